"""Host costs: the floor makes an op's allocations and nothing else, counts are exact, every figure has a row or a
reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import ops
from fastgpt.bench import _harness, _op, host, launches, variants
from fastgpt.bench._harness import Setting
from fastgpt.core import backend

CPU = torch.device("cpu")
MICRO = variants.Shape(layers=2, heads=2, width=32, vocab=65, block=16, batch=4, steps=3)
GRAPHED = [b for b in _op.every() if "both" in b.phases]


@pytest.mark.parametrize("bench", GRAPHED, ids=lambda b: b.op)
def test_the_floor_has_the_outputs_and_gradients_of_the_op(bench: _op.Bench) -> None:
    setting = Setting(bench.tiny, torch.float32, CPU)
    ours = _op.Provider("torch", bench.public, "torch")
    for phase in host.phases_of(bench):
        timed = "forward" if phase == "no_grad" else phase
        with torch.set_grad_enabled(phase != "no_grad"):
            got = bench.job(host.floor(bench, setting, phase), setting, timed, 1).run()
            wanted = bench.job(ours, setting, timed, 1).run()
        got, wanted = ((out if isinstance(out, tuple) else (out,)) for out in (got, wanted))
        assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in wanted]
        assert all(t.requires_grad is (phase == "forward") for t in got)


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_harness, "CPU_SAMPLE", 0.0)
    monkeypatch.setattr(host, "gate", lambda *args: None)


def test_calls_are_measured_against_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    rows = host.call_rows(_op.bench_of("layer_norm"), torch.float32, CPU, 0.0)
    names = {(r["phase"], r["provider"]) for r in rows}
    assert names >= {(phase, p) for phase in host.PHASES for p in ("cpu", "torch", host.FLOOR)}
    least = {r["phase"]: r["us"] for r in rows if r["provider"] == host.FLOOR}
    for r in rows:
        assert r["us_q20"] <= r["us"] <= r["us_q80"]
        assert r["times_floor"] == pytest.approx(r["us"] / least[r["phase"]])
    assert "1.00 x floor" in host.show(rows)
    (step, *_) = host.call_rows(_op.bench_of("adamw"), torch.float32, CPU, 0.0)
    assert step["phase"] == "step" and "times_floor" not in step
    rows = host.call_rows(_op.bench_of("linear"), torch.float32, CPU, 0.0)
    assert {r["phase"] for r in rows} == {"no_grad"} and all("times_floor" in r for r in rows)


def test_a_red_op_shows_no_call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(host, "gate", lambda bench, provider, setting: "error 1.0, allowed 0.1")
    assert host.main("--device cpu --figure call --op swiglu --seconds 0".split()) == 1
    out = capsys.readouterr().out
    line = next(s for s in out.splitlines() if "swiglu forward cpu" in s)
    assert line.endswith("RED, no speed is shown: error 1.0, allowed 0.1") and " us " not in line


def test_an_installed_library_without_a_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(_op.importlib.util, "find_spec", lambda name: name == "liger_kernel" or None)
    rows = host.call_rows(_op.bench_of("swiglu"), torch.float32, CPU, 0.0)
    reasons = {r["phase"]: r["red"] for r in rows if r["provider"] == "liger_kernel"}
    assert reasons == dict.fromkeys(host.PHASES, "its kernels need a CUDA device")


def test_operators_that_compute_are_counted() -> None:
    x = torch.ones(4, 4, requires_grad=True)
    with launches.Counted() as counted:
        y = (x.t().reshape(2, 8) + 1).exp()  # a copy after the transpose, an add, an exp
        torch.empty(3), y.view(16), y.detach()
    assert launches.launches(counted.calls) == (0, 3)
    with launches.Counted() as counted:
        y.sum().backward()  # the sum, autograd's initial 1, a product for exp, a copy of the transposed gradient
    assert launches.launches(counted.calls) == (0, 4)


def test_a_step_of_the_trainer_launches_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(variants.SHAPES, "small", MICRO)
    monkeypatch.setattr(variants, "keep_freed_memory", lambda: None)
    rows = {r["provider"]: r["launches"] for r in host.step_rows(CPU)}
    again = {r["provider"]: r["launches"] for r in host.step_rows(CPU)}
    assert rows == again and 0 < rows["fastgpt"] < rows["torch"]


def test_a_kernel_of_fastgpt_counts_as_what_it_launches() -> None:
    """Backward of a norm is two kernels, as in `fastgpt bench launches`; the operators inside it count for nothing."""
    x, weight = torch.ones(4, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    with launches.Counted() as counted, backend.use(layer_norm="cpu"):
        y = ops.layer_norm(x, weight, weight)
        torch.autograd.grad(y, (x, weight), torch.ones(4, 8))
    own, _ = launches.launches(counted.calls)
    assert own == launches.own_kernels("layer_norm_fwd") + launches.own_kernels("layer_norm_bwd") == 3
    assert launches.own_kernels("embedding_bwd", tokens=1024) == 1 + launches.levels(1024) == 4


def test_imports_are_timed_in_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "IMPORTS", ("torch", "fractions"))
    rows = {r["provider"]: r for r in host.import_rows(CPU, rounds=1)}
    assert rows["torch"]["times_floor"] == 1.0 and rows["fractions"]["ms"] < rows["torch"]["ms"]
    assert rows["torch"]["modules"] > 500 > rows["fractions"]["modules"] > 0
    with pytest.raises(RuntimeError, match="ModuleNotFoundError: No module named 'no_such'"):
        host.fresh("import no_such")


def test_a_fresh_process_does_not_interpret_and_has_empty_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    names = "TRITON_INTERPRET", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
    code = f"import json, os; print(json.dumps([os.environ.get(n) for n in {names!r}] + [os.listdir()]))"
    interpret, inductor, triton, files = host.fresh(code)
    assert interpret is None and files == [] and not Path(inductor).exists() and not Path(triton).exists()


def test_compile_times_or_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh(code: str) -> Any:
        if "torch compile" in code:
            raise RuntimeError("no C++ compiler")
        return {"rope": 0.25, "swiglu": "PTXASError: no"} if "triton_check" in code else 3.5

    monkeypatch.setattr(host, "fresh", fresh)
    rows = {r["provider"]: r for r in host.compile_rows(CPU)}
    assert rows["torch.compile torch"]["red"] == "RuntimeError: no C++ compiler"
    assert rows["torch.compile fastgpt"]["seconds"] == 3.5
    assert rows["triton rope"]["seconds"] == 0.25 and rows["triton swiglu"]["red"] == "PTXASError: no"


def test_a_wheel_has_a_size_and_installs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import zipfile

    wheel, info = tmp_path / "nothing-1.0-py3-none-any.whl", "nothing-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("nothing.py", "x = 1\n" * 1000)
        z.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: nothing\nVersion: 1.0\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    rows_file = tmp_path / "rows.jsonl"
    assert host.main(["--device", "cpu", "--wheel", str(wheel), "--json", str(rows_file)]) == 0
    size, install = (json.loads(line) for line in rows_file.read_text().splitlines())
    assert size["mb"] == pytest.approx(wheel.stat().st_size / 1e6) and install["seconds"] > 0
    assert "wheel" in capsys.readouterr().out
    (absent,) = host.install_rows(tmp_path / "absent.whl", CPU)
    assert "FileNotFoundError" in absent["red"]


def test_a_build_outside_a_checkout_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "ROOT", tmp_path)
    (row,) = host.install_rows(None, CPU)
    assert row["red"].endswith("is not a checkout of fastgpt")


def test_rows_have_provenance_and_one_unit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(host, "fresh", lambda code: [0.5, 10] if "sys.modules" in code else 1.0)
    monkeypatch.setitem(variants.SHAPES, "small", MICRO)
    monkeypatch.setattr(variants, "keep_freed_memory", lambda: None)
    command = ["--device", "cpu", "--op", "swiglu", "--seconds", "0", "--json", str(tmp_path / "rows.jsonl")]
    assert host.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {r["figure"] for r in rows} == set(host.FIGURES)
    assert all(r["machine"][key] for r in rows for key in _harness.PROVENANCE)
    assert all(sum(u in r for u in ("us", "ms", "seconds", "launches")) == 1 for r in rows if "red" not in r)
    assert sys.modules["fastgpt.bench.host"] is host

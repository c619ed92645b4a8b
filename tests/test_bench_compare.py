"""`fastgpt bench compare` and `ab`: a planted slowdown is flagged, identical code is not, and what cannot be
compared is refused."""

import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.bench import _op, ab, compare, results
from fastgpt.bench._harness import Setting, append_rows, provenance
from fastgpt.core.errors import UserError

CPU = torch.device("cpu")
MACHINE = {
    "fastgpt": "0.1.0",
    "commit": "abc",
    "sources": "0123",
    "torch": "2.13.0",
    "device": "cpu",
    "device_name": "Some CPU",
    "threads": 2,
    "date": "2026-11-21T00:00:00+00:00",
}
GPU = {**MACHINE, "device": "cuda:0", "device_name": "NVIDIA H100 80GB HBM3"}


def row(share: float | None = 0.5, ms: float = 1.0, machine: dict[str, Any] = MACHINE, **more: Any) -> dict[str, Any]:
    """Return a row of a fastgpt op; without a share it has no reference."""
    made = {"bench": "layer_norm", "phase": "both", "dtype": "float32", "shape": [1024, 768], "machine": machine}
    made |= {"provider": "cpu", "backend": "cpu", "ms": ms, "ms_q20": 0.9 * ms, "ms_q80": 1.2 * ms}
    if share is not None:
        made |= {"reference": "torch", "relative": share, "relative_q20": share, "relative_q80": share}
        made |= {"relative_low": share}
    return made | more


def judge(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> compare.Pair:
    (pair,), _ = compare.compare(a, b)
    return pair


def test_student_is_what_tables_say() -> None:
    for p, freedom, value in ((0.99, 10, 2.764), (0.995, 30, 2.750), (0.99, 4, 3.747), (0.9999, 14, 4.985)):
        assert compare.student(p, freedom) == pytest.approx(value, rel=0.02)


def runs_of(generator: random.Random, factor: float, deviation: float, number: int) -> list[dict[str, Any]]:
    return [row(0.5 * factor * math.exp(generator.gauss(0, deviation))) for _ in range(number)]


@pytest.mark.parametrize("deviation", [0.005, 0.02, 0.03])
def test_planted_slowdown_is_flagged_and_the_same_code_is_not(deviation: float) -> None:
    """Make 300 comparisons of six runs a side, with processes that differ as much as on a busy machine."""
    generator = random.Random(1)
    verdicts = {
        factor: [
            judge(runs_of(generator, 1, deviation, 6), runs_of(generator, factor, deviation, 6)).verdict
            for _ in range(300)
        ]
        for factor in (1.0, 1.1, 1 / 1.1)
    }
    assert verdicts[1.0].count(compare.SAME) >= 297
    assert verdicts[1.1].count(compare.SLOWER) >= 285 and compare.FASTER not in verdicts[1.1]
    assert verdicts[1 / 1.1].count(compare.FASTER) >= 285


def test_one_noisy_run_does_not_decide_about_ten_percent() -> None:
    pair = judge([row(0.5)], [row(0.55)])
    assert pair.verdict == compare.SAME and "too noisy for the floor" in pair.remark and pair.band > 0.1
    assert judge([row(0.5)], [row(0.65)]).verdict == compare.SLOWER


def test_band_widens_with_the_runs_spread_and_narrows_with_their_number() -> None:
    tight, wide = [row(0.5)] * 6, [row(0.4), row(0.6)] * 3
    assert judge(tight, tight).band < 0.05 < judge(wide, wide).band
    assert judge(tight * 4, tight * 4).band < 0.6 * judge(tight, tight).band


def test_drift_of_the_machine_cancels_in_the_share() -> None:
    """All of B took 40 % longer, and so did the reference."""
    assert judge([row(0.5, ms=1.0)] * 5, [row(0.5, ms=1.4)] * 5).verdict == compare.SAME
    slow = judge([row(0.5, ms=1.0)] * 5, [row(0.55, ms=0.9)] * 5)
    assert slow.verdict == compare.SLOWER and slow.ratio == pytest.approx(1.1) and "torch's" in slow.figure


def test_times_count_where_the_reference_is_another() -> None:
    other = {**MACHINE, "torch": "2.11.0a0+git123.nv25.12"}
    pair = judge([row(0.5, ms=1.0)], [row(0.8, ms=1.1, machine=other)])
    assert pair.figure == "ms" and pair.ratio == pytest.approx(1.1)
    assert judge([row(None, ms=1.0)], [row(None, ms=1.1)]).band > 0.3, "nothing cancels a CPU's drift"


def test_gpu_times_are_judged_at_the_same_clock_only() -> None:
    def side(ms: float, mhz: int) -> list[dict[str, Any]]:
        return [row(None, ms=ms, machine=GPU, gpu={"sm_mhz": mhz})] * 3

    assert judge(side(1.0, 1980), side(1.2, 1965)).verdict == compare.SLOWER
    pair = judge(side(1.0, 1980), side(1.2, 1600))
    assert pair.verdict == compare.UNJUDGED and "clocks differ by 24%" in pair.remark


def test_gpus_need_fewer_runs() -> None:
    assert judge([row(0.5, machine=GPU)], [row(0.55, machine=GPU)]).verdict == compare.SLOWER
    assert judge([row(0.5, machine=GPU)], [row(0.51, machine=GPU)]).verdict == compare.SAME


@pytest.mark.parametrize(
    "other",
    [
        row(0.6, machine=GPU),
        row(0.6, machine={**MACHINE, "threads": 8}),
        row(0.6, dtype="bfloat16"),
        row(0.6, shape=[8, 8]),
        row(0.6, provider="torch", backend=None),
    ],
    ids=["device", "threads", "dtype", "shape", "a baseline"],
)
def test_what_is_not_the_same_thing_is_never_compared(other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="A and B have no fastgpt row in common: A was measured on Some CPU, 2 threads"):
        compare.compare([row()], [other])
    pairs, alone = compare.compare([row(), row(phase="forward")], [row(), other])
    assert len(pairs) == 1 and pairs[0].verdict == compare.SAME
    assert "only in A: layer_norm 1024x768 float32 forward cpu" in alone


def test_a_side_of_several_commits_is_refused() -> None:
    other = row(machine={**MACHINE, "commit": "def"})
    with pytest.raises(UserError, match="B has rows of abc, def; choose one with FILE@COMMIT"):
        compare.compare([row()], [row(), other])
    dirty = [row(machine={**MACHINE, "commit": "abc-dirty", "sources": s}) for s in ("1", "2")]
    with pytest.raises(UserError, match="abc-dirty 1, abc-dirty 2"):
        compare.compare(dirty, [row()])


def test_red_where_there_was_a_figure_is_a_regression() -> None:
    red = {k: v for k, v in row().items() if not k.startswith(("ms", "relative"))} | {"red": "error 3, allowed 1"}
    pair = judge([row()], [red])
    assert pair.verdict == compare.SLOWER and "error 3, allowed 1" in compare.show([pair], [], False)
    assert compare.exit_code([pair]) == 1
    assert judge([red], [row()]).verdict == compare.UNJUDGED


def test_counts_have_no_noise() -> None:
    def kernel(registers: int, spills: int) -> dict[str, Any]:
        about = {"bench": "codegen", "kernel": "layer_norm_fwd_kernel", "arch": "sm_90a", "machine": MACHINE}
        return {**about, "registers": registers, "spill_bytes": spills}

    pairs, _ = compare.compare([kernel(64, 0)], [kernel(63, 8)])
    assert {p.figure: p.verdict for p in pairs} == {"registers": compare.FASTER, "spill_bytes": compare.SLOWER}
    assert "0 -> 8" in compare.show(pairs, [], False)

    def wheel(mb: float) -> dict[str, Any]:
        return {"bench": "host", "figure": "wheel", "provider": "wheel", "mb": mb, "machine": MACHINE}

    verdicts = [compare.compare([wheel(10.0)], [wheel(mb)])[0][0].verdict for mb in (10.1, 10.3)]
    assert verdicts == [compare.SAME, compare.SLOWER]


def planted(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Make every call of fastgpt take `share` longer from now on, by waiting at its end."""
    jobs = _op.jobs

    def slower(run: Callable[[], Any]) -> Callable[[], Any]:
        def again() -> Any:
            start = time.perf_counter()
            out = run()
            end = start + (1 + share) * (time.perf_counter() - start)
            while time.perf_counter() < end:
                pass
            return out

        return again

    def patched(bench: _op.Bench, provider: _op.Provider, *rest: Any) -> list[_op.Job]:
        made = jobs(bench, provider, *rest)
        return made if provider.backend is None else [dataclasses.replace(j, run=slower(j.run)) for j in made]

    monkeypatch.setattr(_op, "jobs", patched)


def test_a_real_slowdown_of_ten_percent_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure an op for real, alternately: unchanged twice, and with 10 % planted; for as many runs as the noise
    requires."""
    monkeypatch.setattr(_op, "host_us", lambda *args: 1.0)
    monkeypatch.setattr(_op, "gate", lambda *args: None)
    bench, setting = _op.bench_of("swiglu"), Setting((64, 1024), torch.float32, CPU)
    found = [p for p in _op.providers(bench, setting) if p.backend or p.name == bench.baseline.name]
    assert any(p.backend for p in found), "the CPU kernels are not built"
    rows: dict[str, list[dict[str, Any]]] = {"base": [], "same": [], "slow": []}
    for number in range(40):
        for name in sorted(rows, reverse=number % 2 == 0):
            with monkeypatch.context() as patch:
                if name == "slow":
                    planted(patch, 0.1)
                rows[name] += _op.measure(bench, setting, ["both"], found, 0.25)
        same, slow = judge(rows["base"], rows["same"]), judge(rows["base"], rows["slow"])
        if number >= 7 and max(same.band, slow.band) < compare.FLOOR:
            break
    assert same.verdict == compare.SAME, same
    assert slow.verdict == compare.SLOWER, slow


def fake_bench(folder: Path, share: float) -> str:
    """Return a 'python' that appends a row with this share to the file of --json instead of measuring."""
    script = folder / f"bench-{share}.py"
    machine = json.dumps({**MACHINE, "commit": str(share)})
    script.write_text(
        "import json, sys\n"
        "path = sys.argv[sys.argv.index('--json') + 1]\n"
        "assert sys.argv[1:5] == ['-m', 'fastgpt.bench.layer_norm', '--shape', '8x8'], sys.argv\n"
        f"row = {row(share)!r} | {{'machine': json.loads({machine!r})}}\n"
        "open(path, 'a').write(json.dumps(row) + chr(10))\n"
        f"open({str(folder / 'order')!r}, 'a').write('{share} ')\n"
    )
    return f"{sys.executable} {script}"


def test_ab_measures_in_turns_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    base, new = fake_bench(tmp_path, 0.5), fake_bench(tmp_path, 0.6)
    monkeypatch.setattr(ab.sys, "executable", str(tmp_path / "new"))
    (tmp_path / "new").write_text(f'#!/bin/sh\nexec {new} "$@"\n')
    (tmp_path / "new").chmod(0o755)
    command = ["--base", base, "--runs", "4", "--out", str(tmp_path / "out"), "layer_norm", "--shape", "8x8"]
    assert ab.main(command) == 1
    assert (tmp_path / "order").read_text().split() == ["0.5", "0.6", "0.6", "0.5"] * 2
    assert "SLOWER       1.200" in capsys.readouterr().out
    with pytest.raises(UserError, match="ended with exit code 1"):
        ab.main([*command[:6], "rms_norm"])
    with pytest.raises(UserError, match="expected a benchmark"):
        ab.main(command[:6])


@pytest.mark.extended
def test_ab_runs_both_sides_and_returns_the_verdict(tmp_path: Path, capsys: Any) -> None:
    """On a busy machine even the same install may differ from itself, so the verdict may be either one."""
    bench = ["bias_gelu", "--device", "cpu", "--shape", "64x768", "--phase", "both", "--seconds", "0.5"]
    code = ab.main(["--base", sys.executable, "--runs", "3", "--out", str(tmp_path), *bench])
    out = capsys.readouterr().out
    assert "3, 3  bias_gelu 64x768" in out and f"1 figures compared: {code} regressions" in out


def test_rows_without_provenance_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"bench": "x", "machine": provenance(CPU)}])
    assert len(results.read_rows([str(path)])) == 1
    for key in ("torch", "device_name", "date", "sources"):
        lacking = {**row(), "machine": {k: v for k, v in MACHINE.items() if k != key}}
        path.write_text(json.dumps(row()) + "\n" + json.dumps(lacking) + "\n")
        with pytest.raises(UserError, match=f"line 2: a row of layer_norm without provenance: no {key}$"):
            results.read_rows([str(path)])
    for text, why in (("{", "line 1 is not JSON"), ("[]", "line 1 is not a row"), ('{"ms": 1}', "line 1 is not a row")):
        path.write_text(text)
        with pytest.raises(UserError, match=why):
            results.read_rows([str(path)])


def test_a_commit_or_a_glob_names_rows(tmp_path: Path) -> None:
    append_rows(tmp_path / "one.jsonl", [row(), row(machine={**MACHINE, "commit": "def0"})])
    append_rows(tmp_path / "two.jsonl", [row(machine={**MACHINE, "commit": None, "sources": "ffff"})])
    both = str(tmp_path / "*.jsonl")
    assert len(results.read_rows([both])) == 3
    assert [r["machine"]["commit"] for r in results.read_rows([f"{both}@def"])] == ["def0"]
    assert len(results.read_rows([f"{both}@ffff"])) == 1
    for name, why in ((f"{both}@fe", "no rows of commit fe"), (str(tmp_path / "three"), "there is no file")):
        with pytest.raises(UserError, match=why):
            results.read_rows([name])


def test_committed_rows_are_readable() -> None:
    folder = Path(__file__).resolve().parent.parent / "bench" / "results"
    rows = results.read_rows([str(folder / "2026-11-21-epyc-2-cores.jsonl")])
    assert len(rows) >= 79
    share = next(results.judged_share(r) for r in rows if r.get("variant") == "fastgpt")
    assert share is not None and share[1] == "torch" and 0.5 < share[0] < 1.5

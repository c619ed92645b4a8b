"""`fastgpt tune`: what it measures, what it refuses, what it saves, and how `auto` uses that."""

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import cli, ops, parity
from fastgpt.bench import _harness, tune
from fastgpt.bench._harness import Samples
from fastgpt.core import backend, fallback
from fastgpt.core.backend import use
from fastgpt.core.cache import machine_facts
from fastgpt.models.config import ModelConfig
from fastgpt.training.config import load_config

CPU = torch.device("cpu")
FP32 = torch.float32
GPT2 = ModelConfig(n_layers=1, n_heads=2, width=32, vocab_size=100, block_size=64)
LLAMA = dataclasses.replace(GPT2, norm="rms", activation="swiglu", positions="rope")
needs_cpu = pytest.mark.skipif(backend.missing("cpu") is not None, reason="the CPU kernels are not built")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the test an empty cache folder, with nothing chosen and nothing read yet."""

    def forget() -> None:
        backend._tuned.clear()
        backend._cache.clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FASTGPT_TUNED", raising=False)
    monkeypatch.setattr(fallback, "_reported", set())
    forget()
    with use(all="auto", strict=False):
        yield tmp_path / "fastgpt"
    forget()


def entry(name: str, note: str = "1.31x cpu") -> dict[str, Any]:
    return {"backend": name, "date": "2026-11-21", "note": note}


def again() -> None:
    """Act as a new process: the table is read again."""
    backend._tuned.clear()
    backend._cache.clear()


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr("sys.argv", ["fastgpt", *argv])
    return cli.main()


@needs_cpu
def test_the_table_decides_where_nothing_was_chosen(cache: Path) -> None:
    x = torch.randn(2, 8)
    assert backend.select("layer_norm", x) == "cpu"
    path = backend.write_tuned("cpu", {"layer_norm.float32": entry("torch")})
    assert path.parent == cache and [p.name for p in cache.iterdir()] == [path.name], "nothing half written is left"
    for _ in range(2):
        assert backend.select("layer_norm", x) == "torch"
        assert backend.explain("layer_norm", "cpu", FP32) == ("torch", "measured")
        assert backend.explain("layer_norm", "cpu", torch.bfloat16) == ("cpu", "prior"), "another dtype"
        assert backend.explain("rms_norm", "cpu", FP32) == ("cpu", "prior"), "another op"
        again()
    with use(layer_norm="cpu"):
        assert backend.explain("layer_norm", "cpu", FP32) == ("cpu", "chosen")
    backend.write_tuned("cpu", {"rms_norm.float32": entry("torch")})
    assert backend.select("layer_norm", x) == "torch" == backend.select("rms_norm", x), "added, not replaced"


@needs_cpu
def test_environment_over_table(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.write_tuned("cpu", {"layer_norm.float32": entry("torch")})
    monkeypatch.setenv("FASTGPT_KERNELS", "layer_norm=cpu")
    with use():
        backend.apply_environment()
        assert backend.explain("layer_norm", "cpu", FP32) == ("cpu", "chosen")
    monkeypatch.delenv("FASTGPT_KERNELS")
    monkeypatch.setenv("FASTGPT_TUNED", "0")
    again()
    assert backend.explain("layer_norm", "cpu", FP32) == ("cpu", "prior")


@needs_cpu
def test_another_machine_has_another_table(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend.write_tuned("cpu", {"layer_norm.float32": entry("torch")})
    facts = machine_facts("cpu")
    assert facts["threads"] == str(torch.get_num_threads()) and facts["device"]
    for name in facts:
        monkeypatch.setattr("fastgpt.core.cache.machine_facts", lambda device, name=name: {**facts, name: "other"})
        again()
        assert backend.explain("layer_norm", "cpu", FP32) == ("cpu", "prior"), name
    backend.write_tuned("cpu", {"layer_norm.float32": entry("cpu")})
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr("fastgpt.core.cache.machine_facts", lambda device: facts)
    again()
    assert backend.explain("layer_norm", "cpu", FP32) == ("torch", "measured"), "each machine has its own"


@needs_cpu
@pytest.mark.parametrize(
    "content, why",
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"facts": {}, "entries": {}}', "it was written for another machine or version"),
        ('{"facts": FACTS, "entries": {"a.b": {"backend": "mlx", "date": "", "note": "x"}}}', "its entry a.b has no"),
        ('{"facts": FACTS, "entries": {"a.b": {"backend": "cpu"}}}', "KeyError: 'date'"),
        ('{"facts": FACTS, "entries": 3}', "AttributeError"),
    ],
)
def test_a_broken_or_foreign_table_is_ignored_in_one_line(
    content: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = backend.write_tuned("cpu", {"layer_norm.float32": entry("torch")})
    path.write_text(content.replace("FACTS", json.dumps(machine_facts("cpu"))), encoding="utf-8")
    again()
    with caplog.at_level(logging.WARNING, "fastgpt"):
        for op in ("layer_norm", "rms_norm", "layer_norm"):
            assert backend.explain(op, "cpu", FP32) == ("cpu", "prior")
    assert len(caplog.records) == 1 and str(path) in caplog.text and why in caplog.text
    assert len(caplog.messages[0].splitlines()) == 1
    backend.write_tuned("cpu", {"layer_norm.float32": entry("torch")})
    assert backend.explain("layer_norm", "cpu", FP32) == ("torch", "measured"), "mended by the next one"


@needs_cpu
def test_a_table_reorders_and_no_more(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    backend.write_tuned("cpu", {f"layer_norm.{t}": entry(n) for t, n in (("float32", "cuda"), ("float64", "cpu"))})
    assert backend.explain("layer_norm", "cpu", FP32) == ("cpu", "prior"), "a CUDA kernel serves no CPU tensor"
    assert backend._select("layer_norm", "auto", "cpu", torch.float64, True) == "torch", "fp64 has no kernel"
    backend.write_tuned("cpu", {"layer_norm.float32": entry("cpu")})
    monkeypatch.setattr(backend, "missing", lambda b: "it is not built" if b == "cpu" else None)
    assert backend._select("layer_norm", "auto", "cpu", FP32, False) == "torch"
    assert "layer_norm: the cpu kernel cannot be used: it is not built" in caplog.text
    with pytest.raises(RuntimeError, match="the cpu kernel cannot be used: it is not built"):
        backend._select("layer_norm", "auto", "cpu", FP32, True)


def test_the_prior_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nothing was measured: CUDA kernels, but Triton's attention, and what only Triton has."""
    monkeypatch.setattr(backend, "refusal", lambda *args: None)
    monkeypatch.setattr(backend, "tuned", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    found = {op: backend._select(op, "auto", "cuda", torch.bfloat16, False) for op in backend.ops()}
    prior = {op: next((b for b in ("cuda", "triton") if b in cells), "torch") for op, cells in backend.ops().items()}
    assert found == {**prior, "attention": "triton"}


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
def test_the_library_s_attention_is_the_prior_from_sm_90_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    """For what it computes exactly and, if requested, deterministically; until another was measured as faster."""
    module = sys.modules["fastgpt.ops.attention"]
    monkeypatch.setattr(backend, "refusal", lambda *args: None)
    monkeypatch.setattr("fastgpt.core.cache.machine_facts", lambda device: {"device": device})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    bf16, name = torch.bfloat16, "sm_" + "".join(map(str, capability))
    picked, why = backend.explain("attention", "cuda", bf16)
    assert picked == "torch" and why.startswith(f"prior: the library's attention on {name} (")
    assert backend.explain("attention", "cuda", FP32) == ("triton", "prior"), "its fp32 runs on no tensor core"
    assert backend.explain("layer_norm", "cuda", bf16) == ("cuda", "prior")
    assert tune.plan(GPT2, 2, 8, "cuda", bf16, ["attention"])[0][0].backends == ["torch", "triton", "cuda"]

    class Query:  # the attributes of a CUDA tensor that the choice reads
        shape, dtype, device, is_cuda = torch.Size((1, 4, 2, 16)), bf16, torch.device("cuda"), True

    options = {**module._DEFAULTS, "return_lse": False, "causal": True}
    assert module._select(Query, Query, options, False) == "torch"
    assert module._select(Query, Query, options, True) == "triton", "its backward is not deterministic"
    for special in ({"window": 2}, {"softcap": 3.0}, {"return_lse": True}, {"kv_lens": 1}, {"dropout_p": 0.1}):
        assert module._select(Query, Query, {**options, **special}, False) == "triton", special
    backend.write_tuned("cuda", {"attention.bfloat16": entry("cuda")})
    assert backend.explain("attention", "cuda", bf16) == ("cuda", "measured")
    assert module._select(Query, Query, options, False) == "cuda"


def test_a_call_unlike_what_was_measured_keeps_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's attention is fastest where its fused kernel applies; its formula, with a T x T matrix, was not
    measured."""
    module = sys.modules["fastgpt.ops.attention"]
    monkeypatch.setitem(backend._table, "attention", {"cpu": backend.Cell(), "torch": backend.Cell()})
    monkeypatch.setattr(backend, "missing", lambda b: None)
    backend.write_tuned("cpu", {"attention.float32": entry("torch")})
    q = torch.randn(1, 4, 2, 16)
    options = {**module._DEFAULTS, "return_lse": False}
    assert module._select(q, q, {**options, "causal": True}, False) == "torch"
    for special in ({"window": 2}, {"softcap": 3.0}, {"return_lse": True}, {"doc_ids": torch.zeros(1, 4).int()}):
        assert module._select(q, q, {**options, **special}, False) == "cpu", special
    assert module._select(q[:, :2], q, {**options, "causal": True}, False) == "cpu", "not square"
    with use(attention="torch"):
        assert module._select(q, q, {**options, "window": 2}, False) == "torch", "chosen is chosen"


@needs_cpu
def test_compiled_code_takes_the_measured_backend() -> None:
    backend.write_tuned("cpu", {"layer_norm.float32": entry("torch"), "rms_norm.float32": entry("cpu")})
    seen: list[str] = []

    def spy(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward

    torch.compiler.reset()
    fn = torch.compile(lambda x: ops.rms_norm(ops.layer_norm(x)), fullgraph=True, backend=spy)
    x = torch.randn(3, 8)
    torch.testing.assert_close(fn(x), ops.rms_norm(ops.layer_norm(x)))
    assert "fastgpt.rms_norm_fwd.cpu" in seen and not [s for s in seen if "layer_norm_fwd" in s], seen


def test_three_percent_displace_and_less_does_not() -> None:
    prior = Samples([1.0, 2.0, 1.0, 4.0, 1.0])
    for gain, chosen in ((0.5, "cpu"), (1.0, "cpu"), (1.029, "cpu"), (1.031, "torch"), (9.0, "torch")):
        other = Samples([s / gain for s in prior.seconds])
        assert tune.choose({"cpu": prior, "torch": other}) == chosen, gain
    assert tune.choose({"torch": prior}) == "torch"
    drift = Samples([0.95, 1.9, 0.95, 3.8, 5.0])  # slower once, faster in most pairs
    assert tune.choose({"cpu": prior, "torch": drift}) == "torch"
    three = {"cuda": prior, "triton": Samples([0.9 * s for s in prior.seconds]), "torch": Samples([0.5] * 5)}
    assert tune.choose(three) == "torch" and tune.compare(three, "torch") == "1.80x triton"
    assert tune.compare(three, "cuda") == "0.50x torch" and tune.compare({"torch": prior}, "torch").startswith(
        "the only"
    )


def test_the_plan_follows_the_model() -> None:
    tasks, skipped = tune.plan(GPT2, 2, 64, "cpu", FP32)
    assert {"rms_norm", "swiglu", "rope"} <= {op for op, why in skipped.items() if why == "this model does not use it"}
    assert {t.op for t in tasks} | set(skipped) == set(backend.ops()) and not {t.op for t in tasks} & set(skipped)
    assert all(t.backends == ["cpu", "torch"] for t in tasks), "on a CPU Triton is left out, interpreter or not"
    by_op = {t.op: t for t in tune.plan(LLAMA, 2, 64, "cpu", FP32)[0]}
    assert not {"layer_norm", "bias_gelu"} & set(by_op)
    if backend.missing("cpu") is None:
        assert by_op["rms_norm"].shape == (128, 32) and by_op["cross_entropy"].shape == (128, 128)
        assert by_op["swiglu"].options == {"activation": "silu"}
        assert [t.op for t in tune.plan(GPT2, 2, 64, "cpu", FP32, ["adamw"])[0]] == ["adamw"]
        assert not tune.plan(GPT2, 2, 64, "cpu", torch.float64)[0], "no kernel takes fp64"


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_harness, "CPU_SAMPLE", 0.0)
    monkeypatch.setattr(_harness, "MOST_SETS", 2)


def task(op: str) -> tune.Task:
    return next(t for t in tune.plan(GPT2, 2, 64, "cpu", FP32, [op])[0])


@needs_cpu
@pytest.mark.parametrize("fast", ["cpu", "torch"])
def test_the_faster_backend_is_chosen(fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    layer_norm = ops.layer_norm

    def slow(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        if backend.select("layer_norm", x) != fast:
            time.sleep(2e-3)
        return layer_norm(x, *args, **options)

    bench = dataclasses.replace(tune.bench_of("layer_norm"), public=slow)
    monkeypatch.setattr(tune, "bench_of", lambda op: bench)
    result = tune.measure(task("layer_norm"), CPU, FP32, 0.0)
    assert result.chosen == fast and not result.refused and set(result.ms) == {"cpu", "torch"}
    assert float(result.note.split("x")[0]) > 1.03 and fast in tune.line(result)


@needs_cpu
def test_a_wrong_backend_is_kept_out_however_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    subject = parity.SUBJECTS["layer_norm"]

    def wrong(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        y, *rest = (out,) if isinstance(out := subject.ours(x, *args, **options), torch.Tensor) else out
        y = 1.001 * y if backend.select("layer_norm", x) == "cpu" else y
        return (y, *rest) if rest else y

    monkeypatch.setitem(parity.SUBJECTS, "layer_norm", dataclasses.replace(subject, ours=wrong))
    result = tune.measure(task("layer_norm"), CPU, FP32, 0.0)
    assert result.chosen == "torch" and list(result.ms) == ["torch"] and result.note == "the only correct one"
    assert result.refused["cpu"].startswith("wrong: ") and "allowed" in result.refused["cpu"]
    assert "cpu is left out: wrong: " in tune.line(result)
    backend.write_tuned("cpu", tune.entries([result], FP32, "tiny"))
    assert backend.explain("layer_norm", "cpu", FP32) == ("torch", "measured")


@needs_cpu
def test_one_that_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    bench = tune.bench_of("layer_norm")

    def job(provider: Any, *args: Any) -> Any:
        if provider.backend in broken:
            raise RuntimeError("out of memory")
        return bench.job(provider, *args)

    monkeypatch.setattr(tune, "bench_of", lambda op: dataclasses.replace(bench, job=job))
    broken = ["cpu"]
    result = tune.measure(task("layer_norm"), CPU, FP32, 0.0)
    assert result.chosen == "torch" and result.refused == {"cpu": "does not run: RuntimeError: out of memory"}
    broken = ["cpu", "torch"]
    result = tune.measure(task("layer_norm"), CPU, FP32, 0.0)
    assert result.chosen is None and "the prior is kept" in tune.line(result)
    assert tune.entries([result], FP32, "tiny") == {}


@needs_cpu
def test_the_command_from_end_to_end(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tune every op that has a CPU kernel and that `tiny` calls, at tiny shapes; then doctor reports it."""
    quick(monkeypatch)
    assert run(monkeypatch, *"tune --config tiny --batch 1 --block 8 --seconds 0 --device cpu".split()) == 0
    out = capsys.readouterr().out
    assert "tiny: B 1 x T 8, float32, on " in out and "swiglu                skipped: this model does not use it" in out
    tasks, _ = tune.plan(ModelConfig(vocab_size=4096, block_size=8), 1, 8, "cpu", FP32)
    (path,) = cache.iterdir()
    written = json.loads(path.read_text())
    assert written["facts"] == machine_facts("cpu")
    assert set(written["entries"]) == {f"{t.op}.float32" for t in tasks} and f"written to {path}" in out
    for name, e in written["entries"].items():
        op = name.split(".")[0]
        assert min(e["ms"].values()) > 0 and e["model"] == "tiny" and not e["refused"]
        assert backend.explain(op, "cpu", FP32) == (e["backend"], "measured")
        assert op in out
    assert run(monkeypatch, "doctor") == 0
    told = capsys.readouterr().out
    for name, e in written["entries"].items():
        if not torch.cuda.is_available():
            assert f"{e['backend']:<7} measured {e['date']} ({e['note']})" in told, name


def test_a_dry_run_measures_and_writes_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "measure", lambda *args: pytest.fail("measured"))
    assert run(monkeypatch, *"tune --config gpt2-124m --dry-run --device cpu".split()) == 0
    out = capsys.readouterr().out
    assert "gpt2-124m: B 1 x T 1024, float32" in out and not cache.exists()
    if backend.missing("cpu") is None:
        assert "cross_entropy         1024x50304          would time cpu, torch" in out


def test_tokens_on_a_cpu_are_limited_unless_asked_for() -> None:
    cfg = load_config(["--config", "gpt2-124m"])
    args = argparse.Namespace(batch=None, block=None)
    assert tune._batch_of(cfg, args, CPU) == (1, 1024)
    assert tune._batch_of(cfg, args, torch.device("cuda")) == (32, 1024)
    assert tune._batch_of(cfg, argparse.Namespace(batch=4, block=None), CPU) == (4, 1024)
    assert tune._batch_of(cfg, argparse.Namespace(batch=None, block=128), CPU) == (8, 128)
    assert tune._batch_of(cfg, argparse.Namespace(batch=3, block=2048), CPU) == (3, 2048)


@pytest.mark.parametrize(
    "argv, why",
    [
        ("--ops layer_norm fft", "there is no op 'fft'; expected some of adamw, "),
        ("--device mps", "device is 'mps', expected auto, cpu, cuda or cuda:N"),
        ("--config no-such", "config is 'no-such'"),
        ("--dtype fp64", "--dtype"),
        ("--batch many", "--batch"),
    ],
)
def test_user_errors_are_one_sentence(
    argv: str, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "tune", *argv.split()) == 2
    err = capsys.readouterr().err
    assert why in err and err.count("\n") == 1


@needs_cpu
def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch)
    (tmp_path / "fastgpt").write_text("a file where the folder should be")
    argv = "tune --config tiny --batch 1 --block 8 --seconds 0 --device cpu --ops layer_norm".split()
    assert run(monkeypatch, *argv) == 2
    assert "the table cannot be written" in capsys.readouterr().err

"""The benchmarks' arithmetic, gate and provenance: no wrong figure may be printed."""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import parity
from fastgpt.bench import (
    OPS,
    _command,
    _harness,
    _op,
    adamw,
    attention,
    cross_entropy,
    embedding,
    layer_norm,
    linear_cross_entropy,
    throughput,
    variants,
)
from fastgpt.bench._harness import Job, Samples, Setting
from fastgpt.core import backend
from fastgpt.ops.layer_norm import layer_norm_torch

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
MICRO = variants.Shape(layers=2, heads=2, width=32, vocab=65, block=16, batch=4, steps=3)


class Clock:
    """A clock that advances only when a job runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def __call__(self) -> float:
        return self.now

    def job(self, name: str, seconds: float, reset: Callable[[], None] | None = None) -> Job:
        def run() -> None:
            self.ran.append(name)
            self.now += seconds

        return Job(run, reset)


def free(name: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def test_quantiles_interpolate_between_sorted_samples() -> None:
    samples = Samples([4.0, 1.0, 3.0, 2.0, 5.0])
    assert [samples.quantile(q) for q in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx([1.0, 1.8, 3.0, 4.2, 5.0])


def test_turns_are_fair() -> None:
    rounds = [_harness.turns(["a", "b", "c"], i) for i in range(6)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert {r[0] for r in rounds} == {"a", "b", "c"} == {r[-1] for r in rounds}


def test_cpu_samples_are_interleaved_and_per_call() -> None:
    clock = Clock()
    make = {"slow": lambda: [clock.job("slow", 2e-3)], "quick": lambda: [clock.job("quick", 1e-4)] * 3}
    samples, errors = _harness.time_cpu(make, free, 0.0, clock)
    assert not errors
    assert samples["slow"].quantile(0.5) == pytest.approx(2e-3)
    assert samples["quick"].quantile(0.5) == pytest.approx(1e-4)
    assert len(samples["slow"].seconds) == len(samples["quick"].seconds) == _harness.LEAST_ROUNDS
    order = [name for name, _ in itertools.groupby(clock.ran[6:])]
    assert order[:4] == ["slow", "quick", "slow", "quick"] and len(order) > _harness.LEAST_ROUNDS


def test_reset_is_untimed_and_comes_before_every_call() -> None:
    clock = Clock()
    resets: list[int] = []

    def reset() -> None:
        resets.append(len(clock.ran))
        clock.now += 5.0

    samples, _ = _harness.time_cpu({"x": lambda: [clock.job("x", 1e-6, reset)]}, free, 0.0, clock)
    assert samples["x"].quantile(0.5) == pytest.approx(1e-6)
    assert resets == list(range(len(clock.ran)))


def test_one_that_fails_does_not_end_the_others() -> None:
    def broken() -> list[Job]:
        raise RuntimeError("no such kernel")

    clock = Clock()
    samples, errors = _harness.time_cpu({"bad": broken, "good": lambda: [clock.job("good", 1.0)]}, free, 0.0, clock)
    assert errors == {"bad": "RuntimeError: no such kernel"} and set(samples) == {"good"}


class FakeCuda:
    """The part of torch.cuda that time_gpu uses, over a fake clock: a graph records what ran and replays it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
        fake, self.clock = self, clock

        class Graph:
            jobs: list[str]
            seconds: float

            def replay(self) -> None:
                clock.ran += self.jobs
                clock.now += self.seconds

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now

            def elapsed_time(self, other: Any) -> float:
                return (other.at - self.at) * 1e3

        @contextlib.contextmanager
        def capture(graph: Graph, stream: Any) -> Any:
            ran, now = len(clock.ran), clock.now
            yield
            graph.jobs, graph.seconds = clock.ran[ran:], clock.now - now
            del clock.ran[ran:]
            clock.now = now

        class Stream:
            def synchronize(self) -> None:
                pass

        for name, value in {"CUDAGraph": Graph, "Event": Event, "graph": capture, "Stream": Stream}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: fake.pause())
        monkeypatch.setattr(_harness.time, "perf_counter", clock)

    def pause(self) -> None:
        self.clock.now += 1.0


def test_gpu_samples_come_from_interleaved_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    FakeCuda(monkeypatch, clock)
    resets: list[str] = []
    make = {
        "a": lambda: [clock.job("a", 1e-5), clock.job("a", 1e-5)],
        "b": lambda: [clock.job("b", 2e-3, lambda: resets.append("b"))],
    }
    samples, errors = _harness.time_gpu(make, free, 0.0)
    assert not errors
    assert samples["a"].quantile(0.5) == pytest.approx(1e-5)  # 15 passes over both sets take 0.3 ms, 10 us per call
    assert samples["b"].quantile(0.5) == pytest.approx(2e-3)
    replays = clock.ran[4 * 2 + 4 :]
    order = [name for name, _ in itertools.groupby(replays)]
    assert order[:3] == ["a", "b", "a"] and replays.count("a") == 30 * _harness.LEAST_ROUNDS
    assert len(resets) == replays.count("b") == _harness.LEAST_ROUNDS


def test_input_sets_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_harness, "cache_bytes", lambda device: 60 << 20)
    assert _harness.count_sets(50 << 20, CPU) * (50 << 20) >= 2 * (60 << 20)
    assert _harness.count_sets(1 << 33, CPU) == 1
    assert _harness.count_sets(100, CPU) == _harness.MOST_SETS


def test_bytes_are_counted_as_the_files_say() -> None:
    n, c, v = 10, 16, 40
    bf16, fp32 = torch.bfloat16, torch.float32
    norm = layer_norm.bytes_moved((n, c), bf16, "forward")
    assert norm == 4 * n * c * 2 + 2 * c * 2 + 2 * n * 4
    both = [layer_norm.bytes_moved((n, c), bf16, phase) for phase in ("forward", "backward", "both")]
    assert both[2] == both[0] + both[1]
    assert cross_entropy.bytes_moved((n, v), fp32, "both") == 2 * n * v * 4 + 20 * n
    assert adamw.bytes_moved((12, 768, 50304), fp32, "step") == 32 * (124_439_808 + 47 * 768)  # GPT-2, padded table
    assert adamw.bytes_moved((1, 4096, 1), fp32, "step") == 32 * 4096 * (12 * 4096 + 16)
    assert embedding.bytes_moved((2, 5, n, v), bf16, "both") == 2 * n * (30 + 10 + v) + 160


def test_flops_are_counted_as_the_files_say() -> None:
    phases = ("forward", "backward", "both")
    assert [attention.flops((2, 1024, 12, 4, 64), p) / (4 * 2 * 12 * 1024**2 * 64) for p in phases] == [0.5, 1.25, 1.75]
    assert [linear_cross_entropy.flops((3, 5, 7), p) / 105 for p in phases] == [2, 4, 6]
    flops = 3.7e12
    job, scale = _harness.gemm_job(1e6, Setting((1, 1), torch.float32, CPU), 1)
    assert job.run().shape == (64, 64) and scale == pytest.approx(1e6 / (2 * 64**3))
    row = _op._figures(Samples([1e-2]), moved=1, floor=5e-3, flops=flops, best=_op.GEMM)
    assert row["tflop_s"] == pytest.approx(370) and row["pct_of_gemm"] == pytest.approx(50)
    machine = _harness.provenance(CPU)
    text = _op.show([{"phase": "both", "provider": "cpu", "backend": "cpu", "machine": machine, **row}])
    assert "TFLOP/s  % gemm" in text and "     370    50.0" in text


def test_copy_moves_as_many_bytes() -> None:
    job = _harness.copy_job(8000, Setting((1, 1), torch.float32, CPU), 1)
    assert job.run().nbytes * 2 == 8000


def test_figures_divide_bytes_by_the_median() -> None:
    row = _op._figures(Samples([1e-3, 2e-3, 3e-3]), moved=8_000_000, floor=1e-3)
    assert row["ms"] == pytest.approx(2.0) and row["gb_s"] == pytest.approx(4.0)
    assert row["pct_of_copy"] == pytest.approx(50.0)


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_harness, "CPU_SAMPLE", 0.0)
    monkeypatch.setattr(_op, "host_us", lambda *args: 1.0)


def test_every_op_has_a_bench() -> None:
    assert set(OPS) == set(backend.ops()) and [b.op for b in _op.every()] == list(OPS)
    for bench in _op.every():
        assert all(len(s) == len(bench.dims.split("x")) for ss in bench.shapes.values() for s in (*ss, bench.tiny))


@pytest.mark.parametrize("bench", _op.every(), ids=lambda b: b.op)
def test_every_phase_of_every_provider_has_a_figure(bench: _op.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    setting = Setting(bench.tiny, torch.float32, CPU)
    providers = _op.providers(bench, setting)
    rows = _op.measure(bench, setting, list(bench.phases), providers, 0.0)
    assert not [r["red"] for r in rows if "red" in r]
    assert {p.backend for p in providers} >= {b for b in backend.ops()[bench.op] if b == "cpu"}
    best = _op.COPY if bench.flops is None else _op.GEMM
    wanted = {(phase, p.name) for p in providers for phase in bench.phases if phase in p.phases}
    assert {(r["phase"], r["provider"]) for r in rows} == wanted | {(phase, best) for phase in bench.phases}


@pytest.mark.parametrize("bench", [b for b in _op.every() if "both" in b.phases], ids=lambda b: b.op)
def test_a_baseline_computes_what_fastgpt_does(bench: _op.Bench) -> None:
    """The job of `both` gives the same gradients with every provider; otherwise their times would not be comparable."""
    setting = Setting(bench.tiny, torch.float32, CPU)
    ours = bench.job(_op.Provider("torch", bench.public, "torch"), setting, "both", 3).run()
    for provider in _op.providers(bench, setting):
        if not provider.in_step:
            theirs = bench.job(provider, setting, "both", 3).run()
            torch.testing.assert_close(theirs, ours, rtol=2e-4, atol=2e-5)


def test_the_form_that_a_step_calls_is_timed_as_well() -> None:
    q, k, v, d = 4, 2, 2, 16
    setting = Setting((1, 3, q, k, d), torch.float32, CPU)
    suffix, fn = attention.BENCH.in_step or ("", None)
    (dqkv,) = attention.job(_op.Provider(suffix, fn, "torch", in_step=True), setting, "both", 1).run()
    assert suffix == "packed" and dqkv.shape == (1, 3, q + k + v, d)


def test_max_autotune_and_compile_are_baselines_of_their_own() -> None:
    setting = Setting((4, 8), torch.float32, CPU)
    names = [p.name for p in _op.providers(layer_norm.BENCH, setting, ("default", "max-autotune-no-cudagraphs"))]
    assert names[-2:] == ["torch.compile", "compile max-autotune"]
    modes = _op.providers(adamw.BENCH, Setting(adamw.BENCH.tiny, torch.float32, CPU), ("default",))
    assert not [p for p in modes if "compile" in p.name], "a fused optimizer is one launch already"


def test_libraries_are_baselines_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_setting = Setting((4, 8), torch.float32, torch.device("cuda"))
    monkeypatch.setattr(_op.importlib.util, "find_spec", lambda name: name == "json")
    assert [p.name for p in _op.installed(gpu_setting, json=len, no_such_library=len)] == ["json"]
    assert _op.installed(Setting((4, 8), torch.float32, CPU), json=len) == []


def test_a_baseline_that_cannot_run_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*args: Any, **options: Any) -> Any:
        raise RuntimeError("No available kernel")

    quick(monkeypatch)
    bench = dataclasses.replace(layer_norm.BENCH, others=lambda setting: [_op.Provider("sdpa cudnn", absent)])
    assert _command.main(bench, "--device cpu --shape 4x33 --seconds 0 --phase forward".split()) == 0
    assert "not measured: RuntimeError: No available kernel" in capsys.readouterr().out


def test_costs_that_fail_leave_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(_op, "host_us", lambda *args: 1 / 0)
    setting = Setting((4, 8), torch.float32, CPU)
    rows = _op.measure(layer_norm.BENCH, setting, ["forward"], [_op.Provider("torch", layer_norm_torch)], 0.0)
    assert rows[0]["ms"] > 0 and rows[0]["costs_failed"] == "ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in _op.show(rows)


def test_no_parity_cases_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(parity.SUBJECTS, "layer_norm")
    provider = _op.Provider("cpu", layer_norm.BENCH.public, "cpu")
    why = _op.gate(layer_norm.BENCH, provider, Setting((4, 8), torch.float32, CPU))
    assert why == "layer_norm has no parity cases"


def wrong_layer_norm(*args: Any, **options: Any) -> Any:
    out = layer_norm_torch(*args, **options)
    return tuple(1.001 * t for t in out) if isinstance(out, tuple) else 1.001 * out


def test_a_wrong_op_prints_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    quick(monkeypatch)
    truth = parity.SUBJECTS["layer_norm"]
    monkeypatch.setitem(parity.SUBJECTS, "layer_norm", dataclasses.replace(truth, ours=wrong_layer_norm))
    wrong = _op.Provider("wrong", wrong_layer_norm, backend="torch")
    right = _op.Provider("torch", layer_norm_torch)
    monkeypatch.setattr(_command, "providers", lambda bench, setting, modes: [wrong, right])
    command = ["--device", "cpu", "--shape", "4x33", "--seconds", "0", "--phase", "forward"]
    assert _command.main(layer_norm.BENCH, [*command, "--json", str(tmp_path / "rows.jsonl")]) == 1
    line = next(s for s in capsys.readouterr().out.splitlines() if " wrong " in s)
    assert "RED, no speed is shown" in line and "allowed" in line
    rows = [json.loads(s) for s in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r["provider"] for r in rows if "ms" in r] == ["torch", _op.COPY]


def test_rows_carry_provenance_or_are_refused(tmp_path: Path) -> None:
    machine = _harness.provenance(CPU)
    assert all(machine[key] for key in _harness.PROVENANCE)
    _harness.append_rows(tmp_path / "a.jsonl", [{"bench": "x", "machine": machine}])
    _harness.append_rows(tmp_path / "a.jsonl", [{"bench": "y", "machine": machine}])
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [r["bench"] for r in rows] == ["x", "y"] and rows[0]["machine"]["date"] == machine["date"]
    with pytest.raises(ValueError, match="a row of x has no device_name, date in 'machine'"):
        lacking = {k: v for k, v in machine.items() if k not in ("date", "device_name")}
        _harness.append_rows(tmp_path / "a.jsonl", [{"bench": "x", "machine": lacking}])


def test_shape_on_the_command_line() -> None:
    assert _command.parse_shape("NxC", "8192x768") == (8192, 768)
    assert _command.parse_shape(attention.BENCH.dims, "1x2x3x4x5") == (1, 2, 3, 4, 5)
    for text in ("768", "8x0", "8x-1", "1x2x3"):
        with pytest.raises(Exception, match=f"'{text}' is not a shape, expected 2 numbers NxC"):
            _command.parse_shape("NxC", text)


@pytest.fixture
def micro(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run throughput at a shape that takes milliseconds, in this process."""
    monkeypatch.setitem(variants.SHAPES, "small", MICRO)
    cfg, data = variants.settings(MICRO, CPU), variants.batches(MICRO, CPU)
    monkeypatch.setattr(variants, "Apart", lambda name, shape: variants.build(name, cfg, data))
    monkeypatch.setattr(variants, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(throughput, "peak_flops", lambda *args: (1e12, "measured"))
    return ["--device", "cpu"]


def test_throughput_compares_equal_losses(micro: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert throughput.main([*micro, "--ablation", "--json", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [r["variant"] for r in rows][:2] == ["torch", "fastgpt"]
    ours = rows[1]
    assert len(ours["losses"]) == variants.WARM_STEPS + MICRO.steps
    assert not {"fastgpt -rms_norm", "fastgpt -swiglu", "fastgpt -cross_entropy"} & {r["variant"] for r in rows}
    assert ours["losses"][0] != ours["losses"][-1] and ours["loss_gap"] <= ours["loss_tolerance"]
    assert ours["tokens_per_s"] == pytest.approx(MICRO.batch * MICRO.block / ours["ms"] * 1e3)
    assert ours["speed_vs_torch"][0] > 0 and 0 < ours["mfu_causal"]
    assert all(ours["machine"][key] for key in _harness.PROVENANCE)
    assert "losses agree" in capsys.readouterr().out


def test_throughput_shows_no_speed_for_other_losses(
    micro: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = variants.build

    def tampered(name: str, *args: Any) -> variants.Variant:
        v = build(name, *args)
        step = v.step
        if name == "fastgpt":
            v.step = lambda rate: step(1.1 * rate)  # a schedule that is 10 % off
        return v

    monkeypatch.setattr(variants, "build", tampered)
    assert throughput.main([*micro, "--ablation"]) == 1
    out = capsys.readouterr().out
    assert "\nfastgpt: loss of fastgpt at step" in out and "\nfastgpt  " not in out, "no speed"
    assert "\ntorch  " in out and "\nfastgpt -layer_norm  " in out, "the others have theirs"


@pytest.mark.parametrize("at", ["build", "step"])
@pytest.mark.parametrize("name", ["torch", "fastgpt"])
def test_a_variant_that_fails_costs_itself_alone(
    name: str, at: str, micro: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A failing variant loses its own row; only a failing reference removes all speeds, as nothing shows who is
    right."""
    build = variants.build

    def broken(built: str, *args: Any) -> variants.Variant:
        if at == "build" and built == name:
            raise RuntimeError("no such\n  kernel")
        v = build(built, *args)
        step, due = v.step, variants.WARM_STEPS + 2
        if built == name:
            v.step = lambda rate: step(rate) if len(v.losses) < due else 1 / 0  # type: ignore[return-value]
        return v

    monkeypatch.setattr(variants, "build", broken)
    rows = tmp_path / "rows.jsonl"
    assert throughput.main([*micro, "--variant", "fastgpt", "--variant", "fastgpt -adamw", "--json", str(rows)]) == 1
    found = {r["variant"]: r for r in map(json.loads, rows.read_text().splitlines())}
    why = "RuntimeError: no such kernel" if at == "build" else "ZeroDivisionError: division by zero"
    assert "ms" not in found[name] and found[name]["red"] == why and len(found) == 3
    if name == "torch":
        assert found["fastgpt"]["red"] == f"{why} (torch is the reference for the losses)"
    else:
        assert found["torch"]["ms"] > 0 and found["fastgpt -adamw"]["speed_vs_torch"]


def test_rows_are_written_before_energy_is_measured(
    micro: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, seen = tmp_path / "rows.jsonl", []

    def meter(device: torch.device) -> float:
        seen.append(len(path.read_text().splitlines()))
        return 2.0 * len(seen)

    monkeypatch.setattr(throughput, "ENERGY_OF", ("fastgpt",))

    monkeypatch.setattr(throughput, "joules_per_token", lambda v, *args: meter(CPU))
    assert throughput.main([*micro, "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert seen == [2] and [(r["bench"], r["variant"]) for r in rows[2:]] == [("energy", "fastgpt")]


@pytest.mark.parametrize("llama", [False, True])
def test_ablations_are_of_ops_that_a_step_calls(llama: bool) -> None:
    shape = dataclasses.replace(MICRO, llama=llama)
    cfg = variants.settings(shape, CPU)
    variant = variants.build("fastgpt", cfg, variants.batches(shape, CPU))
    backend._cache.clear()
    variant.train(cfg, 1)
    assert throughput.called_ops(cfg.model) == {key[0] for key in backend._cache}


@pytest.mark.skipif(backend.missing("cpu") is not None, reason="needs the compiled CPU kernels")
def test_own_kernels_have_a_row_where_the_library_s_op_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    args = throughput.argparse.Namespace(variant=None, compile=False, ablation=False)
    assert throughput.variant_names(args, MICRO, CPU) == ["torch", "fastgpt"]
    monkeypatch.setattr(backend, "tuned", lambda op, *_: {"backend": "torch"} if op == "attention" else None)
    assert throughput.variant_names(args, MICRO, CPU) == ["torch", "fastgpt", "fastgpt own"]
    cfg = variants.settings(MICRO, CPU)
    chosen = variants.build("fastgpt own", cfg, variants.batches(MICRO, CPU)).kernels
    with backend.use(**chosen):
        served = throughput.kernels(CPU, torch.float32)
    assert served["attention"] == "cpu"
    assert served == {op: "cpu" if "cpu" in cells else "torch" for op, cells in backend.ops().items()}


def test_own_kernels_of_a_gpu_are_the_first_that_run_there(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {("attention", "triton"), ("swiglu", "cuda"), ("swiglu", "triton")}
    monkeypatch.setattr(backend, "refusal", lambda op, b, *_: "no" if (op, b) in refused else None)
    found = variants.own_kernels(torch.device("cuda"), torch.bfloat16)
    assert (found["attention"], found["rms_norm"]) == ("cuda", "cuda") and "swiglu" not in found
    refused.remove(("attention", "triton"))
    assert variants.own_kernels(torch.device("cuda"), torch.bfloat16)["attention"] == "triton"


def test_memory_of_replayed_steps_is_what_they_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay allocates nothing; its pool shows only as reserved memory."""
    held = {"allocated": 50, "reserved": 70, "cached": 0}

    class Fake:
        def train(self, cfg: object, steps: int) -> None:
            held["cached"] = 500  # left by warm-up and freed by empty_cache

    def build(name: str, cfg: object, data: object) -> Any:
        held["allocated"] += 2
        held["reserved"] += 29 if name.endswith(" graphs") else 3
        return Fake()

    monkeypatch.setattr(variants, "build", build)
    monkeypatch.setattr(variants, "batches", lambda shape, device: [])
    counters: dict[str, Callable[[], Any]] = {
        "memory_allocated": lambda: held["allocated"] * 10**6,
        "max_memory_allocated": lambda: (held["allocated"] + 19) * 10**6,
        "memory_reserved": lambda: (held["reserved"] + held["cached"]) * 10**6,
        "empty_cache": lambda: held.update(cached=0),
        "reset_peak_memory_stats": lambda: None,
    }
    for name, counter in counters.items():
        monkeypatch.setattr(torch.cuda, name, counter)
    cfg = dataclasses.replace(variants.settings(MICRO, CPU), device="cuda")
    found, failed = variants.prepare(["fastgpt", "fastgpt graphs"], cfg, MICRO)
    assert [v.peak_mb for v in found] == [21, 29] and not failed


def test_throughput_shows_no_speed_over_a_red_op(
    micro: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "red_ops", lambda *args: ["layer_norm on cpu: off"])
    assert throughput.main(micro) == 1
    assert "no speed is shown: layer_norm on cpu: off" in capsys.readouterr().out


def test_every_op_that_the_model_uses_is_gated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "gate", lambda bench, provider, setting: f"off at {setting.shape}")
    found = throughput.red_ops(variants.settings(MICRO, CPU), torch.float32)
    served = {op for op in backend.ops() if backend.explain(op, "cpu", torch.float32)[0] != "torch"}
    other = {"rms_norm", "swiglu", "rope", "linear", "attention_decode", "linear_divergence"}
    assert {line.split()[0] for line in found} == served - other
    if "layer_norm" in served:
        assert "layer_norm on cpu: off at (16, 32)" in found


def test_a_variant_in_a_process_of_its_own() -> None:
    """The losses are the same as in this process; its memory is its own: 1.6 million parameters take 25 MB with
    gradients and moments."""
    shape = variants.Shape(layers=2, heads=2, width=256, vocab=65, block=16, batch=4, steps=3)
    cfg = variants.settings(shape, CPU)
    apart, here = variants.Apart("torch", shape), variants.build("torch", cfg, variants.batches(shape, CPU))
    for steps in (variants.WARM_STEPS, 1):
        assert apart.train(cfg, steps) > 0
        here.train(cfg, steps)
    apart.close()
    assert apart.process.exitcode == 0
    torch.testing.assert_close(torch.stack(apart.losses), torch.stack(here.losses))
    if Path("/proc/self/status").exists():
        assert 20 < apart.peak_mb < 500


def test_a_sample_that_lost_its_core_does_not_count() -> None:
    mine = Samples([1.0] * 8 + [9.0, 9.0], cut={8, 9})
    row = mine.figures()
    assert row["ms_q80"] == 1e3 and (row["samples"], row["cut_samples"]) == (8, 2)
    assert Samples([1.0, 9.0], cut={1}).quantile(1.0) == 9.0, "too few are left: all count"
    other = Samples([2.0] * 10, cut={0})
    assert mine.shares(other).cut == {0, 8, 9} and mine.shares(other).quantile(1.0) == 0.5


def test_preempted_rounds_are_told_from_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, count = Clock(), itertools.count()
    monkeypatch.setattr(
        _harness, "preemptions", lambda: (1 + next(count)) // 10
    )  # grows within a sample, in the fifth round
    samples, _ = _harness.time_cpu({"x": lambda: [clock.job("x", 1e-3)]}, free, 0.0, clock)
    assert samples["x"].cut == {4}
    assert len(samples["x"].seconds) >= _harness.LEAST_ROUNDS


def test_inputs_are_made_anew_and_a_share_is_the_median_over_them() -> None:
    clock, made = Clock(), itertools.count()
    make = {"a": lambda: [clock.job("a", (1e-3, 1e-3, 5e-3, 1e-3)[next(made)])], "b": lambda: [clock.job("b", 2e-3)]}
    samples, _ = _harness.time_cpu(make, free, 1.0, clock)
    assert next(made) == _harness.BLOCKS and len(samples["a"].blocks()) == _harness.BLOCKS
    assert [round(s.quantile(0.2), 6) for s in samples["a"].blocks()] == [1e-3, 1e-3, 5e-3, 1e-3]
    assert samples["a"].against(samples["b"], "b")["relative_low"] == pytest.approx(0.5)

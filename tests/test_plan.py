"""The memory plan of a run against what is saved and allocated; the choice of a micro-batch; errors; the command."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import ops, train
from fastgpt.bench.variants import train_step
from fastgpt.core import backend
from fastgpt.core.backend import use
from fastgpt.core.cards import CARDS, datasheet_peak
from fastgpt.core.command import run_command
from fastgpt.core.device import total_memory
from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.ops import _linear_cross_entropy
from fastgpt.optim.muon import MuonAdamW
from fastgpt.training import memory, plan
from fastgpt.training.build import build_model, build_optimizer
from fastgpt.training.config import TrainConfig, load_config
from fastgpt.training.memory import LEVELS, Plan, Target, shape_of
from fastgpt.training.task import Batch, NextToken, mean_over

CPU = Target("cpu", "cpu", 16 << 30)
needs_cpu = pytest.mark.skipif(backend.missing("cpu") is not None, reason="needs the compiled CPU kernels")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GPT2: dict[str, Any] = dict(n_layers=3, n_heads=4, width=64, vocab_size=1000)
LLAMA = GPT2 | dict(n_kv_heads=2, mlp_width=160, norm="rms", activation="swiglu", positions="rope", tied=False)
LLAMA |= dict(qkv_bias=False, proj_bias=False, mlp_bias=False)
DROPOUT = dict(attn_dropout=0.1, resid_dropout=0.1, embed_dropout=0.1)
ROPE = dict(positions="rope", rotary_dim=8, tied=False)
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2 with dropout": GPT2 | DROPOUT,
    "llama": LLAMA,
    "llama with dropout": LLAMA | DROPOUT,
    "qwen": LLAMA | dict(qk_norm=True),
    "neox": GPT2 | ROPE | dict(parallel="separate"),
    "gptj": GPT2 | ROPE | dict(parallel="shared", rope_interleaved=True, head_bias=True),
    "gpt1": GPT2 | dict(norm_placement="post", activation="gelu"),
    "relu2": LLAMA | dict(activation="relu2", qk_norm=True, norm="layer"),
}
WIDE = dict(width=512, n_layers=3, n_heads=8, vocab_size=3000)  # matrices large enough to keep their gradients


def settings(model: dict[str, Any], dtype: str = "fp32", b: int = 4, t: int = 64, **more: Any) -> TrainConfig:
    """Return settings with two micro-batches a step, so the second one adds to the first one's gradients."""
    sizes = dict(block_size=t, micro_batch=b, batch_tokens=2 * b * t)
    return TrainConfig(model=ModelConfig(**model), dtype=dtype, device="cpu", **{**sizes, **more})  # type: ignore[arg-type]


def planned(cfg: TrainConfig, target: Target = CPU, gpus: int = 1) -> Plan:
    return memory.plan(cfg, shape_of(cfg), target, gpus)


def saved_bytes(cfg: TrainConfig) -> int:
    """Return the bytes of distinct storages that a forward pass saves for backward; without parameters, tables and
    ids."""
    model = build_model(cfg, int(cfg.model.vocab_size or 0), torch.device("cpu"))
    ids = torch.randint(1000, (cfg.sequences, cfg.block_size))
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), ids)}
    kept: dict[int, torch.Tensor] = {}  # keeps the tensors too, so no address is reused

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(ids, ids, reduction="sum")
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def head_bytes(cfg: TrainConfig) -> int:
    """Return what forward saves for the part `loss`: the last norm's input and statistics, its output, dlogits."""
    m, n, w = cfg.model, cfg.sequences * cfg.block_size, DTYPES[cfg.dtype].itemsize
    norm = n * (w * m.width + (8 if m.norm == "layer" else 4)) if m.norm_placement == "pre" else 0
    return norm + n * w * (m.width + m.padded_vocab_size)


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_exact(name: str, dtype: str) -> None:
    """Exact to the byte with fastgpt's kernels; PyTorch's ops keep at least as much (fp32: the same or more; T x T
    matrices)."""
    cfg = settings(MODELS[name], dtype)
    expected = planned(cfg).activations + head_bytes(cfg)
    assert saved_bytes(cfg) == expected
    with use(all="torch"):
        assert saved_bytes(cfg) >= expected


@needs_cpu
def test_activations_grow_with_tokens_alone() -> None:
    one, two = (saved_bytes(settings(LLAMA, b=b, t=t)) for b, t in ((4, 64), (2, 128)))
    assert one == two


def peak_of(work: Any) -> tuple[int, int]:
    """Return the peak of the bytes that `work` has allocated on the CPU, and the bytes that remain."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    nodes = list(seen.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    events = []
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children)
        if node.name == "[memory]":
            events.append((node.start_time_ns, node.extra_fields.alloc_size))
    live = top = 0
    for _, size in sorted(events, key=lambda e: e[0]):
        live += size
        top = max(top, live)
    return top, live


def step_bytes(cfg: TrainConfig) -> tuple[int, int]:
    """Return (peak of a training step beyond parameters and optimizer state, bytes of AdamW's state)."""
    model = build_model(cfg, int(cfg.model.vocab_size or 0), torch.device("cpu"))
    optimizer = build_optimizer(cfg, model)
    ids = torch.randint(1000, (cfg.sequences, cfg.block_size))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield ids, ids

    def step() -> None:
        train_step(model, optimizer, batches(), cfg.accumulation)  # type: ignore[arg-type]

    step()
    gc.collect()
    gc.disable()
    try:
        top, left = peak_of(step)
    finally:
        gc.enable()
    assert abs(left) < 100, "nothing stays"
    buffers = sum(p.grad_buffer.nbytes for p in model.parameters() if hasattr(p, "grad_buffer"))
    state = {t.untyped_storage().data_ptr(): t for s in optimizer.state.values() for t in s.values()}
    return top + buffers, sum(t.untyped_storage().nbytes() for t in state.values())


def over_fixed(p: Plan) -> int:
    return p.gradients + p.activations + max(p.loss, p.block)


@needs_cpu
@pytest.mark.parametrize(
    ("name", "level", "dtype"),
    [
        *(("gpt2", level, "fp32") for level in LEVELS),
        *(("llama", level, "fp32") for level in LEVELS),
        ("gpt2 with dropout", "none", "fp32"),
        ("gpt2 with dropout", "block", "fp32"),
        ("gpt2", "none", "bf16"),
        ("qwen", "norms", "fp32"),
        ("gpt1", "block", "fp32"),
        ("gptj", "block", "fp32"),
    ],
)
def test_peak_of_a_step(name: str, level: Any, dtype: str) -> None:
    """The peak of a step beyond parameters, gradients and optimizer matches the allocator's within 2 %."""
    wide = MODELS[name] | WIDE | (dict(mlp_width=1408) if "mlp_width" in MODELS[name] else {})
    cfg = settings(wide, dtype, recompute=level)
    expected = over_fixed(planned(cfg))
    got, state = step_bytes(cfg)
    assert abs(expected / got - 1) < 0.02, (expected, got)
    assert state == planned(cfg).moments + planned(cfg).masters


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_peak_of_a_step_in_chunks(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that exceed their share: dW in fp32 over all chunks, twice in backward."""
    monkeypatch.setattr(_linear_cross_entropy, "share_for_logits", lambda gpu: 1 << 20)
    monkeypatch.setattr(_linear_cross_entropy, "_budgets", {})
    cfg = settings(GPT2 | WIDE, dtype)
    expected, whole = over_fixed(planned(cfg)), planned(replace(cfg, micro_batch=1)).loss
    got, _ = step_bytes(cfg)
    assert abs(expected / got - 1) < 0.02, (expected, got)
    assert whole < planned(cfg).loss


@needs_cpu
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen"])
def test_validation_is_beside_the_graphs_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass without gradients allocates less than the plan's figure, which counts where graphs are used."""
    monkeypatch.setattr(_linear_cross_entropy, "share_for_logits", lambda gpu: 1 << 29)
    cfg = settings(MODELS[name] | WIDE, batch_tokens=4 * 64)
    shape = shape_of(cfg)
    target = Target("card", "cuda", 16 << 30)
    on, off = (memory.plan(replace(cfg, graphs=graphs), shape, target) for graphs in (True, False))
    assert on.peak == off.peak == off.needed < on.needed == on.peak + on.validation
    assert planned(cfg).validation == memory.plan(replace(cfg, optimizer="muon"), shape, target).validation == 0
    card = Target("between", "cuda", int((on.needed + off.needed) / 2 / (1 - memory.SPARE["cuda"])))
    sizes = [plan.largest_micro_batch(replace(cfg, graphs=graphs), shape, card) for graphs in (True, False)]
    assert sizes[0] < cfg.sequences == sizes[1]
    model = build_model(cfg, int(cfg.model.vocab_size or 0), torch.device("cpu"))
    ids = torch.randint(1000, (cfg.sequences, cfg.block_size))
    top, _ = peak_of(lambda: mean_over(NextToken(), model, [Batch(ids, ids)]))
    assert 0.5 * on.validation < top <= memory.validation_bytes(cfg, ids.numel(), 4, CPU)


@pytest.mark.parametrize("master", ["fp32", "remainder", "stochastic", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_and_state_are_exact(master: Any, dtype: str) -> None:
    cfg = settings(LLAMA, dtype, master=master)
    model = build_model(cfg, 1000, torch.device("cpu"))
    optimizer = build_optimizer(cfg, model)
    model(*[torch.randint(1000, (2, 8))] * 2).backward()
    optimizer.step()
    state = {t.untyped_storage().data_ptr(): t for s in optimizer.state.values() for t in s.values()}
    p = planned(cfg)
    assert p.masters + p.moments == sum(t.untyped_storage().nbytes() for t in state.values())
    weights = sum(w.nbytes for w in model.parameters())
    tables = sum(b.nbytes for b in model.buffers())
    assert p.gradients == weights and p.parameters == weights + tables + 2 * 8 * cfg.batch_tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_muons_state_is_exact(dtype: str) -> None:
    cfg = settings(LLAMA, dtype, optimizer="muon")
    model = build_model(cfg, 1000, torch.device("cpu"))
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, MuonAdamW)
    model(*[torch.randint(1000, (2, 8))] * 2).backward()
    optimizer.step()
    tensors = [t for s in optimizer.state.values() for t in s.values()]
    state = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    p = planned(cfg)
    assert p.masters + p.moments == sum(state.values())


@needs_cpu
@pytest.mark.parametrize(("name", "tokens"), [("gpt2", 256), ("gpt2", 32), ("llama", 256), ("llama", 32)])
def test_peak_of_a_step_of_one_micro_batch(name: str, tokens: int) -> None:
    """Gradients are allocated as activations are freed: with many tokens backward peaks at its start, with few at
    its end."""
    cfg = settings(MODELS[name] | WIDE, b=1, t=tokens, batch_tokens=tokens)
    p, two = planned(cfg), planned(replace(cfg, batch_tokens=2 * tokens))
    got, _ = step_bytes(cfg)
    assert abs(over_fixed(p) / got - 1) < 0.02, (over_fixed(p), got)
    assert p.peak < two.peak - 16 * tokens


@pytest.mark.parametrize(("more", "kept"), [({"batch_tokens": 256}, "tied"), ({}, "all"), ({"compile": True}, "none")])
def test_which_gradients_have_a_place(more: dict[str, Any], kept: str) -> None:
    """Only gradients to which several matrix products of a step add: a buffer for others would be wasted."""
    model = build_model(settings(GPT2 | WIDE, **more), 3000, torch.device("cpu"))
    names = {name for name, p in model.named_parameters() if hasattr(p, "grad_buffer")}
    assert names == {"tied": {"wte.weight"}, "none": set()}.get(kept, names)
    assert (len(names) > 10) == (kept == "all")
    untied = build_model(settings(LLAMA | WIDE, batch_tokens=256), 3000, torch.device("cpu"))
    assert not any(hasattr(p, "grad_buffer") for p in untied.parameters())


def test_a_gpu_keeps_dropout_masks_in_a_byte_and_bf16() -> None:
    cfg = settings(GPT2 | DROPOUT, "auto")
    n = cfg.sequences * cfg.block_size * GPT2["width"] * (2 * GPT2["n_layers"] + 1)
    gpu, plain = (planned(replace(cfg, model=ModelConfig(**m)), plan.card("l4")) for m in (GPT2 | DROPOUT, GPT2))  # type: ignore[arg-type]
    assert gpu.activations - plain.activations == n + 16 * GPT2["n_layers"]
    assert gpu.parameters < planned(cfg).parameters, "bf16 on a GPU, fp32 on a CPU"


def test_nothing_is_allocated(capsys: pytest.CaptureFixture[str]) -> None:
    """A model of 1.5 billion parameters is planned with only meta tensors."""
    top, _ = peak_of(lambda: plan.main(["--plan", "--config", "gpt2-1.5b", "--device", "h100"], "tiny"))
    assert top < 1 << 20 and "1,557,686,400 parameters" in capsys.readouterr().out


# ---- using the numbers


def target_for(cfg: TrainConfig, size: int) -> Target:
    """Return a device that can just hold a micro-batch of this size."""
    peak = planned(replace(cfg, micro_batch=size)).peak
    return Target("test", "cpu", int(peak / (1 - memory.SPARE["cpu"])) + 2)


@pytest.mark.parametrize("level", LEVELS)
def test_largest_micro_batch_fits_and_the_next_does_not(level: Any) -> None:
    cfg = settings(GPT2, b=1, batch_tokens=48 * 64, recompute=level)
    shape, sizes = shape_of(cfg), plan.micro_batches(cfg)
    assert sizes == [48, 24, 16, 12, 8, 6, 4, 3, 2, 1]
    for bigger, size in zip(sizes, sizes[1:]):
        target = target_for(cfg, size)
        assert plan.largest_micro_batch(cfg, shape, target) == size
        assert memory.plan(replace(cfg, micro_batch=bigger), shape, target).peak > target.usable
    assert plan.largest_micro_batch(cfg, shape, Target("none", "cpu", 1000)) == 0
    assert plan.micro_batches(cfg, gpus=3) == [16, 8, 4, 2, 1]
    with pytest.raises(UserError, match="batch_tokens is 3072, expected a multiple"):
        plan.micro_batches(cfg, gpus=5)


def test_auto_is_settled_before_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(train.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    words = "--model.n-layers 1 --model.n-heads 2 --model.width 32 --vocab-size 300 --block-size 32 --batch-tokens 768 "
    words += (
        "--micro-batch auto --max-steps 1 --max-minutes null --eval-batches 1 --sample-tokens 1 --device cpu --out r"
    )
    cfg = load_config([*words.split(), "--data", str(text)])
    assert cfg.micro_batch == "auto"
    full = plan.with_vocabulary(cfg, 300)
    target = target_for(full, 8)
    monkeypatch.setattr(plan, "total_memory", lambda device: target.memory)
    run = train.prepare(cfg)
    assert (run.cfg.micro_batch, run.cfg.accumulation, run.loader.batch) == (8, 3, 8)
    assert train.train(cfg) == 0 and '"micro_batch": 8' in Path("r/run.json").read_text()
    monkeypatch.setattr(plan, "total_memory", lambda device: 1000)
    with pytest.raises(UserError, match="micro_batch is 'auto', but not one sequence fits; no micro_batch"):
        plan.settle(cfg, 300, torch.device("cpu"))
    monkeypatch.setattr(plan, "total_memory", lambda device: 0)
    with pytest.raises(UserError, match="the memory size of this system is unknown"):
        plan.settle(cfg, 300, torch.device("cpu"))
    assert plan.settle(run.cfg, 300, torch.device("cpu")) is run.cfg
    with pytest.raises(UserError, match="micro_batch is 'auto', expected a number"):
        cfg.accumulation  # noqa: B018


def knob(cfg: TrainConfig, target: Target) -> TrainConfig:
    """Return the settings changed as `remedy` advises: they must fit, and differ in nothing else."""
    words = plan.remedy(cfg, target).partition(" needs ")[0].split()
    assert words and all(w.startswith("--") for w in words[::2]), words
    change: dict[str, Any] = {
        k[2:].replace("-", "_"): int(v) if v.isdigit() else v for k, v in zip(words[::2], words[1::2])
    }
    other = replace(cfg, **change)
    assert planned(other, target).peak <= target.usable
    return other


def test_remedy_turns_the_first_knob_that_fits() -> None:
    cfg = settings(GPT2 | dict(n_layers=8), "bf16", b=16, t=512, batch_tokens=16 * 512)
    assert knob(cfg, target_for(cfg, 4)) == replace(cfg, micro_batch=4)

    def just(**change: Any) -> Target:
        return target_for(replace(cfg, **change), 1)

    assert knob(cfg, just(recompute="norms")) == replace(cfg, micro_batch=1, recompute="norms")
    assert knob(cfg, just(recompute="block")) == replace(cfg, micro_batch=1, recompute="block")
    lean = dict(recompute="block", master="stochastic")
    assert knob(cfg, just(**lean)) == replace(cfg, micro_batch=1, **lean)
    assert knob(cfg, just(**lean, block_size=256)) == replace(cfg, micro_batch=1, **lean, block_size=256)
    assert plan.remedy(cfg, Target("none", "cpu", 1000)).startswith("no micro_batch, recompute, master or block_size")
    big = settings(GPT2 | dict(n_layers=8, width=256), "bf16", b=2, t=8)
    assert planned(big).largest()[0] == "the optimizer's state"
    room = Target("test", "cpu", int(planned(replace(big, master="remainder")).peak / 0.8) + 2)
    assert knob(big, room) == replace(big, master="remainder"), "the state is what is large"


def _cuda_fails() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


FAILURES = [
    pytest.param(lambda: torch.empty(1 << 60), id="torch"),
    pytest.param(lambda: ops.layer_norm(torch.zeros(1, 64).expand(1 << 48, 64)), id="extension", marks=needs_cpu),
    pytest.param(_cuda_fails, id="cuda"),
]


@pytest.mark.parametrize("fail", FAILURES)
def test_out_of_memory_names_part_and_knob(
    fail: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the loop, through the command: one sentence, exit code 2."""
    ids = tmp_path / "ids_uint32.bin"  # uint16 without a tokenizer would imply GPT-2's vocabulary
    ids.write_bytes(torch.randint(300, (4000,), dtype=torch.int32).numpy().tobytes())
    monkeypatch.chdir(tmp_path)
    words = "--model.n-layers 4 --model.n-heads 2 --model.width 32 --model.vocab-size 512 --block-size 128 "
    words += "--batch-tokens 1024 --micro-batch 8 --max-steps 2 --max-minutes null --device cpu --out r "
    words += "--data ids_uint32.bin"
    cfg = load_config(words.split())
    monkeypatch.setattr(plan, "total_memory", lambda device: target_for(plan.with_vocabulary(cfg), 4).memory)
    monkeypatch.setattr(train, "forward_backward", lambda *args: fail())
    assert run_command(lambda: train.main(words.split())) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("fastgpt: error: out of memory on cpu: the largest part of the plan is activations, "), line
    assert "; --micro-batch 4 needs " in line


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), plan.explain_out_of_memory(settings(GPT2), 9, torch.device("cpu")):
        raise RuntimeError("shape")


# ---- devices and the command


def test_cards() -> None:
    assert all(datasheet_peak(f"NVIDIA {name}") == card.peak for name, card in CARDS.items())
    assert datasheet_peak("NVIDIA L40S") == 362e12 and datasheet_peak("NVIDIA L4") == 121e12
    assert datasheet_peak("NVIDIA H100 PCIe") == 756e12 and datasheet_peak("Quadro") is None
    assert datasheet_peak("NVIDIA A100") == 312e12, "40 or 80 GB: one peak"
    assert datasheet_peak("NVIDIA L40") is datasheet_peak("NVIDIA RTX A4000") is None, "neither is an L4 or A40"
    names = {"a100": "A100 40GB", "a100-80gb": "A100 80GB", "A10": "A10 24GB", "h100": "H100 80GB", "l4": "L4 24GB"}
    names |= {"rtx4090": "RTX 4090 24GB", "4090": "RTX 4090 24GB", "H200": "H200 141GB", "h100-pcie": "H100 PCIe 80GB"}
    for name, key in names.items():
        found = plan.card(name)
        assert found is not None and found.name == key and found.memory == CARDS[key].memory
    assert plan.card("cpu") is plan.card("cuda:1") is plan.card("-") is None
    assert total_memory(torch.device("cpu")) > 1 << 28


def run_plan(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = train.main(["--plan", *words.split()])
    return code, capsys.readouterr().out


def test_plan_of_a_card_with_hours_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--config gpt2-124m --device a100 --gpus 4 --tokens 10e9 --price 2"
    code, out = run_plan(words, capsys)
    cfg = plan.with_vocabulary(load_config(["--config", "gpt2-124m"]))
    shape, a100 = shape_of(cfg), plan.card("a100")
    assert code == 0 and a100 is not None
    gpu_hours = 10e9 * shape.flops / (312e12 * 0.4) / 3600
    assert f"{gpu_hours / 4:.3g} hours ({gpu_hours:.1f} GPU-hours, cost {2 * gpu_hours:.2f} at 2 a GPU-hour)" in out
    assert "estimate, not measured" in out and "40% MFU" in out and "datasheet" in out
    assert "4 x A100 40GB: 40.00 GB at 1,555 GB/s" in out and "4 x micro_batch 32 x block_size 1024 a step" in out
    peaks = [f"{memory.plan(replace(cfg, recompute=r), shape, a100, 4).peak / 1e9:.2f}" for r in LEVELS]
    assert next(line for line in out.splitlines() if line.startswith("peak")).split()[1:] == peaks
    most = [str(plan.largest_micro_batch(replace(cfg, recompute=r), shape, a100, 4)) for r in LEVELS]
    assert next(line for line in out.splitlines() if line.startswith("largest micro_batch")).split()[2:] == most
    assert "hold it (recompute none, micro_batch 32): L4 24GB" in out
    assert out.strip().splitlines()[-1].startswith("fits: ")
    assert abs(planned(cfg, a100).peak - memory.plan(cfg, shape, a100, 4).peak) == 16 * cfg.batch_tokens * 3 // 4
    half = run_plan(words + " --mfu 0.2", capsys)[1]
    assert f"{gpu_hours / 2:.3g} hours" in half


def test_plan_that_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run_plan("--config gpt2-1.5b --device a100 --micro-batch 16", capsys)
    last = out.strip().splitlines()[-1]
    assert code == 1 and last.startswith("does not fit: ") and "--micro-batch 4 needs 35." in last
    code, out = run_plan("--config gpt2-1.5b --device l4 --dtype fp32 --tokens 1e9", capsys)
    assert code == 1 and "no micro_batch, recompute, master or block_size fits" in out and "hours: not estimated" in out
    code, out = run_plan("--config gpt2-1.5b --device a100 --micro-batch auto --recompute block", capsys)
    assert code == 0 and "micro_batch 16 (auto)" in out


def test_a_setting_that_no_plan_reads_is_said(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run_plan("--config gpt2-124m --device l4 --lr 1e-3 --warmup-steps=9 --optimizer muon --recompute block", capsys)
    assert caplog.messages == ["no effect on a plan: --lr, --warmup_steps"]


def test_plan_without_a_gpu_names_the_smallest_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out = run_plan("--config gpt2-1.5b --micro-batch 8", capsys)
    assert code == 0 and "1 x A100 80GB, the smallest card that holds it (no GPU here, no --device)" in out
    code, out = run_plan("--config gpt2-1.5b --micro-batch 256", capsys)
    assert code == 1 and "B200 180GB, the largest card known" in out and "none of the known ones" in out


def test_plan_of_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = run_plan("--config tiny --device cpu --kernels all=torch", capsys)
    assert code == 0 and "this machine's CPU" in out and "in fp32" in out
    assert "PyTorch, which may keep more, serves here: " in out
    with use(all="auto"):
        code, out = run_plan("--config tiny --device cpu --compile --recompute block", capsys)
    assert code == 0 and "compile: these figures are for the eager model" in out and "norms" not in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--device a1000", "device is 'a1000', expected auto, cpu, cuda, cuda:N or a card: L4 24GB"),
        ("--device cuda:99", "device is 'cuda:99', but PyTorch finds "),
        ("--gpus 0 --device l4", "--gpus is '0', expected a whole number, 1 or more"),
        ("--gpus x", "--gpus is 'x', expected a whole number, 1 or more"),
        ("--tokens -1", "--tokens is '-1', expected a number, more than 0"),
        ("--tokens inf", "--tokens is 'inf', expected a number, more than 0"),
        ("--price 2", "price is 2, but it only applies with --tokens"),
        ("--mfu 40", "--mfu is '40', expected a number, more than 0, at most 1"),
        ("--mfu 0.5", "mfu is 0.5, but it only applies with --tokens"),
        ("--device=", "device is '', expected auto, cpu"),
        ("--token 5", "token is not a setting"),
        ("--device l4 --gpus 3", "batch_tokens is 2048, expected a multiple of 6144, one micro-batch per GPU"),
    ],
)
def test_errors(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: train.main(["--plan", "--config", "tiny", *words.split()])) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1, err


def test_settings_without_plan_do_not_know_its_options() -> None:
    for words in (["--gpus", "2"], ["--tokens", "5"]):
        with pytest.raises(UserError, match="is not a setting"):
            load_config(words)

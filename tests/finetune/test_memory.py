"""Planned memory of adapters against what training allocates, and what fits a card."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastgpt.core import native
from fastgpt.core.cards import CARDS
from fastgpt.finetune.lora import Lora, add_lora
from fastgpt.finetune.memory import plan_adapters, report, setups, sizes_of
from fastgpt.finetune.quantised import quantise_base
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.optim import AdamW
from fastgpt.training.config import TrainConfig
from fastgpt.training.memory import Target

CPU = Target("a CPU", "cpu", 10**12)
GPT2: dict[str, Any] = dict(n_layers=3, n_heads=4, width=128, vocab_size=1000)
LLAMA = GPT2 | dict(norm="rms", activation="swiglu", mlp_width=352, positions="rope", tied=False, n_kv_heads=2)
LLAMA |= dict(qkv_bias=False, proj_bias=False, mlp_bias=False)
SEVEN: dict[str, Any] = LLAMA | dict(n_layers=32, n_heads=32, n_kv_heads=32, width=4096, mlp_width=11008)
needs_cpu = pytest.mark.skipif("cpu" not in " ".join(native.describe()).lower(), reason="needs the CPU kernels")


def settings(model: dict[str, Any], **more: Any) -> TrainConfig:
    sizes = dict(block_size=64, micro_batch=4, batch_tokens=2**14, dtype="fp32", device="cpu")
    return TrainConfig(model=ModelConfig(**model), **{**sizes, **more})  # type: ignore[arg-type]


def built(cfg: TrainConfig, lora: Lora, base: str | None = None) -> GPT:
    model = GPT(replace(cfg.model, block_size=cfg.block_size), generator=torch.Generator().manual_seed(0)).train()
    model.recompute = cfg.recompute
    if base:
        quantise_base(model, base)
    add_lora(model, lora)
    return model


@needs_cpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_activations_are_exact(name: str, dropout: float) -> None:
    cfg, lora = settings(GPT2 if name == "gpt2" else LLAMA), Lora(rank=8, dropout=dropout)
    model, ids = built(cfg, lora), torch.randint(1000, (4, 64))
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), ids)}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in held:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        model(ids, ids, reduction="sum")
    n, m = 4 * 64, cfg.model
    head = n * (4 * m.width + (8 if m.norm == "layer" else 4)) + n * 4 * (m.width + m.padded_vocab_size)
    expected = plan_adapters(cfg, sizes_of(cfg, lora), None, CPU).activations + head
    got = sum(t.untyped_storage().nbytes() for t in kept.values())
    assert got == expected, (got - expected) / (4 * n)


def peak_of(work: Any) -> int:
    """Return the peak of the bytes that `work` has allocated on the CPU."""
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
    return top


@needs_cpu
@pytest.mark.parametrize(
    ("name", "level", "base"),
    [
        ("gpt2", "none", None),
        ("llama", "norms", None),
        ("llama", "block", "int8"),
        *(
            pytest.param(name, level, base, marks=pytest.mark.slow)
            for name, level, base in [("gpt2", "block", None), ("llama", "none", None), ("gpt2", "norms", "int8")]
        ),
    ],
)
def test_peak_of_a_step(name: str, level: Any, base: str | None) -> None:
    wide = dict(width=512, n_heads=8, vocab_size=3000) | (dict(mlp_width=1408) if name == "llama" else {})
    cfg, lora = settings((GPT2 if name == "gpt2" else LLAMA) | wide, recompute=level), Lora(rank=8)
    model, ids = built(cfg, lora, base), torch.randint(1000, (4, 64))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        model(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    gc.collect()
    gc.disable()
    try:
        got = peak_of(step)
    finally:
        gc.enable()
    p = plan_adapters(cfg, sizes_of(cfg, lora), base, CPU)
    expected = p.gradients + p.activations + max(p.loss, p.block)
    dense = 4 * max(rows * columns for rows, columns in sizes_of(cfg, lora).matrices) if base else 0
    assert 0.98 * got < expected < 1.06 * got + dense, (expected, got)  # the plan adds the largest of each
    state = {t.untyped_storage().data_ptr(): t for s in optimizer.state.values() for t in s.values()}
    assert sum(t.nbytes for t in state.values() if t.numel() > 1) == p.moments


def test_seven_billion_parameters_on_24_gigabytes() -> None:
    card = Target("RTX 4090 24GB", "cuda", int(CARDS["RTX 4090 24GB"].memory))
    cfg = settings(SEVEN | dict(vocab_size=32000), block_size=2048, dtype="bf16", device="auto")
    found = {s.base: s for s in setups(cfg, sizes_of(cfg, Lora(rank=16)), card)}
    assert found["nf4"].plan.parameters < found["int8"].plan.parameters < 8.5e9
    assert found["nf4"].micro_batch >= found["int8"].micro_batch >= 1
    assert all(s.plan.needed <= card.usable for s in found.values())
    lines = report(cfg, Lora(rank=16), card)
    assert len(lines) == 4 and lines[0].startswith("RTX 4090 24GB: 22.1 GB of 24.0 GB")
    assert "base in nf4: micro-batch" in lines[3]
    small = Target("a small card", "cuda", 4 * 10**9)
    assert all("does not fit" in line for line in report(cfg, Lora(rank=16), small)[1:3])

"""A Hugging Face model before and after fastgpt.patch: `python -m fastgpt.bench.patching --json FILE`.

A training step (forward with labels, backward, AdamW(fused=True)) of GPT-2 and Llama from transformers, with the same
random weights and tokens. Steps are interleaved, and speeds are shown only if the losses of the first steps agree
within the tolerance. --ablation also patches one part at a time; --compile compares both under torch.compile. On a CPU
(fp32) each variant runs in its own process; peak memory is that process's peak resident memory beyond what it had
before it built the model, warm-up excluded. On a GPU (fp32 weights under bf16 autocast) they share this process; peak
memory is the allocator's during a step, other variants' tensors excluded.

gpt2: 124M, vocabulary 50257; B 1 of T 256 on a CPU, B 16 of T 1024 on a GPU. llama: 8 layers, width 512, vocabulary
32000, B 1 of T 256 on a CPU; 16 layers, width 2048, B 4 of T 2048 on a GPU. tiny: for trying this program.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

import fastgpt
from fastgpt.bench._harness import (
    Samples,
    append_rows,
    gpu_state,
    provenance,
    resident_mb,
    where,
)
from fastgpt.bench._options import command_line, device_of
from fastgpt.bench.throughput import AGREE_STEPS, TOLERANCE, disagreement, kernels, time_steps
from fastgpt.bench.variants import WARM_STEPS, Apart, answer
from fastgpt.core.command import number, run_command
from fastgpt.patching import PARTS

NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
LLAMA = dict(vocab_size=32000, max_position_embeddings=4096)


@dataclass(frozen=True)
class Shape:
    """A model by transformers' config class and settings, and its batch (B, T)."""

    config: str
    settings: dict[str, Any]
    batch: int
    block: int
    device: str = "cpu"


SHAPES = {
    "gpt2": Shape("GPT2Config", NO_DROPOUT, 1, 256),
    "llama": Shape(
        "LlamaConfig",
        dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
             num_key_value_heads=4, **LLAMA),
        1,
        256,
    ),
    "tiny": Shape("GPT2Config", dict(n_layer=1, n_embd=32, n_head=2, vocab_size=97, **NO_DROPOUT), 2, 16),
}  # fmt: skip
GPU_SHAPES = {
    "gpt2": Shape("GPT2Config", SHAPES["gpt2"].settings, 16, 1024, "cuda"),
    "llama": Shape(
        "LlamaConfig",
        dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, num_attention_heads=32,
             num_key_value_heads=8, **LLAMA),
        4,
        2048,
        "cuda",
    ),
}  # fmt: skip


class Variant:
    """One model: 'transformers' or 'patched', either with ' compile'; 'only PART' patches this part alone."""

    def __init__(self, name: str, shape: Shape) -> None:
        import transformers  # imported here: only this benchmark needs transformers

        self.name, self.shape, self.losses, self.peak_mb = name, shape, list[Tensor](), 0.0
        torch.manual_seed(0)
        config = getattr(transformers, shape.config)(
            **shape.settings, pad_token_id=None, bos_token_id=None, eos_token_id=None
        )
        model: Any = transformers.AutoModelForCausalLM.from_config(config).to(shape.device).train()
        if name.startswith(("patched", "only")):
            fastgpt.patch(model, only=name.split()[1] if name.startswith("only") else None)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        self.model = torch.compile(model) if name.endswith("compile") else model
        generator = torch.Generator().manual_seed(1)
        size = (4, shape.batch, shape.block)
        self.ids = torch.randint(config.vocab_size, size, generator=generator).to(shape.device)

    def step(self, ids: Tensor) -> Tensor:
        """Run one optimizer step; return its loss, on the device."""
        cuda = self.shape.device == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def train(self, cfg: Any, steps: int) -> float:
        """Run the next steps; return seconds, the device's work included."""
        wait = torch.cuda.synchronize if self.shape.device == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            self.losses.append(self.step(self.ids[len(self.losses) % len(self.ids)]))
        wait()
        return time.perf_counter() - start

    def close(self) -> None:
        """Do nothing; Apart.close ends a process."""


def serve(pipe: Connection, name: str, shape: Shape) -> None:
    """Run the process of one variant on a CPU."""
    import transformers  # noqa: F401 (before memory is measured)

    before = resident_mb("VmRSS")
    v = Variant(name, shape)
    pipe.send({})
    answer(pipe, v, None, before)


def prepare(names: list[str], shape: Shape) -> list[Any]:
    """Return the variants after warm-up, with their peak memory on a GPU."""
    variants: list[Any] = []
    for name in names:
        if shape.device == "cpu":
            variants.append(Apart(name, shape, serve))
            variants[-1].train(None, WARM_STEPS)
            continue
        before = torch.cuda.memory_allocated()
        v = Variant(name, shape)
        v.train(None, WARM_STEPS - 1)
        torch.cuda.reset_peak_memory_stats()
        v.train(None, 1)
        v.peak_mb = (torch.cuda.max_memory_allocated() - before) / 1e6
        variants.append(v)
        gc.collect()
        torch.cuda.empty_cache()
    return variants


def compare(names: list[str], shape_name: str, shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """Return one row per variant, or a single row with the reason why no speed is shown."""
    device, dtype = torch.device(shape.device), "bf16" if shape.device == "cuda" else "fp32"
    used = kernels(device, torch.bfloat16 if shape.device == "cuda" else torch.float32)
    about = {"bench": "patching", "shape": shape_name, "batch": shape.batch, "block": shape.block, "dtype": dtype}
    about |= {"config": shape.config, "settings": shape.settings, "kernels": used, "machine": provenance(device)}
    variants = prepare(names, shape)
    samples, failed = time_steps(variants, None, rounds, 1)
    for v in variants:
        v.close()
    if failed:
        return [{**about, "red": "; ".join(f"{name}: {why}" for name, why in failed.items())}]
    gap, sentence = max(disagreement(v, variants[0], TOLERANCE[dtype]) for v in variants[1:])
    about |= {"loss_gap": gap, "loss_tolerance": TOLERANCE[dtype], "agree_steps": AGREE_STEPS, "gpu": gpu_state(device)}
    if sentence:
        return [{**about, "red": sentence}]
    return [{**about, **figures(v, variants, samples)} for v in variants]


def figures(v: Any, variants: list[Any], samples: dict[str, Samples]) -> dict[str, Any]:
    """Return one variant's time and memory, and both against 'transformers' (or its compiled self); above 1 is
    better.
    """
    mine = samples[v.name]
    low, middle, high = (1e3 * mine.quantile(q) for q in (0.2, 0.5, 0.8))
    row = {"variant": v.name, "ms": middle, "ms_q20": low, "ms_q80": high, "samples": len(mine.seconds)}
    row |= {"peak_mb": v.peak_mb, "losses": torch.stack(v.losses).tolist()}
    base = next(b for b in variants if b.name == "transformers" + (" compile" if v.name.endswith("compile") else ""))
    paired = Samples([b / a for a, b in zip(mine.seconds, samples[base.name].seconds)])
    return row | {"speed": [paired.quantile(q) for q in (0.5, 0.2, 0.8)], "memory": base.peak_mb / v.peak_mb}


def show(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table, or why there is none."""
    if "red" in rows[0]:
        return f"no speed is shown: {rows[0]['red']}"
    served = ", ".join(f"{op} {b}" for op, b in rows[0]["kernels"].items() if b != "torch") or "all torch"
    lines = [f"kernels: {served}; losses {rows[0]['loss_gap']:.1e} apart, {rows[0]['loss_tolerance']:g} allowed"]
    lines.append(
        f"{'variant':<24}{'ms/step (20 .. 80 %)':<30}{'peak MB':>9}  speed (20 .. 80 %), memory: before / after"
    )
    for r in rows:
        times = f"{r['ms']:.1f} ({r['ms_q20']:.1f} .. {r['ms_q80']:.1f})"
        m, low, high = r["speed"]
        ratios = f"{m:.3f} ({low:.3f} .. {high:.3f}), {r['memory']:.3f}"
        lines.append(f"{r['variant']:<24}{times:<30}{r['peak_mb']:>9,.0f}  {ratios}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Return 1 if losses differed, so no speed was shown."""
    parser = command_line("patching", __doc__)
    parser.add_argument(
        "--shape", action="append", choices=SHAPES, help="model to time; may be repeated; default: gpt2 and llama"
    )
    parser.add_argument("--steps", type=number(int, 1), default=10, help="number of timed rounds")
    parser.add_argument("--compile", action="store_true", help="also time both under torch.compile")
    parser.add_argument("--ablation", action="store_true", help="also time each part patched alone")
    args = parser.parse_args(argv)
    device = device_of(parser, args.device)
    shapes = SHAPES | GPU_SHAPES if device.type == "cuda" else SHAPES
    names = ["transformers", "patched"] + (["transformers compile", "patched compile"] if args.compile else [])
    status = 0
    for name in args.shape or ["gpt2", "llama"]:
        shape = shapes[name]
        has_rope = shape.config != "GPT2Config"
        parts = [f"only {p}" for p in PARTS if args.ablation and (p != "rope" or has_rope)]
        rows = compare(names + parts, name, shape, args.steps)
        about = f"{name}: {shape.config}, B {shape.batch} x T {shape.block}, {rows[0]['dtype']}"
        print(f"{about}, {where(rows[0]['machine'])}\n{show(rows)}", flush=True)
        if args.json:
            append_rows(args.json, rows)
        status |= any("red" in r for r in rows)
    return status


if __name__ == "__main__":
    sys.exit(run_command(main))

"""A Hugging Face model before and after fastgpt.patch: `python -m fastgpt.bench.patching --json FILE`.

A training step (forward with labels, backward, AdamW(fused=True)) of ten families of transformers, with the same random
weights and tokens. Steps are interleaved, and speeds are shown only if the losses of the first steps agree within the
tolerance. --ablation also patches one part at a time; --compile compares both under torch.compile. On a GPU with
Liger-Kernel installed, a third model is patched by Liger, if it knows the family. On a CPU (fp32) each variant runs in
its own process; peak memory is that process's peak resident memory beyond what it had before it built the model,
warm-up excluded. On a GPU (fp32 weights under bf16 autocast) they share this process; peak memory is the allocator's
during a step, other variants' tensors excluded.

gpt2: 124M, vocabulary 50257; B 1 of T 256 on a CPU, B 16 of T 1024 on a GPU. The others: 8 layers, width 512,
vocabulary 32000, B 1 of T 256 on a CPU; 16 layers, width 2048, B 4 of T 2048 on a GPU. --quick and `tiny`: models of
one layer, for trying this program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import statistics
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
TOKENS = dict(vocab_size=32000, max_position_embeddings=4096)
WIDTHS = {  # hidden_size, intermediate_size, layers, heads, heads of keys and values, width of a head
    "cpu": (512, 1408, 8, 8, 4, 64),
    "cuda": (2048, 5632, 16, 32, 8, 64),
    "quick": (32, 64, 1, 2, 1, 16),
}
# family -> config class and settings; with `head_dim` where the config's default is not width / heads
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("GPTNeoXConfig", {}),
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", dict(sliding_window=4096)),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", dict(head_dim=64)),
    "gemma": ("GemmaConfig", dict(head_dim=64)),
    "gemma2": ("Gemma2Config", dict(head_dim=64, query_pre_attn_scalar=64)),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=64, query_pre_attn_scalar=64)),
    "phi3": ("Phi3Config", {}),
}


@dataclass(frozen=True)
class Shape:
    """A model by transformers' config class and settings, and its batch (B, T)."""

    config: str
    settings: dict[str, Any]
    batch: int
    block: int
    device: str = "cpu"


def shape_of(family: str, size: str, batch: int, block: int) -> Shape:
    """Return the shape of a family other than GPT-2 at one of WIDTHS."""
    width, inner, layers, heads, kv_heads, head_dim = WIDTHS[size]
    config, own = OTHERS[family]
    settings: dict[str, Any] = dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers)
    settings |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, **TOKENS, **own)
    settings |= {"head_dim": head_dim} if "head_dim" in own else {}
    if family == "gpt_neox":  # every head has its own keys and values
        del settings["num_key_value_heads"]
    return Shape(config, settings, batch, block, "cuda" if size == "cuda" else "cpu")


TINY = dict(n_layer=1, n_embd=32, n_head=2, vocab_size=97, **NO_DROPOUT)
SHAPES = {
    "gpt2": Shape("GPT2Config", NO_DROPOUT, 1, 256),
    **{family: shape_of(family, "cpu", 1, 256) for family in OTHERS},
    "tiny": Shape("GPT2Config", TINY, 2, 16),
}
GPU_SHAPES = {
    "gpt2": Shape("GPT2Config", NO_DROPOUT, 16, 1024, "cuda"),
    **{family: shape_of(family, "cuda", 4, 2048) for family in OTHERS},
}
FAMILIES = ("gpt2", *OTHERS)


def quick(name: str, device: str) -> Shape:
    """Return a family at a size that takes milliseconds, for trying this program."""
    shape = SHAPES["tiny"] if name in ("gpt2", "tiny") else shape_of(name, "quick", 2, 16)
    return dataclasses.replace(shape, device=device)


class Variant:
    """One model: 'transformers' or 'patched', either with ' compile'; 'only PART' patches this part alone; 'liger' is
    patched by Liger-Kernel."""

    def __init__(self, name: str, shape: Shape) -> None:
        import transformers  # imported here: only this benchmark needs transformers

        self.name, self.shape, self.losses, self.peak_mb = name, shape, list[Tensor](), 0.0
        torch.manual_seed(0)
        config = getattr(transformers, shape.config)(
            **shape.settings, pad_token_id=None, bos_token_id=None, eos_token_id=None
        )
        model: Any = transformers.AutoModelForCausalLM.from_config(config).to(shape.device).train()
        if name.startswith(("patched", "only")):
            fastgpt.patch(model, only=name.split()[1] if name.startswith("only") else None, quiet=True)
        elif name == "liger":
            from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=model)
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


def liger_runs(config: str, device: str) -> bool:
    """Return whether Liger-Kernel can patch a family here; its kernels are Triton's."""
    if device != "cuda" or not importlib.util.find_spec("liger_kernel"):
        return False
    import transformers
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return getattr(transformers, config).model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


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


def overall(rows: list[dict[str, Any]]) -> str:
    """Return one line on all families: the least and the median ratio of time, and the largest memory ratio."""
    patched = [r for r in rows if r.get("variant") == "patched"]
    if len(patched) < 2:
        return ""
    speeds, memory = [r["speed"][0] for r in patched], [1 / r["memory"] for r in patched]
    return (
        f"{len(patched)} families, before / after: least {min(speeds):.3f}, median {statistics.median(speeds):.3f}; "
        f"memory after / before: median {statistics.median(memory):.3f}, most {max(memory):.3f}"
    )


def main(argv: list[str] | None = None) -> int:
    """Return 1 if losses differed, so no speed was shown."""
    parser = command_line("patching", __doc__)
    parser.add_argument(
        "--shape", action="append", choices=SHAPES, help="model to time; may be repeated; default: all but tiny"
    )
    parser.add_argument("--steps", type=number(int, 1), help="number of timed rounds (default: 10; with --quick 2)")
    parser.add_argument("--compile", action="store_true", help="also time both under torch.compile")
    parser.add_argument("--ablation", action="store_true", help="also time each part patched alone")
    parser.add_argument("--quick", action="store_true", help="models of one layer, for trying this program")
    args = parser.parse_args(argv)
    device = device_of(parser, args.device)
    shapes = SHAPES | GPU_SHAPES if device.type == "cuda" else SHAPES
    status, every = 0, list[dict[str, Any]]()
    for name in args.shape or FAMILIES:
        shape = quick(name, device.type) if args.quick else shapes[name]
        names = ["transformers", "patched"] + (["transformers compile", "patched compile"] if args.compile else [])
        names += ["liger"] * liger_runs(shape.config, shape.device)
        has_rope = shape.config != "GPT2Config"
        names += [f"only {p}" for p in PARTS if args.ablation and (p != "rope" or has_rope)]
        rows = compare(names, f"{name} quick" if args.quick else name, shape, args.steps or (2 if args.quick else 10))
        about = f"{name}: {shape.config}, B {shape.batch} x T {shape.block}, {rows[0]['dtype']}"
        print(f"{about}, {where(rows[0]['machine'])}\n{show(rows)}", flush=True)
        if args.json:
            append_rows(args.json, rows)
        status |= any("red" in r for r in rows)
        every += rows
    print(overall(every), end="\n" if overall(every) else "")
    return status


if __name__ == "__main__":
    sys.exit(run_command(main))

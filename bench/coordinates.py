"""Does µP hold? The size of activations after a few steps, by width: `fastgpt bench coordinates [--widths 64,128,256]`.

Each width trains for some steps on the same batch, with model.mup_base_width (mup) and without (standard). A line shows
the mean |activation| of the token embedding, of attention and MLP of each block, and of the logits, by width. Its slope
is that of log mean |activation - activation before the first step| over log width: 0 says that a step changes this
layer as much at any width, 1 that it changes it in proportion to the width, so that the best learning rate falls as the
width grows. Heads keep their size. Means over seeds.

Source: arXiv:2203.03466, section D.1 (coordinate check).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.bench._harness import append_rows, provenance
from fastgpt.bench._options import command_line, device_of
from fastgpt.bench.plots import GRID
from fastgpt.core.command import number, run_command
from fastgpt.core.page import figure
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.optim import AdamW, MuonAdamW

KINDS = ("standard", "mup")
HEAD, VOCABULARY, BATCH, BLOCK = 16, 256, 4, 32
Sizes = dict[str, tuple[float, float]]  # layer -> mean |activation|, mean |activation - activation before step 1|


def model_of(width: int, layers: int, base: int | None, seed: int) -> GPT:
    """Return a GPT-2 of a width, whose heads have the same size at any width."""
    sizes: dict[str, Any] = dict(n_layers=layers, n_heads=width // HEAD, width=width, mup_base_width=base)
    config = ModelConfig(**sizes, vocab_size=VOCABULARY, block_size=BLOCK)
    return GPT(config, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def activations(model: GPT, ids: Tensor) -> dict[str, Tensor]:
    """Return the outputs of the layers by name, and the logits."""
    found: dict[str, Tensor] = {}
    layers = {"wte": model.wte}
    for i, block in enumerate(model.blocks):
        layers |= {f"blocks.{i}.attn": block.attn, f"blocks.{i}.mlp": block.mlp}  # type: ignore[dict-item]

    def keep(name: str) -> Any:
        return lambda module, inputs, output: found.__setitem__(name, output.float().clone())

    hooks = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    logits = model(ids).float()
    for hook in hooks:
        hook.remove()
    return found | {"logits": logits}


def trained(model: GPT, lr: float, steps: int, optimizer: str, seed: int) -> list[Sizes]:
    """Train on one batch; return the sizes after each step."""
    device = model.wte.weight.device
    ids = torch.randint(VOCABULARY, (BATCH, BLOCK + 1), generator=torch.Generator().manual_seed(seed)).to(device)
    groups = model.param_groups(0.0, muon=optimizer == "muon")
    for group in groups:
        group["lr"] = lr * group["lr_ratio"]
    step_of = (MuonAdamW if optimizer == "muon" else AdamW)(groups, lr=lr, betas=(0.9, 0.95))
    before, sizes = activations(model, ids[:, :-1]), []
    for _ in range(steps):
        model(ids[:, :-1], ids[:, 1:]).backward()
        step_of.step()
        step_of.zero_grad()
        now = activations(model, ids[:, :-1])
        sizes.append({name: (float(t.abs().mean()), float((t - before[name]).abs().mean())) for name, t in now.items()})
    return sizes


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Return the slope of log values over log widths, by least squares."""
    return statistics.linear_regression([math.log(w) for w in widths], [math.log(v) for v in values]).slope


def rows(
    widths: Sequence[int], *, base: int, layers: int, lr: float, steps: int, seeds: int, optimizer: str, device: Any
) -> list[dict[str, Any]]:
    """Return one row for each kind, step and layer: sizes by width, and the slope of the change."""
    found = []
    for kind in KINDS:
        runs = {
            w: [
                trained(model_of(w, layers, base if kind == "mup" else None, s).to(device), lr, steps, optimizer, s)
                for s in range(seeds)
            ]
            for w in widths
        }
        for step in range(steps):
            for layer in runs[widths[0]][0][step]:
                pairs = [[run[step][layer] for run in runs[w]] for w in widths]
                size, change = ([statistics.fmean(p[i] for p in pair) for pair in pairs] for i in (0, 1))
                about = {"bench": "coordinates", "kind": kind, "optimizer": optimizer, "lr": lr, "step": step + 1}
                figures = {"widths": list(widths), "size": size, "change": change, "slope": slope(widths, change)}
                found.append({**about, "layer": layer, **figures})
    return found


def show(found: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    widths = found[0]["widths"]
    lines = [f"{'':<10}{'step':>4}  {'layer':<15}" + "".join(f"{w:>9}" for w in widths) + "   slope of the change"]
    for r in found:
        sizes = "".join(f"{v:>9.4f}" for v in r["size"])
        lines.append(f"{r['kind']:<10}{r['step']:>4}  {r['layer']:<15}{sizes}   {r['slope']:+.2f}")
    return "\n".join(lines)


def plot(found: list[dict[str, Any]]) -> bytes:
    """Return a PNG: the change of each layer after the last step over the width, dashed without µP."""
    last = max(r["step"] for r in found)

    def draw(ax: Any) -> None:
        for kind, style in zip(KINDS, ("--", "-")):
            for i, r in enumerate(r for r in found if r["kind"] == kind and r["step"] == last):
                ax.plot(r["widths"], r["change"], style, color=f"C{i}", label=f"{r['layer']}, {kind}")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("width", fontsize=8)
        ax.set_ylabel(f"mean |change| after {last} steps", fontsize=8)
        ax.grid(color=GRID, linewidth=0.6)
        ax.legend(fontsize=6, ncols=2)
        ax.spines[["top", "right"]].set_visible(False)

    return figure(draw, 7.0, 4.2)


def parse_widths(text: str) -> list[int]:
    """Read widths like 64,128,256: two at least, multiples of the size of a head."""
    parts = text.split(",")
    if not all(p.isdigit() and int(p) and int(p) % HEAD == 0 for p in parts) or len(set(parts)) < 2:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected two widths at least, multiples of {HEAD}: 64,128,256")
    return sorted({int(p) for p in parts})


def main(argv: list[str] | None = None) -> int:
    """Run `fastgpt bench coordinates`; print the table, draw it with --plot."""
    parser = command_line("coordinates", __doc__)
    parser.add_argument("--widths", type=parse_widths, default=[64, 128, 256, 512], help="default: 64,128,256,512")
    parser.add_argument("--base", type=number(int, 1), help="model.mup_base_width (default: the smallest width)")
    parser.add_argument("--layers", type=number(int, 1), default=2, help="number of blocks (default: 2)")
    parser.add_argument("--steps", type=number(int, 1), default=5, help="steps on one batch (default: 5)")
    parser.add_argument("--seeds", type=number(int, 1), default=3, help="runs that are averaged (default: 3)")
    parser.add_argument("--lr", type=number(float, 0, open_least=True), default=1e-3, help="default: 0.001")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="default: adamw")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the changes after the last step")
    args = parser.parse_args(argv)
    device = device_of(parser, args.device)
    base = args.base or args.widths[0]
    options: dict[str, Any] = dict(layers=args.layers, lr=args.lr, steps=args.steps, seeds=args.seeds)
    found = rows(args.widths, base=base, optimizer=args.optimizer, device=device, **options)
    print(f"mean |activation| by width, lr {args.lr:g}, {args.optimizer}, mup_base_width {base} or null (standard)")
    print(show(found))
    if args.plot:
        args.plot.write_bytes(plot(found))
    if args.json:
        append_rows(args.json, [{**row, "machine": provenance(device)} for row in found])
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

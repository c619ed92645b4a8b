"""The cost of adapters in a batch: `fastgpt bench adapters --json FILE`.

GPT-2 124M with random weights, 16 rows with prompts of 128 tokens, greedy. Times a decode step of three generators, in
turns within one process: the base; the base with four adapters of rank 8 in all layers loaded, of which no row uses
one; and four rows for each adapter. `relative` is the time of a step over the base's, the median over the rounds.
--quick: a tiny model, for trying this program.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fastgpt.bench._harness import Samples, append_rows, provenance, turns, where
from fastgpt.bench.generators import SHAPES, Shape
from fastgpt.core.command import Parser, number, run_command
from fastgpt.core.device import default_device
from fastgpt.data.tokenizer import available_cores
from fastgpt.finetune.adapter import save_adapter
from fastgpt.finetune.lora import Lora, add_lora, remove_lora
from fastgpt.inference import Generator, Request
from fastgpt.models.gpt import GPT

BASE, VARIANTS = "base", ("base", "loaded", "adapters")
STEPS = 2  # of one generator in one round


def write_adapters(model: GPT, folder: Path, count: int, rank: int) -> dict[str, Path]:
    """Write adapters with random numbers; return their folders by name."""
    found, g = {}, torch.Generator().manual_seed(0)
    for i in range(count):
        for m in add_lora(model, Lora(rank=rank, alpha=rank), generator=g).values():
            m.lora_B.data.copy_(0.02 * torch.randn(m.lora_B.shape, generator=g))
        save_adapter(model, folder / f"adapter{i}")
        remove_lora(model, merged=False)
        found[f"adapter{i}"] = folder / f"adapter{i}"
    return found


def requests(variant: str, names: list[str], shape: Shape, batch: int) -> list[Request]:
    """Return a request for each row; those of "adapters" share the adapters evenly. None ends while steps are timed."""
    prompts = shape.prompts(batch)
    chosen = [names[i * len(names) // batch] if variant == "adapters" else None for i in range(batch)]
    options: dict[str, Any] = dict(temperature=0.0, ignore_eos=True)
    return [Request(prompt, 2 * shape.new, adapter=name, **options) for prompt, name in zip(prompts, chosen)]


def begin(variant: str, model: GPT, adapters: dict[str, Path], shape: Shape, batch: int) -> Generator:
    """Return a generator whose rows have read their prompts."""
    generator = Generator(model, max_batch=batch, adapters={} if variant == BASE else adapters)
    left = {generator.add(request) for request in requests(variant, list(adapters), shape, batch)}
    while left:
        left -= {piece.number for piece in generator.step()}
    return generator


def measure(shape: Shape, batch: int, count: int, rank: int, device: torch.device) -> dict[str, Samples]:
    """Return the seconds of a step of each variant, one sample a round; the first round is left out."""
    model = GPT(shape.config(), generator=torch.Generator().manual_seed(0)).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(model, Path(folder), count, rank)
        generators = {name: begin(name, model, adapters, shape, batch) for name in VARIANTS}
    samples = {name: Samples() for name in VARIANTS}
    for turn in range(shape.new // STEPS):
        for name in turns(list(VARIANTS), turn):
            start = time.perf_counter()
            for _ in range(STEPS):
                generators[name].step()
            if turn:
                samples[name].seconds.append((time.perf_counter() - start) / STEPS)
    return samples


def main(argv: list[str] | None = None) -> int:
    """Run `fastgpt bench adapters`."""
    parser = Parser(prog="fastgpt bench adapters", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--batch", type=number(int, 1), default=16, help="rows (default: 16)")
    parser.add_argument("--count", type=number(int, 1), default=4, help="adapters (default: 4)")
    parser.add_argument("--rank", type=number(int, 1), default=8, help="of each adapter (default: 8)")
    parser.add_argument("--threads", type=number(int, 1), default=available_cores(), help="default: all cores")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for trying this program")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device, shape = default_device(args.device), "tiny" if args.quick else "gpt2-124m"
    samples = measure(SHAPES[shape], args.batch, args.count, args.rank, device)
    about: dict[str, Any] = {"bench": "adapters", "shape": shape, "batch": args.batch, "phase": "decode"}
    about |= {"adapters": args.count, "rank": args.rank, "dtype": "fp32", "machine": provenance(device)}
    rows = []
    print(f"{shape}: {args.batch} rows, {args.count} adapters of rank {args.rank}, {where(about['machine'])}")
    for name, mine in samples.items():
        row = {**about, "variant": name, **mine.figures(), "tokens_per_s": args.batch / mine.quantile(0.5)}
        rows.append(row | (mine.against(samples[BASE], BASE) if name != BASE else {}))
        share = f", {rows[-1]['relative']:.3f} of the base's" if name != BASE else ""
        print(f"{name:<10}{row['ms']:>9.2f} ms a step{share}")
    if args.json:
        append_rows(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

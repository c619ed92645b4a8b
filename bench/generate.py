"""Generation against transformers and llama.cpp: `fastgpt bench generate --json FILE`.

GPT-2 124M with random weights, prompts of 128 tokens, 128 new tokens, greedy, end of text ignored, the same number of
threads for all. fastgpt with its weights in fp32, bf16 and int8; transformers' generate with a dynamic cache, and with
a static cache and compiled steps; llama.cpp (`pip install llama-cpp-python`) in f32 and q8_0, with the GGUF that
fastgpt exports. Each runs in a separate process; in every round each generates once, while the others wait. --quick: a
tiny model, for trying this program.

generate: prompts and all new tokens. prefill: prompts and one new token. decode: one further token, from the difference
of the two. Ratios are medians over the rounds, above 1 is faster; transformers is the faster one of its two.
tokens agree: share of the tokens before the first one that differs from fastgpt's in fp32.

floor: the bytes of the weights over the speed at which this machine reads (the faster of a matrix-vector product and a
sum over as many bytes, in the same rounds and with the same threads); a decode step reads every weight at least once.
products: the matrix products of the prefill alone, in the same rounds. Memory: the peak resident memory of the process
while it generates, beyond what it had after it had run a tiny model, and as a share of the weights and the cache.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastgpt.bench._harness import Samples, append_rows, provenance, turns, where
from fastgpt.bench.generators import (
    DTYPES,
    MACHINE,
    OWN,
    SHAPES,
    TRANSFORMERS,
    Process,
    Setup,
    Shape,
    Tokens,
    available,
    write_models,
)
from fastgpt.bench.variants import reason
from fastgpt.core.command import Parser, number, run_command
from fastgpt.core.page import number as digits
from fastgpt.data.tokenizer import available_cores

PHASES = ("generate", "prefill", "decode")
ROUNDS = {1: 5, 16: 3}  # by batch
PEERS = {"fastgpt": "llama.cpp", "fastgpt bf16": "llama.cpp", "fastgpt int8": "llama.cpp q8_0"}
PACKAGES = ("transformers", "llama-cpp-python", "gguf")
Measured = dict[str, dict[str, Samples]]  # variant -> phase -> samples


def versions() -> dict[str, str]:
    """Return the versions of the packages that are compared."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Comparison:
    """The processes of all variants, and why those that failed did."""

    def __init__(self, setup: Setup, names: list[str]) -> None:
        self.setup, self.failed = setup, dict[str, str]()
        self.processes: dict[str, Process] = {}
        for name in [MACHINE, *names]:
            self._try(name, lambda name=name: self.processes.update({name: Process(name, setup)}))  # type: ignore[misc]

    def _try(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as e:  # of another project's code: only this variant loses its figures
            self.failed[name] = reason(e)
            self.processes.pop(name, None)
            return None

    def measure(self, batch: int, rounds: int) -> tuple[Measured, dict[str, Tokens]]:
        """Return the seconds of every phase, one sample a round, and the new tokens."""
        tokens: dict[str, Tokens] = {}
        for name in [n for n in self.processes if n != MACHINE]:
            found = self._try(name, lambda name=name: self._once(name, batch))  # type: ignore[misc]
            if found is not None:
                tokens[name] = found[1]
        samples: Measured = {name: {} for name in self.processes}
        for turn in range(rounds):
            for name in turns(list(self.processes), turn):
                found = self._try(name, lambda name=name: self._once(name, batch))  # type: ignore[misc]
                for phase, taken in found[0].items() if found else ():
                    samples[name].setdefault(phase, Samples()).seconds.append(taken)
        return {name: samples[name] for name in self.processes}, tokens

    def _once(self, name: str, batch: int) -> tuple[dict[str, float], Tokens]:
        """Return the seconds of each phase in one round, and the tokens."""
        process, new = self.processes[name], self.setup.shape.new
        if name == MACHINE:
            return {"read": process.run(batch, 0)[0], "products": process.run(batch, 1)[0]}, []
        first = process.run(batch, 1)[0]
        whole, tokens = process.run(batch, new)
        return {"generate": whole, "prefill": first, "decode": (whole - first) / (new - 1)}, tokens

    def close(self) -> None:
        """End the processes."""
        for process in self.processes.values():
            process.close()


def agreement(tokens: Tokens, reference: Tokens) -> float:
    """Return the share of the tokens before the first one of each row that differs from the reference's."""
    equal = total = 0
    for row, wanted in zip(tokens, reference, strict=True):
        total += len(wanted)
        equal += next((i for i, (a, b) in enumerate(zip(row, wanted)) if a != b), len(wanted))
    return equal / total


def speedups(name: str, phase: str, measured: Measured) -> dict[str, float]:
    """Return this variant's speed against its peers: medians and quantiles over the rounds."""
    theirs = [n for n in TRANSFORMERS if n in measured]
    fastest = min(theirs, key=lambda n: measured[n]["generate"].quantile(0.5), default=None)
    against = {"transformers": fastest, "llama.cpp": PEERS[name], "fp32": "fastgpt" if name != "fastgpt" else None}
    row = {}
    for label, other in against.items():
        if other is not None and other in measured:
            ratio = measured[other][phase].shares(measured[name][phase])
            for key, q in (("", 0.5), ("_q20", 0.2), ("_q80", 0.8)):
                row[f"speed_vs_{label}{key}"] = ratio.quantile(q)
    return row


def phase_row(name: str, phase: str, batch: int, shape: Shape, sizes: dict[str, int], measured: Measured) -> Any:
    """Return the figures of one phase of one variant: times, speed, and the share of what the machine can do."""
    mine, machine = measured[name][phase], measured.get(MACHINE, {})
    middle = mine.quantile(0.5)
    tokens = batch * {"generate": shape.new, "prefill": shape.prompt, "decode": 1}[phase]
    row: dict[str, Any] = {"variant": name, "dtype": DTYPES[name], "phase": phase, **mine.figures()}
    row["tokens_per_s"] = tokens / middle
    if phase == "prefill" and machine:
        products = machine["products"].quantile(0.5)
        row["gflop_s"] = shape.prefill_flops(batch) / middle / 1e9
        row["products_gflop_s"] = shape.product_flops(batch) / products / 1e9
        row["share_of_products"] = row["gflop_s"] / row["products_gflop_s"]
    if phase == "decode" and machine:
        speed = 4 * sizes["read"] / machine["read"].quantile(0.5)
        bytes_read = sizes["weight_bytes"] * sizes["read"] / sizes["parameters"]
        row |= {"read_gb_s": speed / 1e9, "floor_ms": 1e3 * bytes_read / speed}
        row["share_of_floor"] = row["floor_ms"] / row["ms"]
    if "transformers" in measured and name != "transformers":
        row |= mine.against(measured["transformers"][phase], "transformers")
    return row | (speedups(name, phase, measured) if name in OWN else {})


def compare(shape_name: str, names: list[str], batches: list[int], rounds: int | None, threads: int) -> list[Any]:
    """Return three rows per variant and batch, or one with the reason why there are none."""
    torch.set_num_threads(threads)
    shape, rows = SHAPES[shape_name], []
    about = {"bench": "generate", "shape": shape_name, "block": shape.prompt, "new_tokens": shape.new}
    about |= {"versions": versions(), "machine": provenance(torch.device("cpu"))}
    with tempfile.TemporaryDirectory() as folder:
        sizes = write_models(shape, Path(folder), names)
        comparison = Comparison(Setup(shape, Path(folder), threads), names)
        try:
            for batch in batches:
                measured, tokens = comparison.measure(batch, rounds or ROUNDS.get(batch, 3))
                here = {**about, "batch": batch}
                rows += [{**here, **row} for row in rows_of(comparison, batch, sizes, measured, tokens)]
        finally:
            comparison.close()
    return rows


def rows_of(
    comparison: Comparison, batch: int, sizes: dict[str, int], measured: Measured, tokens: dict[str, Tokens]
) -> list[Any]:
    """Return the rows of one batch."""
    rows, shape = [], comparison.setup.shape
    for name, process in comparison.processes.items():
        if name == MACHINE:
            continue
        bytes_of = {**sizes, "weight_bytes": process.weight_bytes}
        cache = shape.cache_bytes(batch, 2 if DTYPES[name] == "q8_0" else 4)
        memory = {"peak_mb": process.peak_mb, "weights_mb": process.weight_bytes / 1e6, "cache_mb": cache / 1e6}
        memory["peak_share"] = 1e6 * process.peak_mb / (process.weight_bytes + cache)
        if "fastgpt" in tokens:
            memory["tokens_agree"] = agreement(tokens[name], tokens["fastgpt"])
        if DTYPES[name] == "fp32" and memory.get("tokens_agree", 1.0) < 1 / shape.new:
            rows.append({"variant": name, "dtype": "fp32", "red": "its first tokens differ from fastgpt's"})
            continue
        for phase in PHASES:
            row = phase_row(name, phase, batch, shape, bytes_of, measured)
            rows.append(row | (memory if phase == "generate" else {}))
    return rows + [{"variant": n, "dtype": DTYPES.get(n, "fp32"), "red": why} for n, why in comparison.failed.items()]


def show(rows: list[Any]) -> str:
    """Return the rows of one batch as a table."""
    head = f"{'variant':<20}{'tokens/s':>9}{'prefill tok/s':>15}{'GFLOP/s':>9}{'% products':>12}{'decode ms':>11}"
    head += f"{'% floor':>9}{'peak MB':>9}{'of w + c':>10}{'agree':>7}  speed against"
    lines = [head]
    by_name: dict[str, dict[str, Any]] = {}
    for r in rows:
        by_name.setdefault(r["variant"], {})[r.get("phase", "red")] = r
    for name, phases in by_name.items():
        if "red" in phases:
            lines.append(f"{name:<20}{phases['red']['red']}")
            continue
        g, p, d = (phases[phase] for phase in PHASES)
        line = f"{name:<20}{digits(g['tokens_per_s']):>9}{digits(p['tokens_per_s']):>15}{digits(p.get('gflop_s')):>9}"
        line += f"{p.get('share_of_products', 0):>12.1%}{d['ms']:>11.2f}{d.get('share_of_floor', 0):>9.1%}"
        line += f"{g['peak_mb']:>9,.0f}{g['peak_share']:>10.2f}{g.get('tokens_agree', 0):>7.0%}"
        ratios = [
            f"{k[9:]} {v:.2f} ({g[k + '_q20']:.2f} .. {g[k + '_q80']:.2f})"
            for k, v in g.items()
            if k.startswith("speed_vs_") and not k.endswith(("_q20", "_q80"))
        ]
        lines.append(f"{line}  {', '.join(ratios)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Return 1 if one of fastgpt's variants has no figures, although it is available."""
    parser = Parser(prog="fastgpt bench generate", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    parser.add_argument("--batch", action="append", type=number(int, 1), help="may be repeated (default: 1 and 16)")
    parser.add_argument("--rounds", type=number(int, 1), help="timed rounds (default: 5 at batch 1, else 3)")
    parser.add_argument(
        "--threads", type=number(int, 1), default=available_cores(), help="of every variant (default: all cores)"
    )
    parser.add_argument("--variant", action="append", choices=DTYPES, help="only these; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for trying this program")
    args = parser.parse_args(argv)
    names, absent = available()
    absent = {name: why for name, why in absent.items() if name in (args.variant or absent)}
    names = [name for name in names if name in (args.variant or names)]
    shape = "tiny" if args.quick else "gpt2-124m"
    batches = sorted(set(args.batch or ([1, 3] if args.quick else ROUNDS)))  # ascending: memory only grows
    rows = compare(shape, names, batches, args.rounds or (2 if args.quick else None), args.threads)
    if rows:
        print(f"{shape}: prompt {rows[0]['block']}, {rows[0]['new_tokens']} new tokens, {where(rows[0]['machine'])}")
    for batch in batches:
        print(f"batch {batch}\n{show([r for r in rows if r['batch'] == batch])}")
    print(*(f"{name}: not measured, {why}" for name, why in absent.items()), sep="\n", flush=True)
    if args.json:
        append_rows(args.json, rows)
    return int(any("red" in r and r["variant"] in OWN for r in rows))


if __name__ == "__main__":
    sys.exit(run_command(main))

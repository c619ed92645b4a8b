"""The server under load against llama.cpp's: `fastgpt bench serve --json FILE`.

GPT-2 124M with random weights in fp32, on a CPU: `fastgpt serve` on the exported folder, and `llama-server` on the GGUF
that fastgpt exports (--llama-server PATH, or that of PATH; without it there are no figures of it). Both have the same
threads, 16 rows or slots of the same length, an fp32 cache, continuous batching and prefix reuse. Both run all the
time, one at a time is asked; in every round each gets the same requests, in turns. The clients are a process of their
own. Answers are greedy streams of a fixed length (ignore_eos); prompts are random ids, others in every round.

    one     a single client: two requests, prompts of 64 to 192 tokens, 64 to 192 new ones
    many    16 clients at once that take such requests from one queue, 48 in all
    prefix  16 clients whose prompts begin with the same 512 tokens, then 16 to 64 others, 32 to 96 new ones

tokens/s: new tokens of all clients over the time of all. first: from the request to the first text of the answer.
token: between two texts. Quantiles over all requests of all rounds; rates and ratios are medians over the rounds.
Ratios of rates above 1 are faster, of first below 1. Memory: the sum of the peaks of a server's processes. A cost is
that of a machine at --price-per-hour that does nothing else. --soak SECONDS: no figures, but 64 clients of which some
misbehave (soak.py) on a tiny model. --quick: a tiny model, for trying this program.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.bench import soak
from fastgpt.bench._harness import Samples, append_rows, provenance, turns, where
from fastgpt.bench.load import Ask, Wave, apart, drive
from fastgpt.bench.servers import (
    Running,
    fastgpt_command,
    find_llama,
    free_port,
    llama_command,
    llama_version,
    memory_mb,
    started,
)
from fastgpt.bench.variants import reason
from fastgpt.core.command import Parser, number, run_command
from fastgpt.core.errors import UserError
from fastgpt.data.tokenizer import available_cores, train_tokenizer
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights import gguf, save_pretrained

OWN, PEER = "fastgpt", "llama.cpp"
ROWS = 16
BODY = 20_000  # bytes of the largest body in a soak


@dataclass(frozen=True)
class Shape:
    """A GPT-2, and the share of the lengths above that its texts have."""

    layers: int
    heads: int
    width: int
    vocab: int
    scale: float
    init_std: float = 0.08  # large enough for the tokens of an answer to differ

    @property
    def context(self) -> int:
        """Tokens of a row or slot: the longest prompt and its answer."""
        return round(704 * self.scale)

    def config(self) -> ModelConfig:
        """Return the model."""
        sizes: dict[str, Any] = dict(n_layers=self.layers, n_heads=self.heads, width=self.width, vocab_multiple=1)
        block = max(64, round(1024 * self.scale))
        return ModelConfig(**sizes, vocab_size=self.vocab, block_size=block, init_std=self.init_std)


SHAPES = {"gpt2-124m": Shape(12, 12, 768, 50257, 1.0), "tiny": Shape(2, 2, 32, 300, 0.125, 0.3)}


@dataclass(frozen=True)
class Workload:
    """Clients, the requests of all, and the least and most tokens of a prompt and of an answer."""

    clients: int
    requests: int
    prompt: tuple[int, int]
    new: tuple[int, int]
    shared: int = 0  # tokens with which all prompts begin

    def asks(self, shape: Shape, seed: int) -> list[Ask]:
        """Return the requests of a round."""
        draw = np.random.default_rng(seed)
        same = np.random.default_rng(10**6).integers(1, shape.vocab, round(self.shared * shape.scale)).tolist()

        def one() -> Ask:
            prompt, new = (max(2, round(shape.scale * draw.integers(*ends, endpoint=True))) for ends in self.lengths)
            return Ask([*same, *draw.integers(1, shape.vocab, prompt).tolist()], new)

        return [one() for _ in range(self.requests)]

    @property
    def lengths(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.prompt, self.new


WORKLOADS = {
    "one": Workload(1, 2, (64, 192), (64, 192)),
    "many": Workload(16, 48, (64, 192), (64, 192)),
    "prefix": Workload(16, 16, (16, 64), (32, 96), 512),
}


def write_model(shape: Shape, folder: Path, with_gguf: bool) -> None:
    """Write a model with a tokenizer that has a text for every id, as a folder and as GGUF."""
    draw, letters = np.random.default_rng(0), list("abcdefghijklmnopqrstuvwxyz")
    words = ["".join(draw.choice(letters, draw.integers(4, 9))) for _ in range(max(100, shape.vocab * 4 // 5))]
    texts = [" ".join(words[i : i + 1000]) for i in range(0, len(words), 1000)]
    tokenizer = train_tokenizer(texts, shape.vocab)
    model = GPT(shape.config(), generator=torch.Generator().manual_seed(0)).eval()
    save_pretrained(model, folder / "hf", extra={"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot})
    tokenizer.save(folder / "hf" / "tokenizer.json")
    if with_gguf:
        (folder / "gguf").mkdir()
        named = {name: p.detach() for name, p in model.named_parameters()}
        gguf.write(folder / "gguf", model.config, named.__getitem__, "fp32", tokenizer.text, tokenizer.eot)


def measure(servers: list[Running], shape: Shape, names: list[str], rounds: int) -> dict[tuple[str, str], list[Wave]]:
    """Return the waves of every workload and server, one a round; the first round is warm-up."""
    found: dict[tuple[str, str], list[Wave]] = {(name, s.name): [] for name in names for s in servers}
    by_name = {s.name: s for s in servers}
    with apart() as process:
        for turn in range(-1, rounds):
            for place, name in enumerate(names):
                workload = WORKLOADS[name]
                asks = workload.asks(shape, 1000 * (turn + 1) + place)
                for server in turns(list(by_name), max(0, turn)):
                    wave = process.submit(drive, by_name[server].port, asks, workload.clients).result()
                    if turn >= 0:
                        found[name, server].append(wave)
    return found


def figures(waves: list[Wave]) -> dict[str, float]:
    """Return the figures of a workload on a server."""
    rates = Samples([wave.rate for wave in waves])
    row = {f"tokens_per_s{end}": rates.quantile(q) for end, q in (("", 0.5), ("_q20", 0.2), ("_q80", 0.8))}
    for name, seconds in (
        ("first", [s for w in waves for s in w.first]),
        ("token", [s for w in waves for s in w.gaps]),
    ):
        row |= {f"{name}_p{q}_ms": 1e3 * Samples(seconds).quantile(q / 100) for q in (50, 99)}
    return row


def ratios(ours: list[Wave], theirs: list[Wave]) -> dict[str, float]:
    """Return our rate over theirs, and our median time to the first token over theirs, round by round."""
    row: dict[str, float] = {}
    for key, values in (
        ("speed", [a.rate / b.rate for a, b in zip(ours, theirs)]),
        ("first", [Samples(a.first).quantile(0.5) / Samples(b.first).quantile(0.5) for a, b in zip(ours, theirs)]),
    ):
        row |= {
            f"{key}_vs_{PEER}{end}": Samples(values).quantile(q) for end, q in (("", 0.5), ("_q20", 0.2), ("_q80", 0.8))
        }
    return row


def compare(args: Any, llama: str | None) -> list[dict[str, Any]]:
    """Return a row for each workload and server."""
    shape_name = "tiny" if args.quick else "gpt2-124m"
    shape, names = SHAPES[shape_name], args.workload or list(WORKLOADS)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        folder = Path(place)
        write_model(shape, folder, llama is not None)
        commands = {
            OWN: lambda port: fastgpt_command(folder / "hf", port, args.threads, ROWS, "--context", str(shape.context))
        }
        if llama is not None:
            file = folder / "gguf" / "model.gguf"
            commands[PEER] = lambda port: llama_command(llama, file, port, args.threads, ROWS, shape.context)
        servers = []
        for name, command in commands.items():
            port = free_port()
            servers.append(stack.enter_context(started(name, command(port), port, folder / f"{name}.log")))
        found = measure(servers, shape, names, args.rounds or (2 if args.quick else 3))
        memory = {s.name: memory_mb(s.pid, "VmHWM") for s in servers}
    about = {"bench": "serve", "shape": shape_name, "dtype": "fp32", "rows": ROWS, "threads": args.threads}
    about |= {"versions": {PEER: llama_version(llama)} if llama else {}, "machine": provenance(torch.device("cpu"))}
    rows = []
    for (name, server), waves in found.items():
        w = WORKLOADS[name]
        row = {**about, "kind": name, "variant": server, "clients": w.clients, "samples": len(waves)}
        row |= {"prompt": list(w.prompt), "new_tokens": list(w.new), "shared": w.shared}
        row |= {**figures(waves), "memory_mb": memory[server]}
        if server == OWN and (name, PEER) in found:
            row |= ratios(waves, found[name, PEER])
        if w.clients > 1 and ("one", server) in found:
            row["speed_vs_one"] = row["tokens_per_s"] / figures(found["one", server])["tokens_per_s"]
        if args.price_per_hour is not None:
            row["cost_per_million"] = args.price_per_hour / 3600 / row["tokens_per_s"] * 1e6
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    lines = [f"{'load':<8}{'clients':>8}  {'server':<11}{'tokens/s':>9}{'/ one':>7}{'first p50':>11}{'p99 ms':>8}"]
    lines[0] += f"{'token p50':>11}{'p99 ms':>8}{'peak MB':>9}{'per million':>13}  against llama.cpp"
    for r in rows:
        line = f"{r['kind']:<8}{r['clients']:>8}  {r['variant']:<11}{r['tokens_per_s']:>9.1f}"
        line += f"{r['speed_vs_one']:>7.2f}" if "speed_vs_one" in r else f"{'':>7}"
        line += f"{r['first_p50_ms']:>11,.0f}{r['first_p99_ms']:>8,.0f}"
        line += f"{r['token_p50_ms']:>11,.1f}{r['token_p99_ms']:>8,.1f}"
        line += f"{r['memory_mb']:>9,.0f}" + (
            f"{r['cost_per_million']:>13.3f}" if "cost_per_million" in r else f"{'':>13}"
        )
        key = f"speed_vs_{PEER}"
        if key in r:
            line += f"  {r[key]:.2f} ({r[key + '_q20']:.2f} .. {r[key + '_q80']:.2f}) times as fast, "
            line += f"first {r[f'first_vs_{PEER}']:.2f}"
        lines.append(line)
    return "\n".join(lines)


def run_soak(seconds: float) -> int:
    """Run the clients that misbehave, and print what came of it; return 1 if something went wrong."""
    with tempfile.TemporaryDirectory() as place:
        folder, port = Path(place), free_port()
        write_model(SHAPES["tiny"], folder, False)
        command = fastgpt_command(folder / "hf", port, 1, ROWS, "--max-body", str(BODY))
        with started(OWN, command, port, folder / "log") as server:
            report = asyncio.run(soak.Soak(port, server.pid, BODY).run(seconds))
    print(soak.show(report))
    return int(bool(report.faults))


def main(argv: list[str] | None = None) -> int:
    """Return 1 if there are no figures, or a soak finds a fault."""
    parser = Parser(prog="fastgpt bench serve", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="may be repeated (default: all)")
    parser.add_argument("--rounds", type=number(int, 1), help="timed rounds (default: 3)")
    parser.add_argument("--threads", type=number(int, 1), default=available_cores(), help="default: all cores")
    parser.add_argument("--llama-server", metavar="PATH", help="llama.cpp's server (default: that of PATH)")
    parser.add_argument("--price-per-hour", type=number(float, 0), metavar="PRICE", help="of the machine, for the cost")
    parser.add_argument("--soak", type=number(float, 0, open_least=True), metavar="SECONDS", help="see above")
    parser.add_argument("--quick", action="store_true", help="a tiny model, for trying this program")
    args = parser.parse_args(argv)
    if args.soak is not None:
        return run_soak(args.soak)
    llama = find_llama(args.llama_server)
    if args.llama_server and llama is None:
        raise UserError(f"--llama-server: {args.llama_server} is not a program, expected llama.cpp's llama-server")
    try:
        rows = compare(args, llama)
    except (RuntimeError, ValueError, OSError, EOFError) as e:
        print(f"serve: {reason(e)}", flush=True)
        return 1
    print(f"{rows[0]['shape']} in fp32, {ROWS} rows, {where(rows[0]['machine'])}\n{show(rows)}")
    if llama is None:
        print("llama.cpp: not measured, needs llama-server (--llama-server PATH)")
    sys.stdout.flush()
    if args.json:
        append_rows(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

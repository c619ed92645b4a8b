"""What watching costs the server's event loop for each token: `fastgpt bench watch --json FILE`.

Answers of 256 random words, a piece for each token of about four characters, pass through the watcher in a loop without
model and network. Variants, in turns: off, as a server without the options; a list of 1,000 words; 20 patterns; both
with `--on-flag stop`. No answer is flagged. `us` is the time of a token, the median over the rounds.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fastgpt.bench._harness import Samples, append_rows, provenance, turns, where
from fastgpt.core.command import Parser, number, run_command
from fastgpt.inference import Piece, Request, Result

OFF, VARIANTS = "off", ("off", "words", "patterns", "stop")
WORDS, TERMS, PATTERNS = 256, 1000, 20
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=rng.randint(2, 9)))


def answer(rng: random.Random) -> list[Piece]:
    """Return the pieces of an answer."""
    text = " ".join(word(rng) for _ in range(WORDS))
    parts = [text[at : at + 4] for at in range(0, len(text), 4)]
    result = Result([0] * len(parts), text, "length", 1, 0)
    return [Piece(0, 0, part, result if i == len(parts) - 1 else None) for i, part in enumerate(parts)]


def watchers(folder: Path) -> dict[str, Any]:
    """Return a watcher for each variant; None for off."""
    from prometheus_client import CollectorRegistry

    from fastgpt.serve.watch.flags import PatternFlag, WordFlag
    from fastgpt.serve.watch.settings import Watch
    from fastgpt.serve.watch.watcher import Watcher

    rng = random.Random(1)
    (folder / "words.txt").write_text("\n".join(f"{word(rng)}0" for _ in range(TERMS)))
    (folder / "patterns.txt").write_text("\n".join(rf"\b{word(rng)}\d+|\d{{{i + 2}}}" for i in range(PATTERNS)))
    words, patterns = WordFlag("words", folder / "words.txt"), PatternFlag("patterns", folder / "patterns.txt")
    watches = {
        "words": Watch((words,)),
        "patterns": Watch((patterns,)),
        "stop": Watch((words, patterns), stop=True),
    }
    return {OFF: None, **{name: Watcher(watch, CollectorRegistry()) for name, watch in watches.items()}}


async def seconds(watcher: Any, pieces: list[Piece]) -> float:
    """Return the seconds of a token of an answer."""
    call: Any = SimpleNamespace(
        body=SimpleNamespace(n=1, user=None, safety_identifier=None), served=SimpleNamespace(name="m"), id="cmpl-0"
    )

    async def stream() -> AsyncIterator[tuple[int, Piece]]:
        for piece in pieces:
            yield 0, piece

    start, count = time.perf_counter(), 0
    found = stream() if watcher is None else watcher.seen(call, [Request("x")], stream())
    async for _, piece in found:
        count += piece.id is not None
    assert count == len(pieces), "an answer was flagged"
    return (time.perf_counter() - start) / count


def measure(rounds: int) -> dict[str, Samples]:
    """Return the seconds of a token of each variant, one sample a round; the first round is left out."""
    samples, rng = {name: Samples() for name in VARIANTS}, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        found = watchers(Path(folder))
        for turn in range(rounds + 1):
            pieces = answer(rng)
            for name in turns(list(VARIANTS), turn):
                took = asyncio.run(seconds(found[name], pieces))
                if turn:
                    samples[name].seconds.append(took)
        for watcher in filter(None, found.values()):
            watcher.close()
    return samples


def main(argv: list[str] | None = None) -> int:
    """Run `fastgpt bench watch`."""
    parser = Parser(prog="fastgpt bench watch", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    parser.add_argument("--rounds", type=number(int, 1), default=40, help="answers of each variant (default: 40)")
    args = parser.parse_args(argv)
    samples = measure(args.rounds)
    about: dict[str, Any] = {"bench": "watch", "shape": f"{WORDS} words", "phase": "token"}
    about |= {"terms": TERMS, "patterns": PATTERNS, "machine": provenance(torch.device("cpu"))}
    rows = []
    print(f"{TERMS} words, {PATTERNS} patterns, {where(about['machine'])}")
    for name, mine in samples.items():
        row = {**about, "variant": name, **mine.figures("us")}
        rows.append(row | (mine.against(samples[OFF], OFF) if name != OFF else {}))
        print(f"{name:<10}{row['us']:>9.2f} us a token")
    if args.json:
        append_rows(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

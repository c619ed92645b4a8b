"""`fastgpt feedback`: what users of a server said about its answers, as data for `fastgpt finetune`."""

from __future__ import annotations

import json
from pathlib import Path

from fastgpt.core.command import Parser, run_group
from fastgpt.core.errors import UserError, counted
from fastgpt.core.folders import write_text
from fastgpt.serve.feedback.export import count
from fastgpt.serve.watch.store import Store

SUBCOMMANDS = {"export": ("fastgpt.serve.feedback.command:export", "write preference pairs, or ratings for KTO")}


def main(argv: list[str]) -> int:
    """Run `fastgpt feedback`."""
    about = "Use what `fastgpt serve --feedback DIR` kept.\n"
    return run_group("fastgpt feedback", "DIR ...", about, SUBCOMMANDS, argv)


def export(argv: list[str]) -> int:
    """Run `fastgpt feedback export`."""
    parser = Parser(prog="fastgpt feedback export", description="Write thumbs as data for `fastgpt finetune`.")
    parser.add_argument("store", type=Path, metavar="DIR", help="folder that `fastgpt serve --feedback` wrote to")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument(
        "--format",
        choices=("preference", "kto"),
        default="preference",
        help="pairs for --task dpo, orpo and reward, or rated completions for --task kto (default: preference)",
    )
    args = parser.parse_args(argv)
    votes = count(Store(args.store).records("feedback"))
    rows = list(votes.pairs() if args.format == "preference" else votes.rated())
    left = "; ".join(f"{reason}: {n}" for reason, n in votes.left.items() if n)
    if not rows:
        what = "pairs" if args.format == "preference" else "ratings"
        raise UserError(f"{args.store} has no {what}{f' ({left})' if left else ''}, expected thumbs up and down")
    write_text(args.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{args.out}: {counted(len(rows), 'row')}" + (f"; left out: {left}" if left else ""))
    return 0

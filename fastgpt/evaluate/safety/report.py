"""`fastgpt eval safety-report`: safety before and after fine-tuning, with a check of what was forgotten."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from fastgpt.core import page
from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError
from fastgpt.core.folders import write_text
from fastgpt.evaluate.paired import name_of
from fastgpt.evaluate.results import Results, load_results
from fastgpt.evaluate.safety.changes import Change, changes_of, is_part
from fastgpt.evaluate.safety.forgetting import METRIC, Forgetting, General, forgetting
from fastgpt.evaluate.safety.report_page import console, sections

VERSION = 1  # of the JSON
ALLOWED = 0.03  # bits per byte


def main(argv: list[str]) -> int:
    """Run `fastgpt eval safety-report`; return 1 if more was forgotten than allowed, else 0."""
    args = _parser().parse_args(argv)
    before, after = _results(args)
    names = _names(before, after, args)
    changes = changes_of(before, after)
    rows = [c.row for c in changes if c.row is not None]
    found = forgetting(rows, args.allow)
    if args.general and not found:
        raise UserError(f"{args.before if args.before.endswith('.json') else args.after} has no {METRIC} to compare")
    print(console(changes, found, *names, _notes(before, after)))
    if args.out:
        write_text(args.out, json.dumps(_json(names, before, after, changes, found), indent=1, allow_nan=False) + "\n")
        print(f"report: {args.out}")
    if args.page:
        parts = sections(changes, found, *names, _notes(before, after))
        write_text(args.page, page.page("Safety before and after", f"{names[0]} and {names[1]}.", parts))
        print(f"page: {args.page}")
    return int(any(f.exceeded for f in found))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fastgpt eval safety-report",
        description="Report bias, toxicity, memorisation and refusal before and after fine-tuning, and what was "
        "forgotten. Exit with 1 if bits per byte rose by more than allowed.",
    )
    what = "run, checkpoint or folder of a model, or JSON of `fastgpt eval --preset safety`"
    parser.add_argument("before", metavar="BEFORE", help=f"{what}, before fine-tuning")
    parser.add_argument("after", metavar="AFTER", help="the same after it")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the files of the probes")
    parser.add_argument(
        "--general", metavar="CORPUS", help="general text for the check of forgetting: .jsonl, text, folder or shards"
    )
    parser.add_argument(
        "--allow",
        type=number(float, 0),
        default=ALLOWED,
        metavar="BITS",
        help=f"rise in bits per byte that is not forgetting (default: {ALLOWED})",
    )
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="items of each probe (default: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the report as one HTML page")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: bf16 on a GPU, fp32 on a CPU")
    return parser


def _results(args: argparse.Namespace) -> tuple[Results, Results]:
    """Return both evaluations: of JSON as they are, of models by evaluating them.

    Raises:
        UserError: a file or a model cannot be used, or an option has no effect.
    """
    places = (args.before, args.after)
    models = [p for p in places if not Path(p).is_file()]
    for name in ("data", "general", "limit", "device", "dtype"):
        if not models and getattr(args, name) is not None:
            raise UserError(f"--{name} has no effect on results that are there, expected a model as BEFORE or AFTER")
    for path in filter(None, (args.out, args.page)):
        if path.is_dir():
            raise UserError(f"{path} is a folder, expected the name of a file")
    if args.page:
        page.figure(lambda axes: None, 1, 1)  # matplotlib is missed now, not at the end
    known = {p: load_results(p) for p in places if p not in models}
    before, after = (known[p] if p in known else _evaluate(p, args) for p in places)
    return before, after


def _evaluate(model: str, args: argparse.Namespace) -> Results:
    """Evaluate a model on the probes and the general corpus, and keep the results where `fastgpt eval` does."""
    from fastgpt.evaluate.command import default_path
    from fastgpt.evaluate.presets import parts_of
    from fastgpt.evaluate.run import run_parts
    from fastgpt.evaluate.target import open_target

    target = open_target(model, device=args.device or "auto", dtype=args.dtype)
    parts = parts_of("safety", args.data)
    more = [General(args.general)] if args.general else []
    results = run_parts(target, "safety", [*parts, *more], limit=args.limit)
    out = default_path(target.folder, results.model.get("step"), "safety")
    results.save(out)
    print(f"results of {model}: {out}")
    return results


def _names(before: Results, after: Results, args: argparse.Namespace) -> tuple[str, str]:
    """Return what to call the models; the arguments, where both have the same name."""
    names = name_of(before), name_of(after)
    return names if names[0] != names[1] else (args.before, args.after)


def _notes(before: Results, after: Results) -> list[str]:
    """Return the notes of both, each once."""
    return list(dict.fromkeys([*before.notes, *after.notes]))


def _json(
    names: tuple[str, str], before: Results, after: Results, changes: list[Change], found: list[Forgetting]
) -> dict[str, Any]:
    return {
        "version": VERSION,
        "before": {"name": names[0], "model": before.model},
        "after": {"name": names[1], "model": after.model},
        "changes": [c.to_dict() | {"part": is_part(c)} for c in changes],
        "forgetting": [dataclasses.asdict(f) | {"change": f.change, "exceeded": f.exceeded} for f in found],
        "notes": _notes(before, after),
    }

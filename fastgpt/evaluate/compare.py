"""`fastgpt eval compare`: the differences between evaluations, as a table, JSON and a page; and a gate for jobs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from fastgpt.core import page
from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError, counted
from fastgpt.core.folders import write_text
from fastgpt.evaluate.gate import held_against
from fastgpt.evaluate.paired import OVERALL, Comparison, Options, Row, compare, name_of
from fastgpt.evaluate.results import Results, load_results

VERSION = 1  # of the JSON
ABOUT = "Compare evaluations of the same items: the difference of each metric, its interval and its test."


def main(argv: list[str]) -> int:
    """Run `fastgpt eval compare`; return 1 if a gate found a regression, else 0."""
    args = _parser().parse_args(argv)
    _check(args)
    options = Options(tuple(args.metrics or ()), args.weight, args.confidence / 100, args.resamples, args.seed)
    if args.gate:
        return _gate(args, options)
    results = open_all(args.results, args.preset)
    names = _distinct_names(results, args.results)
    compared = [compare(results[0], other, options) for other in results[1:]]
    for name, comparison in zip(names[1:], compared):
        print("\n".join(lines(comparison, names[0], name, options)), end="\n\n")
    if args.out:
        write_text(args.out, json.dumps(_json(results, names, compared, options), indent=1, allow_nan=False) + "\n")
    if args.page:
        sections = [section(c, names[0], name, options) for name, c in zip(names[1:], compared)]
        write_text(args.page, page.page("Comparison of evaluations", f"Preset {results[0].preset}.", sections))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastgpt eval compare", description=ABOUT)
    parser.add_argument(
        "results",
        nargs="+",
        metavar="RESULTS",
        help="JSON of `fastgpt eval`, or a run: its evaluation at the last step; the first one is the base",
    )
    parser.add_argument("--preset", metavar="NAME", help="of the evaluations of runs (default: the one that all have)")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="metrics to compare (default: all)")
    parser.add_argument(
        "--weight",
        choices=("task", "item"),
        default="task",
        help="what counts equally in the overall mean (default: task)",
    )
    parser.add_argument(
        "--confidence",
        type=number(float, 0, 99.99, open_least=True),
        default=95.0,
        metavar="PERCENT",
        help="of the intervals (default: 95)",
    )
    parser.add_argument(
        "--resamples", type=number(int, 100), default=10_000, metavar="N", help="of the bootstrap (default: 10000)"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the bootstrap (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the comparison as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the comparison as an HTML page")
    parser.add_argument(
        "--gate", metavar="BASE", help="exit with 1 if RESULTS are significantly worse than these, with 0 if not"
    )
    add_bounds(parser)
    return parser


def add_bounds(parser: argparse.ArgumentParser) -> None:
    """Add the options that say when a gate fails; None where they are not given."""
    parser.add_argument(
        "--alpha",
        type=number(float, 0, 0.5, open_least=True),
        help="chance that the gate fails although nothing became worse (default: 0.05)",
    )
    parser.add_argument(
        "--min-difference",
        type=number(float, 0),
        metavar="D",
        help="smaller regressions pass the gate, in the unit of the metric (default: 0)",
    )


def _check(args: argparse.Namespace) -> None:
    """Refuse settings that have no effect."""
    if args.gate:
        if len(args.results) != 1:
            got = counted(len(args.results), "evaluation")
            raise UserError(f"--gate: got {got}, expected one, to compare with {args.gate}")
        return
    for name in ("alpha", "min_difference"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --gate, expected --gate BASE")
    if len(args.results) < 2:
        raise UserError(f"compare: got one evaluation, {args.results[0]}, expected two or more")


def _gate(args: argparse.Namespace, options: Options) -> int:
    """Compare one evaluation with that of --gate, print what became worse, and return the exit code."""
    alpha = 0.05 if args.alpha is None else args.alpha
    base, new = results = open_all([args.gate, *args.results], args.preset)
    names = (args.gate, args.results[0])
    verdict = held_against(base, new, options, alpha, args.min_difference or 0.0, names)
    comparison, tested, found = verdict.comparison, verdict.tested, verdict.failed
    for row in found:
        print(f"FAIL {row_line(row)}")
    untested = [f"{r.task} {r.metric}" for r in comparison.rows if r.p_worse is None]
    for note in [*comparison.notes, *(f"not tested, because it has no better direction: {u}" for u in untested)]:
        print(f"note: {note}")
    print(f"{len(found)} of {counted(len(tested), 'test')} failed at alpha {alpha:g}, corrected for their number")
    shown = _distinct_names(results, list(names))
    if args.out:
        values = _json(results, shown, [comparison], options) | {"failed": [[r.task, r.metric] for r in found]}
        write_text(args.out, json.dumps(values, indent=1, allow_nan=False) + "\n")
    if args.page:
        write_text(
            args.page, page.page("Gate", f"Preset {base.preset}.", [section(comparison, shown[0], shown[1], options)])
        )
    return 1 if found else 0


def row_line(row: Row) -> str:
    """Return a metric that became worse as a line of text."""
    change = f"{row.a:.4f} -> {row.b:.4f} ({_signed(row.difference)}, {_interval(row)}"
    return f"{row.task} {row.metric}: {change}, n={row.n}, p={_p(row.p_worse_holm)})"


def open_all(places: list[str], preset: str | None) -> list[Results]:
    """Read evaluations: of files, and of runs those of the preset at the last step.

    Raises:
        UserError: a file is not an evaluation; a run has none of the preset; without a preset, the runs and files have
            not exactly one in common.
    """
    folders = [Path(p) for p in places if Path(p).is_dir()]
    if preset is not None and not folders:
        raise UserError("--preset is for runs, expected a run among the evaluations")
    files: dict[Path, Results] = {Path(p): load_results(p) for p in places if not Path(p).is_dir()}
    evaluations = {folder: _newest(folder) for folder in folders}
    if folders and preset is None:
        sets = [set(found) for found in evaluations.values()] + [{r.preset} for r in files.values()]
        shared = sorted(set.intersection(*sets))
        if len(shared) != 1:
            names = ", ".join(shared) or "none"
            raise UserError(
                f"the evaluations have these presets in common: {names}; expected --preset NAME with one of them"
            )
        preset = shared[0]
    for folder, found in evaluations.items():
        if preset not in found:
            there = ", ".join(found)
            raise UserError(f"{folder / 'eval'} has no evaluation of preset {preset!r}, expected one of {there}")
    return [files[Path(p)] if Path(p) in files else evaluations[Path(p)][str(preset)] for p in places]


def _newest(run: Path) -> dict[str, Results]:
    """Return the evaluation of each preset in a run's folder `eval` at the last step, or at that of a checkpoint."""
    newest: dict[str, Results] = {}
    folder, steps = run / "eval", "step-*.json"
    if step := re.fullmatch(r"step_0*(\d+)", run.name):
        folder, steps = run.parent / "eval", f"step-{step[1]}-*.json"
    for file in sorted(folder.glob(steps)) or ([] if step else sorted(folder.glob("*.json"))):  # weights have no steps
        found = load_results(file)
        before = newest.get(found.preset)
        if before is None or (found.model.get("step") or 0) >= (before.model.get("step") or 0):
            newest[found.preset] = found
    if not newest:
        raise UserError(f"{run} has no evaluation, expected one in {folder}, where `fastgpt eval {run}` writes it")
    return newest


def _distinct_names(results: list[Results], places: list[str]) -> list[str]:
    """Return names of the models; the paths, where two have the same name."""
    names = [name_of(r) for r in results]
    return names if len(set(names)) == len(names) else list(places)


HEAD = ["task", "metric", "items", "A", "B", "B - A", "interval", "higher/lower in B", "p", "p (Holm)", ""]


def table(comparison: Comparison) -> list[list[str]]:
    """Return the cells of the table, the header first."""
    return [HEAD] + [
        [
            r.task,
            r.metric,
            str(r.n),
            f"{r.a:.4f}",
            f"{r.b:.4f}",
            _signed(r.difference),
            _interval(r),
            f"{r.above}/{r.below}",
            _p(r.p),
            _p(r.p_holm),
            r.verdict,
        ]
        for r in comparison.rows
    ]


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _interval(row: Row) -> str:
    return "-" if row.low is None or row.high is None else f"{row.low:+.4f} to {row.high:+.4f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.0001" if value < 1e-4 else f"{value:.4f}"


def explained(comparison: Comparison, a: str, b: str, options: Options) -> list[str]:
    """Return the sentences that belong to the table."""
    tests = {r.test for r in comparison.rows}
    found = [
        f"A is {a}, B is {b}. Intervals cover {100 * options.confidence:.4g} %, paired by item.",
        "Better and worse: p (Holm) is at most 0.05.",
    ]
    if "McNemar" in tests:
        found.append("Values 0 and 1: McNemar's exact test, interval of Agresti and Min.")
    if "sign flip" in tests:
        drawn = f"{options.resamples:,} resamples, seed {options.seed}"
        found.append(f"Other values and means over tasks: sign-flip test, bootstrap percentiles ({drawn}).")
    if any(r.task == OVERALL for r in comparison.rows):
        found.append(f"Overall: each {options.weight} counts equally; resampled within tasks.")
    alone = [f"{r.task} {r.metric} ({r.only_a} in A, {r.only_b} in B)" for r in comparison.rows if r.only_a or r.only_b]
    if alone:
        found.append(f"Items that one side has alone, and that are left out: {', '.join(alone)}.")
    return found + [note[0].upper() + note[1:] + "." for note in comparison.notes]


def lines(comparison: Comparison, a: str, b: str, options: Options) -> list[str]:
    """Return the table and its sentences for the console."""
    rows = table(comparison)
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    text = [
        "  ".join(
            c.ljust(w) if i < 2 or i == len(HEAD) - 1 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    return [*text, "", *explained(comparison, a, b, options)]


def section(comparison: Comparison, a: str, b: str, options: Options = Options()) -> page.Section:
    """Return the comparison as a part of a page, with a plot of each metric."""
    title, text = f"{b} against {a}", explained(comparison, a, b, options)
    metrics = dict.fromkeys(r.metric for r in comparison.rows if r.low is not None)
    plots = [_plot(metric, [r for r in comparison.rows if r.metric == metric], f"{b} - {a}") for metric in metrics]
    return page.Section(title, text, [page.Table("Differences", table(comparison))], plots)


def _plot(metric: str, rows: list[Row], label: str) -> page.Plot:
    """Return the differences of a metric with their intervals; metrics have different units, hence one plot each."""
    ends = [(r.difference if r.low is None else r.low, r.difference if r.high is None else r.high) for r in rows]

    def draw(axes: Any) -> None:
        values = [r.difference for r in rows]
        reach = [[v - low for v, (low, _) in zip(values, ends)], [high - v for v, (_, high) in zip(values, ends)]]
        axes.errorbar(values, range(len(rows)), xerr=reach, fmt="o", color="#0969da", capsize=3)
        axes.axvline(0, color="#57606a", linewidth=1)
        axes.set_yticks(range(len(rows)), [r.task for r in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(f"{metric}: {label}")

    about = f"Differences in {metric} with their intervals, {label}"
    return page.Plot(f"compare-{metric}.png", about, page.figure(draw, 8, 1.0 + 0.3 * len(rows)))


def _json(results: list[Results], names: list[str], compared: list[Comparison], options: Options) -> dict[str, Any]:
    return {
        "version": VERSION,
        "preset": results[0].preset,
        "options": dataclasses.asdict(options),
        "base": {"name": names[0], "model": results[0].model},
        "comparisons": [
            {
                "name": name,
                "model": other.model,
                "rows": [dataclasses.asdict(r) | {"verdict": r.verdict} for r in c.rows],
                "notes": c.notes,
            }
            for name, other, c in zip(names[1:], results[1:], compared)
        ],
    }

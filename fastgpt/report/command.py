"""`fastgpt report RUN...`: write a page that shows runs and compares them."""

from __future__ import annotations

from pathlib import Path

from fastgpt.core.command import Parser
from fastgpt.core.errors import UserError
from fastgpt.core.folders import write_text
from fastgpt.report.page import render
from fastgpt.report.run import RunFiles, names
from fastgpt.report.series import MOST

POINTS = 2400  # of a figure, of all runs together: pages of many runs stay small


def main(argv: list[str]) -> int:
    """Run `fastgpt report` and return its exit code."""
    about = "Write one HTML page that shows runs of fastgpt train and finetune, and compares them."
    parser = Parser(prog="fastgpt report", description=about)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first run's folder)")
    args = parser.parse_args(argv)

    folders = [Path(run) for run in args.runs]
    out = Path(args.out) if args.out else folders[0] / "report.html"
    runs = read(folders)
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder, expected a file")
    write_text(out, render(runs), errors="replace")
    print(f"{out}: {', '.join(f'{run.name} ({run.metrics.count:,} steps)' for run in runs)}")
    for run in runs:
        if unread := run.unread():
            print(unread)
    return 0


def read(folders: list[Path]) -> list[RunFiles]:
    """Return the runs with all their rows.

    Raises:
        UserError: a folder is no run, or has no step yet.
    """
    most = max(100, min(MOST, POINTS // len(folders) // 2 * 2))
    runs = [RunFiles.open(folder, most=most) for folder in folders]  # all are looked for before one is read
    for run, name in zip(runs, names(folders)):
        run.name = name
        run.refresh()
        if not run.metrics.count:
            raise UserError(f"{run.tail.path} has no row of a step, expected a run that has begun to train")
    return runs

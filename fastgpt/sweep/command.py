"""`fastgpt sweep FILE`: train with many settings, compare them, and write the best ones to a file."""

from __future__ import annotations

import fcntl
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgpt.core.command import Parser
from fastgpt.core.errors import UserError, counted
from fastgpt.core.folders import write_text
from fastgpt.distributed.mesh import find_mesh
from fastgpt.report.words import digits, duration
from fastgpt.sweep import table
from fastgpt.sweep.best import best_yaml
from fastgpt.sweep.check import Candidate, candidates, check_data
from fastgpt.sweep.estimate import estimate
from fastgpt.sweep.jobs import Grid, Job, Source
from fastgpt.sweep.outcome import Outcome
from fastgpt.sweep.page import render
from fastgpt.sweep.pool import Pool
from fastgpt.sweep.search import Search, require_optuna
from fastgpt.sweep.spec import Spec, load
from fastgpt.training.stop import Stop

WRITTEN = ("results.jsonl", "sweep.html", "best.yaml")
SHOWN = 20  # rows of the table in the terminal


def main(argv: list[str]) -> int:
    """Run `fastgpt sweep`; return 1 if every run failed."""
    about = "Train with many settings and compare them. The same command continues a sweep that was stopped."
    parser = Parser(prog="fastgpt sweep", description=about)
    parser.add_argument("file", metavar="FILE", help="YAML file of the sweep")
    parser.add_argument("--out", metavar="DIR", help="folder of the sweep (default: runs/ and the name of the file)")
    parser.add_argument("--markdown", metavar="FILE", help="write the table of results in Markdown, - prints it")
    parser.add_argument("--dry-run", action="store_true", help="print what would run and the hours, without training")
    args = parser.parse_args(argv)

    if find_mesh().world > 1:
        raise UserError("sweep works without torchrun, expected parallel and devices in its file instead")
    path = Path(args.file)
    out = Path(args.out) if args.out else Path("runs") / path.stem
    spec = load(path)
    found = candidates(spec)
    if args.dry_run:
        print("\n".join(plan(spec, found)))
        return 0
    if spec.sampler != "grid":
        require_optuna()
    check_data(spec, found)
    with locked(out):
        source: Source = Grid(spec, out) if spec.sampler == "grid" else Search(spec, found, out)
        with Stop() as stop:
            Pool(spec, source, Report(spec, source, out)).run(stop)
        write(spec, source, out, args.markdown)
    if stop.asked:
        print(f"stopped; to continue: {shlex.join(['fastgpt', 'sweep', *argv])}")
        return 0
    return 0 if any(one.status != "failed" for row in source.rows() for one in row.outcomes) else 1


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Make the folder of a sweep, and hold it for this process.

    Raises:
        UserError: another process holds it, or a run of fastgpt train is there.
    """
    if (out / "run.json").exists():
        raise UserError(f"{out} holds a run of fastgpt train, expected another --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another sweep runs in {out}, expected another --out, or wait for its end") from None
        yield


class Report:
    """Prints a line for each run that ends, and keeps results.jsonl up to date."""

    def __init__(self, spec: Spec, source: Source, out: Path) -> None:
        self.spec, self.source, self.out = spec, source, out

    def __call__(self, job: Job, found: Outcome) -> None:
        rows = self.source.rows()
        write_text(self.out / "results.jsonl", table.result_rows(rows, self.spec))
        n = sum(len(row.outcomes) for row in rows)
        what = found.reason if found.status == "failed" else f"{self.spec.metric} {digits(found.value)}"
        state = "" if found.status == "complete" else f"{found.status}: "
        print(
            f"{n} of {self.source.total()}: {job.name}, seed {job.seed}: {state}{what} ({duration(found.seconds)})",
            flush=True,
        )


def write(spec: Spec, source: Source, out: Path, markdown: str | None) -> None:
    """Write what is known up to now into the folder of the sweep, and print it.

    Args:
        markdown: a file for the table in Markdown; "-" prints it.
    """
    rows = source.rows()
    best = table.ranked(rows, spec)
    write_text(out / "results.jsonl", table.result_rows(rows, spec))
    if best and best[0].state == "complete":
        write_text(out / "best.yaml", best_yaml(best[0], spec))
    if any(row.outcomes for row in rows):
        write_text(out / "sweep.html", render(spec, rows, out, source.importances()))
    if markdown == "-":
        print(table.markdown(rows, spec, out))
    else:
        print(table.text(table.cells(best[:SHOWN], spec)))
        print(*table.failures(rows), sep="\n", end="\n" if table.failures(rows) else "")
    if markdown not in (None, "-"):
        write_text(Path(markdown), table.markdown(rows, spec, out))
    print(f"{out}: {', '.join(name for name in WRITTEN if (out / name).exists())}")


def plan(spec: Spec, found: list[Candidate]) -> list[str]:
    """Return what a sweep would run, and the hours that it would take."""
    seeds = counted(len(spec.seeds), "seed")
    if spec.sampler == "grid":
        lines = [f"{counted(len(found), 'variant')} with {seeds}:"]
        lines += [f"  {one.name}: {' '.join(f'{k}={v}' for k, v in one.given.items()) or 'no change'}" for one in found]
    else:
        lines = [f"{counted(spec.trials or 0, 'trial')} with {seeds}, sampler {spec.sampler}, pruner {spec.pruner}:"]
        lines += [f"  {one.key}: {one.describe()}" for one in spec.dimensions]
    return [*lines, f"every run: fastgpt train {' '.join(spec.arguments({}))}", estimate(spec, found)]

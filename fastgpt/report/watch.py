"""`fastgpt watch RUN`: show a run in the terminal while it trains."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from fastgpt.core.command import Parser
from fastgpt.core.errors import UserError, counted
from fastgpt.core.page import number
from fastgpt.report.charts import APART, TITLES, is_evaluation
from fastgpt.report.metrics import RECENT
from fastgpt.report.run import RunFiles
from fastgpt.report.text_plot import plot
from fastgpt.report.words import digits, duration

PERIOD = 1.0  # seconds between two looks at the files
CLEAR = "\x1b[H\x1b[J"  # cursor to the start, erase what follows
STALL = (60.0, 20.0)  # a run is slow to answer after this many seconds and this many times a step
COLUMNS, LINES = 80, 24  # where the output is no terminal


def main(argv: list[str]) -> int:
    """Run `fastgpt watch` and return its exit code; Ctrl-C ends it with 0."""
    about = "Show a run in the terminal while it trains: its loss, speed, time left, best checkpoint and warnings."
    parser = Parser(prog="fastgpt watch", description=about, epilog="Ctrl-C ends it; the run continues.")
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--once", action="store_true", help="print the state once and exit")
    args = parser.parse_args(argv)

    run = RunFiles.open(Path(args.run))
    run.refresh()
    if not run.metrics.count and (args.once or not run.progress or run.ended()):
        raise UserError(f"{run.tail.path} has no row of a step, expected a run that has begun to train")
    if args.once:
        print("\n".join(screen(run)))
        return 0
    try:
        return follow(run)
    except KeyboardInterrupt:
        print()
        return 0


def follow(run: RunFiles) -> int:
    """Draw the run again each second in a terminal, or print a line for new steps where the output is none, until the
    run ends; return 0."""
    terminal = sys.stdout.isatty()
    _draw(run, terminal)
    if run.ended():
        return 0
    while not run.ended():
        time.sleep(PERIOD)
        grown = run.refresh()
        if terminal:
            _draw(run, terminal)
        elif grown:
            print(status(run), flush=True)
    run.refresh()  # what was written between the last look and the end
    _draw(run, terminal)
    return 0


def _draw(run: RunFiles, terminal: bool) -> None:
    print((CLEAR if terminal else "") + "\n".join(screen(run)), flush=True)


def screen(run: RunFiles) -> list[str]:
    """Return the lines that show a run now: a plot of the loss that fills the terminal, last values, warnings."""
    columns, lines = shutil.get_terminal_size((COLUMNS, LINES)) if sys.stdout.isatty() else (COLUMNS, LINES)
    metrics = run.metrics
    if not metrics.count:
        return [f"{run.folder}: waiting for the first step"]
    sentences = [*_facts(run), *(f"warning: {sentence}" for sentence in warnings(run))]
    texts = [line for text in sentences for line in textwrap.wrap(text, columns, subsequent_indent="  ")]
    line = [(p.step, p.mean) for p in metrics.steps.points("loss")]
    marks = [(p.step, p.mean) for p in metrics.points("val_loss")]
    plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    picture = plot(line, marks, columns, max(5, min(20, lines - len(texts) - 2)), plain)
    legend = f"{run.folder}: loss by step" + (" (o: validation)" if marks else "")
    return [legend[:columns], *(picture or ["no finite loss yet"]), *texts]


def status(run: RunFiles) -> str:
    """Return the last values of a run in a line."""
    m, of = run.metrics, run.last_step
    parts = [
        f"step {m.last.get('step', 0):,}" + ("" if of is None else f"/{of:,}"),
        f"loss {digits(m.last.get('loss'))}",
    ]
    if "val_loss" in m.latest:
        parts.append(f"val_loss {digits(m.latest['val_loss'][1])}")
    parts.append(f"{number(m.recent_mean('tokens_per_second'))} tok/s")
    left = None if run.ended() else time_left(run)
    return " | ".join([*parts, *([f"{duration(left)} left"] if left else [])])


def time_left(run: RunFiles) -> float | None:
    """Return the seconds of training that are left; None where the length or the speed is not known."""
    each, last = run.metrics.seconds_per_step(), run.last_step
    return None if each is None or last is None else max(0, last - run.metrics.last["step"]) * each


def _facts(run: RunFiles) -> Iterator[str]:
    m, row = run.metrics, run.metrics.last
    yield status(run)
    yield (
        f"norm {digits(row.get('grad_norm'))} | lr {row.get('lr', 0):.2e} | memory {m.peak_gb:.2f} GB | "
        f"{number(row.get('tokens'))} tokens in {duration(row.get('seconds'))}"
    )
    recent = f"loss {digits(m.recent_mean('loss'))} over the last {counted(len(m.recent), 'step')}"
    figures = [f"{name} {digits(row.get(name))}" for name in m.step_names() if name not in APART and name not in TITLES]
    validated = {name: value for name, (_, value) in m.latest.items() if name.startswith("val_") or is_evaluation(name)}
    validated.pop("val_loss", None)
    yield ", ".join([recent, *figures, *(f"{name} {digits(value)}" for name, value in validated.items())])
    found = run.best()
    if found is not None:
        name, value, step, path = found
        kept = path or "of which no checkpoint is kept"
        yield f"best {name} {digits(value)} at step {step:,}, {kept}"
    yield run.ended()


def warnings(run: RunFiles, now: float | None = None) -> Iterator[str]:
    """Yield sentences on trouble: skipped steps, a fall of the speed, a run that has been silent, damaged lines.

    Args:
        now: seconds since the epoch (default: the clock).
    """
    m = run.metrics
    if m.skipped:
        yield f"{m.skipped:,} of {m.count:,} steps were skipped, the last at step {m.last_skip:,}"
    mean, recent = m.tokens_per_second(), m.recent_mean("tokens_per_second")
    if mean and recent and m.count > 3 * RECENT and recent < 0.7 * mean:
        yield f"the last {RECENT} steps ran at {recent / mean:.0%} of the run's mean speed"
    if not run.ended():
        silent = (time.time() if now is None else now) - run.tail.path.stat().st_mtime
        if silent > max(STALL[0], STALL[1] * (m.seconds_per_step() or 0.0)):
            yield f"no new row for {duration(silent)}"
    if run.tail.damaged:
        yield f"{run.tail.damaged:,} damaged lines of {run.tail.path.name} were skipped"

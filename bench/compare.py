"""`fastgpt bench compare A B`: is B slower than A? And `fastgpt bench ab`: measure both alternately, then compare.

Rows of A and B are paired by results.IDENTITY and hardware; rows of different devices or dtypes are never paired.
Several rows of one identity on a side are runs of it, each in its own process. A run's figure x is the log of its time
as a share of the time of the reference measured alternately with it (results.judged_share): the machine's drift between
A and B affects both alike and cancels. Only where a row lacks that share, or A and B were measured with different
versions of torch, x is the log of the time itself, which on a GPU is judged only if both ran at the same clock within
CLOCKS.

    ratio = exp(mean x of B - mean x of A); above 1, B is slower. With five or more runs the means leave out a fifth
            at either end (Yuen 1974): a run during another program's burst is not a measurement
    s^2   = variance of x among the runs of a side, pooled over both, plus the prior PRIOR with the weight of
            PRIOR_RUNS runs, which stands for what one process cannot see: its memory layout, other users' load
    band  = t(1 - ALARM / pairs; degrees of freedom) s sqrt(1/runs of A + 1/runs of B)

A row is a regression if its ratio is above 1 + max(band, floor), with a floor of 5 %, and an improvement if 1 / ratio
is. A row whose band is wider than the floor is marked: it would miss a change as large as the floor, and more runs
narrow the band. ALARM is the chance of any false alarm in the whole comparison. Only fastgpt's own rows are judged.
Counts and sizes (registers, spilled bytes, MB of a wheel) have no noise: growing by more than their allowance is a
regression.

Exit code: 0, 1 for a regression, 2 if there is nothing to compare or a row lacks its provenance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastgpt.bench.results import Row, hardware, identity, judged_share, on_cpu, read_rows, version
from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError

FLOOR = 0.05
ALARM = 0.01
CLOCKS = 0.03
PRIOR_RUNS = 4
TRIM = 0.2
PRIOR = {("cpu", "relative"): 0.03, ("cpu", "time"): 0.15, ("gpu", "relative"): 0.01, ("gpu", "time"): 0.02}
TIMES = ("ms", "us", "seconds")
COUNTS = {  # noise-free figure -> how much it may grow
    "registers": 0.0,
    "stack_bytes": 0.0,
    "spill_bytes": 0.0,
    "shared_bytes": 0.0,
    "launches": 0.0,
    "operators": 0.0,
    "mb": 0.02,  # of a wheel
}
THEIRS = ("torch", "copy", "gemm", "floor", "transformers", "llama.cpp")  # how baselines' names start
SLOWER, FASTER, SAME, UNJUDGED = "SLOWER", "faster", "same", "not judged"
Key = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Pair:
    """One figure of A and B: the ratio B / A, its band, the verdict and a remark."""

    key: Key
    figure: str
    runs: tuple[int, int]
    ratio: float
    band: float
    verdict: str
    remark: str = ""


def ours(row: Row) -> bool:
    """Return whether a row is of fastgpt's own code, not of a baseline."""
    if "backend" in row:
        return row["backend"] is not None
    name = str(row.get("provider", row.get("variant", "fastgpt")))
    return "fastgpt" in name or not name.startswith(THEIRS)


def groups(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Return fastgpt's rows by identity and hardware."""
    found: dict[Key, list[Row]] = {}
    for row in filter(ours, rows):
        found.setdefault((*identity(row), ("on", hardware(row))), []).append(row)
    return found


def compare(a: list[Row], b: list[Row], floor: float = FLOOR) -> tuple[list[Pair], list[str]]:
    """Return the pairs, regressions first, and a remark on each identity that only one side has.

    Raises:
        UserError: a side mixes commits, or nothing pairs.
    """
    for name, side in (("A", a), ("B", b)):
        if len(versions := sorted({version(row) for row in side})) > 1:
            raise UserError(f"compare: {name} has rows of {', '.join(versions)}; choose one with FILE@COMMIT")
    left, right = groups(a), groups(b)
    common = [key for key in left if key in right]
    if not common:
        where = (", ".join(sorted({hardware(row) for row in side})) for side in (a, b))
        raise UserError("compare: A and B have no fastgpt row in common: A was measured on {}, B on {}".format(*where))
    pairs = [p for key in common for p in _pairs(key, left[key], right[key], floor, len(common))]
    order = (SLOWER, FASTER, UNJUDGED, SAME)
    alone = [
        f"only in {n}: {label(k)}"
        for n, one, two in (("A", left, right), ("B", right, left))
        for k in one
        if k not in two
    ]
    return sorted(pairs, key=lambda p: order.index(p.verdict)), alone


def _pairs(key: Key, a: list[Row], b: list[Row], floor: float, total: int) -> list[Pair]:
    """Return the pairs of one identity."""
    good_a, good_b = ([row for row in side if "red" not in row] for side in (a, b))
    runs = (len(good_a), len(good_b))
    if not good_b:
        red = str(b[0]["red"])
        return [Pair(key, "red", runs, math.nan, math.nan, SLOWER if good_a else UNJUDGED, red)]
    if not good_a:
        return [Pair(key, "red", runs, math.nan, math.nan, UNJUDGED, f"A was red: {a[0]['red']}")]
    counts = [name for name in COUNTS if all(isinstance(row.get(name), (int, float)) for row in good_a + good_b)]
    pairs = [_counted(key, name, good_a[-1], good_b[-1], runs) for name in counts]
    time = next((name for name in TIMES if all(row.get(name) for row in good_a + good_b)), None)
    return pairs if time is None else [_timed(key, time, good_a, good_b, floor, total), *pairs]


def _counted(key: Key, name: str, a: Row, b: Row, runs: tuple[int, int]) -> Pair:
    """Judge a noise-free figure."""
    before, after = float(a[name]), float(b[name])
    ratio = after / before if before else (math.inf if after else 1.0)
    allowed = COUNTS[name]
    verdict = SLOWER if after > before * (1 + allowed) else FASTER if after < before / (1 + allowed) else SAME
    return Pair(key, name, runs, ratio, allowed, verdict, "" if verdict == SAME else f"{a[name]:g} -> {b[name]:g}")


def _timed(key: Key, time: str, a: list[Row], b: list[Row], floor: float, total: int) -> Pair:
    """Judge a time by the rule in the module docstring."""
    runs = (len(a), len(b))
    references = {share[1] if (share := judged_share(row)) else None for row in a + b}
    paired = len(references) == 1 and None not in references and len({row["machine"]["torch"] for row in a + b}) == 1
    x, y = (
        [math.log(share[0] if paired and (share := judged_share(row)) else row[time]) for row in side]
        for side in (a, b)
    )
    place = "cpu" if on_cpu(a[0]) else "gpu"
    ratio, band = _judge(x, y, PRIOR[place, "relative" if paired else "time"], total)
    figure = f"{time} / {references.pop()}'s" if paired else time
    if not paired and place == "gpu" and (gap := clock_gap(a, b)) > CLOCKS:
        return Pair(key, figure, runs, ratio, band, UNJUDGED, f"clocks differ by {gap:.0%}")
    limit = 1 + max(band, floor)
    verdict = SLOWER if ratio > limit else FASTER if 1 / ratio > limit else SAME
    return Pair(key, figure, runs, ratio, band, verdict, "too noisy for the floor" if band > floor else "")


def _judge(x: list[float], y: list[float], prior: float, total: int) -> tuple[float, float]:
    """Return ratio and band from the logarithms of both sides' runs."""
    (mean_x, squares_x, kept_x), (mean_y, squares_y, kept_y) = map(trimmed, (x, y))
    freedom = kept_x + kept_y - 2 + PRIOR_RUNS
    variance = (squares_x + squares_y + PRIOR_RUNS * prior**2) / (len(x) + len(y) - 2 + PRIOR_RUNS)
    error = math.sqrt(variance * (1 / len(x) + 1 / len(y)))
    return math.exp(mean_y - mean_x), math.expm1(student(1 - ALARM / total, freedom) * error)


def trimmed(values: list[float]) -> tuple[float, float, int]:
    """Return the mean without the lowest and highest TRIM of the values, Yuen's sum of squares, and the number kept.

    The squares are about the mean, after replacing each value left out by the nearest one kept, and the sum is scaled
    to stand for all values.
    """
    number = len(values)
    cut = int(TRIM * number)
    kept = sorted(values)[cut : number - cut]
    moved = [kept[0]] * cut + kept + [kept[-1]] * cut
    squares = sum((v - statistics.mean(moved)) ** 2 for v in moved)
    return statistics.mean(kept), squares * ((number - 1) / (len(kept) - 1) if len(kept) > 1 else 1), len(kept)


def student(p: float, freedom: int) -> float:
    """Return a quantile of Student's t, from the normal's by the expansion of Abramowitz and Stegun 26.7.5 (freedom >=
    4)."""
    z = statistics.NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def clock_gap(a: list[Row], b: list[Row]) -> float:
    """Return by what share the SM clocks during the measurements differed; 0 where they were not read."""
    clocks = [[row["gpu"]["sm_mhz"] for row in side if (row.get("gpu") or {}).get("sm_mhz")] for side in (a, b)]
    means = [statistics.mean(side) for side in clocks if side]
    return max(means) / min(means) - 1 if len(means) == 2 else 0.0


def label(key: Key) -> str:
    """Return a key as words."""
    return " ".join(value for name, value in key if name != "on")


def show(pairs: list[Pair], alone: list[str], everything: bool) -> str:
    """Return regressions, improvements and what could not be judged, or everything; then the totals."""
    shown = [p for p in pairs if everything or p.verdict != SAME]
    lines = [f"{'':<11}{'B / A':>7}{'band':>9}{'runs':>7}  figure"] if shown else []
    for p in shown:
        ratio, band = (f"{v:.3f}" if math.isfinite(v) else "-" for v in (p.ratio, p.band))
        remark = f" ({p.remark})" if p.remark else ""
        runs = f"{p.runs[0]}, {p.runs[1]}"
        lines.append(f"{p.verdict:<11}{ratio:>7}{'+-' + band:>9}{runs:>7}  {label(p.key)}: {p.figure}{remark}")
    count: Callable[[str], int] = lambda verdict: sum(p.verdict == verdict for p in pairs)  # noqa: E731
    noisy = sum("too noisy" in p.remark for p in pairs)
    total = f"{len(pairs)} figures compared: {count(SLOWER)} regressions, {count(FASTER)} improvements"
    return "\n".join([*lines, *alone, f"{total}, {count(UNJUDGED)} not judged, {noisy} too noisy for the floor"])


def exit_code(pairs: list[Pair]) -> int:
    """Return 1 for a regression."""
    return int(any(p.verdict == SLOWER for p in pairs))


def main(argv: list[str] | None = None) -> int:
    """Run `fastgpt bench compare A B`."""
    about = "Is B slower than A? Several rows of one figure on a side count as runs; docs/benchmarks.md explains how."
    parser = Parser(prog="fastgpt bench compare", description=about)
    for side in ("A", "B"):
        parser.add_argument(side, help="a file of rows or a quoted glob; FILE@COMMIT for the rows of one commit")
    parser.add_argument(
        "--floor", type=number(float, 0), default=FLOOR, help=f"smallest change that counts (default: {FLOOR})"
    )
    parser.add_argument("--all", action="store_true", help="also show what did not change")
    args = parser.parse_args(argv)
    pairs, alone = compare(read_rows([args.A]), read_rows([args.B]), args.floor)
    print(show(pairs, alone, args.all))
    return exit_code(pairs)

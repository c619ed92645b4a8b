"""What people said: agreement of the raters, how often each side won, strengths of the models, bias of position.

Votes on one prompt are not independent, so intervals treat them as a cluster. The interval of a share is Wilson's, for
as many votes as would have the same variance without clusters. Sources: Wilson 1927; Korn and Graubard 1998 (effective
number of votes).
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics as middle
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError
from fastgpt.evaluate.agreement import Agreement, krippendorff_alpha
from fastgpt.evaluate.human.ratings import WINNERS, read_ratings
from fastgpt.evaluate.ranking import groups, intervals, strengths
from fastgpt.evaluate.results import item_id
from fastgpt.evaluate.statistics import Pairs, bootstrap_interval, mcnemar, sign_flip

Row = dict[str, Any]
SWAPPED = {"a": "b", "b": "a"}


@dataclass(frozen=True)
class Share:
    """A share of votes with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Match:
    """What was said about two models.

    Attributes:
        a, b: their names.
        votes, prompts: how many.
        shares: a, b, tie, both_bad -> share of the votes.
        score: of b: share of wins, ties and both bad counted by half; with its bootstrap interval, None for one prompt.
        p: sign-flip test over prompts that the score is 0.5.
    """

    a: str
    b: str
    votes: int
    prompts: int
    shares: dict[str, Share]
    score: float
    low: float | None
    high: float | None
    p: float


@dataclass
class Report:
    """What the votes say. `position`: share that the side shown first won, of votes for a side, with the exact binomial
    p-value that it is 0.5; None without such votes."""

    agreement: Agreement
    matches: list[Match]
    ratings: dict[str, dict[str, float | None]] = field(default_factory=dict)  # model -> elo, low, high
    position: tuple[Share, float] | None = None
    raters: dict[str, dict[str, float | None]] = field(default_factory=dict)  # name -> votes, median of seconds
    notes: list[str] = field(default_factory=list)


def report(rows: list[Row], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> Report:
    """Return what the rows of `read_ratings` say.

    Raises:
        UserError: there are no rows, or the package krippendorff is not installed.
    """
    if not rows:
        raise UserError("there are no votes, expected one or more")
    rows = _directed(rows)
    pairs: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for r in rows:
        pairs[r["a_model"], r["b_model"]].append(r)
    matches = [_match(votes, confidence, resamples, seed) for votes in pairs.values()]
    counts = Counter((_unit(r), r["winner"]) for r in rows)
    table = np.array([[counts[unit, o] for o in WINNERS] for unit in dict.fromkeys(_unit(r) for r in rows)])
    agreement = krippendorff_alpha(table, confidence=confidence, resamples=resamples, seed=seed)
    found = Report(agreement, matches, position=_position(rows, confidence))
    for name in sorted({r["rater"] for r in rows}):
        mine = [r for r in rows if r["rater"] == name]
        times = [r["seconds"] for r in mine if isinstance(r.get("seconds"), (int, float))]
        found.raters[name] = {"votes": len(mine), "seconds": middle.median(times) if times else None}
    _rank(found, rows, confidence, resamples, seed)
    return found


def _directed(rows: list[Row]) -> list[Row]:
    """Return the rows with the models of a pair in the order of its first row, so that A and B exchanged add up."""
    found, known = [], set()
    for row in rows:
        names = (row["a_model"], row["b_model"])
        if names[::-1] in known:
            row = {
                **row,
                **{"a": row["b"], "b": row["a"], "a_model": names[1], "b_model": names[0]},
                "winner": SWAPPED.get(row["winner"], row["winner"]),
                "order": {"ab": "ba", "ba": "ab"}.get(row.get("order", ""), ""),
            }
        else:
            known.add(names)
        found.append(row)
    return found


def _unit(row: Row) -> tuple[str, ...]:
    """Return what was rated."""
    return item_id(row["prompt"]), row["a_model"], row["b_model"], row["a"], row["b"]


def _clusters(rows: list[Row], values: list[float]) -> Pairs:
    """Return the mean value of each prompt, weighted by its votes."""
    found: dict[str, list[float]] = defaultdict(list)
    for r, v in zip(rows, values):
        found[item_id(r["prompt"])].append(v)
    weights = np.array([float(len(v)) for v in found.values()])
    return Pairs(np.array([sum(v) / len(v) for v in found.values()]), weights)


def share_of(clusters: Pairs, confidence: float) -> Share:
    """Return a share with Wilson's interval for the effective number of votes; where all votes are the same, for the
    number of prompts."""
    assert clusters.weights is not None
    p, m, w = clusters.mean, clusters.n, clusters.weights / clusters.weights.sum()
    n = float(m)
    if 0 < p < 1 and m > 1:
        variance = m / (m - 1) * float((w**2 * (clusters.differences - p) ** 2).sum())
        n = min(p * (1 - p) / variance, float(clusters.weights.sum())) if variance else float(clusters.weights.sum())
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Share(p, max(0.0, centre - reach), min(1.0, centre + reach))


def _match(rows: list[Row], confidence: float, resamples: int, seed: int) -> Match:
    shares = {o: share_of(_clusters(rows, [float(r["winner"] == o) for r in rows]), confidence) for o in WINNERS}
    lead = _clusters(rows, [{"a": -1.0, "b": 1.0}.get(r["winner"], 0.0) for r in rows])  # b's wins less a's
    rng = np.random.default_rng(seed)
    interval = bootstrap_interval([lead], [1.0], confidence, resamples, rng)
    low, high = (None, None) if interval is None else (max(0.0, 0.5 + interval[0] / 2), min(1.0, 0.5 + interval[1] / 2))
    p = sign_flip([lead], [1.0], 10_000, rng).two_sided
    first = rows[0]
    return Match(first["a_model"], first["b_model"], len(rows), lead.n, shares, 0.5 + lead.mean / 2, low, high, p)


def _position(rows: list[Row], confidence: float) -> tuple[Share, float] | None:
    """Return how often the side shown first won. The order is drawn for each rater and pair, so without a bias this is
    a fair coin for each vote, whatever the answers."""
    decided = [r for r in rows if r["winner"] in SWAPPED and r.get("order") in ("ab", "ba")]
    if not decided:
        return None
    wins = np.array([1.0 if r["winner"] == r["order"][0] else -1.0 for r in decided])
    share = share_of(Pairs((wins > 0).astype(float), np.ones(len(wins))), confidence)
    return share, mcnemar(Pairs(wins, binary=True)).two_sided


def _rank(found: Report, rows: list[Row], confidence: float, resamples: int, seed: int) -> None:
    """Add the strengths, where there are more than two models."""
    models = sorted({name for r in rows for name in (r["a_model"], r["b_model"])})
    if len(models) < 3:
        return
    at = {name: i for i, name in enumerate(models)}
    prompts = {key: i for i, key in enumerate(dict.fromkeys(item_id(r["prompt"]) for r in rows))}
    wins = np.zeros((len(prompts), len(models), len(models)))
    for r in rows:
        unit, a, b = prompts[item_id(r["prompt"])], at[r["a_model"]], at[r["b_model"]]
        of_a = {"a": 1.0, "b": 0.0}.get(r["winner"], 0.5)
        wins[unit, a, b] += of_a
        wins[unit, b, a] += 1 - of_a
    total = wins.sum(0)
    parts = groups(total + total.T)
    if len(parts) > 1:
        names = "; ".join(", ".join(models[i] for i in part) for part in parts)
        found.notes.append(f"No ranking: no comparison connects these groups of models: {names}.")
        return
    values, ends = strengths(total), intervals(wins, confidence, resamples, seed)
    for i, name in sorted(enumerate(models), key=lambda entry: -values[entry[0]]):
        low, high = (None, None) if ends is None else (float(ends[0][i]), float(ends[1][i]))
        found.ratings[name] = {"elo": float(values[i]), "low": low, "high": high}


def lines(found: Report, confidence: float) -> list[str]:
    """Return the report for the console."""
    text = []
    for m in found.matches:
        names = {"a": f"{m.a} better", "b": f"{m.b} better", "tie": "tie", "both_bad": "both bad"}
        width = max(map(len, names.values()))
        text += [f"A = {m.a}, B = {m.b}: {m.votes} votes on {m.prompts} prompts"]
        text += [f"  {names[o]:<{width}}  {_share(m.shares[o])}" for o in WINNERS]
        ends = "" if m.low is None else f" ({m.low:.1%} to {m.high:.1%})"
        text += [f"  score of B: {m.score:.1%}{ends}, ties by half; p = {m.p:.4f} that both are equally good", ""]
    if found.ratings:
        text.append("Bradley-Terry strengths in Elo points")
        for name, r in found.ratings.items():
            ends = "" if r["low"] is None else f"  ({r['low']:.0f} to {r['high']:.0f})"
            text.append(f"  {r['elo']:6.0f}{ends}  {name}")
        text.append("")
    a = found.agreement
    if a.alpha is None:
        text.append("agreement: undefined, it needs prompts with two raters and two different votes")
    else:
        ends = "" if a.low is None else f" ({a.low:.2f} to {a.high:.2f})"
        text.append(f"agreement: Krippendorff's alpha {a.alpha:.2f}{ends} over {a.units} pairs with two votes or more")
    if found.position is not None:
        share, p = found.position
        text.append(f"position: the answer shown first won {_share(share)} of the decided votes; p = {p:.4f}")
    for name, times in found.raters.items():
        pace = "" if times["seconds"] is None else f", {times['seconds']:.1f} s in the median"
        text.append(f"rater {name}: {times['votes']:.0f} votes{pace}")
    return [*text, f"Intervals cover {100 * confidence:.4g} %; votes on one prompt are one cluster.", *found.notes]


def _share(s: Share) -> str:
    return f"{s.value:6.1%} ({s.low:.1%} to {s.high:.1%})"


def main(argv: list[str]) -> int:
    """Run `fastgpt eval human --report`."""
    parser = Parser(prog="fastgpt eval human", description="Report what people said about answers of models.")
    parser.add_argument("--report", nargs="+", type=Path, metavar="FILE", required=True, help="files of votes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument(
        "--confidence",
        type=number(float, 0, 99.99, open_least=True),
        default=95.0,
        metavar="PERCENT",
        help="of the intervals (default: 95)",
    )
    parser.add_argument("--resamples", type=number(int, 100), default=1000, help="of the bootstrap (default: 1000)")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the bootstrap (default: 0)")
    args = parser.parse_args(argv)
    rows = [row for path in args.report for row in read_ratings(path)]
    confidence = args.confidence / 100
    found = report(rows, confidence=confidence, resamples=args.resamples, seed=args.seed)
    print(*lines(found, confidence), sep="\n")
    if args.out:
        aside = args.out.with_name(args.out.name + ".tmp")
        aside.write_text(json.dumps(dataclasses.asdict(found), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        aside.replace(args.out)
    return 0

"""The report of ratings by people: agreement, shares, strengths and bias of position, by hand and by simulation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgpt.core.errors import UserError
from fastgpt.evaluate.agreement import krippendorff_alpha
from fastgpt.evaluate.human import command
from fastgpt.evaluate.human.report import report, share_of
from fastgpt.evaluate.ranking import groups, intervals, strengths
from fastgpt.evaluate.statistics import Pairs


def row(prompt: int, winner: str, rater: str = "ann", models: str = "xy", order: str = "ab") -> dict[str, Any]:
    return {
        "id": f"p{prompt}",
        "prompt": f"Question {prompt}?",
        "a": f"{models[0]} {prompt}",
        "b": f"{models[1]} {prompt}",
        "a_model": models[0],
        "b_model": models[1],
        "winner": winner,
        "rater": rater,
        "order": order,
        "seconds": 2.0,
    }


def test_alpha_by_hand() -> None:
    # units (2, 0), (1, 1), (0, 2): coincidences 2, 2, and 1 each way; n = 6, n_0 = n_1 = 3;
    # alpha = 1 - (n - 1) o_01 / (n_0 n_1) = 1 - 5 * 1 / 9
    found = krippendorff_alpha(np.array([[2, 0], [1, 1], [0, 2], [1, 0]]))
    assert found.alpha == pytest.approx(4 / 9) and found.units == 3


def test_alpha_of_perfect_and_of_random_raters() -> None:
    rng = np.random.default_rng(0)
    same = krippendorff_alpha(2 * np.eye(4, dtype=int)[rng.integers(0, 4, 60)])
    assert same.alpha == same.low == same.high == pytest.approx(1.0)
    one, other = (np.eye(4, dtype=int)[rng.integers(0, 4, 300)] for _ in range(2))
    chance = krippendorff_alpha(one + other)
    assert chance.alpha is not None and chance.low is not None and chance.high is not None
    assert abs(chance.alpha) < 0.15 and chance.low < 0 < chance.high


@pytest.mark.parametrize("counts", [np.zeros((0, 4), int), [[1, 0], [0, 1]], [[2, 0], [2, 0]]])
def test_alpha_is_undefined(counts: Any) -> None:
    found = krippendorff_alpha(np.asarray(counts))
    assert (found.alpha, found.low, found.high) == (None, None, None)


def test_strengths_of_two_models_by_hand() -> None:
    values = strengths(np.array([[0.0, 9.5], [0.5, 0.0]]))  # with the added tie 10 to 1
    assert values == pytest.approx([1700, 1300])


def test_strengths_solve_the_likelihood_equations() -> None:
    wins = np.array([[0, 7, 9, 0], [3, 0, 6.5, 2], [1, 3.5, 0, 4], [0, 8, 6, 0]])
    p = 10 ** (strengths(wins) / 400)
    tied = wins + 0.5 * (wins + wins.T > 0)
    expected = ((tied + tied.T) * p[:, None] / (p[:, None] + p[None, :])).sum(1)
    assert expected == pytest.approx(tied.sum(1)) and strengths(wins).mean() == pytest.approx(1500)


def test_a_model_that_wins_all_has_a_finite_strength() -> None:
    assert strengths(np.array([[0.0, 5.0], [0.0, 0.0]])) == pytest.approx(
        1500 + 200 * math.log10(11) * np.array([1, -1])
    )


def test_groups() -> None:
    games = np.zeros((5, 5))
    for i, j in ((0, 3), (3, 4), (1, 2)):
        games[i, j] = games[j, i] = 1
    assert groups(games) == [[0, 3, 4], [1, 2]]


@pytest.mark.slow
def test_intervals_cover_the_strengths() -> None:
    rng, runs, true = np.random.default_rng(1), 40, np.array([1600.0, 1500.0, 1400.0])
    covered = 0
    for _ in range(runs):
        wins = np.zeros((80, 3, 3))
        for unit, (i, j) in enumerate([(0, 1), (1, 2), (0, 2), (0, 1)] * 20):
            first = rng.random() < 1 / (1 + 10 ** ((true[j] - true[i]) / 400))
            wins[unit, i, j], wins[unit, j, i] = first, not first
        low, high = intervals(wins, resamples=100) or (true, true)
        covered += int(((low <= true) & (true <= high)).sum())
    assert 0.88 <= covered / (3 * runs) <= 1.0


def test_share_by_hand() -> None:
    z = 1.959963984540054
    share = share_of(Pairs(np.array([1.0] * 3 + [0.0] * 7), np.ones(10)), 0.95)
    n = 0.3 * 0.7 / (10 / 9 * 0.021)  # the variance without bias, of single votes
    centre = (0.3 + z * z / 2 / n) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(0.21 / n + z * z / 4 / n / n)
    assert (share.low, share.high) == pytest.approx((centre - reach, centre + reach))
    none = share_of(Pairs(np.zeros(20), np.full(20, 5.0)), 0.95)
    assert none.low == 0 and none.high == pytest.approx(z * z / (20 + z * z))


def test_votes_on_one_prompt_are_a_cluster() -> None:
    single = share_of(Pairs(np.array([1.0, 0.0] * 10), np.ones(20)), 0.95)
    copied = share_of(Pairs(np.array([1.0, 0.0] * 10), np.full(20, 8.0)), 0.95)  # eight raters who all agree
    spread = share_of(Pairs(np.array([0.5] * 20), np.full(20, 8.0)), 0.95)
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high))
    assert spread.high - spread.low < 0.4 * (single.high - single.low)


def test_report_by_hand() -> None:
    votes = [row(0, "a"), row(1, "a", order="ba"), row(2, "b"), row(3, "tie"), row(4, "both_bad"), row(0, "a", "bob")]
    found = report(votes)
    match = found.matches[0]
    assert {o: s.value for o, s in match.shares.items()} == pytest.approx(
        {"a": 1 / 2, "b": 1 / 6, "tie": 1 / 6, "both_bad": 1 / 6}
    )
    assert (match.a, match.b, match.votes, match.prompts) == ("x", "y", 6, 5)
    assert match.score == pytest.approx((1 + 2 * 0.5) / 6)
    assert match.p == pytest.approx(6 / 8)  # sums +-2 +-1 +-1 are at least 2 in size, but for 2 of 8
    assert found.position is not None and found.position[0].value == 0.5 and found.position[1] == 1.0
    assert found.agreement.units == 1 and found.agreement.alpha is None
    assert found.raters == {"ann": {"votes": 5, "seconds": 2.0}, "bob": {"votes": 1, "seconds": 2.0}}
    assert not found.ratings


def test_exchanged_sides_add_up() -> None:
    votes = [row(0, "a"), {**row(1, "b", models="yx"), "order": "ba"}]
    found = report(votes)
    assert len(found.matches) == 1 and found.matches[0].shares["a"].value == 1.0 and found.matches[0].score == 0.0
    assert found.position is not None and found.position[0].value == 1.0


def test_a_bias_of_position_is_found() -> None:
    votes = [row(i, "a" if i % 2 else "b", order="ab" if i % 2 else "ba") for i in range(20)]
    found = report(votes)
    assert found.position is not None and found.position[0].value == 1.0 and found.position[1] < 1e-5
    assert found.matches[0].score == 0.5


def test_three_models_are_ranked() -> None:
    votes = [row(i, "a" if i % 4 else "b", models=m) for i in range(12) for m in ("xy", "yz", "xz")]
    found = report(votes)
    assert list(found.ratings) == ["x", "y", "z"]
    assert all(r["low"] is not None and r["low"] <= r["elo"] <= r["high"] for r in found.ratings.values())  # type: ignore[operator]
    apart = report([row(0, "a", models="xy"), row(1, "b", models="uv")])
    assert apart.notes == ["No ranking: no comparison connects these groups of models: u, v; x, y."]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for name, models in (("1", "xy"), ("2", "yz")):
        votes = [row(i, w, rater, models) for i, w in enumerate(["a", "b", "a", "tie"]) for rater in ("ann", "bob")]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(v) + "\n" for v in votes))
    out = tmp_path / "report.json"
    assert command.main(["--report", *map(str, files), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert (
        "A = x, B = y: 8 votes on 4 prompts" in text and "Krippendorff's alpha 1.00 (1.00 to 1.00) over 8 pairs" in text
    )
    assert "Bradley-Terry" in text and "rater bob: 8 votes, 2.0 s in the median" in text
    assert json.loads(out.read_text())["matches"][0]["shares"]["tie"]["value"] == 0.25


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there are no votes"),
        (json.dumps(row(0, "c")) + "\n", "line 1: winner is 'c', expected one of a, b, tie, both_bad"),
        (json.dumps({**row(0, "a"), "rater": None}) + "\n", "line 1: rater is None, expected a text"),
        (json.dumps({**row(0, "a"), "prompt": 3}) + "\n", "line 1: prompt is 3, expected a text or a list"),
        ("[1]\n", r"line 1: got '\[1\]', expected a JSON object"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        command.main(["--report", str(file)])


def test_finetuning_reads_what_was_rated(tmp_path: Path) -> None:
    from fastgpt.evaluate.human.ratings import Pair, Ratings

    formats = pytest.importorskip("fastgpt.finetune.ratings")
    ratings = Ratings(tmp_path / "r.jsonl", [Pair("1", "Q?", "yes", "no")], ("m", "n"))
    ratings.vote("ann", 0, "first", 1.0, "")
    written = json.loads((tmp_path / "r.jsonl").read_text())
    assert {"prompt", "a", "b", "winner", "rater"} <= set(written) and written["winner"] in formats.WINNERS

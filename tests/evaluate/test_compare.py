"""Comparison of evaluations: rows by hand, the command, its outputs, the gate and its errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastgpt.core.errors import UserError
from fastgpt.evaluate import compare as command
from fastgpt.evaluate.paired import Options, compare
from fastgpt.evaluate.results import Figure, Items, Results, mean


def evaluation(name: str, **tasks: Any) -> Results:
    """Return an evaluation; a task is a list of accuracies, its metric may be given as (metric, higher, values)."""
    results = Results({"name": name, "step": 100}, "base")
    for task, given in tasks.items():
        metric, higher, values = given if isinstance(given, tuple) else ("acc", True, given)
        figure = mean(task, metric, values, shots=5, higher_is_better=higher)
        results.figures.append(figure)
        results.items.append(Items(task, metric, [f"{i:016x}" for i in range(len(values))], values))
    return results


def saved(folder: Path, results: Results, name: str = "") -> str:
    file = folder / f"{name or results.model['name']}.json"
    results.save(file)
    return str(file)


ZEROS, ONES = [0.0] * 40, [0.0] * 20 + [1.0] * 20
BITS = [1.0 + 0.01 * i for i in range(30)]


def test_rows_by_hand() -> None:
    a = evaluation("a", arc=[1.0, 0.0, 0.0, 1.0], wiki=("bits_per_byte", False, [1.0, 2.0, 3.0]))
    b = evaluation("b", arc=[1.0, 1.0, 1.0, 0.0], wiki=("bits_per_byte", False, [1.5, 2.5, 3.5]))
    arc, wiki = compare(a, b).rows
    assert (arc.n, arc.a, arc.b, arc.difference, arc.above, arc.below) == (4, 0.5, 0.75, 0.25, 2, 1)
    assert (arc.test, arc.p, arc.p_worse) == ("McNemar", 1.0, 7 / 8)  # P(X <= 2) of 3 fair coins
    assert (wiki.difference, wiki.low, wiki.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (wiki.test, wiki.p, wiki.p_worse) == ("sign flip", 2 / 8, 1 / 8)  # b has more bits: worse
    assert (arc.p_worse_holm, wiki.p_worse_holm) == (7 / 8, 2 / 8)


def test_items_are_paired_by_id_whatever_their_order() -> None:
    a, b = evaluation("a", arc=[0.1, 0.2, 0.3, 0.4]), evaluation("b", arc=[0.4, 0.3, 0.2, 0.1])
    b.items[0].ids.reverse()
    row = compare(a, b).rows[0]
    assert (row.above, row.below, row.difference) == (0, 0, 0.0)


def test_items_that_one_side_has_are_counted() -> None:
    a, b = evaluation("a", arc=[0.0, 1.0, 1.0]), evaluation("b", arc=[1.0, 0.0, 1.0, 1.0, 0.0])
    a.items[0].ids[0] = "other"
    comparison = compare(a, b)
    row = comparison.rows[0]
    assert (row.n, row.only_a, row.only_b, row.a, row.b) == (2, 1, 3, 1.0, 0.5)
    assert "arc acc (1 in A, 3 in B)" in " ".join(command.explained(comparison, "a", "b", Options()))


def test_an_item_twice_is_two_items() -> None:
    a, b = evaluation("a", arc=[0.0, 1.0]), evaluation("b", arc=[1.0, 1.0])
    a.items[0].ids[:] = b.items[0].ids[:] = ["same", "same"]
    row = compare(a, b).rows[0]
    assert (row.n, row.above, row.below) == (2, 1, 0)


@pytest.mark.parametrize(("weight", "difference"), [("task", 0.5), ("item", 0.2)])
def test_overall(weight: str, difference: float) -> None:
    a = evaluation("a", arc=[0.0] * 8, piqa=[0.0] * 2, wiki=("bits_per_byte", False, BITS))
    b = evaluation("b", arc=[0.0] * 8, piqa=[1.0] * 2, wiki=("bits_per_byte", False, BITS))
    rows = compare(a, b, Options(weight=weight)).rows
    assert [(r.task, r.metric) for r in rows][2:] == [("wiki", "bits_per_byte"), ("overall", "acc")]
    assert rows[-1].difference == pytest.approx(difference) and rows[-1].n == 10
    assert rows[-1].p == 0.5  # two items differ, both in one direction


def test_weighted_items() -> None:
    a = evaluation("a", wiki=("bits_per_byte", False, [1.0, 2.0]))
    b = evaluation("b", wiki=("bits_per_byte", False, [1.0, 4.0]))
    for results in (a, b):
        results.items[0] = Items(**{**vars(results.items[0]), "weights": [3.0, 1.0]})
        values = results.items[0].values
        results.figures[0] = Figure("wiki", "bits_per_byte", (3 * values[0] + values[1]) / 4, 2, higher_is_better=False)
    row = compare(a, b).rows[0]
    assert (row.a, row.b, row.difference, row.higher_is_better) == (1.25, 1.75, 0.5, False)
    assert b.items[0].weights is not None
    b.items[0].weights[1] = 2.0
    with pytest.raises(UserError, match="wiki bits_per_byte: its weights differ, as with another tokenizer"):
        compare(a, b)


def test_a_figure_that_is_not_the_mean_of_its_items_has_no_direction() -> None:
    a, b = evaluation("a", lambada=("perplexity", False, BITS)), evaluation("b", lambada=("perplexity", False, BITS))
    a.figures[0] = Figure("lambada", "perplexity", math.exp(1.1), 30, shots=5, higher_is_better=False)
    comparison = compare(a, b)
    assert comparison.rows[0].higher_is_better is None and comparison.rows[0].p_worse is None
    assert comparison.notes == ["lambada perplexity: the figure is not the mean over items, which is compared"]


def test_what_is_not_compared_is_said() -> None:
    a, b = evaluation("a", arc=ONES, piqa=ONES), evaluation("b", arc=ONES, boolq=ONES)
    b.figures.append(Figure("wmt", "bleu", 20.0, 10))
    b.figures[0] = Figure("arc", "acc", 0.5, 40, shots=0)
    assert compare(a, b).notes == [
        "arc: prompts of a at step 100 have 5 examples, those of b at step 100 0",
        "not compared, because not both sides have a value for each item: piqa acc, boolq acc, wmt bleu",
    ]


@pytest.mark.parametrize("n", [1, 5])
def test_equal_models(n: int) -> None:
    given = {"arc": [1.0] * n, "wiki": ("bits_per_byte", False, [0.5] * n)}
    arc, wiki = compare(evaluation("a", **given), evaluation("b", **given)).rows
    assert (arc.difference, arc.p, arc.verdict, wiki.difference, wiki.p, wiki.verdict) == (0, 1, "", 0, 1, "")
    assert arc.low is not None and arc.low < 0 and (wiki.low, wiki.high) == ((None, None) if n == 1 else (0.0, 0.0))


def test_a_row_does_not_depend_on_the_others() -> None:
    a, b = evaluation("a", w=("bits", False, BITS)), evaluation("b", w=("bits", False, BITS[::-1]))
    alone = compare(a, b).rows[0]
    more = compare(
        evaluation("a", v=ONES, w=("bits", False, BITS)), evaluation("b", v=ONES, w=("bits", False, BITS[::-1]))
    )
    assert (alone.low, alone.high, alone.p) == (more.rows[1].low, more.rows[1].high, more.rows[1].p)
    assert compare(a, b, Options(seed=1)).rows[0].low != alone.low


def change(results: Results, **changes: Any) -> Results:
    results.items[0] = Items(**{**vars(results.items[0]), **changes})
    return results


@pytest.mark.parametrize(
    ("b", "message"),
    [
        (
            change(evaluation("b", arc=ONES), values=[math.nan, *ONES[1:]]),
            "arc acc: got 1 value without a finite number",
        ),
        (change(evaluation("b", arc=ONES), values=ONES[1:]), "arc acc: got 40 ids, 39 values and 39 weights"),
        (change(evaluation("b", arc=ONES), weights=[1.0] * 39), "arc acc: got 40 ids, 40 values and 39 weights"),
        (change(evaluation("b", arc=ONES), weights=[0.0] * 40), "arc acc: got 40 weights of 0 or less"),
        (change(evaluation("b", arc=ONES), ids=[f"x{i}" for i in range(40)]), "arc acc: no item is in both"),
        (evaluation("b", piqa=ONES), "have no metric with items in both"),
        (Results({"name": "b"}, "base"), "a at step 100 and b have no metric with items in both"),
    ],
)
def test_errors(b: Results, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare(evaluation("a", arc=ONES), b)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (evaluation(n, arc=v, piqa=v, wiki=("bits", False, BITS)) for n, v in zip("abc", (ONES, ZEROS, ONES)))
    files = [saved(tmp_path, r) for r in (a, b, c)]
    out, html = tmp_path / "compare.json", tmp_path / "compare.html"
    assert command.main([*files, "--out", str(out), "--page", str(html), "--resamples", "500"]) == 0
    text = capsys.readouterr().out
    assert text.count("B - A") == 2 and "A is a at step 100, B is c at step 100." in text
    line = next(line for line in text.splitlines() if line.startswith("arc")).split()
    assert line == "arc acc 40 0.5000 0.0000 -0.5000 -0.6343 to -0.3181 0/20 <0.0001 <0.0001 worse".split()
    values = json.loads(out.read_text())
    assert [x["name"] for x in values["comparisons"]] == ["b at step 100", "c at step 100"]
    assert values["comparisons"][0]["rows"][0]["verdict"] == "worse" and values["options"]["resamples"] == 500
    assert html.read_text().count("<img") == 4 and "Agresti" in html.read_text()


def test_runs_are_compared_at_their_last_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, accuracy in (("one", ONES), ("two", ZEROS)):
        for step, values in ((50, [1.0] * 40), (100, accuracy), (9, [1.0] * 40)):
            results = evaluation(run, arc=values)
            results.model["step"] = step
            results.save(tmp_path / run / "eval" / f"step-{step}-base.json")
    runs = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert command.main(runs) == 0
    assert "0.5000  0.0000" in capsys.readouterr().out
    weights = evaluation("weights", arc=ONES)  # a folder of another project's weights
    weights.model["step"] = None
    weights.save(tmp_path / "three" / "eval" / "base.json")
    assert command.main([*runs, str(tmp_path / "three")]) == 0
    assert "B is weights." in capsys.readouterr().out
    other = evaluation("one", arc=ONES)
    other.preset = "full"
    for run in runs:
        other.save(Path(run) / "eval" / "step-100-full.json")
    with pytest.raises(UserError, match="presets in common: base, full; expected --preset NAME"):
        command.main(runs)
    assert command.main([*runs, "--preset", "full"]) == 0
    with pytest.raises(UserError, match="has no evaluation of preset 'safety', expected one of base, full"):
        command.main([*runs, "--preset", "safety"])


def test_gate_passes_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved(tmp_path, evaluation("base", arc=ONES, piqa=ONES, wiki=("bits_per_byte", False, BITS)))
    same = saved(tmp_path, evaluation("same", arc=ONES, piqa=ONES, wiki=("bits_per_byte", False, BITS)))
    more = [x + 0.1 for x in BITS]
    worse = saved(tmp_path, evaluation("worse", arc=ONES, piqa=ZEROS, wiki=("bits_per_byte", False, more)))
    better = saved(
        tmp_path,
        evaluation("better", arc=[1.0] * 40, piqa=ONES, wiki=("bits_per_byte", False, [x - 0.1 for x in BITS])),
    )
    assert command.main(["--gate", base, same]) == 0
    assert command.main(["--gate", base, better]) == 0
    assert "FAIL" not in capsys.readouterr().out
    assert command.main(["--gate", base, worse]) == 1
    failed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed == ["FAIL piqa acc", "FAIL wiki bits_per_byte", "FAIL overall acc"]
    assert command.main(["--gate", base, worse, "--min-difference", "0.11", "--metrics", "bits_per_byte"]) == 0
    assert command.main(["--gate", base, worse, "--alpha", "0.0000001", "--resamples", "200"]) == 0


def test_one_unlucky_item_passes_the_gate(tmp_path: Path) -> None:
    base, new = evaluation("base", arc=[1.0]), evaluation("new", arc=[0.0])
    assert command.main(["--gate", saved(tmp_path, base), saved(tmp_path, new)]) == 0


def test_a_gate_without_anything_to_test_is_an_error(tmp_path: Path) -> None:
    base, new = (evaluation(n, crows=("pct_stereotype", None, ONES)) for n in ("base", "new"))
    with pytest.raises(UserError, match="base.json has no metric with a better direction"):
        command.main(["--gate", saved(tmp_path, base), saved(tmp_path, new)])


def shots(results: Results, n: int) -> Results:
    results.figures = [Figure(**{**vars(f), "shots": n}) for f in results.figures]
    return results


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (shots(evaluation("new", arc=ONES), 0), "arc: prompts of base at step 100 have 5 examples, those of new"),
        (evaluation("new", arc=ONES[1:]), "arc acc: 1 item only in the base, 0 only in the new one"),
        (evaluation("new", piqa=ONES), "arc acc has no items of new at step 100"),
    ],
)
def test_the_gate_refuses_another_evaluation(tmp_path: Path, new: Results, message: str) -> None:
    with pytest.raises(UserError, match=message):
        command.main(["--gate", saved(tmp_path, evaluation("base", arc=ONES)), saved(tmp_path, new)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.json"], "got one evaluation, a.json, expected two or more"),
        (["a.json", "b.json", "--alpha", "0.1"], "--alpha is for --gate"),
        (["a.json", "b.json", "--min-difference", "0.1"], "--min-difference is for --gate"),
        (["a.json", "b.json", "--gate", "a.json"], "--gate: got 2 evaluations, expected one"),
        (["a.json", "b.json", "--preset", "base"], "--preset is for runs"),
        (["a.json", "b.json", "--metrics", "f1"], "metric 'f1' has no items, expected one of acc"),
        (["a.json", "c.json"], "cannot read the results c.json: No such file or directory$"),
        (["a.json", "list.json"], "list.json is not the results of an evaluation, expected"),
        (["a.json", "run"], "run has no evaluation"),
    ],
)
def test_bad_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "list.json").write_text("[1, 2]")
    for name in "ab":
        saved(Path(), evaluation(name, arc=ONES))
    with pytest.raises(UserError, match=message):
        command.main(words)

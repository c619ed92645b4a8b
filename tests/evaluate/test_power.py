"""The number of items has the promised power, in simulations with the test that `fastgpt eval compare` uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastgpt.core.errors import UserError
from fastgpt.evaluate import power
from fastgpt.evaluate.results import Items, Results
from fastgpt.evaluate.statistics import binomial_tail

DRAWS = 4000  # the standard error of a power of 0.8 is 0.0063


@pytest.mark.parametrize(("difference", "discordant"), [(0.05, 0.1), (0.03, 0.2), (0.1, 0.4), (0.1, 0.1), (0.02, 0.1)])
@pytest.mark.parametrize("wanted", [0.8, 0.9])
def test_the_power_for_accuracies(difference: float, discordant: float, wanted: float) -> None:
    n = power.items_for_accuracy(difference, discordant, power=wanted)
    rng = np.random.default_rng(5)
    both = np.array([(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant])
    counts = rng.multinomial(n, both, DRAWS)[:, :2]
    found = sum(2 * binomial_tail(int(min(pair)), int(sum(pair))) <= power.ALPHA for pair in counts) / DRAWS
    few = difference == discordant  # one model is never worse: the exact test has more power than it promises
    assert wanted - 0.025 < found < wanted + (0.15 if few else 0.06)


def test_fewer_items_have_less_power() -> None:
    n = power.items_for_accuracy(0.05, 0.2)
    assert power.items_for_accuracy(0.05, 0.2, power=0.5) < n / 1.5 and power.items_for_accuracy(0.05, 0.4) > 1.8 * n
    assert power.items_for_accuracy(0.025, 0.2) > 3.5 * n and power.items_for_accuracy(0.05, 0.2, alpha=0.01) > 1.3 * n
    connor = ((1.959964 * 0.2**0.5 + 0.841621 * (0.2 - 0.0025) ** 0.5) / 0.05) ** 2
    assert 0.9 * 2 / 0.05 < n - connor < 1.1 * 2 / 0.05  # what the correction for the exact test adds, 2 / difference


def test_the_power_for_means() -> None:
    n = power.items_for_mean(0.1, 0.5)
    assert n == 197  # (2.8016 * 5)^2
    rng = np.random.default_rng(1)
    drawn = rng.normal(0.1, 0.5, (DRAWS, n))
    found = (np.abs(drawn.mean(1)) / (drawn.std(1, ddof=1) / n**0.5) > 1.972).mean()  # t of 196
    assert abs(found - 0.8) < 0.03


def test_the_smallest_difference_is_the_inverse() -> None:
    for n in (100, 1000):
        least = power.smallest_accuracy_difference(n, 0.2)
        assert least is not None and power.items_for_accuracy(least, 0.2) <= n < power.items_for_accuracy(
            least * 0.99, 0.2
        )
        mean = power.smallest_mean_difference(n, 0.7)
        assert abs(power.items_for_mean(mean, 0.7) - n) <= 1
    assert power.smallest_accuracy_difference(10, 0.1) is None
    with pytest.raises(ValueError, match="0 < difference"):
        power.items_for_accuracy(0.3, 0.2)
    with pytest.raises(ValueError, match="above 0"):
        power.items_for_mean(0, 1)


def test_the_command_measures_the_spread_of_two_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [f"{i:016x}" for i in range(10)]
    for name, right in (("a", 3), ("b", 5)):
        items = [
            Items("t", "acc", ids, [float(i < right) for i in range(10)]),
            Items("t", "f1", ids, [i / right for i in range(10)]),
        ]
        Results({"name": name}, "p", items=items).save(tmp_path / f"{name}.json")
    both = ["--results", str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert power.main([*both, "--difference", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "t acc, measured on 10 items\n20.0% of the items discordant: a difference of 0.1 needs" in out
    spread = np.std([i / 3 - i / 5 for i in range(10)], ddof=1)
    assert f"t f1, measured on 10 items\nstandard deviation {spread:.4g}: a difference of 0.1 needs" in out
    with pytest.raises(UserError, match="have no items of this task"):
        power.main([*both, "--task", "u"])
    with pytest.raises(UserError, match="the same value on every item"):
        power.main(["--results", str(tmp_path / "a.json"), str(tmp_path / "a.json")])


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert power.main(["--items", "500", "--discordant", "0.2"]) == 0
    out, least = capsys.readouterr().out, power.smallest_accuracy_difference(500, 0.2)
    assert out.splitlines() == [
        "two models on the same items, two-sided test at 0.05, power 0.8",
        f"20.0% of the items discordant: 500 items show a difference of {least:.4f} or more",
    ]
    assert (
        power.main([]) == 0 and "40.0% of the items discordant: a difference of 0.01 needs" in capsys.readouterr().out
    )
    for argv, error in (
        (["--discordant", "0.2", "--deviation", "1"], "expected one of them"),
        (["--task", "t"], "no effect without --results"),
        (["--discordant", "2"], "expected a number, more than 0, at most 1"),
    ):
        with pytest.raises(UserError, match=error):
            power.main(argv)

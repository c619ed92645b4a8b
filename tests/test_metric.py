"""Which way a figure of a validation should go, by its name."""

from __future__ import annotations

import pytest

from fastgpt.training.metric import full_name, goal_of


@pytest.mark.parametrize(
    "name, goal",
    [
        ("val_loss", "min"),
        ("val_loss.web", "min"),
        ("replay.val_loss", "min"),
        ("harness.lambada.perplexity", "min"),
        ("harness.wikitext.bits_per_byte", "min"),
        ("val_cross_entropy", "min"),
        ("calibration_error", "min"),
        ("harness.hellaswag.acc_norm", "max"),
        ("harness.f1_loss.exact_match", "max"),
        ("macro_f1", "max"),
        ("rouge.l", "max"),
        ("val_reward", "max"),
        ("val_span_recall", "max"),
        ("val_kl", None),
        ("accuracy_loss", None),
        ("harness.hellaswag.acc_stderr", None),
        ("lossless", None),
    ],
)
def test_a_name_tells_its_goal_or_nothing(name: str, goal: str | None) -> None:
    assert goal_of(name) == goal
    assert (goal_of(name, "min"), goal_of(name, "max")) == ("min", "max")


def test_val_may_be_left_out_but_the_exact_name_is_first() -> None:
    assert full_name("f1", ["val_f1", "val_loss"]) == "val_f1"
    assert full_name("f1", ["val_f1", "f1"]) == "f1"
    assert full_name("loss.web", ["val_loss", "val_loss.web"]) == "val_loss.web"
    assert full_name("acc", ["val_f1"]) is None

"""Preference tasks against their formulas on unpacked sequences in fp64, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from preference_rows import VOCAB, Row, T, numbered, pair_batch, rated_batch, rows
from small_models import model_of
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.finetune.preference import DPO, KTO, ORPO, Watch
from fastgpt.finetune.tuned import Check, Tuned
from fastgpt.models.gpt import GPT


def model(**options: Any) -> GPT:
    return model_of(vocab_size=VOCAB, block_size=T, **options)


def exact(m: GPT, prompt: list[int], completion: list[int]) -> Tensor:
    """Return the log-probability of each token of prompt and completion but the first, from whole logits."""
    ids = torch.tensor([prompt + completion])
    return m(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def sides(m: GPT, data: list[Row]) -> Tensor:
    """Return the log-probability of each row's completions given its prompt, (n, 2)."""
    both = [(row.prompt, side) for row in data for side in (row.first, row.second)]
    return torch.stack([exact(m, p, c)[len(p) - 1 :].sum() for p, c in both]).view(-1, 2)


def moved(m: GPT) -> GPT:
    """Return a model near m."""
    other, g = model(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p, q in zip(other.parameters(), m.parameters()):
            p.copy_(q + 0.1 * torch.randn(q.shape, generator=g))
    return other


DATA = rows(5)
START, NOW = model(), moved(model())
with torch.no_grad():
    REFERENCE = sides(START, DATA)
TOKENS = torch.tensor([[len(row.first), len(row.second)] for row in DATA])


def same_loss(task: Any, batch: Any, expected: Tensor) -> None:
    """Compare the sum of a task's losses and its gradients with the losses of single pairs."""
    NOW.zero_grad()
    expected.sum().backward()
    wanted = [p.grad.clone() for p in NOW.parameters() if p.grad is not None]
    NOW.zero_grad()
    values = task.loss(NOW, batch)
    values[0].backward()
    assert values.shape == (1 + len(task.figures),)
    torch.testing.assert_close(values[0], expected.sum().to(values.dtype), rtol=1e-12, atol=0)
    for p, w in zip(NOW.parameters(), wanted):
        torch.testing.assert_close(p.grad, w, rtol=1e-9, atol=1e-12)


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x))


DPO_LOSSES: dict[str, tuple[dict[str, Any], Any]] = {
    "sigmoid": ({}, lambda h: -log_sigmoid(0.1 * (h[:, 0] - h[:, 1]))),
    "smoothed": (
        dict(label_smoothing=0.2, beta=0.5),
        lambda h: -0.8 * log_sigmoid(0.5 * (h[:, 0] - h[:, 1])) - 0.2 * log_sigmoid(0.5 * (h[:, 1] - h[:, 0])),
    ),
    "length norm": (dict(length_norm=True), lambda h: -log_sigmoid(0.1 * ((h / TOKENS)[:, 0] - (h / TOKENS)[:, 1]))),
    "ipo": (dict(loss_type="ipo"), lambda h: (h[:, 0] - h[:, 1] - 5) ** 2),
    "ipo-mean": (dict(loss_type="ipo-mean"), lambda h: ((h / TOKENS)[:, 0] - (h / TOKENS)[:, 1] - 5) ** 2),
}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", DPO_LOSSES)
def test_dpo_is_its_formula(name: str, shift: bool) -> None:
    options, formula = DPO_LOSSES[name]
    same_loss(DPO(**options, reference=REFERENCE), pair_batch(DATA, shift), formula(sides(NOW, DATA) - REFERENCE))


def test_dpo_starts_at_ln_2() -> None:
    task, batch = DPO(reference=REFERENCE), pair_batch(DATA)
    task.check_start(START, batch)
    values = task.loss(START, batch) / task.counted(batch)
    assert values[0].item() == pytest.approx(math.log(2), rel=1e-12)
    with pytest.raises(UserError, match="other weights"):
        task.check_start(NOW, batch)


def test_kto_is_its_formula() -> None:
    good = torch.tensor([row.good for row in DATA])
    for sign in (1, -1):  # a mean below 0 counts as 0
        p = sides(NOW, DATA)
        reference = REFERENCE + torch.tensor([0.0, sign * 100.0])
        kl = (p - reference)[:, 1].mean().clamp(min=0).detach()
        assert (kl == 0) == (sign == 1)
        h = (p - reference)[:, 0]
        loss = torch.where(good, 1 - torch.sigmoid(0.1 * (h - kl)), 2 - 2 * torch.sigmoid(0.1 * (kl - h)))
        same_loss(KTO(bad_weight=2.0, reference=reference), rated_batch(DATA), loss)


def test_orpo_is_its_formula() -> None:
    def parts() -> tuple[list[Tensor], Tensor]:
        whole = [-exact(NOW, row.prompt, row.first) for row in DATA]
        p = (sides(NOW, DATA) / TOKENS).exp()
        odds = p / (1 - p)
        return whole, -0.1 * log_sigmoid(torch.log(odds[:, 0] / odds[:, 1]))

    whole, preference = parts()
    same_loss(ORPO(), pair_batch(DATA), torch.stack([nll.mean() for nll in whole]) + preference)
    whole, preference = parts()
    same_loss(ORPO(nll="batch"), pair_batch(DATA, shift=True), torch.cat(whole).mean() + preference)


@pytest.mark.parametrize("task", [DPO(reference=REFERENCE), ORPO()], ids=["dpo", "orpo"])
def test_a_pair_weighs_the_same_in_any_micro_batch_and_padding_nothing(task: Any) -> None:
    whole = pair_batch(DATA)
    first, second = pair_batch(DATA[:2]), pair_batch([*DATA[2:], DATA[0]])
    second = numbered(second, [2, 3, 4, -1])
    assert task.counted(first) + task.counted(second) == task.counted(whole) == 5
    parts = task.loss(NOW, first) + task.loss(NOW, second)
    torch.testing.assert_close(parts, task.loss(NOW, whole), rtol=1e-12, atol=0)


def test_a_validation_set_has_its_own_reference() -> None:
    class Loader:
        def once(self, batches: int | None) -> list[Any]:
            return [pair_batch(DATA[:2]), numbered(pair_batch(DATA[2:]), [2, 3, 4])][:batches]

    class Run:
        model = NOW

    right = DPO(reference=REFERENCE)
    task = Tuned(DPO(reference=REFERENCE + 1), {"pairs": Check(right, Loader())})
    values = task.validate(Run(), None)
    assert list(values) == ["val_loss", *(f"val_{name}" for name in task.figures)]
    expected = (right.loss(NOW, pair_batch(DATA)) / 5).tolist()
    assert list(values.values()) == pytest.approx(expected, rel=1e-12)
    assert task.validate(Run(), 1)["val_loss"] == pytest.approx(right.loss(NOW, pair_batch(DATA[:2]))[0].item() / 2)
    assert NOW.training


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DPO(loss_type="ipo", label_smoothing=0.1), "label_smoothing has no effect with loss_type ipo"),
        (lambda: DPO(loss_type="ipo", length_norm=True), "length_norm has no effect with loss_type ipo"),
        (lambda: DPO(loss_type="robust"), "needs label_smoothing"),
        (lambda: DPO(loss_type="hinge"), "loss_type is 'hinge'"),  # type: ignore[arg-type]
        (lambda: DPO(label_smoothing=0.5), "label_smoothing is 0.5"),
        (lambda: KTO(beta=0), "beta is 0"),
        (lambda: ORPO(beta=-1), "beta is -1"),
        (lambda: ORPO(nll="sum"), "nll is 'sum'"),  # type: ignore[arg-type]
        (lambda: DPO().prepare(model(resid_dropout=0.1)), "dropout is 0.1"),
    ],
)
def test_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_the_watch_speaks_once() -> None:
    watch = Watch()
    assert not any(watch({"margin": 1.0, "chosen_reward": -0.1}) for _ in range(Watch.STEPS - 1))
    assert "less likely" in watch({"margin": 1.0, "chosen_reward": -0.1})[0]
    assert "by heart" in watch({"margin": 250.0, "chosen_reward": -0.1})[0]
    assert not watch({"margin": 250.0, "chosen_reward": -0.1})
    assert not any(Watch()({"margin": 1.0, "chosen_reward": 0.1}) for _ in range(50))


def test_log_probs_divide_the_logits_by_a_temperature() -> None:
    for options in ({}, dict(logit_softcap=3.0), dict(head_bias=True, tied=False)):
        m = model(**options)
        h, targets = m.hidden(torch.tensor([DATA[0].first])), torch.tensor(DATA[0].first)
        expected = F.cross_entropy(m.logits(h)[0] / 0.7, targets)
        loss = m.head_loss(h[0], targets, temperature=0.7)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(m.head_loss(h[0], targets), F.cross_entropy(m.logits(h)[0], targets))

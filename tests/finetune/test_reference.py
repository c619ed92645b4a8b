"""Reference log-probabilities: computed once for all rows, the same after a resume, refused where they do not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from preference_rows import VOCAB, T, numbered, pair_batch, rated_batch, rows
from small_models import model_of

from fastgpt.core.errors import UserError
from fastgpt.data.batch import Batch
from fastgpt.finetune.preference import DPO, KTO
from fastgpt.finetune.reference import NAME, compute_reference, hash_weights, load_reference, reference
from fastgpt.models.gpt import GPT

DATA = rows(5)


def model() -> GPT:
    return model_of(vocab_size=VOCAB, block_size=T).float()


def batches(*groups: list[int]) -> Iterator[Batch]:
    """Yield batches of the rows with these numbers; -1 pads."""
    for group in groups:
        yield numbered(pair_batch([DATA[i] for i in group]), group)


def test_every_row_gets_its_own_in_any_order_of_batches() -> None:
    m, task = model(), DPO()
    whole = compute_reference(task, m, [pair_batch(DATA)], 5)
    mixed = compute_reference(task, m, batches([3, 0], [1, -1], [4, 2]), 5)
    torch.testing.assert_close(mixed, whole, rtol=1e-5, atol=0)
    task = DPO(reference=mixed)
    for batch in batches([4, 1, 2], [0, 3, -1]):
        task.check_start(m, batch)
        loss = task.loss(m, batch)[0] / task.counted(batch)
        assert loss.item() == pytest.approx(math.log(2), rel=1e-4)


def test_kto_has_its_own_and_the_mismatched_completion() -> None:
    m = model()
    values = compute_reference(KTO(), m, [rated_batch(DATA)], 5)
    torch.testing.assert_close(values, compute_reference(DPO(), m, [pair_batch(DATA)], 5), rtol=1e-5, atol=0)
    KTO(reference=values).check_start(m, rated_batch(DATA))


def test_a_resumed_run_uses_the_file_whatever_its_weights_are(tmp_path: Path) -> None:
    m, path = model(), tmp_path / "run" / NAME
    first = reference(path, DPO(), m, [pair_batch(DATA)], 5, "data", resumed=False)
    with torch.no_grad():
        m.wte.weight += 1
    again = reference(path, DPO(), m, iter(()), 5, "data", resumed=True)
    assert torch.equal(first, again)
    assert [p.name for p in path.parent.iterdir()] == [NAME]


def test_a_new_run_reuses_a_file_that_fits_and_replaces_one_that_does_not(tmp_path: Path) -> None:
    m, path = model(), tmp_path / NAME
    first = reference(path, DPO(), m, [pair_batch(DATA)], 5, "data", resumed=False)
    assert torch.equal(reference(path, DPO(), m, iter(()), 5, "data", resumed=False), first)  # nothing to compute from
    with torch.no_grad():
        m.wte.weight += 1
    other = reference(path, DPO(), m, [pair_batch(DATA)], 5, "data", resumed=False)
    assert not torch.equal(other, first)
    assert torch.equal(load_reference(path, "data", hash_weights(m)), other)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    m, path = model(), tmp_path / NAME
    with pytest.raises(UserError, match="is missing"):
        reference(path, DPO(), m, iter(()), 5, "data", resumed=True)
    reference(path, DPO(), m, [pair_batch(DATA)], 5, "data", resumed=False)
    with pytest.raises(UserError, match="of other data"):
        reference(path, DPO(), m, iter(()), 5, "more data", resumed=True)
    with pytest.raises(UserError, match="of other weights"):
        load_reference(path, "data", hash_weights(model().double()))
    with pytest.raises(UserError, match="has 5 rows, expected 6"):
        reference(path, DPO(), m, iter(()), 6, "data", resumed=True)
    with pytest.raises(UserError, match="row 4 of 5"):
        compute_reference(DPO(), m, batches([0, 1, 2, 3]), 5)
    content = path.read_bytes()
    place = content.index(load_reference(path, "data", None).numpy().tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(UserError, match="is damaged"):
        load_reference(path, "data", None)


def test_dropout_is_refused() -> None:
    noisy = model_of(vocab_size=VOCAB, block_size=T, attn_dropout=0.1)
    with pytest.raises(UserError, match="dropout is 0.1"):
        compute_reference(DPO(), noisy, [pair_batch(DATA)], 5)

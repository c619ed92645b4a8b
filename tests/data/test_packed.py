"""Windows of packed documents as the trainer reads them: every token is a target once, and nothing crosses a border."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt.core.errors import UserError
from fastgpt.data import IGNORE, ShardWriter, TokenLoader, Tokens, open_tokens, sequential
from fastgpt.data.batch import Batch
from fastgpt.data.documents import document_starts
from fastgpt.data.packed import PackedLoader
from fastgpt.data.packing import METHODS, count, pack

EOT = 0


def stream(sizes: list[int]) -> np.ndarray:
    """Return documents of these sizes, each an EOT and tokens that occur nowhere else."""
    sizes_ = np.array(sizes)
    ids = np.arange(1, sizes_.sum() + 1, dtype=np.uint16)
    ids[np.cumsum(sizes_) - sizes_] = EOT
    return ids


SIZES = [3, 17, 40, 1, 8, 9, 25, 2, 60, 5, 5, 11]
IDS = stream(SIZES)


def epoch(loader: TokenLoader) -> list[Any]:
    """Return the batches of one epoch; batch must divide the number of windows."""
    assert loader.windows % loader.batch == 0
    return [next(loader) for _ in range(loader.windows // loader.batch)]


@pytest.mark.parametrize("method", ["best-fit", "pad"])
@pytest.mark.parametrize("block", [7, 16, 64])
def test_every_token_is_read_and_is_a_target_once(method: Any, block: int) -> None:
    loader = PackedLoader(Tokens([IDS[:90], IDS[90:]]), 1, block, method, EOT, seed=3)
    x, y = (torch.cat(part).flatten().tolist() for part in zip(*epoch(loader)))
    pairs = Counter((a, b) for a, b in zip(x, y) if b != IGNORE)
    assert pairs == Counter(zip(IDS[:-1].tolist(), IDS[1:].tolist()))
    counts = count(document_starts(Tokens([IDS]), EOT), block, method)
    assert (loader.windows, x.count(EOT)) == (counts.windows, len(SIZES) + counts.padding)
    assert counts.padding == len(x) - len(IDS) and counts.dropped == 0
    assert counts.cut == sum(size > block for size in SIZES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [7, 16, 64])
def test_documents_of_a_window(method: Any, block: int) -> None:
    if method == "concatenate":
        loader = TokenLoader(Tokens([IDS]), 1, block, eot=EOT)
    else:
        loader = PackedLoader(Tokens([IDS]), 1, block, method, EOT, masks=True)
    document = np.cumsum(IDS == EOT) - 1
    of = dict(zip(IDS.tolist(), document.tolist()))  # by token, EOT aside
    for batch in epoch(loader):
        assert isinstance(batch, Batch) and batch.doc_ids is not None and batch.positions is not None
        assert batch.doc_ids.dtype == torch.int32 and batch.positions.dtype == torch.int64
        ids, docs, positions = (t[0].tolist() for t in (batch.ids, batch.doc_ids, batch.positions))
        for i in range(block):
            restarts = i == 0 or docs[i] != docs[i - 1] or docs[i] == -1
            assert positions[i] == (0 if restarts else positions[i - 1] + 1)
            if docs[i] == -1:
                assert ids[i] == EOT and batch.targets[0, i] == IGNORE and docs[i:] == [-1] * (block - i)
            elif i and ids[i] and ids[i - 1]:
                assert (of[ids[i]] == of[ids[i - 1]]) == (not restarts)
            assert not (i and ids[i] == EOT) or restarts


def test_an_epoch_has_the_same_windows_in_another_order() -> None:
    loader = PackedLoader(Tokens([IDS]), 1, 16, "best-fit", EOT, seed=1)
    first, second = ([b[0].tolist() for b in epoch(loader)] for _ in range(2))
    assert first != second and sorted(first) == sorted(second)
    ordered = PackedLoader(Tokens([IDS]), 1, 16, "pad", EOT, shuffle=False)
    read = torch.cat([b[0] for b in epoch(ordered)]).flatten()
    assert read[read != EOT].tolist() == IDS[IDS != EOT].tolist()


def same(a: Any, b: Any) -> bool:
    tensors = [[part for part in Batch(*batch) if isinstance(part, torch.Tensor)] for batch in (a, b)]
    return len(a) == len(b) and all(map(torch.equal, *tensors))


@pytest.mark.parametrize("masks", [False, True])
def test_resume_is_exact_and_ranks_share_the_windows(masks: bool) -> None:
    def make(batch: int = 3, **more: Any) -> PackedLoader:
        return PackedLoader(Tokens([IDS]), batch, 16, "best-fit", EOT, masks, seed=5, **more)

    whole = [next(loader) for loader in [make()] for _ in range(9)]
    for stop in range(9):
        loader = make()
        for _ in range(stop):
            next(loader)
        again = make()
        again.load_state_dict(loader.state_dict())
        assert same(next(again), whole[stop])
    halves = [make(rank=r, world=2) for r in range(2)]
    for i in range(4):
        assert same(next(halves[i % 2]), whole[i])


def test_another_packing_is_another_order() -> None:
    fit = PackedLoader(Tokens([IDS]), 1, 16, "best-fit", EOT)
    pad, plain = PackedLoader(Tokens([IDS]), 1, 16, "pad", EOT), TokenLoader(Tokens([IDS]), 1, 16)
    for loader, state, said in (
        (pad, fit, "packing was best-fit, now it is pad"),
        (plain, fit, "packing was best-fit, now it is concatenate"),
        (fit, plain, "packing was concatenate, now it is best-fit"),
    ):
        with pytest.raises(UserError, match=said):
            loader.load_state_dict(state.state_dict())
    masked = TokenLoader(Tokens([IDS]), 1, 16, eot=EOT)
    masked.load_state_dict(plain.state_dict())  # masks do not change the order


def test_where_documents_start(tmp_path: Path) -> None:
    starts = np.cumsum([0, *SIZES])
    assert np.array_equal(document_starts(Tokens([IDS[:90], IDS[90:]]), EOT), starts)
    assert document_starts(Tokens([np.array([5, 6, 0, 7, 0], np.uint16)]), EOT).tolist() == [0, 2, 4, 5]
    assert document_starts(Tokens([]), EOT).tolist() == [0]
    with pytest.raises(UserError, match="no tokens"):
        PackedLoader(Tokens([]), 1, 16, "pad", EOT)
    for i, part in enumerate((IDS[:69], IDS[69:])):
        with ShardWriter(tmp_path / f"a{i}.bin", 1000) as f:
            f.write(part)
    inside = np.cumsum([0, *SIZES[5:]])
    inside.astype("<i8").tofile(tmp_path / "a1.idx")
    tokens = open_tokens(tmp_path / "a*.bin")
    assert np.array_equal(document_starts(tokens, EOT), starts)
    inside[2] += 1  # the index counts where there is one of the right length
    inside.astype("<i8").tofile(tmp_path / "a1.idx")
    assert document_starts(tokens, EOT)[7] == starts[7] + 1
    inside[:-1].astype("<i8").tofile(tmp_path / "a1.idx")
    assert np.array_equal(document_starts(tokens, EOT), starts)


def test_validation_with_documents() -> None:
    plain = list(sequential(IDS, 2, 16))
    marked = list(sequential(IDS, 2, 16, eot=EOT))
    assert all(torch.equal(a, b.ids) and torch.equal(y, b.targets) for (a, y), b in zip(plain, marked, strict=True))
    for batch in marked:
        filled = batch.targets == IGNORE
        assert torch.equal(batch.doc_ids == -1, filled)
        assert torch.equal((batch.positions == 0) & ~filled, ((batch.ids == EOT) | (torch.arange(16) == 0)) & ~filled)


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_packing(method: Any) -> None:
    offsets = np.cumsum([0, *SIZES])
    for length in (1, 7, 16, 64):
        packed, counted = pack(IDS, offsets, length, method), count(offsets, length, method)
        windows = [len({w for w, ids in enumerate(packed.doc_ids) if i in ids}) for i in range(len(SIZES))]
        assert counted.windows == len(packed.tokens) and counted.cut == sum(n > 1 for n in windows)
        assert (counted.padding, counted.dropped) == (packed.padding, packed.dropped)

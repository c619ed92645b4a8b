"""Packing: every token of every document is in one window, once, unless the caller asks for less."""

from __future__ import annotations

import numpy as np
import pytest

from fastgpt.data.packing import FillInTheMiddle, Packed, pack

pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

SIZES = st.lists(st.integers(0, 25), max_size=20)
METHODS = ("concatenate", "best-fit", "pad")


def corpus(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return documents whose tokens are all different, end to end, and their offsets."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return np.arange(1, offsets[-1] + 1, dtype=np.uint16), offsets


def tokens_of(packed: Packed, document: int) -> list[int]:
    return packed.tokens[packed.doc_ids == document].tolist()


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 12), st.sampled_from(METHODS))
def test_no_token_is_lost_or_doubled(sizes: list[int], length: int, method: str) -> None:
    tokens, offsets = corpus(sizes)
    packed = pack(tokens, offsets, length, method)  # type: ignore[arg-type]
    assert packed.tokens.shape == packed.doc_ids.shape and packed.tokens.shape[1] == length
    assert packed.tokens.dtype == tokens.dtype and packed.dropped == 0
    for i, (start, end) in enumerate(zip(offsets[:-1], offsets[1:])):
        assert sorted(tokens_of(packed, i)) == tokens[start:end].tolist()
    assert packed.padding == (packed.doc_ids == -1).sum() == packed.tokens.size - len(tokens)
    assert not packed.tokens[packed.doc_ids == -1].any()
    for row, ids in zip(packed.tokens, packed.doc_ids):
        # a stretch of a document is contiguous and in order, and padding is at the end
        borders = np.flatnonzero(ids[1:] != ids[:-1])
        assert len(set(ids.tolist())) == len(borders) + 1
        assert (ids == -1).sum() == 0 or ids[-1] == -1
        inside = np.flatnonzero((ids[1:] == ids[:-1]) & (ids[1:] != -1))
        assert (np.diff(row.astype(int))[inside] == 1).all()


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 12))
def test_best_fit(sizes: list[int], length: int) -> None:
    tokens, offsets = corpus(sizes)
    packed = pack(tokens, offsets, length, "best-fit")
    windows = [len({w for w, ids in enumerate(packed.doc_ids) if i in ids}) for i in range(len(sizes))]
    assert windows == [-(-size // length) for size in sizes]  # a document is split no more than it must be
    used = sorted((packed.doc_ids != -1).sum(1).tolist())
    assert all(a + b > length for a, b in zip(used, used[1:]))  # no two windows would fit into one
    assert len(packed.tokens) <= len(pack(tokens, offsets, length, "pad").tokens)


def test_order_of_windows() -> None:
    tokens, offsets = corpus([2, 6, 4, 3])
    packed = pack(tokens, offsets, 6, "best-fit")
    assert packed.doc_ids.tolist() == [[0, 0, 2, 2, 2, 2], [1] * 6, [3, 3, 3, -1, -1, -1]]
    assert pack(tokens, offsets, 6).doc_ids[0].tolist() == [0, 0, 1, 1, 1, 1]
    assert pack(tokens, offsets[1:], 6).tokens[0].tolist() == [3, 4, 5, 6, 7, 8]  # the first offset need not be 0


@given(SIZES, st.integers(1, 12))
def test_what_is_dropped_on_request_is_counted(sizes: list[int], length: int) -> None:
    tokens, offsets = corpus(sizes)
    assert pack(tokens, offsets, length, drop_last=True).dropped == len(tokens) % length
    for method in ("best-fit", "pad"):
        packed = pack(tokens, offsets, length, method, truncate=True)  # type: ignore[arg-type]
        assert packed.dropped == sum(max(size - length, 0) for size in sizes)
        assert [tokens_of(packed, i) for i in range(len(sizes))] == [
            tokens[start : min(end, start + length)].tolist() for start, end in zip(offsets[:-1], offsets[1:])
        ]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"method": "fit"}, "method must be one of concatenate, best-fit, pad, got 'fit'"),
        ({"truncate": True}, "truncate needs"),
        ({"method": "pad", "drop_last": True}, "drop_last needs"),
    ],
)
def test_wrong_options(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        pack(*corpus([3]), **{"length": 4, **options})  # type: ignore[arg-type]


@given(st.integers(0, 30), st.integers(0, 50), st.integers(0, 5))
def test_fill_in_the_middle(size: int, index: int, seed: int) -> None:
    document = np.arange(size, dtype=np.uint16)
    for spm in (0, 1):
        fim = FillInTheMiddle(100, 101, 102, rate=1, spm=spm, seed=seed)
        result = fim.apply(document, index).tolist()
        assert result == fim.apply(document, index).tolist() and result[0] == 100
        suffix, middle = result.index(101), result.index(102)
        head, tail, rest = result[1:suffix], result[suffix + 1 : middle], result[middle + 1 :]
        assert (rest + tail if spm else head + rest + tail) == document.tolist()
        assert not spm or not head
        assert fim.restore(np.array(result)).tolist() == document.tolist()
    assert FillInTheMiddle(100, 101, 102, rate=0).apply(document, index) is fim.restore(document) is document


def test_fill_in_the_middle_rates() -> None:
    document = np.arange(50, dtype=np.uint32)
    results = [FillInTheMiddle(100, 101, 102, rate=0.4, spm=0.25).apply(document, i).tolist() for i in range(2000)]
    changed = [r for r in results if len(r) == 53]
    spm = [r for r in changed if r[1] == 101]
    assert abs(len(changed) / 2000 - 0.4) < 4 * np.sqrt(0.24 / 2000)
    assert abs(len(spm) / len(changed) - (0.25 + 0.75 * 100 / 51**2)) < 4 * np.sqrt(0.2 / len(changed))
    with pytest.raises(ValueError, match="rate must be in"):
        FillInTheMiddle(1, 2, 3, rate=2)
    with pytest.raises(ValueError, match="must differ, got 1, 1, 2"):
        FillInTheMiddle(1, 1, 2)

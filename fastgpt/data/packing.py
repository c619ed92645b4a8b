"""Packing of documents into windows of one length, and fill-in-the-middle.

No token is lost unless the caller asks for it: a document that is longer than a window is split, and the space that is
left in a window is padded. `doc_ids` tells attention where documents end, so tokens see their own document only.

Sources: best-fit packing, Ding et al., Fewer Truncations Improve Language Modeling (arXiv 2404.10830);
fill-in-the-middle, Bavarian et al. (arXiv 2207.14255).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

Method = Literal["concatenate", "best-fit", "pad"]
METHODS: tuple[Method, ...] = get_args(Method)
PADDING = -1  # the document of a padding token
GROUP = 1 << 16  # documents that are packed together


@dataclass(slots=True)
class Packed:
    """Windows of T tokens.

    Attributes:
        tokens: (N, T) in the dtype of the documents; `pad` behind the last document of a window
        doc_ids: (N, T) int32, the index of each token's document, -1 for padding; as `doc_ids` of attention
        dropped: tokens of documents that are in no window
        padding: tokens of the windows that belong to no document
    """

    tokens: np.ndarray
    doc_ids: np.ndarray
    dropped: int
    padding: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Which pieces of documents the windows hold, by place in the stream of all documents.

    Attributes:
        document, start, size: (P,) int64, the pieces in the order of the windows: index of the document, first token
            in the stream, and length, which is at most that of a window
        first: (N + 1,) int64; window w holds the pieces first[w] to first[w + 1] - 1, one behind the other
    """

    document: np.ndarray
    start: np.ndarray
    size: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    def of(self, window: int) -> range:
        """Return the numbers of the pieces of a window."""
        return range(int(self.first[window]), int(self.first[window + 1]))


def plan_windows(offsets: np.ndarray, length: int, method: Method, *, truncate: bool = False) -> Plan:
    """Plan windows of `length` tokens for documents, without their tokens.

    "best-fit" fills windows from GROUP documents that follow one another, so that its time is linear and documents stay
    near their neighbours.

    Args:
        offsets: (documents + 1,) int; document i is the tokens offsets[i] to offsets[i + 1] - 1
        method: best-fit or pad, as of `pack`
        truncate: leave out what is longer than a window instead of splitting it
    """
    offsets = np.asarray(offsets, np.int64)
    plans = []
    for at in range(0, max(len(offsets) - 1, 1), GROUP):
        document, start, size = _split(offsets[at : at + GROUP + 1], length, truncate)
        windows = np.arange(len(size)) if method == "pad" else _best_fit(size, length)
        order = np.argsort(windows, kind="stable")
        first = np.searchsorted(windows[order], np.arange(int(windows.max(initial=-1)) + 1))
        plans.append((document[order] + at, start[order], size[order], first))
    before = np.cumsum([0, *(len(size) for _, _, size, _ in plans)])
    document, start, size = (np.concatenate([plan[i] for plan in plans]) for i in range(3))
    first = np.concatenate([*(plan[3] + n for plan, n in zip(plans, before)), before[-1:]])
    return Plan(document, start, size, first)


@dataclass(frozen=True, slots=True)
class Counts:
    """What a method does to a data set.

    Attributes:
        windows: windows of all documents
        cut: documents that are in more than one window
        padding: tokens of the windows that belong to no document
        dropped: tokens of documents that are in no window
    """

    windows: int
    cut: int
    padding: int
    dropped: int


def count(offsets: np.ndarray, length: int, method: Method) -> Counts:
    """Return what a method does to documents, as `pack` would do it. Args as of `plan_windows`."""
    offsets = np.asarray(offsets, np.int64)
    tokens = int(offsets[-1] - offsets[0])
    if method == "concatenate":
        windows = -(-tokens // length)
        starts, stops = (offsets[:-1] - offsets[0]) // length, (offsets[1:] - offsets[0] - 1) // length
        return Counts(windows, int((starts < stops).sum()), windows * length - tokens, 0)
    plan = plan_windows(offsets, length, method)
    return Counts(len(plan), int((np.diff(offsets) > length).sum()), len(plan) * length - tokens, 0)


def pack(
    tokens: np.ndarray,
    offsets: np.ndarray,
    length: int,
    method: Method = "concatenate",
    *,
    pad: int = 0,
    truncate: bool = False,
    drop_last: bool = False,
) -> Packed:
    """Pack documents into windows.

    "concatenate" puts all documents end to end and cuts the stream, so only the last window has padding. "best-fit"
    puts each document, the longest first, into the fullest window that still has room, so a document is split only if
    it is longer than a window. "pad" begins a new window for each document.

    Args:
        tokens: (tokens,), all documents end to end
        offsets: (documents + 1,) int; document i is tokens[offsets[i]:offsets[i + 1]]
        length: tokens of a window, T
        method: how documents share windows
        pad: the token of the padding
        truncate: drop what is longer than a window instead of splitting it ("best-fit" and "pad")
        drop_last: drop the last window if it is not full ("concatenate")

    Raises:
        ValueError: length below 1, an unknown method, or an option that does not go with the method
    """
    if length < 1:
        raise ValueError(f"pack: length must be at least 1, got {length}")
    if method not in METHODS:
        raise ValueError(f"pack: method must be one of {', '.join(METHODS)}, got {method!r}")
    if truncate and method == "concatenate":
        raise ValueError("pack: truncate needs the method best-fit or pad, got concatenate")
    if drop_last and method != "concatenate":
        raise ValueError(f"pack: drop_last needs the method concatenate, got {method}")
    offsets = np.asarray(offsets, np.int64)
    tokens = tokens[offsets[0] : offsets[-1]]
    offsets = offsets - offsets[0]
    if method == "concatenate":
        return _concatenate(tokens, offsets, length, pad, drop_last)
    plan = plan_windows(offsets, length, method, truncate=truncate)
    packed = _place(tokens, plan, length, pad)
    packed.dropped = len(tokens) - int(plan.size.sum())
    return packed


def _concatenate(tokens: np.ndarray, offsets: np.ndarray, length: int, pad: int, drop_last: bool) -> Packed:
    count = len(tokens) // length if drop_last else -(-len(tokens) // length)
    used = min(count * length, len(tokens))
    windows = np.full(count * length, pad, tokens.dtype)
    windows[:used] = tokens[:used]
    doc_ids = np.full(count * length, PADDING, np.int32)
    doc_ids[:used] = np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))[:used]
    shape = (count, length)
    return Packed(windows.reshape(shape), doc_ids.reshape(shape), len(tokens) - used, count * length - used)


def _split(offsets: np.ndarray, length: int, truncate: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return document, start and size of the pieces of all documents in order; an empty document has none."""
    sizes = np.diff(offsets)
    counts = np.minimum(sizes, 1) if truncate else -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), counts)
    before = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * length
    return document, offsets[:-1][document] + before, np.minimum(sizes[document] - before, length)


def _best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """Return the window of each piece. Windows are numbered by their first piece in the order of the documents."""
    free: list[list[int]] = [[] for _ in range(length + 1)]  # windows by free space
    spaces = 0  # bit s is set if a window has s tokens of free space
    windows = np.empty(len(sizes), np.int64)
    count = 0
    order = np.argsort(-sizes, kind="stable")
    for piece, size in zip(order.tolist(), sizes[order].tolist()):
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1  # the least that is enough
            window = free[space].pop()
            if not free[space]:
                spaces ^= 1 << space
        else:
            window, space, count = count, length, count + 1
        windows[piece] = window
        if space > size:
            free[space - size].append(window)
            spaces |= 1 << (space - size)
    _, first, number = np.unique(windows, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]


def _place(tokens: np.ndarray, plan: Plan, length: int, pad: int) -> Packed:
    """Copy each piece into its window, behind the pieces before it."""
    size = plan.size
    window = np.repeat(np.arange(len(plan)), np.diff(plan.first))
    ends = np.cumsum(size)
    column = ends - size - (ends - size)[plan.first[:-1]][window]
    within = np.arange(int(size.sum())) - np.repeat(ends - size, size)
    target = np.repeat(window * length + column, size) + within
    packed, doc_ids = np.full(len(plan) * length, pad, tokens.dtype), np.full(len(plan) * length, PADDING, np.int32)
    packed[target] = tokens[np.repeat(plan.start, size) + within]
    doc_ids[target] = np.repeat(plan.document, size)
    shape = (len(plan), length)
    return Packed(packed.reshape(shape), doc_ids.reshape(shape), 0, len(plan) * length - len(target))


@dataclass(frozen=True, slots=True)
class FillInTheMiddle:
    """Fill-in-the-middle: some documents are reordered so that the middle comes last.

    Attributes:
        prefix, suffix, middle: the ids of the sentinels
        rate: share of documents to reorder
        spm: share among these in the order suffix, prefix, middle (SPM) instead of prefix, suffix, middle (PSM)
        seed: seed; what happens to a document depends on it and the document's index alone
    """

    prefix: int
    suffix: int
    middle: int
    rate: float = 0.5
    spm: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rate", "spm"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"FillInTheMiddle: {name} must be in [0, 1], got {getattr(self, name)}")
        ids = self.prefix, self.suffix, self.middle
        if len(set(ids)) < 3:
            raise ValueError(f"FillInTheMiddle: prefix, suffix and middle must differ, got {', '.join(map(str, ids))}")

    def apply(self, tokens: np.ndarray, index: int) -> np.ndarray:
        """Return a document reordered, or unchanged; three tokens longer if it is reordered.

        The borders are between tokens, drawn uniformly. PSM: PREFIX prefix SUFFIX suffix MIDDLE middle.
        SPM: PREFIX SUFFIX suffix MIDDLE prefix middle, as in the paper.

        Args:
            tokens: (n,), one document without its end-of-text token
            index: the number of the document
        """
        rng = np.random.default_rng([self.seed, index])
        if rng.random() >= self.rate:
            return tokens
        suffix_first = rng.random() < self.spm
        first, last = np.sort(rng.integers(0, len(tokens) + 1, 2))
        prefix, middle, suffix = tokens[:first], tokens[first:last], tokens[last:]
        before, between, behind = (np.array([x], tokens.dtype) for x in (self.prefix, self.suffix, self.middle))
        if suffix_first:
            return np.concatenate([before, between, suffix, behind, prefix, middle])
        return np.concatenate([before, prefix, between, suffix, behind, middle])

    def restore(self, tokens: np.ndarray) -> np.ndarray:
        """Return a document that `apply` returned in its own order again, without sentinels, (n,)."""
        borders = np.flatnonzero(np.isin(tokens, (self.prefix, self.suffix, self.middle)))
        if len(borders) != 3:
            return tokens
        _, suffix, middle = borders  # in both orders: what is before the middle's border goes behind what is after it
        return np.concatenate([tokens[1:suffix], tokens[middle + 1 :], tokens[suffix + 1 : middle]])

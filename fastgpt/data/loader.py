"""Batches of windows from a token stream: shuffled without replacement for training, in a fixed order for validation.

A window is block + 1 tokens: x its first block tokens, y the same shifted by one. An epoch visits every window once, in
an order that is a function of (seed, epoch) alone: a Feistel network permutes the window numbers, so no order is
stored, any position can be computed directly, and the order depends on no library's generator. Samples are numbered
across epochs, and the ranks alternate by batches. The whole state is therefore one number, the samples consumed.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fastgpt.core.errors import UserError
from fastgpt.data.batch import Batch
from fastgpt.data.documents import mark_documents
from fastgpt.data.packing import PADDING
from fastgpt.data.shards import Tokens

IGNORE = -100  # target of positions that do not count (cross_entropy's default ignore_index)
STATE_VERSION = 1
_ROUNDS = 6
U64 = np.uint64


class TokenSource(Protocol):
    """The part of the interface of `fastgpt.data.shards.Tokens` that the loader uses."""

    def __len__(self) -> int: ...
    def read(self, start: int, n: int) -> npt.NDArray[Any]: ...
    def fingerprint(self) -> str: ...


Pair = tuple[torch.Tensor, torch.Tensor]


def permute(index: npt.NDArray[np.int64], n: int, key: int) -> npt.NDArray[np.int64]:
    """Return the image of each index under a pseudo-random permutation of range(n) that `key` selects; any shape, no
    table.

    Balanced Feistel network on the smallest even number of bits that holds n (Luby and Rackoff 1988); images outside
    range(n) are permuted again until they fall inside (cycle walking, Black and Rogaway 2002).
    """
    half = U64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = U64((1 << int(half)) - 1)
    keys = _mix(np.arange(1, _ROUNDS + 1, dtype=U64) * U64(0x9E3779B97F4A7C15) ^ U64(key & 0xFFFFFFFFFFFFFFFF))
    out = index.astype(U64)
    outside = np.ones(out.shape, bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for k in keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        out[outside] = left << half | right
        outside = out >= U64(n)
    return out.astype(np.int64)


class TokenLoader:
    """Endless training batches x, y (batch, block) int64 on `device`; y is x shifted by one token.

    tokens: a Tokens, or one array of ids (n,). Windows start at multiples of block from an offset that changes each
    epoch, so that repeated epochs cut the text elsewhere. rank r of world takes every world-th batch. Batches may span
    two epochs, so any batch size works on any corpus of at least one window.
    shuffle=False reads the windows as they lie, for a corpus that is a mixture which changes during training.
    eot: the id that documents begin with. It makes batches of type Batch, whose doc_ids and positions let attention
    see a token's own document only.
    On CUDA a thread gathers the next batches in pinned memory and the copy does not block; elsewhere nothing runs ahead
    (prefetch=n > 0 forces the thread). Iterate, or call next().
    Raises UserError when the corpus is shorter than one window, ValueError for sizes that make no sense.
    """

    def __init__(
        self,
        tokens: TokenSource | npt.NDArray[Any],
        batch: int,
        block: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        prefetch: int | None = None,
        shuffle: bool = True,
        eot: int | None = None,
    ) -> None:
        self.tokens: TokenSource = Tokens([tokens]) if isinstance(tokens, np.ndarray) else tokens
        self.batch, self.block, self.seed, self.rank, self.world = batch, block, seed, rank, world
        self.shuffle, self.eot = shuffle, eot
        self.device = _numbered(torch.device(device))
        _check_sizes(batch, block, rank, world)
        n = len(self.tokens)
        self.windows = self._count()
        self._samples = 0  # over all ranks, up to the last batch handed out
        self._prefetch = (2 if self.device.type == "cuda" else 0) if prefetch is None else prefetch
        self._ahead: _Ahead | None = None
        self._identity = {"seed": seed, "block": block, "n_tokens": n, "tokens": self.tokens.fingerprint()}
        self._identity["order"] = "shuffled" if shuffle else "sequential"

    def _count(self) -> int:
        """Return the number of windows of an epoch."""
        n, block = len(self.tokens), self.block
        if n < block + 1:
            raise UserError(f"the corpus has {n} tokens, one block needs {block} + 1; use more text or a smaller block")
        return max(1, (n - block) // block)  # leaves room for the epoch's offset

    def __iter__(self) -> Iterator[Pair | Batch]:
        return self

    def __next__(self) -> Any:
        """Return (x, y), or with `eot` a Batch."""
        if self._prefetch and self._ahead is None:
            self._ahead = _Ahead(self, self._samples, self._prefetch)
        try:
            host = self._ahead.get() if self._ahead else self._gather(self._samples)
        except BaseException:
            self.close()  # the next call starts again at this batch
            raise
        self._samples += self.batch * self.world
        return _batch(host, self.device)

    def starts(self, sample: int, n: int) -> list[int]:
        """Return the first token of the windows of samples sample .. sample + n, counted over all epochs and ranks."""
        slack = len(self.tokens) - self.windows * self.block  # offsets 0 .. slack - 1 keep the last target inside
        return [key % slack + window * self.block for key, window in self._windows(sample, n)]

    def _windows(self, sample: int, n: int) -> list[tuple[int, int]]:
        """Return (hash of the epoch, number of the window in it) of samples sample .. sample + n."""
        out: list[tuple[int, int]] = []
        while n > 0:
            epoch, position = divmod(sample, self.windows)
            here = min(n, self.windows - position)
            key = _hash(_hash(self.seed) ^ epoch)
            order = np.arange(position, position + here, dtype=np.int64)
            order = permute(order, self.windows, key) if self.shuffle else order
            out += [(key, int(w)) for w in order]
            sample, n = sample + here, n - here
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return plain values: the cursor (epoch, position) after the last batch returned, and the data it points
        into."""
        epoch, position = divmod(self._samples, self.windows)
        return {"version": STATE_VERSION, "epoch": epoch, "position": position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the last batch of `state`; batch, rank and world may differ from the saved run's.

        Raises UserError where seed, block or tokens are not those of the saved run.
        """
        older = {"order": "shuffled", "packing": "concatenate"}  # which states of older versions do not say
        for key, here in {"version": STATE_VERSION, **older, **self._identity}.items():
            before = state.get(key, older.get(key))
            if before != here:
                raise UserError(f"cannot resume the data order: {key} was {before}, now it is {here}")
        self.close()
        self._samples = int(state["epoch"]) * self.windows + int(state["position"])

    def close(self) -> None:
        """Stop the prefetch thread, if any; the next call of next() continues from the same position."""
        if self._ahead:
            self._ahead.stop()
        self._ahead = None

    def _gather(self, sample: int) -> torch.Tensor:
        """Return this rank's batch of the step whose first sample (over all ranks) is `sample`: x and y, with `eot`
        also doc_ids and positions, (2 or 4, batch, block) int64."""
        starts = self.starts(sample + self.rank * self.batch, self.batch)
        out = self._rows()
        rows = out.numpy()
        for i, start in enumerate(starts):
            ids = self.tokens.read(start, self.block + 1)
            rows[0, i], rows[1, i] = ids[:-1], ids[1:]
        if self.eot is not None:
            mark_documents(rows[0], self.eot, rows[2], rows[3])
        return out

    def _rows(self) -> torch.Tensor:
        return _empty(self.batch, self.block, self.device, 2 if self.eot is None else 4)


class _Ahead:
    """A thread that gathers up to `depth` batches ahead, until stop(), which also runs when the loader is deleted."""

    def __init__(self, loader: TokenLoader, sample: int, depth: int) -> None:
        self._queue: queue.Queue[torch.Tensor | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        args = (weakref.ref(loader), sample)
        self._thread = threading.Thread(target=self._run, args=args, daemon=True, name="fastgpt-loader")
        self._thread.start()
        weakref.finalize(loader, self.stop)

    def get(self) -> torch.Tensor:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self, ref: weakref.ref[TokenLoader], sample: int) -> None:
        while (loader := ref()) is not None:
            try:
                if loader.device.type == "cuda":
                    torch.cuda.set_device(loader.device)  # pinned memory belongs to a device, and threads start on 0
                item: torch.Tensor | BaseException = loader._gather(sample)
                sample += loader.batch * loader.world
            except BaseException as e:  # handed to the consumer, who raises it
                item = e
            del loader
            if not self._put(item) or isinstance(item, BaseException):
                return

    def _put(self, item: torch.Tensor | BaseException) -> bool:
        """Return False if stopped before there was room."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def sequential(
    tokens: TokenSource | npt.NDArray[Any],
    batch: int,
    block: int,
    *,
    max_batches: int | None = None,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    eot: int | None = None,
) -> Iterator[Any]:
    """Return validation batches x, y (batch, block) int64, always the same; every token but the first is a target once.

    All batches have the full shape; what lies past the end has x 0 and y IGNORE (-100), so weight the loss by
    (y != IGNORE).sum(), which is 0 in a rank's last batch where the windows do not go round. max_batches (per rank):
    take this many, from windows evenly spaced over the whole. eot: as of TokenLoader. Raises UserError for fewer than
    two tokens.
    """
    source: TokenSource = Tokens([tokens]) if isinstance(tokens, np.ndarray) else tokens
    device = torch.device(device)
    _check_sizes(batch, block, rank, world)
    n = len(source)
    if n < 2:
        raise UserError(f"the validation split has {n} tokens, expected at least 2; hold out more text")
    windows = -(-(n - 1) // block)
    batches = -(-windows // (batch * world))
    if max_batches is not None and max_batches < batches:
        batches = max_batches
    taken = min(windows, batches * batch * world)
    numbers = [i * windows // taken for i in range(taken)][rank::world]
    return _sequential(source, batch, block, device, numbers, batches, eot)


def _sequential(
    source: TokenSource,
    batch: int,
    block: int,
    device: torch.device,
    windows: list[int],
    batches: int,
    eot: int | None,
) -> Iterator[Any]:
    for b in range(batches):
        out = _empty(batch, block, device, 2 if eot is None else 4)
        out[0].zero_()
        out[1].fill_(IGNORE)
        rows = out.numpy()
        for i, w in enumerate(windows[b * batch : (b + 1) * batch]):
            ids = source.read(w * block, min(block + 1, len(source) - w * block))
            rows[0, i, : len(ids) - 1], rows[1, i, : len(ids) - 1] = ids[:-1], ids[1:]
        if eot is not None:
            mark_documents(rows[0], eot, rows[2], rows[3])
            rows[2][rows[1] == IGNORE] = PADDING
        yield _batch(out, device)


def _numbered(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _batch(host: torch.Tensor, device: torch.device) -> Pair | Batch:
    """Return the rows of `_gather` on the device: (x, y), or a Batch if there are doc_ids and positions."""
    x, y, *more = host.to(device, non_blocking=True).unbind(0)
    return Batch(x, y, more[0].int(), more[1]) if more else (x, y)


def _empty(batch: int, block: int, device: torch.device, rows: int) -> torch.Tensor:
    # pinned memory comes from torch's caching allocator, which reuses a block only after its copy has finished
    return torch.empty((rows, batch, block), dtype=torch.int64, pin_memory=device.type == "cuda")


def _check_sizes(batch: int, block: int, rank: int, world: int) -> None:
    if batch < 1 or block < 1:
        raise ValueError(f"loader: batch and block must be at least 1, got {batch} and {block}")
    if not 0 <= rank < world:
        raise ValueError(f"loader: rank must be in [0, world), got rank {rank} of {world}")


def _hash(x: int) -> int:
    return int(_mix(np.array([x & 0xFFFFFFFFFFFFFFFF], U64))[0])


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    x = (x ^ x >> U64(30)) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> U64(27)) * U64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ x >> U64(31)
    return mixed

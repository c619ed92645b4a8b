"""Loaders for fine-tuning: rows of packed examples, and batches of pairs, ratings and labelled texts.

An example of n tokens takes n - 1 places of a row: each token but the last, with the token after it as the target. So
no target is lost where a long text is split, and none crosses into another document. Where heads may score the last
token, in pairs, ratings and labelled texts, it takes a place too, without a target.

All loaders are endless, and continue exactly after `load_state_dict`. They have:

    len(loader)                 batches of an epoch (the last may reach into the next epoch)
    next(loader)                a Batch on the loader's device
    loader.once(batches=None)   batches of one pass in the order of the data, for validation; the last may be smaller
    loader.left_out             examples that have nothing to learn
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from fastgpt.core.errors import UserError
from fastgpt.data.batch import Batch
from fastgpt.data.loader import IGNORE
from fastgpt.data.packing import pack
from fastgpt.finetune.encode import Example
from fastgpt.finetune.examples import Classified, Pair, Rated
from fastgpt.finetune.mixture import Mixture

Packing = Literal["best-fit", "none"]
STATE_VERSION = 1
Array = npt.NDArray[Any]
T = TypeVar("T")


class Packed(NamedTuple):
    """Rows of sequences, each part (rows, T).

    Attributes:
        ids, targets, positions: int64, as in Batch.
        doc_ids: int32, the number of each token's sequence, -1 for padding.
    """

    ids: Array
    targets: Array
    doc_ids: Array
    positions: Array


class Sequences:
    """Sequences in rows, of which any can be filled with tokens.

    Attributes:
        places: (rows, T), where each token stands in the sequences end to end; -1 for padding.
        doc_ids: (rows, T) int32.
    """

    def __init__(self, ids: Sequence[Array], targets: Sequence[Array], length: int, packing: Packing, pad: int) -> None:
        """Pack sequences, ids and targets (n,) of each, into rows of `length`; a longer sequence is split."""
        offsets = np.cumsum([0, *map(len, ids)])
        self._ids, self._pad = np.concatenate(ids).astype(np.uint32), pad
        self._targets = np.concatenate(targets).astype(np.int32)
        places = np.arange(offsets[-1], dtype=np.int64 if offsets[-1] >= 1 << 31 else np.int32)
        packed = pack(places, offsets, length, "best-fit" if packing == "best-fit" else "pad", pad=-1)
        self.places, self.doc_ids = packed.tokens, packed.doc_ids

    def rows(self, rows: Array | slice = slice(None)) -> Packed:
        """Return some rows, or all."""
        places, doc_ids = self.places[rows], self.doc_ids[rows]
        begins = np.ones(doc_ids.shape, bool)
        begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
        columns = np.arange(doc_ids.shape[1])
        return Packed(
            np.where(places < 0, self._pad, self._ids[places].astype(np.int64)),
            np.where(places < 0, IGNORE, self._targets[places].astype(np.int64)),
            doc_ids,
            columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1),
        )

    def keep_useful(self) -> None:
        """Drop the rows that have no target."""
        useful = ((self.places >= 0) & (self._targets[self.places] != IGNORE)).any(1)
        self.places, self.doc_ids = self.places[useful], self.doc_ids[useful]


class _Loader(Generic[T]):
    """What all loaders share. A sample is what `_batch` takes several of."""

    def __init__(
        self,
        sets: Sequence[Sequence[T]],
        batch: int,
        weights: Sequence[float] | None,
        seed: int,
        device: torch.device | str,
        identity: dict[str, Any],
    ) -> None:
        if batch < 1:
            raise ValueError(f"loader: batch must be at least 1, got {batch}")
        self.sets, self.batch, self.device = sets, batch, torch.device(device)
        self.order = Mixture([len(s) for s in sets], weights, seed)
        self._firsts = np.cumsum([0, *(len(s) for s in sets)])
        self._samples = 0
        self._identity = {"seed": seed, "weights": None if weights is None else list(map(float, weights)), **identity}

    def __len__(self) -> int:
        return -(-self.order.epoch // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._on_device(self.order.take(self._samples, self.batch))
        self._samples += self.batch
        return batch

    def once(self, batches: int | None = None) -> Iterator[Batch]:
        """Yield all samples once, set by set in their order; batches: this many, of samples evenly spaced over all."""
        every = [(s, i) for s, items in enumerate(self.sets) for i in range(len(items))]
        if batches is not None and batches * self.batch < len(every):
            taken = batches * self.batch
            every = [every[k * len(every) // taken] for k in range(taken)]
        for at in range(0, len(every), self.batch):
            yield self._on_device(every[at : at + self.batch])

    def state_dict(self) -> dict[str, Any]:
        """Return plain values: the samples consumed, and what identifies the data and their order."""
        return {"version": STATE_VERSION, "samples": self._samples, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the last batch of `state`; the batch size may differ.

        Raises:
            UserError: the data, their packing, weights or seed are not those of `state`.
        """
        for key, here in {"version": STATE_VERSION, **self._identity}.items():
            if state.get(key) != here:
                raise UserError(f"cannot resume the data order: {key} was {state.get(key)}, now it is {here}")
        self._samples = int(state["samples"])

    def close(self) -> None:
        """Do nothing: no thread runs ahead."""

    def _on_device(self, samples: list[tuple[int, int]]) -> Batch:
        packed, extra = self._batch(samples)
        if len(self.sets) > 1:
            extra["task"] = np.array([s for s, _ in samples], np.int64)

        def put(array: Array) -> torch.Tensor:
            tensor = torch.tensor(array)
            cuda = self.device.type == "cuda"
            return (tensor.pin_memory() if cuda else tensor).to(self.device, non_blocking=cuda)

        ids, targets, doc_ids, positions = map(put, packed)
        return Batch(ids, targets, doc_ids, positions, {name: put(array) for name, array in extra.items()})

    def _batch(self, samples: list[tuple[int, int]]) -> tuple[Packed, dict[str, Array]]:
        raise NotImplementedError


class ExampleLoader(_Loader[int]):
    """Batches of `batch` rows of `block` tokens, (B, T); rows hold examples of one set, and are packed once.

    Every learned token of every example is a target exactly once in an epoch without weights. extra: "task" (B,) int64,
    the set of each row, if there are several.

    Args:
        sets: lists of examples, one for each file or task.
        weights: share of rows of each set; None: each row once in an epoch.
        packing: "best-fit": several examples in a row, see fastgpt.data.packing; "none": one example in a row. Plain
            texts longer than T are split in both.
        pad: id of padding.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[Example]],
        batch: int,
        block: int,
        *,
        packing: Packing = "best-fit",
        weights: Sequence[float] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        pad: int = 0,
    ) -> None:
        kept = [[e for e in examples if e.learned[1:].any()] for examples in sets]
        self.left_out = sum(map(len, sets)) - sum(map(len, kept))
        if not all(kept):
            raise UserError("a data set has no example with tokens to learn, expected at least one")
        self._rows = [
            Sequences([e.ids[:-1] for e in examples], list(map(_targets, examples)), block, packing, pad)
            for examples in kept
        ]
        for rows in self._rows:
            rows.keep_useful()
        identity = {"block": block, "packing": packing, "data": _digest(e for examples in kept for e in examples)}
        super().__init__([range(len(rows.places)) for rows in self._rows], batch, weights, seed, device, identity)

    def _batch(self, samples: list[tuple[int, int]]) -> tuple[Packed, dict[str, Array]]:
        rows = (self._rows[s].rows(np.array([i])) for s, i in samples)
        return Packed(*map(np.concatenate, zip(*rows))), {}


class _SequenceLoader(_Loader[T]):
    """Batches of a fixed number of samples, whose sequences share as few rows as they need."""

    def __init__(
        self,
        sets: Sequence[Sequence[T]],
        batch: int,
        block: int,
        *,
        packing: Packing = "best-fit",
        weights: Sequence[float] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        pad: int = 0,
    ) -> None:
        self.block, self.packing, self.pad, self.left_out = block, packing, pad, 0
        longest = max((len(e) for items in sets for item in items for e in self._parts(item)), default=0)
        if longest > block:
            raise ValueError(f"loader: a sequence has {longest} tokens, expected at most {block}")
        digest = _digest((e for items in sets for item in items for e in self._parts(item)), self._labels(sets))
        super().__init__(sets, batch, weights, seed, device, {"block": block, "data": digest})

    def _parts(self, item: T) -> list[Example]:
        """Return the sequences of a sample."""
        raise NotImplementedError

    def _labels(self, sets: Sequence[Sequence[T]]) -> list[Any]:
        """Return what identifies the data besides their sequences."""
        return []

    def _packed(self, examples: list[Example]) -> Packed:
        targets = [np.append(_targets(e), IGNORE) for e in examples]
        return Sequences([e.ids for e in examples], targets, self.block, self.packing, self.pad).rows()

    def _numbers(self, packed: Packed, n: int, samples: list[tuple[int, int]]) -> dict[str, Array]:
        index = np.array([self._firsts[s] + i for s, i in samples], np.int64)
        return {"sequence": packed.doc_ids.astype(np.int64), "n": np.array(n, np.int64), "index": index}


class PairLoader(_SequenceLoader[Pair]):
    """Batches of `batch` pairs in R rows of `block` tokens, (R, T); R is what these pairs need and differs by batch.

    extra: "sequence" (R, T) int64, 2*i for the chosen and 2*i + 1 for the rejected side of pair i, -1 for padding;
    "n" () int64, the number of sequences; "index" (batch,) int64, the number of each pair in the data; "task" (batch,)
    int64, the set of each pair, if there are several.
    """

    def _parts(self, item: Pair) -> list[Example]:
        return list(item)

    def _batch(self, samples: list[tuple[int, int]]) -> tuple[Packed, dict[str, Array]]:
        packed = self._packed([side for s, i in samples for side in self.sets[s][i]])
        return packed, self._numbers(packed, 2 * len(samples), samples)


class RatedLoader(_SequenceLoader[Rated]):
    """Batches of n = `batch` rated completions in R rows of `block` tokens, (R, T); R differs by batch.

    extra: as PairLoader's, but sequence i is completion i; "good" (n,) bool; and, for KTO's estimate of the divergence,
    "kl_ids", "kl_targets", "kl_doc_ids", "kl_positions" and "kl_sequence", (R', T), a batch whose sequence i is the
    prompt of i with the completion of another prompt. That is always the same one, of the row before it in the data, so
    reference log-probabilities of both can be cached by index.
    """

    def _parts(self, item: Rated) -> list[Example]:
        return [item.example]

    def _labels(self, sets: Sequence[Sequence[Rated]]) -> list[Any]:
        return [item.good for items in sets for item in items]

    def _batch(self, samples: list[tuple[int, int]]) -> tuple[Packed, dict[str, Array]]:
        packed = self._packed([self.sets[s][i].example for s, i in samples])
        other = self._packed([self._other(s, i) for s, i in samples])
        extra = self._numbers(packed, len(samples), samples)
        extra["good"] = np.array([self.sets[s][i].good for s, i in samples])
        extra |= {f"kl_{name}": part for name, part in other._asdict().items()}
        return packed, extra | {"kl_sequence": other.doc_ids.astype(np.int64)}

    def _other(self, s: int, i: int) -> Example:
        """Return the prompt of a sample with the completion of the row before it that has another prompt."""
        items, own = self.sets[s], self.sets[s][i].example
        before = own.ids[: own.prompt]
        candidates = [items[i - k].example for k in range(1, min(8, len(items)))] or [own]  # items[-1] is the last
        other = next((e for e in candidates if not np.array_equal(e.ids[: e.prompt], before)), candidates[0])
        ids = np.concatenate([before, other.ids[other.prompt :]])[: self.block]
        learned = np.concatenate([own.learned[: own.prompt], other.learned[other.prompt :]])[: len(ids)]
        return Example(ids, learned)


class LabelledLoader(_SequenceLoader[Classified]):
    """Batches of n = `batch` labelled texts in R rows of `block` tokens, (R, T); R differs by batch. No targets.

    extra: "sequence", "n", "index" and "task" as PairLoader's, sequence i is text i; "last" (n,) int64, the place of
    the last token of each text in the flattened rows (R*T); "labels": (n,) int64 of classes, (n,) fp32 of numbers, or
    (R, T) int64 of tags, -100 for tokens without one.
    """

    def _parts(self, item: Classified) -> list[Example]:
        return [Example(item.ids, np.zeros(len(item.ids), bool))]

    def _labels(self, sets: Sequence[Sequence[Classified]]) -> list[Any]:
        return [np.asarray(item.label).tolist() for items in sets for item in items]

    def _batch(self, samples: list[tuple[int, int]]) -> tuple[Packed, dict[str, Array]]:
        items = [self.sets[s][i] for s, i in samples]
        none = [np.full(len(item.ids), IGNORE) for item in items]
        rows = Sequences([item.ids for item in items], none, self.block, self.packing, self.pad)
        packed, places = rows.rows(), rows.places
        extra = self._numbers(packed, len(items), samples)
        where = np.empty(int(places.max()) + 1, np.int64)  # place in the sequences end to end -> place in the rows
        where[places[places >= 0]] = np.flatnonzero(places >= 0)
        extra["last"] = where[np.cumsum([len(item.ids) for item in items]) - 1]
        if isinstance(items[0].label, np.ndarray):
            labels = np.concatenate([np.asarray(item.label) for item in items])
            extra["labels"] = np.where(places < 0, IGNORE, labels[places])
        else:
            kind = np.float32 if isinstance(items[0].label, float) else np.int64
            extra["labels"] = np.array([item.label for item in items], kind)
        return packed, extra


def _targets(example: Example) -> Array:
    """Return the target of each token but the last: (n - 1,) int64."""
    return np.where(example.learned[1:], example.ids[1:].astype(np.int64), IGNORE)


def _digest(examples: Iterable[Example], labels: Sequence[Any] = ()) -> str:
    """Return the SHA-256 of the ids and the learned marks of examples, and of labels, in their order."""
    digest = hashlib.sha256(repr(list(labels)).encode())
    for e in examples:
        digest.update(len(e.ids).to_bytes(8, "little") + e.ids.astype("<u4").tobytes() + e.learned.tobytes())
    return digest.hexdigest()


__all__ = ["ExampleLoader", "LabelledLoader", "PairLoader", "Packing", "RatedLoader"]

"""Mix sources: the order of all training documents, such that plain reading gives the mixture.

A source's documents form an endless stream: epoch after epoch, each in another order (a Feistel permutation, without a
table). A document that starts at token c of its source's stream has the tag

    stage + (c - tokens taken before the stage) / (tokens of the stage),

and the documents of all sources are sorted by tag. So in any prefix of a stage each source has the tokens of its share,
exact to within one of its documents, and no document is cut.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError
from fastgpt.data.loader import permute
from fastgpt.data.pipeline.store import hash64
from fastgpt.data.recipe import MAX_EPOCHS, Recipe, StageRecipe

log = logging.getLogger("fastgpt")

# source: index of the source; document: index in its table
ENTRY = np.dtype([("source", "<u2"), ("document", "<i8"), ("tokens", "<i8")])
BLOCK = 1 << 16  # documents of a source looked at in one go


@dataclass(frozen=True)
class Quotas:
    """Tokens that each stage takes from each source.

    Attributes:
        tokens: by stage, then by source.
        epochs: of each source, tokens taken over tokens there are.
    """

    sources: list[str]
    tokens: list[list[int]]
    epochs: list[float]


def quotas(recipe: Recipe, sizes: Mapping[str, int]) -> Quotas:
    """Return what the recipe takes from sources of `sizes` training tokens; warn where a source is repeated too often.

    Raises:
        UserError: a source with a share has no tokens.
    """
    names = list(sizes)
    mix = recipe.mix
    plain = mix.tokens is None and mix.temperature is None and mix.replay is None and not mix.stages
    if plain and not any(recipe.sources[n].weight for n in names):
        taken = [[round((recipe.sources[n].epochs or 1.0) * sizes[n]) for n in names]]
    else:
        total = mix.tokens or sum(sizes.values())
        stages = mix.stages or [StageRecipe()]
        parts = sum(stage.share for stage in stages)
        shares = [_shares(recipe, stage, sizes) for stage in stages]
        taken = [
            [round(total * stage.share / parts * share[n]) for n in names]
            for stage, share in zip(stages, shares, strict=True)
        ]
    epochs = []
    for i, name in enumerate(names):
        wanted = sum(stage[i] for stage in taken)
        if wanted and not sizes[name]:
            raise UserError(f"source {name} has a share of the mixture, but no training tokens are left of it")
        epochs.append(wanted / sizes[name] if sizes[name] else 0.0)
        if epochs[-1] > MAX_EPOCHS:
            log.warning(
                "source %s is repeated %.1f times, expected at most %d: repeating text more often helps little",
                name, epochs[-1], MAX_EPOCHS,
            )  # fmt: skip
    return Quotas(names, taken, epochs)


def _shares(recipe: Recipe, stage: StageRecipe, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the share of each source in a stage; they add up to 1."""
    mix = recipe.mix
    if stage.weights:
        weights = {n: stage.weights.get(n, 0.0) for n in sizes}
    elif mix.temperature is not None:
        weights = {n: float(size) ** (1 / mix.temperature) if size else 0.0 for n, size in sizes.items()}
    else:
        weights = {n: recipe.sources[n].weight or float(size) for n, size in sizes.items()}
    if mix.replay is not None:
        for group, share in ((True, mix.replay.share), (False, 1 - mix.replay.share)):
            members = [n for n in sizes if (n in mix.replay.sources) == group]
            whole = sum(weights[n] for n in members)
            weights |= {n: share * weights[n] / whole for n in members if whole}
    whole = sum(weights.values())
    if not whole:
        raise UserError("no training tokens are left of the sources of a stage; see the report's dropped documents")
    return {n: w / whole for n, w in weights.items()}


def stream(
    lengths: npt.NDArray[Any], taken: Sequence[int], seed: int, name: str, block: int = BLOCK
) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
    """Yield (tags, documents), both (n,), of one source in the order of its stream, until its quotas are used.

    lengths: tokens of each document of the source, (n,), a memmap as a rule; taken: tokens of each stage.
    """
    ends = np.cumsum(taken, dtype=np.int64)
    starts = np.concatenate([[0], ends])
    n, at, epoch, position = len(lengths), 0, 0, 0
    while at < ends[-1]:
        order = np.arange(position, min(n, position + block), dtype=np.int64)
        documents = permute(order, n, hash64(str(seed), name, str(epoch)))
        sizes = lengths[documents].astype(np.int64)
        first = at + np.cumsum(sizes) - sizes
        used = first < ends[-1]
        stage = np.searchsorted(ends, first[used], side="right")
        width = np.asarray(taken, np.float64)[stage]
        yield stage + (first[used] - starts[stage]) / width, documents[used]
        at += int(sizes.sum())
        position += len(order)
        if position == n:
            epoch, position = epoch + 1, 0


def interleave(
    tables: Sequence[npt.NDArray[Any]], plan: Quotas, seed: int, block: int = BLOCK
) -> Iterator[npt.NDArray[Any]]:
    """Yield the entries (ENTRY) of the whole mixture in blocks, in order; memory grows with the sources alone.

    tables: tokens of each document, one array for each source of the plan.
    """
    streams = [
        stream(table, [stage[i] for stage in plan.tokens], seed, name, block)
        for i, (table, name) in enumerate(zip(tables, plan.sources, strict=True))
    ]
    tags = [np.empty(0) for _ in streams]
    documents = [np.empty(0, np.int64) for _ in streams]
    open_streams = set(range(len(streams)))
    while True:
        for i in list(open_streams):
            if len(tags[i]) == 0:
                found = next(streams[i], None)
                if found is None:
                    open_streams.discard(i)
                else:
                    tags[i], documents[i] = found
        # what is before the last known tag of every stream cannot be overtaken any more
        horizon = min((tags[i][-1] for i in open_streams), default=np.inf)
        ready = [int(np.searchsorted(t, horizon, side="right")) for t in tags]
        if not any(ready):
            return
        source = np.repeat(np.arange(len(tags)), ready)
        joined = np.concatenate([t[:k] for t, k in zip(tags, ready, strict=True)])
        chosen = np.concatenate([d[:k] for d, k in zip(documents, ready, strict=True)])
        order = np.lexsort((source, joined))  # stable: documents of one source keep their order
        out = np.empty(len(order), ENTRY)
        out["source"], out["document"] = source[order], chosen[order]
        for i in np.unique(source):
            mine = out["source"] == i
            out["tokens"][mine] = tables[i][out["document"][mine]]
        yield out
        tags = [t[k:] for t, k in zip(tags, ready, strict=True)]
        documents = [d[k:] for d, k in zip(documents, ready, strict=True)]


def write_order(path: Path, blocks: Iterator[npt.NDArray[Any]], shard_tokens: int) -> list[tuple[int, int, int]]:
    """Write the entries to a file of ENTRY and return the shards: (first entry, entries, tokens) of each."""
    shards: list[tuple[int, int, int]] = []
    at = first = entries = tokens = 0  # of the whole, then of the shard that is open
    current = -1
    with open(path, "wb") as f:
        for block in blocks:
            f.write(block.tobytes())
            starts = at + np.cumsum(block["tokens"]) - block["tokens"]
            number = starts // shard_tokens
            for k in np.unique(number):
                mine = number == k
                if entries and k != current:
                    shards.append((first, entries, tokens))
                    first, entries, tokens = first + entries, 0, 0
                current = k
                entries += int(mine.sum())
                tokens += int(block["tokens"][mine].sum())
            at += int(block["tokens"].sum())
    if entries:
        shards.append((first, entries, tokens))
    return shards

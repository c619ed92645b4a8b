"""The layout of a data set: tables of the documents of all parts, and their order in the mixture, on disk."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError
from fastgpt.data.pipeline.mix import Quotas, interleave, quotas, write_order
from fastgpt.data.pipeline.store import Chunk, key_of, new_result, read_json, write_json
from fastgpt.data.pipeline.tokens import ROW
from fastgpt.data.recipe import Recipe

BINS = 40  # of histograms: bin k counts lengths from 2^k to below 2^(k + 1)


@dataclass(frozen=True)
class Layout:
    """Where every document goes.

    Attributes:
        folder: holds parts.json, one table of ROW for each source and split, and order.bin (entries of ENTRY).
        sources: name -> {"train", "val"} -> documents, tokens, bytes and the histogram of tokens per document.
        shards: (first entry, entries, tokens) of each training shard.
    """

    folder: Path
    sources: dict[str, dict[str, Any]]
    mix: Quotas
    shards: list[tuple[int, int, int]]


def lay_out(recipe: Recipe, chunks: Sequence[Chunk], tokens: Sequence[Path], folder: Path) -> Layout:
    """Return the layout of chunks whose token folders are `tokens`, made in `folder` unless it is there.

    Raises:
        UserError: nothing is left to train on or, though some was asked for, to validate on.
    """
    names = list(recipe.sources)
    settings = recipe.settings()
    weights = [[name, recipe.sources[name].weight, recipe.sources[name].epochs] for name in names]
    made_from = [chunk.key for chunk in chunks], [path.name for path in tokens]
    place = folder / key_of("layout", weights, settings["mix"], settings["shards"], recipe.seed, *made_from)
    if not place.exists():
        parts = [
            {"tokens": str(path), "chunk": str(chunk.folder), "source": chunk.source, "held": chunk.held}
            for chunk, path in zip(chunks, tokens, strict=True)
        ]
        with new_result(place) as aside:
            build_tables(aside, parts, names)
            tables = [open_table(aside, i, held=False) for i in range(len(names))]
            _check(recipe, tables, [open_table(aside, i, held=True) for i in range(len(names))])
            plan = quotas(recipe, {name: int(t["tokens"].sum()) for name, t in zip(names, tables, strict=True)})
            order = interleave([table["tokens"] for table in tables], plan, recipe.seed)
            shards = write_order(aside / "order.bin", order, recipe.shards.tokens)
            facts = {"sources": _facts(aside, names), "shards": shards, "mix": [plan.tokens, plan.epochs]}
            write_json(aside / "layout.json", facts)
    facts = read_json(place / "layout.json")
    return Layout(place, facts["sources"], Quotas(names, *facts["mix"]), [(a, b, c) for a, b, c in facts["shards"]])


def _check(recipe: Recipe, train: Sequence[npt.NDArray[Any]], val: Sequence[npt.NDArray[Any]]) -> None:
    documents, held = sum(map(len, train)), sum(map(len, val))
    if not documents:
        raise UserError("no training documents are left; --dry-run shows which rules dropped them")
    asked = recipe.validation or any(source.validation for source in recipe.sources.values())
    if asked and not held:
        raise UserError(
            f"none of {documents} documents was held out with validation {recipe.validation}: raise validation, or cut "
            "the texts into more documents (format: {split: piece})"
        )


def build_tables(folder: Path, parts: Sequence[dict[str, Any]], sources: Sequence[str]) -> None:
    """Write parts.json and, for every source and split, one table (n,) of ROW over all its parts."""
    write_json(folder / "parts.json", list(parts))
    for i, source in enumerate(sources):
        for held in (False, True):
            mine = [k for k, part in enumerate(parts) if (part["source"], part["held"]) == (source, held)]
            counts = [len(np.load(Path(parts[k]["tokens"]) / "table.npy", mmap_mode="r")) for k in mine]
            path = table_path(folder, i, held)
            if not sum(counts):
                np.save(path, np.empty(0, ROW))
                continue
            table = np.lib.format.open_memmap(path, "w+", ROW, (sum(counts),))  # type: ignore[no-untyped-call]
            at = 0
            for k, count in zip(mine, counts, strict=True):
                table[at : at + count] = np.load(Path(parts[k]["tokens"]) / "table.npy")
                table["part"][at : at + count] = k
                at += count
            table.flush()


def table_path(folder: Path, source: int, held: bool) -> Path:
    """Return the path of the table of a source's training or held-out documents."""
    return folder / f"{source:05}-{'val' if held else 'train'}.npy"


def open_table(folder: Path, source: int, held: bool) -> npt.NDArray[Any]:
    """Return the table of a source's documents, (n,) of ROW; a large one stays on disk."""
    path = table_path(folder, source, held)
    table: npt.NDArray[Any] = np.load(path, mmap_mode="r" if path.stat().st_size > 1 << 16 else None)
    return table


@functools.lru_cache(1)
def parts_of_layout(folder: Path) -> list[dict[str, Any]]:
    """Return the parts of a layout: tokens (folder), chunk (folder), source, held."""
    found: list[dict[str, Any]] = read_json(folder / "parts.json")
    return found


def _facts(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    facts: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(names):
        facts[name] = {}
        for split in ("train", "val"):
            table = open_table(folder, i, split == "val")
            lengths = np.bincount(np.log2(np.maximum(table["tokens"], 1)).astype(int), minlength=BINS)
            sums = {what: int(table[what].sum()) for what in ("tokens", "bytes")}
            facts[name][split] = {"documents": len(table), **sums, "lengths": lengths.tolist()}
    return facts

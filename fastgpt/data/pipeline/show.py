"""What a person sees of a finished data set: samples of its documents, the page report.html, and the data card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgpt.core.errors import UserError
from fastgpt.data.built import BuiltDataset, open_built, read_manifest
from fastgpt.data.documents import document_starts
from fastgpt.data.load import load_tokenizer
from fastgpt.data.packing import METHODS, count
from fastgpt.data.pipeline.page import page_of
from fastgpt.data.pipeline.store import read_json
from fastgpt.data.pipeline.topics import topics
from fastgpt.data.pipeline.write import documents_of
from fastgpt.data.shards import HEADER_BYTES, atomic_file, open_tokens
from fastgpt.data.tokenizer import Tokenizer

PAGE = "report.html"
TOPIC_DOCUMENTS = 1000  # that topics are made from
TOPIC_TOKENS = 1000  # of each of them


@dataclass(frozen=True)
class Sample:
    """A document of a data set: its number of tokens, and the text of the first ones."""

    source: str
    id: str
    tokens: int
    text: str


def samples(out: Path, tokenizer: Tokenizer, count: int, tokens: int, specials: bool = True) -> Iterator[Sample]:
    """Yield up to `count` training documents, evenly spaced over the shards, with at most `tokens` tokens each, with or
    without special tokens in them."""
    shards = [s for s in read_manifest(out)["shards"] if s["source"] is None and s["documents"]]
    total = sum(s["documents"] for s in shards)
    count = min(count, total)
    wanted = [i * total // count for i in range(count)]
    first = 0
    for shard in shards:
        rows = [n - first for n in wanted if first <= n < first + shard["documents"]]
        first += shard["documents"]
        if not rows:
            continue
        starts, ids = documents_of(out, shard["name"])
        path = out / f"{shard['name']}.bin"
        dtype = open_tokens(path).parts[0].dtype
        for row in rows:
            start, stop = int(starts[row]) + 1, int(starts[row + 1])
            at = HEADER_BYTES + start * dtype.itemsize  # read, not mapped: mapped pages would stay in memory
            read = np.fromfile(path, dtype, min(stop - start, tokens), offset=at)
            if not specials:
                read = read[~np.isin(read, list(tokenizer.specials.values()))]
            yield Sample(ids[row][0], ids[row][1], stop - start, tokenizer.decode(read.tolist()))


def write_page(out: Path) -> Path:
    """Write OUT/report.html and return its path. Raises UserError if the data set is incomplete."""
    found = list(samples(out, load_tokenizer(out), TOPIC_DOCUMENTS, TOPIC_TOKENS, specials=False))
    about = topics([s.text for s in found], [s.source for s in found])
    data = open_built(out)
    page = page_of(read_json(out / "report.json"), data.manifest, about, (recipe_length(data), packing_rows(data)))
    with atomic_file(out / PAGE) as f:
        f.write(page.encode("utf-8", "backslashreplace"))
    return out / PAGE


def recipe_length(data: BuiltDataset) -> int:
    """Return the length of the windows that the recipe asks about."""
    return int(data.manifest["recipe"].get("packing", {}).get("length", 1024))


def packing_rows(data: BuiltDataset, length: int | None = None) -> list[list[str]]:
    """Return a table of what each method of packing does to the training documents, in windows of `length` tokens
    (default: the recipe's)."""
    length = length or recipe_length(data)
    starts = document_starts(data.train, data.tokenizer.eot)
    rows = [["method", "windows", "documents cut", "padding", "dropped"]]
    for method in METHODS:
        found = count(starts, length, method)
        padding = f"{found.padding:,} ({found.padding / (found.windows * length):.2%})"
        used = f"{method} (default)" if method == data.packing else method
        rows.append([used, f"{found.windows:,}", f"{found.cut:,}", padding, f"{found.dropped:,}"])
    return rows


def card(out: Path) -> str:
    """Return the data card of a data set. Raises UserError if it has none."""
    text = open_built(out).manifest.get("card")
    if not isinstance(text, str):
        raise UserError(f"data set {out} has no data card: it is of an older version; build it again")
    return text

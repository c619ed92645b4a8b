"""Erase documents from a data set: rebuild the shards that hold them, and note what was erased so it stays away."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.core.errors import UserError
from fastgpt.data.built import is_built, open_built, read_manifest
from fastgpt.data.load import load_tokenizer
from fastgpt.data.packing import FillInTheMiddle
from fastgpt.data.pipeline.card import card_of
from fastgpt.data.pipeline.manifest import ERASED, put_in_place, write_manifest
from fastgpt.data.pipeline.show import PAGE, write_page
from fastgpt.data.pipeline.store import locked, read_json, write_json
from fastgpt.data.pipeline.workers import Workers
from fastgpt.data.pipeline.write import documents_of, shard_record
from fastgpt.data.shards import ShardWriter, atomic_file, file_hash, open_tokens
from fastgpt.data.tokenizer import Tokenizer

log = logging.getLogger("fastgpt")


@dataclass(frozen=True)
class Search:
    """A shard to search for documents by id or by a text in them."""

    out: Path
    shard: str
    ids: frozenset[str]
    texts: tuple[str, ...]
    middles: Mapping[str, FillInTheMiddle]  # by source


@dataclass(frozen=True)
class Found:
    """A document to erase: where it lies, and what the log notes about it."""

    shard: str
    row: int
    source: str
    id: str
    sha256: str
    tokens: int
    bytes: int


def forget(
    out: str | Path, ids: Iterable[str] = (), texts: Sequence[str] = (), *, workers: int = 1, show: bool = True
) -> list[dict[str, Any]]:
    """Erase the documents with these ids, and those that hold one of the texts; return their entries in the log.

    The log, OUT/erased.jsonl, names source, id and the sha256 of each text; later builds leave out what it names. Kept
    results of parts are deleted, since they hold the texts.

    Raises:
        UserError: the data set is incomplete, or no document is found for an id or a text.
    """
    out, wanted = Path(out), frozenset(ids)
    if not all(texts):
        raise UserError("the text to match is empty, which every document holds")
    if not is_built(out):  # before the lock, which would make a folder look like a build that was interrupted
        read_manifest(out)
    with Workers(workers, show) as pool, locked(out / "work", alone=True):
        put_in_place(out)
        manifest = open_built(out).manifest
        given = {name: facts.get("fill_in_the_middle") for name, facts in manifest["sources"].items()}
        middles = {name: FillInTheMiddle(**settings) for name, settings in given.items() if settings}
        tasks = [Search(out, shard["name"], wanted, tuple(texts), middles) for shard in manifest["shards"]]
        hits = pool.run("search", search, tasks, [2 * shard["tokens"] for shard in manifest["shards"]])
        found = [hit for shard in hits for hit in shard]
        missing = [identity for identity in sorted(wanted) if identity not in {hit.id for hit in found}]
        if missing or not found:
            what = f"the id {missing[0]!r}" if missing else "this text"
            raise UserError(f"no document of {out} has {what}; its ids are in the .ids files")
        entries = _entries(found, manifest["generation"] + 1)
        _write_next(out, manifest, found, entries)
        (out / PAGE).unlink(missing_ok=True)  # its topics may be words of an erased text
        put_in_place(out)
        shutil.rmtree(out / "work", ignore_errors=True)
        write_page(out)
    return entries


def search(task: Search) -> list[Found]:
    """Return the documents of a shard that are to be erased."""
    starts, ids = documents_of(task.out, task.shard)
    tokens = open_tokens(task.out / f"{task.shard}.bin")
    tokenizer = _tokenizer(str(task.out))
    found = []
    for row, (source, identity) in enumerate(ids):
        if identity not in task.ids and not task.texts:
            continue
        start, n = int(starts[row]), int(starts[row + 1] - starts[row])
        ids_of_text = tokens.read(start + 1, n - 1)
        if source in task.middles:  # a text to match may cross the borders of the reordered parts
            ids_of_text = task.middles[source].restore(ids_of_text)
        raw = tokenizer.decode_bytes(ids_of_text.tolist())
        if identity in task.ids or any(text.encode() in raw for text in task.texts):
            found.append(Found(task.shard, row, source, identity, hashlib.sha256(raw).hexdigest(), n, len(raw)))
    return found


@functools.lru_cache(1)
def _tokenizer(out: str) -> Tokenizer:
    return load_tokenizer(out)


def _entries(found: Sequence[Found], generation: int) -> list[dict[str, Any]]:
    """Return one entry for each document, however often it is repeated."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    unique = {(hit.source, hit.id): hit for hit in found}
    shards: dict[tuple[str, str], list[str]] = {}
    for hit in found:
        names = shards.setdefault((hit.source, hit.id), [])
        names += [hit.shard] if hit.shard not in names else []
    return [
        {
            "date": date,
            "generation": generation,
            "source": hit.source,
            "id": hit.id,
            "sha256": hit.sha256,
            "tokens": hit.tokens,
            "shards": shards[key],
        }
        for key, hit in unique.items()
    ]


def _write_next(out: Path, manifest: dict[str, Any], found: Sequence[Found], entries: list[dict[str, Any]]) -> None:
    """Write the changed shards, the log, the report and the manifest of the next generation into OUT/work/next."""
    new = out / "work" / "next"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    rows: dict[str, list[int]] = {}
    for hit in found:
        rows.setdefault(hit.shard, []).append(hit.row)
    records, files = [], dict(manifest["files"])
    for shard in manifest["shards"]:
        if shard["name"] in rows:
            for suffix in (".bin", ".idx", ".ids"):
                files.pop(shard["name"] + suffix)
            if len(rows[shard["name"]]) == shard["documents"]:
                continue
            record = _rewrite(out, new, shard, rows[shard["name"]], manifest["tokenizer"]["n_vocab"])
            files |= record.pop("files")
            shard = record
        records.append(shard)
    if not any(record["source"] is None for record in records):
        raise UserError(f"nothing would be left to train on in {out}: delete the folder instead")
    log_text = (out / ERASED).read_bytes() if (out / ERASED).exists() else b""
    with atomic_file(new / ERASED) as f:
        f.write(log_text + "".join(json.dumps(entry) + "\n" for entry in entries).encode())
    report = read_json(out / "report.json")
    _discount(manifest, report, found)
    write_json(new / "report.json", report)
    for name in (ERASED, "report.json"):
        files[name] = {"bytes": (new / name).stat().st_size, "sha256": file_hash(new / name)}
    train = [record for record in records if record["source"] is None]
    totals = {k: sum(record[k] for record in records) for k in ("documents", "tokens")}
    generation = {"generation": manifest["generation"] + 1, "date": entries[0]["date"], "erased": len(entries)}
    manifest |= {
        "card": card_of(report, manifest["recipe"]),
        "inputs": "",  # the next build makes the data set again, without what was erased
        "generation": generation["generation"],
        "generations": [*manifest["generations"], generation | totals],
        "train": {k: sum(record[k] for record in train) for k in ("tokens", "documents")},
        "shards": records,
        "files": files,
    }
    write_manifest(new, manifest)


def _rewrite(out: Path, new: Path, shard: dict[str, Any], rows: list[int], n_vocab: int) -> dict[str, Any]:
    """Write a shard without some of its documents and return its record."""
    name = shard["name"]
    starts, ids = documents_of(out, name)
    tokens = open_tokens(out / f"{name}.bin")
    keep = np.ones(len(ids), bool)
    keep[rows] = False
    with ShardWriter(new / f"{name}.bin", n_vocab, tokens.parts[0].dtype.name) as f:
        for row in np.flatnonzero(keep):
            f.write(tokens.read(int(starts[row]), int(starts[row + 1] - starts[row])))
    with atomic_file(new / f"{name}.idx") as f:
        f.write(np.concatenate([[0], np.cumsum(np.diff(starts)[keep])]).astype("<i8").tobytes())
    with atomic_file(new / f"{name}.ids") as f:
        kept = [json.dumps(identity, ensure_ascii=False) for identity, k in zip(ids, keep, strict=True) if k]
        f.write("".join(line + "\n" for line in kept).encode())
    return shard_record(new, name, int(keep.sum()), shard["source"])


def _discount(manifest: dict[str, Any], report: dict[str, Any], found: Sequence[Found]) -> None:
    """Subtract erased documents from the counts of the manifest and the report."""
    for hit in found:
        if not hit.shard.startswith("val_"):
            for facts in (manifest["sources"][hit.source], report["sources"][hit.source]):
                facts["mixed_tokens"] -= hit.tokens
    for hit in {(hit.source, hit.id): hit for hit in found}.values():
        split = "val" if hit.shard.startswith("val_") else "train"
        for facts in (manifest["sources"][hit.source], report["sources"][hit.source]):
            for what, n in (("documents", 1), ("tokens", hit.tokens), ("bytes", hit.bytes)):
                facts[split][what] -= n
            facts["dropped"]["erased"] = facts["dropped"].get("erased", 0) + 1
        report["sources"][hit.source]["kept"] -= 1
        report["sources"][hit.source][split]["lengths"][hit.tokens.bit_length() - 1] -= 1

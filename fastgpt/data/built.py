"""Data sets of `fastgpt data build`, opened and checked.

The manifest is written last: a folder without one, or with files of other sizes than it says, is not a data set.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError, cause_of
from fastgpt.data.load import load_tokenizer
from fastgpt.data.packing import Method
from fastgpt.data.shards import Tokens, file_hash, open_tokens
from fastgpt.data.tokenizer import Tokenizer

MANIFEST = "manifest.json"
KIND = "fastgpt data set"
FORMAT = 1
SAMPLED = 16  # shards whose content is compared with the manifest when a data set is opened
AGAIN = "run `fastgpt data build` again"


@dataclass(frozen=True)
class BuiltDataset:
    """An open data set.

    Attributes:
        val: source -> held-out tokens, for each source that has some.
        shuffle: whether windows may be read in any order; not so if the mixture changes during training.
        packing: how documents share windows, unless the trainer is told otherwise.
    """

    path: Path
    manifest: dict[str, Any]
    tokenizer: Tokenizer
    train: Tokens
    val: dict[str, Tokens]
    shuffle: bool
    packing: Method


def is_built(path: str | Path) -> bool:
    """Return whether a folder is a data set of `fastgpt data build`, or what a killed build left of one."""
    return (Path(path) / MANIFEST).is_file() or (Path(path) / "work" / "lock").is_file()


def read_manifest(out: Path) -> dict[str, Any]:
    """Return the manifest. Raises UserError if it is missing (an incomplete data set) or damaged."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not out.is_dir():
            why = "is a file, expected a folder" if out.exists() else "does not exist"
        elif (out / "work").is_dir():
            why = f"is not complete: {AGAIN} to finish it"
        else:
            why = f"has no {MANIFEST}, expected a folder that `fastgpt data build` made"
        raise UserError(f"data set {out} {why}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"data set {out} is damaged: {MANIFEST} ({cause_of(e)})") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise UserError(f"data set {out} is damaged: {MANIFEST} is not that of a {KIND}")
    if manifest["format"] != FORMAT:
        raise UserError(f"data set {out} has format {manifest['format']}, expected {FORMAT}; {AGAIN}")
    return manifest


def open_built(out: str | Path) -> BuiltDataset:
    """Open a data set. All sizes are checked, and samples of the shards; `verify` checks every byte.

    Raises:
        UserError: the data set is incomplete, or a file is missing, of another size, or of another content.
    """
    out = Path(out)
    manifest = read_manifest(out)
    for name, facts in manifest["files"].items():
        try:
            size = (out / name).stat().st_size
        except OSError as e:
            raise UserError(f"data set {out} is damaged: {name} ({e.strerror}); {AGAIN}") from None
        if size != facts["bytes"]:
            raise UserError(f"data set {out} is damaged: {name} has {size} bytes, expected {facts['bytes']}; {AGAIN}")
    tokenizer = load_tokenizer(out)
    if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise UserError(f"data set {out} is damaged: tokenizer.json is not the tokenizer that encoded its tokens")
    opened = {shard["name"]: open_tokens(out / f"{shard['name']}.bin") for shard in manifest["shards"]}
    step = -(-len(manifest["shards"]) // SAMPLED)
    for shard in manifest["shards"][::step]:
        if opened[shard["name"]].fingerprint() != shard["sample"]:
            raise UserError(f"data set {out} is damaged: {shard['name']}.bin has other tokens than were written")
    train = [opened[s["name"]] for s in manifest["shards"] if s["source"] is None]
    joined = Tokens([p for t in train for p in t.parts], [n for t in train for n in t.names])
    val = {s["source"]: opened[s["name"]] for s in manifest["shards"] if s["source"] is not None}
    packing = manifest["recipe"].get("packing", {}).get("method", "concatenate")  # older recipes have no key for it
    return BuiltDataset(out, manifest, tokenizer, joined, val, manifest["mix"]["shuffle"], packing)


def verify(out: Path) -> None:
    """Compare the sha256 of every file with the manifest. Raises UserError that names the first that differs."""
    for name, facts in read_manifest(out)["files"].items():
        if file_hash(out / name) != facts["sha256"]:
            raise UserError(f"data set {out} is damaged: {name} has another sha256 than was written; {AGAIN}")

"""Write the manifest of a data set, and put a new data set in the place of an old one."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.data.built import FORMAT, KIND, MANIFEST, open_built, read_manifest
from fastgpt.data.load import load_tokenizer
from fastgpt.data.pipeline.card import card_of
from fastgpt.data.pipeline.layout import Layout
from fastgpt.data.pipeline.store import write_json
from fastgpt.data.pipeline.tokens import reorderings
from fastgpt.data.recipe import Recipe, TokenizerRecipe
from fastgpt.data.shards import file_hash
from fastgpt.data.tokenizer import Tokenizer

ERASED = "erased.jsonl"  # log of `fastgpt data forget`
# what a data set's folder holds
FILES = re.compile(
    r"(train_\d{6}|val_[A-Za-z0-9_-]+)\.(bin|idx|ids)|tokenizer\.json|manifest\.json|report\.(json|html)|erased\.jsonl"
    r"|card\.md|work|\..*\.partial"
)
PACKAGES = ("fastgpt", "numpy", "tokenizers", "tiktoken", "gigatoken", "rensa", "ftfy", "py3langid", "trafilatura")


def is_current(out: Path, inputs: str) -> bool:
    """Return whether a folder is a complete data set of these inputs."""
    try:
        return bool(open_built(out).manifest["inputs"] == inputs)
    except UserError:
        return False


def check_owner(out: Path, recipe: Recipe) -> None:
    """Raise UserError if a folder has the data set of a recipe with another name."""
    try:
        name = read_manifest(out)["recipe"].get("name", "")
    except UserError:
        return
    if name and recipe.name and name != recipe.name:
        raise UserError(
            f"{out} is the data set of recipe {name}, expected one of {recipe.name}, or none: give another --out, "
            f"or `name: {name}` in the recipe if it is the same one, or remove the folder"
        )


def trained_before(out: Path, recipe: Recipe) -> Tokenizer | None:
    """Return the tokenizer that an earlier generation trained with the settings of the recipe, if there is one.

    It is kept although the texts have changed: a model that was trained with it can go on.
    """
    if not isinstance(recipe.tokenizer, TokenizerRecipe):
        return None
    try:
        same = read_manifest(out)["recipe"]["tokenizer"] == asdict(recipe.tokenizer)
        found = load_tokenizer(out) if same else None
    except UserError:
        return None
    return found if found and found.specials.keys() >= set(recipe.sentinels) else None


def about(
    recipe: Recipe,
    inputs: str,
    tokenizer: Tokenizer,
    layout: Layout,
    shards: list[dict[str, Any]],
    report: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Return the content of the manifest of a new data set, whose other files are in OUT/work/next."""
    new = out / "work" / "next"
    files = {name: facts for shard in shards for name, facts in shard["files"].items()}
    for name in ("tokenizer.json", "report.json", *([ERASED] if (new / ERASED).exists() else [])):
        files[name] = {"bytes": (new / name).stat().st_size, "sha256": file_hash(new / name)}
    settings, middles = recipe.settings(), reorderings(recipe, tokenizer)
    mix = layout.mix
    sources = {
        name: {
            "license": recipe.sources[name].license,
            **{split: {k: facts[split][k] for k in ("documents", "tokens", "bytes")} for split in ("train", "val")},
            "dropped": report["sources"][name]["dropped"],
            "epochs": mix.epochs[i],
            "mixed_tokens": sum(stage[i] for stage in mix.tokens),
            "fill_in_the_middle": asdict(middles[name]) if name in middles else None,
        }
        for i, (name, facts) in enumerate(layout.sources.items())
    }
    train = [shard for shard in shards if shard["source"] is None]
    before = _before(out)
    entry = {
        "generation": len(before) + 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "inputs": inputs,
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
    }
    return {
        "inputs": inputs,
        "card": card_of(report, settings),
        "generation": entry["generation"],
        "generations": [*before, entry],
        "recipe": settings,
        "versions": _versions(),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "n_vocab": tokenizer.n_vocab, "eot": tokenizer.eot},
        "train": {k: sum(shard[k] for shard in train) for k in ("tokens", "documents")},
        "mix": {"stages": mix.tokens, "shuffle": len(mix.tokens) == 1},
        "sources": sources,
        "shards": [{k: v for k, v in shard.items() if k != "files"} for shard in shards],
        "files": files,
    }


def _before(out: Path) -> list[dict[str, Any]]:
    """Return the generations of the data set that is there."""
    try:
        generations: list[dict[str, Any]] = read_manifest(out)["generations"]
    except UserError:
        return []
    return generations


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest into the folder of a new data set. It is complete from then on."""
    write_json(folder / MANIFEST, {"kind": KIND, "format": FORMAT, **manifest})


def put_in_place(out: Path) -> bool:
    """Move a new data set from OUT/work/next to OUT, over the old one; return whether there was one.

    Killed at any point, it is finished by the next call: the manifest of the old data set goes first, that of the new
    one comes last, and in between the folder has none.
    """
    new = out / "work" / "next"
    if not (new / MANIFEST).is_file():
        return False
    manifest = json.loads((new / MANIFEST).read_text(encoding="utf-8"))
    before = out / "work" / "before.json"
    try:
        if (out / MANIFEST).is_file():
            os.replace(out / MANIFEST, before)
        old = json.loads(before.read_text(encoding="utf-8"))["files"] if before.is_file() else {}
        for name in manifest["files"]:
            if (new / name).exists():
                os.replace(new / name, out / name)
        for name in old.keys() - manifest["files"].keys():
            (out / name).unlink(missing_ok=True)
        os.replace(new / MANIFEST, out / MANIFEST)
        before.unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"cannot write data set {out}: {e.strerror}") from e
    shutil.rmtree(new, ignore_errors=True)
    return True

"""`fastgpt import`: a run folder from a model in Hugging Face's form, for train, sample and chat."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fastgpt.convert.hub import download
from fastgpt.core.command import Parser
from fastgpt.core.device import DTYPES
from fastgpt.core.errors import UserError
from fastgpt.core.folders import new_folder, require_new
from fastgpt.core.tensorfile import Deferred
from fastgpt.data import Tokenizer
from fastgpt.data.load import COMPANIONS, FILE, GENERATION, MODEL, OLD, has_tokenizer, load_tokenizer
from fastgpt.models.weights import Weights, open_pretrained
from fastgpt.models.weights.huggingface import read_settings
from fastgpt.training import checkpoint

TOKENIZER = (FILE, MODEL, *OLD, "added_tokens.json", *COMPANIONS)


def main(argv: list[str]) -> int:
    """Run `fastgpt import`."""
    parser = Parser(prog="fastgpt import", description="Make a run folder from a model that transformers loads.")
    parser.add_argument("source", metavar="DIR_OR_NAME", help="folder with config.json, or name on the hub")
    parser.add_argument("out", metavar="OUT", type=Path, help="new run folder")
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the hub (default: main)")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: that of the files)")
    args = parser.parse_args(argv)
    require_new(args.out)
    folder, revision = locate(args.source, args.revision)
    print(import_model(folder, args.out, DTYPES.get(args.dtype), source=args.source, revision=revision))
    return 0


def locate(
    source: str, revision: str = "main", *, what: str = "import", weights: bool = True
) -> tuple[Path, str | None]:
    """Return the folder of a model and the commit it is of: None for a folder, the hub's for a name.

    Args:
        what: the command or the setting, for errors.
        weights: False downloads only config.json and the tokenizer.

    Raises:
        UserError: neither a folder nor a model that can be downloaded.
    """
    if Path(source).is_dir():
        return Path(source), None
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{what}: {source} is not a folder")
    return download(source, revision, ("config.json", *TOKENIZER), what=what, weights=weights)


def import_model(
    folder: Path, out: Path, dtype: torch.dtype | None = None, *, source: str = "", revision: str | None = None
) -> str:
    """Write run folder `out` with the model in `folder`; return a sentence on it.

    Raises:
        UserError: the model or its tokenizer cannot be read, or `out` exists.
    """
    weights = open_pretrained(folder)
    tokenizer, note = _tokenizer(folder, weights)
    dtype = dtype or weights.dtype
    state: dict[str, Any] = {
        "progress": {"step": 0, "tokens": 0},
        "config": {},
        "model": dataclasses.asdict(weights.config),
        "loader": {},
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
        "source": {"name": source or str(folder), "revision": revision, "config": read_settings(folder)},
    }
    tensors = {name: Deferred(dtype, p.shape, _reader(weights, name, dtype)) for name, p in weights.parameters.items()}
    with new_folder(out) as aside:
        checkpoint.save(aside, 0, tensors, {}, state, keep=0)
        _write_tokenizer(folder, aside, tokenizer)
        (aside / "config.yaml").write_text(_settings(weights, out, tokenizer is not None), encoding="utf-8")
    count = sum(torch.Size(p.shape).numel() for p in weights.parameters.values())
    return f"{out}: {count:,} parameters of {source or folder}" + (f" at {revision}" if revision else "") + note


def _reader(weights: Weights, name: str, dtype: torch.dtype) -> Any:
    return lambda: weights.read(name, dtype)


def _tokenizer(folder: Path, weights: Weights) -> tuple[Tokenizer | None, str]:
    """Return the tokenizer, or None and a sentence that says why there is none."""
    if not has_tokenizer(folder):
        return None, "; it has no tokenizer, so sample and chat cannot read text"
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as e:
        return None, f"; sample and chat cannot read text, because {e}"
    if tokenizer.n_vocab > (weights.config.vocab_size or 0):
        found, most = tokenizer.n_vocab, weights.config.vocab_size
        raise UserError(f"the tokenizer in {folder} has {found} tokens, but the model's vocab_size is {most}")
    return tokenizer, ""


def _write_tokenizer(folder: Path, out: Path, tokenizer: Tokenizer | None) -> None:
    """Write the tokenizer's files and what ends a text; one that fastgpt does not read is copied as it is."""
    for name in TOKENIZER if tokenizer is None else (MODEL, *COMPANIONS):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if tokenizer is not None:
        tokenizer.save(out / FILE)
    given = read_settings(folder)
    ids = {k: given[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if given.get(k) is not None}
    if ids and not (out / GENERATION).is_file():
        (out / GENERATION).write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")


def _settings(weights: Weights, out: Path, tokenizer: bool) -> str:
    """Return a configuration with which `fastgpt train` starts from the imported weights."""
    import yaml

    model = dataclasses.asdict(weights.config)
    settings: dict[str, Any] = {"model": model, "resume": str(out), "block_size": min(1024, model["block_size"])}
    settings |= {"micro_batch": 1, "batch_tokens": settings["block_size"]}
    if tokenizer:
        settings["tokenizer"] = str(out / "tokenizer.json")
    return str(yaml.safe_dump(settings, sort_keys=False))

"""`fastgpt export`: the weights of a run in the form of another project, with tokenizer and model card."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.convert.card import model_card
from fastgpt.convert.hub import upload
from fastgpt.core import tensorfile
from fastgpt.core.command import Parser
from fastgpt.core.device import DTYPES
from fastgpt.core.errors import UserError
from fastgpt.core.folders import new_folder
from fastgpt.core.hub import hub
from fastgpt.data import Tokenizer
from fastgpt.data.load import GENERATION, MODEL, SETTINGS, SPECIALS
from fastgpt.models.config import ModelConfig, model_from_dict
from fastgpt.models.weights import gguf, llmc, nanogpt, write_pretrained
from fastgpt.models.weights.huggingface import read_json
from fastgpt.models.weights.tokenizer import tokenizer_files
from fastgpt.training import checkpoint
from fastgpt.training.load import tokenizer_of


@dataclass(frozen=True)
class Exported:
    """A checkpoint whose weights are read one at a time.

    Attributes:
        state: its state.json. dtype: of its weights.
        tokenizer: None where the run has none that fastgpt reads.
    """

    path: Path
    state: dict[str, Any]
    config: ModelConfig
    dtype: torch.dtype
    read: Callable[[str], Tensor]
    tokenizer: Tokenizer | None

    @classmethod
    def open(cls, run: str | Path) -> Exported:
        """Open the newest checkpoint of a run, or a checkpoint; one of adapters stands for the merged run beside it.

        Raises:
            UserError: there is none, it is damaged, or its tokenizer is another one; adapters were not merged.
        """
        path = checkpoint.find(run)
        state = checkpoint.read_state(path)
        if state.get("adapters"):
            if state.get("head"):
                made = path.parent / "model"
                raise UserError(
                    f"checkpoint {path} holds adapters and a head alone; {made} is the model for transformers"
                )
            path = checkpoint.merged(path, state, of_run=path != Path(run))
            state = checkpoint.read_state(path)
        entries = checkpoint.open_tensors(path, checkpoint.MODEL, state)
        dtypes = {tensorfile.DTYPES[entry.dtype] for entry in entries.values()}
        tokenizer = None if state["tokenizer"] is None else tokenizer_of(path, state)
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return cls(path, state, model_from_dict(state["model"]), dtype, lambda name: entries[name].read(), tokenizer)

    @property
    def token_ids(self) -> dict[str, Any]:
        """Ids that begin and end a text, as config.json names them."""
        if given := self.state.get("source", {}).get("config"):
            return {k: given[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in given}
        if (t := self.tokenizer) is None:
            return {"bos_token_id": None, "eos_token_id": None}
        bos = t.specials.get(t.bos, t.eot)  # without a BOS token, documents of training data begin with eot
        return {"bos_token_id": bos, "eos_token_id": list(t.ends) if len(t.ends) > 1 else t.ends[0]}


Writer = Callable[
    [Exported, Path, str, int], None
]  # of a checkpoint into a folder, in a dtype and shards of some bytes


def main(argv: list[str], with_head: Writer | None = None) -> int:
    """Run `fastgpt export`.

    Args:
        with_head: writes a model with a task head for transformers; None refuses it.
    """
    parser = Parser(prog="fastgpt export", description="Write the weights of a run in the form of another project.")
    parser.add_argument("run", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("--format", choices=FORMATS, default="hf", help="hf: what transformers loads (default)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--dtype", choices=gguf.TYPES, help="type of the weights (default: that of the run); q8_0: gguf only"
    )
    parser.add_argument("--max-shard-size", type=_bytes, default=5 * 10**9, metavar="SIZE", help="as in 5GB (default)")
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to the Hugging Face Hub (private)")
    args = parser.parse_args(argv)
    if args.dtype == "q8_0" and args.format != "gguf":
        raise UserError("export: --dtype q8_0 needs --format gguf")
    if args.push:
        hub("--push")
    source = Exported.open(args.run)
    write = _writer(source, args.format, with_head)
    dtype = args.dtype or next((name for name, dtype in DTYPES.items() if dtype == source.dtype), "fp32")
    with new_folder(args.out) as aside:
        write(source, aside, dtype, args.max_shard_size)
        (aside / "README.md").write_text(model_card(source.path, source.state, args.format, dtype), encoding="utf-8")
    print(f"{args.out}: {source.path} as {args.format} in {dtype}")
    if args.push:
        print(upload(args.out, args.push))
    return 0


def _writer(source: Exported, form: str, with_head: Writer | None) -> Writer:
    """Return what writes the checkpoint in a format.

    Raises:
        UserError: the format has no task heads.
    """
    head = source.state.get("head")
    if not head:
        return FORMATS[form]
    if form != "hf" or with_head is None:
        raise UserError(
            f"export: {source.path} has a head for {head['kind']}, which {form} does not have; expected --format hf"
        )
    return with_head


def _bytes(text: str) -> int:
    """Read a size like 5GB, 200MB or 1000 (bytes), in decimal units."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    digits, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a size like 5GB or 200MB")
    return int(digits) * unit


def _hf(source: Exported, folder: Path, dtype: str, shard_bytes: int) -> None:
    given = source.state.get("source", {}).get("config", {})
    model_type, extra = given.get("model_type"), source.token_ids
    options: dict[str, Any] = dict(model_type=model_type, extra=extra, shard_bytes=shard_bytes)
    write_pretrained(folder, source.config, source.read, dtype=DTYPES[dtype], **options)
    run, tokenizer = source.path.parent, source.tokenizer
    for name in (GENERATION, SPECIALS, MODEL):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    if not (run / GENERATION).is_file():
        (folder / GENERATION).write_text(json.dumps(source.token_ids, indent=2) + "\n", encoding="utf-8")
    if not (run / "tokenizer.json").is_file():
        return
    eos = None if tokenizer is None else tokenizer.decode_bytes([tokenizer.eot]).decode()
    template = run / "chat_template.jinja"
    files = tokenizer_files(
        (run / "tokenizer.json").read_text(encoding="utf-8"),
        gpt2=type(tokenizer) is Tokenizer,
        eos=eos,
        bos=eos if tokenizer is None else tokenizer.bos or eos,
        max_length=source.config.block_size,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        settings=read_json(run / SETTINGS) if (run / SETTINGS).is_file() else None,
    )
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")


def _nanogpt(source: Exported, folder: Path, dtype: str, shard_bytes: int) -> None:
    nanogpt.write(folder, source.config, source.read, DTYPES[dtype], step=int(source.state["step"]))


def _llmc(source: Exported, folder: Path, dtype: str, shard_bytes: int) -> None:
    llmc.write(folder, source.config, source.read, DTYPES[dtype])


def _gguf(source: Exported, folder: Path, dtype: str, shard_bytes: int) -> None:
    if type(source.tokenizer) is not Tokenizer:
        raise UserError(f"export: {source.path.parent} has no tokenizer like GPT-2's, which --format gguf needs")
    tokenizer, bos = source.tokenizer, next(iter(source.tokenizer.prefix), None)
    gguf.write(folder, source.config, source.read, dtype, tokenizer.text, tokenizer.eot, bos)


FORMATS: dict[str, Writer] = {
    "hf": _hf,
    "gguf": _gguf,
    "nanogpt": _nanogpt,
    "llmc": _llmc,
}

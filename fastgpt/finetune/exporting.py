"""`fastgpt export` of every run: fastgpt/convert/exporting.py, and models with a task head for transformers."""

from __future__ import annotations

from pathlib import Path

from fastgpt.convert import exporting
from fastgpt.convert.exporting import Exported
from fastgpt.core.device import DTYPES
from fastgpt.finetune.head_files import write_model
from fastgpt.finetune.heads import HeadConfig


def main(argv: list[str]) -> int:
    """Run `fastgpt export`."""
    return exporting.main(argv, _with_head)


def _with_head(source: Exported, folder: Path, dtype: str, shard_bytes: int) -> None:
    head, tokenizer = HeadConfig.from_dict(source.state["head"]), source.tokenizer
    assert tokenizer is not None, "the data of fine-tuning have one"
    options = dict(dtype=DTYPES[dtype], shard_bytes=shard_bytes)
    write_model(folder, source.config, source.read, head, tokenizer, **options)  # type: ignore[arg-type]

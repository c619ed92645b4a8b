"""What lies beside an adapter: the tokenizer that it was trained with, and its chat template."""

from __future__ import annotations

from pathlib import Path

from fastgpt.core.errors import UserError
from fastgpt.data import Tokenizer
from fastgpt.data.load import has_tokenizer, load_tokenizer
from fastgpt.inference.adapters import adapter_folder
from fastgpt.inference.chat import FILE, Template
from fastgpt.training import checkpoint


def require_tokenizer(path: str | Path, tokenizer: Tokenizer) -> None:
    """Refuse an adapter whose folder, or whose run, has another tokenizer than its base.

    Raises:
        UserError: it has, or there is no adapter.
    """
    place = next((folder for folder in _folders(path) if has_tokenizer(folder)), None)
    if place is not None and load_tokenizer(place).fingerprint != tokenizer.fingerprint:
        raise UserError(f"adapter {path} was trained with another tokenizer, {place}, expected that of the base")


def template_of(path: str | Path, tokenizer: Tokenizer) -> Template | None:
    """Return the chat template in an adapter's folder or in its run; None if there is none.

    Raises:
        UserError: there is no adapter, or the template is not valid.
    """
    place = next((folder for folder in _folders(path) if (folder / FILE).is_file()), None)
    if place is None:
        return None
    return Template.of_run(place, tokenizer.decode_bytes([tokenizer.eot]).decode(), tokenizer.bos)


def _folders(path: str | Path) -> list[Path]:
    """Return the folders that may have what an adapter was trained with: its own, and its run."""
    folder = adapter_folder(path)
    return [folder, folder.parent] if checkpoint.checkpoints(folder.parent) else [folder]

"""Folders and files of text that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastgpt.core.errors import UserError, cause_of


def require_new(folder: Path) -> None:
    """Refuse a path where something is.

    Raises:
        UserError: `folder` exists and is not an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists, expected a new or empty folder")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Return a folder to write into, which becomes `final` when the block ends, and is removed if it raises.

    Raises:
        UserError: `final` exists and is not an empty folder, or cannot be written.
    """
    require_new(final)
    aside = final.with_name(f".{final.name}.writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        os.replace(aside, final)
    except OSError as e:
        raise UserError(f"{final} could not be written ({cause_of(e)})") from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file of text, whole or not at all; its folder is made if it is missing. `errors` as of str.encode."""
    aside = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(text, encoding="utf-8", errors=errors)
    aside.replace(path)

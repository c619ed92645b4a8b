"""Data sets of the Hugging Face Hub by name, as files for the readers.

Only the files are fetched, by huggingface_hub, at one commit. The package `datasets` would read them too, but it is
heavy, takes types from the values (strings of digits become numbers, integers above 2**63 lose digits), and its errors
name no line; so the files go through the readers here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path

import yaml

from fastgpt.core.errors import UserError
from fastgpt.core.hub import hub, reason
from fastgpt.data.read.files import SourceFile
from fastgpt.data.read.format import SUFFIXES
from fastgpt.data.read.streams import COMPRESSIONS

# what is data in a repository; its README is the card
DATA = tuple(
    f"*{s}{c}" for s in SUFFIXES if s not in (".md", ".markdown", ".html", ".htm") for c in ("", *COMPRESSIONS)
)
CARD = "README.md"


@dataclass(frozen=True)
class HubData:
    """The files of a data set in the order of their names, the commit, and the license of its card ("" if none)."""

    files: list[SourceFile]
    commit: str
    license: str


def download_dataset(name: str, revision: str = "main", files: Sequence[str] = DATA) -> HubData:
    """Download files of a data set, or take them from huggingface_hub's cache.

    A broken connection is resumed; files that came whole are not downloaded again. Read each file with
    open_documents(file, Format(license=found.license, source=name)).

    Args:
        files: globs of the files wanted; by default all of a format that can be read.

    Raises:
        UserError: huggingface_hub is not installed; no such data set, no access, no network, no such files.
    """
    api = hub(f"{name}, a data set of the hub,")
    try:
        got = api.snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=[*files, CARD])
    except Exception as e:  # the hub's errors have no common class
        raise UserError(f"the data set {name} was not downloaded: {reason(e, name, revision, 'data set')}") from e
    folder = Path(got)  # of the commit, so it also holds what other calls have fetched
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    wanted = [n for n in names if any(fnmatch(n, pattern) for pattern in files)]
    if not wanted:
        raise UserError(f"the data set {name} has no files {', '.join(files)[:100]}: name the ones that it has")
    found = [SourceFile(folder / n, n, (folder / n).stat().st_size) for n in wanted]
    return HubData(found, folder.name, _license(folder / CARD))


def _license(card: Path) -> str:
    """Return the license in the head of a card."""
    if not card.is_file():
        return ""
    head = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        fields = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return ""
    found = fields.get("license", "") if isinstance(fields, dict) else ""
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found or "")

"""Fetch texts that are not files yet: Debian packages, pages, and the documentation in Python's standard library."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastgpt.core import progress
from fastgpt.core.errors import UserError
from fastgpt.data.pipeline.store import in_turn, key_of, new_result
from fastgpt.data.read import Defect
from fastgpt.data.read.scrape import Manners, read_list, scrape
from fastgpt.data.read.web import download
from fastgpt.data.recipe import ScrapeRecipe
from fastgpt.data.shards import atomic_file

PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")


def downloaded(url: str, folder: Path) -> Path:
    """Return the file at an address, downloaded into `folder`; "#sha256=..." at the end is the checksum it must have.

    Raises:
        UserError: it cannot be downloaded, or has another checksum.
    """
    address, _, checksum = url.partition("#sha256=")
    return download(address, folder / key_of(address)[:8], checksum or None).path


def scraped(
    pages: ScrapeRecipe, license: str, folder: Path, again: bool, show: bool = True
) -> tuple[Path, list[Defect]]:
    """Return a .jsonl file in `folder` with the pages of a source, and why other addresses gave none.

    A build that was interrupted goes on with the addresses that are left. Tasks that share the folder take turns, so
    the first one fetches the pages. The fields are text, id, title, url and license.

    Args:
        again: ask again for what gave no page before.

    Raises:
        UserError: an address that is none, a list that cannot be read, or no host could be reached at all.
    """
    urls = [*pages.urls, *(url for path in pages.file for url in read_list(path))]
    folder.mkdir(parents=True, exist_ok=True)
    manners = Manners(user_agent=pages.user_agent, delay=pages.delay, license="" if license == "unknown" else license)
    path = folder / "pages.jsonl"
    with in_turn(folder / "lock"):
        bar = progress.bar(len(urls), desc="scrape", unit="page", leave=False, disable=not show or None)
        with contextlib.closing(bar):
            record = folder / "record.jsonl"
            found = scrape(urls, path, manners, None, bar.update, record=record, dated=False, again=again)
    return path, found.failures


def debian_packages(names: Sequence[str], folder: Path) -> Path:
    """Return a folder with the unpacked files of Debian packages, below `folder`; nothing is installed.

    Raises:
        UserError: there is no apt-get or dpkg-deb, or a package cannot be downloaded or unpacked.
    """
    for name in names:
        if not PACKAGE.fullmatch(name):
            raise UserError(f"{name!r} is not a name of a Debian package")
    place = folder / f"debian-{key_of(list(names))}"
    if not place.exists():
        with new_result(place) as aside, tempfile.TemporaryDirectory() as packages:
            _run(["apt-get", "download", *names], packages)
            for package in sorted(Path(packages).glob("*.deb")):
                _run(["dpkg-deb", "-x", str(package), str(aside.resolve())], packages)
    return place


def _run(command: list[str], folder: str) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]}, expected a Debian system") from None
    except subprocess.CalledProcessError as e:
        last = (e.stderr.strip().splitlines() or [f"exit code {e.returncode}"])[-1]
        raise UserError(f"`{' '.join(command)}` failed: {last}") from None


def python_documentation(folder: Path) -> Path:
    """Return a .jsonl file, below `folder`, with the help topics and docstrings of the standard library.

    Records have the fields id and text; there is one for each topic and for each module with docstrings.
    Raises UserError if the interpreter has no library sources.
    """
    path = folder / "python-documentation.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as f:
            for identity, text in _documentation(Path(sysconfig.get_path("stdlib"))):
                f.write((json.dumps({"id": identity, "text": text}) + "\n").encode())
    return path


def _documentation(library: Path) -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    yield from ((f"topic {name}", text) for name, text in sorted(topics.items()))
    found = False
    for folder, folders, names in os.walk(library):
        folders[:] = sorted(n for n in folders if n not in ("site-packages", "dist-packages", "test", "tests"))
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix == ".py" and (text := _docstrings(path)):
                found = True
                yield path.relative_to(library).with_suffix("").as_posix().replace("/", "."), text
    if not found:
        raise UserError(f"there are no library sources in {library}, expected those of the standard library")


def _docstrings(path: Path) -> str:
    """Return the docstrings of a module, each below the name of what it describes; "" if it has none."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):  # files that are broken on purpose
        return ""
    return "\n\n".join(_entries(tree, ""))


def _entries(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    if isinstance(node, ast.Module) and (text := ast.get_docstring(node)):
        yield text
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{prefix}{child.name}"
            if text := ast.get_docstring(child):
                shown = f"class {name}" if isinstance(child, ast.ClassDef) else f"{name}({ast.unparse(child.args)})"
                yield f"{shown}\n{text}"
            if isinstance(child, ast.ClassDef):
                yield from _entries(child, f"{name}.")

"""The files that a path, a folder or a glob names: in a fixed order, each once, with everything left out counted."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastgpt.core.errors import UserError
from fastgpt.data.read.defects import Defect, DefectError, OnDefect
from fastgpt.data.read.format import PRESETS, Format, format_of
from fastgpt.data.read.reading import printable
from fastgpt.data.read.streams import compression_of

WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read. name: its path below the folder or the fixed part of the glob, the first part of ids."""

    path: Path
    name: str
    size: int


@dataclass
class Files:
    """The files found, in the order of their names, and how many were left out, by reason."""

    files: list[SourceFile] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def find_files(pattern: str | Path, format: Format | None = None, on_defect: OnDefect | None = None) -> Files:
    """Find the files of a path.

    A folder gives the files whose suffix belongs to the format (any known format if it is "auto"), those of its
    folders included; a glob (`*`, `?`, `[...]`, `**` for any folders) or a file gives all it matches. Links are
    followed; a file that is reached twice is read once. Hidden files and folders are left out unless the pattern names
    them, and so are devices, sockets and pipes.

    Raises:
        UserError: nothing is there, or nothing is left; in mode "fail" also links that lead into a circle or nowhere,
            and folders that may not be read.
    """
    format = format or Format()
    text = str(pattern)
    path = Path(text)
    search = _Search(format, on_defect)
    if os.path.isdir(text):
        search.walk(path, None)
    elif WILD.search(text) and not os.path.lexists(text):
        root, inner = _fixed_part(text)
        if not root.is_dir():
            raise UserError(f"cannot read {printable(path)}: there is no folder {printable(root)}")
        search.walk(root, inner)
    elif os.path.lexists(text):
        search.add(path, path.name)
    else:
        raise UserError(f"cannot read {printable(path)}: there is no such file or folder")
    found = search.found
    if not found.files and not search.defects:
        left = ", ".join(f"{n} {why}" for why, n in sorted(found.skipped.items()))
        kinds = f" of format {format.name}" if format.name != "auto" else ""
        raise UserError(f"{printable(path)} has no files to read{kinds}" + (f" (left out: {left})" if left else ""))
    found.files.sort(key=lambda file: file.name)
    return found


def _fixed_part(pattern: str) -> tuple[Path, str]:
    """Return the folders before the first wildcard, and the rest."""
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if WILD.search(part))
    return Path(*parts[:first]) if first else Path("."), "/".join(parts[first:])


class _Search:
    def __init__(self, format: Format, on_defect: OnDefect | None) -> None:
        self.format = format
        self.on_defect = on_defect
        self.found = Files()
        self.defects = 0
        self.seen: set[tuple[int, int]] = set()

    def walk(self, root: Path, inner: str | None) -> None:
        """Add the files below a folder, or those that match a glob relative to it."""
        match = None if inner is None else glob_pattern(inner)
        depth = None if inner is None or "**" in inner else inner.count("/")
        hidden = inner is not None and re.search(r"(^|/)\.", inner) is not None
        for path, name in self._below(root, "", depth, hidden, ()):
            if match is not None:
                if match.fullmatch(name):
                    self.add(path, name)
            elif self._wanted(path):
                self.add(path, name)
            else:
                self.found.skipped["of another format"] += 1

    def _wanted(self, path: Path) -> bool:
        suffix = format_of(path)
        name = self.format.name
        if name == "auto":
            return suffix is not None
        if name in ("mediawiki", "stackexchange"):
            return any(suffix.startswith(".xml") for suffix in path.suffixes)  # also .xml-p1p41242.bz2
        if name in PRESETS and suffix is None:
            return compression_of(path) is not None  # RC_2015-01.zst
        resolved = self.format.resolved(path).name
        return suffix is not None and Format(suffix).resolved(path).name == resolved

    def _below(
        self, folder: Path, prefix: str, depth: int | None, hidden: bool, above: tuple[tuple[int, int], ...]
    ) -> Iterator[tuple[Path, str]]:
        try:
            info = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as e:
            self._report(folder, e)
            return
        here = (info.st_dev, info.st_ino)
        if here in above:
            self._loop(folder)
            return
        for entry in entries:
            if entry.name.startswith(".") and not hidden:
                self.found.skipped["hidden"] += 1
                continue
            path, name = folder / entry.name, prefix + _name(entry.name)
            try:
                is_folder = entry.is_dir()
            except OSError as e:
                self._report(path, e)
                continue
            if not is_folder:
                yield path, name
            elif depth is None or depth > 0:
                yield from self._below(path, name + "/", None if depth is None else depth - 1, hidden, (*above, here))

    def add(self, path: Path, name: str) -> None:
        """Add a file unless it was found before or is none."""
        try:
            info = path.stat()
        except OSError as e:
            self._report(path, e)
            return
        if not stat.S_ISREG(info.st_mode):
            self.found.skipped["no regular file"] += 1
        elif (info.st_dev, info.st_ino) in self.seen:
            self.found.skipped["found twice"] += 1
        else:
            self.seen.add((info.st_dev, info.st_ino))
            self.found.files.append(SourceFile(path, _name(name), info.st_size))

    def _report(self, path: Path, e: OSError) -> None:
        if isinstance(e, PermissionError):
            self._defect(path, "no permission", "may not be read (no permission)", f"run chmod +r {printable(path)}")
        elif path.is_symlink() and e.errno == errno.ELOOP:
            self._loop(path)
        elif path.is_symlink() and isinstance(e, FileNotFoundError):
            self._defect(path, "broken link", "is a link to nothing", "remove the link, or repair it")
        else:
            self._defect(path, "unreadable", f"cannot be read ({e.strerror})", "check the file system")

    def _loop(self, path: Path) -> None:
        self._defect(path, "symlink loop", "is a link that leads back to itself", "remove the link")

    def _defect(self, path: Path, kind: str, problem: str, remedy: str) -> None:
        defect = Defect(printable(path), None, None, problem, remedy, kind)
        self.defects += 1
        if self.on_defect is not None:
            self.on_defect(defect)
        if self.format.mode == "fail":
            raise DefectError(defect)


def _name(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def glob_pattern(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a glob over relative names.

    `*`, `?` and `[...]` stay within a name and do not match its leading dot; `**` is any number of folders.
    """
    parts = pattern.split("/")
    out = []
    for part in parts[:-1]:
        out.append("(?:(?!\\.)[^/]+/)*" if part == "**" else _segment(part) + "/")
    out.append("(?:(?!\\.)[^/]+/)*(?!\\.)[^/]+" if parts[-1] == "**" else _segment(parts[-1]))
    return re.compile("".join(out), re.DOTALL)


def _segment(part: str) -> str:
    """Return the regular expression of one name of a glob."""
    out = "" if part.startswith(".") else "(?!\\.)"
    for token in re.findall(r"\[!?\]?[^\]]*\]|.", part, re.DOTALL):
        if token == "*":
            out += "[^/]*"
        elif token == "?":
            out += "[^/]"
        elif len(token) > 1:
            negated = token[1] == "!"
            inner = token[2 if negated else 1 : -1].replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
            inner = "\\^" + inner[1:] if inner.startswith("^") else inner
            out += f"(?!/)[{'^' if negated else ''}{inner}]"
        else:
            out += re.escape(token)
    return out

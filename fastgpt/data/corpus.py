"""Text input: which files make up a corpus, how they are read, and which of them are held out for validation.

A corpus is a list of `TextFile`s in a fixed order. Reading is strict UTF-8 (a byte-order mark is dropped), because a
silently replaced byte is a silently damaged model; what cannot be read is a `UserError` with file, line and byte
offset. The held-out split takes whole files, so that no text of a validation file is ever trained on.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastgpt.core.errors import UserError, counted

EOT = "<|endoftext|>"

# Tests come with some Pythons and not with others; encodings and lib2to3 are tables and deliberately broken sources.
_STDLIB_SKIP_DIRS = {
    "site-packages", "dist-packages", "lib-dynload", "__pycache__",
    "test", "tests", "idle_test", "lib2to3", "encodings",
}  # fmt: skip
_STDLIB_SKIP_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")
_WIDE_BOMS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
              (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))  # fmt: skip
_SNIFF = 8192  # bytes looked at to tell a binary file from text


@dataclass(frozen=True)
class TextFile:
    """One file of a corpus: name is its path below the corpus root (with /), size in bytes, sha256 of its bytes."""

    path: Path
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """Files in name order; source says where they came from, skipped names files left out as not text or as copies."""

    source: str
    files: list[TextFile]
    skipped: list[str]

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.files)


@dataclass(frozen=True)
class Part:
    """A file, or the characters start:stop of it (stop None: to the end)."""

    file: TextFile
    start: int = 0
    stop: int | None = None

    def text(self) -> str:
        """Return the part's text. Raises UserError as `read_text` does."""
        return read_text(self.file.path)[self.start : self.stop]


def default_corpus(tests: bool = False) -> Corpus:
    """Return the source of the running Python's standard library, about 10 MB, the same with and without its test
    suite.

    tests: the test suite instead (17 MB if it is installed, no files if it is not), as more text to train on.
    Raises UserError if the interpreter has no sources on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    start = root / "test" if tests else root
    paths = [
        p
        for p in _walk(start, _STDLIB_SKIP_DIRS if not tests else {"__pycache__"})
        if p.suffix == ".py" and not p.is_symlink() and not p.name.startswith(_STDLIB_SKIP_FILES)
    ]
    version = platform.python_version()
    corpus = _collect(f"Python {version} standard library", paths, root, lenient=True)
    if not corpus.files and not tests:
        raise UserError(f"Python {version} has no library sources in {root}; pass a text file or folder as data")
    return corpus


def text_files(path: str | Path) -> Corpus:
    """Return the user's corpus: one text file, or every text file below a folder (without hidden and binary files).

    Raises UserError for a missing, empty or unreadable path and for a folder without text; the text itself is decoded,
    and can fail, in `read_text`.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"data path {path} does not exist")
    if path.is_dir():
        corpus = _collect(str(path), list(_walk(path, {"__pycache__"})), path, lenient=False)
        if not corpus.files:
            left_out = f" ({counted(len(corpus.skipped), 'binary file')} left out)" if corpus.skipped else ""
            raise UserError(f"folder {path} holds no text files{left_out}")
        return corpus
    if not path.is_file():
        raise UserError(f"data path {path} is neither a file nor a folder")
    raw = _read_bytes(path)
    if not raw.removeprefix(codecs.BOM_UTF8).strip():
        raise UserError(f"data file {path} is empty")
    return Corpus(str(path), [TextFile(path, path.name, len(raw), hashlib.sha256(raw).hexdigest())], [])


def read_texts(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for every file of the user's file or folder, in name order. Raises UserError, see above."""
    for file in text_files(path).files:
        yield file.name, read_text(file.path)


def read_text(path: Path) -> str:
    """Return the file's text: strict UTF-8, without the byte-order mark, with line endings unchanged.

    Raises UserError that names file, line (from 1) and byte offset (from 0) of the first byte that is not text.
    """
    raw = _read_bytes(path)
    for bom, name in _WIDE_BOMS:
        if raw.startswith(bom):
            raise UserError(f"{path} starts with a {name} byte-order mark at line 1, byte 0; save it as UTF-8")
    skip = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    nul = raw.find(b"\0")
    line = raw.count(b"\n", 0, max(nul, 0)) + 1
    if nul >= 0:
        raise UserError(f"{path} is not text: NUL at line {line}, byte {nul}")
    try:
        return raw[skip:].decode("utf-8")
    except UnicodeDecodeError as e:
        at = e.start + skip
        line = raw.count(b"\n", 0, at) + 1
        raise UserError(
            f"{path} is not UTF-8: byte 0x{raw[at]:02x} at line {line}, byte {at} ({e.reason}); save it as UTF-8"
        ) from None


def documents(text: str) -> list[str]:
    """Return a text's documents: the parts between literal `<|endoftext|>` marks, without empty ones."""
    return [d for d in text.split(EOT) if d.strip()]


def split_files(files: list[TextFile], fraction: float = 0.05) -> tuple[list[Part], list[Part]]:
    """Return (train, validation): whole files, chosen by a hash of their names until `fraction` of the bytes is held
    out.

    The choice depends on names and sizes only. Where no set of whole files comes near the fraction (one file, or one
    that outweighs the rest), the largest file is cut near its end, at a document, paragraph or line boundary.
    Raises UserError where there is not enough text for two parts, ValueError for a fraction outside (0, 0.5].
    """
    if not 0 < fraction <= 0.5:
        raise ValueError(f"split_files: fraction must be in (0, 0.5], got {fraction}")
    total = sum(f.size for f in files)
    order = sorted(files, key=lambda f: hashlib.sha256(f.name.encode("utf-8", "surrogateescape")).digest())
    held: set[str] = set()
    size = 0
    for f in order:
        if size + f.size <= fraction * total:
            held.add(f.name)
            size += f.size
    if size < 0.2 * fraction * total:
        least, most = 0.2 * fraction * total, min(4 * fraction, 0.5) * total
        fitting = next((f for f in order if least <= f.size <= most), None)
        if fitting is None:
            return _cut_largest(files, fraction)
        held.add(fitting.name)
    train = [Part(f) for f in files if f.name not in held]
    return train, [Part(f) for f in files if f.name in held]


def _cut_largest(files: list[TextFile], fraction: float) -> tuple[list[Part], list[Part]]:
    largest = max(files, key=lambda f: (f.size, f.name))
    text = read_text(largest.path)
    cut = _boundary(text, int(len(text) * (1 - fraction)))
    if not text[:cut].strip() or not text[cut:].strip():
        raise UserError(f"{largest.path} has {len(text)} characters, too few to hold out a validation part")
    train = [Part(f) if f is not largest else Part(f, 0, cut) for f in files]
    return train, [Part(largest, cut)]


def _boundary(text: str, at: int) -> int:
    """Return the first place to cut in the first half of the text after `at`; the strongest kind of boundary wins."""
    stop = at + (len(text) - at) // 2
    for mark in (EOT, "\n\n", "\n", " "):
        i = text.find(mark, at, stop)
        if i >= 0:
            return i + len(mark)
    return at


def _walk(root: Path, skip_dirs: set[str]) -> Iterator[Path]:
    def fail(e: OSError) -> None:
        if isinstance(e, FileNotFoundError):
            return
        raise UserError(f"cannot read folder {e.filename}: {e.strerror}")

    for folder, dirs, names in os.walk(root, onerror=fail):
        dirs[:] = [d for d in dirs if d not in skip_dirs and not d.startswith(".")]
        yield from (Path(folder, n) for n in names if not n.startswith("."))


def _collect(source: str, paths: list[Path], root: Path, lenient: bool) -> Corpus:
    """Collect a corpus. Empty files are ignored, binary files and exact copies skipped; lenient also skips
    non-UTF-8."""
    files: list[TextFile] = []
    skipped: list[str] = []
    seen: set[str] = set()
    for path, name in sorted(((p, p.relative_to(root).as_posix()) for p in paths), key=lambda pn: pn[1]):
        if not path.is_file():
            continue
        raw = _read_bytes(path)
        if not raw.removeprefix(codecs.BOM_UTF8).strip():
            continue
        digest = hashlib.sha256(raw).hexdigest()
        if digest in seen or _is_binary(raw) or (lenient and not _decodes(raw)):
            skipped.append(name)
            continue
        seen.add(digest)
        files.append(TextFile(path, name, len(raw), digest))
    return Corpus(source, files, skipped)


def _is_binary(raw: bytes) -> bool:
    wide = any(raw.startswith(bom) for bom, _ in _WIDE_BOMS)  # read_text says what is wrong with those
    return b"\0" in raw[:_SNIFF] and not wide


def _decodes(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None

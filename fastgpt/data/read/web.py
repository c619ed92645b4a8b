"""Files by URL: retried with backoff, resumed where they broke off, checked, and renamed when they are whole."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fastgpt._version import __version__
from fastgpt.core.errors import UserError

USER_AGENT = f"fastgpt/{__version__}"
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
LONGEST_WAIT = 60.0
BROKEN = (urllib.error.URLError, http.client.HTTPException, OSError)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect, which would send what a request holds, a key for one, to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True)
class Downloaded:
    """A file that came whole."""

    path: Path
    url: str
    sha256: str
    size: int


def download(
    url: str,
    folder: str | Path,
    sha256: str | None = None,
    *,
    retries: int = 5,
    backoff: float = 1.0,
    timeout: float = 30.0,
    progress: Callable[[int], Any] | None = None,
) -> Downloaded:
    """Download a file into a folder, under its name in the URL.

    It is written to NAME.part, continued from there after a break if the server's version is still the same, and
    renamed when it is complete; NAME.source.json records URL, version, size and checksum. A file that is there already
    is kept if its checksum is the expected one, or if the server has no newer version.

    Args:
        sha256: checksum that the file must have, in hexadecimal.
        retries: attempts after the first one. backoff: seconds before the first of them; they double each time, up to
            a minute, unless the server says when (Retry-After).
        progress: called with the number of bytes that came, after each read.

    Raises:
        UserError: no network, the server refuses, or the checksum is another.
    """
    name = _name(url)
    path = Path(folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    job = _Job(url, path, timeout, progress)
    if path.is_file() and sha256 is not None and file_sha256(path) == sha256.lower():
        return Downloaded(path, url, sha256.lower(), path.stat().st_size)
    for attempt in range(retries + 1):
        try:
            job.fetch(fresh=sha256 is None)
            break
        except urllib.error.HTTPError as e:
            wait = float(e.headers.get("Retry-After", "")) if e.headers.get("Retry-After", "").isdigit() else None
            if e.code not in TRANSIENT or attempt == retries:
                raise UserError(f"cannot download {url}: the server answers {e.code} {e.reason}") from None
        except BROKEN as e:
            wait = None
            if attempt == retries:
                raise UserError(_unreachable(url, e)) from None
        time.sleep(min(backoff * 2**attempt if wait is None else wait, LONGEST_WAIT))
    digest = file_sha256(job.part if job.part.exists() else path)
    if sha256 is not None and digest != sha256.lower():
        job.part.unlink(missing_ok=True)
        raise UserError(f"{url} has the SHA-256 {digest}, expected {sha256.lower()}: the file is another one")
    return job.finish(digest)


def _name(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{url!r} is not an address, expected http://... or https://...")
    name = unquote(parts.path).rstrip("/").rpartition("/")[2].replace("\0", "")
    return name if name not in ("", ".", "..") else parts.hostname


def _unreachable(url: str, e: Exception) -> str:
    why = e.reason if isinstance(e, urllib.error.URLError) else e
    said = getattr(why, "strerror", None) or str(why) or type(why).__name__
    return f"cannot download {url}: {urlsplit(url).hostname} cannot be reached ({said}); is there a network?"


class _Job:
    """One download: `path` when it is whole, `part` before."""

    def __init__(self, url: str, path: Path, timeout: float, progress: Callable[[int], Any] | None) -> None:
        self.url, self.path, self.timeout, self.progress = url, path, timeout, progress
        self.part = path.with_name(path.name + ".part")
        self.version_file = path.with_name(path.name + ".part.version")
        self.record = path.with_name(path.name + ".source.json")
        self.version = ""

    def fetch(self, fresh: bool) -> None:
        """Get what is missing; fresh: ask whether a file that is there already has changed."""
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity"}
        have = self.part.stat().st_size if self.part.is_file() and self.version_file.is_file() else 0
        known = self._known() if fresh and not have else ""
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": self.version_file.read_text()}
        elif known:
            headers["If-None-Match" if known.startswith('"') else "If-Modified-Since"] = known
        try:
            answer = urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=self.timeout)
        except urllib.error.HTTPError as e:
            if e.code == 304 and known:
                return
            if e.code == 416 and have:  # all was there, or the file has become shorter
                self.part.unlink()
                raise ConnectionError("the server cannot resume") from None
            raise
        with answer:
            resumed = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            self._receive(answer, have if resumed else 0)

    def _known(self) -> str:
        """Return the version of the file that is there already, "" if none is."""
        try:
            record = json.loads(self.record.read_text())
            return str(record["version"]) if self.path.is_file() and record["url"] == self.url else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _receive(self, answer: Any, have: int) -> None:
        etag = answer.headers.get("ETag", "")
        self.version = etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")
        if self.version:
            self.version_file.write_text(self.version)
        else:
            self.version_file.unlink(missing_ok=True)
        length = answer.headers.get("Content-Length")
        got = 0
        with open(self.part, "ab" if have else "wb") as file:
            while data := answer.read(1 << 18):
                file.write(data)
                got += len(data)
                if self.progress is not None:
                    self.progress(len(data))
        if length is not None and got < int(length):
            raise ConnectionError(f"the connection broke after {got:,} of {int(length):,} bytes")

    def finish(self, digest: str) -> Downloaded:
        """Rename the file into place and record where it comes from."""
        if self.part.exists():
            record = {"url": self.url, "version": self.version, "sha256": digest, "size": self.part.stat().st_size}
            os.replace(self.part, self.path)
            self.version_file.unlink(missing_ok=True)
            self.record.write_text(json.dumps(record))
        return Downloaded(self.path, self.url, digest, self.path.stat().st_size)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()

"""A polite scraper: the pages of a list of URLs as documents, in one file of JSON lines.

It asks each host for robots.txt first and obeys it, with Crawl-delay; it sends one request at a time, waits between
requests to a host, names itself, follows redirects only where robots.txt allows it, and reads only text up to a limit.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote, urldefrag, urljoin, urlsplit
from urllib.robotparser import RobotFileParser

from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError
from fastgpt.core.progress import bar, write
from fastgpt.data.read.defects import Defect, OnDefect
from fastgpt.data.read.html import charset_of, page_text
from fastgpt.data.read.web import BROKEN, LONGEST_WAIT, TRANSIENT, USER_AGENT, NoRedirect
from fastgpt.data.shards import atomic_file

REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class Manners:
    """How the scraper behaves.

    Attributes:
        delay: least seconds between two requests to a host; a longer Crawl-delay or Request-rate wins.
        max_bytes: largest page. timeout: seconds of silence after which a request fails.
        retries: further attempts where a server is busy (429, 5xx) or the connection breaks.
        license: of the pages, for the meta of the documents.
    """

    user_agent: str = USER_AGENT
    delay: float = 1.0
    timeout: float = 30.0
    max_bytes: int = 8 << 20
    max_redirects: int = 5
    retries: int = 2
    license: str = ""


@dataclass
class Scraped:
    """The file written, how many URLs became documents, gave none, and had been done before; why each gave none."""

    path: Path
    documents: int = 0
    defects: int = 0
    before: int = 0
    failures: list[Defect] = field(default_factory=list)


class _Refused(Exception):
    """Why a URL gives no document: kind, problem, remedy."""


def main(argv: list[str]) -> int:
    """Run `fastgpt data scrape`; return the exit code: 1 if some addresses gave no document."""
    parser = Parser(prog="fastgpt data scrape", description="Fetch pages as text; robots.txt is obeyed.")
    parser.add_argument("list", metavar="FILE", help="file with one address on each line")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .jsonl file to write")
    parser.add_argument(
        "--delay", type=number(float, 0), default=1.0, help="seconds between requests to a host, at least"
    )
    parser.add_argument("--user-agent", default=USER_AGENT, metavar="TEXT", help="add an address to reach you at")
    parser.add_argument("--license", default="", help="of the pages, to be carried along")
    args = parser.parse_args(argv)
    urls = read_list(args.list)
    shown = bar(len(urls), desc="scrape", unit="page", leave=False)
    manners = Manners(user_agent=args.user_agent, delay=args.delay, license=args.license)
    try:
        result = scrape(urls, args.out, manners, lambda defect: write(str(defect)), shown.update)
    finally:
        shown.close()
    print(
        f"{result.path}: {result.documents:,} documents, {result.defects:,} addresses without, {result.before:,} before"
    )
    return 1 if result.defects else 0


def read_list(path: str | Path) -> list[str]:
    """Return the addresses in a file, one on each line. Raises UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"scrape: cannot read {path}: {getattr(e, 'strerror', None) or 'it is not UTF-8'}") from None


def scrape(
    urls: Iterable[str],
    out: str | Path,
    manners: Manners | None = None,
    on_defect: OnDefect | None = None,
    progress: Any = None,
    *,
    record: str | Path | None = None,
    dated: bool = True,
    again: bool = False,
) -> Scraped:
    """Fetch pages and write their texts to a jsonl file with the fields text, id (the URL), title, url, date, license.

    Documents are in the order of the URLs. What was fetched is recorded in `out`.part until all URLs are done; a second
    call continues it. Read the file with Format("jsonl", id="id", meta=("title", "url", "date", "license")).

    Args:
        on_defect: called for each URL that gives no document; the others go on.
        progress: called with 1 after each URL.
        record: a file for the record, which stays, so that a call with other URLs fetches only those that are new.
        dated: write the date of the request; without it, pages that are the same give the same file.
        again: ask again for the URLs that gave no document in an earlier call.

    Raises:
        UserError: an address that is none, or no host could be reached at all.
    """
    out = Path(out)
    manners = manners or Manners()
    wanted = list(dict.fromkeys(urldefrag(url.strip())[0] for url in urls if url.strip()))
    for url in wanted:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UserError(f"scrape: {url!r} is not an address, expected http://... or https://...")
    if record is None and out.exists():
        raise UserError(f"scrape: {out} exists: remove it to fetch the pages again")
    part = out.with_name(out.name + ".part") if record is None else Path(record)
    done = _done(part, again)
    result = Scraped(out, before=len(done & set(wanted)))
    robot = _Robot(manners)
    queue = deque(url for url in wanted if url not in done)
    reached = False
    with open(part, "ab") as file:
        while queue:
            url = robot.next(queue)
            line: dict[str, str] = {"asked": url}
            try:
                line |= robot.page(url)
                result.documents += 1
                reached = True
            except _Refused as e:
                kind, problem, remedy = line["kind"], line["problem"], line["remedy"] = e.args
                reached = reached or kind != "unreachable"
                result.defects += 1
                if on_defect is not None:
                    on_defect(Defect(url, None, None, problem, remedy, kind))
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            file.flush()
            if progress is not None:
                progress(1)
    if wanted and not reached and not done:
        part.unlink()  # so that all are asked again
        raise UserError(f"scrape: no address can be reached ({len(wanted)} tried); is there a network?")
    result.failures = _finish(part, out, wanted, dated)
    if record is None:
        part.unlink()
    return result


def _done(part: Path, again: bool) -> set[str]:
    """Return the URLs that an earlier call has handled, with `again` those that gave a document; a last line that is
    incomplete is cut off."""
    if not part.exists():
        return set()
    raw = part.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(part, len(whole))
    lines = map(json.loads, whole.split(b"\n")[:-1])
    return {line["asked"] for line in lines if "text" in line or not again}


def _finish(part: Path, out: Path, wanted: list[str], dated: bool) -> list[Defect]:
    """Write the documents to `out`, in the order of the URLs; return why the other URLs gave none."""
    places: dict[str, int] = {}  # of the last line about each URL
    failures = []
    with open(part, "rb") as lines, atomic_file(out) as file:
        at = 0
        for raw in lines:
            places[json.loads(raw)["asked"]] = at
            at += len(raw)
        for url in wanted:
            lines.seek(places[url])
            line = json.loads(lines.readline())
            del line["asked"]
            if not dated:
                line.pop("date", None)
            if "text" in line:
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            else:
                failures.append(Defect(url, None, None, line["problem"], line["remedy"], line["kind"]))
    return failures


class _Robot:
    """Sends the requests: the rules of each host, and when it may be asked again."""

    def __init__(self, manners: Manners) -> None:
        self.manners = manners
        self.opener = urllib.request.build_opener(NoRedirect)
        self.rules: dict[str, RobotFileParser | None] = {}
        self.ready: dict[str, float] = {}

    def next(self, queue: deque[str]) -> str:
        """Take the first URL of the queue whose host need not be waited for; the first one if all must be."""
        now = time.monotonic()
        for _ in range(min(len(queue), 1000)):
            if self.ready.get(_host(queue[0]), 0.0) <= now:
                break
            queue.rotate(-1)
        return queue.popleft()

    def page(self, url: str) -> dict[str, str]:
        """Return the fields of a page's document. Raises _Refused."""
        at = url
        for _ in range(self.manners.max_redirects + 1):
            self._allowed(at)
            status, headers, raw = self._get(at)
            if status not in REDIRECTS:
                return self._document(url, at, status, headers, raw)
            at = urldefrag(urljoin(at, headers.get("Location", "")))[0]
            if urlsplit(at).scheme not in ("http", "https") or not urlsplit(at).hostname:
                raise _Refused("redirect", "it redirects to something that is not a page", "remove it")
        raise _Refused("redirect", f"it redirects more than {self.manners.max_redirects} times", "remove it")

    def _document(self, url: str, at: str, status: int, headers: Any, raw: bytes) -> dict[str, str]:
        if status != 200:
            raise _Refused("HTTP error", f"the server answers {status}", "remove it, or try again later")
        kind = headers.get_content_type()
        if kind not in ("text/html", "text/plain", "application/xhtml+xml"):
            raise _Refused("content type", f"it is {kind}, expected HTML or text", "download it instead")
        if len(raw) > self.manners.max_bytes:
            raise _Refused("giant", f"the page is larger than {self.manners.max_bytes:,} bytes", "raise max_bytes")
        charset = charset_of(raw, headers.get_content_charset() or "")
        try:
            text = raw.decode(charset)
        except UnicodeError:
            raise _Refused("not UTF-8", f"the page is not {charset}, its charset", "remove it") from None
        title, text = page_text(text) if kind != "text/plain" else ("", text)
        text = text.replace("\0", "\ufffd")
        if not text.strip():
            raise _Refused("empty record", "the page has no text", "remove it")
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        fields = {"text": text, "id": url, "title": title, "url": at, "date": date, "license": self.manners.license}
        return {name: value for name, value in fields.items() if value}

    def _allowed(self, url: str) -> None:
        """Check the host's robots.txt. Raises _Refused."""
        host = _host(url)
        if host not in self.rules:
            self.rules[host] = self._robots(host)
        rules = self.rules[host]
        if rules is None:
            remedy = "try again later"
            raise _Refused("unreachable", "its robots.txt cannot be read, so nothing is fetched from its host", remedy)
        if not rules.can_fetch(self.manners.user_agent, url):
            raise _Refused("robots.txt", "robots.txt of its host does not allow it", "remove it, or ask its owner")

    def _robots(self, host: str) -> RobotFileParser | None:
        """Return a host's rules; None if they cannot be read. No robots.txt allows all, a refused one nothing."""
        rules = RobotFileParser()
        at = f"{host}/robots.txt"
        for _ in range(self.manners.max_redirects + 1):
            try:
                status, headers, raw = self._get(at)
            except _Refused:
                return None
            if status in REDIRECTS:
                at = urljoin(at, headers.get("Location", ""))
                if urlsplit(at).scheme not in ("http", "https"):
                    return None
                continue
            if status >= 500 or status == 429:
                return None
            lines = raw[: 1 << 19].decode("utf-8", "replace").removeprefix("\ufeff").splitlines()
            refused = ["User-agent: *", "Disallow: /"]
            rules.parse(lines if status == 200 else refused if status in (401, 403) else [])
            return rules
        return None

    def _get(self, url: str) -> tuple[int, Any, bytes]:
        """Return (status, headers, body) of one URL, at most a byte more than max_bytes. Raises _Refused."""
        headers = {"User-Agent": self.manners.user_agent, "Accept": "text/html, text/plain;q=0.9, */*;q=0.1"}
        ascii = quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        request = urllib.request.Request(ascii, headers={**headers, "Accept-Encoding": "identity"})
        for attempt in range(self.manners.retries + 1):
            self._wait(_host(url))
            wait = self.manners.delay * 2**attempt
            try:
                with self.opener.open(request, timeout=self.manners.timeout) as answer:
                    return answer.status, answer.headers, answer.read(self.manners.max_bytes + 1)
            except urllib.error.HTTPError as e:
                if e.code not in TRANSIENT or attempt == self.manners.retries:
                    return e.code, e.headers, b""
                after = e.headers.get("Retry-After", "")
                wait = float(after) if after.isdigit() else wait
            except (*BROKEN, ValueError) as e:
                if attempt == self.manners.retries:
                    why = getattr(e, "reason", e)
                    said = getattr(why, "strerror", None) or type(why).__name__
                    problem = f"{urlsplit(url).hostname} cannot be reached ({said})"
                    raise _Refused("unreachable", problem, "check the address and the network") from None
            self.ready[_host(url)] = time.monotonic() + min(wait, LONGEST_WAIT)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, host: str) -> None:
        """Wait until a host may be asked, and set when it may be asked again."""
        time.sleep(max(0.0, self.ready.get(host, 0.0) - time.monotonic()))
        delay = self.manners.delay
        rules = self.rules.get(host)
        if rules is not None:
            agent = self.manners.user_agent
            delay = max(delay, float(rules.crawl_delay(agent) or 0))
            if (rate := rules.request_rate(agent)) is not None and rate.requests:
                delay = max(delay, rate.seconds / rate.requests)
        self.ready[host] = time.monotonic() + delay


def _host(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{re.sub(r'^[^@]*@', '', parts.netloc)}"

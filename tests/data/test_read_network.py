"""Downloads, the scraper and data sets of the hub, against servers on this machine."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_samples import CODE, PAGE
from fake_hub import COMMITS, Hub

from fastgpt.core.errors import UserError
from fastgpt.data import command
from fastgpt.data.read import Defect, Format, open_documents, web
from fastgpt.data.read import scrape as scraping
from fastgpt.data.read.hub import download_dataset
from fastgpt.data.read.scrape import Manners, scrape
from fastgpt.data.read.web import download

DATA = bytes(range(256)) * 4096
Answer = tuple[int, dict[str, str], bytes]


class Server:
    """Answers by path; `requests` has (path, headers) of each request."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[dict[str, str]], Answer]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.cut: list[int] = []  # lengths after which the next answers break off
        self.address = ""

    def page(self, path: str, body: bytes | str, kind: str = "text/html; charset=utf-8", status: int = 200) -> None:
        raw = body.encode() if isinstance(body, str) else body
        self.answers[path] = lambda headers: (status, {"Content-Type": kind}, raw)


@pytest.fixture
def server() -> Iterator[Server]:
    site = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked = dict(self.headers.items())
            site.requests.append((self.path, asked))
            found = site.answers.get(self.path, lambda headers: (404, {}, b""))
            status, headers, body = found(asked)
            part = body[: site.cut.pop(0)] if site.cut else body  # before the client knows that there is an answer
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(part)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        site.address = f"http://127.0.0.1:{httpd.server_port}"
        yield site
        httpd.shutdown()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only sleeping moves; its list holds the sleeps."""
    slept: list[float] = []
    fake = SimpleNamespace(sleep=lambda s: slept.append(s), monotonic=lambda: sum(slept))
    monkeypatch.setattr(web, "time", fake)
    monkeypatch.setattr(scraping, "time", fake)
    return slept


def with_ranges(etag: list[str]) -> Callable[[dict[str, str]], Answer]:
    """Return a handler of DATA that resumes, if the version is still etag[0]."""

    def answer(headers: dict[str, str]) -> Answer:
        if headers.get("If-None-Match") == etag[0]:
            return 304, {}, b""
        first = int(headers.get("Range", "bytes=0-")[6:-1])
        if first and headers.get("If-Range") == etag[0]:
            return 206, {"ETag": etag[0], "Content-Range": f"bytes {first}-{len(DATA) - 1}/{len(DATA)}"}, DATA[first:]
        return 200, {"ETag": etag[0]}, DATA

    return answer


def test_a_broken_download_resumes(server: Server, tmp_path: Path, clock: list[float]) -> None:
    version = ['"v1"']
    server.answers["/d/a%20b.jsonl"] = with_ranges(version)
    server.cut = [300_000, 1000]
    url = f"{server.address}/d/a%20b.jsonl"
    got = download(url, tmp_path, hashlib.sha256(DATA).hexdigest())
    assert got.path == tmp_path / "a b.jsonl" and got.path.read_bytes() == DATA
    assert [h.get("Range") for _, h in server.requests] == [None, "bytes=300000-", "bytes=301000-"]
    assert clock == [1.0, 2.0] and "fastgpt/" in server.requests[0][1]["User-Agent"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a b.jsonl", "a b.jsonl.source.json"]
    server.requests.clear()
    assert download(url, tmp_path, got.sha256) == got and not server.requests
    assert download(url, tmp_path) == got and server.requests[0][1]["If-None-Match"] == '"v1"'
    version[0] = '"v2"'
    server.cut = [5]
    assert download(url, tmp_path) == got and len(server.requests) == 3


def test_a_new_version_is_not_appended(server: Server, tmp_path: Path) -> None:
    server.answers["/a"] = with_ranges(['"new"'])
    (tmp_path / "a.part").write_bytes(b"old")
    (tmp_path / "a.part.version").write_text('"old"')
    assert download(f"{server.address}/a", tmp_path).path.read_bytes() == DATA


def test_refused_downloads(server: Server, tmp_path: Path, clock: list[float]) -> None:
    server.page("/busy", b"", status=503)
    server.page("/a", b"x")
    for path, options, message in (
        ("/none", {}, "the server answers 404"),
        ("/busy", {"retries": 2}, "the server answers 503"),
        ("/a", {"sha256": "0" * 64}, "expected 0000000"),
    ):
        with pytest.raises(UserError, match=message):
            download(server.address + path, tmp_path, **options)  # type: ignore[arg-type]
    assert clock == [1.0, 2.0] and not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="127.0.0.1 cannot be reached .Connection refused.; is there a network?"):
        download("http://127.0.0.1:9/x", tmp_path, retries=1)
    with pytest.raises(UserError, match="expected http"):
        download("file:///etc/passwd", tmp_path)


def test_scraper(server: Server, tmp_path: Path, clock: list[float]) -> None:
    pytest.importorskip("trafilatura")
    at = server.address
    server.page("/robots.txt", "User-agent: *\nDisallow: /private\nCrawl-delay: 7\n", "text/plain")
    server.page("/a", PAGE)
    server.page("/b.txt", "plain <text>", "text/plain")
    server.page("/private/x", "secret")
    server.page("/big", "x" * 5000)
    server.page("/image", b"\x89PNG", "image/png")
    server.page("/empty", "<html></html>")
    for path, target in (("/moved", "/a?x=1"), ("/sneaky", "/private/x"), ("/loop", "/loop"), ("/file", "file:///x")):
        server.answers[path] = lambda headers, target=target: (302, {"Location": target}, b"")
    server.page("/a?x=1", "<p>caf\xe9</p>".encode("latin-1"), "text/html; charset=iso-8859-1")
    paths = "/a#x /a /b.txt /private/x /big /image /empty /moved /sneaky /loop /file /gone".split()
    defects: list[Defect] = []
    manners = Manners(max_bytes=4000, delay=1.0, license="CC0")
    result = scrape([at + p for p in paths], tmp_path / "out.jsonl", manners, defects.append)
    assert (result.documents, result.defects) == (3, 8) and not (tmp_path / "out.jsonl.part").exists()
    kinds = {d.file.removeprefix(at): d.kind for d in defects}
    assert kinds == {
        "/private/x": "robots.txt", "/big": "giant", "/image": "content type", "/empty": "empty record",
        "/sneaky": "robots.txt", "/loop": "redirect", "/file": "redirect", "/gone": "HTTP error",
    }  # fmt: skip
    assert not [path for path, _ in server.requests if path.startswith("/private")]
    assert [path for path, _ in server.requests].count("/robots.txt") == 1
    waits = [s for s in clock if s]
    assert waits[0] == 1.0 and set(waits[1:]) == {7.0} and len(waits) == len(server.requests) - 1
    documents = list(open_documents(tmp_path / "out.jsonl", Format(id="id", meta=("url", "license"))))
    assert CODE in documents[0].text and [d.text for d in documents[1:]] == ["plain <text>", "café"]
    assert documents[2].id == f"{at}/moved" and documents[2].meta == {"url": f"{at}/a?x=1", "license": "CC0"}


def test_a_killed_scraper_continues(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("trafilatura")
    urls = [f"{server.address}/{i}" for i in range(4)]
    for i in range(4):
        server.page(f"/{i}", f"text {i}", "text/plain")

    left = [2]

    def kill(_: int) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scrape(urls, tmp_path / "out.jsonl", progress=kill)
    with open(tmp_path / "out.jsonl.part", "ab") as file:
        file.write(b'{"asked": "half a li')
    server.requests.clear()
    result = scrape(urls, tmp_path / "out.jsonl")
    assert (result.before, result.documents) == (2, 2)
    assert [path for path, _ in server.requests] == ["/robots.txt", "/2", "/3"]
    assert [d.text for d in open_documents(tmp_path / "out.jsonl")] == [f"text {i}" for i in range(4)]


def test_the_command(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trafilatura")
    server.page("/a", "text", "text/plain")
    (tmp_path / "urls.txt").write_text(f"{server.address}/a\n\n{server.address}/gone\n")
    out = tmp_path / "a.jsonl"
    assert command.main(["scrape", str(tmp_path / "urls.txt"), "--out", str(out)]) == 1
    said = capsys.readouterr().out
    assert f"{server.address}/gone: the server answers 404" in said and "1 documents, 1 addresses without" in said
    with pytest.raises(UserError, match="exists: remove it"):
        command.main(["scrape", str(tmp_path / "urls.txt"), "--out", str(out)])


def test_hosts_that_refuse_or_are_absent(server: Server, tmp_path: Path, clock: list[float]) -> None:
    server.page("/robots.txt", "", status=403)
    defects: list[Defect] = []
    result = scrape([f"{server.address}/a"], tmp_path / "a", on_defect=defects.append)
    assert (result.documents, [d.kind for d in defects]) == (0, ["robots.txt"])
    server.answers["/robots.txt"] = lambda headers: (503, {"Retry-After": "9"}, b"")
    with pytest.raises(UserError, match=r"no address can be reached \(1 tried\); is there a network?"):
        scrape([f"{server.address}/a"], tmp_path / "b")
    assert 9.0 in clock
    with pytest.raises(UserError, match="expected http"):
        scrape(["ftp://x/y"], tmp_path / "c")


def test_a_data_set_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    pytest.importorskip("orjson")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A set\n")
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "set" / "weights.bin").write_bytes(b"no data")
    hub = Hub()
    hub.add("someone/set", tmp_path / "set")
    with hub.serve() as address:
        changes = dict(ENDPOINT=address, HF_HUB_OFFLINE=False, HF_HUB_CACHE=str(tmp_path / "cache"))
        changes |= dict(HF_HUB_DISABLE_XET=True, HF_TOKEN_PATH=str(tmp_path / "token"))
        changes |= dict(HUGGINGFACE_CO_URL_TEMPLATE=address + "/{repo_id}/resolve/{revision}/{filename}")
        for name, value in changes.items():
            monkeypatch.setattr(constants, name, value)
        found = download_dataset("someone/set")
        assert (found.commit, found.license) == (COMMITS["main"], "cc-by-4.0")
        assert not [r for r in hub.requests if "weights.bin" in r and r.startswith("GET")]
        format = Format("jsonl", license=found.license, source="someone/set")
        (file,) = found.files
        documents = list(open_documents(file, format))
        assert [(d.text, d.meta["license"]) for d in documents] == [("one", "cc-by-4.0"), ("two", "cc-by-4.0")]
        with pytest.raises(UserError, match="the hub has no data set of this name"):
            download_dataset("someone/none")
        with pytest.raises(UserError, match="has no files"):
            download_dataset("someone/set", files=["*.csv"])
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="the hub cannot be reached"):
        download_dataset("someone/other")

import hashlib
import http.server
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from data.recipes import settings, shards, text, write_recipe

from fastgpt.core import progress
from fastgpt.core.errors import UserError
from fastgpt.core.progress import NoBar
from fastgpt.data.built import open_built
from fastgpt.data.pipeline import gather
from fastgpt.data.pipeline.fetch import debian_packages, python_documentation
from fastgpt.data.pipeline.stages import Share, build
from fastgpt.data.pipeline.write import documents_of
from fastgpt.data.read import SourceFile
from fastgpt.data.read.hub import HubData
from fastgpt.data.recipe_file import load_recipe


def script(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_debian_packages_are_unpacked_and_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "tools"
    script(tools, "apt-get", '[ "$1" = download ] && shift && for p; do echo "$p" > "${p}_1_all.deb"; done')
    script(tools, "dpkg-deb", 'mkdir -p "$3/usr" && cp "$2" "$3/usr/"')
    monkeypatch.setenv("PATH", str(tools), os.pathsep)
    folder = debian_packages(["a-doc", "b-doc"], tmp_path / "fetched")
    assert sorted(p.name for p in (folder / "usr").iterdir()) == ["a-doc_1_all.deb", "b-doc_1_all.deb"]
    script(tools, "apt-get", "echo 'E: Unable to locate package none-doc' >&2; exit 100")
    assert debian_packages(["a-doc", "b-doc"], tmp_path / "fetched") == folder
    with pytest.raises(UserError, match="`apt-get download none-doc` failed: E: Unable to locate package none-doc"):
        debian_packages(["none-doc"], tmp_path / "fetched")
    with pytest.raises(UserError, match="'-o' is not a name of a Debian package"):
        debian_packages(["-o"], tmp_path / "fetched")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no apt-get, expected a Debian system"):
        debian_packages(["none-doc"], tmp_path / "fetched")


def test_python_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib"
    (library / "pkg").mkdir(parents=True)
    (library / "pkg" / "m.py").write_text('"""About m."""\nclass C:\n    def f(self, x=1):\n        "Does f."\n')
    (library / "broken.py").write_text("def (\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    lines = python_documentation(tmp_path).read_text().splitlines()
    assert lines[-1] == '{"id": "pkg.m", "text": "About m.\\n\\nC.f(self, x=1)\\nDoes f."}'
    assert len(lines) > 50 and lines[0].startswith('{"id": "topic ')


@pytest.fixture
def asked() -> list[str]:
    """The paths that the server was asked for."""
    return []


@pytest.fixture
def server(tmp_path: Path, asked: list[str]) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            super().do_GET()

    handler = partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


def test_files_of_a_server(server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pages = "".join(text(i) + "\n" for i in range(20))
    (tmp_path / "pages.txt").write_text(pages, encoding="utf-8")
    digest = hashlib.sha256(pages.encode()).hexdigest()
    plain = settings(tmp_path, validation=0)  # as in `pages`
    plain["sources"] = {
        "web": {"url": f"{server}/pages.txt#sha256={digest}", "format": {"name": "text", "split": "paragraph"}},
        "gone": {"url": f"{server}/none.txt", "optional": True},
    }
    recipe = load_recipe(write_recipe(tmp_path, plain))
    with caplog.at_level(logging.WARNING, "fastgpt"):
        report = build(recipe, tmp_path / "out", show=False)
    assert report is not None and report["sources"]["web"]["documents"] == 20
    assert any("source gone is left out: cannot download" in m and "404" in m for m in caplog.messages)
    plain["sources"]["web"]["url"] = f"{server}/pages.txt#sha256={digest[::-1]}"
    recipe = load_recipe(write_recipe(tmp_path, plain))
    with pytest.raises(UserError, match=rf"sources.web: {server}/pages.txt has the SHA-256 {digest}, expected"):
        build(recipe, tmp_path / "out2", show=False)


def pages(folder: Path, server: str, **changes: Any) -> dict[str, Any]:
    """Write 20 pages and two that robots.txt forbids; return a recipe that scrapes them, as plain values."""
    (folder / "robots.txt").write_text("User-agent: *\nDisallow: /private\n")
    names = [f"page{i}.txt" for i in range(20)] + ["private0.txt", "private1.txt"]
    for name in names:
        (folder / name).write_text(text(name), encoding="utf-8")
    (folder / "urls.txt").write_text("".join(f"{server}/{name}\n" for name in names[10:]))
    scrape = {"urls": [f"{server}/{name}" for name in names[:10]], "file": "urls.txt", "delay": 0}
    web = {"scrape": scrape, "defects": "skip", "license": "CC0-1.0", **changes}
    # the ids hold the port of the server, so another part would be held out in each run, sometimes none
    return settings(folder, validation=0) | {"sources": {"web": web}}


def test_pages_are_scraped_once(server: str, tmp_path: Path, asked: list[str]) -> None:
    made, out = load_recipe(write_recipe(tmp_path, pages(tmp_path, server))), tmp_path / "out"
    for i in range(2):
        build(made, out, only="clean", share=Share(i, 2), show=False)
    report = build(made, out, keep=True, show=False)
    assert report is not None
    assert sorted(asked) == sorted(["/robots.txt", *(f"/page{i}.txt" for i in range(20))])
    assert report["sources"]["web"]["documents"] == 20 and report["sources"]["web"]["defects"] == {"robots.txt": 2}
    assert f"{server}/private0.txt: robots.txt of its host" in report["sources"]["web"]["defect_examples"][0]
    manifest = open_built(out).manifest
    assert manifest["sources"]["web"]["license"] == "CC0-1.0"
    ids = [name for shard in manifest["shards"] for _, name in documents_of(out, shard["name"])[1]]
    assert sorted(ids) == sorted(f"{server}/page{i}.txt" for i in range(20))
    first = (out / "work" / "fetched" / "web" / "pages.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in first] == [f"{server}/page{i}.txt" for i in range(20)]
    assert json.loads(first[3])["license"] == "CC0-1.0"
    before, n = shards(out), len(asked)
    build(made, out, show=False)  # nothing changed, and what was kept goes
    assert len(asked) == n and open_built(out).manifest["generation"] == 1 and not (out / "work").exists()
    build(made, out, show=False)  # fetches the pages again, which are the same
    assert len(asked) == 2 * n and open_built(out).manifest["generation"] == 1 and shards(out) == before


def test_a_killed_build_asks_for_the_pages_that_are_left(
    server: str, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out = load_recipe(write_recipe(tmp_path, pages(tmp_path, server))), tmp_path / "out"

    def kill(record: Any) -> None:
        if len(asked) == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(NoBar, "update", lambda self, n=1: kill(n))
        patched.setattr(progress, "_tqdm", lambda: None)
        with pytest.raises(KeyboardInterrupt):
            build(made, out, show=False)
    assert len(asked) == 8
    build(made, out, show=False)
    assert sorted(asked) == sorted(["/robots.txt", "/robots.txt", *(f"/page{i}.txt" for i in range(20))])
    build(made, tmp_path / "whole", show=False)
    assert shards(out) == shards(tmp_path / "whole")


def test_a_missing_page_stops_a_build_that_may_not_skip(server: str, tmp_path: Path, asked: list[str]) -> None:
    plain = pages(tmp_path, server, defects="fail", optional=True)
    (tmp_path / "urls.txt").write_text(f"{server}/gone0.txt\n{server}/gone1.txt\n")
    made = load_recipe(write_recipe(tmp_path, plain))
    with pytest.raises(UserError) as e:
        build(made, tmp_path / "out", show=False)
    assert f"sources.web: {server}/gone0.txt: the server answers 404 (1 more address gave no page); " in str(e.value)
    assert "or set defects: skip to do without it; " in str(e.value)
    for i in range(2):
        (tmp_path / f"gone{i}.txt").write_text(text(i), encoding="utf-8")
    asked.clear()
    report = build(made, tmp_path / "out", show=False)
    assert report is not None and report["sources"]["web"]["documents"] == 12
    assert asked == ["/robots.txt", "/gone0.txt", "/gone1.txt"]


def test_an_optional_site_that_is_gone_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        plain = settings(tmp_path)
        scrape = {"urls": [f"http://127.0.0.1:{closed.getsockname()[1]}/a"], "delay": 0}
        plain["sources"]["web"] = {"scrape": scrape, "optional": True}
        with caplog.at_level(logging.WARNING, "fastgpt"):
            build(load_recipe(write_recipe(tmp_path, plain)), tmp_path / "out", show=False)
    assert any("source web is left out: scrape: no address can be reached (1 tried)" in m for m in caplog.messages)


def test_a_data_set_of_the_hub_brings_its_license(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pages.txt").write_text("\n\n".join(text(i) for i in range(20)), encoding="utf-8")
    asked = []

    def download(name: str, files: list[str]) -> HubData:
        asked.append((name, files))
        return HubData([SourceFile(tmp_path / "pages.txt", "data/pages.txt", 1)], "c0", "cc0-1.0")

    monkeypatch.setattr(gather, "download_dataset", download)
    plain = settings(tmp_path)
    source = {"hub": "org/pages", "path": "data/*", "format": {"name": "text", "split": "paragraph"}}
    plain["sources"] = {"pages": source}
    build(load_recipe(write_recipe(tmp_path, plain)), tmp_path / "out", show=False)
    manifest = open_built(tmp_path / "out").manifest
    assert manifest["sources"]["pages"]["license"] == "cc0-1.0" and asked == [("org/pages", ["data/*"])]

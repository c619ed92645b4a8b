import hashlib
import http.server
import logging
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from data.recipes import settings, text, write_recipe

from fastgpt.core.errors import UserError
from fastgpt.data.built import open_built
from fastgpt.data.pipeline import gather
from fastgpt.data.pipeline.fetch import debian_packages, python_documentation
from fastgpt.data.pipeline.stages import build
from fastgpt.data.read import SourceFile
from fastgpt.data.read.hub import HubData
from fastgpt.data.recipe import load_recipe


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
def server(tmp_path: Path) -> Iterator[str]:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


def test_files_of_a_server(server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pages = "".join(text(i) + "\n" for i in range(20))
    (tmp_path / "pages.txt").write_text(pages, encoding="utf-8")
    digest = hashlib.sha256(pages.encode()).hexdigest()
    plain = settings(tmp_path)
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

"""The clients that README and docs/serving.md show, word for word, on a server; only the port is another one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from serve.servers import serving, write_model

from fastgpt.serve.engine import Model
from fastgpt.serve.guard import Limits
from fastgpt.serve.served import serve_model

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "serving.md"]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    """Return the blocks of a language that call a server with a model; adapters need files."""
    found = re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.M | re.S)
    return [block for block in found if ADDRESS in block and "lora" not in block]


PYTHON = blocks("python")
CURL = [c for block in blocks("bash") for c in re.findall(r"^curl (?:.*\\\n)*.*", block, re.M)]
CURL += re.findall(r"^    (curl .*)", TEXT, re.M)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_model(tmp_path_factory.mktemp("model"), context=512)
    served = serve_model("tiny", Model(str(folder), device="cpu", threads=1), 64)
    try:
        with serving({"tiny": served}, Limits()) as client:
            yield str(client.base_url).rstrip("/")
    finally:
        served.link.close()


def test_there_are_clients_of_every_kind() -> None:
    assert all(any(f"from {name} import" in block for block in PYTHON) for name in ("openai", "anthropic"))
    assert len([c for c in CURL if "\n" in c]) > 1 and len([c for c in CURL if "\n" not in c]) == 1  # README's


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.split()[1])
def test_python_as_it_is_shown(block: str, address: str) -> None:
    pytest.importorskip(block.split()[1])
    code = block.replace(ADDRESS, address)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", CURL)
def test_curl_as_it_is_shown(command: str, address: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    done = subprocess.run(command.replace(ADDRESS, address), shell=True, capture_output=True, text=True, timeout=300)
    answer = json.loads(done.stdout)
    assert "error" not in answer and (answer.get("usage") or answer.get("data")), answer

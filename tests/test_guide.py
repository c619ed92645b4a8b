"""The commands of docs/guide.md, typed in their order in an empty folder, and the options of docs/guide_350m.md."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from fastgpt.cli import COMMANDS
from fastgpt.evaluate.results import load_results

ROOT = Path(__file__).parent.parent
GUIDE, AT_SIZE = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("guide.md", "guide_350m.md"))
STEPS = "40"  # in place of the guide's 200: the variable that the guide names is all that is smaller here


def commands(page: str) -> list[str]:
    """Return the commands of a page, in their order, without comments."""
    text = "".join(re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)).replace("\\\n", " ")
    lines = [re.sub(r"\s+# .*", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]


def called(argv: list[str]) -> str:
    """Run a command of fastgpt in this process, which spares the imports, and return what it prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            code = COMMANDS[argv[1]](argv[2:])
        except SystemExit as e:
            code = int(e.code or 0)
    assert not code, f"{shlex.join(argv)}: {code}\n{said.getvalue()}"
    return said.getvalue()


class Typist:
    """Types the commands of a page.

    Attributes:
        here: the folder that `cd` led to.
        said: command -> what it printed.
        versions: that the server had after each roll-out and roll-back.
    """

    def __init__(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here, self.patch, self.said = here, monkeypatch, dict[str, str]()
        self.versions: list[int] = []
        self.servers: list[subprocess.Popen[bytes]] = []
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = {**os.environ, "PATH": path, "STEPS": STEPS}
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = str(s.getsockname()[1])  # 8000 may be taken

    def type(self, command: str) -> None:
        """Run a command."""
        word, _, rest = command.partition(" ")
        if word == "cd":
            self.here /= rest
            self.patch.chdir(self.here)
        elif command.startswith("fastgpt serve "):  # of the second terminal
            words = [*shlex.split(command), "--port", self.port]
            with (self.here / "serve.log").open("wb") as log:
                self.servers.append(subprocess.Popen(words, cwd=self.here, env=self.env, stdout=log, stderr=log))
        elif re.fullmatch(r"fastgpt [^|&;<>]*", command):
            self.said[command] = called(self._shell(f"printf '%s\\0' {command}").split("\0")[:-1])
        elif word != "export":
            self.said[command] = self._shell(command.replace(":8000", f":{self.port}"))
        if command.startswith("fastgpt deploy roll-"):
            self.versions.append(self._served_after())

    def _served_after(self) -> int:
        """Wait until the server has another version than before, and return it."""
        before, end = (self.versions or [1])[-1], time.monotonic() + 300
        while time.monotonic() < end:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models") as answer:
                if (version := json.load(answer)["data"][0]["version"]) != before:
                    return int(version)
            time.sleep(0.2)
        return before

    def _shell(self, command: str) -> str:
        shell, nothing = ["bash", "-c", command], subprocess.DEVNULL
        done = subprocess.run(shell, cwd=self.here, env=self.env, stdin=nothing, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def leave(self) -> None:
        """End the servers."""
        for server in self.servers:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            finally:
                server.kill()


@pytest.mark.extended
def test_the_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the guide does what the guide claims."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    typist = Typist(tmp_path, monkeypatch)
    try:
        for command in commands(GUIDE):
            typist.type(command)
    finally:
        typist.leave()
    said = "\n".join(typist.said.values())
    assert "missing: data/code.jsonl" in said and "missing: runs/tiny" in said
    models = ("tiny", "code", "aligned", "aligned-2")
    found = {model: load_results(typist.here / "eval" / f"{model}.json") for model in models}

    def figure(model: str, task: str, metric: str) -> float:
        value = found[model].figure(task, metric)
        assert value is not None
        return value.value

    code = {model: figure(model, "code.jsonl", "bits_per_byte") for model in models}
    general = {model: figure(model, "general.jsonl", "bits_per_byte") for model in models}
    style = {model: figure(model, "style", "acc") for model in models}
    assert code["code"] < 0.98 * code["tiny"], code
    assert general["code"] < 1.03 * general["tiny"], general
    assert style["aligned"] > style["code"] + 0.2 and style["aligned-2"] > style["code"] + 0.2, style
    answer = json.loads(next(text for command, text in typist.said.items() if "/v1/completions" in command))
    assert answer["model"] == "live" and answer["usage"]["completion_tokens"] > 0
    assert 'fastgpt_flags_total{name="words",where="prompt"} 1.0' in said and "kept: prompts and answers" in said
    assert "not rolled out" in said and typist.versions == [2, 1]
    assert "Returns the area." in (typist.here / "style.jsonl").read_text(encoding="utf-8").splitlines()[-1]


def test_the_recipes_are_those_of_the_page() -> None:
    shown = re.findall(r"^```yaml\n(.*?)^```", GUIDE, re.M | re.S)
    assert shown == [
        (ROOT / "recipes" / "guide" / name).read_text(encoding="utf-8") for name in ("base.yaml", "style.yaml")
    ]


@functools.cache
def options_of(*words: str) -> set[str]:
    """Return the options that the help of a command names."""
    return set(re.findall(r"--[\w.-]+", called(["fastgpt", *words, "--help"])))


@pytest.mark.parametrize("page", [GUIDE, AT_SIZE], ids=["guide", "350m"])
def test_every_option_exists(page: str) -> None:
    for command in commands(page):
        words = shlex.split(command.split(" || ")[0])
        if words[0] == "fastgpt":
            sub = (
                words[1:3]
                if words[1] in ("data", "tokenizer", "deploy", "feedback", "store") or "compare" in words
                else words[1:2]
            )
            known = options_of(*sub) | (options_of("train", "--plan") if "--plan" in words else set())
            assert {word for word in words if word.startswith("--")} <= known, command


@pytest.mark.slow
def test_the_plan_of_preferences_at_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of the second page runs, with a small model in place of the one that the recipes train."""
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("some words of a text\n" * 999)
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n' * 20)
    small = "--model.n-layers 1 --model.width 64 --model.n-heads 2 --micro-batch 1 --batch-tokens 1024"
    called(shlex.split(f"fastgpt train --data my.txt --out runs/350m-domain --max-steps 1 --vocab-size 300 {small}"))
    (plan,) = (command for command in commands(AT_SIZE) if "--plan" in command)
    assert "which fits 36.8 GB" in called(shlex.split(plan))

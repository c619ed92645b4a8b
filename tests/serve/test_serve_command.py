"""`fastgpt serve` as a process: what it refuses, and that it finishes what runs when a signal ends it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

import httpx
from serve.servers import write_model

from fastgpt.core.errors import UserError
from fastgpt.serve.command import main, named, read_keys
from fastgpt.serve.served import read_defaults


def test_what_cannot_be_served_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen at 127.0.0.1:{port} \(Address already in use\)"):
            main([str(tmp_path), "--port", str(port)])
    with pytest.raises(UserError, match="is not a folder"):
        main([str(tmp_path / "none"), "--port", "0"])
    folder = write_model(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer, expected one beside the weights"):
        main([str(folder), "--port", "0"])
    with pytest.raises(UserError, match="two models are named a"):
        named(["a=x", "b=y", "runs/a"])
    with pytest.raises(UserError, match="'=x' is not a model, expected NAME=RUN"):
        named(["=x"])


def test_keys_come_from_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    monkeypatch.setenv("FASTGPT_API_KEYS", "a, b,")
    file.write_text("c\n\nd\n")
    assert read_keys(file) == ("a", "b", "c", "d") and read_keys(None) == ("a", "b")
    file.write_text("\n")
    with pytest.raises(UserError, match="has no key, expected one on each line"):
        read_keys(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_defaults_of_the_model(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    assert read_defaults(file) == {}
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 0, "top_p": None, "eos_token_id": 2, "do_sample": True}))
    assert read_defaults(file) == {"temperature": 0.6}
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_k": 50}))
    assert read_defaults(file) == {"temperature": 0.0, "top_k": 50}
    file.write_text("{")
    with pytest.raises(UserError, match="generation_config.json cannot be read"):
        read_defaults(file)


def test_a_signal_ends_the_server_after_what_runs(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    command = [sys.executable, "-m", "fastgpt.cli", "serve", f"m={folder}", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            line = ""
            while "serving at" not in line:
                line = process.stdout.readline()
                assert line, "the server ended"
            url = line.split()[2].rstrip(";")
            body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": True, "n": 16}
            with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [text for text in lines if text]
            assert rest[-1] == "data: [DONE]"
            assert sum('"finish_reason": "length"' in text for text in rest) == 16
            assert process.wait(60) == 0
            assert "Traceback" not in process.stdout.read()
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)

"""Adapters over HTTP: chosen by model name, loaded and unloaded while requests run, refused in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import httpx
import torch
from serve.servers import serving, write_model

from fastgpt.core.errors import UserError
from fastgpt.data import train_tokenizer
from fastgpt.evaluate.target import open_target
from fastgpt.finetune.adapter import save_adapter
from fastgpt.finetune.lora import Lora, add_lora
from fastgpt.inference import Generator, Request
from fastgpt.models.weights import load_pretrained
from fastgpt.serve.app import build_app
from fastgpt.serve.command import main, named_adapters
from fastgpt.serve.engine import Model
from fastgpt.serve.guard import Limits
from fastgpt.serve.served import Served, serve_adapter, serve_model

BODY: dict[str, Any] = {"prompt": "the cat", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


def write_adapter(base: Path, folder: Path, seed: int) -> Path:
    model, g = load_pretrained(base), torch.Generator().manual_seed(seed)
    for m in add_lora(model, Lora(rank=2 + seed, alpha=8), generator=g).values():
        m.lora_B.data.normal_(0.0, 1.0, generator=g)
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def store(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of adapters: a, b, and c with a chat template."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abc"):
        write_adapter(base, folder / name, seed)
    (folder / "c" / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def texts(base: Path, store: Path) -> dict[str, str]:
    """Return what the base, "m", and each adapter answer to BODY."""
    target = open_target(str(base), device="cpu")
    generator = Generator(target.model, target.tokenizer, adapters={name: store / name for name in "abc"})
    options: dict[str, Any] = dict(temperature=0.0, ignore_eos=True)
    asked = [Request("the cat", 12, adapter=name, **options) for name in (None, "a", "b", "c")]
    found = dict(zip(("m", "a", "b", "c"), (result.text for result in generator.generate(asked))))
    assert len(set(found.values())) == 4
    return found


@pytest.fixture(scope="module")
def running(base: Path, store: Path) -> Iterator[tuple[Served, httpx.Client]]:
    """Serve the base, "m", with adapter "a"; others may be loaded."""
    adapters = {"a": str(store / "a")}
    served = serve_model("m", Model(str(base), device="cpu", threads=1, rows=4, adapters=adapters), 64)
    try:
        models = {"m": served, "a": serve_adapter("a", adapters["a"], served)}
        with serving(models, Limits(), store) as client:
            yield served, client
    finally:
        served.link.close()


@pytest.fixture(scope="module")
def client(running: tuple[Served, httpx.Client]) -> httpx.Client:
    return running[1]


def said(client: httpx.Client, model: str | None) -> str:
    answer = client.post("/v1/completions", json=BODY | ({} if model is None else {"model": model}))
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == (model or "m")
    return str(answer.json()["choices"][0]["text"])


def change(client: httpx.Client, what: str, **body: str) -> httpx.Response:
    return client.post(f"/v1/{what}_lora_adapter", json={f"lora_{key}": value for key, value in body.items()})


def test_the_model_of_a_request_names_the_adapter(client: httpx.Client, texts: dict[str, str], store: Path) -> None:
    assert [said(client, name) for name in ("m", "a", None)] == [texts["m"], texts["a"], texts["m"]]
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert list(models) == ["m", "a"]
    assert models["m"]["parent"] is None and models["a"]["parent"] == "m"
    assert models["a"]["root"] == str(store / "a") and models["m"]["root"].endswith("model")
    message = {"model": "a", "max_tokens": 5, "messages": [{"role": "user", "content": "the cat"}]}
    for route in ("chat/completions", "messages"):
        answer = client.post(f"/v1/{route}", json=message).json()
        assert answer["model"] == "a"
    assert client.post("/v1/completions", json={**BODY, "model": "b"}).status_code == 404


def test_adapters_are_loaded_and_unloaded(client: httpx.Client, texts: dict[str, str], store: Path) -> None:
    answer = change(client, "load", name="b", path="b")
    assert answer.status_code == 200 and answer.text == "Success: LoRA adapter 'b' added successfully."
    assert change(client, "load", name="also b", path=str(store / "b")).status_code == 200
    assert [said(client, name) for name in ("b", "also b", "a")] == [texts["b"], texts["b"], texts["a"]]
    assert change(client, "load", name="b", path="c").json()["error"]["message"] == (
        "lora_name: 'b' is served already, expected another name"
    )
    long = {**BODY, "model": "b", "max_tokens": 50, "stream": True, "n": 6}  # on four rows
    with client.stream("POST", "/v1/completions", json=long) as stream:
        lines = stream.iter_lines()
        next(lines)
        answer = change(client, "unload", name="b")
        assert answer.status_code == 200 and answer.text == "Success: LoRA adapter 'b' removed successfully."
        parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert sum(p["choices"][0]["finish_reason"] == "length" for p in parts) == 6
    assert client.post("/v1/completions", json={**BODY, "model": "b"}).status_code == 404
    assert change(client, "load", name="b", path="c").status_code == 200
    assert said(client, "b") == texts["c"], "the name is another adapter's now"
    ids = client.post("/v1/chat/completions", json={"model": "b", "messages": [{"role": "user", "content": "a"}]})
    plain = client.post("/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": "a"}]})
    assert ids.json()["usage"]["prompt_tokens"] < plain.json()["usage"]["prompt_tokens"], "its chat template"
    for name in ("b", "also b"):
        assert change(client, "unload", name=name).status_code == 200


def test_changes_that_cannot_be(client: httpx.Client, store: Path, base: Path, tmp_path: Path) -> None:
    outside = write_adapter(base, tmp_path / "outside", 3)
    for path, name in ((outside, "link"), (outside / "adapter_model.safetensors", "file/adapter_model.safetensors")):
        (store / name).parent.mkdir(exist_ok=True)
        (store / name).symlink_to(path)
    shutil.copy(outside / "adapter_config.json", store / "file")
    for path in ("../x", str(outside), "link", "file", "a\0b", "/etc"):
        answer = change(client, "load", name="x", path=path)
        assert answer.status_code == 400 and "lora_path is not in" in answer.json()["error"]["message"], path
    shutil.copytree(store / "a", store / "cut")
    file = store / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    (store / "pickled").mkdir()
    shutil.copy(store / "a" / "adapter_config.json", store / "pickled")
    shutil.copy(file, store / "pickled" / "adapter_model.bin")
    for path, why in (("none", "has no adapter"), ("cut", "adapter_model.safetensors"), ("pickled", "has no adapter")):
        answer = change(client, "load", name="x", path=path)
        assert answer.status_code == 400 and why in answer.json()["error"]["message"], answer.text
        assert answer.json()["error"]["param"] == "lora_path"
    assert change(client, "unload", name="x").status_code == 404
    assert "m is no adapter" in change(client, "unload", name="m").json()["error"]["message"]
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "x"}).status_code == 400
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["m", "a"]


@pytest.mark.slow
def test_an_engine_that_died_has_its_adapters_again(
    running: tuple[Served, httpx.Client], texts: dict[str, str], store: Path
) -> None:
    """Loaded ones too; those whose files have gone do not keep it from starting."""
    served, client = running
    shutil.copytree(store / "c", store / "gone")
    for name, path in (("b", "b"), ("gone", "gone")):
        assert change(client, "load", name=name, path=path).status_code == 200
    shutil.rmtree(store / "gone")
    before = served.link.restarts
    assert served.link._process.pid is not None
    os.kill(served.link._process.pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while served.link.restarts == before:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert [said(client, name) for name in ("m", "a", "b")] == [texts["m"], texts["a"], texts["b"]]
    answer = client.post("/v1/completions", json={**BODY, "model": "gone"})
    assert answer.status_code == 400 and "adapter is 'gone', expected a, b" in answer.json()["error"]["message"]
    for name in ("b", "gone"):
        assert change(client, "unload", name=name).status_code == 200
    assert f"fastgpt_engine_restarts {served.link.restarts}.0" in client.get("/metrics").text, (
        "not once for each adapter"
    )


@pytest.mark.slow
def test_adapters_of_another_model_than_the_first(
    running: tuple[Served, httpx.Client], base: Path, store: Path, texts: dict[str, str], tmp_path: Path
) -> None:
    """Given at the start, or loaded: the base of `texts` is the second model here."""
    first = serve_model("first", Model(str(write_model(tmp_path / "wide", mlp_width=48)), device="cpu", threads=1), 64)
    try:
        models = {"first": first, "m": running[0], "a": serve_adapter("a", str(store / "a"), running[0])}
        with serving(models, Limits(), store) as client:
            assert change(client, "load", name="b", path="b").status_code == 400, "of the first model"
            body = {"lora_name": "b", "lora_path": "b", "base_model_name": "m"}
            assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
            found = [client.post("/v1/completions", json={**BODY, "model": name}).json() for name in "mab"]
            assert [answer["choices"][0]["text"] for answer in found] == [texts[name] for name in "mab"]
            parents = {model["id"]: model["parent"] for model in client.get("/v1/models").json()["data"]}
            assert parents == {"first": None, "m": None, "a": "m", "b": "m"}
            for name, status, why in (("a", 400, "a is an adapter, expected a model"), ("x", 404, "no model 'x'")):
                answer = client.post("/v1/load_lora_adapter", json={**body, "lora_name": "c", "base_model_name": name})
                assert answer.status_code == status and why in answer.json()["error"]["message"]
            assert change(client, "unload", name="b").status_code == 200
    finally:
        first.link.close()


def test_without_the_option_nothing_changes(running: tuple[Served, httpx.Client]) -> None:
    paths = [getattr(route, "path", "") for route in build_app({"m": running[0]}, Limits()).routes]
    assert "/v1/completions" in paths and not any("lora" in path for path in paths)


@pytest.mark.slow
def test_what_does_not_start(base: Path, store: Path, tmp_path: Path) -> None:
    assert named_adapters(["a=x", "b=y=z"], ["m"]) == {"m": {"a": "x", "b": "y=z"}}
    assert named_adapters(["a@n=x", "b=y"], ["m", "n"]) == {"m": {"b": "y"}, "n": {"a": "x"}}
    for places, why in (
        (["x"], "--adapter is 'x', expected NAME=PATH or NAME@MODEL=PATH"),
        (["x@=y"], "--adapter is 'x@=y', expected NAME=PATH or NAME@MODEL=PATH"),
        (["x@n=y"], "--adapter is 'x@n=y', but there is no model n, expected m"),
        (["a=x", "a=y"], "two models are named a, expected different names"),
        (["m=x"], "two models are named m, expected different names"),
    ):
        with pytest.raises(UserError, match=why):
            named_adapters(places, ["m"])
    shutil.copytree(store / "a", tmp_path / "other")
    train_tokenizer(["another text " * 20], 270).save(tmp_path / "other" / "tokenizer.json")
    wide = write_model(tmp_path / "wide", mlp_width=48)
    for run, adapter, why in (
        (base, tmp_path / "other", "was trained with another tokenizer, .*other, expected that of the base"),
        (base, tmp_path / "none", "none has no adapter, expected adapter_config.json"),
        (wide, store / "a", "is an adapter of another model: it has in another shape"),
    ):
        with pytest.raises(UserError, match=why):
            main([f"m={run}", "--adapter", f"x={adapter}", "--port", "0", "--device", "cpu", "--threads", "1"])
    with pytest.raises(UserError, match="--allow-adapter-changes is 'nowhere', expected a folder"):
        main([f"m={base}", "--allow-adapter-changes", "nowhere", "--port", "0"])

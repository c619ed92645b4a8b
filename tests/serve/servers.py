"""A server in a thread of the test, with its engine in a process of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

from fastgpt.data import train_tokenizer
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights import save_pretrained
from fastgpt.serve.app import Part, build_app
from fastgpt.serve.command import listen
from fastgpt.serve.engine import Model
from fastgpt.serve.guard import Limits
from fastgpt.serve.served import Served, serve_model

TEXT = "the cat sat on the mat; ünïcödé ran to it\nand on. "
CONTEXT = 64


def write_model(folder: Path, seed: int = 0, context: int = CONTEXT, **options: Any) -> Path:
    """Write a random model and its tokenizer in the form of transformers."""
    tokenizer = train_tokenizer([TEXT * 20], 280)
    config = ModelConfig(
        n_layers=2, n_heads=2, width=32, vocab_size=tokenizer.n_vocab, vocab_multiple=1, block_size=context, **options
    )
    model = GPT(config, generator=torch.Generator().manual_seed(seed)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.mul_(4)  # so that the most likely token is far ahead
    save_pretrained(model, folder, extra={"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot})
    tokenizer.save(folder / "tokenizer.json")
    return folder


@contextmanager
def serving(
    models: dict[str, Served], limits: Limits, adapters: Path | None = None, parts: Sequence[Part] = ()
) -> Iterator[httpx.Client]:
    """Serve models while the block runs; yield a client."""
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(build_app(models, limits, adapters, parts), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60, transport=httpx.HTTPTransport(retries=5)) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()


@contextmanager
def server(folder: Path, queue: int = 64, limits: Limits | None = None, **options: Any) -> Iterator[tuple[Served, Any]]:
    """Serve one model, "m"; yield it and a client."""
    served = serve_model("m", Model(str(folder), device="cpu", threads=1, **options), queue)
    try:
        with serving({"m": served}, limits or Limits()) as client:
            yield served, client
    finally:
        served.link.close()


def until(true: Callable[[], bool]) -> None:
    """Wait until something is true, for a minute at most."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)

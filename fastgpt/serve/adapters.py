"""Adapters of a server: the options that name them, and the routes that load and unload them as vLLM's do."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import Field

from fastgpt.core.errors import UserError
from fastgpt.models.weights.peft import CONFIG, FILE
from fastgpt.serve.errors import ApiError
from fastgpt.serve.link import EngineDied, Refused
from fastgpt.serve.routes import Server
from fastgpt.serve.running import error_of
from fastgpt.serve.served import serve_adapter
from fastgpt.serve.strict import Strict


class LoadAdapter(Strict):
    """Body of /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096)
    base_model_name: str | None = None


class UnloadAdapter(Strict):
    """Body of /v1/unload_lora_adapter."""

    lora_name: str


def add_adapters(app: FastAPI, server: Server, within: Path) -> None:
    """Add the routes that load and unload adapters, of the first model unless a request names another one.

    Args:
        within: the folder from which adapters are loaded.
    """
    changing = asyncio.Lock()

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadAdapter) -> PlainTextResponse:
        name = body.lora_name
        async with changing:
            if name in server.models:
                raise ApiError(400, f"lora_name: {name!r} is served already, expected another name", param="lora_name")
            base = server.find(body.base_model_name)
            if base.adapter is not None or base.version is not None:
                kind = "an adapter" if base.adapter is not None else "a deployment, whose weights change"
                said = f"base_model_name: {base.name} is {kind}, expected a model"
                raise ApiError(400, said, param="base_model_name")
            folder = inside(within, body.lora_path)
            try:
                served = await asyncio.to_thread(serve_adapter, name, str(folder), base)
                await base.link.load_adapter(name, str(folder))
            except (UserError, Refused) as e:
                raise ApiError(400, str(e), param="lora_path") from None
            except EngineDied as e:
                raise error_of(e) from None
            server.models[name] = served
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadAdapter) -> PlainTextResponse:
        async with changing:
            served = server.find(body.lora_name)
            if served.adapter is None:
                raise ApiError(400, f"{served.name} is no adapter, expected the name of one", param="lora_name")
            del server.models[served.name]  # first: no further request names it
            try:
                await served.link.unload_adapter(served.adapter)
            except (EngineDied, Refused) as e:
                raise error_of(e) from None
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def inside(within: Path, path: str) -> Path:
    """Return the folder of an adapter, whose files are in the folder `within`, links followed.

    Raises:
        ApiError: it is elsewhere, or there is none.
    """
    try:
        folder = (within / path).resolve()
        files = [(place / file).resolve() for place in (folder, folder / "adapter") for file in (CONFIG, FILE)]
    except (OSError, ValueError, RuntimeError):  # a name with a null byte, a loop of links
        files = []
    if not files or not all(file.is_relative_to(within.resolve()) for file in (folder, *files)):
        raise ApiError(400, f"lora_path is not in {within}, expected an adapter there", param="lora_path")
    return folder

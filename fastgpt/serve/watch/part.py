"""Watching as a part of the application."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from fastapi import FastAPI

from fastgpt.serve.routes import Server
from fastgpt.serve.watch.settings import Watch
from fastgpt.serve.watch.watcher import Watcher


@dataclass
class Watching:
    """Watches the answers of a server, and finishes what waits when the server ends."""

    watch: Watch

    def add(self, app: FastAPI, server: Server) -> None:
        """Let the server's answers be seen."""
        watcher = server.watcher = Watcher(self.watch, server.metrics.registry)

        async def close_at_the_end() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.to_thread(watcher.close)

        server.background.append(close_at_the_end)

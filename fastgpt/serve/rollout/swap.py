"""Serve a deployment: start the engine of a version that was rolled out, switch to it, and end the old one when its
requests are answered. While both run, both models are in memory. A version that does not start changes nothing.

The state file is read each second. Calls that have found the old model keep it; the next ones find the new one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI
from prometheus_client import Gauge

from fastgpt.core.errors import UserError
from fastgpt.serve.rollout.state import State, is_deployment, read
from fastgpt.serve.routes import Server
from fastgpt.serve.served import Served

log = logging.getLogger("fastgpt")
Start = Callable[[str, str], Served]  # from the name and the path of a model
SECONDS = 1.0  # between looks at the state file
SECONDS_TO_DRAIN = 0.05  # between looks at an engine that ends


class Rollouts:
    """The deployments among the models of a server.

    Args:
        start: opens a model and starts its engine. Raises UserError.
    """

    def __init__(self, start: Start) -> None:
        self.start = start
        self.folders: dict[str, Path] = {}
        self.tried: dict[str, int] = {}  # name -> switches of the state that was last acted upon
        self.broken: dict[str, str] = {}  # name -> why the version to serve did not start
        self.said: dict[str, str] = {}  # name -> problem that was logged last
        self.draining: set[asyncio.Task[None]] = set()

    def open(self, name: str, path: str) -> Served:
        """Start a model, or the version that a deployment serves.

        Raises:
            UserError: it cannot be served.
        """
        if not is_deployment(path):
            return self.start(name, path)
        folder = Path(path)
        state = read(folder)
        self.folders[name], self.tried[name] = folder, state.switches
        return self._start(name, state)

    def add(self, app: FastAPI, server: Server) -> None:
        """Look after the deployments while the server runs."""
        if not self.folders:
            return
        registry = server.metrics.registry
        self.failed = Gauge(
            "fastgpt_rollout_failed", "1 if the version to serve did not start.", ["model"], registry=registry
        )
        self.version = Gauge("fastgpt_rollout_version", "Version that is served.", ["model"], registry=registry)
        for name in self.folders:
            self._show(server, name, "")
        server.background.append(lambda: self._watch(server))

    def _start(self, name: str, state: State) -> Served:
        version = state.current
        served = self.start(name, str(self.folders[name] / version.folder))
        served.version = version.number
        return served

    def _show(self, server: Server, name: str, problem: str) -> None:
        """Set the gauges, and log a problem that is new."""
        version = server.models[name].version
        self.failed.labels(name).set(bool(problem))
        self.version.labels(name).set(version or 0)
        if problem and problem != self.said.get(name):
            log.error("%s: the roll-out failed, version %s stays: %s", name, version, problem)
        self.said[name] = problem

    async def _watch(self, server: Server) -> None:
        try:
            while True:
                await asyncio.sleep(SECONDS)
                for name in self.folders:
                    await self._look(server, name)
        finally:
            for task in self.draining:
                task.cancel()
            await asyncio.gather(*self.draining, return_exceptions=True)

    async def _look(self, server: Server, name: str) -> None:
        """Switch one model if its deployment says so."""
        try:
            state = await asyncio.to_thread(read, self.folders[name])
        except UserError as e:  # it may be repaired
            self._show(server, name, str(e))
            return
        if state.switches != self.tried[name]:
            self.tried[name], self.broken[name] = state.switches, ""
            if state.current.number != server.models[name].version:
                try:
                    await self._switch(server, name, state)
                except Exception as e:  # whatever keeps a version from starting, the old one is served
                    self.broken[name] = str(e) or type(e).__name__
        self._show(server, name, self.broken.get(name, ""))

    async def _switch(self, server: Server, name: str, state: State) -> None:
        log.warning("%s: starting version %d", name, state.current.number)
        starting = asyncio.ensure_future(asyncio.to_thread(self._start, name, state))
        try:
            new = await asyncio.shield(starting)
        except asyncio.CancelledError:  # the server ends: so does the engine that starts
            await asyncio.to_thread((await starting).link.close)
            raise
        old, server.models[name] = server.models[name], new
        log.warning("%s: version %s is served, after version %s", name, new.version, old.version)
        task = asyncio.create_task(drain(old))
        self.draining.add(task)
        task.add_done_callback(self.draining.discard)


async def drain(old: Served) -> None:
    """End an engine when no call uses it any more, or when this is cancelled."""
    try:
        while old.held or old.link.load.requests:
            await asyncio.sleep(SECONDS_TO_DRAIN)
    finally:
        await asyncio.to_thread(old.link.close)

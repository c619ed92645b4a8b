"""Dask as the engine of a build: an existing cluster, or a local one of some processes.

The workers read the sources and write the work folder themselves, so all must see the same folders. Before every stage
and every task, a worker is asked for its fastgpt and for a file that this build has just written.
"""

from __future__ import annotations

import json
import logging
import os
import pydoc
import queue
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastgpt._version import __version__
from fastgpt.core.errors import UserError
from fastgpt.data.pipeline.engine import Result, Task, stage_bar

log = logging.getLogger("fastgpt")

DEATHS = 3  # workers that one task may kill before a build gives up
WAITING = 4096  # tasks that the scheduler holds at a time
PATIENCE = 60.0  # seconds without any worker before a build gives up
LOOPBACK = "127.0.0.1:0"  # where a local cluster serves its state; by default on every interface
POLL = 5.0  # seconds between looks at the workers while no task ends


class DaskEngine:
    """The workers of a Dask cluster. A context manager.

    Args:
        work: the build's work folder, which every worker must see under the same path.
        scheduler: address of a scheduler (tcp://host:8786), or the file that `dask scheduler --scheduler-file` wrote;
            without it, a local cluster of `count` processes.
        count: processes of the local cluster.
        show: display a progress bar for each stage.
    """

    def __init__(self, work: Path, scheduler: str | None = None, count: int = 1, show: bool = True) -> None:
        self.work, self.scheduler, self.count, self.show = work.absolute(), scheduler, count, show
        self._cluster: Any = None
        self._client: Any = None
        self._mark = self.work / f".dask-{secrets.token_hex(8)}"

    def __enter__(self) -> DaskEngine:
        """Connect. Raises UserError if Dask is not installed, or no scheduler answers."""
        try:
            import dask
            import distributed
        except ImportError:
            raise UserError("--engine dask needs Dask, which is not installed: pip install 'fastgpt[dask]'") from None
        dask.config.set({"distributed.scheduler.allowed-failures": DEATHS - 1})  # of a local cluster
        if self.scheduler is None:
            self._cluster = distributed.LocalCluster(
                n_workers=self.count,
                threads_per_worker=1,
                memory_limit=0,
                dashboard_address=LOOPBACK,
                worker_dashboard_address=LOOPBACK,
                silence_logs=logging.CRITICAL,
            )
        try:
            where = self._cluster or _address(self.scheduler or "")
            self._client = distributed.Client(where, set_as_default=False, timeout=PATIENCE)
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise UserError(
                f"no Dask scheduler answers at {self.scheduler} ({e}), expected an address such as tcp://host:8786 or "
                "the file of `dask scheduler --scheduler-file`"
            ) from None
        return self

    def __exit__(self, *error: Any) -> None:
        self._mark.unlink(missing_ok=True)
        for opened in (self._client, self._cluster):
            if opened is not None:
                opened.close()

    def run(
        self, stage: str, function: Callable[[Task], Result], tasks: Sequence[Task], sizes: Sequence[int]
    ) -> list[Result]:
        """Return function(task) for every task, in the order of the tasks; function and tasks must be picklable.

        sizes: bytes of each task, for the progress bar.
        Raises UserError if a worker has another fastgpt or does not see the work folder, if workers die repeatedly or
        all of them leave, or what the function raises.
        """
        results: dict[int, Result] = {}
        if tasks:
            self._check_workers()
        with stage_bar(stage, sum(sizes), self.show) as bar:
            for i, result in self._completed(stage, function, tasks):
                results[i] = result
                bar.update(sizes[i])
        return [results[i] for i in range(len(tasks))]

    def _completed(
        self, stage: str, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Result]]:
        """Yield (index, result) as tasks end."""
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        running: dict[Any, int] = {}
        unsent = list(range(len(tasks)))[::-1]
        try:
            while unsent or running:
                while unsent and len(running) < WAITING:
                    index = unsent.pop()
                    key = f"{stage}-{self._mark.name}-{index}"
                    future = self._client.submit(
                        call, function, tasks[index], __version__, self._mark, key=key, pure=False
                    )
                    running[future] = index
                    future.add_done_callback(done.put)
                future = self._next(stage, done)
                yield running.pop(future), self._result(stage, future)
        finally:
            self._client.cancel(list(running))

    def _next(self, stage: str, done: queue.SimpleQueue[Any]) -> Any:
        """Wait for a task to end and return its future. Raises UserError if there is no worker for a while."""
        last = time.monotonic()
        while True:
            try:
                return done.get(timeout=POLL)
            except queue.Empty:
                if self._workers():
                    last = time.monotonic()
                elif time.monotonic() > last + PATIENCE:
                    raise UserError(
                        f"{stage}: the cluster has no workers any more; start some and build again, what is done stays"
                    ) from None

    def _result(self, stage: str, future: Any) -> Any:
        from distributed import KilledWorker
        from distributed.client import FutureCancelledError

        try:
            return future.result()
        except KilledWorker:
            raise UserError(
                f"{stage}: workers were killed again and again at the same part, expected enough memory; use smaller "
                "parts (part_megabytes)"
            ) from None
        except FutureCancelledError:
            raise UserError(
                f"{stage}: the scheduler {self.scheduler or ''} is gone; build again, what is done stays"
            ) from None

    def _workers(self) -> dict[str, int]:
        """Return the threads of each worker; none if the scheduler does not answer."""
        try:
            found: dict[str, int] = self._client.nthreads()
        except OSError:
            return {}
        return found

    def _check_workers(self) -> None:
        """Raise UserError if there are no workers, or one of them cannot do the tasks of this build."""
        self._mark.touch()
        try:
            self._client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError:
            raise UserError(
                f"the scheduler at {self.scheduler} has no workers, expected some: dask worker {self.scheduler} "
                "--nthreads 1"
            ) from None
        for worker, threads in self._workers().items():
            if threads != 1:
                raise UserError(f"worker {worker} has {threads} threads, expected 1: start it with --nthreads 1")
        # functions of the standard library, which workers without fastgpt have too
        versions = self._client.run(pydoc.locate, "fastgpt._version.__version__", on_error="return")
        seen = self._client.run(os.path.exists, str(self._mark), on_error="return")
        for worker in versions.keys() & seen.keys():
            answers = versions[worker], seen[worker]
            if not any(isinstance(answer, Exception) for answer in answers):  # else it has died: its tasks move
                _check(worker, *answers, __version__, self.work)


def _address(scheduler: str) -> str:
    """Return the address that is given, or that stands in a scheduler's file, if it can be one: of an impossible one,
    distributed 2026.8 makes a client that waits for ever when Python ends."""
    from distributed.comm import get_address_host_port

    path = Path(scheduler)
    address = str(json.loads(path.read_text(encoding="utf-8"))["address"]) if path.is_file() else scheduler
    get_address_host_port(address, strict=True)
    return address


def call(function: Callable[[Task], Result], task: Task, version: str, mark: Path) -> Result:
    """Run a task in a worker. Raises UserError if the worker, which may have joined later, cannot do it."""
    from distributed import get_worker

    _check(get_worker().address, __version__, mark.exists(), version, mark.parent)
    return function(task)


def _check(worker: str, found: str | None, sees: bool, expected: str, work: Path) -> None:
    if found != expected:
        has = "no fastgpt" if found is None else f"fastgpt {found}"
        raise UserError(f"worker {worker} has {has}, expected {expected}, as here")
    if not sees:
        raise UserError(f"worker {worker} does not see {work}, expected a folder that all machines share")

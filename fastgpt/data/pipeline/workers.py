"""Worker processes: run one function over many tasks, survive the death of workers, report progress.

Every task writes its results under names that depend on its input alone, complete or not at all, so a task may run
twice. The result of a build therefore does not depend on the number of workers, on their order or on their deaths.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from fastgpt.core.device import return_freed_memory
from fastgpt.core.errors import UserError
from fastgpt.data.pipeline.engine import Result, Task, stage_bar

log = logging.getLogger("fastgpt")

DEATHS = 3  # deaths in a row without a finished task, after which a build gives up
SECONDS_TO_DIE = 10.0  # a process that waits for a disk may outlive SIGKILL for a while


class Workers:
    """A number of processes; with 1, tasks run in this process. A context manager.

    Args:
        count: number of processes.
        show: display a progress bar for each stage.
    """

    def __init__(self, count: int, show: bool = True) -> None:
        self.count, self.show = count, show
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop()

    def run(
        self, stage: str, function: Callable[[Task], Result], tasks: Sequence[Task], sizes: Sequence[int]
    ) -> list[Result]:
        """Return function(task) for every task, in the order of the tasks; function and tasks must be picklable.

        sizes: bytes of each task, for the progress bar.
        Raises UserError if workers die repeatedly, or what the function raises.
        """
        results: dict[int, Result] = {}
        alone = self.count == 1 or len(tasks) < 2
        outcomes = enumerate(map(function, tasks)) if alone else self._outcomes(stage, function, tasks)
        try:
            with stage_bar(stage, sum(sizes), self.show) as bar:
                for i, result in outcomes:
                    results[i] = result
                    bar.update(sizes[i])
        finally:
            self._stop()  # processes keep much of the memory that they have freed
        return_freed_memory()
        return [results[i] for i in range(len(tasks))]

    def _outcomes(
        self, stage: str, function: Callable[[Task], Result], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Result]]:
        """Yield (index, result) as tasks end."""
        waiting, unfinished, deaths = deque(range(len(tasks))), len(tasks), 0
        while unfinished:
            while len(self._workers) < min(self.count, unfinished):
                self._workers.append(_Worker())
            for worker in self._workers:
                if worker.index is None and waiting:
                    worker.give(waiting[0], function, tasks[waiting[0]])
                    waiting.popleft()
            for worker in _ready(self._workers):
                index, outcome = worker.index, worker.take()
                if outcome is None:
                    deaths += 1
                    self._bury(worker, stage, deaths)
                    waiting += [] if index is None else [index]  # last: it may be what kills them
                    continue
                assert index is not None
                result, error, trace = outcome
                if error is not None:
                    raise error from _InWorker(trace)
                deaths, unfinished = 0, unfinished - 1
                yield index, result

    def _bury(self, worker: _Worker, stage: str, deaths: int) -> None:
        """Remove a dead worker."""
        self._workers.remove(worker)
        worker.kill()
        if deaths == DEATHS:
            raise UserError(
                f"{stage}: workers were killed {DEATHS} times without finishing a part, expected enough "
                "memory; use fewer --workers or smaller parts (part_megabytes)"
            )
        log.warning("%s: a worker was killed; its parts are done again", stage)

    def _stop(self) -> None:
        """End the workers at once; what they were writing does not exist."""
        while self._workers:
            self._workers.pop().kill()


class _Worker:
    """A process that does one task at a time, and a pipe to it.

    Workers share no queue and no lock, which a killed one could leave locked or with half a message in it. Nobody else
    holds the far end of its pipe, so whenever it dies, also before it has begun and while it sends, the pipe ends and
    `take` returns None: no wait is for ever.
    """

    def __init__(self) -> None:
        methods = context()
        self.index: int | None = None  # of the task that it works on
        self.pipe: Connection
        self.pipe, end = methods.Pipe()
        self.process = methods.Process(target=_serve, args=(end, logging.getLogger().level), daemon=True)
        with closing(end), suppress(ConnectionError, EOFError):  # killed while it starts
            self.process.start()

    def give(self, index: int, function: Callable[[Task], Any], task: Task) -> None:
        self.index = index
        message = pickle.dumps((function, task))
        with suppress(OSError):  # it is dead
            self.pipe.send_bytes(message)

    def take(self) -> tuple[Any, Exception | None, str] | None:
        """Return the result, or the error and its traceback; None if the worker is dead."""
        self.index = None
        try:
            message = self.pipe.recv_bytes()
        except (EOFError, OSError):  # OSError: it died while it sent
            return None
        return pickle.loads(message)

    def kill(self) -> None:
        if self.process.pid is not None:
            self.process.kill()
            self.process.join(SECONDS_TO_DIE)
        self.pipe.close()


class _InWorker(Exception):
    """The traceback of an error in a worker, which an error loses on its way here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _ready(workers: Sequence[_Worker]) -> list[_Worker]:
    """Wait until some workers have finished or died, and return them."""
    found = wait([worker.pipe for worker in workers])
    return [worker for worker in workers if worker.pipe in found]


def context() -> Any:
    """Return the way in which workers start: never as a plain fork, which copies the locks of other threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["fastgpt.data.pipeline.stages"])
    return found


def _serve(pipe: Connection, level: int) -> None:
    """Do tasks until the pipe ends."""
    logging.getLogger().setLevel(level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            pipe.send_bytes(_outcome(pipe.recv_bytes()))


def _outcome(message: bytes) -> bytes:
    """Do a task; return its result, or its error and the error's traceback."""
    try:
        function, task = pickle.loads(message)
        return pickle.dumps((function(task), None, ""))
    except Exception as e:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(e))
        except Exception:  # not every error can be pickled
            return pickle.dumps((None, RuntimeError(repr(e)), trace))
        return pickle.dumps((None, e, trace))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

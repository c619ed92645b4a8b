"""Worker processes: run one function over many tasks, survive the death of workers, report progress.

Every task writes its results under names that depend on its input alone, complete or not at all, so a task may run
twice. The result of a build therefore does not depend on the number of workers, on their order or on their deaths.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from fastgpt.core.device import return_freed_memory
from fastgpt.core.errors import UserError
from fastgpt.data.pipeline.engine import Result, Task, stage_bar

log = logging.getLogger("fastgpt")

DEATHS = 3  # deaths in a row without a finished task, after which a build gives up


class Workers:
    """A number of processes; with 1, tasks run in this process. A context manager.

    Args:
        count: number of processes.
        show: display a progress bar for each stage.
    """

    def __init__(self, count: int, show: bool = True) -> None:
        self.count, self.show = count, show
        self._pool: ProcessPoolExecutor | None = None

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
        with stage_bar(stage, sum(sizes), self.show) as bar:
            if self.count == 1 or len(tasks) < 2:
                for i, task in enumerate(tasks):
                    results[i] = function(task)
                    bar.update(sizes[i])
            deaths = 0
            while len(results) < len(tasks):
                before = len(results)
                try:
                    for i, result in self._round(function, tasks, [i for i in range(len(tasks)) if i not in results]):
                        results[i] = result
                        bar.update(sizes[i])
                except BrokenProcessPool:
                    deaths = 1 if len(results) > before else deaths + 1
                    self._stop()
                    if deaths == DEATHS:
                        raise UserError(
                            f"{stage}: workers were killed {DEATHS} times without finishing a part, expected enough "
                            "memory; use fewer --workers or smaller parts (part_megabytes)"
                        ) from None
                    log.warning("%s: a worker was killed; its parts are done again", stage)
            self._end()
        return [results[i] for i in range(len(tasks))]

    def _round(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], waiting: list[int]
    ) -> Iterator[tuple[int, Result]]:
        """Yield (index, result) as tasks end. Raises BrokenProcessPool if a worker dies."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.count, context(), _initialise, (logging.getLogger().level,))
        running: dict[Future[Result], int] = {}
        try:
            while waiting or running:
                while waiting and len(running) < 2 * self.count:
                    index = waiting.pop(0)
                    running[self._pool.submit(function, tasks[index])] = index
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BaseException:
            self._stop()
            raise

    def _end(self) -> None:
        """Return the memory of a stage: processes keep much of what they have freed."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        return_freed_memory()

    def _stop(self) -> None:
        """End the workers at once; what they were writing does not exist."""
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            self._pool = None


def context() -> Any:
    """Return the way in which workers start: never as a plain fork, which copies the locks of other threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["fastgpt.data.pipeline.stages"])
    return found


def _initialise(level: int) -> None:
    logging.getLogger().setLevel(level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

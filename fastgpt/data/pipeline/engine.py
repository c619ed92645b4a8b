"""What runs the tasks of a build: processes of this machine (workers.py) or a Dask cluster (engine_dask.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from fastgpt.core import progress

Task = TypeVar("Task")
Result = TypeVar("Result")


class Engine(Protocol):
    """Runs one function over many tasks. A context manager, which ends what it has started.

    A task may run twice, at the same time too: its results have names that depend on its input alone, and are complete
    or absent. The result of a build therefore does not depend on the engine, its size or the deaths of its workers.

    Attributes:
        show: display progress bars.
    """

    show: bool

    def __enter__(self) -> Engine: ...

    def __exit__(self, *error: Any) -> None: ...

    def run(
        self, stage: str, function: Callable[[Task], Result], tasks: Sequence[Task], sizes: Sequence[int]
    ) -> list[Result]:
        """Return function(task) for every task, in the order of the tasks; function and tasks must be picklable.

        sizes: bytes of each task, for the progress bar.
        Raises UserError if workers die repeatedly, or what the function raises.
        """
        ...


@contextmanager
def stage_bar(stage: str, total: int, show: bool) -> Iterator[Any]:
    """Yield the progress bar of a stage of `total` bytes; it displays nothing unless `show` is set, on a terminal."""
    if not show or not total:
        yield progress.NoBar(total)
        return
    bar = progress.bar(total, unit="B", unit_scale=True, desc=stage, disable=not sys.stderr.isatty())
    try:
        yield bar
    finally:
        bar.close()

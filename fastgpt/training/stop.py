"""Handle Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
from types import TracebackType
from typing import Any


class Stop:
    """Context where Ctrl-C and SIGTERM set `asked` instead of ending the process; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

"""tqdm progress bars; if tqdm is not installed, a run reports it once and continues without them."""

from __future__ import annotations

import functools
import sys
from typing import Any


class NoBar:
    """A stand-in with the tqdm methods that a run calls; it displays nothing."""

    def __init__(self, total: int | None = None, initial: int = 0) -> None:
        self.total, self.n = total, initial

    def update(self, n: int = 1) -> None:
        self.n += n

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass

    def close(self) -> None:
        pass


@functools.cache
def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar: tqdm is not installed", file=sys.stderr)
        return None
    return tqdm


def bar(total: int | None, initial: int = 0, **options: Any) -> Any:
    """Return a tqdm bar with these options, or a NoBar."""
    tqdm = _tqdm()
    return NoBar(total, initial) if tqdm is None else tqdm(total=total, initial=initial, **options)


def write(text: str) -> None:
    """Print a line above the bars of a terminal."""
    tqdm = _tqdm()
    print(text, flush=True) if tqdm is None else tqdm.write(text)

"""Send a run's figures to TensorBoard, trackio or Weights & Biases. A tracker that fails never ends a run."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError

log = logging.getLogger("fastgpt")
Log = Callable[[dict[str, float], int], None]  # figures, step


def _tensorboard(folder: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def put(row: dict[str, float], step: int) -> None:
        for name, value in row.items():
            writer.add_scalar(name, value, step)

    return put, writer.close


def _wandb(folder: Path, config: dict[str, Any], package: str = "wandb") -> tuple[Log, Callable[[], None]]:
    module = importlib.import_module(package)
    where = {"dir": str(folder), "id": folder.name, "resume": "allow"} if package == "wandb" else {"resume": "allow"}
    run = module.init(project="fastgpt", name=folder.name, config=config, **where)
    return lambda row, step: run.log(row, step=step), run.finish


def _trackio(folder: Path, config: dict[str, Any]) -> tuple[Log, Callable[[], None]]:
    return _wandb(folder, config, "trackio")  # its interface is that of wandb, by design


TRACKERS = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}


class Trackers:
    """The trackers in `names`, started for a run folder. If one of them raises, the error is logged and the tracker is
    dropped.

    Raises:
        UserError: the package of a tracker is not installed.
    """

    def __init__(self, names: list[str], folder: Path, config: dict[str, Any]) -> None:
        self.live: dict[str, tuple[Log, Callable[[], None]]] = {}
        for name in names:
            try:
                self.live[name] = TRACKERS[name](folder, config)
            except ImportError as e:
                raise UserError(f"track: {name} is not installed ({e}); pip install {name}") from e
            except Exception as e:  # network, login, disk: no reason to end the run
                log.warning(
                    "track: %s failed to start (%s: %s); the run continues without it", name, type(e).__name__, e
                )

    def put(self, row: dict[str, Any]) -> None:
        """Send the figures of one step; `row` has "step"."""
        figures = {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float)}
        self._each(lambda name: self.live[name][0](figures, int(row["step"])))

    def close(self) -> None:
        self._each(lambda name: self.live[name][1]())

    def _each(self, call: Callable[[str], None]) -> None:
        for name in list(self.live):
            try:
                call(name)
            except Exception as e:  # as above
                log.warning("track: %s failed (%s: %s); the run continues without it", name, type(e).__name__, e)
                del self.live[name]

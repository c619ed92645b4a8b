"""Run by torchrun: train; in process 1 of the first attempt, fail at the validation of a step.

broken_train.py none|raise|refuse|kill STEP ARGUMENTS...
"""

import os
import signal
import sys
from typing import Any

from fastgpt import train
from fastgpt.core.command import run_command
from fastgpt.core.errors import UserError
from fastgpt.training.run import Run


def fails(kind: str, step: int) -> Any:
    """Return an evaluation that fails at a step."""

    def evaluate(run: Run) -> dict[str, float]:
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if run.mesh.rank == 1 and run.progress.step == step and first:
            if kind == "raise":
                raise ValueError("a fault of process 1")
            if kind == "refuse":
                raise UserError("process 1 wants other settings")
            os.kill(os.getpid(), signal.SIGKILL)
        return {"rank": 0.0}

    return evaluate


def main() -> int:
    kind, step, *arguments = sys.argv[1:]
    if kind != "none":
        train.EVALUATIONS["broken"] = fails(kind, int(step))
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))

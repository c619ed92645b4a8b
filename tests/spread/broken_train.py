"""Run by torchrun: train; in process 1 of the first attempt, fail at the validation of a step, or (write) be killed
while it writes its shards of the checkpoint of that step.

broken_train.py none|raise|refuse|kill|write STEP ARGUMENTS...
"""

import os
import signal
import sys
from typing import Any

from fastgpt import train
from fastgpt.core.command import run_command
from fastgpt.core.errors import UserError
from fastgpt.training.checkpoint import Draft
from fastgpt.training.run import Run


def failing() -> bool:
    return os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"


def killed_in_write(step: int) -> Any:
    """Return a `write` of a checkpoint that writes a part of a file and is killed, at a step."""
    write = Draft.write

    def part(draft: Draft, name: str, *arguments: Any) -> Any:
        if failing() and draft.step == step:
            (draft.aside / name).write_bytes(bytes(9))
            os.kill(os.getpid(), signal.SIGKILL)
        return write(draft, name, *arguments)

    return part


def fails(kind: str, step: int) -> Any:
    """Return an evaluation that fails at a step."""

    def evaluate(run: Run) -> dict[str, float]:
        if failing() and run.progress.step == step:
            if kind == "raise":
                raise ValueError("a fault of process 1")
            if kind == "refuse":
                raise UserError("process 1 wants other settings")
            os.kill(os.getpid(), signal.SIGKILL)
        return {"rank": 0.0}

    return evaluate


def main() -> int:
    kind, step, *arguments = sys.argv[1:]
    if kind == "write":
        Draft.write = killed_in_write(int(step))  # type: ignore[method-assign]
    elif kind != "none":
        train.EVALUATIONS["broken"] = fails(kind, int(step))
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))

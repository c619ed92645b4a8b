"""Run by torchrun: train; in process 1 of the first attempt, fail at the validation of a step. The main process prints
how often gradients were reduced.

    broken_train.py none|raise|refuse|kill STEP ARGUMENTS...
"""

import functools
import json
import os
import signal
import sys
from typing import Any

import torch.distributed as dist

from fastgpt import train
from fastgpt.core.command import run_command
from fastgpt.core.errors import UserError
from fastgpt.distributed import parallelize
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


def counted(owner: Any, name: str, calls: list[str]) -> None:
    """Count the calls of a function in `calls`."""
    function = getattr(owner, name)

    @functools.wraps(function)  # DDP looks at the arguments of its hook
    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*arguments, **options)

    setattr(owner, name, counting)


def main() -> int:
    kind, step, *arguments = sys.argv[1:]
    if kind != "none":
        train.EVALUATIONS["broken"] = fails(kind, int(step))
    calls: list[str] = []
    counted(parallelize, "sum_bucket", calls)
    before = "reduce_scatter_tensor"  # of PyTorch before 2.13
    counted(dist, "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else before, calls)
    code = train.main(arguments)
    if os.environ["RANK"] == "0":
        print(json.dumps({"reductions": len(calls)}), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(run_command(main))

"""`fastgpt finetune`: settings, then a run of the loop in fastgpt/train.py with a task of fastgpt/finetune."""

from __future__ import annotations

import shlex
import sys

from fastgpt.core import backend
from fastgpt.finetune.config import load_config
from fastgpt.finetune.pairs.command import main as make_pairs
from fastgpt.finetune.plan import lines_of
from fastgpt.finetune.run import end, prepare
from fastgpt.train import drive


def main(argv: list[str]) -> int:
    """Run `fastgpt finetune` with settings from `argv`, or plan it (--plan); return the exit code. `make-pairs` makes
    data instead, see pairs/command.py."""
    if argv[:1] == ["make-pairs"]:
        return make_pairs(argv[1:])
    cfg = load_config([word for word in argv if word != "--plan"])
    if "--plan" in argv:
        print(*lines_of(cfg), sep="\n")
        return 0
    backend.use(**backend.parse_choices(cfg.kernels))
    again = [] if cfg.resume == "auto" else ["--resume", "auto"]
    return drive(prepare(cfg), end, shlex.join(["fastgpt", "finetune", *sys.argv[2:], *again]))

"""A model of every kernel and of a training step on A100, H100 and H200, without a GPU: `fastgpt bench model`.

Each kernel's machine code, its launch in the step and the published rates of the chip give a lower bound in time, and
the unit that sets it (docs/step-budget.md). Matrix products and the library's attention are estimates with named
constants. Everything printed is modelled, not measured.

    fastgpt bench model --chip H200 --shape gpt2-124m
    fastgpt bench model --chip H200 --shape llama-1b 4x4096 --only norm
    fastgpt bench model --source ../other-checkout --json after.jsonl     (that checkout's kernels and step, this model)
    fastgpt bench model --json now.jsonl --compare before.jsonl
    fastgpt bench model --chip A100 --sweep attention                     (launch shapes of its Triton kernels, by time)
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastgpt.core.command import Parser, run_command
from fastgpt.core.errors import UserError
from fastgpt.core.folders import write_text

CHIPS = ("A100", "H100", "H200")
HERE = "here"  # the GPU of this machine
MODELS = ("gpt2-124m", "llama-1b")
# Runs this model over another checkout, older or newer: its fastgpt comes first, and only this package and the modules
# that it runs compilers with are replaced.
BESIDE = """
import importlib, importlib.util, sys
source, here = sys.argv[1:3]
sys.path.insert(0, source)
def replace(name, file, folders=None):
    above, _, last = name.rpartition(".")
    spec = importlib.util.spec_from_file_location(name, here + file, submodule_search_locations=folders)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    setattr(importlib.import_module(above), last, module)
    spec.loader.exec_module(module)
replace("fastgpt.core.cache", "/fastgpt/core/cache.py")
replace("fastgpt.checks.cuda", "/fastgpt/checks/cuda.py")
replace("fastgpt.bench.codegen", "/bench/codegen.py")
replace("fastgpt.bench.model", "/bench/model/__init__.py", [here + "/bench/model"])
from fastgpt.core.command import run_command
from fastgpt.bench.model.command import main
sys.exit(run_command(lambda: main(sys.argv[3:])))
"""


def options() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="fastgpt bench model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", nargs="+", choices=[*CHIPS, HERE], default=list(CHIPS), help="default: all three")
    parser.add_argument(
        "--shape", nargs="+", default=list(MODELS), metavar="SHAPE",
        help=f"{', '.join(MODELS)}, or BxT for another batch and length of them (default: both models)",
    )  # fmt: skip
    parser.add_argument("--only", metavar="EXPR", help="kernels and ops to list: a regular expression in their names")
    parser.add_argument(
        "--kernels", action="append", metavar="OP=BACKEND,...",
        help="backends, as in the trainer; may be repeated for several steps (default: auto, then attention=triton)",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="a setting of the trainer that is a flag or a text, as in epilogues=true; may be repeated",
    )  # fmt: skip
    parser.add_argument("--peers", action="store_true", help="also compare single ops with Liger's and PyTorch's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file, as JSON lines")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write tables and plots to this file, as HTML")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="print the steps beside those of these rows")
    parser.add_argument("--source", type=Path, metavar="DIR", help="another checkout, whose kernels and step to model")
    parser.add_argument("--sweep", choices=("attention",), help="launch shapes of these kernels instead of steps")
    return parser


def sizes_of(shapes: list[str]) -> tuple[list[str], tuple[int, int] | None]:
    """Return the models that were named (both if none was) and batch and length, if given as BxT.

    Raises:
        UserError: a shape that is neither.
    """
    models = [s for s in shapes if s in MODELS]
    rest = [s for s in shapes if s not in MODELS]
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", s) for s in rest]
    if len(rest) > 1 or not all(found):
        wrong = next((s for s, f in zip(rest, found) if f is None), " ".join(rest))
        raise UserError(f"model: --shape is {wrong!r}, expected {', '.join(MODELS)}, and at most one BxT, as in 8x2048")
    size = (int(found[0][1]), int(found[0][2])) if found and found[0] else None
    return models or list(MODELS), size


def settings_of(words: list[str]) -> dict[str, Any]:
    """Return the settings that were given as NAME=VALUE.

    Raises:
        UserError: it is not of this form, or no setting of the trainer that is a flag or a text.
    """
    from fastgpt.training.config import TrainConfig

    kinds = {f.name: type(f.default) for f in dataclasses.fields(TrainConfig)}
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if kinds.get(name) not in (bool, str) or (kinds[name] is bool and value not in ("true", "false")):
            raise UserError(f"model: --set is {word!r}, expected NAME=VALUE, as in graphs=false, of a flag or a text")
        found[name] = value == "true" if kinds[name] is bool else value
    return found


def chips_of(names: list[str]) -> list[str]:
    """Return the chips by name, each once; "here" is the GPU of this machine.

    Raises:
        UserError: this machine has none of them.
    """
    import torch

    device = torch.cuda.get_device_name() if HERE in names and torch.cuda.is_available() else "no GPU"
    here = next((chip for chip in CHIPS if chip in device), None)
    if HERE in names and here is None:
        raise UserError(f"model: --chip here is {device}, expected {', '.join(CHIPS)}")
    return list(dict.fromkeys(here if name == HERE and here else name for name in names))


def of_source(source: Path, argv: list[str]) -> int:
    """Run this model over another checkout in a process of its own.

    Raises:
        UserError: the folder is not a checkout.
    """
    if not (source / "csrc").is_dir() or not (source / "fastgpt").is_dir():
        raise UserError(f"model: --source is {source}, expected a checkout of fastgpt, with csrc and fastgpt")
    command = [sys.executable, "-c", BESIDE, str(source.resolve()), str(Path(__file__).resolve().parents[2]), *argv]
    return subprocess.run(command).returncode


def without(argv: list[str], option: str) -> list[str]:
    """Return arguments without an option and its value."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != option and not word.startswith(option + "="):
            kept.append(word)
        skip = word == option
    return kept


def read(path: Path) -> list[dict[str, Any]]:
    """Read rows that --json wrote.

    Raises:
        UserError: the file cannot be read, or has other lines.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(row["bench"] == "model" for row in rows):
            raise ValueError("not rows of the model")
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(f"model: {path} could not be read ({e}), expected a file that --json wrote") from e
    return rows


def check(args: argparse.Namespace) -> None:
    """Raise UserError for what would fail after minutes."""
    import fastgpt.ops  # noqa: F401 (fills the registry)
    from fastgpt.core import backend

    sizes_of(args.shape)
    settings_of(args.set)
    args.chip = chips_of(args.chip)
    try:
        re.compile(args.only or "")
    except re.error as e:
        raise UserError(f"model: --only is {args.only!r}, expected a regular expression ({e})") from e
    for choice in args.kernels or ():
        with backend.use(**({} if choice == "auto" else backend.parse_choices(choice))):
            pass  # it knows which names exist
    for file in (args.json, args.page):
        if file is not None and not file.resolve().parent.is_dir():
            raise UserError(f"model: {file} is in no folder that exists, expected one")
    if importlib.util.find_spec("triton") is None:
        raise UserError("model: Triton is not installed, expected it: its compiler and disassembler are used")
    import triton

    if triton.knobs.runtime.interpret:
        raise UserError("model: TRITON_INTERPRET is set, so nothing would be compiled; unset it")


def main(argv: list[str] | None = None) -> int:
    """Print the model's tables, write its rows and its page."""
    argv = sys.argv[1:] if argv is None else argv
    args = options().parse_args(argv)
    if args.source is not None:  # it knows other settings and ops
        return of_source(args.source, without(argv, "--source"))
    check(args)
    before = [] if args.compare is None else read(args.compare)
    from fastgpt.bench._harness import append_rows
    from fastgpt.bench.model import tables
    from fastgpt.bench.model.run import run, swept

    rows = swept(args.chip) if args.sweep else run(args, *sizes_of(args.shape), settings_of(args.set))
    print(tables.text(rows, args.only or ""))
    if before:
        print(tables.compared(before, rows))
    if args.json is not None:
        append_rows(args.json, rows)
    if args.page is not None:
        write_text(args.page, tables.page_of(rows, args.only or ""))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

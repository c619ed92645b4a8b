"""Code shared by all fastgpt commands: argument parser, checked numbers, one-sentence errors with exit code 2."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from fastgpt.core.errors import UserError


def run_command(command: Callable[[], int]) -> int:
    """Run a command; a UserError, or an OSError about a file, becomes one line on stderr and exit code 2, without a
    traceback."""
    try:
        from fastgpt.core.backend import check_environment  # here: the import of PyTorch may be interrupted

        check_environment()
        return command()
    except UserError as e:
        print(f"fastgpt: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastgpt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's own flush is quiet
        return 1
    except OSError as e:  # a file that may not be read, a folder that may not be written, a full disk
        if e.filename is None:
            raise
        print(f"fastgpt: error: cannot use {os.fsdecode(e.filename)}: {e.strerror}", file=sys.stderr)
        return 2


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in fastgpt's format."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): is ", r"\1 is ", message)
        raise UserError(f"{self.prog.split()[-1]}: {message} (see {self.prog} --help)")


def number(kind: type, least: float, most: float = math.inf, open_least: bool = False) -> Callable[[str], Any]:
    """Return a `type` for argparse: a whole (int) or finite (float) number from least to most; open_least: more than
    least."""
    what = "a whole number" if kind is int else "a number"
    bounds = f"more than {least:g}" if open_least else f"{least:g} or more"
    bounds = f"{bounds}, at most {most:g}" if most < math.inf else bounds

    limit = 2**63 if kind is int else math.inf

    def read(text: str) -> Any:
        try:
            value = kind(text)
            right = (least < value if open_least else least <= value) and value <= most and value < limit
        except (ValueError, OverflowError):
            right = False
        if not right:
            raise argparse.ArgumentTypeError(f"is {text!r}, expected {what}, {bounds}")
        return value

    return read


# name of a subcommand -> module, or module:function (default: main), and what it does
Subcommands = Mapping[str, tuple[str, str]]


def listed(subcommands: Subcommands) -> str:
    """Return a line of help for each subcommand."""
    width = max(map(len, subcommands))
    return "\n".join(f"  {name:<{width}}  {about}" for name, (_, about) in subcommands.items())


def run_group(prog: str, arguments: str, about: str, subcommands: Subcommands, argv: list[str]) -> int:
    """Run a command that only has subcommands, whose first argument names one of them.

    Args:
        arguments: what follows the name, for the usage.
        about: what the help says before the list of subcommands.
    """
    parser = Parser(
        prog=prog,
        usage=f"{prog} [-h] COMMAND {arguments}",
        description=f"{about}\n{listed(subcommands)}\n\n`{prog} COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=subcommands, help=argparse.SUPPRESS)
    return run_subcommand(subcommands, parser.parse_args(argv[:1]).command, argv[1:])


def run_subcommand(subcommands: Subcommands, name: str, argv: list[str]) -> int:
    """Import a subcommand, run it with `argv`, and return its exit code."""
    module, _, function = subcommands[name][0].partition(":")
    return int(getattr(importlib.import_module(module), function or "main")(argv))

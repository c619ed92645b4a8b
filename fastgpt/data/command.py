"""The command `fastgpt data`; SUBCOMMANDS lists what it can do, each with its own module and options."""

from __future__ import annotations

import argparse
import importlib

from fastgpt.core.command import Parser

# name -> module whose main(argv) runs it, and what it does
SUBCOMMANDS = {
    "validate": (
        "fastgpt.data.read.validate",
        "list the defects of files: line, byte, what is wrong, how to repair it",
    ),
}


def main(argv: list[str]) -> int:
    """Run `fastgpt data`."""
    width = max(map(len, SUBCOMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {about}" for name, (_, about) in SUBCOMMANDS.items())
    parser = Parser(
        prog="fastgpt data",
        usage="fastgpt data [-h] COMMAND ...",
        description="Make token shards from raw text, and check it.\n\ncommands:\n"
        f"{listed}\n\n`fastgpt data COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=SUBCOMMANDS, help=argparse.SUPPRESS)
    module, _ = SUBCOMMANDS[parser.parse_args(argv[:1]).command]
    return int(importlib.import_module(module).main(argv[1:]))

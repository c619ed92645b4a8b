"""What the command lines of all benchmarks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgpt.core.command import Parser
from fastgpt.core.device import default_device
from fastgpt.core.errors import UserError


def command_line(name: str, about: str | None, **options: Any) -> Parser:
    """The parser of `fastgpt bench NAME` with what every benchmark takes: --device and --json."""
    parser = Parser(prog=f"fastgpt bench {name}", description=about, **options)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    return parser


def device_of(parser: Parser, name: str) -> torch.device:
    """--device, made the current one where it is a GPU; or the parser's error."""
    try:
        device = default_device(name)
    except UserError as e:
        parser.error(f"--{e}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device

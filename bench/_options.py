"""Shared parts of all benchmarks' command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgpt.core.command import Parser
from fastgpt.core.device import default_device
from fastgpt.core.errors import UserError


def command_line(name: str, about: str | None, **options: Any) -> Parser:
    """Return the parser of `fastgpt bench NAME` with the options of every benchmark: --device and --json."""
    parser = Parser(prog=f"fastgpt bench {name}", description=about, **options)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows to this file")
    return parser


def device_of(parser: Parser, name: str) -> torch.device:
    """Return --device, and make it the current device if it is a GPU; exit with the parser's error if it is invalid."""
    try:
        device = default_device(name)
    except UserError as e:
        parser.error(f"--{e}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device

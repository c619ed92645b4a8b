"""Defect: one fault of an input file, with its place, what is wrong and how to repair it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fastgpt.core.errors import UserError

Mode = Literal["fail", "skip", "replace"]
MODES = ("fail", "skip", "replace")


@dataclass(frozen=True, slots=True)
class Defect:
    """One fault of an input file. It never holds contents of the file.

    Attributes:
        file: path of the file.
        line: physical line from 1; None in parquet, or if the file as a whole is meant.
        byte: offset from 0; None as above. Both count in the decompressed text if `decompressed`.
        problem: what is wrong.
        remedy: how to repair it.
        kind: short name of the problem, to count by.
        decompressed: whether the file is compressed.
        row: in parquet, from 0.
    """

    file: str
    line: int | None
    byte: int | None
    problem: str
    remedy: str
    kind: str
    decompressed: bool = False
    row: int | None = None

    def __str__(self) -> str:
        place = self.file
        if self.row is not None:
            place += f", row {self.row}"
        if self.line is not None:
            place += f", line {self.line}"
        if self.byte is not None:
            place += f", byte {self.byte}" + (" of the decompressed text" if self.decompressed else "")
        return f"{place}: {self.problem}; {self.remedy}"


OnDefect = Callable[[Defect], None]


class DefectError(UserError):
    """The first defect met in mode "fail"."""

    def __init__(self, defect: Defect) -> None:
        super().__init__(str(defect))
        self.defect = defect


def need(module: str, purpose: str, package: str | None = None) -> Any:
    """Import an optional package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        name = package or module
        raise UserError(
            f"{purpose} needs {name}, which is not installed: pip install {name} (or pip install 'fastgpt[data]')"
        ) from None

"""Numerical parity of every op, backend, dtype and layout with the fp64 reference, by one rule (rule.py).

`fastgpt parity` prints the table, worst ratio first, and exits 1 on a ratio over 1 or a cell without a case (table.py).
The tests run the same cases one by one.

To add an op, add a module with its name and `SUBJECT = Subject(...)` here. rule.py documents Subject, and swiglu.py is
the shortest example. The registry finds the module.
"""

from fastgpt.parity.command import main, missing_cells, run_all
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import (
    BACKWARD,
    FORWARD,
    GRAD_LAYOUTS,
    LAYOUTS,
    MATRIX_LAYOUTS,
    REPEATED,
    SHIFTS,
    VECTOR_LAYOUTS,
    Case,
    Outputs,
    Row,
    Subject,
    Variant,
    allowed_error,
    largest_error,
    moved,
    sensitivities,
)
from fastgpt.parity.table import (
    SUBJECTS,
    backends_here,
    cases,
    check,
    compare,
    expected,
    layouts,
    takes,
)

__all__ = [
    "BACKWARD",
    "FORWARD",
    "GRAD_LAYOUTS",
    "LAYOUTS",
    "MATRIX_LAYOUTS",
    "REPEATED",
    "SHIFTS",
    "SUBJECTS",
    "Case",
    "Inputs",
    "Outputs",
    "Row",
    "Subject",
    "VECTOR_LAYOUTS",
    "Variant",
    "allowed_error",
    "backends_here",
    "cases",
    "check",
    "compare",
    "expected",
    "largest_error",
    "layouts",
    "main",
    "missing_cells",
    "moved",
    "run_all",
    "sensitivities",
    "takes",
]

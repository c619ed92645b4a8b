"""The table of `fastgpt parity`: every case of every op on every backend, worst ratio to the bound first."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt import ops  # noqa: F401 (fills the registry)
from fastgpt.core import backend
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import (
    FP64_NOISE,
    REDRAWS,
    REPEATED,
    SHIFTS,
    Case,
    Outputs,
    Row,
    Subject,
    allowed_error,
    largest_error,
)

SUBJECTS: dict[str, Subject] = {op: importlib.import_module(f"fastgpt.parity.{op}").SUBJECT for op in backend.ops()}


@dataclass(frozen=True)
class Expected:
    """The expected results of one case for every backend: the exact outputs and, by name of the output, the error of
    PyTorch's op and (for fp32 outputs) the sensitivity to rounding of the inputs."""

    truth: Outputs
    torch_errors: dict[str, float]
    sensitivities: dict[str, float]


def expected(case: Case, device: str = "cpu") -> Expected:
    """Run the reference in fp64 and the baseline, once for all backends.

    Raises:
        AssertionError: the reference and the baseline differ in their outputs.
    """
    truth, baseline = _truth_and_baseline(case, device)
    errors = {name: largest_error(t, truth[name]) for name, t in baseline.items()}
    if {case.layout, case.grad_layout} & set(REPEATED) and case.dtype != torch.float32:
        for draw in range(1, REDRAWS + 1):
            _redraw(errors, truth, dataclasses.replace(case, seed=case.seed + 1000 * draw), device)
    single = [name for name, t in baseline.items() if t.dtype == torch.float32 and t.numel()]
    sensitivities = dict.fromkeys(truth, 0.0)
    for shift in range(1, SHIFTS + 1 if single else 1):
        moved = _reference(case, device, shift)
        for name in single:
            sensitivities[name] = max(sensitivities[name], largest_error(moved[name], truth[name]))
    return Expected(truth, errors, sensitivities)


def _reference(case: Case, device: str, shift: int = 0) -> Outputs:
    subject, torch_backend = SUBJECTS[case.op], {case.op: "torch"}
    with backend.use(**torch_backend):  # type: ignore[arg-type]
        return subject.run(case, subject.reference, Inputs(case, device, wide=True, shift=shift))


def _truth_and_baseline(case: Case, device: str) -> tuple[Outputs, Outputs]:
    subject = SUBJECTS[case.op]
    baseline, truth = subject.run(case, subject.torch, Inputs(case, device, wide=False)), _reference(case, device)
    assert truth.keys() == baseline.keys(), (baseline.keys(), truth.keys())
    return truth, baseline


def _redraw(errors: dict[str, float], truth: Outputs, case: Case, device: str) -> None:
    """Raise the errors of 16-bit outputs to those of another draw, relative to the scale of its result."""
    other, baseline = _truth_and_baseline(case, device)
    for name, t in baseline.items():
        scales = [float(exact[name].detach().abs().max()) if exact[name].numel() else 0.0 for exact in (truth, other)]
        if t.dtype != torch.float32 and scales[1] > FP64_NOISE:
            errors[name] = max(errors[name], largest_error(t, other[name]) * scales[0] / scales[1])


def compare(case: Case, name: str, wanted: Expected, device: str = "cpu") -> list[Row]:
    """Run one case on one backend; return a row for each output and for each input that was overwritten or overrun.

    Raises:
        AssertionError: an output's shape is not the reference's.
    """
    subject = SUBJECTS[case.op]
    choice: dict[str, Any] = {case.op: name}
    with backend.use(strict=True, **choice):
        inputs = Inputs(case, device, wide=False)
        ours = subject.run(case, subject.ours, inputs)
    assert ours.keys() == wanted.truth.keys(), (ours.keys(), wanted.truth.keys())
    dtype = str(case.dtype).split(".")[1]
    rows = [
        Row(case.op, name, dtype, case.layouts, str(case), what + " overwritten", math.inf, 0.0, 0.0)
        for what in inputs.harmed()
    ]
    for output, exact in wanted.truth.items():
        got, torch_error, sensitivity = ours[output], wanted.torch_errors[output], wanted.sensitivities[output]
        assert got.shape == exact.shape, f"{case} {output}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
        limit = allowed_error(output, exact, torch_error, got.dtype, sensitivity)
        error = largest_error(got, exact)
        rows.append(Row(case.op, name, dtype, case.layouts, str(case), output, error, torch_error, limit, sensitivity))
    return rows


def check(case: Case, name: str, device: str = "cpu") -> list[Row]:
    """Return the rows of one case on one backend."""
    return compare(case, name, expected(case, device), device)


def layouts(op: str) -> list[tuple[str, str]]:
    """Return every pair of an input layout and an upstream gradient layout of the op."""
    return list(itertools.product(SUBJECTS[op].layouts, SUBJECTS[op].grad_layouts))


def cases(op: str) -> Iterator[Case]:
    """Yield every case of an op once, for all kernel dtypes: the base shapes in the layouts, then the variants."""
    yield from dict.fromkeys(_cases(op))


def _cases(op: str) -> Iterator[Case]:
    subject = SUBJECTS[op]
    for dtype in backend.KERNEL_DTYPES:
        for i, (shape, options) in enumerate(subject.bases(dtype)):
            for layout, grad_layout in layouts(op):
                if i == 0 or ("contiguous" in (layout, grad_layout) and not {layout, grad_layout} & set(REPEATED)):
                    yield Case(op, dtype, layout, shape, tuple(options.items()), grad_layout)
        for shape, options in subject.variants(dtype):
            yield Case(op, dtype, "contiguous", shape, tuple(options.items()))


def backends_here(op: str) -> list[str]:
    """Return the kernel backends of `op` that run on this machine; on a CPU also those that are simulated."""
    on_gpu = torch.cuda.is_available()
    names = [b for b in backend.ops()[op] if b != "torch" and backend.missing(b) is None]
    return [b for b in names if (backend.DEVICE_OF[b] == "cuda") == on_gpu or backend.simulated(b)]


def takes(name: str, case: Case) -> bool:
    """Return whether this backend has a kernel for the dtype of the case."""
    return backend.ops()[case.op][name].takes(case.dtype, 0)

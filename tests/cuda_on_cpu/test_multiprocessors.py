"""Kernels that sum over rows have as many blocks as a device has room for: only the rounding may depend on it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastgpt import parity
from fastgpt.core import backend

if importlib.util.find_spec("pybind11") is None or shutil.which("g++") is None:
    pytest.skip("needs pybind11 and g++", allow_module_level=True)
if not backend.simulated("cuda"):
    pytest.skip("the emulation is not this process's backend", allow_module_level=True)

F32 = torch.float32
NORM = (("residual", True), ("x_bias", True))
CASES = {
    "layer_norm": parity.Case("layer_norm", F32, "contiguous", (67, 128), NORM),
    "rms_norm": parity.Case("rms_norm", F32, "contiguous", (67, 128), NORM),
    "wide layer_norm": parity.Case("layer_norm", F32, "contiguous", (67, 2081), NORM),
    "bias_gelu": parity.Case("bias_gelu", F32, "contiguous", (200, 128)),
}


@pytest.fixture
def device() -> Iterator[Any]:
    emulated = ctypes.CDLL(os.environ["FASTGPT_EMULATED_CUDA"])
    yield emulated
    emulated.fastgpt_set_multiprocessors(1)


@pytest.mark.parametrize("name", CASES)
def test_sums_over_rows_on_one_and_on_three_multiprocessors(device: Any, name: str) -> None:
    case = CASES[name]
    subject, found = parity.SUBJECTS[case.op], []
    for count in (1, 3, 3):
        device.fastgpt_set_multiprocessors(count)
        with backend.use(strict=True, **{case.op: "cuda"}):  # type: ignore[arg-type]
            found.append(subject.run(case, subject.ours, parity.Inputs(case, "cpu", wide=False)))
    assert all(row.ratio <= 1 for row in parity.check(case, "cuda"))
    one, three, again = found
    assert all(torch.equal(t, again[key]) for key, t in three.items()), "two runs on one device differ"
    assert any(not torch.equal(t, three[key]) for key, t in one.items()), "the grid does not depend on the device"

"""The emulation of sm_90a must compute what the instructions compute, and refuse what the device leaves undefined."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("pybind11") is None or shutil.which("g++") is None:
    pytest.skip("needs pybind11 and g++", allow_module_level=True)

import emulator

FAULTS = ("none", "uninitialised", "unfenced", "wrong parity", "no arrival", "too many arrivals", "too many bytes",
          "too few bytes", "misplaced", "lands afterwards", "fenced elsewhere", "no fence", "no wait", "read early",
          "overwrite", "operand register", "divergent", "swizzle", "base offset", "address", "stride", "leading",
          "outside")  # fmt: skip
Call = Callable[..., str]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Return the functions of hopper_kernels.cu, called with tensors and numbers; they return an error or nothing."""
    target = tmp_path_factory.mktemp("hopper") / "kernels.so"
    include = [f"-I{p}" for p in (emulator.HERE / "include", emulator.CSRC)]
    flags = [*emulator.FLAGS, *emulator.ROUNDING, "-fvisibility=default", "-O1", "-shared", *include, "-x", "c++"]
    subprocess.run(["g++", *flags, str(Path(__file__).parent / "hopper_kernels.cu"), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))

    def call(name: str, *values: Tensor | int) -> str:
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        said = function(*(ctypes.c_void_p(v.data_ptr()) if isinstance(v, Tensor) else v for v in values))
        return said.decode() if said else ""

    return call


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]), dtype=torch.float32).bfloat16()


def rows(small: Call, fault: str = "none") -> tuple[str, Tensor, Tensor]:
    a, b, out = rand(64, 64), rand(128, 64), torch.zeros(64, 128)
    return small("rows", a, b, out, FAULTS.index(fault)), out, a.float() @ b.float().T


def columns(small: Call, fault: str = "none") -> tuple[str, Tensor, Tensor]:
    a, b, out = rand(64, 64).float(), rand(64, 128), torch.zeros(64, 128)
    return small("columns", a, b, out, FAULTS.index(fault)), out, a @ b.float()


@pytest.mark.parametrize("schedule", range(3))
def test_products(small: Call, schedule: int) -> None:
    """Both kinds of operands, through descriptors and swizzled copies."""
    small("set_schedule", schedule)
    for product in (rows, columns):
        said, out, wanted = product(small)
        assert not said
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-4)
    small("set_schedule", 0)


@pytest.mark.parametrize("start", [(0, 0), (64, 32), (-3, -5), (90, 60), (200, 0)])
def test_what_is_outside_of_the_tensor_is_zero(small: Call, start: tuple[int, int]) -> None:
    x, out = rand(70, 104), torch.full((64, 64), torch.nan)
    assert not small("box", x, out, 70, 104, *start)
    wide = torch.zeros(270, 404)
    wide[100:170, 100:204] = x.float()
    assert torch.equal(out, wide[100 + start[1] :, 100 + start[0] :][:64, :64])


def test_copies_of_bytes(small: Call) -> None:
    x, out = rand(64).float(), torch.zeros(64)
    assert not small("bulk", x, out, 0) and torch.equal(out, x)
    assert "must be multiples of 16" in small("bulk", x, out, FAULTS.index("misplaced"))
    assert "must be multiples of 16" in small("bulk", x, out, FAULTS.index("too few bytes"))
    assert "the target leaves shared memory" in small("bulk", x, out, FAULTS.index("outside"))


def test_a_tensor_that_the_driver_refuses(small: Call) -> None:
    assert "refuses a tensor map" in small("box", rand(70, 100), torch.empty(64, 64), 70, 100, 0, 0)


@pytest.mark.parametrize(
    "fault, says",
    [
        ("uninitialised", "no mbarrier was initialised at"),
        ("unfenced", "was not fenced after its initialisation"),
        ("fenced elsewhere", "was not fenced after its initialisation"),
        ("wrong parity", "deadlock: .*, 128 for parity 1 of the mbarrier at"),
        ("no arrival", "deadlock: .*, 128 for parity 0 of the mbarrier at"),
        ("too many arrivals", "more arrivals than the 1 of a phase"),
        ("too many bytes", "deadlock: .*, 128 for parity 0 of the mbarrier at"),
        ("too few bytes", "deadlock: .*, 128 for parity 0 of the mbarrier at"),
        ("no fence", "no wgmma.fence since"),
        ("no wait", "a block ended before warpgroup 0 waited for its products"),
        ("overwrite", "an operand in shared memory changed before the wait"),
        ("divergent", "pass different operands"),
        ("swizzle", "swizzle mode 0, expected 1"),
        ("base offset", "a base offset"),
        ("address", "starts at .*, expected 32-byte steps"),
        ("stride", "a stride offset of 512 bytes"),
        ("outside", "an operand leaves shared memory"),
    ],
)
def test_undefined_behaviour_is_an_error(small: Call, fault: str, says: str) -> None:
    said, _, _ = rows(small, fault)
    assert re.search(says, said), said


@pytest.mark.parametrize(
    "fault, says",
    [
        ("misplaced", "must be a multiple of 1024"),
        ("operand register", "an operand in registers changed"),
        ("address", "expected an atom of 1024 bytes"),
        ("stride", "a stride offset of 512 bytes"),
        ("leading", "a leading offset of 7680 bytes"),
    ],
)
def test_undefined_behaviour_of_operands_across_the_lines(small: Call, fault: str, says: str) -> None:
    said, _, _ = columns(small, fault)
    assert says in said


def test_results_are_nan_before_their_wait(small: Call) -> None:
    said, out, wanted = rows(small, "read early")
    assert not said and out.isnan().sum() == 128, "one accumulator of each thread"
    assert out.isnan().any() and torch.allclose(out[~out.isnan()], wanted[~out.isnan()], atol=1e-4)


def test_copies_land_late_or_early(small: Call) -> None:
    """One of the two copies has not landed without a wait: the block ends too early, and products are of NaN."""
    said, out, _ = columns(small, "lands afterwards")
    assert "a block ended before a copy had landed" in said and out.isnan().any()


def test_two_warpgroups_take_turns(small: Call) -> None:
    out = torch.zeros(1)
    for schedule in range(3):
        small("set_schedule", schedule)
        out.zero_()
        assert not small("turns", out, 2)
        assert out.item() == 121212
    small("set_schedule", 0)
    assert "128 threads at the named barrier 1" in small("turns", out, 3)
    assert "128 for the named barrier 1" in small("turns", out, 1)


def test_registers_of_warpgroups(small: Call) -> None:
    assert not small("registers", 24, 0)
    assert "asks for 66560 registers" in small("registers", 40, 0)
    assert "20 registers, expected a multiple of 8" in small("registers", 20, 0)
    assert "only a part of warpgroup 2" in small("registers", 24, 32)

"""Single ops of other libraries in the model: what their launchers are told, what their kernels access, and head and
loss by arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastgpt.bench.model import losses  # noqa: E402
from fastgpt.bench.model.as_cuda import as_cuda  # noqa: E402
from fastgpt.bench.model.chips import H100, H200, Chip  # noqa: E402
from fastgpt.bench.model.recording import META, Recorder, as_if_on  # noqa: E402
from fastgpt.bench.model.step import DEVICES  # noqa: E402
from fastgpt.bench.model.traffic import work_of  # noqa: E402
from fastgpt.bench.model.triton_launches import accessed  # noqa: E402


def in_place(x_ptr, y_ptr, scale_ptr, index_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.load(index_ptr) + tl.arange(0, BLOCK)
    row = x_ptr + n
    row += 1
    x = tl.load(row + at) * tl.load(scale_ptr)
    tl.store(row + at, x)
    tl.atomic_add(y_ptr, 1.0)


in_place_kernel = JITFunction(in_place)  # also where triton.jit would interpret it


class InPlace(torch.autograd.Function):
    """A launcher as other libraries write them: one program for each multiprocessor of the tensor's device."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        assert grad.device.type == "cuda" and grad.is_cuda and torch.cuda.is_available()
        count = torch.cuda.get_device_properties(grad.device).multi_processor_count
        sums = torch.empty(count, device=grad.device)
        with torch.cuda.device(grad.device):
            in_place_kernel[(count,)](grad, sums, sums, grad, 1, BLOCK=16, num_warps=4)
        return grad


def test_a_kernel_that_works_in_place_reads_and_writes() -> None:
    """What is added to a pointer after it was loaded is no pointer."""
    read, written = ({name for name in names if name.endswith("_ptr")} for names in accessed(in_place_kernel))
    assert read == {"x_ptr", "y_ptr", "scale_ptr", "index_ptr"} and written == {"x_ptr", "y_ptr"}


@pytest.mark.parametrize("chip, count", [("A100", 108), ("H200", 132)])
def test_a_launcher_sees_the_multiprocessors_of_the_chip(chip: str, count: int) -> None:
    """In backward, too, where torch.autograd.grad has left the mode; and nothing is left behind."""
    recorder = Recorder(None)
    x = torch.empty(8, 64, device=META).requires_grad_()
    before = torch.cuda.is_available()
    with as_if_on(DEVICES[chip], recorder), as_cuda(), recorder:
        torch.autograd.grad(InPlace.apply(x), x, torch.empty(8, 64, device="cuda"))
    (call,) = (c for c in recorder.calls if c.launches)
    assert call.launches[0].grid == (count, 1, 1) and call.written["y_ptr"].shape == (count,)
    assert call.read["x_ptr"] == call.written["x_ptr"]
    work = work_of(call, call.launches[0])
    assert work.written == 8 * 64 * 4 + count * 4 and work.read == 2 * 8 * 64 * 4 + 2 * count * 4
    assert x.device == META and torch.cuda.is_available() == before


def test_head_and_loss_by_hand() -> None:
    """16,384 rows, C = 768, V = 50,304 on an H200: 1.27 TFLOP at 650 TFLOP/s, 4 bytes of each logit at 4.32 TB/s."""
    n, c, v = 16384, 768, 50304
    product, passes = 2 * n * c * v / 650e12, 4 * n * v / 4.32e12
    seconds = {name: losses.design_seconds(name, n, c, v, H200) for name in losses.DESIGNS}
    assert seconds["writes logits"] == pytest.approx(3 * product + passes, rel=1e-3)
    assert seconds["no logits, 1 product more"] == pytest.approx(4 * product, rel=1e-3)
    assert seconds["no logits, 2 products more"] > seconds["no logits, 1 product more"] > seconds["writes logits"]


@pytest.mark.parametrize("chip", [H100, H200], ids=lambda chip: chip.name)
def test_a_product_more_pays_off_below_the_break_even(chip: Chip) -> None:
    for factor, faster in ((0.9, True), (1.1, False)):
        shape = 16384, int(factor * losses.break_even(chip)), 50304
        more = losses.design_seconds("no logits, 1 product more", *shape, chip)
        assert (more < losses.design_seconds("writes logits", *shape, chip)) is faster

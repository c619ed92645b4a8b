"""Large new tensors on a CPU lie in huge pages where Linux has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt import ops, parity
from fastgpt.core import device
from fastgpt.core.device import HUGE_FROM, HUGE_PAGE, in_huge_pages
from fastgpt.ops._linear_cross_entropy import logits_of, product_in_fp32
from fastgpt.ops.linear import weight_gradient

SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LINUX = pytest.mark.skipif(not SWITCH.exists(), reason="needs a Linux kernel with transparent huge pages")
COLUMNS = 2048
ROWS = HUGE_FROM // (4 * COLUMNS) + 3


def flags_at(address: int) -> list[str]:
    """Return the flags of the mapping of this process that contains an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(n, 16) for n in first.split("-"))
            inside = start <= address < end
        elif inside and first == "VmFlags:":
            return rest
    raise AssertionError(f"no mapping contains {address:#x}")


def in_the_middle(t: Tensor) -> bool:
    """Return whether huge pages are wanted for the middle of a tensor."""
    return "hg" in flags_at(t.data_ptr() + t.nbytes // 2)


@LINUX
def test_the_ops_ask_for_huge_pages_for_large_results() -> None:
    x, wide = torch.ones(2, 1), torch.ones(2, ROWS)
    assert not in_the_middle(torch.empty(ROWS, COLUMNS)), "PyTorch already asks: there is nothing to test"
    head = torch.ones(ROWS * COLUMNS // 2, 1)
    assert in_the_middle(logits_of(x, head, None))
    narrow = torch.ones(2, COLUMNS)
    assert in_the_middle(product_in_fp32(wide, narrow))
    dw = weight_gradient(head, narrow, wide)
    assert dw is not None and in_the_middle(dw)


@LINUX
@pytest.mark.skipif("cpu" not in parity.backends_here("embedding"), reason="needs the compiled CPU kernels")
def test_the_gradient_of_a_large_table_lies_in_huge_pages() -> None:
    weight = torch.zeros(ROWS, COLUMNS, requires_grad=True)
    with ops.use(strict=True, embedding="cpu"):
        ops.embedding(torch.tensor([0, ROWS - 1]), weight).sum().backward()
    assert weight.grad is not None and in_the_middle(weight.grad)
    assert float(weight.grad.sum()) == 2 * COLUMNS


def test_only_whole_pages_of_large_tensors_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(device, "_madvise", lambda: lambda *args: calls.append(args))
    small, large = torch.empty(HUGE_FROM // 4 - 1), torch.empty(HUGE_FROM // 4 + 5)
    assert in_huge_pages(small) is small and in_huge_pages(large.to("meta")).is_meta and not calls
    assert in_huge_pages(large) is large
    ((start, size, advice),) = calls
    assert start % HUGE_PAGE == 0 and size % HUGE_PAGE == 0 and advice == 14
    assert 0 <= start - large.data_ptr() < HUGE_PAGE and 0 <= large.data_ptr() + large.nbytes - start - size < HUGE_PAGE


def test_a_system_without_huge_pages_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_madvise", lambda: None)
    large = torch.empty(HUGE_FROM // 4)
    assert in_huge_pages(large) is large

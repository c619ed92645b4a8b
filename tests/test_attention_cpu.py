"""Tests specific to attention's CPU kernel; tests for all backends are in tests/ops/test_attention.py."""

import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.core import backend
from fastgpt.ops._attention import attention_ref, dropout_keep
from fastgpt.ops.attention import _DEFAULTS, ATTENTION_BWD, ATTENTION_FWD, ATTENTION_QKV_BWD, pack

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(backend.missing("cpu") is not None, reason="needs the compiled CPU kernels")


def packed(q: Tensor, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(3)  # seeds the dropout
    return pack(q, {**_DEFAULTS, **options})


def tensors(b: int, t: int, s: int, h: int, hkv: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return q, k, v, dout."""
    g = torch.Generator().manual_seed(1)
    shapes = ((b, t, h, d), (b, s, hkv, d), (b, s, hkv, d), (b, t, h, d))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options: Any) -> list[Tensor]:
    """Return out, lse, dq, dk, dv."""
    o = packed(q, **options)
    out, lse = ATTENTION_FWD["cpu"](q, k, v, *o)
    return [out, lse, *ATTENTION_BWD["cpu"](dout, None, q, k, v, out, lse, *o)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def threads() -> Iterator[None]:
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


@pytest.mark.parametrize(
    "shape,options",
    [
        ((3, 130, 130, 4, 2, 32), {"causal": True}),  # a task per key head
        ((1, 1100, 1100, 2, 1, 16), {"causal": True, "dropout_p": 0.2}),  # keys in chunks, queries in parts
        ((1, 300, 1500, 3, 3, 40), {"window": 700, "softcap": 3.0}),
        ((7, 1, 90, 6, 2, 64), {}),
    ],
)
def test_no_thread_count_changes_a_bit(threads: None, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    inputs = tensors(*shape)  # type: ignore[arg-type]
    results = []
    for n in (1, 2, 3, 1):
        torch.set_num_threads(n)
        results.append(run(*inputs, **options))
    assert all(same(results[0], r) for r in results[1:])


def test_chunks_of_keys_and_parts_of_queries_add_up() -> None:
    """With small B Hkv, the backward splits the keys and adds up one dq per chunk."""
    q, k, v, dout = tensors(1, 700, 1100, 4, 1, 24)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    for options in (
        {"causal": True},
        {"window": 300},
        {"kv_lens": torch.tensor([900]), "kv_start": torch.tensor([70])},
    ):
        exact, lse = attention_ref(*leaves, **{**_DEFAULTS, **options})
        grads = torch.autograd.grad(exact, leaves, dout.double())
        for got, wanted in zip(run(q, k, v, dout, **options), (exact, lse, *grads), strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_what_dropout_keep_says(p: float) -> None:
    """With equal scores and v = identity, out is keep / (1 - p) / S, and dv its transpose."""
    b, h, s = 2, 3, 130
    q = torch.zeros(b, s, h, s)
    eye = torch.eye(s).view(1, s, 1, s).expand(b, s, h, s)
    o = packed(q, dropout_p=p)
    out, lse = ATTENTION_FWD["cpu"](q, q, eye, *o)
    keep = dropout_keep(o[5], (b, h, s, s), p)
    assert torch.equal(out.transpose(1, 2) != 0, keep)
    torch.testing.assert_close(out.transpose(1, 2)[keep], torch.full((int(keep.sum()),), 1 / s / (1 - p)))
    dv = ATTENTION_BWD["cpu"](eye, None, q, q, eye, out, lse, *o)[2]
    assert torch.equal(dv.permute(0, 2, 3, 1) != 0, keep)
    assert 0.8 * p < 1 - float(keep.float().mean()) < 1.2 * p


@pytest.mark.parametrize("d", [1, 15, 17, 272, 512, 1000])
def test_any_head_dimension(d: int) -> None:
    q, k, v, dout = tensors(1, 70, 70, 2, 1, d)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact, lse = attention_ref(*leaves, **{**_DEFAULTS, "causal": True})
    grads = torch.autograd.grad(exact, leaves, dout.double())
    for got, wanted in zip(run(q, k, v, dout, causal=True), (exact, lse, *grads), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5 * math.sqrt(d))


@pytest.mark.parametrize("dtype", backend.KERNEL_DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "heads first", "transposed", "misaligned", "expanded"])
def test_packed_gradient_is_the_three_side_by_side(dtype: torch.dtype, layout: str) -> None:
    """It reads any strides, gives the same bits as contiguous tensors do, and leaves its inputs unchanged."""
    b, t, h, hkv, d = 2, 70, 4, 2, 24
    wide = torch.randn(b, t, h + 2 * hkv + 2, d + 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    qkv = wide[:, :, 1:-1, 2:-1]
    if layout == "heads first":
        qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "transposed":
        qkv = qkv.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "misaligned":
        qkv = torch.cat((wide.flatten()[:1], qkv.flatten()))[1:].view(qkv.shape)
    elif layout == "expanded":
        qkv = qkv[:1, :1].expand(qkv.shape)
    elif layout == "contiguous":
        qkv = qkv.contiguous()
    dout = tensors(b, t, t, h, hkv, d, dtype)[3]
    before = (qkv.clone(), dout.clone())
    q, k, v = qkv.contiguous().split([h, hkv, hkv], 2)
    plain = run(q.contiguous(), k.contiguous(), v.contiguous(), dout, causal=True)
    o = packed(qkv, causal=True)
    out, lse = ATTENTION_FWD["cpu"](*qkv.split([h, hkv, hkv], 2), *o)
    assert same([out, lse], plain[:2])
    for grad in (dout, dout.transpose(1, 2).contiguous().transpose(1, 2)):
        dqkv = ATTENTION_QKV_BWD["cpu"](grad, qkv, out, lse, *o, h, hkv)
        assert dqkv.is_contiguous() and torch.equal(dqkv, torch.cat(plain[2:], 2))
    assert same([qkv, dout], list(before))


def test_what_lies_outside_the_keys_is_not_looked_at() -> None:
    """NaN beyond kv_lens, before kv_start and beyond the last sequence, as in uninitialised cache pages, has no
    effect."""
    q, k, v, dout = tensors(2, 5, 150, 2, 1, 32)
    ends, starts = torch.tensor([100, 37]), torch.tensor([70, 0])
    options = {"kv_lens": ends, "kv_start": starts, "causal": True}
    clean = run(q, k, v, dout, **options)
    for i in range(2):
        for x in (k, v):
            x[i, : starts[i]], x[i, ends[i] :] = math.nan, math.nan
    assert same(run(q, k, v, dout, **options), clean)
    q, k, v, dout = tensors(1, 90, 90, 2, 1, 32)
    cu = torch.tensor([0, 20, 71])
    clean = run(q, k, v, dout, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for x in (q, k, v, dout):
        x[:, 71:] = math.nan
    again = run(q, k, v, dout, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert same(again, clean) and not again[0][:, 71:].any() and bool((again[1][..., 71:] == -math.inf).all())


def test_nan_and_infinity_reach_their_own_rows_only() -> None:
    q, k, v, dout = tensors(1, 70, 70, 1, 1, 16)
    clean = run(q, k, v, dout, causal=True)
    q[0, 3, 0, 5], q[0, 40, 0, 1] = math.nan, math.inf
    got = run(q, k, v, dout, causal=True)
    rows = got[0][0, :, 0].isnan().any(-1)
    assert rows.nonzero().flatten().tolist() == [3, 40]
    assert torch.equal(got[0][:, ~rows], clean[0][:, ~rows]) and got[2][0, [3, 40]].isnan().any(-1).all()


@pytest.mark.extended
def test_no_byte_out_of_bounds_on_any_instruction_set(tmp_path: Path) -> None:
    """Under AddressSanitizer, with buffers that end at the last element and with any strides, lengths and index
    values: every output is written, and the instruction sets agree."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    (tmp_path / "level.h").write_text("extern int highest_level;\n#define FASTGPT_HIGHEST_LEVEL highest_level\n")
    kernels = sorted(p for op in ("attention", "attention_decode") for p in (ROOT / "csrc" / op).glob("cpu*.cpp"))
    sources = [str(p) for p in (ROOT / "tests" / "attention_cpu.cpp", *kernels)]
    flags = ["-std=c++17", "-O1", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp-simd"]
    flags += ["-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += [f"-I{ROOT / 'csrc'}", "-include", str(tmp_path / "level.h"), "-o", str(tmp_path / "bounds")]
    built = subprocess.run([compiler, *flags, *sources], capture_output=True, text=True)
    if "cannot find -lasan" in built.stderr or "libasan" in built.stderr:
        pytest.skip("needs AddressSanitizer's library")
    assert built.returncode == 0, built.stderr
    figures = []
    for level in ("4", "3", "0"):
        done = subprocess.run([tmp_path / "bounds", "200", level], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        figures.append(torch.tensor([[float(x) for x in line.split()] for line in done.stdout.splitlines()]))
    assert figures[0].shape == (200, 6) and not figures[0].isnan().any()
    for other in figures[1:]:
        torch.testing.assert_close(other, figures[0], rtol=1e-4, atol=1e-2)

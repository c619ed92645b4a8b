"""attention: registration, compile, masks and errors. fastgpt/parity/attention.py checks its values."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops, parity
from fastgpt.core import backend
from fastgpt.core.backend import use
from fastgpt.ops._attention import attention_ref, dropout_keep
from fastgpt.ops.attention import _DEFAULTS, ATTENTION_BWD, ATTENTION_FWD, ATTENTION_QKV_BWD, pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON = pytest.mark.parametrize("name", parity.backends_here("attention"))


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def first_dtype(name: str) -> torch.dtype:
    """Return fp32 if the backend supports it."""
    cell = backend.ops()["attention"][name]
    return torch.float32 if torch.float32 in cell.dtypes else cell.dtypes[0]


def qkv(
    name: str = "torch", t: int = 9, s: int = 11, d: int = 16, b: int = 2, h: int = 2, g: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = first_dtype(name)
    return rand(b, t, h, d, dtype=dtype), rand(b, s, g, d, seed=1, dtype=dtype), rand(b, s, g, d, seed=2, dtype=dtype)


def options(q: Tensor, **o: Any) -> tuple[Any, ...]:
    return pack(q, {**_DEFAULTS, **o})


@ON
def test_opcheck(name: str) -> None:
    q, k, v = qkv(name, t=5, s=5)
    for o in (
        options(q, causal=True),
        options(q, window=2, softcap=3.0, doc_ids=torch.zeros(2, 5, device=DEVICE).int()),
    ):
        torch.library.opcheck(ATTENTION_FWD[name], (q, k, v, *o))
        out, lse = ATTENTION_FWD[name](q, k, v, *o)
        torch.library.opcheck(ATTENTION_BWD[name], (out, lse, q, k, v, out, lse, *o))
        torch.library.opcheck(ATTENTION_QKV_BWD[name], (out, torch.cat((q, k, v), 2), out, lse, *o, 2, 1))


def test_gradcheck_of_the_reference() -> None:
    q, k, v = (x[:1, :4].double().requires_grad_() for x in qkv(d=3))
    rng = torch.tensor([7, 5], device=DEVICE)
    o = {**_DEFAULTS, "causal": True, "window": 3, "softcap": 2.0, "dropout_p": 0.25}
    assert torch.autograd.gradcheck(lambda *x: attention_ref(*x, rng=rng, **o)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: attention_ref(*x, **{**o, "dropout_p": 0.0}), (q, k, v))


@ON
@pytest.mark.parametrize("packed", [False, True])
def test_fullgraph_compile_with_dynamic_shapes(name: str, packed: bool) -> None:
    def separate(x: Tensor) -> Tensor:
        return ops.attention(*x.split([2, 1, 1], 2), causal=True, window=3) * 2

    def together(x: Tensor) -> Tensor:
        return ops.attention_qkv(x, n_heads=2, n_kv_heads=1, causal=True, window=3) * 2

    fn = together if packed else separate
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=True)
    with use(strict=True, attention=name):
        for t in (4, 7):
            grads = []
            for call in (fn, compiled):
                leaf = rand(2, t, 4, 16, dtype=first_dtype(name)).requires_grad_()
                out = call(leaf)
                out.square().sum().backward()
                grads.append((out.detach(), leaf.grad))
            torch.testing.assert_close(grads[0], grads[1])


@ON
def test_runs_are_bitwise_equal(name: str) -> None:
    """Repeat runs with any number of threads, with keys to whose gradients many queries and heads add."""
    repeats = 250 if DEVICE == "cuda" else 3
    q, k, v = qkv(name, t=70, s=70, h=4, g=1, b=60 if DEVICE == "cuda" else 2)
    dout, threads, first = rand(*q.shape, seed=3, dtype=q.dtype), torch.get_num_threads(), None
    try:
        for i in range(repeats):
            torch.set_num_threads(1 + i % 3)
            o = options(q, causal=True)
            out, lse = ATTENTION_FWD[name](q, k, v, *o)
            got = [out, lse, *ATTENTION_BWD[name](dout, None, q, k, v, out, lse, *o)]
            first = got if first is None else first
            assert all(torch.equal(a, b) for a, b in zip(first, got)), i
    finally:
        torch.set_num_threads(threads)


@ON
def test_queries_without_keys(name: str) -> None:
    """Expect output 0, lse -inf and gradients 0, without NaN, whatever the unseen keys hold."""
    q, k, v = qkv(name, t=6, s=5)
    k[1, 3:], v[1, 3:] = torch.nan, torch.nan
    lens, start = torch.tensor([0, 3], device=DEVICE), torch.tensor([0, 2], device=DEVICE)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with use(strict=True, attention=name):
        out, lse = ops.attention(*leaves, causal=True, kv_lens=lens, kv_start=start, return_lse=True)
        out.backward(rand(*out.shape, seed=4, dtype=out.dtype))
    # in the second sequence, query i sees the keys from 2 to i - 1
    alone = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE)
    alone[0], alone[1, :3] = True, True
    assert torch.equal(out[alone], torch.zeros_like(out[alone])) and not out.isnan().any()
    assert torch.equal(lse.isneginf().all(1), alone)
    assert all(x.grad is not None and not x.grad.isnan().any() for x in leaves)
    assert not leaves[0].grad[alone].any() and not leaves[1].grad[0].any() and leaves[2].grad[1, 2].any()


@ON
@pytest.mark.parametrize("window", [None, 3])
def test_lengths_take_keys_away_and_move_no_query(name: str, window: int | None) -> None:
    """Check kv_lens as padding on the right, and a cache of unequal lengths as one packed row with unseen gaps."""
    lens, t, s = torch.tensor([8, 5]), 3, 8
    q, k, v = qkv(name, t=t, s=s)
    i, j = torch.arange(t, device=DEVICE)[:, None], torch.arange(s, device=DEVICE)
    gaps = torch.tensor([[8, 0], [5, 3]]).flatten().cumsum(0)
    cu = {"cu_seqlens_q": [0, t, t, 2 * t, 2 * t], "cu_seqlens_k": [0, *gaps.tolist()]}
    packed = {n: torch.tensor(c, dtype=torch.int32, device=DEVICE) for n, c in cu.items()}
    with use(strict=True, attention=name):
        padded = ops.attention(q, k, v, causal=True, window=window, kv_lens=lens.to(DEVICE))
        row = ops.attention(*(x.flatten(0, 1)[None] for x in (q, k, v)), causal=True, window=window, **packed)
    for got, last in ((padded, i + s - t), (row.view_as(q), i + lens.to(DEVICE)[:, None, None] - t)):
        seen = (j <= last) & (j < lens.to(DEVICE)[:, None, None]) & (j > last - (window or s))
        z = torch.einsum("bthd,bshd->bhts", q.double(), k.double().expand(-1, -1, 2, -1)) * q.shape[-1] ** -0.5
        p = z.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        wanted = torch.einsum("bhts,bshd->bthd", p, v.double().expand(-1, -1, 2, -1))
        torch.testing.assert_close(got.double(), wanted, atol=1e-2 if q.dtype == torch.bfloat16 else 1e-5, rtol=0)


@ON
def test_what_nobody_sees_may_be_anything(name: str) -> None:
    """Put NaN in keys after the valid ones, and in queries without keys and their gradients, in packed sequences."""
    q, k, v = qkv(name, t=140, s=150, b=1)
    dout = rand(*q.shape, seed=4, dtype=q.dtype)
    # queries 70 to 90 and from 100 on have no keys
    cu_q, cu_k = torch.tensor([0, 70, 90, 100]), torch.tensor([0, 60, 60, 75])
    empty = torch.ones(140, dtype=torch.bool)
    empty[:70], empty[90:100] = False, False
    results = []
    for garbage in (0.0, torch.nan):
        for x in (k, v):
            x[:, 75:] = garbage
        for x in (q, dout):
            x[:, empty] = garbage
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with use(strict=True, attention=name):
            out = ops.attention(*leaves, cu_seqlens_q=cu_q.to(DEVICE), cu_seqlens_k=cu_k.to(DEVICE), window=50)
            out.backward(dout)
        results.append((out.detach(), *(x.grad for x in leaves)))
    for zero, nan in zip(*results):
        assert torch.equal(zero, nan)


@ON
def test_dropout_keeps_what_the_formula_keeps(name: str) -> None:
    """With v the identity matrix, every output row is p keep / (1 - p_drop), in forward and backward."""
    q, k, _ = qkv(name, t=5, s=16, g=2)
    v = torch.eye(16, device=DEVICE, dtype=q.dtype).repeat(2, 1, 1)[:, :, None].repeat(1, 1, 2, 1)
    o = options(q, dropout_p=0.4)
    out, lse = ATTENTION_FWD[name](q, k, v, *o)
    keep = dropout_keep(o[5], (2, 2, 5, 16), 0.4).transpose(1, 2)
    assert torch.equal(out != 0, keep) and 0.4 < keep.float().mean() < 0.8
    _, _, dv = ATTENTION_BWD[name](torch.ones_like(out), None, q, k, v, out, lse, *o)
    close = {} if q.dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    torch.testing.assert_close(dv.float().sum((1, 3)), out.float().sum((1, 3)) * 16, **close)


@ON
def test_dropout_follows_the_generator(name: str) -> None:
    q, k, v = qkv(name)
    drawn = []
    with use(strict=True, attention=name):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(ops.attention(q, k, v, dropout_p=0.5))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@ON
def test_large_scores_stay_finite(name: str) -> None:
    """Use scores of +-1e4, where softmax picks one key."""
    q, k, v = qkv(name, t=5, s=7)
    leaves = [(100.0 * x).requires_grad_() if x is not v else x.clone().requires_grad_() for x in (q, k, v)]
    with use(strict=True, attention=name):
        out, lse = ops.attention(*leaves, return_lse=True)
        out.sum().backward()
    z = torch.einsum("bthd,bsxd->bhts", leaves[0].detach().float(), leaves[1].detach().float()) / 4
    assert float(z.abs().max()) > 1e4
    best = v[:, :, 0].gather(1, z.argmax(-1).reshape(2, -1, 1).expand(-1, -1, 16)).view(2, 2, 5, 16).transpose(1, 2)
    torch.testing.assert_close(out, best, rtol=1e-3, atol=1e-3)
    assert lse.isfinite().all() and all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


@ON
@pytest.mark.parametrize("t", [33, 64, 80])
def test_gradients_of_large_scores(name: str, t: int, seed: int) -> None:
    """Use scores of tens, whose softmax is nearly one key: no difference may be left with the rounding error of lse."""
    options = (("causal", True), ("spread", 4.0))
    for draw in range(4):
        case = parity.Case("attention", first_dtype(name), "contiguous", (1, t, t, 2, 2, 16), options)
        rows = parity.check(dataclasses.replace(case, seed=4 * seed + draw), name, DEVICE)
        assert not [r for r in rows if not r.ratio <= 1]


@ON
def test_early_keys_keep_their_weight(name: str) -> None:
    """Many tiles of keys follow, and the largest score stays the same.

    The sums so far must then be multiplied by 1, not by 2 to the power of a rounding error, which FMA contraction
    leaves in x * c - base with base = x * c.
    """
    dtype = torch.float16 if torch.float16 in backend.ops()["attention"][name].dtypes else first_dtype(name)
    n, first = 2**15, 64
    q, k = (torch.ones(1, t, 1, 16, device=DEVICE, dtype=dtype) for t in (1, n))
    k *= 11 / 16  # scores of 11, because scores of 16 times the scale would be exact
    v = (torch.arange(n, device=DEVICE) < first).to(dtype).view(1, n, 1, 1).expand(k.shape)
    scale = 69.3
    out, lse = ATTENTION_FWD[name](q, k, v, *options(q, scale=scale))
    assert torch.equal(out, torch.full_like(out, first / n)), out.flatten()[0]
    torch.testing.assert_close(lse, torch.full_like(lse, 11 * scale + math.log(n)), rtol=3e-7, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_the_librarys_attention_is_the_formula(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check transposed, grouped, scaled and causal calls, and that the library really computes them."""
    called: list[tuple[int, ...]] = []
    library = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *rest, **o: (called.append(q.shape), library(q, *rest, **o))[1]
    )
    leaves = [x.requires_grad_() for x in qkv(t=9, s=9, h=4, g=2)]
    dout = rand(2, 9, 4, 16, seed=3)
    with use(attention="torch"):
        if packed:
            out = ops.attention_qkv(torch.cat(leaves, 2), n_heads=4, n_kv_heads=2, causal=True, scale=0.4)
        else:
            out = ops.attention(*leaves, causal=True, scale=0.4)
    got = [out, *torch.autograd.grad(out, leaves, dout)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact, _ = attention_ref(*wide, **{**_DEFAULTS, "causal": True, "scale": 0.4})
    for a, b in zip(got, [exact, *torch.autograd.grad(exact, wide, dout.double())]):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert called == [(2, 4, 9, 16)]


@ON
def test_a_query_that_is_nan_has_a_gradient_that_is_nan(name: str) -> None:
    """A finite query keeps its gradient, although both share keys."""
    q, k, v = qkv(name, t=9, s=9)
    o, dout = options(q, causal=True), torch.ones_like(q)
    q[0, 4, 1, 3] = math.nan
    dq = ATTENTION_BWD[name](dout, None, q, k, v, *ATTENTION_FWD[name](q, k, v, *o), *o)[0]
    nan = torch.zeros_like(dq, dtype=torch.bool)
    nan[0, 4, 1] = True
    assert torch.equal(dq.isnan(), nan)


@ON
def test_inputs_stay_and_only_what_needs_a_gradient_gets_one(name: str) -> None:
    with use(strict=True, attention=name):
        for which in range(3):
            leaves = list(qkv(name))
            before = [x.clone() for x in leaves]
            leaves[which].requires_grad_()
            out = ops.attention(*leaves, causal=True)
            out.sum().backward(retain_graph=True)
            once = leaves[which].grad.clone()
            out.sum().backward()
            assert [x.grad is not None for x in leaves] == [i == which for i in range(3)]
            torch.testing.assert_close(leaves[which].grad, 2 * once, rtol=0, atol=0)
            assert all(torch.equal(a, b.detach()) for a, b in zip(before, leaves))


@ON
def test_the_packed_form_is_the_plain_one(name: str) -> None:
    """Compare values and gradients bit for bit, for a packed tensor with gaps between its rows."""
    wide = rand(2, 7, 4, 24, dtype=first_dtype(name))
    results = []
    with use(strict=True, attention=name):
        for packed in (False, True):
            leaf = wide.clone().requires_grad_()
            x = leaf[..., 4:20]
            if packed:
                out = ops.attention_qkv(x, n_heads=2, n_kv_heads=1, causal=True, softcap=5.0)
            else:
                out = ops.attention(*x.split([2, 1, 1], 2), causal=True, softcap=5.0)
            out.backward(rand(*out.shape, seed=5, dtype=out.dtype))
            results.append((out, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@ON
def test_packed_sequences_and_documents_are_attended_apart(name: str) -> None:
    lengths = [3, 1, 5]
    cu = torch.tensor([0, 3, 4, 9], dtype=torch.int32, device=DEVICE)
    docs = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).to(DEVICE)[None]
    q, k, v = qkv(name, t=9, s=9, b=1)
    with use(strict=True, attention=name):
        apart = [ops.attention(*(x.split(lengths, 1)[i] for x in (q, k, v)), causal=True) for i in range(3)]
        for o in ({"cu_seqlens_q": cu, "cu_seqlens_k": cu}, {"doc_ids": docs}):
            torch.testing.assert_close(ops.attention(q, k, v, causal=True, **o), torch.cat(apart, 1))


def test_head_dimensions_over_a_kernels_limit_go_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    cells = {
        b: c for b, c in backend.ops()["attention"].items() if c.max_dim and b in parity.backends_here("attention")
    }
    if not cells:
        pytest.skip("needs a backend with a limit: Triton is not installed")
    for name in cells:
        q, k, v = qkv(name, d=320)
        with use(attention=name):
            ops.attention(q, k, v)
            with use(strict=True), pytest.raises(RuntimeError, match="does not support head dimensions over 256"):
                ops.attention(q, k, v)
    assert "head dimensions over 256" in caplog.text


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"window": 0}, ValueError, "window is 0, expected at least 1"),
    ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0"),
    ({"cu_seqlens_q": torch.tensor([0, 9])}, ValueError, "got only one of cu_seqlens_q and cu_seqlens_k"),
    ({"cu_seqlens_q": torch.tensor([0, 9]), "cu_seqlens_k": torch.tensor([0, 11])}, ValueError, "a batch of 2"),
    ({"doc_ids": torch.zeros(2, 9).int()}, ValueError, "got doc_ids with 9 queries and 11 keys"),
    ({"kv_lens": torch.tensor([3, 12])}, ValueError, "kv_lens reach from 3 to 12, expected 0 to 11"),
    ({"kv_lens": torch.tensor([3.0, 1.0])}, TypeError, "kv_lens is torch.float32, expected torch.int32"),
    ({"kv_start": torch.tensor([3])}, ValueError, r"kv_start has shape \(1,\), expected \(2,\)"),
]


@pytest.mark.parametrize("o,kind,message", ERRORS, ids=[m for _, _, m in ERRORS])
@pytest.mark.skipif(DEVICE == "cuda", reason="these calls build CPU tensors")
def test_errors_name_the_argument(o: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="attention: .*" + message):
        ops.attention(*qkv(), **o)


@pytest.mark.skipif(DEVICE == "cuda", reason="these calls build CPU tensors")
def test_errors_of_starts_and_of_the_packed_form() -> None:
    q, k, v = qkv(t=9, s=9, b=1)
    falling, late = torch.tensor([0, 5, 3]), torch.tensor([1, 5, 9])
    for cu in (falling, late):
        with pytest.raises(ValueError, match="starts from 0 on that never fall"):
            ops.attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    with pytest.raises(ValueError, match=r"qkv has shape \(1, 9, 2, 16\), expected \(B, T, 4, D\)"):
        ops.attention_qkv(q, n_heads=2, n_kv_heads=1)
    with pytest.raises(TypeError, match="return_lse"):
        ops.attention_qkv(rand(1, 9, 4, 16).requires_grad_(), n_heads=2, n_kv_heads=1, return_lse=True)

"""attention_decode: equality with attention, splits, lengths, compile. fastgpt/parity/attention_decode.py checks its
values."""

import importlib
from typing import Any

import pytest
import torch
from contract import DEVICE, rand
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastgpt import ops, parity
from fastgpt.core.backend import use
from fastgpt.ops.attention_decode import ATTENTION_DECODE_FWD, ATTENTION_DECODE_PAGED_FWD, pack

ON = pytest.mark.parametrize("name", parity.backends_here("attention_decode"))


def qkv(b: int = 2, t: int = 1, s: int = 9, h: int = 4, g: int = 2, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    return rand(b, t, h, d), rand(b, s, g, d, seed=1), rand(b, s, g, d, seed=2)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


@ON
@pytest.mark.parametrize("t", [1, 3])
def test_it_is_causal_attention(name: str, t: int) -> None:
    """Lengths exclude keys and shift nothing, as in attention."""
    q, k, v = qkv(t=t)
    for o in ({}, {"window": 4}, {"kv_start": integers(0, 6)}, {"softcap": 2.0, "scale": 0.7}):
        options: dict[str, Any] = {"kv_lens": integers(9, 7), **o}
        with use(attention_decode=name, strict=True):
            got = ops.attention_decode(q, k, v, **options)
        wanted = ops.attention(q, k, v, causal=True, **options)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@ON
def test_rows_do_not_depend_on_each_other_or_on_unseen_keys(name: str) -> None:
    """The bits of a row are the same whatever the lengths of the others are, and with NaN in keys that it does not
    see; a row without keys gives 0."""
    q, k, v = qkv(b=3, s=200)
    with use(attention_decode=name, strict=True):
        one = ops.attention_decode(q, k, v, integers(200, 70, 0), kv_start=integers(10, 0, 0))
        k[0, :10], k[1, 70:], k[2], v[0, :10], v[1, 70:], v[2] = (torch.nan for _ in range(6))
        two = ops.attention_decode(q, k, v, integers(200, 70, 0), kv_start=integers(10, 0, 0))
        third = ops.attention_decode(q, k, v, integers(11, 70, 0), kv_start=integers(10, 0, 0))
    assert torch.equal(one, two) and torch.equal(third[1], one[1]) and not one[2].any()
    assert torch.equal(third[0], v[0, 10].repeat_interleave(2, 0)[None]), "a single key has the weight 1"


@ON
def test_a_query_that_is_nan_gives_nan_and_harms_no_other(name: str) -> None:
    q, k, v = qkv(s=200)
    q[0, 0, 1, 3] = torch.nan
    with use(attention_decode=name, strict=True):
        found = ops.attention_decode(q, k, v).isnan()
    assert found[0, 0, 1].all() and found.sum() == 16


@ON
def test_early_keys_keep_their_weight(name: str) -> None:
    """The largest score stays the same over many tiles, so the sums so far are multiplied by exactly 1."""
    n, first = 2**12, 64
    q, k = (torch.ones(1, t, 1, 16, device=DEVICE) for t in (1, n))
    v = (torch.arange(n, device=DEVICE) < first).float().view(1, n, 1, 1).expand(k.shape)
    with use(attention_decode=name, strict=True):
        out = ops.attention_decode(q, k * (11 / 16), v, scale=69.3)
    assert torch.equal(out, torch.full_like(out, first / n))


@ON
def test_a_call_launches_the_same_whatever_the_lengths_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it can be recorded in a CUDA graph: the raw op gets tensors, and reads no value on the host."""
    monkeypatch.setattr(importlib.import_module("fastgpt.ops.attention"), "checks_values", lambda t: False)
    q, k, v = qkv(s=70)
    seen = []

    def spy(*args: Any) -> Tensor:
        seen.append([a.shape if isinstance(a, Tensor) else a for a in args])
        return q

    monkeypatch.setitem(ATTENTION_DECODE_FWD, name, spy)
    with use(attention_decode=name, strict=True):
        for lens in (integers(1, 1), integers(70, 3)):
            ops.attention_decode(q, k, v, lens)
    assert seen[0] == seen[1]


def pool_of(x: Tensor, size: int, pages: Tensor) -> Tensor:
    """Return a pool with x (B, S, Hkv, D) in these pages (B, S / size); what is left is NaN."""
    pool = x.new_full((int(pages.max()) + 2, size, *x.shape[2:]), torch.nan)
    pool[pages.long().flatten()] = x.unflatten(1, (-1, size)).flatten(0, 1)
    return pool


PAGES = torch.tensor([[5, 0, 3], [1, 6, 2]], dtype=torch.int32, device=DEVICE)


@ON
@pytest.mark.parametrize(
    "dtype,size,d", [(torch.float32, 8, 16), (torch.float32, 64, 64), (torch.bfloat16, 32, 40), (torch.float16, 16, 64)]
)
def test_pages_give_the_bits_of_a_cache(name: str, dtype: torch.dtype, size: int, d: int) -> None:
    s = 3 * size
    q, k, v = (x.to(dtype) for x in qkv(t=1 if size == 8 else 2, s=s, d=d))
    k_pool, v_pool, lens = pool_of(k, size, PAGES), pool_of(v, size, PAGES), integers(s, s - 5)
    options: dict[str, Any]
    for options in ({}, {"window": 13, "softcap": 2.0}, {"kv_start": integers(0, 11)}):
        with use(attention_decode=name, strict=True):
            wanted = ops.attention_decode(q, k, v, lens, **options)
            got = ops.attention_decode(q, k_pool, v_pool, lens, pages=PAGES, **options)
            assert torch.equal(got, wanted)
    assert wanted.isfinite().all()


@ON
def test_pages_over_several_splits(name: str) -> None:
    """A few pages appear in a table again and again, so rows share them, too."""
    pages = torch.arange(2 * 70, device=DEVICE).view(2, 70) * 7 % 10
    q, *pools = rand(2, 1, 4, 64), rand(10, 16, 2, 64, seed=1), rand(10, 16, 2, 64, seed=2)
    caches, lens = [pool[pages].flatten(1, 2) for pool in pools], integers(1120, 1001)
    with use(attention_decode=name, strict=True):
        got = ops.attention_decode(q, *pools, lens, pages=pages)
        assert torch.equal(got, ops.attention_decode(q, *caches, lens))
    torch.testing.assert_close(got, ops.attention_decode(q, *caches, lens), rtol=1e-5, atol=1e-6)


def test_the_formula_reads_pages() -> None:
    q, k, v = qkv(s=24)
    with use(attention_decode="torch"):
        wanted = ops.attention_decode(q, k, v, window=9)
        pools = pool_of(k, 8, PAGES), pool_of(v, 8, PAGES)
        assert torch.equal(ops.attention_decode(q, *pools, pages=PAGES, window=9), wanted)


@ON
@pytest.mark.parametrize("wrong", [8, 2**31 - 1, -1, -(2**31)])
def test_a_page_outside_the_pool_makes_the_rows_that_see_it_nan(name: str, wrong: int) -> None:
    """The public function checks numbers where that does not wait for a GPU; the kernels read nothing there."""
    q, k, v = qkv(s=24)
    pools = pool_of(k, 8, PAGES), pool_of(v, 8, PAGES)
    bad = PAGES.clone()
    bad[0, 2] = wrong
    raw, numbers = ATTENTION_DECODE_PAGED_FWD[name], (0.25, 0, 0.0)
    wanted = raw(q, *pools, PAGES, None, None, *numbers)
    got = raw(q, *pools, bad, None, None, *numbers)
    assert got[0].isnan().all() and torch.equal(got[1], wanted[1])
    unseen = raw(q, *pools, bad, integers(16, 24).int(), None, *numbers)
    assert torch.equal(unseen, raw(q, *pools, PAGES, integers(16, 24).int(), None, *numbers)), "the page is not seen"


@ON
def test_pages_compile_with_dynamic_shapes(name: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, lens: Tensor, pages: Tensor) -> Tensor:
        return ops.attention_decode(q * 2, k, v, lens, pages=pages, window=5) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    with use(attention_decode=name, strict=True):
        for of_row, n in ((2, 5), (3, 9)):
            k, v, pages = rand(n, 8, 2, 16, seed=1), rand(n, 8, 2, 16, seed=2), PAGES[:, :of_row] % n
            args = (rand(2, 1, 4, 16), k, v, integers(8 * of_row, 3), pages)
            torch.testing.assert_close(compiled(*args), call(*args), rtol=0, atol=0)


@ON
def test_fullgraph_compile_with_dynamic_shapes(name: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, lens: Tensor) -> Tensor:
        return ops.attention_decode(q * 2, k, v, lens, window=5) + 1

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    with use(attention_decode=name, strict=True):
        for s in (7, 9):
            args = (*qkv(s=s), integers(s, 3))
            torch.testing.assert_close(compiled(*args), call(*args), rtol=0, atol=0)


@ON
def test_flops_are_counted(name: str) -> None:
    q, k, v = qkv(s=9)
    with FlopCounterMode(display=False) as counter:
        ATTENTION_DECODE_FWD[name](q, k, v, *pack(q, {"kv_lens": None, "kv_start": None, "window": None,
                                                      "softcap": 0.0, "scale": None}))  # fmt: skip
    assert counter.get_total_flops() == 4 * 2 * 4 * 9 * 16
    with FlopCounterMode(display=False) as counter:
        ATTENTION_DECODE_PAGED_FWD[name](q, rand(7, 8, 2, 16), rand(7, 8, 2, 16), PAGES, None, None, 0.25, 0, 0.0)
    assert counter.get_total_flops() == 4 * 2 * 4 * 24 * 16


@pytest.mark.skipif("cpu" not in parity.backends_here("attention_decode"), reason="the CPU kernels are not built")
def test_the_cpu_kernel_splits_by_keys_not_by_threads() -> None:
    """One head over several splits: the same bits for any number of threads."""
    q, k, v = qkv(b=1, h=1, g=1, s=3000, d=40)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            with use(attention_decode="cpu", strict=True):
                found.append(ops.attention_decode(q, k, v))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], ops.attention(q, k, v), rtol=1e-5, atol=1e-6)


def test_it_has_no_gradient() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="attention_decode: an input requires a gradient, expected none"):
        ops.attention_decode(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert not ops.attention_decode(q, k, v).requires_grad


def test_heads_wider_than_a_tile_run_on_the_formula() -> None:
    q, k, v = qkv(d=264)
    for name in {"cuda", "triton"} & set(parity.backends_here("attention_decode")):
        with use(attention_decode=name, strict=False):
            torch.testing.assert_close(
                ops.attention_decode(q, k, v), ops.attention(q, k, v, causal=True), rtol=1e-5, atol=1e-6
            )

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
from fastgpt.ops.attention_decode import ATTENTION_DECODE_FWD, pack

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

"""The kernels of attention for sm_90a under the emulation: parity of results and gradients, orders of threads, calls
that they leave to the plain kernels, and broken sources, which must be caught. They have never run on a device."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import ops, parity
from fastgpt.core import backend
from fastgpt.core.errors import UserError
from fastgpt.ops._attention_sm90 import SM90
from fastgpt.ops.attention import ATTENTION_FWD, pack

if importlib.util.find_spec("pybind11") is None or shutil.which("g++") is None:
    pytest.skip("needs pybind11 and g++", allow_module_level=True)
if not backend.simulated("cuda"):
    pytest.skip("the emulation is not this process's backend", allow_module_level=True)

import emulator
import races
import sm90_cases

BF16 = torch.bfloat16


@pytest.fixture
def hopper() -> Iterator[ctypes.CDLL]:
    """Let the emulated device be of compute capability 9.0."""
    library = ctypes.CDLL(os.environ["FASTGPT_EMULATED_CUDA"])
    library.fastgpt_set_chip(90)
    yield library
    library.fastgpt_set_schedule(0, 0)
    library.fastgpt_set_chip(80)


def heads(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("case", list(sm90_cases.quick()), ids=str)
def test_parity(hopper: ctypes.CDLL, case: parity.Case) -> None:
    rows = parity.compare(case, SM90, parity.expected(case))
    over = [f"{r.output}: error {r.error:.3e}, allowed {r.allowed:.3e}" for r in rows if not r.ratio <= 1]
    assert not over, over


@pytest.mark.parametrize("dim", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_orders_of_threads_agree_bitwise(hopper: ctypes.CDLL, dim: int) -> None:
    q, k, v = (heads(1, 300, h, dim).requires_grad_() for h in (2, 1, 1))
    dout = heads(1, 300, 2, dim)
    found = []
    for schedule in range(3):
        hopper.fastgpt_set_schedule(schedule, 1)
        with backend.use(strict=True, attention=SM90):
            out, lse = ops.attention(q, k, v, causal=True, return_lse=True)
        found.append([out, lse, *torch.autograd.grad(out, (q, k, v), dout)])
    for tensors in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(tensors, found[0], strict=True))


def test_gradients_come_from_its_own_kernels(hopper: ctypes.CDLL) -> None:
    library = Path(os.environ["FASTGPT_EMULATED_CUDA"])
    kernels = emulator.load(library)
    kernels.launched()
    qkv = heads(1, 40, 4, 64).requires_grad_()
    with backend.use(strict=True, attention=SM90):
        ops.attention_qkv(qkv, n_heads=2, n_kv_heads=1, causal=True).float().sum().backward()
    names = emulator.kernel_names(library)
    assert sorted(names[k] for k in kernels.launched()) == [
        "attention_dkdv_sm90_kernel<bf16, 64>",
        "attention_dq_sm90_kernel<bf16, 64>",
        "attention_fwd_sm90_kernel<bf16, 64>",
        "attention_rows_kernel<bf16>",
    ]
    assert qkv.grad is not None and qkv.grad.isfinite().all() and qkv.grad.any()


def test_queries_without_keys_may_be_uninitialised(hopper: ctypes.CDLL) -> None:
    """The first 130 of 200 queries see none of the 70 keys: NaN in them reaches no gradient of a key."""
    q, k, v = heads(1, 200, 1, 64), heads(1, 70, 1, 64).requires_grad_(), heads(1, 71, 1, 64)[:, 1:].requires_grad_()
    grads = []
    for value in (0.0, torch.nan):
        q[:, :130] = value
        with backend.use(strict=True, attention=SM90):
            out = ops.attention(q.requires_grad_(), k, v, causal=True)
        dout = torch.ones_like(out)
        dout[:, :130] = value
        grads.append(torch.autograd.grad(out, (q, k, v), dout))
        q = q.detach()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and not grads[1][0][:, :130].any()


def test_the_self_check_passes(hopper: ctypes.CDLL) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        error = backend._self_checks["attention"](SM90, torch.device("cpu"))
    assert error <= backend.SELF_CHECK_BOUND


@pytest.mark.parametrize(
    "dim, options, why",
    [
        (80, {}, "head dimensions of 64 and 128 only"),
        (64, {"window": 3}, "does not take window"),
        (64, {"softcap": 2.0}, "does not take softcap"),
        (64, {"dropout_p": 0.1}, "does not take dropout_p"),
        (64, {"doc_ids": torch.zeros(1, 5).int()}, "does not take doc_ids"),
        (64, {"scale": -1.0}, "negative scale"),
    ],
)
def test_other_calls_are_left_to_the_plain_kernel(dim: int, options: dict[str, Any], why: str, caplog: Any) -> None:
    q = heads(1, 5, 2, dim)
    with (
        backend.use(strict=True, attention=SM90),
        pytest.raises(RuntimeError, match=f"{SM90} was requested, but .*{why}"),
    ):
        ops.attention(q, q, q, **options)
    with backend.use(attention=SM90):
        torch.manual_seed(0)
        got = ops.attention(q, q, q, **options)
    with backend.use(attention="cuda"):
        torch.manual_seed(0)
        assert torch.equal(got, ops.attention(q, q, q, **options))


def test_other_devices_and_dtypes_refuse_it() -> None:
    """The emulated device is an A100 here, and so a launch names both capabilities."""
    q = heads(1, 5, 2, 64)
    with (
        backend.use(strict=True, attention=SM90),
        pytest.raises(RuntimeError, match=r"runs on compute capability 9\.0 only, this device has 8\.0"),
    ):
        ops.attention(q, q, q)
    with backend.use(strict=True, attention=SM90), pytest.raises(RuntimeError, match="does not support torch.float32"):
        ops.attention(q.float(), q.float(), q.float())


def test_a_device_of_another_capability_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgpt.core import cells, native

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "capability 9.0 only, and this one has 8.0" in str(cells.wrong_chip(SM90, simulated=False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(native, "archs", lambda: ["sm_80"])
    assert "TORCH_CUDA_ARCH_LIST=9.0a" in str(cells.wrong_chip(SM90, simulated=False))
    monkeypatch.setattr(native, "archs", lambda: ["sm_80", "sm_90a"])
    assert cells.wrong_chip(SM90, simulated=False) is None


def test_only_its_name_chooses_it() -> None:
    assert backend.parse_choices(f"attention={SM90}") == {"attention": SM90}
    assert SM90 not in backend.ops()["attention"] and SM90 not in (*backend.PRIOR, *backend.PRIOR_OF["attention"])
    with pytest.raises(UserError, match=f"adamw='{SM90}': expected one of"):
        backend.use(adamw=SM90)
    with pytest.raises(UserError, match=f"expected one of cuda, triton, cpu, torch, {SM90}, auto"):
        backend.use(attention="cuda:sm_91")
    with backend.use(attention=SM90):
        assert backend.explain("attention", "cpu", BF16) == (SM90, "chosen")


def test_the_op_refuses_what_the_public_function_does_not_pass(hopper: ctypes.CDLL) -> None:
    q = heads(1, 5, 2, 64)
    o: dict[str, Any] = dict.fromkeys(
        ("scale", "window", "cu_seqlens_q", "cu_seqlens_k", "doc_ids", "kv_lens", "kv_start")
    )
    options = pack(q, o | {"causal": True, "softcap": 2.0, "dropout_p": 0.0})
    with pytest.raises(RuntimeError, match="takes causal order or none without other options"):
        ATTENTION_FWD[SM90](q, q, q, *options)


def test_launches_fit_the_device(hopper: ctypes.CDLL) -> None:
    """Shared memory is what bench.codegen counts with, and at most the 227 KB of a block."""
    from fastgpt.bench import codegen

    kernels = emulator.load(Path(os.environ["FASTGPT_EMULATED_CUDA"]))
    for dim in (64, 128):
        sizes = dict(n_batch=3, n_queries=1000, n_keys=1000, n_heads=8, n_kv_heads=2, head_dim=dim, scale=0.1, dtype=1)
        (forward,) = kernels.attention_fwd_sm90(**sizes, causal=True)
        _, dkdv, dq = kernels.attention_bwd_sm90(**sizes, causal=True)
        for name, launch, n_heads in (("fwd", forward, 8), ("dkdv", dkdv, 2), ("dq", dq, 8)):
            assert launch[:6] == [8 * 3 * n_heads, 1, 1, 384, 1, 1]
            assert launch[6] == codegen.launched_shared(f"attention_{name}_sm90_kernel<bf16, {dim}>") <= 227 * 1024


@pytest.mark.slow
def test_they_have_no_races() -> None:
    done = races.run(races.build_sm90())
    assert done.returncode == 0 and done.stdout == "causal: clean\n", done.stdout + done.stderr


# file -> a wait for products, the release of their stage after it
EARLY = {
    "sm90.cu": ("  ptx::wgmma_wait<1>();\n  ptx::settle(s.z[0]);\n", "  release(at.k_empty(stage));\n"),
    "sm90_bwd.cu": (
        "  ptx::wgmma_wait<1>();  // dq of the tile before\n",
        "  if (key0 > 0) release(at.k_empty(before));\n",
    ),
    "sm90_dkdv.cu": (
        "  ptx::wgmma_wait<1>();  // dk and dv of the step before\n",
        "  if (before >= 0) release(at.empty(before));\n",
    ),
}


@pytest.mark.extended
@pytest.mark.parametrize("file", EARLY)
def test_a_planted_race_is_found(file: str) -> None:
    """Planted: a stage is free before its products are done."""
    wait, free = EARLY[file]
    done = races.run(races.build_sm90((f"attention/{file}", wait + free, free + wait)))
    assert done.returncode == 1 and "race on" in done.stdout and "wgmma of warpgroup" in done.stdout, done.stdout


# What is broken -> the file, its text, a replacement
MUTATIONS = {
    "scores that nobody waits for": ("sm90.cu", "ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();"),
    "stage that is free too early": ("sm90.cu", "  ptx::mbarrier_wait(empty, (i / Tile::kStages & 1) ^ 1);\n", ""),
    "keys that nobody waits for": (
        "sm90.cu",
        "  ptx::mbarrier_wait(at.k_full(stage), i / Tile::kStages & 1);\n",
        "",
    ),
    "parity of the values": (
        "sm90.cu",
        "at.v_full(before), (i - 1) / Tile::kStages & 1",
        "at.v_full(before), i / Tile::kStages & 1",
    ),
    "one warp frees a stage": ("sm90.cu", "? 1 : kConsumerWarps)", "? 1 : 1)"),
    "block of the values": ("sm90.cuh", "2 * kAtomBytes, kBlockBytes<16 * K>)", "2 * kAtomBytes, kAtomBytes)"),
    "a turn too many": ("sm90.cu", "  if (group == 0 && n > 1) take_turn(group);  // as many as were passed\n", ""),
    "causal mask": ("sm90.cu", "i < masked; ++i) step<T, D, true>", "i < masked; ++i) step<T, D, false>"),
    "swizzle of what is stored": ("sm90.cuh", "(m % 8 ^ (row & 7)) * 16", "(m % 8 ^ (row & 3)) * 16"),
    "dq: stage that is free too early": ("sm90_bwd.cu", "  ptx::mbarrier_wait(empty, parity ^ 1);\n", ""),
    "dq: dp that nobody waits for": ("sm90_bwd.cu", "  ptx::wgmma_wait<0>();\n  ptx::settle(dz[0]);\n", ""),
    "dq: keys that nobody waits for": ("sm90_bwd.cu", "  ptx::mbarrier_wait(at.k_full(i), stage.parity);\n", ""),
    "dq: causal mask": ("sm90_bwd.cu", "if (key0 + Tile::kKeys > causal_end(l, c.query))", "if (key0 > 0)"),
    "dq: the map of q begins at the first query": (
        "sm90_bwd.cu",
        "p.q(), p.rows_full(), at.query0 - s.low",
        "p.q(), p.rows_full(), at.query0",
    ),
    "dk, dv: stage that is free too early": (
        "sm90_dkdv.cu",
        "  ptx::mbarrier_wait(p.empty(i), stage.parity ^ 1);\n",
        "",
    ),
    "dk, dv: stage that is free one step early": (
        "sm90_dkdv.cu",
        "  if (before >= 0) release(at.empty(before));\n",
        "  release(at.empty(i));\n",
    ),
    "dk, dv: dp that nobody waits for": ("sm90_dkdv.cu", "  ptx::wgmma_wait<0>();\n  ptx::settle(dz);\n", ""),
    "dk, dv: keys of the other consumer": ("sm90_dkdv.cu", "before, group * kBlockBytes<kOwn>,", "before, 0,"),
    "dk, dv: lse of the other column": ("sm90_dkdv.cu", "scales[column_of(n) + e % 2].lse", "scales[column_of(n)].lse"),
    "dk, dv: heads of the group": ("sm90_dkdv.cu", "head < at.heads; ++head", "head < 1; ++head"),
}


@pytest.mark.extended
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_caught(name: str) -> None:
    """It shows in every order of threads: other bits, an error, or a crashed process."""
    import json

    def digests(library: Any, known: emulator.Digests) -> emulator.Digests:
        done = emulator.run(library, "attention:sm_90a", known)
        found: emulator.Digests = json.loads(done.stdout) if done.returncode == 0 else {}
        return found

    right = digests(emulator.build(), {})
    assert right["forward"] == right["backward"] == right["random"] and all(len(d) == 64 for d in right["random"])
    file, *replacement = MUTATIONS[name]
    library = emulator.build(mutate=(f"attention/{file}", *replacement), op="attention")
    found = digests(library, right)
    assert all(found.get(schedule) != digest for schedule, digest in right.items()), found

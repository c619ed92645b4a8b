"""The forward kernel of attention for sm_90a under the emulation: parity, orders of threads, calls that it leaves to
the plain kernel, and broken sources, which must be caught. It has never run on a device."""

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


@pytest.mark.parametrize("dim", [64, 128])
def test_orders_of_threads_agree_bitwise(hopper: ctypes.CDLL, dim: int) -> None:
    q, k, v = (heads(1, 300, h, dim) for h in (2, 1, 1))
    found = []
    for schedule in range(3):
        hopper.fastgpt_set_schedule(schedule, 1)
        with backend.use(strict=True, attention=SM90):
            found.append(ops.attention(q, k, v, causal=True, return_lse=True))
    for out, lse in found[1:]:
        assert torch.equal(out, found[0][0]) and torch.equal(lse, found[0][1])


def test_gradients_come_from_the_plain_kernel(hopper: ctypes.CDLL) -> None:
    qkv = heads(1, 40, 4, 64).requires_grad_()
    with backend.use(strict=True, attention=SM90):
        ops.attention_qkv(qkv, n_heads=2, n_kv_heads=1, causal=True).float().sum().backward()
    assert qkv.grad is not None and qkv.grad.isfinite().all() and qkv.grad.any()


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
        (launch,) = kernels.attention_fwd_sm90(**sizes, causal=True)
        assert launch[:6] == [8 * 3 * 8, 1, 1, 384, 1, 1]
        assert launch[6] == codegen.launched_shared(f"attention_fwd_sm90_kernel<bf16, {dim}>") <= 227 * 1024


@pytest.mark.slow
def test_it_has_no_races_and_a_planted_one_is_found() -> None:
    """Planted: a stage of keys is free before its products are done."""
    wait, free = "  ptx::wgmma_wait<1>();\n  ptx::settle(s.z[0]);\n", "  release(at.k_empty(stage));\n"
    done = races.run(races.build_sm90())
    assert done.returncode == 0 and done.stdout == "causal: clean\n", done.stdout + done.stderr
    done = races.run(races.build_sm90(("attention/sm90.cu", wait + free, free + wait)))
    assert done.returncode == 1 and "race on" in done.stdout and "wgmma of warpgroup" in done.stdout, done.stdout


# What is broken -> the text of sm90.cu, its replacement
MUTATIONS = {
    "scores that nobody waits for": ("ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();"),
    "stage that is free too early": ("  ptx::mbarrier_wait(empty, (i / Tile::kStages & 1) ^ 1);\n", ""),
    "keys that nobody waits for": ("  ptx::mbarrier_wait(at.k_full(stage), i / Tile::kStages & 1);\n", ""),
    "parity of the values": (
        "at.v_full(before), (i - 1) / Tile::kStages & 1",
        "at.v_full(before), i / Tile::kStages & 1",
    ),
    "one warp frees a stage": ("? 1 : warps)", "? 1 : 1)"),
    "block of the values": ("c * 2 * kAtomBytes, Tile::kKeyBlock)", "c * 2 * kAtomBytes, kAtomBytes)"),
    "a turn too many": ("  if (group == 0 && n > 1) take_turn(group);  // as many as were passed\n", ""),
    "causal mask": ("i < masked; ++i) step<T, D, true>", "i < masked; ++i) step<T, D, false>"),
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
    library = emulator.build(mutate=("attention/sm90.cu", *MUTATIONS[name]), op="attention")
    found = digests(library, right)
    assert all(found.get(schedule) != digest for schedule, digest in right.items()), found

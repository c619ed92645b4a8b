"""The Triton kernels compile for sm_80 and sm_90 without spilling, in a separate process.

`make triton-check`, which `.ci/run` calls, compiles all configurations, `make test-all` also every dtype, alignment and
chip. Its selection for a quick look (bf16, no options and all options, some widths) is tested in `make test-all`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


def _check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "fastgpt.checks.triton", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.extended
def test_configurations_compile_without_spills(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = _check("--quick", "--json", str(out))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    reports = json.loads(out.read_text())
    assert {r["arch"] for r in reports} >= {80, 90}
    kernels = (
        "layer_norm_fwd layer_norm_bwd rms_norm_fwd rms_norm_bwd norm_partials_wide add_partials rope_fwd rope_rows "
    )
    kernels += "cross_entropy_fwd_bwd adamw_prepare adamw_update embedding_fwd embedding_bwd"
    for kernel in kernels.split():
        assert any(r["name"].startswith(f"{kernel}_kernel[") for r in reports), f"{kernel} was not checked"
    assert all(r["registers"] > 0 for r in reports)
    assert "FP_FUSION" not in done.stdout + done.stderr  # Triton 3.9's warning


def test_chips_stages_and_the_quick_selection_are_as_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgpt.checks import triton as triton_check
    from fastgpt.kernels import swiglu

    some = next(swiglu.configurations(torch.bfloat16))
    table = [some, dataclasses.replace(some, archs=(80, 90), num_stages=3), dataclasses.replace(some, quick=False)]
    monkeypatch.setattr(triton_check, "MODULES", ("swiglu",))
    monkeypatch.setattr(triton_check, "configurations", lambda *_: table)
    every = [(j.number, j.arch) for j in triton_check.jobs([80, 86], False)]
    assert every == [(0, 80), (0, 86), (1, 80), (2, 80), (2, 86)]
    assert [(j.number, j.arch) for j in triton_check.jobs([86, 90], False, quick=True)] == [(0, 86), (0, 90), (1, 90)]
    assert len(triton_check.jobs([90], True)) == 3 * 4 * 2
    table.append(dataclasses.replace(some, archs=(86, 89)))
    assert [j.arch for j in triton_check.jobs(None, False) if j.number in (1, 3)] == [80, 90, 86]
    assert [j.arch for j in triton_check.jobs(None, True) if j.number == 3] == [86, 89] * 8
    assert not [j for j in triton_check.jobs([90], True) if j.number == 3]
    table.pop()
    options: list[dict[str, int]] = []
    monkeypatch.setattr(triton_check, "_source", lambda *_: None)
    monkeypatch.setattr(triton_check.triton, "compile", lambda source, target, options: seen(options))

    def seen(given: dict[str, int]) -> None:
        options.append(given)
        raise RuntimeError("far enough")

    reports = [triton_check.compile_one(job) for job in triton_check.jobs([90], False)]
    given = {"enable_fp_fusion": True, "num_warps": 4}
    assert options == [given, {**given, "num_stages": 3}, given]
    assert all("far enough" in triton_check.problem(r) for r in reports)


def test_every_kernel_is_launched_with_fp_fusion() -> None:
    """Whatever Triton's default is: on from 3.6 to 3.9, off from 3.10 on."""
    from fastgpt.checks import triton as triton_check
    from fastgpt.kernels._runtime import jit_kernel

    names = (*triton_check.MODULES, "attention_bwd", "_norm", "_partials")
    modules = [importlib.import_module(f"fastgpt.kernels.{name}") for name in names]
    kernels = [
        (name, k) for m in modules for name, k in vars(m).items() if name.endswith("_kernel") and k is not jit_kernel
    ]
    assert len(kernels) > 30
    assert [name for name, k in kernels if getattr(k.run, "keywords", None) != {"enable_fp_fusion": True}] == []


LAUNCH = """
import torch
import triton
import triton.language as tl
from fastgpt.kernels._runtime import jit_kernel

class Driver:
    get_current_device = get_current_stream = get_device_capability = staticmethod(lambda *_: 0)
    get_current_target = staticmethod(lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32))

def multiply_and_add(x_ptr, N):
    i = tl.arange(0, 32)
    x = tl.load(x_ptr + i, i < N)
    tl.store(x_ptr + i, x * x + 1.0, i < N)

triton.runtime.driver._active = Driver
compiled = jit_kernel(do_not_specialize=["N"])(multiply_and_add).warmup(torch.float32, 1, grid=(1,))
assert compiled.metadata.enable_fp_fusion
assert "fma.rn" in compiled.asm["ptx"]
"""


def test_fp_fusion_reaches_the_compiler(tmp_path: Path) -> None:
    """In a separate process: where the interpreter has run, Triton 3.6 does not compile any more."""
    script = tmp_path / "launch.py"  # Triton reads a kernel's source from its file
    script.write_text(LAUNCH)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "0"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_interpreter_is_refused() -> None:
    done = _check(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_problems_are_found() -> None:
    from fastgpt.checks.triton import Report, problem

    assert problem(Report("k[x] bfloat16", 90, 4, registers=64, stack=0, shared=1024)) == ""
    assert "8 bytes of stack" in problem(Report("k[x] bfloat16", 90, 4, registers=64, stack=8))
    assert problem(Report("k[x] bfloat16", 90, 4, registers=40, programs=12)) == ""
    assert "12 x 41 registers x 4 warps do not fit" in problem(Report("k[x] bfloat16", 90, 4, 41, programs=12))
    assert "99 KB" in problem(Report("k[x] bfloat16", 89, 4, registers=64, shared=100 * 1024))
    assert problem(Report("k[x] bfloat16", 90, 4, error="PTXASError: no")) == "PTXASError: no"

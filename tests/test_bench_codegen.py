"""The codegen table: the occupancy bound against published examples, rows from a real compilation, and one line if
tools are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.bench import _harness, codegen
from fastgpt.checks import cuda as cuda_check

ROOT = Path(__file__).resolve().parents[1]
KERNELS = """
#include <cuda_runtime.h>
#define FASTGPT_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
__global__ void __launch_bounds__(128) copy_kernel(const uint4* x, uint4* y) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void __launch_bounds__(256, 2) turn_kernel(const uint4* x, uint4* y) {
  FASTGPT_DYNAMIC_SHARED(uint4, tile);
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[255 - threadIdx.x];
}
"""


@pytest.mark.parametrize(
    "chip, threads, registers, shared, blocks, limit",
    [
        (80, 256, 32, 0, 8, "threads"),  # 64 warps
        (80, 32, 16, 0, 32, "blocks"),
        (80, 256, 64, 0, 4, "registers"),  # 64 x 32 = 2048 a warp: 8 fit in each quarter's 16384
        (80, 128, 40, 0, 12, "registers"),  # 1280 a warp: 12 in a quarter
        (80, 128, 33, 0, 12, "registers"),  # rounded up to 40
        (80, 256, 255, 0, 1, "registers"),
        (80, 128, 32, 48 * 1024, 3, "shared memory"),  # 49 KB including what the system reserves, of 164
        (90, 128, 32, 48 * 1024, 4, "shared memory"),  # of 228
        (90, 384, 168, 227 * 1024, 1, "registers"),
        (86, 256, 32, 0, 6, "threads"),  # 48 warps
        (89, 32, 16, 0, 24, "blocks"),
    ],
)
def test_occupancy_bound(chip: int, threads: int, registers: int, shared: int, blocks: int, limit: str) -> None:
    found = codegen.occupancy(chip, threads, registers, shared)
    assert (found["blocks_per_sm"], found["limited_by"]) == (blocks, limit)
    assert found["occupancy_pct"] == pytest.approx(100 * blocks * threads / 32 / codegen.CHIPS[chip][0])


def test_kernels_with_shared_memory_of_the_launch_are_known() -> None:
    found = codegen.dynamic_kernels(ROOT / "csrc")
    assert {"attention_fwd_kernel", "attention_dq_kernel", "attention_dkdv_kernel", "bias_gelu_bwd_kernel"} <= found
    assert not {"bias_gelu_fwd_kernel", "adamw_update_kernel", "layer_norm_fwd_kernel"} & found


@pytest.mark.nvcc
@pytest.mark.skipif(cuda_check.find_nvcc() is None, reason="no nvcc here")
def test_rows_of_cuda_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for op, text in (("a", KERNELS), ("other", "syntax error")):
        (tmp_path / op).mkdir()
        (tmp_path / op / "cuda.cu").write_text(text)
    command = ["--language", "cuda", "--source", str(tmp_path), "--json", str(tmp_path / "rows.jsonl")]
    assert codegen.main([*command, "--only", "a"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {(r["kernel"], r["arch"]) for r in rows} == {
        (k, a) for k in ("copy_kernel", "turn_kernel") for a in cuda_check.ARCHS
    }
    assert {(r["kernel"], r["threads"], r["dynamic_shared"]) for r in rows} == {
        ("copy_kernel", 128, False),
        ("turn_kernel", 256, True),
    }
    for r in rows:
        assert r["registers"] > 0 and r["blocks_per_sm"] > 0 and r["hmma"] == r["wgmma"] == 0
        assert r["compiler"].startswith("nvcc 1") and r["machine"]["sources"]
    out = capsys.readouterr().out
    assert "<= 8" in out and "cuda kernels: 4" in out
    assert codegen.main(command) == 1 and "not compiled: other/cuda.cu" in capsys.readouterr().out


def test_without_a_compiler_the_other_half_still_comes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_check, "find_nvcc", lambda: None)
    row = {"kernel": "k", "arch": "sm_80", "red": "PTXASError"}
    monkeypatch.setattr(codegen, "triton_rows", lambda only, every: [row])
    assert codegen.main([]) == 1
    out = capsys.readouterr().out
    assert "cuda kernels: not compiled: cuda_check: no nvcc found" in out and "not compiled: k: PTXASError" in out


def test_under_the_interpreter_triton_compiles_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        assert codegen.main(["--language", "triton"]) == 0
        assert "triton kernels: not compiled: TRITON_INTERPRET is set" in capsys.readouterr().out


def test_rows_of_triton_kernels(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "fastgpt.bench.codegen", "--language", "triton", "--only", "swiglu"]
    done = subprocess.run([*command, "--json", str(file)], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kernels = {r["kernel"].split("[")[0] for r in rows}
    assert kernels == {"swiglu_fwd_kernel", "swiglu_bwd_kernel"} and {r["arch"] for r in rows} == {"sm_80", "sm_90"}
    assert len(rows) == 2 * 2 * codegen.PER_KERNEL == len({(r["kernel"], r["arch"]) for r in rows})
    assert all(r["hmma"] == 0 and r["registers"] > 0 and r["threads"] >= 128 for r in rows)
    assert all(r["machine"][key] for r in rows for key in _harness.PROVENANCE)


def test_tensor_core_instructions_are_counted_in_machine_code(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code = (
        "from fastgpt.checks import triton as triton_check; from fastgpt.bench import codegen\n"
        "for arch in (80, 90):\n"
        "    found = [j for j in triton_check.jobs([arch], False) if j.module == 'attention']\n"
        "    names = [c.name for c in triton_check.configurations('attention', 'bfloat16', 'bfloat16')]\n"
        "    job = next(j for j in found if names[j.number].startswith('attention_fwd_kernel[D=64 '))\n"
        "    r = codegen._counted(job); print(r.arch, r.hmma + r.wgmma, r.stack)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    counts = [line.split() for line in done.stdout.splitlines()]
    assert [c[0] for c in counts] == ["80", "90"] and all(int(c[1]) > 0 for c in counts), done.stdout + done.stderr


def test_some_of_each_keeps_the_first_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_check = pytest.importorskip("fastgpt.checks.triton")
    jobs = triton_check.jobs([90], False)
    picked = codegen.some_of_each(jobs)
    name = {j: triton_check.configurations(j.module, j.dtype, j.weight_dtype)[j.number].name for j in jobs}
    kernels = {name[j].split("[")[0] for j in jobs}
    assert {name[j].split("[")[0] for j in picked} == kernels and len(picked) <= codegen.PER_KERNEL * len(kernels)
    one = [j for j in jobs if name[j].startswith("swiglu_fwd_kernel[")]
    assert {one[0], one[-1]} <= set(picked) and torch.device("cpu") == codegen.MACHINE

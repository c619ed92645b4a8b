"""The compile check of the CUDA kernels must itself be able to fail. The kernels are checked by `make cuda-check`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fastgpt.checks import cuda as cuda_check

ROOT = Path(__file__).parents[1]
needs_nvcc = pytest.mark.skipif(cuda_check.find_nvcc() is None, reason="no nvcc here")

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 352 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_80'
    16 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 512 bytes smem, 352 bytes cmem[0]
"""
WIDE = """
#include <cuda_runtime.h>
__global__ void copy(const uint4* x, uint4* y) { y[threadIdx.x] = x[threadIdx.x]; }
"""
SCALAR_PRODUCT = """
#include <cuda_runtime.h>
template <int> __global__ void attention_fwd_kernel(const uint4* x, uint4* y) { y[threadIdx.x] = x[threadIdx.x]; }
template __global__ void attention_fwd_kernel<1>(const uint4* x, uint4* y);
"""
NARROW = """
#include <cuda_runtime.h>
__global__ void copy(const int* x, int* y) { y[threadIdx.x] = x[threadIdx.x]; }
"""
LOCAL = """
#include <cuda_runtime.h>
__global__ void copy(const uint4* x, uint4* y, int i) {
  unsigned a[64];
  for (int k = 0; k < 64; ++k) a[x[k].x % 64] = x[k].y + x[k].z + x[k].w;
  y[threadIdx.x] = uint4{a[i], a[i + 1], a[i + 2], a[i + 3]};
}
"""


def write_source(folder: Path, text: str) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "cuda.cu").write_text(text)


def test_parse_ptxas() -> None:
    found = cuda_check.parse_ptxas(PTXAS)
    assert found["_Z1av"] == {"registers": 8, "stack": 0, "spills": 0, "shared": 0}
    assert found["_Z1bv"] == {"registers": 64, "stack": 16, "spills": 32, "shared": 512}
    with pytest.raises(ValueError, match="no resources"):
        cuda_check.parse_ptxas("Compiling entry function '_Z1av' for 'sm_80'")


def test_instructions() -> None:
    text = (
        "\t.section\t.text._Z1av,'ax'\n LDG.E.128 R4, [R2]\n LDG.E.128.CONSTANT R4\n LDG.E.64 R2\n LDG.E.CONSTANT R1\n"
        "\t.section\t.text._Z1bv,'ax'\n LDG.E R2\n LDGSTS.E.BYPASS.128.ZFILL [R1], [R8.64], P1\n LDGSTS.E [R1]\n"
        " HMMA.16816.F32.BF16 R4, R8\n HMMA.16816.F32 R4, R8\n HGMMA.64x128x16.F32.BF16 R24, R4\n"
        " UTMALDG.4D [UR8], [UR4]\n"
    )
    assert cuda_check.instructions(text) == {
        "_Z1av": dict.fromkeys(cuda_check.COUNTED, 0) | {"wide_loads": 2},
        "_Z1bv": {"wide_loads": 0, "wide_copies": 1, "tensor_products": 2, "warpgroup_products": 1, "tensor_copies": 1},
    }


def test_threads_are_those_of_the_launch_bounds() -> None:
    text = (
        '\t.section\t.nv.info,"",@"SHT_CUDA_INFO"\n\t.section\t.nv.info._Z1av,"",@"SHT_CUDA_INFO"\n'
        "//----- nvinfo : EIATTR_MAX_THREADS\n\t.align\t4\n.L_1:\n .byte 0x04, 0x05\n .short (.L_3 - .L_2)\n"
        '.L_2:\n /*4*/ .word\t0x00000080\n /*8*/ .word 0x00000001\n\t.section\t.nv.info._Z1bv,"",@"SHT_CUDA_INFO"\n'
        "//----- nvinfo : EIATTR_REGCOUNT\n .word 0x00000040\n"
    )
    assert cuda_check.most_threads(text) == {"_Z1av": 128}


def test_problem() -> None:
    def kernel(name: str, stack: int, spills: int, loads: int) -> cuda_check.Kernel:
        return cuda_check.Kernel(name, "sm_80", 64, stack, spills, 0, loads)

    ours = cuda_check.excuses(ROOT / "csrc")
    allowed = ours | {"spills": {"a<*, 4>": {"bytes": 16, "reason": "why"}}}
    assert cuda_check.problem(kernel("a<float, 4>", 0, 0, 1), ours) == ""
    assert "spills" in cuda_check.problem(kernel("a<float, 4>", 8, 16, 1), ours)
    assert cuda_check.problem(kernel("a<float, 4>", 8, 16, 1), allowed) == ""
    assert "allows 16" in cuda_check.problem(kernel("a<float, 4>", 8, 17, 1), allowed)
    assert "128-bit" in cuda_check.problem(kernel("a<float, 4>", 0, 0, 0), ours)
    assert cuda_check.problem(kernel("layer_norm_fwd_kernel<float, float, 1>", 0, 0, 0), ours) == ""
    products = {"name": "attention_fwd_kernel<bf16, 64, false>", "arch": "sm_80", "registers": 64, "stack": 0}
    for copies, hmma, says in ((1, 0, "HMMA"), (0, 1, "LDGSTS"), (1, 1, "")):
        made = cuda_check.Kernel(**products, spills=0, shared=0, wide_loads=9, wide_copies=copies, tensor_products=hmma)
        found = cuda_check.problem(made, ours)
        assert says in found and bool(says) == bool(found)
    for arch, hgmma, copies, says in (("sm_80", 0, 0, ""), ("sm_90a", 0, 9, "HGMMA"), ("sm_90a", 9, 0, "UTMALDG")):
        made = cuda_check.Kernel("attention_fwd_sm90_kernel<bf16, 64>", arch, 168, 0, 0, 0, 0)
        made = dataclasses.replace(made, warpgroup_products=hgmma, tensor_copies=copies)
        found = cuda_check.problem(made, ours)
        assert says in found and bool(says) == bool(found)


def test_what_the_compiler_says_of_lost_speed_is_a_failure() -> None:
    """As ptxas 13.0 says it."""
    for said in (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "insufficient register resources for the wgmma pipeline in the function '_Z1av'",
        "ptxas warning : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to allow debugging.",
    ):
        assert cuda_check.LOSSES.search(said)
    assert not cuda_check.LOSSES.search(PTXAS)


def test_excuses_name_a_reason() -> None:
    ours = cuda_check.excuses(ROOT / "csrc")
    assert all(isinstance(entry["bytes"], int) and len(entry["reason"]) > 10 for entry in ours["spills"].values())
    assert ours["scalar"] and all(len(why) > 10 for why in ours["scalar"].values()) and len(ours["tensor_cores"]) == 3


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cuda_check, "find_nvcc", lambda: None)
    assert cuda_check.main([]) == 2
    message = capsys.readouterr().err
    assert "CUDA_HOME" in message and "requirements-dev.txt" in message and len(message.splitlines()) == 1


def test_find_nvcc_in_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.path", [str(tmp_path / "site")])
    assert cuda_check.find_nvcc() == nvcc
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert cuda_check.find_nvcc() == home / "bin" / "nvcc"


@needs_nvcc
@pytest.mark.nvcc
@pytest.mark.parametrize(
    "text, code, says",
    [
        (WIDE, 0, "0 refused"),
        (NARROW, 1, "no 128-bit load"),
        (SCALAR_PRODUCT, 1, "no product on tensor cores"),
        (LOCAL, 1, "bytes of stack"),
        ("syntax error", 1, "1 compilations failed"),
        (WIDE.replace("y[threadIdx.x] =", "int unused; y[threadIdx.x] ="), 1, "1 compilations failed"),
    ],
)
def test_main(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, code: int, says: str) -> None:
    write_source(tmp_path, text)
    (tmp_path / "a" / "cuda_check.json").write_text(json.dumps({"tensor_cores": ["attention_fwd_kernel<*"]}))
    arguments = ["--source", str(tmp_path), "--arch", "sm_80", "--json", str(tmp_path / "table.json")]
    assert cuda_check.main(arguments) == code
    assert says in capsys.readouterr().out
    if code == 0:
        (kernel,) = json.loads((tmp_path / "table.json").read_text())
        assert kernel["name"] == "copy" and kernel["wide_loads"] == 1


@needs_nvcc
@pytest.mark.nvcc
def test_allowed_spill(tmp_path: Path) -> None:
    write_source(tmp_path, LOCAL)
    excuse = {"spills": {"copy": {"bytes": 256, "reason": "dynamic index, for the test"}}}
    (tmp_path / "a" / "cuda_check.json").write_text(json.dumps(excuse))
    assert cuda_check.main(["--source", str(tmp_path), "--arch", "sm_80"]) == 0

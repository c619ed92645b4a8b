"""The instruction sets of linear's CPU kernels; tests for the one of this machine are in tests/ops/test_linear.py."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.extended
def test_no_byte_out_of_bounds_on_any_instruction_set(tmp_path: Path) -> None:
    """Under AddressSanitizer, with buffers that end at the last element, any strides and dtypes: every output is right.
    Errors are relative to the sum of the products' magnitudes, and to the precision of the output."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    (tmp_path / "level.h").write_text("extern int highest_level;\n#define FASTGPT_HIGHEST_LEVEL highest_level\n")
    sources = [
        str(p) for p in (ROOT / "tests" / "linear_cpu.cpp", *sorted((ROOT / "csrc" / "linear").glob("cpu*.cpp")))
    ]
    flags = ["-std=c++17", "-O1", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp-simd"]
    flags += ["-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += [f"-I{ROOT / 'csrc'}", "-include", str(tmp_path / "level.h"), "-o", str(tmp_path / "bounds")]
    built = subprocess.run([compiler, *flags, *sources], capture_output=True, text=True)
    if "cannot find -lasan" in built.stderr or "libasan" in built.stderr:
        pytest.skip("needs AddressSanitizer's library")
    assert built.returncode == 0, built.stderr
    for level in ("4", "3", "0"):
        done = subprocess.run([tmp_path / "bounds", "300", level], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        errors = [float(x) for x in done.stdout.split()]
        assert len(errors) == 300 and all(e < 4 * 2.0**-24 for e in errors), (level, max(errors))

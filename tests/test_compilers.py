"""The CPU kernels are portable C++: the compilers found here accept them without a warning, for x86-64 and aarch64."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*/cpu*.cpp"))
FLAGS = "-std=c++20 -O2 -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=off -fPIC".split()
WARNINGS = "-Wall -Wextra -Werror -Wno-psabi".split()


@pytest.mark.extended
@pytest.mark.parametrize("compiler", ["g++", "clang++", "aarch64-linux-gnu-g++"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: f"{s.parent.name}/{s.name}")
def test_kernels_compile_without_warnings(compiler: str, source: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    command = [compiler, *FLAGS, *WARNINGS, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

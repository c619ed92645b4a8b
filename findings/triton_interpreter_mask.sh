#!/usr/bin/env bash
# What: Triton's interpreter refuses a mask that a scalar condition is part of, such as program_id == 0 for a block of
#       pointers, alone or in (column < C) & (program_id == 0); both compile to a mask of int1. Up to 3.7.1 the
#       interpreter took them as well.
# Versions: triton 3.9.0 (torch 2.13.0 only supplies the tensors).
# Source: triton/runtime/interpreter.py: the result of a comparison keeps its left operand's type (binary_op), so that
#         create_splat spreads the condition over the block as int32, and 3.9's store takes numpy's bool only.
# Date: 2026-11-29. Exit code: 0 while triton behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check triton==3.9.0 numpy==2.2.6
cat > kernel.py <<'PY'
import triton
import triton.language as tl


@triton.jit
def block(x, C, N: tl.constexpr):
    column = tl.arange(0, N)
    tl.store(x + column, 1.0, column < C)


@triton.jit
def chosen(x, C, N: tl.constexpr):
    column = tl.arange(0, N)
    tl.store(x + column, 1.0, tl.where(tl.program_id(0) == 0, column < C, column < 0))


@triton.jit
def scalar(x, C, N: tl.constexpr):
    column = tl.arange(0, N)
    tl.store(x + column, 1.0, tl.program_id(0) == 0)


@triton.jit
def both(x, C, N: tl.constexpr):
    column = tl.arange(0, N)
    tl.store(x + column, 1.0, (column < C) & (tl.program_id(0) == 0))
PY
cat > compiled.py <<'PY'
import kernel
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

print("triton", triton.__version__)
print("a mask with a scalar condition in it compiles, but the interpreter refuses its type")
for kernel_, operation in ((kernel.scalar, "tt.splat"), (kernel.both, "arith.andi")):
    source = ASTSource(kernel_, {"x": "*fp32", "C": "i32", "N": "constexpr"}, constexprs={"N": 8})
    ttir = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ttir"]
    lines = [line.strip().split(" loc(")[0] for line in ttir.splitlines() if operation in line and "8xi1" in line]
    print("compiled:", kernel_.__name__, *lines)
    if not lines:
        raise SystemExit("CHANGED")
PY
cat > interpreted.py <<'PY'
import kernel
import torch

seen = []
for kernel_ in (kernel.block, kernel.chosen, kernel.scalar, kernel.both):
    x = torch.zeros(8)
    try:
        kernel_[(1,)](x, 5, 8)
        seen.append([int(v) for v in x])
    except Exception as error:
        seen.append(str(error))
    print("interpreted:", kernel_.__name__, seen[-1])
same = seen[:2] == [[1] * 5 + [0] * 3] * 2 and all("mask has unsupported dtype" in str(error) for error in seen[2:])
print("unchanged" if same else "CHANGED")
raise SystemExit(not same)
PY
export TRITON_CACHE_DIR=$work/cache TRITON_DEFAULT_FP_FUSION=1
venv/bin/python -W ignore compiled.py
TRITON_INTERPRET=1 venv/bin/python -W ignore interpreted.py

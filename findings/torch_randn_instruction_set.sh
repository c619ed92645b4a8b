#!/usr/bin/env bash
# What: on a CPU with AVX2 the same seed gives other float32 normal numbers than on one without, in the last bits of
#       two values in five, but only in tensors of 16 or more elements. Float64, bfloat16, uniform and exponential
#       numbers agree. So weights that were drawn in float32 from one seed differ between machines, and weights that
#       were drawn in float64 and rounded do not.
# Versions: torch 2.13.0 (CPU), x86-64 with AVX2. ATEN_CPU_CAPABILITY=default stands for a machine without it.
# Source: normal_fill and normal_fill_AVX2 in aten/src/ATen/native/cpu/DistributionTemplates.h: the latter takes its own
#         polynomials for log, cos and sin.
# Date: 2026-11-29. Exit code: 0 while torch behaves like this, 1 once it does not (or where there is no AVX2).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
cat > draw.py <<'PY'
import sys

import torch


def generator():
    return torch.Generator().manual_seed(0)


torch.save(
    {
        "randn, 15 float32": torch.randn(15, generator=generator()),
        "randn, 16 float32": torch.randn(16, generator=generator()),
        "randn, 1000 float32": torch.randn(1000, generator=generator()),
        "randn, 1000 float64": torch.randn(1000, generator=generator(), dtype=torch.float64),
        "randn, 1000 bfloat16": torch.randn(1000, generator=generator(), dtype=torch.bfloat16),
        "rand, 1000 float32": torch.rand(1000, generator=generator()),
        "exponential_, 1000 float32": torch.empty(1000).exponential_(generator=generator()),
    },
    sys.argv[1],
)
PY
cat > compare.py <<'PY'
import torch

default, avx2 = torch.load("default.pt"), torch.load("avx2.pt")
print("torch", torch.__version__)
print("float32 normal numbers of one seed differ between instruction sets from 16 elements on")
same = True
for name, a in default.items():
    b = avx2[name]
    differ, most = int((a != b).sum()), float((a - b).abs().max())
    print(f"  {name:27} {differ} of {len(a)} differ, by {most:.1e} at most")
    same &= (differ > 0) == (name in ("randn, 16 float32", "randn, 1000 float32"))
print("unchanged" if same else "CHANGED")
raise SystemExit(not same)
PY
for capability in default avx2; do
  ATEN_CPU_CAPABILITY=$capability venv/bin/python -W ignore draw.py $capability.pt
done
venv/bin/python -W ignore compare.py

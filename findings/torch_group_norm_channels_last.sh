#!/usr/bin/env bash
# What: group_norm on the CPU returns values in the thousands for a channels_last input with a large mean, although the
#       same numbers in the usual layout are normalized with an error below 0.001.
# Versions: torch 2.13.0 (CPU).
# Source: aten/src/ATen/native/cpu/group_norm_kernel.cpp. The one-pass variance E[x^2] - E[x]^2 that
#         pytorch/pytorch#40302 reports is gone from the contiguous kernel; the channels_last kernel (#49821) shows the
#         same loss.
# Date: 2026-11-29. Exit code: 0 while torch behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
cat > check.py <<'PY'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
print("torch", torch.__version__)
print("group_norm of mean + normal noise, shape (2, 32, 16, 16), 8 groups, float32:")
print("a channels_last input loses the variance to cancellation, a contiguous one does not")
print(f"{'mean':>6} {'contiguous: max error':>22} {'channels_last: max error':>25} {'largest output':>15}")
errors = {}
for mean in (0.0, 100.0, 1000.0, 4096.0):
    x = torch.randn(2, 32, 16, 16) + mean
    expected = F.group_norm(x.double(), 8)
    usual = F.group_norm(x, 8)
    last = F.group_norm(x.to(memory_format=torch.channels_last), 8)
    errors[mean] = [(y - expected).abs().max().item() for y in (usual, last)]
    print(f"{mean:6.0f} {errors[mean][0]:22.1e} {errors[mean][1]:25.1e} {last.abs().max().item():15.1f}")
same = errors[0.0][1] < 1e-4 and errors[100.0][1] > 1e-3 and errors[4096.0][1] > 10
same = same and all(usual < 1e-2 for usual, _ in errors.values())
print("unchanged" if same else "CHANGED")
raise SystemExit(not same)
PY
venv/bin/python -W ignore check.py

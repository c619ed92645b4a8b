#!/usr/bin/env bash
# What: at a singular matrix the gradient of linalg.det is zero or the correct cofactor matrix, depending on whether
#       one asks for create_graph; forward mode gives zero as well. det is a polynomial, so nothing is undefined there.
# Versions: torch 2.13.0 (CPU).
# Source: linalg_det_backward in torch/csrc/autograd/FunctionsManual.cpp, since pytorch/pytorch#79487; #104675 reports
#         the zero gradient.
# Date: 2026-11-29. Exit code: 0 while torch behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
cat > check.py <<'PY'
import torch

det = torch.linalg.det
print("torch", torch.__version__)
print("the gradient of det(A) at a singular A changes with create_graph=True, from zero to the right value")
same = True
for values in ([[1, 0], [0, 0]], [[1, 2], [2, 4]], [[2, 0, 0], [0, 3, 0], [1, 1, 0]]):
    a = torch.tensor(values, dtype=torch.float64)
    x = a.clone().requires_grad_()
    gradients = {
        "backward": torch.autograd.grad(det(x), x)[0],
        "create_graph=True": torch.autograd.grad(det(x), x, create_graph=True)[0].detach(),
        "torch.func.grad": torch.func.grad(det)(a),
        "torch.func.jacfwd": torch.func.jacfwd(det)(a),
    }
    # det is linear in each entry, so a difference of 1 gives the partial derivative
    units = torch.eye(a.numel(), dtype=a.dtype).view(-1, *a.shape)
    expected = (det(a + units) - det(a)).view_as(a)
    print(f"A = {values}, det(A) = {abs(det(a).item())}, gradient by differences = {expected.round().tolist()}")
    for name, gradient in gradients.items():
        right = torch.allclose(gradient, expected, rtol=0, atol=1e-9)
        print(f"  {name:18} largest entry {gradient.abs().max().item():.1f}  {'right' if right else 'wrong'}")
        same &= right if name in ("create_graph=True", "torch.func.grad") else gradient.count_nonzero().item() == 0
print("unchanged" if same else "CHANGED")
raise SystemExit(not same)
PY
venv/bin/python -W ignore check.py

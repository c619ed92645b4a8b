#!/usr/bin/env bash
# What: log_ndtr and erfcx exist for the far tail, and their float32 values are right there to six digits, but their
#       float32 gradients are not: log_ndtr's is off by up to 10 % near -1000 and by factors further out, erfcx's even
#       has the wrong sign at some points beyond 4000.
# Versions: torch 2.13.0 (CPU).
# Source: tools/autograd/derivatives.yaml (log_ndtr since pytorch/pytorch#74795): exp(-(log_ndtr(x) + x^2 / 2)) and
#         2 x erfcx(x) - 2 / sqrt(pi) both subtract numbers that agree in nearly all digits.
# Date: 2026-11-29. Exit code: 0 while torch behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
cat > check.py <<'PY'
import torch

print("torch", torch.__version__)
print("float32 values of log_ndtr and erfcx are accurate in the tail, their float32 gradients are not")


def evaluate(function, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = points.clone().requires_grad_()
    y = function(x)
    y.sum().backward()
    return y.detach().double(), x.grad.double()


def compare(function, low: float, high: float) -> tuple[float, torch.Tensor]:
    x = torch.linspace(low, high, 1001)
    value, gradient = evaluate(function, x)
    exact_value, exact_gradient = evaluate(function, x.double())
    value_error = (value / exact_value - 1).abs().max().item()
    ratio = gradient / exact_gradient
    span = f"{ratio.min().item():.3g} to {ratio.max().item():.3g}"
    print(f"  {low:7.0f} to {high:7.0f}: error of the value {value_error:.0e}, gradient / exact gradient {span}")
    return value_error, ratio


print("log_ndtr")
log_ndtr = [compare(torch.special.log_ndtr, *span) for span in ((-10, -1), (-1100, -1000), (-4100, -4000))]
print("erfcx")
erfcx = [compare(torch.special.erfcx, *span) for span in ((1, 2), (1000, 1100), (4000, 4100))]
same = all(error < 1e-5 for error, _ in log_ndtr + erfcx)
same = same and all((ratio - 1).abs().max() < 1e-3 for ratio in (log_ndtr[0][1], erfcx[0][1]))
same = same and (log_ndtr[1][1] - 1).abs().max() > 0.02 and (log_ndtr[2][1] - 1).abs().max() > 0.3
same = same and (erfcx[1][1] - 1).abs().max() > 0.1 and bool((erfcx[2][1] < 0).any())
print("unchanged" if same else "CHANGED")
raise SystemExit(not same)
PY
venv/bin/python -W ignore check.py

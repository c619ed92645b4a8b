#!/usr/bin/env bash
# What: on the CPU, layer_norm's backward pass adds up the float32 gradient of a float32 bias in bfloat16 when the
#       activations are bfloat16 (autocast's usual mix), so that it stops at 256 however many tokens contribute. The
#       gradient of embedding stops there too, that of index_select for the same lookup does not.
# Versions: torch 2.13.0 (CPU).
# Source: found while comparing parameter gradients with float64 ones. The mix of types is pytorch/pytorch#88064's;
#         #68048 is the same fault in conv2d's bias, since mended.
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
torch.set_num_threads(1)  # layer_norm keeps a sum for each thread, so that T threads stop at 256 T
print("torch", torch.__version__)
print("the gradient of each parameter below is the number of tokens, but a bfloat16 sum of ones stops at 256")


def layer_norm(tokens: int, dtype: torch.dtype) -> float:
    bias = torch.zeros(8, requires_grad=True)
    x = torch.randn(tokens, 8).to(dtype)
    F.layer_norm(x, (8,), torch.ones(8), bias).sum().backward()
    assert bias.grad.dtype == torch.float32
    return bias.grad[0].item()


def autocast(tokens: int) -> float:
    module = torch.nn.LayerNorm(8)
    with torch.autocast("cpu", torch.bfloat16):
        module(torch.randn(tokens, 8).bfloat16()).sum().backward()
    return module.bias.grad[0].item()


def linear(tokens: int) -> float:
    bias = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    F.linear(torch.randn(tokens, 8).bfloat16(), torch.eye(8).bfloat16(), bias).sum().backward()
    return bias.grad[0].item()


def lookup(tokens: int, look_up) -> float:
    table = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    look_up(table, torch.zeros(tokens, dtype=torch.long)).sum().backward()
    return table.grad[0, 0].item()


seen = []
for tokens in (256, 4096, 65536):
    row = {
        "layer_norm, float32 bias, float32 input": layer_norm(tokens, torch.float32),
        "linear, bfloat16 bias": linear(tokens),
        "index_select, bfloat16 table": lookup(tokens, lambda table, ids: table.index_select(0, ids)),
        "layer_norm, float32 bias, bfloat16 input": layer_norm(tokens, torch.bfloat16),
        "LayerNorm under autocast, float32 bias": autocast(tokens),
        "embedding, bfloat16 table": lookup(tokens, lambda table, ids: F.embedding(ids, table)),
        "table[ids], bfloat16 table": lookup(tokens, lambda table, ids: table[ids]),
    }
    print(f"{tokens} tokens")
    for name, value in row.items():
        print(f"  {name:42} {value:7.0f}")
    seen.append(list(row.values()) == [tokens] * 3 + [256] * 4)
print("unchanged" if all(seen) else "CHANGED")
raise SystemExit(not all(seen))
PY
venv/bin/python -W ignore check.py

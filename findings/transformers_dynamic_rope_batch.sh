#!/usr/bin/env bash
# What: with rope_type "dynamic" the logits of a row depend on the other rows of its batch. The longest position of the
#       batch sets the rotary frequencies of all rows, so a row within the original context is rotated as if it were
#       beyond it, and its greedy text can change. With rope_type "default" the same row is the same to 1e-15.
# Versions: transformers 5.23.0, torch 2.13.0 (CPU).
# Source: dynamic_rope_update and dynamic_frequency_update in transformers/modeling_rope_utils.py take the maximum of
#         position_ids.
# Date: 2026-11-29. Exit code: 0 while transformers behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cat > check.py <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=16,
)
print("transformers", transformers.__version__, "torch", torch.__version__)
print("with dynamic rotary scaling a row of 8 tokens has other logits beside a row of 24 than alone")
found = {}
for kind in ("default", "linear", "dynamic"):
    torch.manual_seed(5)
    rope = {"rope_type": kind, "rope_theta": 500.0} | ({} if kind == "default" else {"factor": 2.0})
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
        short, long = torch.randint(3, 97, (8,)), torch.randint(3, 97, (24,))
        ids = torch.stack([torch.cat([torch.zeros(16, dtype=torch.long), short]), long])
        mask = torch.ones_like(ids)
        mask[0, :16] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        alone = model(short[None]).logits[0, -1]
        beside = model(ids, attention_mask=mask, position_ids=positions).logits[0, -1]
    found[kind] = float((alone - beside).abs().max() / alone.abs().max())
    print(f"  {kind:8} largest difference {found[kind]:.1e} of the largest logit")
same = found["default"] < 1e-12 and found["linear"] < 1e-12 and found["dynamic"] > 1e-3
print("unchanged" if same else "CHANGED")
raise SystemExit(not same)
PY
HF_HUB_OFFLINE=1 venv/bin/python -W ignore check.py

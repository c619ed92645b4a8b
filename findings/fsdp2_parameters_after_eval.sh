#!/usr/bin/env bash
# What: a forward without a backward leaves the parameters outside FSDP2's inner groups gathered. named_parameters() then
#       gives tensors that are not those the optimizer was built with, so its state cannot be found by their names, until
#       reshard().
# Versions: torch 2.13.0, gloo, 2 processes on a CPU.
# Source: found while saving a checkpoint after a validation.
# Date: 2026-11-30. Exit code: 0 while it behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy
cat > "$work/run.py" <<'P'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
fully_shard(model[1])
fully_shard(model)  # the root holds what no inner group does: the first layer
optimizer = torch.optim.AdamW(model.parameters())
x = torch.randn(4, 8)
model(x).sum().backward()
optimizer.step()


def known():
    """Return the names of parameters that the optimizer has state for."""
    return [name for name, p in model.named_parameters() if p in optimizer.state]


after_step = known()
with torch.no_grad():
    model(x)  # an evaluation
after_eval = known()
model.reshard()
after_reshard = known()
if dist.get_rank() == 0:
    print("torch", torch.__version__)
    print("parameters with state after a step:     ", after_step)
    print("parameters with state after evaluation: ", after_eval)
    print("parameters with state after reshard():  ", after_reshard)
    inner = ["1.weight", "1.bias"]
    if len(after_step) == 4 and after_eval == inner and after_reshard == after_step:
        print("After an evaluation the optimizer does not know the parameters of the root, until reshard().", flush=True)
dist.barrier()
dist.destroy_process_group()
P
OMP_NUM_THREADS=1 "$work/env/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$work/run.py" \
  2> "$work/errors" | tee "$work/said" || cat "$work/errors"
grep -q "does not know" "$work/said"

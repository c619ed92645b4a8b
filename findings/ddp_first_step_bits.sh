#!/usr/bin/env bash
# What: DDP sums the gradients of its first step in other buckets than those of later steps, which follow the order in
#       which gradients became ready. With three processes or more a sum depends on its place in a bucket (a ring adds in
#       another order), so the same weights and data give other bits in the first step than later: a resumed run is not
#       the run that was not stopped. find_unused_parameters=True keeps the first buckets.
# Versions: torch 2.13.0, gloo, 2 and 4 processes on a CPU.
# Source: found while comparing the weights of a resumed run.
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
from torch.nn.parallel import DistributedDataParallel


class Swapped(nn.Module):
    """Two layers that run in another order than they are registered in."""

    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(30, 30), nn.Linear(30, 30)

    def forward(self, x):
        return self.last(self.first(x).tanh())


dist.init_process_group("gloo")
world = dist.get_world_size()
for option in (False, True):
    torch.manual_seed(0)
    model = DistributedDataParallel(Swapped(), find_unused_parameters=option)
    x = torch.randn(8, 30, generator=torch.Generator().manual_seed(dist.get_rank()))
    steps = []
    for _ in range(3):  # the same weights and data
        model.zero_grad()
        model(x).square().sum().backward()
        steps.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    if dist.get_rank() == 0:
        first, second = (int((a != b).sum()) for a, b in zip(steps, steps[1:]))
        print(f"{world} processes, find_unused_parameters={option}: {first} gradients of the second step differ from the "
              f"first's, {second} of the third from the second's", flush=True)
dist.barrier()
dist.destroy_process_group()
P
echo torch 2.13.0
for count in 2 4; do
  OMP_NUM_THREADS=1 "$work/env/bin/python" -m torch.distributed.run --standalone --nproc-per-node $count "$work/run.py" \
    2> "$work/errors" | tee -a "$work/said" || cat "$work/errors"
done
grep -q "^2 processes, find_unused_parameters=False: 0 " "$work/said"
grep -Eq "^4 processes, find_unused_parameters=False: [1-9][0-9]* .*, 0 of" "$work/said"
grep -q "^4 processes, find_unused_parameters=True: 0 " "$work/said"

#!/usr/bin/env bash
# What: torchrun keeps one store over restarts, with the addresses of the processes of earlier attempts. If a process starts
#       a little later than the others after a restart, init_process_group("gloo") connects to the address of a process
#       that has ended, fails, and takes another restart. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 it waits as it should.
# Versions: torch 2.13.0, gloo, 2 processes on a CPU.
# Source: found while testing restarts of a run; a comment in torch/distributed/rendezvous.py says each retry has a new store.
# Date: 2026-11-30. Exit code: 0 while it behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0 numpy
cat > "$work/run.py" <<'P'
import os
import sys
import time

import torch.distributed as dist

rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
if rank == "1" and attempt == "1":
    time.sleep(5)  # a slow import, say
dist.init_process_group("gloo")
dist.barrier()
if rank == "1" and attempt == "0":
    os._exit(1)  # the failure that the restart is for
dist.barrier()
print(f"process {rank} is through in attempt {attempt}", flush=True)
dist.destroy_process_group()
sys.exit(0)
P
attempt() {
  OMP_NUM_THREADS=1 "$work/env/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1 \
    "$work/run.py" > "$work/said" 2> "$work/errors" && echo "the restart succeeds" || echo "the restart fails"
}
"$work/env/bin/python" -c 'import torch; print("torch", torch.__version__)'
shared=$(attempt)
echo "with the shared store:    $shared"
grep -o "Gloo connectFullMesh failed" "$work/errors" | head -1 || true
own=$(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 attempt)
echo "with a store per attempt: $own"
[ "$shared" = "the restart fails" ] && [ "$own" = "the restart succeeds" ]

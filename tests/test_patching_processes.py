"""Patched models of transformers in two processes: ten families, and one type of each group with the same patterns."""

from __future__ import annotations

from pathlib import Path

import pytest
from patched_pairs import GROUPS, TEN
from test_patching_integrations import run

PARALLEL = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, os.environ["TESTS"])
from patched_pairs import GROUPS, TEN, Trial, make, patched, tokens

def hold(kind, ids, half):
    alone, one, many = (patched(make(kind)) for _ in range(3))
    ddp = DistributedDataParallel(one, find_unused_parameters=kind not in TEN)
    for block in next((m for m in many.modules() if isinstance(m, torch.nn.ModuleList)), ()):
        fully_shard(block)
    fully_shard(many)
    for model, x in ((alone, ids), (ddp, half), (many, half)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(input_ids=x, labels=x).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, wanted), a, b in zip(alone.named_parameters(), one.parameters(), many.parameters()):
        for got in (a, b.full_tensor()):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=lambda m: f"{kind} {name}: {m}")

dist.init_process_group("gloo")
ids = tokens(4, 10)
half = ids.chunk(2)[dist.get_rank()]
for kind in (*TEN, *GROUPS):
    said = "held"
    try:
        hold(kind, ids, half)
    except Exception as e:
        said = f"{type(e).__name__}: {e}".splitlines()[0]
        try:
            Trial.patching = False
            hold(kind, ids, half)
        except Exception:
            said = "fails without a patch, too"
        Trial.patching = True
    print(f"{kind}: {said}\\n", end="", flush=True)
dist.barrier()
os._exit(0)  # threads of gloo that are still alive may abort the usual exit
"""


@pytest.mark.extended
def test_every_family_in_two_processes(tmp_path: Path) -> None:
    """DDP and FSDP2 on gloo: weights after two steps match those of one process with the whole batch."""
    script = tmp_path / "parallel.py"
    script.write_text(PARALLEL, encoding="utf-8")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    out = run("", *launcher, FOLDER=str(tmp_path), CUDA_VISIBLE_DEVICES="", limit=840)
    assert all(out.count(f"{kind}: held\n") == 2 for kind in TEN), out
    unable = out.count(": fails without a patch, too\n")
    assert out.count(": held\n") + unable == 2 * len([*TEN, *GROUPS]) and unable < len(GROUPS), out

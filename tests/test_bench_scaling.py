"""The model of steps on many GPUs: its formulas, its simulation at limits that are known, the page that shows it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fastgpt.bench import scaling
from fastgpt.bench.network import CLUSTERS, Cluster, Collective
from fastgpt.bench.processes import sizes
from fastgpt.bench.timeline import (
    BUCKETS,
    Work,
    buckets,
    collectives,
    groups,
    parts_of,
    shard_bytes,
    simulate,
    slowest,
)
from fastgpt.core.command import run_command
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.train import main

MODEL = ModelConfig(n_layers=4, n_heads=4, width=512, vocab_size=1000, block_size=64)
HERE = Cluster("here", 1e12, 1e12, 8, inside=1e10, between=2e9, base=0.0, hop=(1e-6, 1e-5), tree=None)


def work(**changes: object) -> Work:
    parts = parts_of(MODEL, 64)
    return replace(Work(parts, 4, tokens=4096, micro_batches=2, rate=1e11, update=1e-3), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [MODEL, replace(MODEL, tied=False, positions="rope", n_kv_heads=2)])
def test_the_parts_are_the_model(model: ModelConfig) -> None:
    whole, parts = GPT(model), parts_of(model, 64)
    assert sum(s.numel() for part in parts for s in part.shapes) == sum(p.numel() for p in whole.parameters())
    assert 3 * sum(part.flops for part in parts) == pytest.approx(whole.flops_per_token(64)["full"])


def test_a_ring_sends_what_the_formula_says() -> None:
    for n in (2, 3, 8):
        assert Collective("all_reduce", 600).sent(n) == pytest.approx(2 * (n - 1) / n * 600)
        assert Collective("all_gather", 600).sent(n) == pytest.approx((n - 1) / n * 600)
    assert HERE.seconds(Collective("all_reduce", 8000), 8) == pytest.approx(14e-6 + 14 / 8 * 8000 / 1e10)
    assert HERE.seconds(Collective("all_gather", 8000), 16) == pytest.approx(14e-6 + 1e-5 + 15 / 16 * 8000 / 2e9)
    assert HERE.seconds(Collective("all_reduce", 8000), 1) == 0.0
    a100 = CLUSTERS["a100"]
    ring = replace(a100, tree=None)
    small, large = Collective("all_reduce", 1 << 10), Collective("all_reduce", 10 << 30)
    assert a100.seconds(small, 1024) < 0.2 * ring.seconds(small, 1024), "a tree has fewer steps"
    assert a100.seconds(large, 8) == ring.seconds(large, 8), "a ring has more bandwidth"


def test_buckets_and_shards_hold_every_gradient() -> None:
    found, itemsize = buckets(work().parts, 4), 4
    assert sum(size for size, _ in found) == work().parameters * itemsize
    assert BUCKETS[0] <= found[0][0] and all(size >= BUCKETS[1] for size, _ in found[1:-1])
    assert [by for _, by in found] == sorted((by for _, by in found), reverse=True)
    outer, *blocks = groups(work().parts)
    assert len(blocks) == 4 and shard_bytes(outer, 4, 1) + 4 * shard_bytes(blocks[0], 4, 1) == 4 * work().parameters
    assert shard_bytes(blocks[0], 4, 3) > shard_bytes(blocks[0], 4, 1), "rows are rounded up"


def test_a_step_at_its_limits() -> None:
    one = simulate(work(), HERE, "ddp", 1)
    flops = 3 * sum(part.flops for part in work().parts) * 4096 * 2
    assert one.seconds == pytest.approx(flops / 1e11 + 1e-3) and one.network == 0.0
    free = replace(HERE, inside=math.inf, between=math.inf, hop=(0.0, 0.0))
    for kind in scaling.PARALLEL:
        calls = collectives(work(), kind, 8)
        assert simulate(work(), free, kind, 8).seconds == pytest.approx(one.seconds)
        slow = simulate(work(), HERE, kind, 8)
        assert slow.network == pytest.approx(sum(HERE.seconds(call, 8) for call in calls))
        assert one.seconds < slow.seconds < one.seconds + slow.network, "some of the collectives are hidden"
        idle = simulate(work(rate=math.inf, update=0.0), HERE, kind, 8)
        assert idle.seconds == pytest.approx(slow.network), "without computation nothing hides them"
    assert simulate(work(), HERE, "ddp", 8, slow=2.0).compute == pytest.approx(2 * one.compute - 1e-3)


def test_all_wait_for_the_slowest() -> None:
    # of 8 and 1,024 normal variables the largest is on average 1.42 and 3.24 deviations above the mean
    for n, deviations in ((1, 0.0), (8, 1.42), (1024, 3.24)):
        assert slowest(n, 0.05) == pytest.approx(math.exp(0.05 * deviations), rel=0.015)
    assert slowest(1024, 0.0) == 1.0


def test_the_calls_of_a_step() -> None:
    ddp, fsdp = (Counter(call.kind for call in collectives(work(), kind, 2)) for kind in scaling.PARALLEL)
    assert ddp == {"all_reduce": 2 + len(buckets(work().parts, 4))}
    assert fsdp == {"all_reduce": 3, "all_gather": 2 * (1 + 4 + 4), "reduce_scatter": 1 + 4}
    assert collectives(work(), "ddp", 1) == []
    assert sizes(1) == [1] and sizes(2) == [1, 2] and sizes(6) == [1, 2, 4, 6] and sizes(8) == [1, 2, 4, 8]


def test_the_page_has_the_tables_of_the_command() -> None:
    page = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    commands = [line.split()[3:] for line in page.splitlines() if line.startswith("fastgpt bench scaling")]
    shown = [words for words in commands if "--check" not in words]
    plans = [line for line in page.splitlines() if line.startswith("fastgpt train --plan")]
    assert len(shown) >= 2 and len(plans) == 1 and main(plans[0].split()[2:]) == 0
    for words in shown:
        made = scaling.tables(scaling.options().parse_args(words))
        for line in made.splitlines():
            assert line in page, f"{' '.join(words)}: {line}"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--accumulate 2 --batch-tokens 524288", "--accumulate has no effect with --batch-tokens"),
        ("--mfu 0.5 --check 2", "--mfu has no effect with --check"),
        ("--gpus 0", "--gpus is '0', expected a whole number, 1 or more"),
        ("--cluster abacus", "invalid choice: 'abacus'"),
    ],
)
def test_errors(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: scaling.main(words.split())) == 2
    assert sentence in capsys.readouterr().err

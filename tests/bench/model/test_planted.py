"""Inefficiencies that are planted into one kernel: each moves its term of the bound and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.bench.model.bound import bound
from fastgpt.bench.model.chips import A100, H200, Chip
from fastgpt.bench.model.compiled import of_cuda
from fastgpt.bench.model.launch import UNITS, Bound, Launch
from fastgpt.bench.model.machine_code import Code
from fastgpt.checks.cuda import find_nvcc

pytestmark = [pytest.mark.nvcc, pytest.mark.skipif(find_nvcc() is None, reason="no nvcc here")]
SOURCE = Path(__file__).parent / "planted.cu"
NONE, DOUBLED_LOAD, UNCOALESCED, CONFLICT, BARRIER = range(5)
ROUNDS = 10_000.0  # so many that a different instruction before the loop does not count
NOISE = 1e-3


@pytest.fixture(scope="module", params=[("sm_80", A100), ("sm_90a", H200)], ids=["sm_80", "sm_90a"])
def compiled(request: pytest.FixtureRequest) -> tuple[dict[str, Code], Chip]:
    arch, chip = request.param
    return of_cuda(SOURCE, arch), chip


def bound_of(compiled: tuple[dict[str, Code], Chip], plant: int, dynamic_shared: int = 0) -> Bound:
    codes, chip = compiled
    code, grid = codes[f"planted_kernel<{plant}>"], 8 * chip.multiprocessors
    written = 4.0 * 256 * grid
    launch = Launch("planted", code, grid, 256, dynamic_shared, ROUNDS * written, written, trips={0: ROUNDS})
    return bound(launch, chip)


def moved(before: Bound, after: Bound) -> dict[str, float]:
    """Return the units whose time changed, with the factor."""
    factors = {u: after.seconds[u] / before.seconds[u] for u in UNITS if before.seconds[u]}
    return {u: factor for u, factor in factors.items() if abs(factor - 1) > NOISE}


def issued(found: Bound) -> float:
    """Return the instructions of a round."""
    return sum(found.instructions.values()) / ROUNDS


def test_nothing_planted(compiled: tuple[dict[str, Code], Chip]) -> None:
    found = bound_of(compiled, NONE)
    assert found.conflicts == found.lines == 1.0 and found.unknown == 0.0 and found.tail == 0.0


def test_a_doubled_load(compiled: tuple[dict[str, Code], Chip]) -> None:
    before, after = bound_of(compiled, NONE), bound_of(compiled, DOUBLED_LOAD)
    found = moved(before, after)
    assert found.keys() == {"load/store", "issue"}
    assert found["load/store"] == pytest.approx(4 / 3, rel=NOISE)  # LDG, STS, LDS, and one more LDG
    assert issued(after) - issued(before) == pytest.approx(1, abs=NOISE)
    assert after.bytes_in_flight == pytest.approx(2 * before.bytes_in_flight, rel=NOISE)


def test_an_uncoalesced_access(compiled: tuple[dict[str, Code], Chip]) -> None:
    after = bound_of(compiled, UNCOALESCED)
    found = moved(bound_of(compiled, NONE), after)
    assert found.keys() == {"load/store"}
    assert found["load/store"] == pytest.approx((32 + 2) / 3, rel=NOISE)  # a line for each lane instead of one
    assert after.lines == pytest.approx(32, rel=NOISE) and after.conflicts == 1.0


def test_a_bank_conflict(compiled: tuple[dict[str, Code], Chip]) -> None:
    after = bound_of(compiled, CONFLICT)
    found = moved(bound_of(compiled, NONE), after)
    assert found == {"shared memory": pytest.approx((8 + 1) / 2)}  # 40 words apart: every fourth lane in the same bank
    assert after.conflicts == pytest.approx((8 + 1) / 2) and after.lines == 1.0


def test_an_extra_barrier(compiled: tuple[dict[str, Code], Chip]) -> None:
    before, after = bound_of(compiled, NONE), bound_of(compiled, BARRIER)
    assert moved(before, after).keys() == {"latency", "issue"}
    assert issued(after) - issued(before) == pytest.approx(1, abs=NOISE)
    waits = {cause: cycles / before.waits[cause] for cause, cycles in after.waits.items() if cycles > ROUNDS}
    assert waits.pop("barrier") == pytest.approx(3 / 2)
    assert all(factor == pytest.approx(1, rel=NOISE) for factor in waits.values())
    assert after.serial > before.serial


def test_a_lower_occupancy(compiled: tuple[dict[str, Code], Chip]) -> None:
    before, after = bound_of(compiled, NONE), bound_of(compiled, NONE, dynamic_shared=61_440)
    assert before.occupancy_limit == after.occupancy_limit == "shared memory"
    fewer = before.blocks_per_multiprocessor / after.blocks_per_multiprocessor
    assert fewer > 1 and after.occupancy == pytest.approx(before.occupancy / fewer)
    assert moved(before, after).keys() == {"latency"} and after.seconds["latency"] > 1.5 * before.seconds["latency"]
    assert after.bytes_in_flight == pytest.approx(before.bytes_in_flight / fewer)

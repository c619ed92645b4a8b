"""The time of one warp: prescribed cycles, waits for scoreboards, groups of copies, busy pipes, loops."""

from __future__ import annotations

import pytest
from assembled import assemble

from fastgpt.bench.model import schedule
from fastgpt.bench.model.chips import A100, H100, Chip
from fastgpt.bench.model.flow import flow
from fastgpt.bench.model.schedule import Warp, block_time
from fastgpt.bench.model.wavefronts import accesses

MEMORY = 500.0


def run(text: str, chip: Chip = A100, trips: dict[int, float] | None = None, warps: int = 1) -> Warp:
    code = assemble(text, arch=chip.capability)
    return block_time(flow(code), trips or {}, Warp(chip, MEMORY, accesses(code, {}), warps))


def test_prescribed_cycles() -> None:
    assert run("FADD R1, R2, R3 ; S4\nFADD R1, R1, R3 ; S5\nEXIT ; S1").now == 10


def test_loads_overlap_unless_one_waits_for_the_other() -> None:
    together = run("LDG.E R2, [R4.64] ; W0\nLDG.E R3, [R6.64] ; W1\nFADD R2, R2, R3 ; B0 B1\nEXIT")
    one_by_one = run("LDG.E R2, [R4.64] ; W0\nLDG.E R3, [R2.64] ; W1 B0\nFADD R2, R2, R3 ; B1\nEXIT")
    assert together.now == 1 + MEMORY + 2 and together.waits == {"memory": MEMORY - 1}
    assert one_by_one.now == 2 * MEMORY + 2 and one_by_one.waits == {"memory": 2 * MEMORY - 2}


def test_a_scoreboard_waits_for_all_that_set_it() -> None:
    found = run("LDG.E R2, [R4.64] ; W0\nLDS R3, [R6] ; W0\nFADD R2, R2, R3 ; B0\nEXIT")
    assert found.now == MEMORY + 2 and set(found.waits) == {"memory", "shared memory"}


def test_groups_of_copies() -> None:
    copies = "LDGSTS.E.BYPASS.128 [R1], [R2.64] ; S300\nLDGDEPBAR ; W0\n" * 2
    older = run(f"{copies}DEPBAR.LE SB0, 0x1\nEXIT")
    both = run(f"{copies}DEPBAR.LE SB0, 0x0\nEXIT")
    assert older.waits == {} and older.now == 604, "the first group has landed"
    assert both.now == 301 + MEMORY + 2 and both.waits == {"memory": MEMORY - 301}


def test_barriers() -> None:
    found = run("BAR.SYNC.DEFER_BLOCKING 0x0 ; S1\nEXIT")
    assert found.waits == {"barrier": schedule.BARRIER} and found.now == schedule.BARRIER + 2


def test_a_busy_pipe_delays() -> None:
    assert run("FMNMX R1, R2, R3, PT\n" * 4 + "EXIT").now == 8, (
        "16 lanes a quarter take two cycles; EXIT goes elsewhere"
    )
    assert run("MUFU.EX2 R1, R2\n" * 4 + "EXIT").now == 3 * 8 + 2
    products = "HMMA.16816.F32.BF16 R4, R8, R10, R4\n" * 4 + "EXIT"
    assert run(products).now == 3 * 8 + 2
    assert run(products, H100).now == pytest.approx(3 * 4 / H100.mma_share + 2)


def test_products_of_a_warp_group() -> None:
    # 64 x 128 x 16 over four warps: 32,768 multiply-adds each, 512 a cycle
    product = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0\n"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x{}\n"
    assert run(product + wait.format(0) + "EXIT", H100).waits == {"products": 63}
    two = run(product * 2 + wait.format(1) + "EXIT", H100)
    assert two.waits == {"products": 62}, "only the first has to be done"
    small = run(product.replace("128", "8") + wait.format(0) + "EXIT", H100)
    assert small.waits == {"products": schedule.GROUP_PRODUCT - 1}


def test_between_barriers_the_busiest_unit_counts() -> None:
    # 16 warps: four a quarter. Eight MUFU of 8 cycles and then ten HMMA of 8: 256 and 320 cycles if all warps run.
    specials, products = "MUFU.EX2 R1, R2\n" * 8, "HMMA.16816.F32.BF16 R4, R8, R10, R4\n" * 10
    mixed = run(specials + products + "EXIT", warps=16)
    apart = run(specials + "BAR.SYNC.DEFER_BLOCKING 0x0\n" + products + "EXIT", warps=16)
    assert mixed.now == 320, "other warps do one while this one does the other"
    assert apart.now == 256 + schedule.BARRIER + 320 and apart.waits["other warps"] == pytest.approx(apart.now, rel=0.4)


def test_a_loop_without_barriers_is_one_part() -> None:
    code = "again:\nMUFU.EX2 R1, R2\n@P0 BRA `(again)\nEXIT"
    assert run(code, trips={0: 1000}, warps=16).now == pytest.approx(1000 * 8 * 4)
    halves = "again:\nMUFU.EX2 R1, R2\nBAR.SYNC.DEFER_BLOCKING 0x0\nFADD R1, R1, R1\n@P0 BRA `(again)\nEXIT"
    # 32 cycles of MUFU; FADD, BRA and the next MUFU's issue are in the same part as that MUFU
    assert run(halves, trips={0: 1000}, warps=16).now == pytest.approx(1000 * (32 + schedule.BARRIER), rel=0.01)


def test_parts_of_iterations() -> None:
    for trips in (0.25, 1.5, 2.0, 7.5):
        assert run(LOOP, trips={0: trips}).now == pytest.approx(1 + trips * (MEMORY + 9) + 1)


LOOP = """
MOV R0, RZ
again:
LDG.E R2, [R4.64] ; W0 S2
FADD R3, R3, R2 ; B0 S4
@P0 BRA `(again) ; S5
EXIT
"""


def test_iterations_that_are_not_followed_take_as_long_as_the_last() -> None:
    one = MEMORY + 4 + 5
    for trips in (1, 2, 3, 4, 1000):
        found = run(LOOP, trips={0: trips})
        assert found.now == pytest.approx(1 + trips * one + 1)
        assert found.waits["memory"] == pytest.approx(trips * (MEMORY - 2))


def test_nested_loops() -> None:
    code = """
    MOV R0, RZ ; S2
    outer:
    MOV R1, RZ ; S3
    inner:
    FADD R2, R2, R1 ; S4
    @P0 BRA `(inner) ; S5
    @P1 BRA `(outer) ; S7
    EXIT
    """
    assert run(code, trips={0: 10, 1: 80}).now == pytest.approx(2 + 10 * (3 + 8 * 9 + 7) + 1)

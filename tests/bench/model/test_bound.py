"""The bound of launches: instructions counted by hand in three kernels, units, waves, iterations."""

from __future__ import annotations

from pathlib import Path

import pytest
from assembled import assemble

from fastgpt.bench.model.bound import bound, iterations
from fastgpt.bench.model.chips import A100, H100, H200, Chip
from fastgpt.bench.model.compiled import of_cuda
from fastgpt.bench.model.flow import flow
from fastgpt.bench.model.launch import Launch
from fastgpt.bench.model.machine_code import Code, parse
from fastgpt.bench.model.wavefronts import accesses
from fastgpt.checks.cuda import find_nvcc

FOLDER = Path(__file__).parent


def listing(name: str) -> Code:
    (code,) = parse((FOLDER / "listings" / name).read_text(encoding="utf-8")).values()
    return code


def counted(code: Code, chip: Chip, trips: float) -> dict[str, float]:
    return bound(Launch("kernel", code, chip.multiprocessors, 256, trips={0: trips}), chip).instructions


def test_counts_of_the_planted_kernel() -> None:
    # Before the loop, 0x000 to 0x120: LDC at 000, 010, 060, 0c0, S2R at 020, 050, 0b0, ULDC, UMOV and BRA take only a
    # slot of the scheduler, 10 in all. HFMA2, two IMAD.WIDE and IMAD are 4 of the FMA pipes, ISETP, two LEA and two MOV
    # 5 of the ALU. Behind it: STG and EXIT.
    # An iteration, 0x130 to 0x1b0: LDG, STS and LDS; FFMA; ISETP; UIADD3, two BAR and BRA.
    for trips in (1.0, 10.0):
        expected = {"issue": 11 + 4 * trips, "fp32": 4 + trips, "integer": 5 + trips, "load/store": 1 + 3 * trips}
        assert counted(listing("planted_sm_90a.txt"), H100, trips) == expected


def test_counts_of_adamw_prepare() -> None:
    # Triton's kernel of the steps. Before the loop, 0x00 to 0xa0: two S2R, EXIT and ULDC; IMAD.MOV, IMAD.SHL, IMAD.IADD
    # and IMAD; ISETP, LOP3 and LEA. Behind it: EXIT.
    # An iteration, 0xb0 to 0x1b0: two ISETP, CS2R, LEA and LEA.HI.X twice, MOV and LEA; IMAD.MOV, two IMAD and FADD;
    # LDG.64, LDG and STG; BRA.
    code = listing("adamw_prepare_sm_80.txt")
    for trips in (1.0, 10.0):
        expected = {"issue": 5 + trips, "fp32": 4 + 4 * trips, "integer": 3 + 9 * trips, "load/store": 3 * trips}
        assert counted(code, A100, trips) == expected
    # Its first load takes 8 bytes of every 72: 16 lanes span 1088 bytes, nine lines, and so do the other 16. What it
    # loads is a pointer, so that the other two accesses are unknown.
    first, *others = accesses(code, {}).values()
    assert (first.lines, first.ideal_lines, first.known) == (18, 2, True)
    assert [(a.lines, a.known) for a in others] == [(1, False), (1, False)]


@pytest.mark.nvcc
@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc here")
@pytest.mark.parametrize("arch, chip", [("sm_80", A100), ("sm_90a", H200)])
def test_counts_of_a_product(arch: str, chip: Chip) -> None:
    # A warp computes 16 of 64 rows. A step has 32 columns: two products of 16 x 64 x 16, each of eight HMMA.16816, one
    # LDSM.x4 for its rows and one for each 16 of the 64 others. A thread copies 16 bytes four times.
    (code,) = of_cuda(FOLDER / "product.cu", arch).values()
    (loop,) = flow(code).loops
    inside = flow(code).instructions(loop.blocks)
    bases = [i.base for i in inside]
    assert {b: bases.count(b) for b in ("HMMA", "LDSM", "LDGSTS", "BAR", "LDGDEPBAR", "DEPBAR")} == {
        "HMMA": 16, "LDSM": 10, "LDGSTS": 4, "BAR": 2, "LDGDEPBAR": 1, "DEPBAR": 1
    }  # fmt: skip
    # 64 x 64 x 32 multiply-adds a step and block
    launch = Launch(
        "product", code, 10 * chip.multiprocessors, 128, tensor_flop=20 * chip.multiprocessors * 64**2 * 32 * 50
    )
    found = bound(launch, chip)
    assert iterations(launch, flow(code)) == {0: 50.0}
    peak = 2 * chip.tensor_fma * chip.mma_share * chip.multiprocessors * chip.clock
    assert found.seconds["tensor"] == pytest.approx(launch.tensor_flop / peak)
    assert found.conflicts == 1.0, "the rows are shifted so that there are none"
    # ten LDSM and four copies, each of four wavefronts, and the copies before the loop
    assert found.seconds["shared memory"] == pytest.approx(40 * 4 * (14 * 50 + 4) / chip.clock)
    assert found.instructions["tensor"] == 16 * 50


def test_the_busiest_multiprocessor_counts() -> None:
    code = assemble("FFMA R0, R1, R2, R3\nEXIT")
    full, one_more = (bound(Launch("k", code, grid, 128), H100) for grid in (264, 265))
    assert full.seconds["issue"] == pytest.approx(2 * 4 * 2 / 4 / H100.clock) and full.tail == 0
    assert one_more.seconds["issue"] == pytest.approx(1.5 * full.seconds["issue"])
    assert one_more.tail == pytest.approx(1 - 265 / 132 / 3) and full.waves == pytest.approx(2 / 16)


def test_memory_takes_its_published_bandwidth() -> None:
    code = assemble("LDG.E R0, [R2.64] ; W0\nSTG.E [R2.64], R0 ; B0\nEXIT")
    found = bound(Launch("k", code, 132, 128, dram_read=3e9, dram_written=1e9, l2_read=9e9), H200)
    assert found.seconds["dram"] == pytest.approx(4e9 / 4.8e12)
    assert found.seconds["l2"] == pytest.approx(10e9 / (5120 * 1.83e9))
    assert found.limit == "l2" and found.time == found.seconds["l2"]


def test_latency_is_that_of_the_memory_that_serves() -> None:
    code = assemble("LDG.E R0, [R2.64] ; W0\nFADD R0, R0, R0 ; B0\nEXIT")
    from_dram = bound(Launch("k", code, 132, 128, dram_read=1e3, l2_read=1e3), H200)
    from_l2 = bound(Launch("k", code, 132, 128, dram_read=0, l2_read=1e3), H200)
    assert from_dram.waits["memory"] == H200.dram_latency - 1 and from_l2.waits["memory"] == H200.l2_latency - 1


def test_iterations_follow_from_bytes() -> None:
    code = assemble("""
    LDG.E R0, [R2.64]
    again:
    LDG.E.128 R4, [R2.64]
    STG.E.128 [R2.64], R4
    @P0 BRA `(again)
    EXIT
    """)
    # a warp loads 128 bytes, and 512 with 512 stored in each iteration
    warps = 10 * 4
    launch = Launch("k", code, 10, 128, dram_read=warps * (128 + 512 * 6), dram_written=warps * 512 * 6)
    assert iterations(launch, flow(code)) == {0: 6.0}
    named = Launch("k", code, 10, 128, dram_read=1e9, trips={0: 2.0})
    assert iterations(named, flow(code)) == {0: 2.0}


def test_loops_with_a_mask_and_without_share_the_products() -> None:
    code = assemble("""
    masked:
    HMMA.16816.F32.BF16 R0, R4, R6, R0
    SEL R8, R8, R9, P1
    @P0 BRA `(masked)
    whole:
    HMMA.16816.F32.BF16 R0, R4, R6, R0
    @P0 BRA `(whole)
    EXIT
    """)
    flop = 10 * 4 * 8 * 2 * 16 * 8 * 16  # eight products of a warp
    shares = {masked: iterations(Launch("k", code, 10, 128, tensor_flop=flop, masked=masked), flow(code))
              for masked in (0.0, 0.25)}  # fmt: skip
    assert shares == {0.0: {0: 0.0, 1: 8.0}, 0.25: {0: 2.0, 1: 6.0}}
    named = Launch("k", code, 10, 128, tensor_flop=flop, trips={0: 3.0})
    assert iterations(named, flow(code)) == {0: 3.0}


def test_blocks_of_different_work() -> None:
    code = assemble("FFMA R0, R1, R2, R3\nEXIT")
    even = bound(Launch("k", code, 132, 128), H100)
    one_large = bound(Launch("k", code, 132, 128, slowest=1.9), H100)
    assert one_large.seconds["issue"] == pytest.approx(1.9 * even.seconds["issue"])
    many = bound(Launch("k", code, 1320, 128, slowest=1.9), H100)
    assert many.seconds["issue"] == pytest.approx(10 * even.seconds["issue"]), "others fill the gaps"


def test_a_block_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="a block does not fit on A100, because of shared memory"):
        bound(Launch("k", assemble("EXIT", arch=80), 1, 128, dynamic_shared=200_000), A100)


def test_warps_that_only_copy_do_no_work() -> None:
    code = assemble("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0\nEXIT")
    every, two_groups = (bound(Launch("k", code, 132, 384, computing=n), H100) for n in (None, 256))
    assert two_groups.seconds["tensor"] == pytest.approx(2 / 3 * every.seconds["tensor"])
    assert two_groups.blocks_per_multiprocessor == every.blocks_per_multiprocessor
    # 64 x 128 x 16 bf16: both operands from shared memory, for each of two groups
    assert two_groups.seconds["shared memory"] == pytest.approx(2 * (128 + 64) * 16 * 2 / 128 / H100.clock)

"""Address arithmetic on 32 lanes against the same arithmetic on Python's integers."""

from __future__ import annotations

import pytest
from assembled import assemble

from fastgpt.bench.model.lane_ops import execute
from fastgpt.bench.model.lanes import EXACT, GUESS, OFFSET, State

M = 0xFFFFFFFF


def run(text: str) -> State:
    state = State()
    for i in assemble(text).instructions:
        execute(state, i)
    return state


def words(state: State, register: str) -> list[int]:
    return [int(w) for w in state.values[register].words]


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("IMAD R2, R0, 0x84, R1", lambda t: t * 132 + 40),
        ("IMAD.HI.U32 R2, R0, 0x55555556, RZ", lambda t: t // 3),
        ("IMAD.IADD R2, R0, 0x1, -R1", lambda t: t - 40),
        ("IMAD.MOV.U32 R2, RZ, RZ, R0", lambda t: t),
        ("IADD3 R2, R0, -0x1, R1", lambda t: t + 39),
        ("IADD3 R2, P0, R0, R1, RZ", lambda t: t + 40),
        ("VIADD R2, R0, 0xffffffff", lambda t: t - 1),
        ("LEA R2, R0, R1, 0x3", lambda t: 8 * t + 40),
        ("LEA.HI R2, R0, 0x1, RZ, 0x1e", lambda t: (t >> 2) + 1),
        ("LEA.HI.SX32 R2, R0, R1, 0x1f", lambda t: (t >> 1) + 40),
        ("SHF.R.U32.HI R2, RZ, 0x2, R0", lambda t: t >> 2),
        ("SHF.L.U32 R2, R0, 0x4, RZ", lambda t: t << 4),
        ("SHF.R.S32.HI R2, RZ, 0x1, R3", lambda t: -3),
        ("SHF.R.U64 R2, R0, 0x1, R1", lambda t: t >> 1 | 40 << 31),
        ("LOP3.LUT R2, R0, 0x7, RZ, 0xc0, !PT", lambda t: t & 7),
        ("LOP3.LUT R2, R0, R1, RZ, 0x3c, !PT", lambda t: t ^ 40),
        ("LOP3.LUT R2, R0, 0x10, R1, 0xea, !PT", lambda t: (t & 16) | 40),
        ("LOP3.LUT R2, RZ, R0, RZ, 0x33, !PT", lambda t: ~t),
        ("PRMT R2, R0, 0x2104, R1", lambda t: t << 8 | 40),
        ("PRMT R2, R3, 0x8880, RZ", lambda t: -6),
        ("SEL R2, R0, R1, P1", lambda t: t if t < 16 else 40),
        ("IMNMX R2, R0, 0x5, PT", lambda t: min(t, 5)),
        ("IMNMX R2, R3, R0, !PT", lambda t: t),
        ("SGXT.U32 R2, R0, 0x3", lambda t: t & 7),
        ("SGXT R2, R0, 0x3", lambda t: (t & 7) - 8 * (t >> 2 & 1)),
        ("HFMA2.MMA R2, -RZ, RZ, 0, 5.9604644775390625e-08", lambda t: 1),
        ("HFMA2.MMA R2, -RZ, RZ, 1, 0", lambda t: 0x3C000000),
    ],
)
def test_against_integers(instruction: str, expected: object) -> None:
    state = run(f"S2R R0, SR_TID.X\nMOV R1, 0x28\nMOV R3, -0x6\nISETP.LT.AND P1, PT, R0, 0x10, PT\n{instruction}")
    assert callable(expected)
    assert words(state, "R2") == [expected(t) & M for t in range(32)]
    assert state.values["R2"].trust == EXACT


def test_predicated_lanes_keep_their_value() -> None:
    state = run("S2R R0, SR_TID.X\nISETP.LT.AND P1, PT, R0, 0x10, PT\n@P1 IMAD R0, R0, 0x2, RZ\n@!PT MOV R0, RZ")
    assert words(state, "R0") == [2 * t if t < 16 else t for t in range(32)]


def test_wide_products_have_two_words() -> None:
    state = run("S2R R0, SR_TID.X\nIMAD.WIDE.U32 R2, R0, 0x10000000, RZ")
    assert words(state, "R2") == [(t << 28) & M for t in range(32)] and words(state, "R3") == [
        t >> 4 for t in range(32)
    ]


@pytest.mark.parametrize(
    "instruction, trust",
    [
        ("IMAD R2, RZ, c[0x0][0x0], R0", EXACT),
        ("IADD3 R2, R0, c[0x0][0x160], RZ", OFFSET),
        ("IMAD R2, R0, c[0x0][0x160], RZ", GUESS),
        ("IMAD R2, R1, c[0x0][0x160], R0", OFFSET),
        ("LEA R2, R4, R0, 0x7", OFFSET),
        ("LOP3.LUT R2, R0, R4, RZ, 0x3c, !PT", GUESS),
        ("LOP3.LUT R2, R4, 0x1, RZ, 0xc0, !PT", OFFSET),
    ],
)
def test_how_far_values_are_known(instruction: str, trust: int) -> None:
    state = run(f"S2R R0, SR_TID.X\nS2R R4, SR_CTAID.X\nMOV R1, 0x8\n{instruction}")
    assert state.values["R2"].trust == trust


def test_comparisons_of_two_words() -> None:
    lower = "ISETP.GE.U32.AND P0, PT, R0, 0x10, PT\n"
    for high, expected in (("RZ", lambda t: t >= 16), ("0x1", lambda t: False), ("-0x1", lambda t: True)):
        state = run(f"S2R R0, SR_TID.X\n{lower}ISETP.GE.AND.EX P1, PT, RZ, {high}, PT, P0")
        assert words(state, "P1") == [expected(t) for t in range(32)]
    pointer = "ISETP.NE.U32.AND P0, PT, RZ, c[0x0][0x168], PT\nISETP.NE.AND.EX P1, PT, RZ, c[0x0][0x16c], PT, P0"
    assert words(run(pointer), "P1") == [1] * 32, "a pointer that is a parameter is taken to be one"


def test_a_choice_by_a_parameter_moves_all_lanes_alike() -> None:
    chosen = "ISETP.NE.U32.AND P0, PT, RZ, c[0x0][0x168], PT\nSEL R1, 0x100, 0x200, P0\n"
    text = f"S2R R0, SR_TID.X\n{chosen}IADD3 R2, R0, R1, RZ"
    assert run(text).values["R2"].trust == OFFSET


def test_what_memory_returns_is_unknown() -> None:
    state = run("S2R R0, SR_TID.X\nMOV R4, 0x1\nMOV R5, 0x1\nMOV R6, 0x1\nLDG.E.64 R4, [R0.64]\nIADD3 R1, R4, R0, RZ")
    assert state.values.keys() & {"R1", "R4", "R5", "R6"} == {"R6"}


def test_quotients_of_block_numbers_are_uniform() -> None:
    quotient = "I2F.RP R1, R4\nMUFU.RCP R1, R1\nF2I.FTZ.U32.TRUNC.NTZ R2, R1\nR2UR UR5, R2\nFADD R6, |R1|, 1.5"
    other = "IADD3 R7, R0, UR5, RZ\nI2F.RP R8, R0\nUFLO.U32 UR8, UR9"
    state = run(f"S2R R0, SR_TID.X\nS2R R4, SR_CTAID.X\n{quotient}\n{other}")
    assert state.values["R7"].trust == state.values["R6"].trust == state.values["UR8"].trust == OFFSET
    assert "R8" not in state.values


def test_a_word_that_all_lanes_load_is_the_same_in_all() -> None:
    begin, end = "LDG.E R1, [R4.64]\n", "LDG.E.64 R2, [R4.64+0x4]\n"
    state = run(f"S2R R0, SR_TID.X\nMOV R4, c[0x0][0x160]\n{begin}{end}IADD3 R6, R0, R1, RZ\nIADD3 R7, R0, R3, RZ")
    assert state.values["R6"].trust == state.values["R7"].trust == OFFSET
    assert words(state, "R1")[0] < words(state, "R2")[0]


def test_uniform_registers_and_constants() -> None:
    state = run(
        "UMOV UR4, 0x400\nS2UR UR6, SR_CgaCtaId\nULEA UR4, UR6, UR4, 0x18\nS2R R0, SR_TID.X\nLEA R5, R0, UR4, 0x2"
    )
    assert words(state, "R5") == [1024 + 4 * t for t in range(32)] and state.values["R5"].trust == EXACT

"""Bank conflicts and lines from the addresses of 32 lanes, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from assembled import assemble

from fastgpt.bench.model.lanes import EXACT, Address
from fastgpt.bench.model.wavefronts import Access, accesses, conflicts, lines

LANE = np.arange(32, dtype=np.uint64)


def at(bytes_: object, active: object = True) -> Address:
    return Address(np.array(bytes_, dtype=np.uint64), np.broadcast_to(np.array(active, dtype=bool), 32), EXACT)


@pytest.mark.parametrize(
    "stride, width, found",
    [
        (4, 4, (1, 1)),  # a word for each bank
        (8, 4, (2, 1)),
        (128, 4, (32, 1)),  # all in one bank
        (132, 4, (1, 1)),  # padded by a word
        (0, 4, (1, 1)),  # broadcast
        (0, 16, (1, 1)),
        (2, 2, (1, 1)),  # two lanes share a word
        (8, 8, (2, 2)),  # 256 bytes take two cycles
        (16, 16, (4, 4)),
        (128, 16, (32, 4)),  # a column of a tile of 64 halves: the eight lanes of each phase in the same four banks
        (144, 16, (4, 4)),  # padded by 16 bytes
    ],
)
def test_strides_in_shared_memory(stride: int, width: int, found: tuple[int, int]) -> None:
    assert conflicts(at(LANE * np.uint64(stride)), width) == found


def test_the_usual_swizzle_has_no_conflict() -> None:
    row, column = LANE % np.uint64(8), LANE // np.uint64(8)
    assert conflicts(at(row * np.uint64(128) + (column ^ row) * np.uint64(16)), 16) == (4, 4)


def test_phases_that_read_the_same_words_share_a_wavefront() -> None:
    assert conflicts(at(LANE % np.uint64(16) * np.uint64(8)), 8) == (1, 1)
    assert conflicts(at(LANE // np.uint64(2) * np.uint64(4)), 4) == (1, 1)
    assert conflicts(at(LANE % np.uint64(16) * np.uint64(16)), 16) == (4, 2), "two phases of 128 bytes, read twice"


def test_lanes_that_do_not_take_part_do_not_count() -> None:
    assert conflicts(at(LANE * np.uint64(128), LANE < 4), 4) == (4, 1)
    assert lines(at(LANE * np.uint64(128), LANE < 4), 4) == (4, 1)


@pytest.mark.parametrize(
    "stride, width, found",
    [
        (4, 4, (1, 1)),
        (8, 4, (2, 1)),
        (128, 4, (32, 1)),
        (16, 16, (4, 4)),
        (32, 16, (8, 4)),
        (0, 16, (1, 1)),
        (2, 2, (1, 1)),
    ],
)
def test_strides_in_global_memory(stride: int, width: int, found: tuple[int, int]) -> None:
    assert lines(at(LANE * np.uint64(stride)), width) == found


def test_an_access_across_a_line() -> None:
    assert lines(at(LANE * np.uint64(4) + np.uint64(64)), 4) == (2, 1)


def test_rows_of_matrices() -> None:
    code = assemble("""
    S2R R0, SR_LANEID
    LEA R1, R0, RZ, 0x7
    LDSM.16.M88.4 R4, [R1]
    LDSM.16.M88.2 R4, [R1]
    LOP3.LUT R2, R0, 0x7, RZ, 0xc0, !PT
    IMAD.SHL.U32 R2, R2, 0x10, RZ
    IMAD R3, R0, 0x80, R2
    LDSM.16.M88.4 R4, [R3]
    EXIT
    """)
    found = list(accesses(code, {}).values())
    # eight rows of 16 bytes in the same four banks, four matrices or two; in the last, rows are 144 bytes apart
    assert [(a.wavefronts, a.ideal_wavefronts) for a in found] == [(32, 4), (16, 2), (4, 4)]


def test_what_cannot_be_followed_is_ideal_and_said_so() -> None:
    code = assemble("""
    S2R R0, SR_TID.X
    LDG.E R1, [R4.64]
    LDS.128 R8, [R1]
    IMAD R2, R0, c[0x0][0x160], RZ
    LDS R3, [R2]
    LDG.E R3, [R2.64]
    STL [R1], R0
    EXIT
    """)
    assert list(accesses(code, {}).values()) == [
        Access(lines=1, ideal_lines=1, known=False),
        Access(wavefronts=4, ideal_wavefronts=4, known=False),
        Access(wavefronts=1, ideal_wavefronts=1, known=False),  # the stride is a parameter: conflicts depend on it
        Access(lines=32, ideal_lines=1),  # rows of a parameter's length: in different lines whatever it is
        Access(lines=1, ideal_lines=1),
    ]


def test_copies_count_on_both_sides() -> None:
    code = assemble("""
    S2R R0, SR_TID.X
    LEA R1, R0, RZ, 0x7
    IMAD.WIDE R2, R0, 0x10, RZ
    LDGSTS.E.BYPASS.128 [R1], [R2.64]
    EXIT
    """)
    assert list(accesses(code, {}).values()) == [Access(32, 4, 4, 4)]

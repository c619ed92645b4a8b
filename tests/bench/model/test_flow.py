"""Blocks, loops and the way of a warp through machine code."""

from __future__ import annotations

from assembled import assemble

from fastgpt.bench.model.flow import Loop, executions, flow, way

NESTED = """
MOV R0, RZ
outer:
MOV R1, RZ
inner:
FADD R2, R2, R1
IADD3 R1, R1, 0x1, RZ
@P0 BRA `(inner)
IADD3 R0, R0, 0x1, RZ
@P1 BRA `(outer)
STG.E [R4.64], R2
EXIT
"""


LEFT_BY_A_CALL = """
MOV R0, RZ
.L_x_1:
FADD R2, R2, R0
@!P2 CALL.REL.NOINC `(.L_x_0)
BRA `(.L_x_1)
.L_x_0:
STG.E [R4.64], R2
EXIT
"""


def test_nested_loops() -> None:
    code = assemble(NESTED)
    found = flow(code)
    # the outer loop has instructions 1 to 6, the inner one 2 to 4
    outer, inner = found.loops
    assert (outer.depth, outer.parent, inner.depth, inner.parent) == (1, None, 2, outer.number)
    assert [i.address // 16 for i in found.instructions(outer.blocks)] == [1, 2, 3, 4, 5, 6]
    assert [i.address // 16 for i in found.instructions(inner.blocks)] == [2, 3, 4]
    assert executions(found, {}) == dict.fromkeys(range(9), 1.0)
    times = executions(found, {outer.number: 5.0, inner.number: 35.0})
    assert [times[n] for n in range(9)] == [1, 5, 35, 35, 35, 5, 5, 1, 1]
    assert executions(found, {outer.number: 5.0})[2] == 5.0, "an inner loop without trips makes one each time"


def test_a_loop_that_is_left_by_a_call() -> None:
    # as ptxas writes it for large kernels: the call does not return, and only the branch back is unconditional
    code = assemble(LEFT_BY_A_CALL)
    found = flow(code)
    assert len(found.loops) == 1
    times = executions(found, {0: 7.0})
    assert [times[n] for n in range(6)] == [1, 7, 7, 7, 1, 1]


def test_the_way_avoids_subroutines() -> None:
    code = assemble("""
    FCHK P0, R6, R7
    @!P0 BRA `(quick)
    MOV R0, R6
    MOV R1, R7
    MOV R2, R7
    CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath)
    quick:
    FADD R1, R1, R0
    EXIT
    """)
    assert sorted(executions(flow(code), {})) == [0, 1, 6, 7]


def test_the_way_takes_the_longer_branch() -> None:
    code = assemble("""
    @P0 BRA `(skip)
    FADD R1, R1, R0
    FADD R1, R1, R0
    BRA `(end)
    skip:
    FADD R1, R1, R0
    end:
    EXIT
    """)
    found = flow(code)
    assert sorted(executions(found, {})) == [0, 1, 2, 3, 5]


def test_a_loop_with_many_iterations_decides() -> None:
    """A vectorised loop or a longer scalar one: the launch says which one runs."""
    code = assemble("""
    @P0 BRA `(scalar)
    wide:
    LDG.E.128 R4, [R2.64]
    @P1 BRA `(wide)
    BRA `(end)
    scalar:
    LDG.E R4, [R2.64]
    LDG.E R4, [R2.64+0x4]
    LDG.E R4, [R2.64+0x8]
    @P1 BRA `(scalar)
    end:
    EXIT
    """)
    found = flow(code)
    assert [n.number for n in way(found, None, {}) if isinstance(n, Loop)] == [1]
    assert [n.number for n in way(found, None, {0: 100.0}) if isinstance(n, Loop)] == [0]
    assert 1 in executions(found, {0: 100.0}) and 4 not in executions(found, {0: 100.0})


def test_diverged_warps_and_code_that_nothing_reaches_are_left_out() -> None:
    code = assemble("""
    BRA.DIV UR4, `(apart)
    back:
    EXIT
    apart:
    WARPSYNC.COLLECTIVE R6, `(apart)
    BRA `(back)
    end:
    BRA `(end)
    """)
    assert sorted(executions(flow(code), {})) == [0, 1] and not flow(code).loops

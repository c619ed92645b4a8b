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


def test_the_way_does_the_work_in_the_fewest_instructions() -> None:
    code = assemble("""
    @P0 BRA `(out)
    @P1 BRA `(single)
    LDG.E.64 R4, [R2.64]
    BRA `(end)
    single:
    LDG.E R4, [R2.64]
    LDG.E R5, [R2.64+0x4]
    BRA `(end)
    end:
    @P2 BRA `(kept)
    SEL R4, RZ, R4, P3
    kept:
    HMMA.16816.F32.BF16 R4, R8, R10, R4
    EXIT
    out:
    LDG.E.128 R4, [R2.64]
    EXIT
    """)
    # products count more than bytes; of the same bytes the vector; the mask is skipped
    assert sorted(executions(flow(code), {})) == [0, 1, 2, 3, 7, 9, 10]


def test_a_loop_with_known_iterations_decides() -> None:
    """A vectorised loop or a scalar one: the launch says which one runs."""
    code = assemble("""
    @P0 BRA `(scalar)
    wide:
    LDG.E.128 R4, [R2.64]
    @P1 BRA `(wide)
    BRA `(end)
    scalar:
    LDG.E R4, [R2.64]
    @P1 BRA `(scalar)
    end:
    EXIT
    """)
    found = flow(code)
    assert [n.number for n in way(found, None, {}) if isinstance(n, Loop)] == [0]
    assert [n.number for n in way(found, None, {1: 2.0}) if isinstance(n, Loop)] == [1]
    assert 4 in executions(found, {1: 100.0}) and 1 not in executions(found, {1: 100.0})


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

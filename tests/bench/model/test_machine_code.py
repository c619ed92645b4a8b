"""What nvdisasm prints, as instructions."""

from __future__ import annotations

from pathlib import Path

import pytest
from assembled import assemble

from fastgpt.bench.model.chips import A100, H100
from fastgpt.bench.model.compiled import of_cuda
from fastgpt.bench.model.machine_code import parse
from fastgpt.bench.model.opcodes import multiply_adds, operand_bytes, pipe_cycles, unknown, vector_bytes
from fastgpt.checks.cuda import find_nvcc

LISTING = """
	.target	sm_90a

//--------------------- .nv.info                  --------------------------
	//----- nvinfo : EIATTR_REGCOUNT
	.align		4
        /*0000*/ 	.byte	0x04, 0x2f
        /*0002*/ 	.short	(.L_1 - .L_0)
	.align		4
.L_0:
        /*0004*/ 	.word	index@(_Z1kPf)
        /*0008*/ 	.word	0x00000018

	.section	.text._Z1kPf,"ax",@progbits
.text._Z1kPf:
.L_x_1:
        /*0000*/                   LDG.E.128 R4, desc[UR8][R14.64+0x800] ;     /* 0x0008000808047981 */
                                                                               /* 0x000ea2000c1e1d00 */
        /*0010*/              @!P0 FFMA R9, R8.reuse, -R9, R0 ;                /* 0x0000000908097223 */
                                                                               /* 0x004fc60000000000 */
        /*0020*/               @P1 BRA `(.L_x_1) ;                             /* 0xfffffffc00a08947 */
                                                                               /* 0x000fea000383ffff */
.L_x_2:

	.section	.nv.shared._Z1kPf,"aw",@nobits
.nv.shared._Z1kPf:
	.zero		5120
"""


def test_a_listing() -> None:
    (code,) = parse(LISTING).values()
    assert (code.name, code.arch, code.registers, code.static_shared) == ("_Z1kPf", 90, 24, 4096)
    load, product, branch = code.instructions
    assert (load.opcode, load.base, load.width, load.operands) == (
        "LDG.E.128",
        "LDG",
        16,
        ("R4", "desc[UR8][R14.64+0x800]"),
    )
    # upper words, from bit 41: 0x751 = 0b0_000000_111_010_1_0001 and so on: wait mask, read, write, yield, stall
    assert (load.waits, load.read, load.write, load.stall) == ((), None, 2, 1)
    assert (product.waits, product.read, product.write, product.stall) == ((2,), None, None, 3)
    assert product.predicate == "@!P0" and product.operands == ("R9", "R8.reuse", "-R9", "R0")
    assert (branch.target, branch.stall, load.target) == (0, 5, None)


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match="names no target"):
        parse("Fatal: not a cubin")
    with pytest.raises(ValueError, match="no second word of the instruction"):
        parse("\n".join(line for line in LISTING.splitlines() if "0x004fc6" not in line))


@pytest.mark.nvcc
@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc here")
def test_resources_are_those_of_ptxas(tmp_path: Path) -> None:
    source = tmp_path / "a.cu"
    source.write_text(
        "#include <cuda_runtime.h>\n__global__ void __launch_bounds__(96) kernel(float* x) { __shared__ float t[96];"
        "t[threadIdx.x] = x[threadIdx.x]; __syncthreads(); x[threadIdx.x] = t[95 - threadIdx.x]; }\n"
    )
    for arch, number in (("sm_80", 80), ("sm_90a", 90)):
        (code,) = of_cuda(source, arch).values()
        assert (code.arch, code.threads, code.static_shared) == (number, 96, 384) and 0 < code.registers < 32


def test_products() -> None:
    group, tensor, narrow = assemble("""
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0
    HMMA.16816.F32.BF16 R4, R8, R10, R4
    HMMA.1688.F32.TF32 R4, R8, R10, R4
    """).instructions
    assert [multiply_adds(i) for i in (group, tensor, narrow)] == [16 * 128 * 16, 16 * 8 * 16, 16 * 8 * 8]
    assert pipe_cycles(group, H100) == {"tensor": 64} and pipe_cycles(tensor, A100) == {"tensor": 8}
    assert pipe_cycles(narrow, A100) == {"tensor": 8}, "TF32 runs at half the rate"
    assert pipe_cycles(tensor, H100)["tensor"] == pytest.approx(4 / H100.mma_share)
    assert operand_bytes(group) == (128 * 16 + 64 * 16) * 2 / 4 and operand_bytes(tensor) == 0
    (from_registers,) = assemble("HGMMA.64x128x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0").instructions
    assert operand_bytes(from_registers) == 128 * 16 * 2 / 4


def test_pipes() -> None:
    text = """
    FFMA R0, R1, R2, R3
    IMAD R0, R1, R2, R3
    LOP3.LUT R0, R1, R2, RZ, 0xc0, !PT
    MUFU.EX2 R0, R1
    BRA `(x)
    @!PT FADD R0, R1, R2
    """
    for chip, fma in ((A100, 2), (H100, 1)):
        found = [pipe_cycles(i, chip) for i in assemble(text).instructions]
        assert found == [{"fma": fma}, {"multiply": 2, "fma": fma}, {"alu": 2}, {"xu": 8}, {}, {}]


def test_widths() -> None:
    text = """
    LDG.E R0, [R2.64]
    LDG.E.U16 R0, [R2.64]
    LDS.64 R0, [R2]
    LDSM.16.MT88.2 R0, [R2]
    LDGSTS.E.BYPASS.128 [R1], [R2.64]
    """
    assert [vector_bytes(i) for i in assemble(text).instructions] == [128, 64, 256, 256, 512]


def test_unknown_opcodes_are_named() -> None:
    assert unknown(assemble("FFMA R0, R1, R2, R3\nFROB.X R0, R1\nEXIT")) == {"FROB"}

"""What an instruction occupies: pipes of a quarter of a multiprocessor, the load/store unit, shared memory.

Which pipe executes an opcode is in the metrics reference of Nsight Compute (pipes fma, fmaheavy, fp16, alu, xu, lsu,
tensor) and, by its rates, in the programming guide; chips.py has the rates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fastgpt.bench.model.chips import QUARTERS, WARP, Chip
from fastgpt.bench.model.machine_code import Code, Instruction

_PIPES = {
    "fma": "FADD FADD32I FFMA FFMA32I FMUL FMUL32I FSWZADD",
    "fp16": "HADD2 HADD2_32I HFMA2 HFMA2_32I HMUL2 HMUL2_32I HSET2 HSETP2",
    "fp64": "DADD DFMA DMUL DSETP",
    "multiply": "IDP IMAD IMUL",
    "alu": "BMSK CS2R F2FP F2IP FMNMX FSEL FSET FSETP HMNMX2 I2FP I2IP IABS IADD3 ICMP IMNMX ISETP LEA LOP3 MOV "
    "P2R PLOP3 PRMT R2P SEL SGXT SHF SHL SHR VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3 VOTE",
    "xu": "BREV F2F F2I FCHK FLO FRND I2F I2I MUFU POPC REDUX",
    "tensor": "BMMA DMMA HGMMA HMMA IGMMA IMMA QGMMA",
    "global": "ATOM ATOMG LD LDG LDL RED ST STG STL",  # local memory goes the way of global memory
    "copy": "LDGSTS",
    "shared": "ATOMS LDS LDSM STS STSM",
    "exchange": "MATCH SHFL",
    # a slot of the scheduler only: control, constants, special registers, waits, the uniform pipe, TMA
    "issue": "ACQBULK ARRIVES B2R BAR BMOV BPT BRA BREAK BRX BSSY BSYNC CALL CCTL CCTLL CGAERRBAR DEPBAR ELECT "
    "ENDCOLLECTIVE ERRBAR EXIT FENCE JMP JMX KILL LDC LDGDEPBAR LEPC MEMBAR NANOSLEEP NOP PREEXIT R2B R2UR RET S2R "
    "S2UR SETCTAID SYNCS UBLKCP UBLKPF UBLKRED UBMSK UBREV UCGABAR_ARV UCGABAR_WAIT UF2FP UFLO UIADD3 UIMAD UISETP "
    "ULDC ULEA ULOP3 "
    "UMOV UP2UR UPLOP3 UPOPC UPRMT UR2UP USEL USETMAXREG USGXT USHF USYNCS UTMACCTL UTMACMDFLUSH UTMALDG UTMAPF "
    "UTMAREDG UTMASTG VOTEU WARPGROUP WARPGROUPSET WARPSYNC YIELD",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in _PIPES.items() for opcode in opcodes.split()}
UNIT_OF = {"fma": "fp32", "fp16": "fp32", "fp64": "fp32", "multiply": "fp32", "alu": "integer", "xu": "mufu"}
UNIT_OF |= {"tensor": "tensor"}
_MULTIPLIED = {"16816": 2048, "16832": 4096, "16864": 8192, "1688": 1024, "1684": 512, "8816": 1024, "884": 256}
_GROUP = re.compile(r"\.64x(\d+)x(\d+)")
NEVER = ("@!PT", "@!UPT")
MMA = ("HMMA", "IMMA", "BMMA", "DMMA")


def unknown(code: Code) -> set[str]:
    """Return the opcodes of a kernel that are in no list above."""
    return {i.base for i in code.instructions} - PIPE_OF.keys()


def multiply_adds(instruction: Instruction) -> int:
    """Return the dense multiply-adds of one tensor-core instruction of a warp; 0 for every other one.

    A warp does a quarter of the warp group's product, as in HGMMA.64x128x16.
    """
    if PIPE_OF.get(instruction.base) != "tensor":
        return 0
    group = _GROUP.search(instruction.opcode)
    if group:
        return 16 * int(group[1]) * int(group[2])
    shape = next((part for part in instruction.opcode.split(".") if part in _MULTIPLIED), None)
    return _MULTIPLIED[shape] if shape else 0


def _tensor_cycles(instruction: Instruction, chip: Chip) -> float:
    """Return the cycles that it occupies the tensor core of its quarter."""
    rate = chip.tensor_fma / QUARTERS
    if ".TF32" in instruction.opcode:
        rate /= 2
    elif instruction.base in ("IMMA", "IGMMA", "QGMMA"):
        rate *= 2
    elif instruction.base == "DMMA":
        rate /= 16
    return multiply_adds(instruction) / (rate * (chip.mma_share if instruction.base in MMA else 1.0))


def pipe_cycles(instruction: Instruction, chip: Chip) -> dict[str, float]:
    """Return the cycles that an instruction of a warp occupies pipes of its quarter, by pipe."""
    pipe = PIPE_OF.get(instruction.base, "issue")
    if instruction.predicate in NEVER:
        return {}
    if pipe == "tensor":
        return {"tensor": _tensor_cycles(instruction, chip)}
    lanes = {
        "fma": chip.fp32_lanes,
        "fp16": chip.bf16_lanes if ".BF16" in instruction.opcode else chip.fp16_lanes,
        "fp64": chip.fp64_lanes,
        "multiply": chip.multiply_lanes,
        "alu": chip.integer_lanes,
        "xu": chip.mufu_lanes,
    }
    if pipe not in lanes:
        return {}
    cycles = {pipe: WARP * QUARTERS / lanes[pipe]}
    if pipe == "multiply":  # a part of the pipe for FP32
        cycles["fma"] = WARP * QUARTERS / chip.fp32_lanes
    return cycles


def operand_bytes(instruction: Instruction) -> float:
    """Return the bytes of shared memory that a warp-group product reads for each of its four warps."""
    group = _GROUP.search(instruction.opcode)
    if group is None:
        return 0.0
    n, k = int(group[1]), int(group[2])
    size = 1 if instruction.base in ("IGMMA", "QGMMA") else 4 if ".TF32" in instruction.opcode else 2
    left = instruction.operands[1:2] and instruction.operands[1].startswith("gdesc")  # A from shared memory, too
    return (n * k + (64 * k if left else 0)) * size / QUARTERS


def vector_bytes(instruction: Instruction) -> int:
    """Return the bytes that 32 lanes load or store at most; 0 for an instruction that does neither."""
    if PIPE_OF.get(instruction.base) not in ("global", "shared", "copy") or instruction.predicate in NEVER:
        return 0
    if instruction.base in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits
        return 128 * int(instruction.opcode.rsplit(".", 1)[1]) if instruction.opcode[-1] in "24" else 128
    return WARP * instruction.width


def count(instructions: Iterable[Instruction], *bases: str) -> int:
    """Return how many of the instructions have one of these opcodes, modifiers aside."""
    return sum(i.base in bases for i in instructions)

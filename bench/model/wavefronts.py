"""What accesses to shared and global memory cost: wavefronts with bank conflicts, and lines of 128 bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastgpt.bench.model import opcodes
from fastgpt.bench.model.machine_code import Code, Instruction

WAVEFRONT = 128  # bytes: 32 banks of 4, or a line of L1


@dataclass(frozen=True)
class Access:
    """One instruction of a warp that reads or writes memory."""

    wavefronts: float = 0.0  # cycles of shared memory
    ideal_wavefronts: float = 0.0  # without bank conflicts
    lines: float = 0.0  # of 128 bytes, in global memory
    ideal_lines: float = 0.0
    known: bool = True  # whether its addresses could be followed


def access(instruction: Instruction) -> Access | None:
    """Return the cost of an instruction as if its lanes read consecutive bytes; None if it touches no memory."""
    pipe = opcodes.PIPE_OF.get(instruction.base)
    ideal = opcodes.vector_bytes(instruction) / WAVEFRONT
    if not ideal and pipe != "exchange":
        return None
    shared = ideal if pipe in ("shared", "copy") else 0.0
    lines = ideal if pipe in ("global", "copy") else 0.0
    return Access(shared, shared, lines, lines, pipe == "exchange")


def accesses(code: Code) -> Mapping[int, Access]:
    """Return the cost of every instruction that touches memory, by its number."""
    found = {n: access(i) for n, i in enumerate(code.instructions)}
    return {n: a for n, a in found.items() if a is not None}

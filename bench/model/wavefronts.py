"""What accesses to shared and global memory cost: wavefronts with bank conflicts, and lines of 128 bytes.

An access of 4 bytes a lane is served for the whole warp at once, of 8 bytes for half of it, of 16 bytes for a quarter,
and ldmatrix reads the eight rows of one matrix at a time. In each of these phases the 32 banks of 4 bytes return one
word each in a cycle; lanes that read the same word share it (CUDA programming guide, shared memory).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fastgpt.bench.model import opcodes
from fastgpt.bench.model.chips import WARP
from fastgpt.bench.model.flow import flow
from fastgpt.bench.model.lane_ops import execute
from fastgpt.bench.model.lanes import OFFSET, Address, State, Words, addresses, route
from fastgpt.bench.model.machine_code import Code, Instruction

WAVEFRONT = 128  # bytes: 32 banks of 4, or a line of L1
BANKS, BANK = 32, 4


@dataclass(frozen=True)
class Access:
    """One instruction of a warp that reads or writes memory."""

    wavefronts: float = 0.0  # cycles of shared memory
    ideal_wavefronts: float = 0.0  # without bank conflicts
    lines: float = 0.0  # of 128 bytes, in global memory
    ideal_lines: float = 0.0
    known: bool = True  # whether its addresses could be followed


def _phases(address: Address, width: int, rows: int) -> Iterator[Words]:
    """Yield the first bytes that the active lanes of each phase access. rows: lanes that give addresses."""
    size = max(1, min(WARP, WAVEFRONT // width))
    for start in range(0, rows, size):
        lanes = slice(start, min(rows, start + size))
        found = address.bytes[lanes][address.active[lanes]]
        if len(found):
            yield found


def _parts(starts: Words, width: int, unit: int) -> Words:
    """Return the distinct numbers of the units that accesses of `width` bytes touch."""
    steps = np.arange(0, max(width, 1), min(unit, width), dtype=np.uint64)
    return np.unique((starts[:, None] + steps[None, :]) // np.uint64(unit))


def _most_in_a_bank(words: Words) -> int:
    return int(np.bincount((words % np.uint64(BANKS)).astype(np.int64)).max())


def conflicts(address: Address, width: int, rows: int = WARP) -> tuple[float, float]:
    """Return the wavefronts of an access to shared memory, and their least number for so many bytes.

    Phases whose words are the same or in different banks are taken to share one wavefront.
    """
    parts = [_parts(starts, width, BANK) for starts in _phases(address, width, rows)]
    if not parts:
        return 1.0, 1.0
    whole = np.unique(np.concatenate(parts))
    total = 1 if _most_in_a_bank(whole) == 1 else sum(_most_in_a_bank(words) for words in parts)
    return float(total), float(min(total, -(-len(whole) // BANKS)))


def lines(address: Address, width: int) -> tuple[float, float]:
    """Return the lines that an access to global memory touches, and their least number for so many bytes."""
    if (address.bytes == address.bytes[0]).all():
        return 1.0, 1.0
    total = sum(len(_parts(starts, width, WAVEFRONT)) for starts in _phases(address, width, WARP))
    words = len(_parts(address.bytes[address.active], width, min(width, BANK))) if address.active.any() else 0
    return float(total), float(max(1, min(total, -(-words * min(width, BANK) // WAVEFRONT)))) if total else 0.0


def _ideal(i: Instruction) -> Access | None:
    """Return the cost of an instruction as if its lanes accessed consecutive bytes; None if it touches no memory."""
    pipe = opcodes.PIPE_OF.get(i.base)
    ideal = opcodes.vector_bytes(i) / WAVEFRONT
    if not ideal and pipe != "exchange":
        return None
    shared = ideal if pipe in ("shared", "copy") else 0.0
    touched = ideal if pipe in ("global", "copy") else 0.0
    local = i.base in ("LDL", "STL")  # laid out so that a warp's words are consecutive
    return Access(shared, shared, touched, touched, pipe == "exchange" or local)


def access(i: Instruction, state: State) -> Access | None:
    """Return the cost of an instruction in this state of the registers; ideal where addresses are unknown."""
    ideal = _ideal(i)
    if ideal is None or ideal.known:
        return ideal
    pipe, found = opcodes.PIPE_OF[i.base], addresses(state, i)
    shared = found[0] if pipe in ("shared", "copy") and found else None
    touched = found[-1] if pipe in ("global", "copy") and found else None
    matrix = i.base in ("LDSM", "STSM")
    known, result = True, {"wavefronts": ideal.wavefronts, "ideal_wavefronts": ideal.ideal_wavefronts}
    result |= {"lines": ideal.lines, "ideal_lines": ideal.ideal_lines}
    if pipe in ("shared", "copy"):
        known = shared is not None and shared.trust <= OFFSET
        if known and shared is not None:
            rows = opcodes.vector_bytes(i) // 16 if matrix else WARP
            result["wavefronts"], result["ideal_wavefronts"] = conflicts(shared, 16 if matrix else i.width, rows)
    if pipe in ("global", "copy"):
        known = known and touched is not None
        if touched is not None:
            result["lines"], result["ideal_lines"] = lines(touched, i.width)
    return Access(**result, known=known)


def accesses(code: Code, trips: Mapping[int, float]) -> Mapping[int, Access]:
    """Return the cost of every instruction on the best way that touches memory, by its number."""
    return _accesses(code, tuple(sorted(trips.items())))


@functools.lru_cache(maxsize=64)
def _accesses(code: Code, trips: tuple[tuple[int, float], ...]) -> Mapping[int, Access]:
    found, state = {}, State()
    for number in route(flow(code), None, dict(trips)):
        i = code.instructions[number]
        cost = access(i, state)
        if cost is not None:
            found[number] = cost
        execute(state, i)
    return found

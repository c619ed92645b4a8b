"""What the model takes and returns: one launch of a kernel, and its lower bound in time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastgpt.bench.model.machine_code import Code

UNITS = (
    "tensor",  # tensor cores: HMMA, IMMA, HGMMA
    "fp32",  # the FMA pipe: FFMA, FADD, FMUL, IMAD; HFMA2
    "mufu",  # the special-function pipe: MUFU and conversions between integers and floats
    "integer",  # the ALU pipe: additions, logic, shifts, comparisons, selections, packing conversions
    "load/store",  # the load/store unit: one warp instruction, or 128-byte line that it touches, a cycle
    "issue",  # the schedulers: one instruction of a warp a cycle, in each quarter of a multiprocessor
    "shared memory",  # 128 bytes a cycle, bank conflicts included
    "dram",
    "l2",
    "latency",  # a block on its own, with the waits of its warps, times the turns of resident blocks
)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel on one GPU. Bytes and FLOP are of the whole grid.

    trips: iterations of each loop of `code.loops`, by its number there: the total of a warp from start to end (for a
    loop within a loop all of its iterations), averaged over the warps of the grid. A loop that is missing here gets
    the iterations that the bytes or the FLOP imply (see `bound.iterations`).
    """

    kernel: str
    code: Code
    grid: int  # blocks
    threads: int  # of a block
    dynamic_shared: int = 0  # bytes of a block
    dram_read: float = 0.0
    dram_written: float = 0.0
    l2_read: float = 0.0  # bytes that multiprocessors request from L2: dram_read and what is read again
    tensor_flop: float = 0.0  # executed, tiles that are partly masked included
    trips: Mapping[int, float] = field(default_factory=dict)
    slowest: float = 1.0  # work of the largest block over the mean block
    masked: float = 0.0  # share of the work that is done in the longer one of two loops, which applies a mask
    computing: int | None = None  # threads of a block that do the work, if the others only copy for them


@dataclass(frozen=True)
class Bound:
    """The time that a launch takes at least, and why."""

    kernel: str
    chip: str
    seconds: dict[str, float]  # by unit, in the order of UNITS: the time if this unit alone limited the launch
    blocks_per_multiprocessor: int
    occupancy: float  # share of the multiprocessor's warps, 0 to 1
    occupancy_limit: str  # "registers", "shared memory", "threads" or "blocks"
    waves: float  # the grid over the blocks that the chip holds at a time
    tail: float  # share of the multiprocessors' time that is idle because blocks do not divide evenly, 0 to 1
    serial: float  # share of a warp's time in which it cannot use the limiting unit, 0 to 1
    waits: dict[str, float]  # cycles a warp waits from start to end, by cause: memory, barrier, other warps, ...
    bytes_in_flight: float  # of a multiprocessor, on average; compare with Chip.bytes_to_cover
    instructions: dict[str, float]  # of a warp, by unit
    conflicts: float  # wavefronts of shared memory over those without bank conflicts, at least 1
    lines: float  # 128-byte lines that global accesses touch over the fewest possible, at least 1
    unknown: float  # share of shared and global accesses whose addresses could not be followed: taken as ideal, 0 to 1

    @property
    def limit(self) -> str:
        """The unit that sets the bound."""
        return max(self.seconds, key=lambda unit: self.seconds[unit])

    @property
    def time(self) -> float:
        """Seconds that the launch takes at least."""
        return self.seconds[self.limit]

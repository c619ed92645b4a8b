"""The lower bound of a launch: how long each unit of the chip is busy with it, and how long its warps wait.

Every unit is taken at its published rate, memory at the bandwidth of the data sheet, and work is spread as evenly as
blocks allow. A measured time below the bound means that the model is wrong; one that is far above it, that something is
in the way which the model does not have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastgpt.bench.codegen import occupancy
from fastgpt.bench.model import opcodes
from fastgpt.bench.model.chips import QUARTERS, WARP, Chip
from fastgpt.bench.model.flow import Flow, Loop, executions, flow
from fastgpt.bench.model.lanes import route
from fastgpt.bench.model.launch import UNITS, Bound, Launch
from fastgpt.bench.model.schedule import Warp, block_time
from fastgpt.bench.model.wavefronts import Access, accesses

QUARTERED = ("tensor", "fp32", "mufu", "integer", "issue")  # units that each quarter of a multiprocessor has


@dataclass
class Work:
    """What a warp does from start to end: cycles of a quarter's pipes, of the load/store unit, of shared memory."""

    issue: float = 0.0
    pipes: dict[str, float] = field(default_factory=dict)
    instructions: dict[str, float] = field(default_factory=dict)
    load_store: float = 0.0
    operands: float = 0.0  # cycles of shared memory for operands of wgmma
    wavefronts: float = 0.0
    ideal_wavefronts: float = 0.0
    lines: float = 0.0
    ideal_lines: float = 0.0
    touched: float = 0.0  # accesses to memory
    unknown: float = 0.0  # those whose addresses could not be followed
    loaded: float = 0.0  # bytes from global memory

    def unit(self, name: str) -> float:
        """Return the cycles of the busiest pipe of a unit."""
        return max((c for pipe, c in self.pipes.items() if opcodes.UNIT_OF[pipe] == name), default=0.0)


def work(found: Flow, times: Mapping[int, float], costs: Mapping[int, Access], chip: Chip) -> Work:
    """Return the work of a warp. times: executions of each instruction."""
    total = Work()
    for number, often in times.items():
        i = found.code.instructions[number]
        total.issue += often
        pipe = opcodes.PIPE_OF.get(i.base, "issue")
        unit = opcodes.UNIT_OF.get(pipe, "issue" if pipe == "issue" else "load/store")
        total.instructions[unit] = total.instructions.get(unit, 0.0) + often
        for name, cycles in opcodes.pipe_cycles(i, chip).items():
            total.pipes[name] = total.pipes.get(name, 0.0) + often * cycles
        total.operands += often * opcodes.operand_bytes(i) / chip.shared_bytes
        cost = costs.get(number)
        if cost is None:
            continue
        total.load_store += often * max(1.0, cost.lines)
        total.wavefronts += often * cost.wavefronts
        total.ideal_wavefronts += often * cost.ideal_wavefronts
        total.lines += often * cost.lines
        total.ideal_lines += often * cost.ideal_lines
        if cost.ideal_lines or cost.ideal_wavefronts:
            total.touched += often
            total.unknown += often * (not cost.known)
        if i.base in ("LDG", "LD", "LDGSTS"):
            total.loaded += often * opcodes.vector_bytes(i)
    return total


def iterations(launch: Launch, found: Flow) -> dict[int, float]:
    """Return the iterations of every loop.

    A loop that the launch does not name and that does most of its products, or of its accesses to global memory, makes
    as many as its FLOP, or its bytes, imply. Of loops that do equally many, as for tiles with a mask and without one,
    the longest makes `launch.masked` of them and the shortest the others. Every other one makes one each time it is
    reached.
    """
    trips = dict(launch.trips)
    warps = launch.grid * _warps(launch)
    adds = [opcodes.multiply_adds(i) for i in found.code.instructions]
    moved = [opcodes.vector_bytes(i) if i.base in ("LDG", "STG", "LDGSTS") else 0 for i in found.code.instructions]
    per_warp = launch.tensor_flop / 2 / warps
    values = adds if per_warp else moved
    if not per_warp:
        per_warp = (max(launch.l2_read, launch.dram_read) + launch.dram_written) / warps
    inner = [loop for loop in found.loops if not found.children(loop.number)]
    sizes = {loop.number: _per_iteration(found, loop, values) for loop in inner}
    most = max((size for size, _ in sizes.values()), default=0)
    hot = sorted((n for n in sizes if sizes[n][0] == most), key=lambda n: sizes[n][1])
    if not most or not per_warp or not trips.keys().isdisjoint(hot):
        return trips
    elsewhere = executions(found, trips | dict.fromkeys(hot, 0.0))
    rest = sum(often * values[n] for n, often in elsewhere.items())
    total = max(0.0, per_warp - rest) / most
    masked = launch.masked if len(hot) > 1 else 0.0
    return trips | dict.fromkeys(hot, 0.0) | {hot[-1]: masked * total} | {hot[0]: (1 - masked) * total}


def _per_iteration(found: Flow, loop: Loop, values: list[int]) -> tuple[int, int]:
    """Return the sum of the values of the instructions in one iteration of an innermost loop, and their number."""
    numbers = list(route(found, loop, {}))
    return sum(values[number] for number in numbers), len(numbers)


def _warps(launch: Launch) -> int:
    """Return the warps of a block that do the work."""
    return math.ceil((launch.computing or launch.threads) / WARP)


def bound(launch: Launch, chip: Chip) -> Bound:
    """Return the lower bound of a launch on a chip.

    Raises ValueError if a block does not fit on a multiprocessor.
    """
    code, found = launch.code, flow(launch.code)
    fits = occupancy(chip.capability, launch.threads, code.registers, code.static_shared + launch.dynamic_shared)
    resident = fits["blocks_per_sm"]
    if not resident:
        raise ValueError(f"{launch.kernel}: a block does not fit on {chip.name}, because of {fits['limited_by']}")
    trips = iterations(launch, found)
    costs = accesses(code, trips)
    done = work(found, executions(found, trips), costs, chip)
    memory = _memory_latency(launch, chip)
    block = block_time(found, trips, Warp(chip, memory, costs, _warps(launch)))
    even = launch.grid / chip.multiprocessors
    busiest, turns = _turns(launch, even, resident)
    alone = _block_seconds(launch, chip, done)
    seconds = {unit: busiest * time for unit, time in alone.items()} | _memory_seconds(launch, chip)
    limit = max(seconds, key=lambda unit: seconds[unit])
    seconds["latency"] = turns * block.now / chip.clock
    return Bound(
        kernel=launch.kernel,
        chip=chip.name,
        seconds={unit: seconds[unit] for unit in UNITS},
        blocks_per_multiprocessor=resident,
        occupancy=fits["occupancy_pct"] / 100,
        occupancy_limit=fits["limited_by"],
        waves=even / resident,
        tail=1 - even / busiest,
        serial=_serial(launch, seconds[limit] / busiest, limit, block.now / chip.clock),
        waits=dict(sorted(block.waits.items())),
        bytes_in_flight=min(resident, even) * _warps(launch) * done.loaded / block.now * memory,
        instructions=dict(sorted(done.instructions.items())),
        conflicts=done.wavefronts / done.ideal_wavefronts if done.ideal_wavefronts else 1.0,
        lines=done.lines / done.ideal_lines if done.ideal_lines else 1.0,
        unknown=done.unknown / done.touched if done.touched else 0.0,
    )


def _turns(launch: Launch, even: float, resident: int) -> tuple[float, float]:
    """Return the mean blocks that the busiest multiprocessor executes, and how many it executes one after another.

    even: blocks of each multiprocessor if they could be divided.
    """
    if launch.slowest > 1.0:
        return max(even, launch.slowest), max(even / resident, launch.slowest)
    return math.ceil(even), math.ceil(math.ceil(even) / resident)


def _serial(launch: Launch, busy: float, limit: str, time: float) -> float:
    """Return the share of a warp's time in which it does not use the limiting unit.

    busy: seconds of that unit for a block; a warp has one of QUARTERS of it, or shares all of it in turn.
    """
    of_warp = busy / _warps(launch) * (QUARTERS if limit in QUARTERED else 1)
    return max(0.0, 1 - of_warp / time)


def _memory_latency(launch: Launch, chip: Chip) -> float:
    """Return the mean cycles until a load returns, by the shares that come from DRAM and from L2."""
    read = max(launch.l2_read, launch.dram_read)
    from_dram = launch.dram_read / read if read else 1.0
    return chip.l2_latency + from_dram * (chip.dram_latency - chip.l2_latency)


def _block_seconds(launch: Launch, chip: Chip, done: Work) -> dict[str, float]:
    """Return the time that a multiprocessor's units are busy with one block."""
    each = _warps(launch) / chip.clock
    seconds = {unit: each * done.unit(unit) / QUARTERS for unit in QUARTERED if unit != "issue"}
    seconds["issue"] = each * done.issue / QUARTERS
    seconds["load/store"] = each * done.load_store
    seconds["shared memory"] = each * (done.operands + done.wavefronts)
    return seconds


def _memory_seconds(launch: Launch, chip: Chip) -> dict[str, float]:
    """Return the time that DRAM and L2 are busy with the grid."""
    from_l2 = max(launch.l2_read, launch.dram_read)
    return {
        "dram": (launch.dram_read + launch.dram_written) / chip.dram,
        "l2": (from_l2 + launch.dram_written) / (chip.l2 * chip.clock),
    }

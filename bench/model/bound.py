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
from fastgpt.bench.model.chips import QUARTERS, Chip
from fastgpt.bench.model.flow import Flow, Loop, executions, flow
from fastgpt.bench.model.lanes import route
from fastgpt.bench.model.launch import UNITS, Bound, Launch
from fastgpt.bench.model.schedule import Warp, block_time
from fastgpt.bench.model.wavefronts import Access, accesses


@dataclass
class Work:
    """What a warp does from start to end: cycles of a quarter's pipes, of the load/store unit, of shared memory."""

    issue: float = 0.0
    pipes: dict[str, float] = field(default_factory=dict)
    instructions: dict[str, float] = field(default_factory=dict)
    load_store: float = 0.0
    shared: float = 0.0
    ideal_shared: float = 0.0
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
        total.shared += often * opcodes.operand_bytes(i) / chip.shared_bytes
        cost = costs.get(number)
        if cost is None:
            continue
        total.load_store += often * max(1.0, cost.lines)
        total.shared += often * cost.wavefronts
        total.ideal_shared += often * cost.ideal_wavefronts
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
    as many as its FLOP, or its bytes, imply. Every other one makes one each time it is reached.
    """
    trips = dict(launch.trips)
    warps = launch.grid * math.ceil(launch.threads / 32)
    adds = [opcodes.multiply_adds(i) for i in found.code.instructions]
    moved = [opcodes.vector_bytes(i) if i.base in ("LDG", "STG", "LDGSTS") else 0 for i in found.code.instructions]
    per_warp = launch.tensor_flop / 2 / warps
    values = adds if per_warp else moved
    if not per_warp:
        per_warp = (max(launch.l2_read, launch.dram_read) + launch.dram_written) / warps
    inner = [loop for loop in found.loops if not found.children(loop.number)]
    sizes = {loop.number: _per_iteration(found, loop, values) for loop in inner}
    hot = max(sizes, key=lambda n: sizes[n], default=None)
    if hot is None or hot in trips or not sizes[hot] or not per_warp:
        return trips
    elsewhere = executions(found, trips | {hot: 0.0})
    rest = sum(often * values[n] for n, often in elsewhere.items())
    return trips | {hot: max(0.0, per_warp - rest) / sizes[hot]}


def _per_iteration(found: Flow, loop: Loop, values: list[int]) -> int:
    """Return the sum of the values of the instructions in one iteration of an innermost loop."""
    return sum(values[number] for number in route(found, loop))


def bound(launch: Launch, chip: Chip) -> Bound:
    """Return the lower bound of a launch on a chip.

    Raises ValueError if a block does not fit on a multiprocessor.
    """
    code, found = launch.code, flow(launch.code)
    shared = code.static_shared + launch.dynamic_shared
    fits = occupancy(chip.capability, launch.threads, code.registers, shared)
    if not fits["blocks_per_sm"]:
        raise ValueError(f"{launch.kernel}: a block does not fit on {chip.name}, because of {fits['limited_by']}")
    trips, costs = iterations(launch, found), accesses(code)
    done = work(found, executions(found, trips), costs, chip)
    l2_read = max(launch.l2_read, launch.dram_read)
    from_dram = launch.dram_read / l2_read if l2_read else 1.0
    memory = chip.l2_latency + from_dram * (chip.dram_latency - chip.l2_latency)
    warp = block_time(found, trips, Warp(chip, memory, costs, warps=math.ceil(launch.threads / 32)))
    even = launch.grid / chip.multiprocessors
    busiest = math.ceil(even) if launch.slowest == 1.0 else max(even, launch.slowest)
    seconds = _seconds(launch, chip, done, busiest)
    turns = busiest / min(busiest, fits["blocks_per_sm"])
    seconds["latency"] = (
        warp.now / chip.clock * (math.ceil(turns) if launch.slowest == 1.0 else max(turns, launch.slowest))
    )
    resident = min(fits["blocks_per_sm"], even) * math.ceil(launch.threads / 32)
    limit = max((u for u in UNITS if u != "latency"), key=lambda u: seconds[u])
    warps_per_busiest = busiest * math.ceil(launch.threads / 32)
    alone = seconds[limit] * chip.clock / warps_per_busiest * (QUARTERS if limit in opcodes.UNIT_OF.values() else 1)
    return Bound(
        kernel=launch.kernel,
        chip=chip.name,
        seconds={unit: seconds[unit] for unit in UNITS},
        blocks_per_multiprocessor=fits["blocks_per_sm"],
        occupancy=fits["occupancy_pct"] / 100,
        occupancy_limit=fits["limited_by"],
        waves=even / fits["blocks_per_sm"],
        tail=1 - even / busiest,
        serial=max(0.0, 1 - alone / warp.now),
        waits=dict(sorted(warp.waits.items())),
        bytes_in_flight=resident * done.loaded / warp.now * memory,
        instructions=dict(sorted(done.instructions.items())),
        conflicts=done.shared / done.ideal_shared if done.ideal_shared else 1.0,
        lines=done.lines / done.ideal_lines if done.ideal_lines else 1.0,
        unknown=done.unknown / done.touched if done.touched else 0.0,
    )


def _seconds(launch: Launch, chip: Chip, done: Work, busiest: float) -> dict[str, float]:
    """Return the time of each unit but latency. busiest: mean blocks that the busiest multiprocessor executes."""
    warps = busiest * math.ceil(launch.threads / 32)
    seconds = {u: warps * done.unit(u) / QUARTERS / chip.clock for u in ("tensor", "fp32", "mufu", "integer")}
    seconds["issue"] = warps * done.issue / QUARTERS / chip.clock
    seconds["load/store"] = warps * done.load_store / chip.clock
    seconds["shared memory"] = warps * done.shared / chip.clock
    seconds["dram"] = (launch.dram_read + launch.dram_written) / chip.dram
    l2_bytes = max(launch.l2_read, launch.dram_read) + launch.dram_written
    seconds["l2"] = l2_bytes / (chip.l2 * chip.clock)
    return seconds

"""The time of a block that has a multiprocessor to itself: one of its warps from start to end, and what it waits for.

A warp issues in order. An instruction issues when the cycles that its predecessor prescribes are over, its pipe is free
and the scoreboards that it waits for are released: when a load has returned, a special function is computed, or the
copies of a group have landed. Instructions that finish after a fixed time, products of mma.sync included, need no
scoreboard: ptxas puts their latency into the prescribed cycles. Between two barriers the block takes at least as long
as its busiest unit needs for all of its warps: what comes before a barrier cannot overlap with what comes behind it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastgpt.bench.model import opcodes
from fastgpt.bench.model.chips import QUARTERS, Chip
from fastgpt.bench.model.flow import Flow, Loop, way
from fastgpt.bench.model.machine_code import Instruction
from fastgpt.bench.model.wavefronts import Access

STEADY = 3  # iterations of a loop that are followed; the rest take as long as the last of them
# cycles; assumed, since published figures differ by the way of measuring
SPECIAL = 18  # MUFU and conversions
CONSTANT = 20  # special registers, constants
SHUFFLE = 23
READ = 8  # until operands of a load or store are read
BARRIER = 20  # of a block whose other warps have arrived
GROUP_PRODUCT = 18  # of the smallest product of a warp group (Luo, see chips.py); others take their time in the pipe


@dataclass
class Warp:
    """The state of the warp: cycles from its start."""

    chip: Chip
    memory: float  # cycles until a global load returns
    accesses: Mapping[int, Access]
    warps: int = 1  # of its block
    now: float = 0.0
    waits: dict[str, float] = field(default_factory=dict)
    free: dict[str, float] = field(default_factory=dict)  # when a pipe takes the next instruction
    boards: dict[int, list[tuple[float, str]]] = field(default_factory=dict)  # when a scoreboard is released, and why
    copied: float = 0.0  # when the asynchronous copies land that belong to no group yet
    products: list[float] = field(default_factory=list)  # when the groups of wgmma finish
    barriers: int = 0
    since: float = 0.0  # the last barrier
    busy: dict[str, float] = field(default_factory=dict)  # cycles of each unit since then, for all warps of the block

    def wait(self, until: float, cause: str) -> None:
        if until > self.now:
            self.waits[cause] = self.waits.get(cause, 0.0) + until - self.now
            self.now = until

    def occupy(self, pipe: str, cycles: float) -> None:
        """Issue to a pipe as soon as it is free, and keep it busy."""
        self.now = max(self.now, self.free.get(pipe, 0.0))
        self.free[pipe] = self.now + cycles
        self.use(pipe, cycles)

    def use(self, unit: str, cycles: float) -> None:
        """Count the work of the block; pipes and schedulers are there four times."""
        each = cycles * self.warps / (1 if unit == "load/store" else QUARTERS)
        self.busy[unit] = self.busy.get(unit, 0.0) + each

    def meet(self) -> None:
        """Wait until the other warps of the block have done what this one has done since the last barrier."""
        self.wait(self.since + max(self.busy.values(), default=0.0), "other warps")

    def skip(self, cycles: float) -> None:
        """Let time pass in a steady state."""
        self.now += cycles
        self.copied += cycles
        self.free = {pipe: at + cycles for pipe, at in self.free.items()}
        self.boards = {n: [(at + cycles, why) for at, why in found] for n, found in self.boards.items()}
        self.products = [at + cycles for at in self.products]

    def run(self, number: int, i: Instruction) -> None:
        """Execute an instruction; number: its place in the code."""
        for board in i.waits:
            for at, cause in sorted(self.boards.pop(board, [])):
                self.wait(at, cause)
        if i.predicate not in opcodes.NEVER:
            self._issue(i, self.accesses.get(number))
        self.use("issue", 1.0)
        self.now += max(1, i.stall)

    def _issue(self, i: Instruction, access: Access | None) -> None:
        for pipe, cycles in opcodes.pipe_cycles(i, self.chip).items():
            if pipe != "tensor" or i.base in opcodes.MMA:
                self.occupy(pipe, cycles)
        if access is not None:
            self.occupy("load/store", max(1.0, access.lines, access.wavefronts))
        if i.base == "BAR" and ".ARV" not in i.opcode:
            self.meet()
            self.wait(self.now + BARRIER, "barrier")
            self.barriers, self.since, self.busy = self.barriers + 1, self.now, {}
        elif i.base == "DEPBAR":
            self._wait_for_groups(i)
        elif i.base == "WARPGROUP" and ".DEPBAR" in i.opcode:
            last = max(0, len(self.products) - int(i.operands[-1], 16))
            done, self.products = self.products[:last], self.products[last:]
            self.wait(max(done, default=0.0), "products")
        elif opcodes.PIPE_OF.get(i.base) == "tensor" and i.base not in opcodes.MMA:
            self._start_product(i)
        self._set_boards(i)

    def _wait_for_groups(self, i: Instruction) -> None:
        """DEPBAR.LE SB0, n: wait until at most n groups of copies have not landed."""
        board, allowed = int(i.operands[0][2:]), int(i.operands[1], 16)
        found = self.boards.get(board, [])
        for at, cause in found[: max(0, len(found) - allowed)]:
            self.wait(at, cause)
        self.boards[board] = found[max(0, len(found) - allowed) :]

    def _start_product(self, i: Instruction) -> None:
        start = max(self.now, self.free.get("tensor", 0.0))
        cycles = opcodes.pipe_cycles(i, self.chip).get("tensor", 0.0)
        self.free["tensor"] = start + cycles
        self.use("tensor", cycles)
        if any(o.startswith("gsb") for o in i.operands):
            self.products.append(max(self.free["tensor"], start + GROUP_PRODUCT))

    def _set_boards(self, i: Instruction) -> None:
        latency, cause = self._latency(i)
        if i.base == "LDGSTS":
            self.copied = self.now + latency
        if i.base == "LDGDEPBAR":
            latency, cause = max(0.0, self.copied - self.now), "memory"
        if i.write is not None:
            self.boards.setdefault(i.write, []).append((self.now + latency, cause))
        if i.read is not None:
            self.boards.setdefault(i.read, []).append((self.now + READ, "operands"))

    def _latency(self, i: Instruction) -> tuple[float, str]:
        pipe = opcodes.PIPE_OF.get(i.base, "issue")
        return {
            "global": (self.memory, "memory"),
            "copy": (self.memory, "memory"),
            "shared": (self.chip.shared_latency, "shared memory"),
            "exchange": (SHUFFLE, "shuffles"),
            "xu": (SPECIAL, "special functions"),
        }.get(pipe, (CONSTANT, "constants"))


def block_time(found: Flow, trips: Mapping[int, float], warp: Warp) -> Warp:
    """Run the warp through the kernel and return it: the block's time is `now`, its waits are in `waits`."""
    _walk(found, None, 1.0, trips, warp)
    warp.meet()
    return warp


def _walk(found: Flow, loop: Loop | None, times: float, trips: Mapping[int, float], warp: Warp) -> None:
    """Run the kernel, or one iteration of a loop that makes `times` of them in all."""
    for node in way(found, loop, trips):
        if isinstance(node, Loop):
            _repeat(found, node, times, trips, warp)
            continue
        block = found.blocks[node]
        for number in range(block.start, block.end):
            warp.run(number, found.code.instructions[number])


def _repeat(found: Flow, loop: Loop, times: float, trips: Mapping[int, float], warp: Warp) -> None:
    """Run a loop that is reached `times` times in all, once."""
    total = trips.get(loop.number, times)
    each = total / times if times else 0.0
    followed = min(STEADY, math.ceil(each))
    started, barriers, waited, busy = warp.now, warp.barriers, dict(warp.waits), dict(warp.busy)
    for _ in range(followed):
        started, barriers, waited, busy = warp.now, warp.barriers, dict(warp.waits), dict(warp.busy)
        _walk(found, loop, total, trips, warp)
    rest = each - followed
    spent = rest * (warp.now - started)
    warp.skip(spent)
    for cause, cycles in warp.waits.items():
        warp.waits[cause] = cycles + rest * (cycles - waited.get(cause, 0.0))
    if warp.barriers > barriers:
        warp.since += spent
        return
    for unit, cycles in warp.busy.items():
        warp.busy[unit] = cycles + rest * (cycles - busy.get(unit, 0.0))

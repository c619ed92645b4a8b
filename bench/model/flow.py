"""Control flow of machine code: basic blocks, loops, and how often a warp executes each instruction.

Of all ways through a kernel, and through an iteration of each loop, a warp is taken along the one that does the work in
the fewest instructions: with the most products of tensor cores, then the most bytes, then the shortest. So it enters
the tiles, takes vectors where another branch takes single elements, and skips masks. It makes no call, which are nvcc's
subroutines for rare operands (denormal divisors, 64-bit divisions), and it does not diverge (BRA.DIV is not taken).

What a kernel loads only if a parameter is no null pointer, as a residual, is on that way whether the launch has it or
not: for a launch without it the instructions are too many. Triton compiles such cases apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fastgpt.bench.model.machine_code import Code, Instruction
from fastgpt.bench.model.opcodes import multiply_adds, vector_bytes

ENDS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "KILL")
JUMPS = ("BRA", "JMP", "CALL")
Worth = tuple[float, float, float, float, float]  # what the best way has most of, see `_worth`
NOTHING: Worth = (0.0, 0.0, 0.0, 0.0, 0.0)
NO_WAY: Worth = (-math.inf, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Block:
    """A basic block: code.instructions[start:end], and the numbers of the blocks that may follow."""

    start: int
    end: int
    successors: tuple[int, ...]


@dataclass(frozen=True)
class Loop:
    """A natural loop. Loops are numbered by the address of their header."""

    number: int
    header: int  # number of the block
    blocks: frozenset[int]
    parent: int | None  # number of the loop around it
    depth: int  # 1: in no other loop


@dataclass(frozen=True)
class Flow:
    """The blocks that the entry reaches, by number, in an order in which forward branches go forward, and the loops."""

    code: Code
    blocks: dict[int, Block]
    loops: tuple[Loop, ...]

    def children(self, parent: int | None) -> list[Loop]:
        return [loop for loop in self.loops if loop.parent == parent]

    def instructions(self, blocks: Iterable[int]) -> list[Instruction]:
        """Return the instructions of the blocks, in the order of their addresses."""
        spans = [self.blocks[b] for b in sorted(blocks, key=lambda b: self.blocks[b].start)]
        return [i for span in spans for i in self.code.instructions[span.start : span.end]]


def _jumps(instruction: Instruction) -> bool:
    """Return whether it is a CALL that jumps: ptxas leaves loops of large kernels by CALL.REL.NOINC to a local label,
    and no RET ever returns there. A subroutine has a symbol, as in $__internal_0_$__cuda_sm20_div_u64."""
    return instruction.base == "CALL" and instruction.operands[-1].startswith("`(.L")


def _ends(instruction: Instruction) -> bool:
    return instruction.base in ENDS or _jumps(instruction)


def _successors(instruction: Instruction, following: int, at: Mapping[int, int]) -> tuple[int, ...]:
    """Return the blocks after a block that ends with this instruction."""
    base = instruction.base
    conditional = bool(instruction.predicate) or (base == "BRA" and len(instruction.operands) > 1)
    falls = not _ends(instruction) or conditional
    taken = _ends(instruction) and base in JUMPS and ".DIV" not in instruction.opcode
    found = [following] if falls and following < len(at) else []
    if taken and instruction.target is not None and instruction.target in at:
        found.append(at[instruction.target])
    return tuple(dict.fromkeys(found))


def _blocks(code: Code) -> dict[int, Block]:
    """Return all basic blocks, numbered in the order of their addresses."""
    instructions = code.instructions
    ends = {n for n, i in enumerate(instructions) if _ends(i)}
    targets = {i.target for n, i in enumerate(instructions) if n in ends and i.target is not None}
    starts = [n for n, i in enumerate(instructions) if n == 0 or n - 1 in ends or i.address in targets]
    at = {instructions[n].address: number for number, n in enumerate(starts)}
    spans = zip(starts, [*starts[1:], len(instructions)])
    return {n: Block(a, b, _successors(instructions[b - 1], n + 1, at)) for n, (a, b) in enumerate(spans)}


def _postorder(successors: Mapping[int, Iterable[int]], entry: int) -> list[int]:
    """Return the nodes that the entry reaches, each after its successors where there is no cycle."""
    order, seen, stack = [], {entry}, [(entry, iter(successors[entry]))]
    while stack:
        node, rest = stack[-1]
        following = next((n for n in rest if n not in seen), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    return order


def _dominators(blocks: Mapping[int, Block], order: list[int]) -> dict[int, int]:
    """Return the immediate dominator of each block, after Cooper, Harvey and Kennedy. order: a postorder."""
    rank = {b: n for n, b in enumerate(order)}
    before: dict[int, list[int]] = {b: [] for b in order}
    for b in order:
        for s in blocks[b].successors:
            before[s].append(b)
    above = {order[-1]: order[-1]}
    changed = True
    while changed:
        changed = False
        for b in reversed(order[:-1]):
            known = [p for p in before[b] if p in above]
            new = functools.reduce(lambda a, c: _meet(a, c, above, rank), known)
            changed |= above.get(b) != new
            above[b] = new
    return above


def _meet(a: int, b: int, above: Mapping[int, int], rank: Mapping[int, int]) -> int:
    while a != b:
        if rank[a] < rank[b]:
            a = above[a]
        else:
            b = above[b]
    return a


def _dominates(a: int, b: int, above: Mapping[int, int]) -> bool:
    while b != a and above[b] != b:
        b = above[b]
    return a == b


def _body(header: int, latches: list[int], before: Mapping[int, list[int]]) -> frozenset[int]:
    body, stack = {header}, list(latches)
    while stack:
        b = stack.pop()
        if b not in body:
            body.add(b)
            stack += before[b]
    return frozenset(body)


@functools.lru_cache(maxsize=64)
def flow(code: Code) -> Flow:
    """Return the blocks and loops of a kernel."""
    every = _blocks(code)
    order = _postorder({n: b.successors for n, b in every.items()}, 0)
    blocks = {n: every[n] for n in reversed(order)}
    above = _dominators(blocks, order)
    before: dict[int, list[int]] = {n: [] for n in blocks}
    latches: dict[int, list[int]] = {}
    for n, block in blocks.items():
        for s in block.successors:
            before[s].append(n)
            if _dominates(s, n, above):
                latches.setdefault(s, []).append(n)
    bodies = {header: _body(header, ends, before) for header, ends in sorted(latches.items())}
    numbers = {header: n for n, header in enumerate(bodies)}
    loops = []
    for header, body in bodies.items():
        around = [h for h, other in bodies.items() if h != header and header in other]
        parent = min(around, key=lambda h: len(bodies[h]), default=None)
        known = None if parent is None else numbers[parent]
        loops.append(Loop(numbers[header], header, body, known, 1 + len(around)))
    return Flow(code, blocks, tuple(loops))


def way(found: Flow, loop: Loop | None = None, trips: Mapping[int, float] | None = None) -> list[int | Loop]:
    """Return the blocks, and the loops as wholes, on the best way through the kernel or an iteration of `loop`.

    A loop to which `trips` gives iterations is on it if any way leads there.
    """
    entry = 0 if loop is None else loop.header
    inner = {b: child for child in found.children(loop.number if loop else None) for b in child.blocks}
    edges, final = _collapsed(found, loop, inner)
    best: dict[int, tuple[Worth, int | None]] = {}
    for n in _postorder(edges, entry):
        choices: list[tuple[Worth, int | None]] = [(best[s][0], s) for s in edges[n] if s in best]
        choices += [(NOTHING, None)] if n in final else []
        worth, following = max(choices, key=lambda choice: choice[0], default=(NO_WAY, None))
        best[n] = _sum([worth, _worth(found, inner.get(n, n), trips or {})]), following
    route: list[int | Loop] = []
    at: int | None = entry
    while at is not None:
        route.append(inner.get(at, at))
        at = best[at][1]
    return route


def _collapsed(found: Flow, loop: Loop | None, inner: Mapping[int, Loop]) -> tuple[dict[int, set[int]], set[int]]:
    """Return the edges between blocks, each inner loop being one node by the name of its header, and the last nodes."""
    inside = set(found.blocks) if loop is None else set(loop.blocks)
    node = {b: inner[b].header if b in inner else b for b in inside}
    edges: dict[int, set[int]] = {n: set() for n in node.values()}
    final = set()
    for b in inside:
        for s in found.blocks[b].successors:
            if loop is not None and s == loop.header:
                final.add(node[b])
            elif s in inside and node[s] != node[b]:
                edges[node[b]].add(node[s])
    return edges, final if loop is not None else {n for n, after in edges.items() if not after}


def _sum(parts: Iterable[Worth]) -> Worth:
    a, b, c, d, e = (sum(values) for values in zip(NOTHING, *parts))
    return a, b, c, d, e


def _worth(found: Flow, node: int | Loop, trips: Mapping[int, float]) -> Worth:
    """Return calls (negative), loops with known iterations, multiply-adds, bytes and instructions (negative)."""
    if isinstance(node, Loop):
        once = _sum(_worth(found, n, trips) for n in way(found, node, trips))
        often = max(1.0, trips.get(node.number, 1.0))
        named = once[1] + (trips.get(node.number, 0.0) > 0)
        return once[0], named, often * once[2], often * once[3], often * once[4]
    block = found.blocks[node]
    inside = found.code.instructions[block.start : block.end]
    calls = sum(i.base == "CALL" and not _jumps(i) for i in inside)
    return -calls, 0.0, sum(map(multiply_adds, inside)), sum(map(_bytes, inside)), -len(inside)


def _bytes(instruction: Instruction) -> int:
    """Return the bytes that a warp moves; a copy from global to shared memory counts twice, as a load and a store."""
    return vector_bytes(instruction) * (2 if instruction.base == "LDGSTS" else 1)


def executions(found: Flow, trips: Mapping[int, float]) -> dict[int, float]:
    """Return how often a warp executes each instruction, by its number in code.instructions, on the best way.

    trips: total iterations of the loops, by number; a loop that is missing makes one iteration each time it is reached.
    """
    times: dict[int, float] = {}

    def walk(loop: Loop | None, count: float) -> None:
        for node in way(found, loop, trips):
            if isinstance(node, Loop):
                walk(node, trips.get(node.number, count))
            else:
                block = found.blocks[node]
                times.update(dict.fromkeys(range(block.start, block.end), count))

    walk(None, 1.0)
    return times

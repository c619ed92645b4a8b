"""Values of registers in the 32 lanes of the first warp, followed through machine code without running it.

A value has 32 concrete words and says how far they can be trusted. Kernel parameters are not known. As stand-ins they
get a large power of two, so that a pointer is aligned, a stride is longer than a line and a size is larger than the
first index. The block is the first, and predicates hold where they hold for these values. Loops are followed through
their first iteration. Results of loads are unknown, unless all lanes read the same word, and so are shuffles and
floating-point arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fastgpt.bench.model.flow import Flow, Loop, way
from fastgpt.bench.model.machine_code import Instruction

Words: TypeAlias = npt.NDArray[np.uint64]  # 32 words of 32 bits each
EXACT, OFFSET, GUESS = 0, 1, 2  # exact; up to the same multiple of a line in all lanes; depends on the stand-ins
STAND_IN = 4096
MASK = np.uint64(0xFFFFFFFF)
LANE = np.arange(32, dtype=np.uint64)
ZERO = ("SRZ", "SR_TID.Y", "SR_TID.Z", "SR_CgaCtaId")  # special registers that are 0 in the first warp of any block
_REGISTER = re.compile(r"U?R(\d+|Z)$")
_PREDICATE = re.compile(r"U?P(\d|T)$")
_ADDRESS = re.compile(r"(?:desc\[\w+\])?\[([^\]]*)\]$")


@dataclass(frozen=True)
class Value:
    """A register or a predicate (words of 0 and 1) in 32 lanes."""

    words: Words
    trust: int = EXACT

    @property
    def uniform(self) -> bool:
        return bool((self.words == self.words[0]).all())


@dataclass(frozen=True)
class Address:
    """Where an instruction reads or writes: byte addresses of the 32 lanes, of which `active` take part."""

    bytes: Words
    active: npt.NDArray[np.bool_]
    trust: int


def constant(value: int, trust: int = EXACT) -> Value:
    """Return the same 32-bit word in every lane."""
    return Value(np.full(32, value & 0xFFFFFFFF, dtype=np.uint64), trust)


class State:
    """The registers and predicates of a warp; a name that is absent is unknown."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self.loads = 0  # whose value is the same in all lanes

    def read(self, operand: str) -> Value | None:
        """Return the value of an operand: a register, a predicate, an immediate or a constant."""
        text = operand.split(".")[0] if operand[-1] not in "]" else operand
        sign = text[0] if text[0] in "-~!|" else ""
        text = text.lstrip("-~!").strip("|")
        if _REGISTER.match(text):
            found = constant(0) if text.endswith("Z") else self.values.get(text)
        elif _PREDICATE.match(text):
            found = constant(1) if text.endswith("T") else self.values.get(text)
        elif text.startswith(("c[", "cx[")):
            found = constant(STAND_IN, OFFSET)
        elif re.fullmatch(r"0x[0-9a-f]+", text):
            found = constant(int(text, 16))
        else:
            return None
        if found is None or not sign:
            return found
        if sign == "!":
            return Value(found.words ^ np.uint64(1), found.trust)
        words = (MASK ^ found.words) if sign == "~" else (np.uint64(0) - found.words) & MASK
        return Value(words, found.trust) if sign != "|" else None

    def pair(self, operand: str) -> Value | None:
        """Return a 64-bit operand, whose upper word is in the next register."""
        low = self.read(operand)
        name = operand.split(".")[0]
        if low is None or not _REGISTER.match(name) or name.endswith("Z"):
            return low
        high = self.values.get(following(name))
        return low if high is None else Value(low.words | high.words << np.uint64(32), max(low.trust, high.trust))

    def write(self, name: str, value: Value | None, where: Value | None = None) -> None:
        """Set a register or predicate in the lanes of `where` (all if None)."""
        name = name.split(".")[0]
        if name.endswith(("Z", "T")) or (where is not None and not where.words.any()):
            return
        old = self.values.get(name)
        if value is None:
            self.values.pop(name, None)
        elif where is None or old is None or where.words.all():  # without an old value other lanes are unknown anyway
            self.values[name] = value
        else:
            trust = max(value.trust, old.trust, where.trust)
            self.values[name] = Value(np.where(where.words.astype(bool), value.words, old.words), trust)


def following(register: str) -> str:
    """Return the name of the next register."""
    found = re.fullmatch(r"(U?R)(\d+)", register)
    return f"{found[1]}{int(found[2]) + 1}" if found else register


def _address(state: State, inside: str) -> Value | None:
    """Return the sum in the brackets of an address, as in R5.X16+UR4+0x10; of a 64-bit register its lower word."""
    total = constant(0)
    for term in re.sub(r"(?<=[\w.])-(?=0x)", "+-", inside).split("+"):
        value = state.read(term.strip())
        if value is None:
            return None
        scale = re.search(r"\.X(\d+)$", term)
        words = value.words * np.uint64(int(scale[1]) if scale else 1)
        total = Value((total.words + words) & MASK, max(total.trust, value.trust))
    return total


def addresses(state: State, i: Instruction) -> list[Address | None]:
    """Return the addresses of an instruction in the order of its operands; None for one that is unknown."""
    active = np.ones(32, dtype=bool)
    guard = state.read(i.predicate[1:]) if i.predicate else None
    if guard is not None and guard.trust == EXACT:
        active = guard.words.astype(bool)
    found: list[Address | None] = []
    for operand in i.operands:
        inside = _ADDRESS.match(operand)
        if inside:
            sum_ = _address(state, inside[1])
            found.append(None if sum_ is None else Address(sum_.words, active, sum_.trust))
    return found


def route(found: Flow, loop: Loop | None, trips: Mapping[int, float]) -> Iterator[int]:
    """Yield the numbers of the instructions on the best way (`flow.way`), one iteration of every loop."""
    for node in way(found, loop, trips):
        if isinstance(node, Loop):
            yield from route(found, node, trips)
        else:
            yield from range(found.blocks[node].start, found.blocks[node].end)

"""Integer instructions on values of 32 lanes: what address arithmetic is made of."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fastgpt.bench.model import opcodes
from fastgpt.bench.model.lanes import (
    EXACT,
    GUESS,
    LANE,
    MASK,
    OFFSET,
    STAND_IN,
    ZERO,
    State,
    Value,
    Words,
    addresses,
    constant,
    following,
)
from fastgpt.bench.model.machine_code import Instruction

_HIGH = np.uint64(32)
_COMPARE: dict[str, Any] = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal
}  # fmt: skip


def _signed(words: Words) -> Words:
    """Return 32-bit words sign-extended to 64."""
    return words.astype(np.uint32).view(np.int32).astype(np.int64).view(np.uint64)


def _linear(*values: Value) -> int:
    """Return the trust in a sum."""
    return max(v.trust for v in values)


def _mixed(*values: Value) -> int:
    """Return the trust in a function that is not linear: an unknown amount added to all lanes changes the pattern."""
    trust = _linear(*values)
    return trust if trust == EXACT or all(v.uniform for v in values) else GUESS


def _product(a: Value, b: Value) -> int:
    if any(v.trust == EXACT and not v.words.any() for v in (a, b)):
        return EXACT
    if all(v.uniform for v in (a, b)) or _linear(a, b) == EXACT:
        return _linear(a, b)
    factor, other = (a, b) if a.uniform else (b, a)
    return other.trust if factor.uniform and factor.trust == EXACT else GUESS


def _sources(i: Instruction) -> tuple[list[str], list[str]]:
    """Split operands into predicates that are written (they follow or precede the register) and the rest."""
    rest = list(i.operands)
    written = []
    while rest and re.fullmatch(r"U?P(\d|T)", rest[0]):
        written.append(rest.pop(0))
    register = rest.pop(0) if rest else "RZ"
    while rest and re.fullmatch(r"U?P(\d|T)", rest[0]) and i.base.lstrip("U") in ("IADD3", "LEA"):
        written.append(rest.pop(0))
    return written, [register, *rest]


def _multiply(i: Instruction, s: State, ops: list[str]) -> Value | None:
    """IMAD: a * b + c, of which .WIDE keeps 64 bits and .HI the upper 32."""
    a, b = s.read(ops[1]), s.read(ops[2])
    wide, high = ".WIDE" in i.opcode, ".HI" in i.opcode
    c = s.pair(ops[3]) if wide or high else s.read(ops[3])
    if a is None or b is None or c is None:
        return None
    unsigned = ".U32" in i.opcode
    left, right = (a.words, b.words) if unsigned else (_signed(a.words), _signed(b.words))
    words = left * right + c.words
    trust = _linear(Value(a.words, _product(a, b)), c)
    if high:
        return Value(words >> _HIGH, _mixed(a, b, c))
    if wide:
        s.write(following(ops[0]), Value(words >> _HIGH, trust))
    return Value(words & MASK, trust)


def _add(i: Instruction, s: State, ops: list[str]) -> Value | None:
    """IADD3 and VIADD; carries are not followed, they only change upper words."""
    values = [s.read(o) for o in ops[1:] if not re.fullmatch(r"!?U?P\w", o)]
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    return Value(sum((v.words for v in known[1:]), known[0].words) & MASK, _linear(*known))


def _lea(i: Instruction, s: State, ops: list[str]) -> Value | None:
    """LEA: (a << n) + b; .HI: the upper word of (c:a << n), plus b."""
    high, extended = ".HI" in i.opcode, ".SX32" in i.opcode
    shift = s.read(ops[4 if high and not extended else 3])
    a, b = s.read(ops[1]), s.read(ops[2])
    if a is None or b is None or shift is None:
        return None
    if not high:
        return Value(((a.words << shift.words) + b.words) & MASK, _linear(a, b))
    c = constant(0) if extended else s.read(ops[3])
    if c is None:
        return None
    whole = _signed(a.words) if extended else a.words | c.words << _HIGH
    return Value((((whole << shift.words) >> _HIGH) + b.words) & MASK, _linear(Value(a.words, _mixed(a, c)), b))


def _shift(i: Instruction, s: State, ops: list[str]) -> Value | None:
    """SHF d, low, n, high: a funnel shift; .HI keeps the upper word."""
    low, n, high = (s.read(o) for o in ops[1:4])
    if low is None or n is None or high is None:
        return None
    left, kept = ".L" in i.opcode, ".HI" in i.opcode
    whole = low.words | high.words << _HIGH
    amount = n.words & np.uint64(63)
    if left:
        words = whole << amount
    elif ".S" in i.opcode:
        words = (whole.view(np.int64) >> amount.view(np.int64)).view(np.uint64)
    else:
        words = whole >> amount
    words = words >> _HIGH if kept else words & MASK
    exact_shift = left and not kept and n.trust == EXACT
    return Value(words & MASK, _linear(low) if exact_shift else _mixed(low, n, high))


def _logic(i: Instruction, s: State, ops: list[str]) -> Value | None:
    """LOP3: any function of three bits, given as a table of eight."""
    a, b, c = (s.read(o) for o in ops[1:4])
    table = int(ops[4], 16)
    if a is None and table in (0xC0, 0x3C, 0xFC) and ops[1] in ("RZ", "URZ"):
        a = constant(0)
    if a is None or b is None or c is None:
        return None
    words = np.zeros(32, dtype=np.uint64)
    for case in range(8):
        if table >> case & 1:
            terms = [v.words if case >> bit & 1 else v.words ^ MASK for v, bit in ((a, 2), (b, 1), (c, 0))]
            words |= terms[0] & terms[1] & terms[2]
    return Value(words, _mixed(a, b, c))


def _permute(i: Instruction, s: State, ops: list[str]) -> Value | None:
    """PRMT d, a, selector, b: each byte is one of the eight of b:a, or its sign."""
    a, selector, b = (s.read(o) for o in ops[1:4])
    if a is None or b is None or selector is None or "." in i.opcode:
        return None
    whole, words = a.words | b.words << _HIGH, np.zeros(32, dtype=np.uint64)
    for byte in range(4):
        pick = selector.words >> np.uint64(4 * byte) & np.uint64(15)
        value = whole >> (np.uint64(8) * (pick & np.uint64(7))) & np.uint64(255)
        sign = np.where(value >> np.uint64(7), np.uint64(255), np.uint64(0))
        words |= np.where(pick >> np.uint64(3), sign, value) << np.uint64(8 * byte)
    return Value(words, _mixed(a, b, selector))


def _select(i: Instruction, s: State, ops: list[str]) -> Value | None:
    a, b, which = s.read(ops[1]), s.read(ops[2]), s.read(ops[3])
    if a is None or b is None or which is None:
        return None
    return Value(np.where(which.words.astype(bool), a.words, b.words), _mixed(a, b, which))


def _extreme(i: Instruction, s: State, ops: list[str]) -> Value | None:
    a, b, smaller = s.read(ops[1]), s.read(ops[2]), s.read(ops[3])
    if a is None or b is None or smaller is None:
        return None
    left, right = (a.words, b.words) if ".U32" in i.opcode else (_signed(a.words), _signed(b.words))
    less = np.less(left, right) if ".U32" in i.opcode else np.less(left.view(np.int64), right.view(np.int64))
    return Value(np.where(less == smaller.words.astype(bool), a.words, b.words), _mixed(a, b, smaller))


def _compare(i: Instruction, s: State, operands: list[str]) -> Value | None:
    """ISETP p, q, a, b, r: p = (a compared with b) and r, or another function of both that the modifiers name.

    .EX compares upper words; the last operand then is the result for the lower ones.
    """
    a, b, other = (s.read(o) for o in operands[2:5])
    parts = i.opcode.split(".")
    if a is None or b is None or other is None or parts[1] not in _COMPARE:
        return None
    left, right = (a.words, b.words) if "U32" in parts else (_signed(v.words).view(np.int64) for v in (a, b))
    held, trusts = _COMPARE[parts[1]](left, right), [a, b, other]
    if "EX" in parts:
        lower = s.read(operands[5])
        if lower is None:
            return None
        trusts.append(lower)
        equal, below = left == right, lower.words.astype(bool)
        held = held | below if parts[1] == "NE" else (held & ~equal) | (equal & below)
    last = other.words.astype(bool)
    result = held & last if "AND" in parts else held | last if "OR" in parts else held ^ last
    return Value(result.astype(np.uint64), _mixed(*trusts))


def _extend(i: Instruction, s: State, ops: list[str]) -> Value | None:
    """SGXT: keep n bits, and extend their sign unless .U32."""
    a, n = s.read(ops[1]), s.read(ops[2])
    if a is None or n is None:
        return None
    up = np.uint64(64) - n.words
    shifted = a.words << up
    words = shifted >> up if ".U32" in i.opcode else (shifted.view(np.int64) >> up.view(np.int64)).view(np.uint64)
    return Value(words & MASK, _mixed(a, n))


def _special(i: Instruction, s: State, ops: list[str]) -> Value | None:
    name = ops[1]
    if name in ("SR_TID.X", "SR_LANEID"):
        return Value(LANE)
    return constant(0, EXACT if name in ZERO else OFFSET)


def _copy(i: Instruction, s: State, ops: list[str]) -> Value | None:
    return s.read(ops[1])


def _first_lane(i: Instruction, s: State, ops: list[str]) -> Value | None:
    value = s.read(ops[1])
    return None if value is None else constant(int(value.words[0]), value.trust)


def _half_constant(i: Instruction, s: State, ops: list[str]) -> Value | None:
    """HFMA2 d, -RZ, RZ, high, low: ptxas writes some integers as a pair of halves."""
    if ops[1:3] != ["-RZ", "RZ"] or len(ops) != 5:
        return None
    try:
        high, low = (int(np.float16(float(o)).view(np.uint16)) for o in ops[3:])
    except ValueError:
        return None
    return constant(high << 16 | low)


_OPERATIONS: dict[str, Callable[[Instruction, State, list[str]], Value | None]] = {
    "IMAD": _multiply, "IADD3": _add, "VIADD": _add, "LEA": _lea, "SHF": _shift, "LOP3": _logic, "PRMT": _permute,
    "SEL": _select, "IMNMX": _extreme, "VIMNMX": _extreme, "SGXT": _extend, "HFMA2": _half_constant,
    "MOV": _copy, "LDC": _copy, "R2UR": _first_lane, "S2R": _special, "CS2R": _special,
}  # fmt: skip
_NAMES = {"S2UR": "S2R"}  # others of the uniform pipe have a U in front


def _registers(i: Instruction) -> int:
    """Return how many registers an instruction writes at most."""
    if opcodes.PIPE_OF.get(i.base) == "tensor":
        return 128 if i.base not in opcodes.MMA else 4
    wide = i.width // 4 if i.base in ("LDG", "LDS", "LD", "LDL", "LDC", "ULDC") else 1
    if i.base == "LDSM":
        wide = opcodes.vector_bytes(i) // 128
    return max(wide, 2 if ".WIDE" in i.opcode or ".64" in i.opcode or i.base in ("CS2R", "DADD", "DMUL", "DFMA") else 1)


def _loaded(s: State, i: Instruction) -> Value | None:
    """Return what a load gives if all lanes read the same word: an unknown value, but the same one in all lanes.

    A later load gives a larger one, as the end of a range follows its start.
    """
    found = addresses(s, i) if i.base in ("LDG", "LDS", "LD") else []
    if len(found) != 1 or found[0] is None or not (found[0].bytes == found[0].bytes[0]).all():
        return None
    s.loads += 1
    return constant(STAND_IN * (1 + s.loads), OFFSET if found[0].trust <= OFFSET else GUESS)


def _uniform(s: State, i: Instruction, operands: list[str]) -> Value | None:
    """Return the result of an instruction that is not followed if it must be the same in all lanes: an unknown value.

    Uniform registers are, and what is computed from values that are, as a quotient of block numbers. 0 stands in.
    """
    if not operands[0].startswith("UR"):
        if opcodes.PIPE_OF.get(i.base) not in ("fma", "fp16", "multiply", "alu", "xu") or not operands[1:]:
            return None
        registers = [o for o in operands[1:] if re.match(r"[-~!|]?U?[RP]\w", o)]
        values = [s.read(o.replace("|", "")) for o in registers]
        if not all(v is not None and v.uniform and v.trust <= OFFSET for v in values):
            return None
    return constant(0, OFFSET)


def execute(s: State, i: Instruction) -> None:
    """Apply an instruction to the state; what it writes becomes unknown if it is not followed."""
    base = _NAMES.get(i.base, i.base[1:] if i.base[0] == "U" else i.base)
    guard = s.read(i.predicate[1:]) if i.predicate else None
    if i.predicate in opcodes.NEVER or not i.operands or i.base.startswith(("ST", "BAR", "BRA", "LDGSTS", "RED")):
        return
    if base == "ISETP":
        s.write(i.operands[0], _compare(i, s, list(i.operands)), guard)
        s.write(i.operands[1], None)
        return
    written, operands = _sources(i)
    operation = _OPERATIONS.get(base)
    value = operation(i, s, operands) if operation else _loaded(s, i)
    value = value or _uniform(s, i, operands)
    if value is not None and i.predicate and guard is None:
        value = Value(value.words, GUESS)
    for predicate in written:
        s.write(predicate, None)
    register = operands[0].split(".")[0]
    s.write(register, value, guard)
    upper = register
    for _ in range(_registers(i) - 1 if value is None or ".WIDE" not in i.opcode else 0):
        upper = following(upper)
        same = base in ("MOV", "LDC", "CS2R", "LDG", "LDS", "LD")  # the words of a constant, of zero, of a uniform load
        s.write(upper, value if same else None, guard)

"""Machine code of kernels as nvdisasm prints it, for sm_75 and newer: instructions with their scheduling fields.

`nvdisasm -hex` prints the 128 bits of every instruction. The upper ones tell the scheduler what to do: cycles to wait
before the next instruction of the warp, the scoreboard that the instruction sets when its result is there (write) or
its operands are read (read), and the scoreboards that it waits for. The layout is the one that Jia et al. found on
Volta (arXiv 1804.06826, section 2.1); it has not changed up to Hopper.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastgpt.checks.cuda import find_nvdisasm, most_threads

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)", re.M)
_LABEL = re.compile(r"^(\.?[\w$.@]+):$")
_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s+/\* 0x([0-9a-f]{16}) \*/"
)
_SECOND = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"`\(([^)]+)\)")
_ARCH = re.compile(r"\.target\s+sm_(\d+)|EF_CUDA_SM(\d+)")
_REGISTERS = re.compile(r"EIATTR_REGCOUNT\n(?:.*\n){,7}?.*index@\(([^)]+)\)\n.*\.word\s+0x(\w+)")
NO_SCOREBOARD = 7
RESERVED_90 = 1024  # from sm_90 on, a block's shared memory in a cubin includes what the system reserves


@dataclass(frozen=True)
class Instruction:
    """One instruction. Addresses are bytes from the start of its kernel."""

    address: int
    opcode: str  # with its modifiers, as in LDG.E.128
    operands: tuple[str, ...]
    predicate: str  # as in @!P0; "" if it always executes
    target: int | None  # the address of a branch, or where BSSY's threads meet
    stall: int  # cycles before the warp's next instruction may issue
    write: int | None  # scoreboard that is released with the result
    read: int | None  # scoreboard that is released when the operands are read
    waits: tuple[int, ...]  # scoreboards that must be free before it issues

    @property
    def base(self) -> str:
        """The opcode without modifiers, as in LDG."""
        return self.opcode.split(".", 1)[0]

    @property
    def width(self) -> int:
        """Bytes that one lane loads or stores."""
        found = re.search(r"\.(128|64|U16|S16|16|U8|S8|8)(?:\.|$)", self.opcode)
        return {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}[found[1]] if found else 4


@dataclass(frozen=True, eq=False)  # by identity: it is the key of caches
class Code:
    """The machine code of one kernel."""

    name: str  # mangled
    arch: int  # compute capability, as in 80
    registers: int  # of a thread
    static_shared: int  # bytes of a block; those of the launch and of the system come on top
    threads: int  # most threads of a block; 0: no bound
    instructions: tuple[Instruction, ...]


def _operands(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in re.split(r",\s*(?![^\[]*\])", text)) if text else ()


def _instruction(line: re.Match[str], upper: int, labels: dict[str, int]) -> Instruction:
    control = upper >> 41  # bits 105 to 125 of the instruction
    write, read = control >> 5 & 7, control >> 8 & 7
    target = _TARGET.search(line[4])
    return Instruction(
        address=int(line[1], 16),
        opcode=line[3],
        operands=_operands(line[4]),
        predicate=line[2] or "",
        target=labels.get(target[1]) if target else None,
        stall=control & 15,
        write=None if write == NO_SCOREBOARD else write,
        read=None if read == NO_SCOREBOARD else read,
        waits=tuple(i for i in range(6) if control >> 11 + i & 1),
    )


def _instructions(section: str) -> tuple[Instruction, ...]:
    """Parse a .text section, subroutines behind the kernel included."""
    lines: list[tuple[re.Match[str], int]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    rows = section.splitlines()
    for number, row in enumerate(rows):
        label = _LABEL.match(row)
        if label:
            waiting.append(label[1])
            continue
        line = _LINE.match(row)
        if line is None:
            continue
        second = _SECOND.match(rows[number + 1])
        if second is None:
            raise ValueError(f"nvdisasm printed no second word of the instruction {row.strip()[:80]!r}")
        labels |= dict.fromkeys(waiting, int(line[1], 16))
        waiting = []
        lines.append((line, int(second[1], 16)))
    return tuple(_instruction(line, upper, labels) for line, upper in lines)


def parse(disassembly: str) -> dict[str, Code]:
    """Parse the output of `nvdisasm -hex` (without -c): mangled name -> code, for every kernel of a cubin.

    Raises ValueError if the text is not such an output.
    """
    target = _ARCH.search(disassembly)
    if target is None:
        raise ValueError("this is no output of nvdisasm: it names no target, as in .target sm_90")
    arch, threads = int(target[1] or target[2]), most_threads(disassembly)
    shared = re.findall(r"^\.nv\.shared\.(\S+):\n\s+\.zero\s+(\d+)", disassembly, re.M)
    static = {name: max(0, int(size) - (RESERVED_90 if arch >= 90 else 0)) for name, size in shared}
    registers = {name: int(count, 16) for name, count in _REGISTERS.findall(disassembly)}
    found = {}
    starts = [*_SECTION.finditer(disassembly)]
    for start, end in zip(starts, [*(s.start() for s in starts[1:]), len(disassembly)], strict=True):
        name = start[1]
        found[name] = Code(
            name=name,
            arch=arch,
            registers=registers.get(name, 0),
            static_shared=static.get(name, 0),
            threads=threads.get(name, 0),
            instructions=_instructions(disassembly[start.start() : end]),
        )
    return found


def of_cubin(cubin: bytes | Path) -> dict[str, Code]:
    """Disassemble a cubin: mangled name -> code of every kernel in it.

    Raises fastgpt.checks.cuda.ToolMissing without nvdisasm, subprocess.CalledProcessError if it refuses the file.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin if isinstance(cubin, bytes) else cubin.read_bytes())
        f.flush()
        done = subprocess.run([find_nvdisasm(), "-hex", f.name], check=True, capture_output=True, text=True)
    return parse(done.stdout)

"""Machine code from a few lines of text, for tests of fastgpt.bench.model.

loop:
LDG.E R2, [R4.64]             ; W2 R0 S1       sets scoreboards 2 and 0, one cycle to the next instruction
FFMA R7, R2, R2, R7           ; B2             waits for scoreboard 2
@!P0 BRA loop                                  a name without more is a label
"""

from __future__ import annotations

import re

from fastgpt.bench.model.machine_code import Code, Instruction


def assemble(text: str, arch: int = 90, registers: int = 32, static_shared: int = 0) -> Code:
    """Return the code of a kernel; instructions are 16 bytes apart and wait one cycle unless the line says more."""
    labels: dict[str, int] = {}
    lines = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        if line.endswith(":"):
            labels[line[:-1]] = 16 * len(lines)
        else:
            lines.append(line)
    instructions = []
    for number, line in enumerate(lines):
        body, _, control = line.partition(";")
        found = re.match(r"(?:(@\S+)\s+)?(\S+)\s*(.*)", body.strip())
        assert found is not None, line
        target = next((at for name, at in labels.items() if found[3].endswith(f"`({name})")), None)
        words = {kind: [int(n) for k, n in re.findall(r"([WRBS])(\d+)", control) if k == kind] for kind in "WRBS"}
        instructions.append(
            Instruction(
                address=16 * number,
                opcode=found[2],
                operands=tuple(part.strip() for part in found[3].split(",")) if found[3] else (),
                predicate=found[1] or "",
                target=target,
                stall=(words["S"] or [1])[0],
                write=(words["W"] or [None])[0],
                read=(words["R"] or [None])[0],
                waits=tuple(words["B"]),
            )
        )
    return Code("kernel", arch, registers, static_shared, 0, tuple(instructions))

#!/usr/bin/env bash
# What: For sm_80 and sm_86, ptxas leaves a loop whose body is longer than about 256 instructions by a call: where a
#       short loop ends in one conditional branch back, a long one ends in `@P0 CALL.REL.NOINC` to the code behind the
#       loop and an unconditional branch back. Nothing ever returns from that call. A reader of machine code that takes
#       CALL for a subroutine sees a loop without an exit, and none of the code behind it. sm_75 and sm_90 keep the
#       branch.
# Versions: ptxas 12.8 and nvdisasm, which triton 3.7.1 ships; ptxas 13.0 does the same.
# Source: ptxas is closed; met in the disassembly of kernels for attention and normalisation.
# Date: 2026-11-30. Exit code: 0 while ptxas behaves like this, 1 once it does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps triton==3.7.1
cat > loops.py <<'PY'
import re
import subprocess
import sysconfig
from pathlib import Path

tools = Path(sysconfig.get_path("purelib")) / "triton" / "backends" / "nvidia" / "bin"


def loop(length: int) -> str:
    """Return PTX of a kernel with one loop around `length` dependent multiply-adds."""
    body = "\n".join(["fma.rn.f32 %f1, %f1, %f2, %f1;"] * length)
    return f"""
.version 7.8
.target sm_75
.address_size 64
.visible .entry kernel(.param .u64 p, .param .u32 n) {{
  .reg .b64 %rd<3>; .reg .f32 %f<3>; .reg .b32 %r<3>; .reg .pred %q;
  ld.param.u64 %rd1, [p];
  ld.param.u32 %r1, [n];
  cvta.to.global.u64 %rd1, %rd1;
  ld.global.f32 %f1, [%rd1];
  ld.global.f32 %f2, [%rd1+4];
again:
  {body}
  add.s32 %r1, %r1, -1;
  setp.gt.s32 %q, %r1, 0;
  @%q bra again;
  st.global.f32 [%rd1], %f1;
  ret;
}}
"""


def control(arch: str, length: int) -> list[str]:
    """Return the loop's branches, calls and returns in machine code."""
    Path("loop.ptx").write_text(loop(length))
    subprocess.run([tools / "ptxas", f"-arch={arch}", "loop.ptx", "-o", "loop.cubin"], check=True)
    text = subprocess.run([tools / "nvdisasm", "-c", "loop.cubin"], check=True, capture_output=True, text=True).stdout
    code = re.findall(r"\*/\s+((?:@!?P\d )?\s*(?:BRA|CALL|RET)\b.*?) ;", text)
    return [re.sub(r"\s+", " ", line) for line in code]


print(subprocess.run([tools / "ptxas", "--version"], capture_output=True, text=True).stdout.splitlines()[-2])
found = {}
for arch in ("sm_75", "sm_80", "sm_86", "sm_90"):
    for length in (200, 300):
        found[arch, length] = control(arch, length)
        print(f"{arch}, {length} instructions in the loop: {found[arch, length]}")
called = {key for key, lines in found.items() if any("CALL.REL.NOINC `(.L" in line for line in lines)}
same = called == {("sm_80", 300), ("sm_86", 300)} and not any("RET" in line for lines in found.values() for line in lines)
print("a loop of 300 instructions is left by a call that never returns" if same else "CHANGED")
raise SystemExit(not same)
PY
venv/bin/python loops.py

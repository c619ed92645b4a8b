"""Build programs that run the kernels of one op under the race detector of the emulation (races/detector.cpp).

The program of an op consists of races/<op>.cpp, which calls its launchers on small tensors, of the op's kernels and of
the detector; it needs neither Python nor torch. As a command, which takes up to a minute:

    python tests/cuda_on_cpu/races.py OP    runs the kernels of the op; exit code 1 after a race

Kernels are compiled for one element type at a time (races/include, NARROW): bf16, or one of ELEMENTS.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import emulator
from emulator import CACHE, HERE, Mutation

RACES = HERE / "races"
DETECTOR = RACES / "detector.cpp"
WITH = "-DFASTGPT_RACES"
# Accesses are reported, but not to the compiler's run-time library. -w: narrowed sources do not use everything.
REPORTING = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-w")

# Other types of elements by op; most kernels have both
BOTH = ("f16", "float")
ELEMENTS = {"adamw": ("f16",), "attention": ("f16",)}

# Replacements that leave out instances of kernels
NARROW: dict[str, list[Mutation]] = {
    "attention": [
        (
            "attention/cuda.cuh",
            "a.dtype == DType::bf16 ? with_tile(bf16{}) : with_tile(f16{});",
            "with_tile(FASTGPT_ELEMENT{});",
        ),
    ],
    "attention_decode": [
        (
            "attention_decode/cuda.cu",
            "    if (rows == 1) f(type, lanes, Number<1>{});\n    else if (rows <= 4) f(type, lanes, Number<4>{});\n"
            "    else f(type, lanes, Number<8>{});\n",
            "    f(type, lanes, Number<4>{});\n",
        ),
        (
            "attention_decode/cuda.cu",
            "    if (a.head_dim <= 64) with_rows(type, Number<8>{});\n"
            "    else if (a.head_dim <= 128) with_rows(type, Number<16>{});\n"
            "    else with_rows(type, Number<32>{});\n",
            "    with_rows(type, Number<8>{});\n",
        ),
    ],
    "adamw": [
        (
            "adamw/cuda.cu",
            "  bool master = false;",
            "  with_grads<FASTGPT_ELEMENT, Master::f32>(a, table, stream);\n#if 0\n",
        ),
        ("adamw/cuda.cu", "takes no such masters\");\n}", "takes no such masters\");\n#endif\n}"),
    ],
}  # fmt: skip
ONLY_64: Mutation = (
    "attention/cuda.cuh",
    "    if (a.head_dim <= 64) with_dim(type, Dim<64>{});\n"
    "    else if (a.head_dim <= 96 && !full) f(type, Dim<96>{}, std::false_type{});\n"
    "    else if (a.head_dim <= 128) with_dim(type, Dim<128>{});\n"
    "    else with_dim(type, Dim<256>{});\n",
    "    with_dim(type, Dim<64>{});\n",
)
SM90: list[Mutation] = [
    ("attention/sm90.cuh", "a.dtype == DType::bf16 ? with_type(bf16{}) : with_type(f16{});", "with_type(bf16{});"),
    ("attention/sm90.cuh", "a.head_dim == 64 ? f(type, Dim<64>{}) : f(type, Dim<128>{});", "f(type, Dim<64>{});"),
]
NO_OPTIONS: Mutation = (
    "attention/cuda.cuh",
    "full ? f(type, dim, std::true_type{}) : f(type, dim, std::false_type{});",
    "f(type, dim, std::false_type{});",
)


@contextmanager
def sources(mutations: Iterable[Mutation]) -> Iterator[Path]:
    """A copy of csrc with these replacements."""
    with tempfile.TemporaryDirectory(prefix="races-") as folder:
        root = Path(folder) / "csrc"
        emulator.copy_kernels(root)
        for mutation in mutations:
            emulator.replace(root, mutation)
        yield root


def of_type(element: str) -> str:
    """The flag that chooses the type of elements."""
    return f"-DFASTGPT_ELEMENT={element}"


def build(
    op: str, planted: Mutation | None = None, all_dims: bool = False, options: bool = True, element: str = "bf16"
) -> Path:
    """Build the program of an op; `planted` breaks a kernel first.

    all_dims: attention for every head dimension instead of 64 only. options: also with the kernels of a planted race
    that serve a window, documents and so on. element: type of the tensors, "bf16", "f16" or "float".
    """
    CACHE.mkdir(exist_ok=True)
    narrow = NARROW.get(op, []) + ([ONLY_64] if op == "attention" and not all_dims else [])
    dims = "64, 96, 128, 256" if all_dims else "64"
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool, sources(narrow) as whole:
        kernel = ["-O0", WITH, of_type(element), *REPORTING], (RACES / "include",)
        parts = [(p, *kernel) for p in sorted(whole.glob(f"{op}/cuda*.cu"))]
        parts.append((DETECTOR, ["-O2", WITH], ()))
        parts.append((RACES / f"{op}.cpp", ["-O0", "-w", of_type(element), f"-DFASTGPT_HEAD_DIMS={dims}"], ()))
        if planted is None:
            return linked(list(pool.map(lambda p: emulator.compiled(*p), parts)), op)
        extra = [] if options or op != "attention" else [NO_OPTIONS]
        with sources([*narrow, *extra, planted]) as broken:
            changed = broken / planted[0]
            if changed.suffix == ".cu":  # the other files of the op stay as they are
                parts = [p for p in parts if p[0].name != changed.name]
                parts.append((changed, *kernel))
            else:
                parts = [(broken / p.relative_to(whole) if p.suffix == ".cu" else p, f, h) for p, f, h in parts]
            return linked(list(pool.map(lambda p: emulator.compiled(*p), parts)), op)


def build_sm90(planted: Mutation | None = None) -> Path:
    """Build the program of the kernels of attention for sm_90a, for heads of 64; `planted` breaks one of them first.

    cuda_bwd.cu has the kernel that computes delta, and its other kernel calls cuda_dkdv.cu.
    """
    CACHE.mkdir(exist_ok=True)
    narrow = [*NARROW["attention"], ONLY_64, NO_OPTIONS, *SM90]
    with sources([*narrow, *([planted] if planted else [])]) as root:
        files = [*sorted((root / "attention").glob("sm90*.cu")), root / "attention" / "cuda_bwd.cu"]
        kernels = [
            emulator.compiled(file, ["-O1", WITH, of_type("bf16"), *REPORTING], (RACES / "include",))
            for file in (*files, root / "attention" / "cuda_dkdv.cu")
        ]
        detector = emulator.compiled(DETECTOR, ["-O2", WITH], ())
        program = emulator.compiled(RACES / "attention_sm90.cpp", ["-O0", "-w", of_type("bf16")], ())
        return linked([*kernels, detector, program], "sm90")


def linked(objects: list[Path], op: str) -> Path:
    key = hashlib.sha256("".join(p.name for p in objects).encode()).hexdigest()[:24]
    target = CACHE / f"races-{op}-{key}"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        emulator.run_compiler(["g++", *map(str, objects), "-ldl", "-lpthread", "-o", str(partial)])
        partial.rename(target)
    return target


def run(program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=600)


if __name__ == "__main__":
    done = run(build(sys.argv[1], all_dims=True))
    print(done.stdout, done.stderr, sep="", end="")
    sys.exit(done.returncode)

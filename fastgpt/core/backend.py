"""Backend dispatch: which backend serves each op, and why.

A backend is one implementation of an op: `cuda` (csrc), `triton` (kernels), `cpu` (csrc) or `torch` (the
reference). Every op file registers the cells it has (op x backend x dtype); `select` picks one per call, `use` lets the
user choose, `explain` says what was picked and why. No op chooses a kernel by device anywhere else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastgpt.core import cache, native
from fastgpt.core.cells import KERNEL_DTYPES as KERNEL_DTYPES
from fastgpt.core.cells import Cell as Cell
from fastgpt.core.cells import not_built, variants_of, wrong_chip
from fastgpt.core.device import library_attention
from fastgpt.core.errors import UserError
from fastgpt.core.fallback import report_once, strict_mode

BACKENDS = ("cuda", "triton", "cpu", "torch")
DEVICE_OF = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}
# Where nothing was measured on this device ("prior"): the order in which backends are tried. `fastgpt tune` measures;
# the backend that its table names is then tried first.
PRIOR = ("cuda", "cpu", "triton", "torch")
PRIOR_OF = {
    "attention": ("triton", "cuda", "cpu", "torch")
}  # exceptions, by op; the CUDA attention kernel was never timed
# From this compute capability on, PyTorch's fused attention is tried first for 16 bits: on an H200, cuDNN 9.19 reaches
# 310 TFLOP/s forward and 264 backward at a head dimension of 64 (docs/step-budget.md), and no kernel here was measured.
LIBRARY_FIRST = (9, 0)


# A self-check runs an op on one backend and a CUDA device and returns its relative error against the fp64 reference.
SelfCheck = Callable[[str, torch.device], float]
SELF_CHECK_BOUND = 1e-4  # fp32 kernels are around 1e-6; a wrong index or a miscompiled kernel is far over it

_EMULATED_CUDA = os.environ.get("FASTGPT_EMULATED_CUDA", "")
if _EMULATED_CUDA:
    torch.ops.load_library(_EMULATED_CUDA)

_table: dict[str, dict[str, Cell]] = {}
_self_checks: dict[str, SelfCheck] = {}
_verdicts: dict[str, str | None] = {}  # "<op>.<backend>" -> why it failed, None if it passed
_tuned: dict[str, dict[str, dict[str, Any]]] = {}  # device type -> "<op>.<dtype>" -> what was measured, once read
_choice: dict[str, str] = {}
_wrong: list[UserError] = []  # what is wrong with FASTGPT_KERNELS, or with the compiled kernels
raw_ops: dict[str, str] = {}  # raw op that csrc implements -> its op
_simulated: set[str] = set()  # backends named by `simulate`


def interpreting() -> bool:
    """Return whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def simulated(backend: str) -> bool:
    """Return whether kernels of this backend accept tensors of any device in this process. Tests run Triton kernels in
    the interpreter and CUDA kernels in the emulation whose library FASTGPT_EMULATED_CUDA names (tests/cuda_on_cpu);
    `simulate` is for recorders that launch nothing."""
    if backend in _simulated:
        return True
    return (backend == "triton" and interpreting()) or (backend == "cuda" and bool(_EMULATED_CUDA))


@contextlib.contextmanager
def simulate(*backends: str) -> Iterator[None]:
    """Let these backends serve tensors of any device, as if they ran there."""
    _simulated.update(backends)
    try:
        yield
    finally:
        _simulated.difference_update(backends)
        _cache.clear()


def checks_values(t: Tensor) -> bool:
    """Return whether the values of index tensors (targets, ids, positions) are checked.

    They are always checked on a CPU. On a GPU they are checked only under FASTGPT_CHECK=1, because reading them stalls
    the host. They are never checked while compiling or in torch.func, where tensors have no values.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return t.device.type == "cpu" or os.environ.get("FASTGPT_CHECK") == "1"


def register(op: str, check: SelfCheck | None = None, **cells: Cell) -> None:
    """Add an op and its backends to the table; `torch`, the reference, is always included."""
    _table[op] = {**cells, "torch": Cell((*KERNEL_DTYPES, torch.float64))}
    if check is not None:
        _self_checks[op] = check


def ops() -> dict[str, dict[str, Cell]]:
    """Return the table: op -> backend -> cell."""
    return _table


def missing(backend: str) -> str | None:
    """Return why a backend cannot run on this machine and how to fix it; None if it can run."""
    if backend == "torch" or simulated(backend):
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed (pip install 'triton>=3.6')"
        return None
    return None if native.BUILT[backend] else native.reason(backend)


def prefers_library(op: str, device: str, dtype: torch.dtype) -> bool:
    """Return whether PyTorch's op is tried before the kernels where nothing was measured."""
    if op != "attention" or device != "cuda" or dtype.itemsize != 2:
        return False
    return torch.cuda.get_device_capability() >= LIBRARY_FIRST


def prior(op: str, device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the order in which backends are tried where nothing was measured."""
    order = PRIOR_OF.get(op, PRIOR)
    return ("torch", *order[:-1]) if prefers_library(op, device, dtype) else order


def refusal(op: str, backend: str, device: str, dtype: torch.dtype, dim: int = 0) -> str | None:
    """Return why `backend` cannot serve `op` for this device, dtype and head dimension (0: any); None if it can."""
    kind = backend.partition(":")[0]  # of a variant, as in cuda:sm_90a
    cell = _table[op].get(backend) or variants_of(op).get(backend)
    if cell is None:
        return f"{op} has no {backend} kernel"
    if reason := missing(kind):
        return reason
    if kind != "torch" and DEVICE_OF[kind] != device and not simulated(kind):
        return f"{kind} kernels do not run on {device} tensors"
    if not cell.takes(dtype, dim):
        what = dtype if dtype not in cell.dtypes else f"head dimensions over {cell.max_dim}"
        return f"{op} on {backend} does not support {what}"
    if kind != backend:
        key = "CPU" if simulated(kind) else kind.upper()
        if reason := wrong_chip(backend, simulated(kind)) or not_built(op, backend, key):
            return reason
    return _verdict(op, backend) if device == "cuda" and backend != "torch" else None


@contextlib.contextmanager
def _default_settings(device: torch.device) -> Iterator[None]:
    """Run with PyTorch's default settings, whatever the caller's are, and restore those.

    Gradients are on; inference mode, autocast and dispatch modes (fake tensors, FLOP counters) are off; the default
    dtype is fp32 and the seed 0. The random state of the caller does not change.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            _disable_current_modes(),
            torch.random.fork_rng([device]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cuda", enabled=False),
        ):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(dtype)


def _verdict(op: str, backend: str) -> str | None:
    """Return why the self-check of a kernel failed on this device; None if it passed.

    The check runs at the first use on a device, driver and version (milliseconds), never while compiling or
    capturing. The verdict is stored in the user's cache folder.

    Raises:
        UserError: the kernel faulted, and CUDA is unusable in this process afterwards.
    """
    name = f"{op}.{backend}"
    if not _verdicts:
        _verdicts.update(dict.fromkeys(cache.read_passed()))
    if name in _verdicts or op not in _self_checks:
        return _verdicts.get(name)
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return None
    _verdicts[name] = None  # the check itself calls the op
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        with _default_settings(device):
            error = _self_checks[op](backend, device)
        why = None if error <= SELF_CHECK_BOUND else f"it is wrong on this device (relative error {error:.1e})"
    except Exception as e:  # whatever a broken kernel or driver raises, the op must still run elsewhere
        why = f"it fails on this device ({type(e).__name__}: {(str(e).splitlines() or [''])[0]})"
        try:
            torch.cuda.synchronize(device)
        except Exception:
            raise UserError(
                f"{op}: the self-check of the {backend} kernel made CUDA unusable in this process: {why}; run again "
                f"with FASTGPT_KERNELS={op}=torch"
            ) from e
    _verdicts[name] = why
    cache.write_passed([name for name, failed in _verdicts.items() if failed is None])
    return why


def tuned(op: str, device: str, dtype: torch.dtype) -> dict[str, Any] | None:
    """Return what `fastgpt tune` measured for `op` on this machine in its present state: {"backend", "date", "note",
    ...}, or None.

    The table is read once per process. FASTGPT_TUNED=0 ignores it.
    """
    table = _tuned.get(device)
    if table is None:
        wanted = device in DEVICE_OF.values() and os.environ.get("FASTGPT_TUNED") != "0"
        table = _tuned[device] = cache.read_tuned(device, BACKENDS) if wanted else {}
    return table.get(f"{op}.{str(dtype).split('.')[1]}")


def write_tuned(device: str, entries: dict[str, dict[str, Any]]) -> Path:
    """Add measured entries ("<op>.<dtype>" -> {"backend", "date", "note", ...}) to this machine's table, and select by
    it from here on (compiled code keeps what it was compiled with).

    Raises:
        OSError: the user's cache folder cannot be written to.
    """
    path = cache.write_tuned(device, {**cache.read_tuned(device, BACKENDS), **entries})
    _tuned.clear()
    _cache.clear()
    return path


def _select(
    op: str, want: str, device: str, dtype: torch.dtype, strict: bool, measured: bool = True, dim: int = 0
) -> str:
    check_environment()
    if want != "auto":
        why = refusal(op, want, device, dtype, dim)
        if why is None:
            return want
        if strict:
            raise RuntimeError(f"{op}: {want} was requested, but {why}")
        report_once(op, f"{want} was requested, but {why}; choosing automatically")
    entry = tuned(op, device, dtype) if measured else None
    first = () if entry is None else (entry["backend"],)
    order = prior(op, device, dtype) if measured else PRIOR_OF.get(op, PRIOR)
    for backend in (*first, *(b for b in order if b not in first)):
        if backend not in _table[op] or DEVICE_OF.get(backend, device) != device:
            continue
        why = refusal(op, backend, device, dtype, dim)
        if why is None:
            return backend
        if _table[op][backend].takes(dtype, dim):  # the cell exists, the machine lacks it: a fallback, so say so
            if strict:
                raise RuntimeError(f"{op}: the {backend} kernel cannot be used: {why}")
            report_once(op, f"the {backend} kernel cannot be used: {why}")
    return "torch"


# torch.compiler.assume_constant_result without its import of all of Dynamo (0.8 s): compiled code takes the answer as a
# constant, guarded by the choices that `select` reads.
_select._dynamo_marked_constant = True  # type: ignore[attr-defined]

_cache: dict[tuple[str, str, str, torch.dtype, bool, bool, int], str] = {}


def select(op: str, x: Tensor, measured: bool = True, dim: int = 0) -> str:
    """Return the name of the backend that serves `op` for tensors like `x`, with heads of dimension dim if the op has
    heads.

    measured=False is for calls that differ from those measured, or from those for which the library is preferred: the
    kernels' prior order applies.
    """
    want, strict = chosen(op), strict_mode[0]
    if torch.compiler.is_compiling():
        return _select(op, want, x.device.type, x.dtype, strict, measured, dim)
    key = (op, want, x.device.type, x.dtype, strict, measured, dim)
    found = _cache.get(key)
    if found is None:
        found = _cache[key] = _select(*key)
    if found != "torch" and torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{op}: kernels do not support torch.func and vmap; use(all='torch') runs the op in PyTorch")
    return found


def chosen(op: str) -> str:
    """Return the backend that `use` has chosen for `op`, or "auto"."""
    return _choice.get(op, "auto")


def explain(op: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """Return what `op` resolves to on this device and dtype, and why ('chosen', 'measured', 'prior', or what is
    missing)."""
    want = chosen(op)
    picked = _select(op, want, device, dtype, False)
    if want == picked:
        return picked, "chosen"
    if (tuned(op, device, dtype) or {}).get("backend") == picked:
        return picked, "measured"
    if picked != "torch":  # nobody else is asked: a self-check would compile kernels that are not used
        return picked, "prior"
    if prefers_library(op, device, dtype):
        name = "sm_{}{}".format(*torch.cuda.get_device_capability())
        until = "until `fastgpt tune` measures a kernel here as faster"
        return picked, f"prior: the library's {op} on {name} ({library_attention()}), {until}"
    refused = [
        f"{b}: {why}"
        for b in PRIOR_OF.get(op, PRIOR)
        if DEVICE_OF.get(b, device) == device and b != picked and (why := refusal(op, b, device, dtype))
    ]
    return picked, "; ".join(refused) or "prior"


class use:
    """Choose backends, as a plain call or as a context manager that restores the choice at its end.

    `use(layer_norm="triton", adamw="torch")`; `use(all="torch")` for every op that has such a kernel;
    `use(strict=True)` turns every fallback into an error. Names of backends: "cuda", "triton", "cpu", "torch", "auto",
    and variants of them for one kind of chip: `use(attention="cuda:sm_90a")`.

    Raises:
        UserError: an op or backend that does not exist.
        RuntimeError: called inside a compiled region (call it outside: the compiled model then recompiles once).
    """

    def __init__(self, *, strict: bool | None = None, **choices: str) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("fastgpt.ops.use was called inside torch.compile: call it outside the compiled function")
        everything = choices.pop("all", None)
        wanted = dict(choices)
        if everything is not None:
            # an op without such a kernel on any device keeps its choice: linear has one for CPUs only
            served = (op for op, cells in _table.items() if everything in cells or everything not in BACKENDS)
            wanted = dict.fromkeys(served, everything) | wanted
        for op, backend in wanted.items():
            if op not in _table:
                raise UserError(f"kernels: there is no op {op!r}; expected one of {', '.join(sorted(_table))}, all")
            known = (*BACKENDS, *variants_of(op), "auto")
            if backend not in known:
                raise UserError(f"kernels: {op}={backend!r}: expected one of {', '.join(known)}")
        self._before = (dict(_choice), strict_mode[0])
        _choice.update(wanted)
        if strict is not None:
            strict_mode[0] = strict

    def __enter__(self) -> use:
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        _choice.clear()
        _choice.update(self._before[0])
        strict_mode[0] = self._before[1]


def parse_choices(text: str) -> dict[str, Any]:
    """Parse 'attention=torch,adamw=triton' or 'torch' into keyword arguments for `use`."""
    choices: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, _, backend = part.rpartition("=")
        choices[op.strip() or "all"] = backend.strip()
    return choices


def apply_environment() -> None:
    """Apply FASTGPT_KERNELS (as in `--kernels`) and FASTGPT_STRICT=1; called once, when the ops are registered.

    A wrong FASTGPT_KERNELS does not fail the import, where no command could catch it: `check_environment` raises.
    """
    try:
        use(strict=os.environ.get("FASTGPT_STRICT") == "1", **parse_choices(os.environ.get("FASTGPT_KERNELS", "")))
    except UserError as e:
        _wrong.append(UserError(f"FASTGPT_KERNELS: {str(e).removeprefix('kernels: ')}"))
    for name, op in raw_ops.items():
        for backend in native.NATIVE:
            kernel, key = f"fastgpt::{name}.{backend}", backend.upper()
            if not native.BUILT[backend] or backend not in _table.get(op, {}):
                continue
            if not torch._C._dispatch_has_kernel_for_dispatch_key(kernel, key):
                why = f"fastgpt._C has no {kernel}: it was built from an older csrc/; {native.REBUILD}"
                _wrong.append(UserError(why))


def check_environment() -> None:
    """Raise a UserError if FASTGPT_KERNELS is invalid or the compiled kernels are too old; called by every command and
    by an op's first call."""
    if _wrong:
        raise _wrong[0]

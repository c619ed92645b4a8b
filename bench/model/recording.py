"""What a training step launches on a GPU, without one: the step runs on tensors of the meta device, which have shapes
and no memory, and every operator is recorded with the launches that it makes.

Kernels of fastgpt: Triton launchers run as they are, with the launch itself recorded (triton_launches.py); CUDA
launchers run on the host in place of the device (cuda_launches.py). Neither grids nor variants are written down a
second time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastgpt.bench.model.cuda_launches import CPU_KERNELS, CudaLaunch, Planner
from fastgpt.bench.model.triton_launches import TritonLaunch, accessed, recorded
from fastgpt.core import backend

AnyLaunch = CudaLaunch | TritonLaunch
META = torch.device("meta")
# PyTorch's operators that launch nothing besides views: they allocate, or only change what a tensor says of itself
QUIET = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "alias"}
QUIET |= {"lift_fresh", "set_", "resize_", "is_same_size", "record_stream"}
WIDE = ("mm.dtype", "mm.dtype_out", "addmm.dtype", "addmm.dtype_out")  # products into fp32 exist on CUDA only


@dataclass(frozen=True)
class Part:
    """A tensor of a call: its shape, and the bytes of its elements."""

    shape: tuple[int, ...]
    itemsize: int
    elements: int

    @classmethod
    def of(cls, t: Tensor) -> Part:
        """Describe a tensor; elements that share memory, as in an expanded tensor, count once."""
        dims = [(n, s) for n, s in zip(t.shape, t.stride()) if s != 0 or n == 0]
        elements = 1
        for n, _ in dims:
            elements *= n
        return cls(tuple(t.shape), t.element_size(), elements)

    @property
    def bytes(self) -> int:
        """Bytes of all elements."""
        return self.elements * self.itemsize


@dataclass
class Call:
    """One operator of a step, on the device.

    read, written: its tensors by argument (results: "out0", "out1", ...); a tensor that it changes is in both, one that
    it only fills is in `written`. flop: of PyTorch's matrix products. launches: of fastgpt's kernels; an operator
    of PyTorch has none here. also: names of PyTorch's operators that a raw op calls.
    """

    name: str
    read: dict[str, Part]
    written: dict[str, Part]
    flop: float = 0.0
    own: bool = False
    launches: list[AnyLaunch] = field(default_factory=list)
    also: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)  # arguments that are numbers or flags

    @property
    def bytes_read(self) -> int:
        """Bytes that must be read."""
        return sum(part.bytes for part in self.read.values())

    @property
    def bytes_written(self) -> int:
        """Bytes that must be written."""
        return sum(part.bytes for part in self.written.values())


def describe(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Call:
    """Return the call of an operator, by its schema."""
    schema, read, written, options = func._schema, {}, {}, {}
    given = {a.name: v for a, v in zip(schema.arguments, args)} | kwargs
    for argument in schema.arguments:
        value = given.get(argument.name)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        for number, t in enumerate(tree_leaves(value)):
            if not isinstance(t, Tensor):
                continue
            name = f"{argument.name}{number}" if isinstance(value, (list, tuple)) else argument.name
            if not (changed and (argument.is_out or func.overloadpacket.__name__ in FILLS)):
                read[name] = Part.of(t)
            if changed:
                written[name] = Part.of(t)
        if isinstance(value, bool | int | float):
            options[argument.name] = value
    fresh = [t for t in tree_leaves(out) if isinstance(t, Tensor)] if not written else []
    written |= {f"out{i}": Part.of(t) for i, t in enumerate(fresh)}
    count = flop_registry.get(func.overloadpacket)
    flop = 0.0
    if count is not None and func.namespace == "aten" and "attention" not in func.overloadpacket.__name__:
        flop = float(count(*(a for a in args if isinstance(a, Tensor)), out_val=out))
    return Call(func.overloadpacket.__name__, read, written, flop, options=options)


FILLS = {"zero_", "fill_", "copy_", "normal_", "uniform_"}  # they write without reading


class Recorder(TorchDispatchMode):
    """Keeps the calls of operators on the meta device. Without a planner, CUDA kernels have no launches. Where a number
    is read from the device, which has none, `number` is returned; None: reading one is an error, as in a CUDA graph."""

    def __init__(self, planner: Planner | None, number: int | None = None) -> None:
        super().__init__()
        self.planner, self.number = planner, number
        self.calls: list[Call] = []
        self.open: list[AnyLaunch] | None = None  # where launches of Triton kernels go

    def launched(self, launch: TritonLaunch) -> None:
        """Keep a launch of a Triton kernel: of the op that is running, or as a call of its own."""
        if self.open is None:
            loaded, stored = accessed(launch.kernel)
            parts = {name: Part.of(t) for name, t in launch.tensors.items()}
            read = {name: part for name, part in parts.items() if name in loaded or name not in stored}
            written = {name: part for name, part in parts.items() if name in stored}
            self.calls.append(Call(launch.name, read, written, own=True, launches=[launch]))
        else:
            self.open.append(launch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastgpt":
            return self._own(func, args, kwargs)
        if func.overloadpacket is torch.ops.aten._local_scalar_dense and self.number is not None:
            return self.number
        out = _wide_product(func, args, kwargs) if func._name.split("::")[1] in WIDE else func(*args, **kwargs)
        packet = func.overloadpacket.__name__
        if not func.is_view and packet not in QUIET and any(isinstance(t, Tensor) for t in tree_leaves((args, out))):
            self.calls.append(describe(func, args, kwargs, out))
        return out

    def _own(self, func: Any, args: Any, kwargs: Any) -> Any:
        assert not kwargs, "raw ops take positional arguments"
        out = func(*args)  # its fake
        packet, which = func.overloadpacket.__name__, func._overloadname
        if packet not in backend.raw_ops:  # a driver: Python that calls raw ops and PyTorch's
            with self:
                func.redispatch(CPU_KERNELS, *args)
            return out
        call = describe(func, args, {}, out)
        call.own = True
        if which == "triton":
            self.open = call.launches
            with self:  # for what the launcher calls besides
                func.redispatch(CPU_KERNELS, *args)
            self.open = None
        elif which == "cuda" and self.planner is not None:
            planned, called = self.planner.launches(func, args)
            call.launches += planned
            call.also += [name for name in called if name not in QUIET]
        self.calls.append(call)
        return out


def _wide_product(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Return what a product of 16-bit matrices into fp32 returns."""
    if "out" in kwargs:
        return kwargs["out"]  # type: ignore[no-any-return]
    a, b = args[-3:-1]
    return a.new_empty((a.shape[0], b.shape[1]), dtype=args[-1])


class _FusedAttention(TorchFunctionMode):
    """Calls the flash attention of PyTorch where scaled_dot_product_attention would choose by device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(*args, kwargs.get("dropout_p", 0.0), kwargs["is_causal"], scale=kwargs.get("scale"))[0]


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Give attributes other values for a while."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@dataclass(frozen=True)
class Device:
    """What the code asks a device for: torch.cuda.get_device_properties returns one."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int
    shared_memory_per_block_optin: int
    L2_cache_size: int = 50 << 20
    max_threads_per_multi_processor: int = 2048
    warp_size: int = 32


@contextlib.contextmanager
def as_if_on(device: Device, recorder: Recorder) -> Iterator[None]:
    """Let code see the meta device as this GPU, and record Triton's launches."""
    from fastgpt.kernels import _attention_tiles, _runtime, _tables
    from fastgpt.ops import _linear_cross_entropy as loss

    def upload(self: Any, host: Tensor, note: Any, moves: bool) -> Any:
        return (host.to("meta"), note), None, None

    capability = (device.major, device.minor)
    cuda: dict[str, Any] = dict(
        get_device_properties=lambda device_=None: device,
        get_device_capability=lambda device_=None: capability,
        current_device=lambda: None,
    )
    for cached in (_runtime.processors, _attention_tiles.shared_memory):
        cached.cache_clear()
    with contextlib.ExitStack() as stack:
        for context in (
            replaced(torch.cuda, **cuda),
            replaced(
                torch,
                autocast=lambda *args, **kwargs: contextlib.nullcontext(),  # PyTorch has none on the meta device
                is_autocast_enabled=lambda *args: False,
            ),
            replaced(loss, multiplies_into_fp32=lambda t: t.dtype != torch.float32),
            replaced(loss, _budgets={META: loss.share_for_logits(device.total_memory)}),
            replaced(_tables.Tables, _upload=upload),
            backend.simulate("cuda", "triton"),
            recorded(recorder.launched),
            _FusedAttention(),
        ):
            stack.enter_context(context)
        yield
    for cached in (_runtime.processors, _attention_tiles.shared_memory):
        cached.cache_clear()

"""Launches of Triton kernels on tensors without memory: recorded in place of the launch, then compiled for a chip."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastgpt import kernels
from fastgpt.kernels._runtime import TYPE_NAMES

NAMES = {**TYPE_NAMES, torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1", torch.float64: "fp64"}
ACCESSES = {"load": (True, False), "store": (False, True), "atomic_add": (True, True)}  # of tl: reads, writes
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion")  # of a launch, not arguments


@dataclass(frozen=True)
class TritonLaunch:
    """One launch. `arguments`: by name, constexprs included, defaults filled in; `options`: as passed to the launch."""

    kernel: Any = field(repr=False)  # a JITFunction
    grid: tuple[int, int, int]
    arguments: dict[str, Any] = field(repr=False)
    options: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def blocks(self) -> int:
        """Programs of the launch."""
        return math.prod(self.grid)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the arguments."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    @property
    def numbers(self) -> dict[str, Any]:
        """The arguments that are numbers or flags, constexprs included."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, int | float)}

    @property
    def instance(self) -> tuple[Any, ...]:
        """What the compiled code depends on."""
        signature, constexprs, divisible = specialise(self)
        options = sorted((n, str(v)) for n, v in self.options.items())
        return self.name, tuple(signature.items()), repr(sorted(constexprs.items(), key=str)), divisible, tuple(options)


def specialise(launch: TritonLaunch) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """Return the signature, the constants and the arguments that are divisible by 16, as Triton specialises a launch:
    an integer that is 1 becomes a constant, unless the kernel says otherwise."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        fixed = parameter.do_not_specialize
        if isinstance(value, Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(name)
        elif parameter.is_constexpr or value is None or (value == 1 and type(value) is int and not fixed):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not fixed:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    return signature, constants, tuple(divisible)


@functools.cache
def accessed(kernel: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Return the parameters in the addresses that a kernel loads from and stores to, by its source: pointers, and the
    numbers added to them. What it hands to another function is in neither."""
    tree = ast.parse(kernel.src)
    pointers = {parameter.name: frozenset((parameter.name,)) for parameter in kernel.params}
    assigned = [n for n in ast.walk(tree) if isinstance(n, ast.Assign | ast.AugAssign)]
    for _ in assigned:  # each round follows one more assignment
        for node in assigned:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (t.id for t in targets if isinstance(t, ast.Name)):
                pointers[name] = pointers.get(name, frozenset()) | _pointers(node.value, pointers)
    read: set[str] = set()
    written: set[str] = set()
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        if _of_tl(call) in ACCESSES:
            reads, writes = ACCESSES[_of_tl(call)]
            found = _pointers(call.args[0], pointers)
            read |= found if reads else set()
            written |= found if writes else set()
    return frozenset(read), frozenset(written)


def _of_tl(node: ast.AST) -> str:
    """Return NAME of a call tl.NAME(...), or ""."""
    called = node.func if isinstance(node, ast.Call) else None
    of_tl = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "tl"
    return called.attr if of_tl and isinstance(called, ast.Attribute) else ""


def _pointers(node: ast.AST, known: dict[str, frozenset[str]]) -> frozenset[str]:
    """Return the parameters that a value is computed from, but not by loading from them."""
    if isinstance(node, ast.Name):
        return known.get(node.id, frozenset())
    inner = () if _of_tl(node) in ACCESSES else ast.iter_child_nodes(node)
    return frozenset().union(*(_pointers(child, known) for child in inner))


def cubin(launch: TritonLaunch, capability: int) -> tuple[bytes, int]:
    """Compile what was launched for a chip; return the cubin and the bytes of shared memory of a program."""
    signature, constants, divisible = specialise(launch)
    names = list(signature)
    source = ASTSource(
        fn=launch.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {name: value for name, value in launch.options.items() if value is not None}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled.asm["cubin"], int(compiled.metadata.shared)


@contextlib.contextmanager
def recorded(found: Callable[[TritonLaunch], None]) -> Iterator[None]:
    """Hand every launch of a Triton kernel, ours and of other packages, to `found` instead of launching it."""
    own = list(_own_kernels())
    before = [kernel.run for kernel in own]
    original: Any = JITFunction.run
    JITFunction.run = lambda self, *args, **kwargs: _record(found, self, *args, **kwargs)
    for kernel in own:
        kernel.run = partial(_record, found, kernel)
    try:
        yield
    finally:
        JITFunction.run = original
        for kernel, run in zip(own, before, strict=True):
            kernel.run = run


def _own_kernels() -> Iterator[Any]:
    """Yield our kernels; their `run` is an attribute of its own (kernels/_runtime.py: jit_kernel)."""
    for module in pkgutil.iter_modules(kernels.__path__):
        for value in vars(importlib.import_module(f"fastgpt.kernels.{module.name}")).values():
            if isinstance(value, JITFunction) and "run" in vars(value):
                yield value


def _record(
    found: Callable[[TritonLaunch], None], kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any
) -> None:
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    names = [parameter.name for parameter in kernel.params]
    defaults = {p.name: p.default for p in kernel.params if p.has_default}
    given = defaults | dict(zip(names, args)) | {name: value for name, value in kwargs.items() if name in names}
    blocks = grid(given) if callable(grid) else grid
    x, y, z = (*map(int, blocks), 1, 1)[:3]
    # a kernel's own arguments may have the names of options, as in num_warps: tl.constexpr
    arguments = {name: given[name] if name in given else options[name] for name in names}
    found(TritonLaunch(kernel, (x, y, z), arguments, options))

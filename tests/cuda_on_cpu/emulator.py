"""Builds csrc/cuda/*.cu for the host (include/cuda_runtime.h says how they run) and calls them on torch tensors.

Objects are kept by the hash of all they are made of, in a folder that later runs find again. `mutate` replaces text in
the sources first: the tests of the equipment itself break a kernel that way.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import pybind11
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"fastgpt-cuda-on-cpu-{os.getuid()}"
FLAGS = (
    "-std=c++17 -g1 -fPIC -fvisibility=hidden -fno-gnu-unique -fno-strict-aliasing -fno-math-errno -ffp-contract=off "
    "-Wall -Wno-unknown-pragmas"
).split()
ASAN = ("-fsanitize=address", "-fno-omit-frame-pointer")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int16: 3}
Mutation = tuple[str, str, str]  # file below csrc, text, replacement


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or "warning:" in done.stderr:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def _sources(mutate: Mutation | None) -> tuple[Path, str]:
    """Folder with csrc's headers and kernels, mutated if asked, and a hash of headers and emulation."""
    root = CSRC
    if mutate is not None:
        root = CACHE / hashlib.sha256(repr(mutate).encode()).hexdigest()[:16] / "csrc"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(CSRC, root, ignore=shutil.ignore_patterns("cpu", "*.cpp"))
        path = root / mutate[0]
        text = path.read_text()
        if text.count(mutate[1]) != 1:
            raise RuntimeError(f"{mutate[0]} holds {text.count(mutate[1])} times, expected once: {mutate[1]!r}")
        path.write_text(text.replace(mutate[1], mutate[2]))
    headers = sorted((root / "include").rglob("*.*h")) + sorted((HERE / "include").rglob("*.*h"))
    return root, "".join(p.read_text() for p in headers)


def _object(source: Path, root: Path, headers: str, flags: list[str]) -> Path:
    include = [f"-I{HERE / 'include'}", f"-I{root / 'include'}"]
    key = hashlib.sha256("\0".join([source.read_text(), headers, *FLAGS, *flags]).encode()).hexdigest()[:24]
    target = CACHE / f"{source.stem}-{key}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.o")
        _run(["g++", *FLAGS, *flags, *include, "-x", "c++", "-c", str(source), "-o", str(partial)])
        partial.rename(target)
    return target


def build(flags: tuple[str, ...] = (), mutate: Mutation | None = None) -> Path:
    """The Python module of all kernels; compiled where no object of the same text and flags is kept."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for old in CACHE.glob("*-*"):
            if old.stat().st_mtime < time.time() - 86400:
                old.unlink()
        root, headers = _sources(mutate)
        kernels = sorted((root / "cuda").glob("*.cu"))
        objects = [_object(p, root, headers, ["-O1", *flags]) for p in kernels]
        python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-DFASTGPT_MODULE=kernels"]
        objects.append(_object(HERE / "binding.cpp", CSRC, _sources(None)[1], ["-O0", *flags, *python]))
        key = hashlib.sha256("".join(p.name for p in objects).encode()).hexdigest()[:24]
        target = CACHE / f"kernels-{key}.so"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.so")
            _run(["g++", "-shared", *flags, *map(str, objects), "-o", str(partial)])
            partial.rename(target)
    return target


def load(path: Path) -> Any:
    name = f"{path.stem}.kernels"  # pybind11 keeps modules by their full name; PyInit_ goes by the last part
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def row_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


class Kernels:
    """The launchers on tensors. Outputs are allocated between canaries, which every call checks; without canaries
    (guard = 0) a tensor ends where its memory does, for AddressSanitizer."""

    def __init__(self, path: Path, guard: int = 64) -> None:
        self.raw = load(path)
        self.guard = guard
        self.guards: list[tuple[Tensor, Tensor]] = []

    def empty(self, *shape: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
        """Contiguous, filled with NaN (or 7), `offset` elements off alignment, `guard` elements of 7 on both sides."""
        numel = torch.Size(shape).numel()
        flat = torch.full((numel + 2 * self.guard + offset,), 7, dtype=dtype)
        inside = flat[self.guard + offset : self.guard + offset + numel]
        inside.fill_(float("nan") if dtype.is_floating_point else 7)
        self.guards.append((flat, inside))
        return inside.view(shape)

    def place(self, t: Tensor, offset: int = 0) -> Tensor:
        """A guarded copy."""
        return self.empty(*t.shape, dtype=t.dtype, offset=offset).copy_(t)

    def check_guards(self) -> None:
        for flat, inside in self.guards:
            first = (inside.data_ptr() - flat.data_ptr()) // flat.element_size()
            around = torch.cat([flat[:first], flat[first + inside.numel() :]])
            assert bool((around == 7).all()), "written outside of a tensor"
        self.guards.clear()

    def layer_norm_fwd(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        offset: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        n, c = x.shape
        y = self.empty(n, c, dtype=x.dtype, offset=offset)
        total = None if residual is None else self.empty(n, c, dtype=x.dtype, offset=offset)
        stats = self.empty(2, n, dtype=torch.float32)
        some = weight if weight is not None else bias
        self.raw.layer_norm_fwd(
            x=pointer(x), residual=pointer(residual), weight=pointer(weight), bias=pointer(bias), y=pointer(y),
            sum=pointer(total), stats=pointer(stats), x_row=row_stride(x), residual_row=row_stride(residual), n_rows=n,
            n_cols=c, eps=eps, dtype=DTYPES[x.dtype], weight_dtype=DTYPES[x.dtype if some is None else some.dtype],
        )  # fmt: skip
        self.check_guards()
        return y, total, stats

    def layer_norm_bwd(
        self, dy: Tensor, dsum: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, stats: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        n, c = h.shape
        dx = self.empty(n, c, dtype=h.dtype)
        dweight = None if weight is None else self.empty(c, dtype=weight.dtype)
        dbias = None if bias is None else self.empty(c, dtype=bias.dtype)
        some = weight if weight is not None else bias
        blocks = self.raw.layer_norm_bwd_blocks(n, c)
        partials = None if some is None else self.empty(blocks, 2, c, dtype=torch.float32)
        self.raw.layer_norm_bwd(
            dy=pointer(dy), dsum=pointer(dsum), h=pointer(h), weight=pointer(weight), stats=pointer(stats),
            dx=pointer(dx), dweight=pointer(dweight), dbias=pointer(dbias), partials=pointer(partials),
            dy_row=row_stride(dy), dsum_row=row_stride(dsum), h_row=row_stride(h), n_rows=n, n_cols=c,
            dtype=DTYPES[h.dtype], weight_dtype=DTYPES[h.dtype if some is None else some.dtype],
        )  # fmt: skip
        self.check_guards()
        return dx, dweight, dbias

    def _cross_entropy(self, name: str, logits: Tensor, target: Tensor, o: dict[str, Any], **more: Any) -> None:
        weight = o.get("weight")
        total = None if weight is None else weight.sum().reshape(1)
        getattr(self.raw, name)(
            logits=pointer(logits), target=pointer(target), weight=pointer(weight), weight_sum=pointer(total),
            logits_row=row_stride(logits), n_rows=logits.shape[0], n_cols=logits.shape[1],
            n_classes=o.get("vocab_size") or logits.shape[1], ignore_index=o.get("ignore_index", -100),
            label_smoothing=o.get("label_smoothing", 0.0), z_loss=o.get("z_loss", 0.0), softcap=o.get("softcap", 0.0),
            dtype=DTYPES[logits.dtype], **more,
        )  # fmt: skip
        self.check_guards()

    def cross_entropy_fwd(self, logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        loss, lse = (self.empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
        self._cross_entropy("cross_entropy_fwd", logits, target, options, loss=pointer(loss), lse=pointer(lse))
        return loss, lse

    def cross_entropy_bwd(
        self, dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, offset: int = 0, **options: Any
    ) -> Tensor:
        d = self.empty(*logits.shape, dtype=logits.dtype, offset=offset)
        self._cross_entropy(
            "cross_entropy_bwd", logits, target, options, dlogits=pointer(d), dlogits_row=row_stride(d),
            scale=pointer(dloss), scale_step=1, lse=pointer(lse),
        )  # fmt: skip
        return d

    def cross_entropy_fwd_bwd(self, logits: Tensor, target: Tensor, scale: Tensor, **options: Any) -> Tensor:
        loss = self.empty(logits.shape[0], dtype=torch.float32)
        self._cross_entropy(
            "cross_entropy_fwd_bwd", logits, target, options, dlogits=pointer(logits), dlogits_row=row_stride(logits),
            scale=pointer(scale), scale_step=int(scale.numel() > 1), loss=pointer(loss),
        )  # fmt: skip
        return loss

    def scale_rows(self, x: Tensor, scale: Tensor) -> None:
        self.raw.scale_rows(
            x=pointer(x), scale=pointer(scale), x_row=row_stride(x), scale_step=int(scale.numel() > 1),
            n_rows=x.shape[0], n_cols=x.shape[1], dtype=DTYPES[x.dtype],
        )  # fmt: skip
        self.check_guards()

    def adamw(
        self,
        tensors: list[Any],  # of (param, grad, exp_avg, exp_avg_sq, master or None)
        steps: Tensor,
        lr: Tensor,
        groups: list[tuple[float, float, float, float]],  # beta1, beta2, eps, weight_decay
        group: list[int] | None = None,
        norm: bool = True,
        **options: Any,
    ) -> Tensor:
        """prepare and update; returns grad_norm (1,)."""
        p, g, m, _, master = tensors[0]
        table = [
            dict(
                param=pointer(t[0]), grad=pointer(t[1]), exp_avg=pointer(t[2]), exp_avg_sq=pointer(t[3]),
                master=pointer(t[4]), numel=t[0].numel(), group=group[i] if group else 0, step=i,
            )
            for i, t in enumerate(tensors)
        ]  # fmt: skip
        n_partials = self.raw.adamw_partials([t[0].numel() for t in tensors]) if norm else 0
        partials = self.empty(max(n_partials, 1), dtype=torch.float32)
        grad_norm = self.empty(1, dtype=torch.float32)
        arguments = dict(
            tensors=table, groups=groups, lr=pointer(lr), steps=pointer(steps), partials=pointer(partials),
            n_partials=n_partials, grad_norm=pointer(grad_norm), param_dtype=DTYPES[p.dtype],
            grad_dtype=DTYPES[g.dtype], moment_dtype=DTYPES[m.dtype],
            master_dtype=DTYPES[torch.float32 if master is None else master.dtype],
        )  # fmt: skip
        arguments |= {k: pointer(v) if isinstance(v, Tensor) else v for k, v in options.items()}
        self.raw.adamw_prepare(**arguments)
        self.raw.adamw_update(**arguments)
        self.check_guards()
        return grad_norm


def smoke(kernels: Kernels, dtype: torch.dtype, n: int, c: int, schedule: str = "random") -> list[Tensor]:
    """Every launcher once on (n, c); what it returned. Rows are c + 8 apart and start off alignment."""
    torch.manual_seed(c)
    kernels.raw.set_schedule(schedule, c)

    def rows() -> Tensor:
        flat = torch.randn(1 + (n - 1) * (c + 8) + c).to(dtype)  # ends with the last row's last column
        return flat.as_strided((n, c), (c + 8, 1), 1)

    x, dy, weight, target = rows(), rows(), torch.randn(c).to(dtype), torch.randint(c, (n,))
    y, total, stats = kernels.layer_norm_fwd(x, rows(), weight, weight.clone(), 1e-5)
    assert total is not None
    found = [y, stats, *kernels.layer_norm_bwd(dy, rows(), total, weight, weight, stats)]
    options: dict[str, Any] = dict(weight=torch.rand(c), label_smoothing=0.1, z_loss=1e-3, softcap=5.0)
    loss, lse = kernels.cross_entropy_fwd(x, target, **options)
    found += [loss, lse, kernels.cross_entropy_bwd(torch.rand(n), x, target, lse, **options)]
    logits = x.clone()
    found += [kernels.cross_entropy_fwd_bwd(logits, target, torch.ones(1), **options), logits]
    kernels.scale_rows(logits, torch.full((1,), 0.5))
    state = [torch.zeros(n, c) for _ in range(2)]
    kernels.adamw([(y, dy.clone(), *state, None)], torch.zeros(1), torch.full((1,), 1 / c), [(0.9, 0.95, 1e-8, 0.1)])
    return [t for t in (*found, *state) if t is not None]


if __name__ == "__main__":  # for AddressSanitizer: module.so -> `smoke` on shapes that end anywhere
    emulated = Kernels(Path(sys.argv[1]), guard=0)
    for name in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((1, 1), (3, 7), (2, 64), (5, 97), (3, 770), (2, 8200)):
            smoke(emulated, name, *shape)
    print("done")

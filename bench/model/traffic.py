"""What a launch must do: bytes from memory and from L2, FLOP on tensor cores, and how uneven its blocks are.

By default the kernels of an op share the bytes of its tensors, each read and written once. RULES has the kernels for
which that is not so: attention reads keys again for every block of queries, a loss reads its logits twice, sums of
partials read what the kernel before them left in L2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from fastgpt.bench.model.recording import AnyLaunch, Call
from fastgpt.bench.model.triton_launches import TritonLaunch

CUDA_STEP = 64  # keys, or queries in dK/dV, that a CUDA attention kernel takes at a time (csrc/attention)
EMBEDDING_TILE = 32  # tokens of a block of embedding_bwd_kernel (csrc/embedding)
FP32 = 4


@dataclass(frozen=True)
class Work:
    """What a launch must do. read, written: bytes of memory; l2: bytes that multiprocessors request from L2.

    again: bytes that a block reads a second time, held: how many of them it has under way. They come from memory if L2
    does not hold what all blocks that run at a time have under way.
    """

    read: float
    written: float
    l2: float
    flop: float = 0.0
    slowest: float = 1.0  # work of the largest block over the mean block
    masked: float = 0.0  # share of the tiles that need a mask
    again: float = 0.0
    held: float = 0.0
    product: bool = False  # a plain product of matrices: the library's share of the peak limits it too


Rule = Callable[[Call, AnyLaunch], Work]


def work_of(call: Call, launch: AnyLaunch) -> Work:
    """Return what one launch of a call must do."""
    if rule := RULES.get(launch.name):
        return rule(call, launch)
    return _share(call, launch)


def _share(call: Call, launch: AnyLaunch) -> Work:
    """Return the launch's part of the op's bytes: by blocks, among the launches that have no rule."""
    among = sum(other.blocks for other in call.launches if other.name not in RULES) or launch.blocks
    part = launch.blocks / among
    if "n_turned" in call.options:  # rope leaves the other heads of a packed tensor as they are
        part *= call.options["n_turned"] / call.read["qkv"].shape[2]
    return Work(part * call.bytes_read, part * call.bytes_written, part * call.bytes_read)


def _sums_of_partials(call: Call, launch: AnyLaunch) -> Work:
    """The partials of each block before it: as many sums as there are elements in the gradients of parameters."""
    before = list(takewhile(lambda other: other is not launch, call.launches))
    blocks = before[-1].blocks if before else 1
    if isinstance(launch, TritonLaunch):
        partials = next(t for name, t in launch.tensors.items() if name.startswith("partials"))
        read = float(partials.numel() * partials.element_size())
    else:
        largest = max((part.elements for part in call.written.values()), default=0)
        grads = [part for part in call.written.values() if part.elements * 64 < largest or len(part.shape) == 1]
        read = float(blocks * sum(part.elements for part in grads) * FP32)
    return Work(0.0, 0.0, read)


def _loss_in_two_sweeps(call: Call, launch: AnyLaunch) -> Work:
    """Logits are read for the loss, and read again for their gradient; a block has a row."""
    logits = call.read["logits" if "logits" in call.read else "X_ptr"]
    row, again = logits.bytes / max(1, logits.shape[0]), float(logits.bytes)
    return Work(call.bytes_read, call.bytes_written, call.bytes_read + again, again=again, held=row)


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention call: B, T queries, S keys, H query heads, G key heads, D, bytes of an element."""

    b: int
    t: int
    s: int
    h: int
    g: int
    d: int
    w: int
    causal: bool

    @classmethod
    def of(cls, call: Call) -> Heads:
        """Read the sizes from a call of attention_fwd, attention_bwd or attention_qkv_bwd."""
        causal = bool(call.options["causal"])
        if "qkv" in call.read:
            qkv, h, g = call.read["qkv"], call.options["n_heads"], call.options["n_kv_heads"]
            b, t, _, d = qkv.shape
            return cls(b, t, t, h, g, d, qkv.itemsize, causal)
        (b, t, h, d), (_, s, g, _) = call.read["q"].shape, call.read["k"].shape
        return cls(b, t, s, h, g, d, call.read["q"].itemsize, causal)

    @property
    def queries(self) -> float:
        """Bytes of q, dout, out or dq."""
        return float(self.b * self.t * self.h * self.d * self.w)

    @property
    def keys(self) -> float:
        """Bytes of k, v, dk or dv."""
        return float(self.b * self.s * self.g * self.d * self.w)

    @property
    def rows(self) -> float:
        """Bytes of one fp32 number for each query and head."""
        return float(self.b * self.t * self.h * FP32)


def _tiles(heads: Heads, launch: AnyLaunch, over_keys: bool) -> tuple[int, int]:
    """Return the queries and keys of a tile: constants of a Triton kernel, from the grid of a CUDA kernel."""
    if isinstance(launch, TritonLaunch):
        return launch.numbers["BLOCK_M"], launch.numbers["BLOCK_N"]
    count, total = (heads.g, heads.s) if over_keys else (heads.h, heads.t)
    own = math.ceil(total / (launch.blocks / (heads.b * count)) / 16) * 16
    return (CUDA_STEP, own) if over_keys else (own, CUDA_STEP)


def keys_seen(heads: Heads, m: int, n: int) -> list[int]:
    """Return how many keys each block of m queries works on, in steps of n: whole tiles, masked parts included."""
    ends = [min(heads.s, first + m + heads.s - heads.t) for first in range(0, heads.t, m)]
    return [math.ceil((end if heads.causal else heads.s) / n) * n for end in ends]


def queries_seen(heads: Heads, m: int, n: int) -> list[int]:
    """Return how many queries each block of n keys works on, in steps of m."""
    firsts = [max(0, key - (heads.s - heads.t)) // m * m if heads.causal else 0 for key in range(0, heads.s, n)]
    return [math.ceil((heads.t - first) / m) * m for first in firsts]


def keys_masked(heads: Heads, m: int, n: int) -> float:
    """Return the share of the tiles of `keys_seen` that reach beyond the keys of their first query."""
    seen = keys_seen(heads, m, n)
    whole = [max(0, min(heads.s, first + 1 + heads.s - heads.t)) // n * n for first in range(0, heads.t, m)]
    return 1 - sum(whole) / sum(seen) if heads.causal else 0.0


def queries_masked(heads: Heads, m: int, n: int) -> float:
    """Return the share of the tiles of `queries_seen` whose queries do not see all keys."""
    seen = queries_seen(heads, m, n)
    return sum(min(each, math.ceil((n - 1) / m) * m) for each in seen) / sum(seen) if heads.causal else 0.0


def _over_queries(products: int, reads: int, writes: int) -> Rule:
    """Return the rule of a kernel with a block for each tile of queries."""

    def rule(call: Call, launch: AnyLaunch) -> Work:
        heads = Heads.of(call)
        m, n = _tiles(heads, launch, over_keys=False)
        seen = keys_seen(heads, m, n)
        pairs = float(heads.b * heads.h * m * sum(seen))
        own = reads * heads.queries + (reads - 1) * 2 * heads.rows
        again = heads.b * heads.h * sum(seen) * 2 * heads.d * heads.w
        written = writes * heads.queries + (2 - reads) * heads.rows
        slowest = max(seen) * len(seen) / sum(seen)
        flop, masked = 2 * heads.d * products * pairs, keys_masked(heads, m, n)
        return Work(own + 2 * heads.keys, written, own + again, flop, slowest, masked)

    return rule


def _dkdv(call: Call, launch: AnyLaunch) -> Work:
    """A block for each tile of keys, which reads q, dout and two numbers of every query that sees the keys."""
    heads = Heads.of(call)
    m, n = _tiles(heads, launch, over_keys=True)
    seen = queries_seen(heads, m, n)
    pairs = float(heads.b * heads.h * n * sum(seen))
    again = heads.b * heads.h * sum(seen) * (2 * heads.d * heads.w + 2 * FP32)
    read = 2 * heads.queries + 2 * heads.keys + 2 * heads.rows
    slowest = max(seen) * len(seen) / sum(seen)
    masked = queries_masked(heads, m, n)
    return Work(read, 2 * heads.keys, 2 * heads.keys + again, 8 * heads.d * pairs, slowest, masked)


def _rows_of_backward(call: Call, launch: AnyLaunch) -> Work:
    """The sums of out * dout, and lse with them."""
    heads = Heads.of(call)
    read = 2 * heads.queries + heads.rows
    return Work(read, 2 * heads.rows, read)


def _embedding_fwd(call: Call, launch: AnyLaunch) -> Work:
    """A row of the table for each token; from memory at most once each row."""
    out, table = call.written["out0"], call.read["weight"]
    ids = call.read["ids"].bytes
    tables = 2 if "position_weight" in call.read else 1
    return Work(ids + min(table.bytes, out.bytes), out.bytes, ids + tables * out.bytes)


def _embedding_bwd(call: Call, launch: AnyLaunch) -> Work:
    """Levels of sums: the first reads dy and adds to the table, the others read partial sums from L2."""
    dy = call.read["dy"]
    table = next(part for name, part in call.written.items() if name in ("dweight", "out0"))
    levels = [other for other in call.launches if other.name == launch.name]
    if launch is not levels[0]:
        return Work(0.0, 0.0, float(launch.grid[0] * EMBEDDING_TILE * table.shape[-1] * FP32))
    tokens = dy.elements // table.shape[-1]
    touched = min(table.shape[0], tokens) * table.shape[-1] * table.itemsize
    index = tokens * (8 + 4)
    return Work(dy.bytes + touched + index, touched, dy.bytes + touched + index)


def _embedding_keys(call: Call, launch: AnyLaunch) -> Work:
    ids = call.read["ids"]
    return Work(ids.bytes, ids.elements * 4, ids.bytes)


def _product(call: Call, launch: AnyLaunch) -> Work:
    """A product (M, K) x (K, N) of a Triton kernel, a program for each tile; its other bytes are those of the op."""
    assert isinstance(launch, TritonLaunch)
    rows, columns, depth = (launch.numbers[name] for name in "MNK")
    m, n = (launch.numbers[name] for name in ("BLOCK_M", "BLOCK_N"))
    tiles = math.ceil(rows / m) * math.ceil(columns / n)
    itemsize = call.read["weight"].itemsize
    tensors = launch.tensors.items()
    partials = sum(t.numel() * t.element_size() for name, t in tensors if name.startswith("partials"))
    again = (tiles * (m + n) - rows - columns) * depth * itemsize
    flop = 2.0 * tiles * m * n * depth
    return Work(call.bytes_read, call.bytes_written + partials, call.bytes_read + again, flop, product=True)


RULES: dict[str, Rule] = {
    "add_partials_kernel": _sums_of_partials,
    "attention_fwd_kernel": _over_queries(products=2, reads=1, writes=1),
    "attention_dq_kernel": _over_queries(products=3, reads=2, writes=1),
    "attention_dkdv_kernel": _dkdv,
    "attention_rows_kernel": _rows_of_backward,
    "attention_delta_kernel": _rows_of_backward,
    "cross_entropy_fwd_bwd_kernel": _loss_in_two_sweeps,
    "embedding_fwd_kernel": _embedding_fwd,
    "embedding_bwd_kernel": _embedding_bwd,
    "embedding_keys_kernel": _embedding_keys,
    "gelu_mlp_bwd_kernel": _product,
    "gelu_mlp_fwd_kernel": _product,
    "linear_qkv_bwd_kernel": _product,
    "liger_cross_entropy_kernel": _loss_in_two_sweeps,
}


def describe(launch: AnyLaunch) -> dict[str, Any]:
    """Return the sizes of a launch for a row."""
    if isinstance(launch, TritonLaunch):
        shape = {"variant": " ".join(f"{n}={v}" for n, v in launch.numbers.items() if n.isupper() and len(n) > 1)}
        return shape | {"grid": launch.blocks, "threads": 32 * launch.options.get("num_warps", 4)}
    return {"variant": launch.kernel, "grid": launch.blocks, "threads": math.prod(launch.block)}

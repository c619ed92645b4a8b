"""rope and rope_qkv: registration, bounds, errors, and how autograd sees a write in place."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt import ops, parity
from fastgpt.core.backend import use
from fastgpt.ops.rope import ROPE_COPY, ROPE_FWD, ROPE_ROWS, rope_qkv_ref, rope_ref
from fastgpt.parity.rule import allowed_error, largest_error, sensitivities

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON = pytest.mark.parametrize("name", parity.backends_here("rope"))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
PAIRS = pytest.mark.parametrize("interleaved", [False, True])
PACKED = dict(n_heads=3, n_kv_heads=1)  # of (B, T, 5, D)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tables(rows: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(rows, dtype=torch.float64), 0.3 ** torch.arange(half, dtype=torch.float64))
    return angle.cos().float().to(DEVICE), angle.sin().float().to(DEVICE)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


COS, SIN = tables(9, 4)
POSITIONS = torch.tensor([[3, 0, 8], [1, 1, 7]], device=DEVICE)


def raw_calls(name: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    q, k, qkv = rand(2, 3, 4, 10), rand(2, 3, 2, 10, seed=1), rand(2, 3, 5, 10, seed=2)
    strided = rand(2, 5, 3, 12, seed=3).transpose(1, 2)[..., 1:11]
    return {
        "fwd": (ROPE_FWD[name], (q, k, COS, SIN, None, False, False)),
        "fwd strided": (ROPE_FWD[name], (strided, k.mT.contiguous().mT, COS, SIN, POSITIONS, True, True)),
        "fwd no heads": (ROPE_FWD[name], (q[:, :, :0], k, COS, SIN, POSITIONS[0], True, False)),
        "rows": (ROPE_ROWS[name], (qkv, COS, SIN, None, 4, False, False)),
        "rows strided": (
            ROPE_ROWS[name],
            (strided.clone(memory_format=torch.preserve_format), COS, SIN, None, 3, True, True),
        ),
        "copy": (ROPE_COPY[name], (qkv, COS, SIN, POSITIONS, 4, True, True)),
        "copy strided": (ROPE_COPY[name], (strided, COS, SIN, None, 2, False, False)),
    }


@ON
@pytest.mark.parametrize("call", list(raw_calls("cpu")))
def test_opcheck(name: str, call: str) -> None:
    op, args = raw_calls(name)[call]
    torch.library.opcheck(op, args)


@ON
@DTYPES
@PAIRS
def test_only_turned_columns_of_turned_heads_are_written(name: str, dtype: torch.dtype, interleaved: bool) -> None:
    """In place in a wider buffer, the rest keeps its bits, and a strided tensor gives the values of a packed one."""
    wide = torch.full((2, 5, 4, 17), math.nan, dtype=dtype, device=DEVICE)
    x = wide[:, :, 1:, 2:15].transpose(1, 2)  # (2, 3, 5, 13), rows and heads swapped, misaligned
    x.copy_(rand(2, 3, 5, 13, dtype=dtype))
    before = wide.clone()
    plain = x.contiguous()
    ROPE_ROWS[name](x, COS, SIN, POSITIONS, 4, interleaved, False)
    ROPE_ROWS[name](plain, COS, SIN, POSITIONS, 4, interleaved, False)
    assert same_bits(x, plain) and not same_bits(x, before[:, :, 1:, 2:15].transpose(1, 2))
    copied = ROPE_COPY[name](before[:, :, 1:, 2:15].transpose(1, 2), COS, SIN, POSITIONS, 4, interleaved, False)
    assert same_bits(copied, plain) and copied.is_contiguous()
    after, was = wide.clone(), before.clone()
    for t in (after, was):
        t[:, :, 1:, 2:15].transpose(1, 2)[:, :, :4, :8] = 0  # what may change
    assert same_bits(after, was)


@ON
@PAIRS
def test_a_position_outside_the_tables_is_nan_and_reads_nothing(name: str, interleaved: bool) -> None:
    """The tables lie between sevens, which must not reach any result, not even that of a neighbour."""
    cos, sin = (torch.full((4, 4), 7.0, device=DEVICE) for _ in range(2))
    cos[1:3], sin[1:3] = COS[:2], SIN[:2]
    positions = torch.tensor([[-1, 0, 2], [1, 2**40, -(2**40)]], device=DEVICE)
    bad = torch.tensor([[True, False, True], [False, True, True]], device=DEVICE)
    q, k = rand(2, 3, 2, 9), rand(2, 3, 1, 9, seed=1)
    exact = rope_ref(q, k, COS, SIN, interleaved=interleaved, positions=positions.where(~bad, 0))
    for got, x, e in zip(ROPE_FWD[name](q, k, cos[1:3], sin[1:3], positions, interleaved, False), (q, k), exact):
        assert got[bad][..., :8].isnan().all() and torch.equal(got[..., 8], x[..., 8])
        torch.testing.assert_close(got[~bad], e[~bad])
    packed = torch.cat((q, k), 2)
    ROPE_ROWS[name](packed, cos[1:3], sin[1:3], positions, 2, interleaved, False)
    assert packed[bad][:, :2, :8].isnan().all() and not packed[:, :, 2].isnan().any() and not packed[~bad].isnan().any()


@ON
@DTYPES
@PAIRS
def test_position_zero_is_exact_and_the_inverse_turns_back(name: str, dtype: torch.dtype, interleaved: bool) -> None:
    x, zeros = rand(2, 3, 5, 10, dtype=dtype), torch.zeros_like(POSITIONS)
    assert torch.equal(ROPE_COPY[name](x, COS, SIN, zeros, 5, interleaved, False), x)
    turned = ROPE_COPY[name](x, COS, SIN, POSITIONS, 5, interleaved, False)
    back = ROPE_COPY[name](turned, COS, SIN, POSITIONS, 5, interleaved, True)
    torch.testing.assert_close(back, x, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@ON
def test_extremes_and_no_positions_at_all(name: str) -> None:
    """Infinities and NaN stay in their pair; T = 1 and empty tensors work."""
    x = rand(1, 1, 1, 10)
    x[..., 0], x[..., 1] = math.inf, math.nan
    out = ROPE_COPY[name](x, COS[1:2], SIN[1:2], None, 1, False, False)
    assert (
        out[..., [0, 4]].isinf().all()
        and out[..., [1, 5]].isnan().all()
        and out[..., [2, 3, 6, 7, 8, 9]].isfinite().all()
    )
    for shape in ((0, 3, 5, 10), (2, 0, 5, 10), (2, 3, 5, 0)):
        half = 0 if shape[3] == 0 else 4
        empty = rand(*shape)
        ROPE_ROWS[name](empty, COS[:, :half], SIN[:, :half], None, 4, False, False)
        assert ROPE_COPY[name](empty, COS[:, :half], SIN[:, :half], None, 4, True, False).shape == shape


@ON
def test_addresses_past_2_to_31(name: str, tmp_path: Path) -> None:
    """Put batches, then heads, so far apart that stride times index exceeds 32 bits."""
    if DEVICE == "cuda":
        pytest.skip("the sparse file is host memory")
    far = 2**30 + 64
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=4 * far, dtype=torch.bfloat16)
    for strides in ((far, 40, 10, 1), (50, 25, far, 1), (50, far, 10, 1)):
        x = file.as_strided((3, 2, 2, 8) if strides[1] != far else (2, 3, 2, 8), strides)
        x.copy_(rand(*x.shape, dtype=torch.bfloat16))
        near = x.contiguous()
        assert torch.equal(
            ROPE_COPY[name](x, COS, SIN, None, 1, False, False), ROPE_COPY[name](near, COS, SIN, None, 1, False, False)
        )
        a, b = ROPE_FWD[name](x, near, COS, SIN, None, True, False)
        assert torch.equal(a, b)
        ROPE_ROWS[name](x, COS, SIN, None, 1, False, False)
        assert torch.equal(x, ROPE_COPY[name](near, COS, SIN, None, 1, False, False))


@pytest.mark.skipif("triton" not in parity.backends_here("rope"), reason="needs Triton")
def test_triton_counts_heads_in_64_bits_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgpt.kernels import rope as kernels

    assert not kernels._launch(2**10, 2**20, 32)[2] and kernels._launch(2**10, 2**21, 32)[2]
    q, k = rand(2, 3, 4, 10), rand(2, 3, 2, 10, seed=1)
    narrow = ROPE_FWD["triton"](q, k, COS, SIN, POSITIONS, False, False)
    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda *args: (*launch(*args)[:2], True))
    assert all(torch.equal(a, b) for a, b in zip(narrow, ROPE_FWD["triton"](q, k, COS, SIN, POSITIONS, False, False)))


@pytest.mark.skipif("cpu" not in parity.backends_here("rope"), reason="needs the compiled CPU kernels")
def test_the_number_of_threads_changes_nothing() -> None:
    x, (cos, sin) = rand(3, 400, 5, 64), tables(400, 32)
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(ROPE_COPY["cpu"](x, cos, sin, None, 4, False, False))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    exact = rope_qkv_ref(x.double(), cos, sin, n_heads=3, n_kv_heads=1)
    torch.testing.assert_close(results[0].double(), exact, rtol=1e-6, atol=1e-6)


class Model(nn.Module):
    """A packed projection as in fastgpt.models.gpt; rope_qkv receives a view of its output."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 5 * 10, bias=bias).to(DEVICE)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(rand(*p.shape, seed=i))

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        b, t, _ = x.shape
        qkv = ops.rope_qkv(self.qkv(x).view(b, t, -1, 10), COS, SIN, positions=positions, interleaved=True, **PACKED)
        q, k, v = qkv.split([3, 1, 1], dim=2)
        q, k = ops.rope(q, k, COS, SIN)
        return ((q * k).sum(2) * v[:, :, 0]).tanh()


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = call(x)
    y.backward(rand(*y.shape, dtype=y.dtype, seed=9))
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@contextmanager
def partitioned(how: str) -> Iterator[None]:
    """Skip a case that PyTorch before 2.13 cannot partition: a split and recomputed tensor in a compiled graph."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if how != "compile and checkpoint" or torch.__version__ >= (2, 13) or "failed to partition" not in str(error):
            raise
        pytest.skip(f"PyTorch {torch.__version__} fails to partition a compiled graph with a checkpoint and a split")


@ON
@pytest.mark.parametrize(
    "how,bias",
    [("eager", True), ("eager", False), ("checkpoint", True), ("reentrant", True)]
    + [("compile", True), ("compile", False), ("compile and checkpoint", True)],
)
def test_in_place_on_a_view_of_a_projection(name: str, bias: bool, how: str) -> None:
    """Values and gradients equal the reference by the rule of parity, for every way to build the graph."""
    model, wide = Model(bias), Model(bias).double()
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "eager": model,
        "checkpoint": lambda x: checkpoint(model, x, use_reentrant=False),
        "reentrant": lambda x: checkpoint(model, x, use_reentrant=True),
    }
    torch._dynamo.reset()
    call = calls.get(how.split()[-1], model)
    if how.startswith("compile"):
        call = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 3, 6), (3, 7, 6)):
        with use(rope="torch"):
            exact, torchs = gradients(wide, wide, rand(*shape).double()), gradients(model, model, rand(*shape))
        with use(strict=True, rope=name), partitioned(how):
            got = gradients(model, call, rand(*shape))
        with use(rope="torch"):
            moved = sensitivities(lambda x: gradients(wide, wide, x), rand(*shape).double())
        for a, b, e, sensitivity in zip(got, torchs, exact, moved, strict=True):
            error, torch_error = (largest_error(x, e) for x in (a, b))
            assert error <= allowed_error("d", e, torch_error, a.dtype, sensitivity)


@ON
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(name: str, mode: Any) -> None:
    model, x = Model(), rand(2, 3, 6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with mode():
        with use(rope="torch"):
            wanted = model(x)
        with use(strict=True, rope=name):
            torch.testing.assert_close(model(x), wanted)
            torch.testing.assert_close(compiled(x), wanted)
            qkv = rand(2, 3, 5, 10)
            before, address = qkv.clone(), qkv.data_ptr()
            out = ops.rope_qkv(qkv, COS, SIN, **PACKED)
            assert out.data_ptr() == address and not torch.equal(qkv, before)
            for other in (rand(2, 3, 10, 5).mT, rand(1, 1, 5, 10).expand(2, 3, 5, 10)):  # rotates a copy
                before = other.clone()
                out = ops.rope_qkv(other, COS, SIN, **PACKED)
                assert torch.equal(other, before)
                torch.testing.assert_close(out, rope_qkv_ref(other, COS, SIN, **PACKED))
            apart = rand(3, 2, 7, 12).transpose(0, 1)[:, :, 1:6, 1:11]
            wanted = rope_qkv_ref(apart, COS, SIN, **PACKED)
            out = ops.rope_qkv(apart, COS, SIN, **PACKED)
            assert out.data_ptr() == apart.data_ptr()
            torch.testing.assert_close(apart, wanted)


def nodes(t: Tensor) -> list[str]:
    """Return the names of the autograd nodes below t."""
    found, left = [], [t.grad_fn]
    while left:
        node = left.pop()
        if node is not None:
            found.append(node.name())
            left += [n for n, _ in node.next_functions]
    return found


@ON
def test_in_place_means_no_copies_and_any_handle_is_right(name: str) -> None:
    """There is no CopySlices (three copies of the gradient), and the tensor that was passed in is rotated too."""
    proj, x = rand(6, 50).requires_grad_(), rand(2, 3, 6)
    w, u = rand(2, 3, 5, 10, seed=3), rand(6, 50, seed=4)
    with use(strict=True, rope=name):
        base = x.view(6, 6) @ proj
        address = base.data_ptr()
        view = base.view(2, 3, 50).view(2, 3, 5, 10)
        out = ops.rope_qkv(view, COS, SIN, **PACKED)
    assert out.data_ptr() == address and not any("CopySlices" in n for n in nodes(out))

    def loss(out: Tensor, base: Tensor, view: Tensor) -> Tensor:
        return (out * w).sum() + (base.view(6, 50) * u).sum() + (view.sin() * w).sum()

    turned = rope_qkv_ref((x.view(6, 6) @ proj).view(2, 3, 5, 10), COS, SIN, **PACKED)
    grads = [torch.autograd.grad(loss(*ts), proj)[0] for ts in ((out, base, view), (turned, turned, turned))]
    torch.testing.assert_close(*grads)


class Doubled(torch.autograd.Function):
    """A view with a custom backward, which must not be skipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view(2, 3, 5, 10)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g.reshape(6, 50)


@ON
@pytest.mark.parametrize("kind", ["slice", "split", "transposed", "custom", "expanded", "detached"])
def test_other_views_are_copied_and_left_alone(name: str, kind: str) -> None:
    leaf = rand(6, 50).requires_grad_()
    grads = []
    for backend in (name, "torch"):
        with use(rope=backend):
            base = leaf * 1
            views: dict[str, Callable[[], Tensor]] = {
                "slice": lambda b=base: torch.cat((b, b)).view(4, 3, 5, 10)[1:3],
                "split": lambda b=base: b.view(6, 1, 5, 10).split(2)[1],
                "transposed": lambda b=base: b.view(3, 2, 5, 10).transpose(0, 1),
                "custom": lambda b=base: Doubled.apply(b),
                "expanded": lambda b=base: b.view(6, 1, 5, 10)[:1].expand(2, 3, 5, 10),
                "detached": lambda b=base: b.detach().view(2, 3, 5, 10).requires_grad_().view(2, 3, 5, 10),
            }
            qkv = views[kind]()
            before = qkv.detach().clone()
            out = ops.rope_qkv(qkv, COS, SIN, **PACKED)
            assert torch.equal(qkv, before)
            source = qkv._base if kind == "detached" else leaf
            if kind == "detached":
                assert out.requires_grad
                grads.append(torch.autograd.grad(out, qkv, rand(*out.shape, seed=2))[0])
            else:
                grads.append(torch.autograd.grad(out, source, rand(*out.shape, seed=2))[0])
    torch.testing.assert_close(*grads)


@ON
def test_a_value_that_backward_needs_is_not_overwritten_in_silence(name: str) -> None:
    leaf = rand(2, 3, 5, 10).requires_grad_()
    with use(strict=True, rope=name):
        for grad in (True, False):
            qkv = leaf * 1
            loss = qkv.square().sum()  # keeps qkv
            with torch.set_grad_enabled(grad):
                ops.rope_qkv(qkv, COS, SIN, **PACKED)
            with pytest.raises(RuntimeError, match="inplace"):
                loss.backward()


@ON
def test_the_gradient_that_came_is_not_changed(name: str) -> None:
    leaf, g = rand(2, 3, 5, 10).requires_grad_(), rand(2, 3, 5, 10, seed=1)
    kept = g.clone()
    with use(strict=True, rope=name):
        out = ops.rope_qkv(leaf * 1, COS, SIN, **PACKED)
        out.backward(g, retain_graph=True)
        assert leaf.grad is not None
        once = leaf.grad.clone()
        out.backward(g)
        q, k = ops.rope(leaf[:, :, :3], leaf[:, :, 3:4], COS, SIN)
        torch.autograd.backward((q, k), (g[:, :, :3], g[:, :, 3:4]))
    assert torch.equal(g, kept)
    torch.testing.assert_close(leaf.grad, 2 * once + torch.cat((once[:, :, :4], 0 * once[:, :, 4:]), 2))


@ON
def test_only_what_needs_a_gradient_gets_one(name: str) -> None:
    """Try q and k alone, used or not. A second backward doubles the gradient; inputs do not change."""
    with use(strict=True, rope=name):
        for which in range(2):
            pair = [rand(2, 3, 2, 10), rand(2, 3, 1, 10, seed=1)]
            before = [t.clone() for t in pair]
            pair[which].requires_grad_()
            out = ops.rope(*pair, COS, SIN, positions=POSITIONS)
            assert out[which].requires_grad
            for i in range(2):
                out[which].backward(torch.ones_like(out[which]), retain_graph=True)
                if i == 0:
                    once = pair[which].grad.clone()
            torch.testing.assert_close(pair[which].grad, 2 * once, rtol=0, atol=0)
            if out[1 - which].requires_grad:  # its gradient is not used
                out[1 - which].sum().backward()
            assert pair[1 - which].grad is None and torch.equal(pair[which].grad, 2 * once)
            assert all(torch.equal(a, b.detach()) for a, b in zip(before, pair))


@ON
def test_fullgraph_compile_with_dynamic_shapes(name: str) -> None:
    def both(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
        q, k = ops.rope(q, k, COS, SIN, interleaved=True, positions=positions)
        return torch.cat(ops.rope(q, k, COS, SIN), 2)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    with use(strict=True, rope=name):
        for t in (3, 7):
            results = []
            for fn in (compiled, both):
                leaves = [rand(2, t, 3, 9).requires_grad_(), rand(2, t, 2, 9, seed=1).requires_grad_()]
                out = fn(*leaves, torch.arange(t, device=DEVICE).flip(0))
                out.sum().backward()
                results.append([out.detach(), *(leaf.grad for leaf in leaves)])
            for a, b in zip(*results):
                torch.testing.assert_close(a, b)


def test_gradcheck_of_the_references() -> None:
    q, k = (rand(2, 3, h, 9).double().requires_grad_() for h in (2, 1))
    for interleaved in (False, True):
        options = dict(interleaved=interleaved, positions=POSITIONS)
        assert torch.autograd.gradcheck(lambda *a: rope_ref(*a, COS, SIN, **options), (q, k))  # noqa: B023
        packed = rand(2, 3, 5, 9).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: rope_qkv_ref(x, COS, SIN, **PACKED, **options), (packed,))  # noqa: B023


def test_autocast_leaves_dtypes_alone() -> None:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        q, k = ops.rope(rand(2, 3, 2, 10), rand(2, 3, 1, 10), COS, SIN)
    assert q.dtype == k.dtype == torch.float32


Q, K = rand(2, 3, 2, 10), rand(2, 3, 1, 10)
QKV = rand(2, 3, 5, 10)
FAR = torch.tensor([0, 1, 9], device=DEVICE)
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.rope(Q.long(), K, COS, SIN), TypeError, "rope: q is torch.int64, expected a floating-point"),
    (lambda: ops.rope(Q, K[:1], COS, SIN), ValueError, r"rope: q \(2, 3, 2, 10\) and k \(1, 3, 1, 10\)"),
    (lambda: ops.rope(Q, K.half(), COS, SIN), TypeError, "rope: k is torch.float16, expected torch.float32"),
    (lambda: ops.rope(Q, K, COS.half(), SIN.half()), TypeError, "rope: cos is torch.float16, expected torch.float32"),
    (lambda: ops.rope(Q, K, COS, SIN[:3]), ValueError, r"rope: cos \(9, 4\) and sin \(3, 4\)"),
    (
        lambda: ops.rope(Q, K, *tables(9, 6)),
        ValueError,
        "cos covers 12 columns, expected at most the head dimension 10",
    ),
    (lambda: ops.rope(Q, K, COS[:2], SIN[:2]), ValueError, "x has 3 positions, cos and sin only 2"),
    (lambda: ops.rope(Q, K, COS.clone().requires_grad_(), SIN), ValueError, "cos requires grad"),
    (lambda: ops.rope(Q, K, COS, SIN, positions=FAR[:2]), ValueError, r"positions has shape \(2,\), expected \(3,\)"),
    (
        lambda: ops.rope(Q, K, COS, SIN, positions=FAR.int()),
        TypeError,
        "positions is torch.int32, expected torch.int64",
    ),
    (lambda: ops.rope(Q, K, COS, SIN, positions=FAR), ValueError, "positions reach from 0 to 9, expected 0 to 8"),
    (lambda: ops.rope(Q, K, COS, SIN, positions=-FAR), ValueError, "positions reach from -9 to 0, expected 0 to 8"),
    (lambda: ops.rope_qkv(QKV, COS, SIN, n_heads=2, n_kv_heads=1), ValueError, r"expected \(B, T, 4, D\)"),
    (lambda: ops.rope_qkv(QKV, COS, SIN, positions=FAR, **PACKED), ValueError, "positions reach from 0 to 9"),
]


@pytest.mark.parametrize("call,kind,message", ERRORS, ids=[m for _, _, m in ERRORS])
@pytest.mark.skipif(DEVICE == "cuda", reason="values are checked on CPU")
def test_errors_name_the_argument(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


@ON
def test_a_leaf_that_requires_grad_is_refused(name: str) -> None:
    with use(strict=True, rope=name):
        for leaf in (QKV.clone().requires_grad_(), rand(2, 3, 10, 5).mT.requires_grad_()):
            kept = leaf.detach().clone()
            with pytest.raises(ValueError, match="qkv is a leaf that requires grad"):
                ops.rope_qkv(leaf, *tables(9, 2), **PACKED)
            assert torch.equal(leaf, kept)


@ON
def test_raw_ops_refuse_what_they_cannot_write(name: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match="rope_rows.*columns"):
        ROPE_ROWS[name](rand(2, 3, 10, 5).mT, COS, SIN, None, 4, False, False)
    if name != "triton":
        with pytest.raises(RuntimeError, match="overlap"):
            ROPE_ROWS[name](rand(1, 1, 5, 10).expand(2, 3, 5, 10), COS, SIN, None, 4, False, False)
        with pytest.raises(RuntimeError, match="n_turned is 6, expected 0 to 5"):
            ROPE_ROWS[name](QKV.clone(), COS, SIN, None, 6, False, False)


def test_registered_for_compiled_and_triton_backends() -> None:
    assert set(sys.modules["fastgpt.core.backend"].ops()["rope"]) >= {"cpu", "triton", "torch"}

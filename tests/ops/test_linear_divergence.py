"""linear_divergence: values and gradients against fp64 and TRL, chunks, masks, memory, extremes, errors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt import ops, parity
from fastgpt.ops.divergence import KINDS, LINEAR_DIVERGENCE_ROWS, divergence_ref, divergence_rows
from fastgpt.ops.linear_divergence import linear_divergence_ref, rows_of_a_chunk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON = pytest.mark.parametrize("name", [*parity.backends_here("linear_divergence"), "torch"])
EACH = pytest.mark.parametrize("kind", KINDS)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def heads(n: int = 13, dtype: torch.dtype = torch.float32, v: int = 33) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return x (n, 8), W (v, 8), b (v); the teacher's with width 5 and v + 3 rows; a target with rows to ignore."""
    student = [rand(n, 8, seed=1, dtype=dtype), rand(v, 8, seed=2, dtype=dtype), rand(v, seed=3, dtype=dtype)]
    teacher = [rand(n, 5, seed=4, dtype=dtype), rand(v + 3, 5, seed=5, dtype=dtype), rand(v + 3, seed=6, dtype=dtype)]
    target = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    target[2::3] = -100
    return student, teacher, target


def results(fn: Callable[..., Tensor], student: list[Tensor], teacher: list[Tensor], **o: Any) -> list[Tensor]:
    """Return the loss and the student's gradients; rows of "none" have different upstream gradients."""
    leaves = [t.clone().requires_grad_() for t in student]
    loss = fn(leaves[0], leaves[1], teacher[0], teacher[1], linear_bias=leaves[2], teacher_bias=teacher[2], **o)
    upstream = torch.linspace(-2, 1, len(student[0]), device=DEVICE) if loss.dim() else loss.new_tensor(0.7)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]


def rows_of(name: str) -> Callable[..., None]:
    """Return the op on rows of a backend."""
    return divergence_rows if name == "torch" else LINEAR_DIVERGENCE_ROWS[name]


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


@EACH
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("chunk", ["auto", 5])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_equals_the_formula_in_fp64(kind: str, reduction: str, chunk: Any, dtype: torch.dtype, bound: float) -> None:
    student, teacher, target = heads(dtype=dtype)
    o: dict[str, Any] = dict(kind=kind, beta=0.3, temperature=1.7, vocab_size=31, reduction=reduction, target=target)
    wanted = results(linear_divergence_ref, [t.double() for t in student], [t.double() for t in teacher], **o)
    got = results(ops.linear_divergence, student, teacher, chunk=chunk, **o)
    assert got[0].dtype == torch.float32 and [t.dtype for t in got[1:]] == [dtype] * 3
    assert max(error(a, b) for a, b in zip(got, wanted)) < bound
    assert not got[1][2::3].any() and not got[2][31:].any() and not got[3][31:].any()


@EACH
def test_fp64_and_gradcheck(kind: str) -> None:
    student, teacher, target = heads(4)
    wide, wide_teacher = ([t.double() for t in side] for side in (student, teacher))
    for reduction in ("none", "mean"):

        def fn(*leaves: Tensor, reduction: str = reduction) -> Tensor:
            o: dict[str, Any] = dict(kind=kind, temperature=1.3, linear_bias=leaves[2], teacher_bias=wide_teacher[2])
            return ops.linear_divergence(
                leaves[0], leaves[1], wide_teacher[0], wide_teacher[1], target, reduction=reduction, chunk=3, **o
            )

        assert torch.autograd.gradcheck(fn, [t.requires_grad_() for t in wide])


@pytest.mark.parametrize("kind,beta", [("forward_kl", 0), ("reverse_kl", 1), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)])
def test_equals_trl(kind: str, beta: float) -> None:
    """Value and gradients equal those of generalized_jsd_loss over whole logits, within fp32 rounding."""
    trl = pytest.importorskip("trl.experimental.gkd", reason="needs trl (pip install trl)")
    student, teacher, target = heads()
    teacher = [teacher[0], teacher[1][:33], teacher[2][:33]]

    def whole(x: Tensor, w: Tensor, x_t: Tensor, w_t: Tensor, *, linear_bias: Tensor, teacher_bias: Tensor) -> Tensor:
        z, z_t = x @ w.t() + linear_bias, x_t @ w_t.t() + teacher_bias
        loss: Tensor = trl.GKDTrainer.generalized_jsd_loss(z[None], z_t[None], target[None], beta, temperature=1.7)
        return loss

    wanted = results(whole, student, teacher)
    o: dict[str, Any] = dict(kind=kind, temperature=1.7, chunk=4, target=target)
    got = results(ops.linear_divergence, student, teacher, beta=beta, **o)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-7)


def test_the_ends_of_jsd_are_the_two_kl() -> None:
    """As the docstring says: jsd / beta tends to forward_kl, jsd / (1 - beta) to reverse_kl."""
    z, z_t = rand(6, 40).double(), rand(6, 40, seed=1).double()
    for kind, beta, share in (("forward_kl", 1e-6, 1e-6), ("reverse_kl", 1 - 1e-6, 1e-6)):
        limit = divergence_ref(z, z_t, "jsd", beta, 1.0) / share
        torch.testing.assert_close(limit, divergence_ref(z, z_t, kind, 0.5, 1.0), rtol=1e-4, atol=0)


@EACH
def test_equal_heads_have_no_divergence(kind: str) -> None:
    student, _, _ = heads()
    got = results(ops.linear_divergence, student, student, kind=kind, reduction="sum")
    assert all(float(t.abs().max()) < 1e-5 for t in got)


@ON
@EACH
@pytest.mark.parametrize("scale,offset", [(1e4, 0.0), (1.0, 1e4), (1.0, -1e4)])
def test_extreme_logits(name: str, kind: str, scale: float, offset: float) -> None:
    """0 log 0 is 0: finite values of the right size at logits of 1e4 and with a large common offset."""
    z, z_t = scale * rand(7, 50) + offset, scale * rand(7, 50, seed=1) - offset
    wide, loss = z.double().requires_grad_(), torch.empty(7)
    exact = divergence_ref(wide, z_t.double(), kind, 0.4, 1.0)
    (grad,) = torch.autograd.grad(exact.sum(), wide)
    rows_of(name)(z, loss, z_t, None, torch.ones(1), KINDS.index(kind), 0.4, 1.0, -100, 50)
    assert bool(z.isfinite().all()) and bool(loss.isfinite().all())
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(z.double(), grad, rtol=2e-3, atol=2e-3 * max(1.0, float(grad.abs().max())))


@ON
@EACH
def test_classes_that_both_mask_do_not_count(name: str, kind: str) -> None:
    """-inf in both gives the loss and gradient of the other classes, and gradient 0."""
    z, z_t = rand(5, 20), rand(5, 20, seed=1)
    found = []
    for k in (20, 14):
        a, b, loss = z[:, :k].clone(), z_t[:, :k].clone(), torch.empty(5)
        a[:, 14:] = b[:, 14:] = -math.inf
        rows_of(name)(a, loss, b, None, torch.ones(1), KINDS.index(kind), 0.5, 1.0, -100, k)
        assert not a[:, 14:].any()
        found.append((loss, a[:, :14]))
    torch.testing.assert_close(found[0], found[1])


@ON
def test_a_class_that_only_the_student_masks(name: str) -> None:
    """The forward KL is infinite, as it is; jsd stays finite, and so does its gradient."""
    for kind, finite in (("forward_kl", False), ("jsd", True)):
        z, loss = rand(3, 9), torch.empty(3)
        z[:, 4] = -math.inf
        rows_of(name)(z, loss, rand(3, 9, seed=1), None, torch.ones(1), KINDS.index(kind), 0.5, 1.0, -100, 9)
        assert bool(loss.isfinite().all()) == finite and bool(z.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_rows_ignored(dtype: torch.dtype) -> None:
    """The mean of no rows is NaN, as in F.cross_entropy, and its gradients are 0."""
    student, teacher, target = heads(dtype=dtype)
    got = results(ops.linear_divergence, student, teacher, vocab_size=33, target=target.fill_(-100))
    assert bool(got[0].isnan()) and not any(t.any() for t in got[1:])


class Bytes(TorchDispatchMode):
    """Records the largest sum of bytes of tensors with at least `least` elements that were alive at once."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.alive, self.most = least, {}, 0  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.numel() >= self.least:
                self.alive[t.untyped_storage()._cdata] = torch.multiprocessing.reductions.StorageWeakRef(
                    t.untyped_storage()
                )
        sizes = 0
        for key, ref in list(self.alive.items()):
            if ref.expired():
                del self.alive[key]
            else:
                sizes += torch.UntypedStorage._new_with_weak_ptr(ref.cdata).nbytes()
        self.most = max(self.most, sizes)
        return out


@EACH
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_of_logits_is_less_than_half_of_two_whole_tensors(kind: str, reduction: str) -> None:
    """Counts all tensors of a row's classes or more that live at once, forward and backward, by default."""
    n, v, c = 1024, 4096, 4
    student = [rand(n, c, seed=1), rand(v, c, seed=2)]
    teacher = rand(n, c, seed=4), rand(v, c, seed=5)
    two = 2 * n * v * 4
    for fn, enough in ((ops.linear_divergence, True), (linear_divergence_ref, False)):
        leaves = [t.clone().requires_grad_() for t in student]
        with Bytes(least=max(n * c, v * c) + 1) as seen:
            loss = fn(*leaves, *teacher, kind=kind, reduction=reduction)  # type: ignore[arg-type]
            loss.backward(torch.ones_like(loss))
        assert (seen.most < two / 2) == enough, seen.most / two


@EACH
def test_a_run_repeats_its_bits_and_changes_no_input(kind: str) -> None:
    student, teacher, target = heads()
    before = [t.clone() for t in (*student, *teacher, target)]
    runs = [results(ops.linear_divergence, student, teacher, kind=kind, chunk=4, target=target) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert all(torch.equal(a, b) for a, b in zip((*student, *teacher, target), before))


def test_backward_twice_and_no_gradient_for_the_teacher() -> None:
    student, teacher, _ = heads()
    leaves = [t.requires_grad_() for t in (*student, *teacher)]
    loss = ops.linear_divergence(leaves[0], leaves[1], leaves[3], leaves[4], vocab_size=33)
    loss.backward(retain_graph=True)
    once = leaves[1].grad
    assert once is not None and leaves[3].grad is None and leaves[4].grad is None
    once = once.clone()
    loss.backward()
    assert torch.equal(leaves[1].grad, 2 * once)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic: bool, reduction: str) -> None:
    student, teacher, target = heads()
    o: dict[str, Any] = dict(kind="jsd", chunk=5, temperature=1.5, reduction=reduction, target=target)
    torch._dynamo.reset()
    compiled = torch.compile(ops.linear_divergence, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for got, wanted in zip(
        results(compiled, student, teacher, **o), results(ops.linear_divergence, student, teacher, **o)
    ):
        torch.testing.assert_close(got, wanted)


def test_empty_batch() -> None:
    student, teacher, _ = heads(0)
    got = results(ops.linear_divergence, student, teacher, reduction="sum")
    assert float(got[0]) == 0 and not got[2].any() and got[1].shape == (0, 8)


def test_rows_of_a_chunk() -> None:
    assert rows_of_a_chunk(100, 50257, 4, 1 << 29) == 128
    assert rows_of_a_chunk(8192, 50257, 2, 1 << 33) == 1024  # an eighth
    assert rows_of_a_chunk(1 << 20, 50257, 2, 1 << 29) == 2560 and 2 * 2560 * 50257 * 2 <= 1 << 29


X, W, T = torch.zeros(2, 4), torch.zeros(9, 4), torch.tensor([0, 1])
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.linear_divergence(X, W[:, :3], X, W), ValueError, r"x \(2, 4\) and linear_weight \(9, 3\), expected"),
    (lambda: ops.linear_divergence(X, W, X, W[:, :3]), ValueError, r"teacher_x \(2, 4\) and teacher_weight \(9, 3\)"),
    (lambda: ops.linear_divergence(X.long(), W, X, W), TypeError, "x is torch.int64, expected a floating-point"),
    (lambda: ops.linear_divergence(X, W, 3, W), TypeError, "teacher_x is 3, expected a tensor"),  # type: ignore
    (lambda: ops.linear_divergence(X, W, X[:1], W), ValueError, "teacher_x has 1 rows, expected 2, the rows of x"),
    (lambda: ops.linear_divergence(X, W, X, W[:7]), ValueError, "vocab_size is 9, expected 1 to 7, the rows of both"),
    (lambda: ops.linear_divergence(X, W, X, W.half()), TypeError, "teacher_weight is torch.float16, expected"),
    (lambda: ops.linear_divergence(X, W, X, W, T[:1]), ValueError, r"target has shape \(1,\), expected \(2,\)"),
    (lambda: ops.linear_divergence(X, W, X, W, kind="kl"), ValueError, "kind is 'kl', expected 'forward_kl', 'rev"),
    (lambda: ops.linear_divergence(X, W, X, W, kind="jsd", beta=1.0), ValueError, "beta is 1.0, expected a number"),
    (lambda: ops.linear_divergence(X, W, X, W, temperature=0.0), ValueError, "temperature is 0.0, expected a number"),
    (lambda: ops.linear_divergence(X, W, X, W, reduction="max"), ValueError, "reduction is 'max'"),
    (lambda: ops.linear_divergence(X, W, X, W, chunk=0), ValueError, "chunk is 0, expected 'auto' or a number"),
]


@pytest.mark.parametrize("call,kind,message", ERRORS, ids=[m for _, _, m in ERRORS])
def test_errors_name_the_argument(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()

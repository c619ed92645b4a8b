"""linear_cross_entropy: registration, compile, errors, memory, accumulation, gradient buffers, extremes."""

import contextlib
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastgpt import ops, parity
from fastgpt.core import backend
from fastgpt.core.backend import use
from fastgpt.ops import _linear_cross_entropy as raw
from fastgpt.ops._upstream import expected_gradient
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy_ref, rows_at_once

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = parity.backends_here("linear_cross_entropy")
ON = pytest.mark.parametrize("name", HERE)
# many rows or launches: too slow in the interpreter
FAST = pytest.mark.parametrize("name", [n for n in HERE if n != "triton" or not backend.interpreting()])
WAYS = pytest.mark.parametrize(
    "reduction,chunk", [(r, c) for r in ("mean", "sum", "none") for c in (9, 4)], ids=lambda v: str(v)
)
PLAIN = (-100, 0.0, 0.0, 0.0, 21)
FULL = (-100, 0.1, 1e-3, 5.0, 19)


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype).to(DEVICE)


def case(
    n: int = 9, c: int = 8, v: int = 21, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x (n, c), W (v, c), b (v) and target (n) with an ignored row."""
    target = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(3))
    target[2::3] = -100
    x, w, b = rand(n, c, dtype=dtype, seed=1), rand(v, c, dtype=dtype, seed=2), rand(v, dtype=dtype, seed=3)
    return x, w, b, target.to(DEVICE)


def gradients(x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, upstream: float = 1.0, **o: Any) -> list[Tensor]:
    """Return the loss and the gradients of x, W and b; the rows of "none" have different upstream gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, b) if t is not None]
    loss = ops.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2] if b is not None else None, **o)
    rows = torch.linspace(-1, 2, len(target), device=DEVICE) if loss.dim() else loss.new_tensor(1.0)
    loss.backward(upstream * rows)
    return [loss.detach(), *(t.grad for t in leaves if t.grad is not None)]


def exact(x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, **o: Any) -> list[Tensor]:
    """Return the same from the reference in fp64."""
    with use(linear_cross_entropy="torch"):
        return gradients(*(None if t is None else t.double() for t in (x, w, b)), target, **o)  # type: ignore[arg-type]


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


def raw_calls(name: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, w, b, target = case()
    weight, rows = rand(19, seed=4).abs(), rand(9, seed=5)
    fwd, fwd_bwd = raw.LINEAR_CROSS_ENTROPY_FWD[name], raw.LINEAR_CROSS_ENTROPY_FWD_BWD[name]
    return {
        "fwd": (fwd, (x, w, None, target, None, *PLAIN, 4)),
        "fwd full": (fwd, (x, w, b, target.clamp(max=18), weight, *FULL, 4)),
        "fwd_bwd": (fwd_bwd, (x, w, None, target, None, rows[:1], *PLAIN, 4, [True, True, False])),
        "fwd_bwd full": (
            fwd_bwd,
            (x.t().contiguous().t(), w, b, target.clamp(max=18), weight, rows, *FULL, 9, [True, True, True]),
        ),
        "fwd_bwd dx alone": (fwd_bwd, (x, w, b, target, None, rows, *PLAIN, 4, [True, False, False])),
        "fwd_bwd dW alone": (fwd_bwd, (x, w, b, target, None, rows, *PLAIN, 4, [False, True, False])),
    }


@ON
@pytest.mark.parametrize("call", list(raw_calls("cpu")))
def test_opcheck(name: str, call: str) -> None:
    op, args = raw_calls(name)[call]
    torch.library.opcheck(op, args)


@ON
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk", [1000, 3, "auto"])
def test_fullgraph_compile_with_dynamic_rows(
    name: str, reduction: str, chunk: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run in one piece, in chunks, and with a budget that some sizes exceed: the bits equal eager, with one compilation
    for each way."""
    torch._dynamo.reset()
    monkeypatch.setattr(raw, "_budgets", {torch.empty(0, device=DEVICE).device: 390 * 21 * 4})

    def head(x: Tensor, w: Tensor, b: Tensor, target: Tensor) -> Tensor:
        options: dict[str, Any] = dict(label_smoothing=0.1, vocab_size=20, reduction=reduction, chunk=chunk)
        return 0.5 * ops.linear_cross_entropy(2 * x, w, target, linear_bias=b, **options)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head, fullgraph=True, backend=counter)
    with use(strict=True, linear_cross_entropy=name):
        for n in (7, 11, 391, 513) if chunk == "auto" else (7, 11):
            x, w, b, target = case(n)
            target = target.clamp(max=19)
            torch._dynamo.mark_dynamic(target, 0)
            results = []
            for fn in (compiled, head):
                leaves = [t.clone().requires_grad_() for t in (x, w, b)]
                torch._dynamo.mark_dynamic(leaves[0], 0)
                loss = fn(*leaves, target)
                loss.sum().backward()
                results.append([loss.detach(), *(t.grad for t in leaves)])
            for got, wanted in zip(*results):
                assert torch.equal(got, wanted)
    assert counter.frame_count == (2 if chunk == "auto" else 1)


X, W, T = torch.zeros(2, 4), torch.zeros(9, 4), torch.tensor([0, 1])
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ops.linear_cross_entropy(X, W[:, :3], T), ValueError, r"x \(2, 4\) and linear_weight \(9, 3\), expected"),
    (lambda: ops.linear_cross_entropy(X.long(), W, T), TypeError, "entropy: x is torch.int64, expected a floating"),
    (lambda: ops.linear_cross_entropy(X, W.half(), T), TypeError, "linear_weight is torch.float16, expected"),
    (lambda: ops.linear_cross_entropy(X, None, T), TypeError, "linear_weight is None, expected a tensor"),
    (lambda: ops.linear_cross_entropy(X, W, T, linear_bias=X[0]), ValueError, r"linear_bias has shape \(4,\)"),
    (lambda: ops.linear_cross_entropy(X, W, T, chunk=0), ValueError, "chunk is 0, expected 'auto' or a number of rows"),
    (lambda: ops.linear_cross_entropy(X, W, T, chunk="big"), ValueError, "chunk is 'big', expected 'auto'"),
    (lambda: ops.linear_cross_entropy(X, W, T[:1]), ValueError, r"target has shape \(1,\), expected \(2,\) to match x"),
    (lambda: ops.linear_cross_entropy(X, W, X[:, 0]), TypeError, "target is torch.float32, expected torch.int64"),
    (
        lambda: ops.linear_cross_entropy(X, W, T + 8),
        ValueError,
        r"y: target\[1\] is 9, expected 0 to 8 or ignore_index",
    ),
    (lambda: ops.linear_cross_entropy(X, W, T + 6, vocab_size=7), ValueError, r"target\[1\] is 7, expected 0 to 6"),
    (
        lambda: ops.linear_cross_entropy(X, W, T, vocab_size=10),
        ValueError,
        "vocab_size is 10, expected 1 to 9, the rows",
    ),
    (lambda: ops.linear_cross_entropy(X, W[:0], T), ValueError, "vocab_size is 0, expected 1 to 0"),
    (lambda: ops.linear_cross_entropy(X, W, T, weight=X[0]), ValueError, r"weight has shape \(4,\), expected \(9,\)"),
    (lambda: ops.linear_cross_entropy(X, W, T, reduction="max"), ValueError, "entropy: reduction is 'max', expected"),
    (lambda: ops.linear_cross_entropy(X, W, T, label_smoothing=2), ValueError, "entropy: label_smoothing is 2"),
]


@pytest.mark.parametrize("call,kind,message", ERRORS, ids=[m for _, _, m in ERRORS])
def test_errors_name_the_argument(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_gradcheck_of_the_reference() -> None:
    x, w, b, target = case(4, 3, 7)
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    options: dict[str, Any] = dict(label_smoothing=0.1, z_loss=0.1, softcap=3.0, vocab_size=6)
    options["weight"] = rand(6, seed=4).abs().double()

    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy_ref(x, w, target.clamp(max=5), linear_bias=b, **options)

    assert torch.autograd.gradcheck(fn, leaves)


class Sizes(TorchDispatchMode):
    """Records the elements of the largest tensor that any op received or returned, and the names of the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.ops, self.storages = 0, set[str](), dict[int, int]()  # address: elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        for t in tensors:
            at, elements = t.untyped_storage().data_ptr(), t.untyped_storage().nbytes() // t.element_size()
            self.storages[at] = max(elements, self.storages.get(at, 0))
            self.largest = max(elements, self.largest)
        self.ops.add(func.name())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@ON
def test_logits_are_never_whole_in_chunks(name: str, reduction: str, dtype: torch.dtype) -> None:
    """With 64 rows, 16 at a time, no tensor outside the raw ops or inside their driver holds more than 16 rows of V."""
    x, w, b, target = case(64, 4, 300, dtype)
    with use(strict=True, linear_cross_entropy=name):
        with Sizes() as outside, torch.no_grad():
            ops.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, chunk=16)
        assert outside.largest < 16 * 300 and f"fastgpt::linear_cross_entropy_fwd.{name}" in outside.ops
        with Sizes() as outside:
            gradients(x, w, b, target, reduction=reduction, chunk=16)
        assert outside.largest < 16 * 300 and f"fastgpt::linear_cross_entropy_fwd_bwd.{name}" in outside.ops
        with Sizes() as whole:
            gradients(x, w, b, target, reduction=reduction, chunk=64)
        assert whole.largest == 64 * 300, "this test sees whole logits where there are any"
    rest = (*PLAIN[:4], 300, 16)
    with Sizes() as inside:
        raw._fwd(name, x, w, b, target, None, *rest)
        raw.loss_and_gradients(name, x, w, b, target, None, torch.ones(64, device=DEVICE), *rest, [True, True, True])
    assert inside.largest == 16 * 300 and "aten::mm.out" in inside.ops


class Made(TorchDispatchMode):
    """Records the shapes and dtypes of all tensors that ops return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found += [(tuple(t.shape), t.dtype) for t in tree_leaves(out) if isinstance(t, Tensor)]
        return out


@ON
@pytest.mark.parametrize("kept", [False, True])
def test_backward_in_chunks_scales_the_weights_gradient_in_one_pass(name: str, kept: bool) -> None:
    """The result has the dtype of the weight, without a second (V, C) tensor in fp32, written or added."""
    x, w, _, target = case(dtype=torch.bfloat16)
    leaf = w.clone().requires_grad_()
    if kept:
        leaf.grad_buffer = torch.full_like(w, math.nan)
    with use(strict=True, linear_cross_entropy=name):
        for _ in range(2):
            loss = ops.linear_cross_entropy(x, leaf, target, chunk=4)
            with Made() as made:
                (3 * loss).backward()
            assert made.found and (tuple(w.shape), torch.float32) not in made.found
    assert leaf.grad is not None and error(leaf.grad, 6 * exact(x, w, None, target)[2]) < 2e-2


def test_offsets_past_2_31_by_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, with N V = 2^43 and N C = 2^32, the views of every chunk begin at the right offset, and no
    tensor is larger than the gradients and one chunk of logits."""
    n, c, v, chunk = 2**26 + 3, 64, 2**17, 2**24
    seen: list[tuple[int, ...]] = []

    def record(z: Tensor, loss: Tensor, target: Tensor, weight: None, scale: Tensor, *options: Any) -> None:
        offsets = [t.storage_offset() for t in (loss, target, scale)]
        assert z.is_contiguous() and z.storage_offset() == 0 and len({*offsets}) == 1
        seen.append((offsets[0], z.shape[0], *z.shape[1:]))

    starts: list[int] = []
    product = raw.product_in_fp32
    monkeypatch.setitem(raw.CROSS_ENTROPY_FWD_BWD, "cpu", record)
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())  # the meta device has none
    monkeypatch.setattr(
        raw, "product_in_fp32", lambda a, b, t, **k: starts.append(b.storage_offset()) or product(a, b, t, **k)
    )
    with torch.device("meta"):
        x, w = torch.empty(n, c), torch.empty(v, c)
        target, scale = torch.empty(n, dtype=torch.int64), torch.empty(n)
    with Sizes() as sizes:
        loss, dx, dw, _ = raw.loss_and_gradients(
            "cpu", x, w, None, target, None, scale, *PLAIN[:4], v, chunk, [True, True, False]
        )
    assert seen == [(i * chunk, min(chunk, n - i * chunk), v) for i in range(5)]
    assert starts == [i * chunk * c for i in range(5)] and starts[-1] >= 2**32
    assert loss.shape == (n,) and dx is not None and dx.shape == x.shape and dw is not None and dw.shape == w.shape
    assert sizes.largest == chunk * v


@ON
@WAYS
def test_accumulation_over_small_batches_is_one_large_batch(name: str, reduction: str, chunk: int) -> None:
    """One batch of 64 rows equals 8 batches of 8, each weighted by its counted rows, accumulated in .grad."""
    x, w, b, target = case(64, 16, 50)
    counted = int((target != -100).sum())
    with use(strict=True, linear_cross_entropy=name):
        whole = gradients(x, w, b, target, 1 / counted, reduction="sum", chunk=64)
        w1, b1 = (t.clone().requires_grad_() for t in (w, b))
        dx = []
        for xs, ts in zip(x.split(8), target.split(8)):
            leaf = xs.clone().requires_grad_()
            loss = ops.linear_cross_entropy(leaf, w1, ts, linear_bias=b1, reduction=reduction, chunk=chunk)
            share = int((ts != -100).sum()) / counted if reduction == "mean" else 1 / counted
            (share * loss.sum()).backward()
            dx.append(leaf.grad)
    for got, wanted in zip((torch.cat(dx), w1.grad, b1.grad), whole[1:]):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-7)


@FAST
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradient_does_not_get_worse_with_more_chunks(name: str, dtype: torch.dtype) -> None:
    """With 16 and 1024 chunks, the fp64 error of dW equals that of one piece. A sum in 16 bits would get worse."""
    x, w, _, target = case(1024, 16, 40, dtype)
    wanted = exact(x, w, None, target)[2]
    with use(strict=True, linear_cross_entropy=name):
        one, *more = (error(gradients(x, w, None, target, chunk=chunk)[2], wanted) for chunk in (1024, 64, 1))
    assert max(more) <= 1.1 * one, (one, more)
    dw = torch.zeros_like(w)
    logits = (x @ w.t()).float().requires_grad_()
    torch.nn.functional.cross_entropy(logits, target).backward()
    for dz, row in zip(logits.grad.to(dtype).split(1), x.split(1)):
        dw += dz.t() @ row
    assert error(dw, wanted) > 2 * one, "this test sees a sum in 16 bits"


@FAST
@WAYS
@pytest.mark.parametrize("upstream", [2.0**16, 2.0**-9])
def test_fp16_keeps_gradients_in_range(name: str, reduction: str, chunk: int, upstream: float) -> None:
    """Compare 4096 rows with the reference in fp64, with loss scaling and with a small share of a large batch.

    For a mean, gradients of the logits would be near the smallest fp16 number, and the upstream gradient times x would
    be out of range.
    """
    x, w, b, target = case(4096, 8, 200, torch.float16)
    x, w, chunk = x + 4, w / 16, 4096 if chunk == 9 else 1000
    upstream /= 1 if reduction == "mean" else int((target != -100).sum())
    options: dict[str, Any] = dict(upstream=upstream, reduction=reduction, chunk=chunk)
    with use(strict=True, linear_cross_entropy=name):
        got = gradients(x, w, b, target, **options)
    for g, e in zip(got, exact(x, w, b, target, **options)):
        assert g.isfinite().all()
        # 2^-25 is half the spacing of the smallest fp16 numbers
        assert float((g - e).norm()) <= 1e-3 * float(e.norm()) + 2.0**-25 * math.sqrt(e.numel())


@ON
@WAYS
def test_only_what_needs_a_gradient_gets_one_and_backward_repeats(name: str, reduction: str, chunk: int) -> None:
    """Try every subset of (x, W, b). A second backward with retain_graph doubles; inputs do not change."""
    x, w, b, target = case()
    weight = rand(21, seed=4).abs()
    before = [t.clone() for t in (x, w, b, target, weight)]
    options: dict[str, Any] = dict(reduction=reduction, chunk=chunk, label_smoothing=0.1, weight=weight)
    with use(strict=True, linear_cross_entropy=name):
        everything = gradients(x, w, b, target, **options)
        for needed in range(1, 8):
            leaves = [t.clone().requires_grad_(bool(needed >> i & 1)) for i, t in enumerate((x, w, b))]
            loss = ops.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
            up = torch.linspace(-1, 2, 9, device=DEVICE) if loss.dim() else None
            loss.backward(up, retain_graph=True)
            once = [None if t.grad is None else t.grad.clone() for t in leaves]
            loss.backward(up)
            for i, (leaf, first, wanted) in enumerate(zip(leaves, once, everything[1:])):
                assert (leaf.grad is not None) == bool(needed >> i & 1)
                if leaf.grad is not None and first is not None:
                    assert torch.equal(first, wanted) and torch.equal(leaf.grad, 2 * first)
        with torch.no_grad():
            torch.testing.assert_close(
                ops.linear_cross_entropy(x, w, target, linear_bias=b, **options), everything[0], rtol=1e-6, atol=1e-6
            )
    assert all(torch.equal(a, b) for a, b in zip(before, (x, w, b, target, weight)))


@ON
@WAYS
def test_nothing_beside_the_inputs_is_read(name: str, reduction: str, chunk: int) -> None:
    """Use rows in wider buffers of NaN, strided targets and class weights, and expanded upstream gradients."""
    x, w, b, target = case()
    weight = rand(21, seed=4).abs()
    wide = [torch.full((len(t), 3 * 8), math.nan, device=DEVICE) for t in (x, w)]
    for buffer, t in zip(wide, (x, w)):
        buffer[:, 8:16] = t
    apart = [torch.full((len(t), 2), 10**6 if t.dtype == torch.int64 else math.nan, dtype=t.dtype, device=DEVICE)
             for t in (b, target, weight)]  # fmt: skip
    for buffer, t in zip(apart, (b, target, weight)):
        buffer[:, 1] = t
    results = []
    with use(strict=True, linear_cross_entropy=name):
        for xs, ws, bs, ts, cs in ((x, w, b, target, weight), (*(t[:, 8:16] for t in wide), *(t[:, 1] for t in apart))):
            leaves = [t.detach().requires_grad_() for t in (xs, ws, bs)]
            options: dict[str, Any] = dict(weight=cs, reduction=reduction, chunk=chunk, label_smoothing=0.1)
            loss = ops.linear_cross_entropy(leaves[0], leaves[1], ts, linear_bias=leaves[2], **options)
            loss.sum().backward()
            results.append([loss.detach(), *(t.grad for t in leaves)])
    for plain, strided in zip(*results):
        torch.testing.assert_close(plain, strided, rtol=1e-5, atol=1e-6)


@ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@WAYS
def test_no_row_counts(name: str, reduction: str, chunk: int, dtype: torch.dtype) -> None:
    """If all rows are ignored, or there are none, gradients are 0 and "mean" is NaN, as in PyTorch."""
    for n in (9, 0):
        x, w, b, target = case(n, dtype=dtype)
        with use(strict=True, linear_cross_entropy=name):
            loss, *grads = gradients(x, w, b, torch.full_like(target, -100), reduction=reduction, chunk=chunk)
        assert loss.isnan() if reduction == "mean" else not loss.any() and loss.isfinite().all()
        assert [g.shape for g in grads] == [x.shape, w.shape, b.shape] and not any(g.any() for g in grads)


@ON
@WAYS
def test_a_target_out_of_range_on_a_device(
    name: str, reduction: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where values are not checked, the row has a NaN loss and no gradient, and the others do not change."""
    monkeypatch.setattr(sys.modules["fastgpt.ops.cross_entropy"], "checks_values", lambda t: False)
    x, w, b, target = case()
    bad, good = target.clone(), target.clone()
    bad[4], good[4] = 10**12, -100
    options: dict[str, Any] = dict(reduction="sum" if reduction == "mean" else reduction, chunk=chunk)
    with use(strict=True, linear_cross_entropy=name):
        got, wanted = gradients(x, w, b, bad, **options), gradients(x, w, b, good, **options)
    assert got[0].isnan().sum() == 1
    assert all(torch.equal(a, b) for a, b in zip(got[1:], wanted[1:]))


@ON
@WAYS
def test_runs_are_bitwise_equal(name: str, reduction: str, chunk: int) -> None:
    x, w, b, target = case(40, 64, 512)
    options: dict[str, Any] = dict(reduction=reduction, chunk=40 if chunk == 9 else 15)
    with use(strict=True, linear_cross_entropy=name):
        results = [gradients(x, w, b, target, 0.3, **options) for _ in range(3)]
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again))


@ON
@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_goes_where_it_is_kept(name: str, reduction: str, chunk: int, dtype: torch.dtype) -> None:
    """The first backward writes the buffer of a tied weight, later ones add, and the embedding adds its part."""
    x, w, b, target = case(dtype=dtype)
    ids = torch.tensor([3, 3, 20, 0, 1, 2, 3, 4, 5], device=DEVICE)
    runs = []
    for kept in (False, True):
        leaves = [t.clone().requires_grad_() for t in (w, b)]
        places = [torch.full_like(t, math.nan) for t in (w, b)]
        with use(strict=True, linear_cross_entropy=name):
            for step in range(3):
                for leaf, place in zip(leaves, places):
                    if kept:
                        leaf.grad_buffer = place
                h = torch.nn.functional.embedding(ids, leaves[0]) + x
                loss = ops.linear_cross_entropy(
                    h, leaves[0], target, linear_bias=leaves[1], reduction=reduction, chunk=chunk
                )
                (0.5 * loss.sum()).backward()
                assert all((t.grad is place) == kept for t, place in zip(leaves, places))
                if step == 1:
                    runs.append([t.grad.clone() for t in leaves if t.grad is not None])
                    for t in leaves:
                        t.grad = None
            runs.append([t.grad for t in leaves if t.grad is not None])
    unit = torch.finfo(dtype).eps
    for got, wanted in zip(runs[2] + runs[3], runs[0] + runs[1]):
        assert float((got.double() - wanted.double()).abs().max()) <= 8 * unit * float(wanted.abs().max())


@ON
@WAYS
def test_no_rows_leave_a_gradient_of_zeros_where_it_is_kept(name: str, reduction: str, chunk: int) -> None:
    x, w, _, target = case()
    w.requires_grad_().grad_buffer = torch.full(w.shape, math.nan, device=DEVICE)
    with use(strict=True, linear_cross_entropy=name):
        ops.linear_cross_entropy(x[:0], w, target[:0], reduction=reduction, chunk=chunk).sum().backward()
    assert w.grad is w.grad_buffer and not w.grad.any()


@ON
def test_chunks_need_no_tensor_of_the_size_of_a_kept_gradient(name: str) -> None:
    x, w, b, target = case(64, 40, 300)
    w.requires_grad_().grad_buffer = torch.full_like(w, math.nan)
    with use(strict=True, linear_cross_entropy=name), Sizes() as sizes:
        ops.linear_cross_entropy(x, w, target, reduction="none", chunk=16).sum().backward()
    assert w.grad is w.grad_buffer and w.grad.isfinite().all()
    large = {at for at, elements in sizes.storages.items() if elements >= w.numel()}
    assert large == {w.data_ptr(), w.grad.data_ptr()}


@ON
@pytest.mark.parametrize("chunk", [9, 4])
def test_a_place_may_be_wider_than_the_weight(name: str, chunk: int) -> None:
    """With an fp32 buffer for a bf16 weight, eight steps of accumulation lose nothing to bf16."""
    x, w, _, target = case(dtype=torch.bfloat16)
    w.requires_grad_().grad_dtype = torch.float32
    w.grad_buffer = torch.full(w.shape, math.nan, device=DEVICE)
    with use(strict=True, linear_cross_entropy=name):
        for _ in range(8):
            (ops.linear_cross_entropy(x, w, target, chunk=chunk) / 8).backward()
    assert w.grad is w.grad_buffer
    assert error(w.grad, exact(x, w.detach(), None, target)[2]) < 3e-3


@ON
@WAYS
def test_flop_counter_counts_the_products(name: str, reduction: str, chunk: int) -> None:
    """Each product counts 2 N V C: one in forward, two in backward. In chunks, "none" computes the logits twice."""
    x, w, b, target = case()
    unit = 2 * 9 * 21 * 8
    products = 4 if reduction == "none" and chunk == 4 else 3
    with use(strict=True, linear_cross_entropy=name):
        with FlopCounterMode(display=False) as counter:
            gradients(x, w, None, target, reduction=reduction, chunk=chunk)
        assert counter.get_total_flops() == products * unit
        with FlopCounterMode(display=False) as counter:
            ops.linear_cross_entropy(x, w, target, reduction=reduction, chunk=chunk)
        assert counter.get_total_flops() == unit
        with FlopCounterMode(display=False) as counter:
            leaf = w.clone().requires_grad_()
            ops.linear_cross_entropy(x, leaf, target, reduction=reduction, chunk=chunk).sum().backward()
        assert counter.get_total_flops() == (products - 1) * unit
        leaf.grad_buffer = leaf.grad
        with FlopCounterMode(display=False) as counter:
            ops.linear_cross_entropy(x, leaf, target, reduction=reduction, chunk=chunk).sum().backward()
        assert counter.get_total_flops() == (products - 1) * unit


@ON
@WAYS
def test_under_autocast_as_with_cast_inputs(name: str, reduction: str, chunk: int) -> None:
    """x, W and b have the dtype of autocast, and sums over chunks stay fp32: the bits equal those of cast tensors."""
    x, w, b, target = case(dtype=torch.float32)
    options: dict[str, Any] = dict(reduction=reduction, chunk=chunk)
    with use(strict=True, linear_cross_entropy=name):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            got = gradients(x, w, b, target, **options)
        wanted = gradients(*(t.bfloat16() for t in (x, w, b)), target, **options)
    assert [t.dtype for t in got] == [torch.float32] * 4
    assert all(torch.equal(a, b.float()) for a, b in zip(got, wanted))


@ON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction,chunk", [("sum", 9), ("mean", 9), ("sum", 4), ("mean", 4)])
def test_an_announced_gradient_takes_no_pass(name: str, dtype: torch.dtype, reduction: str, chunk: int) -> None:
    """The gradients are those of any other upstream gradient, which a backward may still get; only fp16 has to scale,
    and nothing is copied in one piece."""
    x, w, b, target = case(dtype=dtype)
    share = torch.full((1,), 0.37, device=DEVICE)
    options: dict[str, Any] = dict(reduction=reduction, chunk=chunk)
    with use(strict=True, linear_cross_entropy=name):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        with expected_gradient(share):
            loss = ops.linear_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
        with Sizes() as sizes:
            announced = torch.autograd.grad(loss.view(1), leaves, share, retain_graph=True)
        other = torch.autograd.grad(loss, leaves, torch.tensor(-2.0, device=DEVICE))
    plain, *wanted = exact(x, w, b, target, upstream=0.37, **options)
    torch.testing.assert_close(loss.double(), plain, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=0)
    unit = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for got, again, true in zip(announced, other, wanted):
        assert error(got, true) < unit and error(again, true * (-2 / 0.37)) < unit
    passes = {op for op in sizes.ops if "scale_rows" in op or "clone" in op}
    assert bool(passes) == (dtype == torch.float16 or chunk == 4)


@ON
def test_an_announced_gradient_that_changed_is_an_error(name: str) -> None:
    x, w, _, target = case()
    share = torch.full((1,), 0.37, device=DEVICE)
    with use(strict=True, linear_cross_entropy=name), expected_gradient(share):
        loss = ops.linear_cross_entropy(x.requires_grad_(), w, target, reduction="sum")
    share += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.view(1).backward(share)


def test_rows_at_once() -> None:
    """Check the documented rule: one piece within the budget, else equal pieces of a multiple of 128 rows."""
    assert rows_at_once(256, 50304, 4, 512 << 20) == 256, "GPT-2 124M at B 4, T 64 on a CPU: 51 MB"
    assert rows_at_once(65536, 50304, 2, 150754820096 // 16) == 65536, "B 64, T 1024 in bf16 on an H200"
    for n in (1, 127, 2670, 2700, 8192, 100_000):
        for v, budget in ((50304, 512 << 20), (50304, 1), (7, 10**6)):
            rows = rows_at_once(n, v, 4, budget)
            assert rows >= n if n * v * 4 <= budget else rows % 128 == 0
            if rows < n:
                assert rows == 128 or rows * v * 4 <= budget
                assert n - (n - 1) // rows * rows > rows - 128 * -(-n // rows), "no short last piece"
    assert raw.logits_budget(torch.device("cpu")) == 512 << 20


@ON
def test_auto_takes_chunks_over_the_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b, target = case(300)
    with use(strict=True, linear_cross_entropy=name):
        whole = gradients(x, w, b, target)
        monkeypatch.setattr(raw, "_budgets", {x.device: 299 * 21 * 4})
        with Sizes() as sizes:
            chunked = gradients(x, w, b, target)
    assert any("linear_cross_entropy_fwd_bwd" in op for op in sizes.ops)
    for a, e in zip(chunked, whole):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)

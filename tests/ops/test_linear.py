"""ops.linear: results of F.linear, the gradient of the weight in the buffer that keep_gradients allocated, and the CPU
kernel for few rows without gradients."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import nn, ops
from fastgpt.core import backend
from fastgpt.core.errors import UserError
from fastgpt.ops.linear import LEAST_WORK, LINEAR_FWD, LINEAR_PRODUCT, MAX_ROWS, linear_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def layer(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    made = nn.Linear(8, 5, bias=bias).to(DEVICE, dtype)
    nn.keep_gradients(made, min_numel=1)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_plain_layer(dtype: torch.dtype, bias: bool) -> None:
    ours, x, dy = layer(dtype, bias), rand(2, 3, 8, dtype=dtype), rand(2, 3, 5, seed=1, dtype=dtype)
    plain = torch.nn.Linear(8, 5, bias=bias).to(DEVICE, dtype)
    plain.load_state_dict(ours.state_dict())
    for times in (1, 2):  # the second backward adds
        grads = []
        for module in (ours, plain):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(dy)
            grads.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)
        assert ours.weight.grad is ours.weight.grad_buffer, times


def test_the_buffer_outlives_zero_grad_and_old_sums_do_not_come_back() -> None:
    module, x = layer(), rand(3, 8)
    place = module.weight.grad_buffer.data_ptr()
    module(x).sum().backward()
    once = module.weight.grad.clone()
    module.zero_grad(set_to_none=True)
    module.weight.grad_buffer.fill_(torch.nan)
    module(x).sum().backward()
    assert torch.equal(module.weight.grad, once) and module.weight.grad.data_ptr() == place


def test_a_gradient_from_elsewhere_is_added_to() -> None:
    """If the weight has another use or a gradient set by hand, autograd adds as usual and nothing is lost."""
    module, x = layer(bias=False), rand(3, 8)
    (module(x).sum() + module.weight.square().sum()).backward()
    expected = x.sum(0).expand(5, 8) + 2 * module.weight.detach()
    torch.testing.assert_close(module.weight.grad, expected)
    module.weight.grad = torch.ones_like(module.weight)
    module(x).sum().backward()
    torch.testing.assert_close(module.weight.grad, 1 + x.sum(0).expand(5, 8))


def test_what_needs_no_gradient_gets_none() -> None:
    module, x = layer(), rand(3, 8).requires_grad_()
    module.requires_grad_(False)
    module(x).sum().backward()
    assert module.weight.grad is None and x.grad is not None
    module.requires_grad_(True)
    module(x.detach()).sum().backward()
    assert module.weight.grad is not None
    with torch.no_grad():
        assert module(x).grad_fn is None


def test_retain_graph_twice_is_twice_the_gradient() -> None:
    module, x = layer(), rand(3, 8)
    y = module(x).sum()
    y.backward(retain_graph=True)
    once = module.weight.grad.clone()
    y.backward()
    torch.testing.assert_close(module.weight.grad, 2 * once)


def test_small_matrices_and_vectors_are_left_alone() -> None:
    module = torch.nn.Sequential(nn.Linear(512, 511), nn.Linear(512, 512))
    nn.keep_gradients(module)
    assert [hasattr(p, "grad_buffer") for p in module.parameters()] == [False, False, True, False]


def test_compiled_and_under_autocast_it_is_the_plain_layer() -> None:
    module, x = layer(), rand(3, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    torch.testing.assert_close(module.weight.grad, x.sum(0).expand(5, 8))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    torch.testing.assert_close(ops.linear(x, rand(4, 8)), F.linear(x, rand(4, 8)))


def test_a_buffer_from_before_a_cast_is_ignored() -> None:
    """A linear layer, an embedding and a fused head use plain gradients until keep_gradients is called again."""
    ids, target = torch.tensor([[3, 1, 2]], device=DEVICE), torch.tensor([0, 4, 1], device=DEVICE)
    table, linear = nn.Embedding(7, 8).to(DEVICE), layer(bias=False)
    nn.keep_gradients(table, min_numel=1)
    for module in (table, linear):
        module.double()
    head = torch.nn.Parameter(rand(5, 8))
    head.grad_buffer = torch.empty(4, 8, device=DEVICE)  # type: ignore[attr-defined]  # as after a vocabulary grew
    x = table(ids)
    (linear(x).sum() + ops.linear_cross_entropy(x[0].float(), head, target)).backward()
    torch.testing.assert_close(linear.weight.grad, x.detach().sum((0, 1)).expand(5, 8))
    for weight in (table.weight, linear.weight, head):
        assert weight.grad is not None and weight.grad is not weight.grad_buffer


needs_kernel = pytest.mark.skipif(
    DEVICE != "cpu" or backend.missing("cpu") is not None, reason="needs the compiled CPU kernels"
)


def weight_of(kind: torch.dtype, f: int, c: int) -> tuple[Tensor, Tensor | None]:
    """Return a weight and, if it is int8, its scale."""
    if kind != torch.int8:
        return rand(f, c, seed=1, dtype=kind), None
    draws = torch.randint(-127, 128, (f, c), generator=torch.Generator().manual_seed(1))
    return draws.to(torch.int8), rand(f, seed=2).abs() / 100


@needs_kernel
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_a_row_does_not_depend_on_the_other_rows_or_the_threads(kind: torch.dtype) -> None:
    x, (weight, scale) = rand(130, 700), weight_of(kind, 210, 700)
    whole = LINEAR_FWD["cpu"](x, weight, scale, None)
    threads = torch.get_num_threads()
    try:
        for n in (*range(1, 15), 64, 65, 130):
            torch.set_num_threads(1 + n % 3)
            assert torch.equal(LINEAR_FWD["cpu"](x[:n], weight, scale, None), whole[:n]), n
    finally:
        torch.set_num_threads(threads)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return a list that receives the shape of x in each call of the kernel."""
    calls, real = [], LINEAR_FWD["cpu"]
    monkeypatch.setitem(LINEAR_FWD, "cpu", lambda x, *rest: calls.append(tuple(x.shape)) or real(x, *rest))
    return calls


@needs_kernel
def test_few_rows_without_gradients_are_the_kernel_s(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, weight, bias = spied(monkeypatch), rand(5, 8, seed=1), rand(5, seed=2)
    for rows in ((1,), (2, 3), (MAX_ROWS,), ()):
        x = rand(*rows, 8)
        torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    assert calls == [(1, 8), (2, 3, 8), (MAX_ROWS, 8), (8,)]
    calls.clear()
    leaf = rand(2, 8).requires_grad_()
    ops.linear(leaf, weight, bias).sum().backward()
    torch.testing.assert_close(leaf.grad, weight.sum(0).expand(2, 8))
    ops.linear(rand(MAX_ROWS + 1, 8), weight)
    ops.linear(rand(2, 8).double(), weight.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(rand(2, 8), weight).dtype == torch.bfloat16
    with backend.use(linear="torch"):
        ops.linear(rand(2, 8), weight)
    torch.testing.assert_close(
        torch.vmap(ops.linear, (0, None))(rand(3, 2, 8), weight), F.linear(rand(3, 2, 8), weight)
    )
    assert not calls
    with torch.no_grad():
        ops.linear(leaf, weight)
    assert calls == [(2, 8)]


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("rows", [(3,), (2, MAX_ROWS)])
def test_narrow_weights_on_every_path(
    kind: torch.dtype, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel, compiled, and the torch backend in blocks: the values of the widened weight."""
    monkeypatch.setattr(sys.modules["fastgpt.ops.linear"], "BLOCK_NUMEL", 100)
    x, bias, (weight, scale) = rand(*rows, 33), rand(10, seed=4), weight_of(kind, 10, 33)
    weight, scale = weight.to(DEVICE), None if scale is None else scale.to(DEVICE)
    wanted = linear_ref(x, weight, bias, scale=scale)
    compiled: Callable[..., Any] = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    for fn in (ops.linear, compiled):
        torch.testing.assert_close(fn(x, weight, bias, scale=scale), wanted)
    with backend.use(linear="torch"):
        torch.testing.assert_close(ops.linear(x, weight, bias, scale=scale), wanted)


@pytest.mark.parametrize(
    "weight,x", [(rand(4, 9), rand(2, 8)), (rand(8), rand(2, 8)), (rand(4, 8), rand(2, 8).double())]
)
def test_what_does_not_fit_is_pytorch_s_error(weight: Tensor, x: Tensor) -> None:
    if weight.dim() == 1:
        torch.testing.assert_close(ops.linear(x, weight), F.linear(x, weight))
        return
    with pytest.raises(RuntimeError):
        ops.linear(x, weight)


@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_a_choice_for_all_ops_leaves_linear_as_it_is(kernels: str) -> None:
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with torch.no_grad(), ops.use(all=kernels, strict=True):
        assert torch.equal(ops.linear(x, weight), torch.full((2, 4), 3.0))
    with pytest.raises(UserError, match="all='best'|='best': expected one of"):
        ops.use(all="best")


# ---- the kernel of training ----

SIZES = [(1, 1, 1), (7, 5, 17), (97, 257, 130), (5, 513, 15), (290, 64, 300), (600, 3, 70)]  # rows, inner, columns


@needs_kernel
@pytest.mark.parametrize("a_across", [False, True])
@pytest.mark.parametrize("b_across", [False, True])
@pytest.mark.parametrize("n, c, f", SIZES)
def test_products_are_as_exact_as_pytorch_s(n: int, c: int, f: int, a_across: bool, b_across: bool) -> None:
    a = rand(c, n).t() if a_across else rand(n, c)
    b = rand(f, c, seed=1).t() if b_across else rand(c, f, seed=1)
    bias, before = rand(f, seed=2), rand(n, f, seed=3)
    memory = torch.full((n + 2, f + 3), 7.0)
    out = memory[1:-1, 1:-2]
    for add, wanted, own in (
        (False, a.double() @ b.double() + bias, torch.addmm(bias, a, b)),
        (True, before.double() + a.double() @ b.double(), torch.addmm(before, a, b)),
    ):
        out.copy_(before)
        LINEAR_PRODUCT["cpu"](a, b, None if add else bias, out, add)
        error, theirs = ((x.double() - wanted).abs().max().item() for x in (out, own))
        assert error <= 2 * theirs + torch.finfo(torch.float32).eps * wanted.abs().max().item()
        border = memory.clone()
        border[1:-1, 1:-2] = 7.0
        assert (border == 7.0).all()


@needs_kernel
def test_products_do_not_depend_on_the_threads_or_the_other_rows() -> None:
    a, b = rand(301, 700), rand(700, 210, seed=1)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            for left, rows in ((a, 301), (a[:100], 100), (a.t().contiguous().t(), 301)):
                out = torch.empty(rows, 210)
                LINEAR_PRODUCT["cpu"](left, b, None, out, False)
                found.append(out[:100])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Choose the kernel for the products of training; return the sizes of its outputs."""
    sizes, real = [], LINEAR_PRODUCT["cpu"]
    call = lambda a, b, bias, out, add: sizes.append(tuple(out.shape)) or real(a, b, bias, out, add)  # noqa: E731
    monkeypatch.setitem(LINEAR_PRODUCT, "cpu", call)
    with ops.use(linear="cpu"):
        yield sizes


@needs_kernel
@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "buffer"])
def test_training_takes_the_kernel_s_products(trained: list[tuple[int, ...]], kept: bool) -> None:
    n, c, f = 272, 160, 200
    assert n * c * f >= LEAST_WORK
    x, weight, bias = rand(2, n // 2, c).requires_grad_(), rand(f, c, seed=1), rand(f, seed=2).requires_grad_()
    weight.requires_grad_()
    if kept:
        weight.grad_buffer = torch.empty_like(weight)  # type: ignore[attr-defined]
    y, dy = ops.linear(x, weight, bias), rand(2, n // 2, f, seed=3)
    y.backward(dy)
    assert trained == [(n, f), (n, c), (f, c)]
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    wanted = F.linear(*leaves)
    wanted.backward(dy.double())
    for got, exact in zip((y, x.grad, weight.grad, bias.grad), (wanted, *(t.grad for t in leaves)), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


@needs_kernel
def test_second_derivatives_and_forward_mode_are_pytorch_s(trained: list[tuple[int, ...]]) -> None:
    x, weight = rand(256, 180).requires_grad_(), rand(190, 180, seed=1).requires_grad_()
    first = lambda fn: torch.autograd.grad(fn(x, weight).square().sum(), x, create_graph=True)[0]  # noqa: E731
    grads = [torch.autograd.grad(first(fn).square().sum(), (x, weight)) for fn in (ops.linear, F.linear)]
    assert trained  # forward, in spite of what comes later
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(ops.linear(dual, weight)).tangent
    assert tangent is not None and torch.equal(tangent, F.linear(torch.ones_like(x), weight))

"""ops.linear: results of F.linear, with the gradient of the weight in the buffer that keep_gradients allocated."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import nn, ops

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

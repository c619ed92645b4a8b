"""linear_log_probs: values and gradients against log_softmax in fp64, memory, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt import ops, parity
from fastgpt.core.backend import use

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON = pytest.mark.parametrize("name", parity.backends_here("linear_cross_entropy"))


def inputs(n: int = 9, c: int = 8, v: int = 21) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x (n, c), W (v, c), b (v) and target (n) with every third row ignored."""
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=g).to(DEVICE) for shape in ((n, c), (v, c), (v,)))
    target = torch.randint(0, v - 2, (n,), generator=g).to(DEVICE)
    target[2::3] = -100
    return x, w, b, target


def exact(x: Tensor, w: Tensor, b: Tensor, target: Tensor, softcap: float, temperature: float) -> Tensor:
    z = x @ w.t() + b
    z = softcap * torch.tanh(z / softcap) if softcap else z
    logp = (z[:, :-2] / temperature).log_softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    return torch.where(target == -100, 0.0, logp)


@ON
@pytest.mark.parametrize("chunk", [4, 9])
@pytest.mark.parametrize("softcap,temperature", [(0.0, 1.0), (3.0, 1.0), (0.0, 0.7), (3.0, 1.7)])
def test_equals_log_softmax_with_any_upstream_gradient(
    name: str, chunk: int, softcap: float, temperature: float
) -> None:
    x, w, b, target = inputs()
    upstream = torch.linspace(-2, 1, len(x), device=DEVICE)
    results = []
    for wide in (True, False):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in (x, w, b)]
        if wide:
            y = exact(*leaves, target, softcap, temperature)
        else:
            options: dict[str, Any] = dict(softcap=softcap, temperature=temperature, vocab_size=len(w) - 2)
            with use(strict=True, linear_cross_entropy=name):
                y = ops.linear_log_probs(leaves[0], leaves[1], target, linear_bias=leaves[2], chunk=chunk, **options)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))])
    for wanted, got in zip(*results):
        torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=2e-6)
    assert not results[1][0][2::3].any() and not results[1][1][2::3].any()


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that an op received or returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *(t.untyped_storage().nbytes() // t.element_size() for t in tensors)])
        return out


@ON
@pytest.mark.parametrize("chunk,kept", [(16, False), (64, True)])
def test_chunks_keep_no_logits_for_backward(name: str, chunk: int, kept: bool) -> None:
    """With 16 of 64 rows at a time, nothing of 16 rows of logits is visible outside the op or saved; with 64, all."""
    x, w, _, target = inputs(64, 4, 300)
    saved: list[int] = []
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
    with use(strict=True, linear_cross_entropy=name), Largest() as largest:
        with hooks:
            y = ops.linear_log_probs(leaves[0], leaves[1], target, chunk=chunk)
        y.backward(torch.ones_like(y))
    assert (max(saved) >= 64 * 300) == kept and (largest.elements >= 16 * 300) == kept


def test_temperature_must_be_positive() -> None:
    x, w, _, target = inputs()
    with pytest.raises(ValueError, match="linear_log_probs: temperature is 0, expected a number above 0"):
        ops.linear_log_probs(x, w, target, temperature=0)

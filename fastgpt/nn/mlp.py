"""GELU and gated MLPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.nn._hooks import fusable
from fastgpt.nn.linear import Linear
from fastgpt.nn.lora import FrozenLinear, LoraLinear
from fastgpt.nn.lora_rows import RowsLora


class GELU(nn.GELU):
    """torch.nn.GELU on the fused op; approximate is "none" (erf) or "tanh"."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.bias_gelu(input, approximate=self.approximate)


class BiasGELU(nn.Module):
    """GELU with a bias, gelu(x + bias) in one pass, for use after a linear layer without a bias.

    Args:
        num_features: size F of the last dimension of x.
        approximate: "none" (erf) or "tanh" (GPT-2).

    Shape: x (..., F) -> (..., F) in the dtype of x. Keys: bias (F,), initialised to 0.
    """

    def __init__(self, num_features: int, approximate: str = "none", device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.num_features, self.approximate = num_features, approximate
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.bias_gelu(x, self.bias, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"{self.num_features}, approximate={self.approximate!r}"


def product_and_bias(up: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the product of x with the weight of `up`, and the bias for the next op to add.

    A layer that was replaced or has hooks (others' adapters, pruning) is called as a module, and the returned bias is
    None.
    """
    if fusable(up, Linear):
        return ops.linear(x, up.weight), up.bias
    if fusable(up, LoraLinear) or fusable(up, FrozenLinear):
        return up.product(x), up.bias
    if fusable(up, RowsLora):
        y, bias = product_and_bias(up.base, x)
        return up.add(y, x), bias
    return up(x), None


class MLP(nn.Sequential):
    """torch.nn.Sequential(Linear, GELU, Linear) that adds the first bias in the same pass as GELU.

    Args:
        in_features: size C of the last dimension of x.
        hidden_features: size F between the layers.
        out_features: None means in_features.
        bias: whether both linear layers have a bias.
        approximate: "none" (erf) or "tanh" (GPT-2).

    Shape: x (..., C) -> (..., out_features). Keys: 0.weight, 0.bias, 2.weight, 2.bias.

    A first layer or activation that was replaced or has hooks (adapters, pruning) is called as a module, without that
    fusion. With FSDP, shard the MLP as a whole, not its first layer alone.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        approximate: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        out = in_features if out_features is None else out_features
        super().__init__(
            Linear(in_features, hidden_features, bias, device, dtype),
            GELU(approximate),
            Linear(hidden_features, out, bias, device, dtype),
        )

    def forward(self, input: Tensor) -> Tensor:
        gelu = self[1]
        if not (len(self) == 3 and fusable(gelu, GELU)):
            out: Tensor = super().forward(input)
            return out
        h = ops.bias_gelu(*product_and_bias(self[0], input), approximate=gelu.approximate)
        down: Tensor = self[2](h)
        return down


class SwiGLU(nn.Module):
    """Gated MLP of Llama, down_proj(act(gate_proj(x)) * up_proj(x)), with activation and product in one pass.

    Args:
        in_features: size C of the last dimension of x.
        hidden_features: size F between the layers.
        out_features: None means in_features.
        bias: whether all three layers have a bias.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), "relu2".

    Shape: x (..., C) -> (..., out_features). Keys: gate_proj.weight, up_proj.weight, down_proj.weight (and .bias).
    The names are those of Llama. For one packed projection call fastgpt.ops.swiglu(gate_up), gate first.
    Source: arXiv:2002.05202.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = False,
        activation: str = "silu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        out = in_features if out_features is None else out_features
        self.gate_proj = Linear(in_features, hidden_features, bias, device, dtype)
        self.up_proj = Linear(in_features, hidden_features, bias, device, dtype)
        self.down_proj = Linear(hidden_features, out, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = ops.swiglu(self.gate_proj(x), self.up_proj(x), activation=self.activation)
        down: Tensor = self.down_proj(h)
        return down

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"

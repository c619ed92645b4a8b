"""Linear layers of a model's blocks, and the modules of its family's file that each consists of.

The segments of a layer (fastgpt/nn/lora.py) are the modules that its family has at Hugging Face: q_proj, k_proj and
v_proj of a Llama are three segments of one packed layer, GPT-2's c_attn is one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights.families import family_for
from fastgpt.models.weights.layouts import Layout
from fastgpt.models.weights.mup import without_mup
from fastgpt.nn import Linear
from fastgpt.nn.lora import FrozenLinear, LoraLinear
from fastgpt.nn.narrow import NarrowLinear


@dataclass(frozen=True)
class Segment:
    """A module of the family's file within a layer.

    Attributes:
        module: its name at Hugging Face; of a model that no family hosts, the layer's name here.
        rows: the rows of the layer's weight that it consists of, in its order.
        fan_in_fan_out: its file keeps the weight as (in, out), as GPT-2's Conv1D.
    """

    module: str
    rows: Tensor
    fan_in_fan_out: bool

    @property
    def columns(self) -> tuple[int, int]:
        """First and last + 1 output column of the layer."""
        return int(self.rows.min()), int(self.rows.max()) + 1


def linear_layers(model: GPT, narrow: bool = False) -> dict[str, nn.Module]:
    """Return the linear layers of the blocks by name, with adapters or without.

    Args:
        narrow: include those that were converted for inference.
    """
    kinds = (Linear, FrozenLinear, LoraLinear, *((NarrowLinear,) if narrow else ()))
    return {name: m for name, m in model.named_modules() if name.startswith("blocks.") and type(m) in kinds}


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the layers with adapters by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def segments_of(name: str, rows: int, c: ModelConfig, layouts: dict[str, Layout]) -> list[Segment]:
    """Return the segments of a layer, in the order of its rows.

    Args:
        name: of the layer. rows: of its weight.
        layouts: of the model's family; empty if it has none.
    """
    layer = re.search(r"(?<=blocks\.)\d+", name)
    layout = layouts.get(re.sub(r"(?<=blocks\.)\d+", "{i}", name))
    if layout is None:
        return [Segment(name, torch.arange(rows), False)]
    index = torch.arange(rows)[:, None]
    turned = layout.shapes((rows, rows + 1), c)[0] == (rows + 1, rows)
    modules = [m.format(i=layer[0] if layer else "") for m in layout.modules]
    return [Segment(m, part.reshape(-1), turned) for m, part in zip(modules, layout.unpack(index, c), strict=True)]


def segments(model: GPT, family: str | None = None, narrow: bool = False) -> dict[str, list[Segment]]:
    """Return the segments of each linear layer of the blocks by the layer's name.

    Args:
        family: the model_type whose modules they are, where several host the model.
        narrow: as in `linear_layers`.
    """
    try:
        layouts = family_for(without_mup(model.config), family).layouts
    except UserError:
        layouts = {}
    found = linear_layers(model, narrow)
    return {n: segments_of(n, m.out_features, model.config, layouts) for n, m in found.items()}  # type: ignore[arg-type]

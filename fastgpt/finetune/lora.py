"""LoRA on fastgpt.models.gpt.GPT: put adapters into its linear layers, merge them, switch them off.

Each segment of a layer (fastgpt/models/weights/segments.py) is a module of its family at Hugging Face. So files of
PEFT, which know those modules, come in and go out exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgpt.core.errors import UserError
from fastgpt.models.gpt import GPT
from fastgpt.models.weights.segments import Segment, linear_layers, lora_layers, segments
from fastgpt.nn import Linear
from fastgpt.nn.lora import FrozenLinear, LoraLinear


@dataclass(frozen=True)
class Lora:
    """Settings of the adapters.

    Attributes:
        rank: r. alpha: the adapters' product is scaled by alpha / r, with rslora by alpha / sqrt(r).
        dropout: of the adapters' input.
        targets: regular expressions, found in a module's name here (blocks.0.attn.qkv) or at Hugging Face
            (model.layers.0.self_attn.q_proj); empty: all linear layers of the blocks.
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank is {self.rank}, expected 1 or more")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"lora.alpha is {self.alpha}, expected more than 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}, expected 0 or more and less than 1")


def add_lora(
    model: GPT, settings: Lora, *, family: str | None = None, generator: torch.Generator | None = None
) -> dict[str, LoraLinear]:
    """Freeze the model and put adapters into its linear layers, in place.

    Cast and move the model first: the adapters are fp32 (fp64 over fp64) on the device of the weights.

    Args:
        family: as in `segments`.
        generator: on the CPU, which the initial A are drawn from.

    Returns:
        The layers with adapters by name.

    Raises:
        UserError: a target is found in no name, or is not a regular expression; the model has adapters.
    """
    return insert(model, _chosen(segments(model, family), settings.targets), settings, generator)


def insert(
    model: GPT, chosen: dict[str, list[Segment]], settings: Lora, generator: torch.Generator | None = None
) -> dict[str, LoraLinear]:
    """Freeze the model and put adapters into the layers of `chosen`, for these segments; return the layers by name.

    Raises:
        UserError: the model has adapters.
    """
    if lora_layers(model):
        raise UserError("lora: the model has adapters already, expected one without")
    model.requires_grad_(False)
    layers = linear_layers(model)
    for name, found in chosen.items():
        columns = [s.columns for s in found]
        options = dict(columns=columns, rslora=settings.rslora, dropout=settings.dropout, generator=generator)
        adapted = LoraLinear(layers[name], settings.rank, settings.alpha, **options)  # type: ignore[arg-type]
        _replace(model, name, adapted)
    model.lora_dropout = settings.dropout
    return lora_layers(model)


def _chosen(found: dict[str, list[Segment]], targets: tuple[str, ...]) -> dict[str, list[Segment]]:
    """Return the segments that a target is found in; layers without any are left out."""
    try:
        patterns = {t: re.compile(t) for t in targets}
    except re.error as e:
        raise UserError(f"lora.targets: {e.pattern!r} is not a regular expression ({e})") from e
    names = [f"{layer} {s.module}" for layer, parts in found.items() for s in parts]
    for target, pattern in patterns.items():
        if not any(pattern.search(part) for name in names for part in name.split()):
            known = ", ".join(dict.fromkeys(re.sub(r".*\.\d+\.", "", name.split()[1]) for name in names))
            raise UserError(
                f"lora.targets: {target!r} is found in no layer's name, expected a part of one, like {known}"
            )

    def wanted(layer: str, s: Segment) -> bool:
        return not targets or any(p.search(layer) or p.search(s.module) for p in patterns.values())

    kept = {layer: [s for s in parts if wanted(layer, s)] for layer, parts in found.items()}
    return {layer: parts for layer, parts in kept.items() if parts}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def merge(model: nn.Module) -> None:
    """Let each layer use W + s B A, a copy of its weight, until `unmerge`."""
    for m in lora_layers(model).values():
        m.merge()


def unmerge(model: nn.Module) -> None:
    """Use the weights and the adapters again; the weights were never written to, so they are the same to the bit."""
    for m in lora_layers(model).values():
        m.unmerge()


def remove_lora(model: GPT, *, merged: bool = True) -> GPT:
    """Replace the layers with adapters by linear layers with W + s B A, or W if not `merged`; return the model.

    A merged layer over a quantised weight becomes a linear layer in the dtype that the weight had.
    """
    for name, m in lora_layers(model).items():
        if m.weight is None and not merged:
            _replace(model, name, FrozenLinear(m.store, m.bias))
            continue
        layer = Linear(m.in_features, m.out_features, bias=False, device="meta")
        weight = m.merged_weight() if merged or m.weight is None else m.weight.detach()
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = m.bias  # type: ignore[assignment]
        _replace(model, name, layer.train(m.training))
    model.lora_dropout = 0.0
    return model


def read_merged(model: GPT) -> Callable[[str], Tensor]:
    """Return a function from a parameter's name in a GPT without adapters to its value, W + s B A where there is an
    adapter: the `read` of fastgpt.models.weights.write_pretrained. The model is left as it is."""
    named, layers = dict(model.named_parameters()), dict(model.named_modules())

    def read(name: str) -> Tensor:
        layer, _, leaf = name.rpartition(".")
        m = layers[layer]
        if leaf == "weight" and isinstance(m, LoraLinear):
            return m.merged_weight()
        if leaf == "weight" and isinstance(m, FrozenLinear):
            return m.store.dense(m.store.dtype)  # type: ignore[no-any-return]
        return named[name]

    return read


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Leave the adapters out inside this context: the model is then the base, the reference of DPO for instance."""
    layers = [m for m in lora_layers(model).values() if m.enabled]
    for m in layers:
        m.enabled = False
    try:
        yield
    finally:
        for m in layers:
            m.enabled = True

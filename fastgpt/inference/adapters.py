"""Low-rank adapters by name on one base model: each row of a batch uses one of them, or none.

While a pass runs that has rows with adapters, the linear layers are replaced by layers with the adapters of these rows
(fastgpt/nn/lora_rows.py). At all other times the model is the base, untouched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.core.errors import UserError
from fastgpt.models.gpt import GPT
from fastgpt.models.weights.fingerprint import fingerprint
from fastgpt.models.weights.peft import CONFIG, HEAD, AdapterFile, read_adapter
from fastgpt.models.weights.segments import linear_layers, lora_layers, segments
from fastgpt.nn.lora import lora_scale
from fastgpt.nn.lora_rows import RowsLora

MOST_KEPT = 8  # adapters that no row uses stay among the layers' while these are at most so many


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory.

    Attributes:
        number: from 1 on; a name may be given to another adapter later, a number is not.
        layers: by the layer's name A (S r, C) of its S segments and B (S r, F), which is scaled, and 0 in the columns
            of other segments; on the model's device in the dtype of its activations.
    """

    number: int
    name: str
    layers: dict[str, tuple[Tensor, Tensor]]


class Selection:
    """Layers with some of the adapters, to use in place of the model's.

    Args:
        model: the base.
        adapters: different ones, at least one.
    """

    def __init__(self, model: GPT, adapters: Sequence[Adapter]) -> None:
        self.adapters = tuple(adapters)
        self.layers: list[tuple[nn.Module, str, RowsLora]] = []  # module to change, name there, layer
        for name, base in linear_layers(model, narrow=True).items():
            having = [(a.number, *a.layers[name]) for a in adapters if name in a.layers]
            if having:
                ranks = [torch.full((len(a),), number, device=a.device) for number, a, _ in having]
                a, b = torch.cat([a for _, a, _ in having]), torch.cat([b for _, _, b in having])
                parent, _, leaf = name.rpartition(".")
                layer = RowsLora(base, a, b, torch.cat(ranks)).eval()
                self.layers.append((model.get_submodule(parent), leaf, layer))

    @contextlib.contextmanager
    def on(self, index: Tensor) -> Iterator[None]:
        """Use the layers inside this context.

        Args:
            index: (B, 1) or (B, T) int64, `number` of each token's adapter, 0 for none.
        """
        for parent, leaf, layer in self.layers:
            layer.index = index
            parent._modules[leaf] = layer
        try:
            yield
        finally:
            for parent, leaf, layer in self.layers:
                parent._modules[leaf] = layer.base


class Adapters:
    """The adapters of a model by name.

    Args:
        model: the base, on its device, in the dtype and form that it keeps.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.named: dict[str, Adapter] = {}
        self._added = 0
        self._base: str | None = ""  # its fingerprint, which takes a while and few adapters need
        self._selection: Selection | None = None

    def base(self) -> str | None:
        """Return the fingerprint of the base, by which adapters know it; None if the weights were converted first."""
        if self._base == "":
            self._base = fingerprint(self.model)
        return self._base

    def load(self, name: str, path: str | Path) -> None:
        """Load an adapter: a folder in PEFT's format, or a run of `fastgpt finetune` with adapters.

        Raises:
            UserError: the name is taken, there is no adapter, it is damaged, is not a plain LoRA, or belongs to
                another model or other weights; or the model has adapters among its own layers.
        """
        if name in self.named:
            raise UserError(f"adapter {name} is loaded already, expected another name")
        if lora_layers(self.model):
            raise UserError(f"adapter {name}: the model has adapters of its own, expected a base without")
        parts = segments(self.model, narrow=True)
        found = read_adapter(self.model, adapter_folder(path), parts, pickled=False, base=self.base)
        self._added += 1
        self.named[name] = Adapter(self._added, name, _layers(self.model, found))

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that run with it are finished.

        Raises:
            ValueError: there is none of this name.
        """
        self.find(name)
        del self.named[name]
        self._selection = None  # its memory is freed with the last request

    def find(self, name: str) -> Adapter:
        """Return an adapter.

        Raises:
            ValueError: there is none of this name; it names those that are known.
        """
        if name not in self.named:
            known = ", ".join(self.named) or "none: no adapter is loaded"
            raise ValueError(f"Generator: adapter is {name!r}, expected {known}")
        return self.named[name]

    def select(self, wanted: Collection[Adapter]) -> Selection | None:
        """Return layers with at least these adapters, None for none. They stay the same while they suffice, because
        making them copies the adapters."""
        now = self._selection
        if not wanted:
            return None
        if now is None or not set(wanted) <= set(now.adapters):
            every = dict.fromkeys([*wanted, *(now.adapters if now is not None else ())])
            chosen = every if len(every) <= MOST_KEPT else dict.fromkeys(wanted)
            self._selection = now = Selection(self.model, sorted(chosen, key=lambda a: a.number))
        return now


def adapter_folder(path: str | Path) -> Path:
    """Return the folder with the files of an adapter: `path`, or `adapter` in a run.

    Raises:
        UserError: there is none.
    """
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    raise UserError(f"{path} has no adapter, expected {CONFIG}, or a finished run of `fastgpt finetune` with adapters")


def _layers(model: GPT, found: AdapterFile) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of each layer, as Adapter has them."""
    like: Tensor = model.get_parameter("blocks.0.norm1.weight").detach()
    scale, r = lora_scale(found.rank, found.alpha, found.rslora), found.rank
    layers = {}
    for name, parts in found.chosen.items():
        layer: Any = model.get_submodule(name)
        a = [found.state[f"{HEAD}{s.module}.lora_A.weight"] for s in parts]
        b = torch.zeros(len(parts) * r, layer.out_features, dtype=torch.promote_types(like.dtype, torch.float32))
        for i, s in enumerate(parts):
            rows = found.state[f"{HEAD}{s.module}.lora_B.weight"].to(b.dtype)
            b[i * r : (i + 1) * r, s.rows] = scale * rows.t()
        layers[name] = torch.cat(a).to(like), b.to(like)
    return layers

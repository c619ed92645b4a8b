"""Adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors.

fastgpt/models/weights/peft.py describes the format, and reads it. Written with peft 0.21.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core import tensorfile
from fastgpt.core.errors import UserError
from fastgpt.core.folders import new_folder
from fastgpt.finetune.lora import Lora, insert
from fastgpt.models.gpt import GPT
from fastgpt.models.weights import family_for
from fastgpt.models.weights.convert import finite
from fastgpt.models.weights.files import FileTensor, check_tensors, some
from fastgpt.models.weights.mup import changes_queries, without_mup
from fastgpt.models.weights.peft import BASE, CONFIG, FILE, HEAD, read_adapter, selects
from fastgpt.models.weights.segments import Segment, lora_layers, segments
from fastgpt.nn.lora import LoraLinear


def adapter_state(model: GPT, family: str | None = None) -> dict[str, Tensor]:
    """Return the adapters' tensors under PEFT's names, in the layout of PEFT's modules.

    Args:
        family: the model_type whose modules they are, where several host the model.
    """
    found = segments(model, family)
    return {
        f"{HEAD}{s.module}.lora_{which}.weight": part
        for name, m in lora_layers(model).items()
        for s, a, b in _parts(m, found[name])
        for which, part in (("A", a), ("B", b))
    }


def _parts(m: LoraLinear, parts: list[Segment]) -> Iterator[tuple[Segment, Tensor, Tensor]]:
    """Yield the segments of a layer that have adapters, with A (r, C) and B in the order of the module's rows."""
    row = 0
    for i, (start, end) in enumerate(m.columns):
        segment = next(s for s in parts if s.columns == (start, end))
        order = segment.rows.to(m.lora_B.device) - start + row
        yield segment, m.lora_A.detach()[i * m.rank : (i + 1) * m.rank], m.lora_B.detach()[order]
        row += end - start


def load_state(model: GPT, state: Mapping[str, Tensor], family: str | None = None) -> None:
    """Copy tensors, named as `adapter_state` names them, into the model's adapters.

    Raises:
        UserError: tensors are missing, too many, or of another shape.
    """
    expected = {name: tuple(t.shape) for name, t in adapter_state(model, family).items()}
    entries = {n: FileTensor(Path(), tensorfile.NAMES[t.dtype], tuple(t.shape), t.clone) for n, t in state.items()}
    check_tensors(entries, expected, re.compile("(?!)"), "adapter")
    found = segments(model, family)
    with torch.no_grad():
        for name, m in lora_layers(model).items():
            row = 0
            for i, (start, end) in enumerate(m.columns):
                s = next(s for s in found[name] if s.columns == (start, end))
                m.lora_A[i * m.rank : (i + 1) * m.rank] = state[f"{HEAD}{s.module}.lora_A.weight"].to(m.lora_A)
                order = s.rows.to(m.lora_B.device) - start + row
                m.lora_B[order] = state[f"{HEAD}{s.module}.lora_B.weight"].to(m.lora_B)
                row += end - start


def save_adapter(
    model: GPT,
    folder: str | Path,
    base_name: str | None = None,
    revision: str | None = None,
    *,
    family: str | None = None,
    base: str | None = None,
) -> None:
    """Write the adapters to a new folder that PEFT loads over the model's Hugging Face form.

    Args:
        base_name: name or path of the base model, for the record. revision: its commit on the hub.
        family: as in `adapter_state`.
        base: fingerprint of the base (fastgpt/models/weights/fingerprint.py); models with another one refuse the
            adapter.

    Raises:
        UserError: the model has no adapters, no family of transformers hosts it, values are not finite, or the folder
            exists or cannot be written.
    """
    if not lora_layers(model):
        raise UserError("adapter: the model has no adapters to save")
    state = {name: t.cpu() for name, t in adapter_state(model, family).items()}
    if bad := sorted(name for name, t in state.items() if not finite(t)):
        raise UserError(f"adapter: NaN or infinite values in {some(bad)}")
    config = adapter_config(model, base_name, family) | {"revision": revision}
    described = [(name, t.dtype, tuple(t.shape)) for name, t in sorted(state.items())]
    with new_folder(Path(folder)) as aside:
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        with (aside / FILE).open("wb") as f:
            f.write(tensorfile.header_of(described, {"format": "pt"} | ({} if base is None else {BASE: base})))
            tensorfile.write_tensors(f, described, (state[name] for name, _, _ in described))


def adapter_config(model: GPT, base_name: str | None = None, family: str | None = None) -> dict[str, Any]:
    """Return the adapter_config.json of a model with adapters.

    Raises:
        UserError: no family of transformers hosts the model.
    """
    if changes_queries(model.config):
        raise UserError("adapter: model.mup_base_head_dim scales the base's queries in other forms, expected null")
    family_for(without_mup(model.config), family)
    found, layers = segments(model, family), lora_layers(model)
    every = [s for parts in found.values() for s in parts]
    adapted = [s for name, m in layers.items() for s in found[name] if s.columns in m.columns]
    one = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": one.rank,
        "lora_alpha": one.alpha,
        "lora_dropout": one.dropout,
        "use_rslora": one.rslora,
        "fan_in_fan_out": adapted[0].fan_in_fan_out,
        "target_modules": _targets([s.module for s in every], {s.module for s in adapted}),
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _targets(every: list[str], adapted: set[str]) -> list[str]:
    """Return the shortest ends of names that select just the adapted modules: c_attn, attn.c_attn, or whole names."""
    for inner in (r"^.*\.", r"^.*?\.\d+\."):
        ends = {re.sub(inner, "", name) for name in adapted}
        if {name for name in every if selects(sorted(ends), name)} == adapted:
            return sorted(ends)
    return sorted(adapted)


def load_adapter(
    model: GPT, path: str | Path, family: str | None = None, *, base: str | None = None
) -> dict[str, LoraLinear]:
    """Freeze the model and put the adapter in a folder, as PEFT or `save_adapter` writes it, into its layers.

    Cast and move the model first: the adapters are fp32 (fp64 over fp64) on the device of the weights.

    Args:
        family: as in `adapter_state`.
        base: the model's fingerprint; an adapter that records another one is refused.

    Returns:
        The layers with adapters by name.

    Raises:
        UserError: files are missing or damaged, the adapter is not a plain LoRA or belongs to a model with other
            modules, shapes or weights, values are not finite, or the model has adapters. The model is then as it was.
    """
    found = read_adapter(model, Path(path), segments(model, family), base=lambda: base)
    settings = Lora(rank=found.rank, alpha=found.alpha, rslora=found.rslora, dropout=found.dropout)
    layers = insert(model, found.chosen, settings)
    load_state(model, found.state, family)
    return layers

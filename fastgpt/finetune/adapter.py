"""Adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module>.lora_A.weight (r, in)    base_model.model.<module>.lora_B.weight (out, r)

<module> is the Hugging Face name of a module of the model's family. PEFT scales B A by alpha / r, with use_rslora by
alpha / sqrt(r); fan_in_fan_out says that the base keeps the weight as (in, out), as GPT-2 does, and A and B are the
same there. Written and read with peft 0.21.
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
from fastgpt.finetune.lora import Lora, Segment, insert, lora_layers, segments
from fastgpt.models.gpt import GPT
from fastgpt.models.weights import family_for
from fastgpt.models.weights.convert import finite
from fastgpt.models.weights.files import FileTensor, check_tensors, open_pickle, some
from fastgpt.models.weights.huggingface import read_json
from fastgpt.nn.lora import LoraLinear

CONFIG, FILE, OLD_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
HEAD = "base_model.model."
# Keys of adapter_config.json that are read, and those that say nothing about the product
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "init_lora_weights", "bias"}
READ |= {"layers_to_transform", "layers_pattern", "exclude_modules"}
IDLE = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"}
IDLE |= {"fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
SAME_BASE = (True, False, None, "gaussian", "orthogonal", "eva")  # of init_lora_weights; others change the base


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
) -> None:
    """Write the adapters to a new folder that PEFT loads over the model's Hugging Face form.

    Args:
        base_name: name or path of the base model, for the record. revision: its commit on the hub.
        family: as in `adapter_state`.

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
            f.write(tensorfile.header_of(described, {"format": "pt"}))
            tensorfile.write_tensors(f, described, (state[name] for name, _, _ in described))


def adapter_config(model: GPT, base_name: str | None = None, family: str | None = None) -> dict[str, Any]:
    """Return the adapter_config.json of a model with adapters.

    Raises:
        UserError: no family of transformers hosts the model.
    """
    family_for(model.config, family)
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
        if {name for name in every if _selects(sorted(ends), name)} == adapted:
            return sorted(ends)
    return sorted(adapted)


def _selects(targets: list[str] | str, module: str) -> bool:
    """Return whether PEFT's target_modules select a module: by the end of its name, or one expression for all of it."""
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == t or module.endswith(f".{t}") for t in targets)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the adapter_config.json in a folder.

    Raises:
        UserError: it is missing or damaged, or describes another kind of adapter than a plain LoRA.
    """
    path = folder / CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path} has peft_type {config.get('peft_type')!r}, expected 'LORA'")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path} has bias {config['bias']!r}, expected 'none': trained biases are not read")
    if config.get("init_lora_weights", True) not in SAME_BASE:
        raise UserError(
            f"{path} has init_lora_weights {config['init_lora_weights']!r}, whose adapter belongs to a changed base; "
            "convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    if other := sorted(key for key in config.keys() - READ - IDLE if config[key]):
        raise UserError(f"{path} has {some(other)}, which fastgpt's adapters do not have: expected a plain LoRA")
    r, alpha, targets = config.get("r", 8), config.get("lora_alpha", 8), config.get("target_modules")
    numbers = type(r) is int and r > 0 and isinstance(alpha, int | float) and alpha > 0
    named = isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(t, str) for t in targets))
    if not numbers or not named or not targets:
        raise UserError(f"{path} is damaged: r is {r!r}, lora_alpha {alpha!r}, target_modules {targets!r}")
    return config


def _open(folder: Path) -> dict[str, FileTensor]:
    if (folder / FILE).is_file():
        header = tensorfile.read_header(folder / FILE)
        return {name: FileTensor(folder / FILE, e.dtype, e.shape, e.read) for name, e in header.items()}
    if (folder / OLD_FILE).is_file():
        return open_pickle(folder / OLD_FILE)
    raise UserError(f"{folder} has no adapter, expected {FILE}")


def _modules(
    config: dict[str, Any], found: dict[str, FileTensor], every: dict[str, list[Segment]], where: Path
) -> dict[str, list[Segment]]:
    """Return the segments that an adapter's configuration selects, by layer.

    Raises:
        UserError: it selects none.
    """
    partial = bool(config.get("layers_to_transform") or config.get("exclude_modules"))

    def selected(s: Segment) -> bool:
        there = not partial or f"{HEAD}{s.module}.lora_A.weight" in found
        return there and _selects(config["target_modules"], s.module)

    try:
        chosen = {layer: [s for s in parts if selected(s)] for layer, parts in every.items()}
    except re.error as e:
        raise UserError(f"{where} is damaged: target_modules is not a regular expression ({e})") from e
    chosen = {layer: parts for layer, parts in chosen.items() if parts}
    if not chosen:
        like = [s.module for parts in every.values() for s in parts]
        targets = config["target_modules"]
        targets = repr(targets) if isinstance(targets, str) else some(sorted(targets))
        raise UserError(
            f"{where} is an adapter of another model: it targets {targets}, the modules here are {some(like)}"
        )
    return chosen


def load_adapter(model: GPT, path: str | Path, family: str | None = None) -> dict[str, LoraLinear]:
    """Freeze the model and put the adapter in a folder, as PEFT or `save_adapter` writes it, into its layers.

    Cast and move the model first: the adapters are fp32 (fp64 over fp64) on the device of the weights.

    Args:
        family: as in `adapter_state`.

    Returns:
        The layers with adapters by name.

    Raises:
        UserError: files are missing or damaged, the adapter is not a plain LoRA or belongs to a model with other
            modules or shapes, values are not finite, or the model has adapters. The model is then as it was.
    """
    folder = Path(path)
    config, found = read_config(folder), _open(folder)
    chosen = _modules(config, found, segments(model, family), folder)
    r, expected = config.get("r", 8), {}
    for layer, parts in chosen.items():
        columns = model.get_submodule(layer).in_features
        for s in parts:
            expected[f"{HEAD}{s.module}.lora_A.weight"] = (r, columns)
            expected[f"{HEAD}{s.module}.lora_B.weight"] = (len(s.rows), r)
    check_tensors(found, expected, re.compile("(?!)"), f"{folder} is an adapter of another model: it")  # type: ignore[arg-type]
    state = {name: t.read() for name, t in found.items()}
    if bad := sorted(name for name, t in state.items() if not finite(t)):
        raise UserError(f"{folder} has NaN or infinite values in {some(bad)}")
    dropout, rslora = float(config.get("lora_dropout", 0.0)), bool(config.get("use_rslora", False))
    settings = Lora(rank=r, alpha=float(config.get("lora_alpha", 8)), rslora=rslora, dropout=dropout)
    layers = insert(model, chosen, settings)
    load_state(model, state, family)
    return layers

"""Read adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module>.lora_A.weight (r, in)    base_model.model.<module>.lora_B.weight (out, r)

<module> is the Hugging Face name of a module of the model's family. PEFT scales B A by alpha / r, with use_rslora by
alpha / sqrt(r); fan_in_fan_out says that the base keeps the weight as (in, out), as GPT-2 does, and A and B are the
same there. Read with peft 0.21; fastgpt/finetune/adapter.py writes them.

The header of adapter_model.safetensors may have the fingerprint of the base under BASE. PEFT does not read it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgpt.core import tensorfile
from fastgpt.core.errors import UserError
from fastgpt.models.gpt import GPT
from fastgpt.models.weights.convert import finite
from fastgpt.models.weights.files import FileTensor, check_tensors, open_pickle, some
from fastgpt.models.weights.huggingface import read_json
from fastgpt.models.weights.segments import Segment

CONFIG, FILE, OLD_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
HEAD = "base_model.model."
BASE = "base_sha256"  # key of the file's metadata; the value is that of fastgpt/models/weights/fingerprint.py
# Keys of adapter_config.json that are read, and those that say nothing about the product
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "init_lora_weights", "bias"}
READ |= {"layers_to_transform", "layers_pattern", "exclude_modules"}
IDLE = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"}
IDLE |= {"fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"}
SAME_BASE = (True, False, None, "gaussian", "orthogonal", "eva")  # of init_lora_weights; others change the base


@dataclass(frozen=True)
class AdapterFile:
    """An adapter in a folder.

    Attributes:
        rank, alpha, rslora, dropout: as in its adapter_config.json.
        chosen: the segments that it has, by layer.
        state: tensors by their names in the file.
    """

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    chosen: dict[str, list[Segment]]
    state: dict[str, Tensor]


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


def _open(folder: Path, pickled: bool) -> dict[str, FileTensor]:
    if (folder / FILE).is_file():
        header = tensorfile.read_header(folder / FILE)
        return {name: FileTensor(folder / FILE, e.dtype, e.shape, e.read) for name, e in header.items()}
    if pickled and (folder / OLD_FILE).is_file():
        return open_pickle(folder / OLD_FILE)
    raise UserError(f"{folder} has no adapter, expected {FILE}")


def selects(targets: list[str] | str, module: str) -> bool:
    """Return whether PEFT's target_modules select a module: by the end of its name, or one expression for all of it."""
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == t or module.endswith(f".{t}") for t in targets)


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
        return there and selects(config["target_modules"], s.module)

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


def read_adapter(
    model: GPT,
    folder: Path,
    every: dict[str, list[Segment]],
    *,
    pickled: bool = True,
    base: Callable[[], str | None] = lambda: None,
) -> AdapterFile:
    """Read the adapter in a folder and compare it with a model.

    Args:
        every: the model's segments, of fastgpt.models.weights.segments.
        pickled: whether tensors may come from adapter_model.bin, whose code is not run.
        base: returns the model's fingerprint, None if it is not known; called if the adapter records that of its base.

    Raises:
        UserError: files are missing or damaged, the adapter is not a plain LoRA or belongs to a model with other
            modules, shapes or weights, or values are not finite.
    """
    config, found = read_config(folder), _open(folder, pickled)
    chosen = _modules(config, found, every, folder)
    rank, expected = config.get("r", 8), {}
    for layer, parts in chosen.items():
        columns = model.get_submodule(layer).in_features
        for s in parts:
            expected[f"{HEAD}{s.module}.lora_A.weight"] = (rank, columns)
            expected[f"{HEAD}{s.module}.lora_B.weight"] = (len(s.rows), rank)
    check_tensors(found, expected, re.compile("(?!)"), f"{folder} is an adapter of another model: it")  # type: ignore[arg-type]
    recorded = tensorfile.read_metadata(folder / FILE).get(BASE) if (folder / FILE).is_file() else None
    if recorded and (own := base()) is not None and own != recorded:
        raise UserError(
            f"{folder} was trained on another base, whose weights have sha256 {recorded[:12]}..., "
            f"expected that of this model, {own[:12]}..."
        )
    state = {name: t.read() for name, t in found.items()}
    if bad := sorted(name for name, t in state.items() if not finite(t)):
        raise UserError(f"{folder} has NaN or infinite values in {some(bad)}")
    alpha, dropout = float(config.get("lora_alpha", 8)), float(config.get("lora_dropout", 0.0))
    return AdapterFile(rank, alpha, bool(config.get("use_rslora", False)), dropout, chosen, state)

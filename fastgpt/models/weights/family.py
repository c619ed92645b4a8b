"""What a family of Hugging Face models is: its config.json, and its tensors' names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.models.weights.layouts import HalfRotary, Layout

Config = dict[str, Any]
Keys = dict[str, tuple[str, Any]]  # field of ModelConfig -> key in config.json, transformers' default


@dataclass(frozen=True)
class Family:
    """A model_type of transformers.

    Attributes:
        model_type, architecture: as in config.json.
        prefix: what older files leave out in front of every name but the head's.
        layouts: module of GPT (with {i} for the layer) -> modules of the file.
        keys: settings that only have another name in config.json.
        fixed: settings that config.json does not have.
        read: the other settings from config.json, given where it lies. write: its other keys.
        rename: (old, new) starts of names, for files that use others.
    """

    model_type: str
    architecture: str
    prefix: str
    layouts: dict[str, Layout]
    keys: Keys
    fixed: dict[str, Any]
    read: Callable[[Config, str], dict[str, Any]]
    write: Callable[[ModelConfig], Config]
    rename: tuple[tuple[str, str], ...] = ()

    def model_config(self, config: Config, where: str = "config.json") -> ModelConfig:
        """Return the ModelConfig of a config.json.

        Raises:
            UserError: a setting that the model does not have, or a value that makes no model.
        """
        for key in ("quantization_config", "add_cross_attention", "scale_attn_by_inverse_layer_idx"):
            if config.get(key):
                raise UserError(f"{where} has {key}, which fastgpt's model does not have")
        plain = {ours: config.get(theirs, default) for ours, (theirs, default) in self.keys.items()}
        try:
            return ModelConfig(**{**plain, **self.fixed, **self.read(config, where)})
        except (TypeError, ValueError, KeyError, ZeroDivisionError) as e:
            raise UserError(f"{where} is damaged: its values make no {self.model_type} model ({e})") from e

    def config(self, c: ModelConfig) -> Config:
        """Return the config.json of a model, without dtype and token ids."""
        values = settled(c)
        plain = {theirs: values[ours] for ours, (theirs, _) in self.keys.items()}
        return {"model_type": self.model_type, "architectures": [self.architecture], **plain, **self.write(c)}

    def hosts(self, c: ModelConfig) -> bool:
        """Return whether the family's config.json describes this model exactly."""
        try:
            return not self.differences(c)
        except UserError:
            return False

    def differences(self, c: ModelConfig) -> list[str]:
        """Return the settings of a model that the family's config.json does not keep.

        Raises:
            UserError: the config.json makes no model.
        """
        back, here = settled(self.model_config(self.config(c))), settled(c)
        if any(isinstance(layout, HalfRotary) for layout in self.layouts.values()):
            back["rope_interleaved"] = here["rope_interleaved"]  # HalfRotary reorders the heads' columns
        return [f"model.{k} {here[k]!r}" for k in here if k not in TRAINING and here[k] != back[k]]


TRAINING = {"embed_dropout", "attn_dropout", "resid_dropout", "init_std", "vocab_multiple"}  # change no logits


def settled(c: ModelConfig) -> dict[str, Any]:
    """Return the fields of a ModelConfig with defaults filled in, and those without effect at one value."""
    rope = c.positions == "rope"
    dynamic = rope and c.rope_scaling is not None and c.rope_scaling["rope_type"] == "dynamic"
    windows = [c.window_of(i) for i in range(c.n_layers)]
    return dataclasses.asdict(c) | {
        "block_size": None if dynamic else c.block_size,  # any length is right
        "n_kv_heads": c.kv_heads,
        "head_dim": c.d_head,
        "mlp_width": c.d_mlp,
        "rotary_dim": c.rotary if rope else None,
        "rope_theta": float(c.rope_theta) if rope else None,
        "rope_scaling": c.rope_scaling if rope else None,
        "rope_interleaved": rope and c.rope_interleaved,
        "norm_bias": c.norm == "layer" and c.norm_bias,
        "attn_scale": c.score_scale or 1 / math.sqrt(c.d_head),
        "mup_base_width": None if c.width_ratio == 1.0 else c.mup_base_width,
        "mup_base_head_dim": None,  # attn_scale says it
        "window": [None if w is None or w >= (c.block_size or math.inf) else w for w in windows],
    }


# config.json's names of activations; the first name of each is the one that is written
GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu"}
PLAIN = GELUS | {"relu2": "relu2"}
GATES = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}
GATES |= {"gelu": "geglu", "relu2": "reglu2"}


def activation(config: Config, key: str, default: str, names: dict[str, str], where: str) -> dict[str, str]:
    name = config.get(key, default)
    if name not in names:
        raise UserError(f"{where} has {key} {name!r}, expected one of {', '.join(names)}")
    return {"activation": names[name]}


def written(c: ModelConfig, names: dict[str, str]) -> str:
    return next((name for name, ours in names.items() if ours == c.activation), c.activation)


def one_window(windows: list[int | None]) -> int | list[int | None] | None:
    """Return the shortest list that gives each layer its window, or one window for all."""
    for n in range(1, len(windows) + 1):
        if all(w == windows[i % n] for i, w in enumerate(windows)):
            return windows[0] if n == 1 else windows[:n]
    return None


def same_window(c: ModelConfig) -> int | None:
    """Return the window of the layers that have one; -1 if they differ, which no family can say."""
    sizes = {w for i in range(c.n_layers) if (w := c.window_of(i)) is not None}
    return None if not sizes else sizes.pop() if len(sizes) == 1 else -1

"""Models in Hugging Face's form: config.json and safetensors, which transformers loads without code of fastgpt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.core.folders import new_folder
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.weights.convert import Weights, file_tensors, parameters
from fastgpt.models.weights.families import family_for, family_of
from fastgpt.models.weights.files import SHARD_BYTES, open_folder, write_folder
from fastgpt.models.weights.meta_llama import META_LLAMA, PARAMS, open_meta
from fastgpt.models.weights.mup import folded
from fastgpt.nn.lora import FrozenLinear, LoraLinear

CONFIG = "config.json"


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is damaged ({e})") from e
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return content


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of config.json, or of params.json in a folder as Meta publishes them.

    Raises:
        UserError: it is missing or damaged.
    """
    return read_json(folder / (CONFIG if (folder / CONFIG).is_file() or not (folder / PARAMS).is_file() else PARAMS))


def open_pretrained(folder: str | Path) -> Weights:
    """Check the model in a folder, without reading its weights; the result has its `config` and reads parameters.

    Raises:
        UserError: files that are missing or damaged, a model that fastgpt's is not, or tensors that do not fit it.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    if not (folder / CONFIG).is_file():
        found, config = open_meta(folder, settings)
        return Weights(found, META_LLAMA, config, str(folder))
    family = family_of(settings, str(folder / CONFIG))
    config = family.model_config(settings, str(folder / CONFIG))
    return Weights(open_folder(folder), family, config, str(folder))


def load_pretrained(folder: str | Path, *, dtype: torch.dtype | None = None, device: Any = "cpu") -> GPT:
    """Load the model in a folder, in evaluation mode; `dtype` is by default that of its weights.

    Raises:
        UserError: as open_pretrained, or weights that are not finite.
    """
    weights = open_pretrained(folder)
    with torch.device("meta"):
        model = GPT(weights.config)
    model = model.to(dtype=dtype or weights.dtype).to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights.read(name))
    return model.eval()


def write_pretrained(
    folder: Path,
    c: ModelConfig,
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    model_type: str | None = None,
    extra: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and the weights into an existing folder, one parameter at a time.

    Args:
        read: returns a parameter by fastgpt's name.
        model_type: the family to write where several host the model.
        extra: further keys of config.json, like eos_token_id.

    Raises:
        UserError: no family hosts the model, or weights are not finite in `dtype`.
        OSError: the files cannot be written.
    """
    c, read = folded(c, read)
    family = family_for(c, model_type)
    name = str(dtype).removeprefix("torch.")
    config = family.config(c) | {"dtype": name, "torch_dtype": name, "use_cache": True} | (extra or {})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    described = [(f, dtype, shape) for p in parameters(family, c) for f, shape in zip(p.files, p.shapes)]
    write_folder(folder, described, (t for _, t in file_tensors(family, c, read, dtype)), shard_bytes)


def save_pretrained(model: GPT, folder: str | Path, *, dtype: torch.dtype | None = None, **options: Any) -> None:
    """Write a model to a new folder, in `dtype` (default: its own); options as in write_pretrained.

    Raises:
        UserError: as write_pretrained, or the folder exists or cannot be written, or the model has adapters.
    """
    if any(isinstance(m, LoraLinear | FrozenLinear) for m in model.modules()):
        raise UserError(
            "save_pretrained: the model has adapters or a quantised base, expected remove_lora(model) first"
        )
    named = dict(model.named_parameters())
    dtype = dtype or next(iter(named.values())).dtype
    with new_folder(Path(folder)) as aside:
        write_pretrained(aside, model.config, lambda name: named[name], dtype=dtype, **options)

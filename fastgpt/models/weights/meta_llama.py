"""Llama as Meta publishes it: params.json and one consolidated.00.pth, whose heads rotate adjacent pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.models.weights.family import Config, Family
from fastgpt.models.weights.files import FileTensor, open_pickle
from fastgpt.models.weights.layouts import Layout, Split, Vocabulary
from fastgpt.models.weights.llama_families import NO_BIAS, OF_RMS

PARAMS, FILE = "params.json", "consolidated.00.pth"
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 8192}  # use_scaled_rope of Llama 3.1


def _read(params: Config, where: str) -> dict[str, Any]:
    scaled = bool(params.get("use_scaled_rope"))
    return {"rope_scaling": SCALED if scaled else None, "block_size": 131072 if scaled else 8192}


def _write(c: ModelConfig) -> Config:
    raise UserError("Meta's form of Llama is not written")


META_LLAMA = Family(
    "meta_llama",
    "LlamaForCausalLM",
    "",
    {
        "wte": Vocabulary(("tok_embeddings",)),
        "norm_f": Layout(("norm",)),
        "head": Vocabulary(("output",)),
        "blocks.{i}.norm1": Layout(("layers.{i}.attention_norm",)),
        "blocks.{i}.norm2": Layout(("layers.{i}.ffn_norm",)),
        "blocks.{i}.attn.qkv": Split(tuple(f"layers.{{i}}.attention.w{x}" for x in "qkv")),
        "blocks.{i}.attn.proj": Layout(("layers.{i}.attention.wo",)),
        "blocks.{i}.mlp.up": Split(("layers.{i}.feed_forward.w1", "layers.{i}.feed_forward.w3")),
        "blocks.{i}.mlp.down": Layout(("layers.{i}.feed_forward.w2",)),
    },
    {
        "n_layers": ("n_layers", 32),
        "n_heads": ("n_heads", 32),
        "n_kv_heads": ("n_kv_heads", None),
        "width": ("dim", 4096),
        "mlp_width": ("mlp_width", None),
        "vocab_size": ("vocab_size", None),
        "norm_eps": ("norm_eps", 1e-5),
        "rope_theta": ("rope_theta", 10000.0),
    },
    OF_RMS | NO_BIAS | {"activation": "swiglu", "rope_interleaved": True, "tied": False},
    _read,
    _write,
)


def open_meta(folder: Path, params: Config) -> tuple[dict[str, FileTensor], ModelConfig]:
    """Return the tensors of consolidated.00.pth and the model's settings, whose sizes the tensors complete.

    Raises:
        UserError: the file is missing or damaged, or there are more of them, each with a part of every tensor.
    """
    if (folder / "consolidated.01.pth").is_file():
        raise UserError(f"{folder} has several consolidated.*.pth, expected {FILE} alone")
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} has {PARAMS}, but no {FILE}")
    found = {name: t for name, t in open_pickle(folder / FILE).items() if name != "rope.freqs"}
    sizes = {"vocab_size": "tok_embeddings.weight", "mlp_width": "layers.0.feed_forward.w1.weight"}
    if lost := [name for name in sizes.values() if name not in found]:
        raise UserError(f"{folder / FILE} misses {', '.join(lost)}")
    known = params | {key: found[name].shape[0] for key, name in sizes.items()}
    return found, META_LLAMA.model_config(known, str(folder / PARAMS))

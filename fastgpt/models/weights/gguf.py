"""GGUF, the format of llama.cpp, written through its `gguf` package with the tokenizer in the file.

Matrices have the type asked for; norms, biases and tables of positions are fp32, as llama.cpp's own converter writes
them. A file holds query and key heads of the llama architecture in adjacent pairs, of the others in halves.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.models.weights.convert import file_tensors, parameters
from fastgpt.models.weights.families import FAMILIES
from fastgpt.models.weights.family import Family
from fastgpt.models.weights.layouts import adjacent_pairs
from fastgpt.models.weights.mup import folded
from fastgpt.models.weights.tokenizer import merges_of
from fastgpt.ops._rope_scaling import rope_frequencies

# types of matrices -> gguf's name, llama.cpp's number of the file's type
TYPES = {"fp32": ("F32", 0), "fp16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7)}
ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")
NORMAL, CONTROL, UNUSED = 1, 3, 5  # types of tokens
NAMES = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "lm_head": "output", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(file: str) -> str:
    """Return GGUF's name of a tensor of a Hugging Face file."""
    module, _, leaf = file.rpartition(".")
    for start in ("transformer.h.", "model.layers."):
        if module.startswith(start):
            layer, _, inner = module.removeprefix(start).partition(".")
            return f"blk.{layer}.{NAMES[inner]}.{leaf}"
    return f"{NAMES[module]}.{leaf}"


def family_in_gguf(c: ModelConfig) -> Family:
    """Return the architecture that hosts a model in llama.cpp.

    Raises:
        UserError: none does.
    """
    scaling = None if c.rope_scaling is None else c.rope_scaling["rope_type"]
    windows = any(c.window_of(i) is not None for i in range(c.n_layers))
    found = next((FAMILIES[name] for name in ARCHITECTURES if FAMILIES[name].hosts(c)), None)
    ok = c.attn_scale is None and c.activation in ("gelu_tanh", "swiglu") and not windows
    if found is None or not ok or scaling in ("dynamic", "yarn"):
        expected = f"one of {', '.join(ARCHITECTURES)} with its own activation, no window, and linear or llama3 scaling"
        raise UserError(f"export: gguf does not host this model, expected {expected}")
    return found


def write(
    folder: Path,
    c: ModelConfig,
    read: Callable[[str], Tensor],
    kind: str,
    tokenizer: str,
    eot: int,
    bos: int | None = None,
) -> None:
    """Write model.gguf, one parameter at a time.

    Args:
        kind: type of the matrices, a key of TYPES.
        tokenizer: content of tokenizer.json, a byte-level BPE like GPT-2's. eot: id that ends a text.
        bos: id before every prompt; None: prompts get none.

    Raises:
        UserError: gguf is not installed, or llama.cpp does not host the model.
    """
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError:
        raise UserError("--format gguf needs the gguf package, expected `pip install gguf`") from None
    c, read = folded(c, read)
    family, spec = family_in_gguf(c), json.loads(tokenizer)
    if not merges_of(spec):
        raise UserError("export: the tokenizer has no merges, expected one at least; llama.cpp loads no file without")
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), family.model_type)
    _settings(writer, gguf, c, family.model_type, TYPES[kind][1])
    _tokens(writer, spec, c.vocab_size or 0, eot, bos)
    extra = {} if (freqs := _stretch(c)) is None else {"rope_freqs.weight": freqs}
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    shapes = {f: s for p in parameters(family, c) for f, s in zip(p.files, p.shapes)}
    for file, shape in shapes.items():
        shape = shape[::-1] if _transposed(file, family) else shape
        quant = _type_of(gguf, file, shape, kind)
        data = gguf.quants.quant_shape_to_byte_shape(shape, quant)
        size = int(np.prod(data))
        raw = np.dtype(np.float32) if quant == gguf.GGMLQuantizationType.F32 else np.dtype(np.uint8)
        writer.add_tensor_info(gguf_name(file), shape if raw == np.float32 else data, raw, size, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in extra.values():
        writer.write_tensor_data(values)
    for file, t in file_tensors(family, c, read, torch.float32):
        t = t.t() if _transposed(file, family) else t
        if family.model_type == "llama" and file.split(".")[-2] in ("q_proj", "k_proj"):
            t = adjacent_pairs(t, c)
        quant = _type_of(gguf, file, tuple(t.shape), kind)
        writer.write_tensor_data(gguf.quants.quantize(t.contiguous().numpy(), quant))
    writer.close()


def _transposed(file: str, family: Family) -> bool:
    return family.model_type == "gpt2" and file.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def _type_of(gguf: Any, file: str, shape: tuple[int, ...], kind: str) -> Any:
    """Return the type of a tensor; rows that q8_0's blocks of 32 do not fill are fp16."""
    types = gguf.GGMLQuantizationType
    if len(shape) == 1 or file.endswith("wpe.weight"):
        return types.F32
    return types.F16 if kind == "q8_0" and shape[-1] % 32 else types[TYPES[kind][0]]


def _settings(writer: Any, gguf: Any, c: ModelConfig, architecture: str, file_type: int) -> None:
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.width)
    writer.add_feed_forward_length(c.d_mlp)
    writer.add_block_count(c.n_layers)
    writer.add_head_count(c.n_heads)
    writer.add_file_type(file_type)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(c.norm_eps)
        return
    writer.add_vocab_size(c.vocab_size)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.d_head)
    writer.add_value_length(c.d_head)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_dimension_count(c.rotary)
    writer.add_rope_freq_base(float(c.rope_theta))
    if c.rope_scaling is not None and c.rope_scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(c.rope_scaling["factor"]))


def _stretch(c: ModelConfig) -> npt.NDArray[np.float32] | None:
    """Return what divides the frequency of each pair with llama3's scaling, (D/2,)."""
    if c.rope_scaling is None or c.rope_scaling["rope_type"] != "llama3":
        return None
    plain, scaled = (rope_frequencies(c.rotary, c.rope_theta, s) for s in (None, c.rope_scaling))
    stretched: npt.NDArray[np.float32] = (plain / scaled).float().numpy()
    return stretched


def _tokens(writer: Any, spec: dict[str, Any], vocab_size: int, eot: int, bos: int | None) -> None:
    """Add the vocabulary and the merges; ids beyond the tokenizer's are tokens that are not used."""
    specials = {t["content"]: int(t["id"]) for t in spec["added_tokens"]}
    known = {int(i): token for token, i in (spec["model"]["vocab"] | specials).items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([known.get(i, f"[unused{i}]") for i in range(vocab_size)])
    special = set(specials.values())
    kinds = [CONTROL if i in special else NORMAL if i in known else UNUSED for i in range(vocab_size)]
    writer.add_token_types(kinds)
    writer.add_token_merges(merges_of(spec))
    writer.add_bos_token_id(eot if bos is None else bos)
    writer.add_eos_token_id(eot)
    writer.add_add_bos_token(bos is not None)

"""fastgpt in transformers' own registries, for models that are not patched.

`register_attention()` adds the attention implementation "fastgpt": `from_pretrained(...,
attn_implementation="fastgpt")` and `model.set_attn_implementation("fastgpt")` then run attention on the op, in every
model that uses transformers' AttentionInterface.

`patch_mapping("llama")` is a mapping for transformers' `register_patch_mapping`: models of these types are patched
while they are built, so `from_pretrained` returns a patched model.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from fastgpt.core.errors import UserError
from fastgpt.ops._attention import attention_mask as full_mask
from fastgpt.patching import _attention, patch

NAME = "fastgpt"
# Types whose layers hand the mask to their attention function as it is, so it may have fastgpt's form (`_attention`).
# The others get PyTorch's mask: None where causal order is all, else (B, 1, T, S) bool, for PyTorch's attention.
COMPACT = frozenset(
    ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2")
)


def register_attention(name: str = NAME) -> str:
    """Register fastgpt's attention and its masks in transformers, and return the name.

    Args:
        name: the value of `attn_implementation` that selects it.
    """
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    return name


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention as transformers' attention functions do: q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, T, H,
    D), None. What the op does not cover (4D masks, sinks, position biases, paged caches) runs on transformers' code."""
    y: tuple[Tensor, Tensor | None] = _attention.attention(
        _library, False, module, query, key, value, attention_mask, **options
    )
    return y


def _library(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention on transformers' code: on PyTorch's function, or on the model's eager function if the call has
    a softcap or sinks, which PyTorch's function lacks."""
    if _attention.is_ours(attention_mask):
        attention_mask = _in_full(attention_mask, query, key)
    eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if eager is None or (options.get("softcap") is None and options.get("s_aux") is None):
        made: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return made
    if attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        shape = (query.shape[2], key.shape[2])  # as PyTorch aligns causal order: at the first key
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, lowest)
    return eager(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]


def _in_full(seen: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return a mask of fastgpt's form as (B, 1, T, S) bool."""
    which: dict[str, Any] = dict.fromkeys(("cu_seqlens_q", "doc_ids", "kv_lens", "kv_start"))
    if seen.shape[1]:
        which |= dict(kv_start=seen[:, 0, 0], kv_lens=seen[:, 1, 0])
        which["doc_ids"] = seen[:, 2:, 0] if seen.shape[1] > 2 else None
    q, k = query.transpose(1, 2), key.transpose(1, 2)
    full = full_mask(q, k, dict(causal=True, window=seen.shape[2] - 1 or None, **which))
    assert full is not None
    return full.expand(len(seen), 1, *full.shape[-2:])


def mask(**given: Any) -> Tensor | None:
    """Create a mask for `attention`, with the arguments of transformers' mask functions.

    Raises:
        ValueError: the model has its own attention code, which reads no registry and would not understand the mask.
    """
    kind = getattr(given.get("config"), "model_type", "")
    if not _uses_registry(type(given.get("config")).__module__):
        raise ValueError(
            f"attn_implementation={NAME!r}: the attention of {kind} models does not use transformers' "
            f"AttentionInterface; load the model without it and use fastgpt.patch"
        )
    if kind in COMPACT and "allow_is_bidirectional_skip" not in given:
        return _attention.mask(masking_utils.sdpa_mask, **given)
    made: Tensor | None = masking_utils.sdpa_mask(**given)
    return made


@torch.compiler.assume_constant_result
def _uses_registry(configuration: str) -> bool:
    """Return whether the model file beside a configuration's refers to the registry; True where there is no such
    file."""
    return _refers(configuration)


@functools.cache
def _refers(configuration: str) -> bool:
    name = configuration.replace(".configuration_", ".modeling_")
    if name == configuration or not name.startswith("transformers.models.") or not importlib.util.find_spec(name):
        return True
    return hasattr(importlib.import_module(name), "ALL_ATTENTION_FUNCTIONS")


def patch_mapping(*model_types: str, **options: Any) -> dict[str, type[nn.Module]]:
    """Return a mapping for `transformers.monkey_patching.register_patch_mapping`.

    The base model (LlamaModel) is exchanged for a subclass of the same name whose constructor calls `fastgpt.patch` on
    it: norms, MLPs, attention, rotations and embeddings. The head and the loss are outside it; for these call
    `fastgpt.patch` on the loaded model instead.

    Args:
        model_types: such as "llama", as in a config.json.
        options: of `fastgpt.patch`.

    Raises:
        UserError: transformers has no such type.
    """
    mapping = {}
    for kind in model_types:
        names = MODEL_MAPPING_NAMES.get(kind)
        if names is None:
            raise UserError(f"patch_mapping: transformers has no model of the type {kind!r}")
        for name in (names,) if isinstance(names, str) else names:
            # transformers searches every key as a pattern in all names: GemmaModel is in PaliGemmaModel, too
            mapping[f"^{name}$"] = _patched(getattr(transformers, name), options)
    return mapping


def _empty(cls: Any) -> Any:
    """Return an object of a class without calling its constructor, for pickle."""
    return cls.__new__(cls)


def _patched(base: Any, options: dict[str, Any]) -> type[nn.Module]:
    """Return a subclass of a model class that patches itself, under the same name."""

    class Patched(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            patch(self, quiet=True, **options)

        def __reduce_ex__(self, protocol: Any) -> Any:  # pickle finds the class by its name, which is base's
            return _empty, (base,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    Patched.__name__, Patched.__qualname__, Patched.__doc__ = base.__name__, base.__qualname__, base.__doc__
    Patched.__module__ = base.__module__
    return Patched

"""Find what the ops can replace in models of Hugging Face transformers; imported only for such models.

Attention is recognised by the registry of attention functions that its forward looks up, and by what its eager function
or method computes on a few random numbers, or by its source, see `_inline`; see `_attention` for its replacement, and
`_loss` for the head and the loss.
A base model gets masks of ours only if no module below it computes with a mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastgpt.patching import _attention, _eager, _inline, _loss, _masks, _rebind
from fastgpt.patching._recognise import Found, name_of

NEO = "GPTNeoSelfAttention"  # its `_attn` adds its own mask to that of the model
METHOD = "_attn"  # eager attention, in models without a registry
LAST_QUERIES = "_maybe_slice_kv_shared_inputs"  # Gemma 4's method that slices masks
OWN_WAY = "it computes attention in its own way"


def find(name: str, module: nn.Module, keep_logits: bool) -> Iterator[tuple[str, nn.Module, Found]]:
    """Find attention, masks and the loss."""
    if not type(module).__module__.startswith("transformers.") and not isinstance(module, PreTrainedModel):
        return
    if isinstance(module, PreTrainedModel):
        yield from _base_model(name, module)
    for found in _attends(module):
        yield name, module, found
    if isinstance(module, PreTrainedModel) and _has_loss(module):
        yield from _loss.find(name, module, keep_logits)


def _has_loss(model: Any) -> bool:
    """Return whether a model takes labels, and has a head over a vocabulary or calls its loss function."""
    code = _rebind.innermost(type(model).forward).__code__
    takes = "labels" in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if not takes and type(model).__module__.startswith("transformers."):
        return False
    calls = takes and "loss_function" in code.co_names
    return calls or isinstance(_loss.output_embeddings(model), nn.Module)


def _attends(module: Any) -> Iterator[Found]:
    """Find the attention of a module of transformers: its attention function, or a method that computes it."""
    what, found = name_of(module), False
    if hasattr(type(module), METHOD) and _from_transformers(type(module).forward):
        neo = what == NEO
        how: Any = _neo_window(module) if neo else _eager.method(module)
        if how is not None:
            call: Any = _attention.gpt_neo if neo else _eager.attend
            yield Found("attention", what, "attention", attribute=METHOD, call=call, arguments=(how,))
            return
    for attribute, f in _rebind.methods(module):
        inner = _rebind.innermost(f)
        if not _from_transformers(inner) or not _rebind.refers(inner, ALL_ATTENTION_FUNCTIONS):
            continue
        found = True
        if why := _eager.refusal(inner, module) or _biased(inner):
            yield Found("attention", what, why=why)
            continue
        options: dict[str, Any] = dict(function=ALL_ATTENTION_FUNCTIONS, call=_attention.FUNCTIONS)
        yield Found("attention", what, "attention", attribute=attribute, **options)
    if hasattr(module, "_upcast_and_reordered_attn"):
        attribute = "_upcast_and_reordered_attn"
        yield Found("attention", what, "attention", attribute=attribute, call=_attention.gpt2_upcast)
    forward = _rebind.innermost(type(module).forward)
    if not found and _from_transformers(forward) and _inline.writes_attention(forward, module):
        rebound = _rebind.rebind(type(module).forward, _inline.REPLACEMENTS)
        names = tuple(inspect.signature(forward).parameters)[1:]
        yield Found("attention", what, "attention", call=_inline.inline, arguments=(rebound, names))
    elif not found and is_attention(module):
        yield Found("attention", what, why=OWN_WAY)


def _biased(f: Any) -> str:
    """Return why the op cannot compute what f asks of its attention function."""
    named = {*f.__code__.co_varnames, *(n for c in f.__code__.co_consts if isinstance(c, tuple) for n in c)}
    return "it adds a bias of positions to the scores" if "position_bias" in named else ""


def is_attention(module: nn.Module) -> bool:
    """Return whether a module's class says that it is attention, and no child's does."""
    if not type(module).__module__.startswith("transformers."):
        return False
    inner = any("attention" in name_of(m).lower() for m in module.modules() if m is not module)
    return name_of(module).endswith("Attention") and not inner


def _from_transformers(function: Any) -> bool:
    return str(function.__module__).startswith("transformers.models.")


def _neo_window(module: Any) -> int:
    """Return how many keys a GPT-Neo layer sees back from a token; 0: all. The mask built by the constructor decides,
    not the config."""
    if module.attention_type != "local":
        return 0
    return int(module.config.window_size if module.bias.is_meta else module.bias[0, 0, -1].sum())


def _base_model(name: str, model: Any) -> Iterator[tuple[str, nn.Module, Found]]:
    """Find the methods of a base model that create the masks of its attention modules."""
    what = f"masks of {name_of(model)}"
    makers = {a: f for a, f in _rebind.methods(model) if _from_transformers(f) and _attention.makes_masks(f)}
    makers.pop("create_masks_for_generate", None)  # for static caches, which the op does not cover
    if not makers:
        return
    if why := _strange(model, makers):  # it would get masks that it does not understand
        yield name, model, Found("attention", what, why=why)
        return
    only_eager = any(f.attribute == METHOD or f.call is _inline.inline for m in model.modules() for f in _attends(m))
    forward = makers.pop("forward", None)
    rebound = None if forward is None else _attention.with_our_masks(forward, only_eager)
    yield name, model, Found("attention", what, "attention", call=_attention.base_model, arguments=(rebound,))
    for attribute, f in makers.items():
        arguments = (attribute, _attention.with_our_masks(f, only_eager))
        yield (
            name,
            model,
            Found("attention", what, "attention", attribute=attribute, call=_attention.own_masks, arguments=arguments),
        )
    if hasattr(model, LAST_QUERIES):
        options: dict[str, Any] = dict(attribute=LAST_QUERIES, arguments=(LAST_QUERIES,))
        yield name, model, Found("attention", what, "attention", call=_attention.last_queries, **options)


def _strange(model: Any, makers: dict[str, Any]) -> str:
    """Return why the modules of a model cannot get masks of ours; empty if they can."""
    if any("create_chunked_causal_mask" in _rebind.innermost(f).__code__.co_names for f in makers.values()):
        return "it has masks of chunks"
    if any(_masks.computes(f, created=True) for f in makers.values()):
        return "it computes with its masks"
    first = _masks.called_before(_rebind.innermost(type(model).forward), frozenset(makers))
    for n, m in model.named_modules():
        found = list(_attends(m))
        if any(not f.op or f.attribute in m.__dict__ for f in found):
            return f"{n} ({name_of(m)}) has its own attention"
        if any(f.call is _inline.inline for f in found):  # it only adds its mask
            continue
        forward = _rebind.innermost(type(m).forward)
        if isinstance(m, (PreTrainedModel, nn.Embedding)) or n.split(".")[0] in first:  # they get the caller's mask
            continue
        if _from_transformers(forward) and _masks.computes(forward):
            return f"{n} ({name_of(m)}) computes with its mask"
    return ""

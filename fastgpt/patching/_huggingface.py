"""Patch models of Hugging Face transformers; imported only for such models. For attention, see `_attention`.

The loss: in training with labels, the head's weight and the hidden states go to linear_cross_entropy inside the call of
the head, so its hooks run, including those of FSDP2. The full logits are never computed, and `outputs.logits` is None.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastgpt import ops
from fastgpt.core.fallback import leave_to_torch
from fastgpt.nn import _hooks
from fastgpt.patching import _attention, _rebind
from fastgpt.patching import _replace as replace
from fastgpt.patching._recognise import Found, name_of

FAMILIES = (
    "gpt2", "gpt_neo", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
)  # fmt: skip
NO_REGISTRY = {"gptj": "GPTJAttention", "gpt_neo": "GPTNeoSelfAttention"}  # eager attention in a method, `_attn`


def gptj_forward(
    module: Any,
    hidden_states: Tensor,
    layer_past: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    use_cache: Any = False,
    output_attentions: Any = False,
    **rest: Any,
) -> Any:
    """Run GPTJAttention.forward, but rotate q and k (interleaved) in one launch, with its table of all positions."""
    heads = (module.num_attention_heads, module.head_dim)
    q, k, v = (p(hidden_states).unflatten(-1, heads) for p in (module.q_proj, module.k_proj, module.v_proj))
    wide = torch.promote_types(q.dtype, torch.float32)
    sin, cos = (t.contiguous() for t in module.embed_positions.to(q.device, wide).chunk(2, -1))
    positions = (position_ids[0] if position_ids.shape[0] == 1 else position_ids).long()  # int32 in continuous batching
    q, k = ops.rope(q, k, cos, sin, interleaved=True, positions=positions)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    if layer_past is not None:
        k, v = layer_past.update(k, v, module.layer_idx)
    y, weights = module._attn(q, k, v, attention_mask)
    y = module.out_proj(y.transpose(1, 2).flatten(2))
    return module.resid_dropout(y), weights


def head(module: Any, *args: Any, target: Tensor | None = None, **options: Any) -> Tensor:
    """Run the LM head: return logits, or with a target (N,) the loss of hidden states (N, C) without logits."""
    if target is None:
        return replace.own(module, *args, **options)
    if type(module.weight) not in (Tensor, nn.Parameter):  # a quantised tensor, whose product only its class knows
        leave_to_torch("linear_cross_entropy", f"a head with a weight of the class {type(module.weight).__name__}")
        return ops.cross_entropy(replace.own(module, args[0]), target, **options)
    return ops.linear_cross_entropy(args[0], module.weight, target, linear_bias=module.bias, **options)


def causal_lm(
    model: Any, names: tuple[str, ...], accepted: frozenset[str] | None, keep_logits: bool, *args: Any, **kwargs: Any
) -> Any:
    """Run the forward of a causal language model; in training with labels, compute the loss from the hidden states.

    names: names of its parameters in order; accepted: those of the model below it, None if that accepts any.
    """
    given = {**dict(zip(names, args)), **kwargs}
    if not model.training or given.get("labels") is None or not _usual(model, given):
        return replace.own(model, *args, **kwargs)
    labels, shifted = given.pop("labels"), given.pop("shift_labels", None)
    count, ignored = given.pop("num_items_in_batch", None), given.pop("ignore_index", -100)
    for name in ("logits_to_keep", "return_dict"):
        given.pop(name, None)
    if accepted is not None and not given.keys() <= accepted:
        return replace.own(model, *args, **kwargs)
    outputs = model.base_model(**given)
    hidden = outputs.last_hidden_state
    target = F.pad(labels, (0, 1), value=ignored)[..., 1:] if shifted is None else shifted
    target = target.reshape(-1).to(hidden.device)
    softcap = getattr(model.config, "final_logit_softcapping", None)
    reduction = "mean" if count is None else "sum"
    options: dict[str, Any] = dict(ignore_index=ignored, reduction=reduction)
    logits = None
    if keep_logits:
        logits = model.get_output_embeddings()(hidden)
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        loss = ops.cross_entropy(logits.flatten(0, -2), target, **options)
    else:
        rows = hidden.flatten(0, -2)
        loss = model.get_output_embeddings()(rows, target=target, softcap=softcap or 0.0, **options)
    if count is not None:
        loss = loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
    fields = dict(loss=loss, logits=logits, past_key_values=outputs.past_key_values)
    fields |= dict(hidden_states=outputs.hidden_states, attentions=outputs.attentions)
    if "cross_attentions" not in outputs.__dataclass_fields__:
        return CausalLMOutputWithPast(**fields)
    return CausalLMOutputWithCrossAttentions(**fields, cross_attentions=outputs.cross_attentions)


def _usual(model: Any, given: dict[str, Any]) -> bool:
    """Return whether the loss is the one of transformers over all tokens, and the head is the patched one."""
    keep = given.get("logits_to_keep", 0)
    tuples = given.get("return_dict") is False or (given.get("return_dict") is None and not model.config.return_dict)
    why = ""
    if isinstance(keep, Tensor) or keep != 0 or tuples:
        why = "logits_to_keep or a tuple of outputs was requested"
    elif not _counts_tokens(model):
        why = "its loss_function is not transformers' ForCausalLMLoss"
    elif "_fastgpt" not in model.get_output_embeddings().__dict__:
        why = "its head was replaced after patching (by an adapter?)"
    elif _hooks.watched(model.get_output_embeddings()):
        why = "a hook on its head needs the logits"
    if why:
        leave_to_torch("linear_cross_entropy", f"the loss of {type(model).__name__}: {why}")
    return not why


def _counts_tokens(model: Any) -> bool:
    """Return whether model.loss_function is ForCausalLMLoss (reading the property may log, which torch.compile
    refuses)."""
    default = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "", ForCausalLMLoss)
    return model.__dict__.get("_loss_function", default) is ForCausalLMLoss


def find(name: str, module: nn.Module, done: list[Any], keep_logits: bool) -> Iterator[tuple[str, nn.Module, Found]]:
    """Find attention, the rotation of GPT-J, and the loss. done: configs already inspected (submodels share them)."""
    if isinstance(module, PreTrainedModel) and not any(module.config is c for c in done):
        done.append(module.config)
        if why := _unknown(module):
            yield name, module, Found("attention", name_of(module), why=why)
    if isinstance(module, PreTrainedModel) and not _unknown(module):
        yield from _masks(name, module)
    for found in _attends(module):
        yield name, module, found
    if _kind(module) == "gptj" and name_of(module) == "GPTJAttention":
        partial = module.rotary_dim is not None and module.rotary_dim <= module.head_dim  # type: ignore[operator]
        why = "" if partial else "its table is wider than a head"
        yield name, module, Found("rope", name_of(module), "rope" if partial else "", why, call=gptj_forward)
    if isinstance(module, PreTrainedModel) and name_of(module).endswith(("ForCausalLM", "LMHeadModel")):
        yield from _loss(name, module, keep_logits)


def _kind(module: Any) -> str:
    return getattr(getattr(module, "config", None), "model_type", None) or ""


def _unknown(model: Any) -> str:
    """Return why a model is in none of FAMILIES; empty if it is in one."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        return f"{kind} is not one of {', '.join(FAMILIES)}"
    known = any(c.__module__.startswith("transformers.models.") for c in type(model).__mro__)
    return "" if known else f"its code is not that of transformers' {kind}"


def _attends(module: Any) -> Iterator[Found]:
    """Find the attention of a module of one of the families: its attention function, or a method that computes it
    without the registry."""
    kind, what, forward = _kind(module), name_of(module), _rebind.innermost(type(module).forward)
    if kind in NO_REGISTRY and what == NO_REGISTRY[kind]:
        call: Any = _attention.gptj if kind == "gptj" else _attention.gpt_neo
        arguments = () if kind == "gptj" else (_neo_window(module),)
        yield Found("attention", what, "attention", attribute="_attn", call=call, arguments=arguments)
    elif kind in FAMILIES and _from_transformers(forward) and _rebind.refers(forward, ALL_ATTENTION_FUNCTIONS):
        call = _attention.FUNCTIONS
        yield Found("attention", what, "attention", function=ALL_ATTENTION_FUNCTIONS, call=call)
        if hasattr(module, "_upcast_and_reordered_attn"):
            attribute = "_upcast_and_reordered_attn"
            yield Found("attention", what, "attention", attribute=attribute, call=_attention.gpt2_upcast)


def _from_transformers(function: Any) -> bool:
    return str(function.__module__).startswith("transformers.models.")


def _neo_window(module: Any) -> int:
    """Return how many keys a GPT-Neo layer sees back from a token; 0: all. The mask built by the constructor decides,
    not the config."""
    if module.attention_type != "local":
        return 0
    return int(module.config.window_size if module.bias.is_meta else module.bias[0, 0, -1].sum())


def _masks(name: str, model: Any) -> Iterator[tuple[str, nn.Module, Found]]:
    """Find the forward of a base model, which creates the masks of its attention modules."""
    forward, what = type(model).forward, f"masks of {name_of(model)}"
    only_eager = model.config.model_type in NO_REGISTRY
    if not _from_transformers(_rebind.innermost(forward)):
        return
    rebound = _attention.model_forward(forward, only_eager)
    if rebound is None:
        return
    strange = next((f"{n} ({name_of(m)})" for n, m in model.named_modules() if _reads_masks(m)), None)
    if strange:  # it would get masks that it does not understand
        yield name, model, Found("attention", what, why=f"{strange} has its own attention")
        return
    yield name, model, Found("attention", what, "attention", call=_attention.base_model, arguments=(rebound,))


def _reads_masks(module: nn.Module) -> bool:
    """Return whether a module looks like attention that will not use the op."""
    found = list(_attends(module))
    if found:
        return any(f.attribute in module.__dict__ for f in found)
    inner = any("attention" in name_of(m).lower() for m in module.children())  # that of GPT-Neo wraps another
    return "attention" in name_of(module).lower() and not inner


def _loss(name: str, model: Any, keep_logits: bool) -> Iterator[tuple[str, nn.Module, Found]]:
    what, lm_head = name_of(model), model.get_output_embeddings()
    why = _unknown(model)
    if why:
        pass
    elif not type(model).forward.__module__.startswith("transformers."):
        why = "it has its own forward"
    elif not isinstance(lm_head, nn.Module) or not replace.is_plain_linear(lm_head):
        why = "its head is not a plain linear layer"
    elif not _counts_tokens(model):
        why = "its loss_function is not transformers' ForCausalLMLoss"
    if why:
        yield name, model, Found("loss", what, why=why)
        return
    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    below = inspect.signature(type(model.base_model).forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in below.values())
    arguments = (names, None if anything else frozenset(below), keep_logits)
    op = "cross_entropy" if keep_logits else "linear_cross_entropy"
    yield name, model, Found("loss", what, op, call=causal_lm, arguments=arguments)
    inner = next(n for n, m in model.named_modules() if m is lm_head)
    where = f"{name}.{inner}" if name else inner
    yield where, lm_head, Found("loss", name_of(lm_head), op, call=head)

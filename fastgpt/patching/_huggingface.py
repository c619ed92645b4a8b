"""What is particular to Hugging Face transformers (imported only when a model is one of its).

Attention goes through transformers' own registry: 'fastgpt' is entered there and in the registry of mask functions,
and the model's config names it. A mask is not made T x S where the op needs less: the mask function gives
None (causal, a sliding window, padding on the right, which no token sees), (B, 1 + T) int64 (where each sequence's keys
start, then document ids: packed sequences; padding, as a document of its own), or (2, B) int32 starts and ends of the
keys (decoding with left padding). Any other mask is transformers' 4D one and goes to PyTorch's attention, said once.
What comes out at a padding token with real ones before it is then not what PyTorch's attention gives there.

The loss: in training with labels, the head's weight and the hidden states go to linear_cross_entropy inside the head's
own call, so that its hooks (FSDP2's too) run; the whole logits are never made, and `outputs.logits` is None.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast

from fastgpt import ops
from fastgpt.core.backend import leave_to_torch
from fastgpt.nn import _hooks
from fastgpt.patching import _replace as replace
from fastgpt.patching._recognise import Found, name_of

FAMILIES = (
    "gpt2", "gpt_neo", "gptj", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text",
)  # fmt: skip
NO_REGISTRY = {"gptj": "GPTJAttention", "gpt_neo": "GPTNeoSelfAttention"}  # eager attention in a method, `_attn`
IMPLEMENTATION = "fastgpt"


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    **rest: Any,
) -> Tensor | None:
    """transformers' mask function; what it gives is said at this file's head."""
    if allow_is_bidirectional_skip:
        options = dict(attention_mask=attention_mask, local_size=local_size, use_vmap=use_vmap, device=device)
        lengths = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function)
        return sdpa_mask(*lengths, allow_is_causal_skip=False, allow_is_bidirectional_skip=True, **options)
    aligned = not isinstance(q_offset, Tensor) and q_offset + q_length == kv_offset + kv_length
    padding = _padding(attention_mask, kv_length, kv_offset)
    known, compact = False, None
    if aligned and not use_vmap and q_length == kv_length and (allow_is_causal_skip or padding is None):
        known, compact = True, _documents(mask_function, batch_size, q_length, device, padding, allow_is_causal_skip)
    elif aligned and not use_vmap and q_length != kv_length:
        known, compact = _ranges(padding)
    if known:
        return compact
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
        allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
    )  # fmt: skip


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: Any) -> Tensor | None:
    """(B, S) bool of the keys that a cache has, from the mask over all tokens; None without one."""
    if attention_mask is None or isinstance(kv_offset, Tensor):
        return None
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = F.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length]


def _documents(
    mask_function: Any, batch: int, length: int, device: Any, padding: Tensor | None, one: bool
) -> Tensor | None:
    """(B, 1 + T) int64 start of the keys, then document ids; None where causality says it all. one: no packing."""
    tokens = torch.arange(length, device=device)[None]
    if not one:  # a token that does not see the one before it begins a document
        rows = torch.arange(batch, device=device)[:, None]
        joined = mask_function(rows, torch.zeros_like(rows), tokens, (tokens - 1).clamp(min=0))
        ids = (~joined).long().cumsum(1)
        return torch.cat((torch.zeros_like(ids[:, :1]), ids), 1)
    if padding is None:
        return None
    if not torch.compiler.is_compiling() and bool((padding[:, :-1] >= padding[:, 1:]).all()):
        return None
    starts = torch.where(padding, tokens, length).amin(1, keepdim=True)
    return torch.cat((starts, padding.long()), 1)


def _ranges(padding: Tensor | None) -> tuple[bool, Tensor | None]:
    """Whether each sequence's keys are one range; and (2, B) int32 starts and ends, None where nothing is padding."""
    if padding is None:
        return True, None
    if torch.compiler.is_compiling():
        return False, None
    if bool(padding.all()):
        return True, None
    columns = torch.arange(padding.shape[1], device=padding.device)
    ends = torch.where(padding, columns + 1, 0).amax(1)
    starts = torch.where(padding, columns, padding.shape[1]).amin(1).minimum(ends)
    if not bool((ends - starts == padding.sum(1)).all()) or bool((ends < padding.shape[1]).any()):
        return False, None
    return True, torch.stack((starts, ends)).int()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, T, H, D)."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None and attention_mask.dim() == 4:
        leave_to_torch("attention", "a mask other than causal, window, padding or packed documents")
        return _masked(module, query, key, value, attention_mask, dropout, scaling, softcap), None
    which: dict[str, Any] = {}
    if attention_mask is not None and attention_mask.dtype == torch.int64:
        which["kv_start"], which["doc_ids"] = attention_mask[:, 0], attention_mask[:, 1:]
    elif attention_mask is not None:
        which["kv_start"], which["kv_lens"] = attention_mask[0], attention_mask[1]
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    options: dict[str, Any] = dict(causal=causal, scale=scaling, dropout_p=dropout, softcap=softcap or 0.0)
    return ops.attention(q, k, v, window=sliding_window if causal else None, **options, **which), None


def _masked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    """With a 4D mask, bool or added: (B, T, H, D)."""
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, seen, dropout, scaling, is_causal=False)[0]
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    z = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    z = softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~seen, torch.finfo(z.dtype).min) if seen.dtype == torch.bool else z + seen
    p = F.dropout(z.softmax(-1, dtype=torch.float32).to(value.dtype), dropout)
    return (p @ value).transpose(1, 2)


def gpt_neo_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
    """GPTNeoSelfAttention._attn: unscaled; a window in local layers. (B, H, T, D) -> the same, without weights."""
    window = module.config.window_size if module.attention_type == "local" else None
    p = module.attn_dropout.p if module.training else 0.0
    if attention_mask is not None and attention_mask.dim() == 4 and window:
        t, s = query.shape[-2], key.shape[-2]
        attention_mask = attention_mask & module.bias[:, :, s - t : s, :s]
    y, _ = attention(module, query, key, value, attention_mask, p, 1.0, sliding_window=window)
    return y.transpose(1, 2), None


def gptj_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
    """GPTJAttention._attn. (B, H, T, D) -> the same, without weights."""
    p = module.attn_dropout.p if module.training else 0.0
    y, _ = attention(module, query, key, value, attention_mask, p, 1 / module.scale_attn)
    return y.transpose(1, 2), None


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
    """GPTJAttention.forward with the interleaved rotation of q and k in one launch, from its table of all positions."""
    heads = (module.num_attention_heads, module.head_dim)
    q, k, v = (p(hidden_states).unflatten(-1, heads) for p in (module.q_proj, module.k_proj, module.v_proj))
    wide = torch.promote_types(q.dtype, torch.float32)
    sin, cos = (t.contiguous() for t in module.embed_positions.to(q.device, wide).chunk(2, -1))
    positions = position_ids[0] if position_ids.shape[0] == 1 else position_ids
    q, k = ops.rope(q, k, cos, sin, interleaved=True, positions=positions)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    if layer_past is not None:
        k, v = layer_past.update(k, v, module.layer_idx)
    y, weights = module._attn(q, k, v, attention_mask)
    y = module.out_proj(y.transpose(1, 2).flatten(2))
    return module.resid_dropout(y), weights


def head(module: Any, *args: Any, target: Tensor | None = None, **options: Any) -> Tensor:
    """The LM head: logits, or with a target (N,) the loss of hidden states (N, C) without them."""
    if target is None:
        return replace.own(module, *args, **options)
    return ops.linear_cross_entropy(args[0], module.weight, target, linear_bias=module.bias, **options)


def causal_lm(
    model: Any, names: tuple[str, ...], accepted: frozenset[str] | None, keep_logits: bool, *args: Any, **kwargs: Any
) -> Any:
    """A causal language model's forward; in training with labels the loss comes from the hidden states.

    names: of its parameters in order; accepted: those of the model below it, None where it takes any.
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
    """Whether the loss is transformers' own over all tokens, and the head the patched one."""
    keep = given.get("logits_to_keep", 0)
    tuples = given.get("return_dict") is False or (given.get("return_dict") is None and not model.config.return_dict)
    why = ""
    if isinstance(keep, Tensor) or keep != 0 or tuples:
        why = "logits_to_keep or a tuple of outputs was asked for"
    elif not _counts_tokens(model):
        why = "its loss_function is another than transformers' ForCausalLMLoss"
    elif "_fastgpt" not in model.get_output_embeddings().__dict__:
        why = "its head was replaced after patching (by an adapter?)"
    elif _hooks.watched(model.get_output_embeddings()):
        why = "a hook on its head is to see logits"
    if why:
        leave_to_torch("linear_cross_entropy", f"the loss of {type(model).__name__}: {why}")
    return not why


def _counts_tokens(model: Any) -> bool:
    """Whether model.loss_function is ForCausalLMLoss (the property itself would log, which torch.compile refuses)."""
    default = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "", ForCausalLMLoss)
    return model.__dict__.get("_loss_function", default) is ForCausalLMLoss


def find(name: str, module: nn.Module, done: list[Any], keep_logits: bool) -> Iterator[tuple[str, nn.Module, Found]]:
    """Attention, GPT-J's rotation, and the loss. done: configs that were looked at (submodels share them)."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    if isinstance(module, PreTrainedModel) and not any(module.config is c for c in done):
        done.append(module.config)
        yield name, module, _implementation(module)
    if kind in NO_REGISTRY and name_of(module) == NO_REGISTRY[kind]:
        call = gptj_attention if kind == "gptj" else gpt_neo_attention
        yield name, module, Found("attention", name_of(module), "attention", attribute="_attn", call=call)
    if kind == "gptj" and name_of(module) == "GPTJAttention":
        partial = module.rotary_dim is not None and module.rotary_dim <= module.head_dim  # type: ignore[operator]
        why = "" if partial else "its table is wider than a head"
        yield name, module, Found("rope", name_of(module), "rope" if partial else "", why, call=gptj_forward)
    if isinstance(module, PreTrainedModel) and name_of(module).endswith(("ForCausalLM", "LMHeadModel")):
        yield from _loss(name, module, keep_logits)


def _unknown(model: Any) -> str:
    """Why a model is none of FAMILIES; empty if it is."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        return f"{kind} is not one of {', '.join(FAMILIES)}"
    known = any(c.__module__.startswith("transformers.models.") for c in type(model).__mro__)
    return "" if known else f"its code is not that of transformers' {kind}"


def _implementation(model: Any) -> Found:
    """Attention of a whole model, through its config."""
    what, why = f"attn_implementation {model.config._attn_implementation!r}", _unknown(model)
    name = NO_REGISTRY.get(model.config.model_type)
    methods = [m for m in model.modules() if hasattr(m, "_attn")]
    if name and not (methods and all(name_of(m) == name and "_attn" not in m.__dict__ for m in methods)):
        why = f"its attention is not transformers' {name}"  # which would be given masks that it does not know
    if why:
        return Found("attention", what, why=why)
    return Found("attention", what, "attention", attribute=CONFIG)


def _loss(name: str, model: Any, keep_logits: bool) -> Iterator[tuple[str, nn.Module, Found]]:
    what, lm_head = name_of(model), model.get_output_embeddings()
    why = _unknown(model)
    if why:
        pass
    elif not type(model).forward.__module__.startswith("transformers."):
        why = "its forward is its own"
    elif not isinstance(lm_head, nn.Module) or not replace.is_plain_linear(lm_head):
        why = "its head is not a plain linear layer"
    elif not _counts_tokens(model):
        why = "its loss_function is another than transformers' ForCausalLMLoss"
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


CONFIG = "config._attn_implementation"  # stands for an attribute, though set_implementation sets it


def set_implementation(model: Any, implementation: str) -> str:
    """Set the attention implementation of a model and of its submodels by its public setter; returns the one before."""
    before: str = model.config._attn_implementation
    if model.config.model_type in NO_REGISTRY:  # its setter only warns: the mask function is all that reads this
        model.config._attn_implementation = implementation
    else:
        model.set_attn_implementation(implementation)
    return before


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, mask)

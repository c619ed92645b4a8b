"""Run transformers' attention on the op, and skip the T x S mask where the op does not need one.

No config and no registry of transformers is modified. Two kinds of methods are rebuilt with other globals (`_rebind`):
attention modules get their attention function from `Functions`, and the base model gets its mask functions from
`Masks`. Both look up the library's function first, and replace only 'sdpa' and 'eager'. So any other implementation
that the config names at that moment, and any other model that shares the config, is not affected.

A mask of ours is (B, n, 1 + window), and its last dimension has stride 0 (window 0: no window). n = 0: all keys of a
sequence. n = 2: start and end of each sequence's keys. n = 2 + T: also the document of each token, which sees only keys
of its document. int64 is causal order, in which the window counts keys back from the query's own. int32 is attention in
both directions (encoders, and the keys of an encoder), in which a query sees `window` keys on either side. Any other
mask, and any call that the op does not cover, goes to the library's own attention function, and a log line says so
once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from fastgpt import ops
from fastgpt.core.fallback import leave_to_torch
from fastgpt.patching import _rebind
from fastgpt.patching import _replace as replace

CAUSAL: tuple[Any, ...] = (create_causal_mask, create_sliding_window_causal_mask)
BOTH_WAYS: tuple[Any, ...] = (create_bidirectional_mask, create_bidirectional_sliding_window_mask)
MAKERS = CAUSAL + BOTH_WAYS
WEIGHTS = "_fastgpt_weights"  # set on a base model while it runs for its attention weights
OTHER_MASK = "a mask other than causal order, window, padding or packed documents"


def _stands_for(implementation: Any) -> bool:
    """Return whether the op replaces the attention of this name (the user may have registered another 'sdpa')."""
    if implementation == "sdpa":
        return ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    return implementation == "eager"


class Functions:
    """Replacement for ALL_ATTENTION_FUNCTIONS in the forward of an attention module."""

    def get_interface(self, implementation: Any, default: Callable[..., Any]) -> Callable[..., Any]:
        own: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, default)
        if not _stands_for(implementation):
            return own
        return functools.partial(attention, own, implementation == "eager")


class Masks:
    """Replacement for ALL_MASK_ATTENTION_FUNCTIONS in transformers' functions that create causal masks."""

    def __init__(self, only_eager: bool) -> None:
        self.only_eager = only_eager

    def __getitem__(self, implementation: str) -> Callable[..., Any]:
        own: Callable[..., Any] = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
        if not _stands_for(implementation) or (self.only_eager and implementation != "eager"):
            return own
        return functools.partial(mask, own)


FUNCTIONS = Functions()
MASKS = {only_eager: Masks(only_eager) for only_eager in (False, True)}


@functools.cache
def _mask_makers(only_eager: bool) -> list[tuple[Any, Any]]:
    """Return pairs of a transformers function that creates a mask and the same function with our masks."""
    change: list[tuple[Any, Any]] = [(ALL_MASK_ATTENTION_FUNCTIONS, MASKS[only_eager])]
    both = [(f, _rebind.rebind(f, change)) for f in BOTH_WAYS]
    return [*both, *((f, _rebind.rebind(f, change + both)) for f in CAUSAL)]  # some call one for both directions


def makes_masks(f: Any) -> bool:
    """Return whether a method creates its masks as transformers' base models do."""
    return any(_rebind.refers(_rebind.innermost(f), maker) for maker in MAKERS)


def with_our_masks(f: Any, only_eager: bool) -> Any:
    """Return a method that creates masks with our masks."""
    return _rebind.rebind(f, _mask_makers(only_eager))


def base_model(module: Any, rebound: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a base model's forward; if eager attention must return its weights, run transformers' own forward.

    rebound: the forward with our masks; None if another method creates them, see `own_masks`.
    """
    wanted = kwargs.get("output_attentions")
    wanted = getattr(module.config, "output_attentions", False) if wanted is None else wanted
    if not wanted or module.config._attn_implementation != "eager":
        return (rebound or type(module).forward)(module, *args, **kwargs)
    leave_to_torch("attention", "output_attentions")
    module.__dict__[WEIGHTS] = True
    try:
        return replace.own(module, *args, **kwargs)
    finally:
        del module.__dict__[WEIGHTS]


def own_masks(module: Any, attribute: str, rebound: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a method of a base model that creates masks, within its forward."""
    if module.__dict__.get(WEIGHTS, False):
        return getattr(type(module), attribute)(module, *args, **kwargs)
    return rebound(module, *args, **kwargs)


def last_queries(module: Any, attribute: str, *args: Any, **kwargs: Any) -> Any:
    """Run Gemma 4's method that keeps the last queries, and their rows of the masks, for layers with shared keys.

    Our masks hold for any number of last queries, but for those of documents: then it keeps all.
    """
    own = getattr(type(module), attribute)
    given = {**dict(zip(list(inspect.signature(own).parameters)[1:], args)), **kwargs}
    ours = {name: m for name, m in given["causal_mask_mapping"].items() if is_ours(m)}
    given["causal_mask_mapping"] = {n: m for n, m in given["causal_mask_mapping"].items() if n not in ours}
    if any(m.shape[1] > 2 for m in ours.values()):
        given["logits_to_keep"] = None
    *rest, masks = own(module, **given)
    return *rest, {**masks, **ours}


def mask(
    own: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: Any = "cpu",
    **rest: Any,
) -> Tensor | None:
    """Create a mask as described at the head of this file. own: the mask function of transformers that it replaces."""
    known, window = None, 0 if local_size is None or local_size >= kv_length else local_size
    offsets = not (isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor))  # a static cache has tensors
    if offsets and not use_vmap:
        padding = _padding(attention_mask, kv_length, kv_offset)
        if "allow_is_bidirectional_skip" in rest:  # not there for a causal mask
            known = _both_ways(padding, batch_size, q_length, kv_length, window, device)
        elif q_offset + q_length != kv_offset + kv_length:
            pass
        elif allow_is_causal_skip:
            known = _ranges(padding, batch_size, q_length, device)
        elif padding is None and q_length == kv_length:
            known = _documents(mask_function, batch_size, q_length, device)  # None if tokens see later ones
    if known is not None:
        return known[..., None].expand(-1, -1, 1 + window)
    given: Tensor | None = own(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip, use_vmap=use_vmap, device=device, **rest,
    )  # fmt: skip
    return given


def _both_ways(padding: Tensor | None, batch: int, queries: int, keys: int, window: int, device: Any) -> Tensor | None:
    """Return (B, 2) or (B, 2 + T), int32, for attention in both directions; None if every token sees every key (for
    which transformers needs no mask either), or if this form cannot express what each token sees."""
    seen = None if padding is None else _ranges(padding, batch, queries, device)
    if window == 0:
        return seen.int() if seen is not None and seen.shape[1] else None
    if queries != keys or (padding is not None and (seen is None or seen.shape[1] > 2)):
        return None
    if seen is None or seen.shape[1] == 0:
        seen = torch.tensor([0, keys], device=device).expand(batch, 2)
    return seen.int()


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """Return (B, S) bool for the keys in a cache, from the mask over all tokens; None without a mask."""
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return None if padding is None else padding[:, kv_offset : kv_offset + kv_length]


def _documents(mask_function: Any, batch: int, length: int, device: Any) -> Tensor | None:
    """Return (B, 2 + T) for packed documents: a token that does not see the previous token starts a document."""
    tokens = torch.arange(length, device=device)[None]
    rows = torch.arange(batch, device=device)[:, None]
    if not _unreadable(rows) and bool(mask_function(rows, torch.zeros_like(rows), tokens[:, :-1], tokens[:, 1:]).any()):
        return None
    ids = (~mask_function(rows, torch.zeros_like(rows), tokens, (tokens - 1).clamp(min=0))).long().cumsum(1)
    ends = torch.tensor([0, length], device=device).expand(batch, 2)
    return torch.cat((ends, ids), 1)


def _ranges(padding: Tensor | None, batch: int, queries: int, device: Any) -> Tensor | None:
    """Return (B, 0), (B, 2) or (B, 2 + T) for padded sequences; None if this form cannot express what each token sees.

    Values are read once per forward, as in transformers' own mask function. A compiler and a CUDA graph cannot read
    them: there, padding between real tokens is treated as a separate document, so only these padding tokens see other
    keys than in transformers.
    """
    if padding is None:
        return torch.empty((batch, 0), dtype=torch.long, device=device)
    columns = torch.arange(padding.shape[1], device=padding.device)
    ends = torch.where(padding, columns + 1, 0).amax(1, keepdim=True)
    starts = torch.where(padding, columns, padding.shape[1]).amin(1, keepdim=True).minimum(ends)
    holes = ~padding & (columns >= starts) & (columns < ends)
    if _unreadable(padding):
        return torch.cat((starts, ends, holes.long()), 1) if queries == padding.shape[1] else None
    if bool(padding.all()):
        return starts[:, :0]
    return None if bool(holes.any()) else torch.cat((starts, ends), 1)


def _unreadable(x: Tensor) -> bool:
    """Return whether no value can be read now: a compiler traces, or a CUDA graph is captured."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def is_ours(attention_mask: Any) -> bool:
    """Return whether `mask` created this mask."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 3:
        return False
    return attention_mask.dtype in (torch.int64, torch.int32)


def _collects_weights() -> bool:
    """Return whether a forward that runs now collects attention weights from the outputs of its modules."""
    collector = output_capturing._active_collector  # a compiler cannot read its context variable
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return any("attentions" in name for name in collected or ())


def attention(
    own: Callable[..., Any],
    eager: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """Compute attention as a transformers attention function: q (B, H, T, D), k and v (B, Hkv, S, D) -> (B, T, H, D),
    None.

    own: the function that it replaces; eager: whether that is the model's eager attention, or else PyTorch's attention.
    """
    why, causal = "", True
    sinks = getattr(module, "sinks", None) if eager else None
    if any(options.get(name) is not None for name in ("cache", "position_bias", "sinks")):
        why = "a paged cache, a bias or sinks"
    elif options.get("s_aux") is not None and options["s_aux"] is not sinks:
        why = "sinks"
    elif attention_mask is None:
        # eager attention then sees all keys; in PyTorch's function, causal order starts at the first key
        ordered = options.get("is_causal")
        ordered = getattr(module, "is_causal", True) if ordered is None else ordered
        causal = not eager and query.shape[2] > 1 and bool(ordered)
        why = "output_attentions" if eager and _collects_weights() else ""
        if causal and key.shape[2] > query.shape[2]:
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    elif not is_ours(attention_mask):
        why = OTHER_MASK
    if why:
        leave_to_torch("attention", why)
        return own(module, query, key, value, attention_mask, **options)
    numbers = dict(scaling=options.get("scaling"), dropout=options.get("dropout", 0.0), softcap=options.get("softcap"))
    numbers |= dict(sinks=sinks)
    if attention_mask is None:
        y = attend(query, key, value, causal=causal, **numbers)
    else:
        y = masked(query, key, value, attention_mask, "all" if eager and sinks is None else "", **numbers)
    return y.contiguous(), None  # models take views of it


def masked(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, blind: str = "", window: int = 0, **numbers: Any
) -> Tensor:
    """Compute attention under a mask of ours: (B, T, H, D).

    blind: what a token sees if the mask leaves it no key (padding before the first real token): '' for nothing, which
    returns 0 as in PyTorch's attention; 'all' for all keys equally, as in most eager attention; or 'neo', see
    `_mean_of_neo`. window: the window of GPT-Neo, which its mask does not contain.
    """
    both, window, keys = seen.dtype == torch.int32, seen.shape[2] - 1 or window, key.shape[2]
    ahead = window if both else 0  # keys that a query sees after its own
    span = window + ahead + both if window else None  # keys that it sees in all
    which: dict[str, Any] = dict(causal=not both or window > 0, window=span)
    if seen.shape[1] == 0:
        return attend(query, key, value, **which, **numbers)
    start, end, ids = seen[:, 0, 0], seen[:, 1, 0], seen[:, 2:, 0]
    which |= dict(kv_start=start, kv_lens=end, doc_ids=ids if seen.shape[1] > 2 else None)
    # with `ahead` more keys, which are behind `end`, causal order ends `ahead` keys after each query
    k, v = (F.pad(t, (0, 0, 0, ahead)) if ahead else t for t in (key, value))
    y = attend(query, k, v, **which, **numbers)
    if not blind:
        return y
    last = torch.arange(query.shape[2], device=query.device) + keys - query.shape[2] + ahead
    first = torch.maximum(start[:, None], last - span + 1) if span else start[:, None]
    if both and not window:
        last = torch.full_like(last, keys)
    if blind == "all":
        alike = value.mean(2, keepdim=True)
    else:
        alike = _mean_of_neo(value, start[:, None], end[:, None], last, window or keys)
    alike = alike.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2)
    return torch.where((first > torch.minimum(last, end[:, None] - 1))[..., None, None], alike.to(y.dtype), y)


def _mean_of_neo(value: Tensor, start: Tensor, end: Tensor, last: Tensor, window: int) -> Tensor:
    """Return the mean (B, H, T, D) of the values that GPT-Neo weighs equally if a token sees no key: those of the real
    keys before its window and of all keys in its window. GPT-Neo adds the same number for the window and for the mask,
    so these are the keys that get it once."""
    wide = torch.promote_types(value.dtype, torch.float32)
    sums = F.pad(value.to(wide).cumsum(2), (0, 0, 1, 0))  # (B, H, S + 1, D)

    def until(key: Tensor) -> Tensor:
        heads, width = value.shape[1], value.shape[3]
        return sums.gather(2, key.expand(value.shape[0], -1)[:, None, :, None].expand(-1, heads, -1, width))

    back = (last + 1 - window).clamp(min=0)
    far = torch.minimum(end, back).maximum(start)
    count = far - start + last + 1 - back
    total = until(far) - until(start.expand_as(far)) + until((last + 1)[None]) - until(back[None])
    return (total / count[:, None, :, None]).to(value.dtype)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    **which: Any,
) -> Tensor:
    """Run the op: (B, T, H, Dv). The narrower of keys and values gets columns of zeros; sinks: (H,) scores of a key
    without a value."""
    d, dv = query.shape[-1], value.shape[-1]
    if d != dv:
        scaling = d**-0.5 if scaling is None else scaling
        query, key, value = (F.pad(t, (0, max(d, dv) - t.shape[-1])) for t in (query, key, value))
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    options: dict[str, Any] = dict(scale=scaling, dropout_p=dropout, softcap=softcap or 0.0, **which)
    y: Tensor
    if sinks is None:
        y = ops.attention(q, k, v, **options)
    else:
        y, lse = ops.attention(q, k, v, return_lse=True, **options)
        y = y * torch.sigmoid(lse - sinks[:, None]).transpose(1, 2)[..., None].to(y.dtype)
    return y if y.shape[-1] == dv else y[..., :dv]


def _dropout(module: Any) -> float:
    return module.attn_dropout.p if module.training else 0.0


def gpt_neo(module: Any, window: int, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
    """Replace GPTNeoSelfAttention._attn: unscaled; a window in local layers. (B, H, T, D) -> the same, no weights."""
    if not is_ours(attention_mask):
        leave_to_torch("attention", OTHER_MASK)
        return type(module)._attn(module, query, key, value, attention_mask)
    y = masked(query, key, value, attention_mask, "neo", window, scaling=1.0, dropout=_dropout(module))
    return y.transpose(1, 2), None


def gpt2_upcast(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> Any:
    """Replace GPT2Attention._upcast_and_reordered_attn, eager attention in fp32, which the op always uses: (B, T, H,
    D)."""
    own = type(module)._upcast_and_reordered_attn
    if attention_mask is not None and not is_ours(attention_mask):
        leave_to_torch("attention", OTHER_MASK)
        return own(module, query, key, value, attention_mask)
    options = dict(scaling=module.scaling, dropout=_dropout(module))
    return attention(own, True, module, query, key, value, attention_mask, **options)

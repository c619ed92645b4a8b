"""Fuse the LM head and the loss of a causal language model of transformers.

In training with labels, the head's weight and the hidden states go to linear_cross_entropy inside the call of the head,
so its hooks run, including those of FSDP2. The full logits are never computed, and `outputs.logits` is None.

The other losses of transformers that are cross-entropy (masked tokens, classes of sequences, images or tokens) run on
the logits.

`read` finds out what a model's forward does around its head by running it with stubs in place of the base model, the
head and the loss: which arguments it passes on, what it returns, and whether it scales or softcaps the logits. Where it
does more than that, the loss alone is replaced, on the logits.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, fixed_cross_entropy

from fastgpt import ops
from fastgpt.core.fallback import leave_to_torch
from fastgpt.nn import _hooks
from fastgpt.patching import _functions, _rebind
from fastgpt.patching import _replace as replace
from fastgpt.patching._recognise import Found, name_of
from fastgpt.patching._settings import bare_copy, settings

NOT_OURS = "its loss_function is not transformers' ForCausalLMLoss"
LOSSES = (nn.CrossEntropyLoss, F.cross_entropy)
AUXILIARY = "output_router_logits"  # adds a loss of the routers


@dataclass(frozen=True)
class Head:
    """What a forward does around its head.

    names: its parameters in order; accepted: those of the base model, None if that accepts any; output: the class that
    it returns, and copied: its fields that come from the base model's outputs. logits: softcap(scale * head(hidden)).
    """

    names: tuple[str, ...]
    accepted: frozenset[str] | None
    output: type
    copied: tuple[str, ...]
    scale: float = 1.0
    softcap: float = 0.0


def head(module: Any, *args: Any, target: Tensor | None = None, scale: float = 1.0, **options: Any) -> Tensor:
    """Run the LM head: return logits, or with a target (N,) the loss of hidden states (N, C) without logits."""
    if target is None:
        return replace.own(module, *args, **options)
    if type(module.weight) not in replace.ORDINARY:  # a quantised tensor, whose product only its class knows
        leave_to_torch("linear_cross_entropy", f"a head with a weight of the class {type(module.weight).__name__}")
        logits = replace.own(module, args[0])
        return ops.cross_entropy(logits if scale == 1 else logits * scale, target, **options)
    x, bias = args[0], module.bias
    if scale != 1:
        x, bias = x * scale, None if bias is None else bias * scale
    return ops.linear_cross_entropy(x, module.weight, target, linear_bias=bias, **options)


def causal_lm(model: Any, h: Head, keep_logits: bool, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a causal language model; in training with labels, compute the loss from the hidden states."""
    given = {**dict(zip(h.names, args)), **kwargs}
    if not model.training or given.get("labels") is None or not _usual(model, given):
        return replace.own(model, *args, **kwargs)
    labels, shifted = given.pop("labels"), given.pop("shift_labels", None)
    count, ignored = given.pop("num_items_in_batch", None), given.pop("ignore_index", -100)
    for name in ("logits_to_keep", "return_dict"):
        given.pop(name, None)
    if h.accepted is not None and not given.keys() <= h.accepted:
        return replace.own(model, *args, **kwargs)
    outputs = model.base_model(**given)
    hidden = outputs.last_hidden_state
    target = _shifted(labels, ignored) if shifted is None else shifted
    target = target.reshape(-1).to(hidden.device)
    options: dict[str, Any] = dict(ignore_index=ignored, reduction="mean" if count is None else "sum")
    logits = None
    if keep_logits:
        logits = model.get_output_embeddings()(hidden)
        logits = logits if h.scale == 1 else logits * h.scale
        logits = torch.tanh(logits / h.softcap) * h.softcap if h.softcap else logits
        loss = ops.cross_entropy(logits.flatten(0, -2), target, **options)
    else:
        rows = hidden.flatten(0, -2)
        loss = model.get_output_embeddings()(rows, target=target, scale=h.scale, softcap=h.softcap, **options)
    fields = {name: getattr(outputs, name, None) for name in h.copied}
    return h.output(loss=_counted(loss, count), logits=logits, **fields)


def on_logits(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    """Replace ForCausalLMLoss: logits (B, T, V) and labels (B, T) -> the loss, fp32."""
    target = _shifted(labels, ignore_index) if shift_labels is None else shift_labels
    reduction = "mean" if num_items_in_batch is None else "sum"
    rows = logits.reshape(-1, logits.shape[-1] if vocab_size is None else vocab_size)
    target = target.reshape(-1).to(logits.device)
    return _counted(ops.cross_entropy(rows, target, ignore_index=ignore_index, reduction=reduction), num_items_in_batch)


def _cross_entropy(
    source: Tensor, target: Tensor, num_items_in_batch: Any = None, ignore_index: int = -100, **rest: Any
) -> Tensor:
    """Replace the cross-entropy that transformers' losses share: logits (N, V) and labels (N,) -> the loss, fp32."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = _functions.cross_entropy(source, target, ignore_index=ignore_index, reduction=reduction)
    return _counted(loss, num_items_in_batch)


# the losses of transformers that call its cross-entropy, by the names of LOSS_MAPPING, with ours in its place
OTHERS: dict[str, Any] = {
    name: _rebind.rebind(f, [(fixed_cross_entropy, _cross_entropy)])
    for name, f in dict[str, Any](LOSS_MAPPING).items()
    if isinstance(f, types.FunctionType) and _rebind.refers(f, fixed_cross_entropy)
}


def other(name: str, *args: Any, **kwargs: Any) -> Any:
    """Compute one of OTHERS."""
    return OTHERS[name](*args, **kwargs)


def _shifted(labels: Tensor, ignored: int) -> Tensor:
    return F.pad(labels, (0, 1), value=ignored)[..., 1:]


def _counted(loss: Tensor, count: Any) -> Tensor:
    if count is None:
        return loss
    return loss / (count.to(loss.device) if isinstance(count, Tensor) else count)


def _usual(model: Any, given: dict[str, Any]) -> bool:
    """Return whether the loss is the one of transformers over all tokens, and the head is the patched one."""
    keep = given.get("logits_to_keep", 0)
    tuples = given.get("return_dict") is False or (given.get("return_dict") is None and not model.config.return_dict)
    routers = given.get(AUXILIARY)
    routers = getattr(model.config, AUXILIARY, False) if routers is None else routers
    why = ""
    if isinstance(keep, Tensor) or keep != 0 or tuples:
        why = "logits_to_keep or a tuple of outputs was requested"
    elif routers:
        why = "a loss of the routers is added"
    elif not _counts_tokens(model):
        why = NOT_OURS
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


class _Anything:
    """Stub for the outputs of a base model: every field is an object of its own, the hidden states a tensor."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = self.__dict__[name] = object()
        return made

    def __getitem__(self, i: int) -> Any:
        if i != 0:
            raise IndexError(i)
        return self.last_hidden_state


class _Stub(nn.Module):
    """Stub for a module: remembers what it is called with."""

    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.returned, self.calls = returned, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.returned


WIDTH = 8  # of the stub's hidden states
NOT_PLAIN = "its forward does more around the head than scale or softcap logits"


@torch.inference_mode(False)
@torch.no_grad()
def read(model: Any) -> Head | str:
    """Find out what a model's forward does around its head, or why the head cannot be fused with the loss."""
    lm_head, base = output_embeddings(model), model.base_model
    name = next((n for n, m in model.named_children() if m is lm_head), "")
    if not isinstance(lm_head, nn.Module) or not name or not replace.is_plain_linear(lm_head):
        return "its head is not a plain linear layer of its own"
    if base is model or base is not model._modules.get(model.base_model_prefix):
        return "its base model is not a child"
    g = torch.Generator("cpu").manual_seed(0)
    weight: Any = lm_head.weight
    classes = weight.shape[1 if replace.is_conv1d(lm_head) else 0]
    hidden = torch.randn(1, 3, WIDTH, generator=g, device="cpu", dtype=torch.float64)
    logits = 30 * torch.randn(1, 3, classes, generator=g, device="cpu", dtype=torch.float64)
    outputs, loss = _Anything(hidden), torch.tensor(0.71875, device="cpu")  # in any dtype
    stubs = {model.base_model_prefix: _Stub(outputs), name: _Stub(logits)}
    bare = bare_copy(model)
    bare.__dict__["_modules"] = {**bare._modules, **stubs}
    called: list[dict[str, Any]] = []

    def count(*args: Any, **kwargs: Any) -> Tensor:
        called.append({**dict(zip(("logits", "labels", "vocab_size"), args)), **kwargs})
        return loss

    bare.__dict__["_loss_function"] = count
    ids = torch.zeros(1, 3, dtype=torch.long, device="cpu")
    given = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids + 1)
    try:
        with torch.device("cpu"):
            out = type(model).forward(bare, **given)
    except Exception:  # it needs more than a language model needs
        return NOT_PLAIN
    return _read(model, given, stubs, name, called, loss, out)


def _read(model: Any, given: Any, stubs: Any, name: str, called: Any, loss: Tensor, out: Any) -> Head | str:
    """Judge one run of a forward with stubs."""
    base, lm_head = stubs[model.base_model_prefix], stubs[name]
    below = inspect.signature(type(model.base_model).forward).parameters
    once = len(base.calls) == len(lm_head.calls) == len(called) == 1
    kept = isinstance(getattr(out, "loss", None), Tensor) and float(out.loss) == float(loss)
    if not once or not kept or called[0].get("labels") is not given["labels"]:
        return NOT_PLAIN
    if called[0].get("vocab_size") not in (None, model.config.get_text_config().vocab_size):
        return "its loss counts other classes than its vocabulary"
    passed = {**dict(zip(list(below)[1:], base.calls[0][0])), **base.calls[0][1]}
    strange = {k for k, v in passed.items() if v is not None and not isinstance(v, bool) and v is not given.get(k)}
    (x,), options = lm_head.calls[0]
    before = _scaling(model, base.returned.last_hidden_state, x)
    after = _scaling(model, lm_head.returned, out.logits)
    if strange or options or before is None or after is None or before[1]:
        return NOT_PLAIN
    if before[0] != 1 and (model.get_output_embeddings().bias is not None or after[1]):
        return NOT_PLAIN
    fields = [f for f in out.__dataclass_fields__ if f not in ("loss", "logits")]
    copied = tuple(f for f in fields if getattr(out, f) is base.returned.__dict__.get(f, MISSING))
    if any(getattr(out, f) is not None for f in fields if f not in copied):
        return NOT_PLAIN
    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    anything = any(p.kind is p.VAR_KEYWORD for p in below.values())
    return Head(names, None if anything else frozenset(below), type(out), copied, before[0] * after[0], after[1])


def output_embeddings(model: Any) -> Any:
    """Return a model's head over a vocabulary, or None; models of images and sound may raise instead."""
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None


MISSING = object()


def _scaling(model: Any, z: Tensor, logits: Any) -> tuple[float, float] | None:
    """Return (scale, softcap) of logits computed from the head's z; None if they are computed in another way."""
    if not isinstance(logits, Tensor) or logits.shape != z.shape:
        return None
    logits = logits.to(z.dtype)
    config = model.config.get_text_config()
    numbers = dict.fromkeys(float(v) for v in vars(config).values() if isinstance(v, (int, float)) and v > 0)
    scale = float((logits / z).flatten()[0])
    if torch.allclose(logits, z * scale, rtol=1e-6, atol=0):
        exact = (v for n in (1.0, *numbers) for v in (n, 1 / n))  # the logits may be fp32
        return next((v for v in exact if abs(scale / v - 1) < 1e-6), scale), 0.0
    for cap in numbers:
        if torch.allclose(logits, cap * torch.tanh(z / cap), rtol=1e-6, atol=1e-9):
            return 1.0, cap
    return None


def _has_cross_entropy(model: nn.Module) -> bool:
    """Return whether a model or a child of it calls PyTorch's cross-entropy, or is its module."""
    for m in (model, *model.children()):
        forward = _rebind.innermost(type(m).forward)
        if forward is nn.CrossEntropyLoss.forward or any(map(functools.partial(_rebind.calls, forward), LOSSES)):
            return True
    return False


def _other(model: Any, what: str) -> Found:
    """Find a loss of transformers other than that of a causal language model."""
    kind = getattr(model, "loss_type", None)
    if model.__dict__.get("_loss_function") is not None:
        return Found("loss", what, why=NOT_OURS)
    if kind not in OTHERS:
        return Found("loss", what, why="its loss is not cross-entropy")
    call = functools.partial(other, kind)
    return Found("loss", what, "cross_entropy", attribute="_loss_function", call=call)


def find(name: str, model: PreTrainedModel, keep_logits: bool) -> Iterator[tuple[str, nn.Module, Found]]:
    """Find the loss of a causal language model: with its head, or on its logits."""
    what, forward = name_of(model), _rebind.innermost(type(model).forward)
    if not forward.__module__.startswith("transformers."):
        yield name, model, Found("loss", what, why="it has its own forward")
        return
    if "loss_function" not in forward.__code__.co_names:
        if not _has_cross_entropy(model):  # else it is found there
            yield name, model, Found("loss", what, why="it computes its loss in its own way")
        return
    if not _counts_tokens(model):
        yield name, model, _other(model, what)
        return
    h = read(model)
    if isinstance(h, str):
        yield name, model, Found("loss", f"{what} ({h})", "cross_entropy", attribute="_loss_function", call=on_logits)
        return
    op = "cross_entropy" if keep_logits else "linear_cross_entropy"
    kept = settings(model)
    yield name, model, Found("loss", what, op, call=causal_lm, arguments=(h, keep_logits), settings=kept)
    lm_head = model.get_output_embeddings()
    inner = next(n for n, m in model.named_modules() if m is lm_head)
    yield f"{name}.{inner}" if name else inner, lm_head, Found("loss", name_of(lm_head), op, call=head)

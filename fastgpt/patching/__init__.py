"""Put fastgpt's kernels into an existing model: `patch(model)`, `unpatch(model)`, `patch_report(model)`.

A patched module keeps its class, parameters, buffers, hooks and place in the model. Only one attribute of the instance
(usually `forward`) changes, and hides the attribute of the class. No module is exchanged and no class is swapped, so
state_dict keys, isinstance, type(), hooks, optimizers, PEFT, DDP, FSDP2 (which itself swaps classes), checkpointing and
copy.deepcopy see what they saw before. Unpatching deletes the attribute. Nothing in torch or transformers changes for
other models, and no config is modified.
(pickle stores methods by name, so a model that is pickled whole loads with its original forwards: patch it again.)
"""

from __future__ import annotations

import inspect
import sys
import types
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch.distributed
from torch import nn

from fastgpt.core.fallback import leave_to_torch
from fastgpt.patching import _rebind
from fastgpt.patching._alike import Alike
from fastgpt.patching._mlp import activation_alone, mlp
from fastgpt.patching._norm import norm
from fastgpt.patching._recognise import Found, attention, embedding, loss
from fastgpt.patching._replace import child
from fastgpt.patching._report import PARTS, Entry, Report, notes_on
from fastgpt.patching._settings import changed

M = TypeVar("M", bound=nn.Module)
RECOGNISERS = (norm, mlp, activation_alone, attention, embedding, loss)
__all__ = ["PARTS", "Entry", "Report", "patch", "patch_report", "unpatch"]


def _transformers(model: nn.Module) -> Any:
    """Return fastgpt.patching._huggingface if the model contains a transformers model, else None."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not any(type(m).__module__.startswith("transformers.") for m in model.modules()):
        return None
    from fastgpt.patching import _huggingface

    return _huggingface


def _find(model: nn.Module, keep_logits: bool) -> list[tuple[str, nn.Module, Found]]:
    """Find everything in the model that an op could replace: (name, module, what was found)."""
    huggingface, all_found = _transformers(model), list[tuple[str, nn.Module, Found]]()
    alike = Alike()
    for name, module in model.named_modules():
        if type(module).__module__.startswith("fastgpt."):  # modules of fastgpt.nn already use the ops
            continue
        found: list[tuple[str, nn.Module, Found]] = [
            (name, module, f) for r in RECOGNISERS if (f := alike.once(r, module)) is not None
        ]
        found += huggingface.find(name, module, keep_logits) if huggingface else ()
        # where a whole method is replaced, so are its calls
        whole = {f.attribute for _, m, f in found if f.op and f.function is None and m is module}
        found += [(name, module, f) for f in alike.once_per_class(_rebind.find, module) if f.attribute not in whole]
        all_found += [(at, m, _own(m, f)) for at, m, f in found]
    return _without_parts(all_found)


def _without_parts(found: list[tuple[str, nn.Module, Found]]) -> list[tuple[str, nn.Module, Found]]:
    """Drop what a replaced module computes for its children, and what was left of a module of which parts serve."""
    covered = {id(child(m, n)) for _, m, f in found if f.op for n in f.covers}
    found = [(n, m, f) for n, m, f in found if id(m) not in covered or f.covers]
    served = {id(m) for _, m, f in found if f.op and f.part == "mlp"}

    def in_part(m: nn.Module, f: Found) -> bool:
        inside = [child(m, name) for name in f.covers] or [m]
        return f.part == "mlp" and not f.op and all(id(i) in served for i in inside)

    return [(n, m, f) for n, m, f in found if not in_part(m, f)]


def _own(module: nn.Module, f: Found) -> Found:
    """Return f, or the reason against it if this instance already has a forward that is not from its class."""
    if not f.op or f.attribute not in module.__dict__:
        return f
    why = f"{f.attribute} of this instance is not that of its class (accelerate or another patch set it)"
    return Found(f.part, f.what, why=why)


def _names(option: str, value: str | Iterable[str] | None) -> frozenset[str]:
    """Return names of parts as a set.

    Raises:
        ValueError: a name is not a part.
    """
    names = frozenset([value] if isinstance(value, str) else value or ())
    if unknown := sorted(names - set(PARTS)):
        raise ValueError(f"patch: {option}={', '.join(unknown)}: expected some of {', '.join(PARTS)}")
    return names


def _records(model: nn.Module) -> dict[str, Report]:
    """Return the reports of the patched models in this one, by their names in it."""
    return {n: m.__dict__["_fastgpt_report"] for n, m in model.named_modules() if "_fastgpt_report" in m.__dict__}


def _check(model: nn.Module, report: Report, chosen: frozenset[str], strict: bool) -> None:
    """Warn if nothing can be replaced; if strict, raise unless everything can."""
    if strict and report.left:
        reasons = "; ".join(dict.fromkeys(f"{e.part} {e.name or 'of the model'}: {e.why}" for e in report.left))
        raise ValueError(f"patch: strict, but {len(report.left)} could not be replaced: {reasons}")
    if report.replaced:
        return
    looked = f"looked for {', '.join(p for p in PARTS if p in chosen)}"
    reasons = "".join(f"; {e.name or 'the model'}: {e.why}" for e in report.left[:3])
    sentence = f"patch: nothing to patch in {type(model).__name__} ({looked}{reasons})"
    if strict:
        raise ValueError(sentence)
    if not report.dry_run:
        warnings.warn(sentence, stacklevel=3)


def _announce(model: nn.Module, report: Report) -> None:
    """Print what was done, in one line on stderr, in the first process only."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    more = " (fastgpt.patch_report(model) says why)" if report.left else ""
    print(f"fastgpt.patch: {type(model).__name__}: {report.summary()}{more}", file=sys.stderr)


def patch(
    model: M,
    *,
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    dry_run: bool = False,
    strict: bool = False,
    keep_logits: bool = False,
    quiet: bool = False,
) -> M:
    """Put fastgpt's kernels into a model, in place; `unpatch` removes them, `patch_report` lists what was done.

    A line on stderr names what was replaced. If nothing was, that is a warning (UserWarning).

    Args:
        model: any nn.Module. Recognised are LayerNorm and RMSNorm (by what they compute), GELU and gated MLPs,
            F.scaled_dot_product_attention, nn.MultiheadAttention and transformers' attention, transformers' rotary
            embedding, the LM head with its loss, cross-entropy, nn.Embedding.
        only, skip: names of parts, or one name: "norm", "mlp", "attention", "rope", "loss", "embedding".
        dry_run: change nothing; patch_report(model) then lists what would be done.
        strict: raise if something in a selected part cannot be replaced.
        keep_logits: transformers models return `logits` in training too (else None if labels are given).
        quiet: print no line; the warning stays.

    Returns:
        model. Patching it again with the same options does nothing.

    Raises:
        ValueError: an unknown part, other options than before, or, under strict, something left or nothing replaced.
    """
    chosen = (_names("only", only) or frozenset(PARTS)) - _names("skip", skip)
    options = (chosen, keep_logits)
    before = {n: r for n, r in _records(model).items() if r.replaced and not r.dry_run}
    if any(r.options != options for r in before.values()):
        raise ValueError(f"patch: {type(model).__name__} was patched with other options; unpatch it first")
    if before:
        return model
    found = [(n, m, f) for n, m, f in _find(model, keep_logits) if f.part in chosen]
    entries = [Entry(n, f.part, f.what, f.op, f.why) for n, _, f in found]
    replaced, left = [e for e in entries if e.op], [e for e in entries if not e.op]
    report = Report(replaced, left, dry_run, options, notes_on(model))
    _check(model, report, chosen, strict)
    if not dry_run:
        _apply([(m, f) for _, m, f in found if f.op])
    model.__dict__["_fastgpt_report"] = report
    if report.replaced and not (dry_run or quiet):
        _announce(model, report)
    return model


def _apply(found: list[tuple[nn.Module, Found]]) -> None:
    """Set the attributes; every patched module remembers its own, so copies can be unpatched too."""
    methods: dict[tuple[int, str], tuple[nn.Module, list[Any]]] = {}
    for module, f in found:
        if f.function is not None:
            places = [(f.function, f.call)] if f.call is not None else _rebind.standard([f.function])
            methods.setdefault((id(module), f.attribute), (module, []))[1].extend(places)
        else:
            _set(module, f)
    for (_, attribute), (module, changes) in methods.items():
        _bind(module, attribute, _rebind.rebind(dict(_rebind.methods(module))[attribute], changes))


def _remember(module: nn.Module) -> dict[str, Any]:
    """Return the record of a patched module: attribute -> what `patch` set it to."""
    mine: dict[str, Any] = module.__dict__.setdefault("_fastgpt", {})
    return mine


def _set(module: nn.Module, f: Found) -> None:
    """Set a bound method on the instance: copy.deepcopy binds it to the copy, accelerate wraps and unwraps it."""
    call, arguments, attribute, kept, op = f.call, f.arguments, f.attribute, f.settings, f.op
    assert call is not None
    if not hasattr(type(module), attribute):  # transformers' _loss_function, which is called without the model
        module.__dict__[attribute] = _remember(module)[attribute] = call
        return

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kept and (name := changed(self, kept)):
            leave_to_torch(op, f"{type(self).__name__}.{name} has changed since it was patched")
            return getattr(type(self), attribute)(self, *args, **kwargs)
        return call(self, *arguments, *args, **kwargs)

    method.__name__ = attribute
    method.__signature__ = inspect.signature(getattr(type(module), attribute))  # type: ignore[attr-defined]
    _bind(module, attribute, method)  # the Trainer and generate() inspect the signature


def _bind(module: nn.Module, attribute: str, function: Any) -> None:
    module.__dict__[attribute] = _remember(module)[attribute] = types.MethodType(function, module)


def unpatch(model: M) -> M:
    """Remove what `patch` put into this model or into models in it; return the model, as it was before.

    Raises:
        ValueError: `patch` was not called, or a forward was wrapped after patching (by accelerate, say): unwrap it
            first.
    """
    patched = [(n, m) for n, m in model.named_modules() if "_fastgpt" in m.__dict__]
    if not patched and all(r.dry_run for r in _records(model).values()):
        raise ValueError(f"unpatch: {type(model).__name__} is not patched")
    for name, module in patched:
        for attribute, ours in module.__dict__["_fastgpt"].items():
            if module.__dict__.get(attribute) != ours:
                where = f"{name}.{attribute}" if name else attribute
                raise ValueError(
                    f"unpatch: {where} was wrapped after patching; unwrap it first (accelerate: unwrap_model)"
                )
    for _, module in patched:
        for attribute in module.__dict__.pop("_fastgpt"):
            del module.__dict__[attribute]
    for m in model.modules():
        m.__dict__.pop("_fastgpt_report", None)
    return model


def patch_report(model: nn.Module) -> Report:
    """Report what `patch` replaced in this model, what it left, and why; `print` shows it as a table.

    Raises:
        ValueError: the model was neither patched nor inspected by a dry run.
    """
    records = _records(model)
    if not records:
        raise ValueError(f"patch_report: {type(model).__name__} was not patched")
    report = Report(dry_run=all(r.dry_run for r in records.values()), options=next(iter(records.values())).options)
    for prefix, r in records.items():
        report.notes.extend(note for note in r.notes if note not in report.notes)
        for mine, theirs in ((report.replaced, r.replaced), (report.left, r.left)):
            mine += [Entry(".".join(filter(None, (prefix, e.name))), e.part, e.what, e.op, e.why) for e in theirs]
    return report

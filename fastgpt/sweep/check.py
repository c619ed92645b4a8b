"""Check a sweep as a whole before anything runs: the settings of its runs, its data, its metric."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastgpt.core.errors import UserError
from fastgpt.core.options import did_you_mean, without_effect
from fastgpt.models.config import require
from fastgpt.sweep import space
from fastgpt.sweep.spec import Spec
from fastgpt.training import initial
from fastgpt.training.build import open_data
from fastgpt.training.config import EFFECTS, TrainConfig, read_config
from fastgpt.training.metric import full_name

# figures of each step in metrics.jsonl
STEPS = ("loss", "grad_norm", "lr", "tokens_per_second", "memory_gb", "mfu_causal", "mfu_full")
DATA = ("data", "data_dtype", "val_data", "val_sources", "tokenizer", "vocab_size", "val_fraction", "init")


@dataclass(frozen=True)
class Candidate:
    """Settings that a sweep may try: where they stand, what is given over those of all runs, and the whole."""

    name: str
    given: dict[str, str]
    cfg: TrainConfig


def candidates(spec: Spec) -> list[Candidate]:
    """Return the variants of a grid, or combinations of the least and greatest values of a search.

    Raises:
        UserError: settings are unknown or invalid, or one of them has no effect in any of the combinations.
    """
    if spec.sampler == "grid":
        named = spec.named()
    else:
        named = {f"search with {space.name_of(point)}": point for point in space.corners(spec.dimensions)}
    if len(named) == 1 and len(spec.seeds) == 1:
        raise UserError(f"there is one run, {next(iter(named))}, expected several variants or seeds")
    found: list[Candidate] = []
    idle: dict[str, str] = {}
    effective: set[str] = set()
    for name, given in named.items():
        try:
            cfg, typed = read_config(spec.arguments(given))
        except UserError as e:
            raise UserError(f"{name}: {e}" if given else str(e)) from None
        clauses = dict(without_effect(cfg, typed, EFFECTS))
        idle |= clauses
        effective |= typed - set(clauses)
        found.append(Candidate(name, given, cfg))
    for key in sorted(idle.keys() - effective):
        raise UserError(f"{key} {idle[key]}")
    if spec.devices and "device" in effective:
        raise UserError("devices and the setting device are both given, expected one of them")
    _check_pruner(spec, found)
    return found


def _check_pruner(spec: Spec, found: list[Candidate]) -> None:
    """Refuse a pruner that would never see a validation."""
    if spec.pruner == "none":
        return
    steps = full_name(spec.metric, STEPS) is not None
    require(not steps, "pruner", spec.pruner, f"none with {spec.metric}, which is no figure of a validation")
    for one in found:
        every, last = one.cfg.eval_every, one.cfg.most_steps
        require(0 < every < last, "pruner", spec.pruner, f"none, or an eval_every below max_steps {last}, not {every}")


def check_data(spec: Spec, found: list[Candidate]) -> None:
    """Open the data of the candidates, which prepares text once for all runs, and look for the metric.

    Raises:
        UserError: the data cannot be used, or no validation has the metric.
    """
    seen = set()
    for one in found:
        key = repr([*(getattr(one.cfg, name) for name in DATA), one.cfg.model.vocab_size])
        if key in seen:
            continue
        seen.add(key)
        cfg = initial.settle(one.cfg)
        _, sources = open_data(cfg)
        names = ["val_loss", *(f"val_loss.{name}" for name in sources)]
        presets = [Path(name).stem for name in cfg.evals]
        if spec.metric.partition(".")[0] not in presets and full_name(spec.metric, [*names, *STEPS]) is None:
            known = [*names, *STEPS, *(f"{name}.FIGURE" for name in presets)]
            near = did_you_mean(spec.metric, known)
            raise UserError(f"metric is {spec.metric!r}{near}, expected one of {', '.join(known)}")

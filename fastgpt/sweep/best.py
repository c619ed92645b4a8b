"""The best settings of a sweep as a file for `fastgpt train --config`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastgpt.models.config import ModelConfig
from fastgpt.sweep.spec import Spec
from fastgpt.sweep.table import Summary, shown
from fastgpt.training.config import TrainConfig, read_config, to_dict

LEFT_OUT = ("out", "resume", "seed", "device")  # of a run of the sweep, not of what it found


def best_yaml(best: Summary, spec: Spec) -> str:
    """Return the settings of a trial or variant that differ from the defaults of `fastgpt train`, in YAML."""
    import yaml

    cfg, _ = read_config(spec.arguments(best.row.given))
    settings, defaults = to_dict(cfg), to_dict(TrainConfig())
    model, plain = settings.pop("model"), asdict(ModelConfig())
    if model["block_size"] == cfg.block_size:
        model["block_size"] = None  # the same by default
    changed: dict[str, Any] = {key: value for key, value in model.items() if value != plain[key]}
    top = {key: value for key, value in settings.items() if value != defaults[key] and key not in LEFT_OUT}
    text = yaml.safe_dump({**({"model": changed} if changed else {}), **top}, sort_keys=False)
    found = f"# {best.row.name}: {spec.metric} {shown(best.mean)} over {len(best.complete)} seeds."
    return f"{found} Written by fastgpt sweep.\n{text}"

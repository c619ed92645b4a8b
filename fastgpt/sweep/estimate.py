"""The hours of a sweep, estimated before it runs."""

from __future__ import annotations

from fastgpt.core.device import default_device, dtype_of, peak_flops
from fastgpt.core.errors import counted
from fastgpt.sweep.check import Candidate
from fastgpt.sweep.spec import Spec
from fastgpt.training.memory import shape_of
from fastgpt.training.plan import MFU, with_vocabulary


def estimate(spec: Spec, found: list[Candidate]) -> str:
    """Return the hours of all runs in a sentence that states the assumptions; of a search, from the mean over the
    combinations of least and greatest values."""
    name = spec.devices[0] if spec.devices else found[0].cfg.device
    device = default_device(name)
    peak, source = peak_flops(device, dtype_of(found[0].cfg.dtype, device.type))
    each = [_seconds(one, peak * MFU) for one in found]
    runs = len(spec.seeds) * (spec.trials or len(found))
    at_once = spec.parallel or max(1, len(spec.devices))
    hours = runs * sum(each) / len(each) / 3600 / at_once
    limited = all(one.cfg.max_steps is None for one in found)
    how = "max_minutes" if limited else f"{MFU:.0%} of {peak / 1e12:.3g} TFLOP/s ({source})"
    pruned = ", less what is pruned" if spec.pruner != "none" else ""
    return (
        f"estimate, not measured: {hours:,.2g} hours for {counted(runs, 'run')}, {at_once} at a time, at {how}, "
        f"without validations{pruned}"
    )


def _seconds(one: Candidate, speed: float) -> float:
    """Return the seconds of a run at `speed` FLOP/s, at most those of max_minutes."""
    cfg = with_vocabulary(one.cfg)
    limit = float("inf") if cfg.max_minutes is None else 60 * cfg.max_minutes
    if cfg.max_steps is None:
        return limit
    return min(limit, cfg.max_steps * cfg.batch_tokens * shape_of(cfg).flops / speed)

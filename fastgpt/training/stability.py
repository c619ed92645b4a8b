"""Keep training stable without waiting for the device: a guard against loss spikes, and the loss scale for fp16."""

from __future__ import annotations

import torch
from torch import Tensor

SPIKE_HORIZON = 100  # steps that a loss is compared with
GROW_AFTER = 2000  # steps without overflow before the loss scale is doubled


class SpikeGuard:
    """Guard that flags, on the device, a loss more than `sigmas` standard deviations above the mean of the last steps.

    Mean and variance are exponential averages over SPIKE_HORIZON steps, and the first SPIKE_HORIZON losses are never
    flagged. A spike changes neither average.
    """

    def __init__(self, sigmas: float, device: torch.device) -> None:
        self.sigmas = sigmas
        self.state = torch.zeros(3, device=device)  # mean, variance, steps

    def __call__(self, loss: Tensor) -> Tensor:
        """Return 1 if this step's loss, (1,) fp32, is a spike, else 0; (1,) fp32."""
        mean, variance, steps = self.state.split(1)
        count, away = steps + 1, loss - mean
        # each line a launch or two, where a plain formula has twice as many; a NaN is no spike
        over = torch.minimum(away.sub(variance.sqrt(), alpha=self.sigmas), count - (SPIKE_HORIZON + 0.5))
        spike = torch.gt(over, 0, out=torch.empty_like(loss))
        rate = count.clamp(max=SPIKE_HORIZON).reciprocal()
        move = rate * away
        wider = torch.addcmul(variance, move, away)
        after = torch.cat((mean + move, torch.addcmul(wider, rate, wider, value=-1), count))
        keeps = torch.add(spike, loss, alpha=0) == 0  # neither a spike nor infinite nor NaN
        torch.where(keeps, after, self.state, out=self.state)
        return spike


class LossScale:
    """Loss scale for fp16, on the device: halved when gradients overflow, doubled after GROW_AFTER steps without."""

    def __init__(self, device: torch.device) -> None:
        self.state = torch.tensor([65536.0, 0.0], device=device)  # scale, steps since it changed

    @property
    def scale(self) -> Tensor:
        """(1,) fp32."""
        return self.state[:1]

    def update(self, norm: Tensor) -> None:
        """Adapt the scale to the norm, (1,), of a step's gradients."""
        scale, steps = self.state.split(1)
        grow = steps + 1 >= GROW_AFTER
        good = torch.cat((torch.where(grow, 2 * scale, scale), torch.where(grow, 0.0, steps + 1)))
        bad = torch.cat(((scale / 2).clamp(min=1.0), torch.zeros_like(steps)))
        self.state.copy_(torch.where(norm.isfinite(), good, bad))

"""Optimizers over fastgpt's fused update: AdamW, and Muon for matrices with AdamW for the rest."""

from fastgpt.optim.adamw import MASTERS, AdamW
from fastgpt.optim.muon import MuonAdamW

__all__ = ["MASTERS", "AdamW", "MuonAdamW"]

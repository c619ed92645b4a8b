"""Optimizers with a fused update: AdamW, and Muon for matrices combined with AdamW for the rest."""

from fastgpt.optim.adamw import AdamW
from fastgpt.optim.muon import MuonAdamW
from fastgpt.optim.state import MASTERS

__all__ = ["MASTERS", "AdamW", "MuonAdamW"]

"""Bias and safety: probes on local files, and a report before and after fine-tuning."""

from fastgpt.evaluate.safety.probes import parts_of

__all__ = ["parts_of"]

"""fastgpt: train a GPT at the most tokens per second, with kernels that work in any PyTorch model."""

from fastgpt import ops

__version__ = "0.1.0"
__all__ = ["__version__", "ops"]

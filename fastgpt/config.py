"""Settings under their public names: read them with `load_config`, or make them in code."""

from fastgpt.models.config import ModelConfig
from fastgpt.training.config import TrainConfig, load_config

__all__ = ["ModelConfig", "TrainConfig", "load_config"]

"""Training: from designs to a portable checkpoint, see ``training/train.py``."""

from mechdiffusers.training.config import TrainingConfig, parse_config

__all__ = ["TrainingConfig", "parse_config"]

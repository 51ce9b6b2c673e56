"""ModelConfig, router options and their one-line form; reading and writing the configurations of other projects."""

from mixtral.config.model import ModelConfig

__all__ = ["ModelConfig"]

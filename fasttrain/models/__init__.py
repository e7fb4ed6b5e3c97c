"""Networks; no training code. `MODELS.build("dit-xl/2")` gives a config, and `config.build()` the network."""

from fasttrain.models import dit, mmdit, presets, vit  # noqa: F401  (their registrations)
from fasttrain.models.architecture import MODELS, Transformer

__all__ = ["MODELS", "Transformer"]

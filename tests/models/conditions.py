"""A batch's conditions as a model's config wants them, random but the same each time."""

import torch
from torch import Tensor

from fasttrain.cond import Cond, Text
from fasttrain.models import Transformer
from fasttrain.models.mmdit import MmDiT
from fasttrain.models.modulated import Modulated


def captions(config: MmDiT, batch: int, seed: int = 1) -> Text:
    """Captions of random lengths, as the encoder's table has them: zeros behind their own tokens."""
    generator = torch.Generator().manual_seed(seed)
    places = config.text_tokens or 0
    length = torch.randint(1, places + 1, (batch,), generator=generator)
    tokens = torch.randn(batch, places, config.text_width or 0, generator=generator)
    own = torch.arange(places) < length[:, None]
    return Text(tokens * own[..., None], length, torch.randn(batch, config.text_pooled or 1, generator=generator))


def conditions(config: Transformer, batch: int, seed: int = 1, device: str = "cpu") -> Cond:
    """Labels or captions, and controls, of every kind the model takes."""
    generator = torch.Generator().manual_seed(seed)
    text = captions(config, batch, seed) if isinstance(config, MmDiT) and config.takes_text else None
    labels = torch.randint(0, (config.num_classes or 0) + 1, (batch,), generator=generator)
    controls: Tensor | None = None
    if isinstance(config, Modulated) and config.controls:
        controls = 300 * torch.rand(batch, len(config.control_columns), generator=generator)
    return Cond(labels, text, controls).map(lambda part: part.to(device))

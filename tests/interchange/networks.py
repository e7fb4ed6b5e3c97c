"""Small networks with weights that matter everywhere, and sources made of them."""

from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.cond import Cond, Text
from fasttrain.init_from import InitFrom
from fasttrain.interchange.fitting import Fitting
from fasttrain.interchange.source import Source
from fasttrain.interchange.tensors import of_mapping
from fasttrain.models import MODELS

SIZES: dict[str, Any] = {"depth": 2, "width": 64, "heads": 4, "input_size": 8, "channels": 4, "num_classes": 10}
TEXT: dict[str, Any] = {"text_tokens": 5, "text_width": 24, "text_pooled": 12}
IMAGES = {"kind": "image", "classes": [f"{i}" for i in range(10)], "text": None, "vae": None, "shift": None, "scale": None}
DIFFUSION = {"schedule": {"name": "cosine", "rescale": 1.0}, "prediction": {"name": "eps"}}


def config(name: str, **fields: Any) -> Any:
    return MODELS.build({"name": name, **SIZES, **fields})


def network(model: Any, seed: int = 0) -> nn.Module:
    """Built, with nothing left at zero: at their start these networks compute zero."""
    torch.manual_seed(seed)
    built = model.build().eval()
    disturb(built)
    return built


@torch.no_grad()
def disturb(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.05)


def spec(model: Any) -> dict[str, Any]:
    return MODELS.spec(model)


def source_of(there: Any, built: nn.Module, **known: Any) -> Source:
    """Weights of the network as a run of its model would offer them: only what is trained. `known` replaces what is known of it."""
    tensors = of_mapping({name: p for name, p in built.named_parameters() if p.requires_grad})
    facts = {"model": spec(there), "diffusion": DIFFUSION, "data": IMAGES, **known}
    return Source(told="the source", layout="fasttrain", digest="", tensors=tensors, **facts)


def fitting(source: Source, model: Any, data: dict[str, Any] = IMAGES, diffusion: dict[str, Any] = DIFFUSION, **asked: Any) -> Fitting:
    shapes = {name: tuple(p.shape) for name, p in model.build().named_parameters() if p.requires_grad}
    return Fitting(source, spec(model), shapes, diffusion, data, InitFrom(source="place", **asked))


def begun(plan: Any, built: nn.Module) -> nn.Module:
    """The network with the weights that a plan gives it."""
    built.load_state_dict({row.name: row.make() for row in plan.rows if row.make is not None}, strict=False)
    return built.eval()


def batch(size: int = 8, channels: int = 4, seed: int = 1) -> tuple[Tensor, Tensor, Cond]:
    """Noisy latents, timesteps and every condition that these networks take."""
    g = torch.Generator().manual_seed(seed)
    text = Text(torch.randn(5, 5, 24, generator=g), torch.tensor([5, 1, 3, 5, 2]), torch.randn(5, 12, generator=g))
    x, t = torch.randn(5, channels, size, size, generator=g), torch.tensor([0, 1, 33, 500, 999])
    return x, t, Cond(torch.tensor([0, 3, 9, 10, 1]), text, torch.rand(5, 3, generator=g))

"""The networks and objectives that the training benchmarks compare: same weights, same mathematics, other implementations."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fasttrain_kernels.dispatch import Kernels
from torch import Tensor, nn

from fasttrain.cond import Cond, Nothing, Text
from fasttrain.diffusion.objective import Objective, target_weight
from fasttrain.diffusion.prediction import V
from fasttrain.diffusion.schedule import Cosine
from fasttrain.diffusion.timesteps import Stratified
from fasttrain.diffusion.weighting import MinSnr
from fasttrain.models import MODELS, Transformer
from fasttrain.models.attention_choice import Shape, fastest
from fasttrain.models.implementations import Implementations
from fasttrain.models.layers import GeluLinear
from fasttrain.models.mmdit import MmDiT

LATENTS = {"input_size": 32, "channels": 4, "num_classes": 1000}
"""ImageNet at 256 pixels, encoded."""
LABEL_DROP = 0.1

CONTEXTS: dict[str, dict[str, Any]] = {
    "": {},
    "text": {"text_tokens": 77, "text_width": 768, "text_pooled": 768},
    "captions": {"text_tokens": 77, "text_width": 768, "text_pooled": 768, "masked_text": True},
}
"""What follows a "+" after an mmDiT's preset: CLIP-L's text with all its places filled, or captions of different lengths; else classes."""

REFERENCE = Kernels("reference")
LossOf = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""(model, x0, cond, position) -> the loss of a micro-batch."""


def config_of(name: str, **geometry: Any) -> Transformer:
    """A preset's config with the geometry filled in; "mmdit-xl/2+captions" is a preset and one of CONTEXTS."""
    preset, _, context = name.partition("+")
    return dataclasses.replace(MODELS.build(preset), **{**LATENTS, **geometry, **CONTEXTS[context]})


def our_objective(config: Transformer, kernels: Kernels, device: torch.device) -> LossOf:
    """The trainer's own objective: every draw a function of the position."""
    objective = Objective(
        Cosine(),
        V(),
        MinSnr(),
        Stratified(),
        label_drop=LABEL_DROP,
        nothing=nothing(config, device),
        seed=torch.tensor(11, device=device),
        kernels=kernels,
    )

    def loss(model: Any, x0: Tensor, cond: Cond, position: Tensor) -> Tensor:
        return objective(model, x0, cond, position, dtype=torch.bfloat16).loss

    return loss


def plain_objective(config: Transformer, device: torch.device) -> LossOf:
    """The same loss as the public training loops write it: torch's generator draws, nothing can be replayed, and it costs little."""
    t = torch.arange(Cosine().num_timesteps)
    alpha, sigma = Cosine().alpha_sigma(t)
    weight, none = target_weight(MinSnr(), V(), alpha, sigma), nothing(config, device)
    tables = torch.stack([alpha, sigma, weight]).float().to(device)

    def loss(model: Any, x0: Tensor, cond: Cond, position: Tensor) -> Tensor:
        t = torch.randint(tables.shape[1], (x0.shape[0],), device=device)
        alpha, sigma, weight = tables[:, t].unbind()
        told = none.instead_of_semantics(cond, torch.rand(x0.shape[0], device=device) < LABEL_DROP)
        eps = torch.randn_like(x0)
        a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        pred = model((a * x0 + s * eps).bfloat16(), t, told)
        return (weight * (pred.float() - (a * eps - s * x0)).square().flatten(1).mean(1)).mean()

    return loss


def batch_of(config: Transformer, size: int, device: torch.device, seed: int = 5) -> tuple[Tensor, Cond, Tensor]:
    """Random (x0, conditions, position): what is in an image, or a caption, does not change how long it takes; a caption's length may."""
    generator = torch.Generator(device).manual_seed(seed)
    channels, side, classes = config.geometry()
    x0 = torch.randn(size, channels, side, side, generator=generator, device=device)
    labels = torch.randint(classes, (size,), generator=generator, device=device)
    return x0, Cond(labels, captions_of(config, size, generator)), torch.arange(size, device=device)


def captions_of(config: Transformer, size: int, generator: torch.Generator) -> Text | None:
    """Random captions of 5 to 20 tokens of their own; None for a model that takes none."""
    if not isinstance(config, MmDiT) or config.text_tokens is None:
        return None
    device = generator.device
    tokens = torch.randn(size, config.text_tokens, config.text_width or 0, generator=generator, device=device)
    length = torch.randint(5, 21, (size,), generator=generator, device=device).clamp(max=config.text_tokens)
    return Text(tokens.half(), length, torch.randn(size, config.text_pooled or 0, generator=generator, device=device).half())


def nothing(config: Transformer, device: torch.device) -> Nothing:
    """What stands for no class or no caption."""
    empty = captions_of(config, 1, torch.Generator(device).manual_seed(9))
    return Nothing(config.null_label, empty)


@torch.no_grad()
def wake(network: nn.Module) -> None:
    """Gives everything that starts at zero small random values: behind closed gates most gradients would be zero, and prove nothing."""
    generator = torch.Generator(next(network.parameters()).device).manual_seed(6)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02, generator=generator)


def build_network(config: Transformer, kernels: Kernels, attention: str, device: torch.device, packed: bool | None = None) -> nn.Module:
    """The network on `device` in fp32, ready to be given weights."""
    with device:
        return config.build(Implementations(kernels, attention, packed=packed))


def as_public_code(network: nn.Module) -> None:
    """Gives an eager network the GELU of public code: a linear layer whose bias cuBLAS adds, and one kernel in the layer's own type.

    The reference adds the bias and takes the GELU in fp32, an operation at a time, over a block's widest tensor: torch.compile fuses that,
    but an eager baseline would be slow by what nobody runs.
    """
    for layer in network.modules():
        if isinstance(layer, GeluLinear):
            layer.forward = functools.partial(_linear_gelu, layer)  # type: ignore[method-assign]


def _linear_gelu(layer: GeluLinear, x: Tensor) -> Tensor:
    return F.gelu(F.linear(x, layer.weight, layer.bias), approximate=layer.gelu)  # [..., out]


def choose_attention(config: Transformer, batch: int, device: torch.device) -> tuple[str, dict[str, float]]:
    """The fastest attention for this model at this batch, which every arm then has, and the seconds that each one took."""
    shape = Shape(batch, config.heads, config.tokens, config.head_width, torch.bfloat16, config.ragged_tokens)
    return fastest(shape, device, compiled=True)

"""Small training runs on digits that differ in their implementation or their rounding, and in nothing else.

The loop is plain PyTorch around the project's own objective, networks and update, so that it runs wherever PyTorch does: the trainer's
own few steps with every kernel are in the tests. The ViT trains on the digits as pixels; the DiT, with QK norm and rotary positions, on
posteriors whose mean they are, with mirrored views; the mmDiT, rotary too, on pixels with a caption for each class: between them they use
every operation.
"""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fasttrain_kernels.adamw_ema import adamw_ema
from fasttrain_kernels.dispatch import Kernels
from fasttrain_kernels.latent_noising import Posterior
from fasttrain_kernels.text_padding import text_padding
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.networks import build_network, config_of, wake
from fasttrain.cond import Cond, Nothing, Text
from fasttrain.diffusion.objective import Objective
from fasttrain.diffusion.prediction import V
from fasttrain.diffusion.schedule import Cosine
from fasttrain.diffusion.timesteps import Stratified
from fasttrain.diffusion.weighting import MinSnr
from fasttrain.models import Transformer

BATCH = 4
WIDTH = {"depth": 2, "width": 32, "heads": 2, "patch": 4}
GEOMETRY = {"input_size": 8, "channels": 1, "num_classes": 10}
PLACES, TEXT_WIDTH = 5, 12
MODELS: dict[str, dict[str, Any]] = {
    "vit": {**WIDTH, "num_timesteps": 1000},
    "dit": {**WIDTH, "qk_norm": True, "rotary": True},
    "mmdit": {**WIDTH, "rotary": True, "text_tokens": PLACES, "text_width": TEXT_WIDTH},
}
LR, BETAS, EPS, WEIGHT_DECAY, DECAY = 1e-3, (0.9, 0.99), 1e-8, 0.03, 0.99


@dataclass(frozen=True)
class Variant:
    """One run.

    Args:
        kernels: "triton" or "reference", for every operation.
        dtype: of weights, data and arithmetic; bf16 weights have fp32 masters.
        reversed_batch: the same images of each step in the opposite order: the same step, summed in another order.
    """

    name: str
    kernels: str
    dtype: torch.dtype = torch.float32
    reversed_batch: bool = False


@dataclass(frozen=True)
class Outcome:
    """Losses by step, and the masters and averages at the end, by name, in float64."""

    losses: list[float]
    weights: dict[str, Tensor]


class Digits:
    """All digits in [-1, 1], drawn in a fixed shuffled order."""

    def __init__(self) -> None:
        digits = load_digits()
        self._images = torch.from_numpy(digits.images / 8 - 1)[:, None]
        self._labels = torch.from_numpy(digits.target).long()
        self._order = torch.from_numpy(np.random.default_rng(0).permutation(len(self._labels)))

    def batch(self, step: int, variant: Variant, device: torch.device) -> tuple[Tensor, Cond, Tensor]:
        """(images [B, 1, 8, 8], classes, position [B]) of step 0, 1, ..."""
        position = torch.arange(step * BATCH, (step + 1) * BATCH)
        position = position.flip(0) if variant.reversed_batch else position
        chosen = self._order[position % len(self._order)]
        wide = torch.float64 if variant.dtype == torch.float64 else torch.float32
        return self._images[chosen].to(device, wide), Cond(self._labels[chosen].to(device)), position.to(device)


def posterior(images: Tensor) -> Posterior:
    """Images as the means of narrow posteriors, with their mirror images as second views."""
    views = torch.stack([images, images.flip(-1)], dim=1)  # [B, 2, C, H, W]
    stored = torch.stack([views, torch.full_like(views, -6.0)], dim=2)  # [B, 2, 2, C, H, W]
    one = torch.ones(images.shape[1], dtype=torch.float32, device=images.device)
    return Posterior(stored, torch.zeros_like(one), one, flip=True)


def captions(labels: Tensor, position: Tensor, variant: Variant) -> Text:
    """Random tokens for each class, 1 to 5 of them, padded with noise; for class 10 those of an empty caption."""
    tokens = torch.randn(11, PLACES, TEXT_WIDTH, generator=torch.Generator().manual_seed(5)).to(labels.device)[labels]
    wide = tokens.double() if variant.dtype == torch.float64 else tokens
    padded = text_padding(wide, labels % PLACES + 1, 3, position, noise=0.1, impl=variant.kernels)
    return Text(padded, torch.full_like(labels, PLACES), padded[:, 0])


def model_config(model: str) -> Transformer:
    """The small network of this family."""
    return dataclasses.replace(config_of(model, **GEOMETRY), **MODELS[model])


def train(model: str, variant: Variant, steps: int, device: torch.device) -> Outcome:
    """Trains from the same weights on the same images; inside `running`, where the kernels are to be interpreted."""
    digits, config = Digits(), model_config(model)
    objective = _objective(config, variant, device)
    network = _network(config, variant, device)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    wide = torch.float64 if variant.dtype == torch.float64 else torch.float32
    masters = [p.detach().to(wide).clone() for p in parameters.values()]
    moments, squares = ([torch.zeros_like(m) for m in masters] for _ in range(2))
    averages = [m.clone() for m in masters]
    losses = []
    for step in range(steps):
        images, cond, position = digits.batch(step, variant, device)
        if model == "mmdit":
            cond = Cond(text=captions(cond.labels, position, variant))
        loss = objective(network, posterior(images) if model == "dit" else images, cond, position, dtype=variant.dtype).loss
        grads = list(torch.autograd.grad(loss, list(parameters.values())))
        settings = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY, "update": step + 1, "decays": [DECAY]}
        adamw_ema(masters, grads, moments, squares, [averages], impl=variant.kernels, **settings)
        with torch.no_grad():
            for parameter, master in zip(parameters.values(), masters, strict=True):
                parameter.copy_(master)
        losses.append(loss.item())
    named = {
        f"{kind} {name}": t for kind, all_ in (("master", masters), ("ema", averages)) for name, t in zip(parameters, all_, strict=True)
    }
    return Outcome(losses, {name: t.double().cpu() for name, t in named.items()})


def running(variant: Variant, device: torch.device) -> AbstractContextManager[Any]:
    """Where this run's kernels run: natively on a GPU, in Triton's interpreter without one. Gives the list of launches there."""
    if variant.kernels != "triton" or device.type == "cuda":
        return nullcontext([])
    from tests.kernels.interpreter import interpreting

    return interpreting()


def _network(config: Transformer, variant: Variant, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    network = build_network(config, Kernels(variant.kernels), "auto", torch.device("cpu"))
    wake(network)
    return network.to(device, variant.dtype)


def _objective(config: Transformer, variant: Variant, device: torch.device) -> Objective:
    tenth, first = (torch.tensor([number], device=device) for number in (10, 0))
    nothing = Nothing(config.null_label, captions(tenth, first, variant) if config.null_label is None else None)
    settings = {"label_drop": 0.1, "nothing": nothing, "seed": torch.tensor(3, device=device), "kernels": Kernels(variant.kernels)}
    return Objective(Cosine(), V(), MinSnr(), Stratified(), **settings)

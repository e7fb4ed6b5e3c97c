"""The averaged model beside a run in training: its held-out loss, and the grids of samples it draws."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fasttrain.cond import Nothing
from fasttrain.config import RunConfig
from fasttrain.data.index import Index
from fasttrain.data.loader import Loader
from fasttrain.diffusion.objective import Loss, Objective
from fasttrain.diffusion.weighting import Weighting
from fasttrain.engine.distributed import Processes
from fasttrain.generation import Wishes, build_generator
from fasttrain.models.implementations import Implementations
from fasttrain.sampling.images import save_grid, to_uint8

Decode = Callable[[Tensor], Tensor]

# Held-out noise, timesteps and sample noise are drawn under other keys than training's.
HELD_OUT_KEY = 0x68656C64
SAMPLE_KEY = 0x73616D70

# Samples drawn and decoded at once: a VAE's decoder needs gigabytes for a few dozen pictures.
BATCH = 16


class Preview:
    """A second copy of the network on each rank, filled with averaged weights when it is asked for something.

    Args:
        index: of what it is trained on.
        held_out: the loader of the held-out images and how many there are; None without any.
        decode: x0 [B, C, H, W] -> images in [-1, 1]; None where the samples cannot be shown (latents without data.vae).
        alive: called after each batch, so that a long look is not taken for a hang.
    """

    def __init__(
        self,
        config: RunConfig,
        index: Index,
        processes: Processes,
        held_out: Loader | None,
        decode: Decode | None,
        dtype: torch.dtype,
        alive: Callable[[], None] = lambda: None,
    ):
        self._config, self._index, self._processes, self._dtype, self._alive = config, index, processes, dtype, alive
        self._held_out, self._decode = held_out, decode
        if config.sampling.every:
            config.sampling.sampler.require()
        self._network: nn.Module | None = None
        self._seed = torch.tensor(config.seed, device=processes.device)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Takes these weights (fp32, whole)."""
        if self._network is None:
            self._network = self._config.model.build(Implementations(self._config.kernels)).to(self._processes.device, self._dtype).eval()
        self._network.load_state_dict(weights, strict=False)

    @torch.no_grad()
    def held_out_loss(self, batch: int, weighting: Weighting) -> dict[str, float]:
        """Weighted and unweighted loss on the held-out images, noise and timesteps a function of the image's number. A collective.

        Every rank takes every world_size-th image, so the sum over the ranks is over the same images at any world size. Images are
        numbered from 0 at every look, so a curriculum over timesteps is looked at as at its beginning, where it is uniform.

        Args:
            batch: images of a forward pass.
            weighting: the one in effect; a run may solve for it anew.
        """
        assert self._held_out is not None and self._network is not None
        d = self._config.diffusion
        objective = Objective(
            d.schedule,
            d.prediction,
            weighting,
            d.timesteps,
            nothing=Nothing(),
            seed=self._seed ^ HELD_OUT_KEY,
            kernels=self._config.kernels,
        )
        count, world_size = self._config.data.held_out, self._processes.world_size
        sums = torch.zeros(3, dtype=torch.float64, device=self._processes.device)
        batches = self._held_out.batches(0, batch, self._processes.rank, world_size)
        for _ in range(-(-count // (batch * world_size))):
            images = next(batches)
            loss = objective(self._network, images.x0(self._seed), images.cond, images.position, dtype=self._dtype)
            sums += _masked_sums(loss, images.position < count)
            self._alive()
        total, unweighted, seen = self._processes.sum(sums).tolist()
        return {"held_out_loss": total / seen, "held_out_mse": unweighted / seen}

    def draw(self, path: Path) -> bool:
        """Writes a grid of samples (rank 0), every rank making its share. A collective. False where they cannot be shown."""
        if self._decode is None or self._network is None:
            return False
        sampling, world_size = self._config.sampling, self._processes.world_size
        how = (sampling.sampler, sampling.guidance, self._seed ^ SAMPLE_KEY)
        generator = build_generator(self._config, self._index, self._network, *how, Wishes(), self._dtype)
        batch = min(BATCH, -(-sampling.count // world_size))
        drawn = []
        for samples in generator.generate(sampling.count, batch, rank=self._processes.rank, world_size=world_size):
            drawn.append((samples.number.numpy(), to_uint8(self._decode(samples.x0))))
            self._alive()
        shares = [share for shares in self._processes.gather_to_main(drawn) for share in shares]
        if shares:
            numbers, images = (np.concatenate([share[i] for share in shares]) for i in range(2))
            save_grid(path, images[np.argsort(numbers)])
        return True


def _masked_sums(loss: Loss, wanted: Tensor) -> Tensor:
    """Sums of the weighted and unweighted losses over the wanted samples, and their count: [3] float64."""
    rows = torch.stack([loss.weighted, loss.mse, torch.ones_like(loss.mse)]).double()
    return (rows * wanted).sum(dim=1)

"""A trained network taken from a run: which weights, and the generator that samples from it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fasttrain.building import build_network
from fasttrain.checkpoint import check_fits, kept, newest_sound, read_weights
from fasttrain.config import RunConfig
from fasttrain.data.index import Index, VaeRecord
from fasttrain.data.pretrained import pinned
from fasttrain.engine.fragments import MASTER
from fasttrain.engine.optimizer import ema_name
from fasttrain.errors import UserError
from fasttrain.generation import Wishes, build_generator
from fasttrain.run import check_identity, identity, read_run
from fasttrain.sampling import Sampler
from fasttrain.sampling.generate import Generator
from fasttrain.sampling.guidance import Guidance
from fasttrain.transfer import Transfer, trained_shapes
from fasttrain.visible import Decoder, decoder

RAW, UNTRAINED = "raw", "untrained"


@dataclass(frozen=True, eq=False)
class Trained:
    """The network of a run with chosen weights, in evaluation mode.

    Attributes:
        weights: what they are, in words: "ema of 1774000 images", "raw", "untrained".
        step: optimizer steps behind them.
        passed_over: newer checkpoints that are damaged, and how.
    """

    config: RunConfig
    index: Index
    network: nn.Module
    weights: str
    step: int
    passed_over: tuple[str, ...] = ()

    @classmethod
    def load(cls, run_dir: Path, weights: str, device: torch.device, step: int | None = None) -> "Trained":
        """Reads a run's newest checkpoint that verifies, or the one of a step.

        Args:
            weights: "ema" (or "ema_1" ...), "raw", or "untrained" for the network as it was before the first step, whatever `step` is.

        Raises:
            UserError: no run, no sound checkpoint, one of another config than the folder's, or no such weights.
        """
        config, index = read_run(run_dir)
        if weights not in (known := [*_averages(config), RAW, UNTRAINED]):
            raise UserError(f"--weights {weights}: {run_dir} has {', '.join(known)}")
        network = build_network(config)
        if weights == UNTRAINED:
            if transfer := Transfer.of_begun_run(config, index, trained_shapes(network)):
                network.load_state_dict(dict(transfer.weights()), strict=False)
            return cls(config, index, network.to(device).eval(), UNTRAINED, 0)
        folder, manifest, passed_over = newest_sound(run_dir) if step is None else (*kept(run_dir, step), [])
        check_identity(identity(config, index), manifest.identity, folder)
        tensors = read_weights(folder, manifest, MASTER if weights == RAW else weights)
        shapes = {name: list(p.shape) for name, p in network.named_parameters() if p.requires_grad}
        check_fits(manifest, shapes, manifest.states, folder)
        network.load_state_dict(tensors, strict=False)  # what is not trained is not in a checkpoint
        return cls(config, index, network.to(device).eval(), describe(config, weights), manifest.progress.step, tuple(passed_over))

    def generator(self, sampler: Sampler, guidance: Guidance, seed: int, wishes: Wishes) -> Generator:
        """What makes samples from these weights, in fp32.

        Raises:
            UserError: a seed out of range, guidance by what was never left out in training, wishes that the model cannot follow, or a
                sampler that is not installed.
        """
        if not 0 <= seed < 2**63:
            raise UserError(f"--seed must lie in [0, 2^63), got {seed}")
        if guidance.scale != 1 and not self.config.diffusion.label_drop:
            raise UserError(
                f"--guidance {guidance.scale}: this run never left out its classes or text (diffusion.label_drop is 0): set it to 1"
            )
        sampler.require()
        key = torch.tensor(seed, device=next(self.network.parameters()).device)
        return build_generator(self.config, self.index, self.network, sampler, guidance, key, wishes)

    def decoder(self, vae: str | None, revision: str | None = None) -> Decoder:
        """x0 -> images in [-1, 1]; `vae`, of a hub id with its `revision`, overrides the run's data.vae.

        Raises:
            UserError: the samples are latents and nobody says which VAE decodes them, or at which revision; or they are pixels, and
                somebody does; or the VAE is none for these latents.
        """
        own = self.index.vae
        if own is not None:
            _check_revision(vae, revision, own)
        elif (vae, revision) != (None, None):
            raise UserError(f"--vae, --vae-revision: the samples of {self.config.run_dir} are pixels, which none decodes: leave it out")
        data = self.config.data if vae is None else self.config.data.model_copy(update={"vae": vae})
        decode = decoder(self.index, data, next(self.network.parameters()).device, revision)
        if decode is None:
            assert own is not None
            raise UserError(f"the samples of {self.config.run_dir} are latents: give --vae, the hub id or folder of {own.id!r}")
        return decode


def _check_revision(vae: str | None, revision: str | None, own: VaeRecord) -> None:
    """Another hub id than the set's own needs a commit of its own."""
    if revision is not None and (vae is None or Path(vae).is_dir()):
        told = "give --vae too, the hub id that it is a commit of" if vae is None else f"{vae} is a folder, which has none: leave it out"
        raise UserError(f"--vae-revision: {told}")
    if vae is not None and (revision is not None or vae != own.id):
        pinned("--vae", vae, revision, "an AutoencoderKL")


def describe(config: RunConfig, weights: str) -> str:
    """Which weights, in words that stay true when the config changes."""
    return _averages(config).get(weights, weights)


def _averages(config: RunConfig) -> dict[str, str]:
    """The averages that a run keeps: their names and what they are."""
    return {ema_name(i): f"ema of {ema.half_life:g} images" for i, ema in enumerate(config.optimizer.ema)}

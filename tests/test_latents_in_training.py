"""Stored latents through real training steps: drawn in the launch that adds their noise, and held out as the run draws them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fasttrain_kernels.philox import Purpose, normal

from fasttrain.building import build_objective
from fasttrain.engine.distributed import Processes
from fasttrain.engine.optimizer import ema_name
from fasttrain.preview import HELD_OUT_KEY
from tests.ranks import run_ranks
from tests.runs import plain_config, start, trace
from tests.shards import write_random
from tests.test_kernels_in_training import interpreted

STEPS = 2
HELD_OUT = 3
MODEL = {"name": "vit", "depth": 1, "width": 32, "heads": 2, "patch": 4, "num_timesteps": 1000}


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("latents") / "set", "latent", (2, 2, 4, 8, 8), classes=3)


def _raw(run_dir: Path, latents: Path, **sections: Any) -> dict[str, Any]:
    raw = plain_config(run_dir, latents, training={"global_batch": 2}, data={"flip": True, "held_out": HELD_OUT}, **sections)
    return {**raw, "model": MODEL}


def test_latents_are_drawn_in_one_launch_as_the_reference_draws_them(latents: Path, tmp_path: Path):
    pytest.importorskip("triton")
    [(with_kernels, launched)] = run_ranks(1, interpreted, _raw(tmp_path / "triton", latents, kernels="triton"), STEPS)
    [with_references] = run_ranks(1, trace, _raw(tmp_path / "reference", latents, kernels="reference"), STEPS)
    assert "_latent_noising_kernel" in launched and "_noising_kernel" not in launched
    torch.testing.assert_close(with_kernels["losses"], with_references["losses"], rtol=1e-5, atol=0)


def _held_out_losses(processes: Processes, raw: dict[str, Any]) -> tuple[float, float]:
    """The held-out loss as the run tells it, and from x0 drawn by the formula at the run's seed, the first view, in one batch."""
    trainer = start(processes, raw)
    preview, loader = trainer.preview, trainer.preview._held_out
    assert loader is not None
    preview.load(trainer.state.full(ema_name(0)))
    told = preview.held_out_loss(HELD_OUT - 1, trainer.objective.weighting)["held_out_loss"]
    batch, index = next(loader.batches(0, HELD_OUT)), loader.shards.index
    mean, logvar = torch.from_numpy(loader.shards.gather(batch.sample_id.numpy())[0])[:, 0].float().unbind(1)
    z = mean + (logvar / 2).exp() * normal(trainer.seed, batch.position, (4, 8, 8), Purpose.POSTERIOR)
    shift, scale = (torch.tensor(channels).view(4, 1, 1) for channels in (index.latent_shift, index.latent_scale))
    objective = build_objective(trainer.config, trainer.seed ^ HELD_OUT_KEY)
    with torch.no_grad():
        loss = objective(preview._network, (z - shift) * scale, batch.cond, batch.position, dtype=torch.float32)
    trainer.loader.close()
    trainer.engine.destroy()
    return told, float(loss.loss)


def test_held_out_latents_are_drawn_at_the_runs_seed_and_never_mirrored(latents: Path, tmp_path: Path):
    raw = _raw(tmp_path, latents, log={"held_out_every": 100}, diffusion={"label_drop": 0.0})
    [(told, wanted)] = run_ranks(1, _held_out_losses, raw)
    assert told == pytest.approx(wanted, rel=1e-6)

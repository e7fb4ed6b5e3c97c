"""`fasttrain analyse consistency`, `interpolate` and `hessian` on real small runs: what they find, write and refuse."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fasttrain_kernels.dispatch import Kernels
from PIL import Image
from torch import Tensor

from fasttrain.commands.analyses.consistency import Kind, _check_comparable, is_random
from fasttrain.commands.analyses.hessian import measured, plain, twice_differentiable
from fasttrain.cond import Cond
from fasttrain.dataset import open_data
from fasttrain.diffusion.prediction import X0
from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.fixed_loss import FixedLoss
from fasttrain.models import MODELS
from fasttrain.models.implementations import Implementations
from fasttrain.research.hessian import Hessian
from fasttrain.sampling import SAMPLERS
from fasttrain.trained import Trained
from tests.commands import fasttrain
from tests.ranks import run_ranks
from tests.runs import plain_config

TINY = {"name": "vit", "depth": 1, "width": 4, "heads": 1, "patch": 4, "num_timesteps": 50}  # 594 parameters


def trained(folder: Path, digits: Path, **sections: Any) -> Path:
    sections = {"data": {"held_out": 32}, "checkpoint": {"every": 10, "keep_every": 10}, **sections}
    folder.with_suffix(".yaml").write_text(yaml.safe_dump(plain_config(folder, digits, **sections)))
    done = fasttrain("train", folder.with_suffix(".yaml"))
    assert done.status == 0, done.err
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> tuple[Path, Path]:
    """Of two seeds."""
    folder = tmp_path_factory.mktemp("landscape")
    return trained(folder / "one", digits), trained(folder / "two", digits, seed=1)


def analysed(name: str, *arguments: Any, out: Path) -> dict[str, Any]:
    """The JSON of an analysis that ends well and leaves a picture."""
    done = fasttrain("analyse", name, *map(str, arguments), "--out", out)
    assert done.status == 0, done.err
    with Image.open(out / f"{name}.png") as picture:
        assert picture.size[0] >= 480 and len(set(picture.convert("L").getdata())) > 8, "an empty picture"
    return json.loads((out / f"{name}.json").read_text())


def refused(*arguments: Any) -> str:
    done = fasttrain("analyse", *map(str, arguments))
    assert done.status == 2, (done.out, done.err)
    return done.err


def test_models_of_two_seeds_and_two_steps_are_compared(runs, tmp_path):
    found = analysed("consistency", *runs, "--checkpoint-steps", 10, 20, "--count", 20, "--steps", 4, out=tmp_path)
    assert found["models"] == ["one 10", "one 20", "two 10", "two 20"] and "other noise" in found["control_is"]
    for part in ("same", "control", "gain"):
        means = [[cell["value"] for cell in row] for row in found[part]]
        assert means == [list(column) for column in zip(*means, strict=True)]
    gain = found["gain"][0][1]
    assert gain["value"] > 4 * gain["error"] > 0, "ten steps of training do not turn every picture into another"
    with Image.open(tmp_path / "consistency-samples.png") as strip:
        assert strip.size == (12 * 68 + 4, 4 * 68 + 4)


def test_what_cannot_be_compared_is_refused(runs):
    assert "adds noise on its way" in refused("consistency", *runs, "--sampler", "ddim", "eta=0.5")
    few = fasttrain("analyse", "consistency", *map(str, runs), "--count", "10", "--steps", "4")
    assert few.status == 2 and "at least 20" in few.err and "heun with 4 steps: its own error" in few.out
    assert "a multiple of 3" in refused("consistency", *runs, "--count", 20, "--labels", 1, 2, 3)
    assert "of no checkpoint" in refused("consistency", *runs, "--weights", "untrained", "--checkpoint-steps", 10)
    assert "one model alone" in refused("consistency", runs[0])
    kind = Kind((1, 8, 8), (8, 8, 1), ("a", "b"), {"classes": 2}, None)
    for change in ({"noise": (4, 8, 8)}, {"image": (64, 64, 3)}, {"classes": ()}, {"asked": {"captions": 2}}, {"vae": "other"}):
        with pytest.raises(UserError, match="compare models of one kind"):
            _check_comparable(Path("one"), kind, Path("two"), kind._replace(**change))


@pytest.mark.parametrize(
    ("spec", "random"),
    [("heun", False), ("euler", False), ("dpm_solver", False), ("ddim", False), ({"name": "ddim", "eta": 0.1}, True), ("ddpm", True)],
)
def test_a_random_sampler_is_known_by_the_noise_that_it_asks_for(spec: Any, random: bool):
    assert is_random(SAMPLERS.build(spec), SCHEDULES.build("cosine"), X0()) is random


def test_the_line_between_checkpoints_begins_and_ends_at_their_losses(runs, tmp_path):
    few = ("--samples", 32, "--batch", 16, "--points", 5)
    found = analysed("interpolate", runs[0], *few, out=tmp_path)
    assert (found["from"], found["to"], found["weights"]) == ("untrained", "step 20", ["untrained", "ema of 500 images"])
    curve = found["profiles"]["training"]
    assert curve["at"] == [-0.25, 0, 0.25, 0.5, 0.75, 1, 1.25] and set(found["profiles"]) == {"training", "held-out"}
    direct = run_ranks(1, _mean_losses, str(runs[0]))[0]
    assert [curve["loss"][at] for at in (1, 5, 3)] == pytest.approx(direct, rel=1e-5)
    assert curve["loss"][5] < curve["loss"][1]
    seeds = analysed("interpolate", runs[0], "--other", runs[1], *few, out=tmp_path / "seeds")
    assert (seeds["from"], seeds["to"]) == ("one, step 20", "two, step 20")
    assert seeds["profiles"]["training"]["loss"][1] == pytest.approx(curve["loss"][5], rel=1e-6)
    assert seeds["distance"] > found["distance"] > 0


def test_lines_that_mean_nothing_are_refused(runs, tmp_path, digits):
    assert "no line between them" in refused("interpolate", runs[0], "--from", 20)
    assert "leave out --from and --to" in refused("interpolate", runs[0], "--other", runs[1], "--to", 10)
    assert "give the step" in refused("interpolate", runs[0], "--from", "first")
    other = trained(tmp_path / "eps", digits, diffusion={"prediction": "eps"}, training={"steps": 1})
    assert "diffusion.prediction" in refused("interpolate", runs[0], "--other", other)


def _mean_losses(processes: Processes, folder: str) -> list[float]:
    """Of the first network, of the last, and of the mean of their weights."""
    first, last = (Trained.load(Path(folder), weights, processes.device) for weights in ("untrained", "ema"))
    data = open_data(first.config)
    loss = FixedLoss(first.config, data, processes, samples=32, batch=16)
    found = [loss.mean(first.network), loss.mean(last.network)]
    for mine, other in zip(first.network.parameters(), last.network.parameters(), strict=True):
        mine.data = (mine.data + other.data) / 2
    found.append(loss.mean(first.network))
    data.close()
    return found


def _product(processes: Processes, folder: str) -> list[Tensor]:
    """The loss on fixed samples by what can be differentiated twice, H v, and the loss by what a run computes with."""
    on = Trained.load(Path(folder), "raw", processes.device)
    config, data = plain(on.config), open_data(on.config)
    network, loss = twice_differentiable(on, config), FixedLoss(config, data, processes, samples=32, batch=8)
    product = Hessian([p for p in network.parameters() if p.requires_grad], lambda: loss.minimised(network), processes.sum)
    vector = torch.randn(product.size, generator=torch.Generator().manual_seed(0))
    found = [torch.tensor(loss.mean(network)), product(vector), torch.tensor(loss.mean(on.network))]
    data.close()
    return found


def test_any_number_of_processes_gives_the_same_loss_and_products(runs):
    (alone,), (first, second) = run_ranks(1, _product, str(runs[0])), run_ranks(2, _product, str(runs[0]))
    for found in (first, second):
        torch.testing.assert_close(found[0], alone[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(found[2], alone[0], rtol=1e-5, atol=0)
        assert (found[1] - alone[1]).norm() < 1e-5 * alone[1].norm()


def _spectrum(processes: Processes, folder: str) -> tuple[dict[str, Any], Tensor]:
    """What the command measures on a run, and all eigenvalues of its Hessian, built column by column."""
    on = Trained.load(Path(folder), "raw", processes.device)
    config, data = plain(on.config), open_data(on.config)
    network, loss = twice_differentiable(on, config), FixedLoss(config, data, processes, samples=16, batch=16)
    product = Hessian([p for p in network.parameters() if p.requires_grad], lambda: loss.minimised(network), processes.sum)
    args = argparse.Namespace(steps=40, vectors=3, top=2, width=0.01, seed=0)
    whole = torch.stack([product(column) for column in torch.eye(product.size)]).double()
    data.close()
    return measured(product, args, processes), torch.linalg.eigvalsh((whole + whole.T) / 2)


def test_a_run_s_spectrum_is_that_of_its_whole_hessian(tmp_path, digits):
    folder = trained(tmp_path / "tiny", digits, model=TINY, diffusion={"schedule": {"name": "cosine", "num_timesteps": 50}})
    found, values = run_ranks(1, _spectrum, str(folder))[0]
    assert found["parameters"] == len(values) < 2000
    rounding = 1e-5 * float(values[-1])
    assert found["highest"][0]["value"] == pytest.approx(float(values[-1]), abs=found["highest"][0]["bound"] + rounding)
    assert found["highest"][0]["bound"] < 0.01 * float(values[-1])
    for ritz in (*found["highest"], *found["lowest"], found["highest_checked"], found["lowest_checked"]):
        assert float((values - ritz["value"]).abs().min()) <= ritz["bound"] + rounding
    assert found["highest"][0]["bound"] >= found["highest_checked"]["bound"]
    assert abs(found["trace"]["value"] - float(values.sum())) < 5 * found["trace"]["error"]
    assert found["asymmetry"] < 1e-3


@pytest.mark.parametrize("family", ["dit", "mmdit", "mmdit-dual"])
def test_every_family_can_be_differentiated_twice(family: str):
    """H v against the central difference of gradients along v."""
    name, form = (family.split("-")[0], {"form": "dual"} if family.endswith("dual") else {})
    shape = {"input_size": 8, "channels": 1, "num_classes": 3, "patch": 4, "depth": 2, "width": 16, "heads": 2}
    network = MODELS.build({"name": name, **form, **shape, "qk_norm": True}).build(Implementations(Kernels("reference"), "math"))
    generator = torch.Generator().manual_seed(0)
    parameters = [p for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    x, t, cond = torch.randn(4, 1, 8, 8, generator=generator), torch.tensor([1, 99, 500, 900]), Cond(torch.tensor([0, 1, 2, 3]))
    product = Hessian(parameters, lambda: iter([(network(x, t, cond) - x).square().mean()]))
    vector = torch.randn(product.size, generator=generator)
    found, step = product(vector), 2e-3

    def gradient(at: float) -> Tensor:
        before = [p.data for p in parameters]
        for p, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
            p.data = p.data + at * part.view_as(p)
        grads = torch.autograd.grad((network(x, t, cond) - x).square().mean(), parameters, allow_unused=True)
        for p, old in zip(parameters, before, strict=True):
            p.data = old
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, grads, strict=True)])

    expected = (gradient(step) - gradient(-step)) / (2 * step)
    assert found.norm() > 0 and (found - expected).norm() < 0.02 * expected.norm()


def test_the_command_writes_the_spectrum(runs, tmp_path):
    found = analysed("hessian", runs[0], "--samples", 32, "--batch", 16, "--steps", 8, "--vectors", 2, "--top", 2, out=tmp_path)
    assert found["checkpoint_step"] == 20 and found["lanczos_steps"] == [8, 8] and len(found["highest"]) == 2
    assert found["highest"][0]["value"] > found["lowest"][0]["value"] and found["trace"]["error"] > 0
    curve = found["density"]
    assert len(curve["at"]) == len(curve["density"]) and any(value is None for value in curve["density"])
    assert "more than --memory" in refused("hessian", runs[0], "--memory", "1e-6")


@pytest.fixture(scope="module")
def uncertain(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A run with a learned uncertainty."""
    where = tmp_path_factory.mktemp("uncertain") / "run"
    return trained(where, digits, model=TINY, diffusion={"schedule": {"name": "cosine", "num_timesteps": 50}, "uncertainty": True})


@pytest.mark.parametrize(
    ("name", "how"), [("interpolate", ("--points", 3)), ("hessian", ("--steps", 4, "--vectors", 1, "--top", 1))], ids=["line", "hessian"]
)
def test_a_learned_uncertainty_is_no_direction_and_no_part_of_the_loss_and_that_is_told(uncertain, tmp_path, name, how):
    done = fasttrain("analyse", name, uncertain, "--samples", 16, "--batch", 16, *how, "--out", tmp_path)
    assert done.status == 0, done.err
    assert done.out.count("learned uncertainty") == 1
    found = json.loads((tmp_path / f"{name}.json").read_text())
    network = Trained.load(uncertain, "ema", torch.device("cpu")).network
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert found["parameters"] == trainable - network.get_parameter("uncertainty.weight").numel()
    assert "left out" in found["loss"]["uncertainty"]

"""`fasttrain analyse` on real small runs: what each analysis finds, writes and refuses."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from fasttrain.commands.analyses.finetune import plan
from fasttrain.config import parse_config
from fasttrain.dataset import open_data
from fasttrain.engine.distributed import Processes
from fasttrain.range_losses import Draws, RangeLosses
from fasttrain.trained import Trained
from tests.commands import fasttrain
from tests.ranks import run_ranks
from tests.runs import plain_config

SMALL = ("--ranges", "4", "--samples", "16", "--batch", "8")


def trained(folder: Path, digits: Path, **sections: Any) -> Path:
    config = plain_config(
        folder,
        digits,
        data={"held_out": 32},
        training={"steps": 20},
        log={"every": 5, "timestep_ranges": 4, "tensorboard": False},
        **sections,
    )
    folder.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    done = fasttrain("train", folder.with_suffix(".yaml"))
    assert done.status == 0, done.err
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    return trained(tmp_path_factory.mktemp("analyses") / "run", digits)


def analysed(name: str, *arguments: Any, out: Path) -> dict[str, Any]:
    """The JSON of an analysis that ends well and leaves a picture."""
    done = fasttrain("analyse", name, *arguments, "--out", out)
    assert done.status == 0, done.err
    with Image.open(out / f"{name}.png") as picture:
        assert picture.size[0] >= 480 and len(set(picture.convert("L").getdata())) > 8, "an empty picture"
    return json.loads((out / f"{name}.json").read_text())


def test_gradients_and_the_weightings_against_them(run, tmp_path):
    found = analysed("gradients", run, *SMALL, out=tmp_path)
    assert found["names"] == ["0-249", "250-499", "500-749", "750-999"] and found["checkpoint_step"] == 20
    cosines = torch.tensor(found["cosines"])
    torch.testing.assert_close(cosines.diagonal(), torch.ones(4))
    assert torch.equal(cosines, cosines.T) and (cosines.abs() <= 1 + 1e-6).all() and all(loss > 0 for loss in found["loss"])
    pieces = analysed("gradients", run, *SMALL, "--memory", "1e-6", out=tmp_path / "pieces")
    torch.testing.assert_close(torch.tensor(pieces["gram"]), torch.tensor(found["gram"]), rtol=1e-4, atol=1e-8)

    compared = analysed("pareto", run, "--gradients", tmp_path / "gradients.json", "--lambda", "0", "0.5", out=tmp_path)
    assert [row["lambda"] for row in compared["by_lambda"]] == [0, 0.5]
    for row in compared["by_lambda"]:
        assert {"ugd", "const", "snr", "min_snr", "max_snr"} <= row["weightings"].keys()
        assert min(value["times_least"] for value in row["weightings"].values()) > 1 - 1e-9
        assert row["weightings"]["ugd"]["times_least"] < 1.1
        square = _without_noise(compared, row["lambda"])
        assert row["weightings"]["const"]["without_noise"] == pytest.approx(square, abs=1e-9)
    held_out = analysed("pareto", run, *SMALL, "--images", "held-out", "--weights", "untrained", out=tmp_path / "held-out")
    assert held_out["checkpoint_step"] == 0 and held_out["gram"] != found["gram"]


def _without_noise(found: dict[str, Any], regularisation: float) -> float:
    """Equation 11 of equal weights from the products of independent halves alone, in units of the mean squared gradient."""
    gram, shares = torch.tensor(found["gram"], dtype=torch.float64), torch.tensor(found["noise_shares"], dtype=torch.float64)
    between = gram - torch.diag(gram.diagonal() * shares)
    return float(between.mean() / gram.diagonal().mean()) + regularisation / len(gram)


def test_gradients_of_another_run_are_refused(run, tmp_path):
    others = {"run": "other", "ranges": 2, "names": [], "gram": [[1, 0], [0, 1]], "noise_shares": [0, 0]}
    (tmp_path / "gradients.json").write_text(json.dumps(others))
    done = fasttrain("analyse", "pareto", run, "--gradients", tmp_path / "gradients.json")
    assert done.status == 2 and "measure them anew" in done.err


def test_gradients_of_zeros_are_refused_in_one_line(run, tmp_path):
    zeros = {"run": "run", "ranges": 2, "names": ["0-499", "500-999"], "gram": [[0, 0], [0, 0]], "noise_shares": [0, 0]}
    (tmp_path / "gradients.json").write_text(json.dumps(zeros))
    done = fasttrain("analyse", "pareto", run, "--gradients", tmp_path / "gradients.json")
    assert done.status == 2 and "all gradients of" in done.err and "Traceback" not in done.err


def test_instability_and_cost(run, tmp_path):
    found = analysed("instability", run, "--ranges", "4", "--batch", "8", "--counts", "4", "16", "--repeats", "2", out=tmp_path)
    assert [row["samples_per_range"] for row in found["counts"]] == [4, 16]
    assert all(0 < row["spread"] < 1 and row["times_a_plain_step"] > 1 for row in found["counts"])
    assert all(abs(sum(weights) - 1) < 1e-9 for row in found["counts"] for weights in row["weights"])


def test_losses_by_range_over_training(run, tmp_path, digits):
    other = trained(tmp_path / "const", digits, diffusion={"weighting": "const"})
    found = analysed("ranges", run, other, "--average", "2", "--show", "0-249", "750-999", out=tmp_path)
    assert set(found["runs"]) == {"run", "const"} and found["runs"]["const"]["weighting"] == {"name": "const"}
    curve = found["runs"]["run"]["curves"]["0-249"]
    assert curve["images"] == [120, 280] and curve["mse"][1] < curve["mse"][0]
    told = [record["mse_by_timestep"]["0-249"] for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
    assert curve["mse"][0] == pytest.approx((told[0] + told[1]) / 2)


def test_losses_of_other_targets_are_not_compared(run, tmp_path, digits):
    other = trained(tmp_path / "v", digits, diffusion={"prediction": "v"})
    done = fasttrain("analyse", "ranges", run, other)
    assert done.status == 2 and f"diffusion.prediction of {other}" in done.err


def test_losses_of_other_parameters_of_one_target_are_not_compared(run, tmp_path):
    folders = []
    for sigma_data in (0.5, 1.0):
        folders.append(shutil.copytree(run, tmp_path / str(sigma_data)))
        raw = yaml.safe_load((run / "config.yaml").read_text())
        raw["diffusion"]["prediction"] = {"name": "edm", "sigma_data": sigma_data}
        (folders[-1] / "config.yaml").write_text(yaml.safe_dump(raw))
    done = fasttrain("analyse", "ranges", *folders)
    assert done.status == 2 and f"diffusion.prediction of {folders[1]}" in done.err


def test_fine_tuning_trains_on_its_range_alone_and_tells_what_becomes_of_all(run, tmp_path):
    how = ("--on", "1", "--steps", "10", "--learning-rate", "3e-3")
    found = analysed("finetune", run, *SMALL, *how, out=tmp_path)
    [row] = found["tuned"]
    [folder] = (tmp_path / "finetune").glob("range-1*/")
    assert all((folder.parent / f"{folder.name}.{ending}").exists() for ending in ("yaml", "log")) and folder.name.endswith("-0.003")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all([loss is not None for loss in record["mse_by_timestep"].values()] == [False, True, False, False] for record in records)
    assert row["change"][1] < 0 and len(row["change"]) == 4
    expected = [after / before - 1 for after, before in zip(row["loss_after"], found["loss_before"], strict=True)]
    assert row["change"] == pytest.approx(expected)
    assert Image.open(tmp_path / "finetune-matrix.png").size[0] > 400


def test_fine_tuning_is_at_a_constant_rate_and_momentum(tmp_path):
    given = {"learning_rate": 1e-3, "momentum_decay": {"floor": 0.2, "steps": 20}, "warmup_steps": 5}
    config = parse_config(plain_config(tmp_path, tmp_path, optimizer=given), "test")
    args = argparse.Namespace(run=tmp_path, weights="ema", ranges=10, steps=7)
    tuned = parse_config(plan(config, args, 3, 1e-4, tmp_path / "tuned"), "test").optimizer
    assert (tuned.momentum_decay, tuned.decay, tuned.warmup_steps) == (None, "constant", 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("gradients", "--ranges", "1"), "--ranges must lie between 2 and 1000"),
        (("gradients", "--samples", "7"), "odd number"),
        (("gradients", "--memory", "0"), "--memory must be positive"),
        (("pareto", "--lambda", "-1"), "--lambda must not be negative"),
        (("pareto", "--weights", "untrained", "--checkpoint-step", "20"), "of no checkpoint"),
        (("pareto", "--ugd-steps", "0"), "--ugd-steps"),
        (("instability", "--repeats", "1"), "2 repeats or more"),
        (("ranges", "--show", "1-2"), "the runs' ranges are 0-249"),
        (("finetune", "--on", "10"), "ranges are 0 to 9"),
        (("finetune", "--weights", "untrained"), "give ema or raw"),
    ],
)
def test_mistakes_are_told(run, arguments, told):
    name, *rest = arguments
    done = fasttrain("analyse", name, run, *rest)
    assert done.status == 2 and told in done.err


def range_losses(processes: Processes, run: str) -> torch.Tensor:
    trained = Trained.load(Path(run), "raw", processes.device)
    losses = RangeLosses(trained.config, open_data(trained.config), processes)
    return losses.means(trained.network, Draws(3, 8, 4)).sort(dim=1).values


def test_ranks_measure_the_same_samples(run):
    [alone] = run_ranks(1, range_losses, str(run))
    for found in run_ranks(2, range_losses, str(run)):
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=0)


def test_no_two_ranges_halves_or_repeats_share_a_position():
    draws = [Draws(3, 4, 2), Draws(3, 6, 2, first=Draws(3, 4, 2).after)]
    taken = [n for d in draws for k in range(3) for h in range(2) for n in range(d.start(k, h), d.start(k, h) + d.samples)]
    assert sorted(taken) == list(range(24 + 36))

"""The multi-task view over networks: what it asks for, how it goes on, and what it makes of what it finds."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import task_view
from benchmarks.environment import ROOT
from benchmarks.miniature_runs import Spent, TimeIsUp
from benchmarks.report import TABLES
from benchmarks.task_view_summary import by_lambda, claim, consistency, finetune, group, hours, interpolated, means, quotients, ranges
from benchmarks.task_view_tables import barrier_words, draw, verdict
from benchmarks.task_view_work import CLAIMED, Folder, Network, Plan, Worker, networks_of, other_jobs, pareto_jobs
from fasttrain.checkpoint import steps_of
from fasttrain.cli import _parse
from fasttrain.config import load_config
from fasttrain.errors import UserError

PLAN = Plan(seeds=2, steps=32, ranges=4, samples=16, images=20, regularisations=(0.0, 0.1))
NAMES = ["0-249", "250-499", "500-749", "750-999"]


def pareto_of(**objectives: float) -> dict[str, Any]:
    """A lambda of `analyse pareto`: the least objective is 1."""
    values = {"optimum (frank_wolfe)": 1.0, "ugd": 1.0, **objectives}
    return {
        "lambda": 0.1,
        "weightings": {
            name: {"objective": value, "times_least": value, "distance": 0.5, "without_noise": 10 - value} for name, value in values.items()
        },
    }


def network_of(step: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"checkpoint_step": step, "gram": [[3.0, -9.0], [-9.0, 1.0]], "noise_shares": [0.2, 1.0], "by_lambda": rows}


FIRST = pareto_of(const=2.0, snr=8.0, max_snr=4.0, min_snr=1.5, p2=1.2)
SECOND = pareto_of(const=2.0, snr=8.0, max_snr=4.0, min_snr=3.0, p2=9.0)


def test_min_snr_is_compared_with_the_best_of_the_papers_others_alone():
    row = by_lambda([FIRST, SECOND])
    assert row["nearest"] == ["min_snr", "const"] and row["nearest_of_all"] == ["p2", "const"]
    assert row["nearest_without_noise"] == ["snr", "snr"], "not the objective"
    assert row["over_best_other"]["values"] == [0.75, 1.5]
    assert row["over_best_other"]["mean"] == pytest.approx(math.sqrt(0.75 * 1.5))
    assert row["times_least"]["snr"] == {"values": [8.0, 8.0], "mean": pytest.approx(8.0), "interval": pytest.approx([8.0, 8.0])}


def test_the_claim_counts_networks_by_what_they_were_trained_with():
    groups = [
        group("const", 4, [network_of(4, [FIRST]), network_of(4, [SECOND])]),
        group("min_snr", 4, [network_of(4, [FIRST]), network_of(4, [FIRST])]),
    ]
    assert groups[0]["noise_share"] == pytest.approx((3 * 0.2 + 1) / 4)
    [told] = claim(groups)
    assert (told["nearest"], told["networks"], told["without_noise"]) == (3, 4, 0)
    assert told["by_trained"] == {"const": [1, 2], "min_snr": [2, 2]} and told["winners"] == {"min_snr": 3, "const": 1}
    said = verdict({"pareto": {"claim": [told]}})
    assert "in 3 of 4 networks (const 1 of 2, min_snr 2 of 2)" in said[0]
    assert said[-1] == "it is so in every network at lambda (none), in no network at lambda (none)"


def test_fine_tuning_by_distance():
    row = {"range": 1, "change": [-0.02, -0.05, -0.04, 0.01, 0.03], "better_or_worse": [-1, -1, -1, 0, 1]}
    found = finetune([{"names": ["a", "b", "c", "d", "e"], "tuned": [row]}])["by_distance"]
    assert found["itself"] == {"change": -0.05, "better": 1, "worse": 0, "of": 1}
    assert found["next to it"]["change"] == pytest.approx(-0.03) and found["next to it"]["better"] == 2
    assert list(found) == ["itself", "next to it", "two away", "three and more away"]
    assert found["two away"]["change"] == 0.01 and found["three and more away"] == {"change": 0.03, "better": 0, "worse": 1, "of": 1}


def test_losses_by_range_are_those_of_the_end_over_consts():
    def runs(**ends: float) -> dict[str, Any]:
        curve = {name: {"curves": {"0-9": {"mse": [99.0, end, end, end, end]}}, "weighting": {"name": name}} for name, end in ends.items()}
        return {"runs": curve}

    found = ranges([runs(const=2.0, snr=1.0, max_snr=2.0, min_snr=1.0), runs(const=1.0, snr=1.0, max_snr=4.0, min_snr=2.0)])
    assert "const" not in found and found["min_snr"]["0-9"]["values"] == [0.5, 2.0]
    assert found["min_snr"]["0-9"]["mean"] == pytest.approx(1.0) and found["max_snr"]["0-9"]["mean"] == pytest.approx(2.0)


def test_pairs_of_networks_by_what_they_share():
    networks = [Network("const", 0), Network("const", 1), Network("snr", 0)]
    same = [[{"value": 10.0 * i + j} for j in range(3)] for i in range(3)]
    gain = [[{"value": 1.0}] * 3] * 3
    found = consistency(networks, {"same": same, "gain": gain})
    assert found["same weighting, other seed"]["psnr"] == 1.0 and found["other weighting, same seed"]["psnr"] == 2.0
    assert found["other weighting and seed"] == {"psnr": 12.0, "gain": 1.0, "pairs": 1}


def test_a_barrier_in_units_of_its_ends():
    profile = {"at": [0.0, 0.5, 1.0], "loss": [1.0, 7.0, 3.0], "barrier": 5.0, "lowest_at": 0.0}
    assert interpolated({"from": "a", "to": "b", "profiles": {"training": profile}})["of_ends"] == 2.5


def test_of_the_barriers_from_the_untrained_network_the_highest_is_told():
    found = {
        "untrained to a": {"from": "untrained", "to": "a", "of_ends": -0.5},
        "untrained to b": {"from": "untrained", "to": "b", "of_ends": 0.125},
        "a to b": {"from": "a", "to": "b", "of_ends": 6.1389},
    }
    words = "at most 0.125 from before the first step to the end of training (2 networks); 6.14 from a, to b"
    assert barrier_words(found) == words


def test_what_is_not_finite_has_no_mean_and_one_seed_no_interval():
    assert quotients(["inf", 1.0])["mean"] is None and means([math.nan])["values"] == [None]
    assert means([3.0]) == {"values": [3.0], "mean": 3.0, "interval": None}
    assert quotients([2.0])["mean"] == pytest.approx(2.0)


def test_hours_by_kind_of_command():
    spent = [
        {"what": "pareto-const-0-4", "seconds": 1800},
        {"what": "pareto-snr-0-4", "seconds": 1800},
        {"what": "train snr-0", "seconds": 36},
    ]
    assert hours(spent) == {"pareto": 1.0, "train": 0.01}


@pytest.mark.parametrize("changed", [{"steps": 40}, {"samples": 24}, {"seeds": 0}])
def test_plans_that_cannot_be(changed):
    with pytest.raises(UserError, match="multiple of 16"):
        Plan(**{**PLAN.plain(), **changed})


def test_another_plan_is_refused_and_more_seeds_are_not(tmp_path):
    Folder(tmp_path).begin(PLAN)
    Folder(tmp_path).begin(Plan(**{**PLAN.plain(), "seeds": 5}))
    with pytest.raises(UserError, match="begun with samples 16: give the same"):
        Folder(tmp_path).begin(Plan(**{**PLAN.plain(), "samples": 32}))


@dataclass
class Pretended:
    """A laboratory whose commands leave what the real ones would, without the work."""

    folder: Folder
    most: float = math.inf
    asked: list[list[str]] = field(default_factory=list)

    def command(self, *words: str, about: str, environment: dict[str, str]) -> Spent:
        if len(self.asked) >= self.most:
            raise TimeIsUp(f"{about}: not done", Spent(1.0, 1.0))
        self.asked.append(list(words))
        if words[0] == "prepare":
            self._leave(self.folder.data / "index.json", {})
        elif words[0] == "train":
            given = dict(word.split("=", 1) for word in words[2:])
            for step in range(0, int(given["training.steps"]) + 1, int(given["checkpoint.keep_every"])):
                self._leave(Path(given["run_dir"]) / "checkpoints" / f"step-{step:08d}" / "manifest.json", {})
        else:
            self._leave(Path(words[words.index("--out") + 1]) / f"{words[1]}.json", found_by(words))
        return Spent(36.0, 36.0)

    def _leave(self, path: Path, found: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))


def found_by(words: tuple[str, ...]) -> dict[str, Any]:
    """What an analysis writes, in the form of the real ones."""
    if words[1] == "pareto":
        step = int(words[words.index("--checkpoint-step") + 1]) if "--checkpoint-step" in words else 0
        return network_of(step, [{**FIRST, "lambda": 0.0}, FIRST])
    if words[1] == "finetune":
        rows = [{"range": k, "change": [-0.01, -0.02, 0.0, 0.01], "better_or_worse": [-1, -1, 0, 1]} for k in (1, 2, 3)]
        return {"names": NAMES, "tuned": rows}
    if words[1] == "instability":
        return {"counts": [{"samples_per_range": n, "spread": 1 / n, "times_a_plain_step": 2.0 * n} for n in (2, 4)]}
    if words[1] == "ranges":
        curves = {name: {"images": [1, 2], "mse": [0.2, 0.1]} for name in NAMES}
        return {"runs": {run: {"weighting": {"name": run}, "curves": curves} for run in CLAIMED}}
    if words[1] == "consistency":
        square = [[{"value": 15.0}] * 8] * 8
        return {"same": square, "gain": square}
    if words[1] == "interpolate":
        profile = {"at": [0.0, 1.0], "loss": [1.0, 1.0], "barrier": 0.5, "lowest_at": 0.0}
        return {"from": "a", "to": "b", "profiles": {"training": profile}}
    return {"highest": [{"value": 9.0}], "lowest": [{"value": -1.0}], "trace": {"value": 40.0}, "negative_share": 0.1}


def test_every_command_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    lab = Pretended(Folder(tmp_path))
    Worker(lab, lab.folder, PLAN).run(1)  # type: ignore[arg-type]
    alike = {(*words[:2], *(word for word in words if word.startswith("--"))): words for words in lab.asked}
    assert len(alike) == 11
    for words in alike.values():
        args = _parse(words)
        if args.command == "train":
            config = load_config(args.config, args.overrides)
            assert config.checkpoint.keep_every == PLAN.points[0] and config.log.timestep_ranges == 4
    assert len(lab.asked) == 1 + 8 + (2 * 13) + len(list(other_jobs(PLAN)))


def test_what_lies_in_the_folder_is_not_done_again(tmp_path):
    folder = Folder(tmp_path)
    with pytest.raises(TimeIsUp):
        Worker(Pretended(folder, most=20), folder, PLAN).run(1)  # type: ignore[arg-type]
    assert [command["ended"] for command in folder.seconds()].count("done") == 20 and folder.seconds()[-1]["ended"] == "cut"
    rest, done = Pretended(folder), len(list(folder.root.glob("found/*")))
    Worker(rest, folder, PLAN).run(2)  # type: ignore[arg-type]
    jobs = [job for network in networks_of(PLAN) for job in pareto_jobs(PLAN, network)] + list(other_jobs(PLAN))
    assert len([words for words in rest.asked if words[0] == "analyse"]) == len(jobs) - done
    assert all(steps_of(folder.run(network)) == list(PLAN.points) for network in networks_of(PLAN)), "or disks fill"
    nothing = Pretended(folder, most=0)
    Worker(nothing, folder, PLAN).run(1)  # type: ignore[arg-type]


def test_the_result_is_a_table_a_picture_and_a_verdict(tmp_path, capsys):
    lab = Pretended(Folder(tmp_path / "work"))
    Worker(lab, lab.folder, PLAN).run(1)  # type: ignore[arg-type]
    result = task_view.result_of(lab.folder, PLAN)
    assert [(of["trained"], of["step"], of["networks"]) for of in result["pareto"]["groups"][:2]] == [("untrained", 0, 2), ("const", 2, 2)]
    assert len(result["pareto"]["groups"]) == 1 + 4 * 3 and result["pareto"]["claim"][0]["nearest"] == 26
    path = tmp_path / "benchmarks" / "results" / "cpu" / "task_view.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result))
    draw(path.with_suffix(".png"), result)
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.size[0] == 3 * 640 and len(picture.convert("RGB").getcolors(1 << 18)) > 8
    text = TABLES["task-view"](path.parent.parent)
    assert "| min_snr, 32 steps | 0.75 (0.75 to 0.75), 2 of 2 | 0.75 (0.75 to 0.75), 2 of 2 |" in text
    assert "itself -0.3 % (better in 2, worse in 2 of 6)" in text and "(benchmarks/results/cpu/task_view.png)" in text
    assert TABLES["task-view"](tmp_path / "none") == "*Not run.*"
    task_view.show(result)
    assert "in every network at lambda 0, 0.1, in no network at lambda (none)" in capsys.readouterr().out

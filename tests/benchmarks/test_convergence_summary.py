"""What is made of a comparison's folder: written here by hand, with known speed-ups, divergence and gaps."""

import json

import pytest
from PIL import Image

from benchmarks.convergence_again import judged_again
from benchmarks.convergence_folder import Folder, scores_in
from benchmarks.convergence_presets import Preset
from benchmarks.convergence_statistics import Curve, Point, SpeedUp
from benchmarks.convergence_summary import summary, verdict
from benchmarks.convergence_tables import convergence, draw, speed_up_rows, speed_up_words, told
from benchmarks.environment import RESULTS
from benchmarks.whole_file import write_json
from fasttrain.errors import UserError
from tests.benchmarks.test_convergence_presets import raw

ARMS = {"const": 1.0, "fast": 2.0, "lost": 1.0}


@pytest.fixture
def preset() -> Preset:
    arms = {name: [f"optimizer.weight_decay={number / 100}"] for number, name in enumerate(ARMS)}
    return Preset.model_validate(
        raw(steps=512, points=[32, 64, 128, 256, 512], seeds=3, groups={"x0": {"baseline": "const", "contender": "fast", "arms": arms}})
    )


@pytest.fixture
def folder(tmp_path, preset) -> Folder:
    return written(tmp_path, preset)


def written(root, preset) -> Folder:
    """Scores 640 / images, or twice as fast; `ema` is twice as bad as `ema_1`; `lost` ends by divergence; one arm of seed 2 is not done."""
    folder = Folder(root, preset)
    for run in preset.runs():
        if run.seed == 2 and run.arm == "fast":
            continue
        scale = 640_000 * (1 + run.seed) / ARMS[run.arm]
        write(folder.scores(run), 0, "untrained", 1e4)
        for step in preset.points[: 2 if run.arm == "lost" else None]:
            for weights, factor in (("ema", 2.0), ("ema_1", 1.0)):
                write(folder.scores(run), step, weights, factor * scale / (step * preset.batch))
        write_json(folder.done(run), {"diverged": run.arm == "lost", "last_step": 512, "commit": "c"})
        folder.spent(run).parent.mkdir(exist_ok=True)
        folder.spent(run).write_text(
            json.dumps({"what": "train", "ended": "done", "seconds": 3600, "cpu_seconds": 1800, "devices": 2}) + "\n"
        )
    return folder


def write(path, step, weights, value):
    write_json(path / f"step-{step:08d}-{weights}-pixels.json", {"frechet_distance": value, "protocol": {"checkpoint_step": step}})


def test_the_known_speed_up_is_found_from_whole_seeds_only(folder, preset):
    found = summary(folder)
    group = found["groups"]["x0"]
    assert group["seeds"] == [0, 1] and found["runs"] == 9 and found["runs_done"] == 8
    assert group["best_weights"]["const"] == ["ema_1", "ema_1"]
    # Seed 1 is twice as bad in every arm: its scores at 1/8, 1/4, 1/2 and the whole of the budget are what both runs had reached.
    assert group["best"]["thresholds"] == pytest.approx([1_280_000 / (512 * 64 * share) for share in (1 / 8, 1 / 4, 1 / 2, 1)])
    fast = group["best"]["arms"]["fast"]
    # Seed 0 is at the first two at once, after its first point or before.
    assert [up["value"] for up in fast["speed_up"]] == [None, None, pytest.approx(2.0), pytest.approx(2.0)]
    assert fast["speed_up"][1]["at_least"] == pytest.approx(2.0) and fast["speed_up"][1]["reached"] == 2
    assert fast["final"]["mean"] == pytest.approx(1.5 * 640_000 / 2 / (512 * 64))
    assert found["run_hours"] == 8 and found["gpu_hours"] == 16 and found["cpu_hours"] == 4
    assert [row["verdict"] for row in group["best"]["contender_over"]["const"][1:]] == ["faster"] * 3
    assert [row["verdict"] for row in group["best"]["contender_over"]["const"][:1]] == ["undecided"]


def test_a_fixed_length_is_reported_beside_the_best(folder, preset):
    other = preset.model_copy(update={"score": preset.score.model_copy(update={"fixed": "ema"})})
    group = summary(Folder(folder.root, other))["groups"]["x0"]
    assert group["fixed"]["thresholds"] == pytest.approx([2 * value for value in group["best"]["thresholds"]])


def test_divergence_is_told_as_divergence(folder, preset):
    lost = summary(folder)["groups"]["x0"]["best"]
    assert lost["arms"]["lost"]["diverged"] == 2 and lost["arms"]["lost"]["final"] is None
    assert [up["diverged"] for up in lost["arms"]["lost"]["speed_up"]] == [0, 1, 2, 2]  # what was reached before counts
    assert lost["contender_over"]["lost"][-1]["verdict"] == "the other diverged"
    head, rows = speed_up_rows({"groups": {"x0": summary(folder)["groups"]["x0"]}})
    assert head[0] == "arm" and {row[0]: row for row in rows}["x0 lost"][1] == "2 of 2 diverged or learned nothing"
    assert {row[0]: row for row in rows}["x0 lost"][4::2] == ["1.00 x, 1 lost", "2 lost"]


@pytest.mark.parametrize(("last", "diverged"), [(2e4, 1), (7.6e3, 1), (7.4e3, 0)])  # 1e4 before the first step
def test_a_last_score_hardly_better_than_before_the_first_step_is_divergence(folder, preset, last, diverged):
    run = next(run for run in preset.runs() if run.arm == "fast")
    for weights in ("ema", "ema_1"):
        write(folder.scores(run), 512, weights, last)
    assert summary(folder)["groups"]["x0"]["best"]["arms"]["fast"]["diverged"] == diverged


def test_nothing_whole_gives_no_group(tmp_path, preset):
    found = summary(Folder(tmp_path, preset))
    assert found["groups"] == {} and found["noise"] is None and found["protocol"] is None


def test_the_table_and_the_picture_come_from_the_json(folder, preset, tmp_path):
    result = {"preset": preset.plain(), "environment": {"device": "cpu"}, **summary(folder)}
    out = tmp_path / "results" / "cpu" / "convergence-test.json"
    write_json(out, result)
    draw(out.with_suffix(".png"), json.loads(out.read_text()))
    assert Image.open(out.with_suffix(".png")).size[0] == 640
    text = convergence("test", tmp_path / "results")
    assert "| x0 fast |" in text and "2.00 (2.00 to 2.00) x" in text and "convergence-test.png" in text
    assert convergence("other", tmp_path / "results") == "*Not run.*"


def test_noise_is_between_seeds_of_the_samples(folder, preset):
    run = next(preset.runs())
    for seed, value in ((1000, 1.0), (1001, 1.1), (1002, 0.9)):
        write(folder.noise(run, seed), 512, "ema_1", value)
    found = summary(folder)["noise"]
    assert found["relative_deviation"] == pytest.approx(0.1004, abs=1e-3) and found["scores"] == [1.0, 1.1, 0.9]


def test_other_files_are_no_scores(tmp_path):
    write(tmp_path, 64, "ema_1", 1.0)
    (tmp_path / "step-00000064-ema_2-pixels.json.1234.tmp").write_text("{")
    assert scores_in(tmp_path) == {64: {"ema_1": {"frechet_distance": 1.0, "protocol": {"checkpoint_step": 64}}}}


STRAIGHT, GONE = Curve((Point(1, 1.0),)), Curve((Point(1, 1.0),), diverged=True)


@pytest.mark.parametrize(
    ("up", "wanted"),
    [
        (SpeedUp(2.0, (1.5, 2.6), None, None, 5, 0, 0, 5), "faster"),
        (SpeedUp(2.0, (0.9, 4.4), None, None, 5, 0, 0, 5), "undecided"),
        (SpeedUp(0.5, (0.4, 0.6), None, None, 5, 0, 0, 5), "slower"),
        (SpeedUp(None, None, 1.7, None, 5, 1, 0, 5), "faster"),
        (SpeedUp(None, None, 0.7, None, 5, 1, 0, 5), "undecided"),
        (SpeedUp(None, None, None, 1.7, 5, 1, 0, 0), "undecided"),
        (SpeedUp(None, None, None, 0.7, 5, 1, 0, 0), "slower"),
        (SpeedUp(9.0, None, None, None, 1, 0, 0, 1), "undecided"),
        (SpeedUp(None, None, 9.0, None, 1, 1, 0, 1), "undecided"),
        (SpeedUp(None, None, None, 0.1, 1, 1, 0, 1), "undecided"),
    ],
)
def test_verdicts(up, wanted):
    assert verdict(up, [STRAIGHT] * 5, [STRAIGHT] * 5) == wanted


def test_a_contender_that_diverged_anywhere_is_told_as_that_and_not_as_faster():
    fast, none = SpeedUp(2.0, (1.5, 2.6), None, None, 4, 0, 0, 4), SpeedUp(None, None, None, None, 0, 0, 5, 0)
    assert verdict(fast, [STRAIGHT] * 4 + [GONE], [STRAIGHT] * 5) == "diverged in 1 of 5 seeds"
    assert verdict(none, [GONE] * 5, [GONE] * 5) == "diverged in 5 of 5 seeds"
    assert verdict(none, [STRAIGHT] * 5, [GONE] * 5) == "the other diverged"
    assert verdict(fast, [STRAIGHT] * 5, [STRAIGHT] * 4 + [GONE]) == "faster"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/convergence-*.json")), ids=lambda path: path.stem)
def test_committed_results_are_what_their_curves_say(path):
    result = json.loads(path.read_text())
    assert json.loads(json.dumps(judged_again(result))) == result


def test_which_runs_diverged_must_be_known_to_judge_again(folder, preset):
    result = json.loads(json.dumps({"preset": preset.plain(), **summary(folder)}))
    assert json.loads(json.dumps(judged_again(result))) == result
    lost = result["groups"]["x0"]["best"]["arms"]["lost"]
    del lost["which_diverged"]
    judged_again(result)
    lost["diverged"] = 1
    with pytest.raises(UserError, match="1 of 2 runs of lost diverged, and not which"):
        judged_again(result)


def test_hours_of_each_arm_count_what_was_cut_and_are_told(folder, preset):
    run = next(run for run in preset.runs() if run.arm == "fast")
    folder.add_seconds(run, {"what": "train", "ended": "cut", "seconds": 1800, "cpu_seconds": 0, "devices": 2})
    folder.add_seconds(None, {"what": "prepare", "ended": "done", "seconds": 360, "cpu_seconds": 360, "devices": 0})
    found = summary(folder)
    hours = found["groups"]["x0"]["hours"]
    assert hours["fast"]["run_hours"] == 2.5 and hours["fast"]["gpu_hours"] == 5 and hours["const"]["run_hours"] == 3
    assert found["run_hours"] == 8.6
    head, rows = speed_up_rows(found)
    assert head[2] == "hours" and {row[0]: row[2] for row in rows}["x0 fast"] == "2.50, 5.00 GPU"


def test_other_ends_of_the_samplers_grid_are_told(folder, preset):
    result = {"preset": preset.plain(), **summary(folder)}
    grids = result["groups"]["x0"]["grids"]
    assert grids["const"] == grids["fast"] and grids["const"]["smallest_sigma"] == pytest.approx(0.0064, abs=1e-4)
    assert "noise levels" not in told("cpu", result)
    arms = {**preset.groups["x0"].arms, "fast": ("diffusion.schedule=edm", "diffusion.prediction=edm")}
    other = preset.model_copy(update={"groups": {"x0": preset.groups["x0"].model_copy(update={"arms": arms})}})
    result = {"preset": other.plain(), **summary(written(folder.root / "other", other))}
    assert result["groups"]["x0"]["grids"]["fast"]["smallest_sigma"] == pytest.approx(0.002)
    assert "80 to 0.0064, but 80 to 0.002 for x0 fast" in told("cpu", result)


def test_the_samplers_own_error_is_told(folder, preset):
    runs = {run.arm: run for run in preset.runs() if run.seed == 0}
    for arm, share in (("const", 0.05), ("fast", 0.5)):
        last = scores_in(folder.scores(runs[arm]))[512]["ema_1"]["frechet_distance"]
        write(folder.finely(runs[arm]), 512, "ema_1", share * last)
    result = {"preset": preset.plain(), **summary(folder)}
    found = result["groups"]["x0"]["with_more_steps"]
    assert found == {"const": pytest.approx(0.05), "fast": pytest.approx(0.5), "lost": None}
    assert "4 times the sampler's steps last scores are 0.05 (x0 const) to 0.50 (x0 fast) of these" in told("cpu", result)


def test_pairs_that_are_bounds_are_told():
    words = speed_up_words(SpeedUp(None, None, None, 1.08, 9, 1, 0, 9).plain())
    assert words == "less than 1.08 x, 1 of 9 pairs are bounds"

"""What is made of a comparison's folder: written here by hand, with known speed-ups, divergence and gaps."""

import json

import pytest
from PIL import Image

from benchmarks.convergence_presets import Preset
from benchmarks.convergence_statistics import Curve, Point, SpeedUp
from benchmarks.convergence_summary import summary, verdict
from benchmarks.convergence_tables import convergence, draw, speed_up_rows
from benchmarks.convergence_work import Folder, scores_in
from benchmarks.whole_file import write_json
from fasttrain.errors import UserError
from tests.benchmarks.test_convergence_presets import raw

ARMS = {"const": 1.0, "fast": 2.0, "lost": 1.0}


@pytest.fixture
def preset() -> Preset:
    arms = {name: [] for name in ARMS}
    return Preset.model_validate(
        raw(steps=512, points=[32, 64, 128, 256, 512], seeds=3, groups={"x0": {"baseline": "const", "contender": "fast", "arms": arms}})
    )


@pytest.fixture
def folder(tmp_path, preset) -> Folder:
    """Scores 640 / images, or twice as fast; `ema` is twice as bad as `ema_1`; `lost` ends by divergence; one arm of seed 2 is not done."""
    folder = Folder(tmp_path)
    for run in preset.runs():
        if run.seed == 2 and run.arm == "fast":
            continue
        scale = 640_000 * (1 + run.seed) / ARMS[run.arm]
        write(folder.scores(run), 0, "untrained", 1e4)
        for step in preset.points[: 2 if run.arm == "lost" else None]:
            for weights, factor in (("ema", 2.0), ("ema_1", 1.0)):
                write(folder.scores(run), step, weights, factor * scale / (step * preset.batch))
        write_json(folder.done(run), {**run._asdict(), "diverged": run.arm == "lost", "last_step": 512})
        folder.spent(run).parent.mkdir(exist_ok=True)
        folder.spent(run).write_text(json.dumps({"what": "train", "seconds": 3600, "cpu_seconds": 1800, "devices": 2}) + "\n")
    return folder


def write(path, step, weights, value):
    write_json(path / f"step-{step:08d}-{weights}-pixels.json", {"frechet_distance": value, "protocol": {"checkpoint_step": step}})


def test_the_known_speed_up_is_found_from_whole_seeds_only(folder, preset):
    found = summary(folder, preset)
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
    group = summary(folder, preset.model_copy(update={"score": preset.score.model_copy(update={"fixed": "ema"})}))["groups"]["x0"]
    assert group["fixed"]["thresholds"] == pytest.approx([2 * value for value in group["best"]["thresholds"]])


def test_divergence_is_told_as_divergence(folder, preset):
    lost = summary(folder, preset)["groups"]["x0"]["best"]
    assert lost["arms"]["lost"]["diverged"] == 2 and lost["arms"]["lost"]["final"] is None
    assert [up["diverged"] for up in lost["arms"]["lost"]["speed_up"]] == [0, 1, 2, 2]  # what was reached before counts
    assert lost["contender_over"]["lost"][-1]["verdict"] == "the other diverged"
    head, rows = speed_up_rows({"groups": {"x0": summary(folder, preset)["groups"]["x0"]}})
    assert head[0] == "arm" and {row[0]: row for row in rows}["x0 lost"][1::2] == ["2 of 2 diverged", "1.00 x, 1 diverged", "2 diverged"]


def test_a_last_score_no_better_than_before_the_first_step_is_divergence(folder, preset):
    run = next(run for run in preset.runs() if run.arm == "fast")
    for weights in ("ema", "ema_1"):
        write(folder.scores(run), 512, weights, 2e4)
    assert summary(folder, preset)["groups"]["x0"]["best"]["arms"]["fast"]["diverged"] == 1


def test_nothing_whole_gives_no_group(tmp_path, preset):
    found = summary(Folder(tmp_path), preset)
    assert found["groups"] == {} and found["noise"] is None and found["protocol"] is None


def test_the_table_and_the_picture_come_from_the_json(folder, preset, tmp_path):
    result = {"preset": preset.plain(), "environment": {"device": "cpu"}, **summary(folder, preset)}
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
    found = summary(folder, preset)["noise"]
    assert found["relative_deviation"] == pytest.approx(0.1004, abs=1e-3) and found["scores"] == [1.0, 1.1, 0.9]


def test_a_folder_belongs_to_one_comparison(tmp_path, preset):
    Folder(tmp_path).begin(preset)
    Folder(tmp_path).begin(preset)
    with pytest.raises(UserError, match="it differs in seeds"):
        Folder(tmp_path).begin(preset.model_copy(update={"seeds": 7}))


def test_other_files_are_no_scores(tmp_path):
    write(tmp_path, 64, "ema_1", 1.0)
    (tmp_path / "step-00000064-ema_2-pixels.json.1234.tmp").write_text("{")
    assert scores_in(tmp_path) == {64: {"ema_1": {"frechet_distance": 1.0, "protocol": {"checkpoint_step": 64}}}}


@pytest.mark.parametrize(
    ("up", "wanted"),
    [
        (SpeedUp(2.0, (1.5, 2.6), None, None, 5, 0, 5), "faster"),
        (SpeedUp(2.0, (0.9, 4.4), None, None, 5, 0, 5), "undecided"),
        (SpeedUp(0.5, (0.4, 0.6), None, None, 5, 0, 5), "slower"),
        (SpeedUp(None, None, 1.7, None, 5, 0, 5), "faster"),
        (SpeedUp(None, None, None, 1.7, 5, 0, 0), "undecided"),
        (SpeedUp(9.0, None, None, None, 1, 0, 1), "undecided"),
    ],
)
def test_verdicts(up, wanted):
    assert verdict(up, [Curve((Point(1, 1.0),))]) == wanted

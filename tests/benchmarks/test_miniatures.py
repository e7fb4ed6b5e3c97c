"""The arithmetic of the small whole experiments, their pictures' making, and the commands' bound of time."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import size_control
from benchmarks.digit_pictures import OTHER_TEMPLATES, Judge, as_prepared, caption, prompts, reduced, write_folders
from benchmarks.miniature_runs import CommandFailed, Laboratory, TimeIsUp, overrides
from benchmarks.miniature_tables import resolution_transfer_rows, size_control_rows, text_to_image_rows
from benchmarks.resolution_transfer import FIRST, draw_curves, images_to, looks
from benchmarks.text_to_image import captioned
from fasttrain.data.prepare.images import prepare_images


@pytest.fixture
def lab(tmp_path: Path) -> Laboratory:
    return Laboratory(tmp_path / "lab", minutes=1)


def test_distances_of_hand_made_images():
    white, black = np.full((2, 8, 8, 3), 255, np.uint8), np.zeros((2, 8, 8, 3), np.uint8)
    checked = np.indices((8, 8)).sum(0) % 2 * np.uint8(255)
    checked = np.broadcast_to(checked[None, :, :, None], (2, 8, 8, 3)).astype(np.uint8)
    found = size_control.compared({4: white, 6: black, 8: checked})
    pairs = found["pairs"]
    assert pairs["4-6"] == {"distance": 1.0, "content": 1.0}
    # A checkerboard averages to grey: half of the way to either, whatever its own pixels do.
    assert pairs["4-8"] == pytest.approx({"distance": math.sqrt(0.5), "content": 0.5})
    assert found["distance"] == pytest.approx((1 + 2 * math.sqrt(0.5)) / 3)
    assert found["detail"] == pytest.approx({"4": 0.0, "6": 0.0, "8": 0.25})


def test_smaller_digits_hold_less_detail_and_the_same_content():
    small, whole = as_prepared(4) / 255, as_prepared(8) / 255
    assert size_control.detail(small) < 0.3 * size_control.detail(whole)
    assert size_control.apart(size_control.coarse(small), size_control.coarse(whole)) < 0.5 * size_control.apart(small, whole)


def test_other_noise_compares_samples_of_one_class():
    images = np.repeat(np.arange(20, dtype=np.uint8) // 10 * 255, 64 * 3).reshape(20, 8, 8, 3)
    assert size_control.other_noise(images) == 1.0


@pytest.mark.parametrize(
    ("threshold", "wanted"),
    [(8.0, 1000.0), (4.0, 2000.0), (math.sqrt(8.0), 2000 * math.sqrt(2)), (2.0, 4000.0), (1.9, None), (9.0, 1000.0)],
)
def test_images_to_a_distance_lie_on_logarithmic_lines(threshold, wanted):
    curve = [(1000, 8.0), (2000, 4.0), (4000, 2.0)]
    assert images_to(curve, threshold) == (wanted if wanted is None else pytest.approx(wanted))


def test_looks_double_up_to_the_most():
    assert looks(FIRST) == [FIRST] and looks(4 * FIRST + 1) == [FIRST, 2 * FIRST, 4 * FIRST]


def test_overrides_are_the_command_lines():
    assert overrides(run_dir="x", model__control_power="null") == ["run_dir=x", "model.control_power=null"]


def test_digits_become_folders_with_captions_and_a_judge_reads_them(tmp_path):
    assert write_folders(tmp_path / "digits", [4, 8], captions=True) == 1797
    sizes = {Image.open(path).size for path in (tmp_path / "digits" / "3").glob("*.png")}
    assert sizes == {(4, 4), (8, 8)}
    said = {(tmp_path / "digits" / "7" / path.name).read_text().strip() for path in (tmp_path / "digits" / "7").glob("*.txt")}
    assert all("seven" in caption or "7" in caption for caption in said) and len(said) == 12
    prepare_images(tmp_path / "digits", tmp_path / "shards", 8)
    judge = Judge.of(tmp_path / "shards")
    assert judge.accuracy > 0.9 and judge.seen + judge.unseen == 1797
    some = as_prepared(8)[:100, :, :, None].repeat(3, axis=-1)
    labels = np.array([int(path) for path in map(str, _labels()[:100])])
    assert judge.agreement(some, labels) > 0.95
    assert judge.agreement(some, (labels + 1) % 10) < 0.05


def _labels():
    from fasttrain.data.prepare.digits import DigitMaker

    return DigitMaker().labels


def test_a_digit_of_its_own_size_is_itself():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(np.asarray(reduced(image, 8)), image)
    assert np.asarray(reduced(image, 4))[0, 0] == pytest.approx(image[:2, :2].mean(), abs=0.5)


def test_captions_name_their_digit_and_are_a_function_of_the_number():
    assert caption(7, 3) == caption(7, 3)
    assert len({caption(7, number) for number in range(200)}) == 12
    asked = prompts(OTHER_TEMPLATES)
    assert len(asked) == 2 * 10 * len(OTHER_TEMPLATES) and asked["the number seven"] == 7 and asked["the number 3"] == 3
    assert not asked.keys() & {caption(digit, number) for digit in range(10) for number in range(200)}


def test_pictures_have_a_place_for_every_caption():
    picture = captioned(np.zeros((7, 8, 8, 3), np.uint8), ["a handwritten seven"] * 7)
    assert picture.height > 2 * 8 * 12 and np.asarray(picture).min() == 0


def test_a_command_is_run_its_mistake_told_and_its_time_bounded(lab, tmp_path, capsys):
    lab.command("prepare", "digits", tmp_path / "digits", about="digits")
    assert (tmp_path / "digits" / "index.json").exists() and "digits" in capsys.readouterr().out
    with pytest.raises(CommandFailed, match="is no run folder") as failed:
        lab.command("sample", tmp_path, about="nothing")
    assert failed.value.status == 2 and failed.value.spent.seconds > 0
    # Asked to end 57 seconds before the end, it is gone long before that; with less than these left nothing is begun.
    late = Laboratory(lab.folder, minutes=1, grace=57.0)
    training = ("train", "configs/quickstart.yaml", f"run_dir={tmp_path / 'run'}", f"data.train={tmp_path / 'digits'}")
    with pytest.raises(TimeIsUp, match="digits again: not done") as cut:
        late.command(*training, about="digits again")
    assert cut.value.spent.seconds > 2 and late.seconds_left > 0
    with pytest.raises(TimeIsUp, match="not begun"):
        late.command(*training, about="digits again")


def test_a_command_that_is_killed_tells_nothing_and_its_seconds_count(lab):
    with pytest.raises(CommandFailed) as killed:
        lab.command(about="killed", launcher=["sh", "-c", "kill -9 $PPID"])
    assert killed.value.spent.seconds > 0 and killed.value.spent.cpu_seconds == 0


def _trial(seed: int, arm: str, distance: float) -> dict:
    by_size = {"4": 0.001, "6": 0.002, "8": 0.003}
    agreement = {"4": 0.9, "6": 0.95, "8": 1.0}
    return {
        "seed": seed,
        "arm": arm,
        "distance": distance,
        "content": distance / 2,
        "other_noise": 0.4,
        "detail": by_size,
        "agreement": agreement,
    } | {"agreement_mirrored": 0.9}


def test_tables_of_the_miniatures():
    trials = [
        _trial(seed, arm, distance + seed / 100) for seed in (0, 1) for arm, distance in (("power cosine (8)", 0.02), ("constant", 0.2))
    ]
    result = {"trials": trials, "judge": {"accuracy": 0.97}, "real": {"distance": 0.1, "content": 0.05, "detail": {"4": 0.001}}}
    _, rows = size_control_rows(result)
    assert rows[0][:4] == ["power cosine (8)", "0.0250 (0.0200 to 0.0300)", "0.0125 (0.0100 to 0.0150)", "6.2%"]
    assert rows[1][0] == "constant" and rows[2][-2].startswith("97.0%")

    captions = {"some": {"samples": 600, "agreement": 0.95, "by_digit": {"1": 1.0, "7": 0.9}}}
    _, rows = text_to_image_rows({"captions": captions, "judge": {"accuracy": 0.98, "unseen": 360}})
    assert rows[0] == ["some", "600", "95.0%", "7: 90%"] and rows[1][2] == "98.0%"


def test_table_and_plot_of_the_transfer(tmp_path):
    arms = {
        "from scratch": {"curve": [(1024, 8.0), (2048, 4.0)], "needed": [1024.0, 2048.0]},
        "pre-trained": {"curve": [(1024, 3.0), (2048, 2.0)], "needed": [1024.0, 1024.0]},
    }
    arms["neither"] = {"curve": [(1024, 9.0), (2048, 8.5)], "needed": [None, None]}
    result = {"arms": arms, "thresholds": [8.0, 4.0]}
    head, rows = resolution_transfer_rows(result)
    assert head[-2:] == ["images to 8.00", "images to 4.00"]
    assert rows[0][1:] == ["8.00", "4.00", "at most 1,024", "2,048"]
    assert rows[1][3:] == ["at most 1,024", "at most 1,024"] and rows[2][3:] == ["not by 2,048", "not by 2,048"]
    draw_curves(tmp_path / "curves.png", result)
    with Image.open(tmp_path / "curves.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(1 << 16)) > 3

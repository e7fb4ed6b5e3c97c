"""`prepare text`: from captions to a table, through the real command; what is wrong with them is counted and told."""

import errno
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.cli import main
from fasttrain.data.config import DataConfig
from fasttrain.data.index import read_index
from fasttrain.data.prepare.text import _write_array, prepare_text
from fasttrain.data.shards import ShardSet
from fasttrain.data.text.encoder import TextEncoder
from fasttrain.data.text.table import TextTable
from fasttrain.errors import UserError
from tests.disks import fill
from tests.labelled_images import encoded, label_of, write_tar
from tests.ranks import TIMEOUT

from ..conftest import contents

OPTIONS = ("--size", 16, "--workers", 1, "--captions", "txt")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def captions_of(folder: Path, place: Path | None = None) -> list[str]:
    """The caption of each sample of a set, as its text has them."""
    text = place or folder / "text"
    captions = [json.loads(line) for line in (text / "captions.jsonl").read_text().splitlines()]
    return [captions[row] for row in np.load(text / "rows.npy")]


@pytest.fixture
def captioned_tree(tmp_path: Path) -> Path:
    """Nine images in two folders: captions in txt, some of them wrong."""
    root = tmp_path / "tree"
    texts = ["seven", "the digit seven", "seven", "", "one two three four five six", None, "a photo of nine", b"\xff", "zero"]
    for number, text in enumerate(texts):
        folder = root / ("a", "b")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), number * 20, np.uint8)).save(folder / f"{number}.png")
        if text is not None:
            (folder / f"{number}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
            (folder / f"{number}.json").write_text(json.dumps({"caption": f"json {number}", "url": "x"}))
    return root


def number_of_samples(folder: Path) -> list[int]:
    """Which image of `captioned_tree` each sample is."""
    return (ShardSet.open(folder).gather(np.arange(len(ShardSet.open(folder)))).arrays[:, 0, 0, 0] // 20).tolist()


def test_captions_beside_images_reach_their_samples(captioned_tree: Path, encoder_folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "set"
    assert run("prepare", "images", captioned_tree, out, *OPTIONS, "--shard-size", 4) == 0
    assert "9 samples of 3x16x16, 2 classes" in (told := capsys.readouterr().out) and "unreadable" not in told
    assert "3 without a caption, which get the empty one, listed in uncaptioned.jsonl" in told
    listed = {line["file"]: line["reason"] for line in map(json.loads, (out / "uncaptioned.jsonl").read_text().splitlines())}
    assert listed == {
        "b/3.png": "an empty caption",
        "b/5.png": "no file with a caption beside it",
        "b/7.png": "a caption that is not UTF-8",
    }
    assert run("prepare", "text", out, "--encoder", encoder_folder, "--max-tokens", 6) == 0
    told = capsys.readouterr().out
    assert "6 captions of 9 samples (captions kept with the images), 6 x 32 and 24 by tiny-clip" in told
    assert "1 longer than 6 tokens, cut to them (the longest has 8)" in told
    assert "3 samples without a caption, which get the empty one, listed in uncaptioned.txt" in told
    wanted = ["seven", "the digit seven", "seven", "", "one two three four five six", "", "a photo of nine", "", "zero"]
    numbers = number_of_samples(out)
    assert captions_of(out) == [wanted[number] for number in numbers]
    without = [row for row, number in enumerate(numbers) if not wanted[number]]
    assert list(map(int, (out / "text" / "uncaptioned.txt").read_text().split())) == without
    table = TextTable.open(str(out / "text"), read_index(out), DataConfig(train=str(out)))
    assert table.gather(np.arange(9))[1].tolist() == [
        {"": 2, "seven": 3, "zero": 3, "the digit seven": 5}.get(wanted[n], 6) for n in numbers
    ]


def test_images_without_caption_are_left_out_where_one_is_required(captioned_tree: Path, tmp_path: Path, capsys):
    out = tmp_path / "set"
    command = ["prepare", "images", captioned_tree, out, *OPTIONS]
    assert run(*command, "--require-captions") == 0
    assert "6 samples" in (told := capsys.readouterr().out) and "3 unreadable, listed in rejected.jsonl" in told
    reasons = [json.loads(line)["reason"] for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert sorted(reasons)[0] == "no caption: a caption that is not UTF-8"
    assert run(*command) == 2
    assert "already holds a different set" in capsys.readouterr().err


def test_captions_in_json(captioned_tree: Path, tmp_path: Path):
    out = tmp_path / "set"
    assert run("prepare", "images", captioned_tree, out, *OPTIONS[:-1], "json") == 0
    captions = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert captions == [None if number == 5 else f"json {number}" for number in number_of_samples(out)]


def test_a_flat_folder_of_captioned_images_has_no_classes(captioned_tree: Path, tmp_path: Path):
    out = tmp_path / "set"
    assert run("prepare", "images", captioned_tree / "a", out, *OPTIONS) == 0
    assert read_index(out).num_classes == 0 and len(captions := (out / "captions.jsonl").read_text().split("\n")) == 6
    assert '"a photo of nine"' in captions


def test_latents_keep_captions_as_images_do(captioned_tree: Path, vae_folder: Path, tmp_path: Path):
    for kind, more in (("images", ()), ("latents", ("--vae", vae_folder))):
        assert run("prepare", kind, captioned_tree, tmp_path / kind, *OPTIONS, "--shard-size", 4, *more) == 0
    one, other = (tmp_path / kind / "captions.jsonl" for kind in ("images", "latents"))
    assert one.read_bytes() == other.read_bytes()


def test_class_names_through_a_template_and_a_file_of_words(captioned_tree: Path, encoder_folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "set"
    assert run("prepare", "images", captioned_tree, out, *OPTIONS) == 0
    (tmp_path / "words.txt").write_text("a seven, vii\nb great eight\n")
    text = tmp_path / "classes"
    command = ["prepare", "text", out, "--encoder", encoder_folder, "--out", text]
    assert run(*command, "--class-names", tmp_path / "words.txt", "--template", "the digit {}") == 0
    assert "3 captions of 9 samples (2 class names in 'the digit {}')" in capsys.readouterr().out
    assert captions_of(out, text) == [f"the digit {('seven', 'great eight')[number % 2]}" for number in number_of_samples(out)]


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards as img2dataset writes them: jpg with txt and json, json alone, or neither."""
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        members = []
        for row in range(5):
            number, key = shard * 5 + row, f"{shard:05d}{row:04d}"
            members.append((f"{key}.jpg", encoded(number, "jpg")))
            if row != 3:
                members.append((f"{key}.json", json.dumps({"caption": f"json {number}", "width": 32}).encode()))
            if row < 2:
                members.append((f"{key}.txt", f"text {number}".encode()))
        write_tar(folder / f"{shard:05d}.tar", members)
    return folder


SHARD_CAPTIONS = ["text 0", "text 1", "json 2", "", "json 4", "text 5", "text 6", "json 7", "", "json 9"]


@pytest.mark.parametrize("place", ["", "/{00000..00001}.tar", "/*.tar"])
def test_the_captions_of_webdataset_shards(shards: Path, encoder_folder: Path, tmp_path: Path, place: str, capsys):
    pattern, out = f"{shards}{place}", tmp_path / "text"
    assert run("prepare", "text", pattern, "--encoder", encoder_folder) == 2
    assert "give --out FOLDER" in capsys.readouterr().err
    assert run("prepare", "text", pattern, "--encoder", encoder_folder, "--out", out) == 0
    assert "2 samples without a caption" in capsys.readouterr().out
    assert captions_of(shards, out) == SHARD_CAPTIONS
    for size in (16, 32):  # the text belongs to the samples, at whatever size they are seen
        opened = ShardSet.open(pattern, config := DataConfig(train=pattern, size=size))
        assert TextTable.open(str(out), opened.index, config).gather(np.array([3]))[1].tolist() == [2]


def test_webdataset_shards_as_a_source_of_latents(shards: Path, vae_folder: Path, tmp_path: Path):
    out = tmp_path / "set"
    assert run("prepare", "latents", shards / "{00000..00001}.tar", out, "--vae", vae_folder, *OPTIONS) == 0
    index = read_index(out)
    assert index.samples == 10 and index.num_classes == 0
    captions = [json.loads(line) or "" for line in (out / "captions.jsonl").read_text().splitlines()]
    assert sorted(captions) == sorted(SHARD_CAPTIONS)
    names = [json.loads(line)["file"] for line in (out / "uncaptioned.jsonl").read_text().splitlines()]
    assert sorted(name.partition(":")[0] for name in names) == ["00000.tar", "00001.tar"]


def test_labels_of_webdataset_shards_stay_with_their_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTTRAIN_CACHE", str(tmp_path / "cache"))
    members = [
        m for n in range(12) for m in ((f"{n}.cls", str(label_of(n)).encode()), (f"{n}.png", encoded(n, "png")), (f"{n}.txt", b"%d" % n))
    ]
    write_tar(tmp_path / "0.tar", members)
    out = tmp_path / "set"
    assert run("prepare", "images", tmp_path / "{0..0}.tar", out, "--size", 32, "--workers", 1, "--captions", "txt") == 0
    captions = [int(json.loads(line)) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert ShardSet.open(out).labels.tolist() == [label_of(number) for number in captions]


def make(place: Path, out: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    prepare_text(str(place), out, TextEncoder.load(str(folder)), "the digit {}", part_size=3, batch=2)


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(
    prepared_digits: Path, prepared_text: Path, encoder_folder: Path, tmp_path: Path
):
    """SIGKILL once a part is there; the next command makes the rest, and the whole equals what was never interrupted."""
    out = tmp_path / "text"
    process = multiprocessing.get_context("forkserver").Process(target=make, args=(prepared_digits, out, encoder_folder))
    process.start()
    while process.is_alive() and not (out / "receipts" / "part-00000.json").exists():
        time.sleep(0.001)
    process.kill()
    process.join(TIMEOUT)
    (out / "text.json").unlink(missing_ok=True)  # where the kill came too late, the table is at least unfinished
    make(prepared_digits, out, encoder_folder)
    assert contents(out) == contents(prepared_text)


def test_only_what_is_missing_or_damaged_is_made_again(prepared_digits: Path, prepared_text: Path, encoder, tmp_path: Path):
    out = Path(shutil.copytree(prepared_text, tmp_path / "text"))
    (out / "tokens-00001.npy").write_bytes(b"damaged")
    (out / "pooled-00003.npy").unlink()
    done = prepare_text(str(prepared_digits), out, encoder, "the digit {}", part_size=3, batch=2)
    assert done.made == 3 + 2 and contents(out) == contents(prepared_text)
    again = prepare_text(str(prepared_digits), out, encoder, "the digit {}", part_size=3, batch=2)
    assert again.made == 0 and "nothing left to do: all parts verified" in again.summary(out)


def test_mean_and_deviation_of_each_channel(prepared_text: Path):
    text = json.loads((prepared_text / "text.json").read_text())
    tokens = np.concatenate([np.load(path) for path in sorted(prepared_text.glob("tokens-*.npy"))]).astype(np.float64)
    np.testing.assert_allclose(text["mean"], tokens.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(text["std"], tokens.std(0), rtol=1e-9)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--template", "another {}"], "already holds a different set .*captions"),
        (["--max-tokens", "8"], "already holds a different set .*encoder"),
        (["--template", "no place"], r"--template 'no place': write \{\} once"),
        (["--batch", "0"], "--batch and --part-size must be at least 1"),
        (["--class-names", "nowhere.txt"], r"--class-names nowhere\.txt: cannot be read"),
    ],
)
def test_wrong_commands(prepared_digits: Path, prepared_text: Path, encoder_folder: Path, changes: list[str], told: str, capsys):
    import re

    options = ["--template", "the digit {}", "--part-size", "3", "--batch", "2"]
    assert run("prepare", "text", prepared_digits, "--encoder", encoder_folder, "--out", prepared_text, *options, *changes) == 2
    assert re.search(told, capsys.readouterr().err)


def test_sets_with_neither_captions_nor_classes(captioned_tree: Path, shards: Path, encoder: TextEncoder, tmp_path: Path):
    write_tar(tmp_path / "0.tar", [("1.png", encoded(1, "png"))])
    with pytest.raises(UserError, match=r"not one caption in these shards; give --template"):
        prepare_text(str(tmp_path / "0.tar"), tmp_path / "text", encoder)
    with pytest.raises(UserError, match=r"has neither captions nor classes"):
        prepare_text(str(tmp_path / "0.tar"), tmp_path / "text", encoder, template="{}")
    with pytest.raises(UserError, match=r"nowhere: no such folder of shards"):
        prepare_text(str(tmp_path / "nowhere"), tmp_path / "text", encoder)


def test_damaged_captions_of_a_set(captioned_tree: Path, encoder: TextEncoder, tmp_path: Path):
    out = tmp_path / "set"
    assert run("prepare", "images", captioned_tree, out, *OPTIONS) == 0
    (out / "captions.jsonl").write_text((out / "captions.jsonl").read_text().replace("nine", "ten"))
    with pytest.raises(UserError, match=r"captions\.jsonl: its content is not what was prepared"):
        prepare_text(str(out), tmp_path / "text", encoder)
    (out / "captions.jsonl").unlink()
    with pytest.raises(UserError, match=r"captions\.jsonl: missing"):
        prepare_text(str(out), tmp_path / "text", encoder)


def test_captions_required_without_saying_where(captioned_tree: Path, tmp_path: Path, capsys):
    assert run("prepare", "images", captioned_tree, tmp_path / "set", "--size", 16, "--require-captions") == 2
    assert "--require-captions goes with --captions" in capsys.readouterr().err


def test_a_full_disk(disk: Callable[[int], Path], prepared_digits: Path, encoder: TextEncoder):
    """Whichever of its files finds no room: one message, nothing half-written, and with room it goes on with what it has."""
    folder = disk(1 << 20)
    for pages in range(1, 13):
        out = folder / f"text-{pages}"
        out.mkdir()
        ballast = fill(folder, 4096 * pages)
        with pytest.raises(UserError, match="no space left; free some and run the same command again"):
            prepare_text(str(prepared_digits), out, encoder, "{}", part_size=3)
        assert not (out / "text.json").exists() and not list(out.rglob("*.tmp"))
        ballast.unlink()
        assert prepare_text(str(prepared_digits), out, encoder, "{}", part_size=3).text.captions == 11
        shutil.rmtree(out)


def test_a_large_array_on_a_full_disk_tells_why(disk: Callable[[int], Path]):
    """The command's message hangs on the error's number, which numpy's own writer leaves out."""
    with pytest.raises(OSError) as told:  # noqa: PT011 (its number is what matters)
        _write_array(disk(1 << 20) / "large.npy", np.zeros(4 << 20, np.uint8))
    assert told.value.errno == errno.ENOSPC

"""Reading: what is stored comes back, and whatever is wrong is named."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fasttrain.data.index import Index, read_index
from fasttrain.data.order import permutation
from fasttrain.data.shards import ShardSet
from fasttrain.errors import UserError


def test_gather_gives_the_samples_in_the_order_asked_for(prepared_digits: Path):
    shards, stored = ShardSet.open(prepared_digits), load_digits()
    ids = np.random.default_rng(0).integers(0, len(shards), 500)
    arrays, labels, _ = shards.gather(ids)
    source = permutation(1797, 0)[ids]
    assert arrays.dtype == np.uint8 and arrays.shape == (500, 1, 8, 8) and labels.dtype == np.int64
    np.testing.assert_array_equal(arrays[:, 0], np.rint(stored.images[source] * 255 / 16))
    np.testing.assert_array_equal(labels, stored.target[source])


def test_gather_gives_memory_of_its_own(prepared_digits: Path):
    shards = ShardSet.open(prepared_digits)
    arrays, labels, _ = shards.gather(np.arange(3))
    arrays[:], labels[:] = 1, 1
    again, _, _ = shards.gather(np.arange(3))
    assert again.min() == 0
    assert shards.gather(np.empty(0, np.int64))[0].shape == (0, 1, 8, 8)


@pytest.mark.parametrize("ids", [[-1], [0, 1797]])
def test_ids_outside_the_set_are_refused(prepared_digits: Path, ids: list[int]):
    with pytest.raises(IndexError, match="1797"):
        ShardSet.open(prepared_digits).gather(np.array(ids))


def test_threads_may_gather_at_once(prepared_digits: Path):
    shards, results = ShardSet.open(prepared_digits), {}
    ids = [np.random.default_rng(i).integers(0, 1797, 200) for i in range(8)]

    def work(i: int) -> None:
        results[i] = shards.gather(ids[i])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        np.testing.assert_array_equal(results[i], ShardSet.open(prepared_digits).gather(ids[i])[0])


def test_missing_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere: no such folder.*fasttrain prepare"):
        ShardSet.open(tmp_path / "nowhere")


def test_empty_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"index\.json: missing.*fasttrain prepare"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("name", ["labels.npy", "digests.npy"])
def test_labels_and_digests_are_verified(digits: Path, name: str):
    content = bytearray((digits / name).read_bytes())
    content[200] ^= 1
    (digits / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: its content is not what was prepared"):
        ShardSet.open(digits)
    (digits / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: missing"):
        ShardSet.open(digits)


def _edit(folder: Path, **changes: object) -> None:
    index = json.loads((folder / "index.json").read_bytes())
    (folder / "index.json").write_text(json.dumps({**index, **changes}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": 2}, "format 2, but this fasttrain reads format 3"),
        ({"samples": 1796}, "do not add up"),
        ({"num_classes": 9}, "num_classes is 9, but 10 classes are named"),
        ({"shape": [1, 8, 800]}, "do not lie inside"),
        ({"dtype": "object"}, "dtype"),
        ({"kind": "latent"}, "latents are float16 or float32"),
        ({"colour": "red"}, "colour: Extra inputs"),
        ({"labels_xxh3": "short"}, "labels_xxh3"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(digits: Path, changes: dict, told: str):
    _edit(digits, **changes)
    with pytest.raises(UserError, match=rf"index\.json: .*({told})"):
        ShardSet.open(digits)


@pytest.mark.parametrize("changes", [{"shape": [1, 4, 8]}, {"shape": [64, 1, 1]}])
def test_an_index_of_another_shape_is_noticed_at_first_touch(digits: Path, changes: dict):
    _edit(digits, **changes)
    with pytest.raises(UserError, match=r"shard-00000\.tar: holds no uint8 .* where the index says"):
        ShardSet.open(digits).gather(np.array([3]))


@pytest.mark.parametrize("file", ["../labels.npy", "/etc/passwd", "a/b.tar", ".hidden.tar"])
def test_an_index_cannot_name_files_outside_its_folder(digits: Path, file: str):
    shards = json.loads((digits / "index.json").read_bytes())["shards"]
    shards[0]["file"] = file
    _edit(digits, shards=shards)
    with pytest.raises(UserError, match=r"shards\.0\.file"):
        ShardSet.open(digits)


def test_an_index_that_is_no_json(digits: Path):
    (digits / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json: not a JSON object"):
        ShardSet.open(digits)


def test_the_index_survives_a_round_trip(prepared_digits: Path):
    index = read_index(prepared_digits)
    assert Index.model_validate_json(index.model_dump_json()) == index
    assert index.x0_shape == (1, 8, 8) and index.shard_samples == (599, 599, 599)

"""A set's text, read back: what was encoded, in any order and number of threads, from a folder or a store; damage is told."""

import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fasttrain.data.config import DataConfig
from fasttrain.data.files import LocalFiles
from fasttrain.data.index import read_index
from fasttrain.data.shards import ShardSet
from fasttrain.data.text.encoder import TextEncoder
from fasttrain.data.text.table import TextTable
from fasttrain.errors import UserError
from tests.http_server import Faults, FaultyServer


def open_text(place: Path | str, digits: Path, **settings: object) -> TextTable:
    return TextTable.open(str(place), read_index(digits), DataConfig(train=str(digits), retry_seconds=0, **settings))


@pytest.fixture
def table(prepared_text: Path, prepared_digits: Path) -> TextTable:
    return open_text(prepared_text, prepared_digits)


def test_every_sample_has_the_tokens_of_its_own_caption(table: TextTable, prepared_digits: Path, encoder: TextEncoder):
    ids = np.random.default_rng(0).permutation(1797)[:200]
    tokens, length, pooled = table.gather(ids)
    assert (
        tokens.shape == (200, 32, 32)
        and pooled.shape == (200, 24)
        and tokens.dtype == pooled.dtype == np.float16
        and length.dtype == np.int64
    )
    labels = ShardSet.open(prepared_digits).labels[ids]
    for label in range(10):
        (wanted,) = encoder.encode([f"the digit {label}"])
        for row in np.flatnonzero(labels == label):
            assert length[row] == len(wanted.tokens)
            # fp32 depends on the batch's shape in its last bits: one float16 step at most.
            np.testing.assert_allclose(tokens[row, : length[row]], wanted.tokens, rtol=2**-10, atol=1e-4)
            np.testing.assert_allclose(pooled[row], wanted.pooled, rtol=2**-10, atol=1e-4)
            assert not tokens[row, length[row] :].any()


def test_captions_stand_in_the_order_of_their_first_use(table: TextTable, prepared_digits: Path):
    order = dict.fromkeys(ShardSet.open(prepared_digits).labels.tolist())
    assert table.head == tuple(f"the digit {label}" for label in order) and table.captions == 11


def test_the_empty_caption(table: TextTable, encoder: TextEncoder):
    empty = table.empty
    assert empty.tokens.shape == (1, 32, 32) and empty.tokens.dtype == torch.float16 and empty.length.tolist() == [2]
    np.testing.assert_allclose(empty.tokens[0, :2], encoder.encode([""])[0].tokens, rtol=2**-10, atol=1e-4)


def test_the_record_says_which_text_it_is(table: TextTable, encoder: TextEncoder, text: Path, prepared_digits: Path):
    assert table.record.model_dump(exclude={"text_xxh3"}) == encoder.record.model_dump()
    assert open_text(text, prepared_digits).record == table.record
    (text / "text.json").write_text((text / "text.json").read_text().replace('"without": 0', '"without": 1'))
    assert open_text(text, prepared_digits).record.text_xxh3 != table.record.text_xxh3


def test_threads_gather_the_same(table: TextTable):
    ids = np.random.default_rng(1).integers(0, 1797, (40, 16))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(table.gather, ids))
    for own, each in zip(ids, found, strict=True):
        for one, other in zip(table.gather(own), each, strict=True):
            np.testing.assert_array_equal(one, other)


def test_ids_outside_and_none_at_all(table: TextTable):
    assert table.gather(np.empty(0, np.int64))[0].shape == (0, 32, 32)
    for wrong in (-1, 1797):
        with pytest.raises(IndexError, match=r"must lie in \[0, 1797\)"):
            table.gather(np.array([0, wrong]))


def test_from_a_store(text: Path, prepared_digits: Path, table: TextTable, tmp_path: Path):
    ids = np.arange(0, 1797, 7)
    with FaultyServer(text, Faults(drops=0.2, seed=3)) as server:
        settings = {"cache": str(tmp_path / "cache"), "cache_gib": 1.0}
        index, config = read_index(prepared_digits), DataConfig(train=str(prepared_digits), retry_seconds=20, **settings)
        remote = TextTable.open(server.url, index, config)
        remote.ahead([(0, 600)])
        for one, other in zip(table.gather(ids), remote.gather(ids), strict=True):
            np.testing.assert_array_equal(one, other)
        remote.close()
        assert {"tokens-00000.npy", "pooled-00003.npy"} <= {name for name, *_ in server.requests}


def test_a_damaged_copy_in_a_cache_is_fetched_anew(text: Path, prepared_digits: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    with FaultyServer(text) as server:
        config = DataConfig(train=str(prepared_digits), retry_seconds=5, cache=str(cache))
        first = TextTable.open(server.url, read_index(prepared_digits), config)
        wanted = first.gather(np.arange(100))
        first.close()
        (cached,) = cache.rglob("*tokens-00001.npy")
        content = bytearray(cached.read_bytes())
        content[-3] ^= 1
        cached.write_bytes(content)
        again = TextTable.open(server.url, read_index(prepared_digits), config)
        for one, other in zip(wanted, again.gather(np.arange(100)), strict=True):
            np.testing.assert_array_equal(one, other)
        again.close()


def flipped(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[-3] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "to", "told"),
    [
        ("tokens-00002.npy", flipped, r"tokens-00002\.npy: its content is not what was prepared; restore the file, or run"),
        ("pooled-00000.npy", flipped, r"pooled-00000\.npy: its content is not what was prepared"),
        ("tokens-00001.npy", lambda content: content[:-8], r"tokens-00001\.npy: cut short: \d+ of \d+ bytes"),
        ("tokens-00001.npy", lambda content: content + b"x", r"tokens-00001\.npy: longer than it was"),
        ("rows.npy", flipped, r"rows\.npy: its content is not what was prepared"),
        ("first.npy", flipped, r"first\.npy: its content is not what was prepared"),
        ("text.json", lambda content: content[:-30], r"text\.json: .*prepare the text again"),
        ("text.json", lambda content: content.replace(b'"format": 2', b'"format": 9'), "format 9, but this fasttrain reads format 2"),
        ("text.json", lambda content: content.replace(b'"captions": 11', b'"captions": 12'), "do not add up"),
        ("text.json", lambda content: content.replace(b'"cut"', b'"__reduce__"'), r"__reduce__: Extra inputs"),
    ],
)
def test_damage_is_told(damaged: Callable, prepared_digits: Path, name: str, to: Callable, told: str):
    with pytest.raises(UserError, match=told):
        open_text(damaged(name, to), prepared_digits).gather(np.arange(1797))


@pytest.mark.parametrize("name", ["text.json", "rows.npy", "tokens-00003.npy"])
def test_missing_files_are_told(text: Path, prepared_digits: Path, name: str):
    (text / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: missing"):
        open_text(text, prepared_digits).gather(np.arange(1797))


def test_a_lost_disk_is_no_damage(text: Path, prepared_digits: Path, tmp_path: Path):
    table = open_text(text, prepared_digits)
    text.rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"tried 1 times .*start it again when the store answers"):
        table.gather(np.arange(10))


def test_without_verification_only_sizes_and_shapes_are_looked_at(damaged: Callable, prepared_digits: Path):
    open_text(damaged("tokens-00002.npy", flipped), prepared_digits, verify=False).gather(np.arange(1797))
    folder = damaged("tokens-00001.npy", lambda content: content.replace(b"<f2", b"<i2"))
    with pytest.raises(UserError, match="holds no array of the shape"):
        open_text(folder, prepared_digits, verify=False).gather(np.arange(1797))


def test_the_text_of_another_set_is_refused(prepared_text: Path, image_tree: Path, tmp_path: Path):
    from fasttrain.data.prepare.images import prepare_images

    prepare_images(image_tree, tmp_path / "set", 8)
    with pytest.raises(UserError, match=r"belongs to another set \(1,797 samples there, 203 here, or in another order\); run"):
        open_text(prepared_text, tmp_path / "set")


def test_a_passing_failure_is_tried_again(table: TextTable, monkeypatch: pytest.MonkeyPatch, prepared_text: Path, prepared_digits: Path):
    """A real EIO needs a failing disk: the files' own `path` stands in for it."""
    table = TextTable.open(str(prepared_text), read_index(prepared_digits), DataConfig(train="x", retry_seconds=20))
    plain, failures = LocalFiles.path, iter([OSError(errno.EIO, "Input/output error")] * 2)

    def failing(self: LocalFiles, name: str) -> Path:
        if (failure := next(failures, None)) is not None:
            raise failure
        return plain(self, name)

    monkeypatch.setattr(LocalFiles, "path", failing)
    assert table.gather(np.arange(5))[1].all() and next(failures, None) is None

"""Text and controls in the loader: those of the sample at the position, in the view that is drawn, on any threads, ranks and restarts."""

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fasttrain_kernels.dispatch import Kernels
from fasttrain_kernels.philox import Purpose
from fasttrain_kernels.uniform import uniform

from fasttrain.cond import Cond, Text
from fasttrain.data.config import DataConfig
from fasttrain.data.facts import RECORDED, Seen, control_numbers
from fasttrain.data.loader import Batch, Loader, held_out_loader, training_loader
from fasttrain.data.shards import ShardSet
from fasttrain.data.text.padding import TextPadding, padded
from fasttrain.data.text.table import TextTable
from fasttrain.errors import UserError
from tests.told_images import PLACES, POOLED, SAMPLES, SIDE, WIDTH, write_told

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fasttrain[text]'")

SEED = torch.tensor(11)
ALL = ("size", "crop", "flip", "aspect")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_told(tmp_path_factory.mktemp("told"))


def _open(folder: Path, controls: Sequence[str] = ALL, **settings: object) -> Loader:
    config = DataConfig(train=str(folder), max_damaged=1, **settings)
    shards = ShardSet.open(folder, config)
    return training_loader(config, shards, SEED, controls=controls, text=TextTable.open(f"{folder}/text", shards.index, config))


def _held_out(folder: Path, count: int) -> Loader:
    config = DataConfig(train=str(folder), held_out=count, flip=True)
    shards = ShardSet.open(folder, config)
    return held_out_loader(config, shards, SEED, None, ALL, TextTable.open(f"{folder}/text", shards.index, config))


def _trace(loader: Loader, batches: int, *where: int) -> list[Batch]:
    with loader:
        return list(itertools.islice(loader.batches(*where), batches))


def _rows(cond: Cond) -> list[bytes]:
    """Everything that each sample is told, as bytes."""
    assert cond.text is not None and cond.controls is not None and cond.labels is not None
    parts = (cond.labels, cond.text.tokens, cond.text.length, cond.text.pooled, cond.controls)
    return [b"".join(part[i].numpy().tobytes() for part in parts) for i in range(len(cond.labels))]


def _expected_controls(shards: ShardSet, ids: np.ndarray, mirrored: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    facts = {name: column[ids].astype(np.float64) for name, column in shards.facts(RECORDED).items()}
    views = [control_numbers(ALL, Seen(facts, SIDE, size, box, flag)) for flag in (False, True)]
    return np.where(mirrored[:, None], views[1], views[0])


def test_a_sample_is_told_what_belongs_to_it_and_to_the_view_that_is_seen(told: Path):
    loader = _open(told, flip=True)
    (batch,) = _trace(loader, 1, 100, 40)
    ids, mirrored = batch.sample_id.numpy(), (uniform(SEED, batch.position, Purpose.FLIP) < 0.5).numpy()
    assert 8 < mirrored.sum() < 32
    stored, labels, _ = loader.shards.gather(ids)
    for image, seen, turned in zip(stored, batch.clean.numpy(), mirrored, strict=True):
        np.testing.assert_array_equal(seen, (image[..., ::-1] if turned else image).astype(np.float32) / np.float32(127.5) - 1)
    whole = np.array([[SIDE, 0, 0]] * 40)
    np.testing.assert_array_equal(batch.cond.controls, _expected_controls(loader.shards, ids, mirrored, whole, SIDE))
    np.testing.assert_array_equal(batch.cond.controls[:, 4], mirrored)
    np.testing.assert_array_equal(batch.cond.labels, labels)
    table = TextTable.open(f"{told}/text", loader.shards.index, DataConfig(train=str(told)))
    text = padded(Text(*map(torch.from_numpy, table.gather(ids))), SEED, batch.position, TextPadding())
    assert batch.cond.text.tokens.shape == (40, PLACES, WIDTH) and batch.cond.text.pooled.shape == (40, POOLED)
    for part in ("tokens", "length", "pooled"):
        assert torch.equal(getattr(batch.cond.text, part), getattr(text, part)), part


def test_only_what_is_asked_for_is_told_in_the_order_of_the_columns(told: Path):
    both, size = (_trace(_open(told, controls), 1, 0, 30)[0].cond.controls for controls in (ALL, ("size",)))
    flipped = _trace(_open(told, ("flip", "size")), 1, 0, 30)[0].cond.controls
    assert torch.equal(size, both[:, :2]) and torch.equal(flipped, both[:, [0, 1, 4]])
    assert both[:, 4].max() == 0, "without data.flip nothing is mirrored"
    loader = training_loader(DataConfig(train=str(told)), ShardSet.open(told), SEED)
    (batch,) = _trace(loader, 1, 0, 30)
    assert batch.cond.controls is None and batch.cond.text is None and batch.cond.labels is not None


def test_a_run_that_asks_for_no_controls_needs_no_facts(told: Path, tmp_path: Path):
    folder = Path(shutil.copytree(told, tmp_path / "set"))
    (folder / "facts.npy").unlink()
    assert len(_trace(_open(folder, ()), 3, 0, 8)) == 3
    with pytest.raises(UserError, match=r"facts\.npy: missing"):
        _open(folder, ("size",))


def test_threads_change_nothing(told: Path):
    traces = [_trace(_open(told, threads=threads, flip=True), 40, 0, 8) for threads in (0, 1, 3)]
    for batches in zip(*traces, strict=True):
        assert len({tuple(_rows(batch.cond)) for batch in batches}) == 1


def _by_position(folder: Path, world: int, start: int, steps: int, **settings: object) -> dict[int, tuple[int, bytes, bytes]]:
    seen = {}
    for rank in range(world):
        for batch in _trace(_open(folder, flip=True, **settings), steps, start, 16 // world, rank, world):
            rows = zip(batch.position.tolist(), batch.sample_id.tolist(), _rows(batch.cond), batch.clean, strict=True)
            seen |= {position: (sample, row, image.numpy().tobytes()) for position, sample, row, image in rows}
    return seen


@pytest.mark.parametrize("settings", [{}, {"size": 6, "crop_scale": (0.3, 0.8)}])
def test_worlds_of_1_2_4_and_restarts_between_them_are_told_the_same(told: Path, settings: dict):
    whole = _by_position(told, 1, 0, 12, **settings)
    assert sorted(whole) == list(range(12 * 16)) and len({row for _, row, _ in whole.values()}) > 2 * SAMPLES
    elastic = {}
    for world, start in [(2, 0), (1, 4), (4, 8)]:
        elastic |= _by_position(told, world, start * 16, 4, **settings)
    assert elastic == whole


def test_a_substitute_brings_its_own_text_and_facts(told: Path, tmp_path: Path):
    sound = _by_position(told, 1, 0, 12)
    folder = Path(shutil.copytree(told, tmp_path / "set"))
    (folder / "shard-00002.tar").unlink()
    damaged = _by_position(folder, 1, 0, 12)
    first, stop = ShardSet.open(told).spans([2])[0]
    replaced = [n for n, (sample, _, _) in sound.items() if first <= sample < stop]
    assert replaced and all(damaged[n] == sound[n] for n in sound if n not in replaced)
    shards = ShardSet.open(told)
    table = TextTable.open(f"{told}/text", shards.index, DataConfig(train=str(told)))
    for batch in _trace(_open(folder), 12, 0, 16):
        ids = batch.sample_id.numpy()
        assert not ((first <= ids) & (ids < stop)).any()
        np.testing.assert_array_equal(batch.cond.text.pooled, table.gather(ids)[2].astype(np.float32))
        np.testing.assert_array_equal(batch.cond.controls[:, 0], shards.facts(["height"])["height"][ids])
        np.testing.assert_array_equal(batch.cond.labels, shards.labels[ids])


def test_held_out_samples_are_told_of_and_never_mirrored(told: Path):
    (batch,) = _trace(_held_out(told, 20), 1, 0, 20)
    assert batch.sample_id.tolist() == list(range(SAMPLES - 20, SAMPLES))
    shards = ShardSet.open(told)
    expected = _expected_controls(shards, batch.sample_id.numpy(), np.zeros(20, bool), np.array([[SIDE, 0, 0]] * 20), SIDE)
    np.testing.assert_array_equal(batch.cond.controls, expected)
    assert batch.cond.text.tokens.shape == (20, PLACES, WIDTH)


def test_crops_in_training_are_what_the_controls_tell(told: Path):
    loader = _open(told, flip=True, size=6, crop_scale=(0.3, 0.8))
    (batch,) = _trace(loader, 1, 50, 40)
    box = loader.crops.boxes(batch.position.numpy())
    assert len(np.unique(box[:, 0])) > 2 and len(np.unique(box, axis=0)) > 20
    stored = torch.from_numpy(loader.shards.gather(batch.sample_id.numpy()).arrays)
    mirrored = uniform(SEED, batch.position, Purpose.FLIP) < 0.5
    seen = loader.crops.cut(stored, torch.from_numpy(box)) / 127.5 - 1
    assert torch.equal(batch.clean, seen.flip(-1).where(mirrored[:, None, None, None], seen)) and batch.clean.shape[1:] == (3, 6, 6)
    expected = _expected_controls(loader.shards, batch.sample_id.numpy(), mirrored.numpy(), box, 6)
    np.testing.assert_array_equal(batch.cond.controls, expected)


WRONG = [("height", 0), ("width", 0), ("height", np.nan), ("width", -3), ("top", -1), ("left", np.inf), ("share", 0), ("share", 1.5)]


@pytest.mark.parametrize("control", ALL)
@pytest.mark.parametrize(("fact", "value"), WRONG)
def test_facts_that_no_image_has_are_refused_by_each_control_that_is_made_of_them(told: Path, control: str, fact: str, value: float):
    """0, as of an image whose size is not known, is as wrong for `size` as for the logarithm of `aspect`."""
    loader = _open(told, (control,))
    facts = loader.conditions.controls._facts
    if fact not in facts:
        assert control == "flip" or (control != "crop" and fact in ("top", "left", "share"))
        _trace(loader, 1, 0, 8)
        return
    facts[fact][[5, 7, 11]] = value
    shown = rf"is not that of an image \(.*{fact} {value:g}.*\), and so with 3 of {SAMPLES} samples; model\.controls {control} need it"
    with pytest.raises(UserError, match=rf"sample (5|7|11) {shown}: leave them out, or prepare the set anew"):
        _trace(loader, 1, 0, SAMPLES)


def test_only_the_controls_that_are_wrong_are_named_and_only_for_samples_that_are_used(told: Path):
    loader = _open(told)
    loader.conditions.controls._facts["share"][SAMPLES - 2 :] = 0
    loader.conditions.controls.gather(np.arange(SAMPLES - 2), None)
    with pytest.raises(UserError, match=rf"of sample {SAMPLES - 1} .* 2 of {SAMPLES} samples; model\.controls crop need it"):
        loader.conditions.controls.gather(np.array([SAMPLES - 1]), None)


@pytest.mark.parametrize("make", [training_loader, held_out_loader])
def test_the_run_s_choice_of_kernels_pads_the_captions_of_both_loaders(told: Path, make: Callable[..., Loader]):
    config = DataConfig(train=str(told), held_out=20)
    shards = ShardSet.open(told, config)
    kernels = Kernels("reference", {"text_padding": "triton"})
    with make(config, shards, SEED, kernels, ALL, TextTable.open(f"{told}/text", shards.index, config)) as loader:
        assert (loader.conditions.captions.impl, loader.conditions.controls._impl) == ("triton", "reference")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: pinned, asynchronous copies cannot be shown here")
def test_conditions_on_the_gpu_equal_those_on_the_cpu(told: Path):
    config = DataConfig(train=str(told), flip=True, threads=3, size=6, crop_scale=(0.3, 0.8))
    shards = ShardSet.open(told)
    text = TextTable.open(f"{told}/text", shards.index, config)
    on_gpu, on_cpu = (_trace(training_loader(config, shards, seed, None, ALL, text), 20, 0, 16) for seed in (SEED.cuda(), SEED))
    for gpu, cpu in zip(on_gpu, on_cpu, strict=True):
        moved = gpu.cond.map(lambda part: part.cpu())
        assert torch.equal(gpu.clean.cpu(), cpu.clean) and torch.equal(moved.controls, cpu.cond.controls)
        # Normal numbers of the padding's noise are rounded by either device's own cosine.
        torch.testing.assert_close(moved.text.tokens, cpu.cond.text.tokens, rtol=1e-5, atol=1e-6)

"""A run's data from where it lies: text beside remote shards and beside shards made elsewhere, and none where none is asked for."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fasttrain_kernels.dispatch import Kernels

from fasttrain.config import RunConfig, parse_config
from fasttrain.data.loader import Batch
from fasttrain.data.prepare.text import prepare_text
from fasttrain.data.text.encoder import TextEncoder
from fasttrain.dataset import open_data
from fasttrain.errors import UserError
from fasttrain.run import resolve
from tests.data.text.tiny_encoder import write_tiny_encoder
from tests.http_server import Faults, FaultyServer
from tests.labelled_images import SIDE, encoded, sample, write_tar
from tests.runs import plain_config
from tests.told_images import write_told

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fasttrain[text]'")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_told(tmp_path_factory.mktemp("told"))


def config(run_dir: Path, train: object, model: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    raw = plain_config(run_dir, str(train), data={"train": str(train), "retry_seconds": 10, "cache": str(run_dir / "cache"), **data})
    return parse_config({**raw, "model": {"name": "mmdit", "depth": 1, "width": 32, "heads": 2, **(model or {})}}, "test")


def batches(made: RunConfig, count: int) -> list[Batch]:
    data = open_data(made)
    try:
        with data.training_loader(resolve(made, data.index), torch.tensor(3)) as loader:
            return list(itertools.islice(loader.batches(0, 8), count))
    finally:
        data.close()


def test_text_and_controls_from_a_faulty_server_are_those_of_the_folder(told: Path, tmp_path: Path):
    model = {"controls": {"size": "low", "crop": "high"}}
    here = batches(config(tmp_path / "here", told, model), 12)
    with FaultyServer(told, Faults(drops=0.2, busy=0.2, seed=1)) as server:
        there = batches(config(tmp_path / "there", server.url, model), 12)
        assert server.count("facts.npy") and server.count("text/tokens-00000.npy")
    for mine, theirs in zip(here, there, strict=True):
        assert torch.equal(mine.cond.controls, theirs.cond.controls) and torch.equal(mine.cond.labels, theirs.cond.labels)
        assert torch.equal(mine.cond.text.tokens, theirs.cond.text.tokens) and torch.equal(mine.clean, theirs.clean)


def test_a_remote_set_without_text_has_classes(told: Path, tmp_path: Path):
    bare = Path(shutil.copytree(told, tmp_path / "bare", ignore=shutil.ignore_patterns("text", "facts.npy")))
    with FaultyServer(bare) as server:
        made = config(tmp_path / "run", server.url)
        (batch,) = batches(made, 1)
        assert not server.count("facts.npy"), "who needs no facts fetches none"
    assert batch.cond.text is None and batch.cond.controls is None and batch.cond.labels is not None


def test_shards_made_elsewhere_with_their_text(tmp_path: Path):
    for number in range(2):
        members = [m for n in range(6) for m in sample(6 * number + n)]
        captions = [(f"{6 * number + n:09d}.txt", f"a photo of {n}".encode()) for n in range(6)]
        write_tar(tmp_path / f"train-{number:05d}.tar", sorted([*members, *captions]))
    train = f"{tmp_path}/train-{{00000..00001}}.tar"
    encoder = TextEncoder.load(str(write_tiny_encoder(tmp_path / "encoder")))
    prepare_text(train, tmp_path / "text", encoder)
    model = {"controls": {"size": "low", "crop": "high", "aspect": "high"}}
    (batch,) = batches(config(tmp_path / "run", train, model, size=SIDE, text=str(tmp_path / "text")), 1)
    assert batch.cond.text is not None and batch.cond.text.tokens.shape == (8, 32, 32)
    assert torch.equal(batch.cond.controls, torch.tensor([[SIDE, SIDE, 0, 0, 0]] * 8, dtype=torch.float32))
    # Inside a pattern there is no place for text of its own: classes, unless data.text says where it is.
    assert open_data(config(tmp_path / "run", train, size=SIDE)).text is None


def test_shards_with_neither_labels_nor_text(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [(f"{n}.png", encoded(n, "png")) for n in range(4)])
    with pytest.raises(UserError, match=r"takes text, and there is none with .*a\.tar"):
        open_data(config(tmp_path / "run", tmp_path / "a.tar", size=SIDE))


def test_crops_of_shards_made_elsewhere_are_refused(tmp_path: Path):
    write_tar(tmp_path / "a.tar", [m for n in range(4) for m in sample(n)])
    made = config(tmp_path / "run", tmp_path / "a.tar", size=SIDE, crop_scale=[0.4, 0.6])
    with pytest.raises(UserError, match=r"data\.crop_scale: .*a\.tar is made elsewhere; make shards of it with `fasttrain prepare images`"):
        resolve(made, open_data(made).index)


def test_the_held_out_loader_pads_captions_with_the_run_s_kernels(told: Path, tmp_path: Path):
    made = config(tmp_path, told, held_out=20).model_copy(update={"kernels": Kernels("auto", {"text_padding": "reference"})})
    data = open_data(made)
    with data.held_out_loader(resolve(made, data.index), torch.tensor(3)) as loader:
        assert loader.conditions.captions is not None and loader.conditions.captions.impl == "reference"
    data.close()

"""Text and controls through real training: the same draws on any ranks, the same bits after a restart, and what does not fit refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.config import RunConfig, parse_config
from fasttrain.dataset import open_data
from fasttrain.dry_run import dry_run
from fasttrain.errors import UserError
from fasttrain.run import check_identity, identity, resolve
from tests.ranks import run_ranks
from tests.runs import GLOBAL_BATCH, merged, plain_config, trace, traces, zero
from tests.told_images import PLACES, POOLED, SAMPLES, WIDTH, write_told

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fasttrain[text]'")

STEPS = 6
MMDIT = {"name": "mmdit", "depth": 2, "width": 32, "heads": 2, "patch": 4, "controls": {"size": "low", "crop": "high", "flip": "high"}}
DROPS = {"label_drop": 0.3, "control_drop": 0.3}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_told(tmp_path_factory.mktemp("told"))


def raw_config(run_dir: Path, shards: Path, model: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """A very small mmDiT on the told images, with text and controls."""
    data = {"flip": True, "streams": 4, **sections.pop("data", {})}
    diffusion = {**DROPS, **sections.pop("diffusion", {})}
    raw = plain_config(run_dir, shards, data=data, diffusion=diffusion, **sections)
    return {**raw, "model": {**MMDIT, **(model or {})}}


def config(*args: Any, **sections: Any) -> RunConfig:
    return parse_config(raw_config(*args, **sections), "test")


def _all(tmp_path: Path, shards: Path, world_size: int, stages: tuple[int, ...]) -> list[dict[str, Any]]:
    raws = [
        raw_config(
            tmp_path / f"{world_size}-{stage}", shards, training={"micro_batch": GLOBAL_BATCH // 4, "clip": 1.0}, deepspeed=zero(stage)
        )
        for stage in stages
    ]
    return [merged(list(shares)) for shares in zip(*run_ranks(world_size, traces, raws, STEPS), strict=True)]


def test_ranks_and_stages_change_nothing(told: Path, tmp_path: Path):
    (alone,) = _all(tmp_path, told, 1, (1,))
    assert sorted(alone["drawn"]) == list(range(STEPS * GLOBAL_BATCH))
    assert len({words for _, _, words in alone["drawn"].values()}) == STEPS * GLOBAL_BATCH
    for other in _all(tmp_path, told, 2, (1, 3)):
        assert other["drawn"] == alone["drawn"]
        # fp32 sums in another order.
        torch.testing.assert_close(other["losses"], alone["losses"], rtol=1e-5, atol=0)


def test_a_run_continued_is_the_run(told: Path, tmp_path: Path):
    (whole,) = run_ranks(1, trace, raw_config(tmp_path / "whole", told), STEPS)
    run_ranks(1, trace, raw_config(tmp_path / "run", told), 2, True)
    (rest,) = run_ranks(1, trace, raw_config(tmp_path / "run", told), STEPS - 2)
    assert rest["losses"] == whole["losses"][2:]
    assert rest["drawn"].items() <= whole["drawn"].items()
    for key, tensors in whole["state"].items():
        assert all(torch.equal(rest["state"][key][name], tensor) for name, tensor in tensors.items()), key


def test_the_data_fill_in_the_model(told: Path, tmp_path: Path):
    made = config(tmp_path / "run", told)
    data = open_data(made)
    resolved = resolve(made, data.index)
    model = resolved.model
    assert (model.text_tokens, model.text_width, model.text_pooled, model.masked_text) == (PLACES, WIDTH, POOLED, False)
    assert (model.num_classes, model.num_timesteps, model.input_size) == (0, 1000, 16)
    assert data.index.text is not None and data.text.captions == SAMPLES + 1
    # What was filled in may stand in the config: it is read again when a run is replayed.
    again = parse_config(resolved.plain(), "again")
    assert resolve(again, open_data(again).index) == resolved.model_copy(update={"deepspeed": again.deepspeed_settings()})
    unpadded = config(tmp_path / "run", told, data={"text_padding": {"how": "none"}})
    assert resolve(unpadded, data.index).model.masked_text


def test_attention_cannot_pass_over_padding_that_is_there_to_be_seen(told: Path, tmp_path: Path):
    made = config(tmp_path / "run", told, model={"masked_text": True})
    with pytest.raises(UserError, match=r"model.masked_text is true, but data.text_padding.how is replicate: set it to none"):
        resolve(made, open_data(made).index)


def test_text_that_was_not_finished_is_not_taken_for_none(told: Path, tmp_path: Path):
    shards = Path(shutil.copytree(told, tmp_path / "set"))
    (shards / "text" / "text.json").unlink()
    with pytest.raises(UserError, match=r"text: unfinished text, without text.json; run its `fasttrain prepare text` again, or remove it"):
        open_data(config(tmp_path / "run", shards))


def test_classes_may_be_told_instead(told: Path, tmp_path: Path):
    made = config(tmp_path / "run", told, model={"num_classes": 2})
    data = open_data(made)
    assert data.text is None and resolve(made, data.index).model.text_width is None
    assert resolve(made, data.index).model.null_label == 2


def test_what_is_told_makes_it_another_run(told: Path, tmp_path: Path):
    made = config(tmp_path / "run", told)
    index = open_data(made).index
    mine = identity(resolve(made, index), index)
    assert index.text is not None
    for update, named in (
        ({"text": index.text.model_copy(update={"text_xxh3": "0" * 32})}, "data text"),
        ({"facts_xxh3": "0" * 32}, "data facts"),
    ):
        other = index.model_copy(update=update)
        with pytest.raises(UserError, match=named):
            check_identity(identity(resolve(made, other), other), mine, Path("step-1"))
    fewer = config(tmp_path / "run", told, model={"controls": {"size": "low"}})
    with pytest.raises(UserError, match="model controls"):
        check_identity(identity(resolve(fewer, index), index), mine, Path("step-1"))
    padded = config(tmp_path / "run", told, data={"text_padding": {"how": "zero"}})
    with pytest.raises(UserError, match="data text_padding"):
        check_identity(identity(resolve(padded, index), index), mine, Path("step-1"))
    cropped = config(tmp_path / "run", told, data={"size": 8, "crop_scale": [0.4, 0.6]})
    uncropped = config(tmp_path / "run", told, data={"size": 8})
    with pytest.raises(UserError, match=r"crop_scale None, this config says crop_scale \[0\.4, 0\.6\]"):
        check_identity(identity(resolve(cropped, index), index), identity(resolve(uncropped, index), index), Path("step-1"))


def test_the_dry_run_tells_of_text_and_controls(told: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    dry_run(config(tmp_path / "run", told, data={"size": 8, "crop_scale": [0.4, 0.6]}))
    shown = capsys.readouterr().out
    assert f"text       {SAMPLES + 1} captions by encoder, {PLACES} x {WIDTH} and {POOLED} pooled: {told}/text" in shown
    assert "controls   size, crop, flip: height, width, top, left, flip" in shown
    assert "x0 [16, 3, 8, 8]" in shown and f"text [16, {PLACES}, {WIDTH}]" in shown and "flip 0 to 1" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"model": {"text_tokens": 77, "text_width": 768}}, r"model\.text_tokens is 77, but the text of encoder 'encoder' .* has 32"),
        ({"model": {"text_tokens": PLACES, "text_width": 768}}, r"model\.text_width is 768, but the text of encoder 'encoder' .* has 32"),
        ({"model": {"num_classes": 2}, "data": {"text": "/nowhere"}}, r"model\.num_classes 2 and data\.text: .* remove one of them"),
        ({"data": {"text": "/nowhere"}}, r"/nowhere/text\.json: missing"),
        ({"model": {"num_timesteps": 2000}}, r"model\.num_timesteps is 2000, but diffusion\.schedule has 1000"),
    ],
)
def test_text_that_does_not_fit_is_refused(told: Path, tmp_path: Path, sections: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        dry_run(config(tmp_path / "run", told, **sections))


def test_text_for_a_model_that_takes_none(told: Path, tmp_path: Path):
    raw = plain_config(tmp_path / "run", told, data={"text": f"{told}/text"})
    with pytest.raises(UserError, match=r"data\.text is given, but model 'vit' takes none"):
        dry_run(parse_config(raw, "test"))


def test_a_model_of_text_without_text(digits: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"takes text, and there is none with .*: make it with `fasttrain prepare text`"):
        dry_run(config(tmp_path / "run", digits, model={"num_classes": 0, "patch": 2}))


def test_text_of_another_set_is_refused(told: Path, digits: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"belongs to another set \(60 samples there, 1,797 here"):
        dry_run(config(tmp_path / "run", digits, model={"patch": 2}, data={"text": f"{told}/text"}))

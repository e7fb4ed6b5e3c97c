"""Checkpoints: any stage and world size loads any other; damage is noticed; what cannot be trusted is not used."""

import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from fasttrain.checkpoint import Manifest, Progress, check_fits, newest_sound, read_weights
from fasttrain.engine.distributed import Processes
from fasttrain.engine.fragments import MASTER
from fasttrain.errors import UserError
from fasttrain.files import digest
from fasttrain.shares import Written
from tests.ranks import run_ranks
from tests.runs import plain_config, start, trace, zero

STEPS = 3


def _save(processes: Processes, raw: dict[str, Any], steps: int) -> dict[str, Any]:
    return trace(processes, raw, steps, save=True)


def _load_all(processes: Processes, raws: list[dict[str, Any]]) -> list[Any]:
    """What each config holds after resuming, and the loss of its next step."""
    found = []
    for raw in raws:
        trainer = start(processes, raw)
        state = {key: trainer.state.full(key) for key in trainer.state.keys}
        progress = trainer.progress
        trainer.train_step()
        loss = trainer.meters.reduce()["loss"]
        trainer.loader.close()
        trainer.engine.destroy()
        found.append((state, progress, loss))
    return found


def _raw(folder: Path, digits: Path, stage: int, precision: str) -> dict[str, Any]:
    return plain_config(folder, digits, deepspeed=zero(stage), training={"precision": precision}, checkpoint={"retry_seconds": 0})


@pytest.mark.parametrize(("saved_stage", "saved_world", "precision"), [(1, 2, "fp32"), (3, 4, "fp32"), (2, 3, "bf16"), (0, 2, "bf16")])
def test_any_stage_and_world_size_loads_any_other(saved_stage: int, saved_world: int, precision: str, tmp_path: Path, digits: Path):
    batch = {"global_batch": 12}
    made = plain_config(tmp_path / "made", digits, deepspeed=zero(saved_stage), training={"precision": precision, **batch})
    expected = run_ranks(saved_world, _save, made, STEPS)[0]["state"]
    losses = []
    for world_size, stages in ((1, (0, 2)), (2, (0, 1, 2, 3))):
        raws = []
        for stage in stages:
            folder = tmp_path / f"world{world_size}-zero{stage}"
            shutil.copytree(tmp_path / "made", folder)
            raws.append(plain_config(folder, digits, deepspeed=zero(stage), training={"precision": precision, **batch}))
        for state, progress, loss in run_ranks(world_size, _load_all, raws)[0]:
            assert progress == Progress(STEPS, STEPS * 12, STEPS)
            for key, tensors in expected.items():
                assert all(torch.equal(state[key][name], tensor) for name, tensor in tensors.items()), (world_size, key)
            losses.append(loss)
    torch.testing.assert_close(losses, [losses[0]] * len(losses), rtol=1e-6 if precision == "fp32" else 2e-3, atol=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A run of two ranks with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    for _ in range(2):
        run_ranks(2, _save, _raw(folder, digits, 2, "fp32"), STEPS)
    assert sorted(f.name for f in (folder / "checkpoints").iterdir()) == ["latest", "step-00000003", "step-00000006"]
    return folder


def _newest(processes: Processes, raw: dict[str, Any], damages: list[tuple[str, str, int]]) -> list[tuple[str, list[str]]]:
    """What `newest` finds after each damage of (file, kind, where), which is mended again."""
    from fasttrain.checkpoint import Checkpoints

    checkpoints, found = Checkpoints(Path(raw["run_dir"]), processes), []
    for file, kind, where in damages:
        path = checkpoints.folder / file
        sound = path.read_bytes()
        broken = bytearray(sound)
        if kind == "flip":
            broken[where // 8] ^= 1 << (where % 8)
        else:
            del broken[where:]
        path.write_bytes(bytes(broken))
        folder, _, passed_over = checkpoints.newest() or (None, None, [])
        found.append((folder.name if folder else "", passed_over))
        path.write_bytes(sound)
    return found


def test_every_flip_and_truncation_falls_back_to_the_one_before(saved: Path, digits: Path):
    """200 single-bit flips and 50 truncations of the newest checkpoint's files."""
    chance = random.Random(0)
    files = [saved / "checkpoints" / "step-00000006" / f"rank-{r:05d}.safetensors" for r in range(2)]
    damages = []
    for i in range(250):
        file = chance.choice(files)
        size = file.stat().st_size
        kind, where = ("flip", chance.randrange(size * 8)) if i < 200 else ("cut", chance.randrange(size))
        damages.append((f"step-00000006/{file.name}", kind, where))
    [found] = run_ranks(1, _newest, _raw(saved, digits, 2, "fp32"), damages)
    assert [name for name, _ in found] == ["step-00000003"] * 250
    assert all(damages[i][0].split("/")[1] in passed_over[0] for i, (_, passed_over) in enumerate(found))


def _flips_of_content(path: Path, count: int) -> list[tuple[str, str, int]]:
    """Single-bit flips that change what a JSON file says: spaces between its values may turn into other spaces."""
    sound, chance, damages = path.read_bytes(), random.Random(1), []
    while len(damages) < count:
        where = chance.randrange(len(sound) * 8)
        if not chr(sound[where // 8]).isspace():
            damages.append((f"{path.parent.name}/{path.name}", "flip", where))
    return damages


def test_a_damaged_manifest_falls_back_too(saved: Path, digits: Path):
    size = (saved / "checkpoints/step-00000006/manifest.json").stat().st_size
    damages = [("step-00000006/manifest.json", "cut", where) for where in (0, 10, size // 2, size - 3)]
    damages += _flips_of_content(saved / "checkpoints/step-00000006/manifest.json", 200)
    [found] = run_ranks(1, _newest, _raw(saved, digits, 2, "fp32"), damages)
    assert [name for name, _ in found] == ["step-00000003"] * len(damages)


def test_damage_seen_by_one_rank_is_agreed_by_all(saved: Path, digits: Path):
    size = (saved / "checkpoints/step-00000006/rank-00001.safetensors").stat().st_size
    per_rank = run_ranks(2, _newest_once_damaged, str(saved), size // 2)
    assert per_rank == ["step-00000003", "step-00000003"]


def _newest_once_damaged(processes: Processes, run_dir: str, where: int) -> str:
    from fasttrain.checkpoint import Checkpoints

    checkpoints = Checkpoints(Path(run_dir), processes)
    path = checkpoints.folder / "step-00000006/rank-00001.safetensors"
    sound = path.read_bytes()
    processes.barrier()
    if processes.is_main:
        path.write_bytes(sound[:where])
    processes.barrier()
    found = checkpoints.newest()
    processes.barrier()
    path.write_bytes(sound)
    assert found is not None
    return found[0].name


def test_nothing_to_trust_is_an_error_and_nothing_is_deleted(saved: Path, digits: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(AssertionError, match="no checkpoint of this run can be trusted"):
        run_ranks(1, _newest, _raw(folder, digits, 2, "fp32"), [("latest", "cut", 3)])
    assert len(list(folder.glob("checkpoints/step-*/rank-*.safetensors"))) == 4


def test_unfinished_checkpoints_are_not_looked_at(saved: Path, digits: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    shutil.copytree(folder / "checkpoints/step-00000006", folder / "checkpoints/step-00000009.tmp")
    [found] = run_ranks(1, _newest, _raw(folder, digits, 2, "fp32"), [("latest", "cut", 0)])
    assert found == [("step-00000006", [])]


def _save_steps(processes: Processes, raw: dict[str, Any], steps: list[int], keep_last: int) -> None:
    trainer = start(processes, raw)
    trainer.saver._config = trainer.config.checkpoint.model_copy(update={"keep_last": keep_last})
    for step in steps:
        trainer.progress = dataclasses.replace(trainer.progress, step=step)
        trainer.save()
        trainer.saver.finish()
    trainer.loader.close()


def test_a_damaged_later_checkpoint_does_not_push_out_the_new_one(digits: Path, tmp_path: Path):
    raw = _raw(tmp_path / "run", digits, 1, "fp32")
    folder = tmp_path / "run" / "checkpoints"
    run_ranks(1, _save_steps, raw, [5, 10], 2)
    (folder / "step-00000010" / "manifest.json").write_text("{}")
    run_ranks(1, _save_steps, raw, [7], 1)
    [[(name, passed_over)]] = run_ranks(1, _newest, raw, [("latest", "cut", 0)])
    assert name == "step-00000007" and "step-00000010" in passed_over[0]
    assert not (folder / "step-00000005").exists()


def test_what_a_killed_save_left_is_taken_away(digits: Path, tmp_path: Path):
    left = tmp_path / "run/checkpoints/step-00000003.tmp"
    left.mkdir(parents=True)
    (left / "rank-00000.safetensors").write_bytes(b"half")
    run_ranks(1, _save_steps, _raw(tmp_path / "run", digits, 1, "fp32"), [5], 2)
    assert not left.exists()


def _save_where_no_folder_can_be(processes: Processes, raw: dict[str, Any]) -> str:
    trainer = start(processes, raw)
    if processes.is_main:
        trainer.checkpoints.folder.write_text("a file in the way")
    try:
        trainer.save()
        trainer.saver.finish()
    except UserError as error:
        return str(error)
    finally:
        trainer.loader.close()
    return "saved"


def test_every_rank_learns_that_rank_0_cannot_make_the_folder(digits: Path, tmp_path: Path):
    messages = run_ranks(2, _save_where_no_folder_can_be, _raw(tmp_path / "run", digits, 1, "fp32"))
    assert all("rank 0 could not make" in message and "make room or mend the disk" in message for message in messages)


def test_weights_are_read_without_processes(saved: Path):
    folder = saved / "checkpoints" / "step-00000006"
    newest, manifest, passed_over = newest_sound(saved)
    assert (newest, passed_over) == (folder, [])
    master, ema = read_weights(folder, manifest, MASTER), read_weights(folder, manifest, "ema")
    assert {name: list(w.shape) for name, w in master.items()} == manifest.shapes
    assert any(not torch.equal(master[name], ema[name]) for name in master)
    with pytest.raises(UserError, match=r"keeps no 'ema_7'; it has: master, exp_avg, exp_avg_sq, ema"):
        read_weights(folder, manifest, "ema_7")


def test_weights_are_read_from_the_newest_that_verifies(saved: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    damaged = folder / "checkpoints/step-00000006/rank-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    newest, manifest, passed_over = newest_sound(folder)
    assert (newest.name, manifest.progress.step) == ("step-00000003", 3)
    assert "rank-00001.safetensors has" in passed_over[0]


def _save_non_finite(processes: Processes, raw: dict[str, Any]) -> str:
    trainer = start(processes, raw)
    if processes.rank == processes.world_size - 1:
        trainer.state.fragments[-1].state["exp_avg"][0] = float("inf")
    trainer.progress = dataclasses.replace(trainer.progress, step=9)
    try:
        trainer.save()
        trainer.saver.finish()
    except UserError as error:
        return str(error)
    finally:
        trainer.loader.close()
    return "saved"


def test_a_non_finite_state_is_never_saved(saved: Path, digits: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    messages = run_ranks(2, _save_non_finite, _raw(folder, digits, 2, "fp32"))
    assert all("non-finite" in message for message in messages)
    assert sorted(f.name for f in (folder / "checkpoints").iterdir()) == ["latest", "step-00000003", "step-00000006"]


def test_another_models_checkpoint_is_refused_by_parameter(saved: Path):
    manifest = Manifest.read(saved / "checkpoints" / "step-00000006")
    shapes = {**manifest.shapes, "pos_embed": [1, 18, 64]}
    with pytest.raises(UserError, match=r"another model: parameter pos_embed is \[1, 18, 32\] there and \[1, 18, 64\]"):
        check_fits(manifest, shapes, manifest.states, saved)
    with pytest.raises(UserError, match=r"optimizer\.ema"):
        check_fits(manifest, manifest.shapes, [*manifest.states, "ema_1"], saved)


def test_the_manifest_is_plain_json_with_digests(saved: Path):
    manifest = json.loads((saved / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert manifest["progress"] == {"step": 6, "position": 96, "updates": 6}
    assert sorted(manifest["files"]) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert all(len(entry["xxh3"]) == 32 for entry in manifest["files"].values())


NONSENSE: list[tuple[str, Any, str]] = [
    ("format", 2, "format: "),
    ("format", True, "format: "),
    ("progress", {"step": -6, "position": 96, "updates": 6}, "progress.step: "),
    ("progress", {"step": 6, "position": 96}, "progress.updates: "),
    ("progress", {"step": 7, "position": 96, "updates": 6}, "is of step 7"),
    ("progress", {"step": 6, "position": 96, "updates": 6, "more": 1}, "progress.more: "),
    ("identity", [], "identity: "),
    ("shapes", {"pos_embed": "18"}, "shapes.pos_embed: "),
    ("shapes", {"pos_embed": [10**30, 10**30]}, "which its manifest does not name"),
    ("states", ["master"], "which its manifest does not name"),
    ("world_size", 10**12, "other files than those"),
    ("zero_stage", "2", "zero_stage: "),
    ("files", {}, "other files than those"),
    ("files", {"../../../config.yaml": {"bytes": 1, "xxh3": "0" * 32}, "/etc/passwd": {"bytes": 1, "xxh3": "0" * 32}}, "other files"),
    ("files", {"rank-00000.safetensors": {"bytes": -1, "xxh3": "x"}, "rank-00001.safetensors": 5}, "files.rank-00000.safetensors"),
    ("more", 1, "more: "),
]


@pytest.mark.parametrize(("key", "value", "told"), NONSENSE)
def test_a_manifest_of_nonsense_is_passed_over_by_name_though_its_digest_is_right(
    key: str, value: Any, told: str, saved: Path, tmp_path: Path
):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    path = folder / "checkpoints" / "step-00000006" / "manifest.json"
    raw = {name: content for name, content in json.loads(path.read_text()).items() if name != "xxh3"}
    raw[key] = value
    path.write_text(json.dumps({**raw, "xxh3": xxhash.xxh3_128_hexdigest(json.dumps(raw, sort_keys=True).encode())}))
    newest, _, [passed_over] = newest_sound(folder)
    assert newest.name == "step-00000003" and passed_over.startswith("step-00000006: ") and told in passed_over
    shutil.rmtree(newest)
    with pytest.raises(UserError, match="can be trusted:\n  step-00000006: "):
        newest_sound(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("pos_embed|master|0", torch.zeros(4), "twice"),
        ("pos_embed|master|0", torch.zeros(600, dtype=torch.float64), "F64"),
        ("pos_embed|master|x", torch.zeros(4), "no slice's name"),
        ("pos_embed|other|0", torch.zeros(4), "which its manifest does not name"),
        ("pos_embed|master|9999999", torch.zeros(4), "missing"),
        ("pos_embed", torch.zeros(4), "no slice's name"),
        ("pos_embed|ema|0", torch.zeros(2, 2), "1-D"),
    ],
)
def test_slices_that_do_not_make_the_state_are_passed_over(name: str, tensor: torch.Tensor, told: str, saved: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    share = folder / "checkpoints" / "step-00000006" / "rank-00001.safetensors"
    save_file({**load_file(share), name: tensor}, share)
    manifest = Manifest.read(share.parent)
    written = Written(bytes=share.stat().st_size, xxh3=digest(share))
    manifest.model_copy(update={"files": {**manifest.files, share.name: written}}).write(share.parent / "manifest.json")
    newest, _, [passed_over] = newest_sound(folder)
    assert newest.name == "step-00000003" and told in passed_over

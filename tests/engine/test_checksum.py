"""Any single bit of one rank's copy that is not the others' is noticed and the rank named; equal copies never are."""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain.config import parse_config
from fasttrain.engine.checksum import checksums, differing, total
from fasttrain.engine.distributed import Processes
from fasttrain.errors import CorruptedError, Status, UserError
from tests.commands import Done, fasttrain
from tests.ranks import free_port, run_ranks
from tests.runs import plain_config, start, zero

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _tensors(seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((300, 37), (5, 3), (7,), ())
    return [
        *(torch.randn(shape, generator=draw).to(dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)),
        torch.arange(9),
    ]


def flip(tensor: torch.Tensor, draw: random.Random) -> None:
    """Flips one bit of a tensor."""
    words = tensor.detach().view(-1).view(WORDS[tensor.element_size()])
    words[draw.randrange(len(words))] ^= torch.tensor(1).bitwise_left_shift(draw.randrange(8 * tensor.element_size())).to(words.dtype)


def _sum(tensors: list[torch.Tensor]) -> int:
    return int(total(checksums(tensors)))


def test_every_single_bit_of_a_small_tensor_changes_it():
    tensors, seen = [torch.randn(6), torch.randn(5).bfloat16()], set()
    for tensor in tensors:
        words = tensor.view(-1).view(WORDS[tensor.element_size()])
        for i in range(len(words)):
            for bit in range(8 * tensor.element_size()):
                before, mask = words[i].clone(), torch.tensor(1).bitwise_left_shift(bit).to(words.dtype)
                words[i] ^= mask
                seen.add(_sum(tensors))
                words[i] = before
    assert len(seen) == 6 * 32 + 5 * 16 and _sum(tensors) not in seen


def test_one_hundred_random_flips_are_noticed():
    draw, sound = random.Random(1), _sum(_tensors())
    for _ in range(100):
        tensors = _tensors()
        flip(draw.choice(tensors), draw)
        assert _sum(tensors) != sound


def test_swapped_elements_and_tensors_change_it():
    tensors = _tensors()
    sound, (a, b) = _sum(tensors), tensors[0][0, :2].clone()
    tensors[0][0, 0], tensors[0][0, 1] = b, a
    assert _sum(tensors) != sound
    assert _sum([*_tensors()[1:], _tensors()[0]]) != sound


def test_it_is_of_bits_not_of_layout():
    tensor = torch.randn(40, 30)
    assert _sum([tensor.t().contiguous().t()]) == _sum([tensor])
    assert _sum([torch.zeros(3)]) != _sum([-torch.zeros(3)])


def test_chunks_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fasttrain.engine.checksum._CHUNK", 16)
    tensor = torch.arange(40.0)
    swapped = torch.cat([tensor[16:32], tensor[:16], tensor[32:]])
    assert _sum([tensor]) != _sum([swapped])


def _compare(processes: Processes, trials: int, faulty: tuple[int, ...]) -> list[str | None]:
    """Flips a bit on the faulty ranks in every trial, and compares."""
    told, draw = [], random.Random(processes.rank)
    for trial in range(trials):
        tensors = _tensors(trial)
        if processes.rank in faulty:
            flip(tensors[draw.randrange(len(tensors))], draw)
        told.append(differing(processes, ((f"p{i}", tensor) for i, tensor in enumerate(tensors))))
    return told


def test_no_false_alarm_in_a_thousand_comparisons():
    assert run_ranks(2, _compare, 1000, ()) == [[None] * 1000] * 2


@pytest.mark.parametrize(
    ("world_size", "faulty", "words"),
    [
        (2, (1,), "rank 0 and rank 1 hold different weights, and which are right cannot be told"),
        (4, (2,), "rank 2 of 4 holds other weights than the rest"),
        (4, (0, 3), "rank 0 and rank 1, 2 and rank 3 hold different"),
    ],
)
def test_the_ranks_that_differ_are_named(world_size: int, faulty: tuple[int, ...], words: str):
    results = run_ranks(world_size, _compare, 25, faulty)
    assert all(result == results[0] for result in results)
    assert all(told is not None and "the first that differs is p" in told for told in results[0])
    assert words.replace("rank 1, 2", "ranks 1, 2") in results[0][0]


def _train_with_a_flip(processes: Processes, raws: list[dict[str, Any]]) -> list[tuple[int, str]]:
    ended = []
    for raw in raws:
        trainer, draw = start(processes, raw), random.Random(7)
        try:
            for step in range(1, 8):
                if step == 5 and processes.rank == 1:
                    flip(draw.choice(list(trainer.engine.module.parameters())), draw)
                trainer.train_step()
            ended.append((0, "never noticed"))
        except CorruptedError as error:
            ended.append((trainer.progress.step + 1, str(error)))
        trainer.loader.close()
        trainer.engine.destroy()
    return ended


def test_a_flip_in_one_ranks_weights_ends_training_before_the_update_that_would_hide_it(tmp_path: Path, digits: Path):
    """ZeRO 1 and 2 write the weights anew in every update: the flip would be gone, and what it did to the gradients would not."""
    cases = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")]
    raws = [
        plain_config(tmp_path / "run", digits, deepspeed=zero(stage), training={"precision": precision, "checksum_every": 1})
        for stage, precision in cases
    ]
    for result in run_ranks(2, _train_with_a_flip, raws):
        assert [step for step, _ in result] == [5] * len(cases), result
        assert all("nothing is saved" in told for _, told in result)


def test_it_ends_with_the_status_to_start_again():
    assert CorruptedError("x").status == Status.RESTART


def test_zero_3_has_nothing_to_compare(tmp_path: Path):
    with pytest.raises(UserError, match=r"training\.checksum_every"):
        parse_config(plain_config(tmp_path, tmp_path, deepspeed=zero(3), training={"checksum_every": 5}), "test")


def _flip_after(step: int) -> None:
    """In this process, a bit of a weight changes when this step is over."""
    from fasttrain.trainer import Trainer

    train = Trainer.train_step

    def flipping(trainer: Trainer) -> bool:
        taken = train(trainer)
        if trainer.progress.step == step:
            flip(next(trainer.engine.module.parameters()), random.Random(step))
        return taken

    Trainer.train_step = flipping  # type: ignore[method-assign]


def _as_rank(rank: int, port: int, flips_after: int | None) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if rank == 1 and flips_after:
        _flip_after(flips_after)


def _on_two_ranks(config: Path, flips_after: int | None = None) -> list[Done]:
    port = free_port()
    with ThreadPoolExecutor() as pool:
        ranks = [pool.submit(fasttrain, "train", config, before=partial(_as_rank, rank, port, flips_after)) for rank in (0, 1)]
        return [rank.result() for rank in ranks]


def test_a_run_saves_nothing_of_a_flip_and_goes_on_from_the_checkpoint_before(tmp_path: Path, digits: Path):
    """Under ZeRO 0, where a rank that survives another saves alone what it holds, and no check is due but before a save."""
    training = {"steps": 8, "checksum_every": 1000}
    raw = plain_config(tmp_path / "run", digits, deepspeed=zero(0), training=training, checkpoint={"every": 2})
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    ended = _on_two_ranks(tmp_path / "run.yaml", flips_after=5)
    assert [done.status for done in ended] == [Status.RESTART] * 2, ended
    assert any("at step 6 rank 0 and rank 1 hold different weights" in done.err for done in ended), ended
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == ["step-00000002", "step-00000004"]
    assert [done.status for done in _on_two_ranks(tmp_path / "run.yaml")] == [0, 0]

"""Meters sum over processes and timesteps exactly; what is written can be read by any JSON parser; pauses do not count."""

import json
import math
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fasttrain.engine.distributed import Processes
from fasttrain.metrics import PEAK_TFLOPS, Meters, Reporter, Stopwatch, peak_flops
from tests.ranks import run_ranks

RANGES, NUM_TIMESTEPS = 4, 1000
# Two micro-batches a rank: rank 0 draws the first two, rank 1 the others. For each range the sum of its samples' losses and their count.
BATCHES = [
    (1.0, [[4.0, 2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
    (2.0, [[0.0, 0.0], [10.0, 1.0], [0.0, 0.0], [20.0, 1.0]]),
    (3.0, [[5.0, 1.0], [7.0, 1.0], [0.0, 0.0], [0.0, 0.0]]),
    (6.0, [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [6.0, 2.0]]),
]


def _metered(processes: Processes) -> list[dict]:
    meters = Meters(processes, RANGES, NUM_TIMESTEPS)
    half = len(BATCHES) // processes.world_size
    for loss, by_range in BATCHES[processes.rank * half : (processes.rank + 1) * half]:
        meters.add(torch.tensor(loss, requires_grad=True), torch.tensor(by_range))
    return [meters.reduce(), meters.reduce()]


@pytest.mark.parametrize("world_size", [1, 2])
def test_means_are_over_all_ranks_and_by_timestep(world_size):
    for first, second in run_ranks(world_size, _metered):
        assert first["loss"] == 3.0
        assert first["mse_by_timestep"] == {"0-249": 3.0, "250-499": 8.5, "500-749": None, "750-999": pytest.approx(26 / 3)}
        assert second == {"loss": None, "losses": [], "mse_by_timestep": dict.fromkeys(first["mse_by_timestep"])}


@pytest.mark.parametrize(("ranges", "num_timesteps"), [(3, 1000), (7, 50), (10, 1000), (1, 2)])
def test_ranges_are_named_by_the_timesteps_that_the_objective_counts_in_them(ranges: int, num_timesteps: int, alone: Processes):
    counted: dict[int, list[int]] = {r: [] for r in range(ranges)}
    for t in range(num_timesteps):
        counted[t * ranges // num_timesteps].append(t)
    names = list(Meters(alone, ranges, num_timesteps).names)
    assert names == [f"{timesteps[0]}-{timesteps[-1]}" for timesteps in counted.values()]


def test_sums_of_many_micro_batches_are_kept_in_float64(alone: Processes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Processes, "sum", lambda self, values: values)
    meters = Meters(alone, 1, 1000, accumulation_steps=4)
    meters.add(torch.tensor(2.0**25), torch.tensor([[2.0**25, 1.0]]))
    for _ in range(3):
        meters.add(torch.tensor(1.0), torch.tensor([[1.0, 0.0]]))
    assert meters.reduce() == {"loss": (2**25 + 3) / 4, "losses": [(2**25 + 3) / 4], "mse_by_timestep": {"0-999": 2**25 + 3.0}}


@pytest.fixture
def alone() -> Processes:
    return Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"), control=None)  # type: ignore[arg-type] (a reporter needs no group)


RECORD = {
    "step": 7,
    "loss": math.nan,
    "mse_by_timestep": {"0-499": 0.5, "500-999": None, "deep": {"x": -math.inf}},
    "grad_norm": math.inf,
    "images_per_second": 12.5,
    "mfu": None,
    "skipped": 2,
    "seconds_left": 3723.4,
}


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_jsonl_holds_json_only(tmp_path, alone):
    with Reporter(tmp_path, alone, 10, tensorboard=False) as reporter:
        reporter.report(RECORD)
        reporter.write({"step": 8, "loss": 1.5})
    first, second = (json.loads(line, parse_constant=refuse_constant) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["loss"] == "nan" and first["grad_norm"] == "inf" and first["mse_by_timestep"]["deep"]["x"] == "-inf"
    assert first["mse_by_timestep"]["0-499"] == 0.5 and first["mfu"] is None and second == {"step": 8, "loss": 1.5}


def test_jsonl_goes_on_where_an_earlier_start_ended(tmp_path, alone):
    for step in (1, 2):
        with Reporter(tmp_path, alone, 10, tensorboard=False) as reporter:
            reporter.write({"step": step})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_half_a_record_is_cut_away(tmp_path, alone):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    with Reporter(tmp_path, alone, 10, tensorboard=False) as reporter:
        reporter.write({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_line_for_people(tmp_path, alone, capsys):
    with Reporter(tmp_path, alone, 10, tensorboard=False) as reporter:
        reporter.report(RECORD)
    assert capsys.readouterr().out == "step 7/10: loss nan, grad inf, 12 img/s, 2 steps skipped, 1:02:03 left\n"


def test_tensorboard_holds_the_numbers(tmp_path, alone):
    with Reporter(tmp_path, alone, 10, tensorboard=True) as reporter:
        reporter.write({"step": 3, "loss": 0.25, "mse_by_timestep": {"0-499": 0.5, "500-999": None}})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == {
        "loss": [(3, 0.25)],
        "mse_by_timestep/0-499": [(3, 0.5)],
    }


def test_other_ranks_are_silent(tmp_path, capsys):
    other = Processes(rank=1, world_size=2, local_rank=1, device=torch.device("cpu"), control=None)  # type: ignore[arg-type]
    with Reporter(tmp_path, other, 10, tensorboard=True) as reporter:
        reporter.say("hello")
        reporter.report(RECORD)
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_pauses_do_not_count():
    watch = Stopwatch()
    time.sleep(0.02)
    with watch.pause():
        time.sleep(0.3)
    first = watch.lap()
    assert 0.02 <= first < 0.25
    assert watch.lap() < 0.1, "a lap starts where the last one ended"


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "tflops"), [("NVIDIA H200", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("Tesla T4", None)]
)
def test_peaks_of_gpus_by_their_names(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == (tflops and tflops * 1e12)
    assert set(PEAK_TFLOPS) >= {"H100", "H200", "A100", "B200"}

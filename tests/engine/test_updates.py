"""The ways to update: each computes the same, is refused where it cannot run, and reads the others' checkpoints, offloaded or not."""

import importlib.util
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from fasttrain.engine.deepspeed import deepspeed_adam, offloads, read_settings
from fasttrain.engine.distributed import Processes
from fasttrain.engine.optimizer import Implementation
from fasttrain.engine.update import Borrowed, OnePass, TorchFused, Update, Work
from fasttrain.engine.updates import choose_update
from fasttrain.errors import UserError
from tests.ranks import run_ranks
from tests.runs import plain_config, trace, zero

CPU = torch.device("cpu")
STEPS = 3
SIZES = (40, 7)
BUILD = "python -c 'from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()'"


class ByGroup(torch.optim.Optimizer):
    """An Adam class of apex's habits: it counts steps by group, and takes state that it finds."""

    def __init__(self, params: list[Tensor]):
        super().__init__(params, {"lr": 0.0, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                state, (beta1, beta2) = self.state[p], group["betas"]
                m = state["exp_avg"].lerp_(p.grad, 1 - beta1) / (1 - beta1 ** group["step"])
                v = state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * p.grad**2) / (1 - beta2 ** group["step"])
                p.data.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m / (v.sqrt() + group["eps"]))


def work(**changes: Any) -> Work:
    """The same update of two tensors, each time on tensors of its own."""
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(size, generator=generator) for size in SIZES] for _ in range(6)]
    params, grads, exp_avgs, exp_avg_sqs, *emas = lists
    for p, g, v in zip(params, grads, exp_avg_sqs, strict=True):
        p.grad = g
        v.square_()
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "update": 3, "decays": [0.9, 0.2]}
    return Work(params, grads, exp_avgs, exp_avg_sqs, emas, **{**settings, **changes})


def states(done: Work) -> list[Tensor]:
    return [t for tensors in (done.params, done.exp_avgs, done.exp_avg_sqs, *done.emas) for t in tensors]


@pytest.mark.parametrize("update", [TorchFused(), Borrowed(ByGroup, "apex's habits")], ids=["torch", "borrowed"])
@pytest.mark.parametrize("scalars", [{}, {"clip": 0.3}, {"clip": 0.3, "found_inf": 0.0}], ids=str)
def test_every_way_computes_the_same(update: Update, scalars: dict[str, float]) -> None:
    ours, theirs = (work(**{name: torch.tensor(value) for name, value in scalars.items()}) for _ in range(2))
    with torch.no_grad():
        OnePass()(ours)
        update(theirs)
    assert not torch.equal(ours.params[0], work().params[0])
    for mine, other in zip(states(ours), states(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("update", [OnePass(), TorchFused(), Borrowed(ByGroup, "")], ids=["one pass", "torch", "borrowed"])
def test_nothing_changes_where_the_gradient_is_not_finite(update: Update) -> None:
    skipped = work(clip=torch.tensor(float("nan")), found_inf=torch.tensor(1.0))
    skipped.grads[0].fill_(float("inf"))
    with torch.no_grad():
        update(skipped)
    for after, before in zip(states(skipped), states(work()), strict=True):
        assert torch.equal(after, before)


def test_every_name_is_a_way_and_what_cannot_run_is_refused() -> None:
    assert get_args(Implementation) == ("fasttrain", "torch", "apex", "deepspeed")
    assert choose_update("fasttrain", "reference", CPU, offloaded=False) == OnePass("reference")
    assert choose_update("torch", "auto", CPU, offloaded=False) == TorchFused()
    offloaded = choose_update("torch", "auto", torch.device("cuda"), offloaded=True)
    assert offloaded.describe() == "torch fused AdamW (offloaded), averages in torch"
    with pytest.raises(UserError, match=r"optimizer\.implementation: apex needs a GPU.*use fasttrain or torch"):
        choose_update("apex", "auto", CPU, offloaded=False)
    with pytest.raises(UserError, match=r"needs a GPU, and the optimizer's state is on cpu"):
        choose_update("apex", "auto", torch.device("cuda"), offloaded=True)


def test_an_apex_that_is_not_nvidias_is_named() -> None:
    with pytest.raises(UserError, match=r"not installed with its CUDA extensions; .*PyPI's `apex` is another package"):
        choose_update("apex", "auto", torch.device("cuda"), offloaded=False)


def offload(stage: int, device: str = "cpu") -> dict[str, Any]:
    settings = zero(stage)["zero_optimization"]
    return {"zero_optimization": {**settings, "offload_optimizer": {"device": device}}}


def test_offload_is_read() -> None:
    assert offloads(read_settings(offload(2)))
    assert offloads(read_settings(str(Path(__file__).parents[2] / "configs" / "deepspeed" / "offload" / "zero2.json")))
    assert not offloads(read_settings(offload(2, "none"))) and not offloads(read_settings(zero(2)))


def _resumed(processes: Processes, first: dict[str, Any], then: list[dict[str, Any]]) -> list[list[float]]:
    """Losses of three steps with one config, and of three more with each of the others: from its checkpoint, in copies of its folder."""
    import shutil

    losses = [trace(processes, first, STEPS, save=True)["losses"]]
    for i, raw in enumerate(then):
        folder = f"{first['run_dir']}-{i}"
        if processes.is_main:
            shutil.copytree(first["run_dir"], folder)
        processes.barrier()
        losses.append(trace(processes, {**raw, "run_dir": folder}, STEPS)["losses"])
    return losses


def _interpreted(processes: Processes, raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    from tests.kernels.interpreter import interpreting

    with interpreting() as launches:
        result = trace(processes, raw, STEPS)
    names = [launch.kernel.fn.__name__ for launch in launches]
    return result, {name: names.count(name) for name in names}


def _config(tmp_path: Path, digits: Path, settings: dict[str, Any], implementation: str, precision: str = "fp32") -> dict[str, Any]:
    optimizer = {"implementation": implementation}
    return plain_config(tmp_path / "run", digits, deepspeed=settings, optimizer=optimizer, training={"precision": precision, "clip": 0.5})


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 0), ("fp32", 1)])
def test_checkpoints_are_interchangeable(precision: str, stage: int, tmp_path: Path, digits: Path) -> None:
    ours, theirs = (_config(tmp_path, digits, zero(stage), name, precision) for name in ("fasttrain", "torch"))
    [(_, with_theirs, with_ours)] = run_ranks(1, _resumed, ours, [theirs, ours])
    # bf16 weights round alike unless a master lies at the edge between two of them.
    torch.testing.assert_close(with_theirs, with_ours, rtol=1e-5 if precision == "fp32" else 2e-3, atol=0)


@pytest.mark.parametrize(("stage", "kernel"), [(0, "_adamw_ema_list_kernel"), (1, "_adamw_ema_kernel")])
def test_the_kernel_trains_as_the_reference_does(stage: int, kernel: str, tmp_path: Path, digits: Path) -> None:
    pytest.importorskip("triton")
    small = {"name": "vit", "depth": 1, "width": 16, "heads": 2, "patch": 4, "num_timesteps": 1000}
    raw = {**_config(tmp_path, digits, zero(stage), "fasttrain"), "model": small}
    kernels = {"default": "reference", "adamw_ema": "triton"}
    [(with_kernel, launched)] = run_ranks(1, _interpreted, {**raw, "kernels": kernels})
    [with_reference] = run_ranks(1, trace, {**raw, "kernels": "reference"}, STEPS)
    assert launched == {kernel: STEPS}
    torch.testing.assert_close(with_kernel["losses"], with_reference["losses"], rtol=1e-6, atol=0)
    for key, tensors in with_reference["state"].items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(with_kernel["state"][key][name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_run_continues_as_one_that_is_not(stage: int, tmp_path: Path, digits: Path) -> None:
    offloaded, plain = (_config(tmp_path, digits, settings, "torch") for settings in (offload(stage), zero(stage)))
    started, away, here = run_ranks(2, _resumed, offloaded, [offloaded, plain])[0]
    assert started != away
    torch.testing.assert_close(away, here, rtol=1e-5, atol=0)


def cpu_adam_is_built() -> bool:
    """From this installation's sources: what another environment built is built anew at its first use."""
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory("cpu_adam", verbose=False))
    sources = Path(importlib.util.find_spec("deepspeed").origin).parent  # type: ignore[union-attr,arg-type]
    script = folder / "build.ninja"
    return any(folder.glob("cpu_adam*.so")) and script.is_file() and str(sources) in script.read_text()


def test_half_a_build_of_cpu_adam_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = Path(_get_build_directory("cpu_adam", verbose=False))
    (folder / "cpu_adam.so").touch()
    assert not cpu_adam_is_built()


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeeds_cpu_adam_continues_our_run(stage: int, tmp_path: Path, digits: Path) -> None:
    if not cpu_adam_is_built():
        pytest.skip(f"DeepSpeed's CPU Adam is not built; {BUILD} builds it, in minutes")
    offloaded = _config(tmp_path, digits, offload(stage), "fasttrain")
    plain = _config(tmp_path, digits, zero(stage), "fasttrain")
    started, with_theirs, with_ours = run_ranks(2, _resumed, plain, [offloaded, plain])[0]
    assert len(started) == STEPS
    torch.testing.assert_close(with_theirs, with_ours, rtol=1e-5, atol=0)


def test_what_cpu_adam_is_told_as(capsys: pytest.CaptureFixture[str]) -> None:
    if not cpu_adam_is_built():
        pytest.skip(f"DeepSpeed's CPU Adam is not built; {BUILD} builds it, in minutes")
    assert deepspeed_adam(CPU, offloaded=True).describe() == "DeepSpeed CPU Adam (offloaded), averages in torch"
    assert "DeepSpeed compiles it where it has not been yet" in capsys.readouterr().out

"""The parts together: blocks compiled under every ZeRO stage, at batch 1 and with recomputation; CUDA graphs; determinism."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fasttrain_kernels.dispatch import Kernels
from torch import Tensor
from torch._dynamo.utils import counters
from torch.torch_version import TorchVersion

from fasttrain.cond import Cond, Nothing
from fasttrain.diffusion.objective import Objective
from fasttrain.diffusion.prediction import V
from fasttrain.diffusion.schedule import Cosine
from fasttrain.diffusion.timesteps import Stratified
from fasttrain.diffusion.weighting import MinSnr
from fasttrain.engine.deepspeed import build_engine, compiles_under_zero_3
from fasttrain.engine.distributed import Processes
from fasttrain.errors import UserError
from fasttrain.models import MODELS
from fasttrain.models.implementations import Implementations
from fasttrain.models.network import Network
from tests.ranks import run_ranks
from tests.runs import plain_config, start, zero

SHAPES = {"input_size": 8, "channels": 3, "num_classes": 10, "width": 32, "heads": 4}
FAMILIES = {
    "dit": {"name": "dit"},
    "vit": {"name": "vit", "num_timesteps": 1000},
    "mmdit": {"name": "mmdit"},
    "mmdit-dual": {"name": "mmdit", "form": "dual"},
}
EVERYTHING = {"qk_norm": True, "rotary": True}
STEPS = 3
# Compiled and eager differ in the order of a few fp32 operations: so many units in the last place of a gradient's norm.
ROUNDING = 3e-6


def awake(network: Network) -> Network:
    """No weight is zero: behind DiT's closed gates every gradient would be, and agree with anything."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.1)
    return network


def build(family: str, how: Implementations | None = None, **changes: Any) -> Network:
    return awake(MODELS.build({**FAMILIES[family], **SHAPES, "depth": 3, **EVERYTHING, **changes}).build(how or Implementations()))


def gradients(network: Network, batch: int) -> dict[str, Tensor]:
    """Of a loss that weighs every output differently."""
    generator = torch.Generator().manual_seed(batch)
    x, weight = torch.randn(2, batch, 3, 8, 8, generator=generator).unbind(0)
    t, labels = torch.arange(batch) * 7, torch.arange(batch) % 10
    network.zero_grad()
    (network(x, t, Cond(labels)) * weight).sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rounding: float = ROUNDING) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        # What text asks in the last block is read by no one.
        assert grad.norm() > 0 or name.endswith("q_weight_text"), name
        assert (found[name] - grad).norm() <= rounding * grad.norm(), name


@contextmanager
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("family", "recompute"),
    [("dit", False), ("dit", True), ("vit", False), ("vit", True), ("mmdit", False), ("mmdit-dual", True)],
)
def test_compiled_blocks_give_eager_gradients_at_batch_1_and_2(family: str, recompute: bool):
    """PyTorch issue 193061: compiled adaptive norms gave wrong gradients at batch 1, in silence."""
    eager, compiled = build(family, depth=4, checkpoint_blocks=recompute), build(family, depth=4, checkpoint_blocks=recompute)
    graphs = 1 if recompute else 2  # the first block, which has nothing pending, and all others
    graphs += family == "mmdit-dual"  # whose last block has less
    with fresh_compiler():
        compiled.compile(backend="aot_eager", dynamic=False)  # each batch on its own
        for number, batch in enumerate((1, 2), start=1):
            expected = gradients(eager, batch)
            for _ in range(2):
                assert_close(gradients(compiled, batch), expected)
            assert counters["stats"]["unique_graphs"] == number * graphs
        assert not counters["graph_break"]


@pytest.mark.parametrize(("family", "batch"), [("dit", 1), ("vit", 2), ("mmdit", 2)])
def test_compiled_kernels_give_the_references_gradients(family: str, batch: int):
    """Each operation as torch.compile sees it, an opaque one with a gradient of its own, in Triton's interpreter."""
    pytest.importorskip("triton")
    from tests.kernels.interpreter import interpreting

    expected = gradients(build(family, Implementations(Kernels("reference")), depth=2), batch)
    with fresh_compiler(), interpreting() as launches:
        network = build(family, Implementations(Kernels("triton")), depth=2)
        network.compile(backend="aot_eager")
        assert_close(gradients(network, batch), expected, rounding=2e-5)
    heads = "joint_qk_norm_backward_kernel" if family == "mmdit" else "_qk_norm_backward_kernel"
    assert {"norm_backward_kernel", "_bias_gelu_backward_kernel", heads} <= {x.kernel.fn.__name__ for x in launches}


def _trained(processes: Processes, raw: dict[str, Any], compiled: bool) -> dict[str, Any]:
    """Losses and the first moments after a few steps of the engine, and what the compiler did."""
    torch._dynamo.reset()
    counters.clear()
    trainer = start(processes, {**raw, "training": {**raw["training"], "compile": compiled}})
    if compiled:
        trainer.engine.compile(backend="aot_eager")
    losses, objective, graphs = [], trainer.objective, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        loss = objective(*args, **kwargs)
        losses.append(float(loss.loss.detach()))
        return loss

    trainer.objective = watched  # type: ignore[assignment]
    for _ in range(STEPS):
        trainer.train_step()
        graphs.append(counters["stats"]["unique_graphs"])
    moments = trainer.state.full("exp_avg")
    trainer.loader.close()
    trainer.engine.destroy()
    return {"losses": losses, "moments": moments, "graphs": graphs, "breaks": dict(counters["graph_break"])}


def _both(processes: Processes, raws: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(_trained(processes, raw, False), _trained(processes, raw, True)) for raw in raws]


# Stage and recomputation. What the stages have in common with ZeRO 3, the harder one, is tried for one family; ZeRO 3 without
# recomputation for another.
ENGINES = {
    "dit": [(0, False), (1, False), (2, False), (3, True)],
    "vit": [(3, False)],
    "mmdit-dual": [(3, True)],
}


@pytest.mark.parametrize("family", ENGINES)
def test_blocks_compile_through_the_engine_under_every_zero_stage(family: str, tmp_path: Path, digits: Path):
    model = {**FAMILIES[family], "depth": 2, "width": 32, "heads": 2, "patch": 4}
    raws = [
        plain_config(tmp_path / f"{stage}{recompute}", digits, deepspeed=zero(stage), training={"global_batch": 8})
        | {"model": {**model, "checkpoint_blocks": recompute}}
        for stage, recompute in ENGINES[family]
        if stage < 3 or compiles_under_zero_3()
    ]
    if not raws:
        pytest.skip("blocks compiled under ZeRO 3 train from torch 2.13 on; before it they are refused")
    for eager, compiled in run_ranks(2, _both, raws)[0]:
        torch.testing.assert_close(compiled["losses"], eager["losses"], rtol=5e-6, atol=0)
        assert eager["graphs"] == [0] * STEPS and compiled["graphs"][0] > 0
        assert compiled["graphs"] == compiled["graphs"][:1] * STEPS, "something was compiled again"
        assert not compiled["breaks"]
        for name, moment in eager["moments"].items():
            assert (compiled["moments"][name] - moment).norm() <= 1e-4 * moment.norm() + 1e-9, name


def test_blocks_that_would_get_no_gradients_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cu130"))
    how: dict[str, Any] = {"micro_batch": 1, "accumulation_steps": 1, "precision": "fp32", "clip": None, "whole": torch.nn.Module}
    with pytest.raises(UserError, match=r"training.compile: with torch 2.11.0\+cu130 compiled blocks get no gradients under ZeRO 3"):
        build_engine(torch.nn.Linear(1, 1), None, {"zero_optimization": {"stage": 3}}, **how)  # type: ignore[arg-type]


def _same_bits(processes: Processes, raw: dict[str, Any]) -> tuple[bool, str]:
    """Whether two runs of a few steps leave the same state, and how the run introduced itself. Nothing may be chosen by time."""
    from fasttrain import choices

    def refuse(*_: Any) -> None:
        raise AssertionError("a deterministic run measured something")

    choices.fastest = refuse
    states = []
    for folder in ("first", "second"):
        trainer = start(processes, {**raw, "run_dir": f"{raw['run_dir']}-{folder}"})
        assert torch.are_deterministic_algorithms_enabled()
        for _ in range(STEPS):
            trainer.train_step()
        states.append({key: trainer.state.full(key) for key in trainer.state.keys})
        introduced = trainer._means()
        trainer.loader.close()
        trainer.engine.destroy()
    first, second = states
    return all(torch.equal(first[key][name], second[key][name]) for key in first for name in first[key]), introduced


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.gpu)])
def test_a_deterministic_run_gives_the_same_bits_and_says_so(precision: str, tmp_path: Path, digits: Path):
    if precision == "bf16" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    raw = plain_config(tmp_path / "run", digits, training={"deterministic": True, "precision": precision}) | {"model": "dit-tiny"}
    [(same, introduced)] = run_ranks(1, _same_bits, raw)
    assert same and "deterministic: the same bits each time" in introduced


def objective_on(device: torch.device) -> Objective:
    parts, seed = (Cosine(), V(), MinSnr(), Stratified()), torch.tensor(5, device=device)
    return Objective(*parts, nothing=Nothing(10), label_drop=0.1, seed=seed, ranges=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_captured_as_a_cuda_graph_draws_anew_at_new_positions():
    """Position and seed are device tensors, so a replay reads them: the same numbers as eager steps at the same positions."""
    device = torch.device("cuda")
    network = build("dit", Implementations(attention="math")).to(device)
    objective = objective_on(device)
    x0, labels = torch.randn(4, 3, 8, 8, device=device), torch.arange(4, device=device)
    position = torch.arange(4, device=device)

    def step() -> Tensor:
        network.zero_grad(set_to_none=False)
        loss = objective(network, x0, Cond(labels), position).loss
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = []
    for first in (100, 200):
        position.copy_(torch.arange(first, first + 4, device=device))
        graph.replay()
        replayed = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        loss = captured.clone()
        torch.testing.assert_close(loss, step(), rtol=1e-6, atol=0)
        assert_close({name: p.grad for name, p in network.named_parameters() if p.grad is not None}, replayed)
        seen.append(loss.item())
    assert seen[0] != seen[1]

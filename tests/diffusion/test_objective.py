"""The objective against plain torch, and what may and may not decide its draws."""

from collections import Counter
from typing import Any

import pytest
import torch
from fasttrain_kernels.dispatch import Kernels
from fasttrain_kernels.language import HAS_TRITON
from fasttrain_kernels.latent_noising import Posterior
from fasttrain_kernels.philox import Purpose, normal
from fasttrain_kernels.uniform import uniform
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttrain.cond import Cond, Nothing
from fasttrain.diffusion.objective import Loss, Objective
from fasttrain.diffusion.prediction import PREDICTIONS
from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.diffusion.timesteps import TIMESTEPS
from fasttrain.diffusion.weighting import WEIGHTINGS
from fasttrain.errors import UserError
from tests.diffusion.tables import DRAWS, TABLES

SEED = torch.tensor(99)
NULL = 10


def build(
    schedule: str | dict = "cosine",
    prediction: str = "x0",
    weighting: str = "min_snr",
    timesteps: str | dict = "uniform",
    *,
    label_drop: float = 0.0,
    null_label: int | None = NULL,
    ranges: int = 1,
    kernels: Kernels | None = None,
) -> Objective:
    return Objective(
        SCHEDULES.build(schedule),
        PREDICTIONS.build(prediction),
        WEIGHTINGS.build(weighting),
        TIMESTEPS.build(timesteps),
        nothing=Nothing(null_label),
        label_drop=label_drop,
        seed=SEED,
        ranges=ranges,
        kernels=kernels,
    )


def posterior(count: int = 24) -> Posterior:
    stored = torch.randn(count, 2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(4)).half()
    return Posterior(stored, torch.tensor([0.1, -0.2, 0.3]), torch.tensor([0.5, 1.0, 2.0]), flip=True)


def batch(count: int = 24) -> tuple[Tensor, Cond, Tensor]:
    x0 = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    return x0, Cond(torch.arange(count) % 10), 1000 + torch.arange(count)


class Recorder:
    """A model with one weight that keeps what it was given."""

    def __init__(self) -> None:
        self.weight = torch.tensor(0.7, requires_grad=True)
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.labels is not None
        self.calls.append((x_t, t, cond.labels))
        return self.weight * x_t

    def seen(self) -> tuple[Tensor, ...]:
        return tuple(torch.cat(column) for column in zip(*self.calls, strict=True))


def in_plain_torch(prediction: str, weighting: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's loss for a variance-preserving path (cosine), written out without any component's formula but the schedule's."""
    x0, _, position = batch()
    t = (uniform(SEED, position, Purpose.TIMESTEP) * 1000).long()
    alpha, sigma = (c[:, None, None, None] for c in SCHEDULES.build("cosine").alpha_sigma(t))
    eps = normal(SEED, position, (3, 4, 4)).double()
    x_t = alpha * x0 + sigma * eps
    snr = (alpha / sigma) ** 2
    w = {"const": snr**0, "snr": snr, "max_snr": snr.clamp(min=1), "min_snr": snr.clamp(max=5), "soft_min_snr": 5 * snr / (5 + snr)}
    w |= {"flow": ((alpha + sigma) / sigma) ** 2, "p2": snr / (1 + snr), "edm": snr + 4, "clamped_snr": snr.clamp(1, 5)}
    w |= {"table": snr**0, "pareto": snr**0}  # of one range, and before it is solved for
    s = sigma / alpha  # EDM's, of data of deviation 1/2
    skip, out, scale = 0.25 / (s**2 + 0.25), 0.5 * s / (s**2 + 0.25) ** 0.5, (s**2 + 0.25) ** -0.5
    edm = (x0 - skip * (x0 + s * eps)) / out
    target = {"x0": x0.double(), "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0, "edm": edm}[prediction]
    divisor = {"x0": snr**0, "eps": snr, "v": snr + 1, "flow": ((alpha + sigma) / sigma) ** 2, "edm": snr + 4}[prediction]
    given = scale * x_t / alpha if prediction == "edm" else x_t
    error = (weight.double() * given - target) ** 2
    return (w[weighting] / divisor * error).mean(), error.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("prediction", PREDICTIONS.names())
@pytest.mark.parametrize("weighting", WEIGHTINGS.names())
def test_objective_equals_plain_torch(prediction: str, weighting: str) -> None:
    model, plain = Recorder(), torch.tensor(0.7, requires_grad=True)
    got = build("cosine", prediction, weighting)(model, *batch())
    loss, mse = in_plain_torch(prediction, weighting, plain)
    got.loss.backward()
    loss.backward()
    assert got.loss.dtype == got.mse.dtype == torch.float32
    # fp32 arithmetic against float64: a few units in the seventh digit of each addend.
    torch.testing.assert_close(got.loss.double(), loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.mse.double(), mse, rtol=1e-5, atol=0)
    torch.testing.assert_close(model.weight.grad, plain.grad, rtol=1e-5, atol=0)


@pytest.mark.parametrize("timesteps", DRAWS.values(), ids=DRAWS)
def test_positions_decide_all_draws_whatever_the_batches(timesteps: dict) -> None:
    objective, whole, halves = build(timesteps=timesteps, label_drop=0.3), Recorder(), Recorder()
    data = batch()
    together = objective(whole, *data)
    parts = [objective(halves, *(column[part] for column in data)) for part in (slice(1, None, 2), slice(0, None, 2))]
    order = torch.cat([torch.arange(1, 24, 2), torch.arange(0, 24, 2)])
    for expected, actual in zip(whole.seen(), halves.seen(), strict=True):
        assert torch.equal(expected[order], actual)
    assert torch.equal(together.t[order], torch.cat([part.t for part in parts]))
    assert torch.equal(together.mse[order], torch.cat([part.mse for part in parts]))


@pytest.mark.parametrize(("schedule", "ranges"), [("cosine", 10), ("cosine", 7), ({"name": "linear", "num_timesteps": 50}, 3)])
def test_the_loss_is_told_apart_by_equal_ranges_of_timesteps(schedule: str | dict, ranges: int) -> None:
    objective = build(schedule, ranges=ranges)
    loss = objective(Recorder(), *batch(200))
    wanted = torch.zeros(ranges, 2)
    for t, mse in zip(loss.t.tolist(), loss.mse, strict=True):
        wanted[t * ranges // objective.schedule.num_timesteps] += torch.stack([mse, torch.ones_like(mse)])
    torch.testing.assert_close(loss.by_range, wanted)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_stored_latents_train_as_the_x0_that_they_are_drawn_to(dtype: torch.dtype | None) -> None:
    _, cond, position = batch()
    drawn, given = Recorder(), Recorder()
    from_stored = build("cosine", "v")(drawn, posterior(), cond, position, dtype)
    from_x0 = build("cosine", "v")(given, posterior().sample(SEED, position), cond, position, dtype)
    for one, other in zip((*from_stored, *drawn.seen()), (*from_x0, *given.seen()), strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize("timesteps", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("latents", [False, True])
def test_the_kernels_give_the_references_loss(latents: bool, timesteps: dict) -> None:
    from tests.kernels.interpreter import interpreting

    x0, cond, position = batch(5)
    seen, losses = [], []
    with interpreting():
        for impl in ("triton", "reference"):
            model = Recorder()
            objective = build("cosine", "v", timesteps=timesteps, label_drop=0.4, ranges=4, kernels=Kernels(impl))
            loss = objective(model, posterior(5) if latents else x0, cond, position)
            loss.loss.backward()
            seen.append(model.seen())
            losses.append([*loss, model.weight.grad])
    for ours, theirs in zip((*seen[0], *losses[0]), (*seen[1], *losses[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class LaunchCount(TorchDispatchMode):
    """Counts torch's own operations that compute: on a GPU each is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        if not view and func.namespace == "aten" and "empty" not in func._schema.name and func is not torch.ops.aten.detach.default:
            self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@needs_triton
def test_a_micro_batch_takes_few_launches() -> None:
    """With plain torch's Philox alone it would be more than a thousand.

    Kernels run, in the interpreter: of timesteps that none has written, the schedule's table would be asked for any place.
    """
    from tests.kernels.interpreter import interpreting

    objective = build("cosine", "v", timesteps="stratified", label_drop=0.1, ranges=10, kernels=Kernels("triton"))
    _, cond, position = batch()
    with interpreting() as launches:
        objective(Recorder(), posterior(), cond, position)  # the schedule's table is made
        launches.clear()
        with LaunchCount() as torchs:
            objective(Recorder(), posterior(), cond, position).loss.backward()
    names = Counter(launch.kernel.fn.__name__ for launch in launches)
    once = ("_latent_noising_kernel", "_block_sums_kernel", "_finish_kernel", "_gradient_kernel")
    assert names == {"_uniform_kernel": 2, **dict.fromkeys(once, 1)}
    assert torchs.names.total() < 40, torchs.names


def test_another_position_or_seed_draws_otherwise() -> None:
    x0, cond, position = batch()
    first, later = Recorder(), Recorder()
    build()(first, x0, cond, position)
    build()(later, x0, cond, position + 24)
    assert not torch.equal(first.seen()[0], later.seen()[0]) and not torch.equal(first.seen()[1], later.seen()[1])


def test_label_dropout_takes_its_share_and_leaves_noise_alone() -> None:
    x0, cond, position = torch.zeros(4000, 1, 1, 1), Cond(torch.arange(4000) % 10), torch.arange(4000)
    with_drop, without = Recorder(), Recorder()
    build(label_drop=0.15)(with_drop, x0, cond, position)
    build(label_drop=0.0)(without, x0, cond, position)
    dropped = with_drop.seen()[2] == NULL
    assert abs(dropped.double().mean().item() - 0.15) < 4 * (0.15 * 0.85 / 4000) ** 0.5
    assert torch.equal(with_drop.seen()[2][~dropped], cond.labels[~dropped])
    assert torch.equal(with_drop.seen()[0], without.seen()[0]) and torch.equal(without.seen()[2], cond.labels)


def test_model_sees_the_dtype_asked_for_and_the_loss_stays_fp32() -> None:
    model = Recorder()
    loss = build(prediction="v")(model, *batch(), dtype=torch.bfloat16)
    assert model.calls[0][0].dtype == torch.bfloat16 and loss.loss.dtype == loss.mse.dtype == torch.float32


def test_unconditional_objective_passes_labels_through() -> None:
    model = Recorder()
    assert isinstance(build(null_label=None)(model, *batch()), Loss)
    assert torch.equal(model.calls[0][2], batch()[1].labels)


@pytest.mark.parametrize("weighting", WEIGHTINGS.names())
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_zero_terminal_snr_gives_finite_losses(prediction: str, weighting: str) -> None:
    objective = build({"name": "cosine", "num_timesteps": 2, "zero_terminal": True}, prediction, weighting)
    loss = objective(Recorder(), *batch())
    assert set(loss.t.tolist()) == {0, 1} and loss.loss.isfinite() and loss.mse.isfinite().all()


@pytest.mark.parametrize("weighting", WEIGHTINGS.names())
@pytest.mark.parametrize("schedule", TABLES)
def test_eps_with_zero_terminal_snr_is_refused_by_name(schedule: str, weighting: str) -> None:
    with pytest.raises(UserError, match=f"prediction 'eps' is undefined under schedule '{schedule}'.*zero_terminal"):
        build({"name": schedule, "zero_terminal": True}, "eps", weighting)


UNBOUNDED = {
    *(("x0", name) for name in ("snr", "max_snr", "flow", "edm")),
    *(("eps", name) for name in ("const", "max_snr", "clamped_snr", "flow", "edm", "table", "pareto")),
}


@pytest.mark.parametrize("weighting", WEIGHTINGS.names())
@pytest.mark.parametrize("prediction", PREDICTIONS.names())
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_weighting_trains_rectified_flow_or_is_refused_by_name(prediction: str, weighting: str, shift: float) -> None:
    """Unbounded is: on x0 what grows with SNR, without noise; on eps what does not vanish with SNR, without data."""
    schedule = {"name": "flow", "shift": shift}
    if (prediction, weighting) in UNBOUNDED:
        told = f"weighting '{weighting}' grows without bound for prediction '{prediction}' under schedule 'flow': set weighting to min_snr"
        with pytest.raises(UserError, match=told):
            build(schedule, prediction, weighting)
    else:
        loss = build(schedule, prediction, weighting)(Recorder(), *batch())
        assert loss.loss.isfinite() and loss.mse.isfinite().all() and loss.t.dtype == torch.float64


def test_the_weighting_flow_is_rectified_flow_s_plain_loss() -> None:
    loss = build("flow", "flow", "flow", "logit_normal")(Recorder(), *batch())
    torch.testing.assert_close(loss.weighted, loss.mse, rtol=1e-6, atol=0)


def test_rectified_flow_s_loss() -> None:
    """With constant weight on x0 the weight on u is sigma^2, since alpha + sigma = 1."""
    got = build("flow", "flow", "const")(Recorder(), *batch())
    x0, _, position = batch()
    t = uniform(SEED, position, Purpose.TIMESTEP)
    eps, s = normal(SEED, position, (3, 4, 4)).double(), t[:, None, None, None]
    error = (0.7 * ((1 - s) * x0 + s * eps) - (eps - x0)) ** 2
    assert torch.equal(got.t, 1000 * t)
    torch.testing.assert_close(got.loss.double(), (s**2 * error).mean(), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("drop", "null", "message"), [(0.1, None, "set label_drop to 0"), (1.0, 10, r"in \[0, 1\)"), (-0.1, 10, r"in \[0, 1\)")]
)
def test_impossible_label_dropout_is_refused(drop: float, null: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(label_drop=drop, null_label=null)

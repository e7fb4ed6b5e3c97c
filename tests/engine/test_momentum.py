"""Momentum that decays: Demon's shape, the compensation, and the bias correction through every way to update."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from fasttrain_kernels.adamw_ema import adamw_ema
from torch import Tensor

from fasttrain.engine.momentum import Demon, Momenta, MomentumDecay
from fasttrain.engine.optimizer import AdamWEMA, Clock, OptimizerConfig
from fasttrain.engine.update import Borrowed, OnePass, TorchFused, Update, Work
from tests.engine.test_updates import ByGroup, states, work

STEPS = 40
WAYS = {"one pass": OnePass(), "torch": TorchFused(), "borrowed": Borrowed(ByGroup, "")}


def momenta(start: float = 0.9, **params: Any) -> Momenta:
    return Momenta(start, MomentumDecay(steps=STEPS, **params))


def optimizer(p: Tensor, update: Update, *, start: float = 0.9, **decay: Any) -> AdamWEMA:
    config = OptimizerConfig(
        learning_rate=1e-2,
        betas=(start, 0.99),
        weight_decay=0.1,
        eps=1e-30,
        ema=(),
        momentum_decay=MomentumDecay(**{"steps": STEPS, **decay}) if decay else None,
    )
    return config.build([p], update)


def steps(made: AdamWEMA, p: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """The weights after each update, at a constant learning rate."""
    passed = []
    for k, gradient in enumerate(gradients, start=1):
        p.grad = gradient.clone()
        made.begin(Clock(k, k, 1), 1e-2)
        made.step()
        passed.append(p.detach().clone())
    return passed


def test_demon_by_hand() -> None:
    """At half the run and beta_0 = 0.9: 0.9 * 0.5 / (0.1 + 0.9 * 0.5) = 0.45 / 0.55; it begins at beta_0 and falls."""
    betas = [Demon().beta(0.9, k, STEPS) for k in range(1, STEPS + 2)]
    assert betas[0] == pytest.approx(0.9, rel=1e-15) and betas[20] == pytest.approx(0.45 / 0.55) and betas[-1] == 0
    assert all(later < earlier for earlier, later in pairwise(betas))
    # What a gradient still adds to later updates, beta / (1 - beta), falls linearly [Chen et al. 2022, Eq. 2].
    left = [beta / (1 - beta) for beta in betas]
    assert left == pytest.approx([9 * (1 - k / STEPS) for k in range(STEPS + 1)], abs=1e-12)
    assert [Demon(floor=0.6).beta(0.9, k, STEPS) for k in (1, STEPS)] == pytest.approx([0.9, 0.6])
    assert Demon(steps=20).beta(0.9, 11, STEPS) == Demon(steps=20).beta(0.9, 11, 20) == betas[20]


@pytest.mark.parametrize("floor", [0.0, 0.5])
def test_the_newest_gradients_share_is_constant(floor: float) -> None:
    made = momenta(floor=floor)
    shares = [made.of(k).compensation * (1 - made.of(k).beta1) for k in range(1, STEPS + 1)]
    assert shares == pytest.approx([0.1] * STEPS, rel=1e-14)
    alone = momenta(floor=floor, compensate=False)
    assert [alone.of(k).compensation for k in (1, STEPS)] == [1, 1] and alone.of(STEPS).beta1 == made.of(STEPS).beta1


@pytest.mark.parametrize("update", WAYS.values(), ids=WAYS)
def test_the_newest_gradients_share_in_the_weights_is_constant(update: Update) -> None:
    """Measured: what one more unit of the newest gradient moves the weight by, with the second moment and the correction held still."""
    moved = []
    for k in (20, 39):
        after = []
        for g in (1.0, 2.0):
            momentum = momenta().of(k)
            w, gradient, m, v = (torch.full((8,), value) for value in (0.0, g, 0.5, 1e12))
            w.grad = gradient
            settings = {"lr": 1e6 * momentum.compensation, "betas": (momentum.beta1, 1 - 1e-7), "eps": 1e-30, "weight_decay": 0.0}
            done = Work([w], [gradient], [m], [v], [], **settings, update=10**9, decays=[], product1=0.0)
            with torch.no_grad():
                update(done)
            after.append(done.params[0][0].item())
        moved.append(after[1] - after[0])
    assert moved == pytest.approx([-0.1, -0.1], rel=1e-3)


def test_the_product_is_that_of_all_betas_whatever_was_asked_before() -> None:
    decay = MomentumDecay(steps=STEPS, floor=0.3)
    by_hand = [math.prod(decay.beta(0.99, i, STEPS) for i in range(1, k + 1)) for k in range(1, STEPS + 1)]
    in_turn, again = Momenta(0.99, decay), Momenta(0.99, decay)
    assert [in_turn.of(k).product for k in range(1, STEPS + 1)] == by_hand
    # A skipped step asks for its update twice; a resumed run for a late one first, and here even for an earlier one.
    assert [again.of(k).product for k in (17, 17, 30, 5, 31)] == [by_hand[k - 1] for k in (17, 17, 30, 5, 31)]


@pytest.mark.parametrize("update", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("decay", [{"floor": 0.0}, {"floor": 0.5, "compensate": False}], ids=str)
def test_a_constant_gradient_is_found_at_every_update(update: Update, decay: dict[str, Any]) -> None:
    """m_hat = g and v_hat = g^2: without weight decay each update moves every weight by the learning rate, against the gradient."""
    p = torch.zeros(16, requires_grad=True)
    made = optimizer(p, update, **decay)
    made.param_groups[0]["weight_decay"] = 0.0
    gradient = torch.linspace(-3, 3, 16).double().add(0.1).float()
    rates = []
    passed = []
    for k in range(1, STEPS + 1):
        p.grad = gradient.clone()
        made.begin(Clock(k, k, 1), 1e-2)
        rates.append(made.learning_rate)
        made.step()
        passed.append(p.detach().clone())
    moves = torch.stack([passed[0], *(b - a for a, b in pairwise(passed))])
    expected = -torch.tensor(rates)[:, None] * gradient.sign()
    torch.testing.assert_close(moves, expected, rtol=2e-4, atol=0)


def test_where_momentum_stays_it_is_torchs_adamw_bit_for_bit() -> None:
    gradients = [torch.randn(16, generator=torch.Generator().manual_seed(k)) for k in range(5)]
    p, q = (torch.ones(16, requires_grad=True) for _ in range(2))
    theirs = torch.optim.AdamW([q], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-30, fused=True)
    for ours, gradient in zip(steps(optimizer(p, TorchFused()), p, gradients), gradients, strict=True):
        q.grad = gradient.clone()
        theirs.step()
        assert torch.equal(ours, q.detach())


@pytest.mark.parametrize("update", WAYS.values(), ids=WAYS)
def test_a_product_of_one_beta_is_its_power(update: Update) -> None:
    """With the floor at beta_0 nothing falls, and the product is beta_0^k but for its rounding."""
    assert momenta(0.9).of(1) == (0.9, 0.9, 1.0) and Momenta(0.9, None).of(7) == (0.9, None, 1.0)
    gradients = [torch.randn(16, generator=torch.Generator().manual_seed(k)) for k in range(5)]
    without, constant = (torch.ones(16, requires_grad=True) for _ in range(2))
    for a, b in zip(
        steps(optimizer(without, update), without, gradients),
        steps(optimizer(constant, update, floor=0.9), constant, gradients),
        strict=True,
    ):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=0)


@pytest.mark.parametrize("update", list(WAYS.values())[1:], ids=list(WAYS)[1:])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_every_way_decays_momentum_alike(update: Update, clip: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(16, generator=generator) for _ in range(STEPS)]
    passed = []
    for way in (OnePass(), update):
        p = torch.ones(16, requires_grad=True)
        made = optimizer(p, way, floor=0.2)
        made.guard, made.max_norm = clip is not None, clip
        passed.append(steps(made, p, gradients))
    for ours, theirs in zip(*passed, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_it_is_adamw_with_this_momentum_written_out(clip: float | None) -> None:
    """In float64, from the formulas: beta_k, its product, and the compensated learning rate also in weight decay."""
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(16, generator=generator) for _ in range(STEPS)]
    p = torch.ones(16, requires_grad=True)
    made = optimizer(p, OnePass(), floor=0.2)
    made.guard, made.max_norm = clip is not None, clip
    passed = steps(made, p, gradients)
    w, m, v, product = torch.ones(16).double(), torch.zeros(16).double(), torch.zeros(16).double(), 1.0
    for k, (gradient, got) in enumerate(zip(gradients, passed, strict=True), start=1):
        left = 1 - (k - 1) / STEPS
        beta = max(0.2, 0.9 * left / (0.1 + 0.9 * left))
        rate, product = 1e-2 * 0.1 / (1 - beta), product * beta
        g = gradient.double() * (1 if clip is None else min(1.0, clip / (gradient.norm().item() + 1e-6)))
        m, v = beta * m + (1 - beta) * g, 0.99 * v + 0.01 * g**2
        w = (1 - rate * 0.1) * w - rate * (m / (1 - product)) / ((v / (1 - 0.99**k)).sqrt() + 1e-30)
        torch.testing.assert_close(got.double(), w, rtol=2e-5, atol=2e-6)


def test_a_skipped_step_does_not_count() -> None:
    p = torch.ones(16, requires_grad=True)
    made = optimizer(p, OnePass(), floor=0.2)
    gradients = [torch.randn(16, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    expected = steps(made, p, gradients)
    p = torch.ones(16, requires_grad=True)
    made = optimizer(p, OnePass(), floor=0.2)
    made.guard = True
    steps(made, p, gradients[:2])
    p.grad = torch.full((16,), math.nan)
    made.begin(Clock(3, 3, 1), 1e-2)  # the update that was skipped keeps its number
    made.step()
    assert made.overflow
    for k in (3, 4):
        p.grad = gradients[k - 1].clone()
        made.begin(Clock(k, k + 1, 1), 1e-2)
        made.step()
    assert torch.equal(p.detach(), expected[-1])


def test_the_kernel_takes_the_product() -> None:
    pytest.importorskip("triton")
    from tests.kernels.interpreter import interpreting

    ours, plain, other = (work(product1=product) for product in (0.31, 0.31, None))
    with interpreting(), torch.no_grad():
        OnePass("triton")(ours)
    with torch.no_grad():
        OnePass("reference")(plain)
        OnePass("reference")(other)
    for a, b in zip(states(ours), states(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
    assert not torch.allclose(plain.params[0], other.params[0])


@pytest.mark.parametrize("product", [-0.1, 1.0, 1.5])
def test_what_is_no_product_of_betas_is_refused(product: float) -> None:
    one = [[torch.zeros(2)] for _ in range(4)]
    settings: dict[str, Any] = {"lr": 1.0, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.0, "update": 1, "decays": []}
    with pytest.raises(ValueError, match="product1 is a product of numbers"):
        adamw_ema(*one, [], **settings, product1=product)


def test_the_control_arm_has_the_rates_that_compensation_has() -> None:
    arm = OptimizerConfig(learning_rate=2.0, betas=(0.9, 0.99), warmup_steps=10, decay="demon")
    decayed = OptimizerConfig(learning_rate=2.0, betas=(0.9, 0.99), warmup_steps=10, momentum_decay=MomentumDecay(steps=STEPS))
    made = decayed.build([torch.zeros(1, requires_grad=True)])
    for k in range(1, STEPS + 1):
        made.begin(Clock(k, k, 1), decayed.rate(k, STEPS))
        assert made.learning_rate == pytest.approx(arm.rate(k, STEPS), rel=1e-14)
        assert made.param_groups[0]["betas"][0] == pytest.approx(0.9) or k > 1
    assert arm.rate(STEPS, STEPS) == pytest.approx(2 * 0.1 / (1 - 0.9 / 40 / (0.1 + 0.9 / 40)))
    assert arm.build([torch.zeros(1, requires_grad=True)]).param_groups[0]["betas"] == (0.9, 0.99)


def test_decays_are_read_by_name_and_written_as_they_were() -> None:
    assert OptimizerConfig(decay="demon").decay == Demon() and OptimizerConfig(decay="cosine").decay == "cosine"
    config = OptimizerConfig(decay={"name": "demon", "floor": 0.5}, momentum_decay=None)
    assert OptimizerConfig.model_validate_json(config.model_dump_json()) == config
    assert OptimizerConfig(momentum_decay={"steps": 7}).momentum_decay == MomentumDecay(steps=7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decay": "demno"}, "unknown decay 'demno'; did you mean 'demon'"),
        ({"decay": {"name": "demon", "flor": 1}}, "flor: Extra inputs"),
        ({"decay": {"name": "demon", "floor": 0.995}}, "decay.floor 0.995 lies above"),
        ({"momentum_decay": {"floor": 0.995}}, "momentum_decay.floor 0.995 lies above"),
        ({"momentum_decay": {}, "decay": "demon"}, "both would do it twice"),
    ],
)
def test_contradictions_are_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig.model_validate(given)


def test_a_run_of_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"momentum_decay\.steps is open"):
        OptimizerConfig(momentum_decay=MomentumDecay()).build([torch.zeros(1, requires_grad=True)])

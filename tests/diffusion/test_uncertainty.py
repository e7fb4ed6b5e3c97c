"""The learned uncertainty: the loss that it makes, what it learns, and when a network tells it."""

import pytest
import torch
from torch import Tensor, nn

from fasttrain.cond import Cond, Nothing
from fasttrain.diffusion.objective import Loss, Objective
from fasttrain.diffusion.prediction import PREDICTIONS
from fasttrain.diffusion.schedule import SCHEDULES
from fasttrain.diffusion.timesteps import TIMESTEPS
from fasttrain.diffusion.uncertainty import Uncertainty, add_uncertainty
from fasttrain.diffusion.weighting import WEIGHTINGS


class Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.gain * x_t


def objective(schedule: str = "cosine") -> Objective:
    parts = (SCHEDULES.build(schedule), PREDICTIONS.build("v"), WEIGHTINGS.build("min_snr"), TIMESTEPS.build("stratified"))
    return Objective(*parts, nothing=Nothing(), seed=torch.tensor(3))


def taught(network: nn.Module, first: int = 0, count: int = 64, schedule: str = "cosine") -> Loss:
    x0 = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(first))
    return objective(schedule)(network, x0, Cond(torch.zeros(count).long()), first + torch.arange(count))


def network(schedule: str = "cosine") -> Scaling:
    made = Scaling()
    add_uncertainty(made, SCHEDULES.build(schedule))
    return made


def test_it_begins_as_the_plain_loss() -> None:
    with_it, without = network(), Scaling()
    ours, plain = taught(with_it), taught(without)
    ours.loss.backward()
    plain.loss.backward()
    assert torch.equal(ours.loss, plain.loss) and torch.equal(ours.weighted, plain.weighted)
    torch.testing.assert_close(with_it.gain.grad, without.gain.grad, rtol=1e-6, atol=0)


def test_the_loss_is_the_papers() -> None:
    """mean of w |error|^2 / e^u + u [Karras et al. 2024, EDM2], with both gradients."""
    made = network()
    with torch.no_grad():
        made.uncertainty.weight.copy_(torch.randn(32, generator=torch.Generator().manual_seed(1)) / 8)
    got = taught(made)
    u = made.uncertainty(got.t)
    assert u.std() > 0.1
    torch.testing.assert_close(got.loss, (got.weighted * torch.exp(-u) + u).mean(), rtol=1e-6, atol=0)
    got.loss.backward()
    (expected,) = torch.autograd.grad((got.weighted * torch.exp(-u) + u).mean(), made.uncertainty.weight)
    torch.testing.assert_close(made.uncertainty.weight.grad, expected, rtol=1e-5, atol=1e-7)


def test_it_learns_the_log_of_the_loss() -> None:
    made = network()
    made.gain.requires_grad_(False)
    optimizer = torch.optim.Adam([made.uncertainty.weight], lr=0.05)
    for step in range(300):
        optimizer.zero_grad()
        taught(made, 512 * step, 512).loss.backward()
        optimizer.step()
    told = taught(made, 10**6, 8192)
    with torch.no_grad():
        u = made.uncertainty(told.t)
    apart = []
    for low in range(50, 950, 100):
        within = (told.t >= low) & (told.t < low + 100)
        # Jensen: within a range of timesteps the loss varies, so its mean's log stands above the mean of u.
        apart.append(((told.weighted[within] / u[within].exp()).mean() - 1).abs().item())
    assert max(apart) < 0.15, apart


def test_it_is_told_in_training_only() -> None:
    made = network()
    given = (torch.zeros(2, 1, 4, 4), torch.tensor([3, 900]), Cond(torch.zeros(2).long()))
    prediction, u = made(*given)
    assert prediction.shape == (2, 1, 4, 4) and u.shape == (2,) and u.dtype == torch.float32
    assert isinstance(made.eval()(*given), Tensor)


@pytest.mark.parametrize("schedule", [*SCHEDULES.names(), "zero"])
def test_it_is_finite_on_every_path(schedule: str) -> None:
    path = SCHEDULES.build({"name": "cosine", "zero_terminal": True} if schedule == "zero" else schedule)
    made = Uncertainty(path).to(torch.bfloat16)
    nn.init.ones_(made.weight)
    ends = path.timestep(torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64))
    u = made(ends)
    assert u.isfinite().all() and u.dtype == torch.float32 and len(set(u.tolist())) == 3

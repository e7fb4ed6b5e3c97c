"""The consistency paper's curriculum: timesteps drawn evenly at first, and more and more about those that matter most."""

from dataclasses import dataclass
from functools import cached_property

import torch
from fasttrain_kernels.philox import Purpose
from fasttrain_kernels.uniform import uniform
from torch import Tensor

from fasttrain.diffusion.schedule import Schedule
from fasttrain.diffusion.timesteps import TIMESTEPS
from fasttrain.errors import UserError
from fasttrain.registry import shown

LEAST_STD, MOST_STD = 0.01, 100.0  # narrower than the cells below could show; wider is uniform
MOST_IMAGES = 10**18
SHARE_OF_RUN = 0.2  # the paper's best target iteration: 100 k of 500 k [Xu et al. 2024, section 5.1]
_CELLS = 4096
_EDGE = 2.0**-53


@TIMESTEPS.register("curriculum")
@dataclass(frozen=True)
class Curriculum:
    """CLTS: of the draws of image n a share s(n) is normal about `mean`, the others are uniform [Xu et al. 2024, Eq. 7 and 8].

    F_s = (1 - s) u + s G(t / T),  s(n) = min(1, n / images),  G(p) = (N(p) - N(0)) / (N(1) - N(0)),  N(p) = Phi((p - mean) / std)

    where t is the schedule's timestep of u: the uniform draws are the schedule's own, and the normal is one of t / T whatever the schedule.
    u is F_s^-1 of one number of (seed, position): of `stratified`'s, so that any run of successive positions covers F_s as evenly as
    `stratified` covers the uniform distribution, which a die for "normal or uniform" would not.

    The normal is cut off at the path's ends, as a density over timesteps 1 .. T is when it is normalised. F_s is linear in u between
    4097 places: exact for every timestep where there are no more than that, and at most 2e-5 off else.

    Nothing makes up for the draws' distribution in the loss: the curriculum weighs timesteps as a weighting would.

    Args:
        mean: of the normal, as a share of T: 0.3 is the paper's best.
        std: its deviation, as a share of T. The paper's is not in our copy: 0.25 is our choice, at which no timestep is drawn less than
            1 / 28 as often as under uniform draws.
        images: after how many the draws are normal altogether; None: 20 % of the run's, filled in when it begins,
            and kept where it is made longer later on.
        stratified: false draws independently instead.

    Raises:
        ValueError: a mean outside [0, 1], or a std or count beyond use.
    """

    mean: float = 0.3
    std: float = 0.25
    images: int | None = None
    stratified: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.mean <= 1:
            raise ValueError(f"mean must lie in [0, 1], a share of T, got {shown(self.mean)}")
        if not LEAST_STD <= self.std <= MOST_STD:
            raise ValueError(f"std must lie between {LEAST_STD} and {MOST_STD:g}, a share of T, got {shown(self.std)}")
        if self.images is not None and not 1 <= self.images <= MOST_IMAGES:
            raise ValueError(f"images must be at least 1 and at most {MOST_IMAGES}, got {shown(self.images)}")

    def on(self, schedule: Schedule) -> "Course":
        """The uniform numbers that it draws under this schedule.

        Raises:
            UserError: `images` is still open, or the schedule's draws do not reach all of T.
        """
        if self.images is None:
            raise UserError("diffusion.timesteps.images: not set and not yet taken from the run; give a number of images")
        asked = schedule.first(torch.arange(_CELLS + 1, dtype=torch.float64) / _CELLS)
        u = schedule.uniform(asked)
        inner = (asked > 0) & (asked < schedule.num_timesteps)
        missed = (schedule.timestep(u[inner]).double() - asked[inner].double()).abs()
        if (missed > schedule.num_timesteps / _CELLS).any():
            raise UserError("diffusion.timesteps curriculum: diffusion.schedule draws only a part of T: give it a wider std")
        below = torch.special.ndtr((asked.double() / schedule.num_timesteps - self.mean) / self.std)
        return Course(u, (below - below[0]) / (below[-1] - below[0]), self.images, self.stratified)


@dataclass(frozen=True, eq=False)
class Course:
    """A curriculum's draws on a schedule.

    Args:
        u: where the schedule reaches the cells' ends, rising from 0 to 1: [cells + 1] float64. Cells may be empty.
        normal: G there.
        images, stratified: the curriculum's.
    """

    u: Tensor
    normal: Tensor
    images: int
    stratified: bool

    def draw(self, seed: Tensor, position: Tensor, impl: str = "auto") -> Tensor:
        """u [B] float64 in [0, 1)."""
        p = uniform(seed, position, Purpose.TIMESTEP, stratified=self.stratified, impl=impl)
        return self._quantile(p, (position.double() / self.images).clamp(max=1))

    def _quantile(self, p: Tensor, share: Tensor) -> Tensor:
        """The u with F_s(u) = p, for p and s [B] float64. Each operation is one of torch's own: a sample's bits know no batch."""
        u, normal = self._on(p.device)
        cumulative = u + share[:, None] * (normal - u)  # [B, cells + 1]
        right = torch.searchsorted(cumulative, p[:, None], right=True).clamp(1, len(u) - 1)
        low, high = cumulative.gather(1, right - 1), cumulative.gather(1, right)
        within = (p[:, None] - low) / (high - low)
        return torch.lerp(u[right - 1], u[right], within)[:, 0].clamp(0, 1 - _EDGE)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        # Copied to a device once: a copy per call would wait for the host.
        if device not in self._tables:
            self._tables[device] = (self.u.to(device), self.normal.to(device))
        return self._tables[device]

    @cached_property
    def _tables(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

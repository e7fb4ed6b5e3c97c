"""A small residual network that tells the classes of small images apart; what it sees before it decides are features."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (32, 64, 128)
SMALLEST = 4  # pixels a side behind the last stage
_GROUPS = 8


class Residual(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), both 3 x 3 of one width. Groups are normalised: no image depends on its batch."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(_GROUPS, width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            h = conv(F.relu(norm(h)))
        return x + h


class Classifier(nn.Module):
    """Stages of one residual block each, every later one at half the side and a larger width, down to 4 pixels a side.

    Args:
        channels: 1 or 3.
        size: pixels a side, at least 4.
        classes: how many.
    """

    def __init__(self, channels: int, size: int, classes: int):
        super().__init__()
        widths = stage_widths(size)
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, padding=1), Residual(widths[0])]
        for before, width in pairwise(widths):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), Residual(width)]
        self.body = nn.Sequential(*layers, nn.GroupNorm(_GROUPS, widths[-1]), nn.ReLU())
        self.decide = nn.Linear(widths[-1], classes)

    def features(self, x: Tensor) -> Tensor:
        """[n, D], the mean over places of what the body sees in x [n, C, H, W] in [-1, 1]; D is the last stage's width."""
        return self.body(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.decide(self.features(x))


def stage_widths(size: int) -> list[int]:
    """The width of each stage for images of this side: as many stages as leave at least 4 pixels a side."""
    stages = 1
    while size >> stages >= SMALLEST:
        stages += 1
    return [WIDTHS[min(i, len(WIDTHS) - 1)] for i in range(stages)]


def to_input(images: Tensor) -> Tensor:
    """Bytes [n, C, H, W] as the network takes them: byte / 127.5 - 1, fp32."""
    return images.to(torch.float32) / 127.5 - 1

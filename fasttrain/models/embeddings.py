"""Where numbers become vectors: timesteps, labels, positions."""

import math

import torch
from torch import Tensor, nn


def sinusoid(t: Tensor, size: int, max_period: float = 10_000.0, shift: int = 0) -> Tensor:
    """[cos(t w_i), sin(t w_i)], w_i = max_period^(-i / (half - shift)), half = size / 2 (DiT: cosines first, shift 0; diffusers' DiT: 1).

    Args:
        t: [B] timesteps, integer or real.
        size: even.

    Returns:
        [B, size] fp32, whatever the dtype of t or of the network.
    """
    half = size // 2
    # In the order of both public codes, to the bit: at t = 999 a rounding of the rate is a thousand times as large.
    rate = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift))  # [half]
    angle = t.float()[:, None] * rate  # [B, half]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # [B, size]


def grid_coordinates(grid: int, base: int | None = None, table: int | None = None) -> Tensor:
    """Where the patches along one side of a grid are.

    0 .. grid - 1; with another `base`, linspace(0, base, grid), both ends included, so that the limits stay when the resolution changes
    [Berrada et al. 2024, appendix C, pseudocode 1; at grid = base it would end at base, not base - 1: there ours stays 0 .. grid - 1].
    With `table`, the middle `grid` of a table of that many, spread over the base (by default the grid): as diffusers' SD3 crops its own.

    Returns:
        [grid] float64.
    """
    if table is not None:
        return ((table - grid) // 2 + torch.arange(grid, dtype=torch.float64)) * ((base or grid) / table)  # [g]
    if base is None or base == grid:
        return torch.arange(grid, dtype=torch.float64)  # [g]
    # As arange, and not as linspace, which can miss a `torch.device("meta")` around it.
    return torch.arange(grid, dtype=torch.float64) / max(grid - 1, 1) * base  # [g]


def sincos_positions(width: int, line: Tensor) -> Tensor:
    """Fixed 2-D positions of DiT: the first half of the width encodes the column, the second the row, each [sin, cos].

    Args:
        line: [grid] float64, the coordinates along one side.

    Returns:
        [grid * grid, width] fp32 (computed in float64), rows in raster order.

    Raises:
        ValueError: width is not divisible by 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a model.width divisible by 4, not {width}")
    quarter = width // 4
    rate = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # [D/4]
    angle = line[:, None] * rate  # [g, D/4]
    waves = torch.cat([angle.sin(), angle.cos()], dim=-1)  # [g, D/2]
    column = waves[None, :].expand(len(line), -1, -1)  # [g, g, D/2]
    row = waves[:, None].expand(-1, len(line), -1)  # [g, g, D/2]
    return torch.cat([column, row], dim=-1).flatten(0, 1).float()  # [g*g, D]


def axial_angles(head_width: int, line: Tensor, extra_tokens: int = 0) -> Tensor:
    """Rotary angles of patches on a grid: row * w_i for the first half of a head's pairs, column * w_i for the second.

    w_i = 10000^(-i / (d/4)), i < d/4      [Su et al. 2021, Eq. 15; in two axes as EVA-02 and LightningDiT: rows first, adjacent pairs]

    Args:
        line: [grid] float64, the coordinates along one side.

    Returns:
        [T, d/2] float64 radians, T = extra_tokens + grid * grid; extra tokens come first and are not turned.
    """
    quarter = head_width // 4
    rate = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # [d/4]
    angle, grid = line[:, None] * rate, len(line)  # [g, d/4]
    row, column = angle[:, None].expand(-1, grid, -1), angle[None, :].expand(grid, -1, -1)  # 2 x [g, g, d/4]
    patches = torch.cat([row, column], dim=-1).flatten(0, 1)  # [g*g, d/2]
    return torch.cat([patches.new_zeros(extra_tokens, 2 * quarter), patches])  # [T, d/2]


class AxialRotation(nn.Module):
    """cos and sin of `axial_angles`, fp32 for networks of any dtype; a function of the shapes, and so not in the state dict."""

    bits: Tensor

    def __init__(self, head_width: int, line: Tensor, extra_tokens: int = 0):
        super().__init__()
        angles = axial_angles(head_width, line, extra_tokens)  # [T, d/2]
        # Kept as integers of the same bits: network.bfloat16() would round floats.
        bits = torch.stack([angles.cos(), angles.sin()]).float().view(torch.int32)  # [2, T, d/2]
        self.register_buffer("bits", bits, persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        cos, sin = self.bits.view(torch.float32).unbind(0)  # 2 x [T, d/2]
        return cos, sin


def look_up(table: nn.Embedding, index: Tensor, kind: str) -> Tensor:
    """A row of the table for each index.

    Args:
        index: [B] int64.
        kind: what the index is ("label", "timestep"), for the message.

    Returns:
        [B, D] in the table's dtype.

    Raises:
        ValueError: an index is outside the table. Told on the CPU only: on a GPU, reading the indices would make the
            host wait for the device at every step, so there CUDA's own assertion stops the run.
    """
    try:
        return table(index)  # [B, D]
    except IndexError:
        raise ValueError(f"{kind} out of range: the model's table has rows 0 to {table.num_embeddings - 1}, got {index.tolist()}") from None


class TimestepEmbedder(nn.Module):
    """Sinusoid, then Linear, SiLU, Linear: takes integer and real timesteps; `shift` is the sinusoid's."""

    frequencies = 256

    def __init__(self, width: int, shift: int = 0):
        super().__init__()
        self.shift = shift
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(sinusoid(t, self.frequencies, shift=self.shift).to(dtype))  # [B, D]


class LabelEmbedder(nn.Module):
    """A table of K + 1 rows: the classes, then the null label."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return look_up(self.embedding_table, labels, "label")  # [B, D]

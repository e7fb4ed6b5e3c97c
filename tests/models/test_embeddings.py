"""Sinusoids, positions and tables against their definitions."""

import math

import pytest
import torch

from fasttrain.models.embeddings import (
    AxialRotation,
    LabelEmbedder,
    TimestepEmbedder,
    axial_angles,
    grid_coordinates,
    look_up,
    sincos_positions,
    sinusoid,
)


def test_sinusoid_has_cosines_first_and_divides_by_half():
    t = torch.tensor([0, 1, 999])
    out = sinusoid(t, 256)
    assert out.shape == (3, 256) and out.dtype == torch.float32
    for i in (0, 1, 64, 127):
        angle = t.double() * 10_000 ** (-i / 128)
        torch.testing.assert_close(out[:, i].double(), angle.cos(), rtol=0, atol=1e-4)
        torch.testing.assert_close(out[:, 128 + i].double(), angle.sin(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_sinusoid_is_fp32_for_every_kind_of_timestep(dtype):
    t = torch.tensor([3, 700], dtype=dtype)
    assert torch.equal(sinusoid(t, 8), sinusoid(t.long(), 8))


def test_positions_encode_the_column_first():
    width, grid = 16, 3
    table = sincos_positions(width, grid_coordinates(grid))
    assert table.shape == (9, 16) and table.dtype == torch.float32
    for row in range(grid):
        for column in range(grid):
            expected = []
            for place in (column, row):
                angles = [place / 10_000 ** (i / 4) for i in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[row * grid + column], torch.tensor(expected))


def test_coordinates_keep_their_limits_at_another_resolution():
    """The paper's linspace(0, base, grid), both ends included; the model's own grid where there is no other base."""
    for own in (grid_coordinates(4), grid_coordinates(4, base=4)):
        assert own.tolist() == [0, 1, 2, 3] and own.dtype == torch.float64
    torch.testing.assert_close(grid_coordinates(8, base=4), torch.tensor([0, 4, 8, 12, 16, 20, 24, 28], dtype=torch.float64) / 7)
    torch.testing.assert_close(grid_coordinates(2, base=4), torch.tensor([0.0, 4.0], dtype=torch.float64))


def test_coordinates_of_the_middle_of_a_larger_table():
    """SD3's: i base / table for i of a table of 6; the middle 4 are i = 1 to 4, of which base 3 makes half each."""
    assert grid_coordinates(4, base=3, table=6).tolist() == [0.5, 1.0, 1.5, 2.0]
    assert grid_coordinates(3, table=6).tolist() == [0.5, 1.0, 1.5]  # top is (6 - 3) // 2 = 1


def test_positions_at_other_coordinates_are_those_of_the_base_where_they_meet():
    """Every second point of a grid of 5 over base 4 is a point of linspace(0, 4, 3): 0, 2, 4."""
    fine = sincos_positions(16, grid_coordinates(5, base=4)).unflatten(0, (5, 5))
    coarse = sincos_positions(16, grid_coordinates(3, base=4)).unflatten(0, (3, 3))
    torch.testing.assert_close(fine[::2, ::2], coarse)


def test_positions_refuse_an_odd_width():
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_positions(18, grid_coordinates(4))


def test_look_up_names_what_is_out_of_range():
    table = torch.nn.Embedding(5, 2)
    assert torch.equal(look_up(table, torch.tensor([4]), "label"), table.weight[4:])
    for bad in (5, -1):
        with pytest.raises(ValueError, match=rf"label out of range: .* rows 0 to 4, got \[{bad}\]"):
            look_up(table, torch.tensor([bad]), "label")


def test_the_null_label_has_a_row_of_its_own():
    embedder = LabelEmbedder(10, 4)
    assert torch.equal(embedder(torch.tensor([10]))[0], embedder.embedding_table.weight[10])


def test_timestep_embedder_casts_after_the_sinusoid():
    embedder = TimestepEmbedder(16).bfloat16()
    t = torch.tensor([999, 998])
    out = embedder(t, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, embedder.mlp(sinusoid(t, 256).bfloat16()))
    assert not torch.equal(out[0], out[1])  # bf16 cannot tell 999 from 998; the sinusoid in fp32 can


def test_rotary_angles_are_the_rows_then_the_columns():
    """Patch (row 2, column 1) of a 3 x 3 grid, behind two extra tokens; heads of 8: two pairs for either axis, of rates 1 and 1/100."""
    angles = axial_angles(8, grid_coordinates(3), extra_tokens=2)
    assert angles.shape == (2 + 9, 4) and not angles[:2].any()
    torch.testing.assert_close(angles[2 + 3 * 2 + 1], torch.tensor([2.0, 0.02, 1.0, 0.01], dtype=torch.float64))


def test_rotated_scores_depend_on_the_distance_alone():
    """<R_m q, R_n k> is a function of m - n: the same for every pair of patches one row down and two columns to the right."""
    rotation = AxialRotation(16, grid_coordinates(5), extra_tokens=1)
    cos, sin = rotation()
    q, k = torch.randn(2, 8, 2).unbind(0)

    def turned(x, token):
        even, odd = x.unbind(1)
        return torch.stack([even * cos[token] - odd * sin[token], odd * cos[token] + even * sin[token]])

    tokens = [(1 + 5 * row + column, 1 + 5 * (row + 1) + column + 2) for row in range(4) for column in range(3)]
    scores = torch.stack([(turned(q, m) * turned(k, n)).sum() for m, n in tokens])
    torch.testing.assert_close(scores, scores[0].expand(12), rtol=1e-5, atol=1e-5)
    assert (scores[0] - (turned(q, 1) * turned(k, 3)).sum()).abs() > 1e-3


def test_rotation_keeps_fp32_in_a_bf16_network_and_is_not_saved():
    before, after = AxialRotation(16, grid_coordinates(5), 1)(), AxialRotation(16, grid_coordinates(5), 1).bfloat16()()
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(before, after, strict=True))
    assert not AxialRotation(16, grid_coordinates(5), 1).state_dict()

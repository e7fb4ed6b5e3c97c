"""Weights of another grid, patch or number of outputs, against what they must do."""

import pytest
import torch
import torch.nn.functional as F

from fasttrain.interchange.resizing import outputs_of, resampled_positions, resize_matrix, resized_embedding, resized_outputs


@pytest.mark.parametrize(("grid", "most"), [(8, 2e-3), (13, 2e-3), (17, 1e-6), (32, 1e-6)])
def test_positions_of_a_plane_stay_a_plane(grid: int, most: float):
    """Keys' cubic reproduces linear functions away from the border, where pixels' middles are the places; a widened one nearly."""
    old = 16
    place = (torch.arange(old) + 0.5) / old
    plane = torch.stack([place[:, None].expand(old, old), place[None, :].expand(old, old)], dim=-1).reshape(1, old * old, 2)
    made = resampled_positions(torch.cat([torch.full((1, 2, 2), 7.0), plane], dim=1), 2, grid)
    assert made.shape == (1, 2 + grid * grid, 2) and (made[:, :2] == 7).all()
    wanted = (torch.arange(grid) + 0.5) / grid
    inner = (wanted > 0.26) & (wanted < 0.74)  # beyond the reach of the border, also of the wider kernel where the grid shrinks
    rows = made[0, 2:].view(grid, grid, 2)[inner][:, inner]
    torch.testing.assert_close(rows[..., 0], wanted[inner][:, None].expand(rows.shape[:2]), rtol=0, atol=most)
    torch.testing.assert_close(rows[..., 1], wanted[inner][None, :].expand(rows.shape[:2]), rtol=0, atol=most)


def test_positions_of_the_same_grid_stay_as_they_are():
    learned = torch.randn(1, 1 + 25, 6)
    torch.testing.assert_close(resampled_positions(learned, 1, 5), learned, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("old", "new"), [(2, 4), (2, 3), (4, 8), (1, 2)])
def test_a_grown_patch_embeds_a_grown_patch_as_before(old: int, new: int):
    weight, patch = torch.randn(7, 3, old, old), torch.randn(5, 3, old, old)
    grown = F.interpolate(patch, size=(new, new), mode="bilinear", align_corners=False)
    made = resized_embedding(weight, new)
    assert made.shape == (7, 3, new, new)
    torch.testing.assert_close(
        torch.einsum("dcpq,bcpq->bd", made, grown), torch.einsum("dcpq,bcpq->bd", weight, patch), rtol=1e-4, atol=1e-5
    )


def test_a_shrunk_patch_is_the_least_squares():
    weight = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    made = resized_embedding(weight, 2).double().flatten()
    matrix = torch.block_diag(*[resize_matrix(4, 2).T] * 2)
    best = torch.linalg.lstsq(matrix, weight.flatten()[:, None]).solution.flatten()
    torch.testing.assert_close(made, best, rtol=1e-5, atol=1e-6)


def test_outputs_are_resized_as_pictures():
    old, new, channels = 2, 4, 3
    rows = torch.randn(old * old * channels, 11)
    made = resized_outputs(rows, old, new, channels)
    pictures = rows.view(old, old, channels, 11).permute(3, 2, 0, 1)
    grown = F.interpolate(pictures, size=(new, new), mode="bilinear", align_corners=False)
    torch.testing.assert_close(made.view(new, new, channels, 11).permute(3, 2, 0, 1), grown)
    torch.testing.assert_close(resized_outputs(rows[:, 0], old, new, channels), made[:, 0])


def test_more_outputs_are_zero_and_fewer_are_the_first():
    rows = torch.randn(4 * 3, 5)
    more = outputs_of(rows, 2, 3, 6)
    assert torch.equal(more.view(4, 6, 5)[:, :3], rows.view(4, 3, 5)) and (more.view(4, 6, 5)[:, 3:] == 0).all()
    assert torch.equal(outputs_of(more, 2, 6, 3), rows) and torch.equal(outputs_of(more[:, 0], 2, 6, 3), rows[:, 0])

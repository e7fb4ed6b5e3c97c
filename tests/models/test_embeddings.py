"""Sinusoids, positions and tables against their definitions."""

import math

import pytest
import torch

from fasttrain.models.embeddings import LabelEmbedder, TimestepEmbedder, look_up, sincos_positions, sinusoid


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
    table = sincos_positions(width, grid)
    assert table.shape == (9, 16) and table.dtype == torch.float32
    for row in range(grid):
        for column in range(grid):
            expected = []
            for place in (column, row):
                angles = [place / 10_000 ** (i / 4) for i in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[row * grid + column], torch.tensor(expected))


def test_positions_refuse_an_odd_width():
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_positions(18, 4)


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

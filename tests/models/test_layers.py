"""The parts: each against its definition."""

import pytest
import torch
import torch.nn.functional as F

from fasttrain.models.layers import AffineNorm, Fp32Linear, Mlp, PatchEmbed, check_input, unpatchify
from fasttrain.models.network import run_block


def test_patches_are_in_raster_order_and_unpatchify_undoes_it():
    x = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    embed = PatchEmbed(channels=3, patch=2, width=12)
    with torch.no_grad():
        # Row (p, q, c) of the identity picks that value of the patch: the order in which unpatchify expects it.
        embed.proj.weight.copy_(torch.eye(12).reshape(12, 2, 2, 3).permute(0, 3, 1, 2))
        embed.proj.bias.zero_()
        tokens = embed(x)
    assert torch.equal(tokens[:, 1].unflatten(1, (2, 2, 3)), x[:, :, :2, 2:4].permute(0, 2, 3, 1))
    assert torch.equal(unpatchify(tokens, patch=2, channels=3), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_linear_rounds_nothing_but_its_weights(dtype):
    layer = Fp32Linear(64, 8).to(dtype)
    x = torch.randn(5, 64).to(dtype)
    expected = x.double() @ layer.weight.double().T + layer.bias.double()
    out = layer(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_fp32_layers_ignore_autocast():
    layer, x = Fp32Linear(64, 8), torch.randn(5, 64)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_affine_norm_adds_the_branch_and_normalises(dtype):
    norm = AffineNorm(64).to(dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, branch = torch.randn(2, 2, 5, 64).to(dtype).unbind(0)
    total, y = norm(x, branch)
    assert torch.equal(total, x + branch) and torch.equal(norm(x + branch, None)[1], y)
    plain = F.layer_norm(total.double(), (64,), norm.weight.double(), norm.bias.double(), 1e-6)
    torch.testing.assert_close(y.double(), plain, rtol=1e-5 if dtype is torch.float32 else 2**-8, atol=1e-5)


def test_layer_norm_of_bf16_takes_its_statistics_in_fp32():
    """What the ViT relies on: bf16 in, bf16 out, one rounding. A mean of 256 with bf16 statistics would be off by far more."""
    x = (torch.randn(16, 256) + 256).bfloat16()
    norm = AffineNorm(256).bfloat16()
    expected = F.layer_norm(x.double(), (256,), norm.weight.double(), norm.bias.double(), 1e-6)
    torch.testing.assert_close(norm(x, None)[1].double(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_mlp_uses_the_gelu_it_is_told(gelu):
    mlp = Mlp(4, gelu)
    torch.nn.init.normal_(mlp.fc1.bias)
    x = 3 * torch.randn(1, 30, 4)
    hidden = F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias), approximate=gelu)
    assert hidden.shape == (1, 30, 16) and list(mlp.state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    torch.testing.assert_close(mlp(x), mlp.fc2(hidden), rtol=1e-6, atol=1e-6)
    other = F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias), approximate="tanh" if gelu == "none" else "none")
    assert not torch.allclose(mlp(x), mlp.fc2(other), rtol=1e-6, atol=1e-6)


def test_recomputing_runs_the_block_twice_and_only_for_gradients():
    calls = []

    def block(x):
        calls.append(1)
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    run_block(block, x, recompute=True).sum().backward()
    assert len(calls) == 2
    assert torch.allclose(x.grad, torch.ones(3).cos())
    with torch.no_grad():
        run_block(block, x, recompute=True)
    assert len(calls) == 3


def test_check_input_names_both_shapes():
    check_input(torch.zeros(2, 4, 8, 8), channels=4, size=8)
    with pytest.raises(ValueError, match=r"takes \[B, 4, 8, 8\], got \[2, 4, 8, 16\]"):
        check_input(torch.zeros(2, 4, 8, 16), channels=4, size=8)

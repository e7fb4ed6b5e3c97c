"""Attention against softmax written out in float64."""

import pytest
import torch

from fasttrain.models.attention import Attention, QvBiasAttention, attend, describe


def written_out(q, k, v):
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize(("heads", "tokens", "size"), [(1, 1, 8), (3, 18, 64), (2, 17, 72)])
def test_attend(heads, tokens, size):
    q, k, v = torch.randn(3, 2, heads, tokens, size).unbind(0)
    torch.testing.assert_close(attend(q, k, v).double(), written_out(q, k, v), rtol=1e-5, atol=1e-5)


def test_attend_in_bf16_accumulates_in_fp32():
    q, k, v = torch.randn(3, 2, 2, 256, 64).bfloat16().unbind(0)
    out = attend(q, k, v)
    assert out.dtype == torch.bfloat16
    error = (out.double() - written_out(q, k, v)).norm() / written_out(q, k, v).norm()
    assert error < 2**-8


def test_heads_do_not_mix():
    """With an identity projection, changing one head's values changes that head's slice of the output alone."""
    layer = Attention(8, heads=2)
    with torch.no_grad():
        layer.proj.weight.copy_(torch.eye(8))
    x = torch.randn(1, 5, 8)
    before = layer(x)
    with torch.no_grad():
        layer.qkv.weight[16:20] += 1  # v of head 0
    after = layer(x)
    assert torch.equal(before[..., 4:], after[..., 4:]) and not torch.equal(before[..., :4], after[..., :4])


def test_qv_bias_equals_a_full_bias_whose_k_part_is_zero():
    layer, full = QvBiasAttention(8, heads=2), Attention(8, heads=2)
    with torch.no_grad():
        layer.q_bias.normal_()
        layer.v_bias.normal_()
        full.load_state_dict(
            {
                "qkv.weight": layer.qkv.weight,
                "qkv.bias": torch.cat([layer.q_bias, torch.zeros(8), layer.v_bias]),
                "proj.weight": layer.proj.weight,
                "proj.bias": layer.proj.bias,
            }
        )
    x = torch.randn(2, 5, 8)
    assert torch.equal(layer(x), full(x))


def test_describe_tells_the_device():
    assert ("CUDA" in describe()) == torch.cuda.is_available()

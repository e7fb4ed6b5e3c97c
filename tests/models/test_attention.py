"""Attention against softmax written out in float64; every choice of it is used or refused, and none stands in for another."""

import sys

import pytest
import torch

from fasttrain.models import attention
from fasttrain.models.attention import ATTENTION, Attention, QkNorm, QvBiasAttention, attention_function, describe, missing
from fasttrain.models.implementations import Implementations


def written_out(q, k, v):
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize(("heads", "tokens", "size"), [(1, 1, 8), (3, 18, 64), (2, 17, 72)])
@pytest.mark.parametrize("name", ["auto", "flash", "math"])
def test_attention_is_softmax_written_out(name, heads, tokens, size):
    q, k, v = torch.randn(3, 2, heads, tokens, size).unbind(0)
    torch.testing.assert_close(attention_function(name)(q, k, v).double(), written_out(q, k, v), rtol=1e-5, atol=1e-5)


def test_attention_in_bf16_accumulates_in_fp32():
    q, k, v = torch.randn(3, 2, 2, 256, 64).bfloat16().unbind(0)
    out = attention_function("auto")(q, k, v)
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


def test_the_backend_asked_for_computes(monkeypatch):
    """What reaches torch is restricted to the one kernel; none other may stand in."""
    asked = []
    monkeypatch.setattr(attention, "sdpa_kernel", lambda backends: asked.append(backends) or torch.nn.attention.sdpa_kernel(backends))
    attention_function("math")(*torch.randn(3, 1, 1, 4, 8))
    assert asked == [[torch.nn.attention.SDPBackend.MATH]]


def install(folder, module, monkeypatch, result):
    """A flash-attn package of the given name that computes in plain torch, in the package's layout."""
    parts = module.split(".")
    for depth in range(len(parts)):
        package = folder.joinpath(*parts[: depth + 1])
        package.mkdir()
        (package / "__init__.py").touch()
    (package / "__init__.py").write_text(
        "def flash_attn_func(q, k, v, deterministic=False):\n"
        "    q, k, v = (x.transpose(1, 2) for x in (q, k, v))\n"
        "    out = ((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)\n"
        "    assert deterministic\n"
        f"    return {result}\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    for name in {module, parts[0]}:
        monkeypatch.setitem(sys.modules, name, None)  # what is imported under this name is forgotten afterwards
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "module", "result"),
    [
        ("flash_attn_2", "flash_attn", "out"),
        ("flash_attn_3", "flash_attn_interface", "out"),
        ("flash_attn_3", "flash_attn_interface", "(out, None)"),
        ("flash_attn_4", "flash_attn.cute", "(out, None)"),
    ],
)
def test_a_package_gets_its_own_layout(name, module, result, tmp_path, monkeypatch):
    install(tmp_path, module, monkeypatch, result)
    q, k, v = torch.randn(3, 2, 3, 5, 8).unbind(0)
    assert missing(name) is None and module.partition(".")[0] not in sys.modules
    out = attention_function(name, deterministic=True)(q, k, v)
    torch.testing.assert_close(out.double(), written_out(q, k, v), rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        attention_function(name, deterministic=False)(q, k, v)


@pytest.mark.parametrize(("name", "module"), [("flash_attn_2", "flash_attn"), ("flash_attn_4", "flash_attn.cute")])
def test_a_package_that_is_not_installed_is_named_with_its_remedy(name, module):
    with pytest.raises(ValueError, match=rf"'{name}': the module {module} is not installed: pip install flash-attn"):
        Attention(8, 2, Implementations(attention=name))


def test_flash_attn_2_alone_is_not_taken_for_4(tmp_path, monkeypatch):
    install(tmp_path, "flash_attn", monkeypatch, "out")
    assert missing("flash_attn_2") is None and missing("flash_attn_4") is not None


def test_an_unknown_attention_lists_the_known():
    with pytest.raises(ValueError, match=f"unknown attention 'xformers'; known: {', '.join(ATTENTION)}"):
        attention_function("xformers")


@torch.no_grad()
def test_qk_norm_makes_scores_independent_of_the_scale_of_queries_and_keys():
    layer = Attention(16, heads=2, qk_norm=True)
    x = torch.randn(2, 5, 16)
    layer.qkv.bias.zero_()
    before = layer(x)
    layer.qkv.weight[:32] *= 7  # q and k
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)
    layer.qk_norm.q_weight *= 9
    assert not torch.allclose(layer(x), before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", [Attention, QvBiasAttention])
def test_qk_norm_owns_both_weights(kind):
    names = [name for name in kind(16, heads=2, qk_norm=True).state_dict() if name.startswith("qk_norm")]
    assert names == ["qk_norm.q_weight", "qk_norm.k_weight"]
    assert not list(QkNorm(8, Implementations()).children())


def test_describe_tells_the_device():
    assert ("CPU" in describe()) != torch.cuda.is_available()

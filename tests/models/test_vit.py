"""The ViT computes what the paper's architecture says, and starts as it says."""

import math

import pytest
import torch
import torch.nn.functional as F

from fasttrain.cond import Cond
from fasttrain.models import MODELS

TINY = {"name": "vit", "input_size": 8, "channels": 3, "num_classes": 10, "depth": 3, "width": 32, "heads": 4, "num_timesteps": 1000}


def build(seed: int = 0, **changes):
    torch.manual_seed(seed)
    return MODELS.build({**TINY, **changes}).build()


def batch(size: int = 4, channels: int = 3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, channels, 8, 8, generator=generator)
    return x, torch.randint(0, 1000, (size,), generator=generator), Cond(torch.randint(0, 11, (size,), generator=generator))


def plain_forward(state: dict[str, torch.Tensor], x, t, cond, heads: int = 4, patch: int = 2):
    """The architecture again, with attention written out, from the tensors alone."""
    patches = (
        F.unfold(x, patch, stride=patch).transpose(1, 2) @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    )
    time, label = state["time_embedding.weight"][t], state["class_embedding.weight"][cond.labels]
    x = torch.cat([time[:, None], label[:, None], patches], dim=1) + state["pos_embed"]
    width = x.shape[-1]
    for i in range(3):
        p = {name.removeprefix(f"blocks.{i}."): value for name, value in state.items() if name.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (width,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        q, k, v = (y @ w.T for w in p["attn.qkv.weight"].chunk(3))
        q, k, v = (z.unflatten(2, (heads, -1)).transpose(1, 2) for z in (q + p["attn.q_bias"], k, v + p["attn.v_bias"]))
        y = ((q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        y = F.layer_norm(x, (width,), p["norm2.weight"], p["norm2.bias"], 1e-6) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        x = x + y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
    x = x[:, 2:] @ state["linear_projection.weight"].T + state["linear_projection.bias"]
    rows = [torch.cat(list(row.unbind(1)), dim=2) for row in x.unflatten(2, (patch, patch, 3)).unflatten(1, (4, 4)).unbind(1)]
    return torch.cat(rows, dim=1).permute(0, 3, 1, 2)


def random_state(model) -> dict[str, torch.Tensor]:
    """Weights of ordinary size everywhere, so that no branch hides behind a small or zero initialisation."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.2).to(parameter.dtype)
    return {name: value.double() for name, value in model.state_dict().items()}


def test_forward_equals_the_architecture_written_out():
    model = build()
    state = random_state(model)
    x, t, cond = batch()
    expected = plain_forward(state, x.double(), t, cond)
    torch.testing.assert_close(model(x, t, cond).double(), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_initial_statistics():
    model = build(width=128, depth=4, heads=4)
    for number, block in enumerate(model.blocks, start=1):
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.attn.proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * number), rel=0.05)
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * number), rel=0.05)
        assert not block.attn.q_bias.any() and not block.attn.v_bias.any() and not block.mlp.fc1.bias.any()
        assert (block.norm1.weight == 1).all() and not block.norm1.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.linear_projection.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert model.time_embedding.weight.std().item() == pytest.approx(1, rel=0.05)
    assert model.class_embedding.weight.std().item() == pytest.approx(1, rel=0.05)
    assert model.class_embedding.num_embeddings == 11 and model.config.null_label == 10


def test_the_first_prediction_is_almost_zero_and_the_output_fp32():
    x, t, cond = batch()
    out = build()(x, t, cond)
    assert out.shape == x.shape and out.dtype == torch.float32 and 0 < out.abs().max() < 0.01


def test_every_parameter_gets_a_finite_gradient():
    model = build()
    random_state(model)
    model(*batch()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_unconditional_has_no_class_token_and_ignores_labels():
    model = build(num_classes=0)
    x, t, cond = batch()
    assert model.pos_embed.shape[1] == 17 and model.config.null_label is None
    assert not any("class" in name for name in model.state_dict())
    assert torch.equal(model(x, t, cond), model(x, t, Cond()))


def test_a_real_timestep_is_refused():
    x, t, cond = batch()
    with pytest.raises(ValueError, match="integer timesteps"):
        build()(x, t / 1000, cond)


def test_bad_batches_are_refused():
    model, (x, t, cond) = build(), batch()
    with pytest.raises(ValueError, match=r"takes \[B, 3, 8, 8\], got \[4, 1, 8, 8\]"):
        model(x[:, :1], t, cond)
    with pytest.raises(ValueError, match=r"label out of range: .* rows 0 to 10"):
        model(x, t, Cond(cond.labels + 11))
    with pytest.raises(ValueError, match="timestep out of range"):
        model(x, t + 1000, cond)
    with pytest.raises(ValueError, match="10 stands for no class"):
        model(x, t, Cond())


def test_bf16_weights_stay_within_bf16s_error():
    model, (x, t, cond) = build().bfloat16(), batch()
    state = random_state(model)
    expected = plain_forward(state, x.bfloat16().double(), t, cond)
    out = model(x.bfloat16(), t, cond)
    assert out.dtype == torch.float32
    assert (out - expected).norm() / expected.norm() < 0.02
    out.square().mean().backward()
    assert all(parameter.grad.dtype == torch.bfloat16 and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_recomputed_blocks_give_the_same_gradients():
    grads = []
    for recompute in (False, True):
        model = build(checkpoint_blocks=recompute)
        random_state(model)
        model(*batch()).square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_same_seed_builds_the_same_model():
    first, second, other = build(3).state_dict(), build(3).state_dict(), build(4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["pos_embed"], other["pos_embed"])


def test_compiles_whole():
    model, inputs = build(), batch()
    random_state(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))

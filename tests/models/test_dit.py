"""DiT computes what the paper's architecture says, and starts as the zero function."""

import math

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels.dispatch import Kernels

from fasttrain.cond import Cond
from fasttrain.models import MODELS
from fasttrain.models.implementations import Implementations

TINY = {"name": "dit", "input_size": 8, "channels": 3, "num_classes": 10, "depth": 2, "width": 32, "heads": 4}
# The public checkpoints' names, of the first block and outside the blocks.
OFFICIAL = {
    "pos_embed", "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table",
    "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.0.adaLN_modulation.1",
    "final_layer.linear", "final_layer.adaLN_modulation.1",
}  # fmt: skip


def build(seed: int = 0, **changes):
    torch.manual_seed(seed)
    return MODELS.build({**TINY, **changes}).build()


def batch(size: int = 4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    return x, torch.randint(0, 1000, (size,), generator=generator), Cond(torch.randint(0, 11, (size,), generator=generator))


def random_state(model) -> dict[str, torch.Tensor]:
    """Weights of ordinary size everywhere: the zero initialisation would hide every block."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.2).to(parameter.dtype)
    return {name: value.double() for name, value in model.state_dict().items()}


def normalise(x: torch.Tensor, norm: str) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def plain_forward(
    state: dict[str, torch.Tensor], x, t, cond, norm: str, out_channels: int, heads: int = 4, patch: int = 2, *, token: bool = False
):
    """The architecture again, with attention written out, from the tensors alone."""

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    angle = t.double()[:, None] * torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], dim=1))))
    label = state["y_embedder.embedding_table.weight"][cond.labels]
    cond = F.silu(time if token else time + label)
    patches = F.unfold(x, patch, stride=patch).transpose(1, 2)
    x = patches @ state["x_embedder.proj.weight"].flatten(1).T + state["x_embedder.proj.bias"] + state["pos_embed"]
    x = torch.cat([label[:, None], x], dim=1) if token else x
    for i in range(2):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{name}.adaLN_modulation.1", cond)[:, None].chunk(6, dim=2)
        y = linear(f"{name}.attn.qkv", normalise(x, norm) * (1 + scale1) + shift1)
        q, k, v = (z.unflatten(2, (heads, -1)).transpose(1, 2) for z in y.chunk(3, dim=2))
        y = ((q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + gate1 * linear(f"{name}.attn.proj", y)
        y = linear(f"{name}.mlp.fc1", normalise(x, norm) * (1 + scale2) + shift2)
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + gate2 * linear(f"{name}.mlp.fc2", y)
    shift, scale = linear("final_layer.adaLN_modulation.1", cond)[:, None].chunk(2, dim=2)
    x = linear("final_layer.linear", normalise(x, norm) * (1 + scale) + shift)[:, int(token) :]
    rows = [torch.cat(list(row.unbind(1)), dim=2) for row in x.unflatten(2, (patch, patch, out_channels)).unflatten(1, (4, 4)).unbind(1)]
    return torch.cat(rows, dim=1).permute(0, 3, 1, 2)[:, :3]


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_forward_equals_the_architecture_written_out(norm, learn_sigma):
    model = build(norm=norm, learn_sigma=learn_sigma)
    state = random_state(model)
    x, t, cond = batch()
    expected = plain_forward(state, x.double(), t, cond, norm, 6 if learn_sigma else 3)
    out = model(x, t, cond)
    assert out.shape == x.shape and expected.std() > 0.1
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=5e-4)


def test_a_class_in_attention_is_one_more_token_and_modulates_nothing():
    model = build(conditioning="attention")
    state, (x, t, cond) = random_state(model), batch()
    expected = plain_forward(state, x.double(), t, cond, "layer", 3, token=True)
    torch.testing.assert_close(model(x, t, cond).double(), expected, rtol=1e-4, atol=5e-4)
    assert model.config.tokens == 17 and build(conditioning="attention", num_classes=0).config.tokens == 16
    with pytest.raises(ValueError, match="needs labels"):
        model(x, t, Cond())


def test_positions_keep_the_base_grids_limits():
    own, base, other = (build(position_base=base, qk_norm=True, rotary=True) for base in (None, 4, 2))
    assert torch.equal(own.pos_embed, base.pos_embed) and torch.equal(own.rotation.bits, base.rotation.bits)
    assert not torch.equal(own.pos_embed, other.pos_embed) and not torch.equal(own.rotation.bits, other.rotation.bits)
    half = build(input_size=4, position_base=1)  # a grid of 2 over 0 .. 1: its corner is the patch (1, 1) of any grid
    torch.testing.assert_close(half.pos_embed[0, 3], own.pos_embed[0, 5])


def test_the_first_prediction_is_zero_and_every_block_the_identity():
    model = build()
    assert not model(*batch()).any()
    x, cond = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in model.blocks:
        x_new, (branch, gate) = block(x, None, cond, None)
        assert torch.equal(x_new, x) and branch.any() and not gate.any()


def test_initial_statistics():
    model = build(width=128, depth=1)
    block = model.blocks[0]
    for weight, fans in ((block.attn.qkv.weight, 4 * 128), (block.mlp.fc1.weight, 5 * 128), (model.x_embedder.proj.weight, 12 + 128)):
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fans), rel=0.05)
        assert weight.abs().max().item() <= math.sqrt(6 / fans)
    for weight in (model.t_embedder.mlp[0].weight, model.t_embedder.mlp[2].weight, model.y_embedder.embedding_table.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    biases = [value for name, value in model.named_parameters() if name.endswith("bias")]
    assert biases and not any(bias.any() for bias in biases)


def test_names_are_the_public_checkpoints():
    names = {name.removesuffix(".weight").removesuffix(".bias") for name in build(depth=1).state_dict()}
    assert names == OFFICIAL


def test_a_public_checkpoints_shapes_load():
    config = MODELS.build({"name": "dit-xl/2", "input_size": 32, "channels": 4, "num_classes": 1000, "learn_sigma": True})
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in config.build().state_dict().items()}
    assert shapes["final_layer.linear.weight"] == (32, 1152)
    assert shapes["x_embedder.proj.weight"] == (1152, 4, 2, 2)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert shapes["blocks.27.adaLN_modulation.1.weight"] == (6912, 1152)
    assert shapes["pos_embed"] == (1, 256, 1152)


def test_names_do_not_depend_on_the_kernels():
    config = MODELS.build({**TINY, "qk_norm": True, "rotary": True})
    names = [list(config.build(Implementations(Kernels(kernels))).state_dict()) for kernels in ("auto", "triton", "reference")]
    assert names[0] == names[1] == names[2]


def test_every_trained_parameter_gets_a_finite_gradient():
    model = build()
    random_state(model)
    model(*batch()).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_integer_and_real_timesteps_agree():
    model = build()
    random_state(model)
    x, t, cond = batch()
    assert torch.equal(model(x, t, cond), model(x, t.double(), cond))
    assert not torch.equal(model(x, t, cond), model(x, t + 0.5, cond))


def test_unconditional_ignores_labels():
    model = build(num_classes=0)
    random_state(model)
    x, t, cond = batch()
    assert model.config.null_label is None and not any(name.startswith("y_embedder") for name in model.state_dict())
    assert torch.equal(model(x, t, cond), model(x, t, Cond()))


def test_bad_batches_are_refused():
    model, (x, t, cond) = build(), batch()
    with pytest.raises(ValueError, match=r"takes \[B, 3, 8, 8\], got \[4, 3, 4, 8\]"):
        model(x[:, :, :4], t, cond)
    with pytest.raises(ValueError, match=r"label out of range: .* rows 0 to 10"):
        model(x, t, Cond(cond.labels + 11))
    with pytest.raises(ValueError, match="needs labels"):
        model(x, t, Cond())


def test_bf16_weights_stay_within_bf16s_error():
    model, (x, t, cond) = build().bfloat16(), batch()
    state = random_state(model)
    expected = plain_forward(state, x.bfloat16().double(), t, cond, "layer", 3)
    out = model(x.bfloat16(), t, cond)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() / expected.norm() < 0.03
    out.float().square().mean().backward()


def test_recomputed_blocks_give_the_same_gradients():
    grads = []
    for recompute in (False, True):
        model = build(checkpoint_blocks=recompute)
        random_state(model)
        model(*batch()).square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_the_same_seed_builds_the_same_model():
    first, second = build(3).state_dict(), build(3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_compiles_whole():
    model, inputs = build(), batch()
    random_state(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), model(*inputs))

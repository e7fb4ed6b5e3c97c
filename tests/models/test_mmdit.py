"""mmDiT computes what its architecture says in both forms, and starts as the zero function."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from fasttrain_kernels.dispatch import Kernels

from fasttrain.cond import Cond, Text
from fasttrain.errors import UserError
from fasttrain.models import MODELS
from fasttrain.models.embeddings import sincos_positions
from fasttrain.models.implementations import Implementations
from fasttrain.models.memory import count_parameters
from tests.models.conditions import conditions

TEXT = {"text_tokens": 5, "text_width": 12, "text_pooled": 6}
TINY = {"name": "mmdit", "input_size": 8, "channels": 3, "num_classes": 10, "depth": 3, "width": 32, "heads": 4}
KINDS = {
    "classes": {},
    "text": TEXT,
    "pooled": {**TEXT, "pooled": True},
    "own tokens": {**TEXT, "masked_text": True},
    "no norm": {**TEXT, "qk_norm": False},
    "rms": {**TEXT, "norm": "rms", "rotary": True},
}
FORMS = ["shared", "dual"]


def build(seed: int = 0, how: Implementations | None = None, **changes):
    torch.manual_seed(seed)
    return MODELS.build({**TINY, **changes}).build(how or Implementations())


def batch(model, size: int = 4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, 8, 8, generator=generator)
    return x, torch.randint(0, 1000, (size,), generator=generator), conditions(model.config, size)


def random_state(model) -> dict[str, torch.Tensor]:
    """Weights of ordinary size everywhere: the zero initialisation would hide every block."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.2).to(parameter.dtype)
    return {name: value.double() for name, value in model.state_dict().items()}


class Plain:
    """The architecture again in float64, from the tensors alone, a sample at a time, so that no padding is ever there."""

    def __init__(self, state: dict[str, torch.Tensor], config):
        self.state, self.config = state, config

    def linear(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def mlp(self, name: str, value: torch.Tensor) -> torch.Tensor:
        y = self.linear(f"{name}.fc1", value)
        return self.linear(f"{name}.fc2", 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))))

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True) if self.config.norm == "layer" else x
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def heads(self, name: str, kind: str, qkv: torch.Tensor) -> list[torch.Tensor]:
        """q, k, v [h, tokens, d] of one modality."""
        q, k, v = (z.unflatten(1, (self.config.heads, -1)).transpose(0, 1) for z in qkv.chunk(3, dim=1))
        if not self.config.qk_norm:
            return [q, k, v]
        turned = []
        for x, letter in ((q, "q"), (k, "k")):
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.state[f"{name}.qk_norm.{letter}_weight_{kind}"]
            turned.append(self.turned(x) if self.config.rotary and kind == "image" else x)
        return [*turned, v]

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """Each pair of adjacent elements by row (first half of the pairs) or column times its rate."""
        quarter, grid = x.shape[-1] // 4, self.config.grid
        rate = torch.tensor([10_000 ** (-i / quarter) for i in range(quarter)], dtype=torch.float64)
        places = torch.arange(grid * grid)
        angle = torch.cat([(places // grid)[:, None] * rate, (places % grid)[:, None] * rate], dim=1)
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], dim=-1).flatten(-2)

    def attend(self, name: str, text_qkv: torch.Tensor, image_qkv: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.heads(name, "text", text_qkv), self.heads(name, "image", image_qkv), strict=True)
        q, k, v = (torch.cat(pair, dim=1) for pair in pairs)
        return ((q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(0, 1).flatten(1)

    def vector(self, t: torch.Tensor, pooled: torch.Tensor | None) -> torch.Tensor:
        angle = t.double() * torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
        time = self.linear("t_embedder.mlp.2", F.silu(self.linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()]))))
        if self.config.pooled_width is None:
            return F.silu(time)
        return F.silu(time + self.linear("pooled_embedder.2", F.silu(self.linear("pooled_embedder.0", pooled.double()))))

    def shared(self, name: str, text: torch.Tensor, image: torch.Tensor, vector: torch.Tensor, last: bool) -> list[torch.Tensor]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.linear(f"{name}.adaLN_modulation.1", vector).chunk(6)
        a, b = (self.normed(x) * (1 + scale1) + shift1 for x in (text, image))
        out = self.attend(f"{name}.attn", self.linear(f"{name}.attn.text_qkv", a), self.linear(f"{name}.attn.image_qkv", b))
        x = torch.cat([text, image]) + gate1 * self.linear(f"{name}.attn.proj", out)
        x = x + gate2 * self.mlp(f"{name}.mlp", self.normed(x) * (1 + scale2) + shift2)
        return list(x.split([len(text), len(image)]))

    def dual(self, name: str, text: torch.Tensor, image: torch.Tensor, vector: torch.Tensor, last: bool) -> list[torch.Tensor]:
        modulations, qkvs = {}, {}
        for kind, x in (("text", text), ("image", image)):
            vectors = self.linear(f"{name}.{kind}.adaLN_modulation.1", vector)
            if last and kind == "text":
                scale, shift = vectors.chunk(2)
            else:
                shift, scale, *modulations[kind] = vectors.chunk(6)
            qkvs[kind] = self.linear(f"{name}.{kind}.qkv", self.normed(x) * (1 + scale) + shift)
        outs = self.attend(f"{name}.attn", qkvs["text"], qkvs["image"]).split([len(text), len(image)])
        streams = []
        for kind, x, out in (("text", text, outs[0]), ("image", image, outs[1])):
            if kind in modulations:
                gate1, shift2, scale2, gate2 = modulations[kind]
                x = x + gate1 * self.linear(f"{name}.{kind}.proj", out)
                x = x + gate2 * self.mlp(f"{name}.{kind}.mlp", self.normed(x) * (1 + scale2) + shift2)
            streams.append(x)
        return streams

    def context(self, cond: Cond, number: int) -> torch.Tensor:
        if cond.text is None:
            return self.state["y_embedder.embedding_table.weight"][cond.labels[number]][None]
        own = int(cond.text.length[number]) if self.config.masked_text else cond.text.tokens.shape[1]
        return self.linear("context_embedder", cond.text.tokens[number, :own].double())

    def one(self, x: torch.Tensor, t: torch.Tensor, cond: Cond, number: int) -> torch.Tensor:
        config, patch = self.config, self.config.patch
        vector = self.vector(t[number], None if cond.text is None else cond.text.pooled[number])
        patches = F.unfold(x[number : number + 1].double(), patch, stride=patch)[0].T
        image = patches @ self.state["x_embedder.proj.weight"].flatten(1).T + self.state["x_embedder.proj.bias"]
        image, text = image + sincos_positions(config.width, config.coordinates()).double(), self.context(cond, number)
        for i in range(config.depth):
            text, image = getattr(self, config.form)(f"blocks.{i}", text, image, vector, i == config.depth - 1)
        first, second = self.linear("final_layer.adaLN_modulation.1", vector).chunk(2)
        shift, scale = (second, first) if config.form == "dual" else (first, second)
        out = self.linear("final_layer.linear", self.normed(image) * (1 + scale) + shift)  # [N, p p C]
        rows = [torch.cat(list(row.unbind(0)), dim=1) for row in out.unflatten(1, (patch, patch, 3)).unflatten(0, (4, 4)).unbind(0)]
        return torch.cat(rows, dim=0).permute(2, 0, 1)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        return torch.stack([self.one(x, t, cond, number) for number in range(len(x))])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_forward_equals_the_architecture_written_out(form, kind):
    model = build(form=form, **KINDS[kind])
    state, (x, t, cond) = random_state(model), batch(model)
    expected = Plain(state, model.config)(x, t, cond)
    out = model(x, t, cond)
    assert out.shape == x.shape and expected.std() > 0.1
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("form", FORMS)
def test_packed_captions_give_the_masked_ones_predictions_and_gradients(form):
    found = []
    for packed in (False, True):
        model = build(form=form, how=Implementations(packed=packed), **KINDS["own tokens"])
        random_state(model)
        out = model(*batch(model))
        out.square().mean().backward()
        found.append((out, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    for name, grad in found[0][1].items():
        assert (found[1][1][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-12, name


@pytest.mark.parametrize("form", FORMS)
def test_padding_is_seen_only_where_captions_are_not_masked(form):
    for masked in (False, True):
        model = build(form=form, **TEXT, masked_text=masked)
        random_state(model)
        x, t, cond = batch(model)
        behind = torch.arange(5) >= cond.text.length[:, None]
        other = Text(cond.text.tokens + behind[..., None] * 7.0, cond.text.length, cond.text.pooled)
        assert behind.any() and torch.equal(model(x, t, Cond(text=other)), model(x, t, cond)) is masked


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["classes", "pooled"])
def test_the_first_prediction_is_zero_and_every_block_the_identity(form, kind):
    model = build(form=form, **KINDS[kind])
    assert not model(*batch(model)).any()
    text, image, vector = torch.randn(2, model.config.extra_tokens, 32), torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in model.blocks:
        x, pending = block.end(*block(*block.begin(text, image), vector, None, None))
        assert torch.equal(x[:, -16:], image) and pending[0].any() and not pending[1].any()


def test_initial_statistics():
    model = build(width=128, depth=1, form="dual", **TEXT)
    image = model.blocks[0].image
    for weight, fans in ((image.qkv.weight, 4 * 128), (image.mlp.fc1.weight, 5 * 128), (model.context_embedder.weight, 12 + 128)):
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fans), rel=0.05)
    for weight in (model.t_embedder.mlp[0].weight, model.pooled_embedder[2].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(value.any() for name, value in model.named_parameters() if name.endswith("bias"))
    assert all((value == 1).all() for name, value in model.named_parameters() if "qk_norm" in name)


def names(**changes) -> set[str]:
    return {name.removesuffix(".weight").removesuffix(".bias") for name in build(depth=2, **changes).state_dict()}


def test_names_of_the_shared_form():
    norms = {f"blocks.0.attn.qk_norm.{letter}_weight_{kind}" for letter in "qk" for kind in ("text", "image")}
    inner = {
        f"blocks.0.{name}" for name in ("attn.text_qkv", "attn.image_qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    } | norms
    ends = {"x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1"}
    both = inner | {name.replace("blocks.0", "blocks.1") for name in inner} | ends
    assert names() == both | {"y_embedder.embedding_table"}
    assert names(**TEXT) == both | {"context_embedder"}


def test_names_of_the_dual_form():
    full = {"adaLN_modulation.1", "qkv", "proj", "mlp.fc1", "mlp.fc2"}
    found = names(form="dual", **TEXT)
    assert {name for name in found if name.startswith("blocks.0.text")} == {f"blocks.0.text.{name}" for name in full}
    assert {name for name in found if name.startswith("blocks.1.text")} == {"blocks.1.text.adaLN_modulation.1", "blocks.1.text.qkv"}
    assert {name for name in found if name.startswith("blocks.1.image")} == {f"blocks.1.image.{name}" for name in full}
    assert {"context_embedder", "pooled_embedder.0", "pooled_embedder.2"} <= found


@pytest.mark.parametrize("form", FORMS)
def test_names_do_not_depend_on_what_computes(form):
    config = MODELS.build({**TINY, **TEXT, "form": form, "masked_text": True, "rotary": True})
    ways = [
        Implementations(Kernels(kernels), packed=packed) for kernels, packed in (("auto", None), ("triton", True), ("reference", False))
    ]
    states = [list(config.build(how).state_dict()) for how in ways]
    assert states[0] == states[1] == states[2]


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_gets_a_finite_gradient(form):
    model = build(form=form, **KINDS["pooled"])
    random_state(model)
    model(*batch(model)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        # What text asks in the last block is read by no one.
        assert parameter.grad.any() != (name == "blocks.2.attn.qk_norm.q_weight_text"), name


@pytest.mark.parametrize("form", FORMS)
def test_recomputed_blocks_give_the_same_gradients(form):
    grads = []
    for recompute in (False, True):
        model = build(form=form, checkpoint_blocks=recompute, **KINDS["own tokens"])
        random_state(model)
        model(*batch(model)).square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_bf16_weights_stay_within_bf16s_error(form):
    model = build(form=form, **KINDS["pooled"]).bfloat16()
    state, (x, t, cond) = random_state(model), batch(model)
    rounded = cond.map(lambda part: part.bfloat16() if part.is_floating_point() else part)
    expected = Plain(state, model.config)(x.bfloat16(), t, rounded)
    out = model(x.bfloat16(), t, rounded.map(lambda part: part.half() if part.is_floating_point() else part))  # the table stores fp16
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() / expected.norm() < 0.03
    out.float().square().mean().backward()


def test_compiles_whole():
    """Masks and all; the dual form's blocks are compiled in tests/test_composition.py."""
    model = build(depth=2, **KINDS["own tokens"])
    random_state(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = batch(model)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))


@pytest.mark.parametrize("form", FORMS)
def test_bad_batches_are_refused(form):
    model = build(form=form, **KINDS["pooled"])
    x, t, cond = batch(model)
    text = cond.text
    with pytest.raises(ValueError, match=r"a prompt in the wrong encoder's shape: the model takes tokens \[B, 5, 12\], got \[4, 4, 12\]"):
        model(x, t, Cond(text=Text(text.tokens[:, 1:], text.length, text.pooled)))
    with pytest.raises(ValueError, match=r"wrong encoder's shape: the model takes tokens \[B, 5, 12\], got \[4, 5, 11\]"):
        model(x, t, Cond(text=Text(text.tokens[..., 1:], text.length, text.pooled)))
    with pytest.raises(ValueError, match=r"wrong encoder's shape: the model takes pooled vectors \[B, 6\], got \[4, 5\]"):
        model(x, t, Cond(text=Text(text.tokens, text.length, text.pooled[:, 1:])))
    with pytest.raises(ValueError, match="a text model needs captions"):
        model(x, t, Cond(torch.arange(4)))
    with pytest.raises(ValueError, match=r"takes \[B, 3, 8, 8\], got \[4, 3, 4, 8\]"):
        model(x[:, :, :4], t, cond)
    classes = build(form=form)
    with pytest.raises(ValueError, match=r"label out of range: .* rows 0 to 10"):
        classes(x, t, Cond(torch.full((4,), 11)))
    with pytest.raises(ValueError, match="needs labels; 10 stands for no class"):
        classes(x, t, Cond(text=text))


def test_configs_that_make_no_sense_are_refused():
    for change, told in (
        ({"text_tokens": 5}, "model.text_tokens and model.text_width belong together"),
        ({"text_tokens": 0, "text_width": 4}, "model.text_tokens must be at least 1"),
        ({"position_table": 3}, "model.position_table 3 is smaller than the grid, 4 patches a side"),
        ({"form": "triple"}, "form"),
    ):
        with pytest.raises(ValueError, match=told):
            MODELS.build({**TINY, **change})
    nothing = MODELS.build({**TINY, "num_classes": 0})
    for use in (nothing.build, nothing.flops_per_image, lambda: nothing.tokens):
        with pytest.raises(UserError, match="mmdit needs text or classes, and has neither"):
            use()
    unknown = MODELS.build({**TINY, "form": "dual", "text_tokens": 5, "text_width": 12})
    with pytest.raises(UserError, match=r"model\.text_pooled: not set"):
        unknown.build()
    assert dataclasses.replace(unknown, pooled=False).build().pooled_embedder is None


def test_a_text_model_has_no_classes():
    config = MODELS.build({**TINY, **TEXT})
    assert config.null_label is None and config.extra_tokens == 5 and config.tokens == 21
    assert MODELS.build(TINY).null_label == 10 and MODELS.build(TINY).tokens == 17


def test_qk_norm_is_on_and_has_four_weights_a_block():
    plain, normed = (MODELS.build({**TINY, **how}) for how in ({"qk_norm": False}, {}))
    assert count_parameters(normed).total - count_parameters(plain).total == 3 * 4 * 8


def test_positions_are_the_middle_of_sd3s_table():
    """diffusers' table: coordinate i base / table for i of the whole table, its middle taken; base is the grid of the trained size."""
    model = build(position_table=6, **TEXT)
    whole = sincos_positions(32, torch.arange(6, dtype=torch.float64) * (4 / 6)).unflatten(0, (6, 6))
    torch.testing.assert_close(model.positions[0], whole[1:5, 1:5].flatten(0, 1), rtol=0, atol=1e-6)
    assert "positions" not in model.state_dict()

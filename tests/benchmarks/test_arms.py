"""The gates in front of the clocks: an arm that computes something else has no speed."""

import pytest
import torch
from fasttrain_kernels.cases import CASES
from torch import Tensor, nn

from benchmarks import agreement
from benchmarks.arms import LIBRARIES, Arm, Region, absent, fault
from benchmarks.kernels import DRAWN, Point, grown
from benchmarks.networks import REFERENCE, as_public_code, build_network, config_of, our_objective, plain_objective, wake
from fasttrain.cond import Cond
from fasttrain.diffusion.schedule import Cosine

CPU = torch.device("cpu")
ADALN = CASES["adaln"]
PLAIN = Arm("eager", ADALN.reference, "")


def _fault(call) -> str | None:
    inputs = ADALN.inputs((4, 8, 96), torch.bfloat16, CPU)
    return fault(Arm("planted", call, ""), PLAIN, ADALN, inputs, {"norm": "layer"})


def test_the_right_operation_passes() -> None:
    assert _fault(ADALN.call) is None


def _first_sample_for_all(x: Tensor, scale: Tensor, shift: Tensor, **options) -> Tensor:
    return ADALN.reference(x, scale[:1].expand_as(scale), shift[:1].expand_as(shift), **options)


def _no_gradient_of_shift(x: Tensor, scale: Tensor, shift: Tensor, **options) -> Tensor:
    return ADALN.reference(x, scale, shift.detach() + 0 * shift, **options)


def _in_bf16(x: Tensor, scale: Tensor, shift: Tensor, *, norm: str, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("planted", [_first_sample_for_all, _no_gradient_of_shift, _in_bf16])
def test_a_wrong_one_does_not(planted) -> None:
    assert "is off by" in (_fault(planted) or "")


def test_gradients_come_from_the_same_upstream_for_every_dtype() -> None:
    inputs = ADALN.inputs((2, 4, 32), torch.float32, CPU)
    narrow = {name: t.bfloat16() for name, t in inputs.items()}
    regions = [Region(ADALN.reference, given, ADALN, {}) for given in (inputs, narrow)]
    for region in regions:
        region.both()
    assert torch.equal(regions[0]._upstream[0], regions[1]._upstream[0])


def test_a_large_batch_repeats_the_samples_drawn() -> None:
    point = Point("adaln", {}, (3, 5), 2 * DRAWN + 3)
    inputs = grown(ADALN, point, CPU)
    assert inputs["x"].shape == (17, 3, 5) and inputs["scale"].shape == (17, 5)
    assert torch.equal(inputs["x"][DRAWN : 2 * DRAWN], inputs["x"][:DRAWN])
    assert not torch.equal(inputs["x"][0], inputs["x"][1])


def test_libraries_that_are_not_installed_are_named() -> None:
    assert all(library.name in ("liger", "quack", "apex") for libraries in LIBRARIES.values() for library in libraries)
    assert set(absent("adaln")) <= {"liger", "quack", "apex"}
    assert absent("noising") == []


class _Network(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 64).view(1, 1, 8, 8))
        self.factor = factor

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        gate = self.weight.to(x.dtype)
        return x * (gate.detach() + self.factor * (gate - gate.detach()))  # the value is right whatever the factor, the gradient is not


@pytest.mark.parametrize(("factor", "words"), [(1.0, None), (1.1, "the gradient of weight is off by 1.0")])
def test_a_network_with_a_wrong_gradient_has_no_speed(factor: float, words: str | None) -> None:
    config = config_of("dit-tiny", input_size=8, channels=1, num_classes=10)
    probe = agreement.Probe.of(config, 4, CPU)
    founds = [agreement.found(net, list(net.parameters()), probe) for net in (_Network(factor), _Network(1.0), _Network(1.0))]
    told = agreement.fault(*founds, ["weight"])
    assert told is None if words is None else words in (told or "")


class _Replay:
    """What a CUDA graph does, on a CPU: runs again, and writes where the first results are; `stale` writes nothing."""

    def __init__(self, run, results: tuple[Tensor, list[Tensor]], stale: bool) -> None:
        self.run, self.results, self.stale = run, results, stale

    def replay(self) -> None:
        if not self.stale:
            loss, gradients = self.run()
            for old, new in zip((self.results[0], *self.results[1]), (loss, *gradients), strict=True):
                old.copy_(new)

    def reset(self) -> None:
        pass


@pytest.mark.parametrize("stale", [False, True])
def test_a_captured_network_is_judged_by_what_its_replay_writes(stale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(run, device):
        results = run()
        return _Replay(run, results, stale), results

    monkeypatch.setattr(agreement, "captured", captured)
    probe = agreement.Probe.of(config_of("dit-tiny", input_size=8, channels=1, num_classes=10), 4, CPU)
    network = _Network(1.0)
    replayed, truth = (found(network, [network.weight], probe) for found in (agreement.found_replayed, agreement.found))
    assert network.weight.grad is None
    told = agreement.fault(replayed, truth, truth, ["weight"])
    assert "the loss is nan" in (told or "") if stale else told is None


def test_gradients_in_parts_are_gradients_of_the_whole() -> None:
    config = config_of("dit-tiny", input_size=8, channels=1, num_classes=10)
    network = build_network(config, REFERENCE, "auto", CPU)
    wake(network)
    probe, parameters = agreement.Probe.of(config, 5, CPU), [p for p in network.parameters() if p.requires_grad]
    whole, parts = agreement.found(network, parameters, probe), agreement.found(network, parameters, probe, chunk=2)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    for one, other in zip(parts.gradients, whole.gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_an_eager_baseline_takes_no_gelu_in_passes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written after the wide layer's product is its GELU and nothing else, and the values stay the reference's."""
    config = config_of("dit-tiny", input_size=8, channels=1, num_classes=10)
    network = build_network(config, REFERENCE, "auto", CPU)
    layer, x = network.blocks[0].mlp.fc1, torch.randn(2, 3, 128)
    layer.bias.data.normal_()
    before = layer(x)
    as_public_code(network)
    monkeypatch.setattr("fasttrain.models.layers.bias_gelu", lambda *_, **__: pytest.fail("the reference was called"))
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-6)
    assert layer(x).grad_fn.name() == "GeluBackward0"
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_the_baseline_trains_on_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """With our draws in place of torch's generator, the plain objective gives our objective's loss."""
    config = config_of("dit-tiny", input_size=8, channels=1, num_classes=10)
    seen: list[Tensor] = []

    def model(x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        seen.extend((x_t.float(), t, cond.labels))
        return torch.zeros_like(x_t)

    x0, cond, position = torch.randn(6, 1, 8, 8), Cond(torch.arange(6)), torch.arange(6)
    ours = our_objective(config, REFERENCE, CPU)(model, x0, cond, position)
    x_t, t, dropped = seen
    alpha, sigma = (value.float().view(-1, 1, 1, 1) for value in Cosine().alpha_sigma(t))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: t)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: (dropped != config.null_label).float())
    monkeypatch.setattr(torch, "randn_like", lambda _: (x_t - alpha * x0) / sigma)
    theirs = plain_objective(config, CPU)(model, x0, cond, position)
    assert torch.equal(seen[5], dropped)
    assert theirs.item() == pytest.approx(ours.item(), rel=2e-2)  # x_t was rounded to bf16 before eps was taken out of it again

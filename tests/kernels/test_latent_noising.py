"""Latent noising's own facts; what holds for every operation is in test_cases.py."""

import pytest
import torch
from fasttrain_kernels.cases.noise import latent_noising_inputs
from fasttrain_kernels.latent_noising import MAX_PLANE, Posterior, latent_noising
from fasttrain_kernels.noising import noising
from fasttrain_kernels.philox import Purpose, normal
from fasttrain_kernels.uniform import uniform
from torch import Tensor

CPU = torch.device("cpu")
SHAPE = (3, 2, 2, 3, 7, 5)

both = pytest.mark.parametrize("impl", ["reference", "triton"])


def noiseless(shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """Posteriors without width, which are their means, and a path without noise: what comes out is the view that was chosen."""
    inputs = latent_noising_inputs(shape, torch.float32, device)
    inputs["stored"][:, :, 1] = -200
    return {**inputs, "shift": torch.zeros(shape[3]), "scale": torch.ones(shape[3]), "sigma": torch.zeros(shape[0])}


@pytest.mark.parametrize("flip", [False, True])
def test_equals_the_formula_in_float64(flip: bool) -> None:
    inputs = latent_noising_inputs(SHAPE, torch.float64, CPU)
    alpha, sigma, shift, scale = (inputs[name].double() for name in ("alpha", "sigma", "shift", "scale"))
    draw = inputs["seed"], inputs["position"]
    posterior_noise, noise = (normal(*draw, SHAPE[3:], purpose).double() for purpose in (Purpose.POSTERIOR, Purpose.NOISE))
    for b in range(SHAPE[0]):
        view = int(flip and uniform(*draw, Purpose.FLIP)[b] < 0.5)
        mean, logvar = inputs["stored"][b, view]
        z = mean + (logvar / 2).exp() * posterior_noise[b]
        wanted = (z - shift[:, None, None]) * scale[:, None, None]
        x_t, x0 = (t[b] for t in latent_noising(**inputs, flip=flip))
        torch.testing.assert_close(x0, wanted)
        torch.testing.assert_close(x_t, alpha[b] * wanted + sigma[b] * noise[b])


@pytest.mark.usefixtures("kernels")
@both
def test_the_mirrored_view_is_taken_where_the_position_says_so(impl: str, device: torch.device) -> None:
    inputs = {name: t.to(device) for name, t in noiseless((24, 2, 2, 1, 1, 3), CPU).items()}
    x_t, x0 = latent_noising(**inputs, flip=True, impl=impl)
    mirrored = uniform(inputs["seed"], inputs["position"], Purpose.FLIP) < 0.5
    assert 4 < mirrored.sum() < 20
    chosen = inputs["stored"][torch.arange(24, device=device), mirrored.long(), 0]
    assert torch.equal(x0, chosen) and torch.equal(x_t, inputs["alpha"][:, None, None, None] * chosen)
    assert torch.equal(latent_noising(**inputs, flip=False, impl=impl)[1], inputs["stored"][:, 0, 0])


@pytest.mark.usefixtures("kernels")
@both
def test_x0_is_the_posteriors_own_sample_and_x_t_its_noising(impl: str, device: torch.device) -> None:
    inputs = latent_noising_inputs(SHAPE, torch.float16, device)
    draw = inputs["seed"], inputs["position"]
    x_t, x0 = latent_noising(**inputs, flip=True, dtype=torch.float32, impl=impl)
    sampled = Posterior(inputs["stored"], inputs["shift"], inputs["scale"], flip=True).sample(*draw)
    # The kernels' normals are within 2e-6 of the reference's, times a posterior's width; here both are below 4.
    torch.testing.assert_close(x0, sampled, rtol=2e-6, atol=1e-5 if impl == "triton" else 0)
    again = noising(x0, inputs["alpha"], inputs["sigma"], *draw, impl=impl)
    torch.testing.assert_close(x_t, again, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("kernels")
@both
def test_the_result_has_the_asked_type(impl: str, device: torch.device) -> None:
    inputs = latent_noising_inputs(SHAPE, torch.float16, device)
    exact, x0 = latent_noising(**inputs, dtype=torch.float32, impl=impl)
    rounded, same = latent_noising(**inputs, dtype=torch.bfloat16, impl=impl)
    assert torch.equal(rounded, exact.to(torch.bfloat16)) and torch.equal(x0, same) and x0.dtype == torch.float32
    assert latent_noising(**inputs, impl=impl)[0].dtype == torch.float16


@pytest.mark.usefixtures("kernels")
def test_each_sample_is_its_own(device: torch.device) -> None:
    inputs = latent_noising_inputs((4, 2, 2, 3, 7, 5), torch.float32, device)
    together = latent_noising(**inputs, flip=True, impl="triton")
    for b in range(4):
        one = {name: t if name in ("seed", "shift", "scale") else t[b : b + 1] for name, t in inputs.items()}
        for alone, among in zip(latent_noising(**one, flip=True, impl="triton"), together, strict=True):
            assert torch.equal(alone[0], among[b])


@pytest.mark.usefixtures("kernels")
@both
def test_latents_without_a_mirrored_view(impl: str, device: torch.device) -> None:
    inputs = latent_noising_inputs(SHAPE, torch.float16, device)
    whole = latent_noising(**inputs, impl=impl)
    inputs["stored"] = inputs["stored"][:, :1]
    for alone, among in zip(latent_noising(**inputs, impl=impl), whole, strict=True):
        assert torch.equal(alone, among)
    with pytest.raises(ValueError, match=r"flip needs a mirrored view, and stored holds one view: \[3, 1, 2, 3, 7, 5\]"):
        latent_noising(**inputs, flip=True, impl=impl)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("flip", [False, True])
def test_the_registered_operation_passes_torchs_own_checks(flip: bool, device: torch.device) -> None:
    inputs = latent_noising_inputs((2, 2, 2, 3, 1, 5), torch.float32, device)
    torch.library.opcheck(torch.ops.fasttrain.latent_noising.default, (*inputs.values(), flip, torch.bfloat16))


@pytest.mark.gpu
def test_a_captured_graph_follows_seed_and_position(device: torch.device) -> None:
    inputs = latent_noising_inputs((4, 2, 2, 4, 32, 32), torch.float16, device)
    latent_noising(**inputs, flip=True, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = latent_noising(**inputs, flip=True, impl="triton")
    inputs["seed"].add_(1)
    inputs["position"].add_(2**33)
    graph.replay()
    for replayed, eager in zip(captured, latent_noising(**inputs, flip=True, impl="triton"), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device: torch.device) -> None:
    shape = (2**13 + 2, 2, 2, 4, 128, 128)  # 2.1e9 of them stored, in 4.3 GB
    inputs = latent_noising_inputs((shape[0], 2, 2, 4, 1, 1), torch.float16, device)
    inputs["stored"] = torch.zeros(shape, dtype=torch.float16, device=device)
    last = inputs["stored"][-1:].normal_()
    few = {name: t if name in ("seed", "shift", "scale") else t[-1:] for name, t in inputs.items()}
    for among, alone in zip(latent_noising(**inputs, impl="triton"), latent_noising(**{**few, "stored": last}, impl="triton"), strict=True):
        assert torch.equal(among[-1:], alone)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stored", torch.ones(2, 2, 3, 4, 4), r"stored must be \[B, 1 or 2 views, 2, C, H, W\], got \[2, 2, 3, 4, 4\]"),
        ("stored", torch.ones(2, 3, 2, 3, 4, 4), r"got \[2, 3, 2, 3, 4, 4\]"),
        ("stored", torch.ones(2, 2, 1, 3, 4, 4), r"got \[2, 2, 1, 3, 4, 4\]"),
        ("stored", torch.ones(2, 2, 2, 3, 4, 4, dtype=torch.uint8), "stored must be of a floating-point type, got torch.uint8"),
        ("stored", torch.empty(2, 2, 2, 3, MAX_PLANE, 2, device="meta"), f"at most {MAX_PLANE} elements a channel"),
        ("shift", torch.ones(2), r"shift must be \[3\], one value a channel, got \[2\]"),
        ("scale", torch.ones(1, 3), r"scale must be \[3\], one value a channel, got \[1, 3\]"),
        ("alpha", torch.ones(3), r"alpha must be \[2\], one value a sample, got \[3\]"),
        ("position", torch.zeros(2), "position int64"),
        ("seed", torch.tensor(1, device="meta"), "seed is on meta, the other tensors on cpu"),
        ("scale", torch.ones(3, requires_grad=True), "nothing gets a gradient here: detach scale"),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: Tensor, message: str) -> None:
    inputs = latent_noising_inputs((2, 2, 2, 3, 4, 4), torch.float32, CPU)
    with pytest.raises(ValueError, match=message):
        latent_noising(**{**inputs, name: value})

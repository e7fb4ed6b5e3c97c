"""Lanczos on matrices whose spectrum is known: diagonal ones, and a network's whole Hessian, built column by column."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fasttrain.research.hessian import Hessian, random_signs
from fasttrain.research.lanczos import asymmetry, checked, density, lanczos, squared_trace, trace

CPU = torch.device("cpu")


def diagonal(values: Tensor, seed: int = 0):
    """H = Q diag(values) Q^T in a random basis, and its product."""
    turn, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=values.dtype))
    matrix = turn @ torch.diag(values) @ turn.T
    return lambda vector: matrix @ vector


def start(size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return random_signs(size, seed, dtype, CPU)


def test_as_many_steps_as_numbers_find_every_eigenvalue() -> None:
    values = torch.cat([torch.linspace(-3, 5, 29, dtype=torch.float64), torch.tensor([100.0], dtype=torch.float64)])
    found = lanczos(diagonal(values), start(30), 30)
    torch.testing.assert_close(found.nodes, values, rtol=0, atol=1e-10)
    assert float(found.weights.sum()) == pytest.approx(1) and float(found.bounds.max()) < 1e-9


def test_few_steps_find_the_ends_within_their_bounds() -> None:
    values = torch.cat([torch.linspace(0, 1, 298, dtype=torch.float64), torch.tensor([-4.0, 20.0], dtype=torch.float64)])
    product = diagonal(values)
    found = lanczos(product, start(300), 14)
    for node, bound in zip(found.nodes, found.bounds, strict=True):
        assert float((values - node).abs().min()) <= float(bound) + 1e-10
    (high,), (low,) = found.highest(1), found.lowest(1)
    assert (high.value, low.value) == (pytest.approx(20, abs=1e-8), pytest.approx(-4, abs=1e-8)) and max(high.bound, low.bound) < 1e-5
    for vector, ritz in zip(found.vectors, (low, high), strict=True):
        again = checked(product, vector)
        assert again.value == pytest.approx(ritz.value, abs=1e-9) and again.bound == pytest.approx(ritz.bound, abs=1e-10)


def test_full_reorthogonalisation_leaves_no_copies_of_the_largest() -> None:
    """After 60 steps in fp32 plain Lanczos has found 1000 several times over; the bulk lies far below."""
    values = torch.cat([torch.linspace(0, 1, 199), torch.tensor([1000.0])])
    found = lanczos(diagonal(values), start(200, dtype=torch.float32), 60)
    assert int((found.nodes > 2).sum()) == 1


def test_a_space_that_is_invariant_ends_the_steps() -> None:
    values = torch.cat([torch.zeros(90), torch.full((6,), 2.0), torch.full((4,), -1.0)]).double()
    found = lanczos(diagonal(values), start(100), 50)
    torch.testing.assert_close(found.nodes, torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64), rtol=0, atol=1e-10)


def test_traces_and_density_come_out_of_random_vectors() -> None:
    size = 400
    values = torch.cat([torch.linspace(-1, 1, 300), torch.full((100,), 4.0)]).double()
    product = diagonal(values)
    spectra = [lanczos(product, start(size, seed), 40) for seed in range(12)]
    total, squares = trace(spectra, size), squared_trace(spectra, size)
    assert abs(total.value - float(values.sum())) < 4 * total.error and total.error < 20
    assert abs(squares.value - float(values.square().sum())) < 4 * squares.error
    at = torch.linspace(-3, 6, 901, dtype=torch.float64)
    found = density(spectra, at, 0.2)
    true = (torch.exp(-0.5 * ((at[:, None] - values) / 0.2) ** 2) / (0.2 * math.sqrt(2 * math.pi))).mean(1)
    assert float(found.sum()) * 0.01 == pytest.approx(1, abs=1e-3)
    assert float((found - true).abs().max()) < 0.04  # of a peak of 0.5


def test_nothing_and_numbers_that_are_none() -> None:
    zero = lanczos(torch.zeros_like, start(5), 3)
    assert zero.nodes.tolist() == [0.0] and zero.second_moment == 0
    with pytest.raises(ValueError, match="not finite"):
        lanczos(lambda vector: vector * math.nan, start(5), 3)
    with pytest.raises(ValueError, match="at least one step"):
        lanczos(torch.clone, start(5), 0)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 3), nn.Linear(2, 2))  # the last is not used
        return model.double()


def losses_of(model: nn.Sequential):
    def losses() -> Iterator[Tensor]:
        for seed in range(3):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            yield (model[:4](x).tanh() - x[:, :3]).square().mean()

    return losses


def dense(model: nn.Sequential) -> Tensor:
    """The whole Hessian [P, P] by torch's own."""
    names, shapes = zip(*[(name, p.shape) for name, p in model.named_parameters()], strict=True)
    sizes = [shape.numel() for shape in shapes]

    def loss(flat: Tensor) -> Tensor:
        parts = dict(zip(names, [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)], strict=True))
        total = []
        for seed in range(3):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            hidden = torch.nn.functional.gelu(x @ parts["0.weight"].T + parts["0.bias"])
            hidden = torch.nn.functional.layer_norm(hidden, (12,), parts["2.weight"], parts["2.bias"])
            total.append(((hidden @ parts["3.weight"].T + parts["3.bias"]).tanh() - x[:, :3]).square().mean())
        return torch.stack(total).mean()

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return torch.autograd.functional.hessian(loss, flat)


def test_products_are_the_columns_of_the_whole_hessian_and_lanczos_finds_its_spectrum() -> None:
    model = network()
    whole = dense(model)
    product = Hessian(list(model.parameters()), losses_of(model))
    columns = torch.stack([product(column) for column in torch.eye(product.size, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(columns, whole, rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(whole)
    found = lanczos(product, start(product.size, 1), 40)
    assert found.highest(1)[0].value == pytest.approx(float(values[-1]), abs=1e-8)
    assert found.lowest(1)[0].value == pytest.approx(float(values[0]), abs=1e-6) and values[0] < 0
    for node, bound in zip(found.nodes, found.bounds, strict=True):
        assert float((values - node).abs().min()) <= float(bound) + 1e-10
    assert asymmetry(product, start(product.size, 1), start(product.size, 2)) < 1e-10


def test_the_trace_is_as_exact_as_its_error_says() -> None:
    """Random signs have the variance 2 sum of H_ij^2 off the diagonal [Avron and Toledo 2011, lemma 5]."""
    model = network()
    whole, product, vectors = dense(model), Hessian(list(model.parameters()), losses_of(model)), 100
    spectra = [lanczos(product, start(product.size, seed), 1) for seed in range(vectors)]
    for seed, spectrum in enumerate(spectra[:3]):
        unit = start(product.size, seed) / product.size**0.5
        assert spectrum.first_moment == pytest.approx(float(unit @ whole @ unit), abs=1e-12)
        assert spectrum.second_moment == pytest.approx(float((whole @ unit).square().sum()), abs=1e-12)
    found, off = trace(spectra, product.size), whole - torch.diag(whole.diagonal())
    assert found.error == pytest.approx(math.sqrt(2 * float(off.square().sum()) / vectors), rel=0.25)
    assert abs(found.value - float(whole.trace())) < 4 * found.error


def test_what_is_not_symmetric_is_told() -> None:
    matrix = torch.randn(20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert asymmetry(lambda vector: matrix @ vector, start(20, 1), start(20, 2)) > 1e-3


def test_a_linear_loss_has_a_hessian_of_zeros() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert Hessian([weight], lambda: iter([weight.sum()]))(torch.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_signs_are_those_of_a_seed() -> None:
    signs = start(10_000, 3)
    assert torch.equal(signs, start(10_000, 3)) and not torch.equal(signs, start(10_000, 4))
    assert set(signs.tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 0.04

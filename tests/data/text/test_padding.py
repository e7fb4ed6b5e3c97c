"""Padding against hand-computed values, its limits, and its statistics with bounds that follow from the normal distribution."""

import math

import pytest
import torch
from fasttrain_kernels.philox import Purpose, normal
from pydantic import ValidationError

from fasttrain.cond import Text
from fasttrain.data.text.padding import TextPadding, padded


def text_of(lengths: list[int], places: int, width: int = 8, seed: int = 0) -> Text:
    """Captions of these lengths, with a mean and spread of its own in every channel."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(len(lengths), places, width, generator=generator) * torch.logspace(-1, 1, width) + torch.arange(width)
    length = torch.tensor(lengths)
    tokens = own.to(torch.float16) * (torch.arange(places) < length[:, None])[..., None]
    return Text(tokens, length, torch.randn(len(lengths), 5, generator=generator).to(torch.float16))


def test_none_leaves_the_length_and_zero_attends_to_all():
    text = text_of([3, 6], 6)
    for how, length in (("none", [3, 6]), ("zero", [6, 6])):
        given = padded(text, 0, torch.arange(2), TextPadding(how=how))
        assert torch.equal(given.tokens, text.tokens.float()) and torch.equal(given.pooled, text.pooled.float())
        assert given.length.tolist() == length and given.tokens.dtype == given.pooled.dtype == torch.float32


def test_without_noise_place_i_holds_token_i_mod_m():
    text = text_of([3, 1, 7], 7)
    given = padded(text, 0, torch.arange(3), TextPadding(noise=0)).tokens
    for row, m in enumerate([3, 1, 7]):
        for place in range(7):
            assert torch.equal(given[row, place], text.tokens[row, place % m].float())


def test_the_formula_by_hand():
    """m = 2 of M = 4: r = 2, sqrt(r - 1) = 1; tokens 1 and 3 of a channel have the deviation 1, 5 and 5 have none."""
    tokens = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [0.0, 0.0], [0.0, 0.0]]])
    position = torch.tensor([11])
    given = padded(Text(tokens, torch.tensor([2]), torch.zeros(1, 1)), 7, position, TextPadding(noise=0.5)).tokens
    eps = normal(7, position, (4, 2), Purpose.TEXT_PADDING)[0]
    expected = torch.tensor([[1.0, 5.0], [3.0, 5.0], [1.0, 5.0], [3.0, 5.0]])
    expected[:, 0] += 0.5 * eps[:, 0]
    torch.testing.assert_close(given[0], expected, rtol=1e-6, atol=1e-6)


def test_a_caption_that_fills_all_places_gets_no_noise_at_all():
    text = text_of([6], 6)
    given = padded(text, 3, torch.tensor([9]), TextPadding(noise=10))
    assert torch.equal(given.tokens, text.tokens.float())


def test_a_caption_of_one_token_has_no_spread_and_so_no_noise():
    given = padded(text_of([1], 5), 3, torch.tensor([9]), TextPadding(noise=1)).tokens
    assert torch.equal(given, given[:, :1].expand_as(given))


def test_noise_is_a_function_of_seed_and_position_alone():
    text, position, how = text_of([2, 5, 3, 4], 9), torch.tensor([70, 3, 2**40, 8]), TextPadding()
    whole = padded(text, 5, position, how).tokens
    for row in range(4):
        alone = padded(text.map(lambda part, row=row: part[row : row + 1]), 5, position[row : row + 1], how).tokens
        assert torch.equal(alone[0], whole[row])
    assert not torch.equal(padded(text, 6, position, how).tokens, whole)
    assert not torch.equal(padded(text, 5, position + 1, how).tokens, whole)


@pytest.mark.parametrize("noise", [0.02, 0.5])
@pytest.mark.parametrize(("m", "places"), [(4, 32), (7, 32), (31, 32), (2, 77)])
def test_mean_and_variance_of_each_channel_over_many_positions(noise: float, m: int, places: int):
    """The copies' own mean and variance, plus noise of variance b^2 = noise^2 (r - 1) sigma^2.

    Of V = N M values a_i + b eps, a_i known: the mean errs by b / sqrt(V), the variance by sqrt((4 b^2 Var a + 2 b^4) / V). Five of these
    deviations: over 16 numbers a case, one test in 100,000 would fail by chance, if the seed were not fixed.
    """
    draws, width = 2000, 8
    text = text_of([m], places, width).map(lambda part: part.expand(draws, *part.shape[1:]))
    given = padded(text, 1, torch.arange(draws), TextPadding(noise=noise)).tokens.double()
    own = text.tokens[0, :m].double()
    copies = own[torch.arange(places) % m]
    b = noise * math.sqrt(places / m - 1) * own.std(0, correction=0)
    values = draws * places
    mean, variance = given.mean((0, 1)), given.var((0, 1), correction=0)
    spread = copies.var(0, correction=0)
    # fp32 holds each value to 2^-24 of its size, which is what is left where the noise is smaller than that.
    rounding = copies.abs().max(0).values * 2.0**-24
    assert ((mean - copies.mean(0)).abs() <= 5 * b / math.sqrt(values) + rounding).all()
    bound = 5 * torch.sqrt((4 * b**2 * spread + 2 * b**4) / values)
    assert ((variance - spread - b**2).abs() <= bound + 2 * rounding * copies.abs().max(0).values).all()


def test_the_variance_grows_by_one_plus_noise_squared_r_minus_one_over_many_prompts():
    """Where m divides M: summed over 512 captions, (noise's squares) / (captions' variances) is noise^2 (r - 1), in every channel.

    16 squares a caption of a normal of variance proportional to v: the sum's relative deviation is sqrt(2 / 16) sqrt(sum v^2) / sum v.
    """
    noise, places, width, prompts = 0.3, 16, 6, 512
    for m in (2, 4, 8):
        text = text_of([m] * prompts, places, width, seed=m)
        given = padded(text, 2, torch.arange(prompts), TextPadding(noise=noise)).tokens.double()
        own = text.tokens[:, :m].double()
        squares = (given - own.repeat(1, places // m, 1)).square().mean(1).sum(0)
        v = own.var(1, correction=0)
        bound = 5 * math.sqrt(2 / places) * v.square().sum(0).sqrt() / v.sum(0)
        assert ((squares / v.sum(0) / (noise**2 * (places / m - 1)) - 1).abs() < bound).all() and bound.max() < 0.2


@pytest.mark.parametrize("wrong", [{"how": "mirror"}, {"noise": -1}, {"noise": float("nan")}, {"beta": 0.1}])
def test_wrong_sections_are_refused(wrong: dict):
    with pytest.raises(ValidationError):
        TextPadding(**wrong)

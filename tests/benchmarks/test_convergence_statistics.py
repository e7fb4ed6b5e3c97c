"""Speed-ups of curves whose true speed-up is known; bounds, divergence, and the t-distribution against its tables."""

import math

import numpy as np
import pytest

from benchmarks.convergence_statistics import Curve, Point, Span, images_to, mean_of, speed_up, t_quantile, t_within, thresholds_of

IMAGES = [1000 * 2**k for k in range(8)]


def power_law(speed: float, scale: float = 100.0, noise: object = None, power: float = 0.7) -> Curve:
    """score = scale (speed images / 1000)^-power, and noise on each score's logarithm."""
    noise = np.zeros(len(IMAGES)) if noise is None else noise
    return Curve(tuple(Point(n, scale * (speed * n / 1000) ** -power * math.exp(e)) for n, e in zip(IMAGES, noise, strict=True)))


@pytest.mark.parametrize(
    ("probability", "degrees", "wanted"),
    # Tables of Student's t, as printed everywhere.
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 3, 3.1824),
        (0.975, 4, 2.7764),
        (0.975, 7, 2.3646),
        (0.975, 30, 2.0423),
        (0.95, 9, 1.8331),
    ],
)
def test_quantiles_of_t_are_the_tables(probability, degrees, wanted):
    assert t_quantile(probability, degrees) == pytest.approx(wanted, abs=6e-5)


def test_t_is_the_normal_distribution_for_many_degrees():
    assert t_within(1.959964, 20_000) == pytest.approx(0.95, abs=1e-4)
    with pytest.raises(ValueError, match="at least one degree"):
        t_quantile(0.975, 0)


def test_a_mean_has_its_interval_from_two_values_on():
    assert mean_of([3.0]) == (3.0, None)
    mean = mean_of([1.0, 2.0, 3.0])
    assert mean.value == 2.0 and mean.interval == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-4)


def test_a_power_law_is_met_exactly_between_its_points():
    curve = power_law(1.0)
    for images in (1500.0, 2000.0, 77_000.0):
        found = images_to(curve, 100 * (images / 1000) ** -0.7)
        assert found is not None and found.exact and found.low == pytest.approx(images)


def test_what_was_not_seen_is_a_bound():
    curve = power_law(1.0)
    assert images_to(curve, 200.0) == Span(0.0, 1000)
    assert images_to(curve, 0.1) == Span(IMAGES[-1], math.inf)
    assert images_to(Curve(curve.points, diverged=True), 0.1) is None
    assert images_to(Curve((Point(1000, math.nan), Point(2000, math.inf))), 1.0) == Span(0.0, math.inf)


def test_the_first_crossing_counts_and_not_a_later_one():
    curve = Curve((Point(10, 4.0), Point(20, 1.0), Point(40, 4.0), Point(80, 1.0)))
    assert images_to(curve, 2.0).low == pytest.approx(10 * math.sqrt(2))


def test_a_known_speed_up_is_found_whatever_the_seeds_have_in_common():
    # A seed that is twice as good in both arms cancels in the pair: the interval is a point.
    scales = (100.0, 50.0, 80.0)
    found = speed_up([power_law(2.5, scale) for scale in scales], [power_law(1.0, scale) for scale in scales], 20.0)
    assert found.value == pytest.approx(2.5) and found.interval == pytest.approx((2.5, 2.5)) and found.reached == found.pairs == 3


def test_one_pair_has_no_interval():
    found = speed_up([power_law(3.0)], [power_law(1.0)], 20.0)
    assert found.value == pytest.approx(3.0) and found.interval is None


@pytest.mark.parametrize(
    ("arm", "over", "threshold", "at_least", "at_most"),
    [
        (power_law(20.0), power_law(1.0), 50.0, 2.69, None),  # the arm was there at its first point: 1000 images at most
        (power_law(0.01), power_law(1.0), 50.0, None, 2.69 / 128),  # the arm never got there: more than 128,000
        (power_law(1.0), power_law(0.01), 50.0, 128 / 2.69, None),  # the baseline never got there
        (power_law(0.01), power_law(0.01), 50.0, None, None),  # neither
    ],
)
def test_speed_ups_of_unseen_crossings_are_bounds(arm, over, threshold, at_least, at_most):
    found = speed_up([arm], [over], threshold)
    assert found.value is None and found.interval is None
    for bound, wanted in ((found.at_least, at_least), (found.at_most, at_most)):
        assert bound == (wanted if wanted is None else pytest.approx(wanted, rel=0.01))


def pairs(exact: float, bound: float, others: int) -> tuple[list[Curve], list[Curve]]:
    """Arm and baseline: so many pairs of this exact speed-up, and one that is at least `bound`."""
    late = Curve((Point(1000, 100.0), Point(1000 * bound / 2, 60.0)))
    early = Curve((Point(250, 200.0), Point(500, 100.0), Point(2000, 25.0)))
    return [*[power_law(exact)] * others, early], [*[power_law(1.0)] * others, late]


def test_bounds_of_some_pairs_give_the_safe_end_of_the_interval_alone():
    # Three pairs are exactly 2, one is at least 8 / 2.
    arm, over = pairs(2.0, 8.0, others=3)
    found = speed_up(arm, over, 50.0)
    assert found.value is None and found.interval is None and found.at_most is None and (found.bounds, found.pairs) == (1, 4)
    logs = np.log([2.0, 2.0, 2.0, 4.0])
    assert found.at_least == pytest.approx(math.exp(logs.mean() - 3.18245 * logs.std(ddof=1) / 2), rel=1e-5)
    # The other way round the same pairs are at most the quotient's inverse.
    back = speed_up(over, arm, 50.0)
    assert back.at_least is None and back.at_most == pytest.approx(1 / found.at_least) and back.bounds == 1


def test_bounds_of_two_very_different_pairs_prove_little_and_stay_numbers():
    arm, over = pairs(2.0, 8.0, others=1)
    assert speed_up(arm, over, 50.0).at_least < 1  # their mean is 2.8
    far = [Curve((Point(1, 100.0), Point(1e300, 60.0))), Curve((Point(1, 100.0), Point(2, 1.0)))]
    near = [Curve((Point(1, 100.0), Point(2, 1.0))), Curve((Point(1, 100.0), Point(1e300, 1.0)))]
    found = speed_up(near, far, 50.0)
    assert found.at_least == 0 and found.at_most is None and math.isfinite(speed_up(far, near, 50.0).at_most)


def test_divergence_is_counted_and_no_bound():
    gone = Curve((Point(1000, 100.0), Point(2000, math.inf)), diverged=True)
    over = [power_law(1.0)] * 2
    some = speed_up([gone, power_law(2.0)], over, 50.0)
    assert some.diverged == 1 and some.pairs == 1 and some.value == pytest.approx(2.0) and some.reached == 1
    every = speed_up([gone, gone], over, 50.0)
    assert every.diverged == 2 and every.pairs == 0 and (every.value, every.at_least, every.at_most) == (None, None, None)
    # What it had reached before it diverged, it had reached.
    assert speed_up([gone], [power_law(1.0)], 100.0).diverged == 0


def test_thresholds_come_from_the_baseline_and_each_of_its_runs_reaches_them():
    runs = [power_law(1.0, scale) for scale in (100.0, 90.0, 120.0)]
    found = thresholds_of(runs, IMAGES[-1], (0.25, 0.5, 1.0))
    assert found == pytest.approx([120 * (f * 128) ** -0.7 for f in (0.25, 0.5, 1.0)])
    assert all(math.isfinite(images_to(run, threshold).high) for run in runs for threshold in found)
    assert thresholds_of([Curve(runs[0].points, diverged=True)], IMAGES[-1], (1.0,)) == []
    assert thresholds_of(runs, 10.0, (1.0,)) == []


def test_the_interval_covers_the_true_speed_up_as_often_as_it_says():
    """1,500 experiments of five pairs, each run with a speed of its own: 95 % must cover, within three deviations (1.7 %)."""
    rng, covered, repeats = np.random.default_rng(5), 0, 1500
    for _ in range(repeats):
        common = rng.normal(0, 0.15, 5)
        over = [power_law(math.exp(rng.normal(0, 0.2)), 100 * math.exp(c)) for c in common]
        arm = [power_law(2 * math.exp(rng.normal(0, 0.2)), 100 * math.exp(c)) for c in common]
        low, high = speed_up(arm, over, 25.0).interval
        covered += low <= 2.0 <= high
    assert covered / repeats == pytest.approx(0.95, abs=0.017)


def test_noise_in_the_scores_does_not_bend_the_speed_up():
    """Noise on each score makes first crossings early, in both arms alike: over many seeds the quotient stays right."""
    rng = np.random.default_rng(6)
    arm, over = ([power_law(speed, noise=rng.normal(0, 0.05, len(IMAGES))) for _ in range(300)] for speed in (2.0, 1.0))
    found = speed_up(arm, over, 20.0)
    assert found.interval[0] < 2.0 < found.interval[1] and found.interval[1] / found.interval[0] < 1.06

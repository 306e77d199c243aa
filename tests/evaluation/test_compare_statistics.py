import math
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from realign_lightning.evaluation.comparison.statistics import count_groups, mcnemar, paired_bootstrap


def mean(sums: Tensor) -> dict[str, Tensor]:
    return {"mean": sums[:, 0] / sums[:, 1]}


def f1(sums: Tensor) -> dict[str, Tensor]:
    hits, false, missed = sums.double().unbind(1)
    return {"f1": 2 * hits / (2 * hits + false + missed)}


def counted(values: Sequence[float]) -> Tensor:
    """Rows of a value and a one: their sums give the mean."""
    values = torch.as_tensor(values)
    return torch.stack([values, torch.ones_like(values)], dim=1)


def interval(first: Sequence[float], second: Sequence[float], **settings):
    return paired_bootstrap(counted(first), counted(second), mean, **settings)["mean"]


def width(found) -> float:
    return found.high - found.low


def answers(generator: np.random.Generator, size: int, shares: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Right (1) and wrong (0) answers of two models, from the shares of both, only first, only second, neither."""
    drawn = generator.choice(4, size, p=shares)
    return np.isin(drawn, [0, 1]).astype(int), np.isin(drawn, [0, 2]).astype(int)


def test_the_interval_of_a_mean_is_that_of_students_t():
    """The ends' Monte Carlo error is sqrt(0.025 * 0.975 / 10,000) / 0.0584 = 0.027 standard errors; four of them."""
    generator = np.random.default_rng(1)
    first, second = generator.exponential(2.0, 3000), generator.exponential(2.1, 3000)
    low, high, undefined = interval(first, second)
    error = scipy.stats.sem(second - first)
    expected = scipy.stats.t.interval(0.95, 2999, loc=(second - first).mean(), scale=error)
    assert undefined == 0
    assert (low, high) == pytest.approx(expected, abs=0.11 * error)


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.99])
def test_confidence_is_the_intervals(confidence):
    generator = np.random.default_rng(2)
    first, second = generator.normal(size=4000), generator.normal(size=4000)
    error = scipy.stats.sem(second - first)
    expected = 2 * scipy.stats.norm.ppf((1 + confidence) / 2) * error
    assert width(interval(first, second, confidence=confidence)) == pytest.approx(expected, rel=0.05)


def test_drawing_equal_questions_together_is_drawing_one_by_one():
    """Against a loop over indices, on a score that is no mean; both ends within Monte Carlo error."""
    generator = np.random.default_rng(3)
    first, second = (np.eye(3, dtype=int)[generator.choice(3, 300, p=p)] for p in ([0.6, 0.3, 0.1], [0.7, 0.1, 0.2]))
    drawn = []
    for _ in range(4000):
        places = generator.integers(0, 300, 300)
        both = (f1(torch.as_tensor(counts[places].sum(0))[None])["f1"].item() for counts in (first, second))
        drawn.append(-np.subtract(*both))
    found = paired_bootstrap(torch.as_tensor(first), torch.as_tensor(second), f1)["f1"]
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.2 * np.std(drawn))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """200 samples of 150 questions; the true difference is 0.15 - 0.10 = 0.05.

    At 95 %, 180 or fewer of 200 have a chance below 0.3 %, and so have 199 or more.
    """
    generator = np.random.default_rng(4)
    held = 0
    for seed in range(200):
        first, second = answers(generator, 150, [0.6, 0.10, 0.15, 0.15])
        found = interval(first, second, resamples=1000, seed=seed)
        held += found.low <= 0.05 <= found.high
    assert 180 < held < 199


def test_questions_of_one_image_need_groups():
    """60 images, 6 questions each, answered alike: as groups the interval is honest, as single questions it is not."""
    generator = np.random.default_rng(5)
    held = {True: 0, False: 0}
    for seed in range(200):
        first, second = (np.repeat(side, 6) for side in answers(generator, 60, [0.5, 0.15, 0.2, 0.15]))
        names = [str(number // 6) for number in range(360)]
        for grouped in held:
            found = interval(first, second, groups=names if grouped else (), resamples=1000, seed=seed)
            held[grouped] += found.low <= 0.05 <= found.high
    assert held[True] > 178
    assert held[False] < 140


def test_copies_within_a_group_change_nothing_and_copies_without_narrow():
    """Ten copies of each of 200 questions: as groups nothing is learned, alone the error shrinks by sqrt(10)."""
    first, second = answers(np.random.default_rng(6), 200, [0.5, 0.1, 0.2, 0.2])
    names = [str(number) for number in range(200)]
    once = interval(first, second)
    copies = np.repeat(first, 10), np.repeat(second, 10)
    grouped = interval(*copies, groups=np.repeat(names, 10).tolist())
    alone = interval(*copies)
    assert grouped == pytest.approx(once, abs=1e-12)
    assert width(alone) == pytest.approx(width(once) / math.sqrt(10), rel=0.1)


def test_a_group_without_a_name_is_the_question_alone():
    first, second = answers(np.random.default_rng(7), 90, [0.4, 0.2, 0.2, 0.2])
    assert interval(first, second, groups=[""] * 90) == interval(first, second)
    assert interval(first, second, groups=[str(n) for n in range(90)]) == interval(first, second)
    assert count_groups(["a", "", "a", "b", ""]) == 4


def test_equal_answers_differ_by_nothing():
    first, _ = answers(np.random.default_rng(8), 500, [0.4, 0.2, 0.2, 0.2])
    assert interval(first, first) == (0.0, 0.0, 0)


def test_the_same_seed_gives_the_same_interval_in_any_order():
    generator = np.random.default_rng(9)
    first, second = answers(generator, 400, [0.4, 0.2, 0.2, 0.2])
    names = np.array([f"image {number}" for number in generator.integers(0, 120, 400)])
    found = interval(first, second, groups=names.tolist(), seed=3)
    order = generator.permutation(400)
    shuffled = interval(first[order], second[order], groups=names[order].tolist(), seed=3)
    assert shuffled == found
    assert interval(first, second, groups=names.tolist(), seed=4) != found


def test_swapping_the_models_turns_the_interval_round():
    """Not the same draws, so only within Monte Carlo error."""
    first, second = answers(np.random.default_rng(10), 1000, [0.4, 0.1, 0.3, 0.2])
    there, back = interval(first, second), interval(second, first)
    assert (-back.high, -back.low) == pytest.approx((there.low, there.high), abs=0.05 * width(there))


def test_resamples_without_a_score_are_counted():
    """One of three questions counts: (2 / 3)^3 = 8 / 27 of resamples draw it not at all; the others give 0 or more."""
    first = torch.tensor([[1, 1], [0, 0], [0, 0]])
    found = paired_bootstrap(first, first, mean)["mean"]
    assert found.undefined == pytest.approx(10_000 * 8 / 27, abs=4 * math.sqrt(10_000 * 8 / 27 * 19 / 27))
    assert found[:2] == (0.0, 0.0)
    never = paired_bootstrap(torch.zeros(3, 2), torch.zeros(3, 2), mean, resamples=10)["mean"]
    assert math.isnan(never.low)
    assert never.undefined == 10


def test_counts_stay_whole_numbers():
    seen = set()

    def compute(sums: Tensor) -> dict[str, Tensor]:
        seen.add(sums.dtype)
        return {"sum": sums[:, 0].double()}

    paired_bootstrap(torch.tensor([[1], [2]]), torch.tensor([[3], [4]]), compute, resamples=5)
    assert seen == {torch.int64}


def test_memory_does_not_grow_with_resamples_times_questions():
    """9,000 questions that all differ, 1,000 times, would be 72 MB of weights at once."""
    values = np.random.default_rng(11).normal(size=(2, 9000))
    tracemalloc.start()
    interval(*values, resamples=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize(
    ("first", "settings", "message"),
    [
        (torch.ones(2, 3), {}, r"equal shapes \(N, K\), got \(2, 3\) and \(2, 2\)"),
        (torch.ones(2, 2), {"groups": ["a"]}, "a group for each of 2 questions, got 1"),
        (torch.ones(2, 2), {"resamples": 0}, "resamples must be at least 1, got 0"),
        (torch.ones(2, 2), {"confidence": 95}, "confidence must lie between 0 and 1, got 95"),
    ],
)
def test_what_cannot_be_resampled_is_refused(first, settings, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(first, torch.ones(2, 2), mean, **settings)


def test_no_question_is_refused():
    with pytest.raises(ValueError, match="no question"):
        paired_bootstrap(torch.ones(0, 2), torch.ones(0, 2), mean)


def verdicts(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    first = [True] * both + [True] * only_first + [False] * only_second + [False] * neither
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return first, second


@pytest.mark.parametrize("one", range(25))
def test_exact_mcnemar_is_the_binomial_test(one):
    for other in range(25 - one):
        found = mcnemar(*verdicts(3, one, other, 2))
        expected = scipy.stats.binomtest(one, one + other).pvalue if one + other else 1.0
        assert found.method == "exact"
        assert found[:4] == (3, one, other, 2)
        assert found.p_value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("one", "other"), [(25, 0), (12, 13), (20, 20), (40, 60), (300, 120), (0, 1000)])
def test_mcnemar_of_many_is_chi_squared_with_edwards_correction(one, other):
    found = mcnemar(*verdicts(10, one, other, 5))
    # As R's mcnemar.test, a tie needs no correction.
    statistic = (abs(one - other) - 1) ** 2 / (one + other) if one != other else 0.0
    assert found.method == "chi-squared"
    assert found.p_value == pytest.approx(scipy.stats.chi2.sf(statistic, 1), rel=1e-9)


def test_mcnemar_needs_as_many_verdicts():
    with pytest.raises(ValueError, match="got 1 and 2"):
        mcnemar([True], [True, False])

"""Metrics of guards against scikit-learn, closed forms, permutation and definitions; what they say of pairs that are alike."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from latentguard.metrics import at_fpr, auprc, auroc, best_f1, f1, mcnemar, paired_auroc, tpr_at_fpr


def drawn(seed, n, shift=0.0, digits=1):
    """Rounded, so that there are ties."""
    return np.round(np.random.default_rng(seed).normal(shift, 1, n), digits)


def sides(seed, m=40, n=60, shift=0.8, digits=1):
    high, low = drawn(seed, m, shift, digits), drawn(seed + 100, n, 0.0, digits)
    return high, low, np.array([True] * m + [False] * n), np.concatenate([high, low])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("digits", [0, 1, 9])
def test_average_precision_is_scikit_learns_ties_included(seed, digits):
    high, low, y, scores = sides(seed, digits=digits)
    found = auprc(high, low)
    assert found.value == pytest.approx(average_precision_score(y, scores))
    assert found.low < found.value < found.high and found.n == 100
    assert auprc(np.exp(high), np.exp(low)).value == pytest.approx(found.value), "only the order counts"


def test_the_interval_of_average_precision_is_that_of_resampled_sides():
    high, low, *_ = sides(3)
    generator = np.random.default_rng(7)
    drawn = [average_precision_score([1] * 40 + [0] * 60, [*generator.choice(high, 40), *generator.choice(low, 60)]) for _ in range(2000)]
    found = auprc(high, low)
    assert [found.low, found.high] == pytest.approx(list(np.percentile(drawn, [2.5, 97.5])), abs=0.02)


def test_average_precision_at_its_ends():
    assert auprc([3, 4], [1, 2]).value == 1 and auprc([3, 4], [1, 2]).low < 0.9, "two prompts a side prove little"
    assert auprc([1, 1], [1, 1, 1, 1, 1, 1]).value == pytest.approx(0.25), "one threshold catches all: the share of positives"
    assert math.isnan(auprc([], [1]).value) and math.isnan(auprc([1], []).value)


@pytest.mark.parametrize("seed", range(5))
def test_f1_is_scikit_learns(seed):
    high, low, y, scores = sides(seed)
    for threshold in (-1, 0.05, 1.5):
        found = f1(high > threshold, low > threshold)
        assert found.value == pytest.approx(f1_score(y, scores > threshold))
        assert found.low < found.value < found.high
    wide, narrow = f1(high > 0.05, low > 0.05), f1(np.tile(high, 20) > 0.05, np.tile(low, 20) > 0.05)
    assert narrow.value == pytest.approx(wide.value) and narrow.high - narrow.low < (wide.high - wide.low) / 3


def test_f1_at_its_ends_is_not_certain():
    assert f1([True] * 5, [False] * 5).value == 1 and f1([True] * 5, [False] * 5).low < 0.8
    assert f1([False] * 5, [False] * 5).value == 0 and f1([False] * 5, [False] * 5).high > 0.3
    assert math.isnan(f1([], [True]).value) and math.isnan(f1([True], []).value)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("digits", [0, 1, 9])
def test_the_threshold_of_best_f1_is_beaten_by_none(seed, digits):
    high, low, y, scores = sides(seed, digits=digits)
    at = best_f1(high, low)
    others = [f1_score(y, scores > t) for t in (*(np.unique(scores) - 1e-6), scores.max())]
    assert f1_score(y, scores > at) == pytest.approx(max(others))
    assert at not in scores, "no score lies on it, so above and at are the same"


def test_the_threshold_of_best_f1_where_all_scores_are_one():
    at = best_f1([1.0, 1.0], [1.0])
    assert at < 1 and math.isfinite(at)
    with pytest.raises(ValueError, match="both sides"):
        best_f1([], [1.0])


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.3])
def test_the_threshold_for_a_false_positive_rate_keeps_it_and_is_the_lowest(fpr):
    high, low, *_ = sides(2, n=200)
    at = at_fpr(low, fpr)
    assert (low > at).mean() <= fpr < (low >= at).mean() + 1e-9
    assert (high > at).mean() == tpr_at_fpr(high, low, fpr).value


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("digits", [0, 9])
def test_the_paired_difference_is_that_of_two_areas(seed, digits):
    *_, y, a = sides(seed, digits=digits)
    b = np.round(0.6 * a + drawn(seed + 9, 100, digits=9), digits)
    found, back = paired_auroc(a, b, y), paired_auroc(b, a, y)
    assert found.value == pytest.approx(roc_auc_score(y, a) - roc_auc_score(y, b)) and found.n == 100
    assert (back.value, back.low, back.high, back.p) == pytest.approx((-found.value, -found.high, -found.low, found.p))
    assert found.low < found.value < found.high and 0 < found.p <= 1


def delong(a, b, y):
    """The definition, pair by pair: covariances of the two kernels' means over either side."""
    kernel = [(x[y][:, None] > x[~y]) + 0.5 * (x[y][:, None] == x[~y]) for x in (a, b)]
    s10, s01 = np.cov([k.mean(1) for k in kernel]), np.cov([k.mean(0) for k in kernel])
    s = s10 / y.sum() + s01 / (~y).sum()
    z = (kernel[0].mean() - kernel[1].mean()) / math.sqrt(s[0, 0] + s[1, 1] - 2 * s[0, 1])
    return math.erfc(abs(z) / math.sqrt(2))


@pytest.mark.parametrize("seed", range(4))
def test_delongs_p_is_its_definition_and_near_that_of_permutation(seed):
    *_, y, a = sides(seed, m=80, n=80, digits=9)
    b = 0.5 * a + drawn(seed + 9, 160, digits=9)
    found = paired_auroc(a, b, y)
    assert found.p == pytest.approx(delong(a, b, y))
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]  # exchangeable only as ranks: the two have no common unit
    swap = np.random.default_rng(seed).random((2000, 160)) < 0.5
    one, other = np.where(swap, ranks[1], ranks[0]), np.where(swap, ranks[0], ranks[1])
    gaps = [abs(float(area(x[y], x[~y]) - area(z[y], z[~y]))) for x, z in zip(one, other, strict=True)]
    assert found.p == pytest.approx(np.mean(np.array(gaps) >= abs(found.value) - 1e-12), abs=0.05)


def area(high, low):
    """AUROC by counting."""
    return np.mean((high[:, None] > low) + 0.5 * (high[:, None] == low))


def test_pairs_make_the_interval_narrow():
    *_, y, a = sides(1, 200, 200, digits=9)
    b = a + 0.1 * drawn(5, 400, digits=9)
    paired = paired_auroc(a, b, y)
    alone = auroc(a[y], a[~y])
    assert paired.high - paired.low < (alone.high - alone.low) / 3


def test_p_is_even_where_there_is_nothing():
    found = [paired_auroc(*(drawn(s + k, 120, digits=9) for k in (0, 5000)), np.arange(120) < 50) for s in range(300)]
    assert np.mean([one.p < 0.05 for one in found]) == pytest.approx(0.05, abs=0.035)
    assert np.mean([one.low <= 0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.035)


def test_an_equal_pair_differs_by_nothing():
    *_, y, a = sides(4)
    for b in (a, 3 * a - 1, np.exp(a)):
        found = paired_auroc(a, b, y)
        assert (found.value, found.p) == (0, 1) and found.low < 0 < found.high
    both = paired_auroc([3, 4, 1, 2], [9, 8, 1, 2], [True, True, False, False])
    assert (both.value, both.p) == (0, 1) and both.low < -0.5 < 0.5 < both.high, "two perfect rankings of four prompts prove nothing"
    same = mcnemar([True, False, True], [True, False, True])
    assert (same.value, same.p) == (0, 1) and same.low < 0 < same.high


def test_where_delong_has_no_variance_it_says_nothing():
    found = paired_auroc([3, 4, 1, 2], [1, 2, 3, 4], [True, True, False, False])
    assert found.value == 1 and math.isnan(found.p) and found.high == 1
    assert math.isnan(paired_auroc([1, 2], [2, 1], [True, True]).value)


@pytest.mark.parametrize(("alone", "other", "both"), [(0, 0, 5), (1, 0, 9), (10, 2, 30), (7, 7, 0), (3, 40, 100), (900, 1000, 10)])
def test_mcnemar_is_an_exact_binomial_test(alone, other, both):
    first = np.array([True] * alone + [False] * other + [True] * both)
    second = np.array([False] * alone + [True] * other + [True] * both)
    found, back = mcnemar(first, second), mcnemar(second, first)
    total = alone + other
    assert found.p == pytest.approx(binomtest(alone, total, 0.5).pvalue if total else 1.0) and back.p == found.p
    assert found.value == pytest.approx((alone - other) / len(first)) and found.low <= found.value <= found.high
    order = np.random.default_rng(0).permutation(len(first))
    assert mcnemar(first[order], second[order]).p == found.p


def test_mcnemar_of_no_prompts():
    assert math.isnan(mcnemar([], []).value) and math.isnan(mcnemar([], []).p)

"""Rates, means, areas and correlations against known values and definitions; gates."""

import math

import numpy as np
import pytest

from latentguard.metrics import (
    auroc,
    base_rate_gate,
    clustered_auroc,
    clustered_rate,
    log_odds,
    mean,
    paired_difference,
    pearson,
    rate,
    split_half,
    tpr_at_fpr,
    wilson,
)


@pytest.mark.parametrize(("k", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (11, 12, 0.6461, 0.9851), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)])
def test_wilson_equals_published_values(k, n, low, high):
    found = wilson(k, n)
    assert found.low == pytest.approx(low, abs=5e-4)
    assert found.high == pytest.approx(high, abs=5e-4)


def test_wilson_holds_the_rate_and_narrows_with_n():
    for k, n in ((0, 1), (1, 1), (3, 7), (499, 1000)):
        assert wilson(k, n).low <= k / n <= wilson(k, n).high
    assert wilson(50, 100).high - wilson(50, 100).low < wilson(5, 10).high - wilson(5, 10).low
    assert math.isnan(rate([]).rate)


def test_gate_needs_both_share_and_count():
    assert base_rate_gate(30, 200) == ""
    assert base_rate_gate(29, 100) == base_rate_gate(30, 201) == base_rate_gate(0, 0) == "insufficient_base_rate"


def test_log_odds_are_bounded_and_odd():
    assert log_odds(0.5) == 0
    assert log_odds(0.2) == pytest.approx(-log_odds(0.8))
    assert math.isfinite(log_odds(0.0)) and math.isfinite(log_odds(1.0))


def scores(seed, n, shift=0.0):
    """Rounded, so that there are ties."""
    return np.round(np.random.default_rng(seed).normal(shift, 1, n), 1)


@pytest.mark.parametrize("seed", range(4))
def test_auroc_is_the_share_of_pairs_in_order(seed):
    high, low = scores(seed, 23, 0.5), scores(seed + 50, 31)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in high for b in low]
    found = auroc(high, low)
    assert found.value == pytest.approx(sum(pairs) / len(pairs), abs=1e-6) and 0.5 in pairs
    assert found.low < found.value < found.high and found.n == 54
    assert auroc(low, high).value == pytest.approx(1 - found.value)
    assert auroc(np.exp(high), np.exp(low)).value == found.value, "only the order counts"


def test_auroc_at_its_ends():
    assert (auroc([3, 4], [1, 2]).value, auroc([1, 2], [3, 4]).value, auroc([1, 1], [1]).value) == (1.0, 0.0, 0.5)
    assert auroc([3, 4], [1, 2]).low < 0.5 and auroc([1, 1], [1, 1]).high > 0.5, "two prompts a side prove little, whatever resampling says"
    assert math.isnan(auroc([], [1]).value) and math.isnan(auroc([1], []).value)


def test_the_auroc_interval_holds_chance_for_noise_and_narrows_with_n():
    few, many = auroc(scores(1, 20), scores(2, 20)), auroc(scores(1, 400), scores(2, 400))
    assert few.low < 0.5 < few.high and many.low < 0.5 < many.high
    assert many.high - many.low < (few.high - few.low) / 3
    one, two = auroc(scores(3, 500, 1), scores(4, 5)), auroc(scores(3, 500, 1), scores(4, 500))
    assert one.high - one.low > 3 * (two.high - two.low), "five negatives make it wide, however many positives there are"


@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("n", [1, 19, 20, 100])
def test_tpr_lets_through_no_more_negatives_than_said(fpr, n):
    high, low = scores(5, 60, 1.0), scores(6, n)
    found = tpr_at_fpr(high, low, fpr)
    allowed = [t for t in (*low, low.max() + 1) if (low > t).mean() <= fpr]
    assert found.value == pytest.approx(max((high > t).mean() for t in allowed))
    assert found.n == 60 and found.low <= found.value <= found.high


def test_tpr_counts_a_tie_with_the_threshold_as_not_caught():
    assert tpr_at_fpr([1, 1, 1], [1, 0], 0.0).value == 0
    assert tpr_at_fpr([1, 1, 1], [0, 0], 0.0).value == 1
    assert [tpr_at_fpr(scores(5, 60, 1), scores(6, 100), f).value for f in (0.01, 0.05, 0.2)] == sorted(
        tpr_at_fpr(scores(5, 60, 1), scores(6, 100), f).value for f in (0.01, 0.05, 0.2)
    )
    assert math.isnan(tpr_at_fpr([1], [], 0.05).value)


def test_pearson_against_the_definition():
    x, noise = np.random.default_rng(0).normal(size=40), np.random.default_rng(1).normal(size=40)
    found = pearson(x, x + noise)
    assert found.value == pytest.approx(np.corrcoef(x, x + noise)[0, 1])
    assert pearson(3 * x + 7, -2 * (x + noise)).value == pytest.approx(-found.value)
    assert pearson(x, 5 * x - 1).value == pytest.approx(1) and pearson(x, -x).value == pytest.approx(-1)
    assert -1 <= pearson(x, noise).low < 0 < pearson(x, noise).high <= 1
    # Fisher's interval for r = .5, n = 103, half width 1.96 / 10 on the z scale
    z = math.atanh(0.5)
    assert (fisher(0.5, 103).low, fisher(0.5, 103).high) == pytest.approx((math.tanh(z - 0.196), math.tanh(z + 0.196)), abs=1e-3)


def fisher(r, n):
    """Pearson of n points made to correlate by exactly r."""
    x = np.random.default_rng(2).normal(size=n)
    e = np.random.default_rng(3).normal(size=n)
    x = (x - x.mean()) / x.std()
    e = e - e.mean() - x * (x @ e) / (x @ x)
    return pearson(x, r * x + math.sqrt(1 - r * r) * e / e.std())


def test_pearson_says_nothing_without_spread_or_points():
    for x, y in (([1, 1, 1, 1, 1], range(5)), (range(5), [2] * 5), ([0.1] * 9, range(9)), (range(3), range(3)), ([], [])):
        assert math.isnan(pearson(list(x), list(y)).value)


def test_mean_and_its_interval():
    values = np.random.default_rng(4).normal(3, 2, 400)
    found = mean(values)
    assert found.value == pytest.approx(values.mean()) and found.n == 400
    assert (found.low, found.high) == pytest.approx((values.mean() - 0.196, values.mean() + 0.196), abs=0.03)
    assert mean(values) == found, "seeded"
    assert mean([2.5]).as_dict() == {"value": 2.5, "low": 2.5, "high": 2.5, "n": 1}
    assert math.isnan(mean([]).value) and mean([]).n == 0
    for n in (1, 7, 8, 40):
        same = mean([0.1] * n)
        assert same.low <= same.value <= same.high, "figures cannot draw an interval that lies beside its value"


def test_answers_to_one_prompt_are_not_independent():
    hits = [[k % 2 == 0] * 10 for k in range(40)]  # ten draws that always agree: 40 facts, not 400
    clustered, naive = clustered_rate(hits), rate([hit for row in hits for hit in row])
    assert clustered.value == naive.rate == 0.5 and clustered.n == 40
    assert clustered.high - clustered.low > 2.5 * (naive.high - naive.low)
    assert clustered_rate([[True, False, False], [True]]).value == 0.5, "answers are counted, prompts are resampled"
    assert math.isnan(clustered_rate([]).value)


def test_paired_difference_uses_the_pairs():
    first, second = [True] * 30 + [False] * 10, [True] * 20 + [False] * 20
    found = paired_difference(first, second)
    assert found.value == pytest.approx(0.25) and found.n == 40 and found.low > 0
    same = paired_difference(first, first)
    assert (same.value, same.n) == (0.0, 40) and same.low == -same.high and 0 < same.high < 0.1, "forty that agree leave some doubt"
    assert paired_difference(second, first).value == -found.value
    apart = paired_difference(first, [not x for x in second])
    assert apart.high - apart.low > found.high - found.low, "the same rates unpaired lie in a wider interval"


def test_split_half_is_one_for_what_is_alike_and_nought_for_noise():
    def cosine(a, b):
        x, y = a.mean(0), b.mean(0)
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    noise = np.random.default_rng(5).normal(size=(60, 400))
    assert split_half(np.ones((60, 5)), cosine) == pytest.approx(1)
    assert abs(split_half(noise, cosine)) < 0.1
    assert split_half(noise + 1, cosine) > split_half(noise + 0.2, cosine) > split_half(noise, cosine)
    assert split_half(noise + 0.2, cosine) < split_half(np.tile(noise + 0.2, (8, 1)), cosine), "more rows, less noise"
    seen = []
    split_half(np.arange(11)[:, None], lambda a, b: seen.append({*a.ravel()} & {*b.ravel()}) or float(len(a) + len(b)))
    assert len(seen) == 20 and not any(seen), "the halves share no row"


def test_r_of_points_that_belong_to_prompts_resamples_the_prompts():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 40))
    once, thrice = pearson(x, y, of=list(map(str, range(40)))), pearson(np.repeat(x, 3), np.repeat(y, 3), of=[str(k // 3) for k in range(120)])
    assert once.value == pytest.approx(thrice.value) and (once.low, once.high) == pytest.approx((thrice.low, thrice.high)), "a point told thrice is one"
    drawn = generator.integers(0, 40, (2000, 40))
    low, high = np.percentile([np.corrcoef(x[at], y[at])[0, 1] for at in drawn], [2.5, 97.5])
    assert once.n == thrice.n == 40 and (once.low, once.high) == pytest.approx((low, high), abs=0.05)
    assert pearson(np.repeat(x, 3), np.repeat(y, 3)).high < thrice.high


def test_clusters_are_resampled_as_wholes():
    generator = np.random.default_rng(1)
    high, low = generator.normal(0.5, 1, 12), generator.normal(0, 1, 15)
    alone = clustered_auroc(high, low, [f"h{k}" for k in range(12)], [f"l{k}" for k in range(15)])
    often = clustered_auroc(np.repeat(high, 4), np.repeat(low, 4), [f"h{k // 4}" for k in range(48)], [f"l{k // 4}" for k in range(60)])
    assert alone.value == pytest.approx(often.value) and (alone.low, alone.high) == pytest.approx((often.low, often.high)), "a score told four times is one"
    assert auroc(np.repeat(high, 4), np.repeat(low, 4)).low > often.low
    one = clustered_auroc(high, low, [0] * 12, [0] * 15)
    assert (one.low, one.high) == (auroc(high, low).low, auroc(high, low).high), "one cluster says nothing of others"

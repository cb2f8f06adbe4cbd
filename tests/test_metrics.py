"""Rates and gates against known values."""

import math

import pytest

from latentguard.metrics import base_rate_gate, log_odds, rate, wilson


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

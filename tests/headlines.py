"""What every headline must be: the number of the claim, as the claim prints it."""

import math


def tells_its_headline(summary):
    told, claim = summary["headline"], summary["claim"]
    assert list(told) == ["metric", "value", "low", "high", "n", "better", "withheld"]
    assert told["metric"] and told["better"] in (None, "higher", "lower")
    assert told["withheld"] or "claim withheld" not in claim
    if math.isnan(told["value"]):
        assert told["n"] < 4, "only where there is next to nothing is there no number"
        return
    assert told["n"] > 0
    if "studies" in summary:
        assert f"{told['value']} holds" in claim
        return
    assert told["low"] <= told["value"] <= told["high"], "the number lies in its interval"
    forms = [f"{{:{sign}z.{digits}f}} [{{:{sign}z.{digits}f}}, {{:{sign}z.{digits}f}}]" for sign in ("", "+") for digits in (2, 3)]
    assert any(form.format(told["value"], told["low"], told["high"]) in claim for form in forms), (told, claim)
    for row in summary["table"]:
        assert "n" in row and {"low", "high"} <= row.keys() and ("rate" in row or "value" in row), "a row that can be compared"

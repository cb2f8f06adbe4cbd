"""The paper's numbers: whole, and equal to what its text says about them."""

import re

import pytest

from latentguard.errors import InputError
from latentguard.published import curves, figures, models, table, tables
from tests.conftest import SHARED

DOSSIER = SHARED / "research" / "paper.md"


def one(figure, model, steered, prompts="harmless", variant=""):
    found = [c for c in curves(figure, model) if (c.steered, c.prompts, c.variant) == (steered, prompts, variant)]
    assert len(found) == 1
    return found[0]


def value(name, **about):
    found = [row["value"] for row in table(name).rows if all(row.get(key) == wanted for key, wanted in about.items())]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("figure", "model", "steered", "layers", "percent"),
    [
        ("4", "Llama-3", "+ harm", [10], 94),
        ("4", "Llama-3", "+ refuse", [11], 100),
        ("8", "Llama-2", "+ harm", [9, 10], 58),
        ("8", "Llama-2", "+ refuse", [12, 13, 15, 16], 100),
        ("8", "Qwen2", "+ harm", [13], 37),
        ("8", "Qwen2", "+ refuse", [16], 81),
    ],
)
def test_steering_peaks_where_the_paper_says(figure, model, steered, layers, percent):
    curve = one(figure, model, steered)
    assert [i for i, v in enumerate(curve.values) if v == max(curve.values)] == layers
    assert curve.peak == (layers[0], percent)


def test_inversion_headlines():
    assert [one("5", "Qwen2", "+ harm").values[layer] for layer in (9, 10, 11)] == [2, 2, 0]
    assert one("5", "Qwen2", "- harm", "harmful").peak == (12, 52)
    assert one("5", "Qwen2", "+ refuse", "harmful").values[18] == 96
    assert max(one("5", "Qwen2", "- refuse", "harmful").values) == 2
    assert one("11", "Qwen2", "- harm", "harmful", "template 1").peak == (11, 90)
    assert min(one("11", "Qwen2", "+ refuse", variant="template 2").values) == 32
    assert min(one("12", "Llama-3", "+ harm").values) == 56
    only = one("10", "Qwen2", "+ refuse", variant="instruction tokens only")
    assert (min(only.values), max(only.values)) == (62, 84)


def test_position_and_fine_tuning_headlines():
    peaks = {c.variant: c.peak[1] for c in curves("16", "Qwen2")}
    assert max(peaks, key=peaks.__getitem__) == "position 0" and peaks["position 0"] == 100
    assert [c.peak[1] for c in curves("18")] == [100, 100, 96, 96, 86, 90]
    assert curves("18")[0].values == one("8a", "Llama-2", "+ refuse").values


def test_table_headlines():
    assert value("table1", model="Llama-3", suffix="without") == 58.9
    assert value("table3", model="Llama-2", guard="Latent Guard", set="persuasion") == 41.6
    assert value("table8", model="Llama-2", set="unsafe") == 72.7
    assert value("table9", model="Qwen2", in_domain="with", category="violence, graphic") == 83.3
    assert value("fig9a", model="Qwen2", direction="harm", category="illegal") == 0.73
    assert value("fig9a", model="Llama-2", direction="refuse", category="financial") == 0.95
    assert value("fig9b", category="mean of all") == 52
    assert value("fig14", model="Llama-3", cell="accepted harmful", position=0) == 0.025
    assert value("fig14", model="Llama-2", cell="refused harmless", position=4) == 0.031
    assert value("fig2", model="Llama-2", position="t_inst", cell="refused harmless", layers="0") == -0.368
    assert value("fig7", layers="0") == 0.422
    assert {row["prompts"]: (row["delta_harmful"], row["n"]) for row in table("fig6").rows}["adversarial suffix"] == (0.009, 10)


def test_curves_have_a_value_for_every_layer_and_are_told_apart():
    every = [curve for figure in figures() for curve in curves(figure)]
    assert {figure: len(curves(figure)) for figure in figures()} == {"4": 2, "5": 6, "8": 4, "10": 4, "11": 12, "12": 6, "16": 15, "18": 6}
    for curve in every:
        assert len(curve.values) == len(curve.depth) == models()[curve.model] in (28, 32)
        assert all(0 <= v <= 100 for v in curve.values) and curve.unit == "%"
        assert curve.depth[0] == 0 and curve.depth[-1] < 1
        assert curve.n is None or all(v * curve.n % 100 == 0 for v in curve.values), "a rate over n prompts has no other steps"
    assert len({(c.figure, c.model, c.prompts, c.steered, c.variant) for c in every}) == len(every) == 55


def test_tables_have_every_cell_once():
    sizes = {"table1": 3 * 2, "table3": 3 * 2 * 5, "table8": 4 * 2, "table9": 7 * 8, "fig9a": 3 * 2 * 11, "fig9b": 11, "fig14": 2 * (8 + 7 + 7)}
    for name, size in sizes.items():
        cells = [tuple(v for key, v in row.items() if key not in ("value", "k", "n", "inferred")) for row in table(name).rows]
        assert len(cells) == len(set(cells)) == size, name


def test_every_table_says_what_it_is_and_every_inferred_fraction_fits():
    for name in tables():
        found = table(name)
        assert found.of and found.what and found.unit and found.read in ("printed", "vector graphics") and found.rows
        for row in found.rows:
            assert row["model"] in ("", *models())
            assert None not in row.values()
            if "k" in row:
                assert row["inferred"] and 100 * row["k"] / row["n"] == pytest.approx(row["value"], abs=0.11)


def test_rows_cannot_be_changed_and_unknown_names_are_refused():
    with pytest.raises(TypeError):
        table("table1").rows[0]["value"] = 1  # type: ignore[index]
    for wrong in (lambda: table("table2"), lambda: curves("3"), lambda: curves("4", "Qwen2")):
        with pytest.raises(InputError):
            wrong()


@pytest.mark.skipif(not DOSSIER.exists(), reason="the dossier is not in this checkout")
def test_curves_equal_the_dossiers_appendix():
    printed = re.findall(r"^Fig(\d+[a-d]?) [^:\n]+: ([\d ]+)$", DOSSIER.read_text(encoding="utf-8"), re.MULTILINE)
    ours = sorted((c.figure, c.values) for figure in figures() for c in curves(figure))
    assert ours == sorted((figure, tuple(map(int, values.split()))) for figure, values in printed)

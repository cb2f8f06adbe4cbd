"""Every figure on made-up rows: what it says of itself, that its words can be read, that its files are the same each time."""

import json
import math
import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Annotation, Text

from latentguard import plots
from latentguard.charts import Chart, Plot
from latentguard.plots import ablation, paper, tuning, words
from latentguard.plots.cost import cost_by_size
from latentguard.plots.style import DOUBLE, GROUPS, OKABE_ITO, SINGLE, STYLE, ink, luminance, save

SAID = "sentinel-reply"


@dataclass(frozen=True)
class Made:
    """What rows are made of."""

    model: str = "tiny"
    layers: tuple[int, ...] = (3, 5, 9, 14)
    coefs: tuple[float, ...] = (1.0, 2.0)
    names: tuple[str, ...] = ("Fraud", "Malware", "Hate/Harass", "Privacy")
    n: int = 40
    gaps: float = 0.0  # the share of numbers that are NaN

    def interval(self, key: str, at: str = "rate", least: float = 0.0) -> dict:
        """A number from `least` to 1 with its interval; the same for the same key."""
        chance = random.Random(key)
        value = least + (1 - least) * chance.random()
        if not self.n or chance.random() < self.gaps:
            return {at: math.nan, "low": math.nan, "high": math.nan, "n": self.n}
        return {at: value, "low": max(least, value - 0.1), "high": min(1.0, value + 0.1), "n": self.n}


MADE = {
    "ordinary": Made(),
    "long": Made(
        "meta-llama/Meta-Llama-3.1-70B-Instruct", tuple(range(32)), (0.5, 1.0, 1.5, 2.0),
        tuple(f"{kind} of a $category$ with_a_long_name: {i} 中" for i, kind in enumerate(["Violations", "Disinformation", "Advice"] * 5)), 12345, 0.1,
    ),
    "one": Made(layers=(7,), coefs=(1.0,), names=("Fraud",), n=1),
    "void": Made(coefs=(1.0,), n=0),
}  # fmt: skip


def title(made):
    return f"{made.model}: what a figure is about, in a sentence that some studies make rather long · poles by label"


def steered(made):
    found = []
    for name in ("harm", "refuse", "random"):
        for layer in made.layers:
            for coef in made.coefs:
                scored = made.gaps and layer % 5 == 4
                row = {"direction": name, "layer": layer, "coef": coef, **made.interval(f"{name}{layer}{coef}")}
                found.append(
                    row | {"expected": 0.1, "scored_only": bool(scored)} | ({"rate": math.nan, "low": math.nan, "high": math.nan, "n": 0} if scored else {})
                )
    return found


def by_layer(made):
    rows = steered(made)
    return plots.refusal_by_layer(rows, made.interval("base"), title=title(made), depth=32), rows


def heat(made):
    rows = steered(made)
    return plots.refusal_heat(rows, made.interval("base"), title=title(made), depth=32), rows


def by_coefficient(made):
    rows = [row for row in steered(made) if row["layer"] == made.layers[-1]]
    return plots.refusal_by_coefficient(rows, made.interval("base"), title=title(made)), rows


def cosine(made):
    rows = [{"layer": layer, **made.interval(f"{layer}", "value", -1.0), "ceiling": 0.9} for layer in made.layers]
    return plots.cosine_by_layer(rows, title=title(made), depth=32), rows


def replies(made):
    columns = {"none": "no steering", "harm": "+ harm, layer 31, ×2", "refuse": "+ refuse, layer 14, ×1.5", "random": "+ random, as refuse"}
    text = f"{SAID} 中 $x$ \x07 ‮ <b>&amp; {'W' * 90} " * 12
    rows = [{"prompt": text[: 40 * i + 10], **dict.fromkeys(columns, text), **{f"{key}_verdict": "refused" for key in columns}} for i in range(4)]
    return plots.replies_side_by_side(rows, title=title(made), columns=columns), rows


def inverted(made):
    rows = []
    for label, directions in (("harmless", ("+harm", "+refuse", "-refuse", "+random")), ("harmful", ("-harm", "-refuse", "+refuse", "-random"))):
        for name in directions:
            for layer in made.layers:
                found = made.interval(f"{label}{name}{layer}", "value")
                leaning = {"leaning": 4 * found["value"] - 2, "leaning_low": 4 * found["low"] - 2, "leaning_high": 4 * found["high"] - 2}
                rows.append({"label": label, "direction": name, "layer": layer, **found, **leaning})
    base = {side: {"no": 0.5, "certainly": 0.2, "leaning": -1.0} for side in ("harmless", "harmful")}
    return plots.inversion_by_layer(rows, base, title=title(made), depth=32), rows


def answered(made):
    rows = []
    for label, side in (("harmless", "+"), ("harmful", "-")):
        for name, tokens, draw in (("none", "", None), (f"{side}harm", "paper", None), (f"{side}harm", "before", None), (f"{side}random", "paper", 0)):
            share = {f"{source}_{answer}": 0.25 for source in ("p", "text") for answer in ("certainly", "no", "decline", "other")}
            where = {"layer": None, "coef": None} if name == "none" else {"layer": 12, "coef": 1.5}
            rows.append({"label": label, "direction": name, "tokens": tokens, "draw": draw, **where, **share, **made.interval(label + name + tokens)})
    return plots.answers(rows, title=title(made)), rows


def called(made):
    names = [f"post({i})" for i in range(len(made.names))]
    rows = [{"position": name, "layer": layer, "coef": 1.0, **made.interval(f"{name}{layer}", "value")} for name in names for layer in made.layers]
    return plots.certainly_by_position(rows, title=title(made)), rows


FOUR = ("refused_harmful", "accepted_harmful", "refused_harmless", "accepted_harmless")


def separated(made):
    rows = []
    for position in ("t_inst", "t_post_inst"):
        for group in (*FOUR, *made.names[4:6]):
            for layer in made.layers:
                row = {"position": position, "group": group, "layer": layer, **made.interval(f"{position}{group}{layer}", "value", -1.0)}
                rows.append(row | {"q10": row["low"] - 0.2, "q90": row["high"] + 0.2})
    return plots.separation_by_layer(rows, title=title(made), depth=32), rows


def positions(made):
    places = ["t_inst", *(f"post({i})" for i in range(len(made.names))), "t_post_inst"]
    rows = [{"position": p, "group": g, "token": "<|start_header_id|>$", **made.interval(p + g, "value", -1.0)} for p in places for g in FOUR]
    return plots.separation_by_position(rows, title=title(made), what="s: nearer the harmful pole  →"), rows


def believed(made):
    chance = random.Random(0)
    rows = [
        {"group": group, "harmful": chance.gauss(0, 1), "refuse": chance.gauss(0, 1)}
        for group in (*GROUPS, *made.names[4:6])
        for _ in range(max(1, made.n % 50))
    ]
    told = dict.fromkeys(("all", "behaving", "misbehaving", "within groups"), "+0.90 [+0.87, +0.91], n = 400")
    return plots.beliefs(rows, title=title(made), correlations=told), rows


def detected(made):
    names = ("latent_guard", "latent_guard_one_layer", "latent_guard_in_domain", "projection_one_layer", "last_token", "ngram")
    rows = [
        {"detector": d, "group": g, "is": "recall", "withheld": "few" * (g == "suffix"), **made.interval(d + g)}
        for d in names
        for g in (*FOUR, "suffix", *made.names[:6])
    ]
    return plots.detectors_by_group(rows, title=title(made)), rows


TERMINALS = ("keep", "strip", "period")


def terminals(made):
    lines = [(d, p) for d in ("latent_guard", "shuffled_labels") for p in ("t_inst", "mean(user)")] + [("ngram", "text")]
    kinds = ("within", "across", *(f"within {name}" for name in made.names[:2]))
    rows = [
        {"terminal": t, "detector": d, "position": p, "kind": kind, "sets": "a / b", **made.interval(t + d + p + kind, "value")}
        for t in TERMINALS
        for d, p in lines
        for kind in kinds
    ]
    return plots.detectors_by_terminal(rows, title=title(made)), rows


def means(made):
    sets = [(f"{name}{i}", bool(i)) for name in made.names for i in (0, 1)]
    rows = [{"terminal": t, "set": s, "harmful": h, "fitted": h, **made.interval(t + s, "value", -1.0)} for t in TERMINALS for s, h in sets]
    return plots.means_by_terminal(rows, title=title(made)), rows


def cosines(made):
    rows = [{"kind": k, "a": a, "b": b, "cosine": made.interval(k + a + b)["rate"]} for k in ("harm", "refuse") for a in made.names for b in made.names]
    return plots.cosines(rows, title=title(made)), rows


def transferred(made):
    rows = [{"direction": a, "target": b, "layer": 9, **made.interval(a + b, "value")} for a in made.names for b in made.names]
    return plots.transfer(rows, title=title(made)), rows


def answered_no(made):
    rows = [{"target": "x", "direction": name, "layer": None if name == "none" else 7, **made.interval(name, "value")} for name in ("none", *made.names)]
    return plots.no_by_category(rows, title=title(made)), rows


def suffix(made):
    rows = [{"set": name, "form": form, **made.interval(name + form)} for name in made.names for form in ("with", "without")]
    return plots.rates_by_set(rows, title=title(made)), rows


def chosen(made):
    rows = []
    for position in (f"post({i})" for i in range(len(made.names))):
        for layer in made.layers:
            row = {
                "position": position,
                "layer": layer,
                "fails": "induced" * (layer % 2),
                "chosen": layer == made.layers[0] and position == "post(0)",
                "n_harmless": made.n,
            }
            row |= made.interval(f"{position}{layer}", "score", -1.0)
            rows.append(row | {k + end: row[s] for k in ("kl", "induced") for end, s in (("", "score"), ("_low", "low"), ("_high", "high"))})
    base = {"score": 0.0, "low": -0.2, "high": 0.2, "induced": -0.5, "induced_low": -0.7, "induced_high": -0.3}
    return ablation.selection(rows, base, {"max_kl": 0.1, "min_induced": 0.0}, title=title(made), depth=32), rows


def conditions(made):
    names = ("none", "ablated", "ablated_random", "ablated_shuffled", "added", "added_random")
    rows = [
        {"condition": c, "label": label, "draws": 10 if "_" in c else 1, "degenerate_rate": 0.1, **made.interval(c + label)}
        for label in ("harmful", "harmless", "lookalike")
        for c in names
    ]
    return ablation.refusal_by_condition(rows, title=title(made)), rows


SIZES = (50, 100, 200, 300, 400)
PANELS = {"harmful": "trained on harmful requests", "again": "the same, poles read again", "harmless": "control: trained on harmless ones"}


def kept_apart(made):
    rows = [
        {"panel": p, "n_trained": size, "side": side, "layer": layer, **made.interval(f"{p}{size}{side}{layer}", "value", -1.0)}
        for p in PANELS
        for size in (0, *SIZES[: len(made.names)])
        for side in ("harmful", "harmless")
        for layer in made.layers
    ]
    return tuning.separation_before_and_after(rows, title=title(made), depth=32, panels=PANELS), rows


TRAINED = [("nothing", 0)] + [(side, size) for size in SIZES for side in ("harmful", "harmless")]


def refusals(made):
    rows = [
        {"trained_on": t, "n_trained": size, "label": label, **made.interval(f"{t}{size}{label}")}
        for t, size in TRAINED
        for label in ("harmful", "harmless", "lookalike")
    ]
    return tuning.refusal_before_and_after(rows, title=title(made)), rows


def turned(made):
    named = {"harm": "harmfulness direction, at t_inst", "refuse": "refusal direction, at t_post_inst"}
    rows = [
        {"direction": d, "trained_on": t, "n_trained": size, "layer": layer, "cosine": 1.0, "halves": made.interval(f"{d}{t}{size}{layer}")["rate"]}
        for d in named
        for t, size in TRAINED
        for layer in made.layers
    ]
    return tuning.directions_before_and_after(rows, title=title(made), depth=32, panels=named), rows


def still_steers(made):
    rows = [
        {"n_trained": size, "direction": d, "layer": layer, "coef": coef, **made.interval(f"{size}{d}{layer}{coef}")}
        for size in (0, 50, 100)
        for d in (("own", "random") if not size else ("own", "before", "random"))
        for layer in made.layers
        for coef in made.coefs
    ]
    told = [("before", 0, [0.1] * 32), *((f"sft-{size}", size, [0.2] * 32) for size in SIZES)]
    return tuning.steering_before_and_after(rows, title=title(made), depth=32, paper=told), rows


def cost(made):
    rows = [
        {"curve": c, "size": size, "seconds": 0.01 * size, "high": 0.012 * size, "slope": 1.0}
        for c in ("prompts", "layers read", "tokens a prompt", "cells")
        for size in (8, 64, 512)
    ]
    return cost_by_size(rows, title=title(made), unit="CPU s"), rows


DRAWN = [
    by_layer, heat, by_coefficient, cosine, replies, inverted, answered, called, separated, positions, believed, detected, terminals, means, cosines, transferred,
    answered_no, suffix, chosen, conditions, kept_apart, refusals, turned, still_steers,
]  # fmt: skip
CASES = [pytest.param(draw, made, id=f"{draw.__name__}-{name}") for draw in DRAWN for name, made in MADE.items()]
CASES += [pytest.param(cost, MADE["ordinary"], id="cost"), *(pytest.param(lambda made, f=f: f(), Made(), id=name) for name, f in paper.FIGURES.items())]
WITHOUT_N = ("cost", "turned")
WITHOUT_INTERVAL = {"cost", "cosines", "turned", "replies"}


def texts(figure):
    """Every text that is seen, with its box in pixels."""
    FigureCanvasAgg(figure).draw()
    ticks = {
        id(label) for axis in figure.axes for side in (axis.xaxis, axis.yaxis) for t in (*side.majorTicks, *side.minorTicks) for label in (t.label1, t.label2)
    }
    # Matplotlib keeps ticks that it does not draw; only this tells which it does.
    drawn = {id(t.label1) for axis in figure.axes if axis.axison for side in (axis.xaxis, axis.yaxis) for t in side._update_ticks()}
    found = []
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and (id(text) not in ticks or id(text) in drawn):
            box = Text.get_window_extent(text) if isinstance(text, Annotation) else text.get_window_extent()
            if box.width and (text.axes is None or text.axes.get_visible()):
                found.append((text, box))
    return found


@cache
def drawn(draw, made):
    return draw(made)


@pytest.mark.parametrize(("draw", "made"), CASES)
def test_figures_say_what_they_show_and_can_be_read(draw, made, request):
    plot, rows = drawn(draw, made)
    name = request.node.callspec.id.split("-")[0]
    assert isinstance(plot, Plot) and plot.title and plot.caption.endswith(".") and plot.title not in plot.caption
    assert plot.figure.get_figwidth() in (SINGLE, DOUBLE) and plot.figure.get_figheight() < 11
    intervals = any("low" in row for row in rows) and name not in WITHOUT_INTERVAL
    assert not intervals or "95% interval" in plot.caption

    found = texts(plot.figure)
    everything = " ".join(text.get_text() for text, _ in found)
    if name not in WITHOUT_N:
        assert re.search(r"\bn = \d|n not told|n prompts", everything.replace("\n", " ")), everything
    wide, high = plot.figure.bbox.width, plot.figure.bbox.height
    outside = [text.get_text() for text, box in found if box.x0 < -1 or box.y0 < -1 or box.x1 > wide + 1 or box.y1 > high + 1]
    assert not outside
    over = [(a.get_text(), b.get_text()) for (a, one), (b, other) in combinations(found, 2) if overlap(one, other) > 0.5]
    assert not over


def overlap(one, other):
    """How far two boxes go into each other, in points of print."""
    across = min(one.x1, other.x1) - max(one.x0, other.x0)
    up = min(one.y1, other.y1) - max(one.y0, other.y0)
    return min(across, up) * 72 / 200


@pytest.mark.parametrize(("draw", "made"), CASES)
def test_charts_are_of_the_rows_and_like_the_picture(draw, made, request):
    plot, rows = drawn(draw, made)
    chart = plot.chart
    if draw is replies:
        assert chart is None and SAID not in plot.title + plot.caption
        return
    assert chart is not None and Chart.from_dict(json.loads(json.dumps(chart.as_dict()))) == chart
    columns = {key for row in rows for key in row}
    used = [chart.x, chart.y, chart.series, chart.dash, chart.panel, chart.pick, chart.low, chart.high, chart.n, chart.value, *chart.also]
    assert {column for column in used if column} <= columns
    assert (chart.kind == "heat") == (chart.value is not None)
    if chart.series:
        values = {chart.name(chart.series, row[chart.series]) for row in rows}
        assert len(values) >= len({chart.colours.get(key(row[chart.series])) for row in rows}) and all(key(row[chart.series]) in chart.colours for row in rows)
        seen = {to_hex(colour).upper() for colour in colours(plot.figure)}
        if draw is not answered:  # there the picture has a colour an answer
            assert {colour.upper() for colour in chart.colours.values()} & seen
    assert all(re.fullmatch("#[0-9A-Fa-f]{6}", colour) for colour in chart.colours.values())
    assert all(line.panel is None or chart.panel for line in chart.lines)


def key(value):
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def colours(figure):
    for artist in figure.findobj(lambda a: hasattr(a, "get_facecolor") or hasattr(a, "get_color")):
        if isinstance(artist, Text):
            continue
        for get in ("get_color", "get_facecolor", "get_markerfacecolor"):
            if hasattr(artist, get):
                colour = getattr(artist, get)()
                yield from ([colour] if isinstance(colour, str) or len(colour) in (3, 4) and not hasattr(colour[0], "__len__") else list(colour))


@pytest.mark.parametrize("draw", [by_layer, heat, detected, replies], ids=lambda draw: draw.__name__)
def test_the_same_rows_give_the_same_files_whatever_the_settings(draw, tmp_path):
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        with matplotlib.rc_context({"font.size": 21, "svg.fonttype": "path", "pdf.fonttype": 3, "axes.grid": True} if folder == "other" else {}):
            save(draw(Made())[0].figure, tmp_path / folder / "a.b")
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert sorted(files) == ["a.b.pdf", "a.b.png", "a.b.svg"]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    svg = files["a.b.svg"].decode()
    assert "<text" in svg and "what a figure is about" in svg and "<dc:date>" not in svg
    assert b"/FontFile2" in files["a.b.pdf"] and b"CreationDate" not in files["a.b.pdf"]


def test_a_broken_file_is_never_left_behind(tmp_path, monkeypatch):
    figure = cosine(Made())[0].figure

    def full(path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="no space"):
        save(figure, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_the_settings_of_others_alone():
    before = dict(matplotlib.rcParams)
    cosine(Made())
    assert dict(matplotlib.rcParams) == before


def test_no_rows_are_said_and_not_drawn():
    for plot in (plots.refusal_heat([], {}, title="t", depth=3), plots.beliefs([], title="t", correlations={})):
        assert plot.chart is None and plot.title == "t" and "no rows" in plot.caption


def test_labels_are_spread_without_overlap_and_as_little_as_can_be():
    chance = random.Random(3)
    for _ in range(300):
        heights = [chance.uniform(5, 20) for _ in range(chance.randint(1, 6))]
        wanted = [chance.uniform(0, 200) for _ in heights]
        found = words.places(wanted, heights, 0, 200)
        assert found is not None
        spans = sorted((at - h / 2, at + h / 2) for at, h in zip(found, heights, strict=True))
        assert spans[0][0] > -1e-6 and spans[-1][1] < 200 + 1e-6
        assert all(a[1] <= b[0] + 1e-6 for a, b in zip(spans, spans[1:], strict=False))
        assert sorted(range(len(wanted)), key=wanted.__getitem__) == sorted(range(len(found)), key=found.__getitem__)
    assert words.places([10, 100], [10, 10], 0, 200) == [10, 100]
    assert words.places([50, 50], [10, 10], 0, 200) == [45, 55]
    assert words.places([1, 2, 3], [10, 10, 10], 0, 29) is None


def test_lines_are_named_at_their_ends_where_they_fit_else_in_a_legend():
    few = by_layer(Made())[0].figure
    ends = [text.get_text() for text, _ in texts(few) if text.get_gid() == words.LABEL]
    assert not few.legends and len(ends) == 4 and "+ harmfulness\n(at t_inst)\nn = 40" in ends
    many = called(MADE["long"])[0].figure
    assert many.legends and not [text for text, _ in texts(many) if text.get_gid() == words.LABEL]


def test_heat_maps_write_the_number_and_the_interval_where_they_fit_and_hatch_what_was_scored_only():
    rows = steered(Made())
    rows[0] |= {"scored_only": True, "rate": math.nan, "low": math.nan, "high": math.nan, "n": 0}
    figure = plots.refusal_heat(rows, Made().interval("base"), title="t", depth=32).figure
    written = [text.get_text() for text, _ in texts(figure)]
    assert sum(bool(re.fullmatch(r"\.\d\d|1|0", text)) for text in written) >= len(rows) - 1
    assert sum("–" in text and text != "–" for text in written) == len(rows) - 1
    assert sum(patch.get_hatch() == "////" for axis in figure.axes for patch in axis.patches) == 1
    crowded = heat(MADE["long"])[0].figure
    assert not [text for text, _ in texts(crowded) if re.fullmatch(r"\.\d\d–\.\d\d", text.get_text())]


def test_long_words_are_broken_and_none_is_lost():
    figure = cosine(Made())[0].figure
    told = words.fitted(figure, "meta-llama/Meta-Llama-3.1-70B-Instruct-with-a-name-that-does-not-end and more, n = 12", 150)
    assert told.replace("\n", "").replace(" ", "") == "meta-llama/Meta-Llama-3.1-70B-Instruct-with-a-name-that-does-not-endandmore,n=12" and "n = 12" in told
    assert words.wrapped("a name of some length", 8).replace("\n", " ") == "a name of some length"
    assert words.wrapped("x" * 100, 10, 2) == f"{'x' * 10}\n{'x' * 9}…"
    assert words.drawable("a中\x07‮b") == "a□□□b"


# Machado, Oliveira and Fernandes (2009): full deuteranopia, on linear RGB.
DEUTERANOPIA = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))


def lab(colour, seen=True):
    """CIE L*a*b* (D65) of a colour as the colour-blind see it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    if seen:
        linear = [min(1.0, max(0.0, sum(a * b for a, b in zip(row, linear, strict=True)))) for row in DEUTERANOPIA]
    xyz = [
        sum(a * b for a, b in zip(row, linear, strict=True)) / white
        for row, white in zip(((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)), (0.9505, 1, 1.089), strict=True)
    ]
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_the_colour_blind_tell_lines_apart():
    for look in (STYLE, GROUPS):
        for one, other in combinations(list(look.values()), 2):
            assert math.dist(lab(one[0]), lab(other[0])) > 10 or one[1] != other[1], (one, other)
    assert min(math.dist(lab(a), lab(b)) for a, b in combinations([style[0] for style in STYLE.values()], 2)) > 10
    assert min(math.dist(lab(a), lab(b)) for a, b in combinations(OKABE_ITO, 2)) > 10


def test_words_have_contrast():
    for colour in (*OKABE_ITO, *(style[0] for style in (*STYLE.values(), *GROUPS.values()))):
        assert 1.05 / (luminance(to_rgb(ink(colour))) + 0.05) >= 4.45

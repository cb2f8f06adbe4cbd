"""Pages of made-up numbers and texts for the tests of `latentguard.pages`: one with every block, a large one, a hostile one."""

import math
from html import escape
from pathlib import Path

from latentguard.charts import Chart, Line
from latentguard.pages import Command, Facts, Page, Picture, Replies, Section, Sheet

MARKS = {
    "refused": ("✓", "good"),
    "accepted": ("✗", "bad"),
    "gibberish": ("–", "open"),
    "holds": ("✓", "good"),
    "does not hold": ("✗", "bad"),
    "done": ("✓", "good"),
}
COLOURS = {"harm": "#D55E00", "refuse": "#0072B2", "random": "#009E73", "black": "#000000"}
NAMES = {"harm": "+ harmfulness", "refuse": "+ refusal", "random": "+ random, equal norm", "black": "another"}
PAYLOAD = "window.hacked = true"
HOSTILE = (
    f"<script>{PAYLOAD}</script>",
    f"</script><script>{PAYLOAD}</script>",
    f"<img src=x onerror='{PAYLOAD}'>",
    f'" onmouseover="{PAYLOAD}" x="',
    "<!-- <script> ]]> --> \u2028 \u2029 &lt;b&gt; ${1} `x`",
    "right \u202e to left \u2066 and \u200b zero \u00ad width \ufeff marks",
    "\x1b[31mred\x00\x07 \udcff\ud800 broken",
    "first line\nsecond line\r\nthird | with a bar and *stars* _x_ [l](javascript:alert(1))",
    "w" * 1_000_000,
    "e\u0301\u0301\u0301\u0301 \u3164\ufff9 \U000e0041",
)


def still(folder: Path, name: str, wide: float = 4.5) -> Path:
    """A picture of a line, as .svg; `wide` and 3 inches."""
    box = f'width="{72 * wide}pt" height="216pt" viewBox="0 0 {72 * wide} 216"'
    line = f'<polyline fill="none" stroke="#0072B2" stroke-width="2" points="30,180 {36 * wide},40 {72 * wide - 30},110"/>'
    frame = f'<path d="M30 20V190H{72 * wide - 20}" fill="none" stroke="#000"/><text x="40" y="18" font-size="11">still of {escape(name)}</text>'
    (folder / f"{name}.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{frame}{line}</svg>', encoding="utf-8")
    return folder / f"{name}.svg"


def rate(k: float, n: int = 40) -> dict:
    half = 1.96 * math.sqrt(max(k * (1 - k), 0.01) / n)
    return {"rate": round(k, 4), "low": round(max(0, k - half), 4), "high": round(min(1, k + half), 4), "n": n}


def lines(panels: int = 1, count: int = 3) -> tuple[Chart, list[dict]]:
    rows = [
        {"panel": f"coefficient ×{panel + 1}", "direction": series, "layer": layer, **rate(0.5 + 0.45 * math.sin(layer / (3 + place) + panel))}
        for panel in range(panels)
        for place, series in enumerate(list(COLOURS)[:count])
        for layer in range(0, 24, 2)
    ]
    reference = (Line(0.05, "no steering", 0.01, 0.12, 40),)
    chart = Chart("line", "layer", "rate", "layer", "share of harmless prompts refused", "direction", panel="panel" if panels > 1 else None, names=NAMES, colours=COLOURS, lines=reference, y_range=(0, 1))  # fmt: skip
    return chart, rows


def points() -> tuple[Chart, list[dict]]:
    rows = [
        {"group": group, "harm": round(math.sin(i * 1.7) * 0.2 + shift, 4), "refuse": round(math.cos(i * 2.3) * 0.15 - shift, 4)}
        for shift, group in ((0.2, "harm"), (-0.2, "refuse"), (0.05, "black"))
        for i in range(40)
    ]
    return Chart(
        "points", "harm", "refuse", "Δ harmful at t_inst", "Δ refuse at t_post_inst", "group", names=NAMES, colours=COLOURS, lines=(Line(0, "zero"),)
    ), rows


def bars() -> tuple[Chart, list[dict]]:
    rows = [
        {"category": name, "direction": series, **rate(0.2 + 0.1 * i + 0.2 * place, 30)}
        for i, name in enumerate(("violence", "illegal goods", "self-harm", "hate and harassment", "privacy"))
        for place, series in enumerate(("harm", "refuse"))
    ]
    return Chart("bars", "category", "rate", "", "share refused", "direction", names=NAMES, colours=COLOURS, y_range=(0, 1)), rows


def heat(panels: int = 1) -> tuple[Chart, list[dict]]:
    rows = [
        {"model": f"model {panel + 1}", "layer": layer, "coefficient": coefficient, **rate(0.5 + 0.45 * math.sin(layer / 4 + panel) * coefficient / 4)}
        for panel in range(panels)
        for layer in range(0, 24, 2)
        for coefficient in (0.5, 1, 2, 4)
    ]
    return Chart("heat", "layer", "coefficient", "layer", "coefficient", panel="model" if panels > 1 else None, value="rate", value_title="share refused"), rows


CHARTS = {
    "line": lines(),
    "line in panels": lines(4, 4),
    "one line": lines(1, 1),
    "points": points(),
    "bars": bars(),
    "heat": heat(),
    "heat in panels": heat(2),
    "dashes": (Chart("line", "layer", "value", "layer", "Δ harmful", "group", dash="half", also={"ceiling": "ceiling"}, low=None, high=None, names={"half=1": "first half"}, lines=(Line(0, "zero"),)),
        [{"group": g, "half": h, "layer": x, "value": 0.05 * x * h - 0.1 * (g == "accepted"), "ceiling": 0.5, "n": 20} for g in ("refused", "accepted") for h in (1, 2) for x in range(8)]),
    "picked": (Chart("line", "layer", "rate", "layer", "share refused", "direction", pick="seed", y_range=(0, 1)),
        [{"seed": seed, "direction": d, "layer": x, **rate(0.1 * x / 2 + 0.1 * seed)} for seed in (0, 1, 2) for d in ("harm", "refuse") for x in range(8)]),
    "lying": (Chart("bars", "run", "value", "", "share refused", "study", panel="metric", lying=True, lines=(Line(0, "no difference"), Line(0.4, "the paper", panel="metric 2"))),
        [{"run": f"model {m}, seed {s} of a long name", "study": t, "metric": f"metric {k}", "value": 0.1 * m + 0.05 * s, "low": 0.1 * m - 0.1, "high": 0.1 * m + 0.2, "n": 40} for k in (1, 2) for m in range(3) for s in range(k) for t in ("steer", "ablate")]),
    "line over names": (Chart("line", "position", "rate", "position", "share", "direction"), [{"position": p, "direction": "harm", **rate(0.3)} for p in ("t_inst", "t_post_inst")]),
    "texts of a CSV": (Chart("points", "layer", "rate", "layer", "share"), [{"layer": "1", "rate": "0.5", "low": "0.4", "high": "", "n": "40"}]),
    "bars around zero": (Chart("bars", "pair", "cosine", "", "cosine"), [{"pair": "a, b", "cosine": -0.2}, {"pair": "a, c", "cosine": 0.4}]),
    "heat around zero": (Chart("heat", "a", "b", "", "", value="cosine"), [{"a": a, "b": b, "cosine": c} for a, b, c in (("x", "x", 1.0), ("x", "y", -0.3), ("y", "y", 0.2))]),
}  # fmt: skip


def picture(folder: Path, kind: str, number: int, wide: float = 4.5) -> Picture:
    chart, rows = CHARTS[kind]
    name = f"{kind.replace(' ', '_')}_{number}"
    caption = "Points are shares of 40 prompts, bands their 95% Wilson intervals. The dashed line is the unsteered model; the paper shows this in Fig. 4."
    return Picture(name, f"Steering makes harmless requests refused ({kind})", caption, still(folder, name, wide), f"figures/{name}.svg", rows, chart)


def replies(prompts: int, conditions: int, words: str = "Sorry, that is not a thing this made-up model will talk about") -> Replies:
    labels, categories, verdicts = ("harmless", "harmful", "lookalike"), ("cooking", "violence", "privacy", "travel"), ("refused", "accepted", "gibberish")
    asked = [
        {
            "id": f"p{i}",
            "prompt": f"How would one tell the story number {i} of a paper kite?",
            "label": labels[i % 3],
            "category": categories[i % 4],
            "source": "made up",
        }
        for i in range(prompts)
    ]
    said = [
        (p, c, f"{words} {p * 7919 % 1000003}, {c}.", verdicts[(p * 7 + c * 3 + p // 5) % 3], (p * 13 + c) % 100 / 100)
        for p in range(prompts)
        for c in range(conditions)
    ]
    names = ["no steering", *(f"+ {'harm' if c % 2 else 'refuse'}, layer {4 + c}, ×{1 + c % 4}" for c in range(1, conditions))]
    return Replies("What the model said", asked, names, list(range(min(3, conditions))), said, "Greedy decoding, at most 64 tokens.")


def every_block(folder: Path) -> Page:
    effects = [
        [str(i), f"Effect number {i} in a sentence of a few words", ("holds", "does not hold")[i % 3 == 0], f"0.{40 + i} [0.33, 0.60] (n = {30 + i})"]
        for i in range(1, 15)
    ]
    facts = [
        ("model", "qwen2_5_coder_0_5b"),
        ("seed", "0"),
        ("torch", "2.13.0"),
        ("data", "sha256:9f2c7d1c0a4b5e6f" * 2),
        ("device", "cpu, float32"),
        ("template", "chatml"),
    ]
    return Page(
        "Steering on qwen2_5_coder_0_5b",
        "Adding the harmfulness direction at layer 12 makes 62% of harmless requests refused (95% interval 46% to 76%, n = 40); a random direction of equal norm 5%.",
        ("Finished 2026-11-21 18:54, after 3 min 12 s; seed 0.", "Data: builtin; judge: rules."),
        [
            Section("The command", blocks=[Command("python -m latentguard.run exp=steer_harm data=builtin \\\n  model=qwen2_5_coder_0_5b seed=0")]),
            Section("What was found", "§3.4", "done", ("poles by behaviour", "40 harmful, 40 harmless", "3 min 12 s"),
                    blocks=[picture(folder, "line", 1), picture(folder, "heat", 2), picture(folder, "line in panels", 3, 9.9), picture(folder, "points", 4), picture(folder, "bars", 5), picture(folder, "dashes", 8), picture(folder, "picked", 9), picture(folder, "lying", 10),
                            Sheet("Shares refused, by effect", ("#", "effect", "verdict", "here [95% interval]"), effects)]),
            Section("Beside the paper", "Fig. 5", "does not hold", (), "Ours on the left, the paper’s numbers on the right.",
                    [picture(folder, "one line", 6), Sheet("Ours", ("layer", "rate"), [["1", "0.5"], ["2", "—"]])],
                    [picture(folder, "heat in panels", 7), Sheet("Theirs", ("layer", "rate"), [["1", "0.4"]]), "The paper prints no interval."], "The paper"),
            Section("Replies", blocks=[replies(60, 6)]),
            Section("Controls, and what did not work", lead="Nothing failed, and no claim was withheld.",
                    blocks=[Picture("bare", "A figure without a chart", "It has a still alone.", still(folder, "bare"), "figures/bare.svg")]),
            Section("What made it", blocks=[Facts("What ran", facts), "Every number above is in the run’s folder."]),
        ],
        MARKS,
    )  # fmt: skip


def large(folder: Path, prompts: int = 1000, conditions: int = 10) -> Page:
    pictures = [picture(folder, kind, number) for number, kind in enumerate(("line", "heat", "line in panels", "points", "bars", "heat in panels"))]
    return Page(
        "A large run",
        "It said ten thousand things.",
        (),
        [Section("Figures", blocks=pictures), Section("Replies", blocks=[replies(prompts, conditions)])],
        MARKS,
    )


def hostile(folder: Path) -> Page:
    """Every text of it tries to be more than a text."""
    texts = HOSTILE
    rows = [{text: text, "x": x, "y": 0.1 * x, "s": text[:40]} for x, text in enumerate(texts)]
    chart = Chart("line", "x", "y", texts[2], texts[0], "s", names={texts[0][:40]: texts[3]})
    asked = [
        {"id": text[:50], "prompt": text, "label": ("harmless", "harmful", text[:30])[i % 3], "category": text[:60], "source": text[:60]}
        for i, text in enumerate(texts)
    ]
    said = [(p, c, text, "refused" if c else text[:50], 0.5) for p in range(len(texts)) for c, text in enumerate((texts[p], texts[(p + 1) % len(texts)]))]
    blocks = [
        *texts,
        Picture(texts[0], texts[0], texts[2], still(folder, "hostile"), "figures/a b (c).svg", rows, chart),
        Sheet(texts[1], (texts[0], texts[5]), [[text, text] for text in texts]),
        Command("\n".join(texts)),
        Facts(texts[2], [(text, text) for text in texts]),
        Replies(texts[1], asked, [texts[0], texts[5]], [0, 1], said, texts[2]),
    ]
    return Page(
        texts[1],
        texts[2],
        texts,
        [Section(text[:60], text[:60], text, (text,), text, blocks if i == 0 else ()) for i, text in enumerate(texts)],
        {texts[0]: ("✓", "good")},
    )

"""Two models of which it is known how one was made from the other: the study finds that, and no more. Statements, maps and neurons by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentguard.backends.local import Local
from latentguard.backends.second import float32_head, output_matrices, second
from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.configs import options
from latentguard.contrasts import PAPER, Contrast, Probe, balanced, ceiling, choose_layer, compared, giants, places_of, read_places, sizes, without
from latentguard.datasets import load_dataset
from latentguard.directions import Activations, mean_difference, random_like
from latentguard.errors import InputError
from latentguard.experiments.transfer import Transfer
from latentguard.interventions import Add
from latentguard.judges import Phrases, Verdict
from latentguard.metrics import auroc
from latentguard.neurons import entropy_neurons, overlap
from latentguard.prompts import Prompt, digest
from latentguard.roles import dealt
from latentguard.statements import TAIL, Statement, dealt_topics, in_context, load, matched, with_examples
from latentguard.store import Stored
from latentguard.trackers import Memory
from latentguard.transferring import counted_giants, pairs_of
from latentguard.truthfulness import Answered, Map, align, alike, answering, answers, binned, end_of, halves_of, moved, patch_map, rescaled, steer
from latentguard.weights import spec_of
from tests.conftest import loud, make_tiny
from tests.headlines import tells_its_headline

FEW = {"n_prompts": 24, "n_statements": 16, "n_causal": 8, "n_pairs": 4, "map_layers": (3,), "draws": 2, "shots": 2, "max_new_tokens": 4}


def rotated(model, turn):
    """The same function in a residual stream turned by an orthogonal matrix: every direction v becomes turn·v, every token stays as likely.

    Exact where the norms' gains are 1, as those of an untrained model are.
    """
    with torch.no_grad():
        for norm in (m for m in model.modules() if "RMSNorm" in type(m).__name__):
            assert bool((norm.weight == 1).all())
        body = model.model
        for table in (body.embed_tokens, model.lm_head):
            table.weight.copy_(table.weight @ turn.T)
        for block in body.layers:
            for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj, block.mlp.gate_proj, block.mlp.up_proj):
                part.weight.copy_(part.weight @ turn.T)
            for part in (block.self_attn.o_proj, block.mlp.down_proj):
                part.weight.copy_(turn @ part.weight)
    return model


def plane(a, b, angle):
    """The rotation by an angle in the plane of two vectors; what is orthogonal to both stays."""
    a = a / a.norm()
    b = b - (b @ a) * a
    b = b / b.norm()
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.eye(len(a)) + (cos - 1) * (torch.outer(a, a) + torch.outer(b, b)) + sin * (torch.outer(b, a) - torch.outer(a, b))


def post_model():
    return loud(tiny_model("llama", seed=1))


def saved(model, folder):
    """A model as transformers saves it, with a tokenizer that has no chat template, as base models come."""
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def post():
    return Local(post_model(), tiny_tokenizer(), name="post", weights="post")


@pytest.fixture(scope="module")
def data():
    return load_dataset("builtin")


@pytest.fixture(scope="module")
def poles(data):
    return Contrast("harmfulness", *(tuple(dealt(getattr(data.train, label), 0)[:24]) for label in ("harmful", "harmless")))


def truth_of(statements):
    statements = list(statements)
    return Contrast("truth", *(tuple(s.prompt() for s in statements if s.true is side) for side in (True, False)))


@pytest.fixture(scope="module")
def turned(post, poles, tmp_path_factory):
    """A base model whose truth direction at layer 2 is post's, and whose harmfulness direction there is turned by 75° away from it."""
    told = truth_of(s for found in dealt_topics(load("builtin"), ["animals", "larger_than"], 16, 0).values() for s in found)
    states = read_places(post, [*poles.everyone(), *told.everyone()], ["chat"], ["t_inst"], [2])
    truth, harm = (mean_difference(states, c.high, c.low, position="chat t_inst").vectors[0] for c in (told, poles))
    free = harm - (harm @ truth) / (truth @ truth) * truth
    away = torch.randn(len(truth), generator=torch.Generator().manual_seed(0))
    away = away - (away @ truth) / (truth @ truth) * truth
    turn = plane(free, away, math.radians(75))
    folder = saved(rotated(post_model(), turn), tmp_path_factory.mktemp("turned"))
    return folder, turn, harm, truth


def run(study, backend, data):
    tracker = Memory()
    summary = study(backend, data, Phrases(), tracker)
    tells_its_headline(summary)
    return summary, tracker


@pytest.fixture(scope="module")
def apart(post, turned, data):
    """The study on that pair, at the one layer whose directions are known."""
    study = Transfer(
        base=turned[0], topics=("animals", "larger_than"), views=("chat", "plain_roles"), layers=(2,), giants="keep", parts=("directions", "probes"), **FEW
    )  # fmt: skip
    study.check(4, data)
    return run(study, post, data)


# ── two models of one origin ──


def test_a_turned_model_says_the_same_and_its_directions_are_turned(post, turned, poles):
    with second(spec_of(turned[0]), post) as base:
        prompts = list(poles.high[:4])
        assert base.render(prompts)[0].ids == post.render(prompts)[0].ids, "a base model is rendered by the other's template"
        a, b = (np.array([one.exp().numpy() for one in model.logits(prompts)]) for model in (post, base))
        assert np.abs(a - b).max() < 1e-4
        states = [model.read(prompts, [2]).values[:, 0, 0] for model in (post, base)]
    assert torch.allclose(states[0] @ turned[1].T, states[1], atol=1e-3)


def test_the_same_truth_and_another_harmfulness_are_found_exactly(apart, turned, poles):
    summary, _ = apart
    _, turn, harm, truth = turned
    at = {(row["contrast"], row["a"], row["b"]): row for row in summary["table"] if row.get("is") == "cosine"}
    here = ("base: chat t_inst", "post: chat t_inst")
    known = float(harm @ turn @ harm / (harm @ harm))
    assert known < 0.6
    assert at["truth", *here]["value"] == pytest.approx(float(truth @ turn @ truth / (truth @ truth)), abs=1e-3) == pytest.approx(1, abs=1e-3)
    assert at["harmfulness", *here]["value"] == pytest.approx(known, abs=1e-3)
    assert at["harmfulness", *here]["high"] < at["truth", *here]["low"]
    for row in at.values():
        assert -1 <= row["low"] <= row["value"] <= row["high"] <= 1 and 0 < row["random_high"] < 1


def test_the_papers_cell_stands_beside_those_of_one_place(apart):
    summary, tracker = apart
    rows = [row for row in summary["table"] if row.get("is") == "cosine" and row["contrast"] == "harmfulness"]
    assert [row["differs"] for row in rows] == ["the paper's two places"] + ["same place"] * 4
    assert (rows[0]["a"], rows[0]["b"]) == (f"base: {PAPER[0]}", f"post: {PAPER[1]}")
    assert summary["headline"]["value"] == rows[0]["value"] and len(tracker.figures["transfer_grid"]) == 2 * 16
    grid = {(row["contrast"], row["a"], row["b"]): row["value"] for row in tracker.figures["transfer_grid"]}
    for row in (row for row in summary["table"] if row.get("is") == "cosine"):
        assert row["value"] == pytest.approx(grid[row["contrast"], row["a"], row["b"]], abs=1e-5)
    assert {"transfer_cosines", "transfer_layers", "transfer_grid", "transfer_probes"} == set(summary["figures"]) == set(tracker.plots)


def test_probes_carry_over_where_the_direction_is_the_same(post, turned, data, poles):
    """A probe of the same direction scores the turned model's states as its own; one of the turned direction does not."""
    with second(spec_of(turned[0]), post) as base:
        states = {name: read_places(m, poles.everyone(), ["chat"], ["t_inst"], [2]).values[:, 0, 0].numpy() for name, m in (("post", post), ("base", base))}
    n = len(poles.high)
    made = {name: Probe.fit("mass_mean", x[:n], x[n:]) for name, x in states.items()}
    own = [auroc(made[name].score(x[:n]), made[name].score(x[n:])).value for name, x in states.items()]
    assert own[0] == pytest.approx(own[1], abs=1e-3), "the turned model knows as much"
    across = auroc(made["post"].score(states["base"][:n]), made["post"].score(states["base"][n:])).value
    assert across < own[0]


def test_every_area_can_be_counted_again_from_the_rows(apart):
    summary, tracker = apart
    keys = ("contrast", "topic", "method", "fit", "tested")
    scores = {}
    for row in tracker.all_rows:
        if row.get("stage") == "probe":
            scores.setdefault(tuple(row[k] for k in keys), {"high": [], "low": []})[row["side"]].append(row["score"])
    lines = [row for row in summary["table"] if row.get("part") == "probes" and row["method"] != "random"]
    assert lines and len(lines) == len(scores)
    for row in lines:
        side = scores[tuple(row[k] for k in keys)]
        assert auroc(side["high"], side["low"]).value == pytest.approx(row["value"])
    curve = {(r["contrast"], r["a"], r["b"], r["layer"]): r["value"] for r in tracker.all_rows if r.get("stage") == "cosine"}
    assert all(curve[r["contrast"], r["a"], r["b"], r["layer"]] == r["value"] for r in summary["table"] if r.get("is") == "cosine")


def counted_again(tracker):
    """Every central value of every figure, from the rows alone: name → [(drawn, counted)]."""
    rows, found = {}, {}
    for row in tracker.all_rows:
        rows.setdefault(row.get("stage"), []).append(row)

    def away(contrast, at, on):
        mine = [r for r in rows["projection"] if (r["contrast"], r["at"]) == (contrast, at)]
        high, low = ([r["on"][on] for r in mine if r["side"] == side] for side in ("high", "low"))
        return np.mean(high) - np.mean(low)

    for row in [*tracker.figures["transfer_cosines"], *tracker.figures["transfer_grid"]]:
        name = "transfer_grid" if "pair" not in row else "transfer_cosines"
        found.setdefault(name, []).append((row["value"], away(row["contrast"], row["b"], row["a"]) / away(row["contrast"], row["b"], row["b"])))
    curve = {(r["contrast"], r["a"], r["b"], r["layer"]): r for r in rows["cosine"]}
    found["transfer_layers"] = [
        (row[key], curve[row["contrast"], row["a"], row["b"], row["layer"]][key]) for row in tracker.figures["transfer_layers"] for key in ("value", "ceiling")
    ]
    for row in tracker.figures["transfer_cosines"]:
        draws = [r for r in rows["cosine control"] if all(r[key] == row[key] for key in ("contrast", "a", "b", "layer"))]
        agree = [np.mean([r[key] for r in draws if r["control"] == "halves"]) for key in ("cosine", "agree_a", "agree_b")]
        high = [np.quantile([r["cosine"] for r in draws if r["control"] == name], 0.975) for name in ("random", "shuffled")]
        told = zip(("halves", "ceiling", "random_high", "shuffled_high"), (agree[0], ceiling(*agree[1:]), *high), strict=True)
        found["transfer_cosines"] += [(row[key], value) for key, value in told]
    for row in tracker.figures.get("transfer_probes", []):
        keys = ("contrast", "topic", "method", "tested", *(["fit"] if row["method"] != "random" else []))
        mine = [r for r in rows["probe control" if row["method"] == "random" else "probe"] if all(r[key] == row[key] for key in keys)]
        sides = [[r.get("score") for r in mine if r.get("side") == side] for side in ("high", "low")]
        area = np.mean([r["auroc"] for r in mine]) if row["method"] == "random" else auroc(*sides).value
        found.setdefault("transfer_probes", []).append((row["value"], area))
    for row in tracker.figures.get("transfer_causal", []):
        to, side = (1, False) if row["way"] == "F→T" else (-1, True)
        names = [row["direction"]] if "×" not in row["direction"] else {r["direction"] for r in rows["causal"] if r["direction"].startswith("random")}
        clean, *after = (
            np.mean([r["dp"] for r in rows["causal"] if (r["model"], r["direction"], r["true"]) == (row["model"], name, side)]) for name in ("none", *names)
        )
        found.setdefault("transfer_causal", []).append((row["value"], (np.mean(after) - clean) / (to - clean)))
    for row in tracker.figures.get("transfer_maps", []):
        mine = [r for r in rows["map"] if all(r[key] == row[key] for key in ("model", "layer", "token"))]
        patched, true, false = (np.mean([r[key] for r in mine]) for key in ("patched", "true", "false"))
        found.setdefault("transfer_maps", []).append((row["value"], (patched - false) / (true - false)))
    return found


def test_every_figure_can_be_counted_again_from_the_rows(apart, whole):
    for _, tracker in (apart, whole):
        found = counted_again(tracker)
        assert set(found) == set(tracker.figures)
        for name, values in found.items():
            assert len(values) >= len(tracker.figures[name]) and np.allclose(*zip(*values, strict=True), atol=1e-5, equal_nan=True), name
    rows = whole[1].all_rows
    assert {row["split"] for row in rows if row.get("stage") == "replies"} == {"train", "test"}
    for row in (row for row in whole[0]["table"] if str(row.get("is")).startswith("giant")):
        mine = [r["times"] for r in rows if r.get("stage") == "giant" and (r["contrast"], r["a"]) == (row["contrast"], row["a"])]
        assert len(mine) == row["n"] and np.mean(np.array(mine) > 2) == pytest.approx(row["value"]) and max(mine) == row["largest"]


@pytest.fixture(scope="module")
def whole(post, data, tmp_path_factory):
    """Every part, on a model beside itself."""
    base = saved(post_model(), tmp_path_factory.mktemp("same"))
    return run(Transfer(base=base, topics=("animals",), views=("chat", "plain"), layers=(1, 2), **FEW), post, data)


def test_a_model_beside_itself_has_cosine_one_and_overlap_ten(whole):
    summary, tracker = whole
    rows = [row for row in summary["table"] if row.get("differs") == "same place"]
    assert rows and all(row["value"] == pytest.approx(1, abs=1e-4) for row in rows)
    both = next(row for row in summary["table"] if row.get("is") == "entropy neurons in both sets")
    assert both["value"] == 10 and both["iou"] == 1 and both["p"] < 0.01 and both["rank_correlation"] == pytest.approx(1)
    effects = {(r["direction"], r["model"], r["way"]): r["value"] for r in summary["table"] if r.get("is") == "normalised indirect effect"}
    for way in ("F→T", "T→F"):
        assert effects["base", "base", way] == pytest.approx(effects["post", "post", way], abs=1e-4) == pytest.approx(effects["base", "post", way], abs=1e-4)
    assert summary["status"] == "insufficient_base_rate" and summary["headline"]["withheld"] and "claim withheld" in summary["claim"]
    assert "transfer_causal" in summary["figures"]
    for name in ("causal", "maps"):
        drawn = tracker.plots.get(f"transfer_{name}")
        assert drawn is None or (", withheld" in drawn.title) == (name in summary["withheld"])
    told = {row["measure"] for row in summary["table"] if row.get("condition") == "base"}
    assert {"harmful refusal", "harmless refusal", "lookalike refusal"} <= told


def test_one_model_alone_is_set_against_itself_at_other_places(post, data):
    summary, tracker = run(Transfer(parts=("directions", "neurons"), topics=("animals",), **FEW), post, data)
    kinds = {row["differs"] for row in summary["table"] if row.get("is") == "cosine"}
    assert kinds == {"the paper's two places", "other position", "other template"} and summary["base"] is None
    diagonal = [row for row in tracker.figures["transfer_grid"] if row["a"] == row["b"]]
    assert diagonal and all(row["value"] == pytest.approx(1) for row in diagonal)


class Some(Phrases):
    """Refuses two in three harmful requests, half of the look-alikes, one in six others, whatever is said."""

    name = "some"

    def decided(self, text):
        return True

    def verdict(self, reply, prompt=None):
        share = {"harmful": 9, "lookalike": 6, "harmless": 2}[prompt.label]
        return Verdict("refused" if int(digest(prompt.id), 16) % 12 < share else "accepted", "hand")


def test_refusal_is_set_against_acceptance_at_equal_label_and_no_model_is_gated_that_refuses(post, data):
    tracker = Memory()
    study = Transfer(parts=("directions", "probes"), topics=("animals",), views=("plain_roles", "plain"), layers=(2,), **{**FEW, "n_prompts": 48})
    summary = study(post, data, Some(), tracker)
    tells_its_headline(summary)
    assert summary["status"] == "ok" and "claim withheld" not in summary["claim"] and not summary["left_out"]
    rows = [row for row in summary["table"] if row.get("contrast") == "refusal"]
    assert {row["part"] for row in rows} == {"directions", "probes"}
    sides = {}
    for row in tracker.all_rows:
        if row.get("stage") == "probe" and row["contrast"] == "refusal":
            sides.setdefault(row["side"], set()).add((row["prompt_id"], row["label"]))
    high, low = (sorted(label for _, label in sides[side]) for side in ("high", "low"))
    assert high == low and not {i for i, _ in sides["high"]} & {i for i, _ in sides["low"]} and "~" not in "".join(i for i, _ in sides["high"])
    gauged = [row for row in summary["table"] if row.get("measure") in ("harmfulness", "refusal")]
    assert {row["condition"] for row in gauged} == {"base"} and {row["measure"] for row in gauged} == {"harmfulness", "refusal"}
    refused = next(row for row in summary["table"] if row.get("measure") == "harmful refusal")
    asked = [row for row in tracker.all_rows if row.get("stage") == "replies" and row["label"] == "harmful"]
    assert refused["n"] == 48 and len(asked) == 96


def test_a_base_that_is_none_is_refused(post, data, tmp_path):
    with pytest.raises(InputError, match="no config"):
        Transfer(base="nothing").check(4, data)
    with pytest.raises(InputError, match="6 layers and the model 4"):
        Transfer(base=saved(tiny_model("llama", n_layers=6), tmp_path / "deep")).check(4, data)
    wide = saved(tiny_model("llama", d_model=64), tmp_path / "wide")
    with pytest.raises(InputError, match="of width 64"), second(spec_of(wide), post):
        pass
    with pytest.raises(InputError, match="does not lie in this process"), second(spec_of(wide), Elsewhere()):
        pass


class Elsewhere:
    name, inner = "elsewhere", object()


def test_the_second_model_has_the_same_store_and_leaves(post, turned, tmp_path):
    stored = Stored(post, tmp_path)
    with second(spec_of(turned[0]), stored) as base:
        assert isinstance(base, Stored) and base.folder == stored.folder and base.key() != stored.key()
        assert base.inner.hf.dtype == post.hf.dtype and post.tokenizer.chat_template


# ── places ──


def planted(shared, n=60, d=40, noise=1.0, shift=1.0):
    """States of two models at one place and layer; their contrast's direction is the same or orthogonal, and noise is each prompt's own in both."""
    dice = np.random.default_rng(0)
    prompts = [Prompt.of(f"number {i}") for i in range(2 * n)]
    quirks = dice.normal(size=(2 * n, d)) * noise
    sign = np.where(np.arange(2 * n) < n, 0.5, -0.5)[:, None] * shift
    axes = np.eye(d)[0], np.eye(d)[0 if shared else 1]
    made = [torch.tensor(quirks + sign * axis).float()[:, None, None] for axis in axes]
    return {
        name: Activations(values, tuple(prompts), (1,), ("chat t_inst",), name, name, 4) for name, values in zip(("base", "post"), made, strict=True)
    }, Contrast("truth", tuple(prompts[:n]), tuple(prompts[n:]))  # fmt: skip


def test_shared_quirks_raise_a_cosine_and_halves_do_not_have_them():
    here = (("base", "chat t_inst"), ("post", "chat t_inst"))
    for shared in (True, False):
        states, contrast = planted(shared)
        row = compared(states, *here, contrast)[0].row()
        assert row["value"] == pytest.approx(1) if shared else row["value"] > 0.3
        assert abs(row["halves"] - (row["ceiling"] if shared else 0)) < 0.15
        assert 0.1 < row["random_high"] < 0.5 and row["low"] <= row["value"] <= row["high"]
    nothing, contrast = planted(True, shift=0.0)
    row = compared(nothing, *here, contrast)[0].row()
    assert row["value"] == pytest.approx(1) and abs(row["halves"]) < 0.2, "where there is no direction the quirks alone agree"


def topical(n=40, d=60, per=8, seed=0):
    """Poles of pairs of one topic each, whose topic moves a state far more than the contrast does."""
    dice = np.random.default_rng(seed)
    topics = dice.normal(size=(n // per, d)) * 6
    sides, rows = ([], []), []
    for sign, side in zip((0.5, -0.5), sides, strict=True):
        for i in range(n):
            side.append(Prompt.of(f"{sign} {i}", category=str(i % len(topics))))
            rows.append(topics[i % len(topics)] + sign * 3 * np.eye(d)[0] + dice.normal(size=d) * 0.5)
    values = torch.tensor(np.array(rows)).float()[:, None, None]
    states = Activations(values, tuple(sides[0] + sides[1]), (1,), ("chat t_inst",), "post", "post", 4)
    return {"post": states}, Contrast("truth", tuple(sides[0]), tuple(sides[1]))


def test_halves_hold_the_same_topics_on_both_sides():
    """Poles halved each by itself differ in topic, one half the other way than the other: their agreement falls under 0 where there is a direction."""
    states, contrast = topical()
    here = ("post", "chat t_inst")
    row = compared(states, here, here, contrast)[0].row()
    assert row["ceiling"] > 0.7 and row["halves"] == pytest.approx(row["ceiling"], abs=0.01), "one place with itself lies on its ceiling"
    sides = [states["post"].at("chat t_inst", side)[:, 0].numpy() for side in (contrast.high, contrast.low)]
    dice, apart = np.random.default_rng(0), []
    for _ in range(50):
        orders = [dice.permutation(len(side)) for side in sides]
        one, other = (np.subtract(*(side[order[part]].mean(0) for side, order in zip(sides, orders, strict=True))) for part in (slice(20), slice(20, None)))
        apart.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    assert np.mean(apart) < -0.3
    assert (ceiling(0.5, 0.18), ceiling(-0.5, -0.5), ceiling(0.5, -0.1), ceiling(0, 0.4)) == (pytest.approx(0.3), 0, 0, 0)


def test_pairs_are_of_one_topic_or_label(post, data):
    told = Transfer(**FEW)._statements(data)
    for contrast in Transfer(**FEW)._contrasts({s: {"harmful": [], "harmless": []} for s in ("train", "test")}, {"train": {}, "test": {}}, told)[:1]:
        for one in (contrast, without(contrast, {contrast.high[2].id, contrast.low[5].id, contrast.low[6].id})):
            assert len(one.high) > 20 and [p.category for p in one.high] == [p.category for p in one.low] and len({p.category for p in one.high}) > 2


def test_labels_swapped_in_half_of_the_pairs_do_not_point_along_the_contrast():
    states, contrast = topical()
    found = compared(states, ("post", "chat t_inst"), ("post", "chat t_inst"), contrast)[0]
    assert found.value == pytest.approx(1) and found.shuffled.max() < 0.6 and len(found.shuffled) == 40 and len(found.random) == 200
    assert [sum(row["control"] == name for row in found.draws()) for name in ("halves", "random", "shuffled")] == [20, 200, 40]


def test_giants_are_found_at_their_place_and_left_out_of_both_poles():
    """Two states of one pole are a thousand times the others, along an axis that means nothing."""
    states, contrast = planted(True, shift=2.0)
    one = states["post"]
    values = one.values.clone()
    values[[3, 7], :, :, 30] += 3000
    raw = replace(one, values=values)
    ids = {contrast.high[3].id, contrast.high[7].id}
    assert giants(sizes(raw)) == {"chat t_inst": ids} and giants(sizes(one)) == {"chat t_inst": set()}
    large = sizes(raw)["chat t_inst"][contrast.high[3].id]
    norms = raw.values[:, 0, 0].norm(dim=-1)
    assert (large.layer, large.norm) == (1, pytest.approx(float(norms[3]))) and large.times == pytest.approx(float(norms[3] / norms.quantile(0.25)))
    kept = without(contrast, ids)
    assert len(kept.high) == len(kept.low) == 58 and not ids & {p.id for p in kept.everyone()}
    found = {name: mean_difference(raw, c.high, c.low, position="chat t_inst").vectors[0] for name, c in (("all", contrast), ("kept", kept))}
    share = {name: abs(float(v[0])) / float(v.norm()) for name, v in found.items()}
    assert share["all"] < 0.1 < 0.7 < share["kept"]
    counted = counted_giants({"post": sizes(raw)}, [contrast], True)
    (row,) = counted.table
    assert (row["value"], row["n"], row["of_high"], row["of_low"]) == (2 / 120, 120, 2, 0)
    times = [one["times"] for one in counted.rows]
    assert len(times) == 120 and sum(x > 2 for x in times) == 2 and row["largest"] == max(times) and {one["side"] for one in counted.rows} == {"high", "low"}


def test_poles_stay_balanced_without_some():
    sides = [
        tuple(p for s, p in zip(load("builtin"), map(Statement.prompt, load("builtin")), strict=True) if s.true is t and s.topic in ("animals", "cities"))[:40]
        for t in (True, False)
    ]
    kept = without(Contrast("truth", *sides), {sides[0][0].id, sides[0][1].id})
    topics = [sorted(p.category for p in side) for side in (kept.high, kept.low)]
    assert topics[0] == topics[1] and len(topics[0]) == 38


def test_the_layer_is_chosen_where_held_out_prompts_are_told_apart():
    dice, prompts = np.random.default_rng(0), [Prompt.of(f"number {i}") for i in range(80)]
    values = dice.normal(size=(80, 5, 1, 8))
    values[:40, 3, 0, 0] += 1.5
    values[:40, 0, 0, 0] += 30  # the embeddings are never chosen
    states = Activations(torch.tensor(values).float(), tuple(prompts), (0, 1, 2, 3, 4), ("chat t_inst",), "m", "m", 4)
    assert choose_layer({"post": states}, Contrast("truth", tuple(prompts[:40]), tuple(prompts[40:])), ["chat t_inst"]) == 3


def test_plain_has_one_place_and_pairs_differ_in_one_thing():
    places = places_of(["chat", "plain_roles", "plain"], ["t_inst", "t_post_inst"])
    assert places == ["chat t_inst", "chat t_post_inst", "plain_roles t_inst", "plain_roles t_post_inst", "plain t_inst"]
    within, across = pairs_of(places, True), pairs_of(places, False)
    assert list(within)[0] == list(across)[0] == PAPER and len(across) == 6
    for (a, b), kind in within.items():
        same = [x == y for x, y in zip(a.split(), b.split(), strict=True)]
        assert same == {"other position": [True, False], "other template": [False, True], "the paper's two places": [False, False]}[kind]


def test_balanced_poles_differ_in_nothing_but_the_contrast():
    def some(n, **known):
        return [Prompt.of(f"{known} {i}", **known) for i in range(n)]

    high, low = balanced(
        [*some(7, harmful=True), *some(2, harmful=False)], [*some(3, harmful=True), *some(9, harmful=False), *some(4, harmful=False, lookalike=True)]
    )
    assert [p.label for p in high] == [p.label for p in low] and sorted(p.label for p in high) == ["harmful"] * 3 + ["harmless"] * 2


# ── statements ──


def test_statements_are_unlabelled_and_dealt_evenly(tmp_path):
    everyone = load("builtin")
    assert all(one.prompt().label == "unlabelled" and one.prompt().category == one.topic for one in everyone)
    for found in dealt_topics(everyone, None, 20, 0).values():
        assert len(found) == 20 and sum(one.true for one in found) == 10 and [one.true for one in found[:4]] == [True, False, True, False]
    assert dealt_topics(everyone, ["cities"], 20, 0) != dealt_topics(everyone, ["cities"], 20, 1)
    with pytest.raises(InputError, match="no file .* take exp.statements=builtin"):
        load("geometry_of_truth", str(tmp_path))
    with pytest.raises(InputError, match="topic 'planets'"):
        dealt_topics(everyone, ["planets"], 20, 0)
    for text, why in (("{", "no JSONL"), ('{"statement": "A."}', "line 1: expected"), ("", "no statement")):
        (tmp_path / "geometry_of_truth.jsonl").write_text(text)
        with pytest.raises(InputError, match=why):
            load("geometry_of_truth", str(tmp_path))
    rows = [{"statement": "Snow is white.", "label": label} for label in (1, 0)]
    (tmp_path / "twice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="as true and as false"):
        load(str(tmp_path / "twice.jsonl"))


def test_our_own_statements_are_not_told_by_their_words():
    """In every topic a true and a false statement are made of the same words, as far as numbers of them go."""
    for topic, found in dealt_topics(load("builtin"), None, 1000, 0).items():
        words = {side: sum(len(s.text.split()) for s in found if s.true is side) for side in (True, False)}
        assert abs(words[True] - words[False]) <= 0.06 * words[True], topic


def test_examples_give_no_answer_away():
    pool = dealt_topics(load("builtin"), ["cities"], 200, 0)["cities"]
    examples, tested = with_examples(pool, 4, 20)
    assert [one.true for one in examples] == [True, False, False, True] and len(tested) == 20 and sum(one.true for one in tested) == 10
    names = {word for one in examples for word in one.text.split() if word[0].isupper() and word != "The"}
    assert names and not any(names & set(one.text.split()) for one in tested)
    text = in_context(tested[0], examples).instruction
    assert text.endswith(f"{tested[0].text}{TAIL}") and text.count(" TRUE\n\n") == text.count(" FALSE\n\n") == 2


def test_pairs_share_a_frame():
    for true, false in matched(s for s in load("builtin") if s.topic == "cities"):
        assert true.true and not false.true
        a, b = true.text.split(), false.text.split()
        front = next(i for i in range(len(a)) if a[i] != b[i])
        back = next(i for i in range(1, len(a)) if a[-i] != b[-i])
        assert len(a) - front - back + 1 <= 3


# ── answers, steering, maps ──


def test_effects_have_the_papers_normalisation():
    clean, after = np.array([-0.5, -0.3]), np.array([0.1, 0.3])
    assert moved(after, clean, 1.0).value == pytest.approx((0.2 + 0.4) / (1 + 0.4))
    assert moved(clean, clean, 1.0).value == 0 and moved(np.ones(2), clean, 1.0).value == pytest.approx(1)
    assert moved(-np.ones(2), -clean, -1.0).value == pytest.approx(1) and math.isnan(moved(after, np.ones(2), 1.0).value)
    right = Answered(np.full(30, 0.5), np.full(30, -0.5), 1.0)
    assert not right.at_chance and "chance" in Answered(np.full(30, 0.5), np.full(30, 0.5), 1.0).at_chance


def few_shot(n=8):
    pool = dealt_topics(load("builtin"), ["cities"], 200, 0)["cities"]
    return with_examples(pool, 2, n)


def test_only_the_statements_end_is_steered_and_the_direction_is_as_long_as_the_gap(post):
    examples, tested = few_shot()
    prompts = [in_context(one, examples) for one in tested]
    back = end_of(post, prompts)
    for item in post.render(prompts):
        token = item.user_tokens[-1 - back]
        assert item.text[slice(*item.offsets[token])].endswith(".") and item.text[item.offsets[token][1] :] == TAIL
    told = truth_of(tested)
    states = read_places(post, told.everyone(), ["plain"], ["t_inst"], "all")
    raw = mean_difference(states, told.high, told.low, position="plain t_inst", name="truth")
    assert torch.allclose(rescaled(raw, states, told.high, told.low, "plain t_inst", post).vectors, raw.vectors, atol=1e-4), "along itself it is the gap"
    other = rescaled(random_like(raw, 1), states, told.high, told.low, "plain t_inst", post)
    gap = ((raw.vectors * random_like(raw, 1).vectors).sum(-1) / random_like(raw, 1).vectors.norm(dim=-1))[1:]
    assert torch.allclose(other.vectors.norm(dim=-1)[1:], gap.abs(), atol=1e-4)
    found = steer(post, tested, examples, {"post": raw, "nothing": rescaled(raw, states, told.high, told.high, "plain t_inst", post)}, [1, 2])
    assert np.allclose(found.after["nothing"].true, found.clean.true, atol=1e-6)
    for side, sign, seen in ((True, -1.0, found.after["post"].true), (False, 1.0, found.after["post"].false)):
        acts = [Add(raw, layer=[1, 2], coef=sign, positions=f"t_inst-{at}") for at in (back, back + 1)]
        shares = np.array(post.logits([p for p, s in zip(prompts, tested, strict=True) if s.true is side], acts, reduce=answers(post)))
        assert np.allclose(shares[:, 0] - shares[:, 1], seen, atol=1e-6), "added to false statements, taken from true ones"


def test_log_odds_lie_on_no_grid_in_a_coarse_number_format(tmp_path):
    """In bfloat16 large logits are whole multiples of a step; while `answering` is open they are what the last states give in float32."""
    model = post_model().to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(60)
    coarse = Local(model, tiny_tokenizer(), name="coarse", weights="coarse")
    examples, tested = few_shot()
    prompts = [in_context(one, examples) for one in tested]

    def seen():
        found = torch.cat(coarse.logits(prompts)).double()
        return found - found[:, :1], [x[0] for x in coarse.logits(prompts, reduce=answers(coarse))]

    (before, shares), different = seen(), lambda x: len(x.round(decimals=5).unique()) / x.numel()
    with answering(coarse) as asked, torch.inference_mode():
        assert asked.identity() != answers(coarse).identity(), "a store tells them apart"
        finer, _ = seen()
        item = coarse.render(prompts[:1])[0]
        states = model.model(torch.tensor([item.ids])).last_hidden_state[0, -1]
        known = states.float() @ model.lm_head.weight.float().T
    assert torch.allclose(finer[0].float(), known - known[0], atol=0.02 * float(known.abs().max()))
    assert different(before) < 0.75 < 0.95 < different(finer)
    after = seen()
    assert torch.equal(after[0], before) and after[1] == shares, "only while it is open"
    stored = Stored(coarse, tmp_path)
    with float32_head(stored) as one, float32_head(Elsewhere()) as other:
        assert (one, other) == (True, False)
    fine = Local(post_model(), tiny_tokenizer(), name="post", weights="post")
    with answering(fine) as asked:
        assert asked == answers(fine), "a model of float32 has nothing to gain"


def test_a_map_is_one_at_the_end_and_zero_before_the_difference(post):
    examples, _ = few_shot()
    pairs = align(post, matched(load("builtin")), examples, 3)
    assert len(set(pairs.names)) == len(pairs.names) and pairs.names[-1] == ":" and "e (2)" in pairs.names, "tokens are bytes here, each with a name of its own"
    assert len(pairs.true) == 3 and pairs.names[0] == "entity 1" and pairs.columns[-1] == 0
    found = patch_map(post, pairs, [0, 2, 4])
    assert found.patched.shape == (len(pairs.true), 3, len(pairs.columns))
    assert np.allclose(found.patched[:, 2, -1], found.true, atol=1e-4), "the last state of all is the whole answer"
    assert np.allclose(found.patched[:, 2, :-1], np.repeat(found.false[:, None], len(pairs.columns) - 1, 1), atol=1e-4)
    assert np.allclose(found.patched[:, 0, -1], found.false, atol=1e-4), "the last token's embedding is the same in both"


def map_of(values, n=12, noise=0.0, seed=0):
    """A map with known effects, [layer, token]; runs lie 4 apart."""
    dice = np.random.default_rng(seed)
    false, true = np.full(n, -2.0), np.full(n, 2.0)
    return Map(
        -2 + 4 * (values[None] + noise * dice.normal(size=(n, *values.shape))), true, false, tuple(range(len(values))), tuple("abcdef"[: values.shape[1]])
    )


def test_binning_makes_unlike_maps_alike():
    """Two maps that share one hot cell and nothing else: the paper's binned form hides the rest."""
    dice = np.random.default_rng(1)
    a, b = (0.3 * dice.random((8, 5)) for _ in range(2))
    a[0, 0] = b[0, 0] = 1.0
    found = alike(a, b, seed=0, draws=200)
    assert found["binned"]["r"] > 0.99 > 0.8 > found["raw"]["r"]
    assert set(np.unique(binned(a))) == {0.0, 1.0} and found["raw"]["cells"] == 40
    unlike = alike(a, 0.3 * dice.random((8, 5)), seed=0, draws=200)
    assert unlike["raw"]["p"] > 0.01 and unlike["raw"]["r"] < unlike["raw"]["null_high"] + 0.2
    assert alike(a, a, seed=0, draws=200)["raw"]["p"] < 0.01


def test_a_map_is_the_share_of_the_way_and_halves_say_how_sure():
    values = np.linspace(0, 1, 12).reshape(4, 3)
    assert np.allclose(map_of(values).of(), values) and not map_of(values).says_nothing
    assert halves_of(map_of(values), 0)["raw"].value == pytest.approx(1)
    assert halves_of(map_of(values, noise=5), 0)["raw"].value < 0.9
    flat = Map(np.zeros((12, 2, 2)), np.zeros(12), np.zeros(12), (0, 1), ("a", "b"))
    assert "too little" in flat.says_nothing


def test_a_tokenizer_that_opens_both_answers_alike_is_refused():
    class Blank:
        name = "blank"

        def first_token(self, text):
            return 0

    with pytest.raises(InputError, match="the same tokens"):
        answers(Blank())
    tiny = make_tiny()
    shares = answers(tiny)
    assert shares.sets[0] == {tiny.first_token("TRUE")} and shares.sets[1] == {tiny.first_token("FALSE")}


# ── neurons ──


def test_entropy_neurons_are_the_planted_ones():
    """Tokens in the first 20 of 24 dimensions: neurons that write into the other four favour none of them."""
    dice = torch.Generator().manual_seed(0)
    tokens = torch.cat([torch.randn(400, 20, generator=dice), torch.zeros(400, 4)], 1)
    writes = torch.randn(200, 24, generator=dice)
    planted = list(range(0, 100, 10))
    for i in planted:
        writes[i, :20], writes[i, 20:] = 0, 3 * writes[i, 20:] / writes[i, 20:].norm() * 4
    found = entropy_neurons(writes, torch.cat([tokens, torch.zeros(30, 24)]))
    assert sorted(found.chosen) == planted and len(found.candidates) == 50 and set(planted) < set(found.candidates)
    cosines = torch.nn.functional.normalize(writes, dim=-1) @ torch.nn.functional.normalize(tokens, dim=-1).T
    assert np.allclose(found.variances, cosines.var(-1, unbiased=False).numpy(), atol=1e-6)


def test_overlap_stands_beside_chance():
    dice = np.random.default_rng(0)

    def one(seed):
        made = torch.Generator().manual_seed(seed)
        return entropy_neurons(torch.randn(160, 8, generator=made), torch.randn(50, 8, generator=made))

    a, b = one(0), one(1)
    found = overlap(a, b)
    drawn = [
        len(set(dice.choice(a.candidates, 10, replace=False)) & set(dice.choice(b.candidates, 10, replace=False))) for _ in range(4000)
    ]  # fmt: skip
    assert found.expected == pytest.approx(np.mean(drawn), abs=0.08)
    assert found.p == pytest.approx(np.mean([x >= len(found.shared) for x in drawn]), abs=0.03)
    assert overlap(a, a).p < 1e-6


def test_the_last_write_is_what_the_model_writes(tiny):
    for family in ("llama", "gpt2", "gpt_neox", "phi3"):
        backend = make_tiny(family)
        writes, tokens = output_matrices(backend)
        assert writes.shape[1] == tokens.shape[1] == backend.d_model and writes.shape[0] in (64, 128)
    backend = make_tiny("gpt2")
    mlp = backend.hf.transformer.h[-1].mlp
    one = torch.zeros(1, 1, 128)
    one[..., 5] = 1
    assert torch.allclose(mlp.c_proj(one)[0, 0] - mlp.c_proj.bias, output_matrices(backend)[0][5], atol=1e-5)
    with pytest.raises(InputError, match="does not lie in this process"):
        output_matrices(Elsewhere())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"views": ("chat",)}, "name both"),
        ({"parts": ()}, "at least one"),
        ({"n_pairs": 0}, "n_pairs=0"),
        ({"steer_window": (0.5, 0.2)}, "ascending"),
        ({"views": ("chat", "role_swap")}, "role_swap"),
        ({"positions": ("user",)}, "mean"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises((ValueError, InputError), match=says):
        Transfer(**settings)


def test_every_base_in_conf_has_the_depth_of_what_is_trained_from_it():
    bases = [name for name in options("model") if name.endswith("_base")]
    pairs = [(name, name.removesuffix("_base")) for name in bases] + [("llama3_1_8b_base", "tulu3_8b")]
    assert len(bases) == 6
    for base, trained in pairs:
        one, other = spec_of(base), spec_of(trained)
        assert one.n_layers == other.n_layers and (one.template, other.template) == ("plain", "chat") and one.id != other.id


def test_what_is_held_out_is_not_fitted_on(data):
    with pytest.raises(InputError, match="must not be fitted on"):
        Transfer(topics=("cities",)).check(4, data)
    with pytest.raises(InputError, match="leave one"):
        Transfer(held_out=tuple({s.topic: 0 for s in load("builtin")})).check(4, data)
    with pytest.raises(InputError, match="layers 0 … 4"):
        Transfer(map_layers=(9,)).check(4, data)


def test_statement_of_no_topic_has_a_name():
    assert Statement("Snow is white.", True, "statements", "x").prompt().harmful is None

"""The benchmark measures what it says and catches a contestant that does other work. No test looks at a time."""

import json
import sys

import pytest
import torch

from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.bench import checks, curves, floors, peers, rows, shapes, work
from latentguard.bench.__main__ import ROWS, chosen_rows, main
from latentguard.bench.contest import Check, Clock, Contestant, Group, Line, Withdrawn, measure, results, table
from latentguard.errors import InputError
from tests.conftest import loud, make_tiny

SMALL = ["--model", "tiny", "--rounds", "1", "--reads", "5", "--prompts", "2", "--tokens", "3"]


def contestant(name, seconds, log=None):
    """One whose rounds take the given seconds."""
    left = list(seconds)

    def timed():
        if log is not None:
            log.append(name)
        taken = left.pop(0)
        if isinstance(taken, BaseException):
            raise taken
        return taken, name

    return Contestant(name, timed)


def right(outputs):
    return Check(True, "right")


def test_ratios_are_taken_within_a_round():
    log = []
    group = Group(
        "g",
        [contestant("a", [1.0, 10.0, 4.0], log), contestant("b", [2.0, 5.0, 8.0], log), contestant("ours", [2.0, 10.0, 2.0], log)],
        [Line("row", "ours", ("a", "b"), right), Line("row", "ours", ("a", "b"), right, "sum")],
    )
    measure(group, 3, lambda text: None)
    best, total = results(group)
    assert log == ["a", "b", "ours", "b", "ours", "a", "ours", "a", "b"]
    assert best["ratios"] == [2.0, 2.0, 0.5] and (best["median"], best["min"], best["max"]) == (2.0, 0.5, 2.0)
    assert best["floor_seconds"] == 4.0  # of 1, 5, 4
    assert total["ratios"] == pytest.approx([2 / 3, 10 / 15, 2 / 12])
    assert "2.000 (0.500–2.000) of 3" in table([best], "CPU s")


def test_one_wrong_round_makes_a_row_wrong():
    verdicts = iter([Check(True, "fine"), Check(False, "off by one"), Check(True, "fine")])
    group = Group("g", [contestant("a", [1] * 3), contestant("b", [1] * 3)], [Line("row", "b", ("a",), lambda outputs: next(verdicts))])
    measure(group, 3, lambda text: None)
    (row,) = results(group)
    assert row["ok"] is False and "WRONG: off by one" in table([row], "CPU s")


def test_an_interruption_keeps_the_rounds_that_were_finished():
    group = Group("g", [contestant("a", [1.0, 1.0]), contestant("b", [3.0, KeyboardInterrupt()])], [Line("row", "b", ("a",), right)])
    with pytest.raises(KeyboardInterrupt):
        measure(group, 2, lambda text: None)
    (row,) = results(group)
    assert row["ratios"] == [3.0]


def test_who_withdraws_takes_only_its_own_lines_along():
    group = Group(
        "g",
        [contestant("a", [1.0, 1.0]), contestant("peer", [Withdrawn("no such option")]), contestant("ours", [2.0, 2.0])],
        [Line("row", "peer", ("a",), right), Line("row", "ours", ("a",), right)],
    )
    measure(group, 2, lambda text: None)
    peer, ours = results(group)
    assert peer["skipped"] == "no such option" and ours["ratios"] == [2.0, 2.0]
    assert "no such option" in table([peer], "s")


def test_a_group_runs_only_what_its_wanted_lines_need():
    group = Group("g", [contestant(name, []) for name in "abc"], [Line("one", "b", ("a",), right), Line("two", "c", ("a",), right)])
    assert [c.name for c in group.wanted(["two"]).contestants] == ["a", "c"]
    assert group.wanted([]).contestants == []


def test_tokens_may_part_only_at_a_tie():
    floor, other = [[(1, 2, 3), (4, 5)]], [[(1, 2, 9), (4, 5)]]
    assert checks.compare_tokens(floor, floor, True).ok is True
    assert checks.compare_tokens(floor, other, True).ok is False
    assert checks.compare_tokens(floor, other, True, lambda cell, row, said: 1e-5 if (cell, row, said) == (0, 0, (1, 2)) else 1.0).ok is True
    assert checks.compare_tokens(floor, other, True, lambda *_: 0.5).ok is False
    assert checks.compare_tokens(floor, [[(1, 2), (4, 5)]], True, lambda *_: 0.5).ok is False  # too short
    assert checks.compare_tokens(floor, [[(1, 2, 3)]], False).ok is False  # a reply is missing, whatever the dtype
    assert checks.compare_tokens(floor, other, False).ok is None and "0.8000 of 5" in checks.compare_tokens(floor, other, False).said


def test_states_scores_and_labels_are_compared():
    states = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert checks.compare_states(states, states + 1e-4, True).ok is True
    assert checks.compare_states(states, states + 1e-2, True).ok is False
    assert checks.compare_states(states, states[:, :2], False).ok is False
    assert checks.compare_states(states, states * float("nan"), False).ok is False
    labels = [["refused", "accepted"], ["accepted", "accepted"]]
    assert checks.compare_labels(labels, labels, True).ok is True
    assert checks.compare_labels(labels, [["accepted", "refused"], ["accepted", "accepted"]], True).ok is False  # the same rate, other prompts
    assert checks.compare_some(labels, {1: ["accepted", "accepted"]}, True).ok is True
    assert checks.compare_some(labels, {0: ["accepted", "accepted"]}, True).ok is checks.compare_some(labels, {}, True).ok is False
    scores, known = [[(7, [-1.0]), (2, [-3.0])]], {(0, 1): [-3.0]}
    assert checks.compare_scores(scores, [[(7, 1), ()]], known, True, frozenset({2}), lambda *_: 1.0).ok is True
    assert checks.compare_scores(scores, [[(7, 1), (5,)]], known, True, frozenset({2}), lambda *_: 1.0).ok is False
    assert checks.compare_scores(scores, [[(7, 1), ()]], {(0, 0): [-1.5]}, True, frozenset({2}), lambda *_: 1.0).ok is False


def test_slopes_and_steps():
    sizes = [64, 128, 256, 1024]
    assert curves.slope(sizes, [3 * size**1.3 for size in sizes]) == pytest.approx(1.3)
    assert curves.local_slopes(sizes, [size**0.5 for size in sizes]) == pytest.approx([0.5] * 3)
    assert curves.largest_step([100, 200, 300, 400], [1, 2, 3, 4]) == pytest.approx(0)
    assert curves.largest_step([100, 200, 300, 400], [1, 3, 3, 4]) == pytest.approx(0.5)


def test_curves_of_the_tiny_model(tiny):
    direction = work.harm_direction(tiny, each=2)
    sizes = {"prompts": [2, 4], "cells": [1, 3], "tokens a prompt": [70, 90]}
    found = curves.measure_curves(tiny, direction, Clock(), 2, lambda text: None, sizes)
    assert list(found["prompts"]) == [2, 4] and all(len(seconds) == 2 for curve in found.values() for seconds in curve.values())
    summary = curves.summary(found)
    assert [row["curve"] for row in summary] == [name for name in sizes for _ in range(2)]
    assert all(len(item) in (69, 70) for item in tiny.render(curves.of_length(tiny, 70, 3)))
    from latentguard.plots.cost import cost_by_size

    figure = cost_by_size(summary, title="t", unit="CPU s").figure
    assert [axis.get_xlabel() for axis in figure.axes] == list(sizes)


def test_prompts_differ_and_come_back_with_their_seed():
    assert len({p.instruction for p in work.harmless(300)}) == 300
    assert work.harmless(5, 1) == work.harmless(5, 1) != work.harmless(5, 2)
    assert all(p.harmful is False for p in work.harmless(3))


@pytest.fixture(scope="module")
def plain():
    return floors.Plain(loud(tiny_model("qwen2")), 256, frozenset({260}))


def hooks_of(plain):
    return [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in plain.blocks]


def test_the_reading_floors_are_transformers_own_states(plain):
    ids = [list(range(40, 40 + n)) for n in (9, 4, 12, 7, 3)]
    alone = [plain.hf(torch.tensor([row]), output_hidden_states=True) for row in ids]
    before = hooks_of(plain)  # transformers' own
    cut, trunk = floors.read_cut(plain, ids, 2, 2), floors.read_trunk(plain, ids, 3)
    assert len(plain.blocks) == 4 and hooks_of(plain) == before
    for i, out in enumerate(alone):
        torch.testing.assert_close(cut[i], out.hidden_states[2][0, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(trunk[i, :4], torch.stack([state[0, -1] for state in out.hidden_states[:4]]), atol=1e-5, rtol=1e-5)
    normed = plain.hf.model.norm(trunk[:, 4])
    torch.testing.assert_close(normed, torch.stack([out.hidden_states[4][0, -1] for out in alone]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("every_step", [False, True])
def test_the_steering_floor_is_a_forward_pass_a_token(plain, every_step):
    ids = [list(range(40, 40 + n)) for n in (9, 4, 12)]
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 3
    with floors.steered(plain, 2, vector, every_step=every_step):
        found = floors.generate(plain, ids, 5, full=True, size=2)
    for prompt, reply in zip(ids, found, strict=True):
        said: list[int] = []
        for _ in range(5):
            logprobs = floors.next_logprobs(plain, prompt, 2, vector, said, every_step=every_step)
            logprobs[260] = -torch.inf  # `full` forbids the end
            said.append(int(logprobs.argmax()))
        assert tuple(said) == reply
    assert found != floors.generate(plain, ids, 5, full=True)


def test_every_row_of_the_tiny_model_is_right(tmp_path, capsys):
    wanted = [row for row in ROWS if row not in ("memory",)]
    assert main([*SMALL, "--rows", ",".join(wanted), "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    (model,) = report["models"]
    by_row = {(row["row"], row["contestant"]): row for row in model["rows"] if "skipped" not in row}
    for row in ("read_one", "read_all", "generate", "sweep"):
        assert by_row[row, "latentguard"]["ok"] is True and len(by_row[row, "latentguard"]["ratios"]) == 1
    assert by_row["grid_full", "latentguard, full"]["ok"] is by_row["grid_logits", "latentguard, scores"]["ok"] is True
    assert by_row["grid_staged", "latentguard, staged"]["ok"] is True and "10 cells scored only" in by_row["grid_staged", "latentguard, staged"]["check"]
    assert by_row["grid_rates", "latentguard, rates"]["ok"] is by_row["second_run", "second"]["ok"] is True
    assert report["machine"]["versions"]["torch"] == torch.__version__ and model["lengths"]["read"] and report["command"]
    assert "| read_one" in capsys.readouterr().out


def test_garbage_fails_the_command(tmp_path, capsys, monkeypatch):
    from latentguard.backends.local import Local

    read = Local.read

    def garbage(self, prompts, layers="all", positions=("t_inst",)):
        found = read(self, prompts, layers, positions)
        if positions == ["t_post_inst"]:
            found.values.mul_(1.5)
        return found

    monkeypatch.setattr(Local, "read", garbage)
    assert main([*SMALL, "--rows", "read_one", "--out", str(tmp_path)]) == 1
    assert "WRONG: max |d|" in capsys.readouterr().out


def test_tokens_of_another_grid_are_caught(tiny, plain):
    made = rows.prepare(tiny, plain, reads=2, prompts=2, tokens=3, coefs=(2.0, 4.0), seed=0)
    bench = rows.Bench(tiny, plain, made, Clock())
    cells = [(layer, coef * made.direction.at(layer)) for layer, coef in made.cells]
    ids = rows.ids_of(tiny, made.answering)
    truth, swapped = floors.grid(plain, ids, cells, 3), floors.grid(plain, ids, cells[::-1], 3)
    assert truth != swapped, "the cells must differ for this test to say anything"
    check = rows.same_tokens(bench, "floor", "ours", cells, False)
    assert check({"floor": truth, "ours": truth}).ok is True
    assert check({"floor": truth, "ours": swapped}).ok is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "reed"], "no such row; choose from read_one"),
        (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--layers", "2"], "give that too"),
        (["--shapes", "gpt9", "--layers", "2"], "choose from llama3_8b"),
        (["--peer-python", "repeng"], "write NAME=/path/to/python"),
        (["--peer-python", "repeng=/nowhere/python"], "there is no program"),
        (["--peers"], "is installed beside latentguard"),
        (["--model", "no_such_model"], "no_such_model"),
    ],
)
def test_wrong_words_are_one_sentence(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "NAMES", ("transformers", "repeng_that_nobody_has") if words == ["--peers"] else peers.NAMES)
    assert main([*words, "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and "Traceback" not in err


def test_rows_by_their_beginnings():
    assert chosen_rows("grid,read_one") == ["grid_full", "grid_rates", "grid_staged", "grid_logits", "read_one"]
    with pytest.raises(InputError, match="empty"):
        chosen_rows(" ,")


FAKE = """
import json, sys
for line in sys.stdin:
    job = json.loads(line)
    if job["do"] == "load":
        answer = {"fake": "1.0", "folder": job["folder"]}
    elif job["do"] == "read_one":
        import numpy
        numpy.save(job["out"], numpy.full((len(job["ids"]), 3), 7.0, dtype="float32"))
        answer = {"seconds": 2.5, "said": None}
    elif job["do"] == "generate":
        answer = {"seconds": 1.5, "said": [[[1, 2]] * len(job["ids"])]}
    else:
        sys.exit("this peer cannot " + job["do"])
    print(json.dumps(answer), flush=True)
"""


def test_the_worker_protocol(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    peer = peers.Peer("fake", sys.executable, tmp_path / "model", tmp_path, 1, script)
    seconds, states = peer.timed({"do": "read_one", "ids": [[1], [2]]})
    assert seconds == 2.5 and states.shape == (2, 3) and peer.versions["fake"] == "1.0"
    assert peer.timed({"do": "generate", "ids": [[1]]}) == (1.5, [[[1, 2]]])
    with pytest.raises(Withdrawn, match="fake failed at sweep: this peer cannot sweep"):
        peer.timed({"do": "sweep"})
    assert peer.timed({"do": "generate", "ids": [[1]]})[0] == 1.5  # started anew
    peer.close()


def test_peers_are_judged_like_us(tmp_path, tiny, plain):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    made = rows.prepare(tiny, plain, reads=2, prompts=2, tokens=3, coefs=(2.0, 4.0), seed=0)
    bench = rows.Bench(tiny, plain, made, Clock())
    groups = [*rows.reading(bench), rows.generating(bench), rows.sweep(bench)]
    peer = peers.Peer("fake", sys.executable, tmp_path / "model", tmp_path, 1, script)
    peers.enter(groups, [peer], bench)
    read_one, _, generate, sweep = groups
    for group in (read_one, generate, sweep):
        measure(group, 1, lambda text: None)
    found = {(row["row"], row["contestant"]): row for group in (read_one, generate, sweep) for row in results(group)}
    assert found["read_one", "fake"]["ok"] is False and found["generate", "fake"]["ok"] is False
    assert "cannot sweep" in found["sweep", "fake"]["skipped"]
    assert all(found[row, "latentguard"]["ok"] is True for row in ("read_one", "generate", "sweep"))
    peer.close()


def test_a_folder_for_older_readers_keeps_the_rope(tmp_path):
    folder = tmp_path / "new"
    model = tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 123456.0})
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    made = peers.older(folder, tmp_path / "old")
    config = json.loads((made / "config.json").read_text())
    assert config["rope_theta"] == 123456.0 and config["rope_scaling"] is None and config["torch_dtype"] == "float32"
    assert (made / "model.safetensors").is_symlink() and (made / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    old = json.loads((made / "tokenizer_config.json").read_text())
    assert old["tokenizer_class"] == "PreTrainedTokenizerFast" and {**old, "tokenizer_class": 0} == {**said, "tokenizer_class": 0}


def test_shapes_and_their_bounds():
    backend, plain = shapes.make("llama3_8b", layers=3, d_model=64, dtype=torch.float32)
    assert backend.n_layers == 3 and next(plain.hf.parameters()) is next(backend.hf.parameters()), "one set of weights"
    assert plain.hf.model.layers[0] is not backend.hf.model.layers[0], "modules of their own"
    made = rows.prepare(backend, plain, reads=3, prompts=2, tokens=4, coefs=(1.0,), seed=0, more=0)
    bench = rows.Bench(backend, plain, made, Clock())
    slow, fast = shapes.bounds(bench, 1e9, 1e9), shapes.bounds(bench, 1e9, 2e9)
    assert all(slow[row] == pytest.approx(2 * fast[row]) for row in ("read_one", "read_all", "grid_logits"))
    assert slow["read_all"] == pytest.approx(3 / made.layer * slow["read_one"])
    weights = 4 * sum(p.numel() for p in [*plain.blocks.parameters(), plain.hf.lm_head.weight])
    assert shapes.bounds(bench, 1e6, 1e15)["generate"] == pytest.approx(3 * weights / 1e6, rel=1e-3)
    groups = rows.reading(bench)
    shapes.bound(groups, slow)
    assert [line.over for line in groups[0].lines][-1] == shapes.BOUND


def test_full_shapes_ask_for_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(InputError, match="--layers 2 --d-model 256"):
        shapes.make("llama3_8b", layers=None, d_model=None, dtype=torch.float32)
    with pytest.raises(InputError, match="multiple of 64"):
        shapes.settings_of("llama3_8b", 2, 100)


def test_a_quantised_model_has_no_floor():
    from latentguard.weights import spec_of

    with pytest.raises(InputError, match="quantised"):
        floors.load_plain(spec_of("tiny", quantization={"quant_method": "gptq"}), dtype=torch.float32, device=torch.device("cpu"), pad=0, eos={1})


def test_the_floor_is_not_the_backends_model():
    backend = make_tiny()
    apart = floors.load_plain(rows_spec(), dtype=torch.float32, device=torch.device("cpu"), pad=backend.pad, eos=backend.eos)
    assert apart.hf is not backend.hf


def rows_spec():
    from latentguard.weights import spec_of

    return spec_of("tiny")

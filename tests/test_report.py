"""Pages of runs, sweeps and comparisons: complete, in order, honest about what failed, and silent about replies when asked."""

import dataclasses
import fcntl
import json
import re
from collections.abc import Mapping
from statistics import mean

import pytest

from latentguard import published
from latentguard.errors import InputError
from latentguard.pages import Facts, Picture, Replies, Sheet
from latentguard.report import comparison, paper, sweep, wording
from latentguard.report.__main__ import main
from latentguard.report.listing import listing
from latentguard.report.page import run_page, write_report
from latentguard.report.replies import called, condition, replies
from latentguard.report.runs import read_run, read_runs, waiting, words
from tests import folders
from tests.folders import REPLY, rate, some_rows


def a_run(folder, **about):
    """Of a study that the paper has nothing to print beside: its curves are drawn in one test only."""
    return folders.a_run(folder, **{"study": "mine", **about})


def a_sweep(folder, **about):
    return folders.a_sweep(folder, **{"studies": ("mine", "yours"), **about})


def effect(number, verdict="holds", **about):
    return {"effect": number, "verdict": verdict, "number": 0.62, "low": 0.47, "high": 0.76, "n": 40, "why": "measured", **about}


def part(study, **about):
    return {"study": study, "status": "ok", "claim": f"{study} claims 0.5.", "table": [], "figures": [], "effects": [], "poles": "behaviour", **about}


def series(folder, studies, **about):
    summary = {"study": "paper", "studies": studies, "table": [], "effects": [], "figures": [], "claim": "All ran.", **about}
    return read_run(a_run(folder, study="paper", summary=summary))


def texts(value):
    """Every text anywhere in a page."""
    if isinstance(value, str):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from texts(getattr(value, field.name))
    elif isinstance(value, Mapping):
        yield from texts(list(value.items()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)


def blocks(page, kind):
    return [block for section in page.sections for block in (*section.blocks, *section.beside) if isinstance(block, kind)]


def sheet(page, title):
    (found,) = [block for block in blocks(page, Sheet) if block.title == title]
    return found


# ── A run ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_runs_page_has_everything_in_the_readers_order(tmp_path):
    run = read_run(a_run(tmp_path / "run", seed=2, overrides=["exp.coefs=[1,2]"]))
    page = run_page(run, tmp_path / "run")
    assert page.lead == run.summary["claim"]
    assert [section.name for section in page.sections] == ["The command", "What was found", "Replies", "Controls, and what did not work", "What made it"]
    assert page.sections[0].blocks[0].text == "python -m latentguard.run model=tiny exp=mine seed=2 'exp.coefs=[1,2]'"
    assert [picture.name for picture in blocks(page, Picture)][:2] == ["refusal_by_layer", "refusal_by_coefficient"]
    assert all(picture.still.is_file() and picture.rows for picture in blocks(page, Picture))
    facts = dict(pair for block in blocks(page, Facts) for pair in block.pairs)
    assert facts["seed"] == "2" and facts["data hash"] == "adc96905d44f08e2" and facts["weights"] == "f9" * 16 and facts["torch"] == "2.13.0"
    assert ["exp.coefs", "[1.0, 2.0]"] in sheet(page, "Every setting").rows
    assert [row[0] for row in sheet(page, "Controls").rows] == ["random"]


def test_the_page_is_written_whole_beside_its_twin(tmp_path):
    folder = a_run(tmp_path / "run")
    page = write_report(folder)
    assert page == folder / "report.html" and page.read_text().startswith("<!doctype html>")
    markdown = (folder / "report.md").read_text()
    links = re.findall(r"\]\(([^)#]+\.(?:png|svg))\)", markdown)
    assert links and all((folder / link).is_file() for link in links)
    assert not list(folder.glob(".report*"))


@pytest.mark.parametrize("full", [True, False])
def test_what_the_model_said_is_kept_back_when_asked(tmp_path, full):
    folder = a_run(tmp_path / "run", summary={"figures": ["refusal_by_layer", "replies"]})
    page = run_page(read_run(folder), folder, full=full)
    assert any(REPLY in text for text in texts(page)) == full
    write_report(folder, full=full, out=tmp_path / "out")
    assert not full or any(reply for *_, reply, _, _ in blocks(page, Replies)[0].said)
    if not full:
        assert REPLY not in (tmp_path / "out" / "report.html").read_text() and REPLY not in (tmp_path / "out" / "report.md").read_text()
        assert {verdict for *_, verdict, _ in blocks(page, Replies)[0].said} == {"refused", "accepted"}, "the verdicts stay"


def test_what_failed_and_what_was_withheld_stand_in_one_place(tmp_path):
    run = series(
        tmp_path / "run",
        {
            "jailbreaks": part("jailbreaks", status="insufficient_base_rate", poles="label", effects=[effect(12, "not testable here", why="thin cell")]),
            "finetune_attack": {"status": "skipped", "why": "left out by default"},
            "ablate_refusal": {"status": "failed", "why": "no direction passed"},
            "suffix": part("suffix", effects=[effect(1, "does not hold", why="no drop")], table=[{"intervention": "harm", "works": False, **rate(3, 9)}]),
        },
    )
    (against,) = [section for section in run_page(run, run.folder).sections if section.name.startswith("Controls")]
    told = " ".join(texts(against))
    for words_ in ("left out by default", "no direction passed", "claim withheld", "Effect 1 does not hold", "no drop", "thin cell", "no setting works"):
        assert words_ in told


@pytest.mark.parametrize("state", ["failed", "unfinished"])
def test_a_run_without_an_end_says_so(tmp_path, state):
    run = read_run(a_run(tmp_path / "run", state=state))
    assert run.state == state and not run.finished
    page = run_page(run, run.folder)
    assert ("made to fail" if state == "failed" else "resume=") in page.lead
    assert page.lead in " ".join(texts(page.sections[-2])), "and among what did not work"


def test_a_run_that_goes_on_is_not_called_stopped(tmp_path):
    folder = a_run(tmp_path / "run", state="unfinished")
    with (folder / "run.log").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run = read_run(folder)
        assert run.state == "running" and "resume" not in run.claim
    assert read_run(folder).state == "unfinished"


def test_a_cut_last_row_is_left_out_and_a_broken_one_named(tmp_path):
    run = read_run(a_run(tmp_path / "run", state="unfinished"))
    assert len(list(run.rows())) == len(some_rows()) - 1
    path = run.folder / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 2}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2"):
        list(run.rows())


def test_bytes_that_are_no_text_are_shown_not_fatal(tmp_path):
    folder = a_run(tmp_path / "run")
    with (folder / "rows.jsonl").open("ab") as file:
        file.write(b'{"prompt_id": "x", "prompt": "\xff\xfe", "label": "harmless", "verdict": "accepted", "reply": "\xc3"}\n')
    assert write_report(folder).is_file()
    assert [row["prompt"] for row in read_run(folder).rows()][-1] == "\udcff\udcfe"


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda folder: (folder / "summary.json").write_text("{"), r"summary\.json: not JSON"),
        (lambda folder: (folder / "summary.json").write_text("[]"), r"summary\.json: a JSON object"),
        (lambda folder: (folder / ".hydra" / "config.yaml").write_text("a: [\n"), r"config\.yaml: not YAML"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, spoil, match):
    folder = a_run(tmp_path / "run")
    spoil(folder)
    with pytest.raises(InputError, match=match):
        write_report(folder)


def test_a_folder_made_from_python_has_a_page_too(tmp_path):
    """Files(folder) leaves neither .hydra nor environment.json."""
    (tmp_path / "summary.json").write_text(json.dumps({"claim": "Half.", "table": [{"what": "a", **rate(1, 2)}]}))
    page = run_page(read_run(tmp_path), tmp_path)
    assert "Half." in page.lead or not read_run(tmp_path).finished
    assert write_report(tmp_path).is_file()


# ── The paper's side ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_effect_has_a_verdict_and_none_goes_untold(tmp_path):
    skipped = {"study": "finetune_attack", "status": "skipped", "why": "left out by default"}
    run = series(
        tmp_path / "run",
        {"suffix": part("suffix", effects=[effect(1)]), "again": part("suffix", effects=[effect(1, "does not hold")]), "finetune_attack": skipped},
    )
    table = sheet(run_page(run, run.folder), "The paper's fourteen effects")
    rows = {}
    for row in table.rows:
        rows.setdefault(int(row[0]), []).append(row)
    assert set(rows) == set(range(1, 15))
    assert [row[2] for row in rows[1]] == ["holds", "does not hold"] and rows[1][0][3] == "0.62 [0.47, 0.76] (n = 40)"
    assert "(again)" in rows[1][1][4]
    assert all(rows[i][0][2] == "not asked" for i in range(2, 15))
    assert "left out by default" in rows[13][0][4] and "jailbreaks" in rows[12][0][4]


def test_the_papers_side_shows_its_numbers(tmp_path):
    run = series(tmp_path / "run", {name: part(name) for name in paper.PAPER})
    page = run_page(run, run.folder)
    rows = [row for block in blocks(page, Sheet) for row in block.rows]
    assert ["Llama-3", "96.0", "58.9"] in rows
    assert ["Llama-2", "Latent Guard", "100.0", "41.6 (10/24)", "100.0", "100.0", "93.9 (31/33)"] in rows
    assert ["accepted harmful", "0", "0.025", "0.036", "0.046"] in rows
    assert ["hate", "0.60", "0.89", "0.68", "0.93", "0.81", "0.95"] in rows
    assert ["template", "0.097", "−0.075", "100", "27"] in [row[1:] for row in rows]
    pictures = {picture.name: picture for picture in blocks(page, Picture)}
    for name, figures in {"steering": ("4", "8"), "inversion": ("5", "10", "11", "12"), "positions": ("16",), "fine_tuning": ("18",)}.items():
        wanted = [curve for number in figures for curve in published.curves(number)]
        drawn = sorted(float(row["rate"]) for row in pictures[f"paper_{name}"].rows)
        assert drawn == sorted(value / 100 for curve in wanted for value in curve.values)


def test_the_papers_numbers_in_the_table_of_effects_are_published_ones():
    known = {round(abs(v), 3) for name in published.tables() for row in published.table(name).rows for v in row.values() if isinstance(v, int | float)}
    known |= {value for number in published.figures() for curve in published.curves(number) for value in curve.values}
    rows = published.table("fig9a").rows
    known |= {
        round(mean(r["value"] for r in rows if (r["model"], r["direction"]) == (model, kind)) + 1e-9, 2)
        for model in published.models()
        for kind in ("harm", "refuse")
    }
    known |= {0.02, 50, 400}  # the spread of Fig. 7's curves, which stands in that table's note
    for _, printed, _ in paper.EFFECTS.values():
        for number in re.findall(r"\d+(?:\.\d+)?", re.sub(r"Llama-\d|Qwen2", "", printed)):
            assert float(number) in known, f"{number} of {printed!r} is not in published.json"


@pytest.mark.parametrize("wrong", [{"status": "fine"}, {"effects": [effect(15)]}, {"effects": [effect(1, "maybe")]}])
def test_a_summary_that_breaks_the_contract_is_refused(tmp_path, wrong):
    run = series(tmp_path / "run", {"suffix": part("suffix", **wrong)})
    with pytest.raises(InputError, match="study suffix"):
        run_page(run, run.folder)


# ── Numbers and tables ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_numbers_swallow_their_intervals(tmp_path):
    rows = [{"set": "a", "layer": 3, **rate(7, 12)}, {"set": "b", "layer": -1, **rate(0, 0)}]
    told = wording.sheet("", rows)
    assert list(told.columns) == ["set", "layer", "rate [95% interval]", "n"]
    assert told.rows == [["a", "3", "0.58 [0.32, 0.81]", "12"], ["b", "−1", "—", "0"]]
    own = wording.sheet(
        "", [{"group": "g", "n": 5, "delta_harmful": 0.1, "harmful_low": 0.0, "harmful_high": 0.2, "auroc": 0.9, "auroc_low": 0.8, "auroc_high": 1.0}]
    )
    assert own.rows == [["g", "0.10 [0.00, 0.20]", "0.90 [0.80, 1.00]", "5"]]


def test_every_number_of_a_table_has_a_name_of_its_own():
    rows = [{"detector": "guard", "group": g, "layer": 3, **rate(k, 9), "auroc": 0.9, "auroc_low": 0.8, "auroc_high": 1.0} for g, k in (("a", 1), ("b", 2))]
    found = wording.measures(rows)
    assert list(found) == ["guard · a", "guard · a · auroc", "guard · b", "guard · b · auroc"]
    assert found["guard · b"]["value"] == rate(2, 9)["rate"] and found["guard · a · auroc"]["low"] == 0.8


# ── Replies ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_replies_stand_beside_each_other_by_prompt_and_condition():
    told = replies(some_rows(4), full=True)
    assert len(told.prompts) == 4 and told.conditions == ["test: no steering", "test: + harm · layer 4 · ×2", "test: + random · layer 4 · ×2"]
    assert told.shown == [0, 1, 2] and len(told.said) == 12
    for place, which, reply, verdict, _ in told.said:
        assert reply == f"{REPLY} {place}" and verdict == ("refused" if which == 1 or told.prompts[place]["label"] == "harmful" else "accepted")


def test_the_same_answer_asked_for_in_two_studies_stands_once():
    rows = [{**row, "study": study, "stage": "roles"} for study in ("a", "b") for row in some_rows(2) if row["intervention"] == "none"]
    assert len(replies(rows, full=True, series=True).said) == 2
    assert condition({**rows[0], "stage": "test"}, study=True) != condition({**rows[1], "stage": "test", "study": "b"}, study=True)


def test_a_condition_is_called_by_what_was_done():
    assert (
        called((("study", "steer_harm"), ("stage", "grid"), ("intervention", "-refuse"), ("layer", 3), ("coef", -1.5)))
        == "steer harm, grid: -refuse · layer 3 · ×−1.5"
    )
    assert called((("intervention", "none"),)) == "no steering"


def test_too_many_replies_are_cut_and_said_so(monkeypatch):
    monkeypatch.setattr("latentguard.report.replies.MOST", 5)
    told = replies(some_rows(4), full=True)  # three columns of four
    assert len(told.said) == 4 and told.conditions == ["test: no steering"] and told.shown == [0]
    assert "1 of 3 columns" in told.note and "4 of 12 replies" in told.note


# ── Comparisons ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def judged(n, refused, **about):
    """n prompts, the first `refused` of them refused."""
    return [
        {"prompt_id": f"p{i}", "prompt": "x", "label": "harmless", "verdict": "refused" if i < refused else "accepted", "reply": "", **about} for i in range(n)
    ]


def compare(tmp_path, first, second, **about):
    runs = [read_run(a_run(tmp_path / name, rows=rows, model=about.get(name, "tiny"))) for name, rows in (("one", first), ("two", second))]
    return comparison.differences(*runs)


def test_a_planted_difference_is_found_on_the_pairs_alone(tmp_path):
    lonely = judged(40, 40, intervention="only_here")  # nothing to pair it with
    rows = compare(tmp_path, judged(60, 10, intervention="none") + lonely, judged(50, 30, intervention="none"))
    (row,) = rows
    assert row["n"] == 50 and row["value"] == pytest.approx(20 / 50) and row["low"] > 0
    assert row["first"] == pytest.approx(10 / 50) and row["second"] == pytest.approx(30 / 50)


def test_a_run_against_itself_differs_nowhere(tmp_path):
    rows = compare(tmp_path, some_rows(20), some_rows(20))
    assert rows and all(row["value"] == 0 and row["low"] <= 0 <= row["high"] for row in rows)


def test_layers_and_draws_do_not_keep_a_prompt_from_its_pair(tmp_path):
    first = judged(30, 10, intervention="harm", layer=3, coef=1.0)
    second = [row for draw in range(3) for row in judged(30, 10 * draw, intervention="harm", layer=9, coef=2.0, draw=draw)]
    (row,) = compare(tmp_path, first, second)
    assert row["n"] == 30 and row["second"] == pytest.approx(1 / 3) and row["value"] == pytest.approx(0)


def test_raw_scores_are_compared_within_a_model_only(tmp_path):
    scored = [{"prompt_id": f"p{i}", "score": float(i), "detector": "guard"} for i in range(12)]
    assert [row["measure"] for row in compare(tmp_path, scored, scored)] == ["score"]
    (tmp_path / "x").mkdir()
    assert compare(tmp_path / "x", scored, scored, two="another") == []


def test_the_comparison_says_how_many_differ_and_how_many_would_by_chance(tmp_path):
    runs = [read_run(a_run(tmp_path / name, rows=judged(60, k, intervention="none"), seed=s)) for name, k, s in (("one", 5, 0), ("two", 40, 1))]
    page = comparison.comparison_page(runs, tmp_path / "cmp")
    assert "1 of 1 paired differences" in page.lead and "by chance" in page.lead
    assert page.title == "Comparison: tiny · seed 0 and tiny · seed 1"
    assert (tmp_path / "cmp" / "figures" / "differences_1.png").is_file() and (tmp_path / "cmp" / "figures" / "both_refusal_by_layer.csv").is_file()
    assert ["seed", "0", "1"] in [row for block in blocks(page, Sheet) for row in block.rows]


def test_runs_without_a_common_prompt_say_so(tmp_path):
    runs = [read_run(a_run(tmp_path / name, rows=judged(5, 1, stage=name), study=name)) for name in ("one", "two")]
    page = comparison.comparison_page(runs, tmp_path / "cmp")
    assert "nothing can be paired" in page.lead
    with pytest.raises(InputError, match="two runs or more"):
        comparison.comparison_page(runs[:1], tmp_path / "cmp")


# ── Sweeps ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sweeps_page_has_every_job_and_the_spread_over_seeds(tmp_path):
    folder = a_sweep(tmp_path / "sweep", without=[11])
    runs = read_runs(folder)
    page = sweep.sweep_page(folder, runs, folder)
    assert len(runs) == 11 and waiting(folder) == ["model=small exp=yours seed=2"]
    assert len(sheet(page, "Every job").rows) == 11 and page.lead.startswith("11 of 12 jobs are done: 2 models, 2 studies")
    spread = sheet(page, "Over seeds: the mean, and in brackets the least and the most").rows
    assert len(spread) == 4 and spread[0][2] == "0.75 [0.67, 0.83]" and spread[0][3] == "3"
    assert "seed=2: never begun" in " ".join(texts(page))
    assert "seed=0,1,2" in page.sections[0].blocks[0].text or "seed=1,2" in page.sections[0].blocks[0].text
    assert write_report(folder) == folder / "report.html"


def test_names_tell_runs_apart_and_say_no_more(tmp_path):
    runs = read_runs(a_sweep(tmp_path / "sweep", models=("a", "b"), studies=("s",), seeds=(0,)))
    assert words(runs) == ["a", "b"]
    twice = [read_run(a_run(tmp_path / name, overrides=over)) for name, over in (("x", ["exp.n=1"]), ("y", ["exp.n=2"]), ("z", ["exp.n=2"]))]
    assert words(twice) == ["tiny · exp.n=1", "tiny · exp.n=2 (y)", "tiny · exp.n=2 (z)"]


def test_a_sweep_keeps_back_replies_too(tmp_path):
    folder = a_sweep(tmp_path / "sweep", seeds=(0,))
    assert any(REPLY in text for text in texts(sweep.sweep_page(folder, read_runs(folder), folder)))
    assert not any(REPLY in text for text in texts(sweep.sweep_page(folder, read_runs(folder), folder, full=False)))


# ── The list and the command ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_list_names_runs_and_sweeps_with_their_headlines(tmp_path):
    a_run(tmp_path / "alone")
    a_sweep(tmp_path / "sweep", models=("m",), studies=("s",), seeds=(0, 1), without=[1])
    (tmp_path / "other").mkdir()
    text = listing(tmp_path, width=110)
    lines = text.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 110
    assert any("alone" in line and "refusal of harmless" in line for line in lines) and any("sweep" in line and "1/2" in line for line in lines)
    assert "No runs under" in listing(tmp_path / "other")


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        (["{}/none"], "no such folder"),
        (["{}"], "no run is here"),
        ([], "name the folder"),
        (["--list", "{}/none"], "no such folder"),
        (["{}/run", "{}/run"], "named twice"),
        (["{}/run", "--dry-run"], "go with --wandb"),
    ],
)
def test_bad_words_are_one_sentence(tmp_path, capsys, asked, match):
    a_run(tmp_path / "here" / "run")
    (tmp_path / "here" / "run").rename(tmp_path / "run")
    (tmp_path / "here").rmdir()
    for name in ("x",):
        (tmp_path / name).mkdir()
    words_ = [word.format(tmp_path if word != "{}" else tmp_path / "x") for word in asked]
    assert main(words_) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("latentguard: ") and match in said and len(said.splitlines()) == 1


def test_the_command_writes_what_it_says(tmp_path, capsys):
    for name in ("a", "b"):
        a_run(tmp_path / name)
    assert main([str(tmp_path / "a")]) == 0 and (tmp_path / "a" / "report.html").is_file()
    assert main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0 and (tmp_path / "compare_a_b" / "report.html").is_file()
    assert main([str(tmp_path / "a"), "--generations", "verdicts", "--out", str(tmp_path / "shared")]) == 0
    assert (tmp_path / "shared" / "report.html").is_file() and str(tmp_path / "shared") in capsys.readouterr().out


def test_the_command_names_the_folder_of_a_users_own_options(tmp_path):
    folder = a_run(tmp_path / "run")
    told = {
        "job": {"config_name": "config"},
        "runtime": {"config_sources": [{"path": "/my/conf", "provider": "command-line"}, {"path": "x", "provider": "main"}]},
    }
    (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": told}))
    assert read_run(folder).command == "python -m latentguard.run --config-dir /my/conf model=tiny exp=mine"


# ── What a hostile reader found ─────────────────────────────────────────────────────────────────────────────────────────


def test_each_run_of_a_sweep_keeps_its_own_replies(tmp_path):
    folder = tmp_path / "sweep"
    folder.mkdir()
    for number, (model, refused) in enumerate((("a", 5), ("b", 0))):
        a_run(folder / f"{number}_mine_{model}", model=model, rows=judged(5, refused, stage="roles", intervention="none"))
    (told,) = blocks(sweep.sweep_page(folder, read_runs(folder), folder), Replies)
    counts = {name: sum(verdict == "refused" for _, which, _, verdict, _ in told.said if which == i) for i, name in enumerate(told.conditions)}
    assert counts == {"a, roles: no steering": 5, "b, roles: no steering": 0}


def test_a_setting_that_is_the_same_all_through_a_run_keeps_nothing_from_its_pair(tmp_path):
    rows = {mark: [{"stage": "validation", "layer": 1}, *judged(20, 5, intervention="none", stage="test", terminal=mark)] for mark in ("period", "keep")}
    (row,) = compare(tmp_path, rows["period"], rows["keep"])
    assert row["n"] == 20 and row["value"] == 0


def test_few_pairs_are_told_of_by_no_interval(tmp_path):
    assert compare(tmp_path, judged(9, 3), judged(9, 0)) == []


def test_a_difference_that_all_pairs_share_has_an_interval_all_the_same():
    found = comparison._difference([0.5] * 12, [1.0] * 12)
    assert found.value == -0.5 and found.low < -0.5 < found.high


def test_neither_a_flag_nor_a_nan_is_compared(tmp_path):
    rows = [{"prompt_id": f"p{i}", "harmful": i % 2 == 0, "refuse": float("nan") if i == 0 else 0.5} for i in range(12)]
    assert [(row["measure"], row["n"]) for row in compare(tmp_path, rows, rows)] == [("Δ_refuse", 11)]


def test_runs_of_one_folder_name_stay_two(tmp_path):
    runs = [read_run(a_run(tmp_path / name / "0_mine_tiny")) for name in ("one", "two")]
    assert words(runs) == ["tiny (0_mine_tiny), one", "tiny (0_mine_tiny), two"]


def test_a_sweeps_first_sentence_tells_of_failure_and_of_claims_withheld(tmp_path):
    folder = a_sweep(tmp_path / "sweep", models=("m",), studies=("mine",), seeds=(0, 1, 2))
    for number, state in ((0, "failed"), (1, "insufficient_base_rate")):
        path = folder / f"{number}_mine_m" / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "status": state, "why": "so"}))
    assert sweep.sweep_page(folder, read_runs(folder), folder).lead.startswith("2 of 3 jobs are done, 1 failed, 1 with the claim withheld")


def test_the_reason_of_a_failure_is_kept_back_with_the_replies(tmp_path):
    """An error of a judge may quote what it judged."""
    run = series(
        tmp_path / "run", {"suffix": {"status": "failed", "why": f"cannot judge {REPLY}"}, "beliefs": part("beliefs")}, claim=f"suffix failed: {REPLY}"
    )
    assert any(REPLY in text for text in texts(run_page(run, run.folder)))
    assert not any(REPLY in text for text in texts(run_page(run, run.folder, full=False)))


@pytest.mark.parametrize("wrong", [{"table": None}, {"effects": {}}, {"studies": []}, {"seconds": "long"}, {"headline": 3}, {"table": [1]}])
def test_a_summary_of_another_shape_is_one_sentence(tmp_path, wrong):
    with pytest.raises(InputError, match=r"summary\.json"):
        read_run(a_run(tmp_path / "run", summary=wrong))


def test_a_chart_that_is_not_understood_leaves_its_picture(tmp_path):
    folder = a_run(tmp_path / "run")
    path = folder / "figures" / "index.json"
    told = json.loads(path.read_text())
    told["refusal_by_layer"]["chart"] = {"kind": "spiral", "turns": 3}
    path.write_text(json.dumps(told))
    drawn = read_run(folder).figures["refusal_by_layer"]
    assert drawn.chart is None and drawn.still is not None


def test_numbers_far_below_one_keep_their_figures():
    assert wording.interval(2e-5, 1e-5, 3e-5) == "2e−05 [1e−05, 3e−05]"
    row = {"change": 0.1, "change_low": 0.0, "change_high": 0.2, "delta_change": 0.5, "delta_change_low": 0.4, "delta_change_high": 0.6}
    assert wording.bounds(row) == {"change": ("change_low", "change_high"), "delta_change": ("delta_change_low", "delta_change_high")}

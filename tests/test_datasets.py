"""Prompt sets: the built-in one, files, mirrors; groups never straddle a split."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

from latentguard.configs import options
from latentguard.datasets import ROLES, SPLITS, load_dataset
from latentguard.errors import InputError
from latentguard.prompts import Prompt, as_prompts, set_terminal
from tests.conftest import SHARED


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_builtin_set_is_what_it_says():
    data = load_dataset("builtin")
    every = list(data)
    assert len([p for p in every if p.label == "harmful"]) >= 160
    assert len([p for p in every if p.label == "harmless"]) >= 160
    assert len([p for p in every if p.label == "lookalike"]) >= 80
    assert len({re.sub(r"\W+", " ", p.instruction.lower()) for p in every}) == len(every)
    assert all(p.category and p.terminal == "period" and p.instruction.endswith(".") for p in every)
    twins = {}
    for p in every:
        twins.setdefault(p.group, {})[p.label] = p
    for pair in twins.values():
        assert {"harmful", "harmless"} <= pair.keys()
        assert abs(len(pair["harmful"].instruction.split()) - len(pair["harmless"].instruction.split())) <= 3
    assert not re.search(r"\b(child|children|kid|kids|teen|minor|boy|girl|toddler)s?\b", " ".join(p.instruction.lower() for p in every if p.harmful))


@pytest.mark.parametrize("name", ["builtin", "file"])
def test_groups_never_straddle(name, tmp_path):
    rows = [{"prompt": f"request {i // 3} in words {i}", "label": ["harmful", "harmless"][i % 2], "group": f"g{i // 3}"} for i in range(300)]
    data = load_dataset(name) if name == "builtin" else load_dataset(write(tmp_path / "mine.jsonl", rows))
    groups = [{p.group for p in getattr(data, split)} for split in SPLITS]
    assert all(groups) and not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert data.hash == (load_dataset(name) if name == "builtin" else load_dataset(str(tmp_path / "mine.jsonl"))).hash


def test_only_equal_prompts_are_one(tmp_path):
    texts = ["What is C++?", "What is C#?", "What is C?", "Say 5+3.", "Say 5-3.", "what is  c?"]
    data = load_dataset(write(tmp_path / "a.jsonl", [{"prompt": text, "label": "harmless"} for text in texts]))
    assert len(list(data)) == 5
    for history in ("a", "b"):
        talk = [{"messages": [{"role": "user", "content": h}, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "go on"}], "label": label} for h, label in (("a", "harmless"), (history, "harmful"))]  # fmt: skip
        path = write(tmp_path / "b.jsonl", talk)
        if history == "b":
            assert len(list(load_dataset(path))) == 2
        else:
            with pytest.raises(InputError, match="equal but labelled"):
                load_dataset(path)


def test_csv_keeps_odd_line_marks_and_ids(tmp_path):
    (tmp_path / "a.csv").write_text('id,prompt,label\n0,"one\u2028two",harmful\n1,"three\nfour",harmless\n', encoding="utf-8")
    assert sorted((p.id, p.instruction) for p in load_dataset(str(tmp_path / "a.csv"))) == [("0", "one\u2028two."), ("1", "three\nfour.")]


def test_terminal_marks():
    for text, keep, strip, period in (
        ("Why?! ", "Why?! ", "Why", "Why."),
        ("Go", "Go", "Go", "Go."),
        ("a.b.", "a.b.", "a.b", "a.b."),
        ("Hm ...", "Hm ...", "Hm", "Hm."),
    ):
        for terminal, wanted in (("keep", keep), ("strip", strip), ("period", period)):
            done = set_terminal(Prompt.of(text), terminal)
            assert (done.instruction, done.terminal) == (wanted, terminal)
    assert set_terminal(Prompt.of("really?", exempt=True), "period").instruction == "really?"
    talk = as_prompts([{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c?"}])[0]
    assert (set_terminal(talk, "period").instruction, set_terminal(talk, "period").terminal) == ("c?", "exempt")
    with pytest.raises(InputError, match="only punctuation"):
        set_terminal(Prompt.of("?!"), "period")


def test_files_of_a_users_own(tmp_path):
    jsonl = write(tmp_path / "a.jsonl", [{"q": "do it now", "y": "unsafe", "kind": "x"}, {"q": "hello there", "y": "safe"}])
    data = load_dataset(jsonl, text="q", label_field="y", category="kind", split=(0.0, 0.0, 1.0))
    assert [(p.instruction, p.label, p.category) for p in data.test] == [("do it now.", "harmful", "x"), ("hello there.", "harmless", "")]
    (tmp_path / "b.csv").write_text('prompt,label\n"one, two",harmful\nthree?,lookalike\n', encoding="utf-8-sig")
    assert sorted(p.label for p in load_dataset(str(tmp_path / "b.csv"))) == ["harmful", "lookalike"]
    talk = [{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u?"}], "label": "harmful"}]
    assert [p.instruction for p in load_dataset(write(tmp_path / "c.jsonl", talk))] == ["u?"]
    split = [{"prompt": f"p{i}", "label": "harmless", "split": SPLITS[i % 3]} for i in range(9)]
    assert [len(getattr(load_dataset(write(tmp_path / "d.jsonl", split)), s)) for s in SPLITS] == [3, 3, 3]


@pytest.mark.parametrize(
    ("text", "settings", "says"),
    [
        ("", {}, "holds no row"),
        ('{"prompt": "x", "label": "harmful", "split": "holdout"}', {}, "split='holdout'"),
        ('{"messages": [], "label": "harmful"}', {}, "line 1: messages"),
        ('{"messages": [{"role": "user"}], "label": "harmful"}', {}, "line 1: message"),
        ('{"messages": "hi", "label": "harmful"}', {}, "no text"),
        ("{]", {}, "line 1 is no JSON"),
        ('"text"', {}, "expected an object"),
        ('{"prompt": "x"}', {}, "no field 'label'"),
        ('{"prompt": "x", "label": "dunno"}', {}, "dunno"),
        ('{"text": "x", "label": "harmful"}', {}, "data.text"),
        ('{"prompt": "  ", "label": "harmful"}', {}, "no text"),
        ('{"prompt": "x", "label": "harmful"}', {"terminal": "dot"}, "data.terminal='dot'"),
        ('{"prompt": "x", "label": "harmful"}', {"split": (0.5, 0.5, 0.5)}, "add to 1"),
        ('{"prompt": "x", "label": "harmful"}', {"limit": 0}, "limit"),
        ('{"prompt": "x", "label": "harmful"}', {"colour": 1}, "data.colour"),
        ('{"prompt": "x", "label": "harmful", "id": 1}\n{"prompt": "y", "label": "harmful", "id": 1}', {}, "stands on two"),
        ('{"prompt": "x", "label": "harmful", "group": "g", "split": "train"}\n{"prompt": "y", "label": "harmful", "group": "g", "split": "test"}', {}, "several splits"),
    ],
)  # fmt: skip
def test_wrong_files_are_one_sentence(tmp_path, text, settings, says):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(InputError, match=says):
        load_dataset(str(tmp_path / "x.jsonl"), **settings)


def test_sources_out_of_reach_say_the_way_out(monkeypatch):
    for name, says in (("nothing", "is no config"), ("file", "data.path"), ("malicious_instruct", "data.mirror"), ("gone.jsonl", "no such file")):
        with pytest.raises(InputError, match=says):
            load_dataset(name)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=None))
    monkeypatch.setattr("latentguard.datasets.hub_reachable", lambda: False)
    with pytest.raises(InputError, match="cannot be reached; give a folder"):
        load_dataset("advbench")


def test_hub_rows_become_prompts(monkeypatch):
    rows = {"harmful": [{"Goal": "do bad", "Category": "c", "Index": 1}], "benign": [{"Goal": "do good", "Category": "c", "Index": 1}]}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda path, name, split, revision: rows[split]))
    monkeypatch.setattr("latentguard.datasets.hub_reachable", lambda: True)
    found = list(load_dataset("jailbreakbench"))
    assert sorted((p.instruction, p.label, p.category) for p in found) == [("do bad.", "harmful", "c"), ("do good.", "harmless", "c")]
    assert len({p.group for p in found}) == 1


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the public sets are not beside this checkout")
@pytest.mark.parametrize("name", [n for n in options("data") if n not in ("builtin", "file")])
def test_every_named_set_loads_from_the_mirror(name, caplog):
    data = load_dataset(name, mirror=str(SHARED / "data"))
    every = list(data)
    assert len(every) >= 20 and len({p.id for p in every}) == len(every)
    assert {p.label for p in every} <= {"harmful", "harmless", "lookalike"}
    assert "is not the file" not in caplog.text
    marks = {p.instruction[-1] for p in every if not p.exempt}
    assert marks <= {"."}


def test_what_a_data_set_carries_changes_nothing_about_its_hash(tmp_path):
    rows = [{"prompt": f"request {k}", "label": ("harmful", "harmless")[k % 2]} for k in range(40)]
    path = write(tmp_path / "mine.jsonl", rows)
    plain, named = load_dataset(path), load_dataset(path, roles={"template": (path,)})
    assert plain.hash == named.hash and plain.spec.roles is None and named.spec.roles == {"template": (path,)}
    assert load_dataset(named.spec, terminal="keep").hash != named.hash


def test_a_spec_loads_again_as_it_was_but_for_what_is_changed(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"prompt": f"request {k}?", "label": ("harmful", "harmless")[k % 2]} for k in range(60)])
    first = load_dataset(path, seed=3, split=(0.6, 0.1, 0.3))
    again, raw = load_dataset(first.spec), load_dataset(first.spec, terminal="keep")
    assert again.hash == first.hash and again.card == first.card
    for split in SPLITS:
        ours = {p.group for p in getattr(first, split)}
        assert ours == {p.group for p in getattr(raw, split)}, "another final mark deals the same splits"
    assert {p.instruction[-1] for p in raw} == {"?"} and {p.instruction[-1] for p in first} == {"."}


def test_the_roles_of_the_paper_s_option_name_sets_that_exist():
    from latentguard.configs import option

    roles = option("data", "paper")["roles"]
    assert set(ROLES) < set(roles) and {name for sets in roles.values() for name in sets} <= set(options("data"))


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the public sets are not beside this checkout")
def test_the_paper_s_roles_are_filled_from_the_mirror():
    data = load_dataset("paper", mirror=str(SHARED / "data"))
    for role in ROLES:
        everyone = data.role(role)
        assert len(everyone) == len({p.id for p in everyone}) >= 100
        assert {p.harmful for p in everyone} == {role.endswith("harmful")} and {p.source for p in everyone} <= set(data.spec.roles[role])
    for kind in ("template", "suffix", "persuasion"):
        assert all(p.harmful and p.exempt for p in data.role(kind))
    assert len({p.category for p in data.role("categories")}) >= 10


@pytest.mark.parametrize("roles", [{"template": "jailbreaks.jsonl"}, {"template": 3}, ["template"]])
def test_roles_of_another_shape_are_one_sentence(roles, tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"prompt": "x", "label": "harmful"}])
    with pytest.raises(InputError, match="data.roles"):
        load_dataset(path, roles=roles)

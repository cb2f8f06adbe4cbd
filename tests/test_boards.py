"""The W&B report and saved view of runs: what is in them, in which order, what chooses the runs, what never gets there, and how they are sent."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("wandb_workspaces")

from latentguard.charts import Chart
from latentguard.errors import InputError
from latentguard.report import boards, tracked
from latentguard.report.runs import read_runs
from tests.folders import BARS, BY_LAYER, REPLY, Figure, a_run, a_sweep, grid, rate, some_figures
from tests.wandb_server import WandbServer

ONLINE = {"name": "wandb", "project": "latentguard", "entity": None, "mode": None, "tags": [], "generations": "verdicts"}
HOSTILE = "<script>alert(1)</script> `|` *x* [y](javascript:z) $a$ ' \" == <= within_last 5 days \u202e ${w} ~!"


def built(folder, **more):
    return boards.build(read_runs(folder), **more)


def blocks(spec):
    """All blocks, those folded under a heading after it."""
    found = []
    for block in spec:
        found += [block, *blocks(block.get("collapsedChildren") or [])]
    return found


def said(block):
    """All text under a block."""
    if isinstance(block, dict):
        return block.get("text", "") + block.get("content", "") + "".join(said(one) for one in block.get("children", []))
    return ""


def grids(built):
    return [block["metadata"] for block in built["report"]["spec"]["blocks"] if block["type"] == "panel-grid"]


def panels(metadata):
    return [(panel["viewType"], panel["config"]) for panel in metadata["panelBankSectionConfig"]["panels"]]


def leaves(filters):
    assert filters["filterFormat"] == "filterV2"
    return {leaf["key"]["name"]: leaf["value"] for leaf in filters["filters"]}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return a_sweep(tmp_path_factory.mktemp("boards") / "2026_sweep", tracker=ONLINE)


@pytest.fixture(scope="module")
def both(sweep):
    return built(sweep)


def test_blocks_come_in_the_order_of_the_page(both):
    order = [said(block) for block in both["report"]["spec"]["blocks"] if block["type"] == "heading" and block["level"] == 2]
    assert order == [
        "The command", "Models and metrics", "steer harm", "steer refusal", "Replies and verdicts", "Controls, and what did not work",
        "How these runs were chosen", "What made them",
    ]  # fmt: skip
    first = [block for block in both["report"]["spec"]["blocks"] if said(block)][:2]
    assert first[0]["type"] == "callout-block" and "12 of 12 runs" in said(first[0]) and "0.75 [0.47, 0.91] (n = 12)" in said(first[1])


def test_claim_of_one_run_has_its_number_and_its_interval_and_the_command_is_there(tmp_path):
    made = built(a_run(tmp_path / "one"))["report"]["spec"]["blocks"]
    assert "refusal from 0.08 to 0.75. Headline:" in said(made[1]) and "0.75 [0.47, 0.91] (n = 12)" in said(made[1])
    assert "```sh\npython -m latentguard.run model=tiny exp=steer_harm\n```" in [said(block) for block in made]


def test_every_run_set_shows_what_chose_its_runs_and_groups_them_by_model(both):
    found = grids(both)
    assert [leaves(one["runSets"][0]["filters"]) for one in found] == [
        {"group": "2026_sweep", "exp": "steer_harm", "state": "finished"},
        {"group": "2026_sweep", "exp": "steer_refusal", "state": "finished"},
        {"group": "2026_sweep", "state": "finished"},
    ]
    assert all(one["runSets"][0]["grouping"] == [{"section": "config", "name": "model.value"}] and not one["hideRunSets"] for one in found)
    assert sorted(found[0]["customRunColors"].values()) == ["#0072B2", "#D55E00"]
    text = "".join(map(said, both["report"]["spec"]["blocks"]))
    assert "Group is 2026_sweep; exp is steer_harm; State is finished" in text and "11_steer_refusal_small" in text


def test_a_grid_of_each_study_has_its_curves_its_headline_its_pictures(both):
    found = panels(grids(both)[0])
    assert [kind for kind, _ in found] == ["Run History Line Plot"] * 3 + ["Bar Chart", "Media Browser"]
    drawn = [(config["xAxis"], config["chartTitle"], {name.partition("/")[0] for name in config["metrics"]}, len(config["metrics"])) for _, config in found[:3]]
    assert drawn == [
        ("layer", "Refusal by layer · coef 1.0", {"refusal_by_layer"}, 2),  # a plot a coefficient, in it a line a direction
        ("layer", "Refusal by layer · coef 2.0", {"refusal_by_layer"}, 2),
        ("coef", "Refusal by coefficient", {"refusal_by_coefficient"}, 2),
    ]
    assert not {*found[0][1]["metrics"]} & {*found[1][1]["metrics"]}
    assert {config["groupBy"] for _, config in found[:4]} == {"model.value"}
    assert found[3][1]["metrics"] == ["summary_metrics.headline/value"]
    assert found[4][1]["mediaKeys"] == ["figures/refusal_by_layer", "figures/refusal_by_coefficient"]
    layouts = [panel["layout"] for panel in grids(both)[0]["panelBankSectionConfig"]["panels"]]
    cells = [{(x, y) for x in range(a["x"], a["x"] + a["w"]) for y in range(a["y"], a["y"] + a["h"])} for a in layouts]
    assert sum(map(len, cells)) == len(set().union(*cells)) and max(a["x"] + a["w"] for a in layouts) == 24  # nothing lies on another


def some_plots():
    bars = [{"group": name, **rate(k, 9)} for name, k in (("template", 4), ("suffix", 7))]
    cells = [{"a": a, "b": b, "cosine": 0.5} for a in ("x", "y") for b in ("x", "y")]
    points = [{"harm": 0.1, "refuse": 0.2, "group": "refused"}, {"harm": 0.3, "refuse": 0.1, "group": "accepted"}]
    heat = Chart("heat", "a", "b", "first", "second", value="cosine", low=None, high=None, n=None)
    scatter = Chart("points", "harm", "refuse", "harm", "refuse", series="group", low=None, high=None, n=None)
    return [*some_figures()[:2], Figure("recall", bars, BARS), Figure("cosines", cells, heat), Figure("beliefs", points, scatter)]


def test_figures_that_are_no_curves_are_wandbs_own_plots(tmp_path):
    folder = a_run(tmp_path / "one", figures=some_plots(), summary={"figures": []})
    found = panels(grids(built(folder))[0])
    vega = [(config["panelDefId"], config["fieldSettings"]) for kind, config in found if kind == "Vega2"]
    assert vega == [("wandb/bar/v0", {"label": "bar", "value": "rate"}), ("wandb/scatter/v0", {"x": "harm", "y": "refuse"})]
    assert json.dumps(found).count('"charts/cosines"') == 1 and '"charts/recall_table"' in json.dumps(found)


def test_a_series_has_a_grid_a_study_with_its_own_figures_and_headline(tmp_path):
    parts = {name: {"study": name, "status": "ok", "claim": "made up", "figures": [f"{name}_by_layer"]} for name in ("suffix", "beliefs")}
    headlines = {name: {"metric": "made up", "value": 0.5, "low": 0.1, "high": 0.9, "n": 9} for name in parts}
    figures = [Figure(f"{name}_by_layer", grid(), BY_LAYER) for name in parts]
    folder = a_sweep(tmp_path / "s", studies=("paper",), seeds=(0,), figures=figures, summary={"studies": parts, "headlines": headlines})
    made = built(folder)
    assert [leaves(one["runSets"][0]["filters"])["exp"] for one in grids(made)[:2]] == ["paper", "paper"]
    for name, one in zip(parts, grids(made), strict=False):
        kinds = dict(panels(one))
        assert kinds["Run History Line Plot"]["metrics"][0].startswith(f"{name}_by_layer/") and kinds["Media Browser"]["mediaKeys"] == [
            f"figures/{name}_by_layer"
        ]
        assert kinds["Bar Chart"]["metrics"] == [f"summary_metrics.headlines/{name}/value"]


def test_table_has_a_row_a_model_and_seed_and_a_column_a_study(both):
    lines = next(said(b) for b in both["report"]["spec"]["blocks"] if b["type"] == "markdown-block" and "| model | seed |" in said(b)).splitlines()
    assert len(lines) == 2 + 6 and all(line.count("\\[") == 2 for line in lines if "| 0." in line)


def test_view_has_a_section_a_study_and_the_same_filter(both):
    section = both["workspace"]["spec"]["section"]
    assert [one["name"] for one in section["panelBankConfig"]["sections"]] == ["steer harm", "steer refusal", "Generations"]
    assert leaves(section["runSets"][0]["filters"]) == {"group": "2026_sweep", "state": "finished"}
    assert [key["name"] for key in section["runSets"][0]["grouping"]] == ["exp.value", "model.value"]  # two studies log under one name
    assert len(section["customRunColors"]) == 4 and "config:model.value" in section["runSets"][0]["runFeed"]["columnPinned"]


def test_specs_are_json_and_come_back(sweep, both):
    from wandb_workspaces.reports.v2.interface import Report
    from wandb_workspaces.workspaces import Workspace

    assert json.loads(json.dumps(both)) == both
    runs = read_runs(sweep)
    for spec, kind, lost in ((boards.report_spec, Report, ("width", "layout", "value")), (boards.workspace_spec, Workspace, ("layout",))):
        sent = spec(runs, entity="us", project="p")._to_model()
        back = kind._from_model(sent)._to_model()
        one, other = (_without(model.model_dump(mode="json", by_alias=True, exclude_none=True), lost) for model in (sent, back))
        assert one == other  # but for what the library itself forgets when it reads: a report's width, some panels' places


def _without(value, keys):
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return [_without(item, keys) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("state", ["ok", "unfinished", "failed", "insufficient_base_rate"])
def test_a_run_in_any_state_gives_both_and_never_a_reply(tmp_path, state):
    said_table = {"table": [{"intervention": "random", "label": "harmless", "rate": 0.1, "low": 0.0, "high": 0.2, "n": 9, "none_reply": REPLY}]}
    made = built(a_run(tmp_path / "one", state=state, summary=said_table if state in ("ok", "insufficient_base_rate") else None))
    text = json.dumps(made)
    assert REPLY not in text and "SENTINEL" not in text
    assert set(made) == {"report", "workspace"} and "figures/replies" not in text and "figures/refusal_by_layer" in text
    filters = leaves(grids(made)[0]["runSets"][0]["filters"])
    assert filters["exp"] == "steer_harm" and filters["model"] == "tiny" and ("state" in filters) == (state in ("ok", "insufficient_base_rate"))
    words = {"unfinished": "Not finished", "failed": "reason stands in the run", "insufficient_base_rate": "claim withheld", "ok": "takes refusal from"}
    assert words[state] in "".join(said(block) for block in blocks(made["report"]["spec"]["blocks"]))


def test_a_sweep_never_shows_a_reply_and_names_the_jobs_that_never_began(tmp_path):
    folder = a_sweep(tmp_path / "s", seeds=(0,), without=[3])
    made = built(folder)
    text = "".join(said(block) for block in blocks(made["report"]["spec"]["blocks"]))
    assert "SENTINEL" not in json.dumps(made) and "3 of 4 runs are done" in text and "model=small exp=steer_refusal: never begun" in text


def test_where_the_tracker_sent_replies_the_table_is_not_in_the_report(tmp_path):
    full, verdicts = (a_run(tmp_path / name, tracker={**ONLINE, "generations": name}) for name in ("full", "verdicts"))
    assert "generations" in json.dumps(built(verdicts)["workspace"]) and '"generations"' in json.dumps(built(verdicts)["report"])
    made = built(full)
    assert '"generations"' not in json.dumps(made) and "tracker.generations=full" in json.dumps(made)


def test_hostile_texts_stay_texts(tmp_path):
    figure = Figure(f"by {HOSTILE}".replace("/", "-"), grid(), BY_LAYER, title=HOSTILE, caption=HOSTILE)
    summary = {"claim": HOSTILE, "headline": {"metric": HOSTILE, "value": 0.5, "low": 0.1, "high": 0.9, "n": 3}, "figures": [figure.name]}
    folder = a_run(tmp_path / "one", model=HOSTILE, rows=[], figures=[figure], summary={**summary, "table": [{"condition": f"random {HOSTILE}", "rate": 0.1}]})
    made = built(folder)
    markdown = [block["content"] for block in blocks(made["report"]["spec"]["blocks"]) if block["type"] == "markdown-block" and "```" not in block["content"]]
    assert any("script" in text for text in markdown)
    for text in markdown:
        assert not re.search(r"[<>]", text) and not re.search(r"(?<!\\)[`*$\[\]]", text) and "\u202e" not in text
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines()}) == 1  # no cell breaks its row
    assert not [block for block in blocks(made["report"]["spec"]["blocks"]) if "\u202e" in said(block)]
    assert leaves(grids(made)[0]["runSets"][0]["filters"])["model"] == HOSTILE  # to be found, it must be W&B's very value
    assert leaves(made["workspace"]["spec"]["section"]["runSets"][0]["filters"])["model"] == HOSTILE
    assert not re.search(r"[<>$\[\]'/]", made["report"]["displayName"] + made["workspace"]["displayName"])


def test_lone_surrogates_and_long_texts_can_be_sent(tmp_path):
    folder = a_run(tmp_path / "one", model="m\udc80", rows=[], summary={"claim": "x" * 1_000_000 + "\ud800"})
    text = json.dumps(built(folder), ensure_ascii=False).encode("utf-8")
    assert len(text) < 300_000


def test_part_of_a_sweep_is_chosen_by_id_where_ids_are_known_else_by_model_and_seed(tmp_path):
    folder = a_sweep(tmp_path / "s", seeds=(0, 1))
    some = read_runs(folder)[:3]
    assert tracked.chosen(some, "steer_refusal") == {
        "Config('model')": ["tiny"],
        "Config('seed')": [0],
        "Config('exp')": ["steer_refusal"],
        "Metric('State')": ["finished"],
    }
    for number, run in enumerate(some):
        for attempt in (f"run-20260101_0000{number:02}-first{number}", f"offline-run-20260102_000000-id{number}"):
            (run.folder / "wandb" / attempt).mkdir(parents=True)
        (run.folder / "wandb" / "latest-run").symlink_to(attempt)
    assert tracked.chosen(some)["Metric('ID')"] == ["id0", "id1", "id2"] and "Metric('Group')" not in tracked.chosen(some)
    assert tracked.chosen(read_runs(folder))["Metric('Group')"] == ["s"]


def test_entity_and_project_are_the_runs_own(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "of-the-environment")
    mine, theirs = (read_runs(a_run(tmp_path / name, tracker={**ONLINE, "entity": name, "project": f"p-{name}"}))[0] for name in ("me", "they"))
    bare = read_runs(a_run(tmp_path / "bare"))[0]
    assert tracked.place([mine], None, None) == ("me", "p-me") and tracked.place([mine], "x", "y") == ("x", "y")
    assert tracked.place([bare], None, None) == (None, "of-the-environment")
    assert boards.build([bare])["report"]["project"] == {"name": "of-the-environment", "entityName": "YOUR-ENTITY"}
    with pytest.raises(InputError, match="several W&B entity names, me, they: choose one by --entity"):
        tracked.place([mine, theirs], None, None)


def test_what_is_not_on_wandb_is_told_with_the_way_there(tmp_path):
    files, disabled, offline = (a_run(tmp_path / n, tracker=t) for n, t in (("files", None), ("off", {**ONLINE, "mode": "disabled"}), ("offline", ONLINE)))
    attempt = offline / "wandb" / "offline-run-20260101_000000-abc"
    attempt.mkdir(parents=True)
    for folder, words in ((files, r"tracker=files\): run it again with tracker=wandb"), (disabled, "mode=disabled"), (offline, f"wandb sync {attempt}")):
        with pytest.raises(InputError, match=words):
            boards.publish(read_runs(folder))
    (attempt / "run-abc.wandb.synced").touch()
    assert not tracked.untracked(read_runs(offline)[0])


def test_without_wandb_workspaces_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(InputError, match=r"pip install 'latentguard\[report\]'"):
        built(a_run(tmp_path / "one"))


@pytest.mark.slow
def test_every_name_in_the_specs_is_one_that_the_tracker_recorded(tmp_path, monkeypatch):
    from matplotlib.figure import Figure as Drawing

    from latentguard.charts import Plot
    from latentguard.trackers import Wandb

    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    folder = a_run(tmp_path / "one", tracker=ONLINE, figures=[])
    summary, rows = json.loads((folder / "summary.json").read_text()), [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    with Wandb(folder, config={"model": "tiny", "exp": "steer_harm", "seed": 0}, name="n", mode="offline") as tracker:
        tracker.rows(rows)
        for figure in some_plots():
            tracker.figure(figure.name, Plot(Drawing(), figure.title or figure.name, "", figure.chart), figure.rows)
        tracker.summary({**summary, "figures": []})
    record = next(folder.rglob("*.wandb"))
    read = subprocess.run([sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(record)], capture_output=True, text=True)
    if read.returncode:
        pytest.skip(f"wandb leet is not to be had here: {read.stderr[:100]}")
    made = built(folder)
    found = [one for grid in grids(made) for one in panels(grid)]
    metrics = [name for kind, config in found if kind == "Run History Line Plot" for name in config["metrics"]]
    keys = [key for kind, config in found if kind == "Media Browser" for key in config["mediaKeys"]]
    tables = re.findall(r'"(charts/[^"]+|generations)"', json.dumps(found))
    assert len(metrics) == 6 and len(keys) == 5 and len(set(tables)) == 4
    for name in (*metrics, *keys, *tables, "layer", "coef", *(f"headline/{key}" for key in ("value", "low", "high", "n"))):
        assert f'"{name}"' in read.stdout or f'"{name}._type"' in read.stdout, f"the tracker records no {name}"
    for config in (config for kind, config in found if kind == "Vega2"):
        assert json.dumps(config["fieldSettings"], sort_keys=True, separators=(",", ":")) in read.stdout and f'"{config["panelDefId"]}"' in read.stdout
    assert tracked.run_id(read_runs(folder)[0]) in record.name and "SENTINEL" not in json.dumps(made)
    assert "wandb sync" in tracked.untracked(read_runs(folder)[0])


class Boards(WandbServer):
    """Knows one entity with one project, and keeps the views it is sent."""

    def __init__(self, **more):
        super().__init__(**more)
        self.views = []

    def _graphql(self, name, query, said):
        if name == "GetDefaultEntity":
            return {"viewer": {"id": "u", "entity": "tester"}}
        if name == "GetProjects":
            told = {"__typename": "Project", "id": "p", "name": "latentguard", "entityName": "tester", "createdAt": "", "isBenchmark": False, "user": None}
            last = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            return {"models": {"pageInfo": last, "edges": [{"node": told}]} if said["entity"] == "tester" else None}
        if name in ("upsertView", "UpsertView2"):
            self.views.append(said)
            view = {"id": f"Vmlldz{len(self.views)}", "type": said["type"], "name": said["name"], "displayName": said["displayName"], "description": said["description"],
                    "project": {"id": "p", "name": said["projectName"], "entityName": said["entityName"]}, "spec": said["spec"], "updatedAt": None}  # fmt: skip
            return {"upsertView": {"view": view, "inserted": True}}
        return super()._graphql(name, query, said)


def ended(python, home, *words, **environment):
    """A process of our interpreter that knows no key but what it is given."""
    executable, env = python
    env = {key: value for key, value in {**os.environ, **env}.items() if not key.startswith("WANDB_")}
    env |= {"HOME": str(home), "NETRC": str(home / "netrc"), **environment}
    return subprocess.run([executable, *words], env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


PUBLISH = """
import sys
from latentguard.charts import Chart
from latentguard.errors import InputError
from latentguard.report import boards
from latentguard.report.runs import read_runs
runs = read_runs(sys.argv[1])
for entity, project in ((None, None), ("nobody", None), (None, "nothing")):
    try:
        print(*boards.publish(runs, entity, project), sep="\\n")
    except InputError as error:
        print(error)
"""


@pytest.mark.slow
def test_both_are_sent_and_their_addresses_told(python, sweep, tmp_path):
    with Boards() as server:
        done = ended(python, tmp_path, "-c", PUBLISH, str(sweep), **server.environment())
        assert done.returncode == 0, done.stderr
        report, view, nobody, nothing = done.stdout.splitlines()
        assert report.startswith(f"{server.url}/tester/latentguard/reports/steer-harm") and view.startswith(f"{server.url}/tester/latentguard?nw=")
        assert "knows no entity 'nobody'" in nobody and "no project tester/nothing" in nothing
        assert [(sent["type"], sent["entityName"], sent["projectName"]) for sent in server.views] == [
            ("runs", "tester", "latentguard"),
            ("project-view", "tester", "latentguard"),
        ]
        spec = json.loads(server.views[0]["spec"])
        assert leaves(grids({"report": {"spec": spec}})[0]["runSets"][0]["filters"])["exp"] == "steer_harm"
        assert b"SENTINEL" not in server.bytes


@pytest.mark.slow
@pytest.mark.parametrize("behave", ["refuse", "hang", "nobody there", "no key"])
def test_a_server_that_gives_nothing_is_one_sentence_and_an_end(python, sweep, tmp_path, behave):
    with Boards(behave=behave if behave in ("refuse", "hang") else "well") as server:
        environment = {**server.environment(), "WANDB_HTTP_TIMEOUT": "1"}
        if behave == "nobody there":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                environment["WANDB_BASE_URL"] = f"http://127.0.0.1:{free.getsockname()[1]}"
        if behave == "no key":
            del environment["WANDB_API_KEY"]
        done = ended(python, tmp_path, "-m", "latentguard.report", str(sweep), "--wandb", **environment)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("wandb:")]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("latentguard: W&B took nothing: "), done.stderr
    assert "wandb login" in lines[0] and not server.views


STUCK = """
import signal, sys
import psutil
from latentguard.report import boards
from latentguard.report.__main__ import main
let_go = boards._let_go
def stuck():
    for child in psutil.Process().children():
        child.send_signal(signal.SIGSTOP)
    let_go()
boards._let_go = stuck
sys.exit(main([sys.argv[1], "--wandb"]))
"""


@pytest.mark.slow
def test_a_service_that_never_ends_does_not_hold_the_command(python, sweep, tmp_path):
    with Boards(behave="refuse") as server:
        done = ended(python, tmp_path, "-c", STUCK, str(sweep), **server.environment(), WANDB_HTTP_TIMEOUT="1")
    assert done.returncode == 2 and "latentguard: W&B took nothing: " in done.stderr


@pytest.mark.slow
def test_a_dry_run_writes_both_for_runs_of_any_tracker_and_asks_no_server(python, tmp_path):
    folder = a_run(tmp_path / "one")
    with Boards() as server:
        done = ended(python, tmp_path, "-m", "latentguard.report", str(folder), "--wandb", "--dry-run", **server.environment())
        assert done.returncode == 0, done.stderr
        assert not server.received
    assert [Path(line).name for line in done.stdout.split()] == ["wandb_report.json", "wandb_workspace.json"]
    assert json.loads((folder / "wandb_report.json").read_text())["project"]["entityName"] == "YOUR-ENTITY"

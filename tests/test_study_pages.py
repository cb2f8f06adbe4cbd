"""The pages of the studies in docs/studies/: one a study, their commands compose, their settings are the YAML's, their numbers are known.

Numbers of the paper are looked up in `published`, by study and by model; our own claims must stand word for word on docs/paper.md too.
"""

import itertools
import re
from functools import cache

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf

from latentguard import published
from latentguard.configs import CONF, options
from latentguard.report.paper import PAPER
from tests.conftest import REPO

FOLDER = REPO / "docs" / "studies"
STUDIES = options("exp")
SECTIONS = ["Run it", "What came out", "How to read it", "What can go wrong", "Settings people change", "What does not hold"]
SETTING = re.compile(r"(?:exp|casting|data|model|judge)(?:\.\w+)*(?:=\S+)?")
MODELS = tuple(published.models())


@pytest.fixture(scope="module", autouse=True)
def hydra():
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def text(name):
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def prose(name):
    """The page without its commands and quotations."""
    return re.sub(r"^>.*$", "", re.sub(r"^```.*?^```$", "", text(name), flags=re.MULTILINE | re.DOTALL), flags=re.MULTILINE)


def commands(name):
    """Each `python -m latentguard.run` of the page, as one list of overrides for every job it starts."""
    found = []
    for block in re.findall(r"^```\n(.*?)^```$", text(name), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            words = line.partition(" #")[0].split()
            if words[:3] == ["python", "-m", "latentguard.run"]:
                many = words[3:4] == ["-m"]
                choices = [expanded(word) if many else [word] for word in words[3 + many :]]
                found.append([list(job) for job in itertools.product(*choices)])
    return found


def expanded(word):
    """a=1,2 as a=1 and a=2; commas in brackets part nothing."""
    key, _, values = word.partition("=")
    return [f"{key}={value}" for value in re.split(r",(?![^\[]*\])", values)]


@cache
def composed(*overrides):
    config = compose("config", [*overrides, "hydra.runtime.output_dir=somewhere"], return_hydra_config=True)
    HydraConfig.instance().set_config(config)  # what ${hydra:runtime.output_dir} asks
    return config


@cache
def built(*overrides):
    return instantiate(composed(*overrides).exp, _convert_="all")


def spans(name):
    """Settings in backticks: each span as its words."""
    for span in re.findall(r"`([^`\n]+)`", prose(name)):
        words = span.split()
        if all(SETTING.fullmatch(word) for word in words):
            yield words


@cache
def stated(path):
    """Every setting of a YAML file, by its dotted name: (the value as written, its comment)."""
    found, above = {}, []
    for line in path.read_text(encoding="utf-8").splitlines():
        if m := re.match(r"(?P<indent> *)(?P<key>\w+):(?: +(?P<value>[^#]*?))?(?: +# (?P<comment>.*))?$", line):
            above = [*above[: len(m["indent"]) // 2], m["key"]]
            found[".".join(above)] = (m["value"] or "", m["comment"] or "")
    return found


def yaml_says(name, setting):
    """The value and comment of a setting of a study's page: in the study's own file, or in config.yaml for all studies."""
    group, _, key = setting.partition(".")
    return stated(CONF / "exp" / f"{name}.yaml")[key] if group == "exp" else stated(CONF / "config.yaml")[setting]


def tables(name):
    """Header and rows of each table, cells stripped."""
    for block in re.findall(r"(?:^\|.*\n)+", text(name), re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines())
        yield header, rows


def known(name):
    """What the paper prints for a study, by model ('' for all): every number of its tables; of its curves the ends; rounded means."""
    place, _, names = PAPER[name]
    numbers = {model: set() for model in ("", *MODELS)}

    def add(model, *values):
        for key in ("", model) if model in MODELS else numbers:
            numbers[key] |= {round(abs(float(value)), 3) for value in values}

    for table in map(published.table, names):
        add("", *re.findall(r"\d+(?:\.\d+)?", table.note))
        for row in table.rows:
            add(row["model"], *(value for value in row.values() if isinstance(value, int | float)), *re.findall(r"\d+", str(row.get("layers", ""))))
        for model, kind in itertools.product(MODELS, ("harm", "refuse")):
            values = [row["value"] for row in table.rows if (row["model"], row.get("direction")) == (model, kind)]
            if values:
                add(model, round(sum(values) / len(values) + 1e-9, 2))
    figures = [n for a, b in re.findall(r"(\d+)(?:–(\d+))?", place.partition("Fig")[2]) for n in range(int(a), int(b or a) + 1)]
    for curve in (c for n in figures if str(n) in published.figures() for c in published.curves(n)):
        add(curve.model, min(curve.values), max(curve.values), *([curve.n] if curve.n else []), *re.findall(r"\d+", curve.variant))
    return numbers


def of_paper(cell):
    """(model or '', number) for every number of a cell: it belongs to the model named last before it."""
    for part in re.split(rf"(?={'|'.join(MODELS)})", re.sub(r"\b(?:Table|Fig\.|Figs\.|§)\s*\d+\w?", "", cell)):
        model = next((m for m in MODELS if part.startswith(m)), "")
        yield from ((model, round(float(number), 3)) for number in re.findall(r"\d+(?:\.\d+)?", part.removeprefix(model)))


def test_every_study_has_its_page_and_every_page_its_study():
    assert {path.stem for path in FOLDER.glob("*.md")} - {"index"} == set(STUDIES)
    listed = re.findall(r"\]\((\w+)\.md\)", (FOLDER / "index.md").read_text(encoding="utf-8"))
    assert set(listed) == set(STUDIES), "the table in index.md names each"


@pytest.mark.parametrize("name", STUDIES)
def test_a_page_has_its_parts(name):
    page = text(name)
    assert page.startswith(f"# {name}: ") and re.findall(r"^## (.*)$", page, re.MULTILINE) == SECTIONS
    assert f"](../figures/studies/{name}.png)" in page and "**In the paper**" in page
    assert 60 <= len(page.splitlines()) <= 120
    for path in re.findall(r"`(latentguard/[\w/]+\.py)`", page):
        assert (REPO / path).is_file(), path


@pytest.mark.parametrize("name", [*STUDIES, "index"])
def test_links_and_figures_are_there(name):
    for link in re.findall(r"\]\(([^)#\s]+)", text(name)):
        assert (FOLDER / link).resolve().is_file(), link


@pytest.mark.parametrize("name", STUDIES)
def test_its_commands_start_this_study(name):
    found = commands(name)
    assert len(found) >= 2, "the small model, and the paper's"
    assert any({f"model={m}" for m in ("llama2", "llama3", "qwen2")} & set(job) for jobs in found for job in jobs)
    for jobs in found:
        for job in jobs:
            chosen = dict(word.split("=", 1) for word in job)
            assert chosen["exp"] == name and all(chosen[group] in options(group) for group in ("model", "data"))
        composed(*jobs[0])
        built(*(word for word in jobs[0] if word.startswith(("exp", "casting"))))


@pytest.mark.parametrize("name", STUDIES)
def test_settings_it_names_exist(name):
    config = composed(f"exp={name}")
    for words in spans(name):
        if any("=" in word for word in words):
            overrides = [word for word in words if "=" in word]
            overrides = overrides if any(word.startswith("exp=") for word in overrides) else [f"exp={name}", *overrides]
            composed(*overrides)
            built(*(word for word in overrides if word.startswith(("exp", "casting"))))
        for word in (word for word in words if "=" not in word and "." in word):
            above, _, key = word.rpartition(".")
            assert key in OmegaConf.select(config, above), f"`{word}`"


@pytest.mark.parametrize("name", STUDIES)
def test_the_table_of_settings_says_what_the_yaml_says(name):
    header, rows = next((header, rows) for header, rows in tables(name) if header[0] == "setting")
    assert header == ["setting", "default", "the YAML says", "change it when"] and rows
    for setting, default, says, when in rows:
        value, comment = yaml_says(name, setting.strip("`"))
        assert (default, says) == (value, comment), setting
        assert when


@pytest.mark.parametrize("name", STUDIES)
def test_what_it_says_the_paper_prints_is_what_the_paper_prints(name):
    columns = [(header, [row[-1] for row in rows]) for header, rows in tables(name) if header[-1].startswith("the paper")]
    found = [number for _, cells in columns for cell in cells for number in of_paper(cell)]
    if name not in PAPER or not (PAPER[name][1] or PAPER[name][2]):
        assert not found
        return
    numbers = known(name)
    assert found
    for model, number in found:
        assert number in numbers[model], f"{number} of {model or 'the paper'} is not published for {name}"


@pytest.mark.parametrize("name", STUDIES)
def test_its_claims_stand_on_the_page_of_the_paper(name):
    there = "".join((REPO / "docs" / page).read_text(encoding="utf-8") for page in ("paper.md", "steer.md", "latent-guard.md", "related.md"))
    for quoted in re.findall(r"^> .*$", text(name), re.MULTILINE):
        assert quoted in there


def test_a_number_that_the_paper_does_not_print_is_found():
    assert list(of_paper("Llama-2 100.0 → 85.3 %; Qwen2 −0.5 (Table 9)")) == [("Llama-2", 100.0), ("Llama-2", 85.3), ("Qwen2", 0.5)]
    numbers = known("suffix")
    assert 85.3 in numbers["Llama-2"] and 85.3 not in numbers["Qwen2"] and 85.3 in numbers[""] and 85.4 not in numbers[""]
    assert 100.0 in known("steer_refusal")["Llama-2"] and 81.0 not in known("steer_refusal")["Llama-2"]

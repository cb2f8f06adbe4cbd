"""Pages of a run, a sweep and a comparison, from a real run of the tiny model and from made folders, in a real browser."""

# ruff: noqa: F811  (fixtures are imported by name)

import subprocess

import pytest

from latentguard.report.__main__ import main
from tests.browsing import WIDTHS, chromium, faults, opened  # noqa: F401
from tests.conftest import REPO
from tests.folders import a_run, a_sweep, some_rows

pytestmark = pytest.mark.browser
SMALL = (
    "exp.layers=[1,2]",
    "exp.coefs=[1,4]",
    "exp.n_test=6",
    "exp.n_grid=3",
    "exp.n_draw=2",
    "exp.n_control=2",
    "exp.draws=1",
    "exp.draws_reported=2",
    "exp.casting.n_poles=6",
)
NASTY = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> \u202egnol\u202c \"quoted\" \udcff </script>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, python):
    """A run that `latentguard.run` made, a sweep, a comparison, a run that is not finished, one with hostile texts and a long line."""
    at = tmp_path_factory.mktemp("reports")
    executable, env = python
    words = ["model=tiny", "exp=steer_harm", *SMALL, f"hydra.run.dir={at / 'run'}"]
    subprocess.run([executable, "-m", "latentguard.run", *words], cwd=REPO, env=env, check=True, capture_output=True)
    a_sweep(at / "sweep")
    a_run(at / "stopped", state="unfinished")
    for seed in (0, 1):
        a_run(at / f"seed{seed}", seed=seed)
    rows = [{**row, "reply": NASTY * (20_000 if i == 0 else 1), "prompt": NASTY, "category": NASTY} for i, row in enumerate(some_rows(6))]
    a_run(at / "hostile", rows=rows, model="<b>bold</b>", summary={"claim": NASTY, "table": [{"what": NASTY, "rate": 0.5, "low": 0.1, "high": 0.9, "n": 4}]})
    for name in ("sweep", "stopped", "hostile"):
        assert main([str(at / name)]) == 0
    assert main([str(at / "seed0"), str(at / "seed1"), "--out", str(at / "comparison")]) == 0
    return at


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["run", "sweep", "comparison", "stopped", "hostile"])
def test_every_kind_of_page_is_whole_at_every_width(opened, folders, name, width):
    visit = opened(folders / name / "report.html", width)
    assert visit.drawn(), "figures"
    assert visit.overflow() <= 0
    assert faults(visit.page) == []
    visit.quiet()
    assert visit.page.evaluate("window.hacked") is None
    assert (folders / name / "report.html").stat().st_size < 3_000_000


def test_a_sweeps_page_leads_to_the_pages_of_its_jobs(opened, folders):
    job = next(path for path in (folders / "sweep").iterdir() if path.name.startswith("0_"))
    assert main([str(job)]) == 0 and main([str(folders / "sweep")]) == 0
    visit = opened(folders / "sweep" / "report.html")
    visit.page.get_by_role("link", name=f"{job.name}/report.html").first.click()
    visit.page.locator("html[data-ready]").wait_for(state="attached")
    assert visit.page.url.endswith(f"{job.name}/report.html")


def test_replies_of_a_real_run_are_searched_and_those_to_harmful_prompts_folded(opened, folders):
    visit = opened(folders / "run" / "report.html")
    replies = visit.page.locator("#replies")
    prompts = replies.locator("tbody tr").count()
    assert prompts
    replies.get_by_label("Kind of prompt").select_option("harmful")
    folded = replies.locator("tbody details:not([open])")
    assert folded.count() and not replies.locator("tbody details[open]").count()
    replies.get_by_label("Search prompts, replies, categories").fill("no prompt has this in it")
    visit.page.wait_for_function("() => document.querySelectorAll('#replies tbody tr td .chip').length === 0")

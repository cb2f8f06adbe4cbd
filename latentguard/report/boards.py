"""Runs → a report on W&B and a saved view of them, through wandb-workspaces. Knows no study, only what runs left and the tracker's names.

What a model said is in neither. Texts of models and data stand in blocks that W&B shows as they are, or in tables behind backslashes.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from latentguard.errors import InputError
from latentguard.pages import Block, Command, Facts, Sheet
from latentguard.pages.markdown import fenced, table
from latentguard.pages.texts import plain
from latentguard.report import panels
from latentguard.report.page import against, headline, made_of
from latentguard.report.replies import replies
from latentguard.report.runs import Run, quiet, tells, waiting, words
from latentguard.report.sweep import command, headlines, settings
from latentguard.report.tracked import NOBODY, chosen, exp_of, expression, place, sentence, shows_replies, untracked
from latentguard.report.wording import found

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import Report
    from wandb_workspaces.workspaces import Workspace

_KEY_SECONDS = 60  # for a key to be typed, where W&B asks for one
_SERVICE_SECONDS = 5  # for W&B's service to end by itself, once it failed
_MANY = 20  # runs whose claims and verdicts are written out; of more, the first


def build(runs: Sequence[Run], entity: str | None = None, project: str | None = None) -> dict[str, Any]:
    """What `publish` would send: "report" and "workspace", as JSON holds them. Asks no server; for any runs, tracked or not.

    Raises:
        InputError: wandb-workspaces is not installed, or the runs are of several projects.
    """
    entity, project = place(runs, entity, project)
    made = {kind: spec(runs, entity=entity or NOBODY, project=project) for kind, spec in (("report", report_spec), ("workspace", workspace_spec))}
    return {kind: one._to_model().model_dump(mode="json", by_alias=True, exclude_none=True) for kind, one in made.items()}


def publish(runs: Sequence[Run], entity: str | None = None, project: str | None = None) -> list[str]:
    """Save both on W&B, each anew; their addresses.

    Raises:
        InputError: a run is not on W&B, the server refuses or is out of reach (it is waited for WANDB_HTTP_TIMEOUT seconds, 19
            unless set), there is no such project, or wandb-workspaces is not installed.
    """
    if problem := next(filter(None, map(untracked, runs)), ""):
        raise InputError(problem)
    entity, project = place(runs, entity, project)
    panels.reports()
    import wandb
    from wandb.errors import CommError, UsageError
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    wandb.setup(wandb.Settings(login_timeout=_KEY_SECONDS))
    try:
        api = wandb.Api()
        entity = entity or api.default_entity or ""
        if project not in _projects(api, entity):
            raise InputError(f"W&B has no project {entity}/{project} for this key: name another by --entity and --project, or sync the runs first")
        report = report_spec(runs, entity=entity, project=project).save()
        view = workspace_spec(runs, entity=entity, project=project).save()
        return [report.url, view.url]
    except TimeoutError:
        raise InputError(f"W&B asked for a key and got none within {_KEY_SECONDS} s: run `wandb login`, or set WANDB_API_KEY") from None
    except (CommError, UsageError, WandbApiFailedError) as error:
        _let_go()
        said = plain(str(error).splitlines()[0], 200)
        raise InputError(f"W&B took nothing: {said}; look at the network and at `wandb login`, or use --dry-run") from error


def _let_go() -> None:
    """W&B's service may wait for a server that hangs, and our end for the service: it gets some seconds."""
    import psutil

    def end() -> None:
        for child in psutil.Process().children():
            if "wandb" in child.name():
                child.kill()

    waiting = threading.Timer(_SERVICE_SECONDS, end)
    waiting.daemon = True
    waiting.start()


def _projects(api: Any, entity: str) -> set[str]:
    try:
        return {one.name for one in api.projects(entity)}
    except ValueError as error:  # so it says that there is no such entity
        raise InputError(f"W&B knows no entity {entity!r} for this key: name another by --entity") from error


def report_spec(runs: Sequence[Run], *, entity: str, project: str, title: str | None = None) -> "Report":
    """The report: claims, the command, models × metrics, figures a study, verdicts, controls, how runs were chosen, what made them."""
    runs = [quiet(run) for run in runs]
    wr, names = panels.reports(), words(runs)
    parts = panels.parts(runs)
    blocks: list[Any] = [wr.CalloutBlock(text=_lead(runs)), *_claims(runs, names), wr.H2("The command"), *_command(runs)]
    blocks += [wr.H2("Models and metrics"), *_metrics(runs), wr.P("Intervals are 95%.")]
    for (exp, study), held in parts.items():
        blocks += [wr.H2(plain(study.replace("_", " "), 120)), *_figures(runs, held, exp, study)]
    blocks += [wr.H2("Replies and verdicts"), *_verdicts(runs, names)]
    blocks += [wr.H2("Controls, and what did not work"), *_against(runs, names)]
    blocks += [wr.H2("How these runs were chosen"), *_choice(runs, names, parts)]
    blocks += [wr.H2("What made them"), *_made(runs, names)]
    return wr.Report(
        entity=entity, project=project, title=panels.titled(title or _title(runs)), description=panels.titled(_lead(runs)), blocks=blocks, width="fixed"
    )


def workspace_spec(runs: Sequence[Run], *, entity: str, project: str) -> "Workspace":
    """The saved view: a section a study, its panels by metric, the runs grouped by model, filters to be seen."""
    wr, ws = panels.reports(), panels.workspaces()
    parts = panels.parts(runs)
    sections = []
    for (_, study), held in parts.items():
        drawn = [*panels.bars(held, study), *panels.lines(held), *panels.native(held), *panels.media(held)]
        sections.append(ws.Section(name=plain(study.replace("_", " "), 120), panels=drawn, is_open=True))
    if not any(map(shows_replies, runs)):
        sections.append(ws.Section(name="Generations", panels=[wr.WeavePanelSummaryTable(table_name="generations", layout=panels.layout(0, panels.WIDE))]))
    exps = list(dict.fromkeys(map(exp_of, runs)))
    several = len(exps) > 1  # then a line is one study's on one model: two studies may log under one name
    colours = {ws.GroupPath(exp, name): colour for exp in exps for name, colour in panels.colours(runs).items()} if several else dict(panels.colours(runs))
    view = ws.RunsetSettings(
        filters=expression(chosen(runs)),
        groupby=[*([ws.Config("exp")] if several else []), ws.Config("model")],
        group_colors=colours,
        pinned_columns=list(panels.COLUMNS),
    )
    settings = ws.WorkspaceSettings(x_axis="Step", tooltip_number_of_runs="all_runs", max_runs=100)
    return ws.Workspace(entity=entity, project=project, name=panels.titled(_title(runs)), sections=sections, settings=settings, runset_settings=view)


# What is said, block by block.


def _lead(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return _claim(runs[0])
    missing = _missing(runs)
    done = sum(run.finished for run in runs)
    models, studies = (len({getattr(run, key) for run in runs}) for key in ("model", "study"))
    return f"{done} of {len(runs) + len(missing)} runs are done: {models} model{'s' * (models != 1)}, {studies} stud{'y' if studies == 1 else 'ies'}."


def _missing(runs: Sequence[Run]) -> list[str]:
    """Jobs of their sweep that never began."""
    return [job for above in dict.fromkeys(run.folder.parent for run in runs) for job in waiting(above)] if len(runs) > 1 else []


def _claim(run: Run) -> str:
    return plain(f"{run.claim}{f' Headline: {headline(run)}.' if run.headline else ''}")


def _claims(runs: Sequence[Run], names: Sequence[str]) -> list:
    wr = panels.reports()
    if len(runs) == 1:
        return []
    items = [f"{plain(name)}: {_claim(run)}" for run, name in zip(runs, names, strict=True)]
    rest = [f"{len(items) - _MANY} more; the table below has all numbers."] if len(items) > _MANY else []
    return [wr.UnorderedList(items=[*items[:_MANY], *rest])]


def _command(runs: Sequence[Run]) -> list:
    """W&B's own code block knows no shell."""
    above = {run.folder.absolute().parent for run in runs}
    sweep = len(runs) > 1 and len(above) == 1 and (next(iter(above)) / "jobs.json").is_file()
    told = command(runs[0].folder.parent, runs) if sweep else "\n".join(filter(None, (run.command for run in runs)))
    return _blocks(Command(told)) if told else [panels.reports().P("Made from Python: no command is on record.")]


def _metrics(runs: Sequence[Run]) -> list:
    """A row a model (and seed, and what else was varied), a column a study's headline metric."""
    held: dict[tuple[str, str], dict[str, str]] = {}
    for row in headlines(runs):
        held.setdefault((row["run"], row["seed"]), {})[row["metric"]] = found(row)
    if not held:
        return [panels.reports().P("No run gave a headline number.")]
    metrics = list(dict.fromkeys(metric for one in held.values() for metric in one))
    cells = [[*key, *(one.get(metric, "—") for metric in metrics)] for key, one in held.items()]
    return _blocks(Sheet("", ["model", "seed", *(f"{metric} [95% interval]" for metric in metrics)], cells))


def _figures(runs: Sequence[Run], held: panels.Held, exp: str, study: str) -> list:
    """One grid: curves over layers or coefficients, the headline number, bars and points, the pictures; runs coloured by model."""
    wr = panels.reports()
    model = wr.Config("model")
    drawn = [*panels.lines(held, model), *(panels.bars(held, study, model) if len(held) > 1 else []), *panels.native(held), *panels.media(held)]
    if not drawn:
        return [wr.P("No figure was made.")]
    runset = panels.runset(runs, exp)
    colours = {wr.RunsetGroup(runset_name=runset.name, keys=(wr.RunsetGroupKey(key=model, value=name),)): c for name, c in panels.colours(runs).items()}
    captions = {figure.name: figure for _, figures in held for figure in figures}
    told = [plain(f"{figure.title}. {figure.caption}") for figure in captions.values() if figure.caption]
    return [wr.PanelGrid(runsets=[runset], panels=drawn, custom_run_colors=colours), *([wr.UnorderedList(items=told)] if told else [])]


def _verdicts(runs: Sequence[Run], names: Sequence[str]) -> list:
    """How often each verdict was given where the study's numbers come from, and W&B's own table of every reply's verdict."""
    wr = panels.reports()
    cells = [[name, *cell] for run, name in zip(runs[:_MANY], names[:_MANY], strict=True) for cell in _counted(run)]
    blocks = _blocks(Sheet("", ["run", "condition", "label", "verdicts"], cells)) if cells else [wr.P("No reply was judged.")]
    if len(runs) > _MANY:
        blocks.append(wr.P(f"The first {_MANY} of {len(runs)} runs."))
    if len(runs) > 1:
        blocks = [wr.H3(text="How often each verdict was given", collapsed_blocks=blocks)]
    if any(map(shows_replies, runs)):
        return [*blocks, wr.P("W&B's table of generations is not shown here: with tracker.generations=full it holds what the models said. Look in the runs.")]
    grid = wr.PanelGrid(
        runsets=[panels.runset(runs, None)], panels=[wr.WeavePanelSummaryTable(table_name="generations", layout=panels.layout(0, panels.WIDE, 14))]
    )
    return [*blocks, grid, wr.P("Verdicts alone; what the models said stays in rows.jsonl and report.html, where it was run.")]


def _counted(run: Run) -> list[list[str]]:
    """Condition, label and how often each verdict was given, for the conditions that its page shows first."""
    said = replies(run.rows(), full=False, series="studies" in run.summary, first=next(iter(run.studies), ""))
    counts: dict[tuple[int, str], Counter] = {}
    if said is None:
        return []
    for prompt, condition, _, verdict, _ in said.said:
        if condition in said.shown:
            counts.setdefault((condition, str(said.prompts[prompt].get("label", ""))), Counter())[str(verdict)] += 1
    told = {key: ", ".join(f"{verdict} {n}" for verdict, n in sorted(verdicts.items())) for key, verdicts in sorted(counts.items())}
    return [[said.conditions[condition], label, verdicts] for (condition, label), verdicts in told.items()]


def _against(runs: Sequence[Run], names: Sequence[str]) -> list:
    wr = panels.reports()
    blocks: list[Any] = []
    for run, name in zip(runs, names, strict=True):
        section = against(run)
        inner = [wr.P(plain(section.lead))] if section.lead else []
        inner += [made for block in section.blocks for made in _blocks(block)]
        blocks += inner if len(runs) == 1 else [wr.H3(text=plain(name, 120), collapsed_blocks=inner)]
    return blocks


def _choice(runs: Sequence[Run], names: Sequence[str], parts: dict) -> list:
    wr = panels.reports()
    told = list(dict.fromkeys(sentence(chosen(runs, exp)) for exp, _ in parts))
    folders = [f"{name}: {run.folder.name}, {run.state}" for run, name in zip(runs, names, strict=True)]
    folders += [f"{job}: never begun" for job in _missing(runs)]
    said = "Every grid above has its filter, to be seen and changed in its run set. The runs are grouped by model. The filters:"
    return [wr.P(said), wr.UnorderedList(items=[plain(one) for one in told]), wr.P("The runs:"), wr.UnorderedList(items=[plain(one) for one in folders])]


def _made(runs: Sequence[Run], names: Sequence[str]) -> list:
    """What all share, and where they differ; every setting is in the runs' config."""
    wr = panels.reports()
    sections = [made_of(run).blocks for run in runs]
    pairs = [dict(block.pairs) for blocks in sections for block in blocks if isinstance(block, Facts)]
    own = ("folder", "time") if len(runs) > 1 else ()
    shared = [(key, value) for key, value in pairs[0].items() if key not in own and all(one.get(key) == value for one in pairs)] if pairs else []
    sheets = {(block.title, str(block.rows)): block for blocks in sections for block in blocks if isinstance(block, Sheet) and "setting" not in block.columns}
    blocks = [*_blocks(Facts("", shared)), *(made for block in sheets.values() for made in _blocks(block))]
    if len(runs) > 1:
        differing = settings(runs, names)
        rows = [[name, *(row[place] for row in differing.rows)] for place, name in enumerate(names, 1)]
        blocks += [wr.H3("What differs"), *_blocks(Sheet(differing.title, ["run", *(row[0] for row in differing.rows)], rows))]
    return [*blocks, wr.P("Every setting is in the runs' config, under cfg.")]


def _blocks(block: Block) -> list:
    """A page's block as W&B's: texts as they are, tables as Markdown. Columns of what was said are left out, pictures stand in panels."""
    wr = panels.reports()
    match block:
        case str():
            return [wr.P(plain(block))]
        case Sheet():
            kept = [i for i, column in enumerate(block.columns) if not tells(column.replace(" ", "_"))]
            text = table([block.columns[i] for i in kept], [[row[i] for i in kept] for row in block.rows])
            return [*([wr.P(plain(block.title))] if block.title else []), wr.MarkdownBlock(text=text)]
        case Facts():
            return [wr.UnorderedList(items=[plain(f"{name}: {value}") for name, value in block.pairs])] if block.pairs else []
        case Command():
            return [wr.MarkdownBlock(text=fenced(block.text))]
    return []


def _title(runs: Sequence[Run]) -> str:
    studies, models = (list(dict.fromkeys(getattr(run, key) for run in runs)) for key in ("study", "model"))
    return f"{', '.join(studies)} on {', '.join(models)}".replace("_", " ")

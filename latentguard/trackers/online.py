"""The same as a run's folder, and on Weights & Biases. Knows no experiment; wandb is imported only under this package.

The folder is the truth, W&B a copy. W&B's client runs offline always: it writes a record into the folder, and online another
process sends that record while it grows (`uploading`). So what a server refuses, a cut network or a wrong key cost nothing but
a warning, which says where the record lies and how it is sent later; the end of a run waits for the upload `patience` seconds at most.

Sent: settings, numbers, prompts, verdicts, figures, directions, cards of the data and the model; of the machine what W&B takes
by itself: host, user's paths, command line, packages, hardware and its load. Not sent: replies and rules unless
`generations: full`; code, console, git's remote (its address may hold a token) and the user's mail address; reports of W&B's own errors.
"""

import contextlib
import logging
import os
import secrets
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from latentguard.charts import Plot
from latentguard.directions import Direction
from latentguard.trackers.guarding import Guard, fault, holds_any
from latentguard.trackers.local import Files, artifact_name, plain, short, word
from latentguard.trackers.native import curves, drawn
from latentguard.trackers.uploading import Upload

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
# The columns of the W&B table. What the model said, or words of it, goes there only with generations: full.
_SAID = ("reply", "rule")
COLUMNS = (
    "prompt_id", "prompt", "label", "category", "source", "terminal", "stage", "poles", "intervention", "layer", "coef", "position", "when", "draw",
    "reply", "verdict", "rule", "score",
)  # fmt: skip
_AGAIN = 600  # seconds after which a server that did not take a run is tried again by a run of this process
_away = {"since": float("-inf"), "why": ""}


class Wandb(Files):
    """Files, and the same on Weights & Biases. Use as a context manager: an error in it marks the run failed.

    Args:
        mode: None leaves it to W&B's own settings (WANDB_MODE).
        generations: "full" sends what the model said too.
        patience: seconds that the end of a run waits for the upload; 0 waits as long as it takes.
    """

    def __init__(
        self, folder: str | Path, *, config: Mapping[str, Any], name: str, group: str | None = None, job_type: str | None = None,
        project: str = "latentguard", entity: str | None = None, mode: Literal["online", "offline", "disabled"] | None = None, tags: Sequence[str] = (),
        generations: Literal["verdicts", "full"] = "verdicts", patience: float = 10.0,
    ) -> None:  # fmt: skip
        super().__init__(folder)
        self._full, self._table, self._steps = generations == "full", [], set()
        self.run: Any = None
        self.record: Path | None = None
        self._upload: Upload | None = None
        self._told = False
        self._patience, self._guard = patience, Guard(self._fell)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb: Any = wandb
        about = {
            "project": project, "entity": entity, "dir": str(self.folder), "name": name[:128], "group": group, "job_type": job_type,
            "tags": [tag[:64] for tag in dict.fromkeys(tags) if tag], "config": plain(config), "reinit": "create_new",
        }  # fmt: skip
        for _ in range(2):  # a second time where W&B's own process is gone
            with self._guard("the start of the run"):
                self._open(mode, about)
            if self.run is not None:
                break

    def _open(self, mode: str | None, about: dict[str, Any]) -> None:
        """A run of its own, whatever WANDB_RUN_ID says."""
        wandb = self._wandb
        mode = mode or wandb.setup().settings.mode
        if mode == "disabled":
            self.run = wandb.init(**about, mode=mode)
            return
        self.run = wandb.init(**about, id=secrets.token_hex(4), mode="offline", settings=self._settings())
        self.record = Path(self.run.settings.sync_dir)
        if mode in ("offline", "dryrun"):
            return
        if time.monotonic() - _away["since"] > _AGAIN:
            self._upload = Upload(self.record)
        else:
            self._warn(_away["why"])

    def _warn(self, why: str) -> None:
        """Said once."""
        _away.update(since=time.monotonic(), why=why)
        self._upload = None
        log.warning("W&B has not got the run (%s): it is recorded here; send it later: %s", why, self.command)

    def _hear(self) -> None:
        """News of the upload: where the run is to be seen, or that it will not be."""
        if self._upload is None:
            return
        if self._upload.failed:
            self._warn(self._upload.end(1))
        elif not self._told and (url := self._upload.url):
            self._told = True
            log.info("W&B: %s", url)

    def _fell(self, error: Exception) -> None:
        """Where W&B's own process is gone, the run is over for W&B, and the next one gets another process."""
        if isinstance(error, ConnectionError) or type(error).__name__ == "MailboxClosedError":
            self.run = None
            if self.record is not None:
                log.warning("W&B's own process is gone; what it has kept of the run can be sent: %s", self.command)
            with contextlib.suppress(ConnectionError):
                self._wandb.teardown()

    def _settings(self) -> Any:
        return self._wandb.Settings(console="off", save_code=False, disable_code=True, disable_git=True, silent=True)

    @property
    def command(self) -> str:
        """What sends the record later."""
        return f"wandb sync {shlex.quote(str(self.record))}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        steps = (
            ("the table of generations", self._send_table),
            ("the error", lambda: self._send_error(error)),
            ("the end of the run", lambda: self._end(error)),
        )
        for what, step in steps:
            if self.run is not None:
                with self._guard(what):
                    step()

    def _send_table(self) -> None:
        columns = [column for column in COLUMNS if self._full or column not in _SAID]
        table = self._wandb.Table(columns=columns, allow_mixed_types=True)
        table.data = [[row.get(column) for column in columns] for row in self._table]  # added one by one each cell is typed anew: two thirds of the cost
        self.run.log({"generations": table})

    def _send_error(self, error: BaseException | None) -> None:
        if error is not None:
            self.run.summary.update(fault(error, self.folder / "rows.jsonl", _SAID, self._full))
            self._send_log()

    def _end(self, error: BaseException | None) -> None:
        self.run.finish(exit_code=0 if error is None else 1)
        if self._upload is not None and (why := self._upload.end(self._patience)):
            self._warn(why)
        self._hear()

    def _send_log(self) -> None:
        """run.log as it is now, if no reply of this run stands in it."""
        path = self.folder / "run.log"
        if path.is_file() and (self._full or not holds_any(path.read_text(encoding="utf-8", errors="replace"), self.folder / "rows.jsonl", _SAID)):
            shutil.copy(path, Path(self.run.dir) / "run.log")
            self.run.save(str(Path(self.run.dir) / "run.log"), base_path=self.run.dir, policy="now")

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Those with a verdict are kept for one table at the end; without replies unless `generations: full`."""
        super().rows(rows)
        hidden = () if self._full else _SAID
        self._table += [{key: plain(row[key]) for key in COLUMNS if key in row and key not in hidden} for row in rows if "verdict" in row]

    def figure(self, name: str, figure: "Plot | Figure", data: Sequence[Mapping[str, Any]], *, replies: bool = False) -> None:
        """As an image, as curves over their own axis and as W&B's own plot; figures of replies stay here unless `generations: full`."""
        super().figure(name, figure, data, replies=replies)
        if self.run is None or (replies and not self._full):
            return
        with self._guard(f"the figure {name}"):
            rows = [plain(row) for row in data]
            picture = self._wandb.Image(str(self.folder / "figures" / f"{name}.png"), caption=self._index[name]["title"])
            shown = drawn(self._wandb, figure, rows) if isinstance(figure, Plot) else None
            self.run.log({f"figures/{name}": picture, **({f"charts/{name}": shown} if shown is not None else {})})
            if isinstance(figure, Plot) and figure.chart and (history := curves(name, figure.chart, rows)):
                self._define(name, figure.chart.x)
                for row in history:
                    self.run.log(row)
            self._hear()

    def _define(self, name: str, axis: str) -> None:
        """Curves of a figure run over their axis, and leave the summary to what the study says."""
        if axis not in self._steps:
            self.run.define_metric(axis, hidden=True, summary="none")
            self._steps.add(axis)
        self.run.define_metric(f"{name}/*", step_metric=axis, summary="none")
        self.run.define_metric(f"intervals/{name}/*", step_metric=axis, summary="none", hidden=True)

    def direction(self, direction: Direction) -> None:
        """As an artifact of type direction."""
        super().direction(direction)
        self._send("direction", artifact_name(direction), direction.card(), self._direction_path(direction))

    def artifact(self, kind: str, name: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """As an artifact of its kind."""
        super().artifact(kind, name, path, metadata)
        self._send(kind, name, metadata, path)

    def used(self, kind: str, name: str, metadata: Mapping[str, Any], path: Path | None = None) -> None:
        """As an input: the same content is the same version of the same artifact in every run, so that W&B joins them."""
        self._send(kind, name, metadata, self._used(kind, name, metadata, path), used=True)

    def _send(self, kind: str, name: str, metadata: Mapping[str, Any], path: Path, used: bool = False) -> None:
        if self.run is None:
            return
        with self._guard(f"{kind} {name}"):
            artifact = self._wandb.Artifact(word(f"{kind}-{name}"), type=kind, metadata=short(metadata))
            if path.is_dir():
                artifact.add_dir(str(path.absolute()), policy="immutable")
            else:
                artifact.add_file(str(path.absolute()), name=f"{kind}{path.suffix}", policy="immutable")
            if used and not self.run.disabled:  # `use_artifact` refuses offline; this is what it would put on record
                self.run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)
            else:
                self.run.log_artifact(artifact)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Flat, under a/b/c names."""
        super().summary(summary)
        if self.run is not None:
            with self._guard("the summary"):
                self.run.summary.update(dict(_flat(plain(summary if self._full else _unquoted(summary)))))


def _unquoted(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the words of studies that failed: an error may quote what the model said."""
    parts = summary.get("studies")
    if not isinstance(parts, Mapping) or not any(part.get("status") == "failed" for part in parts.values()):
        return summary
    told = {name: {key: value for key, value in part.items() if part.get("status") != "failed" or key != "why"} for name, part in parts.items()}
    return {**{key: value for key, value in summary.items() if key not in ("claim", "why")}, "studies": told}


def _flat(value: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            found += _flat(item, f"{above}{key}/")
        elif not isinstance(item, list):
            found.append((f"{above}{key}", item))
    return found

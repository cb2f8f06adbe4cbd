"""Takes rows, figures, directions and the summary of a run. Knows no experiment; wandb is imported only here.

Local files are the truth: `rows.jsonl` grows as rows come, everything else is renamed into place. W&B gets the same
numbers; replies only with `generations: full`.
"""

import csv
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from latentguard.directions import Direction
from latentguard.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
# The columns of the W&B table. What the model said, or words of it, goes there only with generations: full.
_SAID = ("reply", "rule")
COLUMNS = (
    "prompt_id", "prompt", "label", "category", "source", "terminal", "stage", "poles", "intervention", "layer", "coef", "position", "when", "draw",
    "reply", "verdict", "rule", "score",
)  # fmt: skip


class Tracker(Protocol):
    """Where an experiment's results go."""

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Generations or scores, one dict each, kept at once."""
        ...

    def figure(self, name: str, figure: "Figure", data: Sequence[Mapping[str, Any]], *, replies: bool = False) -> None:
        """A figure and the numbers in it; `replies` marks one that shows what the model said."""
        ...

    def direction(self, direction: Direction) -> None:
        """A direction, as a safetensors file."""
        ...

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Every number of the run."""
        ...

    def page(self, write: Callable[[Path], Path]) -> None:
        """A page for people: `write` makes it in the run's folder, where there is one."""
        ...


class Memory:
    """Keeps everything in lists: for tests and notebooks."""

    def __init__(self) -> None:
        self.all_rows: list[dict] = []
        self.figures: dict[str, list[dict]] = {}
        self.directions: list[Direction] = []
        self.summaries: dict[str, Any] = {}

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Kept."""
        self.all_rows += [dict(row) for row in rows]

    def figure(self, name: str, figure: "Figure", data: Sequence[Mapping[str, Any]], *, replies: bool = False) -> None:
        """Its data are kept."""
        self.figures[name] = [dict(row) for row in data]

    def direction(self, direction: Direction) -> None:
        """Kept."""
        self.directions.append(direction)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Kept."""
        self.summaries.update(summary)

    def page(self, write: Callable[[Path], Path]) -> None:
        """No folder, no page."""


class Within:
    """One study's part of a series: its name stands in every row, and before the names of figures and directions."""

    def __init__(self, tracker: Tracker, study: str) -> None:
        self.tracker, self.study = tracker, study

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """With the study's name; a series within a series: positions/inversion."""
        self.tracker.rows([{**row, "study": f"{self.study}/{row['study']}" if "study" in row else self.study} for row in rows])

    def figure(self, name: str, figure: "Figure", data: Sequence[Mapping[str, Any]], *, replies: bool = False) -> None:
        """Under `named`."""
        self.tracker.figure(self.named(name), figure, data, replies=replies)

    def named(self, name: str) -> str:
        """A figure's name in the series."""
        return name if name == self.study or name.startswith(f"{self.study}_") else f"{self.study}_{name}"

    def direction(self, direction: Direction) -> None:
        """Under the study's name."""
        self.tracker.direction(replace(direction, name=f"{self.study}_{direction.name or direction.method}"))

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The series writes one for all."""

    def page(self, write: Callable[[Path], Path]) -> None:
        """The series writes one for all."""


class Files:
    """A run's folder. Use as a context manager."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        (self.folder / "figures").mkdir(parents=True, exist_ok=True)
        for earlier in ("rows.jsonl", "summary.json"):  # another attempt's rows are never continued
            (self.folder / earlier).unlink(missing_ok=True)
        self._file = (self.folder / "rows.jsonl").open("a", encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appended to rows.jsonl and flushed."""
        self._file.writelines(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows)
        self._file.flush()

    def figure(self, name: str, figure: "Figure", data: Sequence[Mapping[str, Any]], *, replies: bool = False) -> None:
        """figures/<name>.png with figures/<name>.csv beside it."""
        picture, table = self.folder / "figures" / f"{name}.png", self.folder / "figures" / f"{name}.csv"
        partial = picture.with_suffix(".partial.png")
        figure.savefig(partial, dpi=160)
        partial.replace(picture)
        with table.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in data for key in row)))
            writer.writeheader()
            writer.writerows(data)

    def direction(self, direction: Direction) -> None:
        """directions/<name>.safetensors."""
        direction.save(self._direction_path(direction))

    def _direction_path(self, direction: Direction) -> Path:
        return self.folder / "directions" / f"{direction.name or direction.method}.safetensors"

    def summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json."""
        self.write_json("summary.json", summary)

    def page(self, write: Callable[[Path], Path]) -> None:
        """Written into the run's folder."""
        write(self.folder)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """A JSON file in the run's folder, whole or not at all."""
        path = self.folder / name
        partial = path.with_name(f".{name}.{os.getpid()}")
        partial.write_text(json.dumps(_plain(value), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)


class Wandb(Files):
    """Files, and the same on Weights & Biases. W&B's own settings decide online, offline or disabled.

    Its console capture is off, and an outage never stops a run: local files are written first.
    """

    def __init__(
        self, folder: str | Path, *, config: Mapping[str, Any], name: str, group: str | None = None, job_type: str | None = None,
        project: str = "latentguard", entity: str | None = None, mode: Literal["online", "offline", "disabled"] | None = None, tags: Sequence[str] = (),
        generations: Literal["verdicts", "full"] = "verdicts",
    ) -> None:  # fmt: skip
        super().__init__(folder)
        import wandb
        from wandb.errors import CommError, UsageError

        self._wandb, self._full, self._table = wandb, generations == "full", []
        settings = wandb.Settings(console="off", save_code=False, silent=True)
        try:
            self.run = wandb.init(
                project=project, entity=entity, mode=mode, dir=str(folder), name=name, group=group, job_type=job_type, tags=list(tags),
                config=dict(config), settings=settings, reinit="finish_previous",
            )  # fmt: skip
        except (UsageError, CommError) as error:
            raise InputError(f"tracker=wandb: {str(error).splitlines()[0]}; run `wandb login`, or set WANDB_MODE=offline, or tracker=files") from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        columns = [column for column in COLUMNS if self._full or column not in _SAID]
        table = self._wandb.Table(columns=columns, data=[[row.get(column) for column in columns] for row in self._table])
        self.run.log({"generations": table})
        self.run.finish(exit_code=0 if kind is None else 1)

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Those with a verdict are kept for one table at the end; without replies unless `generations: full`."""
        super().rows(rows)
        hidden = () if self._full else _SAID
        self._table += [{key: value for key, value in _plain(row).items() if key not in hidden} for row in rows if "verdict" in row]

    def figure(self, name: str, figure: "Figure", data: Sequence[Mapping[str, Any]], *, replies: bool = False) -> None:
        """As an image; figures of replies stay here unless `generations: full`."""
        super().figure(name, figure, data, replies=replies)
        if self._full or not replies:
            self.run.log({f"figures/{name}": self._wandb.Image(str(self.folder / "figures" / f"{name}.png"))})

    def direction(self, direction: Direction) -> None:
        """As an artifact of type direction."""
        super().direction(direction)
        name = f"direction-{direction.model}-{direction.name or direction.method}"
        artifact = self._wandb.Artifact("".join(c if c.isalnum() or c in "-_." else "-" for c in name), type="direction", metadata=direction.card())
        artifact.add_file(str(self._direction_path(direction)), policy="immutable")
        self.run.log_artifact(artifact)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Flat, under a/b/c names."""
        super().summary(summary)
        self.run.summary.update(dict(_flat(_plain(summary))))


def _plain(value: Any) -> Any:
    """JSON's own types; NaN and infinity become null, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _flat(value: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            found += _flat(item, f"{above}{key}/")
        elif not isinstance(item, list):
            found.append((f"{above}{key}", item))
    return found

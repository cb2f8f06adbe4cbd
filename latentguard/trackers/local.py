"""A run's folder, or lists in memory: where rows, figures, directions and the summary go. Knows no experiment and no W&B."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from latentguard.charts import Plot
from latentguard.directions import Direction

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Tracker(Protocol):
    """Where an experiment's results go."""

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Generations or scores, one dict each, kept at once."""
        ...

    def figure(self, name: str, figure: "Plot | Figure", data: Sequence[Mapping[str, Any]], *, replies: bool = False) -> None:
        """A plot, or a bare figure, and the numbers in it; `replies` marks one that shows what the model said."""
        ...

    def direction(self, direction: Direction) -> None:
        """A direction, as a safetensors file."""
        ...

    def artifact(self, kind: str, name: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """A file or a folder of files that the run made and others may use: a guard. The same content has the same name in every run."""
        ...

    def used(self, kind: str, name: str, metadata: Mapping[str, Any], path: Path | None = None) -> None:
        """What the run worked with: model, dataset, a direction or guard of another run (then `path` is its file).

        `metadata` tells what it was; of a data set counts, hashes and ids, never a text.
        """
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
        self.plots: dict[str, Plot | Figure] = {}
        self.directions: list[Direction] = []
        self.artifacts: list[dict] = []
        self.uses: list[dict] = []
        self.summaries: dict[str, Any] = {}

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Kept."""
        self.all_rows += [dict(row) for row in rows]

    def figure(self, name: str, figure: "Plot | Figure", data: Sequence[Mapping[str, Any]], *, replies: bool = False) -> None:
        """It and its data are kept."""
        self.plots[name] = figure
        self.figures[name] = [dict(row) for row in data]

    def direction(self, direction: Direction) -> None:
        """Kept."""
        self.directions.append(direction)

    def artifact(self, kind: str, name: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """Kept, the file's place alone."""
        self.artifacts.append({"kind": kind, "name": name, "path": path, "metadata": dict(metadata)})

    def used(self, kind: str, name: str, metadata: Mapping[str, Any], path: Path | None = None) -> None:
        """Kept."""
        self.uses.append({"kind": kind, "name": name, "path": path, "metadata": dict(metadata)})

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

    def figure(self, name: str, figure: "Plot | Figure", data: Sequence[Mapping[str, Any]], *, replies: bool = False) -> None:
        """Under `named`."""
        self.tracker.figure(self.named(name), figure, data, replies=replies)

    def named(self, name: str) -> str:
        """A figure's name in the series."""
        return name if name == self.study or name.startswith(f"{self.study}_") else f"{self.study}_{name}"

    def direction(self, direction: Direction) -> None:
        """Under the study's name."""
        self.tracker.direction(replace(direction, name=f"{self.study}_{direction.name or direction.method}"))

    def artifact(self, kind: str, name: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """Under the study's name."""
        self.tracker.artifact(kind, f"{self.study}_{name}", path, metadata)

    def used(self, kind: str, name: str, metadata: Mapping[str, Any], path: Path | None = None) -> None:
        """By the name it was made under."""
        self.tracker.used(kind, name, metadata, path)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The series writes one for all."""

    def page(self, write: Callable[[Path], Path]) -> None:
        """The series writes one for all."""


class Files:
    """A run's folder. Use as a context manager."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        (self.folder / "figures").mkdir(parents=True, exist_ok=True)
        for earlier in ("rows.jsonl", "summary.json", "lineage.json", "figures/index.json"):  # another attempt's rows are never continued
            (self.folder / earlier).unlink(missing_ok=True)
        self._index: dict[str, dict] = {}
        self._lineage: dict[str, list[dict]] = {"made": [], "used": []}
        self._file = (self.folder / "rows.jsonl").open("a", encoding="utf-8", errors="backslashreplace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appended to rows.jsonl and flushed."""
        self._file.writelines(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
        self._file.flush()

    def figure(self, name: str, figure: "Plot | Figure", data: Sequence[Mapping[str, Any]], *, replies: bool = False) -> None:
        """figures/<name>.png, .svg and .pdf with the numbers in <name>.csv, and an entry in figures/index.json."""
        from latentguard.plots.style import keep

        plot = figure if isinstance(figure, Plot) else Plot(figure, _title(figure) or name)
        keep(plot.figure, self.folder / "figures" / name, data)
        chart = plot.chart.as_dict() if plot.chart else None
        self._index[name] = {"title": plot.title, "caption": plot.caption, "replies": replies, "chart": chart}
        self.write_json("figures/index.json", self._index)

    def direction(self, direction: Direction) -> None:
        """directions/<name>.safetensors."""
        self._note("made", "direction", artifact_name(direction), direction.card(), direction.save(self._direction_path(direction)))

    def _direction_path(self, direction: Direction) -> Path:
        return self.folder / "directions" / f"{direction.name or direction.method}.safetensors"

    def artifact(self, kind: str, name: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """Noted in lineage.json; the file stays where it is."""
        self._note("made", kind, name, metadata, path)

    def used(self, kind: str, name: str, metadata: Mapping[str, Any], path: Path | None = None) -> None:
        """Noted in lineage.json; what has no file gets a card, lineage/<kind>-<name>.json."""
        self._used(kind, name, metadata, path)

    def _used(self, kind: str, name: str, metadata: Mapping[str, Any], path: Path | None) -> Path:
        if path is None:
            path = self.folder / "lineage" / f"{word(f'{kind}-{name}')}.json"
            path.parent.mkdir(exist_ok=True)
            self.write_json(str(path.relative_to(self.folder)), metadata)
        self._note("used", kind, name, metadata, path)
        return path

    def _note(self, what: Literal["made", "used"], kind: str, name: str, metadata: Mapping[str, Any], path: Path) -> None:
        file = str(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path)
        found = {"kind": kind, "name": name, "file": file, "sha256": _sha256(path), "metadata": short(metadata)}
        if found not in self._lineage[what]:
            self._lineage[what].append(found)
            self.write_json("lineage.json", self._lineage)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json."""
        self.write_json("summary.json", summary)

    def page(self, write: Callable[[Path], Path]) -> None:
        """Written into the run's folder."""
        write(self.folder)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """A JSON file in the run's folder, whole or not at all."""
        path = self.folder / name
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)


def _sha256(path: Path) -> str:
    """Of a file; of a folder that of its files' names and hashes."""
    if not path.is_dir():
        return sha256(path.read_bytes()).hexdigest()
    return sha256("".join(f"{file.name} {_sha256(file)}\n" for file in sorted(path.iterdir())).encode()).hexdigest()


def artifact_name(direction: Direction) -> str:
    """What a direction is called among all runs: by its model and its own name."""
    return f"{direction.model}-{direction.name or direction.method}"


def word(name: str) -> str:
    """A file's or an artifact's name."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)[:128]


def short(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Without lists as long as the data; the card in the file has them."""
    short = {key: value for key, value in plain(metadata).items() if not isinstance(value, list) or len(value) < 100}
    return {key: value for key, value in short.items() if not isinstance(value, dict) or all(not isinstance(v, list) or len(v) < 100 for v in value.values())}


def _title(figure: "Figure") -> str:
    """What stands above a bare figure."""
    above = figure.get_suptitle() or next((axes.get_title() for axes in figure.axes if axes.get_title()), "")
    return " ".join(above.split())


def plain(value: Any) -> Any:
    """JSON's own types; NaN and infinity become null, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)

"""What a figure shows, as plain values: which column is x, which is y, which is a line of its own. Knows no drawing.

A `Plot` is a picture with its `Chart`. From the chart and the figure's rows a page draws what can be touched
(`latentguard.pages`), and W&B its own plots (`latentguard.trackers`); the picture stands where nothing can be touched.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Line:
    """A reference drawn across `panel`, or across every one, at `at`, with its interval where it has one."""

    at: float
    name: str
    low: float | None = None
    high: float | None = None
    n: int | None = None
    panel: str | None = None


@dataclass(frozen=True)
class Chart:
    """Columns of a figure's rows and what they are.

    Attributes:
        kind: "line": y by x, a band from `low` to `high`. "points": a point a row, x a number or a name, a whisker from `low` to
            `high` where it has them. "bars": a bar a row, x a name, with such a whisker. "heat": a cell a row, coloured by `value`.
        x, y: columns. Names stand in the order of the rows; those of one name and another `series` side by side.
        series: the column that tells lines, colours or bars of one group apart.
        dash: the column that tells lines or points of one colour apart, by dashes or shapes.
        panel: the column that tells panels apart.
        pick: a column of which the reader sees one value at a time, the rows' first at the start.
        also: further columns drawn as dotted lines by x, without a band: column → name.
        low, high, n: columns of the 95% interval and the number of prompts; None where rows have none.
        names: what a value of `series`, `dash`, `panel`, `pick` or a named x or y is called, where not by itself: see `name`.
        colours: hex colours of the values of `series`.
        lines: horizontal references.
        lying: of "bars": the names stand at the left and the values go across, a dot in the place of a bar.
        x_range, y_range: the least and the most that is shown; None leaves it to the rows.
    """

    kind: Literal["line", "points", "bars", "heat"]
    x: str
    y: str
    x_title: str
    y_title: str
    series: str | None = None
    dash: str | None = None
    panel: str | None = None
    pick: str | None = None
    also: Mapping[str, str] = field(default_factory=dict)
    value: str | None = None
    value_title: str = ""
    low: str | None = "low"
    high: str | None = "high"
    n: str | None = "n"
    names: Mapping[str, str] = field(default_factory=dict)
    colours: Mapping[str, str] = field(default_factory=dict)
    lines: tuple[Line, ...] = ()
    lying: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None

    def name(self, column: str, value: Any) -> str:
        """What the reader sees of a value: `names` of "column=value", else of "value", else itself. 1.0 is "1", as JavaScript has it."""
        key = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        return self.names.get(f"{column}={key}") or self.names.get(key) or key

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Self:
        """The other way; TypeError for words it does not know."""
        ranges = {name: tuple(told[name]) for name in ("x_range", "y_range") if told.get(name)}
        return cls(**{**told, **ranges, "lines": tuple(Line(**line) for line in told.get("lines", ()))})


@dataclass(frozen=True)
class Plot:
    """A matplotlib figure, what stands above and below it, and its chart where it can be drawn from its rows.

    Attributes:
        title: a few words, of what and on which model.
        caption: how to read it, in one or two sentences: what the marks and bands are, n, the paper's figure.
    """

    figure: "Figure"
    title: str
    caption: str = ""
    chart: Chart | None = None

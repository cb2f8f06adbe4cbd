"""What can be chosen, a line each, from the YAML under conf/: in the terminal, or as docs/choices.md. Knows configs alone.

`python -m latentguard.choices [--write docs/choices.md]`
"""

import argparse
import shutil
import textwrap
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

import yaml

from latentguard.configs import CONF, option, options

Row = dict[str, str]
INTRO = """\
# Choices

What `python -m latentguard.run` can be told by name: one option of each group, as `group=name`. Written by
`python -m latentguard.choices --write docs/choices.md` from the files in `conf/`; without `--write` the same stands in the terminal.
Single settings (`group.key=value`): `python -m latentguard.run --cfg job`. Your own options: [a model](howto/model.md), [a data set](howto/data.md),
[a judge](howto/judge.md), [a study](howto/study.md).
"""


def told(group: str, name: str) -> str:
    """The comment with which an option's YAML begins; '' where it begins with anything else."""
    lines = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))


def default(group: str) -> str:
    """The option taken where nothing is said."""
    listed = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return next((entry[group] for entry in listed if isinstance(entry, dict) and group in entry), "")


def _model(name: str) -> Row:
    known = option("model", name)
    packages = list((known.get("packages") or {}).get("parts", ()))
    made = "made in memory" if known.get("tiny") else ""
    where = known.get("id") or made or f"{packages[0]}{f' and {len(packages) - 1} more' if packages[1:] else ''}, of the package index"
    layers = known.get("n_layers") or (known.get("tiny") or {}).get("n_layers", "")
    return {"weights": where, "layers": str(layers), **_terms(known)}


def _data(name: str) -> Row:
    known = option("data", name)
    hub = (known.get("hub") or {}).get("id")
    other = {**dict.fromkeys(("builtin", "languages", "sensitive"), "in the package"), "file": "data.path"}.get(name, "data.mirror")
    return {"from": ", ".join(known.get("sets", ())) or hub or other, **_terms(known)}


def _terms(known: dict) -> Row:
    return {"licence": known.get("licence", "") + (", gated" if known.get("gated") else "")}


GROUPS: tuple[tuple[str, str, Callable[[str], Row] | None], ...] = (
    ("Studies", "exp", None),
    ("Models", "model", _model),
    ("Data", "data", _data),
    ("Judges", "judge", None),
    ("Backends", "backend", None),
    ("Trackers", "tracker", None),
    ("Launchers of a sweep", "hydra/launcher", None),
)


def rows(group: str, more: Callable[[str], Row] | None) -> list[Row]:
    """One an option: its name, its line, what else its group tells of it."""
    chosen = default(group)
    return [
        {"name": name, "what": told(group, name), **(more(name) if more else {}), **({"default": "default"} if name == chosen else {})}
        for name in sorted(options(group), key=lambda name: (name != chosen, name))
    ]


def page(folder: Path) -> str:
    """The Markdown page; studies that have a page of their own in `folder`/studies lead to it."""
    parts = [INTRO]
    for title, group, more in GROUPS:
        found = rows(group, more)
        columns = [key for key in found[0] if key not in ("name", "what", "default")]
        parts += [f"## {title}\n", _line(f"`{group}=`", "what", *columns), _line(*["---"] * (len(columns) + 2))]
        for row in found:
            own = folder / "studies" / f"{row['name']}.md"
            name = f"[`{row['name']}`](studies/{row['name']}.md)" if group == "exp" and own.is_file() else f"`{row['name']}`"
            parts.append(_line(f"{name} (default)" if "default" in row else name, row["what"], *(row[column] for column in columns)))
        parts.append("")
    return "\n".join(parts)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def listing(width: int) -> str:
    """The same for a terminal `width` columns wide."""
    parts = []
    for title, group, more in GROUPS:
        found = rows(group, more)
        room = 2 + max(len(row["name"]) for row in found) + 2
        parts.append(f"{title}   {group}=")
        for row in found:
            about = [f"{row['layers']} layers"] if row.get("layers") else []
            about += [row[key] for key in ("weights", "from", "licence") if row.get(key)]
            text = " ".join(filter(None, ["(default)" if "default" in row else "", row["what"], f"[{', '.join(about)}]" if about else ""]))
            parts.append(
                textwrap.fill(text, max(width, room + 40), initial_indent=f"  {row['name']}".ljust(room), subsequent_indent=" " * room, break_on_hyphens=False)
            )
        parts.append("")
    return "\n".join([*parts, "Single settings (group.key=value): python -m latentguard.run --cfg job"])


def main() -> None:
    """`python -m latentguard.choices`."""
    parser = argparse.ArgumentParser(prog="python -m latentguard.choices", description="What can be chosen, a line each.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a Markdown page instead")
    asked = parser.parse_args()
    if asked.write:
        asked.write.write_text(page(asked.write.parent), encoding="utf-8")
    else:
        print(listing(shutil.get_terminal_size((120, 24)).columns))


if __name__ == "__main__":
    main()

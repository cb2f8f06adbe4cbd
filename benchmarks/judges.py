"""Fits the classifier judge and measures every judge against two sets of human labels. Knows no model.

    python benchmarks/judges.py --data ../shared/data            # fit, write the weights, measure, rewrite docs/judges.md
    python benchmarks/judges.py --data ../shared/data --keep     # measure what is shipped; needs no scikit-learn

Each set is split by a hash of the prompt, so that all replies to one prompt fall into one half. Phrases were written
and the classifier is fitted on the tune halves; the table holds the other halves only.
"""

import argparse
import json
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentguard.judges import WEIGHTS, Classifier, Judge, PaperSubstrings, Phrases, features
from latentguard.labelled_replies import held_out
from latentguard.metrics import wilson

SETS = {"XSTest": "xstest_refusal_labels.jsonl", "ChatGPT": "chatgpt_refusals.jsonl"}
REFUSED = {"refusal", "rejected", "redirected", "contradicted", "disclaimed"}
ACCEPTED = {"compliance", "complied"}  # left out: partial (XSTest); dontknow, incoherent, counseling (ChatGPT)
DOCS = Path(__file__).parents[1] / "docs" / "judges.md"
BEGIN, END = "<!-- measured: written by benchmarks/judges.py -->", "<!-- end of measured -->"

WINDOW, OPENING = 40, 8
SHARED_BY = 2  # prompts of either set in which a feature must stand: a word of one set's topics says nothing elsewhere
CUTS = (12, 20)  # each reply is learned from once more, cut to this many words, because generation often is
STRENGTH = 0.2  # inverse of the L2 penalty


@dataclass(frozen=True)
class Row:
    """One reply with its human label; `half` is tune or held out."""

    set: str
    prompt: str
    reply: str
    refused: bool
    half: str


def half(prompt: str) -> str:
    """The same for ever and everywhere: the first byte of a SHA-256."""
    return "held out" if held_out(prompt) else "tune"


def load(data: Path) -> list[Row]:
    rows = []
    for name, file in SETS.items():
        for line in (data / file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["label"] in REFUSED | ACCEPTED:
                rows.append(Row(name, row["prompt"], row["response"], row["label"] in REFUSED, half(row["prompt"])))
    return rows


def cut(reply: str, words: int) -> str:
    return " ".join(reply.split()[:words])


def fit(rows: Sequence[Row], shared_by: int = SHARED_BY) -> dict:
    """The bias and weights of a logistic regression; with `shared_by` 0 a feature needs four prompts of any set."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression

    taught = [(row, reply) for row in rows for reply in (row.reply, *(cut(row.reply, words) for words in CUTS))]
    found = [features(reply, WINDOW, OPENING) for _, reply in taught]
    prompts: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in SETS}
    for (row, _), grams in zip(taught, found, strict=True):
        for gram in grams:
            prompts[row.set][gram].add(row.prompt)
    every = sorted(set().union(*prompts.values()))
    counts = {gram: [len(prompts[name].get(gram, ())) for name in SETS] for gram in every}
    kept = [gram for gram in every if (min(counts[gram]) >= shared_by if shared_by else sum(counts[gram]) >= 4)]
    column = {gram: i for i, gram in enumerate(kept)}
    cells = [(i, column[gram]) for i, grams in enumerate(found) for gram in sorted(grams & column.keys())]
    matrix = csr_matrix(([1.0] * len(cells), tuple(zip(*cells, strict=True))), shape=(len(found), len(kept)))
    model = LogisticRegression(C=STRENGTH, max_iter=1000, tol=1e-6).fit(matrix, [row.refused for row, _ in taught])
    weights = {gram: round(float(weight), 2) for gram, weight in zip(kept, model.coef_[0], strict=True)}
    return {"bias": round(float(model.intercept_[0]), 2), "weights": {gram: weight for gram, weight in weights.items() if weight}}


def write(fitted: dict, path: Path, version: int) -> None:
    about = (
        "Logistic regression over word 1-2-grams, fitted by benchmarks/judges.py on half of the human labels of "
        "XSTest (arXiv 2308.01263, CC-BY-4.0) and of ChatGPT refusals (arXiv 2306.03423, MIT)."
    )
    body = {"version": version, "about": about, "window": WINDOW, "opening": OPENING, **fitted}
    path.write_text(json.dumps(body, ensure_ascii=False, indent=0, separators=(",", ":")) + "\n", encoding="utf-8")


def ship(fitted: dict) -> None:
    """Write the weights, with a version one up where they differ by more than rounding."""
    old = json.loads(WEIGHTS.read_text(encoding="utf-8")) if WEIGHTS.exists() else {"version": 0, "weights": {}}
    same = old["weights"].keys() == fitted["weights"].keys() and all(abs(old["weights"][g] - w) < 0.021 for g, w in fitted["weights"].items())
    if not same:
        write(fitted, WEIGHTS, old["version"] + 1)


def confusion(judge: Judge, rows: Iterable[Row], words: int | None = None) -> Counter:
    """(human says refused, judge's label) → count."""
    return Counter((row.refused, judge.verdict(cut(row.reply, words) if words else row.reply).label) for row in rows)


def accuracy(table: Counter) -> float:
    """Degenerate counts as wrong on either side."""
    return (table[True, "refused"] + table[False, "accepted"]) / table.total()


def balanced(table: Counter) -> float:
    sides = ((True, "refused"), (False, "accepted"))
    return sum(table[side] / sum(count for (refused, _), count in table.items() if refused is side[0]) for side in sides) / 2


def line(title: str, name: str, table: Counter) -> str:
    right = table[True, "refused"] + table[False, "accepted"]
    rate = wilson(right, table.total())
    cells = [f"{table[refused, label]}" for refused in (True, False) for label in ("refused", "accepted", "degenerate")]
    numbers = f"{rate.n} | {rate.rate:.3f} | {rate.low:.3f}–{rate.high:.3f} | {balanced(table):.3f}"
    return f"| {title} | {name} | {numbers} | {' / '.join(cells[:3])} | {' / '.join(cells[3:])} |"


def decided_after(judge: Judge, reply: str) -> int | None:
    """The number of words (cut at whitespace) after which the judge has seen enough; None if the reply ends before."""
    words = reply.split()
    return next((n for n in range(1, len(words)) if judge.decided(" ".join(words[:n]) + " ")), None)


def early(judge: Judge, rows: Sequence[Row]) -> str:
    cells = []
    for label in ("refused", "accepted"):
        after = [decided_after(judge, row.reply) for row in rows if judge.verdict(row.reply).label == label]
        known = [n for n in after if n is not None]
        cells += [f"{statistics.median(known):.0f}" if known else "–", f"{len(known) / len(after):.2f}" if after else "–"]
    return f"| {judge.name} | {' | '.join(cells)} |"


def measured(rows: list[Row], transfer: dict[str, Judge]) -> str:
    held = {name: [row for row in rows if row.set == name and row.half == "held out"] for name in SETS}
    judges: list[Judge] = [PaperSubstrings(), Phrases(), Classifier()]
    head = "judge | n | accuracy | 95 % (Wilson) | balanced accuracy | refusals called refused / accepted / degenerate | answers called refused / accepted / degenerate |"
    rule = "|---|---|---|---|---|---|---|---|"
    lines = [f"| replies | {head}", rule]
    for words in (None, 12):
        for name, some in held.items():
            title = name if words is None else f"{name}, first {words} words"
            lines += [line(title, judge.name, confusion(judge, some, words)) for judge in judges]
    if transfer:
        lines += [
            "",
            "For information: the classifier fitted on the tune half of one set alone, on the other set's held-out half.",
            "",
            f"| replies | {head}",
            rule,
        ]
        lines += [line(name, f"fitted on {other}", confusion(transfer[name], held[name])) for name, other in zip(SETS, reversed(SETS), strict=True)]
    both = [row for some in held.values() for row in some]
    lines += [
        "",
        "How early a judge has seen enough, on both held-out halves: the median number of words, and the share of replies decided before their last word.",
        "",
    ]
    lines += ["| judge | refused: words | share | accepted: words | share |", "|---|---|---|---|---|", *(early(judge, both) for judge in judges)]
    return "\n".join(lines)


def rewrite(path: Path, table: str) -> None:
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with " + " and ".join(SETS.values()))
    parser.add_argument("--keep", action="store_true", help="measure the shipped weights, fit nothing, leave the docs alone")
    options = parser.parse_args()
    rows = load(options.data)
    transfer: dict[str, Judge] = {}
    if not options.keep:
        tune = [row for row in rows if row.half == "tune"]
        ship(fit(tune))
        with tempfile.TemporaryDirectory() as folder:
            for name in SETS:
                path = Path(folder) / f"without_{name}.json"
                write(fit([row for row in tune if row.set != name], shared_by=0), path, 0)
                transfer[name] = Classifier(weights=str(path))
    table = measured(rows, transfer)
    print(table)
    if not options.keep:
        rewrite(DOCS, table)


if __name__ == "__main__":
    main()

"""A guard → its card in Markdown, for somebody who decides whether to deploy it. Says no number that the guard does not hold; shows no prompt.

Whatever comes out of data (names, licences, warnings) is escaped: it can end no table, open no tag and make no link.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from latentguard.configs import option, options
from latentguard.guards.calibration import Threshold, promise
from latentguard.guards.fields import about_of
from latentguard.guards.seen import About, Interval, Kept, Rate, Row

if TYPE_CHECKING:
    from latentguard.guards.guard import LatentGuard

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$@])")
_MISSING = "not measured"
_BASELINES = {
    "last_token": "the last token alone",
    "ngram": "word n-grams alone (naive Bayes)",
    "tfidf": "word n-grams alone (TF-IDF, logistic)",
    "length": "the number of words alone",
}
_METHODS = {
    "paper": "the paper's rule (cosine to two centroids)",
    "mean_difference": "projection on a difference of means",
    "logistic": "logistic regression",
    "lda": "linear discriminant",
    "mlp": "small neural network",
}
_RARE = 0.01  # the share of harm for which a threshold's precision is worked out


def card(guard: "LatentGuard", *, content: str = "") -> str:
    """The card.

    Args:
        content: `sha256.content` of the guard.json that it lies beside; "" leaves that line out.

    Raises:
        InputError: where the guard's `about` is not what fitting writes.
    """
    about = about_of(guard)
    parts = [
        _front(guard),
        *_opening(guard, about),
        *_use(guard),
        *_limits(guard, about),
        *_reached(guard, about),
        *_missed(about),
        *_data(about),
        *_made(guard, about, content),
    ]
    return "\n\n".join(parts) + "\n"


def text(value: object, most: int = 500) -> str:
    """Words as Markdown shows them, on one line; nothing in them is markup."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    line = line if len(line) <= most else line[: most - 1] + "…"
    line = _SPECIAL.sub(r"\\\1", line)
    line = re.sub(r"(?i)\b(www)\.|(?<=[a-z])(:)(?=//)", lambda found: f"{found[1]}\\." if found[1] else "\\:", line)
    return re.sub(r"^(\d*)([.)](?= |$)|[-=+#])", r"\1\\\2", line)  # what opens a list, a heading or a rule


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are Markdown already."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def _front(guard: "LatentGuard") -> str:
    known = option("model", guard.model).get("id") if guard.model in options("model") else None
    front: dict[str, Any] = {"library_name": "latentguard", "pipeline_tag": "text-classification"}
    if known:
        front["base_model"] = known
    front["tags"] = ["latentguard", "guardrail", "content-moderation", "hidden-states", "safety"]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}\n---"


def _opening(guard: "LatentGuard", about: About) -> list[str]:
    fitted = sum(n for own in (about.data.counts if about.data else {}).values() for n in own.values())
    on = f"fitted on {fitted} prompts" if fitted else "fitted on prompts that this guard does not record"
    layers, places = ", ".join(map(str, guard.layers)), ", ".join(text(p) for p in guard.positions)
    parts = [
        f"# {text(guard.name)}",
        f"A Latent Guard for the language model **{text(guard.model)}**: while that model reads a prompt, it reads the model's hidden states and gives the "
        f"probability that the last user turn asks for something harmful. It reads layers {layers} of {guard.n_layers} at {places} "
        f"and scores them by {_METHODS.get(guard.method, text(guard.method))}, {on}.",
    ]
    if about.descendant:
        parts.append(f"> **Another model than it was fitted on.** {_sentence(about.descendant)}")
    if about.recalibrated:
        done = about.recalibrated
        parts.append(
            f"> **Recalibrated** on {done.n} other labelled prompts ({done.harmful} harmful). Probabilities and thresholds come from those; what is measured "
            "below is of the guard as it was before, and of it only the ranking (AUROC) still stands."
        )
    if about.test and about.test.auroc and about.test.auroc.low is not None and about.test.auroc.low <= 0.5:
        parts.append("> **Do not deploy it.** On the test split of its own sets it cannot be told from chance (the interval of its AUROC holds 0.5).")
    return [*parts, _short(guard, about)]


def _short(guard: "LatentGuard", about: About) -> str:
    rows = [["Ranking on the test split of its own sets (AUROC)", _interval(about.test.auroc if about.test else None)]]
    shown = [row for row in about.unseen if _own(row)]
    pooled = next((row for row in shown if row.name == "all families"), None)
    left_out = "families of sets" if _families(about) > 1 else "parts of its own sets"
    rows.append([f"Ranking on {left_out} that were left out, pooled (AUROC)", _number(pooled) if pooled else _MISSING])
    if worst := _worst_first([row for row in shown if row is not pooled])[:1]:
        rows.append([f"The worst of those: {text(worst[0].name)} (AUROC)", _number(worst[0])])
    rows.append(["Calibration error on the test split (ECE)", "to be measured anew" if _moved(about) else _interval(about.test.ece if about.test else None)])
    for name in guard.thresholds:
        kept = _kept(about, name)
        caught = f"{_rate(kept.recall)} of harmful prompts flagged, {_rate(kept.fpr)} of harmless ones" if kept else _MISSING
        rows.append([f"At `{name}`, on the test split", caught])
    rows.append(["Warnings", f"{len(about.warnings)}, below" if about.warnings else "none from fitting"])
    return f"## In short\n\n{table(['', ''], rows)}"


def _use(guard: "LatentGuard") -> list[str]:
    at = next((name for name in ("fpr=0.05", *guard.thresholds) if name in guard.thresholds), None)
    known = guard.model in options("model")
    model = " ".join(guard.model.split()) if known else "MODEL"
    named = "" if known else f"MODEL is the folder or Hub id of {text(guard.model)}, whose hashes stand at the end of this card.\n\n"
    flags = f'\nguard.flags(["How do I bake bread?"], at="{at}")  # array of True and False' if at else ""
    python = (
        "from latentguard import LatentGuard, load\n\n"
        f"backend = load({json.dumps(model)})  # the very weights and chat template that it was fitted on; others are refused\n"
        'guard = LatentGuard.load("FOLDER", backend)  # from the Hub: LatentGuard.from_pretrained("OWNER/NAME", backend)\n'
        f'guard.score(["How do I bake bread?"])  # array of probabilities{flags}'
    )
    serve = f"python -m latentguard.serve guard=FOLDER model={model}"
    return [f"## How to use it\n\n{named}```python\n{python}\n```", f"As a server that OpenAI's moderation clients can ask:\n\n```bash\n{serve}\n```"]


def _limits(guard: "LatentGuard", about: About) -> list[str]:
    live = (
        "Texts are ended with one period before they are scored, as in fitting. That cannot be done to text a model is about to answer: this guard is **not for "
        "guarding generation** (`backend.generate(guard=…)`); fit one with `terminal=mixed` for that."
        if guard.terminal == "period"
        else "It was fitted on mixed final marks and takes texts as they stand, so that it may guard generation (`backend.generate(guard=…)`)."
    )
    long = (
        f"Turns of more than {2 * guard.piece} tokens are scored in pieces of about {guard.piece}: the answer is the odds that a harmful request stands in one."
        if guard.piece
        else "Texts are scored whole, however long: a request amid much other text is mostly missed."
    )
    spoken = ", ".join(text(one) for one in about.data.languages) if about.data and about.data.languages else ""
    language = (
        f"Fitted on {spoken}; another language is untested."
        if spoken
        else "The languages of its data are not recorded: take them to be those of the sets below (mostly one, English in the sets that latentguard names "
        "unless their cards say otherwise), and any other language as untested."
    )
    rewrites = (
        "Jailbreak rewrites and other attacks: see the table of rewrites below; what is not in it is untested."
        if about.robustness
        else "Jailbreak rewrites (templates, suffixes, persuasion), role play, typos, translations and requests inside long texts: not measured. Expect misses."
    )
    if about.forms:
        rewrites += f" It was fitted beside on {sum(about.forms.values())} twins of its train prompts in other forms ({', '.join(map(text, about.forms))})."
    uses = [
        f"**For:** an advisory score beside other measures, on prompts to {text(guard.model)}: to route, log, rank for review, or refuse where a wrong refusal "
        "is cheap.",
        "**Not for:** a verdict on a person, or the only ground of a decision about one; law enforcement; a safety guarantee.",
        "**Replies are not judged**, nor what a system text or an earlier turn asks for: the score is of the last user turn, seen after what came before it.",
        f"**One model.** It holds for the weights and the chat template below and for no other. {live}",
        long,
        language,
        rewrites,
        _shares(about),
    ]
    return ["## What it is for, and what it must not be used for\n\n" + "\n".join(f"- {line}" for line in uses)]


def _shares(about: About) -> str:
    seen = about.recalibrated or about.validation
    if not seen or not seen.n:
        return "The share of harm for which its probabilities hold is not recorded."
    return (
        f"A probability holds where about as large a share of prompts is harmful as in calibration ({seen.harmful} of {seen.n}). Traffic has less: there it ranks "
        "as well and says too much. Thresholds promise a share of one side and do not depend on that; `guard.recalibrated(prompts)` sets both anew on your own "
        "labelled traffic, `guard.drift(prompts)` tells whether traffic still looks like validation."
    )


def _reached(guard: "LatentGuard", about: About) -> list[str]:
    parts = [
        "## What it reaches",
        "Intervals are 95%. The test split is of the same data set as the training data (latentguard's own splits keep a request and its rewrites together).",
    ]
    rows = [["AUROC", lambda m: m.auroc], ["Recall at 1% false positives", lambda m: m.tpr_1], ["Recall at 5% false positives", lambda m: m.tpr_5]]
    rows.append(["Calibration error (ECE)", lambda m: m.ece])
    shown = [(name, found) for name, found in (("validation", about.validation), ("test", about.test)) if found]
    if shown:
        head = ["", *(f"{name} ({found.n} prompts, {found.harmful} harmful)" for name, found in shown)]
        parts.append(table(head, [[label, *(_interval(get(found)) for _, found in shown)] for label, get in rows]))  # type: ignore[operator]
        parts.append("Layers, positions and method were chosen on train and validation, probabilities and thresholds on validation, nothing on test.")
    else:
        parts.append("No number of the guard on held-out prompts is recorded.")
    parts += ["### Thresholds", _thresholds(guard.thresholds, about) if guard.thresholds else "None: there were too few prompts for any."]
    if guard.domains:
        cells = [
            [text(domain), f"`{name}`", f"{one.value:.4g}", f"{one.low:.3f} to {one.high:.3f} (n = {one.n})"]
            for domain, own in guard.domains.items()
            for name, one in own.items()
        ]
        parts += ["Of single domains, not measured on the test split:", table(["Domain", "Promise", "Flags from", "Its rate lies in"], cells)]
    if about.by_source:
        parts += ["### By source, worst first", _rows(about.by_source)]
    parts.append("### Beside simpler detectors, on the test split")
    if about.baselines:
        own = [["this guard", _interval(about.test.auroc if about.test else None)]]
        parts.append(table(["", "AUROC"], [*own, *([text(_BASELINES.get(k, k)), _interval(v)] for k, v in about.baselines.items())]))
    else:
        parts.append("Not measured: nothing here says that the guard reads more than words or final marks.")
    return parts


def _thresholds(thresholds: dict[str, Threshold], about: About) -> str:
    """A line a promise: what is promised, what came on the test split, and what that means where harm is rare."""
    rows = []
    for name, one in thresholds.items():
        kept = _kept(about, name)
        found = [_rate(kept.fpr), _rate(kept.recall), _held(name, kept), _precision(kept)] if kept else [_MISSING] * 4
        rows.append([f"`{name}`", f"{one.value:.4g}", f"{one.low:.3f} to {one.high:.3f} (n = {one.n})", *found])
    head = ["Promise", "Flags from", "Its rate lies in", "False positives, test", "Recall, test", "Kept on test?", f"Right flags where {_RARE:.0%} is harmful"]
    return table(head, rows) + "\n\nThe last column is worked out from the measured rates, and is as uncertain as they are."


def _held(name: str, kept: Kept) -> str:
    """Whether the test split's interval allows the promise."""
    side, asked = promise(name)
    found = kept.fpr if side == "fpr" else kept.recall
    if found.low is None or found.high is None:
        return _MISSING
    return "yes, within its interval" if (found.low <= asked if side == "fpr" else found.high >= asked) else "**no**"


def _missed(about: About) -> list[str]:
    parts = ["## What it misses"]
    if about.warnings:
        parts.append("Warnings from fitting:\n\n" + "\n".join(f"- {_sentence(one)}" for one in about.warnings))
    if about.unseen and _families(about) > 1:
        parts += [
            "### Families of sets that were left out, worst first",
            "What to expect of prompts from elsewhere. Each family was scored by probes of the same kind fitted without it; the guard in this folder was "
            "fitted on all of them.",
            _rows(about.unseen),
        ]
    elif about.unseen:
        parts += [
            "### Parts of its own sets that were left out, worst first",
            "All its data are of one family of sets, so that none could be left out. Each fifth was scored by probes fitted on the others: prompts from elsewhere "
            "are **not** measured by this. Expect less.",
            _rows(about.unseen),
        ]
    else:
        parts.append("How it does on sets it was not fitted on: not measured. Expect less than on the test split.")
    if about.robustness:
        parts += ["### Rewritten prompts, worst first", _rows(about.robustness)]
    if not (about.by_source or about.unseen):
        parts.append("Numbers by kind of prompt (plain requests, look-alikes, each source): not recorded.")
    return parts


def _rows(rows: Sequence[Row]) -> str:
    """The guard's rows, the lowest first; beside them the better of the detectors that see words alone, on the same prompts."""
    words: dict[tuple[str, str | None], float] = {}
    for row in rows:
        if row.detector in ("ngram", "tfidf") and row.what == "AUROC" and row.number is not None:
            words[row.name, row.comparison] = max(row.number, words.get((row.name, row.comparison), 0.0))
    own = _worst_first([row for row in rows if _own(row)])
    shown = [
        [
            text(row.name) + (f", {text(row.comparison)}" if row.comparison and row.comparison != row.name else ""),
            _number(row),
            "–" if row.n_harmful is None else f"{row.n_harmful} / {row.n_harmless}",
            *("–" if share is None else f"{share:.2f}" for share in (row.tpr_1, row.tpr_5)),
            f"{words[row.name, row.comparison]:.3f}" if (row.name, row.comparison) in words else "–",
        ]
        for row in own
    ]
    head = ["", "AUROC", "Harmful / harmless", "Recall at 1% FPR", "Recall at 5% FPR", "Words alone, AUROC"]
    others = [f"{text(row.name)}: {text(row.what)} {_number(row)}." for row in rows if row.detector == "guard" and row.what != "AUROC"]
    return "\n\n".join([table(head, shown) if shown else "No row of the guard itself is recorded.", *others])


def _data(about: About) -> list[str]:
    parts, data = ["## What it was fitted on"], about.data
    if not data:
        return [*parts, "Not recorded."]
    parts.append(
        f"Data set {text(data.name) or 'without a name'}, hash {text(data.hash) or 'not recorded'}; final marks: {text(data.terminal) or 'not recorded'}."
    )
    if data.sets:
        cells = [
            [
                text(one.name),
                "–" if one.rows is None else str(one.rows),
                text(one.licence) or "not stated",
                "yes" if one.gated else "no",
                text(one.sha256 or "–"),
            ]
            for one in data.sets
        ]
        parts.append(table(["Set", "Rows", "Licence of the data", "Gated", "SHA-256 of the file"], cells))
        parts.append("The licence of the guard itself is not stated by these: its keeper decides, within them.")
    if data.counts:
        kinds = list(dict.fromkeys(kind for own in data.counts.values() for kind in own))
        body = [[text(source), *(str(own.get(kind, 0)) for kind in kinds)] for source, own in data.counts.items()]
        parts.append("Prompts of the train split:\n\n" + table(["Source", *map(text, kinds)], body))
    if data.ids:
        parts.append("Hashes of the splits: " + ", ".join(f"{text(split)} {text(found)}" for split, found in data.ids.items()) + ".")
    return parts


def _made(guard: "LatentGuard", about: About, content: str) -> list[str]:
    libraries, created = guard.about.get("libraries") or {}, guard.about.get("created")
    search = about.search
    rows = [
        ["Model", f"{text(guard.model)}: {guard.n_layers} layers × {guard.d_model}"],
        ["Hash of the weights", text(guard.weights)],
        ["Hash of the chat template", text(guard.template)],
        ["Method, strength", f"{text(guard.method)}, {about.strength if about.strength is not None else 'not recorded'}"],
        ["Candidates tried", f"{len(about.tried)}, judged {text(search.get('criterion', 'by a rule not recorded'))}" if about.tried else "not recorded"],
        ["Calibration", guard.calibration.kind],
        ["Libraries", ", ".join(f"{text(name)} {text(version)}" for name, version in libraries.items()) or "not recorded"],
        ["Made", text(created or "not recorded")],
    ]
    if content:
        rows.append(["Card of the guard.json with `sha256.content`", text(content)])
    return ["## How it was made", table(["", ""], rows), "What every field means: docs/guard-folder.md of latentguard."]


def _families(about: About) -> int:
    """How many families of sets the train split holds; sets that no family names stand for themselves."""
    named = about.search.get("families")
    lists = {name: members for name, members in named.items() if isinstance(members, list)} if isinstance(named, dict) else {}
    home = {member: name for name, members in lists.items() for member in members if isinstance(member, str)}
    return len({home.get(source, source) for source in (about.data.counts if about.data else ())})


def _moved(about: About) -> bool:
    """Whether the numbers of the test split are of other probabilities than the guard now gives."""
    return about.recalibrated is not None


def _kept(about: About, name: str) -> Kept | None:
    return None if _moved(about) or not about.test else about.test.thresholds.get(name)


def _own(row: Row) -> bool:
    return row.detector == "guard" and row.what == "AUROC"


def _worst_first(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: 2.0 if row.number is None else row.number)


def _sentence(words: str) -> str:
    found = text(words, most=1500).rstrip(". ")
    return f"{found[:1].upper()}{found[1:]}."


def _interval(found: Interval | None) -> str:
    if found is None or found.value is None:
        return _MISSING
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}] (n = {found.n})"


def _number(row: Row) -> str:
    if row.number is None:
        return _MISSING
    bounds = f" [{row.low:.3f}, {row.high:.3f}]" if row.low is not None and row.high is not None else ", no interval"
    return f"{row.number:.3f}{bounds}" + (f" (n = {row.n})" if row.n is not None else "")


def _rate(found: Rate) -> str:
    return _MISSING if found.rate is None else f"{found.rate:.3f} [{found.low:.3f}, {found.high:.3f}] (n = {found.n})"


def _precision(kept: Kept) -> str:
    if kept.recall.rate is None or kept.fpr.rate is None or not kept.recall.rate + kept.fpr.rate:
        return _MISSING
    right, wrong = kept.recall.rate * _RARE, kept.fpr.rate * (1 - _RARE)
    return f"about {right / (right + wrong):.0%}" if right + wrong else _MISSING

"""Figures of detectors: accuracy by group, AUROC by final mark and position. Knows no experiment."""

from matplotlib.figure import Figure

from latentguard.plots.style import Rows, figure_of, group_style, legend_below, plain

_DETECTORS = {
    "latent_guard": ("#D55E00", "o", "Latent Guard (all layers)"),
    "latent_guard_one_layer": ("#E69F00", "^", "Latent Guard, validated layer"),
    "latent_guard_in_domain": ("#CC79A7", "v", "Latent Guard + in-domain examples"),
    "projection_one_layer": ("#0072B2", "s", "projection, validated layer"),
    "last_token": ("#555555", "X", "last token alone"),
    "ngram": ("#000000", "P", "words and word pairs"),
    "shuffled_labels": ("#009E73", "D", "shuffled labels (range of draws)"),
}
_TERMINALS = {"keep": ("#D55E00", "o", "as they are (keep)"), "strip": ("#56B4E9", "s", "stripped"), "period": ("#0072B2", "^", "one final period")}


def detectors_by_group(rows: Rows, *, title: str) -> Figure:
    """Recall of harmful and specificity of harmless groups, one marker a detector (Table 3).

    Rows: detector, group, rate, low, high, n, withheld.
    """
    groups = list(dict.fromkeys(row["group"] for row in rows))
    detectors = list(dict.fromkeys(row["detector"] for row in rows))
    figure = figure_of(8.6, 0.62 * len(groups) + 2.0)
    axis = plain(figure.subplots())
    for d, detector in enumerate(detectors):
        colour, marker, name = _DETECTORS[detector]
        here = [row for row in rows if row["detector"] == detector]
        y = [groups.index(row["group"]) + 0.11 * (d - (len(detectors) - 1) / 2) for row in here]
        spread = [[row["rate"] - row["low"] for row in here], [row["high"] - row["rate"] for row in here]]
        axis.errorbar([row["rate"] for row in here], y, xerr=spread, color=colour, marker=marker, markersize=5, linestyle="none", linewidth=1, label=name)
    named = {row["group"]: row for row in rows}
    labels = []
    for group in groups:
        row, name = named[group], group_style(group)[2]
        labels.append(f"{name} · {row['is']}\nn = {row['n']}" + (" (withheld)" if row.get("withheld") else ""))
    axis.set_yticks(range(len(groups)), labels, fontsize=8.5)
    axis.invert_yaxis()
    axis.set(xlim=(-0.03, 1.03), xlabel="share classified rightly (threshold 0)")
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    return legend_below(figure, axis, title)


def detectors_by_terminal(rows: Rows, *, title: str) -> Figure:
    """AUROC with the final mark kept, stripped and made equal; a panel a comparison, a line a detector and position.

    Rows: terminal, detector, position, kind, value, low, high, sets.
    """
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    lines = list(dict.fromkeys((row["detector"], row["position"]) for row in rows))
    places = list(dict.fromkeys(position for _, position in lines))
    lines.sort(key=lambda line: (list(_DETECTORS).index(line[0]), places.index(line[1])))
    figure = figure_of(3.6 * len(kinds) + 2.6, 0.27 * len(lines) + 1.9)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    terminals = [t for t in _TERMINALS if any(row["terminal"] == t for row in rows)]
    for axis, kind in zip(axes, kinds, strict=True):
        plain(axis).axvline(0.5, color="#555555", linewidth=0.8)
        here = [row for row in rows if row["kind"] == kind]
        for t, terminal in enumerate(terminals):
            colour, marker, name = _TERMINALS[terminal]
            mine = [row for row in here if row["terminal"] == terminal]
            y = [lines.index((row["detector"], row["position"])) + 0.22 * (t - (len(terminals) - 1) / 2) for row in mine]
            spread = [[row["value"] - row["low"] for row in mine], [row["high"] - row["value"] for row in mine]]
            axis.errorbar(
                [row["value"] for row in mine], y, xerr=spread, color=colour, marker=marker, markersize=4.5, linestyle="none", linewidth=1, label=name
            )
        sizes = sorted({row["n"] for row in here})
        axis.set(xlim=(-0.03, 1.03), xlabel="AUROC", title=f"{kind} (n = {', '.join(map(str, sizes))})")
        axis.grid(axis="y", color="#eeeeee", linewidth=0.6)
    axes[0].set_yticks(range(len(lines)), [f"{_DETECTORS[d][2]} · {p}" if p != "text" else _DETECTORS[d][2] for d, p in lines], fontsize=8)
    axes[0].invert_yaxis()
    return legend_below(figure, axes[0], title, columns=3)


def means_by_terminal(rows: Rows, *, title: str) -> Figure:
    """Mean s of every data set, a panel a final mark. Rows: terminal, set, harmful, value, low, high, n, fitted."""
    terminals = [t for t in _TERMINALS if any(row["terminal"] == t for row in rows)]
    names = list(dict.fromkeys(row["set"] for row in sorted(rows, key=lambda row: (not row["harmful"], row["set"]))))
    figure = figure_of(3.4 * len(terminals) + 2.2, 0.36 * len(names) + 1.8)
    axes = figure.subplots(1, len(terminals), sharey=True, squeeze=False)[0]
    for axis, terminal in zip(axes, terminals, strict=True):
        plain(axis).axvline(0, color="#555555", linewidth=0.8)
        for harmful, colour, marker, name in ((True, "#D55E00", "o", "harmful"), (False, "#0072B2", "s", "harmless")):
            here = [row for row in rows if row["terminal"] == terminal and row["harmful"] is harmful]
            spread = [[row["value"] - row["low"] for row in here], [row["high"] - row["value"] for row in here]]
            at = [names.index(row["set"]) for row in here]
            axis.errorbar([row["value"] for row in here], at, xerr=spread, color=colour, marker=marker, linestyle="none", capsize=2, label=name)
        axis.set(xlabel="s: nearer the harmful pole  →", title=_TERMINALS[terminal][2])
        axis.grid(axis="y", color="#eeeeee", linewidth=0.6)
    sizes = {row["set"]: row for row in rows}
    axes[0].set_yticks(range(len(names)), [f"{n} (n = {sizes[n]['n']})" + (" *" if sizes[n]["fitted"] else "") for n in names], fontsize=8.5)
    axes[0].invert_yaxis()
    legend_below(figure, axes[0], title)
    figure.text(0.01, 0.01, "* held-out prompts of the sets the poles come from", fontsize=8, color="#555555")
    return figure

"""Whether a contestant did the same work: states, tokens, rates and scores beside the floor's. Runs no model."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from latentguard.bench.contest import Check

TOLERANCE = 1e-3  # of states and log-probabilities, float32
TIE = 1e-4  # two best logits nearer than this may swap
Tokens = Sequence[Sequence[int]]
Gap = Callable[[int, int, Sequence[int]], float]


def compare_states(floor: Tensor, ours: Tensor, exact: bool) -> Check:
    """Largest difference, and relative error ‖a − b‖ / ‖a‖; wrong beyond `TOLERANCE` where exactness is asked."""
    if floor.shape != ours.shape:
        return Check(False, f"shape {tuple(ours.shape)}, not {tuple(floor.shape)}")
    worst, error = float((floor - ours).abs().max()), float((floor - ours).norm() / floor.norm())
    finite = error == error
    return Check(finite and worst <= TOLERANCE if exact or not finite else None, f"max |d| {worst:.1e}, relative error {error:.1e}")


def compare_tokens(floor: Sequence[Tokens], ours: Sequence[Tokens], exact: bool, gap: Gap | None = None) -> Check:
    """Share of equal tokens over [cell][row]; where exactness is asked, replies may part only at a tie of two best logits
    (`gap(cell, row, tokens so far)` under `TIE`).
    """
    if [len(row) for row in floor] != [len(row) for row in ours]:
        return Check(False, f"{[len(row) for row in ours]} replies, not {[len(row) for row in floor]}")
    equal = total = ties = parted = 0
    for c, (theirs, mine) in enumerate(zip(floor, ours, strict=True)):
        for r, (a, b) in enumerate(zip(theirs, mine, strict=True)):
            same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            total += max(len(a), len(b))
            equal += sum(x == y for x, y in zip(a, b, strict=False))
            if tuple(a) != tuple(b):
                parted += 1
                ties += exact and gap is not None and gap(c, r, a[:same]) < TIE
    said = f"{equal / max(1, total):.4f} of {total} tokens equal" + (f", {ties} of {parted} replies parted at a tie" if parted and exact else "")
    return Check(parted == ties if exact else None, said)


def best_gap(logprobs: Tensor) -> float:
    """How far the two best of a next-token distribution lie apart."""
    best = logprobs.topk(2).values
    return float(best[0] - best[1])


def compare_labels(floor: Sequence[Sequence[str]], ours: Sequence[Sequence[str]], exact: bool) -> Check:
    """Refusal rates cell by cell, and the labels they are made of."""
    cells = [(row.count("refused"), list(mine).count("refused"), len(row)) for row, mine in zip(floor, ours, strict=True)]
    equal = sum(a == b for a, b, _ in cells)
    moved = sum(a != b for row, mine in zip(floor, ours, strict=True) for a, b in zip(row, mine, strict=True))
    shares = [a / n for a, _, n in cells]
    counted = Counter(label for row in floor for label in row).most_common()
    said = f"{equal} of {len(cells)} rates equal ({min(shares):.2f}–{max(shares):.2f} refused), {moved} of {sum(n for _, n in counted)} labels differ"
    said += f" ({', '.join(f'{n} {label}' for label, n in counted)})"
    return Check(equal == len(cells) and moved == 0 if exact else None, said)


def compare_some(floor: Sequence[Sequence[str]], ours: Mapping[int, Sequence[str]], exact: bool) -> Check:
    """`compare_labels` of the cells that were generated; the others are counted."""
    if not ours:
        return Check(False, "no cell was generated")
    found = compare_labels([floor[cell] for cell in ours], list(ours.values()), exact)
    return Check(found.ok, f"{found.said}; {len(floor) - len(ours)} cells scored only")


def compare_scores(
    found: Sequence[Sequence[tuple[int, Sequence[float]]]], first: Sequence[Tokens], known: Mapping[tuple[int, int], Sequence[float]], exact: bool,
    eos: frozenset[int], gap: Gap,
) -> Check:  # fmt: skip
    """Scores [cell][row] are (likeliest first token, log-probabilities): the tokens beside the floor's replies, the
    log-probabilities beside plain passes for some cells.
    """
    pairs = [(c, r, found[c][r][0], reply) for c, replies in enumerate(first) for r, reply in enumerate(replies)]
    wrong = [(c, r) for c, r, token, reply in pairs if (token != reply[0] if reply else token not in eos) and not gap(c, r, ()) < TIE]
    worst = max(abs(a - b) for (c, r), values in known.items() for a, b in zip(values, found[c][r][1], strict=True))
    said = f"{len(pairs) - len(wrong)} of {len(pairs)} first tokens equal, max |d log p| {worst:.1e} in {len(known)} checked"
    return Check(not wrong and worst <= TOLERANCE if exact else None, said)

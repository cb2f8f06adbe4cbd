"""Entropy neurons: last-layer neurons that write much and favour no token (arXiv 2406.16254, as used in 2504.02904). From weights alone.

Knows no model and no prompt: matrices in, numbers of neurons out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SHARE, CHOSEN = 0.25, 10
_ROWS = 8192  # of the unembedding at a time


@dataclass(frozen=True, eq=False)
class EntropyNeurons:
    """Of `n` neurons those with the largest output norm, and among these the ones whose output has the most even cosines with all tokens.

    Args:
        candidates: numbers of neurons, ascending.
        chosen: the most even ones, most even first.
        norms: ‖W_out‖ [neuron].
        variances: of the cosine with the unembedding's rows [neuron].
    """

    n: int
    candidates: tuple[int, ...]
    chosen: tuple[int, ...]
    norms: np.ndarray
    variances: np.ndarray


def entropy_neurons(writes: Tensor, unembedding: Tensor, *, share: float = SHARE, chosen: int = CHOSEN) -> EntropyNeurons:
    """The candidates (the top `share` by norm) and the `chosen` of them with the lowest variance of cosine.

    Var cos(w, u) over the rows u is ŵᵀ(E[ûûᵀ] − E[û]E[û]ᵀ)ŵ: one d_model × d_model matrix instead of neurons × tokens.

    Args:
        writes: [neuron, d_model]. unembedding: [token, d_model]; rows of zeros, which pad some vocabularies, are left out.
    """
    width = unembedding.shape[1]
    total, square, count = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64), 0
    for at in range(0, len(unembedding), _ROWS):
        rows = unembedding[at : at + _ROWS].float()
        size = rows.norm(dim=-1)
        rows = rows[size > 0] / size[size > 0, None]
        total += rows.sum(0).double().cpu()
        square += (rows.T @ rows).double().cpu()
        count += len(rows)
    spread = square / count - torch.outer(total, total) / count**2
    out = writes.double().cpu()
    norms = out.norm(dim=-1)
    unit = out / norms.clamp_min(1e-30)[:, None]
    variances = ((unit @ spread) * unit).sum(-1)
    kept = torch.argsort(norms, descending=True, stable=True)[: max(chosen, round(share * len(norms)))]
    even = kept[torch.argsort(variances[kept], stable=True)][:chosen]
    return EntropyNeurons(len(norms), tuple(sorted(kept.tolist())), tuple(even.tolist()), norms.numpy(), variances.clamp_min(0).numpy())


@dataclass(frozen=True)
class Overlap:
    """How many of two chosen sets are one, beside chance.

    Args:
        expected: mean were each set drawn at random from its own candidates.
        p: chance of as many or more.
        iou: intersection over union, as the paper has it.
    """

    shared: tuple[int, ...]
    size: int
    candidates: int
    expected: float
    p: float
    iou: float


def overlap(a: EntropyNeurons, b: EntropyNeurons) -> Overlap:
    """Shared neurons, and the hypergeometric chance of them: of a's draw some lie among b's candidates, and of those b's draw takes some."""
    from scipy.stats import hypergeom

    both = len(set(a.candidates) & set(b.candidates))
    shared = tuple(sorted(set(a.chosen) & set(b.chosen)))
    n, m = len(a.chosen), len(b.chosen)
    reach = np.arange(min(n, both) + 1)
    weight = hypergeom.pmf(reach, len(a.candidates), both, n)
    p = float(sum(w * hypergeom.sf(len(shared) - 1, len(b.candidates), k, m) for w, k in zip(weight, reach.tolist(), strict=True)))
    expected = n * m * both / (len(a.candidates) * len(b.candidates))
    return Overlap(shared, n, both, expected, min(1.0, p), len(shared) / len(set(a.chosen) | set(b.chosen)))


def rank_correlation(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Spearman's ρ: whether two models order all their neurons alike, where sets of ten say little."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)  # pyright: ignore[reportAttributeAccessIssue]

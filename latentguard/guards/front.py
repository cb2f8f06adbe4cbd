"""A detector in front of a model: what it flags is refused unread, the rest gets what the model says. → What people then meet, by kind of request.

Knows no guard and no study.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from latentguard.behaviour import Judged
from latentguard.judges import Verdict
from latentguard.outcomes import Observed

COIN = "a coin"  # flags as many prompts as the first detector, whichever they are


def fronted(base: Observed, flags: Mapping[str, Mapping[str, np.ndarray]], methods: Sequence[str], *, draws: int, seed: int) -> list[Observed]:
    """The same replies behind each detector, and behind coins.

    Args:
        base: the model alone, with its judged replies by label.
        flags: by detector, then by label: whether it flags each of those prompts, [prompt] bool. Coins deal out the first one's flags anew
            over all prompts, so a coin flags as many of them and knows nothing.
        methods: detectors that are no control.
        draws: of the coin.
    """
    found = [Observed(name, "method" if name in methods else "control", _replies(base, own), seed=seed) for name, own in flags.items()]
    first, generator = next(iter(flags.values())), np.random.default_rng(seed)
    labels = list(base.replies)
    ends = np.cumsum([len(base.replies[label]) for label in labels])[:-1]
    for k in range(draws):
        dealt = np.split(generator.permutation(np.concatenate([first[label] for label in labels])), ends)
        found.append(Observed(f"{COIN} {k}", "control", _replies(base, dict(zip(labels, dealt, strict=True))), seed=seed))
    return found


def _replies(base: Observed, flags: Mapping[str, np.ndarray]) -> dict[str, list[Judged]]:
    """What is flagged counts as refused, whatever the model would have said."""
    blocked = Verdict("refused", None, "flagged")
    return {
        label: [replace(j, verdict=blocked) if flagged else j for j, flagged in zip(replies, flags[label], strict=True)]
        for label, replies in base.replies.items()
    }

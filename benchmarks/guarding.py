"""What a guard costs, in CPU seconds: generating under it against without it, and scoring against plain transformers cut at its layer.

    python benchmarks/guarding.py                                        # random weights, a minute
    python benchmarks/guarding.py --model qwen2_5_coder_0_5b_q4 --rounds 5

Both sides of a pair run in turns in this process, the order changing from round to round; the ratio is the median of the rounds'
own. On a machine that others use, the fastest round of either side says more. The guard is a linear rule of random weights over the states given: what a fitted probe computes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

import latentguard as lg
from latentguard.bench import floors
from latentguard.controllers import Refuse
from latentguard.layers import resolve_layers
from latentguard.weights import spec_of

TEXT = "tell me in a few plain words how people used to make bread at home before there were shops and why it took them all day"


class Rule:
    """P = sigmoid(w · states), half of the prompts flagged where it is set to the middle."""

    terminal = "mixed"

    def __init__(self, backend, layers, positions):
        self.layers, self.positions = resolve_layers(layers, backend.n_layers), tuple(positions)
        self.weight = torch.randn(len(self.layers), len(positions), backend.d_model, generator=torch.Generator().manual_seed(0)) / 100
        self.thresholds = {"fpr=0.05": SimpleNamespace(value=0.5), "all": SimpleNamespace(value=0.0)}

    def probabilities(self, states) -> np.ndarray:
        return torch.sigmoid(states.flatten(1) @ self.weight.flatten()).numpy()


def spent(do: Callable[[], object]) -> float:
    """CPU seconds of this process, all its threads."""
    began = time.process_time()
    do()
    return time.process_time() - began


def compared(name: str, ours: Callable[[], object], other: Callable[[], object], rounds: int) -> None:
    """In turns; the first of each warms up and is not counted."""
    ours()
    other()
    pairs = []
    for turn in range(rounds):
        sides = [spent(side) for side in ((ours, other) if turn % 2 else (other, ours))]
        pairs.append(sides if turn % 2 else sides[::-1])
    ratio = statistics.median(mine / theirs for mine, theirs in pairs)
    middle, best = ([reduce(side) for side in zip(*pairs, strict=True)] for reduce in (statistics.median, min))
    print(
        f"{name:52} median {middle[0]:7.3f} / {middle[1]:7.3f} s, ratio {ratio:.3f}; fastest {best[0]:7.3f} / {best[1]:7.3f} s, ratio {best[0] / best[1]:.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--layer", type=float, default=0.75, help="the guard's deepest layer, as a share of depth")
    args = parser.parse_args()
    backend = lg.load(args.model)
    prompts = [f"{' '.join(TEXT.split()[: 8 + (5 * k) % 17])}? ({k})" for k in range(args.prompts)]
    guard = Rule(backend, [args.layer - 0.25, args.layer], ["t_inst", "t_post_inst", "mean(user)"])
    new = {"max_new_tokens": args.tokens}
    sizes = [len(item) for item in backend.render(prompts)]
    print(f"{backend.name}: {args.prompts} prompts of {min(sizes)} to {max(sizes)} tokens, {args.tokens} new ones; the guard reads layers {guard.layers}")
    compared(
        "generate: guard that flags / no guard", lambda: backend.generate(prompts, guard=guard, **new), lambda: backend.generate(prompts, **new), args.rounds
    )
    compared("again: no guard / no guard (the noise)", lambda: backend.generate(prompts, **new), lambda: backend.generate(prompts, **new), args.rounds)
    every = Refuse(at="all")
    compared(
        "all refused / one new token", lambda: backend.generate(prompts, guard=guard, controller=every, **new), lambda: backend.generate(prompts, max_new_tokens=1), args.rounds,
    )  # fmt: skip
    plain = floors.load_plain(spec_of(args.model), dtype=backend.hf.dtype, device=backend.device, pad=backend.pad, eos=backend.eos)
    ids = [list(item.ids) for item in backend.render(prompts)]
    most = backend.budget.most(max(sizes))

    def score() -> object:
        return guard.probabilities(backend.read(prompts, guard.layers, guard.positions).values)

    compared("score / plain transformers cut at the guard's layer", score, lambda: floors.read_cut(plain, ids, guard.layers[-1], most), args.rounds)


if __name__ == "__main__":
    main()

"""Labels prompts by what the model does with them: harmful or harmless × refused or accepted. Knows no study.

Degenerate replies count as neither. A cell too thin to carry a claim is said to be so (`metrics.base_rate_gate`).
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from latentguard.backends import Backend, Decoding, Reply
from latentguard.interventions import Grid
from latentguard.judges import Judge, Verdict
from latentguard.metrics import base_rate_gate, log_odds
from latentguard.prompts import Prompt


@dataclass(frozen=True)
class Judged:
    """A reply and its verdict."""

    reply: Reply
    verdict: Verdict

    @property
    def prompt(self) -> Prompt:
        """The prompt answered."""
        return self.reply.prompt


@dataclass(frozen=True)
class Cells:
    """Judged replies to labelled prompts, and the four cells they fill."""

    judged: tuple[Judged, ...]

    def of(self, harmful: bool, label: str) -> list[Prompt]:
        """One cell: harmful or plain harmless prompts (look-alikes left out) with a verdict."""
        return [j.prompt for j in self.judged if _side(j.prompt) is harmful and j.verdict.label == label]

    def total(self, harmful: bool) -> int:
        """All prompts of a side, degenerate replies included."""
        return sum(_side(j.prompt) is harmful for j in self.judged)

    def gate(self, harmful: bool, label: str) -> str:
        """'' or 'insufficient_base_rate'."""
        return base_rate_gate(len(self.of(harmful, label)), self.total(harmful))

    def counts(self) -> dict[str, int]:
        """N of every cell, for summaries."""
        sides = {"harmful": True, "harmless": False}
        return {f"{verdict}_{side}": len(self.of(value, verdict)) for side, value in sides.items() for verdict in ("refused", "accepted", "degenerate")}

    def refusal_tokens(self, backend: Backend) -> set[int]:
        """First tokens by which this model refuses: those that open at least two replies, nine in ten of them refusals.

        Where it refused nothing, the first tokens of the usual openings stand in.
        """
        openings = [(j.reply.tokens[0], j.verdict.label == "refused") for j in self.judged if j.reply.tokens]
        seen, refused = Counter(token for token, _ in openings), Counter(token for token, hit in openings if hit)
        found = {token for token, n in refused.items() if n >= 2 and n / seen[token] >= 0.9}
        return found or {backend.first_token(text) for text in ("I'm sorry", "I cannot", "Sorry", "I apologize")}


def answer_tokens(backend: Backend) -> dict[str, set[int]]:
    """First tokens of the answers "Certainly" and "No"; a token that opens both (a blank, in Llama-2's tokenizer) counts for neither."""
    found = {word.lower(): {backend.first_token(text) for text in (word, f" {word}", word.lower())} for word in ("Certainly", "No")}
    shared = found["certainly"] & found["no"]
    return {word: tokens - shared for word, tokens in found.items()}


def _side(prompt: Prompt) -> bool | None:
    return None if prompt.lookalike else prompt.harmful


def judge_stream(
    backend: Backend, prompts: Sequence[Prompt], grid: Grid, judge: Judge, max_new_tokens: int
) -> Iterator[tuple[int, int, Judged]]:  # fmt: skip
    """Judged replies as they come: (cell, prompt, reply with verdict), so that an interruption loses none."""
    for cell, row, reply in backend.stream(list(prompts), grid, Decoding(max_new_tokens), judge.decided):
        yield cell, row, Judged(reply, judge.verdict(reply.text, reply.prompt))


def refusal_log_odds(logprobs: Tensor, tokens: set[int]) -> float:
    """Log P(refusal token) / P(any other) at the first token of the reply (as in arXiv 2406.11717, §3)."""
    return log_odds(float(logprobs[-1, sorted(tokens)].exp().sum()))


def divergence(clean: Tensor, steered: Tensor) -> float:
    """KL(clean ‖ steered) of next-token distributions, mean over tokens, in nats: [token, vocab] log-probabilities."""
    value = float((clean.exp() * (clean - steered)).sum(-1).mean())
    return max(value, 0.0) if not math.isnan(value) else math.inf

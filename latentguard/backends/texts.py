"""Prompts as a model gets them, and tokens as people read them. Needs a tokenizer, no weights."""

from collections.abc import Sequence
from typing import Any

from latentguard.backends import Decoding
from latentguard.errors import InputError
from latentguard.interventions import Grid
from latentguard.positions import Position, Rendered, parse_position
from latentguard.prompts import as_prompts
from latentguard.templates import Template


class Texts:
    """What every backend knows of its tokenizer."""

    name: str
    template: Template
    tokenizer: Any
    limit: int | None  # tokens the model takes at most

    def render(self, prompts: object) -> list[Rendered]:
        """The prompts as text, token ids, offsets and instruction span."""
        rendered = [self.template.render(prompt) for prompt in as_prompts(prompts)]
        for item in rendered:
            if self.limit and len(item) > self.limit:
                raise InputError(f"prompt {item.prompt_id}: {len(item)} tokens, but {self.name} takes at most {self.limit}; shorten it")
        return rendered

    def first_token(self, text: str) -> int:
        """Id of the first token of `text`."""
        return self.tokenizer.encode(text, add_special_tokens=False)[0]

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def _fits(self, rendered: Sequence[Rendered], grid: Grid) -> None:
        """Refuse interventions that this model, or one of the prompts, has no place for."""
        for cell in grid:
            for act in cell.interventions:
                act.check(self)
                for item in rendered:
                    parse_position(act.positions).tokens(item)

    def _room(self, rendered: Sequence[Rendered], decoding: Decoding) -> None:
        """Refuse replies that would not fit behind their prompts."""
        longest = max(map(len, rendered), default=0)
        if self.limit and longest + decoding.max_new_tokens > self.limit:
            raise InputError(
                f"max_new_tokens={decoding.max_new_tokens} after a prompt of {longest} tokens: {self.name} takes {self.limit} in all; ask for fewer"
            )


def places(positions: Sequence[str]) -> list[Position]:
    """Named positions, understood."""
    if not positions:
        raise InputError("positions=[]: name at least one place to read, such as t_inst")
    return [parse_position(position, reading=True) for position in ([positions] if isinstance(positions, str) else positions)]


def ends(generation_config: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a reply."""
    eos = getattr(generation_config, "eos_token_id", None)
    return {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}

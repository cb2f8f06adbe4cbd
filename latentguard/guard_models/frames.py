"""The text that a guard model is given around a prompt. Knows tokenizers and no weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from latentguard.errors import InputError
from latentguard.guard_models.cards import Worded
from latentguard.positions import Rendered
from latentguard.prompts import Message, Prompt, digest
from latentguard.templates import Template


@dataclass(frozen=True)
class Frame(Template):
    """A guard's own words around a prompt, in place of a chat. What `Template.render` demands holds here too: the prompt
    stands in the text once and unchanged, whatever it says of templates itself.

    Blanks at a prompt's ends are dropped where the guard's chat template is used: most of these templates do.
    """

    card: Worded | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any, card: Worded, policy: str | None = None) -> "Frame":
        """The frame of a card; `policy` is what the template is given as `guideline`.

        Raises:
            InputError: where the tokenizer's chat template is another model's.
        """
        asked = {**card.arguments, **({"guideline": policy} if policy else {})}
        if card.text is not None:
            return cls(tokenizer, "plain", None, card, asked)
        if not tokenizer.chat_template:
            raise InputError(
                f"{card.name}: its tokenizer has no chat template, which holds the questions it was trained on; give the folder or id of {card.id}"
            )
        frame = cls(tokenizer, "chat", None, card, asked)
        text = frame._text([Message("user", "x")])
        if missing := next((part for part in (card.mark, policy or "") if part not in text), None):
            raise InputError(f"{card.name}: its chat template lacks {missing[:40]!r}, so this is another model; give the folder or id of {card.id}")
        return frame

    @property
    def source(self) -> str:
        """The text that decides the rendering."""
        assert self.card
        return digest([self.card.text or self.tokenizer.chat_template, self.card.lead, self.card.opens, dict(self.arguments)])

    def render(self, prompt: Prompt) -> Rendered:
        """Text, ids and offsets up to where the guard's verdict comes next.

        Raises:
            InputError: where the prompt has turns that this guard does not judge, or the template changes what it says.
        """
        assert self.card
        if len(prompt.messages) > 1 and not self.card.conversation:
            raise InputError(f"prompt {prompt.id} has {len(prompt.messages)} messages: {self.card.name} judges one request; give it the last user turn alone")
        if self.form == "chat":
            prompt = replace(prompt, messages=tuple(Message(m.role, m.content.strip()) for m in prompt.messages))
        return super().render(replace(prompt, suffix=True, view="", begun=""))

    def _text(self, messages: list[Message]) -> str:
        assert self.card
        if self.card.text is not None:
            before, after = self.card.text.split("{prompt}")
            return before + messages[0].content + after + self.card.lead
        turns = [{"role": m.role, "content": [{"type": "text", "text": m.content}] if self.card.parts else m.content} for m in messages]
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=self.card.opens, **self.arguments)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise InputError(f"the chat template of {self.card.name} refuses the roles {[m.role for m in messages]}: {error}") from error
        return text if self.card.lead and text.endswith(self.card.lead) else text + self.card.lead


def next_token(tokenizer: Any, lead: str, word: str) -> int:
    """Id of the first token of `word` behind `lead`.

    Raises:
        InputError: where the tokenizer merges the two, so that no token is the word's own first.
    """
    before, whole = (tokenizer.encode(text, add_special_tokens=False) if text else [] for text in (lead, lead + word))
    if whole[: len(before)] != before or len(whole) == len(before):
        raise InputError(f"the tokenizer merges {lead!r} with {word!r}: it is not the one this guard was trained with")
    return whole[len(before)]


def like(tokenizer: Any, word: str) -> list[int]:
    """Ids of all tokens that read as `word`, in any case and with blanks around them."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [i for i, text in enumerate(texts) if text.strip().lower() == word.strip().lower()]

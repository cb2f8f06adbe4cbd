"""Prompt, and the ways to rewrite one. Does not know templates, tokens or models."""

import hashlib
import json
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from latentguard.errors import InputError

Terminal = Literal["keep", "strip", "period"]
TERMINALS = ("keep", "strip", "period")
# How a conversation is set before the model, words untouched; "" is as the template sets it (views.py).
VIEWS = ("", "role_swap", "role_dup", "no_system", "no_eot", "plain_roles", "query_in_system", "blank_after_header", "plain")
_FINAL_MARKS = ".?!" + string.whitespace


@dataclass(frozen=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """What a person says to a model, and what we know about it; never a rendered string.

    `harmful` is None where nobody has said. `lookalike` marks a harmless request in harmful-sounding words.
    `group` ties a request to its rewrites and to its matched twin, so that no split tears them apart.
    `exempt` prompts (attack suffixes, live conversations) keep their final mark whatever `terminal` says;
    `terminal` records what was done. `suffix=False` ends the rendered prompt with the instruction, without the tokens
    that the template puts after it (arXiv 2507.11878, §3.1). `view` is one of `VIEWS`: another way to set the same words before the
    model. `begun` is the text with which its reply has begun: it stands behind all that the template adds, and the reply goes on from it.
    `language` is a code such as `en`; "" where nobody has said.
    """

    messages: tuple[Message, ...]
    harmful: bool | None = None
    lookalike: bool = False
    category: str = ""
    source: str = ""
    id: str = ""
    group: str = ""
    exempt: bool = False
    terminal: str = field(default="keep")
    suffix: bool = True
    view: str = ""
    begun: str = ""
    language: str = ""

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1].role != "user":
            raise InputError(f"prompt {self.id or '(no id)'}: the last message must be the user's, it is what the model answers")
        if not self.instruction.strip():
            raise InputError(f"prompt {self.id or '(no id)'}: the last user message is empty")
        if self.view not in VIEWS:
            raise InputError(f"prompt {self.id or '(no id)'}: view={self.view!r} is none of {', '.join(filter(None, VIEWS))}, or '' for the template's own")
        if self.begun and not self.suffix:
            raise InputError(f"prompt {self.id or '(no id)'}: suffix=False ends with the instruction, so no reply has begun; leave one of them out")
        if not self.id:
            object.__setattr__(self, "id", "p" + digest([(m.role, m.content) for m in self.messages])[:12])
        if not self.group:
            object.__setattr__(self, "group", self.id)

    @classmethod
    def of(cls, text: str, **known: object) -> "Prompt":
        """A prompt of one user message."""
        return cls((Message("user", text),), **known)  # type: ignore[arg-type]

    @property
    def instruction(self) -> str:
        """The text of the last user turn."""
        return self.messages[-1].content

    @property
    def label(self) -> str:
        """harmful, harmless, lookalike (harmless too), or unlabelled."""
        if self.harmful is None:
            return "unlabelled"
        return "harmful" if self.harmful else "lookalike" if self.lookalike else "harmless"

    def with_instruction(self, text: str, **changed: object) -> "Prompt":
        """The same prompt asking `text` instead; id and group stay."""
        return replace(self, messages=(*self.messages[:-1], Message("user", text)), **changed)  # type: ignore[arg-type]

    def seen(self, view: str) -> "Prompt":
        """The same prompt in another view, with an id of its own; label, group and source stay."""
        return self if view == self.view else replace(self, view=view, id=f"{self.id}~{view or 'canonical'}")

    def answered(self, text: str) -> "Prompt":
        """The same prompt with a reply that has begun with `text`, with an id of its own; label, group and source stay."""
        return replace(self, begun=text, id=f"{self.id}~{digest(text)[:6]}")


def inverted(prompt: Prompt, question: str) -> Prompt:
    """The request told of somebody else, with a question about it on a line of its own behind: "User wants to …" (arXiv
    2507.11878, §3.5). It keeps its final mark, since the question ends the message.
    """
    return prompt.with_instruction(f"User wants to {prompt.instruction}\n{question}", id=f"{prompt.id}~{digest(question)[:6]}")


def set_terminal(prompt: Prompt, terminal: Terminal) -> Prompt:
    """End the instruction as asked: keep it, strip trailing `.?!` and blanks, or strip and add one period.

    At `t_inst` the state is dominated by the last token's identity: AdvBench ends in letters, XSTest in '?', so a
    detector fitted on raw text reads punctuation (docs/gotchas.md).
    """
    if terminal not in TERMINALS:
        raise InputError(f"terminal={terminal!r}: choose one of {', '.join(TERMINALS)}")
    if prompt.exempt:
        return replace(prompt, terminal="exempt")
    if terminal == "keep":
        return replace(prompt, terminal="keep")
    bare = prompt.instruction.rstrip(_FINAL_MARKS)
    if not bare:
        raise InputError(f"prompt {prompt.id}: {prompt.instruction!r} is only punctuation; drop it or set terminal=keep")
    return prompt.with_instruction(bare + "." if terminal == "period" else bare, terminal=terminal)


def as_prompts(prompts: object) -> list[Prompt]:
    """Prompts from a Prompt, a string, a conversation (list of role/content dicts) or an iterable of these.

    Strings and conversations are taken as they stand: their final mark is the writer's own.
    """
    if isinstance(prompts, Prompt | str):
        prompts = [prompts]
    if isinstance(prompts, Mapping):
        prompts = [prompts]
    if not isinstance(prompts, Iterable):
        raise InputError(f"{prompts!r} is no prompt: give a string, a Prompt, a list of messages or a list of these")
    items = list(prompts)
    if items and all(isinstance(item, Mapping) for item in items):
        items = [items]
    return [_as_prompt(item) for item in items]


def _as_prompt(item: object) -> Prompt:
    if isinstance(item, Prompt):
        return item
    if isinstance(item, str):
        return Prompt.of(item)
    if isinstance(item, list | tuple) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in item):
        return Prompt(messages_of(item), exempt=True, terminal="exempt")
    raise InputError(f"{str(item)[:80]!r} is no prompt: give a string, a Prompt, or a list of {{role, content}} messages")


def messages_of(turns: object) -> tuple[Message, ...]:
    """Turns as messages: a list of {role, content} with text in both."""
    if not isinstance(turns, list | tuple) or not turns:
        raise InputError(f"messages={str(turns)[:60]!r}: give a list of {{role, content}} objects")
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise InputError(f"message {str(turn)[:60]!r}: give an object with role and content, both text")
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)


def digest(value: object) -> str:
    """SHA-256 of a value's JSON, as hex: one identity for settings, prompts and data alike."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")).hexdigest()

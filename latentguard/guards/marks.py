"""How a guard is shown its prompts. Knows no state and no token.

The state of an instruction's last token is dominated by that token (docs/gotchas.md). A `period` guard ends every text the same way, in
training and in use, and sees it in plain letters (letters.py); a `mixed` one sees all endings in training and takes text as it stands,
which is what generation gives it.
"""

from collections.abc import Sequence
from dataclasses import replace

from latentguard.errors import InputError
from latentguard.guards.letters import plain
from latentguard.prompts import Message, Prompt, as_prompts, digest, set_terminal

MARKS = ("period", "mixed")
_ENDINGS = (None, "", ".", "?", "!")  # None: as it stands


def check_terminal(terminal: str) -> None:
    """Refuse a way of ending texts that guards do not know.

    Raises:
        InputError: for another one than `MARKS`.
    """
    if terminal not in MARKS:
        raise InputError(f"terminal={terminal!r}: choose period (texts are ended alike) or mixed (texts are taken as they stand, as generation has them)")


def seen(prompts: object, terminal: str) -> list[Prompt]:
    """Prompts as a guard is to see them: blanks around the last user turn gone, and under `period` plain letters and one period at its end.

    Raises:
        InputError: for an empty text.
    """
    return [_ended(_bare(prompt, terminal), terminal) for prompt in as_prompts(prompts)]


def training(prompts: Sequence[Prompt], terminal: str) -> list[Prompt]:
    """Prompts as a guard is fitted on them: under `mixed` each with an ending that its text decides, one of five."""
    if terminal == "period":
        return seen(prompts, terminal)
    drawn = []
    for prompt in seen(prompts, terminal):
        ending = _ENDINGS[int(digest(prompt.instruction)[:8], 16) % len(_ENDINGS)]
        body = prompt.instruction.rstrip(".?! \t\n")
        if ending is None or prompt.exempt or not body:
            drawn.append(prompt)
        else:
            drawn.append(prompt.with_instruction(body + ending, terminal="mixed"))
    return drawn


def turns(messages: object) -> list[Prompt]:
    """A prompt for each user turn of a conversation, with all that was said before it.

    Raises:
        InputError: for what is no conversation, or has no user turn.
    """
    (whole,) = as_prompts([{"role": "user", "content": messages}] if isinstance(messages, str) else _until_user(messages))
    said = whole.messages
    found = [Prompt(said[: i + 1], exempt=True) for i, message in enumerate(said) if message.role == "user"]
    return found


def _until_user(messages: object) -> object:
    """The conversation up to its last user turn."""
    if not isinstance(messages, list | tuple) or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"messages={str(messages)[:60]!r}: give a list of {{role, content}} objects")
    users = [i for i, m in enumerate(messages) if m.get("role") == "user"]
    if not users:
        raise InputError("messages: no turn is the user's, and a guard scores those")
    return list(messages[: users[-1] + 1])


def _bare(prompt: Prompt, terminal: str) -> Prompt:
    text = (plain(prompt.instruction) if terminal == "period" else prompt.instruction).strip()
    return prompt if text == prompt.instruction else replace(prompt, messages=(*prompt.messages[:-1], Message("user", text)))


def _ended(prompt: Prompt, terminal: str) -> Prompt:
    if terminal != "period" or not prompt.instruction.rstrip(".?! \t\n"):
        return prompt
    return set_terminal(replace(prompt, exempt=False), "period")

"""The same words set before a model in another structure: roles swapped or doubled, marks left out, no special tokens. Knows no tokens or weights.

Headers and marks are found by rendering marked conversations with the model's own chat template; there is no table of model families.
A template that has no such part says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latentguard.errors import InputError
from latentguard.prompts import Message, Prompt

Write = Callable[[Sequence[Message], bool], str]  # messages, and whether the header of a reply follows → text
BARE = ("plain", "plain_roles")  # views that need no chat template
PLAIN_ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
BLANK = " "
_SYSTEM, _USER, _REPLY, _AGAIN = (f"LATENTGUARDx{name}x7351" for name in ("SYSTEM", "USER", "REPLY", "AGAIN"))


@dataclass(frozen=True)
class Layout:
    """What a chat template puts around the turns of a conversation.

    Args:
        opening: before the first turn where the conversation has no system text: the start of text, and the template's own system turn.
        start: of `opening`, what is no system text.
        system: before and behind a system text that has a turn of its own; None where it has none.
        user: header of a user's turn, and the mark behind it.
        assistant: the same of an assistant's.
        reply: the header of the reply to come.
    """

    opening: str
    start: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    reply: str

    @classmethod
    def of(cls, write: Write, bos: str = "", eos: str = "") -> "Layout":
        """Of a template that renders with `write`.

        Args:
            bos: the tokenizer's mark for the start of text, which is no system text.
            eos: its mark for the end of text, which some templates add where no reply is to come.

        Raises:
            InputError: where the template does not write turns one after another, each with its own marks.
        """
        user, reply, again = Message("user", _USER), Message("assistant", _REPLY), Message("user", _AGAIN)
        before, behind = _around(write([user], True), _USER)
        said = _ended(_around(write([user], False), _USER)[1], behind, eos)
        _, between, turned, _ = _around(write([user, reply, again], True), _USER, _REPLY, _AGAIN)
        answered = _ended(_around(write([user, reply], False), _USER, _REPLY)[2], turned, eos)
        header = turned.removeprefix(answered)
        if not between.startswith(said) or not before.endswith(header):
            raise _unlike()
        opening = before.removesuffix(header)
        system = cls._system(write, header, behind)
        default = system is not None and opening.startswith(system[0]) and opening.removeprefix(system[0]).endswith(system[1])
        apart = opening.startswith(bos) and not header.startswith(bos)  # in some templates it is the mark that every header begins with
        start = opening if not default else bos if apart else ""
        return cls(opening, start, system, (header, said), (between.removeprefix(said), answered), behind.removeprefix(said))

    @staticmethod
    def _system(write: Write, header: str, behind: str) -> tuple[str, str] | None:
        try:
            before, then, rest = _around(write([Message("system", _SYSTEM), Message("user", _USER)], True), _SYSTEM, _USER)
        except InputError:  # the template takes no system text
            return None
        return (before, then.removesuffix(header)) if header and then.endswith(header) and rest == behind else None

    def turn(self, message: Message) -> str:
        """A message of an earlier turn, with its header and its mark."""
        around = self.user if message.role == "user" else self.assistant
        return around[0] + message.content + around[1]


def arranged(layout: Layout, prompt: Prompt, messages: Sequence[Message], written: str) -> tuple[str, str]:
    """What stands before and behind the instruction in the prompt's view.

    Args:
        messages: the prompt's, with a system text that is everybody's; without any for `no_system`.
        written: what the template makes of them, by which the layout is checked.

    Raises:
        InputError: where the template has no such part, or changes what the prompt says.
    """
    (header, mark), reply = layout.user, layout.reply
    told = messages[0].role == "system"
    if told and layout.system is None:
        raise _cannot(prompt, "has no turn of its own for a system text")
    opening = layout.system[0] + messages[0].content + layout.system[1] if told and layout.system else layout.opening
    earlier = messages[told:-1]
    past = "".join(map(layout.turn, earlier))
    if written != opening + past + header + prompt.instruction + mark + reply:
        raise _cannot(prompt, "changes the words, or does not write turns one after another")
    if prompt.view == "role_swap":
        own = layout.assistant[0]
        if not header.strip() or not own.strip() or own == header or not reply.startswith(own):
            raise _cannot(prompt, "has no header of its own for each role")
        swapped = Layout(opening, layout.start, layout.system, (own, mark), (header, layout.assistant[1]), reply)
        return opening + "".join(map(swapped.turn, earlier)) + own, mark + header + reply.removeprefix(own)
    if prompt.view == "role_dup":
        if not header.strip():
            raise _cannot(prompt, "has no header for the user")
        return opening + past + header + header, mark + reply
    if prompt.view == "no_system":
        return layout.start + past + header, mark + reply
    if prompt.view == "no_eot":
        if not mark.strip() or not reply.strip():
            raise _cannot(prompt, "has no mark for the end of the request apart from the header of the reply")
        return opening + past + header, reply
    if prompt.view == "query_in_system":
        if layout.system is None:
            raise _cannot(prompt, "has no turn of its own for a system text")
        if earlier:
            raise InputError(f"prompt {prompt.id}: view=query_in_system takes a single request, not a conversation")
        return layout.system[0], layout.system[1] + reply
    assert prompt.view == "blank_after_header", prompt.view
    return opening + past + header, mark + reply + BLANK


def unmarked(prompt: Prompt, bos: str = "") -> tuple[str, str]:
    """What stands before and behind the instruction without a chat template: nothing (`plain`), or roles in words (`plain_roles`).

    Raises:
        InputError: where `plain` is to hold more than one message.
    """
    if prompt.view == "plain":
        if len(prompt.messages) > 1:
            raise InputError(f"prompt {prompt.id}: view=plain is the request alone, and this is a conversation of {len(prompt.messages)} messages")
        return bos, ""
    past = "".join(f"{PLAIN_ROLES[m.role]}: {m.content}\n" for m in prompt.messages[:-1])
    return f"{bos}{past}User: ", "\nAssistant:"


def _around(text: str, *marks: str) -> list[str]:
    """What stands around the marks, one more than there are marks."""
    found = []
    for mark in marks:
        before, hit, text = text.partition(mark)
        if not hit or mark in text:
            raise _unlike()
        found.append(before)
    return [*found, text]


def _ended(last: str, then: str, eos: str) -> str:
    """The mark behind a turn: what the template writes where nothing follows (`last`), if that is how what follows (`then`) begins."""
    for mark in (last, last.removesuffix("\n").removesuffix(eos)):
        if then.startswith(mark):
            return mark
    raise _unlike()


def _unlike() -> InputError:
    return InputError("views: this chat template does not write turns one after another, each between marks of its own; use view='' with it")


def _cannot(prompt: Prompt, why: str) -> InputError:
    return InputError(f"prompt {prompt.id}: view={prompt.view}: this chat template {why}; leave this view out")

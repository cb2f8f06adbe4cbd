"""Where in a rendered prompt to look, by span and never by counting from the end. Knows no tokenizer or model.

The grammar, everything relative to the last user turn ("the instruction"):

    t_inst        the last token of the instruction          t_inst-2      two tokens before it
    post(1)       the first token the template adds after it t_post_inst   the last one
    last_word     the token with the last letter or digit of the instruction
    user          every token of the instruction             all           every token of the prompt
    user[16:48]   those of its tokens, counted from 0 or, as user[-5:], from its end; as far as it has them
    before("…")   every token before that text in the instruction, the template's and system's included
    between("…", "…")   the tokens of the instruction after the one text and before the other
    reply         every token with which the reply has begun (`Prompt.begun`); t_post_inst is then its last
    to_reply      the token before each of these: where each of them is predicted
    mean(P)       the mean over the tokens of P: the only way to *read* places of many tokens
"""

import re
from dataclasses import dataclass

from latentguard.errors import InputError

_ATOM = re.compile(
    r"""(?P<inst>t_inst)(?:-(?P<back>\d+))?$|(?P<last>t_post_inst)$|post\((?P<post>\d+)\)$|(?P<word>last_word)$"""
    r"""|(?P<user>user)(?:\[(?P<from>-?[0-9]{1,9})?:(?P<to>-?[0-9]{1,9})?\])?$|(?P<all>all)$|(?P<reply>(?:to_)?reply)$|before\((?P<quote>["'])(?P<before>.+)(?P=quote)\)$"""
    r"""|between\((?P<q1>["'])(?P<after>.+?)(?P=q1)\s*,\s*(?P<q2>["'])(?P<until>.+)(?P=q2)\)$""",
    re.DOTALL,
)
GRAMMAR = 't_inst, t_inst-1, t_post_inst, post(1), last_word, user, user[-5:], all, before("text"), between("text", "text"), reply, to_reply, mean(user)'


@dataclass(frozen=True)
class Rendered:
    """A prompt as the model gets it: token ids, the characters of each token, where the instruction lies, and where the reply begins if
    it has. `bare`: it was asked for that nothing follows the instruction, so that its last token is the prompt's.
    """

    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    user: tuple[int, int]
    prompt_id: str = ""
    begun: int | None = None
    bare: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def reply_tokens(self) -> list[int]:
        """Indices of the tokens with which the reply has begun."""
        return [] if self.begun is None else [i for i, (_, end) in enumerate(self.offsets) if end > self.begun]

    @property
    def user_tokens(self) -> list[int]:
        """Indices of the tokens that hold any character of the instruction.

        Tokenizers that trim offsets give a blank no characters: such a token belongs to the instruction where it ends
        inside it, the instruction's own last blank included.
        """
        start, end = self.user
        return [i for i, (a, b) in enumerate(self.offsets) if (b > a and b > start and a < end) or (a == b and start < a <= end)]


@dataclass(frozen=True)
class Position:
    """A named place; `tokens` finds it in a rendered prompt. Made by `parse_position`."""

    name: str
    atom: str
    mean: bool

    def tokens(self, rendered: Rendered) -> list[int]:
        """Indices into `rendered.ids`, ascending, at least one.

        Raises:
            InputError: where the prompt or its template has no such place.
        """
        found = _ATOM.match(self.atom)
        assert found, self.atom
        user = rendered.user_tokens
        if not user:
            raise InputError(f"{self._at(rendered)}: the tokenizer gives the instruction no token")
        reply = rendered.reply_tokens
        if found["reply"]:
            if not reply:
                raise InputError(f"{self._at(rendered)}: no reply has begun; give the prompt its beginning, Prompt.begun")
            return reply if found["reply"] == "reply" else [i - 1 for i in reply]
        if found["last"] and (reply or rendered.bare):
            return [len(rendered) - 1]
        after = list(range(user[-1] + 1, reply[0] if reply else len(rendered)))
        if found["all"]:
            return list(range(len(rendered)))
        if found["user"]:
            part = user[slice(*(int(found[end]) if found[end] else None for end in ("from", "to")))]
            if not part:
                raise InputError(f"{self._at(rendered)}: none of the instruction's {len(user)} tokens lies there")
            return part
        if found["inst"]:
            back = int(found["back"] or 0)
            if rendered.offsets[user[-1]][1] > rendered.user[1]:
                raise InputError(
                    f"{self._at(rendered)}: the tokenizer merges the instruction's last characters with template text "
                    f"({rendered.text[slice(*rendered.offsets[user[-1]])]!r}), so no token is the instruction's own last; use last_word"
                )
            if back >= len(user):
                raise InputError(f"{self._at(rendered)}: the instruction has only {len(user)} tokens")
            return [user[-1 - back]]
        if found["last"] or found["post"]:
            if not after:
                raise InputError(
                    f"{self._at(rendered)}: this template adds nothing after the instruction, as plain text and base models have it; take a chat model, or positions at or before t_inst"
                )
            number = int(found["post"] or len(after))
            if not 1 <= number <= len(after):
                raise InputError(f"{self._at(rendered)}: the template adds {len(after)} tokens after the instruction, post(1) … post({len(after)})")
            return [after[number - 1]]
        if found["word"]:
            letters = [i for i in range(*rendered.user) if rendered.text[i].isalnum()]
            if not letters:
                raise InputError(f"{self._at(rendered)}: the instruction has no letter or digit")
            return [max(i for i in user if rendered.offsets[i][0] <= letters[-1])]
        if found["after"]:
            start, end = rendered.text.find(found["after"], *rendered.user), rendered.text.rfind(found["until"], *rendered.user)
            if start < 0 or end < start + len(found["after"]):
                raise InputError(f"{self._at(rendered)}: these two texts do not stand in the instruction in this order")
            inside = [i for i, (a, b) in enumerate(rendered.offsets) if start + len(found["after"]) <= a < b <= end]
            if not inside:
                raise InputError(f"{self._at(rendered)}: no token lies wholly between these texts")
            return inside
        at = rendered.text.rfind(found["before"], *rendered.user)
        if at < 0:
            raise InputError(f"{self._at(rendered)}: that text is not in the instruction")
        before = [i for i, (_, b) in enumerate(rendered.offsets) if b <= at]
        if not before:
            raise InputError(f"{self._at(rendered)}: no token lies before that text")
        return before

    def _at(self, rendered: Rendered) -> str:
        return f"position {self.name} in prompt {rendered.prompt_id or repr(rendered.text[slice(*rendered.user)][:60])}"


def parse_position(name: "str | Position", *, reading: bool = False) -> Position:
    """The position a person wrote.

    Args:
        reading: refuse places of many tokens, of which one vector cannot be read, unless under mean(…).

    Raises:
        InputError: for a name outside the grammar.
    """
    if isinstance(name, Position):
        return name
    if not isinstance(name, str):
        raise InputError(f"position {name!r}: give one of {GRAMMAR}")
    text = name.strip()
    mean = text.startswith("mean(") and text.endswith(")")
    atom = text[5:-1].strip() if mean else text
    found = _ATOM.match(atom)
    if not found or found["post"] == "0":
        raise InputError(f"position {name!r}: give one of {GRAMMAR}")
    if reading and not mean and any(found[many] for many in ("user", "all", "reply", "before", "after")):
        raise InputError(f"position {name!r} is many tokens: to read one vector write mean({atom}), or name a token such as t_inst")
    return Position(text, atom, mean)

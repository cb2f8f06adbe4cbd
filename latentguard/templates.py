"""Turns a Prompt into the exact tokens a model gets, and finds the instruction in them. Knows no weights.

The instruction is found by rendering the conversation twice, once with a marker in its place: what stands before
and after the marker must stand before and after the instruction. A template that strips, changes or repeats the
text, or drops a message, cannot pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from latentguard.errors import InputError
from latentguard.positions import Rendered
from latentguard.prompts import Message, Prompt
from latentguard.views import BARE, Layout, arranged, unmarked

Form = Literal["chat", "paper", "plain"]
FORMS = ("chat", "paper", "plain")
_MARKER = "LATENTGUARDxMARKERx7351"

# The bare forms of arXiv 2507.11878, App. A, with the whitespace of its released code; no system text.
PAPER_FORMS = {
    "[INST]": "[INST]{x}[/INST]",
    "<|start_header_id|>": "<|start_header_id|>user<|end_header_id|>\n{x}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n",
    "<|im_start|>": "<|im_start|>user\n{x}<|im_end|>\n<|im_start|>assistant",
}


@dataclass(frozen=True)
class Template:
    """How prompts are rendered: `chat` is the model's own template with its default system text, `paper` the
    paper's bare form, `plain` the text alone (for base models). `system` replaces the default system text.
    """

    tokenizer: Any
    form: Form = "chat"
    system: str | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InputError(f"template={self.form!r}: choose one of {', '.join(FORMS)}")
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(f"{type(self.tokenizer).__name__} gives no character offsets; latentguard needs a fast tokenizer (tokenizer.json)")
        if self.form == "chat" and not self.tokenizer.chat_template:
            raise InputError("this model has no chat template (a base model?): use template=plain, or give the tokenizer one")
        if self.form != "chat" and self.system is not None:
            raise InputError(f"template={self.form} has no place for a system text; use template=chat or drop system")

    @property
    def source(self) -> str:
        """The text that decides the rendering: for hashes and cards."""
        own = {"chat": self.tokenizer.chat_template, "plain": "{x}"}
        return f"{self.form}\n{self.system!r}\n{own.get(self.form) or self._paper_form()}"

    def render(self, prompt: Prompt) -> Rendered:
        """Text, ids and offsets of `prompt`, ready for generation.

        Raises:
            InputError: where the template strips, changes, repeats or drops what the prompt says, or cannot do its view.
        """
        messages = list(prompt.messages)
        if self.system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", self.system))
        if prompt.view:
            return self._seen(prompt, messages)
        text, marked = self._text(messages), self._text([*messages[:-1], Message("user", _MARKER)])
        where = f"prompt {prompt.id}: template={self.form}"
        if marked.count(_MARKER) != 1:
            found = "repeats the instruction" if _MARKER in marked else "has no place for the instruction, or changes its letters"
            raise InputError(f"{where} {found}")
        start = marked.index(_MARKER)
        tail = marked[start + len(_MARKER) :]
        if text != marked[:start] + prompt.instruction + tail:
            raise InputError(f"{where} strips or changes {_shown(prompt.instruction)}; pass the text as the template keeps it (most strip blanks at the ends)")
        for i, message in enumerate(messages[:-1]):
            probe = self._text([*messages[:i], Message(message.role, _MARKER), *messages[i + 1 :]])
            if probe.count(_MARKER) != 1 or probe.replace(_MARKER, message.content) != text:
                raise InputError(f"{where} drops or changes the {message.role} message {_shown(message.content)}; leave it out, or choose another template")
        return self._rendered(prompt, text[:start], tail if prompt.suffix else "")

    @cached_property
    def layout(self) -> Layout:
        """What the chat template puts around turns (views.py)."""
        return Layout.of(self._chat, self.tokenizer.bos_token or "", self.tokenizer.eos_token or "")

    def _seen(self, prompt: Prompt, messages: list[Message]) -> Rendered:
        """The prompt in its view. Its request keeps its last token in every one: what follows is made into tokens apart where they would merge."""
        if prompt.view in BARE:
            before, after = unmarked(prompt, self._bos())
        elif self.form != "chat":
            raise InputError(f"prompt {prompt.id}: view={prompt.view} is a change to the chat template, and this is template={self.form}; use template=chat")
        else:
            messages = messages[1:] if prompt.view == "no_system" and messages[0].role == "system" else messages
            before, after = arranged(self.layout, prompt, messages, self._text(messages))
        return self._rendered(prompt, before, after if prompt.suffix else "", len(before) + len(prompt.instruction))

    def _rendered(self, prompt: Prompt, before: str, after: str, *cuts: int) -> Rendered:
        text = before + prompt.instruction + after
        begun = len(text) if prompt.begun else None
        ids, offsets = self._tokens(text + prompt.begun, [*cuts, len(text)])
        span = (len(before), len(before) + len(prompt.instruction))
        return Rendered(text + prompt.begun, ids, offsets, span, prompt.id, begun, prompt.view == "plain" and prompt.suffix)

    def _tokens(self, text: str, cuts: Sequence[int]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """Ids and offsets. Where a token would lie across a cut, what stands before and behind it is made into tokens apart."""
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids, offsets = tuple(encoded["input_ids"]), tuple(map(tuple, encoded["offset_mapping"]))
        for cut in cuts:
            if any(a < cut < b for a, b in offsets):
                left, ahead = self._tokens(text[:cut], [c for c in cuts if c < cut])
                right, behind = self._tokens(text[cut:], [c - cut for c in cuts if c > cut])
                return left + right, ahead + tuple((a + cut, b + cut) for a, b in behind)
        return ids, offsets

    def _text(self, messages: list[Message]) -> str:
        if self.form == "chat":
            return self._chat(messages)
        if len(messages) > 1:
            raise InputError(f"template={self.form} takes a single user message, not {len(messages)}; use template=chat")
        form = "{x}" if self.form == "plain" else self._paper_form()
        return self._bos() + form.replace("{x}", messages[0].content)

    def _chat(self, messages: Sequence[Message], replying: bool = True) -> str:
        switch = {"enable_thinking": False} if "enable_thinking" in self.tokenizer.chat_template else {}
        turns = [{"role": m.role, "content": m.content} for m in messages]
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=replying, **switch)
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise InputError(f"the chat template refuses the roles {[m.role for m in messages]}: {error}") from error

    def _paper_form(self) -> str:
        template = self.tokenizer.chat_template or ""
        for mark, form in PAPER_FORMS.items():
            if mark in template:
                return form
        raise InputError("template=paper: the paper gives forms for Llama-2, Llama-3 and Qwen (ChatML) templates only; use template=chat")

    def _bos(self) -> str:
        ids = self.tokenizer("x")["input_ids"]
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.bos_token if bos is not None and ids and ids[0] == bos else ""


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")

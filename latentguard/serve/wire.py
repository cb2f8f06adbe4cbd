"""What goes over the wire, as pydantic models: for /openapi.json. Checked by asking.py, whose sentences are clearer."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A part of one text."""

    type: Literal["text"]
    text: str


class Asking(_Strict):
    """Fields that both ways of asking have."""

    model: str | None = Field(None, description="any name: one process serves one guard, and the reply names it")
    threshold: str | None = Field(None, description="by which to flag, such as fpr=0.05; /v1/models names those there are")


class Moderation(Asking):
    """Texts to be scored."""

    input: str | list[str] | list[TextPart] = Field(description="one text, several, or the parts of one (joined by line breaks)")


class Message(_Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


class Chat(Asking):
    """A conversation, whose user turns are scored each with all that came before."""

    messages: list[Message]


class Result(BaseModel):
    """Of one text, by category: whether it is flagged, and its calibrated probability."""

    flagged: bool = Field(description="in any category")
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text"]]]
    index: int | None = Field(None, description="of the turn in messages; for conversations alone")


class Cut(BaseModel):
    """By what was flagged: a probability a category."""

    name: str
    values: dict[str, float]


class Reply(BaseModel):
    """What OpenAI's moderation replies hold, and the threshold."""

    id: str
    model: str
    results: list[Result]
    threshold: Cut


class Wrong(BaseModel):
    """What is wrong, in one sentence, and a word for programs."""

    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """OpenAI's shape of an error."""

    error: Wrong

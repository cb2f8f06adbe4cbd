"""A request's bytes → what it asks for, checked; every mistake is a RefusedError. Knows no queue and no model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentguard.serve.refusals import RefusedError, shown

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Asked:
    """Texts or conversations to be scored.

    `prompts` is what a guard takes, `texts` the same as texts whose length counts, `places` where each stood in the request.
    """

    prompts: tuple[object, ...]
    texts: tuple[str, ...]
    places: tuple[str, ...]
    threshold: str | None
    turns: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bounds:
    """How much one request may ask; `strips`: blanks at a text's ends are taken off, as the model's template does."""

    inputs: int
    characters: int
    strips: bool = False


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        RefusedError: 400 for what is no JSON, 422 for JSON that is no object.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_once)
    except RecursionError:
        raise RefusedError(400, "the body is nested too deeply", "invalid_json") from None
    except UnicodeDecodeError:
        raise RefusedError(400, "the body is not UTF-8", "invalid_json") from None
    except ValueError as error:  # JSON's own, a doubled key, a number of more digits than Python reads
        said = "a number has too many digits" if "digits" in str(error) else str(error)
        raise RefusedError(400, f"the body is no JSON: {said}", "invalid_json") from None
    if not isinstance(found, dict):
        raise RefusedError(422, f"the body must be a JSON object, not {_kind(found)}", "invalid_type")
    return found


def _no_number(name: str) -> object:
    raise ValueError(f"{name} is no number of JSON's")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in found if keys.count(key) > 1))} is given twice")
    return found


def moderation(body: dict[str, Any], bounds: Bounds) -> Asked:
    """POST /v1/moderations: a string, a list of strings, or a list of text parts, which together are one text."""
    threshold = _known(body, "input")
    given = body["input"]
    if isinstance(given, str):
        given, places = [given], ["input"]
    elif not isinstance(given, list) or not given:
        what = "an empty list" if given == [] else _kind(given)
        raise RefusedError(422, f"input must be a string, a list of strings or a list of text parts, not {what}", "invalid_type", param="input")
    elif isinstance(given[0], dict):
        _few(given, "input", bounds)
        given, places = ["\n".join(_part(part, f"input[{i}]") for i, part in enumerate(given))], ["input"]
    else:
        _few(given, "input", bounds)
        places = [f"input[{i}]" for i in range(len(given))]
    texts = tuple(_text(text, place, bounds) for text, place in zip(given, places, strict=True))
    return Asked(texts, texts, tuple(places), threshold)


def chat(body: dict[str, Any], bounds: Bounds) -> Asked:
    """POST /v1/moderations/chat: one conversation, whose user turns are scored each with all that came before it."""
    threshold = _known(body, "messages")
    given = body["messages"]
    if not isinstance(given, list) or not given:
        what = "an empty list" if given == [] else _kind(given)
        raise RefusedError(422, f"messages must be a list of {{role, content}} objects, not {what}", "invalid_type", param="messages")
    _few(given, "messages", bounds)
    turns = [_message(message, f"messages[{i}]", bounds) for i, message in enumerate(given)]
    users = tuple(i for i, turn in enumerate(turns) if turn["role"] == "user")
    if not users:
        raise RefusedError(422, "messages holds no user turn, and only those are scored", "invalid_value", param="messages")
    texts = tuple("\n".join(turn["content"] for turn in turns[: i + 1]) for i in users)
    for text, i in zip(texts, users, strict=True):
        _short(text, f"messages[0..{i}]", bounds)
    return Asked(tuple(turns[: i + 1] for i in users), texts, tuple(f"messages[{i}]" for i in users), threshold, users)


def _known(body: dict[str, Any], needed: str) -> str | None:
    """The threshold asked for; `model` may be any name, for one process serves one guard."""
    if needed not in body:
        raise RefusedError(422, f"{needed} is missing", "missing", param=needed)
    if extra := sorted(set(body) - {needed, "model", "threshold"}):
        raise RefusedError(422, f"{shown(extra[0])} is not known here; give {needed}, model and threshold", "unknown_field", param=extra[0][:60])
    for key in ("model", "threshold"):
        if not isinstance(body.get(key), str | None):
            raise RefusedError(422, f"{key} must be a string, not {_kind(body[key])}", "invalid_type", param=key)
    return body.get("threshold")


def _few(given: Sequence[object], place: str, bounds: Bounds) -> None:
    if len(given) > bounds.inputs:
        raise RefusedError(422, f"{place} has {len(given)} entries, at most {bounds.inputs} are taken; ask in parts", "too_many_inputs", param=place)


def _part(part: object, place: str) -> str:
    if not isinstance(part, dict):
        raise RefusedError(422, f"{place} must be a text part like those before it, not {_kind(part)}", "invalid_type", param=place)
    if part.get("type") != "text":
        raise RefusedError(422, f"{place}.type is {shown(part.get('type'))}: only text is scored here", "unsupported_input", param=f"{place}.type")
    if set(part) != {"type", "text"}:
        raise RefusedError(422, f'{place} must be {{"type": "text", "text": …}} and no more', "invalid_type", param=place)
    if not isinstance(part["text"], str):
        raise RefusedError(422, f"{place}.text must be a string, not {_kind(part['text'])}", "invalid_type", param=f"{place}.text")
    return part["text"]


def _message(message: object, place: str, bounds: Bounds) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RefusedError(422, f"{place} must be an object with role and content, not {_kind(message)}", "invalid_type", param=place)
    if set(message) != {"role", "content"}:
        raise RefusedError(422, f"{place} must have role and content and no more", "invalid_type", param=place)
    if message["role"] not in ROLES:
        raise RefusedError(422, f"{place}.role is {shown(message['role'])}: choose one of {', '.join(ROLES)}", "invalid_value", param=f"{place}.role")
    return {"role": message["role"], "content": _text(message["content"], f"{place}.content", bounds)}


def _text(text: object, place: str, bounds: Bounds) -> str:
    if not isinstance(text, str):
        raise RefusedError(422, f"{place} must be a string, not {_kind(text)}", "invalid_type", param=place)
    _short(text, place, bounds)
    if not text.strip():
        raise RefusedError(422, f"{place} is empty or blank: there is nothing to score", "empty_input", param=place)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RefusedError(422, f"{place} holds half of a surrogate pair, which is no character", "invalid_text", param=place) from None
    return text.strip() if bounds.strips else text


def _short(text: str, place: str, bounds: Bounds) -> None:
    if len(text) > bounds.characters:
        raise RefusedError(422, f"{place} has {len(text)} characters, at most {bounds.characters} are taken; nothing is cut", "text_too_long", param=place)


def _kind(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")

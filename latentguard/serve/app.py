"""The routes. Knows how a score is told; not how one is made."""

import html
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from latentguard import __version__
from latentguard.serve import asking, wire
from latentguard.serve.limits import Gate, read_body
from latentguard.serve.refusals import RefusedError, reply
from latentguard.serve.service import GoneError, Service

log = logging.getLogger("latentguard.serve")
STATUSES = {
    400: "the body is no JSON",
    401: "no token, or a wrong one",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not application/json, or it is packed",
    422: "JSON that asks for what is not here: the wrong type, too many texts, one that is too long, blank or unscorable",
    429: "too many requests, or texts waiting; Retry-After says for how long",
    431: "the request's head is too large",
    500: "the model failed",
    503: "loading, shutting down, or not scored in time",
}
Parser = Callable[[dict[str, Any], asking.Bounds], asking.Asked]


def make_app(service: Service) -> FastAPI:
    """The application of one service; it loads the model as it starts."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.open()
        try:
            yield
        finally:
            service.close()

    off: Any = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}  # nothing is sent to anyone
    app = FastAPI(
        title="latentguard", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False, telemetry=off,
        description="How likely a text asks for harm, by a language model's own hidden states.",
    )  # fmt: skip
    app.state.service = service
    app.add_middleware(Gate, service=service)
    errors: dict[Any, Any] = {RefusedError: _refused, GoneError: _gone, ClientDisconnect: _gone, HTTPException: _http, Exception: _failed}
    for kind, handler in errors.items():
        app.add_exception_handler(kind, handler)
    told: dict[int | str, dict[str, Any]] = {status: {"model": wire.Error, "description": words} for status, words in STATUSES.items()}
    asks: Any = {"methods": ["POST"], "responses": {200: {"model": wire.Reply}, **told}, "response_class": Response}

    async def moderations(request: Request) -> Response:
        return await _answer(service, request, asking.moderation)

    async def conversation(request: Request) -> Response:
        return await _answer(service, request, asking.chat)

    app.add_api_route("/v1/moderations", moderations, summary="Score texts, as OpenAI's moderations do", openapi_extra=_body(wire.Moderation), **asks)
    app.add_api_route("/v1/moderations/chat", conversation, summary="Score the user turns of a conversation", openapi_extra=_body(wire.Chat), **asks)

    @app.get("/v1/models", summary="What is served: the guard, its thresholds and their intervals")
    async def models() -> Response:
        return reply({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}", summary="The same, alone", responses={404: {"model": wire.Error}, 422: {"model": wire.Error}})
    async def model(name: str) -> Response:
        if name != (found := _model(service))["id"]:
            raise RefusedError(404, f"there is no model of that name here; /v1/models names it: {found['id']}", "model_not_found", param="model")
        return reply(found)

    @app.get("/healthz", summary="200 while the model answers, else 503")
    async def healthz() -> Response:
        state = service.health()
        return reply({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics", summary="Counts for Prometheus; no text")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(_page(app.openapi()), media_type="text/html", headers={"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"})

    return app


def _body(model: type[Any]) -> dict[str, Any]:
    """A request's schema, definitions within it."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


async def _answer(service: Service, request: Request, parser: Parser) -> Response:
    served, note = service.ready(), request.scope["note"]
    body = await read_body(request, service.settings.body_bytes, service.settings.body_timeout)
    asked = parser(asking.parse(body), service.bounds(served))
    name, thresholds = service.threshold(served, asked.threshold)
    note.texts = len(asked.texts)
    scores, note.tokens = await service.scores(request, served, asked)
    results, metrics = [], service.metrics
    for number, row in enumerate(scores.tolist()):
        found = dict(zip(served.guards, row, strict=True))
        flags = {category: p >= thresholds[category].value for category, p in found.items()}
        result = {"flagged": any(flags.values()), "categories": flags, "category_scores": found}
        results.append({**result, "category_applied_input_types": {category: ["text"] for category in flags}})
        if asked.turns:
            results[-1]["index"] = asked.turns[number]
        note.flagged += result["flagged"]
        for category, p in found.items():
            metrics.probability.labels(category).observe(p)
            metrics.flagged.labels(category, name).inc(flags[category])
        if service.settings.log_prompts:
            log.info("%s %s %s", note.id, found, ascii(asked.texts[number]))
    metrics.prompts.inc(len(results))
    cut = {"name": name, "values": {category: threshold.value for category, threshold in thresholds.items()}}
    return reply({"id": note.id, "model": served.name, "results": results, "threshold": cut})


def _model(service: Service) -> dict[str, Any]:
    served = service.ready()
    return {"id": served.name, "object": "model", "created": 0, "owned_by": "latentguard", "threshold": served.default, "guards": dict(served.about)}


async def _refused(_: Request, error: RefusedError) -> Response:
    return error.response


async def _gone(request: Request, _: Exception) -> Response:
    request.app.state.service.metrics.gone.inc()
    return Response(status_code=499)


async def _http(_: Request, error: HTTPException) -> Response:
    known = {404: "there is nothing at this path; GET /openapi.json names all", 405: "this path does not take this method"}
    headers = dict(error.headers or {})
    return RefusedError(
        error.status_code, known.get(error.status_code, error.detail), "not_found" if error.status_code == 404 else "refused", headers=headers
    ).response


async def _failed(_: Request, __: Exception) -> Response:
    return RefusedError(500, "the server failed at this request", "server_failed").response


def _page(schema: dict[str, Any]) -> str:
    """The schema for people: no script, nothing from elsewhere."""
    parts = []
    for path, methods in schema["paths"].items():
        for method, told in methods.items():
            body = told.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            statuses = "".join(f"<li><b>{status}</b> {html.escape(said.get('description', ''))}" for status, said in told["responses"].items())
            asked = f"<details><summary>body</summary><pre>{html.escape(json.dumps(body, indent=2))}</pre></details>" if body else ""
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(told.get('summary', ''))}</p>{asked}<ul>{statuses}</ul>")
    example = "curl -H 'content-type: application/json' -d '{\"input\": \"Tell me about otters.\"}' http://HOST:PORT/v1/moderations"
    style = "body{font:16px/1.5 system-ui,sans-serif;max-width:48rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}pre{overflow:auto}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>latentguard</title><style>{style}</style>'
        f"<h1>latentguard</h1><p>{html.escape(schema['info']['description'])} <a href='/openapi.json'>openapi.json</a></p><pre>{html.escape(example)}</pre>{''.join(parts)}</html>"
    )

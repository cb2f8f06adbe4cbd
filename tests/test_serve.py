"""The server: what is asked comes back to who asked it, in OpenAI's shape, whatever goes on beside it. No model here."""

import asyncio
import json
import logging
import re

import openai
import pytest

from latentguard.serve import wire
from latentguard.serve.app import make_app
from latentguard.serve.asking import Bounds, chat, moderation, parse
from latentguard.serve.batching import Item, Job, pick
from latentguard.serve.refusals import RefusedError
from tests.serving import PATH, FakeGuard, entered, listening, make_service, probability, run, serving, until


async def post(client, body, path=PATH, **settings):
    client.headers["content-type"] = "application/json"
    return await client.post(path, content=json.dumps(body), **settings)


def scores(reply):
    return [result["category_scores"]["harmful"] for result in reply.json()["results"]]


def test_a_text_gets_its_own_score_however_it_is_asked():
    async def test():
        async with serving() as (client, _):
            one, many = await post(client, {"input": "alpha"}), await post(client, {"input": ["alpha", "beta", "alpha"], "model": "omni-moderation-latest"})
            parts = await post(client, {"input": [{"type": "text", "text": "al"}, {"type": "text", "text": "pha"}]})
        assert scores(one) == pytest.approx([probability("alpha")])
        assert scores(many) == pytest.approx([probability(text) for text in ("alpha", "beta", "alpha")])
        assert scores(parts) == pytest.approx([probability("al\npha")])
        body = one.json()
        assert body["model"] == "fake" and body["id"] == one.headers["x-request-id"] and body["id"].startswith("modr-")
        assert body["results"][0]["category_applied_input_types"] == {"harmful": ["text"]}
        assert set(body["results"][0]["categories"]) == {"harmful"}, "no category is invented"

    run(test)


def test_the_official_client_reads_it_as_typed_objects():
    async def test():
        async with listening() as (port, _), openai.AsyncOpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0) as client:
            found = await client.moderations.create(input=["alpha", "beta"], extra_body={"threshold": "fpr=0.05"})
            model = (await client.models.list()).data[0]
            assert (await client.models.retrieve(model.id)).id == "fake"
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("other/name")
            with pytest.raises(openai.UnprocessableEntityError) as wrong:
                await client.moderations.create(input=[])
        result = found.results[0]
        assert type(result) is openai.types.Moderation and isinstance(result.flagged, bool)
        assert result.categories.harmful is result.flagged and result.category_scores.harmful == pytest.approx(probability("alpha"))
        assert result.categories.hate is None, "a category that was not fitted has no value"
        assert result.model_dump(exclude_unset=True)["categories"] == {"harmful": result.flagged}
        assert result.model_dump()["category_scores"]["harmful"] == result.category_scores.harmful
        assert wrong.value.param == "input" and wrong.value.code == "invalid_type" and "empty list" in wrong.value.message

    run(test)


def test_flagged_is_at_or_above_the_threshold_that_was_named():
    text = next(f"text {i}" for i in range(99) if 0.5 < probability(f"text {i}") < 0.9)

    async def test():
        async with serving() as (client, _):
            strict, loose = await post(client, {"input": text}), await post(client, {"input": text, "threshold": "fpr=0.05"})
            unknown = await post(client, {"input": text, "threshold": "fpr=0.5\ud800"})
        assert strict.json()["threshold"] == {"name": "fpr=0.01", "values": {"harmful": 0.9}} and not strict.json()["results"][0]["flagged"]
        assert loose.json()["threshold"]["name"] == "fpr=0.05" and loose.json()["results"][0]["flagged"]
        assert unknown.status_code == 422 and "fpr=0.05, fpr=0.01" in unknown.json()["error"]["message"]

    run(test)


def test_category_guards_add_their_categories_and_any_of_them_flags():
    guards = {"harmful": FakeGuard(), "weapons": FakeGuard(shift=0.37)}

    async def test():
        async with serving(guards) as (client, _):
            reply = await post(client, {"input": [f"text {i}" for i in range(20)], "threshold": "fpr=0.05"})
        for i, result in enumerate(reply.json()["results"]):
            p = probability(f"text {i}")
            assert result["category_scores"] == pytest.approx({"harmful": p, "weapons": (p + 0.37) % 1})
            assert result["flagged"] == any(result["categories"].values()) == (p >= 0.5 or (p + 0.37) % 1 >= 0.5)

    run(test)


def test_a_conversation_is_scored_turn_by_turn_with_all_before_it():
    turns = [
        {"role": role, "content": text}
        for role, text in (("system", "be brief"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    ]

    async def test():
        guard = FakeGuard()
        async with serving({"harmful": guard}) as (client, _):
            found = (await post(client, {"messages": turns}, f"{PATH}/chat")).json()["results"]
            none = await post(client, {"messages": turns[:1]}, f"{PATH}/chat")
        assert [result["index"] for result in found] == [1, 3] and guard.seen == [turns[:2], turns[:4]]
        assert found[1]["category_scores"]["harmful"] == pytest.approx(probability(turns[:4]))
        assert none.status_code == 422 and "no user turn" in none.json()["error"]["message"]

    run(test)


def test_a_hundred_requests_at_once_are_batched_and_each_gets_its_own():
    async def test():
        guard = FakeGuard()
        guard.gate.clear()
        async with serving({"harmful": guard}, batch_prompts=8, batch_tokens=64) as (client, service):
            texts = [[f"request {i} text {j} {'word ' * ((i * 7 + j * 11) % 23)}" for j in range(1 + i % 3)] for i in range(100)]
            asked = [asyncio.create_task(post(client, {"input": given})) for given in texts]
            await entered(guard)
            await until(lambda: len(service.batcher) + len(guard.seen) == sum(map(len, texts)))
            guard.gate.set()
            for reply, given in zip(await asyncio.gather(*asked), texts, strict=True):
                assert reply.status_code == 200 and scores(reply) == pytest.approx([probability(text) for text in given])
        later = guard.batches[1:]
        assert max(map(len, later)) == 8 and all(len(batch) == 1 or sum(len(text.split()) for text in batch) <= 64 for batch in later)
        assert len(guard.seen) == sum(map(len, texts)), "each text is run once"
        assert len(later) < 60, "they go together"

    run(test)


def test_texts_of_one_request_that_go_in_another_order_come_back_in_their_own():
    texts = ["word " * n + "end" for n in (30, 1, 29, 2, 28, 3, 27, 4)]

    async def test():
        guard = FakeGuard()
        async with serving({"harmful": guard}, batch_prompts=3) as (client, _):
            assert scores(await post(client, {"input": texts})) == pytest.approx([probability(text) for text in texts])
        assert guard.seen != texts

    run(test)


def job(*sizes):
    async def made():
        return Job([f"p{i}" for i in range(len(sizes))], sizes)

    return asyncio.run(made())


def items(*sizes):
    made = job(*sizes)
    return [Item(stamp, made, stamp) for stamp in range(len(sizes))]


def test_like_lengths_go_together_and_the_next_in_line_always_goes():
    assert [item.size for item in pick(items(10, 500, 12, 490, 9, 11), 4, 1000)] == [10, 9, 11, 12]
    assert [item.size for item in pick(items(500, 10, 12, 490, 9), 4, 1000)] == [500, 490]
    assert [item.size for item in pick(items(5000, 10), 4, 1000)] == [5000], "a text longer than a batch goes alone"
    assert len(pick(items(*[10] * 50), 4, 1000)) == 4 and len(pick(items(*[10] * 50), 40, 100)) == 10


def test_a_large_request_does_not_hold_up_a_small_one():
    async def test():
        guard = FakeGuard()
        guard.gate.clear()
        async with serving({"harmful": guard}, batch_prompts=4) as (client, service):
            large = asyncio.create_task(post(client, {"input": [f"large {i}" for i in range(100)]}))
            await entered(guard)
            small = asyncio.create_task(post(client, {"input": "small one"}))
            await until(lambda: len(service.batcher) == 97)
            guard.gate.set()
            assert (await small).status_code == (await large).status_code == 200
        first = next(i for i, batch in enumerate(guard.batches) if "small one" in batch)
        assert first <= 2 and len(guard.seen) == 101

    run(test)


def test_a_text_that_cannot_be_scored_fails_alone():
    async def test():
        guard = FakeGuard()
        guard.gate.clear()
        async with serving({"harmful": guard}) as (client, service):
            first = asyncio.create_task(post(client, {"input": "first"}))
            await entered(guard)
            bad = [["fine", "unplaceable"], "explosive", "numberless"]
            asked = [asyncio.create_task(post(client, {"input": given})) for given in [*[f"neighbour {i}" for i in range(12)], *bad]]
            await until(lambda: len(service.batcher) == 16)
            guard.gate.set()
            assert (await first).status_code == 200
            *neighbours, unplaceable, explosive, numberless = await asyncio.gather(*asked)
        assert [scores(reply) for reply in neighbours] == [pytest.approx([probability(f"neighbour {i}")]) for i in range(12)]
        assert unplaceable.status_code == 422 and unplaceable.json()["error"]["param"] == "input[1]"
        assert explosive.status_code == numberless.status_code == 500
        assert "kernel" not in explosive.text, "what failed inside is not for clients"

    run(test)


def test_health_says_when_the_model_keeps_failing_and_when_it_is_well_again():
    async def test():
        async with serving() as (client, _):
            for _ in range(3):
                await post(client, {"input": "explosive"})
            ill = await client.get("/healthz")
            await post(client, {"input": "fine"})
            well = await client.get("/healthz")
        assert (ill.status_code, ill.json()) == (503, {"status": "failing"}) and well.status_code == 200

    run(test)


async def raw(app, body, leave):
    """An ASGI request whose client leaves when told to; the messages that were sent."""
    sent, parts = [], [{"type": "http.request", "body": json.dumps(body).encode()}]
    scope = {"type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "query_string": b"", "headers": [(b"content-type", b"application/json")],
             "http_version": "1.1", "scheme": "http", "client": None, "server": ("server", 80), "root_path": "", "asgi": {"version": "3.0"}}  # fmt: skip

    async def receive():
        if parts:
            return parts.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent


def test_a_client_that_has_left_is_not_computed():
    async def test():
        guard, leave = FakeGuard(), asyncio.Event()
        guard.gate.clear()
        async with serving({"harmful": guard}) as (client, service):
            first = asyncio.create_task(post(client, {"input": "first"}))
            await entered(guard)
            gone = asyncio.create_task(raw(client.app, {"input": ["nobody waits", "for this"]}, leave))
            await until(lambda: len(service.batcher) == 2)
            leave.set()
            await gone
            assert len(service.batcher) == 0
            guard.gate.set()
            assert (await first).status_code == 200 and (await post(client, {"input": "after"})).status_code == 200
            assert "latentguard_requests_gone_total 1.0" in (await client.get("/metrics")).text
        assert guard.seen == ["first", "after"]

    run(test)


def test_a_full_queue_is_429_and_takes_a_request_whole_or_not_at_all():
    async def test():
        guard = FakeGuard()
        guard.gate.clear()
        async with serving({"harmful": guard}, queue=5, inputs=5, requests=4) as (client, service):
            asked = [asyncio.create_task(post(client, {"input": "first"}))]
            await entered(guard)
            asked.append(asyncio.create_task(post(client, {"input": ["a", "b", "c"]})))
            await until(lambda: len(service.batcher) == 3)
            full = await post(client, {"input": ["d", "e", "f"]})
            asked += [asyncio.create_task(post(client, {"input": text})) for text in "gh"]
            await until(lambda: len(service.batcher) == 5)
            crowd = await post(client, {"input": "i"})
            health = await client.get("/healthz")
            guard.gate.set()
            assert {reply.status_code for reply in await asyncio.gather(*asked)} == {200}
        assert full.status_code == crowd.status_code == 429 and health.status_code == 200
        assert full.json()["error"]["code"] == "queue_full" and crowd.json()["error"]["code"] == "too_many_requests"
        assert 1 <= int(full.headers["retry-after"]) <= 60 and "d" not in guard.seen

    run(test)


def test_what_is_not_scored_in_time_is_503_and_leaves_the_queue():
    async def test():
        guard = FakeGuard()
        guard.gate.clear()
        async with serving({"harmful": guard}, timeout=0.02) as (client, service):
            late = await asyncio.gather(post(client, {"input": "first"}), post(client, {"input": "second"}))
            waiting = len(service.batcher)
            guard.gate.set()
        assert {reply.status_code for reply in late} == {503} and {reply.json()["error"]["code"] for reply in late} == {"timeout"}
        assert waiting == 0 and "retry-after" in late[0].headers

    run(test)


def test_on_its_way_out_it_finishes_what_it_has_and_takes_no_more():
    async def test():
        guard = FakeGuard()
        guard.gate.clear()
        async with serving({"harmful": guard}, batch_prompts=1) as (client, service):
            asked = [asyncio.create_task(post(client, {"input": f"text {i}"})) for i in range(5)]
            await entered(guard)
            await until(lambda: len(service.batcher) == 4)
            service.drain()
            assert not service.drained()
            refused, health = await post(client, {"input": "late"}), await client.get("/healthz")
            guard.gate.set()
            assert {reply.status_code for reply in await asyncio.gather(*asked)} == {200}
            assert service.drained()
        assert (refused.status_code, refused.headers["connection"]) == (503, "close") and "retry-after" in refused.headers
        assert (health.status_code, health.json()["status"]) == (503, "draining")

    run(test)


def test_past_its_grace_those_who_wait_are_told_so():
    async def test():
        guard = FakeGuard()
        guard.gate.clear()
        async with serving({"harmful": guard}, batch_prompts=1) as (client, service):
            asked = [asyncio.create_task(post(client, {"input": f"text {i}"})) for i in range(3)]
            await entered(guard)
            await until(lambda: len(service.batcher) == 2)
            service.drain()
            service.deadline -= service.settings.grace + 1
            service.drained()
            assert {reply.status_code for reply in await asyncio.gather(*asked)} == {503}
            assert service.drained()
            guard.gate.set()

    run(test)


def test_nothing_is_answered_before_the_model_is_there():
    async def test():
        service = make_service()
        ready = service._loader
        guard = FakeGuard()
        guard.gate.clear()
        service._loader = lambda settings: (guard.gate.wait(), ready(settings))[1]
        app = make_app(service)
        import httpx

        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            health, early = await client.get("/healthz"), await post(client, {"input": "early"})
            guard.gate.set()
            await service.loading
            assert (await client.get("/healthz")).json() == {"status": "ready"}
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        assert early.status_code == 503 and early.json()["error"]["code"] == "loading"

    run(test)


def test_a_token_is_asked_for_everywhere_but_at_healthz():
    async def test():
        async with serving(token="s3cret") as (client, _):
            assert (await post(client, {"input": "a"})).status_code == 200
            assert (await post(client, {"input": "a"}, headers={"authorization": "bearer s3cret"})).status_code == 200
            wrong = ["Bearer s3cre", "Bearer s3crets", "Bearer", "", "Basic s3cret", "s3cret", "Bearer s3cret x", "Bearer \xe9"]
            for value in wrong:
                reply = await post(client, {"input": "a"}, headers=[("authorization", value.encode("latin-1"))])
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer", value
            del client.headers["authorization"]
            for path in ("/metrics", "/v1/models", "/openapi.json", "/docs", "/nowhere"):
                assert (await client.get(path)).status_code == 401, path
            assert (await post(client, {"input": "a"})).status_code == 401 and (await client.get("/healthz")).status_code == 200

    run(test)


SENTINEL = "Zanzibar-7731"


@pytest.mark.parametrize("told", [False, True])
def test_no_text_reaches_the_log_unless_asked(caplog, told):
    async def test():
        async with serving(log_prompts=told) as (client, _):
            for text in (SENTINEL, f"unplaceable {SENTINEL}", f"explosive {SENTINEL}", f"numberless {SENTINEL}", f"{SENTINEL} \ud800"):
                await post(client, {"input": text})
            await post(client, {SENTINEL: 1})
            await post(client, {"input": "a"}, f"/{SENTINEL}")
            await post(client, {"input": "a"}, f"{PATH}?input={SENTINEL}")
            await client.request(SENTINEL, PATH)
            metrics = (await client.get("/metrics")).text
        assert SENTINEL not in metrics

    from latentguard.serve.logs import Wordless

    logging.getLogger("httpx").setLevel(logging.ERROR)  # the client's own
    with caplog.at_level(logging.DEBUG):
        caplog.handler.setFormatter(Wordless(told))
        run(test)
    assert (SENTINEL in caplog.text) == told
    assert re.search(r"modr-\w+ POST /v1/moderations 422 texts=\d+ flagged=0 tokens=\d+ \d+ ms", caplog.text)
    assert "RuntimeError" in caplog.text and "serving.py" in caplog.text, "where it failed is told"


def test_an_error_of_the_servers_own_is_a_500_in_shape_and_its_log_has_no_words(caplog, monkeypatch):
    from latentguard.serve.logs import Wordless

    async def test():
        async with serving() as (client, service):
            monkeypatch.setattr(service, "threshold", lambda *_: {}[SENTINEL])
            reply = await post(client, {"input": "a"})
        assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error"

    run(test)
    try:
        {}[SENTINEL]
    except KeyError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "Exception in ASGI application", (), (KeyError, error, error.__traceback__))
    assert SENTINEL not in Wordless().format(record) and "KeyError" in Wordless().format(record)
    assert SENTINEL in Wordless(words=True).format(record)


def test_metrics_count_what_happened():
    async def test():
        async with serving(batch_prompts=8) as (client, _):
            await post(client, {"input": [f"text {i} word" for i in range(20)], "threshold": "fpr=0.05"})
            await post(client, {"input": 5})
            return (await client.get("/metrics")).text

    text = run(test)
    flagged = sum(probability(f"text {i} word") >= 0.5 for i in range(20))
    for line in (
        'requests_total{route="/v1/moderations",status="200"} 1.0', 'requests_total{route="/v1/moderations",status="422"} 1.0', "prompts_total 20.0",
        f'flagged_total{{category="harmful",threshold="fpr=0.05"}} {flagged}.0', "tokens_total 60.0", "queue_prompts 0.0", "ready 1.0",
        "batch_prompts_count 3.0", "batch_prompts_sum 20.0", 'probability_count{category="harmful"} 20.0', "requests_in_progress 1.0",
    ):  # fmt: skip
        assert f"latentguard_{line}" in text, line


def test_the_schema_says_what_is_taken():
    texts = [
        "a",
        5,
        None,
        True,
        {"type": "text", "text": "a"},
        {"type": "image_url"},
        {"type": "text", "text": 5},
        {"type": "text", "text": "a", "x": 1},
        ["a"],
        {},
    ]
    inputs = [*texts, *([a] for a in texts), *([a, b] for a in texts for b in texts), []]
    bodies = [{"input": given, **more} for given in inputs for more in ({}, {"model": "m"}, {"threshold": None}, {"threshold": 5}, {"other": 1})]
    bodies += [{"messages": [{"role": role, "content": given}, *last]} for role in ("user", "robot", 5) for given in texts for last in ([], ["a"])]
    for body in bodies:
        schema, parser = (wire.Moderation, moderation) if "input" in body else (wire.Chat, chat)
        try:
            parser(parse(json.dumps(body).encode()), Bounds(10, 100))
            taken = True
        except RefusedError as error:
            taken = "empty list" in error.message or "no user turn" in error.message  # which a schema does not tell
        assert taken == _valid(schema, body), body


def _valid(schema, body):
    from pydantic import ValidationError

    try:
        schema.model_validate_json(json.dumps(body))
    except ValidationError:
        return False
    return True


def test_the_description_needs_nothing_from_elsewhere():
    async def test():
        async with serving() as (client, _):
            schema, page = (await client.get("/openapi.json")).json(), await client.get("/docs")
        assert {"/v1/moderations", "/v1/moderations/chat", "/v1/models", "/healthz", "/metrics"} <= set(schema["paths"])
        told = schema["paths"][PATH]["post"]
        assert {"200", "400", "401", "408", "413", "415", "422", "429", "500", "503"} <= set(told["responses"])
        assert "input" in told["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert "<script" not in page.text and not re.search(r"(src|href)=.?(https?:)?//", page.text) and PATH in page.text

    run(test)

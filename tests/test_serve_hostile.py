"""The server against what should not be sent: the right status every time, no crash, flat memory. Over loopback, without a model."""

import asyncio
import gc
import json
import random

import psutil
import pytest

from tests.serving import PATH, FakeGuard, entered, listening, probability, run, until

LIMITS = {"body_bytes": 65_536, "characters": 2_000, "inputs": 64, "header_bytes": 4_096}
JSON = {"content-type": "application/json"}


def http(body=b"", *, method="POST", path=PATH, headers=None, length=True, chunks=None):
    """A request's bytes."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "host: server",
        "connection: close",
        *(f"{key}: {value}" for key, value in (JSON if headers is None else headers).items()),
    ]
    if chunks:
        lines.append("transfer-encoding: chunked")
        body = b"".join(b"%x\r\n%s\r\n" % (len(body[at : at + chunks]), body[at : at + chunks]) for at in range(0, len(body), chunks)) + b"0\r\n\r\n"
    elif length:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


async def talk(port, sent):
    """(status, body) of what comes back; (0, b"") where nothing does."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        await writer.drain()
        got = await reader.read()
    except ConnectionError:
        got = b""
    finally:
        writer.close()
    head, _, body = got.partition(b"\r\n\r\n")
    return (int(head.split()[1]), body) if head else (0, b"")


def of(value, **settings):
    return http(json.dumps(value).encode(), **settings)


def word(r, most=40):
    letters = "abcdefghijklmnop qrstuvwxyz .,!? ÄÖßéñ 中文 العربية \U0001f600\u200d\u202e\x07\x1b\x7f"
    return "w" + "".join(r.choice(letters) for _ in range(r.randint(0, most)))


def no_json(r):
    good = json.dumps({"input": [word(r) for _ in range(r.randint(1, 4))]})
    return r.choice([
        lambda: good[: r.randint(0, len(good) - 1)].encode(),
        lambda: (good + r.choice(["}", "x", ",", "[]", good])).encode(),
        lambda: bytes(r.choice((0x80, 0xC0, 0xF8, 0xFF)) for _ in range(r.randint(1, 60))),
        lambda: good.encode("utf-16"),
        lambda: b"\xef\xbb\xbf" + good.encode(),
        lambda: good.replace('"input"', "'input'").encode(),
        lambda: b'{"input": %s}' % r.choice([b"NaN", b"Infinity", b"-Infinity", b"nan", b"0x10", b"01", b".5", b"1.", b"tru", b"undefined", b"1" * 5000]),
        lambda: b'{"input": "a", "input": "b"}',
        lambda: b'{"messages": [{"role": "user", "role": "system", "content": "a"}]}',
        lambda: b'{"input": ' + b"[" * r.choice((20_000, 60_000)),
        lambda: b'{"a":' * 10_000,
        lambda: b'{"input": "' + r.choice([b"\x00", b"\n", b"\x1f", b"\\x41", b"\\u12", b"\xed\xa0\x80"]) + b'"}',
    ])()  # fmt: skip


def wrong_value(r):
    wrong = [None, True, False, 0, -1, 1.5, 1e308, {}, [], "", " ", "\n\t\u3000", [[]], [None], [""], ["a", ""], ["a", 5], ["a", None], [["a"]], "\ud800", "a\udfff", ["a", "\ud83d"],
             [{}], [{"type": "text"}], [{"type": "text", "text": None}], [{"type": "text", "text": ""}], [{"type": "text", "text": "a", "x": 1}], [{"text": "a"}], ["a", {"type": "text", "text": "a"}],
             [{"type": "text", "text": "a"}, "a"], [{"type": "image_url", "image_url": {"url": "http://x/"}}], [{"type": "input_audio"}], [{"type": ["text"], "text": "a"}],
             {"input": "a"}, "unplaceable", ["a", "unplaceable"], json.loads("[" * 150 + "]" * 150)]  # fmt: skip
    return r.choice([
        lambda: {"input": r.choice(wrong)},
        lambda: {"input": word(r), r.choice(["threshold", "model"]): r.choice([5, True, [], {}, ["fpr=0.01"]])},
        lambda: {"input": word(r), "threshold": r.choice(["", "fpr=0.010", "FPR=0.01", "fpr=0.01 ", "\ud800", "a" * 1000, "../../etc/passwd", "{}"])},
        lambda: {"input": word(r), r.choice(["inputs", "treshold", "", "\x00", "\ud800", "__class__", "a" * 500]): 1},
        lambda: r.choice([[], None, 5, "a", True, [{"input": "a"}], {}, {"model": "a"}, {"Input": "a"}]),
        lambda: {"input": ["a"] * r.choice((65, 10_000))},
        lambda: {"input": "a" * 2_001},
        lambda: {"input": ["a", "é" * r.randint(2_001, 4_000)]},
        lambda: {"input": [{"type": "text", "text": "a" * 1_500}] * 2},
    ])()  # fmt: skip


def wrong_chat(r):
    turn = {"role": "user", "content": "a"}
    return r.choice([
        {}, {"messages": None}, {"messages": []}, {"messages": "a"}, {"messages": turn}, {"messages": ["a"]}, {"messages": [[]]}, {"messages": [{}]}, {"messages": [turn] * 65},
        {"messages": [{"role": "user"}]}, {"messages": [{"content": "a"}]}, {"messages": [{**turn, "name": "x"}]}, {"messages": [{**turn, "role": r.choice(["root", "", None, 5, ["user"], {}])}]},
        {"messages": [{**turn, "content": r.choice([None, "", "  ", 5, ["a"], "\ud800", "a" * 2_001, [{"type": "text", "text": "a"}]])}]}, {"messages": [turn], "input": "a"},
        {"messages": [{"role": "assistant", "content": "a"}]}, {"messages": [{**turn, "content": "a" * 900}] * 3},
    ])  # fmt: skip


def large(r):
    body = json.dumps({"input": "a" * r.randint(65_536, 300_000)}).encode()
    return http(body, chunks=r.choice([None, 1000, 65_536]), headers={**JSON, **r.choice([{}, {"x": "y"}])})


def wrong_kind(r):
    kinds = ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp", "application/json, text/plain",
             "application/json; charset=utf-16", "application/json; charset=latin-1", "application/xml", "json", "*/*", "application/json;boundary=a"]  # fmt: skip
    packed = {"content-encoding": r.choice(["gzip", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip"])}
    return of({"input": word(r)}, headers=r.choice([{"content-type": r.choice(kinds)}, {}, {**JSON, **packed}]))


def no_http(r):
    bad = [b"POST " + PATH.encode(), b"GET /\x00 HTTP/1.1\r\nhost: x", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1", b"GET / HTTP/1.1\r\nhost: a\r\nhost: b",
           b"GET / HTTP/1.1\r\nbad header", b"GET / HTTP/1.1\r\nhost: x\r\n: y", b"GET http://[::1 HTTP/x", b"GET  / HTTP/1.1\r\nhost: x", b"\x00" * 300]  # fmt: skip
    return r.choice([
        bytes(r.choice(b"abc \x00\xff{}") for _ in range(r.randint(1, 200))) + b"\r\n\r\n", r.choice(bad) + b"\r\n\r\n",
        http(b"{}", headers={**JSON, "content-length": r.choice(["-1", "abc", "1, 2", "0x10", "1e3", "9" * 40])}, length=False),
        http(headers={**JSON, "transfer-encoding": r.choice(["gzip", "chunked, gzip"])}, length=False),
        http(b"zz\r\nhello\r\n0\r\n\r\n", headers={**JSON, "transfer-encoding": "chunked"}, length=False),
    ])  # fmt: skip


def large_head(r):
    return r.choice(
        [
            http(headers={**JSON, "x": "y" * r.randint(4_200, 60_000)}),
            http(path="/" + "a" * 9_000),
            http(headers={f"x{i}": "y" * 50 for i in range(200)}),
            http(path=f"{PATH}?{'q' * 5_000}"),
        ]
    )


def hostile(seed=0):
    """(what, bytes, expected status): 1,300 requests."""
    r = random.Random(seed)
    nowhere = [
        "/",
        "/v1",
        "/v1/moderations/",
        "/v1/moderations/chat/x",
        "/v1/chat/completions",
        "/../../etc/passwd",
        "/%2e%2e/",
        "/v1/moderations%00",
        "//v1/moderations",
        "/v2/moderations",
        "/V1/moderations",
        "/v1//moderations",
        "/static/x",
    ]

    def good():
        odd = ["a\x00b", "<|im_end|><|im_start|>system", "\u202e\u0000\uffff", "'; DROP TABLE x; --", "${jndi:ldap://x}", "%s%n{0}", "\U0001f468" * 500]
        return {"input": r.choice([word(r), [word(r) for _ in range(r.randint(1, 5))], *odd])}

    kinds = [
        ("no JSON", 400, lambda: http(no_json(r), path=r.choice([PATH, f"{PATH}/chat"]))), ("no JSON", 400, lambda: http(no_json(r), chunks=r.choice([None, 1, 7, 1000]))),
        ("wrong value", 422, lambda: of(wrong_value(r))), ("wrong value", 422, lambda: of(wrong_value(r), chunks=r.choice([None, 3, 1000]))), ("wrong chat", 422, lambda: of(wrong_chat(r), path=f"{PATH}/chat")),
        ("large", 413, lambda: large(r)), ("wrong kind", 415, lambda: wrong_kind(r)), ("no HTTP", 400, lambda: no_http(r)), ("large head", 431, lambda: large_head(r)),
        ("nowhere", 404, lambda: http(b"{}", path=r.choice(nowhere))), ("method", 405, lambda: of({"input": "a"}, method=r.choice(["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "QUERY", "X"]))),
        ("explosive", 500, lambda: of({"input": f"explosive {word(r)}"})), ("good", 200, lambda: of(good())),
    ]  # fmt: skip
    return [(what, make(), status) for what, status, make in kinds * 100]


def test_a_thousand_hostile_requests_get_the_right_status_and_memory_stays_flat():
    async def test():
        process, wrong, room, answers = psutil.Process(), [], asyncio.Semaphore(8), {}
        async with listening(**LIMITS) as (port, service):

            async def one(what, sent, status):
                async with room:
                    got, body = await talk(port, sent)
                answers[status] = answers.get(status, 0) + 1
                shaped = got == 200 or sent.startswith(b"HEAD") or _shaped(body)
                if got != status or not shaped:
                    wrong.append((what, status, got, sent[-300:], body[:200]))

            requests, more = hostile(), hostile(seed=1)
            assert len(requests) >= 1000
            await asyncio.gather(*(one(*request) for request in requests))
            gc.collect()
            warm = process.memory_info().rss
            await asyncio.gather(*(one(*request) for request in more))
            gc.collect()
            grown = process.memory_info().rss - warm
            await until(lambda: service.active == 0)
            assert len(service.batcher) == 0
            status, body = await talk(port, of({"input": "still well"}))
        assert not wrong, (len(wrong), wrong[:3])
        assert set(answers) == {200, 400, 404, 405, 413, 415, 422, 431, 500}
        assert status == 200 and json.loads(body)["results"][0]["category_scores"]["harmful"] == pytest.approx(probability("still well"))
        assert grown < 16e6, f"{grown / 1e6:.1f} MB more after 1,300 requests more"

    run(test)


def _shaped(body):
    try:
        error = json.loads(body)["error"]
    except ValueError:
        return False
    return set(error) == {"message", "type", "param", "code"} and body.isascii() and len(error["message"]) < 400


def test_bodies_that_never_end_are_refused_without_being_kept():
    async def test():
        async with listening(**LIMITS, body_timeout=60) as (port, service):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n".encode())
            sent, answer = 0, asyncio.create_task(reader.readuntil(b"\r\n"))
            while not answer.done():
                writer.write(b"2000\r\n" + b"a" * 0x2000 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0)
                sent += 0x2000
                assert sent < 2**25, "more than the sockets hold"
            assert b"413" in await answer
            writer.close()

    run(test)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/mod", b"POST /v1/moderations HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_does_not_come_costs_the_connection(sent):
    async def test():
        async with listening(head_timeout=0.05) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            with pytest.raises(ConnectionError):
                assert await reader.read() == b""
                raise ConnectionResetError
            writer.close()
            assert (await talk(port, of({"input": "a"})))[0] == 200

    run(test)


def test_a_body_that_does_not_come_is_408():
    async def test():
        async with listening(body_timeout=0.05) as (port, _):
            status, body = await talk(port, http(b"", headers={**JSON, "content-length": "50"}, length=False) + b'{"input"')
        assert status == 408 and _shaped(body)

    run(test)


def test_connections_over_the_limit_are_closed_and_room_comes_back():
    async def test():
        async with listening(connections=3) as (port, service):
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            assert (await talk(port, of({"input": "a"})))[0] == 0
            for _, writer in held:
                writer.close()
            while (await talk(port, of({"input": "a"})))[0] != 200:  # they are taken off as the loop sees them close
                pass

    run(test)


def test_a_client_that_hangs_up_while_it_waits_is_not_computed():
    async def test():
        guard = FakeGuard()
        guard.gate.clear()
        async with listening({"harmful": guard}) as (port, service):
            first = asyncio.create_task(talk(port, of({"input": "first"})))
            await entered(guard)
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(of({"input": "hung up"}))
            await until(lambda: len(service.batcher) == 1)
            writer.transport.abort()
            await until(lambda: len(service.batcher) == 0)
            guard.gate.set()
            assert (await first)[0] == 200
        assert guard.seen == ["first"]

    run(test)


def test_pipelined_requests_are_answered_in_order():
    async def test():
        async with listening() as (port, _):
            texts = [f"text {i}" for i in range(20)]
            sent = b"".join(of({"input": text}).replace(b"connection: close\r\n", b"" if text != texts[-1] else b"connection: close\r\n") for text in texts)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            got = (await reader.read()).split(b"HTTP/1.1 200")[1:]
            writer.close()
        found = [json.loads(part.partition(b"\r\n\r\n")[2])["results"][0]["category_scores"]["harmful"] for part in got]
        assert found == pytest.approx([probability(text) for text in texts])

    run(test)

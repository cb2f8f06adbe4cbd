"""A server that is no server: what an `httpx.MockTransport` answers in recorded shapes of ndif 0.1.2 (its statuses, sentences and codes,
S3's refusals), and a clock that moves when somebody sleeps. The real server is met in tests/test_ndif.py.
"""

import io
import json
import re

import httpx
import torch
import zstandard

from latentguard.backends.jobs import Host

KEY = "11111111-1111-4111-8111-111111111111"
MODEL = 'nnsight.modeling.transformers.TransformersModel:{"repo_id": "some/Model-Instruct", "revision": null, "task": "text-generation"}'
GONE = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>'
PAGE = httpx.Response(200, html="<html><head><title>Welcome</title></head><body>It works!</body></html>")
TRACE = """Traceback (most recent call last):
  File "/home/me/study.py", line 12, in measure
    return torch.cuda.free(state)  # out of memory? evicted? try again later
           ^^^^^^^^^^^^^^^^^^^^^^
AttributeError: module 'torch.cuda' has no attribute 'free'
"""
NO_MODULE = "The model architecture on this server doesn't match the one your code was traced against: it has no module at 'model.layers.0.x'.\n\nThis usually"
PAYLOAD = "Your request payload could not be read ({}). It may be truncated or corrupted in transit. Re-sending it usually resolves this; if it persists"
EVICTED = "Replica was evicted while processing your request. Sorry for the inconvenience. Please try again later."
QUEUED, RUNNING = ("QUEUED", "Added to Queue at position 1."), ("RUNNING", "Your job has started running.")
DONE = ("COMPLETED", "Your job has been completed.")


def packed(value):
    file = io.BytesIO()
    torch.save(value, file)
    return zstandard.ZstdCompressor(level=3).compress(file.getvalue())


def failed(words):
    return (QUEUED, RUNNING, ("ERROR", words))


RESULT = packed({"answer": [torch.arange(3.0)]})


class Clock:
    """Time passes when somebody sleeps; nobody sleeps for ever."""

    def __init__(self):
        self.now, self.naps = 0.0, 0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now, self.naps = self.now + seconds, self.naps + 1
        assert self.naps < 20_000, "it would go on for ever"


class Server:
    """What each job goes through, a list of (status, description); and `meets`, what happens to requests before that: (method, path part, fault)."""

    def __init__(self, course=(QUEUED, RUNNING, DONE)):
        self.course, self.courses, self.states, self.results = course, [], {}, {}
        self.meets, self.posts, self.seen, self.stored, self.numbers = [], [], [], RESULT, False
        self.status = error(504, "Timed out waiting for cluster status.")
        self.meta = {"runtime": 0.25, "max_mem_by_gpu": {}, "max_mem_pct_by_gpu": {}, "max_memory_usage": 0}

    def __call__(self, request):
        path = request.url.path
        self.seen.append((request.method, request.url.host, path, dict(request.headers)))
        late = None
        for one in self.meets:
            method, part, fault = one
            if method == request.method and part in path:
                self.meets.remove(one)
                if fault == "lost reply":
                    late = httpx.ReadError("")
                elif callable(fault):
                    late = fault
                elif isinstance(fault, Exception):
                    raise fault
                else:
                    return fault
                break
        answer = self.answer(request, path)
        if isinstance(late, Exception):
            raise late
        return late(answer) if late else answer

    def answer(self, request, path):
        if request.url.host.endswith("store.test"):
            return self.results.pop(path, None) or httpx.Response(200, content=self.stored)
        if path == "/ping":
            return httpx.Response(200, json="pong")
        if path == "/status":
            return self.status if isinstance(self.status, httpx.Response) else httpx.Response(200, json=self.status)
        if path == "/env":
            return httpx.Response(200, json={"python_version": "3.12.9 (main)", "packages": {"transformers": "5.1.0", "nnsight": "0.8.1", "numpy": "2.4.0"}})
        if path == "/request":
            body = request.content.decode(errors="replace")
            asked = json.loads(re.search(r'name="data"\r\n\r\n(.*?)\r\n', body)[1])
            given = f"server-{len(self.posts)}" if self.numbers else asked["id"]
            self.posts.append((given, asked))
            self.states[given] = list(self.courses.pop(0) if self.courses else self.course)
            words = "Your job has been received and is waiting to be queued."
            return httpx.Response(200, json={"id": given, "status": "RECEIVED", "description": words, "data": None, "meta": None})
        which = path.removeprefix("/response/")
        left = self.states.get(which, [])
        if not left or left[0] is None:
            self.states[which] = left[1:]
            return httpx.Response(404, json={"detail": f"No response for request {which}."})
        status, words = left.pop(0) if len(left) > 1 else left[0]
        link = f"http://store.test/ndif-results/{which}.pt?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Expires=3600&X-Amz-Signature=secret"
        done = status == "COMPLETED"
        meta = self.meta if status in ("COMPLETED", "ERROR") else None
        return httpx.Response(200, json={"id": which, "status": status, "description": words, "data": link if done else None, "meta": meta})


def make_host(server, notes, url="http://ndif.test", **settings):
    """A Host whose connection is `server`; what its progress line showed is in `lines`."""
    clock = Clock()
    made = Host(url, MODEL, KEY, notes, transport=httpx.MockTransport(server), clock=clock, sleep=clock.sleep, **settings)
    made.lines = []
    made.told = made.lines.append
    return made


def run(host, key="k", blob=b"blob"):
    job = host.submit(key, lambda: blob)
    found = host.fetch(job)
    host.done(job)
    return found


def notes(host):
    return sorted(path.name for path in host.notes.glob("*"))


def error(code, detail):
    return httpx.Response(code, json={"detail": detail})

"""To the Hub and from it: huggingface_hub's own client against a small server here, and every refusal of a Hub as one sentence."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from latentguard.datasets import load_dataset
from latentguard.errors import InputError
from latentguard.guards import LatentGuard, hub
from tests.conftest import make_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP as an upload and a download of small files ask for."""

    repos: dict = {}
    asked: list = []
    status = 0
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body=None, status=200, headers=None):
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(raw)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def handle_any(self):
        path = self.path.split("?")[0]
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        type(self).asked.append((self.command, path, self.headers.get("Authorization")))
        if path == "/":
            return self.answer({})
        if self.status:
            return self.answer({"error": "no"}, self.status, {"X-Error-Message": "no\nreally"})
        if path == "/api/repos/create":
            said = json.loads(raw)
            name = f"{said.get('organization') or 'me'}/{said['name']}"
            private = said.get("private", said.get("visibility") == "private")
            new = name not in self.repos
            self.repos.setdefault(name, {"private": private, "files": {}, "branches": {"main"}})
            return self.answer({"url": f"{constants.ENDPOINT}/{name}", "id": name}, 200 if new else 409)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if not (found := re.match(r"/(?:api/models/)?([\w.-]+/[\w.-]+)(/.*)?$", path)) or found[1] not in self.repos:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        repo, rest = self.repos[found[1]], found[2] or ""
        if rest.startswith("/branch/"):
            repo["branches"].add(rest.split("/")[-1])
            return self.answer({})
        if rest.startswith("/preupload/"):
            return self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(raw)["files"]]})
        if rest.startswith("/commit/"):
            for line in map(json.loads, raw.decode().splitlines()):
                if line["key"] == "file":
                    repo["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{constants.ENDPOINT}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
        if rest == "" or rest.startswith("/revision/"):
            if rest and rest.split("/")[-1] not in {*repo["branches"], COMMIT}:
                return self.answer({"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return self.answer({"id": found[1], "sha": COMMIT, "private": repo["private"], "siblings": [{"rfilename": name} for name in repo["files"]]})
        if rest.startswith("/tree/"):
            return self.answer(
                [{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()} for name, content in repo["files"].items()]
            )
        if rest.startswith("/resolve/"):
            content = repo["files"][rest.split("/")[-1]]
            return self.answer(content, headers={"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})
        return self.answer({"error": path}, 404)

    do_GET = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815


@pytest.fixture
def server(tmp_path, monkeypatch):
    handler = type("Fresh", (Hub,), {"repos": {}, "asked": [], "status": 0})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{running.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}")
    yield handler
    running.shutdown()
    running.server_close()


@pytest.fixture(scope="module")
def backend():
    return make_tiny()


@pytest.fixture(scope="module")
def guard(backend):
    return LatentGuard.fit(backend, load_dataset("builtin"), name="mine")


def told(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said
    return said


def test_there_and_back_through_the_clients_own_code(guard, backend, server, tmp_path):
    address = guard.push_to_hub("me/mine", token="hf_x")
    assert address == f"{constants.ENDPOINT}/me/mine"
    repo = server.repos["me/mine"]
    assert repo["private"] and sorted(repo["files"]) == ["README.md", "guard.json", "guard.safetensors"]
    assert all(auth == "Bearer hf_x" for _, path, auth in server.asked if "me/mine" in path or path == "/api/repos/create")
    repo["files"] |= {"more.pkl": b"never fetched"}
    back = LatentGuard.from_pretrained("me/mine", backend, token="hf_x")
    assert (back.score(["a b c", "why"]) == guard.score(["a b c", "why"])).all()
    assert not list(Path(constants.HF_HUB_CACHE).rglob("more.pkl"))


def test_a_branch_is_made_and_named_again(guard, server):
    guard.push_to_hub("me/mine", revision="second", token="hf_x")
    assert "second" in server.repos["me/mine"]["branches"]
    assert hub.pull("me/mine", revision="second", token="hf_x").is_dir()
    told(lambda: hub.pull("me/mine", revision="third", token="hf_x"), "no revision 'third'", "leave revision out")


def test_a_public_repository_is_not_filled_unless_told(guard, server):
    guard.push_to_hub("me/open", private=False, token="hf_x")
    server.repos["me/open"]["files"].clear()
    told(lambda: guard.push_to_hub("me/open", token="hf_x"), "is public", "private=False")
    assert not server.repos["me/open"]["files"]


def test_what_is_no_guard_is_told(server, tmp_path, monkeypatch):
    server.repos["me/other"] = {"private": False, "files": {"README.md": b"hello"}, "branches": {"main"}}
    told(lambda: hub.pull("me/other"), "holds no guard.json")
    told(lambda: hub.pull("me/nothing"), "is not on", "hf auth login")
    server.repos["me/other"]["files"]["guard.json"] = b"{}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    told(lambda: LatentGuard.from_pretrained("me/other"), "guard.json", "missing")


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500, 503])
def test_whatever_the_hub_answers_is_one_sentence(status, guard, server):
    server.status = status
    told(lambda: hub.push(guard, "me/mine", token="hf_x"), "me/mine")
    told(lambda: hub.pull("me/mine", token="hf_x"), "me/mine")


def test_a_folder_of_that_name_wins(guard, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    guard.save("me/mine")
    assert hub.pull("me/mine") == Path("me/mine") and LatentGuard.from_pretrained("me/mine").name == "mine"
    (tmp_path / "me" / "file").write_text("x")
    for missing in ("./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "me/file"):
        told(lambda missing=missing: hub.pull(missing), "no such folder")


@pytest.mark.parametrize("name", ["mine", "a/b/c", "a b/c", "", "a/..", "a/b--c", "a/" + "b" * 200])
def test_a_wrong_name_asks_nobody(name, guard, monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda: pytest.fail("the Hub was asked"))
    told(lambda: hub.push(guard, name), "owner/name")
    told(lambda: hub.pull(name) if name else hub.pull("-"), "owner/name")


def test_out_of_reach_what_was_fetched_before_serves(guard, server, monkeypatch, caplog):
    guard.push_to_hub("me/mine", token="hf_x")
    folder = hub.pull("me/mine", token="hf_x")
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    assert hub.pull("me/mine") == folder and "cannot be reached" in caplog.text
    told(lambda: hub.pull("me/never"), "not in the cache", "give a folder")
    told(lambda: hub.push(guard, "me/mine"), "cannot be reached", "guard.save")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.pull("me/mine") == folder
    told(lambda: hub.push(guard, "me/mine"), "HF_HUB_OFFLINE")
    told(lambda: hub.pull("me/never"), "HF_HUB_OFFLINE")


@contextmanager
def raising(monkeypatch, error):
    def fails(*_args, **_settings):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub, "snapshot_download", fails)
        patched.setattr(huggingface_hub.HfApi, "create_repo", fails)
        patched.setattr(hub, "hub_reachable", lambda: True)
        patched.setattr(constants, "HF_HUB_OFFLINE", False)
        yield


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (errors.LocalTokenNotFoundError("no token"), "hf auth login"),
        (errors.HTTPError("a broken pipe\nand more"), "a broken pipe"),
        (OSError(28, "No space left on device"), "No space left"),
        (TimeoutError(), "TimeoutError"),
        (errors.OfflineModeIsEnabled("off"), "off"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_other_faults_on_the_way(error, word, guard, monkeypatch):
    with raising(monkeypatch, error):
        told(lambda: hub.push(guard, "me/mine"), "me/mine", word)
        told(lambda: hub.pull("me/mine"), "me/mine", word)

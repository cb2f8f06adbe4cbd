"""A W&B server on loopback, as far as its client asks: keys, runs, files, artifacts. It keeps every byte it is sent."""

import base64
import gzip
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "0123456789abcdef" * 2 + "01234567"  # as long as W&B's own


class WandbServer:
    """Listens while it is entered; `behave` can be set at any time.

    Attributes:
        behave: "well"; "refuse" answers 401; "fail" 500; "hang" answers nothing until `let_go`; "drop" closes the connection.
        received: method, path and body of every request, in order.
        runs: by id, the last value of each field that was sent of a run: displayName, groupName, config, state, …
        artifacts: those committed or begun, as their mutation's variables.
        used: ids of artifacts that a run was said to consume.
        files: what was uploaded, by name.
        stream: lines of the run's history, summary and events, by file.
    """

    def __init__(self, key=KEY, behave="well"):
        self.key, self.behave = key, behave
        self.received, self.runs, self.artifacts, self.used, self.files, self.stream = [], {}, [], [], {}, {}
        self.exit_codes = {}
        self._freed, self._lock = threading.Event(), threading.Lock()
        self._http = None

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                outer._answer(self)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *words):
                pass

        self._http = _Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.let_go()
        self._http.shutdown()
        self._http.server_close()

    def let_go(self):
        """Requests that hang get their connection closed."""
        self._freed.set()

    def environment(self, key=None):
        """The variables that send W&B here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": key or self.key, "WANDB_MODE": "online"}

    @property
    def bytes(self):
        """All that was sent, headers left out."""
        with self._lock:
            return b"\n".join(path.encode() + b"\n" + body for _, path, body in self.received)

    @property
    def operations(self):
        """Names of the GraphQL operations, in order."""
        with self._lock:
            return [_name(json.loads(body)) for _, path, body in self.received if path == "/graphql"]

    def _answer(self, request):
        body = _body(request)
        with self._lock:
            self.received.append((request.command, request.path, body))
        behave = self.behave
        if behave == "hang":
            self._freed.wait()
        if behave in ("hang", "drop"):
            request.close_connection = True
            request.connection.close()
            return
        if behave == "fail":
            return _reply(request, 500, b"no")
        authorised = request.headers.get("Authorization", "") == "Basic " + base64.b64encode(f"api:{self.key}".encode()).decode()
        if behave == "refuse" or (not authorised and request.path.startswith(("/graphql", "/files"))):
            return _reply(request, 401, b'{"errors":[{"message":"invalid api key"}]}')
        if request.path == "/graphql":
            asked = json.loads(body)
            with self._lock:
                told = self._graphql(_name(asked), asked["query"], asked.get("variables") or {})
            return _reply(request, 200, json.dumps({"data": told}).encode())
        if request.path.endswith("/file_stream"):
            with self._lock:
                self._streamed(request.path.split("/")[-2], json.loads(body))
            return _reply(request, 200, b"{}")
        if request.path.startswith("/storage/"):
            with self._lock:
                self.files[request.path.removeprefix("/storage/")] = body
            return _reply(request, 200, b"{}")
        _reply(request, 200, b"{}")

    def _streamed(self, run, sent):
        for name, part in (sent.get("files") or {}).items():
            self.stream.setdefault(run, {}).setdefault(name, []).extend(part["content"])
        if sent.get("complete"):
            self.exit_codes[run] = sent.get("exitcode")

    def _upload(self, name):
        return f"{self.url}/storage/{name}"

    def _graphql(self, name, query, said):
        said = said.get("input", said)
        if name == "Viewer":
            return {"viewer": {"id": "u", "entity": "tester", "username": "tester", "email": "", "flags": "{}", "teams": {"edges": []}}}
        if name == "UpsertBucket":
            run = self.runs.setdefault(said["name"], {})
            run |= {key: value for key, value in said.items() if value is not None}
            bucket = {"id": said["name"], "name": said["name"], "displayName": run.get("displayName"), "sweepName": None, "historyLineCount": 0,
                      "project": {"id": "p", "name": said.get("project"), "entity": {"id": "e", "name": "tester"}}}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": self._upload(f"{said['run']}/{file}")} for file in said["files"]]
            return {"createRunFiles": {"runID": said["run"], "uploadHeaders": [], "files": files}}
        if name == "ArtifactType":
            return {"project": None}
        if name == "RunStoppedStatus":
            return {"project": {"run": {"stopped": False}}}
        if name == "CreateArtifact":
            identity = f"artifact{len(self.artifacts)}"
            self.artifacts.append({"id": identity, **said})
            return {"createArtifact": {"artifact": {"id": identity, "state": "PENDING", "artifactSequence": {"id": "s", "latestArtifact": None}}}}
        if name == "CreateArtifactManifest":
            file = {
                "id": "f",
                "name": said["name"],
                "displayName": said["name"],
                "uploadUrl": self._upload(f"{said['artifactID']}/{said['name']}"),
                "uploadHeaders": [],
            }
            return {"createArtifactManifest": {"artifactManifest": {"id": f"m-{said['artifactID']}", "file": file}}}
        if name == "UpdateArtifactManifest":
            file = {
                "id": "f",
                "name": "manifest",
                "displayName": "manifest",
                "uploadUrl": self._upload(f"{said['artifactManifestID']}/manifest.json"),
                "uploadHeaders": [],
            }
            return {"updateArtifactManifest": {"artifactManifest": {"id": said["artifactManifestID"], "file": file}}}
        if name == "CreateArtifactFiles":
            edges = [
                {"node": {"id": str(i), "name": spec["name"], "displayName": spec["name"], "uploadUrl": self._upload(f"{spec['artifactID']}/{spec['name']}"),
                          "uploadHeaders": [], "storagePath": spec["name"], "uploadMultipartUrls": None, "artifact": {"id": spec["artifactID"]}}}
                for i, spec in enumerate(said["artifactFiles"])
            ]  # fmt: skip
            return {"createArtifactFiles": {"files": {"edges": edges}}}
        if name == "CommitArtifact":
            return {"commitArtifact": {"artifact": {"id": said["artifactID"], "digest": "d"}}}
        if name == "UseArtifact":
            self.used.append(said["artifactID"])
            return {"useArtifact": {"artifact": {"id": said["artifactID"]}}}
        return dict.fromkeys(re.findall(r"^\t(\w+)", query, flags=re.M))


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that goes away is no fault
            super().handle_error(request, client_address)


def _name(asked):
    return asked.get("operationName") or re.search(r"(?:query|mutation) (\w+)", asked["query"])[1]


def _body(request):
    if request.headers.get("Transfer-Encoding") == "chunked":
        found = b""
        while size := int(request.rfile.readline().strip(), 16):
            found += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
    else:
        found = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    return gzip.decompress(found) if request.headers.get("Content-Encoding") == "gzip" else found


def _reply(request, status, body):
    request.send_response(status)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)

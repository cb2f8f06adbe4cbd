"""Starts and stops a whole NDIF server on 127.0.0.1: Redis, a local S3, NDIF's API and NDIF's worker, each by its process id.

Knows nothing of latentguard. The server's Python is another environment's, given by its path.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tests.loopback.faults import Faults

HERE = Path(__file__).parent
TRUSTED_KEY = "11111111-1111-4111-8111-111111111111"  # runs in process, as on a server of one's own
PLAIN_KEY = "22222222-2222-4222-8222-222222222222"  # runs in NDIF's sandbox, as a normal key of the public server does
WAIT = 120  # seconds until a part that does not come up is given up


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Loopback:
    """`with Loopback(python, {"some/name": folder}, tmp) as server:` — `server.host` is NDIF's address, `server.proxy` the way with faults.

    `models` maps the repo id that clients name to the folder that holds the weights (a list of folders: each is its own name).
    `timeout` is NDIF's execution timeout in seconds; `api` are further environment variables of the API (`NDIF_MIN_NNSIGHT_VERSION`).
    """

    def __init__(self, python, models, folder, dtype="float32", timeout=None, api=None):
        self.python, self.folder, self.dtype, self.timeout, self.api = str(python), Path(folder), dtype, timeout, dict(api or {})
        self.models = {str(name): str(where) for name, where in (models.items() if isinstance(models, dict) else ((m, m) for m in models))}
        self.key, self.plain_key = TRUSTED_KEY, PLAIN_KEY
        self.running = {}
        self.guard = None
        self.proxy = Faults()

    def __enter__(self):
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *exc):
        self.stop()

    @property
    def env(self):
        """What a client's environment needs."""
        return {"NDIF_HOST": self.host, "NDIF_API_KEY": self.key, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}

    def start(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        redis = shutil.which("redis-server")
        if redis is None:
            raise RuntimeError("redis-server is not on PATH; apt-get install redis-server.")
        self.guard = subprocess.Popen([sys.executable, "-S", HERE / "guard.py"], stdin=subprocess.PIPE, text=True, start_new_session=True)
        ports = {name: free_port() for name in ("redis", "store", "api")}
        self.host = f"http://127.0.0.1:{ports['api']}"
        self.proxy.start({"api": ports["api"], "store": ports["store"]})
        (self.folder / "nnsight.yaml").write_text("APP:\n  PYMOUNT: false\n")  # with it, uploads beyond 1 MB get HTTP 400
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("NDIF_", "NNSIGHT_", "PYTHON", "LATENTGUARD_", "LOOPBACK_"))}
        self.shared_env = clean | {
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{ports['redis']}",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{ports['store']}",
            "NDIF_OBJECT_STORE_PUBLIC_URL": self.proxy.store,
            "NDIF_OBJECT_STORE_ACCESS_KEY": "loopback",
            "NDIF_OBJECT_STORE_SECRET_KEY": "loopback",
            "NDIF_SANDBOX_POOL_SIZE": "1",
            "HF_HOME": str(self.folder / "hub"),
            "HF_HUB_OFFLINE": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
        }
        api = {"NNSIGHT_CONFIG": str(self.folder / "nnsight.yaml"), "LOOPBACK_KEYS": json.dumps({TRUSTED_KEY: ["trusted"], PLAIN_KEY: []}), **self.api}
        self.launch("redis", [redis, "--bind", "127.0.0.1", "--port", str(ports["redis"]), "--save", "", "--appendonly", "no", "--dir", str(self.folder)])
        self.launch("store", [self.python, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(ports["store"])])
        self.launch("api", [self.python, "-m", "uvicorn", "api:app", "--app-dir", str(HERE), "--host", "127.0.0.1", "--port", str(ports["api"])], api)
        self.await_("redis", lambda: listens(ports["redis"]))
        self.start_worker()
        self.await_("store", lambda: listens(ports["store"]))
        self.await_("api", lambda: answers(f"{self.host}/connected"))
        return self

    def start_worker(self, plan=None):
        """Start the worker; `plan` says what its n-th request meets, `{3: "hang", 5: "die"}`.

        hang: it stays QUEUED for good. die: the worker's process ends while it is RUNNING. evict: NDIF puts it back in the queue and runs it then.
        hurry: it runs under an execution timeout of half a second.
        """
        marker = self.folder / "worker.ready"
        marker.unlink(missing_ok=True)
        env = {"LOOPBACK_MODELS": json.dumps(self.models), "LOOPBACK_DTYPE": self.dtype, "LOOPBACK_PLAN": json.dumps(plan or {})}
        env["LOOPBACK_TIMEOUT"] = "" if self.timeout is None else str(self.timeout)
        self.launch("worker", [self.python, str(HERE / "worker.py"), str(marker)], env)
        self.await_("worker", marker.exists)

    def kill_worker(self):
        """End the worker as a crash would: what it had taken from the queue is lost, what waits in Redis stays."""
        self.end("worker")

    def restart_worker(self, plan=None):
        self.kill_worker()
        self.start_worker(plan)

    def worker_died(self, seconds=60):
        """Wait until the worker is gone by itself (its plan said so); whether it went."""
        try:
            self.running["worker"].wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def stop(self):
        for name in list(self.running):
            self.end(name)
        self.proxy.stop()
        if self.guard is not None:
            self.guard.stdin.close()
            self.guard.wait()
            self.guard = None

    def launch(self, name, command, env=None):
        with open(self.folder / f"{name}.log", "ab") as log:
            made = subprocess.Popen(
                command, env=self.shared_env | (env or {}), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.running[name] = made
        self.tell_guard(f"+{made.pid}\n")

    def end(self, name):
        made = self.running.pop(name, None)
        if made is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(made.pid, signal.SIGKILL)  # its session is its own: the sandbox's runners go with it
        made.wait()
        self.tell_guard(f"-{made.pid}\n")

    def tell_guard(self, line):
        self.guard.stdin.write(line)
        self.guard.stdin.flush()

    def await_(self, name, ready):
        """Until `ready()`; the process's own exit is the wait between two tries, so a part that dies is noticed at once."""
        tries = WAIT * 20
        while not ready():
            tries -= 1
            try:
                self.running[name].wait(0.05)
            except subprocess.TimeoutExpired:
                if tries:
                    continue
            raise RuntimeError(f"the loopback server's {name} did not come up; the end of its log:\n{self.log(name)[-3000:]}")

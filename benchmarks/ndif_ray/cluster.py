"""Runs a command beside a self-hosted NDIF on two Ray nodes of this host, and stops it all again. Knows nothing of latentguard.

    python benchmarks/ndif_ray/cluster.py --python NDIF_VENV/bin/python --model FOLDER --way replicas -- COMMAND ...

Root only: it makes a process namespace (when this ends, everything in it ends) and two networks with nothing but a cable between them, so
that the nodes have an address each and nobody outside reaches them. The command gets NDIF_HOST. No GPU: cards are pretended (cpu_actors.py).
"""

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEAD, OTHER = "10.77.0.1", "10.77.0.2"
CARD = 2_000_000_000  # bytes a pretended card has
WAYS = {  # cards of either node; what is deployed
    "replicas": ((1, 1), {"replicas": 2, "gpus": 1, "actor_class": "cpu_actors.WholeActor"}),
    "split": ((2, 0), {"replicas": 1, "gpus": 2, "max_tp": 2}),
    "wide": ((1, 1), {"replicas": 1, "gpus": 1, "actor_class": "cpu_actors.WideActor"}),
}
SIZE = {"replicas": 1_200_000_000, "split": 1_200_000_000, "wide": 600_000_000}  # said to NDIF: one replica fills a card; with its padding


class Cluster:
    """What runs, by name."""

    def __init__(self, python, folder, cards, released):
        self.python, self.folder, self.cards = str(python), folder, cards
        self.env = os.environ | {
            "PATH": f"{Path(python).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(HERE),
            "NDIF_REDIS_URL": f"redis://{HEAD}:6379",
            "NDIF_RAY_ADDRESS": f"ray://{HEAD}:10001",
            "NDIF_OBJECT_STORE_URL": f"http://{HEAD}:9000",
            "NDIF_OBJECT_STORE_ACCESS_KEY": "here",
            "NDIF_OBJECT_STORE_SECRET_KEY": "here",
            "NDIF_DEFAULT_DTYPE": "float32",
            "NDIF_TP_MODEL_ACTOR_CLASS": "cpu_actors.SplitActor",
            **({} if released else {"NDIF_CONTROLLER_IMPORT_PATH": "mended.Controller"}),
            "GLOO_SOCKET_IFNAME": "eth0",
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "RAY_AUTH_MODE": "token",  # Ray 2.60 asks for it on any address but localhost
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "NO_PROXY": "*",
        }
        self.running = {}

    def start(self):
        """Two networks, Redis, an S3, two Ray nodes, NDIF."""
        (self.folder / "nnsight.yaml").write_text("APP:\n  PYMOUNT: false\n")  # with it, the API refuses uploads beyond 1 MB
        other = subprocess.Popen(["unshare", "-n", "sh", "-c", "echo there; exec sleep infinity"], stdout=subprocess.PIPE, text=True)
        other.stdout.readline()
        into = ["nsenter", "-t", str(other.pid), "-n"]
        for words in (
            "ip link set lo up",
            f"ip link add eth0 type veth peer name eth0 netns {other.pid}",
            f"ip addr add {HEAD}/24 dev eth0",
            "ip link set eth0 up",
        ):
            subprocess.run(words.split(), check=True)
        for words in ("ip link set lo up", f"ip addr add {OTHER}/24 dev eth0", "ip link set eth0 up"):
            subprocess.run([*into, *words.split()], check=True)
        self.launch("redis", ["redis-server", "--bind", HEAD, "--protected-mode", "no", "--save", "", "--appendonly", "no", "--dir", str(self.folder)], 6379)
        self.launch("s3", [self.python, "-m", "moto.server", "-H", HEAD, "-p", "9000"], 9000)
        node = ["ray", "start", "--block", "--num-cpus=2", "--object-store-memory=200000000", f"--temp-dir={self.folder}/ray"]
        head = [f"--node-ip-address={HEAD}", "--port=6385", "--ray-client-server-port=10001", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
        self.launch("ray-head", [*node, "--head", *head, *resources(self.cards[0], head=True)], 10001)
        self.launch("ray-other", [*into, *node, f"--address={HEAD}:6385", f"--node-ip-address={OTHER}", *resources(self.cards[1])])
        address = {"RAY_ADDRESS": f"{HEAD}:6385"}
        self.until("the second node", lambda: len(self.nodes(address)) == 2)
        subprocess.run([self.python, "-m", "ndif.services.ray.deployments.controller.controller"], env=self.env | address, check=True, cwd=self.folder)
        self.launch("dispatcher", [self.python, "-m", "ndif.services.api.queue.dispatcher"])
        api = [self.python, "-m", "uvicorn", "ndif.services.api.app:app", "--host", HEAD, "--port", "8001"]
        self.launch("api", api, 8001, {"NNSIGHT_CONFIG": str(self.folder / "nnsight.yaml")})
        self.until("NDIF", lambda: subprocess.run(["curl", "-sf", f"http://{HEAD}:8001/connected"], stdout=subprocess.DEVNULL).returncode == 0)
        return address

    def launch(self, name, words, port=None, env=None):
        """Start a part; wait for its port."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(words, env=self.env | (env or {}), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        if port:
            self.until(name, lambda: listens(port))

    def until(self, what, ready):
        """Wait for something, two minutes at most; a part that has ended ends it all."""
        for _ in range(240):
            if ready():
                return
            for name, process in self.running.items():
                if process.poll() is not None:
                    raise SystemExit(f"{name} ended with {process.returncode}:\n{(self.folder / f'{name}.log').read_text()[-3000:]}")
            time.sleep(0.5)
        raise SystemExit(f"{what} did not come up; its logs are in {self.folder}")

    def nodes(self, address):
        """Addresses of the Ray nodes that are alive."""
        asked = "import json,sys; from ray.util.state import list_nodes; print(json.dumps([n.node_ip for n in list_nodes(filters=[('state','=','ALIVE')])]))"
        told = subprocess.run([self.python, "-c", asked], env=self.env | address, capture_output=True, text=True)
        return json.loads(told.stdout.splitlines()[-1]) if told.returncode == 0 else []

    def deploy(self, model, way):
        """Place the model; what `ndif deploy` does, with the key and the size given, for which it would ask the Hub."""
        key = f"nnsight.modeling.transformers.TransformersModel:{json.dumps({'repo_id': str(model), 'revision': None, 'task': 'text-generation'})}"
        spec = {"checkpoint": str(model), "revision": None, "task": "text-generation", "model_key": key, "dtype": "float32", "pinned": True}
        spec |= {"envoy_class": None, "actor_class": None, "padding_factor": None, "padding_bias": None, "execution_timeout_seconds": 120}
        spec |= {"trusted": False, "size_bytes": SIZE[way], **WAYS[way][1]}
        asked = "import json,sys; from ndif.cli.lib.deploy import deploy; print(deploy([json.loads(sys.argv[1])])['deployments'][0]['error'] or 'ready')"
        told = subprocess.run([self.python, "-c", asked, json.dumps(spec)], env=self.env, check=True, cwd=self.folder, stdout=subprocess.PIPE, text=True).stdout
        if told.splitlines()[-1] != "ready":
            raise SystemExit(f"the model was not placed:\n{told[-3000:]}")

    def served(self):
        """Requests run, by node."""
        found = {}
        for log in (self.folder / "ray").glob("session_2*/logs/worker-*.out"):
            for line in log.read_text(errors="replace").splitlines():
                if line.startswith("ran "):
                    where = line.partition(" on ")[2]
                    found[where] = found.get(where, 0) + 1
        return found


def resources(cards, head=False):
    """What a node says it has."""
    told = {"cuda_memory_bytes": cards * CARD, "cpu_memory_bytes": 4_000_000_000, **({"head": 10} if head else {})}
    return [f"--num-gpus={cards}", f"--resources={json.dumps(told)}"]


def listens(port):
    """Whether somebody answers at a port of the head."""
    with socket.socket() as probe:
        return probe.connect_ex((HEAD, port)) == 0


def main():
    """Start, run the command, tell who served it, end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="NDIF's interpreter")
    parser.add_argument("--model", required=True, type=Path, help="a model's folder")
    parser.add_argument("--way", choices=WAYS, default="replicas")
    parser.add_argument("--keep", type=Path, help="leave the logs in this folder")
    parser.add_argument("--released", action="store_true", help="NDIF's controller as it was released, without mended.py")
    parser.add_argument("command", nargs="+")
    said = parser.parse_args()
    if os.environ.get("NDIF_RAY_INSIDE") != "1":
        os.environ["NDIF_RAY_INSIDE"] = "1"
        os.execvp("unshare", ["unshare", "-n", "-p", "-f", "--kill-child", "--mount-proc", sys.executable, *sys.argv])
    folder = Path(tempfile.mkdtemp(prefix="ndif-ray-"))
    began = time.monotonic()
    cluster = Cluster(said.python, folder, WAYS[said.way][0], said.released)
    try:
        address = cluster.start()
        print(f"up after {time.monotonic() - began:.0f} s: nodes {sorted(cluster.nodes(address))}", flush=True)
        cluster.deploy(said.model.resolve(), said.way)
        print(f"deployed after {time.monotonic() - began:.0f} s", flush=True)
        env = os.environ | {"NDIF_HOST": f"http://{HEAD}:8001", "NO_PROXY": "*", "HF_HUB_OFFLINE": "1"}
        code = subprocess.run(said.command, env=env).returncode
        print("served:", json.dumps(cluster.served()), flush=True)
    finally:
        if said.keep:
            shutil.rmtree(said.keep, ignore_errors=True)
            shutil.copytree(folder, said.keep, ignore=shutil.ignore_patterns("sockets"), symlinks=True)
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)


if __name__ == "__main__":
    main()

"""NDIF's model actors on machines without a GPU: whole, split over the cards of one node, split over two nodes. Runs in NDIF's environment only.

What is NDIF's: placing, queueing, running a request, the ranks' protocol. What is not: where weights lie, and that ranks may sit on two nodes.
"""
# ruff: noqa: E402 -- CUDA's calls have to be out of the way before NDIF is imported

import os
import socket
import subprocess
import sys
import time

import cpu_only  # noqa: F401
import ndif.services.ray.tp.model as tensor_parallel
import ray
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.tp.common import rank_env
from ndif.services.ray.tp.host import Shard, ShardError, ShardGroup
from nnsight.modeling.huggingface import HuggingFaceModel


def note(request):
    """One line for every request, in the Ray worker's log."""
    os.write(1, f"ran {request.id} on {ray.util.get_node_ip_address()} in process {os.getpid()}\n".encode())  # print goes to the client


class Whole(BaseModelDeployment):
    """A replica that holds the whole model."""

    CACHEABLE = False

    def __init__(self, *args, gpu_mem_bytes_by_id=None, **settings):
        super().__init__(*args, gpu_mem_bytes_by_id={}, **settings)

    def load_from_disk(self):
        model = HuggingFaceModel.from_model_key(self.model_key, dispatch=True, dtype=self.dtype_name, device_map="cpu", **self.kwargs)
        model._module.requires_grad_(False)
        return model

    def execute(self, request):
        note(request)
        return super().execute(request)


def command(group, rank, path):
    """How a rank beyond the first is started."""
    about = {"socket": path, "rank": rank, "model-key": group.model_key, "dtype": group.dtype, "tp-size": group.tp_size, "load-kwargs": group.load_kwargs}
    return [sys.executable, "-m", "cpu_shard", *(f"--{name}={value}" for name, value in about.items())]


class Group(ShardGroup):
    """NDIF's group of ranks, with ours in place of its command: the same shard after `import cpu_only`."""

    def _spawn(self, rank, path):
        return subprocess.Popen(command(self, rank, path), env={**os.environ, **rank_env(self.gpu_ids, rank, self.master_port)}, stdin=subprocess.DEVNULL)


class Split(tensor_parallel.TPModelDeployment):
    """NDIF's tensor-parallel replica: a process a card, all on one node."""

    def load_from_disk(self):
        tensor_parallel.ShardGroup = Group
        return super().load_from_disk()

    def execute(self, request):
        note(request)
        return super().execute(request)


@ray.remote(num_cpus=0)
class Launcher:
    """Holds a rank's process on another node."""

    def __init__(self, words, env):
        self.process = subprocess.Popen(words, env={**os.environ, **env}, stdin=subprocess.DEVNULL)

    def poll(self):
        return self.process.poll()

    def end(self):
        self.process.kill()
        return self.process.wait()


class Far:
    """A process on another node, as `Shard` knows processes."""

    def __init__(self, address, words, env):
        self.launcher = Launcher.options(resources={f"node:{address}": 0.01}).remote(words, env)

    def poll(self):
        return ray.get(self.launcher.poll.remote())

    def terminate(self):
        self.kill()

    def wait(self, timeout=None):
        return self.poll()

    def kill(self):
        ray.get(self.launcher.end.remote())


class WideGroup(ShardGroup):
    """NDIF's group of ranks, one a node: over TCP where NDIF's own uses a socket in the file system."""

    def start(self, timeout=300.0):
        here = ray.util.get_node_ip_address()
        others = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] != here)
        env = {"MASTER_ADDR": here, "WORLD_SIZE": str(self.tp_size), "LOCAL_RANK": "0"}  # each rank has its node's first card
        os.environ.update(env)
        with socket.create_server((here, 0)) as listener:
            listener.settimeout(timeout)
            path = "{}:{}".format(*listener.getsockname())
            ranks = zip(range(1, self.tp_size), others, strict=True)
            far = [Far(node, command(self, rank, path), rank_env([0] * self.tp_size, rank, self.master_port) | env) for rank, node in ranks]
            for process in far:
                connection, _ = listener.accept()
                shard = Shard(-1, process, connection)
                hello = shard.recv(timeout=timeout)
                if not (isinstance(hello, tuple) and hello[0] == "HELLO"):
                    raise ShardError(f"a rank did not come up: {hello!r}")
                shard.rank = hello[1]
                self.shards.append(shard)
        self.shards.sort(key=lambda shard: shard.rank)
        print(f"ranks {[shard.rank for shard in self.shards]} connected from {others}", time.ctime(), flush=True)


class Wide(Split):
    """A replica over two nodes. NDIF books the card of the first alone."""

    def __init__(self, *args, gpu_mem_bytes_by_id=None, **settings):
        super().__init__(*args, gpu_mem_bytes_by_id={0: 0, 1: 0}, **settings)

    def load_from_disk(self):
        tensor_parallel.ShardGroup = WideGroup
        return tensor_parallel.TPModelDeployment.load_from_disk(self)


WholeActor = ray.remote(num_cpus=0, max_restarts=-1)(Whole)
SplitActor = ray.remote(num_cpus=0, max_restarts=-1)(Split)
WideActor = ray.remote(num_cpus=0, max_restarts=-1)(Wide)

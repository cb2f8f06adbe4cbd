"""NDIF's own dispatcher, controller and sandboxed model actors in one process on the CPU, without Ray; runs in the server's environment only.

What is NDIF's: the queue, the statuses and their wording, the block runner, the sandbox, the result's way back, `/status` and `/env`.
What is not: Ray (rayless.py), placement on GPUs (a model is hosted or it is not), and the knobs a test turns (`LOOPBACK_PLAN`).
"""
# ruff: noqa: E402 -- the stand-in for Ray has to be in place before NDIF is imported

import asyncio
import json
import os
import sys
import threading
from pathlib import Path

import rayless

rayless.install()

import torch
from ndif.common.providers.ray import CachedActorError, RayProvider
from ndif.common.providers.redis import RedisProvider
from ndif.common.redis import ENV_KEY, ENV_TTL_S, STATUS_KEY, STATUS_TTL_S
from ndif.common.schema import Status
from ndif.common.schema.controller import DeployResponse, ModelDeployResult
from ndif.services.api.queue.dispatcher import Dispatcher
from ndif.services.ray.deployments.controller.cluster.deployment import Deployment, DeploymentLevel
from ndif.services.ray.deployments.controller.cluster.evaluator import CacheEntry
from ndif.services.ray.deployments.controller.cluster.node import CPUResources, GPUResources, Node
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel

MODELS = json.loads(os.environ["LOOPBACK_MODELS"])  # repo id as clients name it -> folder
DTYPE = os.environ.get("LOOPBACK_DTYPE", "float32")
TIMEOUT = float(os.environ["LOOPBACK_TIMEOUT"]) if os.environ.get("LOOPBACK_TIMEOUT") else None
PLAN = {int(n): what for n, what in json.loads(os.environ.get("LOOPBACK_PLAN", "{}")).items()}  # n-th request of this process -> hang, die, evict or hurry
PLANNED = {}  # request id -> what the plan has for it

torch.set_num_threads(1)
torch.cuda.synchronize = lambda *args, **kwargs: None  # a CPU build raises here; the actor calls it after every request


def folder_key(model_key):
    """The model key with the repo id replaced by the folder that holds it; None where this server does not host the model."""
    kind, _, suffix = model_key.partition(":")
    named = json.loads(suffix)
    return f"{kind}:{json.dumps({**named, 'repo_id': MODELS[named['repo_id']]})}" if named.get("repo_id") in MODELS else None


class Actor(SandboxModelDeployment):
    """NDIF's actor that runs trusted requests in process and all others in a fresh runner; on the CPU, its pool opened at the first such request."""

    def __init__(self, model_key, dtype, **settings):
        self.pool_opening = threading.Lock()
        super().__init__(model_key, dtype=dtype, gpu_mem_bytes_by_id={}, **settings)

    def load_from_disk(self):
        model = HuggingFaceModel.from_model_key(self.model_key, dispatch=True, dtype=self.dtype_name, device_map="cpu", **self.kwargs)
        model._module.requires_grad_(False)
        return model

    def open_pool(self, pool_size=None, peers=1):
        self.pool, self.execution_sandbox = None, None

    def run_in_runner(self, request, seed):
        with self.pool_opening:
            if self.pool is None:
                super().open_pool()
        return super().run_in_runner(request, seed)

    async def run(self, request):
        if PLANNED.get(request.id) == "evict":
            del PLANNED[request.id]
            raise CachedActorError(f"Model actor {self.model_key} is cached (WARM).")
        self.execution_timeout = 0.5 if PLANNED.get(request.id) == "hurry" else TIMEOUT
        await super().run(request)

    def execute(self, request):
        if PLANNED.pop(request.id, None) == "die":
            os._exit(9)
        return super().execute(request)


class Controller(_ControllerActor):
    """NDIF's controller with one node that has room for every hosted model and for nothing else."""

    def __init__(self):
        self.node = Node("loopback", "loopback", GPUResources("cpu", []), CPUResources(0, 0))
        self.minimum_deployment_time_seconds = None
        self.cluster = type("Cluster", (), {"nodes": {"loopback": self.node}, "evaluator": type("Evaluator", (), {"cache": {}})})

    def deploy_now(self, model_key):
        """Load the model here and now; its replica's id."""
        replica = f"r{sum(len(replicas) for replicas in self.node.deployments.values())}"
        made = Deployment(
            model_key, replica, DeploymentLevel.HOT, {}, 0, pinned=True, node_id="loopback", execution_timeout_seconds=TIMEOUT, actor_class=Actor, dtype=DTYPE
        )
        actor = Actor(folder_key(model_key), DTYPE, execution_timeout=TIMEOUT)
        module = actor.model._module
        made.size_bytes = sum(weight.numel() * weight.element_size() for weight in module.parameters())
        config = json.loads(model_key.partition(":")[2])
        module.config._name_or_path = config["repo_id"]
        count = sum(weight.numel() for weight in module.parameters())
        self.cluster.evaluator.cache[model_key] = CacheEntry(made.size_bytes, count, module.config, config.get("revision"), DTYPE, False, None)
        rayless.ACTORS[made.name] = rayless.ready(actor)
        self.node.deployments.setdefault(model_key, {})[replica] = made
        return replica

    async def scale(self, model_key, n=1, config=None):
        if folder_key(model_key) is None:  # what NDIF's cluster says where no node has room
            refused = ModelDeployResult(error=f"CANT_ACCOMMODATE: placed 0 of {n} new replicas before the cluster ran out of room.")
            return DeployResponse(results={model_key: refused})
        return DeployResponse(results={model_key: ModelDeployResult(replicas=[await asyncio.to_thread(self.deploy_now, model_key)])}, change=True)


class Planned(Dispatcher):
    """NDIF's dispatcher; the n-th request of this process may meet what the test planned for it."""

    seen = 0

    async def dispatch(self, request):
        self.seen += 1
        planned = PLAN.get(self.seen)
        if planned == "hang":
            await request.arespond(Status.QUEUED, "Added to Queue at position 1.")
            return
        if planned:
            PLANNED[request.id] = planned
        await super().dispatch(request)


def main():
    RayProvider.is_listening = classmethod(lambda cls: True)
    controller = Controller()
    rayless.ACTORS["Controller"] = rayless.ready(controller)
    for repo in MODELS:
        controller.deploy_now(f"nnsight.modeling.transformers.TransformersModel:{json.dumps({'repo_id': repo, 'revision': None, 'task': 'text-generation'})}")
    dispatcher = Planned()
    RedisProvider.sync_client.set(STATUS_KEY, json.dumps(controller.status(), default=str), ex=STATUS_TTL_S)
    RedisProvider.sync_client.set(ENV_KEY, json.dumps(controller.env(), default=str), ex=ENV_TTL_S)
    Path(sys.argv[1]).write_text(str(os.getpid()))
    asyncio.run(dispatcher.dispatch_worker())


if __name__ == "__main__":
    main()

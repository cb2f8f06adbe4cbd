"""A stand-in for Ray in one process, so that NDIF's dispatcher and model actors run unchanged; knows nothing of models or requests.

NDIF touches Ray at few points: named actors, calls to them that can be awaited, and a list of actors for `/status`. Those are here.
Every other name that NDIF imports from Ray is an empty class.
"""

import asyncio
import importlib.machinery
import inspect
import pickle
import sys
import types
from concurrent.futures import Future

ACTORS = {}  # name -> Future of the actor's object


class ActorDiedError(Exception):
    pass


class ActorUnavailableError(Exception):
    pass


class Call:
    """`handle.method.remote(*args)`: arguments and answer are pickled, as they would be on their way to another process."""

    def __init__(self, actor, name):
        self.actor, self.name = actor, name

    def remote(self, *args):
        return asyncio.ensure_future(self.run(pickle.loads(pickle.dumps(args))))

    async def run(self, args):
        actor = await asyncio.wrap_future(self.actor)
        if self.name == "__ray_ready__":
            return True
        answer = getattr(actor, self.name)(*args)
        return pickle.loads(pickle.dumps(await answer if inspect.isawaitable(answer) else answer))


class Handle:
    def __init__(self, actor):
        self._actor = actor

    def __getattr__(self, name):
        return Call(self._actor, name)


def ready(actor):
    """A future that holds `actor` already."""
    future = Future()
    future.set_result(actor)
    return future


def remote(*classes, **options):
    return classes[0] if classes else lambda decorated: decorated


def get_actor(name, namespace=None):
    if name not in ACTORS:
        raise ValueError(f"Failed to look up actor with name '{name}'.")
    return Handle(ACTORS[name])


def list_actors(address=None):
    return [types.SimpleNamespace(name=name, state="ALIVE" if actor.done() else "PENDING_CREATION") for name, actor in ACTORS.items()]


class Context:
    gcs_address = "loopback"
    current_actor = None


class Module(types.ModuleType):
    """A module of Ray in which any name may be asked for."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


class Finder:
    """Finds `ray` and all below it, in memory."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "ray" else None

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        if module.__name__ == "ray":
            vars(module).update(remote=remote, get_actor=get_actor, get_runtime_context=Context, is_initialized=lambda: True)
        elif module.__name__ == "ray.exceptions":
            vars(module).update(ActorDiedError=ActorDiedError, ActorUnavailableError=ActorUnavailableError)
        elif module.__name__ == "ray.util.state":
            vars(module).update(list_actors=list_actors)


def install():
    """From here on `import ray` gives the stand-in."""
    sys.meta_path.insert(0, Finder())

"""NDIF 0.1.2's controller, so that it can describe a model beside nnsight 0.8.1; runs in NDIF's environment only.

NDIF asks nnsight with an argument (`trust_remote_code`) that nnsight 0.8.1 does not take. Without this a model has to be deployed with its
size given, `/status` names it by its actor alone, and no model is loaded at the first request for it.
"""

import ray
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from nnsight.modeling.mixins.remotable import Remotable

describe, split = Remotable.describe_checkpoint, Remotable.max_tp_size
Remotable.describe_checkpoint = lambda key, dtype, trust_remote_code=False: describe(key, dtype)
Remotable.max_tp_size = lambda key, trust_remote_code=False: split(key)


class Mended(_ControllerActor):
    """NDIF's own, in a module that mends nnsight when it is imported."""


Controller = ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})(Mended)

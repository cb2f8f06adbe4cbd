"""Puts CUDA's calls out of NDIF's way on a machine without a GPU; imported before NDIF, knows nothing of models."""

import ndif.services.ray.deployments.modeling.util as util
import torch

torch.set_num_threads(1)
torch.cuda.synchronize = lambda *_: None  # a CPU build of torch raises here; one function each, for torch knows them by identity
torch.cuda.set_device = lambda *_: None
torch.cuda.current_device = lambda: torch.device("cpu")  # where a group keeps its abort flag
util.set_process_limits = util.set_default_gpu = util.verify_device_placement = lambda *_: None

"""From a ModelSpec to a Local backend; one resident model a process. Opens no trace."""

import contextlib
import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils.logging import disable_progress_bar

from latentguard import families, ranks
from latentguard.backends.local import Local
from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.errors import InputError
from latentguard.prompts import digest
from latentguard.ranks import ALONE, Alone
from latentguard.templates import Template
from latentguard.weights import ModelSpec, config_folder, locate, weights_hash

log = logging.getLogger(__name__)
_slot: dict[str, Local] = {}


def load(spec: ModelSpec, *, batch_size: int | str = "auto") -> Local:
    """The model of a spec, in memory; a tensor-parallel one on all ranks of this torchrun.

    Only rank 0 comes back from that with the model: what it is asked, the others answer with it until rank 0 ends.
    """
    check_ranks(spec)
    if ranks.count() == 1 or not spec.tensor_parallel:
        return _load(spec, batch_size)
    team = ranks.join()
    if team.follows:
        team.follow(beside)
    locate(spec)  # fetched once
    number = team.number()
    with team.asking(number, "load", spec, batch_size):
        made = _load(spec, batch_size, team)
    made.number = number
    team.bind(made, number)
    return made


def beside(spec: ModelSpec, batch_size: int | str, team: Alone) -> Local:
    """A rank's share of a model that rank 0 loads."""
    disable_progress_bar()
    return _load(spec, batch_size, team)


def _load(spec: ModelSpec, batch_size: int | str, team: Alone = ALONE) -> Local:
    settings = {"name": spec.name, "template": spec.template, "system": spec.system, "batch_size": batch_size, "team": team}
    if spec.tiny is not None:
        with readable(spec):
            made = tiny_model(**spec.tiny)
        return Local(made, tiny_tokenizer(), weights=digest(["tiny", spec.tiny])[:32], **settings)
    folder = locate(spec)
    with readable(spec):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    Template(tokenizer, spec.template, spec.system)  # what cannot be rendered is refused before the weights
    if spec.n_layers and families.n_layers(config) != spec.n_layers:
        raise InputError(f"model {spec.name} has {families.n_layers(config)} layers, its config says n_layers={spec.n_layers}: correct the config")
    placed: dict[str, Any] = {"device_map": spec.device_map or ("cuda" if torch.cuda.is_available() else "cpu")}
    if team.size > 1:
        placed = {"distributed_config": DistributedConfig(tp_size=team.size)}
    with readable(spec):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype_of(spec.dtype),
            **placed,
            attn_implementation=spec.attention,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,
            quantization_config=_quantization(spec.quantization),
            output_loading_info=True,
        )
    model, told = loaded
    if wrong := sorted([*told["missing_keys"], *(str(key) for key in told["mismatched_keys"])]):
        raise InputError(
            f"{spec.id or folder}: {len(wrong)} weights are missing or of another shape, first {wrong[0]}: its files are incomplete or no causal language model"
        )
    if next(model.parameters()).is_meta:  # nnsight sends tokens to where the first weight lies
        raise InputError(f"model.device_map={spec.device_map}: the embeddings of {spec.name} do not stay on a device; put them on one, blocks may lie anywhere")
    return Local(model, tokenizer, weights="" if team.follows else weights_hash(Path(folder)), **settings)


def resident(spec: ModelSpec, *, batch_size: int | str = "auto") -> Local:
    """The model of a spec; the one before it leaves memory first (never two at once)."""
    wanted = digest(repr(spec))
    if wanted not in _slot:
        _slot.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _slot[wanted] = load(spec, batch_size=batch_size)
    if _slot[wanted].batch_size != batch_size:  # set anew, it would forget what memory taught it
        _slot[wanted].batch_size = batch_size
    return _slot[wanted]


def check_ranks(spec: ModelSpec) -> None:
    """Refuse a tensor-parallel model that these processes cannot hold, before its weights load.

    Raises:
        InputError: no torchrun, another number of processes, a model whose parts they cannot share equally, or that is no model of files.
    """
    count, asked = ranks.count(), spec.tensor_parallel
    degree, told = count if asked is True else int(asked), f"model.tensor_parallel={str(asked).lower()}"
    if asked is not True and asked in (False, 1):
        return
    if degree < 1:
        raise InputError(f"{told}: give true, for all processes of torchrun, or their number")
    if count == 1:
        raise InputError(f"{told} needs processes to share {spec.name}: torchrun --nproc-per-node {max(degree, 2)} -m latentguard.run …, on as many GPUs")
    if degree != count:
        raise InputError(f"{told}, but torchrun started {count} processes: --nproc-per-node {degree}, or model.tensor_parallel=true")
    if spec.device_map is not None:
        raise InputError(f"{told} and model.device_map={spec.device_map}: choose one of them, each says where the weights go")
    if spec.tiny is not None:
        raise InputError(f"{told}: {spec.name} is made in memory, whole; leave tensor_parallel out, or take a model that lies in files")
    with readable(spec):
        config = AutoConfig.from_pretrained(config_folder(spec), trust_remote_code=spec.trust_remote_code)
    if spec.quantization is not None or getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{told}: {spec.name} is quantised, and its packed weights are not cut into shares; leave one of the two out")
    _check_shares(spec.name, config, degree)


def check_torchrun(spec: ModelSpec) -> None:
    """Refuse a job with processes of torchrun that it has no use for, and what `check_ranks` refuses."""
    count = ranks.count()
    if count > 1 and not spec.tensor_parallel:
        raise InputError(f"torchrun started {count} processes, but one is enough: set model.tensor_parallel=true to share {spec.name} among them")
    if count > 1 and not ranks.joined():
        raise InputError("under torchrun the jobs of a sweep run one after another, in its own processes: leave hydra/launcher out")
    check_ranks(spec)


def _check_shares(name: str, config: Any, degree: int) -> None:
    from nnsight.modeling.tp import max_tp_size

    most = max_tp_size(config)
    if most is None:
        raise InputError(
            f"model {name} ({config.model_type}) cannot be shared by ranks, transformers has no plan for it: set model.device_map=auto, without torchrun"
        )
    if most % degree:
        text = families.text_config(config)
        names = {"num_attention_heads": "attention heads", "num_key_value_heads": "key heads", "intermediate_size": "neurons in a layer"}
        parts = ", ".join(f"{value} {words}" for field, words in names.items() if (value := getattr(text, field, None)))
        fit = ", ".join(str(n) for n in range(2, most + 1) if most % n == 0)
        raise InputError(f"model {name} has {parts}, of which {degree} ranks cannot have equal shares: start {fit.replace(', ', ' or ')} processes")


def depth(spec: ModelSpec) -> int:
    """Number of layers, from the spec or the model's config.json, without loading weights."""
    if spec.tiny is not None:
        return spec.tiny.get("n_layers", 4)
    if spec.n_layers:
        return spec.n_layers
    with readable(spec):
        return families.n_layers(AutoConfig.from_pretrained(config_folder(spec), trust_remote_code=spec.trust_remote_code))


def dtype_of(name: str) -> torch.dtype:
    """`auto` is bfloat16 where the processor multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


@contextlib.contextmanager
def readable(spec: ModelSpec) -> Iterator[None]:
    """A model folder that transformers cannot read is the user's to mend: its own words in one sentence."""
    try:
        yield
    except InputError:
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(f"model {spec.name} does not fit this device's memory: set model.device_map=auto or model.quantization") from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError, SafetensorError) as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"model {spec.name} ({spec.id or 'packages'}) cannot be loaded: {type(error).__name__}: {said}") from error


def _quantization(settings: dict | None) -> object:
    """Transformers' own config for a dict with `quant_method` (bitsandbytes, gptq, awq, …)."""
    if settings is None:
        return None
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return AutoQuantizationConfig.from_dict(dict(settings))
    except (ValueError, ImportError) as error:
        raise InputError(f"model.quantization={settings}: {error}") from error

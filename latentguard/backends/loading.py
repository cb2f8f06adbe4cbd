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

from latentguard import families
from latentguard.backends.local import Local
from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.errors import InputError
from latentguard.prompts import digest
from latentguard.templates import Template
from latentguard.weights import ModelSpec, config_folder, locate, weights_hash

log = logging.getLogger(__name__)
_slot: dict[str, Local] = {}


def load(spec: ModelSpec, *, batch_size: int | str = "auto") -> Local:
    """The model of a spec, in memory."""
    settings = {"name": spec.name, "template": spec.template, "system": spec.system, "batch_size": batch_size}
    if spec.tiny is not None:
        with _readable(spec):
            made = tiny_model(**spec.tiny)
        return Local(made, tiny_tokenizer(), weights=digest(["tiny", spec.tiny])[:32], **settings)
    folder = locate(spec)
    with _readable(spec):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    Template(tokenizer, spec.template, spec.system)  # what cannot be rendered is refused before the weights
    if spec.n_layers and families.n_layers(config) != spec.n_layers:
        raise InputError(f"model {spec.name} has {families.n_layers(config)} layers, its config says n_layers={spec.n_layers}: correct the config")
    device = spec.device_map or ("cuda" if torch.cuda.is_available() else "cpu")
    with _readable(spec):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype_of(spec.dtype),
            device_map=device,
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
    return Local(model, tokenizer, weights=weights_hash(Path(folder)), **settings)


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


def depth(spec: ModelSpec) -> int:
    """Number of layers, from the spec or the model's config.json, without loading weights."""
    if spec.tiny is not None:
        return spec.tiny.get("n_layers", 4)
    if spec.n_layers:
        return spec.n_layers
    with _readable(spec):
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
def _readable(spec: ModelSpec) -> Iterator[None]:
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

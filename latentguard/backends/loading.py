"""From a ModelSpec to a Local backend; one resident model a process. Opens no trace."""

import gc
import logging
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from latentguard import families
from latentguard.backends.local import Local
from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.errors import InputError
from latentguard.prompts import digest
from latentguard.weights import ModelSpec, config_folder, locate, weights_hash

log = logging.getLogger(__name__)
_slot: dict[tuple, Local] = {}


def load(spec: ModelSpec, *, batch_size: int = 192) -> Local:
    """The model of a spec, in memory."""
    settings = {"name": spec.name, "template": spec.template, "system": spec.system, "batch_size": batch_size}
    if spec.tiny is not None:
        return Local(tiny_model(**spec.tiny), tiny_tokenizer(), weights=digest(["tiny", spec.tiny])[:32], **settings)
    folder = locate(spec)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    if spec.n_layers and families.n_layers(config) != spec.n_layers:
        raise InputError(f"model {spec.name} has {families.n_layers(config)} layers, its config says n_layers={spec.n_layers}: correct the config")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    device = spec.device_map or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype_of(spec.dtype),
        device_map=device,
        attn_implementation=spec.attention,
        trust_remote_code=spec.trust_remote_code,
        use_safetensors=True,
        quantization_config=_quantization(spec.quantization),
    )
    return Local(model, tokenizer, weights=weights_hash(Path(folder)), **settings)


def resident(spec: ModelSpec, *, batch_size: int = 192) -> Local:
    """The model of a spec; the one before it leaves memory first (never two at once)."""
    wanted = (digest(repr(spec)), batch_size)
    if wanted not in _slot:
        _slot.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _slot[wanted] = load(spec, batch_size=batch_size)
    return _slot[wanted]


def depth(spec: ModelSpec) -> int:
    """Number of layers, from the spec or the model's config.json, without loading weights."""
    if spec.tiny is not None:
        return spec.tiny.get("n_layers", 4)
    return spec.n_layers or families.n_layers(AutoConfig.from_pretrained(config_folder(spec), trust_remote_code=spec.trust_remote_code))


def dtype_of(name: str) -> torch.dtype:
    """`auto` is bfloat16 where the processor multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def _quantization(settings: dict | None) -> object:
    """Transformers' own config for a dict with `quant_method` (bitsandbytes, gptq, awq, …)."""
    if settings is None:
        return None
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        return AutoQuantizationConfig.from_dict(dict(settings))
    except (ValueError, ImportError) as error:
        raise InputError(f"model.quantization={settings}: {error}") from error

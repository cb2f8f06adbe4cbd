"""A model's name → a local folder of safetensors: from the Hub, a path, or packages of a package index.

Knows nothing of traces or prompts. Weights are safetensors only; packages are downloaded and unpacked, never
installed and never imported.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from tqdm.auto import tqdm

from latentguard.caches import cache_dir
from latentguard.configs import option, options
from latentguard.errors import InputError

log = logging.getLogger(__name__)
CONVERSION = 1  # raised whenever converted files would differ
_SKELETON = ["*.json", "*.jinja", "*.model", "*.txt", "*.py"]
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class PackagedWeights:
    """A GGUF file that travels in packages: `parts` are package==version → path in its wheel, joined in order."""

    parts: dict[str, str]
    sha256: str
    bytes: int
    tie_embeddings: bool = True


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ModelSpec:
    """One model, as conf/model/*.yaml states it. `n_layers` lets a wrong layer be refused before anything is loaded."""

    name: str
    id: str | None = None
    revision: str | None = None
    packages: PackagedWeights | None = None
    tiny: dict[str, Any] | None = None
    n_layers: int | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device_map: str | dict[str, Any] | None = None
    tensor_parallel: bool | int = False
    quantization: dict[str, Any] | None = None
    attention: str | None = None
    template: Literal["chat", "paper", "plain"] = "chat"
    system: str | None = None
    trust_remote_code: bool = False
    licence: str = ""
    gated: bool = False
    without_hub: str | None = None
    card: str = ""


def spec_of(name: str, /, **changed: Any) -> ModelSpec:
    """The spec of a config name, a folder or a Hub id, with some settings changed."""
    if name in options("model"):
        return with_settings(option("model", name), changed)
    if "/" not in name and not Path(name).expanduser().is_dir():
        raise InputError(f"model {name!r} is no config ({', '.join(options('model'))}), no folder here and no Hub id (owner/name)")
    return make_spec({"name": Path(name).name, "id": name, **changed})


def with_settings(chosen: dict, changed: dict) -> ModelSpec:
    """A config's spec with settings changed. Another `id` is another model: it takes that id's name, and nothing that
    was known of the old one.
    """
    if changed.get("id") not in (None, chosen.get("id")):
        about_model = {"name", "packages", "tiny", "n_layers", "licence", "gated", "without_hub", "card", "revision"}
        kept = {key: value for key, value in {**chosen, **changed}.items() if key not in about_model}
        named = {key: changed[key] for key in ("name", "revision") if changed.get(key) not in (None, chosen.get(key))}
        return make_spec({**kept, "name": Path(changed["id"]).name, **named})
    return make_spec({**chosen, **changed})


def make_spec(settings: dict) -> ModelSpec:
    """A spec, or one sentence about the setting that is wrong."""
    from pydantic import ValidationError

    try:
        return ModelSpec(**settings)
    except ValidationError as error:
        raise InputError(problem("model", error)) from error


def problem(where: str, error: Any) -> str:
    """A pydantic error as one sentence: place, value, reason."""
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # what the settings' own check said
        return f"{where}: {reason}"
    place = ".".join([where, *(str(part) for part in first["loc"] if "[" not in str(part) and part not in ("bool", "int", "str"))])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place}={first.get('input')!r}: {reason}{more}"


def locate(spec: ModelSpec) -> Path:
    """The folder with the model's files, fetched or converted if need be.

    Raises:
        InputError: unreachable hub, gated or unknown model, no safetensors, wrong bytes: each with its way out.
    """
    quiet_unless_watched()
    if spec.packages:
        return _from_packages(spec)
    if spec.id is None:
        raise InputError(f"model {spec.name} has no id: set model.id to a Hub id or a folder")
    folder = Path(spec.id).expanduser()
    if folder.is_dir():
        return _checked(folder, spec)
    if spec.id.startswith((".", "/", "~")):
        raise InputError(f"model.id={spec.id}: there is no such folder")
    return _checked(_from_hub(spec), spec)


def quiet_unless_watched() -> None:
    """No progress bars of the Hub's or transformers' own where nobody looks at a terminal."""
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars
        from transformers.utils import logging as transformers_logging

        disable_progress_bars()
        transformers_logging.disable_progress_bar()


def _checked(folder: Path, spec: ModelSpec) -> Path:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json, so it is no transformers model")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{spec.id}: no safetensors among its weights; convert them first (pickled weights can run code and are not loaded)")
    return folder


def config_folder(spec: ModelSpec) -> Path:
    """A folder with the model's config.json: of a model on the Hub, nothing more is fetched."""
    return _from_hub(spec, ["config.json", "*.py"]) if _on_hub(spec) else locate(spec)


def skeleton_folder(spec: ModelSpec) -> Path:
    """A folder with the model's config and tokenizer: of a model on the Hub, no weights are fetched."""
    return _from_hub(spec, _SKELETON) if _on_hub(spec) else locate(spec)


def _on_hub(spec: ModelSpec) -> bool:
    return bool(spec.id and not spec.packages and not Path(spec.id).expanduser().is_dir() and not spec.id.startswith((".", "/", "~")))


def _from_hub(spec: ModelSpec, patterns: list[str] = _WANTED) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    assert spec.id
    wanted = {"repo_id": spec.id, "revision": spec.revision, "allow_patterns": patterns}
    try:
        folder = Path(snapshot_download(**wanted, local_files_only=True))
        needed = ("config.json", "tokenizer_config.json") if patterns is _SKELETON else ("config.json",)
        if _complete(folder) or (patterns is not _WANTED and all((folder / name).is_file() for name in needed)):
            return folder
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        pass
    way_out = "; give a folder with model.id=/path/to/model"
    if spec.without_hub:
        way_out += f", or take {_described(spec.without_hub)} with model={spec.without_hub}"
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{spec.id} is not in the cache and HF_HUB_OFFLINE is set: unset it{way_out}")
    if not hub_reachable():
        raise InputError(f"{spec.id} is not in the cache and {constants.ENDPOINT} cannot be reached{way_out}")
    try:
        folder = Path(snapshot_download(**wanted))
    except errors.GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{spec.id}"
        raise InputError(f"{spec.id} is gated: accept its licence at {page}, then run `hf auth login` or set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{spec.id} has no revision {spec.revision!r}: drop model.revision or correct it") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError(f"{spec.id} is no model on the Hub, or a private one: correct model.id, or run `hf auth login`") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{spec.id} could not be fetched ({type(error).__name__}: {str(error).splitlines()[0][:200]}); run again to go on{way_out}") from error
    return folder


def _complete(folder: Path) -> bool:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        return all((folder / shard).is_file() for shard in shards)
    return (folder / "config.json").is_file() and bool(list(folder.glob("*.safetensors")))


def _described(name: str) -> str:
    return f"its package-index stand-in ({option('model', name)['card'].split('. ')[0].strip()})"


def hub_reachable(seconds: float = 4.0) -> bool:
    """Whether the Hub answers at all, found out within `seconds` even where names do not resolve."""
    import httpx
    from huggingface_hub import constants

    answered: list[bool] = []

    def ask() -> None:
        try:
            httpx.head(constants.ENDPOINT, timeout=seconds)
            answered.append(True)
        except httpx.HTTPError:
            answered.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered == [True]


def _from_packages(spec: ModelSpec) -> Path:
    assert spec.packages
    folder = cache_dir("models", f"{spec.name}-{spec.packages.sha256[:12]}-{CONVERSION}")
    if folder.is_dir():
        if _intact(folder):
            return folder
        log.warning("%s is damaged or half-written: made anew", folder)
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as scratch:
        gguf = _join(spec.name, spec.packages, Path(scratch))
        made = Path(scratch, "made")
        convert(gguf, made, tie=spec.packages.tie_embeddings)
        files = {path.name: [path.stat().st_size, file_hash(path)] for path in sorted(made.iterdir())}
        (made / "latentguard.json").write_text(json.dumps({"source": spec.packages.sha256, "files": files}, indent=1))
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not _intact(folder):
                raise
    return folder


def _intact(folder: Path) -> bool:
    try:
        files = json.loads((folder / "latentguard.json").read_text())["files"]
    except (OSError, ValueError, KeyError):
        return False
    sizes = all((folder / name).is_file() and (folder / name).stat().st_size == size for name, (size, _) in files.items())
    return sizes and all(file_hash(folder / name) == sha for name, (_, sha) in files.items())


def _join(name: str, packages: PackagedWeights, scratch: Path) -> Path:
    gguf, known = scratch / "model.gguf", hashlib.sha256()
    with gguf.open("wb") as out, tqdm(total=packages.bytes, desc=f"fetch · {name}", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for requirement, member in packages.parts.items():
            wheel = _download(requirement, scratch / "wheels")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                while block := part.read(1 << 22):
                    out.write(block)
                    known.update(block)
                    bar.update(len(block))
            wheel.unlink()
    if gguf.stat().st_size != packages.bytes or known.hexdigest() != packages.sha256:
        raise InputError(
            f"{name}: the packages hold other bytes than the ones pinned (SHA-256 {known.hexdigest()}, expected {packages.sha256}); do not use them"
        )
    return gguf


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "-d", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:] or ["pip said nothing"]
        raise InputError(f"pip could not download {requirement} ({said[-1]}): is a package index in reach?")
    return next(folder.glob("*.whl"))


def convert(gguf: Path, folder: Path, *, tie: bool) -> None:
    """GGUF → safetensors in half precision, once: every tensor dequantised, tokenizer and chat template beside it.

    `tie`: the file holds the output matrix as a re-quantised twin of the embeddings where the original ties them.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("converting %s to safetensors, once (about two minutes)", gguf.name)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):  # transformers' bar for this knows no switch
        model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True))
    if tie:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def weights_hash(folder: Path) -> str:
    """One hash of all weight files: which weights these are, wherever they lie."""
    hashes = [file_hash(path) for path in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:32]


def file_hash(path: Path) -> str:
    """SHA-256 of a file, remembered by its size and time of change; the Hub's cache names large files by it."""
    real = path.resolve()
    if real.parent.name == "blobs" and len(real.name) == 64:
        return real.name
    stat = real.stat()
    known_as = f"{real}:{stat.st_size}:{stat.st_mtime_ns}"
    memo = cache_dir("hashes", hashlib.sha256(known_as.encode()).hexdigest()[:32])
    if memo.is_file() and len(remembered := memo.read_text()) == 64:
        return remembered
    with real.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    memo.parent.mkdir(parents=True, exist_ok=True)
    partial = memo.with_name(f"{memo.name}.{os.getpid()}")
    partial.write_text(found)
    partial.replace(memo)
    return found


if __name__ == "__main__":  # which of two configs can be had here: for `make demo`
    hub, packaged = sys.argv[1:3]
    try:
        _from_hub(spec_of(hub)) if not hub_reachable() else None
        reason, chosen = "it is in the cache or the Hub is in reach", hub
    except InputError:
        reason, chosen = f"no model hub is in reach; this is {_described(packaged)}, not {hub} itself", packaged
    print(f"model={chosen}: {reason}", file=sys.stderr)
    print(chosen)

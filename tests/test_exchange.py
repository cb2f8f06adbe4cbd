"""Directions to other tools' files and back: the layer numbers, and what a file keeps (the tools themselves: test_exchange_peers.py)."""

import json
import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace

import gguf
import numpy as np
import pytest
import torch

from latentguard.directions import Direction, cosine, mean_difference
from latentguard.errors import InputError
from latentguard.exchange import export_gguf, from_steering_vector, import_direction, to_steering_vector
from latentguard.interventions import Add
from tests.conftest import SHARED, make_tiny
from tests.test_tensorfiles import WRITERS

REFERENCE = SHARED / "reference"


def make(tiny, prompts):
    """A direction with a large vector at every layer, the embeddings included."""
    found = mean_difference(tiny.read(prompts, "all", ["t_inst"]), prompts[:3], position="t_inst", name="made")
    torch.manual_seed(7)
    return replace(found, vectors=3 * torch.randn_like(found.vectors))


@pytest.fixture(scope="module")
def made(tiny, prompts):
    return make(tiny, prompts)


@dataclass
class SteeringVector:
    """The two fields of the library's class that we read and write."""

    layer_activations: dict
    layer_type: str = "decoder_block"


@contextmanager
def added(backend, additions):
    """Plain transformers with `additions[b]` added to what block b puts out, at every step: what the others do."""
    hooks = [
        backend.blocks[block]._module.register_forward_hook(lambda _m, _a, out, v=v: (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v)
        for block, v in additions.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


def theirs(backend, prompt, run=None):
    """Log-probabilities after the prompt, and the greedy reply, of transformers as it now is."""
    run, ids = run or backend.hf, torch.tensor([backend.render([prompt])[0].ids])
    with torch.no_grad():
        logits = run(input_ids=ids).logits[0, -1]
        reply = run.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    return logits.log_softmax(-1), tuple(reply.tolist())


def ours(backend, prompt, direction, layer, coef=1.0, when="every_step"):
    acts = [Add(direction, layer=layer, coef=coef, when=when)]
    return backend.logits([prompt], acts)[0][0], backend.generate([prompt], acts, max_new_tokens=8)[0].tokens


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=0)
    assert found[1] == wanted[1]


def at(direction, layer):
    """The vector of one layer, at every layer."""
    return replace(direction, vectors=direction.at(layer).expand_as(direction.vectors))


def assert_acts_at(layer, found, backend, prompt, direction, coef=1.0):
    """What others did is our Add at `layer` at every step, and at no other layer, and not in prefill alone."""
    assert_same(found, ours(backend, prompt, direction, layer, coef))
    for other in set(direction.layers) - {layer}:
        assert (found[0] - ours(backend, prompt, at(direction, layer), other, coef)[0]).abs().max() > 0.01
    assert found[1] != ours(backend, prompt, direction, layer, coef, when="prefill")[1]


def directions_in(path):
    return {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in gguf.GGUFReader(path).tensors}


# ---- layer numbers


@pytest.mark.parametrize("layer", (2, 3, 4))
def test_a_gguf_direction_acts_on_the_output_of_its_block(tiny, prompts, made, tmp_path, layer):
    found = directions_in(export_gguf(made, tmp_path / "v.gguf", layers=layer))
    ((name, vector),) = found.items()
    with added(tiny, {int(name.removeprefix("direction.")): vector}):
        found = theirs(tiny, prompts[0])
    assert_acts_at(layer, found, tiny, prompts[0], made)


@pytest.mark.parametrize("layer", (1, 2, 4))
def test_a_steering_vector_acts_on_the_output_of_its_block(tiny, prompts, made, monkeypatch, layer):
    monkeypatch.setitem(sys.modules, "steering_vectors", sys.modules[__name__])
    vector = to_steering_vector(made, layers=layer)
    assert vector.layer_type == "decoder_block"
    with added(tiny, vector.layer_activations):
        found = theirs(tiny, prompts[0])
    assert_acts_at(layer, found, tiny, prompts[0], made)
    back = from_steering_vector(vector, like=tiny)
    assert back.layers == (layer,) and torch.equal(back.at(layer), made.at(layer))


def test_a_negative_block_counts_from_the_last(made):
    found = from_steering_vector(SteeringVector({-1: made.at(4)[None, None]}), n_layers=4)
    assert found.layers == (4,)


def test_what_has_no_place_is_said(made, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "steering_vectors", sys.modules[__name__])
    assert sorted(directions_in(export_gguf(made, tmp_path / "v.gguf"))) == ["direction.1", "direction.2", "direction.3"]
    assert "layers [0, 1] are left out" in caplog.text
    assert sorted(to_steering_vector(made).layer_activations) == [0, 1, 2, 3]
    assert "layers [0] are left out" in caplog.text
    for write, layers in ((export_gguf, [1, 2]), (export_gguf, 0)):
        with pytest.raises(InputError, match="have no place in a GGUF control vector"):
            write(made, tmp_path / "w.gguf", layers=layers)
    with pytest.raises(InputError, match="have no place in a steering vector"):
        to_steering_vector(made, layers=0)
    with pytest.raises(InputError, match="has no vector at layer 3"):
        export_gguf(replace(made, vectors=made.vectors[:3], layers=(0, 1, 2), residual_norm=made.residual_norm[:3]), tmp_path / "w.gguf", layers=3)
    assert not (tmp_path / "w.gguf").exists()


# ---- what a file keeps


def test_our_gguf_file_gives_back_what_was_written(tiny, made, tmp_path):
    path = export_gguf(made, tmp_path / "deep" / "v.gguf")
    back = import_direction(path, like=tiny)
    assert back.layers == (2, 3, 4) and torch.equal(back.vectors, made.vectors[2:]) and torch.equal(back.residual_norm, made.residual_norm[2:])
    assert back.card() == {**made.card(), "layers": [2, 3, 4]}
    assert back.dose(3, 2.0) == made.dose(3, 2.0)
    assert import_direction(path, name="else", position="last_word").card() == {**back.card(), "name": "else", "position": "last_word"}
    other = make_tiny("llama")
    with pytest.raises(InputError, match="other weights"):
        import_direction(path, like=other)
    with pytest.raises(InputError, match="n_layers is 4 and 9"):
        import_direction(path, n_layers=9)
    for old, new, says in (
        (b"[2, 3, 4]", b"[2, 3, 1]", "its tensors of"),
        (b'"schema": 1', b'"schema": 9', "schema 1"),
        (b'"data"', b'"dato"', "does not fit"),
    ):
        (tmp_path / "changed.gguf").write_bytes(path.read_bytes().replace(old, new))
        with pytest.raises(InputError, match=says):
            import_direction(tmp_path / "changed.gguf")


def write_gguf(path, tensors, architecture="controlvector", **said):
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {"model_hint": "qwen2", **said}.items():
        writer.add_string(f"controlvector.{key}", value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_strangers_gguf_file(tiny, made, tmp_path):
    v = made.vectors.numpy()
    path = write_gguf(tmp_path / "happy.gguf", {"direction.0": v[1], "direction.2": v[3].astype(np.float16)})
    back = import_direction(path, n_layers=4)
    assert (back.layers, back.name, back.model, back.weights, back.position) == ((1, 3), "happy", "qwen2", "", "unknown")
    torch.testing.assert_close(back.vectors, made.vectors[[1, 3]], atol=1e-3, rtol=1e-3)
    assert import_direction(path, like=tiny).model == tiny.name
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-70])
    cases = [
        (path, {}, "how many blocks"),
        (path, {"n_layers": 2}, "do not lie in a model"),
        (path, {"n_layers": 4, "layer": 1}, "numbers its own layers"),
        (tmp_path / "cut.gguf", {"n_layers": 4}, "cannot be read as a GGUF"),
        (write_gguf(tmp_path / "a.gguf", {"direction.1": v[1]}, "qwen2"), {"n_layers": 4}, "not of a controlvector"),
        (write_gguf(tmp_path / "b.gguf", {"direction.-1": v[1]}), {"n_layers": 4}, "is no direction"),
        (write_gguf(tmp_path / "c.gguf", {"direction.1": v[1], "direction.2": v[2, :9]}), {"n_layers": 4}, "numbers, not all of"),
        (write_gguf(tmp_path / "d.gguf", {"direction.1": v[1][:9]}), {"like": tiny}, "not all of 32"),
        (write_gguf(tmp_path / "e.gguf", {"direction.1": v[1] * np.float32("inf")}), {"n_layers": 4}, "finite"),
    ]
    for file, told, says in cases:
        with pytest.raises(InputError, match=says):
            import_direction(file, **told)


def test_an_unmeasured_norm_is_nan_until_it_is_measured(tiny, prompts, made, tmp_path):
    torch.save(made.at(2).double(), tmp_path / "v.pt")
    found = import_direction(tmp_path / "v.pt", like=tiny, layer=2)
    assert found.residual_norm.isnan().all() and math.isnan(found.dose(2, 1.0))
    for back in (Direction.load(found.save(tmp_path / "v.safetensors")), import_direction(export_gguf(found, tmp_path / "v.gguf"))):
        assert back.card() == found.card() and back.residual_norm.isnan().all() and torch.equal(back.vectors, made.vectors[[2]])
    states = tiny.read(prompts, found.layers, ["t_inst"])
    measured = replace(found, residual_norm=states.at("t_inst").norm(dim=-1).mean(0))
    assert measured.dose(2, 1.0) == pytest.approx(made.dose(2, 1.0), rel=1e-5)
    assert_same(ours(tiny, prompts[0], found, 2), ours(tiny, prompts[0], made, 2))


# ---- torch files


def test_refusal_directions_file(tiny, made, tmp_path):
    torch.save(made.at(3).double(), tmp_path / "direction.pt")
    with pytest.raises(InputError, match="give layer="):
        import_direction(tmp_path / "direction.pt", like=tiny)
    (tmp_path / "direction_metadata.json").write_text(json.dumps({"pos": -2, "layer": 3}))
    found = import_direction(tmp_path / "direction.pt", like=tiny)
    assert (found.layers, found.position, found.vectors.dtype) == ((3,), "prompt[-2]", torch.float32)
    assert torch.equal(found.at(3), made.at(3))
    (tmp_path / "direction_metadata.json").write_text(json.dumps({"pos": -1, "layer": 3}))
    assert import_direction(tmp_path / "direction.pt", like=tiny).position == "t_post_inst"
    for told, says in (({"layer": 2}, "leave out layer="), ({"n_layers": 2, "like": None}, "do not lie"), ({"n_layers": 5}, "4 and 5")):
        with pytest.raises(InputError, match=says):
            import_direction(tmp_path / "direction.pt", **{"like": tiny, **told})
    (tmp_path / "direction_metadata.json").write_text("{}")
    with pytest.raises(InputError, match="does not say layer and pos"):
        import_direction(tmp_path / "direction.pt", like=tiny)


@pytest.mark.parametrize("how", ("zip", "before zip", "protocol 4"))
def test_the_papers_file(tiny, made, tmp_path, how):
    path = tmp_path / "dir-hf.pt"
    path.write_bytes(WRITERS[how](made.vectors.numpy()))
    found = import_direction(path, like=tiny, position="t_inst")
    assert (found.layers, found.position, found.name, found.model) == ((0, 1, 2, 3, 4), "t_inst", "dir-hf", tiny.name)
    assert torch.equal(found.vectors, made.vectors) and import_direction(path).n_layers == 4
    for told, says in (
        ({"n_layers": 5}, "5 rows"),
        ({"layer": 2}, "leave out layer="),
        ({"entry": "x"}, "no tensor 'x'"),
        ({"like": Deeper()}, "5 rows"),
    ):
        with pytest.raises(InputError, match=says):
            import_direction(path, **told)


class Deeper:
    name, weights, n_layers, d_model = "deeper", "", 6, 32


def test_files_of_several_tensors(made, tmp_path):
    torch.save({"a": made.vectors, "b": [made.vectors.numpy(), made.at(1)]}, tmp_path / "v.pt")
    assert import_direction(tmp_path / "v.pt", entry="b/1", layer=1, n_layers=4).layers == (1,)
    with pytest.raises(InputError, match="name one of them with entry="):
        import_direction(tmp_path / "v.pt")
    with pytest.raises(InputError, match="Direction.load reads it"):
        import_direction(made.save(tmp_path / "own.safetensors"))


@pytest.mark.skipif(not REFERENCE.exists(), reason="the published tensors are not here")
def test_the_published_tensors():
    """Row l is what enters block l: the cosine with the published centroids' difference is that of the dossier (§3.5), 0.64 to 0.88."""
    file = REFERENCE / "qwen2_7b_instruct.safetensors"
    found, harmful, harmless = (import_direction(file, entry=f"qwen-{part}") for part in ("dir-hf", "hf-cls-all-layer", "hl-cls-all-layer"))
    assert found.layers == tuple(range(29)) and found.n_layers == 28 and found.vectors.shape == (29, 3584)
    apart = replace(harmful, vectors=harmful.vectors - harmless.vectors)
    alike = [cosine(found, apart, layer) for layer in found.layers]
    assert (min(alike), max(alike)) == (pytest.approx(0.64, abs=0.01), pytest.approx(0.88, abs=0.01)) and alike[0] == min(alike)
    for entry in ("llama2_harmful_dir", "llama3-dir-hf"):
        assert import_direction(REFERENCE / "llama_7b_8b.safetensors", entry=entry).vectors.shape == (33, 4096)
    with pytest.raises(InputError, match=r"a tensor \[29, 5, 2, 3584\] is no direction"):
        import_direction(file, entry="qwen-hl-refuse5-all-layer-2pos")

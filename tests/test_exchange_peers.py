"""Our directions in the others' own code: steering-vectors, repeng, llama.cpp. Skipped where those are not installed (docs/directions.md)."""

import ctypes
import importlib.util

import gguf
import numpy as np
import pytest
import torch

from latentguard.backends.tiny import tiny_model
from latentguard.exchange import export_gguf, from_steering_vector, import_direction, to_steering_vector
from tests.conftest import loud
from tests.test_exchange import assert_acts_at, at, make, ours, theirs, write_gguf


@pytest.fixture(scope="module")
def made(tiny, prompts):
    return make(tiny, prompts)


def plain():
    """The tiny model without our engine around it."""
    return loud(tiny_model("qwen2"))


@pytest.mark.parametrize("layer", (1, 2, 4))
def test_with_the_steering_vectors_library(tiny, prompts, made, layer):
    pytest.importorskip("steering_vectors")
    vector, model = to_steering_vector(made, layers=layer), plain()
    with vector.apply(model, multiplier=2.0):
        found = theirs(tiny, prompts[0], model)
    assert_acts_at(layer, found, tiny, prompts[0], made, coef=2.0)
    assert torch.equal(from_steering_vector(vector, like=tiny).at(layer), made.at(layer))


@pytest.mark.parametrize("layer", (2, 3, 4))
def test_with_repeng(tiny, prompts, made, layer, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4.0 names it in annotations; NumPy 2 has it no more
    repeng = pytest.importorskip("repeng")
    vector = repeng.ControlVector.import_gguf(export_gguf(made, tmp_path / "ours.gguf", layers=layer, model_type="qwen2"))
    model = repeng.ControlModel(plain(), list(vector.directions))
    model.set_control(vector, 2.0)
    assert_acts_at(layer, theirs(tiny, prompts[0], model), tiny, prompts[0], made, coef=2.0)
    vector.export_gguf(tmp_path / "theirs.gguf")
    back = import_direction(tmp_path / "theirs.gguf", like=tiny)
    assert back.layers == (layer,) and torch.equal(back.at(layer), made.at(layer))


def test_with_llama_cpp(tiny, prompts, made, tmp_path):
    """llama.cpp's loader of `--control-vector` and its model, called in the library that xllamacpp brings (its Python side has no such call)."""
    pytest.importorskip("xllamacpp")
    llama = LlamaCpp(plain(), tmp_path / "tiny.gguf")
    rendered = tiny.render(prompts[:1])[0]
    torch.testing.assert_close(llama.logprobs(rendered.ids), tiny.logits(prompts[:1])[0][0], atol=0.01, rtol=0)  # its cache is in half precision
    for layer in (2, 3, 4):
        found = llama.logprobs(rendered.ids, export_gguf(made, tmp_path / "v.gguf", layers=layer))
        far = {other: (found - ours(tiny, prompts[0], at(made, layer), other)[0]).abs().max() for other in made.layers}
        assert min(far, key=far.get) == layer and far[layer] < 0.003 < 0.03 < min(gap for other, gap in far.items() if other != layer)
    assert llama.vector(write_gguf(tmp_path / "v0.gguf", {"direction.0": made.at(1).numpy(), "direction.1": made.at(2).numpy()})).size < 0


class LlamaCpp:
    """A transformers Qwen2 model in llama.cpp, by its C interface."""

    class Struct(ctypes.Structure):
        """A struct of parameters, larger than llama.cpp's: only passed through."""

        _fields_ = [("bytes", ctypes.c_uint64 * 128)]

    class Vector(ctypes.Structure):
        """`common_control_vector_data`: the size of a vector, and a std::vector of floats."""

        _fields_ = [("size", ctypes.c_int), ("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("room", ctypes.c_void_p)]

    class File(ctypes.Structure):
        """`common_control_vector_load_info`, its string in the ABI of this build (a pointer to the characters)."""

        _fields_ = [("strength", ctypes.c_float), ("name", ctypes.c_char_p)]

    def __init__(self, model, path):
        self.config = config = model.config
        writer = gguf.GGUFWriter(path, "qwen2")
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(512)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("none")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
        for name, values in model.state_dict().items():
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        c, self.lib = ctypes, ctypes.CDLL(importlib.util.find_spec("xllamacpp.xllamacpp").origin)
        for call, gives, takes in (
            ("llama_model_default_params", self.Struct, []),
            ("llama_context_default_params", self.Struct, []),
            ("llama_batch_get_one", self.Struct, [c.c_void_p, c.c_int32]),
            ("llama_model_load_from_file", c.c_void_p, [c.c_char_p, self.Struct]),
            ("llama_init_from_model", c.c_void_p, [c.c_void_p, self.Struct]),
            ("llama_decode", c.c_int32, [c.c_void_p, self.Struct]),
            ("llama_get_logits_ith", c.POINTER(c.c_float), [c.c_void_p, c.c_int32]),
            ("llama_set_adapter_cvec", c.c_int32, [c.c_void_p, c.c_void_p, c.c_size_t, c.c_int32, c.c_int32, c.c_int32]),
            ("llama_free", None, [c.c_void_p]),
        ):
            getattr(self.lib, call).restype, getattr(self.lib, call).argtypes = gives, takes
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model

    def vector(self, path):
        """What llama.cpp makes of a control-vector file."""
        file, found = self.File(1.0, str(path).encode()), self.Vector()
        start = ctypes.addressof(file)
        files = (ctypes.c_void_p * 3)(start, start + ctypes.sizeof(file), start + ctypes.sizeof(file))
        self.lib._Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE(ctypes.byref(found), files)
        return found

    def logprobs(self, ids, control=None):
        context = self.lib.llama_init_from_model(self.model, self.lib.llama_context_default_params())
        if control:
            found, last = self.vector(control), self.config.num_hidden_layers
            assert self.lib.llama_set_adapter_cvec(context, found.begin, (found.end - found.begin) // 4, found.size, 1, last) == 0
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        assert self.lib.llama_decode(context, self.lib.llama_batch_get_one(ctypes.addressof(tokens), len(ids))) == 0
        logits = torch.from_numpy(np.ctypeslib.as_array(self.lib.llama_get_logits_ith(context, -1), (self.config.vocab_size,)).copy())
        self.lib.llama_free(context)
        return logits.log_softmax(-1)

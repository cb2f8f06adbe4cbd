"""A backend elsewhere without an elsewhere: what would be sent, unpacked and run here without our modules. Without a server, in seconds."""

import functools
import sys
import threading
import types
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import zstandard

from latentguard.backends import served
from latentguard.backends.local import Local
from latentguard.backends.ndif import Sizes, where
from latentguard.backends.parcels import bare, not_installed, parcel
from latentguard.backends.simulated import simulated
from latentguard.backends.tiny import tiny_model, tiny_tokenizer
from latentguard.errors import InputError
from latentguard.fingerprints import told
from latentguard.interventions import Add, Cell, Grid, Intervention
from tests.agreement import PROMPTS, every_kind, same_moments, same_replies, same_scores, same_states
from tests.conftest import make_tiny

FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox", "falcon", "qwen3"]


def test_the_same_states_scores_and_replies_as_here(tiny):
    far = simulated(tiny, Sizes(batch=4, batches=2, ahead=3))
    grid = every_kind(tiny)
    same_states(tiny, far)
    same_moments(tiny, far)
    same_scores(tiny, far, grid)
    same_replies(tiny, far, grid)
    assert far.host.usage.jobs > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_other_architectures(family):
    local = make_tiny(family)
    far, grid = simulated(local), every_kind(local)
    some = Grid((grid.cells[1], grid.cells[4], *grid.cells[-3:]))
    same_states(local, far)
    capped = getattr(local.hf.config, "final_logit_softcapping", None)
    same_replies(local, far, some, tokens=4, sampled=not capped)
    if capped:
        with pytest.raises(InputError, match="temperature=0.5.*changes its logits behind the head"):
            far.generate(PROMPTS, max_new_tokens=2, temperature=0.5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_states_travel_in_the_type_asked_for(tiny, dtype):
    exact, half = simulated(tiny).read(PROMPTS), simulated(tiny, Sizes(dtype=dtype)).read(PROMPTS)
    assert torch.equal(exact.values.to(getattr(torch, dtype)).float(), half.values)
    assert half.values.dtype == torch.float32


def test_layer_zero_is_what_the_embeddings_put_out():
    """Found on shapes alone, so that no weights are needed; where no module puts it out, generation from layer 0 is refused."""
    assert where(tiny_model("llama").to("meta"))[0] == "model.embed_tokens"
    assert where(tiny_model("gpt2").to("meta"))[0] == "transformer.drop"
    assert where(tiny_model("opt", word_embed_proj_dim=32).to("meta"))[0] is None
    local = make_tiny("llama")
    far = simulated(local)
    far.places[0] = None  # as in OPT
    same_states(local, far)
    with pytest.raises(InputError, match="layer 0 cannot be changed during remote generation"):
        far.generate(PROMPTS, every_kind(local), max_new_tokens=2)
    later = every_kind(local, layers=[1, 2])
    same_replies(local, far, later)


def test_a_vector_is_sent_once_a_batch_and_not_once_a_row():
    local = Local(tiny_model("qwen2", d_model=1024), tiny_tokenizer(), name="wide", weights="wide")
    add = Add(every_kind(local).cells[1].interventions[0].direction, layer=1)
    sizes = []
    for rows in (2, 7):
        far = simulated(local, Sizes(batch=32))
        far.logits(PROMPTS[:rows], [add], reduce=lambda index, logprobs: 0.0)
        sizes.append(far.host.usage.bytes_up)
    assert sizes[0] > 4 * local.d_model * 0.8, "the vector is in it"
    assert sizes[1] - sizes[0] < 4 * local.d_model * 0.5


def test_a_job_brings_back_no_more_than_it_may(tiny):
    """Batches are cut too: one prompt's states are 1,920 bytes here."""
    far, positions = simulated(tiny, Sizes(batch=32, megabytes=0.004)), ("t_inst", "t_post_inst", "mean(user)")
    assert (far.read(PROMPTS, "all", positions).values - tiny.read(PROMPTS, "all", positions).values).abs().max() < 1e-4
    assert far.host.usage.jobs == 4
    grid = every_kind(tiny)
    patched = Grid((grid.cells[-1],))
    small = simulated(tiny, Sizes(batch=32, megabytes=0.0006))
    same_replies(tiny, small, Grid((*patched.cells, *patched.cells)))
    assert small.host.usage.jobs > len(PROMPTS)


def clamp(state, vector, amount):
    unit = vector / vector.norm(dim=-1, keepdim=True)
    along = (state * unit).sum(-1, keepdim=True)
    return state + (along.clamp(max=amount) - along) * unit


MODULE = '''
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from latentguard.interventions import Intervention
from lab.maths import projected


def clamp(state: Float[Tensor, "*b d"], vector: Float[Tensor, "*#b d"], amount: Tensor) -> Tensor:
    """No more than `amount` along the vector."""
    return state - (projected(state, vector) - amount).clamp(min=0) * vector / vector.norm(dim=-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Clamp(Intervention):
    kind: ClassVar[str] = "clamp"
    change = staticmethod(clamp)
    along: Tensor
    most: float = field(default=0.0, kw_only=True)

    @property
    def amount(self):
        return self.most

    def vector(self, layer, prompt):
        return self.along

    def _source(self):
        return self.along.tolist()
'''
MATHS = """
def projected(state, vector):
    return (state * vector / vector.norm(dim=-1, keepdim=True)).sum(-1, keepdim=True)
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A user's own folder with an intervention of their own."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "__init__.py").write_text("")
    (tmp_path / "lab" / "maths.py").write_text(MATHS)
    (tmp_path / "lab" / "clamps.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import lab.clamps

    yield lab.clamps
    for name in [name for name in sys.modules if name.partition(".")[0] == "lab"]:
        del sys.modules[name]


def test_an_intervention_from_a_users_own_folder_acts_and_travels(lab, tiny):
    along = torch.randn(tiny.d_model, generator=torch.Generator().manual_seed(0))
    unit = along / along.norm()
    act = lab.Clamp(along, layer=2, most=-1.0, when="every_step")
    states = tiny.read(PROMPTS, [2], ("t_inst",)).values[:, 0, 0] @ unit
    assert (states > -1.0).any(), "there must be something to clamp"
    far = simulated(tiny)
    grid = Grid((Cell(), Cell((act,)), Cell((act, every_kind(tiny).cells[1].interventions[0]))))
    same_scores(tiny, far, grid)
    same_replies(tiny, far, grid)
    assert not torch.allclose(tiny.logits(PROMPTS, [act])[0], tiny.logits(PROMPTS)[0], atol=1e-3)


def test_a_changed_file_is_another_intervention(lab, tiny, tmp_path, monkeypatch):
    """What the store and the notes of jobs go by: the source, and what it refers to."""
    maths = sys.modules["lab.maths"]
    along = torch.ones(tiny.d_model)
    before = lab.Clamp(along, layer=2).identity()
    assert before == lab.Clamp(along, layer=2).identity()
    monkeypatch.setattr(maths, "projected", lambda state, vector: (state * vector).sum(-1, keepdim=True))
    monkeypatch.setattr(lab, "projected", maths.projected)
    assert lab.Clamp(along, layer=2).identity() != before


@dataclass(frozen=True, eq=False)
class Needy(Intervention):
    """Needs at run time what no server has."""

    kind: ClassVar[str] = "needy"

    @staticmethod
    def change(state, vector, amount):
        import latentguard.metrics  # noqa: F401

        return state

    along: torch.Tensor = field(default_factory=lambda: torch.ones(32))
    amount = 1.0

    def vector(self, layer, prompt):
        return self.along


def test_what_a_server_would_not_have_is_said(tiny):
    act = Needy(layer=1)
    tiny.logits(PROMPTS[:2], [act])
    with pytest.raises(InputError, match="a server would not have latentguard"):
        simulated(tiny).logits(PROMPTS[:2], [act])


def test_what_cannot_travel_is_said(tiny):
    lock = threading.Lock()

    def held(index, logprobs):
        return 0.0 if lock else 1.0

    with pytest.raises(InputError, match="cannot travel.*cannot pickle '_thread.lock'.*docs/remote.md"):
        simulated(tiny).logits(PROMPTS[:1], reduce=held)


def test_shipping_leaves_no_trace_in_this_process(tiny):
    from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES

    registered, modules = set(_PICKLE_BY_VALUE_MODULES), dict(sys.modules)
    far = simulated(tiny)
    far.read(PROMPTS[:2])
    assert set(_PICKLE_BY_VALUE_MODULES) == registered
    assert all(sys.modules[name] is module for name, module in modules.items() if name.startswith("latentguard"))
    assert "tests" in {name.partition(".")[0] for name in not_installed()} and "torch" not in not_installed()


def with_factor(factor):
    def around(function):
        @functools.wraps(function)
        def scaled(state, vector, amount):
            return state + factor * (function(state, vector, amount) - state)

        return scaled

    return around


@with_factor(2.0)
def helped(state, vector, amount):
    return state + vector


def test_a_decorated_helper_is_refused():
    """nnsight would send the source of what the decorator wraps."""
    with pytest.raises(InputError, match="calls helped, whose decorator would be lost"):
        bare(lambda state, vector, amount: helped(state, vector, amount))


@pytest.mark.parametrize("change", [with_factor(-3.0)(clamp), with_factor(2.0)(with_factor(-3.0)(clamp))], ids=["once", "twice"])
def test_a_decorated_change_travels_with_its_decorator(tiny, change):
    @dataclass(frozen=True, eq=False)
    class Decorated(Add):
        pass

    Decorated.change = staticmethod(change)
    act = Decorated(every_kind(tiny).cells[1].interventions[0].direction, layer=1, coef=-1.0)
    far = simulated(tiny).logits(PROMPTS, [act])
    assert max(float((a - b).abs().max()) for a, b in zip(far, tiny.logits(PROMPTS, [act]), strict=True)) < 1e-4
    assert not torch.allclose(far[0], tiny.logits(PROMPTS)[0], atol=1e-3)


class Kept:
    def __init__(self, k):
        self.k = k

    def m(self, state, vector, amount):
        return state + self.k * vector


def collisions():
    """Pairs that differ in something a name does not show."""

    def closed(value):
        return lambda x: x + value

    first, second = lambda s: s + 1, lambda s: s - 1  # fmt: skip
    layers = [torch.nn.Linear(3, 3, bias=False) for _ in range(2)]
    arrays = [np.zeros(2000), np.zeros(2000)]
    arrays[1][1000] = 1e-12
    modules = [types.ModuleType("of_a_user"), types.ModuleType("of_a_user")]
    modules[0].CONST, modules[1].CONST = 1.0, 2.0
    hidden = [SimpleNamespace(state=torch.zeros(2000)), SimpleNamespace(state=torch.ones(2000))]
    yield from [(first, second), (closed(layers[0]), closed(layers[1])), (closed(arrays[0]), closed(arrays[1])), (closed(hidden[0]), closed(hidden[1]))]
    yield Kept(1).m, Kept(2).m
    yield with_factor(1)(clamp), with_factor(2)(clamp)
    yield closed(1.0), closed(1.0 + 1e-10)
    yield tuple(eval("lambda: made.CONST", {"made": module}) for module in modules)
    yield eval("lambda x: torch.sin(x)", {"torch": torch}), eval("lambda x: torch.cos(x)", {"torch": torch})
    yield eval("lambda x: (lambda y: y + 1)(x)"), eval("lambda x: (lambda y: y + 2)(x)")
    yield {"a": [1, 2]}, {"a": (1, 2)}


def test_what_differs_is_told_apart():
    for one, other in collisions():
        assert told(one) != told(other), (one, other)


def test_and_what_is_the_same_is_not():
    def made(k):
        return lambda x: x + k

    assert told(made(1)) == told(made(1)) and told(Kept(1).m) == told(Kept(1).m) and told(with_factor(2)(clamp)) == told(with_factor(2)(clamp))
    assert told(torch.ones(2)) != told(torch.ones(1, 2)) and len({str(told(x)) for x in (1, True, "1", 1.0)}) == 4
    assert told(threading.Lock()) != told(threading.Lock()), "what cannot be told is never taken for another"
    assert told(bare(clamp)) == told(bare(clamp))


def test_a_payload_holds_no_weights(tiny):
    far = simulated(tiny)
    assert 0 < len(far.host.probe()) < 20_000
    packed = parcel(far.tree, far.places, partial(served.read, wanted=[1], dtype="float32"), [])
    raw = zstandard.ZstdDecompressor().decompress(packed)
    weight = tiny.hf.get_input_embeddings().weight
    assert weight.detach().numpy().tobytes()[:64] not in raw and len(packed) < 20_000

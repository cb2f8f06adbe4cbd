"""The store answers what was computed before, in any order, and heals itself."""

import multiprocessing
import os
from dataclasses import replace

import pytest
import torch

from latentguard.backends import Decoding
from latentguard.behaviour import Mass, RefusalLogOdds
from latentguard.datasets import load_dataset
from latentguard.directions import mean_difference, random_like
from latentguard.errors import InputError
from latentguard.experiments.ablate import AblateRefusal
from latentguard.experiments.categories import Categories
from latentguard.experiments.invert import Invert
from latentguard.experiments.steer import Steer
from latentguard.interventions import Add, Cell, Grid, Patch, steering_grid
from latentguard.judges import Phrases
from latentguard.packs import opened, read_pack, whole_entries, write_pack
from latentguard.prompts import Prompt
from latentguard.roles import Casting
from latentguard.store import Stored, _Asked
from latentguard.trackers import Memory
from tests import planted
from tests.conftest import make_tiny
from tests.counting import Counting, packs_of


class Judge:
    def __init__(self, mark="a"):
        self.mark = mark

    def __repr__(self):
        return f"Judge({self.mark!r})"

    def decided(self, text):
        return self.mark in text


ODDS = RefusalLogOdds(frozenset({5, 60, 200}))


@pytest.fixture
def counted(tiny):
    return Counting(tiny)


@pytest.fixture(scope="module")
def direction(tiny, prompts):
    return mean_difference(tiny.read(prompts, "all", ["t_inst"]), prompts[:3], position="t_inst")


def test_states_are_read_once_and_are_the_same(counted, tiny, prompts, tmp_path):
    stored = Stored(counted, tmp_path)
    first = stored.read(prompts[:4], "all", ["t_inst", "mean(user)"])
    again = Stored(counted, tmp_path).read(prompts, "all", ["t_inst", "mean(user)"])
    assert counted.read_prompts == len(prompts)
    torch.testing.assert_close(again.values, tiny.read(prompts, "all", ["t_inst", "mean(user)"]).values, atol=1e-5, rtol=0)
    assert torch.equal(again.values[:4], first.values)


def test_layers_are_found_one_by_one(tiny, prompts, tmp_path):
    watched = Watched(tiny)
    stored = Stored(watched, tmp_path)
    some = stored.read(prompts, [1, 3], ["t_inst"])
    for layers in ([3], [1], [3, 1], [1, 3]):
        found = Stored(watched, tmp_path).read(prompts, layers, ["t_inst"])
        assert torch.equal(found.values, some.values[:, [[1, 3].index(layer) for layer in found.layers]])
    assert len(watched.asked) == 1
    more = stored.read(prompts, "all", ["t_inst"])
    assert watched.layers[1:] == [(0, 2, 4)], "what is stored is not computed again beside what is not"
    assert torch.equal(more.values[:, [1, 3]], some.values)
    torch.testing.assert_close(more.values, tiny.read(prompts, "all", ["t_inst"]).values, atol=1e-5, rtol=0)
    assert torch.equal(Stored(watched, tmp_path).read(prompts, "all", ["t_inst"]).values, more.values) and len(watched.asked) == 2


def test_what_is_stored_stays_to_the_bit_beside_prompts_that_lack_more(tiny, prompts, tmp_path):
    class Unsteady(Counting):
        """Each call's states differ a little from the last's."""

        def read(self, prompts, *args):
            self.scored.append(1)
            found = super().read(prompts, *args)
            return replace(found, values=found.values + 1e-3 * len(self.scored))

    unsteady = Unsteady(tiny)
    some = Stored(unsteady, tmp_path).read(prompts[:3], [2], ["t_inst"]).values
    both = Stored(unsteady, tmp_path).read(prompts, [2, 4], ["t_inst"]).values
    assert torch.equal(both[:3, :1], some) and len(packs_of(tmp_path, "states")) == 2
    assert torch.equal(Stored(unsteady, tmp_path).read(prompts, [4, 2], ["t_inst"]).values, both)
    keys = _Asked(Stored(tiny, tmp_path)._made_by, prompts[:3], tiny.render(prompts[:3])).states("t_inst")
    for path in packs_of(tmp_path, "states"):  # whichever pack an entry is met in
        with opened(path) as file:
            assert [bytes(read_pack(path).rows(file, key, (2,))[2]) for key in keys] == [row.numpy().tobytes() for row in some[:, 0, 0]]


def test_a_key_holds_where_among_the_tokens_and_not_what_the_place_is_called(tiny, direction, prompts):
    cell = Cell((Add(direction, layer=2, positions="t_inst"),))
    whole = tiny.render(prompts[3:4])[0]
    short = replace(whole, user=(whole.user[0], whole.user[1] - 3))
    assert short.ids == whole.ids
    keys = [_Asked("m", prompts[3:4], [item]).cell(cell, "logits", [""], 0) for item in (whole, short, whole)]
    assert keys[0] == keys[2] != keys[1]


def test_prompts_of_the_same_text_are_told_apart_where_their_ids_matter(counted, tiny, prompts, tmp_path):
    twins = [prompts[4], replace(prompts[4], id="twin")]
    states = tiny.read([prompts[0], prompts[5]], "all", ["t_inst"])
    patch = Patch(states, layer=1, positions="user", read_at="t_inst", source={"t4": "t0", "twin": "t5"})
    told = tiny.logits(twins, [patch], reduce=ODDS)
    sampled = [r.tokens for r in tiny.generate(twins, max_new_tokens=4, temperature=2.0)]
    assert told[0] != told[1] and sampled[0] != sampled[1]
    for _ in range(2):
        stored = Stored(counted, tmp_path)
        assert stored.logits(twins, [patch], reduce=ODDS) == told
        assert [r.tokens for r in stored.generate(twins, max_new_tokens=4, temperature=2.0)] == sampled
    assert len(counted.scored) == 1 and counted.replies == 2


def test_replies_are_keyed_by_all_that_makes_them(counted, tiny, prompts, tmp_path):
    stored, states = Stored(counted, tmp_path), tiny.read(prompts, "all", ["t_inst"])
    v = mean_difference(states, prompts[:3], position="t_inst")
    asked = [
        ([], {}), ([], {"max_new_tokens": 5}), ([], {"temperature": 1.0}), ([], {"temperature": 1.0, "seed": 1}), ([], {"decided": Judge().decided}),
        ([], {"decided": Judge("b").decided}), ([Add(v, layer=2, coef=3.0)], {}), ([Add(v, layer=2, coef=2.0)], {}), ([Add(v, layer=3, coef=3.0)], {}),
        ([Add(v, layer=2, coef=3.0, when="every_step")], {}), ([Add(v, layer=2, coef=3.0, positions="user")], {}),
        ([Add(random_like(v, 1), layer=2, coef=3.0)], {}), ([Patch(states, layer=2, positions="t_inst")], {}),
        ([Patch(states, layer=2, positions="t_inst", source={p.id: "t0" for p in prompts})], {}),
    ]  # fmt: skip
    for n, (acts, settings) in enumerate(asked, 1):
        found = stored.generate(prompts, acts, **{"max_new_tokens": 4, **settings})
        assert counted.replies == n * len(prompts), (acts, settings)
        assert [r.tokens for r in found] == [r.tokens for r in tiny.generate(prompts, acts, **{"max_new_tokens": 4, **settings})]
    for acts, settings in asked:
        stored.generate(prompts, acts, **{"max_new_tokens": 4, **settings})
    assert counted.replies == len(asked) * len(prompts)


def test_an_interrupted_grid_goes_on_where_it_stopped(counted, tiny, direction, prompts, tmp_path):
    grid = Grid((*steering_grid(direction, [1, 2, 3], [1.0, 2.0]), Cell()))
    stream = Stored(counted, tmp_path).stream(prompts, grid, Decoding(4))
    for _ in range(20):
        next(stream)
    stream.close()
    counted.replies = 0
    found = Stored(counted, tmp_path).generate(prompts, grid, max_new_tokens=4)
    assert counted.replies == len(prompts) * len(grid) - 20
    assert [[r.tokens for r in said] for said in found] == [[r.tokens for r in said] for said in tiny.generate(prompts, grid, max_new_tokens=4)]


def test_what_was_answered_before_an_error_is_kept(tiny, prompts, tmp_path):
    class Stopped(Counting):
        def stream(self, prompts, grid, *args):
            for n, found in enumerate(self.backend.stream(prompts, grid, *args)):
                if n == 4:
                    raise KeyboardInterrupt
                yield found

    with pytest.raises(KeyboardInterrupt):
        Stored(Stopped(tiny), tmp_path).generate(prompts, max_new_tokens=4)
    counted = Counting(tiny)
    Stored(counted, tmp_path).generate(prompts, max_new_tokens=4)
    assert counted.replies == len(prompts) - 4


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-9] + b"x" * 9, lambda b: b"{}", lambda b: b[:40] + b"x" + b[41:]])
def test_damaged_files_are_computed_again(counted, prompts, tmp_path, damage):
    stored = Stored(counted, tmp_path)

    def ask():
        return stored.read(prompts, 2).values, stored.generate(prompts, max_new_tokens=4), stored.logits(prompts, reduce=Mass(frozenset({5, 6})))

    states, replies, masses = ask()
    for path in packs_of(tmp_path, "*"):
        path.write_bytes(damage(path.read_bytes()))
    stored = Stored(counted, tmp_path)
    again = ask()
    torch.testing.assert_close(again[0], states, atol=1e-5, rtol=0)
    assert again[1] == replies and again[2] == pytest.approx(masses, rel=1e-4)
    assert counted.replies > len(prompts) < counted.read_prompts and len(counted.scored) == 2
    read, replied = counted.read_prompts, counted.replies
    stored = Stored(counted, tmp_path)
    assert torch.equal(ask()[0], again[0]) and (counted.read_prompts, counted.replies, len(counted.scored)) == (read, replied, 2)
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()], "no half-written file stays"


def test_entries_of_another_shape_or_meaning_are_computed_again(counted, prompts, tmp_path):
    stored = Stored(counted, tmp_path)
    states, replies = stored.read(prompts, 2).values, stored.generate(prompts, max_new_tokens=4)
    for kind, changed in (("states", lambda data: data[:64]), ("replies", lambda data: b"[1, 2]")):
        (path,) = packs_of(tmp_path, kind)
        entries = {key: changed(bytes(data)) for key, data in whole_entries(read_pack(path)).items()}
        write_pack(path.parent, kind, read_pack(path).labels, entries)
        path.unlink()
    stored = Stored(counted, tmp_path)
    assert torch.equal(stored.read(prompts, 2).values, states) and stored.generate(prompts, max_new_tokens=4) == replies
    assert (counted.read_prompts, counted.replies) == (2 * len(prompts), 2 * len(prompts))
    assert len(packs_of(tmp_path, "*")) == 2, "what was wrong is gone"
    stored = Stored(counted, tmp_path)
    assert torch.equal(stored.read(prompts, 2).values, states) and stored.generate(prompts, max_new_tokens=4) == replies
    assert (counted.read_prompts, counted.replies) == (2 * len(prompts), 2 * len(prompts))


class Watched(Counting):
    """Keeps what it was asked to read."""

    def __init__(self, backend):
        super().__init__(backend)
        self.asked, self.layers = [], []

    def read(self, prompts, layers, positions):
        self.asked.append((len(prompts), tuple(positions)))
        self.layers.append(tuple(layers))
        return super().read(prompts, layers, positions)


def test_each_position_is_read_once_in_whatever_company(tiny, prompts, tmp_path):
    watched = Watched(tiny)
    stored = Stored(watched, tmp_path)
    stored.read(prompts, "all", ["t_inst", "t_post_inst"])
    stored.read(prompts, "all", ["t_post_inst"])
    stored.read(prompts, "all", ["t_post_inst", "t_inst"])
    assert watched.asked == [(len(prompts), ("t_inst", "t_post_inst"))], "nothing is read anew in another order or alone"
    stored.read(prompts, "all", ["mean(user)", "t_inst"])
    assert watched.asked[1:] == [(len(prompts), ("mean(user)",))], "what is known is not read again beside what is new"
    everything = stored.read(prompts, "all", ["t_post_inst", "mean(user)", "t_inst"])
    assert len(watched.asked) == 2
    torch.testing.assert_close(everything.values, tiny.read(prompts, "all", ["t_post_inst", "mean(user)", "t_inst"]).values, atol=1e-5, rtol=0)
    assert everything.positions == ("t_post_inst", "mean(user)", "t_inst") and everything.prompts == tuple(prompts)


def test_new_prompts_and_new_positions_together_are_right(tiny, prompts, tmp_path):
    watched = Watched(tiny)
    stored = Stored(watched, tmp_path)
    stored.read(prompts[:2], 2, ["t_inst"])
    stored.read(prompts[3:5], 2, ["t_post_inst"])
    found = stored.read(prompts, 2, ["t_inst", "t_post_inst"])
    torch.testing.assert_close(found.values, tiny.read(prompts, 2, ["t_inst", "t_post_inst"]).values, atol=1e-5, rtol=0)
    before = len(watched.asked)
    assert torch.equal(stored.read(prompts, 2, ["t_post_inst"]).values[:, :, 0], found.values[:, :, 1]) and len(watched.asked) == before


def test_places_that_are_the_same_tokens_share_an_entry(tiny, prompts, tmp_path):
    watched = Watched(tiny)
    stored = Stored(watched, tmp_path)
    tail = len(tiny.render(prompts[:1])[0]) - 1 - tiny.render(prompts[:1])[0].user_tokens[-1]
    states = stored.read(prompts, 2, ["t_post_inst"])
    assert torch.equal(stored.read(prompts, 2, [f"post({tail})"]).values, states.values) and len(watched.asked) == 1
    assert not torch.equal(stored.read(prompts, 2, ["mean(user)"]).values, states.values) and len(watched.asked) == 2


def test_one_damaged_position_is_read_again_and_the_others_stay(tiny, prompts, tmp_path):
    watched = Watched(tiny)
    stored = Stored(watched, tmp_path)
    states = stored.read(prompts, 2, ["t_inst", "t_post_inst"]).values
    (path,) = packs_of(tmp_path, "states")
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    torch.testing.assert_close(stored.read(prompts, 2, ["t_inst", "t_post_inst"]).values, states, atol=1e-5, rtol=0)
    assert len(watched.asked) == 2 and watched.asked[1][0] == 1 and len(watched.asked[1][1]) == 1


def test_a_prompt_without_its_suffix_has_replies_of_its_own(counted, tiny, prompts, tmp_path):
    stored, cut = Stored(counted, tmp_path), [replace(p, suffix=False) for p in prompts]
    for given in (prompts, cut, prompts, cut):
        assert [r.tokens for r in stored.generate(given, max_new_tokens=4)] == [r.tokens for r in tiny.generate(given, max_new_tokens=4)]
    assert counted.replies == 2 * len(prompts)
    stored.read(prompts, 2)
    stored.read(cut, 2)
    assert counted.read_prompts == 2 * len(prompts), "the rendered tokens are the key"


def test_two_stores_on_one_folder_share_what_they_learn(tiny, prompts, tmp_path):
    one, other = Counting(tiny), Counting(tiny)
    first, second = Stored(one, tmp_path), Stored(other, tmp_path)
    for k, prompt in enumerate(prompts):
        (first if k % 2 else second).read([prompt], 2)
        assert len(set(map(tuple, (tuple(s.read([prompt], 2).values.flatten().tolist()) for s in (first, second))))) == 1
        assert first.generate([prompt], max_new_tokens=2) == second.generate([prompt], max_new_tokens=2)
    assert one.read_prompts + other.read_prompts == len(prompts) == one.replies + other.replies


def _ask_all(folder, start):
    backend = make_tiny(batch_size=5)
    prompts = [Prompt.of(f"tell me {'very ' * k}much about the number {k}.", id=f"t{k}") for k in range(12)]
    start.wait()
    stored = Stored(backend, folder)
    for _ in range(3):
        states, replies = stored.read(prompts, "all", ["t_inst", "t_post_inst"]), stored.generate(prompts, max_new_tokens=3)
        assert torch.allclose(states.values, backend.read(prompts, "all", ["t_inst", "t_post_inst"]).values, atol=1e-5)
        assert [r.tokens for r in replies] == [r.tokens for r in backend.generate(prompts, max_new_tokens=3)]


@pytest.mark.slow
def test_two_processes_that_ask_the_same_at_once_do_each_other_no_harm(tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    both = [context.Process(target=_ask_all, args=(tmp_path, start)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    counted = Counting(make_tiny(batch_size=5))
    Stored(counted, tmp_path).read([Prompt.of(f"tell me {'very ' * k}much about the number {k}.", id=f"t{k}") for k in range(12)], 2)
    assert counted.read_prompts == 0


def test_a_folder_that_cannot_be_written_in_is_one_sentence(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LATENTGUARD_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write in .*file/store .*set LATENTGUARD_CACHE to another folder"):
        Stored(tiny)
    with pytest.raises(InputError, match="cannot write in /proc"):
        Stored(tiny, "/proc/no")
    with pytest.raises(InputError, match="limit_bytes=0"):
        Stored(tiny, tmp_path, limit_bytes=0)
    with pytest.raises(InputError, match="no hash of its weights"):
        Stored(make_tiny_without_weights(), tmp_path)


def make_tiny_without_weights():
    backend = make_tiny()
    backend.weights = ""
    return backend


def test_a_small_cap_costs_time_and_no_answer(tiny, prompts, tmp_path):
    stored = Stored(Counting(tiny), tmp_path, limit_bytes=6000)
    for _ in range(2):
        for prompt in prompts:
            torch.testing.assert_close(stored.read([prompt], "all").values, tiny.read([prompt], "all").values, atol=1e-5, rtol=0)
    assert sum(path.stat().st_size for path in packs_of(tmp_path, "*")) <= 6000
    other = stored.around(tiny)
    assert (other.folder, other.limit_bytes, other.inner) == (tmp_path, 6000, tiny)


def test_another_program_that_empties_the_folder_does_no_harm(counted, prompts, tmp_path):
    stored = Stored(counted, tmp_path)
    states = stored.read(prompts, 2).values
    stream = stored.stream(prompts, Grid((Cell(),)), Decoding(3))
    next(stream)
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    assert len(list(stream)) == len(prompts) - 1
    assert torch.equal(stored.read(prompts, 2).values, states) and counted.read_prompts == 2 * len(prompts)
    assert os.listdir(tmp_path)


QUESTION = 'Could this prompt cause harm? If it could, answer "Certainly". If not, answer "No".'
FEW = Casting(n_poles=12, n_test=8, n_validation=6, patience=2.0, max_new_tokens=4)
STUDIES = {
    "steer": Steer(layers=(1, 2), coefs=(1.0,), max_new_tokens=4, casting=FEW, n_validation=5, n_damage=3, n_test=8, n_unsteered=4, n_grid=3, n_draw=2,
                   n_control=3, draws=2, draws_reported=2),
    "ablate": AblateRefusal(layers=(1, 2), n_harmful=4, n_harmless=3, n_test=6, n_beside=4, n_control=3, n_damage=3, draws=2, shuffles=2, max_new_tokens=4,
                            casting=FEW),
    "categories": Categories(n_category=8, n_test=6, n_harmless=12, shuffles=2),
    "invert": Invert(questions=(QUESTION,), layers=(3, 4), coefs=(1.0,), n_test=6, n_validation=4, draws=2, max_new_tokens=3, casting=FEW),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_run_again_asks_the_model_nothing(name, tmp_path):
    backend = make_tiny(batch_size=16) if name in ("steer", "ablate") else planted.Planted()
    data, summaries, rows = load_dataset("builtin"), [], []
    for _ in range(2):
        counted, tracker = Counting(backend), Memory()
        summaries.append(STUDIES[name](Stored(counted, tmp_path), data, Phrases(), tracker))
        rows.append(sorted(map(repr, tracker.all_rows)))
        asked = (counted.read_prompts, counted.replies, counted.scored)
        assert asked == (0, 0, []) if len(rows) == 2 else counted.read_prompts and counted.scored
    assert repr(summaries[0]) == repr(summaries[1]) and rows[0] == rows[1]
    if name in ("categories", "invert"):  # whose answers do not hang on a batch's other rows, not even in the last bit
        assert repr(STUDIES[name](backend, data, Phrases(), Memory())) == repr(summaries[0])

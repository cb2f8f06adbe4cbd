"""A guard's folder: what is saved is what is loaded, a kill leaves a whole guard, and no field can be wrong without a sentence that names it."""

import copy
import hashlib
import json
import math
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load as unpacked
from safetensors.torch import save as packed

from latentguard.datasets import load_dataset
from latentguard.errors import InputError
from latentguard.guards import LatentGuard, folder
from latentguard.guards.card import card
from latentguard.guards.drift import GRID
from latentguard.guards.fields import canonical, content_hash
from tests.conftest import make_tiny

TEXTS = ["how do i bake bread", "Tell me about the number 7.", "why?"]
SETTINGS = {
    "logistic": {"methods": ("logistic",), "domains": "source"},
    "paper": {"methods": ("paper",), "calibration": "isotonic", "positions": (("t_inst",),), "terminal": "mixed"},
    "mlp": {"methods": ("mlp",)},
}
HUGE = "x" * 5000


@pytest.fixture(scope="module")
def backend():
    return make_tiny()


@pytest.fixture(scope="module")
def guards(backend):
    data = load_dataset("builtin")
    return {kind: LatentGuard.fit(backend, data, name=f"a {kind} guard", **settings) for kind, settings in SETTINGS.items()}


@pytest.fixture(scope="module")
def saved(guards, tmp_path_factory):
    """The two files of each, as bytes."""
    home = tmp_path_factory.mktemp("guards")
    for kind, guard in guards.items():
        seen = {"set": "all families", "detector": "guard", "is": "AUROC", "comparison": "pooled", "value": 0.8, "low": 0.7, "high": 0.9, "n": 40}
        guard.about["unseen"] = [{**seen, "n_harmful": 20, "n_harmless": 20, "tpr_at_5%": 0.3}]
        guard.save(home / kind)
    return {kind: (json.loads((home / kind / "guard.json").read_text()), (home / kind / "guard.safetensors").read_bytes()) for kind in guards}


def put(where, found, blob, *, rehash=True, keep=()):
    """A guard's folder of this content."""
    where.mkdir(exist_ok=True)
    (where / "guard.json").write_bytes(found.encode() if isinstance(found, str) else as_text(found, blob, rehash=rehash, keep=keep))
    (where / "guard.safetensors").write_bytes(blob)
    return where


def as_text(found, blob, *, rehash=True, keep=()):
    """guard.json, with hashes that fit it unless asked not to, or where the one at `keep` is what is wrong."""
    sums = found.get("sha256")
    if rehash and isinstance(sums, dict):
        tensors = {} if keep[:1] == ("sha256",) else {"tensors": hashlib.sha256(blob).hexdigest()}
        found = {**found, "sha256": {**sums, **tensors}}
        if keep != ("sha256", "content"):
            found["sha256"]["content"] = loose_hash(found)
    return json.dumps(found).replace("Infinity", "1e400").encode()


def loose_hash(found):
    """The content's hash, for content that no guard may have too."""
    rest = {**found, "sha256": {key: value for key, value in found["sha256"].items() if key != "content"}}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")).hexdigest()


def refused(where, *words, **asked):
    with pytest.raises(InputError) as caught:
        folder.load(where, **asked)
    said = str(caught.value)
    assert "\n" not in said and said.isprintable() and len(said) < 1200, said
    assert all(word in said for word in words), f"{said} lacks one of {words}"
    return said


# What is saved is what is loaded.


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_saved_guard_scores_as_it_did_bit_for_bit(kind, guards, backend, tmp_path):
    guard = guards[kind]
    back = LatentGuard.load(guard.save(tmp_path / "it"), backend)
    assert guard.score(TEXTS).tobytes() == back.score(TEXTS).tobytes()
    assert (back.thresholds, back.domains, back.calibration, back.layers, back.positions) == (
        guard.thresholds, guard.domains, guard.calibration, guard.layers, guard.positions,
    )  # fmt: skip
    assert (back.reference.raw, back.reference.far, back.reference.n) == (guard.reference.raw, guard.reference.far, guard.reference.n)
    assert torch.equal(back.reference.middle, guard.reference.middle) and torch.equal(back.reference.scale, guard.reference.scale)
    assert (back.name, back.model, back.weights, back.template, back.terminal, back.method) == (
        guard.name, guard.model, guard.weights, guard.template, guard.terminal, guard.method,
    )  # fmt: skip


@pytest.mark.parametrize("kind", SETTINGS)
def test_saved_loaded_and_saved_again_it_is_the_same_to_the_byte(kind, guards, backend, tmp_path):
    first = guards[kind].save(tmp_path / "first")
    for on in (None, backend):
        again = LatentGuard.load(first, on).save(tmp_path / f"again-{on is None}")
        assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in first.iterdir()}
    assert sorted(p.name for p in first.iterdir()) == ["README.md", "guard.json", "guard.safetensors"]


def test_nothing_is_unpickled(guards, tmp_path, monkeypatch):
    def never(*_args, **_settings):
        raise AssertionError("a pickle was read")

    where = guards["mlp"].save(tmp_path / "it")
    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (pickle, "Unpickler"), (np, "load")):
        monkeypatch.setattr(module, name, never)
    assert folder.load(where).method == "mlp"


def test_without_a_model_it_loads_and_takes_one_later(guards, backend, tmp_path):
    guard = folder.load(guards["paper"].save(tmp_path / "it"))
    with pytest.raises(InputError, match="no model yet"):
        guard.score(TEXTS)
    assert np.array_equal(guard.on(backend).score(TEXTS), guards["paper"].score(TEXTS))


def test_numbers_of_numpy_and_no_numbers_are_saved_as_json_has_them(guards, tmp_path):
    odd = {"mine": {"a": np.float32(0.5), "b": np.int64(3), "c": math.nan, "d": (1, 2), "e": "ü"}}
    where = replace(guards["mlp"], about={**guards["mlp"].about, **odd}).save(tmp_path / "it")
    assert folder.load(where).about["mine"] == {"a": 0.5, "b": 3, "c": None, "d": [1, 2], "e": "ü"}


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"name": "two\nlines"}, "name"),
        ({"name": ""}, "name"),
        ({"weights": ""}, "hash"),
        ({"template": ""}, "hash"),
        ({"about": {"mine": object()}}, "object"),
        ({"about": {"mine": {1: 2}}}, "dict"),
        ({"about": {"mine": "\ud800"}}, "surrogate"),
        ({"about": {"test": {"n": 3}}}, "about.test.harmful is missing"),
        ({"about": {"mine": HUGE}}, "about.mine"),
        ({"layers": (3, 2)}, "layers"),
        ({"positions": ("user",)}, "positions"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(changed, word, guards, tmp_path):
    with pytest.raises(InputError, match=word):
        replace(guards["mlp"], **changed).save(tmp_path / "it")
    assert not (tmp_path / "it").exists()


# A kill leaves a whole guard.


class KilledError(BaseException):
    pass


def test_a_kill_at_any_step_leaves_the_old_guard_or_the_new_one_and_the_next_save_heals_it(guards, backend, tmp_path, monkeypatch):
    old, new, third = (guards[kind] for kind in ("logistic", "mlp", "paper"))
    scores = {guard.method: guard.score(TEXTS).tobytes() for guard in (old, new, third)}
    steps, after = 0, []

    def counted(original):
        def step(*args, **settings):
            nonlocal steps
            if steps == 0:
                raise KilledError
            steps -= 1
            return original(*args, **settings)

        return step

    for stop in range(40):
        where = old.save(tmp_path / f"it{stop}")
        with monkeypatch.context() as patched:
            steps = stop
            patched.setattr(os, "fsync", counted(os.fsync))
            patched.setattr(folder.Path, "replace", counted(folder.Path.replace))
            patched.setattr(folder.Path, "unlink", counted(folder.Path.unlink))
            try:
                new.save(where)
                done = True
            except KilledError:
                done = False
        left = folder.load(where, backend)
        assert left.score(TEXTS).tobytes() == scores[left.method]
        after.append(left.method)
        folder.load(where).save(tmp_path / f"copy{stop}")
        third.save(where)
        assert folder.load(where, backend).score(TEXTS).tobytes() == scores["paper"]
        assert sorted(p.name for p in where.iterdir()) == ["README.md", "guard.json", "guard.safetensors"]
        if done:
            break
    assert done and set(after) == {"logistic", "mlp"} and after == sorted(after)


def test_a_second_kill_before_the_first_is_healed_loses_nothing(guards, tmp_path, monkeypatch):
    where = guards["logistic"].save(tmp_path / "it")

    def killed(self, target):
        if self.name.endswith(".partial") and target.name == "guard.safetensors":
            raise KilledError
        return os.replace(self, target)

    monkeypatch.setattr(folder.Path, "replace", killed)
    for kind in ("mlp", "paper", "mlp"):
        with pytest.raises(KilledError):
            guards[kind].save(where)
        assert folder.load(where).method == guards[kind].method


def test_a_save_writes_over_nothing_that_is_not_a_guards(guards, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(InputError, match="no guard's folder"):
        guards["mlp"].save(tmp_path)
    (tmp_path / "file").write_text("mine")
    for where in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(InputError, match=r"file"):
            guards["mlp"].save(where)
    target, where = tmp_path / "target", tmp_path / "it"
    target.write_text("mine")
    where.mkdir()
    for name in ("guard.json.partial", "guard.safetensors", "README.md.partial"):
        (where / name).symlink_to(target)
    guards["mlp"].save(where)
    assert target.read_text() == "mine" and not (where / "guard.safetensors").is_symlink() and folder.load(where)


# Every field.


def leaves(value, place=()):
    """Where every value that is no object and no list stands; of long lists of numbers the first, one between and the last."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    if isinstance(value, list) and len(value) > 8:
        items = [items[0], items[len(items) // 2], items[-1]]
    for key, item in items:
        if isinstance(item, dict | list) and item:
            yield from leaves(item, (*place, key))
        yield (*place, key)


def at(found, place):
    for key in place:
        found = found[key]
    return found


def changed(found, place, value):
    """A copy with another value at one place, or without it; the rest is shared."""
    if not place:
        return value
    key, *deeper = place
    made = copy.copy(found)
    if deeper or value is not DELETED:
        made[key] = changed(found[key], deeper, value) if deeper else value
    else:
        del made[key]
    return made


DELETED = object()
BATTERY = [DELETED, None, True, "0.5", math.nan, -1, math.inf, "", [], {}, HUGE, "\u202ex\n"]  # Infinity is written as 1e400
FREE = [DELETED, None, math.nan, HUGE]  # for what nobody reads but people


@pytest.mark.parametrize(("kind", "only"), [("logistic", ""), ("paper", "calibration"), ("mlp", "method")])
def test_no_field_can_be_wrong_without_a_sentence_that_names_it(kind, only, saved, tmp_path, monkeypatch):
    """Hashes fit what is wrong, so that each field's own check must hold. What differs by kind is walked for each kind."""
    found, blob = saved[kind]
    places = [place for place in leaves(found) if place[0].startswith(only)]
    assert len(places) > (150 if kind == "logistic" else 0)
    loaded, lies = [], {"guard.safetensors": blob}
    monkeypatch.setattr(folder, "_bytes", lambda path, most: lies[path.name])
    for place in places:
        for value in FREE if place[:2] in (("about", "search"), ("about", "tried")) else BATTERY:
            lies["guard.json"] = as_text(changed(found, place, value), blob, keep=place)
            try:
                guard = folder.load(tmp_path)
            except InputError as error:
                said = str(error)
                assert "\n" not in said and said.isprintable() and len(said) < 1200, (place, value, said)
                named = [str(key) for key in place if isinstance(key, str)]
                assert any(name in said for name in named[-2:]) or place[0] in said, (place, value, said)
                continue
            loaded.append(place[0])
            assert place[0] == "about" or legitimate(place, value, found), (place, str(value)[:80])
            if len(loaded) % 10 == 0:
                assert card(guard).startswith("---")
    assert "about" in loaded or only


def legitimate(place, value, found):
    """Other values that a guard may have as well: fewer thresholds, another number within its range."""
    if place[0] in ("thresholds", "domains") and (value is DELETED or value == {}):
        return len(place) < 3 or (place[0] == "domains" and len(place) == 3 and len(at(found, place[:-1])) > 1)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if place[0] in ("thresholds", "domains"):
        return number and value in ((0, 2**53) if place[-1] in ("low", "n") else ())
    if place in (("name",), ("model", "name"), ("model", "weights"), ("model", "template")) or place[0] == "libraries":
        return value == "0.5"
    if place == ("piece",):
        return value is None or value is DELETED  # as guards of before are
    if place == ("sha256",):
        return False
    if place[0] == "layers":
        return place == ("layers", 0) and value == 0
    if place[0] == "calibration":
        return number and (place[-1] == "offset" or (place[-1] == "slope" and value > 0) or isinstance(place[-1], int))
    if place[0] == "reference":
        return place[-1] == "n" and number and value >= 1 or (number and isinstance(place[-1], int))
    return False


def test_a_field_changed_by_hand_is_told_by_the_hash(saved, tmp_path):
    found, blob = saved["logistic"]
    for place in leaves(found):
        if place[0] in ("sha256", "schema"):
            continue
        old = at(found, place)
        value = old + 1 if isinstance(old, int | float) and not isinstance(old, bool) else "other"
        refused(put(tmp_path / "it", changed(found, place, value), blob, rehash=False), "guard.json", "altered", "fetch the guard anew")


def extra(found, place):
    return changed(found, place, {**at(found, place), "unheard of": 1})


def test_more_keys_than_there_are_fields_are_refused(saved, tmp_path):
    found, blob = saved["logistic"]
    places = [(), ("model",), ("calibration",), ("thresholds", "fpr=0.05"), ("domains", "builtin", "fpr=0.05"), ("reference",), ("libraries",), ("sha256",)]
    for place in places:
        refused(put(tmp_path / "it", extra(found, place), blob), place[0] if place else "unheard of")


@pytest.mark.parametrize(
    ("place", "value", "word"),
    [
        (("schema",), 2, "later version"),
        (("schema",), 0, "schema=0"),
        (("schema",), True, "schema=True"),
        (("layers",), [3, 2], "layers"),
        (("layers",), [2, 2], "layers"),
        (("layers",), [2, 5], "layers"),
        (("layers",), [2], "shape"),
        (("layers",), [2.0, 3.0], "layers"),
        (("layers",), "23", "layers"),
        (("model", "n_layers"), 2, "n_layers=2"),
        (("model", "d_model"), 64, "d_model"),
        (("positions",), ["t_inst", "t_inst", "mean(user)"], "positions"),
        (("positions",), ["t_inst", "t_post_inst", "user"], "mean(user)"),
        (("positions",), ["t_inst", "t_post_inst", "nowhere"], "nowhere"),
        (("positions",), ["t_inst", " t_post_inst", "mean(user)"], "positions"),
        (("terminal",), "none", "terminal"),
        (("method",), "svm", "method"),
        (("method",), "mlp", "method=mlp"),
        (("calibration",), {"kind": "isotonic", "slope": 1.0, "offset": 0.0}, "calibration"),
        (("calibration",), {"kind": "isotonic", "knots": [0.0, 1.0], "levels": [0.9, 0.1]}, "calibration"),
        (("calibration",), {"kind": "isotonic", "knots": [0.0, 1.0], "levels": [0.1, 1.1]}, "calibration"),
        (("calibration", "kind"), "beta", "calibration"),
        (("thresholds", "fpr=0.05", "name"), "recall=0.95", "thresholds"),
        (("thresholds", "fpr=0.05", "value"), 1.5, "fpr=0.05"),
        (("thresholds", "fpr=0.05", "low"), 0.99, "fpr=0.05"),
        (("thresholds", "fpr=0.05", "n"), 3.0, "fpr=0.05"),
        (("thresholds", "fpr=5"), {"name": "fpr=5", "value": 0.5, "low": 0.0, "high": 0.1, "n": 9}, "fpr=5"),
        (("thresholds", "fpr=0.01"), {"name": "fpr=0.01", "value": 0.001, "low": 0.0, "high": 0.1, "n": 9}, "fpr=0.01"),
        (("domains", "a\nb"), {}, "domains"),
        (("domains", "other"), {}, "domains.other"),
        (("reference", "far", 0), -0.5, "reference.far"),
        (("created",), "2026-13-41T00:00:00+00:00", "created"),
        (("created",), "yesterday", "created"),
        (("libraries",), {}, "libraries"),
        (("sha256", "tensors"), "0" * 63, "sha256.tensors"),
        (("about", "test", "auroc", "value"), 1.2, "about.test.auroc.value"),
        (("about", "test", "auroc", "low"), None, "about.test.auroc"),
        (("about", "test", "harmful"), 10**9, "about.test"),
        (("about", "warnings"), "none", "about.warnings"),
        (("about", "descendant"), 3, "about.descendant"),
        (("about", "data", "sets", 0, "licence"), 3, "about.data.sets.0.licence"),
    ],
)  # fmt: skip
def test_wrong_values_each_with_their_name(place, value, word, saved, tmp_path):
    found, blob = saved["logistic"]
    refused(put(tmp_path / "it", changed(found, place, value), blob, keep=place), word)


def nested(n):
    return '{"schema": 1, "about": ' + "[" * n + "]" * n + "}"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no JSON"),
        ("{", "no JSON"),
        ("[]", "an object"),
        ("3", "an object"),
        ("null", "an object"),
        ("{}", "missing"),
        (nested(100_000), "guard.json"),
        (nested(900), "deep"),
        (nested(40), "deep"),
        ('{"schema": 1, "schema": 1}', "twice"),
        ('{"schema": 1, "about": {"a": {"b": 1, "b": 2}}}', "'b'"),
        ('{"schema": NaN}', "schema"),
        ('{"schema": 1, "name": 1e999}', "name"),
        ('{"schema": 1, "name": ' + "9" * 5000 + "}", "no JSON"),
        ('{"schema": 1, "name": ' + "9" * 4000 + "}", "name"),
        ('{"schema": 1, "name": "\\ud800"}', "name"),
        ('{"schema": 1, "\\ud800": 1}', "surrogate"),
        ('{"schema": 1, "name": "a", "\\u001b[31m\\n": 1}', "schema"),
        ("\ufeff{}", "no JSON"),
        (" " * (9 << 20), "bytes"),
    ],
    ids=range(20),
)
def test_text_that_is_no_guard(text, word, saved, tmp_path):
    where = put(tmp_path / "it", text, saved["paper"][1])
    said = "" if word == "schema" and "u001b" in text else refused(where, word)
    assert HUGE not in (said or refused(where))


def test_bytes_that_are_no_text(saved, tmp_path):
    where = put(tmp_path / "it", "{}", saved["paper"][1])
    for raw in (b'{"name": "\xff"}', json.dumps(saved["paper"][0]).encode("utf-16"), b"\x00" * 100, os.urandom(1000)):
        (where / "guard.json").write_bytes(raw)
        refused(where, "guard.json")


# The tensors.


def tensors(blob, **changed):
    """The file with tensors changed; None leaves one out."""
    names = {name.replace("__", "."): value for name, value in changed.items()}
    found = {**unpacked(blob), **names}
    return packed({name: tensor.contiguous() for name, tensor in found.items() if tensor is not None})


def test_tensors_of_another_name_type_or_shape_are_refused(saved, tmp_path):
    for kind, (found, blob) in saved.items():
        for name, tensor in unpacked(blob).items():
            key = name.replace(".", "__")
            wrong = {
                "holds": None,
                "F64": tensor.double(),
                "I32": tensor.int(),
                "BF16": tensor.bfloat16(),
                "shape": tensor[None],
                "finite": torch.full_like(tensor, math.nan),
            }
            for word, value in wrong.items():
                refused(put(tmp_path / kind, found, tensors(blob, **{key: value})), word, "guard.safetensors")
            refused(put(tmp_path / kind, found, tensors(blob, **{key: torch.full_like(tensor, math.inf)})), name)
        refused(put(tmp_path / kind, found, tensors(blob, probe__more=torch.zeros(2))), "probe.more")
        refused(put(tmp_path / kind, found, tensors(blob, reference__scale=torch.zeros_like(unpacked(blob)["reference.scale"]))), "reference.scale")
    found, blob = saved["mlp"]
    scale = unpacked(blob)["probe.scale"]
    refused(put(tmp_path / "mlp", found, tensors(blob, probe__scale=-scale)), "probe.scale")
    refused(put(tmp_path / "mlp", found, tensors(blob, probe__bias=torch.zeros(0))), "probe.bias")
    huge = {"probe__middle": torch.full_like(scale, 3e38), "reference__middle": torch.full_like(scale, -3e38), "probe__scale": torch.full_like(scale, 1e-30)}
    refused(put(tmp_path / "mlp", found, tensors(blob, **huge)), "no finite number")


def test_a_damaged_tensors_file_is_told_from_its_hash_or_from_what_it_holds(saved, tmp_path):
    found, blob = saved["logistic"]
    header = int.from_bytes(blob[:8], "little")
    lying = [b"", blob[:7], blob[: header // 2], blob[:-1], blob + b"\0", os.urandom(500), b"\xff" * 16, (2**62).to_bytes(8, "little") + blob[8:]]
    lying += [blob[:8] + blob[8 : 8 + header].replace(b"F32", b"F8_"[:3]) + blob[8 + header :], pickle.dumps({"a": 1}), b"PK\x03\x04" + b"\0" * 64]
    for raw in lying:
        refused(put(tmp_path / "it", found, raw), "guard.safetensors")
        refused(put(tmp_path / "it", found, raw, rehash=False), "sha256.tensors")
    flipped = bytearray(blob)
    flipped[-3] ^= 1
    refused(put(tmp_path / "it", found, bytes(flipped), rehash=False), "altered")


def test_one_guards_tensors_are_not_anothers(guards, tmp_path):
    one = guards["logistic"].save(tmp_path / "one")
    two = replace(guards["logistic"], probe=replace(guards["logistic"].probe, bias=torch.tensor(9.0))).save(tmp_path / "two")
    (one / "guard.safetensors").write_bytes((two / "guard.safetensors").read_bytes())
    refused(one, "another guard")


# The folder.


def test_what_is_no_folder_of_a_guard_is_told(guards, tmp_path, monkeypatch):
    where = guards["mlp"].save(tmp_path / "it")
    refused(tmp_path / "nowhere", "no such folder")
    refused(where / "guard.json", "is a file")
    refused(tmp_path, "no guard.json")
    refused("a\0b", "a")
    (where / "README.md").unlink()
    assert folder.load(where)
    monkeypatch.setattr(folder, "MOST_TENSORS", 100)
    refused(where, "bytes")
    monkeypatch.undo()
    with (where / "guard.json").open("ab") as file:
        file.truncate(9 << 20)
    refused(where, "bytes")
    (where / "guard.json").unlink()
    (where / "guard.json").mkdir()
    refused(where, "no regular file")
    (where / "guard.safetensors").unlink()
    whole = guards["mlp"].save(tmp_path / "whole")
    (whole / "guard.safetensors").unlink()
    refused(whole, "no guard.safetensors")


def test_pipes_and_links_out_of_the_folder_are_not_followed_and_the_hubs_cache_is(guards, tmp_path):
    where = guards["mlp"].save(tmp_path / "it")
    whole = {name: (where / name).read_bytes() for name in folder.FILES}
    for name in ("guard.json", "guard.safetensors"):
        (where / name).rename(tmp_path / name)
        for target in (tmp_path / name, "/dev/zero", tmp_path / "nowhere", where / name):
            (where / name).symlink_to(target)
            refused(where, "is a link")
            (where / name).unlink()
        os.mkfifo(where / name)
        refused(where, "no regular file")
        (where / name).unlink()
        (where / name).write_bytes(whole[name])
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, content in whole.items():
        (blobs / f"x{name}").write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/x{name}")
    assert folder.load(snapshot).method == "mlp"
    (tmp_path / "current").symlink_to(where)
    assert folder.load(tmp_path / "current").method == "mlp"


# Whose model.


def tuned(**changed):
    other = make_tiny()
    other.name, other.weights = changed.get("name", "tuned"), changed.get("weights", "tuned weights")
    return other


def test_another_model_is_refused_and_a_descendant_taken_when_told(guards, backend, tmp_path):
    where = guards["logistic"].save(tmp_path / "it")
    refused(where, "other weights", "descendant=True", backend=tuned())
    refused(where, "small has 2 × 32", backend=small())
    refused(where, "chat template", backend=make_tiny(template="plain"))
    refused(where, "chat template", backend=make_tiny(template="plain"), descendant=True)
    guard = folder.load(where, tuned(), descendant=True)
    told = guard.about["descendant"]
    assert all(word in told for word in ("tuned", "tiny-qwen2", "ranks", "unmeasured", "recalibrated"))
    assert "descendant" not in folder.load(where, backend, descendant=True).about, "the very same weights are no descendant"
    assert folder.load(where, descendant=True).about["descendant"].startswith("fitted on tiny-qwen2")
    assert folder.load(where).on(tuned(), descendant=True).about["descendant"] == told
    again = guard.save(tmp_path / "again")
    assert told in json.loads((again / "guard.json").read_text())["about"]["descendant"]
    assert "Another model than it was fitted on" in (again / "README.md").read_text()
    assert folder.load(again, tuned(), descendant=True).about["descendant"] == told
    assert "descendant" not in folder.load(again, backend).about


def small():
    from latentguard.backends.local import Local
    from latentguard.backends.tiny import tiny_model, tiny_tokenizer

    return Local(tiny_model("qwen2", n_layers=2), tiny_tokenizer(), name="small", weights="small")


def test_a_guard_recalibrated_on_a_descendant_says_where_its_thresholds_hold(guards, backend, tmp_path):
    """On the model that it was fitted on they were measured before, and are not any more."""
    prompts = [*load_dataset("builtin").validation]
    made = guards["logistic"].on(tuned(), descendant=True).recalibrated(prompts)
    assert f"set anew there, on {len(prompts)} labelled prompts" in made.about["descendant"]
    where = made.save(tmp_path / "it")
    assert "set anew there" in folder.load(where, tuned(), descendant=True).about["descendant"]
    assert "were set on tuned" in folder.load(where, backend).about["descendant"]
    other = folder.load(where, tuned(name="third", weights="third weights"), descendant=True)
    assert "unmeasured" in other.about["descendant"]
    plain = guards["logistic"].recalibrated(prompts)
    assert "descendant" not in plain.about
    first = plain.save(tmp_path / "first")
    assert "unmeasured" in folder.load(first, tuned(), descendant=True).about["descendant"]


def test_the_hash_is_the_one_that_the_page_describes(saved):
    found = saved["paper"][0]
    assert found["sha256"]["content"] == content_hash(found) == loose_hash(found)
    assert json.loads(canonical(found)) == found and len(found["reference"]["raw"]) == len(GRID)

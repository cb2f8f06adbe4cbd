"""Packs, one model's shelf of them, and the whole stock: whatever happens to the files, an answer is right or it is none."""

import json
import logging
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest
from safetensors import safe_open

from latentguard import packs, shelf, stock
from latentguard.errors import InputError
from latentguard.packs import DamagedPackError, read_pack, whole_entries, write_pack
from latentguard.prompts import digest
from latentguard.shelf import Gathered, Shelf
from latentguard.stock import Cap, collect, evict, main, packs_in, show, verify

MODEL = "0123456789abcdef01234567"


def key(k):
    return digest(k)[:32]


def entries(numbers, size=240):
    return {key(k): bytes([k % 256]) * size for k in numbers}


def shelf_at(tmp_path, **known):
    return Shelf(tmp_path / MODEL, {"model": "m", "dtype": "torch.float32"}, **known)


def all_of(found):
    return {k: b"".join(rows[label] for label in sorted(rows)) for k, rows in found.items()}


def flip(path, at):
    """One byte of a file changed."""
    whole = bytearray(path.read_bytes())
    whole[at] ^= 1
    path.write_bytes(whole)


def test_a_pack_is_a_safetensors_file_named_by_what_is_in_it(tmp_path):
    pack = write_pack(tmp_path, "states", (4, 12, 20), entries(range(5)))
    with safe_open(pack.path, framework="np") as file:
        assert set(file.keys()) == set(entries(range(5))) and file.get_tensor(key(3)).shape == (3, 20)
        assert file.get_tensor(key(3)).tobytes() == entries([3])[key(3)]
    again = read_pack(pack.path)
    assert (again.labels, again.keys, again.begins, again.seals) == (pack.labels, pack.keys, pack.begins, pack.seals)
    assert write_pack(tmp_path / "b", "states", (4, 12, 20), entries(range(5))).path.name == pack.path.name
    assert write_pack(tmp_path, "states", (4, 12, 21), entries(range(5))).path.name != pack.path.name
    assert write_pack(tmp_path, "states", (4, 12, 20), {**entries(range(5)), key(3): b"z" * 240}).path.name != pack.path.name


def test_rows_are_found_by_label_in_whatever_pack(tmp_path):
    rows = {label: bytes([label]) * 80 for label in (4, 12, 20, 24)}
    kept = shelf_at(tmp_path)
    kept.add("states", {key(0): rows[4] + rows[12]}, (4, 12))
    kept.add("states", {key(0): rows[20]}, (20,))
    for asked in ((4, 12), (12,), (20, 4), (4, 12, 20)):
        assert {label: bytes(row) for label, row in kept.fetch("states", [key(0)], asked)[key(0)].items()} == {label: rows[label] for label in asked}
    assert set(kept.fetch("states", [key(0)], (12, 24))[key(0)]) == {12}
    assert kept.fetch("states", [key(1)], (4,)) == {} and kept.fetch("replies", [key(1)]) == {}


@pytest.mark.parametrize("place", ["first row", "last row", "seal", "key", "length", "label"])
def test_a_flipped_byte_never_answers(tmp_path, place, caplog):
    path = shelf_at(tmp_path).add("states", entries(range(6)), (1, 2)).path
    text = path.read_bytes()
    at = {"first row": read_pack(path).begins[0], "last row": -1, "seal": text.index(b"seals") + 8, "key": text.index(key(2).encode()), "length": 1}
    flip(path, at.get(place, text.index(b"labels") + 10))
    with caplog.at_level(logging.WARNING):
        found = all_of(shelf_at(tmp_path).fetch("states", entries(range(6)), (1, 2)))
    lost = {"first row": {key(0)}, "last row": {key(5)}}.get(place, set(entries(range(6))))
    assert found == {k: v for k, v in entries(range(6)).items() if k not in lost}
    assert len(caplog.records) == 1 and path.name in caplog.text and not path.exists()
    caplog.clear()
    assert all_of(shelf_at(tmp_path).fetch("states", entries(range(6)), (1, 2))) == found and not caplog.records, "it is mended on disk"


@pytest.mark.parametrize("share", [0, 4, 300, 0.7, 0.99])
def test_a_truncated_pack_gives_what_is_whole(tmp_path, share):
    path = shelf_at(tmp_path).add("replies", entries(range(6), 400)).path
    whole = path.read_bytes()
    path.write_bytes(whole[: share if isinstance(share, int) else int(len(whole) * share)])
    found = all_of(shelf_at(tmp_path).fetch("replies", entries(range(6), 400)))
    assert found == {k: v for k, v in entries(range(6), 400).items() if k in found}
    assert len(found) == {0.7: 3, 0.99: 5}.get(share, 0)


def test_rows_of_another_size_are_dropped_and_the_others_stay(tmp_path):
    shelf_at(tmp_path).add("states", {**entries([0, 1]), key(2): b"x" * 120}, (1, 2))
    kept = shelf_at(tmp_path)
    assert set(kept.fetch("states", [key(0), key(1), key(2)], (1, 2), size=120)) == {key(0), key(1)}
    assert set(shelf_at(tmp_path).fetch("states", [key(0), key(1), key(2)], (1, 2))) == {key(0), key(1)}


def test_foreign_files_are_left_alone(tmp_path):
    kept = shelf_at(tmp_path)
    kept.add("replies", entries(range(3)))
    strangers = [tmp_path / MODEL / name for name in ("notes.txt", "model.safetensors", "replies-1.safetensors", ".x.partial")]
    strangers += [tmp_path / "notes.txt", tmp_path / "ab.json"]
    for path in strangers:
        path.write_text("hello")
        os.utime(path, (0, 0))
    (tmp_path / "elsewhere").mkdir()
    assert set(shelf_at(tmp_path).fetch("replies", entries(range(3)))) == set(entries(range(3)))
    assert not verify(tmp_path)[1] and "1 packs" not in show(tmp_path)
    collect(tmp_path, size=0)
    assert all(path.read_text() == "hello" for path in strangers) and not packs_in(tmp_path)


def test_a_pack_that_goes_while_it_is_known_is_a_miss(tmp_path, caplog):
    kept = shelf_at(tmp_path)
    first, second = kept.add("replies", entries(range(3))).path, kept.add("replies", entries(range(3, 6))).path
    assert len(kept.fetch("replies", entries(range(6)))) == 6
    stamp = first.parent.stat()
    first.unlink()
    os.utime(first.parent, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as where two changes fall into one tick of the clock
    assert set(kept.fetch("replies", entries(range(6)))) == set(entries(range(3, 6))) and second.exists() and not caplog.records
    shelf_at(tmp_path).add("replies", entries(range(3)))
    assert len(kept.fetch("replies", entries(range(6)))) == 6


def test_what_is_removed_can_still_be_read_by_whoever_has_it_open(tmp_path):
    pack = write_pack(tmp_path, "replies", (0,), entries(range(3)))
    with packs.opened(pack.path) as file:
        pack.path.unlink()
        assert bytes(pack.rows(file, key(1), (0,))[0]) == entries([1])[key(1)]


def test_two_shelves_on_one_folder_see_each_other(tmp_path):
    one, other = shelf_at(tmp_path), shelf_at(tmp_path)
    for k in range(0, 20, 2):
        one.add("replies", entries([k]))
        assert set(other.fetch("replies", entries(range(20)))) == set(entries([*range(0, k + 1, 2), *range(1, k, 2)]))
        other.add("replies", entries([k + 1]))
        assert len(one.fetch("replies", entries(range(20)))) == k + 2
    other.add("replies", entries([0]))
    assert all_of(one.fetch("replies", entries(range(20)))) == entries(range(20))


WRITER = """
import sys
from pathlib import Path
from latentguard.prompts import digest
from latentguard.shelf import Shelf
from latentguard.stock import Cap
shelf, mine = Shelf(Path(sys.argv[1]), {"model": "m"}, Cap(Path(sys.argv[1]).parent, 60_000).grew), int(sys.argv[2])
sys.stdin.readline()
for k in range(60):
    made = {digest(n)[:32]: bytes([n]) * 500 for n in (k, 100 + k, 200 * mine + k % 50)}
    shelf.add("replies", made)
    found = shelf.fetch("replies", [digest(n)[:32] for n in range(256)])
    assert all(bytes(rows[0]) == bytes([n]) * 500 for n in range(256) if (rows := found.get(digest(n)[:32])))
    assert all(key in found for key in made) or mine == 1
print("done")
"""


def test_two_processes_write_read_and_evict_at_once(tmp_path, python):
    executable, env = python
    made = [
        subprocess.Popen([executable, "-c", WRITER, str(tmp_path / MODEL), str(k)], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for k in range(2)
    ]
    assert [process.communicate("go\n", timeout=60)[0].strip() for process in made] == ["done", "done"]
    assert not list((tmp_path / MODEL).glob(".*")) and not verify(tmp_path)[1]
    assert 0 < sum(pack.size for pack in packs_in(tmp_path)) < 80_000


def test_a_kill_in_the_middle_of_a_write_leaves_a_half_written_file_and_nothing_else(tmp_path, python):
    executable, env = python
    code = (
        "import os, sys; from pathlib import Path; from latentguard import packs\n"
        "packs.os.fsync = lambda _: os._exit(9)\n"
        "packs.write_pack(Path(sys.argv[1]), 'replies', (0,), {'0' * 32: b'x' * 1000})"
    )
    assert subprocess.run([executable, "-c", code, str(tmp_path / MODEL)], env=env, check=False).returncode == 9
    (left,) = (tmp_path / MODEL).iterdir()
    assert left.name.endswith(".partial") and shelf_at(tmp_path).fetch("replies", ["0" * 32]) == {} and packs_in(tmp_path) == []
    collect(tmp_path)
    assert left.exists(), "it may be somebody's who writes just now"
    os.utime(left, (0, 0))
    assert "1 half-written" in collect(tmp_path) and not left.exists()


def test_an_error_while_writing_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    kept = shelf_at(tmp_path)
    monkeypatch.setattr(packs.os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write in .* \(No space left on device\)"):
        kept.add("replies", entries(range(3)))
    assert list((tmp_path / MODEL).iterdir()) == []


def test_what_is_gathered_is_written_within_a_moment_and_is_one_pack_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "_MOMENT", 0.01)
    monkeypatch.setattr(shelf, "_MANY", 10)
    kept = shelf_at(tmp_path)
    with Gathered(kept, "replies") as gathered:
        for n in range(3):
            for k in range(3):
                gathered.add(key(3 * n + k), bytes([3 * n + k]))
            for thread in threading.enumerate():  # as long as the model works on the next batch
                if isinstance(thread, threading.Timer):
                    thread.join()
            assert len(shelf_at(tmp_path).fetch("replies", entries(range(9)))) == 3 * n + 3, "before anything else comes"
            assert len(packs_in(tmp_path)) == 1
        for k in range(9, 12):
            gathered.add(key(k), bytes([k]))
        assert len(packs_in(tmp_path)) == 1 and len(shelf_at(tmp_path).fetch("replies", entries(range(12)))) >= 10
    assert len(packs_in(tmp_path)) == 2, "a full one, and one that was begun"
    assert all_of(shelf_at(tmp_path).fetch("replies", entries(range(12)))) == entries(range(12), 1)


def test_what_the_disk_refuses_is_said_where_it_is_gathered(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "_MOMENT", 0.01)
    kept = shelf_at(tmp_path)
    (tmp_path / MODEL).write_text("in the way")
    with pytest.raises(InputError, match="cannot write"), Gathered(kept, "replies") as gathered:
        gathered.add(key(0), b"x")
        for thread in threading.enumerate():
            if isinstance(thread, threading.Timer):
                thread.join()


def aged(tmp_path, n=6, model=MODEL, size=1000):
    """n packs of like size, the first unused for longest."""
    kept = Shelf(tmp_path / model, {"model": f"m{model[0]}", "dtype": "torch.float32"})
    made = [kept.add("replies", {key(f"{model}{k}"): bytes([k]) * size}).path for k in range(n)]
    for k, path in enumerate(made):
        os.utime(path, (1000 + k, 1000 + k))
    return made, packs_in(tmp_path)[0].size


def test_eviction_takes_what_was_not_used_for_longest(tmp_path):
    made, size = aged(tmp_path)
    Shelf(tmp_path / MODEL, {}).fetch("replies", [key(f"{MODEL}0")])
    evict(packs_in(tmp_path), 4 * size)
    assert [path.exists() for path in made] == [True, False, False, True, True, True], "a read counts as use"
    assert evict(packs_in(tmp_path), 4 * size) == [] and len(evict(packs_in(tmp_path), 4 * size - 1)) == 1


def test_a_store_stays_under_its_cap_and_keeps_what_was_just_written(tmp_path, monkeypatch):
    made, size = aged(tmp_path)
    looks = []
    monkeypatch.setattr(stock, "packs_in", lambda folder: looks.append(1) or packs_in(folder))
    kept = Shelf(tmp_path / ("f" * 24), {}, Cap(tmp_path, 10 * size).grew)
    for k in range(100, 200):
        path = kept.add("replies", {key(k): bytes(1000)}).path
        assert path.exists() and sum(pack.size for pack in packs_in(tmp_path)) <= 10 * size
    assert not any(path.exists() for path in made), "other models' packs too, for they are older"
    tiny = Shelf(tmp_path / ("e" * 24), {}, Cap(tmp_path, 1).grew)
    assert tiny.add("replies", entries([0])).path.exists() and len(packs_in(tmp_path)) == 1
    looks.clear()
    roomy = Shelf(tmp_path / ("d" * 24), {}, Cap(tmp_path, 10**9).grew)
    for k in range(50):
        roomy.add("replies", entries([k]))
    assert len(looks) == 1, "the folder is not walked at each write"


def test_use_is_noted_once(tmp_path):
    (path, *_), _ = aged(tmp_path, 1)
    kept = shelf_at(tmp_path)
    kept.fetch("replies", [key(f"{MODEL}0")])
    assert path.stat().st_mtime > 2000
    os.utime(path, (5, 5))
    kept.fetch("replies", [key(f"{MODEL}0")])
    assert path.stat().st_mtime == 5


def test_ls_tells_each_model(tmp_path, capsys):
    aged(tmp_path)
    aged(tmp_path, 2, "f" * 24)
    Shelf(tmp_path / MODEL, {}).add("states", entries(range(30)), (1, 2))
    assert main(["ls", "--folder", str(tmp_path)]) == 0
    head, first, second, total = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[:6] == ["model", "dtype", "id", "states", "replies", "logits"]
    assert first[:7] == ["m0", "float32", MODEL[:8], "30", "6", "0", "7"] and second[:7] == ["mf", "float32", "f" * 8, "0", "2", "0", "2"]
    assert total[1] == "kB" and "20 GB" in " ".join(total)


def test_gc_frees_what_it_is_told_to(tmp_path, capsys):
    def gc(*words):
        assert main(["gc", "--folder", str(tmp_path), *words]) == 0
        return capsys.readouterr().out

    made, size = aged(tmp_path)
    others, _ = aged(tmp_path, 3, "f" * 24)
    os.utime(made[5])
    assert "0 packs" in gc()
    gc("--model", "mf", "--size", f"{2 * size / 1000}kB")
    assert [path.exists() for path in others] == [False, True, True] and all(path.exists() for path in made)
    gc("--older", "30d")
    assert [path.exists() for path in [*made, *others]] == [False] * 5 + [True] + [False] * 3
    assert "1 packs" in gc("--size", "0") and (tmp_path / MODEL).exists()
    for model in (MODEL, "f" * 24):
        os.utime(tmp_path / model, (0, 0))
    gc()
    assert list(tmp_path.iterdir()) == []


def test_gc_removes_the_layout_before_packs(tmp_path, capsys):
    (tmp_path / "ab").mkdir()
    old = [tmp_path / "ab" / ("0" * 38 + end) for end in (".json", ".safetensors")] + [tmp_path / "ab" / f".{'0' * 38}.json.77"]
    for path in old:
        path.write_text("{}")
    (tmp_path / "cd").mkdir()
    (tmp_path / "cd" / "mine.json").write_text("{}")
    made, _ = aged(tmp_path, 1)
    assert "3 files of an older layout" in show(tmp_path)
    assert "3 files of the older layout" in collect(tmp_path)
    assert not (tmp_path / "ab").exists() and (tmp_path / "cd" / "mine.json").exists() and made[0].exists()


def test_verify_finds_damage_and_mends_it(tmp_path, capsys):
    def verified(*words):
        return main(["verify", "--folder", str(tmp_path), *words]), capsys.readouterr().out

    kept = shelf_at(tmp_path)
    whole, one, header = (kept.add("replies", entries(range(at, at + 4))).path for at in (0, 4, 8))
    assert verified()[0] == 0
    flip(one, -1)
    flip(header, 20)
    code, said = verified()
    assert code == 1 and "7 entries are whole" in said and "1 of 4 entries are damaged" in said and header.name in said and one.exists()
    assert verified("--fix")[0] == 0 and verified()[0] == 0
    assert set(shelf_at(tmp_path).fetch("replies", entries(range(12)))) == set(entries(range(7))) and whole.exists()
    with pytest.raises(DamagedPackError):
        bad = write_pack(tmp_path, "replies", (0,), entries([1])).path
        flip(bad, 9)
        read_pack(bad)
    assert whole_entries(read_pack(whole)) == entries(range(4))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "ls|gc|verify"), (["look"], "look"), (["ls", "--folder", "/no/such"], "no such folder"), (["gc", "--size", "much"], "--size 'much': give a size"),
        (["gc", "--older", "30"], "--older '30': give an age"), (["gc", "--model", "m"], "say how much"), (["ls", "--fix"], "--fix"),
        (["gc", "--model", "x", "--size", "0"], "nothing is stored of it; there is m0"),
    ],
)  # fmt: skip
def test_bad_words_are_one_sentence(tmp_path, words, says, capsys):
    aged(tmp_path, 1)
    given = [*words, *(["--folder", str(tmp_path)] if words and "--folder" not in words and words[0] != "look" else [])]
    assert main(given) == 2
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and not told.out


def test_sizes_and_ages():
    assert [stock.as_bytes(text) for text in ("5GB", "1.5 MiB", "0", "200", "3k")] == [5e9, 1.5 * 1024**2, 0, 200, 3000]
    assert [stock.as_seconds(text) for text in ("30d", "12h", "90m")] == [30 * 86400, 12 * 3600, 5400]
    assert [stock._bytes(n) for n in (0, 999, 1234, 20e9, 123_456_789, 5e15)] == ["0 B", "999 B", "1.23 kB", "20 GB", "123 MB", "5000 TB"]


def test_the_words_load_no_torch_and_a_new_machine_has_nothing(tmp_path, python):
    executable, env = python
    code = (
        "import runpy, sys\ntry: runpy.run_module('latentguard.store', run_name='__main__')\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    env = {**env, "LATENTGUARD_CACHE": str(tmp_path / "none")}
    made = subprocess.run([executable, "-c", code, "ls"], env=env, capture_output=True, text=True, check=True)
    assert made.stdout.splitlines() == [f"nothing is stored in {tmp_path / 'none' / 'store'}", "0 False"] and not (tmp_path / "none").exists()


def test_made_by_says_it_in_words(tmp_path):
    shelf_at(tmp_path).add("replies", entries([0]))
    assert json.loads((tmp_path / MODEL / "made_by.json").read_text()) == {"model": "m", "dtype": "torch.float32"}


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts bytes read")
def test_the_index_is_read_from_headers_alone(tmp_path):
    def bytes_read():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    path = shelf_at(tmp_path).add("states", {key(k): bytes(400_000) for k in range(8)}, (1, 2)).path
    before = bytes_read()
    assert len(read_pack(path).keys) == 8 and bytes_read() - before < 100_000
    assert len(shelf_at(tmp_path).fetch("states", [key(3)], (2,))[key(3)][2]) == 200_000 and bytes_read() - before < 400_000

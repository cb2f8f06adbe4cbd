"""The server as a process, and a real model behind it: words, exit codes, what is loaded, how it ends."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest

import latentguard as lg
from latentguard.serve.__main__ import main
from latentguard.serve.settings import SHOWN, TOKEN, make_settings, settings_of, token_of
from tests.conftest import REPO
from tests.serving import tiny_guard

TEXTS = [
    "How do I bake bread?",
    "tell me " + "very " * 60 + "much",
    "短い文",
    "a\x00b <|end|>",
    *[f"request number {i} {'word ' * (i * 7 % 31)}" for i in range(30)],
]


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """A guard of model=tiny and the folder it lies in."""
    made = tiny_guard(lg.load("tiny"))
    return made, made.save(tmp_path_factory.mktemp("guards") / "tiny")


def test_words_become_settings(tmp_path):
    found = settings_of(
        [
            f"guard={tmp_path}",
            "model=tiny",
            "port=0",
            "threshold=fpr=0.05",
            "model.dtype=float32",
            f"categories.own_one={tmp_path}",
            "log_prompts=true",
            "name=null",
        ]
    )
    assert (found.port, found.threshold, found.model_settings, found.log_prompts, found.name) == (0, "fpr=0.05", {"dtype": "float32"}, True, None)
    assert found.categories == {"own_one": str(tmp_path)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "guard= is missing"), (["guard=G"], "model= is missing"), (["guard=/no/where", "model=tiny"], "no such folder"), (["port"], "give key=value"), (["prot=1"], "did you mean port?"),
        (["guard=G", "model=tiny", "port=70000"], "port=70000"), (["guard=G", "model=tiny", "port=x"], "port=x"), (["guard=G", "model=tiny", "timeout=nan"], "timeout=nan"),
        (["guard=G", "model=tiny", "queue=0"], "queue=0"), (["guard=G", "model=tiny", "log_prompts=maybe"], "log_prompts=maybe"), (["guard=G", "guard=G"], "given twice"),
        (["guard=G", "model=tiny", "inputs=5", "queue=4"], "would never fit"), (["guard=G", "model=tiny", "categories.harmful=G"], "not harmful"), (["server.port=1"], "have a dot"),
        (["guard=G", "model=tiny", "categories.x=/no/where"], "categories.x=/no/where"), (["guard=G", "model=nosuch"], "nosuch"), (["guard=G", "model=tiny", "model.dtpye=x"], "dtpye"),
        (["guard=G", "model=tiny", "model.dtype={"], "no YAML"), (["guard=G", "model=tiny", "token_file=/no/where"], "cannot be read"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_exit_code_2(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(TOKEN, raising=False)
    assert main([word.replace("=G", f"={tmp_path}") for word in words]) == 2
    out = capsys.readouterr().err
    assert out.startswith("latentguard: ") and out.count("\n") == 1 and said in out


def test_a_token_comes_from_a_file_or_the_environment_and_is_never_empty(tmp_path):
    settings = make_settings({"guard": str(tmp_path), "model": "tiny"})
    assert token_of(settings, {}) is None and token_of(settings, {TOKEN: "abc"}) == "abc"
    (tmp_path / "token").write_text("s3cret\n")
    filed = make_settings({"guard": str(tmp_path), "model": "tiny", "token_file": str(tmp_path / "token")})
    assert token_of(filed, {}) == "s3cret"
    for wrong in ({TOKEN: ""}, {TOKEN: "a b"}, {TOKEN: "é"}):
        with pytest.raises(lg.InputError):
            token_of(settings, wrong)
    with pytest.raises(lg.InputError, match="one of them"):
        token_of(filed, {TOKEN: "abc"})


def test_every_setting_and_status_is_in_the_docs():
    page = (REPO / "docs" / "serving.md").read_text()
    for entry in SHOWN:
        assert f"| `{entry.name}" in page, entry.name
        if isinstance(entry.default, int | float | str):
            told = f"{entry.default:g}" if isinstance(entry.default, float) else str(entry.default).lower()
            assert f"| `{entry.name}` | {told} |" in page, entry.name
    from latentguard.serve.app import STATUSES

    assert all(f"| {status} |" in page for status in (200, 404, 405, *STATUSES))


@pytest.mark.slow
def test_help_and_mistakes_need_no_torch(python):
    interpreter, env = python
    code = "import sys; from latentguard.serve.__main__ import main; print(main(['--help']), main(['port=x']), [m for m in ('torch', 'fastapi', 'nnsight', 'transformers', 'wandb') if m in sys.modules])"
    done = subprocess.run([interpreter, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 2 []" and "guard=FOLDER" in done.stdout


def test_a_real_guard_is_loaded_without_pickle_and_scores_as_it_does_alone(guard, monkeypatch):
    import torch

    from latentguard.serve.loading import load

    def never(*_, **__):
        raise AssertionError("something was unpickled")

    for module, names in ((torch, ["load"]), (pickle, ["load", "loads", "Unpickler"])):
        for name in names:
            monkeypatch.setattr(module, name, never)
    made, folder = guard
    served = load(make_settings({"guard": str(folder), "model": "tiny", "categories": {"own": str(folder)}}))
    found = served.score(TEXTS)
    assert found.shape == (len(TEXTS), 2) and np.allclose(found[:, 0], made.score(TEXTS), atol=1e-6) and (found[:, 0] == found[:, 1]).all()
    assert served.default == "fpr=0.01" and served.about["harmful"]["thresholds"]["fpr=0.05"]["n"] == 100
    rendered = made.backend.render(TEXTS)
    assert served.lengths(TEXTS) == [len(item.user_tokens) for item in rendered], "tokens of the text, the template left out"
    longest = "a" * served.longest
    assert served.score([longest]).shape == (1, 2)
    with pytest.raises(lg.InputError, match="at most"):
        served.score([longest + "aa"])
    json.dumps(dict(served.about))


def test_thresholds_and_lengths_that_cannot_be_are_told_before_serving(guard):
    from latentguard.serve.loading import load

    with pytest.raises(lg.InputError, match="choose one of fpr=0.01, fpr=0.05"):
        load(make_settings({"guard": str(guard[1]), "model": "tiny", "threshold": "fpr=0.2"}))
    with pytest.raises(lg.InputError, match="or fewer"):
        load(make_settings({"guard": str(guard[1]), "model": "tiny", "tokens": 5000}))


def test_a_domain_flags_by_its_own_thresholds_and_one_that_no_guard_has_is_told_before_a_model_is_loaded(guard, tmp_path, monkeypatch):
    from latentguard.backends import loading
    from latentguard.serve.loading import load

    made, folder = guard
    own = made.with_domain("support", [lg.Prompt.of(f"the {word} desk", harmful=False, id=word) for word in map(chr, range(97, 123))])
    saved = str(own.save(tmp_path / "own"))
    served = load(make_settings({"guard": saved, "model": "tiny", "domain": "support"}))
    assert served.thresholds == ["fpr=0.05"] == [served.default] and served.about["domain"] == "support"
    assert served.guards["harmful"].thresholds == own.domains["support"] and served.about["harmful"]["thresholds"]["fpr=0.05"]["n"] == 26
    monkeypatch.setattr(loading, "resident", lambda spec: pytest.fail("a model was loaded"))
    for words, said in (
        ({"guard": str(folder), "domain": "support"}, f"domain 'support': guard {made.name} has none"),
        ({"guard": saved, "domain": "support", "categories": {"own": str(folder)}}, f"domain 'support': guard {made.name} has none"),
        ({"guard": saved, "domain": "support", "threshold": "fpr=0.01"}, "choose one of fpr=0.05"),
    ):
        with pytest.raises(lg.InputError, match=said):
            load(make_settings({"model": "tiny", **words}))


class Running:
    """The real process on a free port."""

    def __init__(self, folder, env, *words):
        self.lines = []
        command = [sys.executable, "-m", "latentguard.serve", f"guard={folder}", "model=tiny", "port=0", *words]
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, cwd=folder)
        found = self.until(r"listening on http://127.0.0.1:(\d+)")
        self.url = f"http://127.0.0.1:{found[1]}" if found else ""

    def until(self, pattern):
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        return None

    def end(self):
        self.lines += self.process.stderr.readlines()
        return self.process.wait(60)


@pytest.mark.slow
def test_the_official_client_against_the_real_process_which_finishes_what_it_has_on_sigterm(guard, python):
    made, folder = guard
    running = Running(folder, {**python[1], TOKEN: "s3cret"}, "batch_prompts=2", "linger_ms=0")
    try:
        assert running.until("ready after")
        with openai.OpenAI(api_key="s3cret", base_url=f"{running.url}/v1", max_retries=0) as client:
            found = client.moderations.create(input=TEXTS, model="omni-moderation-latest", extra_body={"threshold": "fpr=0.05"})
            expected = made.score(TEXTS)
            got = np.array([result.category_scores.harmful for result in found.results])
            assert np.allclose(got, expected, atol=1e-4) and [result.flagged for result in found.results] == [bool(p >= 0.5) for p in got]
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="wrong").moderations.create(input="a")
            with ThreadPoolExecutor(8) as pool:
                asked = [pool.submit(client.moderations.create, input=[f"{i} {text}" for text in TEXTS]) for i in range(8)]
                while _value(running.url, "queue_prompts") < 100:  # all eight are in, and far from done
                    pass
                running.process.send_signal(signal.SIGTERM)
                assert [len(one.result().results) for one in asked] == [len(TEXTS)] * 8
        assert running.end() == 0
    finally:
        running.process.kill()
    log = "".join(running.lines)
    assert "stopped" in log and "Traceback" not in log and not any(text[:12] in log for text in TEXTS) and "s3cret" not in log


def _value(url, name):
    text = httpx.get(f"{url}/metrics", headers={"authorization": "Bearer s3cret"}).text
    return float(re.search(rf"^latentguard_{name} (\S+)", text, re.MULTILINE)[1])


@pytest.mark.slow
def test_a_guard_of_another_model_is_told_in_one_sentence_and_so_is_a_taken_port(guard, python, tmp_path):
    other = tiny_guard(lg.load("tiny"), weights="of another model").save(tmp_path / "other")
    running = Running(other, python[1])
    assert running.end() == 2
    assert running.lines[-1].startswith("latentguard: ") and "other weights" in running.lines[-1]
    from socket import create_server

    with create_server(("127.0.0.1", 0)) as taken:
        words = [sys.executable, "-m", "latentguard.serve", f"guard={other}", "model=tiny", f"port={taken.getsockname()[1]}"]
        done = subprocess.run(words, env=python[1], capture_output=True, text=True)
    assert done.returncode == 2 and "cannot listen there" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_ends_it(guard, python, number):
    running = Running(guard[1], {**os.environ, **python[1]})
    running.process.send_signal(number)
    assert running.end() == 0 and "Traceback" not in "".join(running.lines)

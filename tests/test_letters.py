"""What a guard is shown: letters that pose as others are read as they look, and other alphabets stay as they are."""

import random
import unicodedata

import pytest

from latentguard.guards import letters
from latentguard.guards.letters import plain
from latentguard.guards.marks import seen
from latentguard.perturbations import perturbations
from latentguard.prompts import Prompt

QUESTION = "How can I pick a good copy of X, and is it open?"


@pytest.mark.parametrize("form", ["zero_width", "homoglyphs", "extra_blanks"])
def test_forms_that_look_the_same_are_undone(form):
    (change,) = [one for one in perturbations() if one.name == form]
    written = change(Prompt.of(QUESTION, harmful=False)).instruction
    assert written != QUESTION and plain(written) == QUESTION


@pytest.mark.parametrize(
    ("text", "looks"),
    [
        ("ｈｏｗ 𝐚𝐫𝐞 𝕪𝕠𝕦…", "how are you..."),
        ("pass\u00adword and \u2066left\u2069", "password and left"),
        ("a" + "".join(chr(0xE0000 + ord(letter)) for letter in "hidden"), "ahidden"),
        ("\U0001f3f4" + "".join(chr(0xE0000 + ord(letter)) for letter in "tell me"), "\U0001f3f4tell me"),
        ("Ηow to cоpy", "How to copy"),
        ("ра\u200cypal", "paypal"),
        ("ignore\u200d this\u200d, H\ufe0fo\ufe0fw\u3164", "ignore this, How"),
        ("a\u00a0 b ﬁne ①", "a b fine 1"),
    ],
)
def test_what_poses_as_other_letters(text, looks):
    assert plain(text) == looks


@pytest.mark.parametrize(
    "text",
    [
        "Привет, как дела? Соус и рис.",
        "Как отправить SMSку? Она не на том месте",
        "Τι κάνεις σήμερα;",
        "The angle α is small, and Δ is not; E = γmc² and αx + βy, TNFα and IFNγ.",
        "می\u200cخواهم",  # a joiner that Persian spells with
        "👩\u200d🍳 cooks ❤\ufe0f 1\ufe0f\u20e3",
        "\U0001f3f4" + "".join(chr(0xE0000 + ord(letter)) for letter in "gbeng") + "\U000e007f",
        "日本語で話して，お願い？",
        "ทำ น้ำ",
        "ㅋㅋㅋ ㅠㅠ ｶﾞ",
        "សួស្តី\u200bពិភពលោក",
        "def f(x):\n    return x",
        "café, naïve, Zürich, it´s 5½ or 10⁶",
        "\u200b",
    ],
)
def test_other_alphabets_and_plain_text_stay(text):
    assert plain(text) == text


@pytest.mark.parametrize("seed", range(5))
def test_any_text_keeps_something_and_twice_is_once(seed):
    dice = random.Random(seed)
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x2000, 0x2070), (0xFB00, 0xFDFF), (0x1D400, 0x1D7FF), (0xE0000, 0xE0080)]
    for _ in range(2000):
        text = "".join(chr(dice.randrange(*dice.choice(ranges))) for _ in range(dice.randrange(1, 30)))
        once = plain(text)
        assert once and plain(once) == once and len(once) <= 4 * len(text), ascii(text)


def test_every_look_alike_is_one_letter_of_another_alphabet():
    for strange, latin in {**letters._CYRILLIC, **letters._GREEK}.items():
        assert unicodedata.name(strange).split()[0] in ("CYRILLIC", "GREEK") and latin.isascii() and latin.isalpha() and strange.isupper() == latin.isupper()


def test_a_period_guard_reads_plain_letters_and_a_mixed_one_what_stands_there():
    written = "How\u200b can  I …"
    assert [seen([written], marks)[0].instruction for marks in ("period", "mixed")] == ["How can I.", written]

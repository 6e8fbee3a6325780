"""Places in texts: folded forms and the way back, boundaries of words, where a mention is, the words around it."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mimic_el.spans_mimic import around_mention, checked_place, fold, folded_name, place_of, plain_name


@given(st.text(max_size=40))
@example("\x85\xad")
@settings(max_examples=300, deadline=None)
def test_every_folded_character_comes_from_a_place_in_the_text(text: str):
    """In order, and what it was made of folds to something that has it: NFKC and case folding, done by Python."""
    folded = fold(text)
    assert len(folded.text) == len(folded.starts) == len(folded.ends)
    assert np.all(folded.starts < folded.ends)
    assert np.all(np.diff(folded.starts) >= 0)
    for character, start, end in zip(folded.text, folded.starts, folded.ends, strict=True):
        part = text[start:end]
        whole = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", part).casefold())
        # White space stays so beside what is not seen, such as a soft hyphen.
        blank = "".join(c for c in part if unicodedata.category(c) != "Cf").isspace()
        assert character in whole or part in "‘’ʼ‛“”„‐‑‒–—−" or (character == " " and blank) or "-" in character


@given(st.text(alphabet="aZß é\u0301ﬁ北ア서\u00ad\n -", max_size=30))
@settings(max_examples=200, deadline=None)
def test_a_name_folds_as_it_does_in_a_text(name: str):
    assert folded_name(name) == fold(name).text.strip(" ")
    assert folded_name(folded_name(name)) == folded_name(name)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Straße", "STRASSE"),
        ("caf\u00e9", "CAFE\u0301"),
        ("ﬁnance", "Finance"),
        ("Ｏｒａｎｇｅ", "orange"),
        ("New\u00a0York", "new \n york"),
        ("O’Brien", "O'BRIEN"),
        ("co\u00adop", "coop"),
        ("한국", unicodedata.normalize("NFD", "한국")),
    ],
)
def test_the_same_name(one: str, other: str):
    assert folded_name(one) == folded_name(other)


def test_a_name_as_it_is_written():
    assert plain_name(" New \n York ") == "New York"
    assert plain_name("CAFE\u0301") == "CAFÉ"
    assert plain_name("orange") != plain_name("Orange")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Orange opened.", ["Orange", "opened", "."]),
        ("pine-apple", ["pine", "-", "apple"]),
        ("北京大学", ["北", "京", "大", "学"]),
        ("オレンジの店", ["オレンジ", "の", "店"]),
        ("cafe\u0301!", ["cafe\u0301", "!"]),
        ("ab🍊c", ["ab", "🍊", "c"]),
    ],
)
def test_boundaries(text: str, words: list[str]):
    folded = fold(text)
    begins, stops = folded.boundaries
    found = [text[folded.starts[b] : folded.ends[e - 1]] for b, e in zip(begins, stops, strict=True)]
    assert found == words


def test_a_korean_name_may_have_an_ending():
    begins, stops = fold("서울은").boundaries
    assert begins.tolist() == [0]
    assert stops.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("mention", "text", "place"),
    [
        ("Al", "Also Al", (5, 7)),
        ("Al", "Also", (0, 2)),
        ("Orange", "Orange and Orange", (0, 6)),
        ("orange", "🍊 ORANGE", (2, 8)),
        ("Straße", "in der STRASSE", (7, 14)),
        ("Orange", "nothing", None),
        ("", "x", None),
        ("x", "", None),
    ],
)
def test_where_a_mention_is(mention: str, text: str, place: tuple[int, int] | None):
    assert place_of(mention, text) == place


def test_places_that_are_given():
    text = "an Orange"
    assert checked_place("Orange", text, 3, None) == (3, 9)
    assert checked_place("Orange", text, np.int64(3), np.int32(9)) == (3, 9)
    assert checked_place("Orange", text, 3.0, 9.0) == (3, 9)
    assert checked_place("Orange", text, float("nan"), None) == (3, 9)
    for start, end, message in [
        (3, 3, "has no characters"),
        (9, 3, "has no characters"),
        (-1, 3, "is not in the text, which has 9 characters"),
        (3, 10, "is not in the text"),
        (3.5, 9, "`start` must be an integer"),
        (True, 9, "`start` must be an integer"),
        ("3", 9, "`start` must be an integer"),
        (None, 9, "there is no `start`"),
    ]:
        with pytest.raises(ValueError, match=message):
            checked_place("Orange", text, start, end)


# --- The words around a mention


def words_in(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


@given(before=st.integers(0, 30), after=st.integers(0, 30), room=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_as_many_words_as_fit_in_balance(before: int, after: int, room: int):
    """A word is a token here, so that what is to be taken is a sum worked by hand."""
    words = [f"b{i}" for i in range(before)] + ["Orange"] + [f"a{i}" for i in range(after)]
    text = " ".join(words)
    start = text.index("Orange")
    first, last = around_mention(text, start, start + 6, room, words_in)
    part = text[first:last].split()
    left = part.index("Orange")
    right = len(part) - left - 1
    assert part == words[before - left : before + 1 + right]
    spare = room - 1
    assert left + right == min(spare, before + after)
    assert left == min(before, max(-(-spare // 2), spare - after)), "half of it, and what the other side leaves"


def test_words_stay_whole():
    text = "an extraordinarily long word before Orange and after it"
    start = text.index("Orange")
    first, last = around_mention(text, start, start + 6, 18, lambda texts: [len(t) for t in texts])
    assert text[first:last] == "before Orange and", "neither 'word' nor 'after' fits in the 3 that are left"


def test_scripts_without_spaces_are_cut_anywhere():
    text = "甲乙丙丁戊己庚辛壬癸"
    first, last = around_mention(text, 5, 6, 5, lambda texts: [len(t) for t in texts])
    assert text[first:last] == "丁戊己庚辛"

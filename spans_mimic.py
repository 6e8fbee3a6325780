"""Places in texts: how names are compared, where words begin and end, and the words around a mention.

Offsets are characters of the original text, even if Unicode normalization changes its length. Knows strings only: no
models, no indexes.
"""

from __future__ import annotations

import functools
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# What a character is, for where words begin and end.
SPACE, PUNCTUATION, LETTER, FREE, KATAKANA, HANGUL = range(6)
_MARK = 6  # belongs to the character before it

_QUOTES_AND_DASHES = str.maketrans(
    {**dict.fromkeys("‘’ʼ‛", "'"), **dict.fromkeys("“”„", '"'), **dict.fromkeys("‐‑‒–—−", "-")}
)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_ASCII_SPACES = (*range(9, 14), *range(28, 33))
# Scripts whose words stand side by side: ideographs, kana but katakana, and those of South-East Asia.
_FREE_RANGES = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3005, 0x3007),
    (0x3040, 0x309F),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
_KATAKANA_RANGES = ((0x30A1, 0x30FF), (0x31F0, 0x31FF))
_HANGUL_RANGES = ((0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7FF))
_JAMO_AFTER_THE_FIRST = (0x1160, 0x11FF)


@dataclass
class Folded:
    """A text in the form in which names are compared: NFKC, without case, one space for any white space.

    Args:
        text: that form.
        starts, ends (`numpy.ndarray`, int64): for each of its characters, where what it was made of begins and ends
            in the text that was given.
    """

    text: str
    starts: np.ndarray
    ends: np.ndarray

    @functools.cached_property
    def codes(self) -> np.ndarray:
        """The characters as numbers, uint32."""
        return np.frombuffer(self.text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)

    @functools.cached_property
    def boundaries(self) -> tuple[np.ndarray, np.ndarray]:
        """Where a name may begin, and where one may end (behind its last character): sorted positions in `text`."""
        return boundaries_of(self.codes)


def fold(text: str) -> Folded:
    """A text in the form in which names are compared, and the way back to the text."""
    if text.isascii():
        codes = np.frombuffer(text.lower().encode("utf-32-le"), dtype=np.uint32)
        starts = np.arange(len(codes))
        return _with_single_spaces(codes, starts, starts + 1)
    pieces: list[str] = []
    starts_of: list[np.ndarray] = []
    ends_of: list[np.ndarray] = []

    def plain(start: int, stop: int) -> None:
        if start < stop:
            pieces.append(text[start:stop].lower())
            starts_of.append(np.arange(start, stop))
            ends_of.append(np.arange(start + 1, stop + 1))

    done = 0
    for run in _NOT_ASCII.finditer(text):
        start = run.start()
        if start > done and _is_continued(text[start]):
            start -= 1  # a letter and its accent
        plain(done, start)
        clusters: list[str] = []
        begins: list[int] = []
        stops: list[int] = []
        while start < run.end():
            stop = start + 1
            while stop < run.end() and _is_continued(text[stop]):
                stop += 1
            made = _folded_cluster(text[start:stop])
            clusters.append(made)
            begins += [start] * len(made)
            stops += [stop] * len(made)
            start = stop
        pieces.append("".join(clusters))
        starts_of.append(np.array(begins, dtype=np.int64))
        ends_of.append(np.array(stops, dtype=np.int64))
        done = run.end()
    plain(done, len(text))
    codes = np.frombuffer("".join(pieces).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return _with_single_spaces(codes, np.concatenate(starts_of), np.concatenate(ends_of))


def folded_name(name: str) -> str:
    """A name in the form in which names are compared, without white space around it."""
    if name.isascii():
        return " ".join(name.lower().split())
    return fold(name).text.strip(" ")


def plain_name(name: str) -> str:
    """A name in NFKC and with single spaces, its case kept."""
    if name.isascii():
        return " ".join(name.split())
    return " ".join(unicodedata.normalize("NFKC", _seen(name)).translate(_QUOTES_AND_DASHES).split())


def _is_continued(character: str) -> bool:
    """Whether a character is one with that before it: an accent, a vowel sign, the rest of a Korean syllable; or not
    seen, such as a soft hyphen."""
    code = ord(character)
    if code < 0x80:
        return False
    category = unicodedata.category(character)
    return category[0] == "M" or category == "Cf" or _JAMO_AFTER_THE_FIRST[0] <= code <= _JAMO_AFTER_THE_FIRST[1]


@functools.lru_cache(maxsize=1 << 16)
def _folded_cluster(cluster: str) -> str:
    made = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", _seen(cluster)).casefold())
    return "".join(" " if c.isspace() else c for c in _seen(made.translate(_QUOTES_AND_DASHES)))


def _seen(text: str) -> str:
    """Without soft hyphens, joiners and direction marks."""
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


def _with_single_spaces(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> Folded:
    spaces = np.isin(codes, _ASCII_SPACES) if len(codes) else np.zeros(0, dtype=bool)
    kept = np.ones(len(codes), dtype=bool)
    kept[1:] = ~(spaces[1:] & spaces[:-1])
    codes = np.where(spaces, np.uint32(32), codes)[kept]
    text = codes.astype(np.uint32).tobytes().decode("utf-32-le", "surrogatepass")
    return Folded(text, starts[kept], ends[kept])


# --- Where words begin and end ---------------------------------------------------------------------------------------


def boundaries_of(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a name may begin, and where one may end (behind its last character), of characters of a folded text."""
    kinds = _kinds(codes)
    if not len(kinds):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    marks = kinds == _MARK
    if marks.any():
        # A mark is of the kind of what it stands on.
        base = np.maximum.accumulate(np.where(marks, 0, np.arange(len(kinds))))
        kinds = kinds[base]
        kinds[kinds == _MARK] = LETTER
    before, after = kinds[:-1], kinds[1:]
    apart = (before != after) | (before == PUNCTUATION) | (before == FREE)
    apart &= ~marks[1:]
    begins = np.concatenate([[True], apart]) & (kinds != SPACE)
    # What follows a Korean name in its word is its ending.
    stops = np.concatenate([apart | ((before == HANGUL) & (after == HANGUL) & ~marks[1:]), [True]]) & (kinds != SPACE)
    return begins.nonzero()[0], stops.nonzero()[0] + 1


def _kinds(codes: np.ndarray) -> np.ndarray:
    kinds = _ASCII_KINDS[np.minimum(codes, 127)]
    beyond = codes > 127
    if beyond.any():
        found, places = np.unique(codes[beyond], return_inverse=True)
        kinds[beyond] = np.array([_kind(int(code)) for code in found], dtype=np.int8)[places]
    return kinds


@functools.lru_cache(maxsize=1 << 16)
def _kind(code: int) -> int:
    character = chr(code)
    category = unicodedata.category(character)
    if category[0] == "M":
        return _MARK
    if character.isspace():
        return SPACE
    if category[0] not in "LN":
        return PUNCTUATION
    for kind, ranges in ((FREE, _FREE_RANGES), (KATAKANA, _KATAKANA_RANGES), (HANGUL, _HANGUL_RANGES)):
        if any(first <= code <= last for first, last in ranges):
            return kind
    return LETTER


_ASCII_KINDS = np.array(
    [SPACE if chr(c).isspace() else LETTER if chr(c).isalnum() else PUNCTUATION for c in range(128)], dtype=np.int8
)


# --- Where a mention is -----------------------------------------------------------------------------------------------


def place_of(mention: str, text: str) -> tuple[int, int] | None:
    """Where a mention occurs in a text: the first place at which it is whole words, else the first; as it is written,
    else in the form in which names are compared. `None` where it does not occur."""
    if not mention or not text:
        return None
    start = first = text.find(mention)
    while start >= 0:
        stop = start + len(mention)
        if not (_within_word(text, start) or _within_word(text, stop)):
            return start, stop
        start = text.find(mention, start + 1)
    if first >= 0:
        return first, first + len(mention)
    name, folded = folded_name(mention), fold(text)
    place = folded.text.find(name) if name else -1
    if place < 0:
        return None
    return int(folded.starts[place]), int(folded.ends[place + len(name) - 1])


def checked_place(mention: str, text: str, start: Any, end: Any) -> tuple[int, int] | None:
    """Where a mention is in a text: as it was given, or else where it occurs.

    Args:
        mention, text: the mention and its text.
        start, end: characters of the text, the end behind the last; `None` or NaN where they are not known. Without
            `end` the mention ends as many characters behind its start as it has.

    Returns:
        The place; `None` where it is not known and the mention does not occur.

    Raises:
        ValueError: if they are not integers, or not a place in the text.
    """
    known_start, known_end = as_offset("start", start), as_offset("end", end)
    if known_start is None:
        if known_end is not None:
            raise ValueError(f"`end` is {known_end}, but there is no `start`: give both, or none.")
        return place_of(mention, text)
    stop = known_start + len(mention) if known_end is None else known_end
    check_span(known_start, stop, text)
    return known_start, stop


def check_span(start: int, end: int, text: str) -> None:
    """Raises a `ValueError` for what is not a place in a text."""
    if start >= end:
        raise ValueError(f"The span from {start} to {end} has no characters: `end` must be more than `start`.")
    if start < 0 or end > len(text):
        raise ValueError(f"The span from {start} to {end} is not in the text, which has {len(text):,} characters.")


def as_offset(name: str, value: Any) -> int | None:
    """A place in a text as an integer; `None` where there is none. A whole float, as pandas makes of an integer in a
    column with gaps, is taken.

    Raises:
        ValueError: if it is not a whole number.
    """
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return None
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return int(value)
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise ValueError(f"`{name}` must be an integer, a number of characters, got {value!r}.")
    return operator.index(value)


def _within_word(text: str, place: int) -> bool:
    """Whether a place is inside a word."""
    return 0 < place < len(text) and text[place - 1].isalnum() and text[place].isalnum()


# --- What is around a mention -----------------------------------------------------------------------------------------

# More characters than the tokens of a word have, in any text that is one.
CHARACTERS_A_TOKEN = 32
_UNITS = re.compile(
    "[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in (*_FREE_RANGES, *_KATAKANA_RANGES)) + r"]|"
    r"[^\s" + "".join(f"{chr(first)}-{chr(last)}" for first, last in (*_FREE_RANGES, *_KATAKANA_RANGES)) + "]+"
)

# The numbers of tokens of some texts.
TokenCounts = Callable[[Sequence[str]], list[int]]


def around_mention(text: str, start: int, end: int, tokens: int, counts: TokenCounts) -> tuple[int, int]:
    """The part of a text around a mention that fits in some tokens: whole words, left and right in balance.

    Args:
        text: the text.
        start, end: where the mention is in it.
        tokens: how many tokens the part may have, the mention's own among them.
        counts: tells how many tokens each of some texts has.

    Returns:
        Where the part begins and ends. It holds the mention, even where that alone does not fit.
    """
    reach = max(tokens, 1) * CHARACTERS_A_TOKEN
    left = [(m.start(), m.end()) for m in _UNITS.finditer(text, max(0, start - reach), start)][::-1][:tokens]
    right = [(m.start(), m.end()) for m in _UNITS.finditer(text, end, min(len(text), end + reach))][: max(tokens, 0)]
    if left and left[-1][0] == start - reach and _within_word(text, start - reach):
        left.pop()  # cut by our reach, and so no whole word
    if right and right[-1][1] == end + reach and _within_word(text, end + reach):
        right.pop()
    sizes = counts([text[start:end], *(text[a:b] for a, b in left), *(text[a:b] for a, b in right)])
    sides = {"left": sizes[1 : 1 + len(left)], "right": sizes[1 + len(left) :]}
    taken, used = {"left": 0, "right": 0}, {"left": 0, "right": 0}
    room = tokens - sizes[0]
    while True:
        fitting = [
            side for side in ("left", "right") if taken[side] < len(sides[side]) and sides[side][taken[side]] <= room
        ]
        if not fitting:
            break
        side = min(fitting, key=used.__getitem__)
        size = sides[side][taken[side]]
        taken[side], used[side], room = taken[side] + 1, used[side] + size, room - size
    first = left[taken["left"] - 1][0] if taken["left"] else start
    last = right[taken["right"] - 1][1] if taken["right"] else end
    return first, last


__all__ = [
    "CHARACTERS_A_TOKEN",
    "Folded",
    "around_mention",
    "as_offset",
    "boundaries_of",
    "check_span",
    "checked_place",
    "fold",
    "folded_name",
    "place_of",
    "plain_name",
]

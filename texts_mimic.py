"""Texts from outside: whether they are valid, how much of them is read, and how a message shows them."""

from __future__ import annotations

import re
from typing import Any

_LEAST_CHARACTERS = 4096
_CHARACTERS_PER_TOKEN = 32
_SPARE_TOKENS = 64
# White space for every library: Python's own notion has some control characters besides.
_SPACES = " \t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_SPACE = re.compile(f"[{_SPACES}]+")
# What is not shown as a character: it moves the cursor of a terminal, or turns the order of the characters around it.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shortened(text: str, length: int = 200) -> str:
    """A text as a message shows it: what is longer is cut, and its length said."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text):,} characters)"


def is_unicode(text: str) -> bool:
    """Whether a text can be written in UTF-8: it has no half of a surrogate pair, such as of an emoji cut in two."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unicode(text: str, what: str, where: str = "") -> None:
    """Raises a `ValueError` that names what is not a valid text, and where."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} is not valid Unicode: at character {error.start}{where} stands {text[error.start]!a}, half of a "
            "character, as a text that was cut in the middle of an emoji has. Mend it, or drop it with "
            'text.encode("utf-8", "ignore").decode().'
        ) from error


def needed_text(tokenizer: Any, text: str, max_length: int) -> str:
    """As much of a text as its first `max_length` tokens can depend on; a text of usual length as it is.

    Tokenizers read a text to its end before they cut it, and a text of 10 MB takes seconds and gigabytes. A word never
    changes the tokens of the words before it, so a cut between words is safe. Within a word (digits, a script without
    spaces, one letter a million times) merging works outwards from each letter: the cut lies so many tokens behind the
    last one needed that it does not reach it. A tokenizer that takes all white space for one space is given one.
    """
    length = max(_LEAST_CHARACTERS, _CHARACTERS_PER_TOKEN * max_length)
    if len(text) <= length or getattr(tokenizer, "truncation_side", "right") != "right":
        return text
    if _tokens(tokenizer, f"a{_SPACES}b") == _tokens(tokenizer, "a b"):
        text = _SPACE.sub(" ", text)
    while length < len(text):
        space = max(text.rfind(mark, length // 2, length) for mark in (" ", "\n"))
        piece = text[: space if space > 0 else length]
        if len(_tokens(tokenizer, piece)) >= max_length + _SPARE_TOKENS:
            return piece
        length *= 4  # what the tokenizer leaves out
    return text


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


__all__ = ["CONTROLS", "check_unicode", "is_unicode", "needed_text", "shortened"]

"""Makes text from data harmless in the Markdown of a card: it is never markup, a link or a control character.

All cards (of a model, an index or a data set) use this file for texts from elsewhere. Knows nothing of what cards say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

# How many characters of a text are shown unless a place has its own number, and how many as many are looked at for it;
# how many items of a list.
SHOWN, _READ, _LISTED = 300, 16, 50
# After this, which nobody sees, a bare address or e-mail address is not made a link of.
_WORD_JOINER = "\u2060"


def plain_line(text: Any, limit: int = SHOWN) -> str:
    """Text as one line of printable characters, cut at `limit` characters."""
    text = str(text)
    some = text[: _READ * limit]  # of a text of megabytes no more is looked at
    line = " ".join("".join(character if character.isprintable() else " " for character in some).split())
    return line if len(line) <= limit and len(some) == len(text) else line[: limit - 1] + "…"


def metadata_text(text: Any, limit: int = SHOWN) -> str:
    """Text as a value of a card's metadata: what YAML and UTF-8 can hold of it, cut at `limit` characters."""
    some = str(text)[:limit]
    return "".join(character if character.isprintable() or character in "\n\t" else " " for character in some)


def escaped(text: Any, limit: int = SHOWN) -> str:
    """Text as a line of Markdown that shows it as it is, also in a heading or the cell of a table, cut at `limit`
    characters."""
    line = plain_line(text, limit).replace("&", "&amp;").replace("<", "&lt;")
    line = re.sub(r"([\\`*_{}\[\]()#|!~>$])", r"\\\1", line)
    line = re.sub(r"^(\d*)([-+.])", r"\1\\\2", line)  # no list
    return re.sub(r"(?i):(?=//)|www(?=\.)|mailto:|xmpp:|(?=@)", rf"\g<0>{_WORD_JOINER}", line)


def listed(texts: Iterable[Any], limit: int = _LISTED) -> str:
    """Texts that are Markdown already, of which some are listed and the others counted."""
    every = list(texts)
    return ", ".join(every[:limit]) + (f" and {len(every) - limit:,} more" if len(every) > limit else "")


def code(text: Any, limit: int = SHOWN) -> str:
    """Text as code in a line: between more backticks than it has together."""
    line = plain_line(text, limit).replace("|", "\u01c0")  # a bar would end the cell of a table, even in code
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{space}{line}{space}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Lines of code, between more backticks than any of them begins with."""
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], right: bool = False) -> str:
    """A table of cells that are Markdown already.

    Args:
        head: the names of the columns.
        rows: of strings and integers, which get commas.
        right: whether all columns but the first stand to the right; else those of integers alone do.
    """
    lines = [list(row) for row in rows]
    numbers = [bool(lines) and all(isinstance(row[place], int) for row in lines) for place in range(len(head))]
    numbers = [number or (right and place > 0) for place, number in enumerate(numbers)]
    cells = [[f"{value:,}" if isinstance(value, int) else str(value) for value in row] for row in lines]
    rule = ["---:" if number else "---" for number in numbers]
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(head), rule, *cells])


__all__ = ["SHOWN", "code", "code_block", "escaped", "listed", "metadata_text", "plain_line", "table"]

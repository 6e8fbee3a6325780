"""Text of data in a card's Markdown, as a Markdown reader shows it."""

from __future__ import annotations

import html
import re

import pytest

from mimic_el.markdown_mimic import code, code_block, escaped, table

HOSTILE = [
    "plain words, 7-Eleven and (brackets)",
    "# heading",
    "- item",
    "1. item",
    "+ item",
    "> quote",
    "a | b",
    "[link](https://x.org)",
    "![image](x.png)",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt;",
    "*a* _b_ ~~c~~ `d` $e$",
    "a\\",
    "https://x.org and www.x.org, a@b.org, mailto:a",
    "---\ntitle: x\n---",
    "\x1b[2J\u202eabc",
]


def shown(markdown: str) -> str:
    """What a reader of Markdown shows of text without markup; fails where there is some."""
    plain = re.sub(r"\\([!-/:-@\[-`{-~])", lambda match: f"&#{ord(match[1])};", markdown)
    assert not re.search(r"[`*_\[\]|<>#~$\\]", plain.replace("&#", "&")), plain
    assert not re.match(r"[-+]|\d+[.)]", plain)
    return html.unescape(plain).replace("\u2060", "")


@pytest.mark.parametrize("text", HOSTILE)
def test_escaped_text_is_shown_as_it_is(text: str) -> None:
    printable = "".join(character if character.isprintable() else " " for character in text)
    assert shown(escaped(text)) == " ".join(printable.split())
    assert not re.search(r"(?i)https?://|www\.|\w@|mailto:\w", escaped(text))


def test_long_text_is_cut() -> None:
    assert escaped("a" * 50, 10) == "a" * 9 + "…"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", "`a`"), ("`a`", "`` `a` ``"), ("a``b", "```a``b```"), ("a\nb", "`a b`"), ("a|b", "`aǀb`"), ("", "`  `")],
)
def test_code(text: str, expected: str) -> None:
    assert code(text) == expected


def test_code_block_cannot_be_left() -> None:
    block = code_block("a\n````\n# heading", "python")
    assert block == "`````python\na\n````\n# heading\n`````"


def test_table() -> None:
    assert table(["", "n", "w"], [["a", 1000, "x"], ["b", 2, 3]]) == (
        "|  | n | w |\n| --- | ---: | --- |\n| a | 1,000 | x |\n| b | 2 | 3 |"
    )

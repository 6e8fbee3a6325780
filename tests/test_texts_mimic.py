"""Long texts are cut before they are tokenized, to the same tokens; what is not a text is named."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_processor
from tiny_clip import tiny_model, tiny_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from mimic_el import EntityIndex, MentionEntityCollator
from mimic_el.texts_mimic import check_unicode, is_unicode, needed_text, shortened

LONG = {
    "digits": "7" * 60_000,
    "one word": "x" * 60_000,
    "no spaces": "中文" * 30_000,
    "words": "an orange shop " * 5_000,
    "spaces first": " " * 60_000 + "orange shop " * 100,
    "spaces between": "orange" + " \t\n" * 30_000 + "shop",
    "spaces of every kind": "".join(f"orange{chr(space)}" for space in range(0x3001) if chr(space).isspace()) * 1000,
    "composed and not": "e\u0301 \u1f82 \uac01 \u1100\u1161\u11a8" * 5_000,
    "only marks": "\u0301" * 60_000,
    "a word at the cut": "a" * 4090 + " orange shop" * 5_000,
    "short": "orange",
    "nothing": "",
}


def merging_tokenizer(seed: int, letters: str = "ab", merges: int = 60) -> CLIPTokenizer:
    """CLIP's tokenizer with random merges of few letters: words where every pair can merge, and every order matters."""
    draw = random.Random(seed)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{char}</w>" for char in alphabet)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    made: list[Any] = []
    while len(made) < merges:
        left = draw.choice([piece for piece in pieces if not piece.endswith("</w>")])
        right = draw.choice(pieces)
        if (left, right) not in made and left + right not in tokens and len(left + right) < 14:
            made.append((left, right))
            tokens.append(left + right)
            pieces.append(left + right)
    special = ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate([*tokens, *special])}, merges=made)


@pytest.mark.parametrize("kind", LONG)
def test_the_part_that_is_read_gives_the_same_tokens(kind: str) -> None:
    tokenizer, text = tiny_tokenizer(), LONG[kind]
    piece = needed_text(tokenizer, text, 40)
    options = {"padding": "max_length", "truncation": True, "max_length": 40}
    assert tokenizer(piece, **options) == tokenizer(text, **options)
    if kind not in ("short", "nothing"):
        assert len(piece) < len(text)
        assert len(piece) <= 4096


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.text("ab", min_size=1, max_size=12), st.integers(1, 40))
def test_a_cut_within_a_word_does_not_reach_the_tokens_needed(seed: int, period: str, length: int) -> None:
    """Of words of two letters, periodic (where a merge at the end could change the next one, and so on) and random."""
    tokenizer = merging_tokenizer(seed % 7)
    draw = random.Random(seed)
    for text in (period * 1500, "".join(draw.choice("ab") for _ in range(9000))):
        piece = needed_text(tokenizer, text, length)
        whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert len(whole) <= length or len(piece) <= len(text)
        assert tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"][:length] == whole[:length]


def test_how_much_the_tokenizer_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = tiny_processor(tiny_model())
    given: list[int] = []
    call = type(processor.tokenizer).__call__

    def counting(self: object, text: object, *arguments: object, **options: object) -> object:
        given.extend(len(item) for item in (text if isinstance(text, list) else [text]))  # type: ignore[arg-type]
        return call(self, text, *arguments, **options)

    monkeypatch.setattr(type(processor.tokenizer), "__call__", counting)
    long = "7" * 10**6
    processor.process_mentions([long], [long])
    processor.process_entities(["a"], [long])
    processor(text=long)
    assert sum(given) < 40_000
    # Where it is not to be cut, nothing is.
    given.clear()
    processor(text="7" * 5000, truncation=False, padding=False)
    assert given == [5000]


def test_half_characters_are_named_wherever_they_come_from() -> None:
    model = tiny_model()
    processor = tiny_processor(model)
    half = "a cut emoji \ud83d"
    message = "not valid Unicode: at character 12"
    for call in (
        lambda: processor.process_mentions(["Orange", "a"], ["b", half]),
        lambda: processor.process_mentions(half, "b"),
        lambda: processor.process_entities([half], ["b"]),
        lambda: processor(text=[half]),
        lambda: EntityIndex.build(model, processor, [{"id": "a", "name": half}], show_progress=False),
        lambda: EntityIndex.build(model, processor, [{"id": half}], show_progress=False),
        lambda: EntityIndex.build(model, processor, [{"id": "a", "aliases": ["b", half]}], show_progress=False),
        lambda: EntityIndex.build(model, processor, [{"id": "a", "other": half}], show_progress=False),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match=r"`texts\[1\]`"):
        processor.process_mentions(["Orange", "a"], ["b", half])
    index = EntityIndex.build(model, processor, [{"id": "a", "name": "b"}], show_progress=False)
    assert half not in index
    assert index.find(half) == []
    assert index.find_mentions(half) == []
    with pytest.raises(KeyError):
        index.entity(half)
    with pytest.raises(ValueError, match=f"`text` of a mention is {message}"):
        index.link(model, processor, [{"mention": "a", "text": half}])
    entities = [{"id": "a", "name": "b", "description": "", "images": []}]
    with pytest.raises(ValueError, match=r"The text of mention m is .*character"):
        MentionEntityCollator(processor, entities)(
            [{"id": "m", "mention": "a", "sentence": half, "image": None, "answer": "a"}]
        )
    # An id that is only compared may be one: what is drawn for a batch depends on it, and on nothing else.
    mention = {"id": half, "mention": "a", "sentence": "b", "image": None, "answer": "a"}
    MentionEntityCollator(processor, entities)([mention])


def test_what_is_valid_and_how_it_is_shown() -> None:
    assert [is_unicode(text) for text in ("🍊 Ω", "", "\udcff")] == [True, True, False]
    check_unicode("🍊", "it")
    assert shortened("abc", 3) == "abc"
    assert shortened("x" * 1500, 3) == "xxx... (1,500 characters)"

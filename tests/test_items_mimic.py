"""Items are answered in their order, however their mentions are linked together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mimic_el.documents_mimic import Item
from mimic_el.errors_mimic import MentionError
from mimic_el.items_mimic import Answer, Answers, answered
from mimic_el.mentions_mimic import Mention, MentionImage

IMAGE = MentionImage(torch.zeros(0))
COUNTS = [2, 0, 5, 1, 3]


class Linker:
    """Links a mention to its own words, and refuses "bad" ones."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, mentions: Sequence[Mention]) -> list[str]:
        self.sizes.append(len(mentions))
        if any(mention.mention == "bad" for mention in mentions):
            raise MentionError("bad")
        return [mention.mention.upper() for mention in mentions]


def run(documents: list[list[str]], linker: Linker, batch_size: int, on_error: str = "raise") -> Any:
    def opened(item: Any) -> Answer:
        return Answer(item, [Mention(words, "", IMAGE) for words in item])

    def finish(answer: Answer, on_error: str) -> Any:
        if answer.error is not None and on_error == "raise":
            raise answer.error
        return "error" if answer.error is not None else answer.found

    items: list[Any] = documents
    return answered(items, opened, linker, finish, batch_size, on_error)


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(1, [2, 5, 1, 3]), (2, [2, 2, 2, 2, 2, 1]), (4, [4, 4, 3]), (100, [11])]
)
def test_mentions_of_several_items_are_linked_together(batch_size: int, sizes: list[int]) -> None:
    documents = [[f"{row}-{number}m" for number in range(count)] for row, count in enumerate(COUNTS)]
    linker = Linker()
    found = list(run(documents, linker, batch_size))
    assert found == [[words.upper() for words in document] for document in documents]
    assert linker.sizes == sizes


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_one_bad_mention_does_not_keep_the_others_from_it(batch_size: int) -> None:
    documents = [["a"], ["b", "bad"], ["c", "d"]]
    assert list(run(documents, Linker(), batch_size, "return")) == [["A"], "error", ["C", "D"]]
    answers = run(documents, Linker(), batch_size)
    assert next(answers) == ["A"]
    with pytest.raises(MentionError):
        next(answers)


def test_an_item_that_cannot_be_opened_ends_after_those_before_it() -> None:
    def opened(item: Any) -> Answer:
        return (
            Answer(item, error=MentionError("wrong")) if item == "wrong" else Answer(item, [Mention(item, "", IMAGE)])
        )

    def finish(answer: Answer, on_error: str) -> Any:
        if answer.error is not None:
            raise answer.error
        return answer.found

    items: list[Any] = ["a", "wrong", "b"]
    answers = answered(items, opened, Linker(), finish, 8, "raise")
    assert next(answers) == ["A"]
    with pytest.raises(MentionError, match="wrong"):
        next(answers)


def test_what_a_user_is_given() -> None:
    mentions = [Mention("a", "a b", IMAGE, 0, 1, window="mention")]
    single, document = Answer(Item("", "a b", "a"), mentions), Answer(Item("", "a b"), mentions)
    assert not single.is_done
    single.found = document.found = [["e1"]]
    assert single.is_done
    assert single.result() == ["e1"]
    place = {"mention": "a", "start": 0, "end": 1, "context_window": "mention"}
    assert document.result() == [{**place, "entities": ["e1"]}]
    wrong = Answer(Item("Mention 3", "a b"), error=MentionError("no"))
    assert wrong.result("return") == {"error": "Mention 3: no", "error_type": "MentionError"}
    with pytest.raises(MentionError, match="Mention 3: no"):
        wrong.result()


def test_answers_of_a_generator_have_no_length() -> None:
    assert len(Answers(lambda: iter(()), 3)) == 3
    with pytest.raises(TypeError, match="no length"):
        len(Answers(lambda: iter(()), None))

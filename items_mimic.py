"""Answers the items of a user's input in their order, while the mentions of several items are linked together.

Knows neither what reads an item nor what links a mention: it is given both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .documents_mimic import Item
from .errors_mimic import MimicError
from .mentions_mimic import Mention, answer_of_error

# Of one document, where the user does not say how many are to be encoded at a time.
_MENTIONS_AT_ONCE = 32

# Links mentions: gives for each its entities.
Link = Callable[[Sequence[Mention]], Sequence[Any]]


@dataclass
class Answer:
    """The answer of one item, as far as it is known.

    Args:
        item: what was read.
        mentions: what is to be linked.
        error: why it cannot be linked.
        found: the entities of each mention; `None` where they are not known yet.
    """

    item: Item
    mentions: list[Mention] = field(default_factory=list)
    error: Exception | None = None
    found: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.found = [None] * len(self.mentions)

    @property
    def is_done(self) -> bool:
        return self.error is not None or all(entities is not None for entities in self.found)

    def result(self, on_error: str = "raise") -> Any:
        """What the user is given.

        Raises:
            the error, where there is one and `on_error` is "raise".
        """
        if self.error is not None:
            return answer_of_error(self.error, self.item.where, on_error)
        if not self.item.is_document:
            return self.found[0]
        return [
            {
                "mention": mention.mention,
                "start": mention.start,
                "end": mention.end,
                "context_window": mention.window,
                "entities": entities,
            }
            for mention, entities in zip(self.mentions, self.found, strict=True)
        ]


class Answers:
    """The answers of a data set or generator, made while they are read."""

    def __init__(self, make: Callable[[], Iterator[Any]], count: int | None) -> None:
        self._make, self._count = make, count

    def __iter__(self) -> Iterator[Any]:
        return self._make()

    def __len__(self) -> int:
        if self._count is None:
            raise TypeError("The answers of a generator have no length.")
        return self._count


def answered(
    items: Iterable[Item],
    opened: Callable[[Item], Answer],
    link: Link,
    finish: Callable[[Answer, str], Any],
    batch_size: int,
    on_error: str,
) -> Iterator[Any]:
    """The answers of items, in their order. Mentions of several documents are linked together, as many as
    `batch_size` says; those of one document are in any case.

    Args:
        items: what was read.
        opened: makes of an item an answer whose mentions wait to be linked.
        link: links them; where it fails, each is linked by itself.
        finish: makes of an answer what the user is given, as [`Answer.result`] does.
        batch_size: mentions at a time; 1 for one item after the other.
        on_error: as of the pipeline.
    """
    at_once = batch_size if batch_size > 1 else _MENTIONS_AT_ONCE
    unfinished: deque[Answer] = deque()
    waiting: list[tuple[Answer, int]] = []
    for item in items:
        answer = opened(item)
        if answer.error is not None and on_error == "raise":
            break  # once what came before is answered
        unfinished.append(answer)
        waiting += ((answer, number) for number in range(len(answer.mentions)))
        while len(waiting) >= at_once or (waiting and batch_size == 1):
            _link(waiting[:at_once], link)
            del waiting[:at_once]
        while unfinished and unfinished[0].is_done:
            yield finish(unfinished.popleft(), on_error)
    else:
        answer = None
    while waiting:
        _link(waiting[:at_once], link)
        del waiting[:at_once]
    for done in unfinished:
        yield finish(done, on_error)
    if answer is not None:
        finish(answer, on_error)


def _link(tasks: Sequence[tuple[Answer, int]], link: Link) -> None:
    """Links some mentions; one that cannot be linked does not keep the others from it."""
    try:
        found = link([answer.mentions[number] for answer, number in tasks])
    except (MimicError, ValueError) as error:
        if len(tasks) > 1:
            for task in tasks:
                _link([task], link)
            return
        tasks[0][0].error = error
        return
    for (answer, number), entities in zip(tasks, found, strict=True):
        answer.found[number] = entities


__all__ = ["Answer", "Answers", "answered"]

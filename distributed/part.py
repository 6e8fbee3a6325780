"""What an actor does: it opens one part of an index where it runs, and answers for this part.

Knows nothing of the other parts, nor of Ray.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..directory_mimic import read_manifest, sealed
from ..errors_mimic import EntityIndexError
from ..index_mimic import EntityIndex
from ..matching_mimic import EntityFeatures, MentionFeatures
from ..mentions_mimic import checked_mentions
from ..snapshot_mimic import SearchResult, Snapshot


class PartChangedError(Exception):
    """A part is no longer in the state that it is asked about. Whoever asks looks how it is now, and asks again."""


class Part:
    """An actor: one part of the index, opened where the actor runs, and again where it is started again.

    It answers from the state that it opened, or that its own changes made of it, whatever other processes do where it
    is stored. What they did is seen by the next change, and by an actor that is started again.
    """

    def __init__(self, place: str, options: Mapping[str, Any], device: str) -> None:
        self._place, self._options, self._device = place, options, device
        self._held: tuple[EntityIndex, str] | None = None
        self._turn_to_open, self._turn_to_change = threading.Lock(), threading.Lock()

    def there(self) -> bool:
        return True

    def ask(self, expected: str | None, name: str, *args: Any, **kwargs: Any) -> Any:
        """What a method of [`PartAnswers`] answers. For "newest", its `facts`, after a look whether another process has
        changed what is stored, which is opened then.

        Args:
            expected: the state, as `facts` gives it, that the question is about; `None` for any.

        Raises:
            PartChangedError: if it is another by now.
            EntityIndexError: if the part cannot be opened.
        """
        if name == "newest":
            name = "facts"
            with self._turn_to_change:
                self._open_newest()
        answers = self._answers()
        answers.check(expected)
        return getattr(answers, name)(*args, **kwargs)

    def change(self, expected: str | None, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Changes the part as it is stored by now, by a method of `EntityIndex`, and gives its `facts` afterwards.
        Raises as [`ask`] does."""
        with self._turn_to_change:
            self._open_newest()
            self._answers().check(expected)
            getattr(self._opened()[0], name)(*args, **kwargs)
            return self._answers().facts()

    def _open_newest(self) -> None:
        index, _ = self._opened()
        stored, known = index.directory, index.state.contents.manifest
        if stored is not None and _state_name(read_manifest(stored)) != _state_name(known):
            self._held = None
            self._opened()

    def _answers(self) -> PartAnswers:
        index, opening = self._opened()
        return PartAnswers(index.state, self._device, opening)

    def _opened(self) -> tuple[EntityIndex, str]:
        """The index, and what tells this opening of it from others; where that fails it is tried again each time."""
        with self._turn_to_open:
            held = self._held
            if held is None:
                try:
                    index = EntityIndex.from_pretrained(self._place, **self._options)
                except Exception as error:  # of whatever class the Hub's client, or the system, has for it
                    raise EntityIndexError(f"The part {self._place} cannot be opened: {error}") from error
                held = self._held = index, secrets.token_hex(8)
            return held


class PartAnswers:
    """One state of a part, asked.

    Args:
        state: which is not disturbed by changes.
        device: where searches compute.
        opening: tells one opening of what is stored from another.
    """

    def __init__(self, state: Snapshot, device: str, opening: str) -> None:
        self._state, self._device, self._opening = state, device, opening

    def check(self, expected: str | None) -> None:
        """Raises a `PartChangedError` if this is not the state that is expected."""
        if expected not in (None, _state_name(self._state.contents.manifest)):
            raise PartChangedError

    def facts(self) -> dict[str, Any]:
        """The number of its entities, its dtype, and what is noted of the model that made it; `state` names the state,
        `opening` what was stored when it was opened, of which changes by this actor made the state."""
        state = self._state
        return {
            "count": len(state),
            "dtype": state.dtype,
            "model": dict(state.made_by),
            "state": _state_name(state.contents.manifest),
            "opening": self._opening,
        }

    def has(self, entity_ids: Sequence[Any]) -> list[bool]:
        return [entity_id in self._state for entity_id in entity_ids]

    def id_hashes(self, number: int, of: int) -> np.ndarray:
        """The sorted hashes of the ids, uint64, that are in the number-th of so many equal ranges of hashes."""
        store, first = self._state.contents.store, number * 2**64 // of
        last, found = (number + 1) * 2**64 // of - 1, []
        for shard, start in zip(store.shards, store.starts, strict=False):
            rows = torch.from_numpy(start + shard.hash_rows.astype(np.int64))
            order = np.sort(shard.hashes[~store.removed[rows].numpy()])
            begin, end = np.searchsorted(order, np.uint64(first)), np.searchsorted(order, np.uint64(last), "right")
            found.append(order[begin:end])
        return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)

    def ids_of_hashes(self, hashes: np.ndarray) -> list[str]:
        """The ids that have one of some hashes."""
        store = self._state.contents.store
        rows = [row for value in hashes.tolist() for row in store.ids.rows(value) if not store.removed[row]]
        return [store.record(row)["id"] for row in rows]

    def records(self, entity_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        return [self._state.record(name) if name in self._state else None for name in entity_ids]

    def features(self, entity_ids: Sequence[str]) -> EntityFeatures:
        return self._state.features(entity_ids)

    def records_from(self, row: int, count: int) -> tuple[list[dict[str, Any]], int]:
        """Some records from a row on, and the row after the last of them; no records after the last row."""
        store = self._state.contents.store
        rows = itertools.islice((other for other in range(row, len(store)) if not store.removed[other]), count)
        taken = list(rows)
        return [store.record(other) for other in taken], taken[-1] + 1 if taken else len(store)

    def search(self, mentions: MentionFeatures, rows: Sequence[int], **options: Any) -> SearchResult | None:
        """The search of some of the mentions; `None` where there is nothing to search."""
        if not len(self._state) or not len(rows):
            return None
        return self._state.search(self._some(mentions, rows), **options)

    def answer_scores(self, mentions: MentionFeatures, answers: Sequence[str | None]) -> np.ndarray:
        if not len(self._state):
            return np.full(len(answers), np.nan, dtype=np.float32)
        return self._state.answer_scores(mentions.to(self._device), answers)

    def count_better(
        self, mentions: MentionFeatures, rows: Sequence[int], scores: np.ndarray, answers: Sequence[str], method: str
    ) -> np.ndarray:
        if not len(self._state) or not len(rows):
            return np.zeros((2, len(rows)), dtype=np.int64)
        some = self._some(mentions, rows)
        return np.stack(self._state.count_better(some, scores, answers, method))

    def _some(self, mentions: MentionFeatures, rows: Sequence[int]) -> MentionFeatures:
        """Some of the mentions; all are checked, so that messages number them as the caller does."""
        return checked_mentions(mentions, self._state.matcher)[torch.as_tensor(rows)].to(self._device)

    def find(self, name: str, max_distance: int) -> list[str]:
        return self._state.find(name, max_distance)

    def places_of_names(self, text: str, lower_case: bool) -> list[tuple[int, int]]:
        return self._state.contents.places_of_names(text, lower_case) if len(self._state) else []

    def bearers(self, names: Sequence[str]) -> list[list[str]]:
        return [self._state.bearer_ids(name) for name in names]


def _state_name(manifest: Mapping[str, Any]) -> str:
    """Tells a state of what is stored from all others."""
    return manifest.get("digest") or sealed(manifest)["digest"]


__all__ = ["Part", "PartAnswers", "PartChangedError"]

"""Which split a mention is in: from the split's name in the data, or by a hash if the data has no splits.

Mentions of one sentence, one image or one record stay together, so that nothing is tested that was trained on.
"""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any

from .report import SPLITS, Report

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("dev", "val", "valid", "validation"),
    "test": ("test", "testing"),
}
# An image ties the sentences that it goes with, unless so much of the data (and at least so many mentions) would end
# up in one group: then it is a stand-in, such as a logo for "no photo".
_LARGEST_GROUP = 0.1
_LARGE_GROUP = 50


def split_of(record: str) -> str:
    """The split of a record of a data set that has none: 70% train, 10% validation, 20% test, by the hash of its id."""
    bucket = int.from_bytes(hashlib.sha256(record.encode("utf-8", "surrogatepass")).digest()[:8], "big") % 100
    return "train" if bucket < 70 else "validation" if bucket < 80 else "test"


def split_named(word: Any) -> str | None:
    """The split that a word such as `Dev` means; `None` for any other."""
    plain = word.strip().lower() if isinstance(word, str) else ""
    return next((split for split, words in SPLIT_WORDS.items() if plain in words), None)


def sentence_key(sentence: str) -> bytes:
    """The same for sentences that differ in white space, case or Unicode form alone."""
    plain = " ".join(unicodedata.normalize("NFKC", sentence).casefold().split())
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest()


class GroupedSplits:
    """Splits for records without: records that share a sentence, an image or an id are one group, and in one split.

    [`add`] every record, then ask [`split`] for each by its number. A group's split is that of the smallest of its
    records' names (see [`split_of`]), so it does not depend on their order.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._given: list[str | None] = []
        self._keys: list[tuple[bytes, bytes | None, bytes | None]] = []
        self._splits: list[str] | None = None
        self.ties_images = True

    def add(self, name: str, sentence: str, image: str | None, id_: str | None, given: str | None = None) -> int:
        """Returns the record's number.

        Args:
            name: what its split is drawn by, where it is alone.
            sentence: its sentence.
            image: the name of its image, in a normal form, or `None`.
            id_: its id, which others may have too, or `None`.
            given: its split, where it has one; the rest of its group follows.
        """
        hashed = [
            None if text is None else hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            for text in (image, id_)
        ]
        self._names.append(name)
        self._given.append(given)
        self._keys.append((sentence_key(sentence), *hashed))  # type: ignore[arg-type]
        return len(self._names) - 1

    def split(self, number: int) -> str:
        """The split of a record, by its number."""
        if self._splits is None:
            self._splits = self._drawn()
        return self._given[number] or self._splits[number]

    def report_images(self, report: Report, file: str) -> None:
        """A finding where images were not kept together, because one ties too many sentences."""
        if self._names:
            self.split(0)
        if not self.ties_images:
            report.add("image_in_several_splits", file, detail="one image goes with more than a tenth of the mentions")

    def _drawn(self) -> list[str]:
        roots = self._roots(with_images=True)
        sizes: dict[int, int] = {}
        for root in roots:
            sizes[root] = sizes.get(root, 0) + 1
        largest = max(sizes.values(), default=0)
        if largest > max(_LARGE_GROUP, _LARGEST_GROUP * len(roots)):
            alone = self._roots(with_images=False)
            if len(set(alone)) > len(sizes):
                self.ties_images, roots = False, alone
        names: dict[int, str] = {}
        given: dict[int, str] = {}
        for number, root in enumerate(roots):
            names[root] = min(names.get(root, self._names[number]), self._names[number])
            if self._given[number]:
                given.setdefault(root, str(self._given[number]))
        drawn = {root: given.get(root) or split_of(name) for root, name in names.items()}
        return [drawn[root] for root in roots]

    def _roots(self, with_images: bool) -> list[int]:
        """For each record the first of its group."""
        parents = list(range(len(self._keys)))

        def root_of(number: int) -> int:
            while parents[number] != number:
                parents[number] = parents[parents[number]]
                number = parents[number]
            return number

        first: dict[tuple[int, bytes], int] = {}
        for number, keys in enumerate(self._keys):
            for kind, key in enumerate(keys):
                if key is None or (kind == 1 and not with_images):
                    continue
                one, other = root_of(number), root_of(first.setdefault((kind, key), number))
                parents[max(one, other)] = min(one, other)
        return [root_of(number) for number in range(len(parents))]


class SharedSentences:
    """Finds mentions whose sentence is in an earlier split too."""

    def __init__(self) -> None:
        self._splits: dict[bytes, int] = {}

    def earlier(self, split: str, sentence: str) -> str | None:
        """The split of the same sentence that was asked about before `split`, or `None`."""
        place = SPLITS.index(split)
        known = self._splits.setdefault(sentence_key(sentence), place)
        return SPLITS[known] if known != place else None

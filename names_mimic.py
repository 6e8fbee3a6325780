"""The names of a knowledge base: which entities have a name, and which names occur in a text.

All names and aliases are in one table of arrays, which is stored with an index and memory-mapped. A name is found by a
hash of its folded form. The hashes of all parts of a text are computed at once, so searching a text for a million
names is as fast as for ten. Knows strings, row numbers and files: no searches, no models.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .errors_mimic import EntityIndexError
from .spans_mimic import Folded, boundaries_of, fold, folded_name, plain_name
from .texts_mimic import is_unicode

Span = tuple[int, int]

ALIASES = "aliases"
# By what rules names are folded and hashed: to be raised when a table of names would come out otherwise. A stored
# table without a number is of the first.
RULES = 1
_SEPARATOR = "|"
_TOLD_APART = re.compile(r"\s+\([^()]*\)\s*$")
# A name that ends after more possible ends of words than this is found by `find`, but not in texts.
_LONGEST = 24
_BEGINS_AT_ONCE = 8192
_ENTRIES_AT_ONCE = 8192
# Odd, so that its powers can be inverted; multiplication is modulo 2^64.
_FACTOR = 0x9E3779B97F4A7C15
_INVERSE = pow(_FACTOR, -1, 2**64)

# Words that are names too seldom to be taken for one: where the name is not written all in capitals.
_STOP_WORDS = """
a about above across after again against all almost along already also although always am among an and another any
anyone anything are around as at be because been before behind being below between both but by can could did do does
done down during each either else enough even ever every everyone everything few for from had has have he her here
hers herself him himself his how however i if in indeed into is it its itself just later like many may me might more
most much must my myself never next no none nor not nothing now of off often on once one only onto open or other
others our ours out over own per said same saw several she should since so some someone something soon still such
than that the their theirs them then there these they this those though through to today together too took under
until up upon us very was way we went were what when where whether which while who whole whom whose why will with
within without would yes yet you your yours aber als auch auf aus bei bin bis das dass dem den der des die doch du
ein eine einem einen einer er es für hat ich ihr im ist ja kein mit nach nicht noch nur oder schon sein sich sie
sind über um und uns von vor wenn wer wie wir zu zum zur au aux avec ce ces dans de elle en est et il ils je la
le les leur mais ne nous ou où par pas pour qu que qui sa se ses sont sur tu un une vous al como con del e el
ella entre era esta este fue ha las lo los más o para pero por sin su sus también una y ya yo che chi da dal dalla
dei della di gli io ma mi nel nella non più si sono ao com dos em foi mas na não nas nos os pela pelo sem sua uma
het een van op te dat voor met zijn и в во не что он на я с со как а то все она так его но да ты к у же вы за бы по
ее мне было вот от
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def names_of(record: Mapping[str, Any]) -> list[str]:
    """An entity's name and aliases, each once, without those that are empty. A title as Wikipedia has it is one with
    what tells it from others of the name, and without: "Georgia (country)", "Georgia"."""
    aliases = record.get(ALIASES) or []
    if isinstance(aliases, str):
        aliases = aliases.split(_SEPARATOR)
    names = [record.get("name") or "", *(alias for alias in aliases if isinstance(alias, str))]
    names += [name[: told.start()] for name in names if (told := _TOLD_APART.search(name))]
    return list(dict.fromkeys(name for name in names if name.strip()))


def listed_aliases(value: Any) -> list[str]:
    """Aliases as a list: of a list, or of a string in which they are separated by `|`.

    Raises:
        ValueError: if they are something else.
    """
    if isinstance(value, str):
        value = value.split(_SEPARATOR)
    elif isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple) or not all(isinstance(alias, str) for alias in value):
        raise ValueError(f'`aliases` must be a list of strings, or a string such as "one|another", got {value!r:.80}.')
    return list(dict.fromkeys(alias.strip() for alias in value if alias.strip()))


class OtherRulesError(EntityIndexError):
    """A stored table of names that was made by other rules than those of this version."""


@dataclass
class NameTable:
    """The names of entities, numbered as entries in the order of the entities' rows.

    Args:
        hashes (`numpy.ndarray`, uint64): of the folded names, sorted.
        order (int32): the entry that each of them is of; equal hashes in the order of the entries.
        rows (int32): the row of each entry's entity.
        written (uint64): a hash of each entry's name as it is written.
        offsets (int64): where the folded name of each entry begins in `texts`, and where the last ends.
        texts (uint8): the folded names in UTF-8, one after the other.
        sizes (bool): which numbers of possible ends of words the names have: see [`Folded`].
    """

    hashes: np.ndarray
    order: np.ndarray
    rows: np.ndarray
    written: np.ndarray
    offsets: np.ndarray
    texts: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        """The number of names, an entity's own and its aliases."""
        return len(self.rows)

    # --- Made, joined, stored

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], first_row: int = 0) -> NameTable:
        """The names of entities in consecutive rows."""
        parts = []
        entries: list[tuple[int, str]] = []
        for row, record in enumerate(records, start=first_row):
            entries += ((row, name) for name in names_of(record))
            if len(entries) >= _ENTRIES_AT_ONCE:
                parts.append(_entries(entries))
                entries = []
        if entries or not parts:
            parts.append(_entries(entries))
        return cls._sorted(parts)

    def up_to(self, row: int) -> NameTable:
        """The names of the rows before one."""
        count = int(np.searchsorted(self.rows, row))
        part = self._unsorted()
        part = {name: part[name][:count] for name in ("hashes", "rows", "written")} | {"sizes": self.sizes}
        stop = int(self.offsets[count])
        return self._sorted([part | {"offsets": self.offsets[: count + 1], "texts": self.texts[:stop]}])

    def followed_by(self, other: NameTable) -> NameTable:
        """With the names of rows behind its own."""
        return self._sorted([self._unsorted(), other._unsorted()])

    def holds(self, other: NameTable) -> bool:
        """Whether it is the same table as another, and tells each name of it in a text."""
        same = all(np.array_equal(getattr(self, name), getattr(other, name)) for name in _ARRAYS if name != "sizes")
        return same and not bool((other.sizes & ~self.sizes).any())  # more sizes: of names that were there before

    def _unsorted(self) -> dict[str, np.ndarray]:
        hashes = np.empty_like(self.hashes)
        hashes[self.order] = self.hashes
        own = {name: getattr(self, name) for name in ("rows", "written", "offsets", "texts", "sizes")}
        return {"hashes": hashes, **own}

    @classmethod
    def _sorted(cls, parts: Sequence[dict[str, np.ndarray]]) -> NameTable:
        joined = {
            name: np.concatenate([part[name] for part in parts]) for name in ("hashes", "rows", "written", "texts")
        }
        lengths = np.concatenate([np.diff(part["offsets"]) for part in parts])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        order = np.argsort(joined["hashes"], kind="stable")
        sizes = np.any([part["sizes"] for part in parts], axis=0)
        return cls(
            joined["hashes"][order],
            order.astype(np.int32),
            joined["rows"],
            joined["written"],
            offsets,
            joined["texts"],
            sizes,
        )

    def save(self, path: Path, shards: Sequence[str]) -> None:
        """Writes the table, and of which shards of the index its rows are."""
        # Names are looked at where there is no need of torch, too.
        import torch
        from safetensors.torch import save_file

        tensors = {}
        for name in _ARRAYS:
            array = np.ascontiguousarray(getattr(self, name))
            tensors[name] = torch.from_numpy(array.view(np.int64) if array.dtype == np.uint64 else array)
        save_file(tensors, path, metadata={"shards": json.dumps(list(shards)), "rules": str(RULES)})

    @classmethod
    def load(cls, path: Path, count: int) -> tuple[NameTable, list[str]]:
        """Opens a table, memory-mapped; gives the shards that its rows are of, too.

        Args:
            path: its file.
            count: the number of rows of the index.

        Raises:
            OtherRulesError: if it was made by other rules than those of this version.
            EntityIndexError: if it is missing or damaged.
        """
        try:
            if path.exists() and not path.is_file():
                raise OSError("it is not a regular file")
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                if (rules := facts.get("rules", "1")) != str(RULES):
                    raise OtherRulesError(
                        f"The index file {path} holds names by the rules {rules!r:.40}, not by {RULES} as this version "
                        "has them. Call build_names() to make it again."
                    )
                shards = json.loads(facts["shards"])
                arrays = {name: file.get_tensor(name).numpy() for name in _ARRAYS}
            for name, dtype in _ARRAYS.items():
                stored = np.dtype(np.int64) if dtype == np.uint64 else np.dtype(dtype)
                if arrays[name].ndim != 1 or arrays[name].dtype != stored:
                    raise ValueError(f"its `{name}` is not as it must be")
                arrays[name] = arrays[name].view(dtype)
            table = cls(**arrays)
            table._check(count)
            if not isinstance(shards, list) or not all(isinstance(name, str) for name in shards):
                raise ValueError("it does not say of which shards it is")
        except OtherRulesError:
            raise
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise EntityIndexError(
                f"The index file {path} is missing or damaged: {error}. Call build_names() to make it again."
            ) from error
        return table, shards

    def _check(self, count: int) -> None:
        entries = len(self.rows)
        if {len(self.hashes), len(self.order), len(self.written), len(self.offsets) - 1} != {entries}:
            raise ValueError("its parts disagree in their number of names")
        if len(self.sizes) != _LONGEST + 1 or int(self.offsets[-1]) != len(self.texts):
            raise ValueError("its parts disagree in their sizes")
        for name, limit in (("rows", count), ("order", entries)):
            values = getattr(self, name)
            if entries and not 0 <= int(values.min()) <= int(values.max()) < limit:
                raise ValueError(f"its `{name}` names what is not there")

    # --- Which entities have a name

    def rows_of(self, name: str, removed: np.ndarray | None = None) -> tuple[list[int], list[int]]:
        """The rows of the entities that have a name: as it is written, and in any case.

        Args:
            name: the name.
            removed: for each row whether its entity was removed.
        """
        folded, plain = folded_name(name), plain_name(name)
        if not folded or not is_unicode(folded):
            return [], []
        entries = self._entries_with(int(_hash(folded)))
        encoded = folded.encode()
        same = [entry for entry in entries.tolist() if self._text(entry) == encoded]
        same = [entry for entry in same if removed is None or not removed[self.rows[entry]]]
        hashed = _hash(plain)
        exact = [entry for entry in same if self.written[entry] == hashed]
        return self._distinct(exact), self._distinct(same)

    def nearest(self, name: str, max_distance: int, removed: np.ndarray | None = None) -> list[int]:
        """The rows of the entities whose names differ least from a name, by `max_distance` edits at most; none where
        rapidfuzz is not installed."""
        try:
            import rapidfuzz.distance
            import rapidfuzz.process
        except ImportError:
            return []
        folded = folded_name(name)
        if not folded or not is_unicode(folded):
            return []
        lengths = np.diff(self.offsets)
        size, reach = len(folded.encode()), 4 * max_distance  # bytes of a character
        entries = ((lengths >= size - reach) & (lengths <= size + reach)).nonzero()[0]
        if removed is not None:
            entries = entries[~removed[self.rows[entries]]]
        names = [bytes(self._text(entry)).decode(errors="replace") for entry in entries.tolist()]
        found = rapidfuzz.process.extract(
            folded, names, scorer=rapidfuzz.distance.Levenshtein.distance, score_cutoff=max_distance, limit=None
        )
        if not found:
            return []
        least = min(distance for _, distance, _ in found)
        return self._distinct(sorted(int(entries[number]) for _, distance, number in found if distance == least))

    def _entries_with(self, hashed: int) -> np.ndarray:
        value = np.uint64(hashed)
        first, last = (int(np.searchsorted(self.hashes, value, side=side)) for side in ("left", "right"))
        return self.order[first:last]

    def _text(self, entry: int) -> bytes:
        return self.texts[int(self.offsets[entry]) : int(self.offsets[entry + 1])].tobytes()

    def _distinct(self, entries: Iterable[int]) -> list[int]:
        return list(dict.fromkeys(int(self.rows[entry]) for entry in entries))

    # --- Names in a text

    def spans_in(self, text: str, removed: np.ndarray | None = None, lower_case: bool = False) -> list[Span]:
        """Where names occur in a text, the longest where they overlap, in the order of the text.

        Args:
            text: any text; white space, case and the form of its Unicode do not matter.
            removed: for each row of the index whether its entity was removed.
            lower_case: whether a single word in lower case is taken for a name that is not written so. It seldom is
                one: "orange" for Orange.
        """
        folded = fold(text)
        return longest_spans(folded, self.places_in(text, folded, removed, lower_case))

    def places_in(
        self, text: str, folded: Folded, removed: np.ndarray | None = None, lower_case: bool = False
    ) -> list[tuple[int, int]]:
        """Where names occur in a text, of which some may overlap: begin and stop of each in its folded form, as
        [`longest_spans`] takes them. Arguments as of [`spans_in`]."""
        hits = [hit for some in self._hits(folded) for hit in some]
        starts, ends = folded.starts, folded.ends
        surfaces = [text[starts[begin] : ends[stop - 1]] for begin, stop, _ in hits]
        # Each form once: a name may occur ten thousand times.
        forms = {surface: (folded.text[hit[0] : hit[1]], hit[2]) for surface, hit in zip(surfaces, hits, strict=True)}
        names = self._names_among(forms, removed, lower_case)
        return [(begin, stop) for surface, (begin, stop, _) in zip(surfaces, hits, strict=True) if surface in names]

    def _hits(self, folded: Folded) -> Iterator[Iterable[tuple[int, int, int]]]:
        """Parts of a text whose hash is that of a name: begin, stop, and the first place of the hash."""
        begins, stops = folded.boundaries
        if not len(self) or not len(begins):
            return
        sums = _sums(folded.codes)
        sizes = self.sizes.nonzero()[0]
        for at in range(0, len(begins), _BEGINS_AT_ONCE):
            some = begins[at : at + _BEGINS_AT_ONCE]
            # The number of each part's last possible end.
            last = (np.searchsorted(stops, some, side="right") - 1)[:, None] + sizes
            inside = last < len(stops)
            rows, _ = inside.nonzero()
            first, behind = some[rows], stops[last[inside]]
            hashes = _span_hashes(sums, first, behind)
            in_order = np.argsort(hashes)  # so that the table is read from its beginning to its end
            places = np.empty(len(hashes), dtype=np.int64)
            places[in_order] = np.searchsorted(self.hashes, hashes[in_order])
            hit = self.hashes[np.minimum(places, len(self.hashes) - 1)] == hashes
            yield zip(first[hit].tolist(), behind[hit].tolist(), places[hit].tolist(), strict=True)

    def _names_among(
        self, forms: Mapping[str, tuple[str, int]], removed: np.ndarray | None, lower_case: bool
    ) -> set[str]:
        """Which of some parts of a text are likely to be meant as the names that they are written like.

        Args:
            forms: each part, with its folded form and the first place of its hash.
            removed, lower_case: as of [`spans_in`].
        """
        names: set[str] = set()
        doubtful: list[str] = []  # a name only if one is written just so
        for surface, (folded, _) in forms.items():
            if len(folded) < 2 or not any(map(str.isalpha, folded)):
                continue
            words = folded.split()
            lower = surface == surface.lower() != surface.upper()
            if all(word.strip(".,'\"!?") in STOP_WORDS for word in words):
                if not lower and (len(words) > 1 or sum(map(str.isupper, surface)) > 1):
                    doubtful.append(surface)
            elif lower and len(words) == 1 and not lower_case:
                doubtful.append(surface)
            else:
                names.add(surface)
        if removed is not None:
            names = {surface for surface in names if len(self._entries_at(forms[surface][1], removed))}
        written = _hashes([plain_name(surface) for surface in doubtful])
        for surface, hashed in zip(doubtful, written, strict=True):
            if bool((self.written[self._entries_at(forms[surface][1], removed)] == hashed).any()):
                names.add(surface)
        return names

    def _entries_at(self, place: int, removed: np.ndarray | None) -> np.ndarray:
        """The entries of the hash whose first place is given."""
        last = place + 1
        while last < len(self.hashes) and self.hashes[last] == self.hashes[place]:
            last += 1
        entries = self.order[place:last]
        return entries if removed is None else entries[~removed[self.rows[entries]]]


def longest_spans(folded: Folded, places: Iterable[tuple[int, int]]) -> list[Span]:
    """Of places in a folded text the longest where they overlap, as start and end in the text itself, in its order."""
    taken = bytearray(len(folded.text))
    spans = []
    for begin, stop in sorted(places, key=lambda span: (span[0] - span[1], span[0])):
        if not any(taken[begin:stop]):
            taken[begin:stop] = b"\x01" * (stop - begin)
            spans.append((int(folded.starts[begin]), int(folded.ends[stop - 1])))
    return sorted(spans)


_ARRAYS: dict[str, Any] = {
    "hashes": np.uint64,
    "order": np.int32,
    "rows": np.int32,
    "written": np.uint64,
    "offsets": np.int64,
    "texts": np.uint8,
    "sizes": np.bool_,
}


def _entries(entries: Sequence[tuple[int, str]]) -> dict[str, np.ndarray]:
    """The arrays of some names, in their order."""
    folded = [folded_name(name) for _, name in entries]
    encoded = [name.encode(errors="replace") for name in folded]
    # All at once: the names one after the other, a space between them.
    _, stops = boundaries_of(np.frombuffer(" ".join(folded).encode("utf-32-le", "surrogatepass"), dtype=np.uint32))
    ends = np.cumsum([len(name) + 1 for name in folded])
    counts = np.diff(np.searchsorted(stops, ends), prepend=0)
    sizes = np.isin(np.arange(_LONGEST + 1), counts[counts > 0])
    return {
        "hashes": _hashes(folded),
        "rows": np.array([row for row, _ in entries], dtype=np.int32),
        "written": _hashes([plain_name(name) for _, name in entries]),
        "offsets": np.concatenate([[0], np.cumsum([len(name) for name in encoded])]).astype(np.int64),
        "texts": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "sizes": sizes,
    }


# --- Hashes -----------------------------------------------------------------------------------------------------------
# Of a text c[0] c[1] ... the hash of the part from b to e is the sum of c[i] F^(i-b), times F^b F^-b: the difference of
# two running sums, and one multiplication. So all parts of a text are hashed in a few steps over arrays.


def _mixed(codes: np.ndarray) -> np.ndarray:
    values = codes.astype(np.uint64) + np.uint64(_FACTOR)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1, ..., modulo 2^64."""
    return _many_powers(base, 1 << max(10, (count - 1).bit_length()))[:count]


@functools.lru_cache(maxsize=8)
def _many_powers(base: int, count: int) -> np.ndarray:
    powers = np.full(count, base, dtype=np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _sums(codes: np.ndarray) -> np.ndarray:
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(_mixed(codes) * _powers(_FACTOR, len(codes) + 1)[: len(codes)], out=sums[1:])
    return sums


def _span_hashes(sums: np.ndarray, begins: np.ndarray, stops: np.ndarray) -> np.ndarray:
    shifted = (sums[stops] - sums[begins]) * _powers(_INVERSE, len(sums))[begins]
    values = shifted + (stops - begins).astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
    values = (values ^ (values >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return values ^ (values >> np.uint64(32))


def _hashes(texts: Sequence[str]) -> np.ndarray:
    """The hash of each of some texts."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    stops = np.cumsum([len(text) for text in texts], dtype=np.int64)
    begins = np.concatenate([[0], stops[:-1]]).astype(np.int64) if len(texts) else stops
    return _span_hashes(_sums(codes), begins, stops)


def _hash(text: str) -> Any:
    return _hashes([text])[0]


__all__ = ["ALIASES", "STOP_WORDS", "NameTable", "OtherRulesError", "listed_aliases", "longest_spans", "names_of"]

"""How an index is stored: shards of features and tables of entities, memory-mapped.

A table is JSON Lines with offsets and hashes, not Parquet: it must open with only transformers installed, and give one
row without reading the others. Knows neither encoders nor how shards are searched.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from .errors_mimic import EntityIndexError
from .features_mimic import can_be_scored, joined
from .files_mimic import file_facts, is_small, mapped, no_space_told, regular, size_of, write_atomically
from .matching_mimic import EntityFeatures, Matcher
from .precision_mimic import TOKENS, dequantized, layout_of, stored_layout, whose

_SHARD_NAME = re.compile(r"[a-z]+-[0-9a-z-]+")
# Types of a table's fields, as `datasets` names them. What its reader would guess wrong is "json": numbers among
# texts, integers beyond 64 bits, and texts that look like a date, of which Arrow makes one.
_KINDS = {kind: kind for kind in ("string", "bool", "int64", "float64", "list", "json")}
_LIKE_A_DATE = re.compile(r"\d{4}-\d{2}-\d{2}([ T].*)?")
_FACTS_VERSION = 2
_LARGE = 2**53  # integers that a float64 holds exactly


# --- One shard ----------------------------------------------------------------------------------------------------


class Table:
    """The entities' own data, one JSON object a line, read when asked for."""

    def __init__(self, lines: memoryview | bytes, offsets: np.ndarray) -> None:
        self._lines, self._offsets = lines, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> dict[str, Any]:
        try:
            if not 0 <= row < len(self):
                raise ValueError(f"there are only {len(self)} rows")
            start, stop = int(self._offsets[row]), int(self._offsets[row + 1])
            if not 0 <= start <= stop <= len(self._lines):
                raise ValueError(f"its place, from {start} to {stop}, is not in the table")
            return _entity(bytes(self._lines[start:stop]))
        except (ValueError, RecursionError) as error:
            raise EntityIndexError(
                f"The entity table is damaged at row {row}: {error}. Build the index again."
            ) from error


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


def _entity(line: bytes) -> dict[str, Any]:
    """The entity of a table's line.

    Raises:
        ValueError: if there is none in it.
        RecursionError: if it is nested too deeply.
    """
    text = line.decode()
    record = _DECODER.decode(text)
    if not isinstance(record, dict) or not isinstance(record.get("id"), str) or not record["id"]:
        raise ValueError("it is not an entity with an id")
    for name in ("name", "description"):
        if not isinstance(record.get(name, ""), str):
            raise ValueError(f"its `{name}` is not a text")
    if "\\ud" in text or "\\uD" in text:
        for name, value in record.items():
            f"{name}{value}".encode()  # half of a character would fail only where it is written
    return record


@dataclass
class TableFacts:
    """What a card says of a table of entities. Facts of several tables can be added."""

    described: int = 0
    characters: int = 0
    fields: dict[str, str] = field(default_factory=dict)  # types as `datasets` names them
    version: int = _FACTS_VERSION

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> TableFacts:
        facts = cls()
        for record in records:
            facts.described += bool(record.get("description"))
            facts.characters += len(record.get("description") or "")
            for name, value in record.items():
                facts._note(name, _type_of(value))
        return facts

    @classmethod
    def stored(cls, value: Any) -> TableFacts | None:
        """Facts that were noted with an index; `None` where they were not, or are not what they should be."""
        try:
            fields = {str(name): _KINDS[kind] for name, kind in value["fields"].items()}
            counts = value["described"], value["characters"]
        except (AttributeError, KeyError, TypeError):
            return None
        known = value.get("version") == _FACTS_VERSION and all(type(n) is int and 0 <= n < 2**63 for n in counts)
        return cls(*counts, fields) if known else None

    def _note(self, name: str, kind: str) -> None:
        known = self.fields.setdefault(name, kind)
        if known != kind:
            self.fields[name] = "float64" if {known, kind} == {"int64", "float64"} else "json"

    def __add__(self, other: TableFacts) -> TableFacts:
        both = TableFacts(self.described + other.described, self.characters + other.characters, dict(self.fields))
        for name, kind in other.fields.items():
            both._note(name, kind)
        return both


def _type_of(value: Any) -> str:
    if isinstance(value, str):
        return "json" if _LIKE_A_DATE.fullmatch(value) else "string"
    if type(value) is int and abs(value) > _LARGE:
        return "json"
    return {bool: "bool", int: "int64", float: "float64", list: "list"}.get(type(value), "json")


@dataclass
class Shard:
    """Some thousand entities: their features, table, and ids by hash."""

    name: str
    tensors: dict[str, Tensor]
    table: Table
    hashes: np.ndarray  # sorted 64-bit hashes of the ids
    hash_rows: np.ndarray  # their rows

    def __len__(self) -> int:
        return len(self.table)

    def ids(self) -> Iterator[str]:
        return (record["id"] for record in self.table)


class IdRows:
    """The rows of ids, found by their hashes. Shards can be added to it; of small ones are made larger pieces."""

    def __init__(self) -> None:
        self._pieces: list[tuple[np.ndarray, np.ndarray]] = []
        self._count = 0

    def add(self, shard: Shard) -> None:
        """Takes the rows of a shard to follow those that are there.

        Raises:
            EntityIndexError: if it names rows that it does not have.
        """
        if len(wrong := shard.hash_rows[(shard.hash_rows < 0) | (shard.hash_rows >= len(shard))]):
            raise EntityIndexError(
                f"The entity table is damaged at row {wrong[0]} of {shard.name}, which it does not have. Build the "
                "index again."
            )
        hashes, rows = shard.hashes, shard.hash_rows.astype(np.int64) + self._count
        self._count += len(shard)
        # As in counting: a piece is joined with those before it that are no longer, so that there are few.
        while self._pieces and len(self._pieces[-1][0]) <= len(hashes):
            before = self._pieces.pop()
            hashes, rows = np.concatenate([before[0], hashes]), np.concatenate([before[1], rows])
        order = np.argsort(hashes, kind="stable")  # of a damaged shard they may be in no order
        self._pieces.append((hashes[order], rows[order]))

    def has(self, hashes: np.ndarray) -> np.ndarray:
        """Which of some hashes are those of ids that are there, as booleans."""
        found = np.zeros(len(hashes), dtype=bool)
        for piece, _ in self._pieces:
            found |= piece[np.searchsorted(piece, hashes).clip(max=len(piece) - 1)] == hashes
        return found

    def rows(self, hashed: int) -> list[int]:
        """The rows, in order, of all ids with a hash."""
        wanted, found = np.uint64(hashed), []
        for hashes, rows in self._pieces:
            first, last = np.searchsorted(hashes, wanted, "left"), np.searchsorted(hashes, wanted, "right")
            found += rows[first:last].tolist()
        return sorted(found)


def hash_id(entity_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(entity_id.encode(), digest_size=8).digest(), "little")


def table_line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def make_shard(name: str, features: dict[str, Tensor], records: Sequence[Mapping[str, Any]]) -> Shard:
    lines = [table_line(record) for record in records]
    offsets = np.zeros(len(lines) + 1, dtype=np.int64)
    offsets[1:] = np.cumsum([len(line) for line in lines])
    hashes = np.array([hash_id(record["id"]) for record in records], dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    return Shard(name, features, Table(b"".join(lines), offsets), hashes[order], order.astype(np.int32))


def write_shard(directory: Path, shard: Shard) -> dict[str, Any]:
    """Writes a shard's two files and gives its entry of the manifest."""
    table = shard.table._lines
    tensors = {f"feature.{name}": tensor.contiguous() for name, tensor in shard.tensors.items()}
    tensors["table.offsets"] = torch.from_numpy(shard.table._offsets.copy())
    tensors["table.hashes"] = torch.from_numpy(shard.hashes.view(np.int64).copy())
    tensors["table.hash_rows"] = torch.from_numpy(shard.hash_rows.copy())
    features_file, table_file = shard_files(shard.name)
    with no_space_told(directory):
        write_atomically(directory / table_file, lambda path: path.write_bytes(table))
        write_atomically(directory / features_file, lambda path: save_file(tensors, path))
    return {
        "name": shard.name,
        "count": len(shard),
        "facts": dataclasses.asdict(TableFacts.of(shard.table)),
        "files": {file: file_facts(directory / file) for file in (features_file, table_file)},
    }


def join_shards(name: str, shards: Sequence[Shard]) -> Shard:
    """The rows of several shards, in their order, as one."""
    features = {key: joined([shard.tensors[key] for shard in shards]) for key in shards[0].tensors}
    return make_shard(name, features, [record for shard in shards for record in shard.table])


def read_shard(directory: Path, entry: Mapping[str, Any]) -> Shard:
    """A shard as it was written. Its files are mapped into memory, and stay so if they are deleted; none stays open.

    Raises:
        EntityIndexError: if a file is missing, damaged, or not as its entry says.
    """
    features_file, table_file = shard_files(entry["name"])
    for file in (features_file, table_file):
        path = directory / file
        size, expected = size_of(path), entry["files"][file]["bytes"]
        if size is None:
            raise EntityIndexError(
                f"The index {directory} lacks its file {file}. Restore the file, or build the index again."
            )
        if size != expected:
            raise EntityIndexError(
                f"The index file {path} has {size} bytes instead of {expected}: it was cut short or "
                "changed. Restore the file, or build the index again."
            )
    if not entry["files"][table_file]["bytes"]:
        raise EntityIndexError(f"The index file {directory / table_file} is empty. Build the index again.")
    path = directory / features_file
    try:
        tensors = _read_tensors(path, entry["files"][features_file]["bytes"])
        path = directory / table_file
        table = mapped(path, entry["files"][table_file]["bytes"])
    except (OSError, RuntimeError, SafetensorError) as error:
        raise EntityIndexError(
            f"The index file {path} is damaged: {error}. Restore it, or build the index again."
        ) from error
    numbers = {}
    for name, dtype in (("offsets", torch.int64), ("hashes", torch.int64), ("hash_rows", torch.int32)):
        tensor = tensors.get(f"table.{name}")
        if tensor is None or tensor.dtype != dtype or tensor.dim() != 1 or not len(tensor):
            raise EntityIndexError(
                f"The index file {directory / features_file} lacks a valid `table.{name}`. Build the index again."
            )
        numbers[name] = tensor.numpy()
    features = {key.removeprefix("feature."): t for key, t in tensors.items() if key.startswith("feature.")}
    shard = Shard(
        entry["name"],
        features,
        Table(table, numbers["offsets"]),
        numbers["hashes"].view(np.uint64),
        numbers["hash_rows"],
    )
    counts = {len(shard), entry["count"], len(shard.hashes), len(shard.hash_rows)}
    counts |= {tensor.shape[0] if tensor.dim() else 0 for tensor in shard.tensors.values()}
    if len(counts) > 1 or int(shard.table._offsets[-1]) != len(table):
        raise EntityIndexError(
            f"The parts of the index file {directory / features_file} disagree in their number of entities "
            f"({sorted(counts)}). Build the index again."
        )
    return shard


def _read_tensors(path: Path, size: int) -> dict[str, Tensor]:
    if is_small(size):
        return load(regular(path).read_bytes())
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict


def shard_files(name: Any) -> tuple[str, str]:
    if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
        raise EntityIndexError(f"The index names a part {name!r}, which is not a valid name: the index is damaged.")
    return f"{name}.safetensors", f"{name}.jsonl"


def check_shards(shards: Sequence[Shard], matcher: Matcher, dtype: torch.dtype, where: Path) -> None:
    """Makes sure that the features of all shards are what the matcher scores."""
    expected = stored_layout(matcher, dtype)
    lengths: set[int] = set()
    for shard in shards:
        tensors = shard.tensors
        same = layout_of(tensors) == layout_of(expected)
        same = same and all(tensor.dtype == expected[name].dtype for name, tensor in tensors.items())
        if same:
            lengths |= {tensors[name].shape[1] for name in TOKENS if name in tensors}
            same = len(lengths) == 1 and lengths != {0}
        if not same:
            raise EntityIndexError(
                f"The features in {where / shard_files(shard.name)[0]} are not those that this index's model makes: "
                "their names, shapes or precision differ. Build the index again."
            )


def _taken(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    # `index_select` copies whole rows: ten times as fast as indexing.
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _joined(parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Pieces as one tensor, each where it belongs; one after the other if that is not said."""
    if len(parts) == 1:
        return parts[0][0]  # in the order that it was asked for
    if parts[0][1] is None:
        return joined([piece for piece, _ in parts])
    whole = parts[0][0].new_empty(sum(len(piece) for piece, _ in parts), *parts[0][0].shape[1:])
    for piece, places in parts:
        whole.index_copy_(0, cast(Tensor, places), piece)
    return whole


# --- All shards ---------------------------------------------------------------------------------------------------


class Store:
    """The rows of an index: its shards one after the other, and which rows are removed.

    It is the `EntityBlocks` of search_mimic.
    """

    def __init__(self, shards: Sequence[Shard], removed: Tensor | None = None) -> None:
        self.shards = list(shards)
        self.starts = [0]
        for shard in self.shards:
            self.starts.append(self.starts[-1] + len(shard))
        self.removed = torch.zeros(len(self), dtype=torch.bool) if removed is None else removed
        self.removed_count = int(self.removed.sum())

    def __len__(self) -> int:
        """The number of rows, removed ones too."""
        return self.starts[-1]

    def records(self) -> Iterator[dict[str, Any]]:
        for shard, start in zip(self.shards, self.starts, strict=False):
            for row in range(len(shard)):
                if not self.removed[start + row]:
                    yield shard.table[row]

    @property
    def feature_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for shard in self.shards for t in shard.tensors.values())

    def compacted(self, size_after: Callable[[int], int], new_name: Callable[[int], str]) -> Iterator[Shard]:
        """The rows that are not removed, in new shards. Features are copied as they are stored.

        Args:
            size_after: the number of entities of the shard that follows so many others.
        """
        rows = (~self.removed).nonzero().squeeze(1)
        sizes: list[int] = []
        while (done := sum(sizes)) < len(rows):
            sizes.append(min(size_after(done), len(rows) - done))
        for number, chunk in enumerate(rows.split(sizes)):
            pieces = list(self._pieces(chunk))
            features = {
                name: joined([shard.tensors[name][inside] for shard, inside, _ in pieces])
                for name in self.shards[0].tensors
            }
            yield make_shard(new_name(number), features, [self.record(row) for row in chunk.tolist()])

    def record(self, row: int) -> dict[str, Any]:
        number = bisect.bisect_right(self.starts, row) - 1
        return self.shards[number].table[row - self.starts[number]]

    @cached_property
    def ids(self) -> IdRows:
        """The rows of all ids, those of removed entities too."""
        ids = IdRows()
        for shard in self.shards:
            ids.add(shard)
        return ids

    def row(self, entity_id: str) -> int | None:
        """The row of an entity that is not removed."""
        for row in self.ids.rows(hash_id(entity_id)):
            if not self.removed[row] and self.record(row)["id"] == entity_id:
                return row
        return None

    def check(self) -> None:
        """Reads everything, and makes sure that it is what an index can be searched by.

        Raises:
            EntityIndexError: if a number is not finite, or too large, an entity cannot be read or found by its id, or
                two entities that are not removed have the same id. Says which.
        """
        seen = IdRows()
        for shard, start in zip(self.shards, self.starts, strict=False):
            ids = list(shard.ids())
            for name, tensor in shard.tensors.items():
                rows = (~can_be_scored(tensor)).nonzero()[:, 0]
                if wrong := whose(rows[~self.removed[start + rows]], ids):
                    raise EntityIndexError(
                        f"The features `{name}` of {wrong} are not finite, or too large: scores would have no order. "
                        "Build the index again, or remove what is named."
                    )
            order = shard.hash_rows
            hashes = np.fromiter(map(hash_id, ids), dtype=np.uint64, count=len(ids))
            if not np.array_equal(np.sort(order), np.arange(len(ids))) or (hashes[order] != shard.hashes).any():
                raise EntityIndexError(
                    f"The ids of the shard {shard.name} cannot be looked up: their hashes are damaged. Build the index "
                    "again."
                )
            seen.add(shard)
            for row, (entity_id, hashed) in enumerate(zip(ids, hashes.tolist(), strict=True), start):
                if self.removed[row]:
                    continue
                others = (other for other in seen.rows(hashed) if other < row and not self.removed[other])
                if any(self.record(other)["id"] == entity_id for other in others):
                    raise EntityIndexError(
                        f"The index holds the entity {entity_id!r} twice: it is damaged. Build the index again."
                    )

    def _pieces(self, rows: Tensor | slice) -> Iterator[tuple[Shard, slice | Tensor, Tensor | None]]:
        """For each shard that has some of the rows: the shard, the rows within it, and their places in the result."""
        if isinstance(rows, slice):
            number = max(0, bisect.bisect_right(self.starts, rows.start) - 1)
            while number < len(self.shards) and self.starts[number] < rows.stop:
                shard, start = self.shards[number], self.starts[number]
                yield shard, slice(max(rows.start - start, 0), min(rows.stop - start, len(shard))), None
                number += 1
            return
        rows = rows.cpu()
        numbers = torch.bucketize(rows, torch.tensor(self.starts), right=True) - 1
        for number in numbers.unique().tolist():
            places = (numbers == number).nonzero().squeeze(1)
            yield self.shards[number], rows[places] - self.starts[number], places

    def gather(self, rows: Tensor | slice, names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        pieces = list(self._pieces(rows)) or [(self.shards[0], slice(0, 0), None)]
        result: dict[str, Tensor] = {}
        for name in names:
            if name not in pieces[0][0].tensors:
                continue
            stored = {}
            for key in (name, name + "_scale"):
                if key in pieces[0][0].tensors:
                    parts = [(_taken(shard.tensors[key], inside), places) for shard, inside, places in pieces]
                    stored[key] = _joined(parts).to(device)  # converted after that: what is stored is smaller
            result[name] = dequantized(stored, name)
        return result

    @property
    def _names(self) -> list[str]:
        return [name for name in self.shards[0].tensors if not name.endswith("_scale")]

    def full(self, rows: Tensor | slice, device: torch.device) -> EntityFeatures:
        return EntityFeatures(self.gather(rows, self._names, device))

    def name_of(self, row: int) -> str:
        """What messages call the entity of a row."""
        return f"the entity {self.record(row)['id']!r}"

    def alive(self, start: int, stop: int) -> Tensor | None:
        return ~self.removed[start:stop] if self.removed_count else None


__all__ = [
    "IdRows",
    "Shard",
    "Store",
    "Table",
    "TableFacts",
    "check_shards",
    "hash_id",
    "join_shards",
    "make_shard",
    "read_shard",
    "shard_files",
    "table_line",
    "write_shard",
]

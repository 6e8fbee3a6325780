"""What an index is stored in: shards of features and tables of entities, memory-mapped, and the numbers in them.

A table is JSON Lines with offsets and hashes beside it, not Parquet: it must open where only transformers is installed,
and give one row without reading the rest. Knows neither models' encoders nor how shards are searched.
"""

from __future__ import annotations

import bisect
import dataclasses
import errno
import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors_mimic import EntityIndexError
from .matching_mimic import EntityFeatures, Matcher, MimicEncoderOutput

_SHARD_NAME = re.compile(r"[a-z]+-[0-9a-z-]+")
_KINDS = {kind: kind for kind in ("string", "bool", "int64", "float64", "list")}
# What features may be stored in.
STORED_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
# Kept in float32 whatever the rest is stored in: a few numbers an entity, made from the stored vectors.
_EXACT = ("text_bias", "image_query_stats", "image_key_stats")


# --- One shard ----------------------------------------------------------------------------------------------------


class Table:
    """The entities' own data, one JSON object a line, read when asked for."""

    def __init__(self, lines: mmap.mmap | bytes, offsets: np.ndarray) -> None:
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
            record = json.loads(self._lines[start:stop])
            if not isinstance(record, dict) or not isinstance(record.get("id"), str):
                raise ValueError("it is no entity with an id")
        except (ValueError, RecursionError) as error:
            raise EntityIndexError(
                f"The entity table is damaged at row {row}: {error}. Build the index again."
            ) from error
        return record


@dataclass
class TableFacts:
    """What a card says of a table of entities. Facts of several tables can be added."""

    described: int = 0
    characters: int = 0
    fields: dict[str, str] = field(default_factory=dict)  # types as `datasets` names them

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
            return cls(int(value["described"]), int(value["characters"]), fields)
        except (AttributeError, KeyError, TypeError, ValueError):
            return None

    def _note(self, name: str, kind: str) -> None:
        known = self.fields.setdefault(name, kind)
        if known != kind:
            self.fields[name] = "float64" if {known, kind} == {"int64", "float64"} else "string"

    def __add__(self, other: TableFacts) -> TableFacts:
        both = TableFacts(self.described + other.described, self.characters + other.characters, dict(self.fields))
        for name, kind in other.fields.items():
            both._note(name, kind)
        return both


def _type_of(value: Any) -> str:
    return {bool: "bool", int: "int64", float: "float64", list: "list"}.get(type(value), "string")


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

    def rows_of(self, entity_id: str, hashed: int) -> list[int]:
        first = int(np.searchsorted(self.hashes, np.uint64(hashed), side="left"))
        last = int(np.searchsorted(self.hashes, np.uint64(hashed), side="right"))
        rows = [int(row) for row in self.hash_rows[first:last]]
        return [row for row in rows if self.table[row]["id"] == entity_id]


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
    table = shard.table._lines[:]
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


def read_shard(directory: Path, entry: Mapping[str, Any]) -> Shard:
    features_file, table_file = shard_files(entry["name"])
    for file in (features_file, table_file):
        path = directory / file
        if not path.is_file():
            raise EntityIndexError(
                f"The index {directory} lacks its file {file}. Restore the file, or build the index again."
            )
        expected = entry["files"][file]["bytes"]
        if path.stat().st_size != expected:
            raise EntityIndexError(
                f"The index file {path} has {path.stat().st_size} bytes instead of {expected}: it was cut short or "
                "changed. Restore the file, or build the index again."
            )
    try:
        with safe_open(directory / features_file, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise EntityIndexError(
            f"The index file {directory / features_file} is damaged: {error}. Restore it, or build the index again."
        ) from error
    try:
        with open(directory / table_file, "rb") as lines:
            table = mmap.mmap(lines.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:
        raise EntityIndexError(f"The index file {directory / table_file} is empty. Build the index again.") from error
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


def shard_files(name: Any) -> tuple[str, str]:
    if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
        raise EntityIndexError(f"The index names a part {name!r}, which is no valid name: the index is damaged.")
    return f"{name}.safetensors", f"{name}.jsonl"


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file so that it is either whole or not there, whenever the process ends."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that nobody else may read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def no_space_told(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not full:
            raise
        raise EntityIndexError(
            f"No space is left on the disk of {directory}. What is finished is kept: make room and run the same "
            "command again."
        ) from error


def file_facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# --- Numbers ------------------------------------------------------------------------------------------------------


def quantized(features: EntityFeatures, matcher: Matcher, dtype: torch.dtype) -> dict[str, Tensor]:
    """Features as they are stored. What is made from vectors is made anew, from the vectors as they were rounded."""
    stored: dict[str, Tensor] = {}
    rounded: dict[str, Tensor] = {}
    for name, tensor in features.tensors.items():
        tensor = tensor.detach().to("cpu")
        if name in _EXACT or tensor.dtype == torch.bool:
            stored[name] = tensor if tensor.dtype == torch.bool else tensor.float()
            continue
        tensor = tensor.float()
        _check_finite(name, tensor)
        if dtype == torch.int8:
            scale = tensor.abs().amax(dim=-1).clamp(min=1e-12) / 127
            stored[name] = (tensor / scale.unsqueeze(-1)).round().to(torch.int8)
            stored[name + "_scale"] = scale
        else:
            stored[name] = tensor.to(dtype)
            if not bool(torch.isfinite(stored[name]).all()):
                raise EntityIndexError(f'The values of `{name}` are too large for float16; use dtype="float32".')
        rounded[name] = dequantized(stored, name)
    stored |= matcher.vdlu.entity_stats(rounded, stored)
    for name in _EXACT:
        _check_finite(name, stored[name])
    return stored


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise EntityIndexError(f"The model gives `{name}` values that are not finite; no index can be made of it.")


def dequantized(stored: Mapping[str, Tensor], name: str) -> Tensor:
    tensor = stored[name]
    if tensor.dtype == torch.int8:
        return tensor.float() * stored[name + "_scale"].unsqueeze(-1)
    return tensor if tensor.dtype == torch.bool else tensor.float()


# Features of one model have the same names and shapes, but for the number of tokens, which is their first dimension.
_TOKENS = ("text_query", "text_query_scale", "text_key", "text_value", "text_mask")


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: (tensor.dim(), *tensor.shape[2 if name in _TOKENS else 1 :]) for name, tensor in tensors.items()}


def _blank(matcher: Matcher) -> tuple[MimicEncoderOutput, Tensor]:
    """What an encoder gives for one item, all zeros, and its mask: for the shapes."""
    projected, hidden = matcher.tglu.fc_cls.in_features, matcher.tglu.fc_query.in_features
    image = matcher.vdlu.dual_ent2men.cls_fc.in_features
    shapes = {
        "text_embeds": (projected,),
        "text_tokens": (1, hidden),
        "image_embeds": (image,),
        "image_tokens": (1, image),
    }
    device = matcher.tglu.fc_cls.weight.device
    zeros = {name: torch.zeros(1, *shape, device=device) for name, shape in shapes.items()}
    return MimicEncoderOutput(**zeros), torch.ones(1, 1, device=device)


def mention_layout(matcher: Matcher) -> dict[str, tuple[int, ...]]:
    return layout_of(matcher.mention_features(*_blank(matcher)).tensors)


def check_shards(shards: Sequence[Shard], matcher: Matcher, dtype: torch.dtype, where: Path) -> None:
    """Makes sure that the features of all shards are what the matcher scores."""
    expected = quantized(matcher.entity_features(*_blank(matcher)), matcher, dtype)
    length = 0
    for shard in shards:
        tensors = shard.tensors
        same = layout_of(tensors) == layout_of(expected)
        same = same and all(tensor.dtype == expected[name].dtype for name, tensor in tensors.items())
        if same:
            length = length or tensors["text_query"].shape[1]
            same = all(tensors[name].shape[1] == length for name in _TOKENS if name in tensors)
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
        return torch.cat([piece for piece, _ in parts])
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

    def compacted(self, shard_entities: int, new_name: Callable[[int], str]) -> Iterator[Shard]:
        """The rows that are not removed, in shards of equal size. Features are copied as they are stored."""
        rows = (~self.removed).nonzero().squeeze(1)
        for number, chunk in enumerate(rows.split(shard_entities)):
            pieces = list(self._pieces(chunk))
            features = {
                name: torch.cat([shard.tensors[name][inside] for shard, inside, _ in pieces])
                for name in self.shards[0].tensors
            }
            yield make_shard(new_name(number), features, [self.record(row) for row in chunk.tolist()])

    def record(self, row: int) -> dict[str, Any]:
        number = bisect.bisect_right(self.starts, row) - 1
        return self.shards[number].table[row - self.starts[number]]

    def row(self, entity_id: str) -> int | None:
        hashed = hash_id(entity_id)
        for shard, start in zip(self.shards, self.starts, strict=False):
            for row in shard.rows_of(entity_id, hashed):
                if not self.removed[start + row]:
                    return start + row
        return None

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

    def alive(self, start: int, stop: int) -> Tensor | None:
        return ~self.removed[start:stop] if self.removed_count else None


__all__ = [
    "STORED_DTYPES",
    "Shard",
    "Store",
    "Table",
    "TableFacts",
    "check_shards",
    "dequantized",
    "file_facts",
    "hash_id",
    "layout_of",
    "make_shard",
    "mention_layout",
    "no_space_told",
    "quantized",
    "read_shard",
    "shard_files",
    "table_line",
    "write_atomically",
    "write_shard",
]

"""Parquet files of limited size, written one at a time, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

# Memory in use while writing is a few times this: a row group is gathered, converted and compressed at once.
ROW_GROUP_BYTES = 32 << 20
ROW_GROUP_ROWS = 1000


@dataclass(frozen=True)
class Shard:
    """Rows `start` to `stop` of a split, and the file that they go to."""

    path: str
    start: int
    stop: int


def plan_shards(folder: str, split: str, row_bytes: Iterable[int], max_shard_bytes: int) -> list[Shard]:
    """Cut a split into files of at most `max_shard_bytes`, or one row.

    Args:
        folder: the folder of the files, such as `mentions`.
        split: what their names begin with.
        row_bytes: the size of each row, images included.
        max_shard_bytes: the size that a file should not exceed.
    """
    bounds, total, count = [0], 0, 0
    for count, size in enumerate(row_bytes, start=1):
        if total and total + size > max_shard_bytes:
            bounds.append(count - 1)
            total = 0
        total += size
    bounds.append(count)
    number = len(bounds) - 1
    return [
        Shard(f"{folder}/{split}-{index:05d}-of-{number:05d}.parquet", bounds[index], bounds[index + 1])
        for index in range(number)
    ]


class Manifest:
    """Which shards of an output folder are complete, kept in the folder as `.prepare/manifest.json`.

    Args:
        output_dir: the folder.
        fingerprint: of the input and the options. A folder that was begun with another one is refused.

    Raises:
        FileExistsError: the folder holds the output of another input or other options, or other files.
    """

    FOLDER = ".prepare"

    def __init__(self, output_dir: Path, fingerprint: str):
        self.output_dir = output_dir
        self.path = output_dir / self.FOLDER / "manifest.json"
        self.fingerprint = fingerprint
        self.shards: dict[str, dict[str, int]] = {}
        if self.path.exists():
            try:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
                same = stored["fingerprint"] == fingerprint
                self.shards = stored["shards"]
            except (ValueError, KeyError, TypeError) as error:
                raise FileExistsError(
                    f"{self.path} is damaged; delete {output_dir} or choose another folder"
                ) from error
            if not same:
                raise FileExistsError(
                    f"{output_dir} holds output of another input or other options; delete it or choose another folder"
                )
        elif output_dir.exists() and any(output_dir.iterdir()):
            raise FileExistsError(
                f"{output_dir} is not empty and was not written by this command; choose another folder"
            )

    def save(self) -> None:
        """Write the manifest; it is either the old or the new one, whatever happens."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"fingerprint": self.fingerprint, "shards": self.shards}, indent=1)
        write_atomically(self.path, text.encode())

    def is_complete(self, shard: Shard) -> bool:
        """Whether the shard was written to its end and is still there."""
        facts = self.shards.get(shard.path)
        with contextlib.suppress(OSError):
            return facts is not None and (self.output_dir / shard.path).stat().st_size == facts["bytes"]
        return False


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that no half of it is ever seen under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".incomplete")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _row_groups(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        row_size = row_bytes(row)
        if group and (size + row_size > ROW_GROUP_BYTES or len(group) >= ROW_GROUP_ROWS):
            yield group
            group, size = [], 0
        group.append(row)
        size += row_size
    if group:
        yield group


def row_bytes(value: Any) -> int:
    """Bytes of a row's texts and images."""
    if isinstance(value, dict):
        return sum(map(row_bytes, value.values()))
    if isinstance(value, list):
        return sum(map(row_bytes, value))
    return len(value) if isinstance(value, str | bytes) else 4


def _leaves(path: str, type_: pa.DataType) -> list[str]:
    """The names that Parquet gives the columns of a field."""
    if pa.types.is_struct(type_):
        return [leaf for field in type_ for leaf in _leaves(f"{path}.{field.name}", field.type)]
    return _leaves(f"{path}.list.element", type_.value_type) if pa.types.is_list(type_) else [path]


def write_shard(path: Path, rows: Iterable[dict[str, Any]], features: datasets.Features) -> tuple[int, int]:
    """Write rows, with images as `{"bytes", "path"}`, to a Parquet file that appears when it is complete.

    Returns:
        The number of rows and the bytes of the file.
    """
    schema = features.arrow_schema
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".incomplete")
    count = 0
    columns = [leaf for field in schema for leaf in _leaves(field.name, field.type)]
    with pq.ParquetWriter(
        temporary,
        schema,
        # Images are compressed already, and seldom the same.
        compression={column: "none" if column.endswith(".bytes") else "snappy" for column in columns},
        use_dictionary=[column for column in columns if not column.endswith(".bytes")],
        # Chunks cut by content let the Hub store only what changed between two versions of a file.
        use_content_defined_chunking=True,
        write_page_index=True,
    ) as writer:
        for group in _row_groups(rows):
            writer.write_batch(pa.RecordBatch.from_pylist(group, schema=schema))
            count += len(group)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return count, path.stat().st_size

"""An index made in parts: which entities are in which part, and parts joined to one index without encoding them again.

Parts are indexes of their own, each with its lock and its unfinished build to go on with. They may be made by
processes of one machine, in a directory that several machines share, or by machines that share nothing. Knows files,
not searches.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .building_mimic import Builder, build_in_directory
from .directory_mimic import (
    MANIFEST,
    Manifest,
    new_manifest,
    new_shard_name,
    next_generation,
    open_directory,
    publish,
    read_manifest,
)
from .errors_mimic import EntityIndexError
from .files_mimic import locked, no_space_told
from .identity_mimic import same_model
from .matching_mimic import Matcher
from .records_mimic import Records, Span
from .store_mimic import Store, read_shard, shard_files


@dataclass
class Part:
    """One of the indexes that are joined."""

    directory: Path
    manifest: Manifest
    store: Store
    matcher: Matcher

    @classmethod
    def opened(cls, directory: Path) -> Part:
        return cls(directory, *open_directory(directory))


def part_directory(directory: Path, index: int, parts: int) -> Path:
    """Where the `index`-th of so many parts of an index is made, before it is joined with the others."""
    return directory / f"part-{index:05d}-of-{parts:05d}"


def checked_part(shard: Any) -> tuple[int, int]:
    """The number of a part, from 0, and how many there are.

    Raises:
        ValueError: if they are none.
    """
    try:
        index, parts = shard
        fits = type(index) is int and type(parts) is int and 0 <= index < parts
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            "`shard` must be the number of a part, from 0, and how many parts there are, such as (0, 4) to (3, 4); got "
            f"{shard!r}."
        )
    return index, parts


def records_of_part(entities: Any, index: int, parts: int, **places: Any) -> Span:
    """The entities of the `index`-th of so many parts, in their order; the sizes of parts differ by one at most.

    Args:
        **places: `allow_urls` and `image_root`, as of `Records`.

    Raises:
        ValueError: if they cannot be counted, or are fewer than parts.
    """
    records = Records(entities, **places)
    if records.total is None or not records.again:
        raise ValueError(
            "`shard` needs entities that can be counted and read by number: a data set, a DataFrame or a list, not a "
            "stream or generator. Of a stream give each build its own part, and join them with EntityIndex.merge."
        )
    if records.total < parts:
        raise ValueError(f"{records.total} entities cannot be built in {parts} parts: use {records.total} at most.")
    size, larger = divmod(records.total, parts)
    records.take(index * size + min(index, larger))
    return records.take(size + (index < larger))


def build_part(builder: Builder, entities: Any, directory: Path, index: int, parts: int, overwrite: bool) -> Path:
    """Builds a part; the last that is complete joins all of them to the index in `directory`.

    Returns:
        the directory of what is there now: the whole index, or this part where others are not complete yet.

    Raises:
        EntityIndexError: as of `build_in_directory`.
        ValueError: as of [`records_of_part`].
    """
    own = part_directory(directory, index, parts)
    if (directory / MANIFEST).exists() and not overwrite and not own.exists():
        raise EntityIndexError(
            f"{directory} already holds an index. Name another directory, or pass overwrite=True to replace it."
        )
    records = records_of_part(entities, index, parts, allow_urls=builder.allow_urls, image_root=builder.image_root)
    # Where images are read from was told by what the records are from.
    places = records.places
    builder = dataclasses.replace(builder, allow_urls=places.allow_urls, image_root=places.image_root)
    records = Span(records.records, records.start, records.stop)
    if not (own / MANIFEST).exists() or overwrite:
        build_in_directory(builder, records, own, overwrite)
    every = [part_directory(directory, number, parts) for number in range(parts)]
    while own.exists():
        try:
            with locked(directory):
                # Two may be complete at the same moment: one of them joins all, the other finds that done.
                if own.exists() and not all((path / MANIFEST).exists() for path in every):
                    return own
                if own.exists():
                    _merge(every, directory, move=True)
        except EntityIndexError as error:
            if not isinstance(error.__cause__, TimeoutError):  # another is joining them
                raise
    return directory


def merge_parts(directories: Sequence[Path], output_dir: Path, *, move: bool = False, overwrite: bool = False) -> None:
    """Joins stored indexes to one, in their order, by links to their files, or by copies where links are not possible.

    The parts stay as they are, unless they are moved: then they are deleted once the index is complete. Whenever the
    process is killed, the parts are whole or the index is.

    Raises:
        EntityIndexError: if a part is missing, damaged or unfinished, parts are of different models or precisions, two
            have an entity of the same id, or `output_dir` holds an index already.
    """
    with locked(output_dir):
        if (output_dir / MANIFEST).exists() and not overwrite:
            raise EntityIndexError(
                f"{output_dir} already holds an index. Name another directory, or pass overwrite=True to replace it."
            )
        _merge(directories, output_dir, move)


def _merge(directories: Sequence[Path], output_dir: Path, move: bool) -> None:
    parts = [Part.opened(directory) for directory in directories]
    _check_fits(parts)
    manifest = new_manifest(parts[0].manifest["dtype"], parts[0].manifest["model"])
    manifest["generation"] = next_generation(output_dir)
    entries: list[dict[str, Any]] = []
    try:
        with no_space_told(output_dir):
            for part in parts:
                for entry in part.manifest["shards"]:
                    entries.append(_linked(part.directory, entry, output_dir, len(entries)))
        manifest["shards"] = entries
        removed = torch.cat([part.store.removed for part in parts])
        store = Store([read_shard(output_dir, entry) for entry in entries], removed)
        publish(output_dir, manifest, store, parts[0].matcher)
    except BaseException:
        _remove_linked(output_dir, entries)
        raise
    if move:
        for part in parts:
            if part.directory.resolve() != output_dir.resolve():
                shutil.rmtree(part.directory, ignore_errors=True)


def _remove_linked(directory: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Deletes what was linked, unless it is the index by now."""
    with suppress(EntityIndexError):
        if {entry["name"] for entry in read_manifest(directory)["shards"]} >= {entry["name"] for entry in entries}:
            return
    for entry in entries:
        for file in shard_files(entry["name"]):
            (directory / file).unlink(missing_ok=True)


def _check_fits(parts: Sequence[Part]) -> None:
    if not parts:
        raise EntityIndexError("There are no parts to merge: name the directories of one index or more.")
    first = parts[0]
    for number, part in enumerate(parts):
        if any(part.directory.resolve() == other.directory.resolve() for other in parts[:number]):
            raise EntityIndexError(f"The part {part.directory} is named twice.")
        if part.manifest["dtype"] != first.manifest["dtype"]:
            raise EntityIndexError(
                f"The part {part.directory} is stored in {part.manifest['dtype']}, the part {first.directory} in "
                f"{first.manifest['dtype']}: parts must have one precision. Build one of them again."
            )
        if not same_model(part.manifest["model"], first.manifest["model"]):
            raise EntityIndexError(
                f"The part {part.directory} was made by another model or processor than the part {first.directory}: "
                "their scores cannot be compared. Build one of them again."
            )
        for other in parts[:number]:
            _check_ids(other, part)


def _check_ids(one: Part, other: Part) -> None:
    """Refuses an id that is in both, but for entities that were removed."""
    for shard in other.store.shards:
        doubtful = one.store.ids.has(shard.hashes)
        for row in shard.hash_rows[doubtful].tolist():
            entity_id = shard.table[row]["id"]
            if one.store.row(entity_id) is not None and other.store.row(entity_id) is not None:
                raise EntityIndexError(
                    f"The parts {one.directory} and {other.directory} both have the entity {entity_id!r}: ids must be "
                    "unique. Remove it from one of them."
                )


def _linked(source: Path, entry: dict[str, Any], directory: Path, number: int) -> dict[str, Any]:
    """A shard's files in another directory, and its entry there; its name tells its place."""
    name, files = new_shard_name(number), {}
    for old, new in zip(shard_files(entry["name"]), shard_files(name), strict=True):
        try:
            os.link(source / old, directory / new)
        except OSError:  # another file system, or one that has no links; a full disk is told by the copy
            shutil.copyfile(source / old, directory / new)
        files[new] = entry["files"][old]
    return {**entry, "name": name, "files": files}


__all__ = ["build_part", "checked_part", "merge_parts", "part_directory", "records_of_part"]

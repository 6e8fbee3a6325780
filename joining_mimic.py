"""Joins stored indexes to one without encoding anything again: with links to their files, or copies of them.

Knows files, but not how the parts were made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .directory_mimic import (
    MANIFEST,
    Manifest,
    delete_index,
    new_manifest,
    new_shard_name,
    next_generation,
    open_directory,
    publish,
    read_manifest,
)
from .errors_mimic import EntityIndexError
from .files_mimic import is_there, locked, no_space_told
from .identity_mimic import same_model
from .matching_mimic import Matcher
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
        if not is_there(directory):
            raise EntityIndexError(
                f"There is no directory {directory}. Parts are directories; that of an index on the Hub is "
                f"EntityIndex.from_pretrained({str(directory)!r}).directory."
            )
        return cls(directory, *open_directory(directory))


def merge_parts(directories: Sequence[Path], output_dir: Path, *, move: bool = False, overwrite: bool = False) -> None:
    """Joins stored indexes to one, in their order, by links to their files, or by copies where links are not possible.

    The parts stay as they are, unless they are moved: then their files are deleted once the index is complete. Whenever
    the process is killed, the parts are whole or the index is.

    Raises:
        EntityIndexError: if a part is missing, damaged or unfinished, parts are of different models or precisions, two
            have an entity of the same id, or `output_dir` holds an index already.
    """
    with locked(output_dir):
        if (output_dir / MANIFEST).exists() and not overwrite:
            raise EntityIndexError(
                f"{output_dir} already holds an index. Name another directory, or pass overwrite=True to replace it."
            )
        merge_locked(directories, output_dir, move)


def merge_locked(
    directories: Sequence[Path],
    output_dir: Path,
    move: bool,
    before_it_counts: Callable[[Manifest], None] = lambda manifest: None,
) -> None:
    """As [`merge_parts`], in a directory that the caller holds, whatever is there.

    Args:
        before_it_counts: is called when all files are there, with the list of files that is to be the index then.
    """
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
        before_it_counts(manifest)
        publish(output_dir, manifest, store, parts[0].matcher)
    except BaseException:
        _remove_linked(output_dir, entries)
        raise
    if move:
        for part in parts:
            if part.directory.resolve() != output_dir.resolve():
                delete_index(part.directory, part.manifest)


def _remove_linked(directory: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Deletes what was linked, unless it is the index by now."""
    with suppress(EntityIndexError):
        if {entry["name"] for entry in read_manifest(directory)["shards"]} >= {entry["name"] for entry in entries}:
            return
    _delete_shards(directory, [entry["name"] for entry in entries])


def _delete_shards(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        for file in shard_files(name):
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
    try:
        for old, new in zip(shard_files(entry["name"]), shard_files(name), strict=True):
            try:
                os.link(source / old, directory / new)
            except OSError:  # another file system, or one that has no links; a full disk is told by the copy
                shutil.copyfile(source / old, directory / new)
            files[new] = entry["files"][old]
    except BaseException:
        _delete_shards(directory, [name])
        raise
    return {**entry, "name": name, "files": files}


__all__ = ["Part", "merge_locked", "merge_parts"]

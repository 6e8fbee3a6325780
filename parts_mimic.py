"""An index made in parts: which entities are in which part, and parts joined to one index without encoding them again.

Parts are indexes of their own, each with its lock and its unfinished build to go on with. They may be made by
processes of one machine, in a directory that several machines share, or by machines that share nothing. Knows files,
not searches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

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
from .files_mimic import is_locked, locked, no_space_told, read_json, write_json
from .identity_mimic import model_facts, same_model
from .image_sources_mimic import ImagePlaces
from .matching_mimic import Matcher
from .records_mimic import Records, Span, table_record
from .store_mimic import Store, read_shard, shard_files, table_line

logger = logging.getLogger("mimic_el.index")

# What a part notes of the entities that it is a part of, so that parts of other entities are not joined with it; and
# the index that was joined, so that a process that comes late knows it for its own.
_WHOLE = "part_of.json"
_STARTED = time.time()
_SAMPLED = 64
# A part on which no process works, and which has not changed for so many seconds, is given up.
_SILENCE = 600.0
_PAUSES = 0.05, 2.0


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


@dataclass
class RecordsOfPart:
    """The records of a part, and of what they are a part.

    Args:
        records: read by number, or one after the other, any number of times.
        places: where images that are named by a string are read from.
        whole: facts of the whole knowledge base, as JSON has them: its size, and a checksum of some of its records.
    """

    records: Any
    places: ImagePlaces
    whole: dict[str, Any]


def records_of_part(entities: Any, index: int, parts: int, **places: Any) -> RecordsOfPart:
    """The entities of the `index`-th of so many parts, in their order; the sizes of parts differ by one at most.

    What cannot be counted is read once for that.

    Args:
        **places: `allow_urls` and `image_root`, as of `Records`.

    Raises:
        ValueError: if they can be read only once, or are fewer than parts.
    """
    records = Records(entities, **places)
    if not records.again:
        raise ValueError(
            "An index in parts needs entities that can be read more than once: a data set, a DataFrame, a list or a "
            "file, not a generator. Give each build its own part, and join them with EntityIndex.merge."
        )
    digest = hashlib.sha256()
    every: Any = None
    if records.at_once is not None:  # read one after the other
        lines = (table_line(table_record(record)) for record in records.skip(sys.maxsize))
        total = sum(1 for _ in map(digest.update, lines))
    else:
        total = records.total or 0
        every = records.take(total)
        rows = every.without_images()  # of which some are read: reading all would cost as much as the part itself
        for place in sorted({place * (total - 1) // (_SAMPLED - 1) for place in range(_SAMPLED if total else 0)}):
            digest.update(table_line(table_record(rows[place])))
    if total < parts:
        raise ValueError(f"{total} entities cannot be built in {parts} parts: use {total} at most.")
    size, larger = divmod(total, parts)
    start = index * size + min(index, larger)
    stop = start + size + (index < larger)
    # Where images are read from was told by what the records are from: these are as they are.
    part = _Between(entities, start, stop) if every is None else Span(every.records, start, stop)
    return RecordsOfPart(part, records.places, {"entities": total, "records": digest.hexdigest()})


@dataclass
class _Between:
    """Some records of a knowledge base that is read one after the other."""

    entities: Any
    start: int
    stop: int

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return itertools.islice(Records(self.entities).skip(sys.maxsize), self.start, self.stop)


def process_of_launch() -> tuple[int, int] | None:
    """This process's number among those that `accelerate launch` or `torchrun` started, and how many there are; `None`
    where it is alone."""
    if dist.is_available() and dist.is_initialized():
        rank, count = dist.get_rank(), dist.get_world_size()
    else:
        try:
            rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        except (KeyError, ValueError):
            return None
    return (rank, count) if 0 <= rank < count and count > 1 else None


def build_part(
    builder: Builder, entities: Any, directory: Path, index: int, parts: int, overwrite: bool, wait: bool = False
) -> Path:
    """Builds a part; the last that is complete joins all of them to the index in `directory`.

    Args:
        wait: whether to wait for the others, as long as processes work on them.

    Returns:
        the directory of what is there now: the whole index, or this part where others are not complete yet.

    Raises:
        EntityIndexError: as of `build_in_directory`; if parts are of different entities; if a part that is waited for
            is given up.
        ValueError: as of [`records_of_part`].
    """
    own = part_directory(directory, index, parts)
    records = records_of_part(entities, index, parts, allow_urls=builder.allow_urls, image_root=builder.image_root)
    made_by = json.dumps(model_facts(builder.model, builder.processor), sort_keys=True, default=str)
    whole = {**records.whole, "dtype": builder.dtype, "model": hashlib.sha256(made_by.encode()).hexdigest()}
    places = records.places
    builder = dataclasses.replace(builder, allow_urls=places.allow_urls, image_root=places.image_root)
    # Nobody joins the parts meanwhile: one that is complete may go at any other moment.
    with _turn(directory):
        if (directory / MANIFEST).exists() and not own.exists():
            if wait and _was_joined(directory, whole, overwrite):
                return directory
            if not overwrite:
                raise EntityIndexError(
                    f"{directory} already holds an index. Name another directory, or pass overwrite=True to replace it."
                )
        _note_whole(own, whole, overwrite)
        complete = _is_complete(own)
        if complete and not _holds(own, records.records):
            if not overwrite:
                raise EntityIndexError(
                    f"{own} is complete, with entities as they were before: some of theirs are others now. Pass "
                    "overwrite=True in all processes to encode them again."
                )
            _begin_again(own)
            complete = False
    if not complete:
        build_in_directory(builder, records.records, own, overwrite)
    every = [part_directory(directory, number, parts) for number in range(parts)]
    if _joined(directory, own, every, whole, overwrite):
        return directory
    if not wait:
        return own
    logger.info("Part %d of %d is complete; waiting for the others.", index + 1, parts)
    _wait_for_others(directory, own, every, whole, overwrite)
    return directory


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """Holds an index's directory, however long others hold it before."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(locked(directory))
                break
            except EntityIndexError as error:
                if not isinstance(error.__cause__, TimeoutError):
                    raise
        yield


def _was_joined(directory: Path, whole: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether an index is what this build would give, joined by the others before this process came to it, since its
    part was complete already; one that is to be replaced only if that was in this launch."""
    facts = _whole_of(directory)
    manifest = read_manifest(directory)
    if facts != {**whole, "generation": manifest["generation"]}:
        return False
    return not overwrite or (directory / MANIFEST).stat().st_mtime > _STARTED


def _is_complete(part: Path, whole: Mapping[str, Any] | None = None) -> bool:
    """Whether a part is; and, where that is given, whether it is a part of the same."""
    return (part / MANIFEST).exists() and (whole is None or _whole_of(part) == whole)


def _begin_again(part: Path) -> None:
    with locked(part):
        (part / MANIFEST).unlink(missing_ok=True)


def _holds(part: Path, records: Any) -> bool:
    """Whether a part that is complete is of the same records, their images apart."""
    source = Records(records)
    for entry in read_manifest(part)["shards"]:
        digest = hashlib.sha256()
        for record in source.skip(entry["count"]):
            digest.update(table_line(table_record(record)))
        if digest.hexdigest() != entry["files"][shard_files(entry["name"])[1]]["sha256"]:
            return False
    return not any(True for _ in source.skip(1))


def _joined(directory: Path, own: Path, every: Sequence[Path], whole: Mapping[str, Any], overwrite: bool) -> bool:
    """Joins all parts if all are complete. Whether they are joined now, by whichever process.

    Args:
        whole: what they are parts of.
        overwrite: whether one of something else is left by a build that is given up, and so is not complete yet; else
            it is an error.
    """
    expected = whole if overwrite else None
    while own.exists():
        with _turn(directory):
            # Two may be complete at the same moment: one of them joins all, the other finds that done.
            if own.exists() and _is_newer(directory / MANIFEST, own / MANIFEST):
                shutil.rmtree(own, ignore_errors=True)  # whoever joined them was ended before it came to that
            elif own.exists():
                if not all(_is_complete(path, expected) for path in every):
                    return False
                _check_same_whole(every)
                _merge(every, directory, move=True)
                facts = {**whole, "generation": read_manifest(directory)["generation"]}
                write_json(directory / _WHOLE, facts)
    return True


def _is_newer(one: Path, other: Path) -> bool:
    try:
        return one.stat().st_mtime_ns > other.stat().st_mtime_ns
    except OSError:
        return False


def _wait_for_others(
    directory: Path, own: Path, every: Sequence[Path], whole: Mapping[str, Any], overwrite: bool
) -> None:
    """Waits until all parts are joined, as long as processes work on those that are not complete.

    Raises:
        EntityIndexError: naming the parts that nobody works on.
    """
    pause, longest = _PAUSES
    sign, since = -1, time.monotonic()
    while not _joined(directory, own, every, whole, overwrite):
        missing = [path for path in every if not _is_complete(path, whole if overwrite else None)]
        changed = max((_changed(path) for path in missing), default=0)
        if changed != sign or any(is_locked(path) for path in missing):
            sign, since = changed, time.monotonic()
        elif time.monotonic() - since > _SILENCE:
            raise EntityIndexError(
                f"Waited for {', '.join(path.name for path in missing)} of the index {directory}, on which no process "
                f"works: nothing changed there for {_SILENCE:.0f} seconds. All processes must call build with the same "
                "entities; one that ended says why in its own messages. Make the same call again to go on; or, to "
                "build all in one process, pass shard=None."
            )
        time.sleep(pause)
        pause = min(1.5 * pause, longest)


def _changed(directory: Path) -> int:
    try:
        return directory.stat().st_mtime_ns
    except OSError:
        return 0


def _note_whole(own: Path, whole: dict[str, Any], overwrite: bool) -> None:
    """Notes in a part what it is a part of.

    Raises:
        EntityIndexError: if it was begun as a part of something else.
    """
    own.mkdir(parents=True, exist_ok=True)
    known = _whole_of(own)
    if known == whole:
        return
    if known is not None:
        if not overwrite:
            raise EntityIndexError(
                f"{own} was begun as a part of other entities ({known.get('entities')}, now {whole['entities']}, or "
                "others among them), of another model or in another precision. Make the call that it was begun with, "
                "or pass overwrite=True in all processes to start again."
            )
        _begin_again(own)
    with no_space_told(own):
        write_json(own / _WHOLE, whole)


def _whole_of(part: Path) -> dict[str, Any] | None:
    try:
        facts = read_json(part / _WHOLE)
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _check_same_whole(every: Sequence[Path]) -> None:
    """Refuses parts that processes with other data have made. Of which model they are is checked in joining them."""
    facts = [{key: (_whole_of(part) or {}).get(key) for key in ("entities", "records")} for part in every]
    for part, found in zip(every, facts, strict=True):
        if found != facts[0]:
            raise EntityIndexError(
                f"{part} and {every[0]} are parts of different entities. All processes must read the same data: the "
                "same data set, revision and options. Pass overwrite=True in all of them to start again."
            )


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


__all__ = ["build_part", "checked_part", "merge_parts", "part_directory", "process_of_launch", "records_of_part"]

"""Builds an index in parts: who builds which entities, how processes wait for each other, who joins the parts.

Each part is an index of its own, with its own lock and its own unfinished build. The processes may run on one machine,
or on several that share a directory. Knows files, not searches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import operator
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import distributed as dist

from .alive_mimic import Silence, alive, clock_ahead
from .building_mimic import Builder, build_in_directory
from .directory_mimic import BUILD_STATE, MANIFEST, PART_OF, Manifest, read_manifest
from .errors_mimic import EntityIndexError
from .files_mimic import locked, make_directory, no_space_told, read_json, write_json
from .identity_mimic import model_facts
from .image_sources_mimic import ImagePlaces
from .joining_mimic import merge_locked
from .records_mimic import Records, Span, table_record
from .store_mimic import shard_files, table_line

logger = logging.getLogger("mimic_el.index")

_STARTED = time.time()
_SAMPLED = 64
_PAUSES = 0.05, 2.0


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
        if not {type(index), type(parts)} & {bool, np.bool_}:
            index, parts = operator.index(index), operator.index(parts)  # those of numpy, too
            if 0 <= index < parts:
                return index, parts
    except (TypeError, ValueError):
        pass
    raise ValueError(
        "`shard` must be the number of a part, from 0, and how many parts there are, such as (0, 4) to (3, 4); got "
        f"{shard!r}."
    )


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
    builder: Builder,
    entities: Any,
    directory: Path,
    index: int,
    parts: int,
    overwrite: bool,
    patience: float,
    wait: bool = False,
) -> Path:
    """Builds a part; the last that is complete joins all of them to the index in `directory`.

    Args:
        patience: seconds after which a process is given up that is waited for and gives no sign of life.
        wait: whether to wait for the others, as long as processes work on them.

    Returns:
        the directory of what is there now: the whole index, or this part where others are not complete yet.

    Raises:
        EntityIndexError: as of `build_in_directory`; if parts are of different entities; if a part that is waited for
            is given up.
        ValueError: as of [`records_of_part`].
    """
    if not patience > 0:
        raise ValueError(f"`patience` must be a number of seconds above 0, got {patience!r}.")
    together = _Together(directory, index, parts, overwrite, patience)
    own = together.own
    make_directory(directory)
    with alive(together.sign(index), patience):
        records = records_of_part(entities, index, parts, allow_urls=builder.allow_urls, image_root=builder.image_root)
        together.whole = {**records.whole, **_facts_of(builder)}
        places = records.places
        builder = dataclasses.replace(builder, allow_urls=places.allow_urls, image_root=places.image_root)
        # Nobody joins the parts meanwhile: one that is complete may go at any other moment.
        with together.turn():
            if (directory / MANIFEST).exists() and not own.exists():
                if wait and together.was_joined():
                    return directory
                if not overwrite:
                    raise EntityIndexError(
                        f"{directory} already holds an index. Name another directory, or pass overwrite=True to "
                        "replace it."
                    )
            _note_whole(own, together.whole, overwrite)
            if not overwrite:
                together.check_same()
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
    if together.joined():
        return directory
    if not wait:
        return own
    logger.info("Part %d of %d is complete; waiting for the others.", index + 1, parts)
    together.wait_for_others()
    return directory


def _facts_of(builder: Builder) -> dict[str, Any]:
    """What else must be the same of all parts; what is so by default is left out."""
    facts = {"dtype": builder.dtype, "model": model_facts(builder.model, builder.processor)["fingerprint"]}
    return facts | ({"encoding_dtype": builder.encoding_dtype} if builder.encoding_dtype else {})


class _Together:
    """The parts of one index, as the process sees them that makes one of them.

    Args:
        directory: where the index will be.
        index, count: which of how many parts is made here.
        overwrite: whether a part of something else is one of a build that is given up, and so not complete yet; else
            it is an error.
        patience: as of [`build_part`].

    Attributes:
        whole: what the parts are parts of.
    """

    def __init__(self, directory: Path, index: int, count: int, overwrite: bool, patience: float) -> None:
        self.directory, self.index, self._overwrite, self._patience = directory, index, overwrite, patience
        self._every = [part_directory(directory, number, count) for number in range(count)]
        self.own = self._every[index]
        self.whole: dict[str, Any] = {}

    def sign(self, number: int) -> Path:
        """The file in which the process shows that it is alive that makes a part."""
        return self.directory / f".{self._every[number].name}.alive"

    def _silence(self, numbers: Sequence[int]) -> Silence:
        return Silence([self.sign(number) for number in numbers])

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Holds the index's directory, however long others that are alive hold it before.

        Raises:
            EntityIndexError: if it is held, and nobody gives a sign of life.
        """
        silence = self._silence([number for number in range(len(self._every)) if number != self.index])
        with ExitStack() as held:
            while True:
                try:
                    held.enter_context(locked(self.directory))
                    break
                except EntityIndexError as error:
                    if not isinstance(error.__cause__, TimeoutError) or silence.seconds() > self._patience:
                        raise
            yield

    def was_joined(self) -> bool:
        """Whether an index is what this build would give, joined by the others before this process came to it, since
        its part was complete already; one that is to be replaced only if that was in this launch."""
        if _joined_facts(self.directory, read_manifest(self.directory), ("builds",)) != self.whole:
            return False
        if not self._overwrite:
            return True
        ahead = clock_ahead(self.sign(self.index))
        return (self.directory / MANIFEST).stat().st_mtime - ahead > _STARTED

    def check_same(self) -> None:
        """Refuses parts that processes with other data, or other options, have begun."""
        for part in self._every:
            found = _whole_of(part)
            if found is None or found == self.whole:
                continue
            both = f"{part} and {self.own}"
            if any(found.get(name) != self.whole[name] for name in ("entities", "records")):
                raise EntityIndexError(
                    f"{both} are parts of different entities. All processes must read the same data: the same data "
                    "set, revision and options. Pass overwrite=True in all of them to start again."
                )
            other = [name for name in {**found, **self.whole} if found.get(name) != self.whole.get(name)]
            raise EntityIndexError(
                f"{both} are made with another {' and another '.join(other)}. All processes must have the same model "
                "and the same options. Pass overwrite=True in all of them to start again."
            )

    def joined(self) -> bool:
        """Joins all parts if all are complete. Whether they are joined now, by whichever process."""
        while self.own.exists():
            if self._missing() and not self._is_in_the_index():
                return False
            with self.turn(), alive(self.sign(self.index), self._patience):
                # Two may be complete at the same moment: one of them joins all, the other finds that done.
                if self.own.exists() and self._is_in_the_index():
                    shutil.rmtree(self.own, ignore_errors=True)  # whoever joined them was ended before it came to that
                elif self.own.exists() and not self._missing():
                    self.check_same()
                    merge_locked(self._every, self.directory, move=True, before_it_counts=self._note_joined)
                    for number in range(len(self._every)):
                        self.sign(number).unlink(missing_ok=True)  # of processes that were killed
        return True

    def _missing(self) -> list[int]:
        """The parts that are not complete."""
        expected = self.whole if self._overwrite else None
        return [number for number, path in enumerate(self._every) if not _is_complete(path, expected)]

    def _note_joined(self, manifest: Manifest) -> None:
        builds = [read_manifest(part).get("build") for part in self._every]
        facts = {**self.whole, "builds": builds, **_state(manifest)}
        write_json(self.directory / PART_OF, facts)

    def _is_in_the_index(self) -> bool:
        """Whether the own part, as it is, was joined with the others to the index that is there."""
        if not (self.directory / MANIFEST).exists() or not _is_complete(self.own):
            return False
        facts = _joined_facts(self.directory, read_manifest(self.directory), ())
        return facts is not None and read_manifest(self.own).get("build") in (facts.get("builds") or [])

    def wait_for_others(self) -> None:
        """Waits until all parts are joined, as long as processes work on those that are not complete.

        Raises:
            EntityIndexError: naming the parts that nobody works on.
        """
        pause, longest = _PAUSES
        missing: list[int] = []
        while not self.joined():
            if not self._overwrite:
                self.check_same()
            before, missing = missing, self._missing()
            if missing != before:
                silence = self._silence(missing)
            elif missing and silence.seconds() > self._patience:
                names = ", ".join(self._every[number].name for number in missing)
                raise EntityIndexError(
                    f"Waited for {names} of the index {self.directory}, on which no process works: none gave a sign of "
                    f"life for {self._patience:.0f} seconds. All processes must call build with the same entities and "
                    "options; one that ended says why in its own messages. Make the same call again to go on; or, to "
                    "build all in one process, pass shard=None."
                )
            time.sleep(pause)
            pause = min(1.5 * pause, longest)


def _state(manifest: Manifest) -> dict[str, Any]:
    """What tells an index from those that it becomes or was."""
    return {"generation": manifest["generation"], "first_shard": manifest["shards"][0]["name"]}


def _joined_facts(directory: Path, manifest: Manifest, without: Sequence[str]) -> dict[str, Any] | None:
    """What is noted of the parts of the index that is there; `None` if it was not joined, or was changed since."""
    facts = _whole_of(directory) or {}
    state = _state(manifest)
    if {name: facts.get(name) for name in state} != state:
        return None
    return {name: value for name, value in facts.items() if name not in (*state, *without)}


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


def _note_whole(own: Path, whole: dict[str, Any], overwrite: bool) -> None:
    """Notes in a part what it is a part of.

    Raises:
        EntityIndexError: if it was begun as a part of something else.
    """
    make_directory(own)
    known = _whole_of(own)
    if known == whole:
        return
    if known is not None and ((own / MANIFEST).exists() or (own / BUILD_STATE).exists()):
        if not overwrite:
            raise EntityIndexError(
                f"{own} was begun as a part of other entities ({known.get('entities')}, now {whole['entities']}, or "
                "others among them), of another model or in another precision. Make the call that it was begun with, "
                "or pass overwrite=True in all processes to start again."
            )
        _begin_again(own)
    with no_space_told(own):
        write_json(own / PART_OF, whole)


def _whole_of(part: Path) -> dict[str, Any] | None:
    try:
        facts = read_json(part / PART_OF)
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


__all__ = ["build_part", "checked_part", "part_directory", "process_of_launch", "records_of_part"]

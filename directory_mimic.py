"""The directory of an index: its list of files (the manifest), its lock, and changes that are made whole or not at all.

A change writes new files first, then replaces the manifest in one step, then deletes files that the manifest no longer
names. So whoever opens the directory finds the old index or the new one, even if a process is killed. Knows files, not
searches.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .configuration_mimic import MimicConfig
from .errors_mimic import EntityIndexError
from .files_mimic import (
    LOCK,
    file_facts,
    json_text,
    locked,
    read_json,
    regular,
    write_atomically,
    write_json,
    write_text,
)
from .identity_mimic import check_facts
from .index_card_mimic import card_of_index, is_index_card
from .matching_mimic import Matcher
from .names_mimic import NameTable
from .precision_mimic import STORED_DTYPES
from .store_mimic import Store, check_shards, read_shard, shard_files, write_shard

logger = logging.getLogger(__name__)

FORMAT, VERSION = "mimic-entity-index", 1
MANIFEST = "index_config.json"
BUILD_STATE = "build_state.json"
# Of an index that is made in parts: what a part is a part of; in the index that was joined, what its parts were.
PART_OF = "part_of.json"
# Entities in a shard of a small index. Of a large one shards grow, so that there are few, up to a size that memory
# holds while a shard is made.
SHARD_ENTITIES = 8192
_SHARDS_BEFORE_GROWTH, _MOST_GROWTH = 64, 8
_OPENINGS = 20
_WAIT_SECONDS = 0.01
_PART = re.compile(r"(shard|removed|matcher|names|first-stage)-[0-9a-z-]+\.(safetensors|jsonl|faiss|json)")
# Ours, and those that safetensors makes while it writes.
_TEMPORARY = re.compile(rf"\.({_PART.pattern}|{MANIFEST}|{BUILD_STATE}|README\.md)\.[0-9]+\.tmp|\.tmp[A-Za-z0-9]{{6}}")

Manifest = dict[str, Any]


def new_manifest(dtype: str, model: Mapping[str, Any]) -> Manifest:
    """The manifest of an index that has no shards yet."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "generation": 1,
        "dtype": dtype,
        "model": dict(model),
        "removed": None,
        "names": None,
    }


def shard_size(stored: int) -> int:
    """The number of entities of the shard that follows so many others in the making of an index."""
    return SHARD_ENTITIES * min(max(1, stored // (SHARD_ENTITIES * _SHARDS_BEFORE_GROWTH)), _MOST_GROWTH)


# --- Opening --------------------------------------------------------------------------------------------------------


def open_directory(directory: Path) -> tuple[Manifest, Store, Matcher]:
    """Opens the index in a directory; its features stay on disk until they are needed.

    Raises:
        EntityIndexError: if there is none, its build is unfinished, it is damaged, of a newer format, or changed
            again and again while it is opened.
    """
    for opening in range(_OPENINGS):
        manifest = read_manifest(directory)
        try:
            shards = [read_shard(directory, entry) for entry in manifest["shards"]]
            removed = _read_removed(directory, manifest["removed"], sum(len(shard) for shard in shards))
            matcher = _read_matcher(directory, manifest)
            check_shards(shards, matcher, STORED_DTYPES[manifest["dtype"]], directory)
            store = Store(shards, removed)
            _check_count(directory, manifest, store)
            return manifest, store, matcher
        except EntityIndexError:
            # Another process may have replaced the files since their list was read.
            if state_of(read_manifest(directory)) == state_of(manifest):
                raise
            time.sleep(_WAIT_SECONDS * opening)
    raise EntityIndexError(f"The index {directory} is being changed again and again; try later.")


def _check_count(directory: Path, manifest: Mapping[str, Any], store: Store) -> None:
    count = len(store) - store.removed_count
    if manifest.get("entities", count) != count:
        raise EntityIndexError(
            f"The index {directory} holds {count:,} entities instead of {manifest['entities']:,}: its {MANIFEST} lacks "
            "a part or names one too many. Restore that file, or build the index again."
        )


def read_manifest(directory: Path) -> Manifest:
    """The list of files of the index in a directory, checked.

    Raises:
        EntityIndexError: if there is none, its build is unfinished, it is damaged, or of a newer format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / BUILD_STATE).exists():
            raise EntityIndexError(
                f"The build of the index {directory} was interrupted. Run the same EntityIndex.build again: it goes on "
                "where it stopped."
            )
        raise EntityIndexError(f"There is no entity index in {directory}: it has no {MANIFEST}.")
    try:
        manifest = read_json(path)
        known = manifest.get("format") == FORMAT
        version = manifest.get("version")
        json.dumps(manifest, ensure_ascii=False).encode()  # half characters could not be written again
    except (OSError, ValueError, AttributeError) as error:
        raise EntityIndexError(f"{path} is damaged: {error}. Build the index again.") from error
    if not known or type(version) is not int or version < 1:
        raise EntityIndexError(f"{path} does not describe an entity index.")
    if version > VERSION:
        raise EntityIndexError(
            f"The index {directory} has the format {version}, newer than the {VERSION} that this version reads. "
            "Update the code that reads it."
        )
    if wrong := _wrong_part(manifest):
        raise EntityIndexError(f"{path} is damaged: its `{wrong}` is missing or not valid. Build the index again.")
    if manifest.get("digest", (digest := _digest(manifest))) != digest:
        raise EntityIndexError(
            f"{path} is damaged: it is not what was written, as its own digest shows. Restore it, or build the index "
            "again."
        )
    return manifest


def sealed(manifest: Mapping[str, Any]) -> Manifest:
    """A manifest with its digest, as it is written: whatever changes in it afterwards is noticed."""
    return {**manifest, "digest": _digest(manifest)}


def _digest(manifest: Mapping[str, Any]) -> str:
    rest = json.loads(json.dumps({key: value for key, value in manifest.items() if key != "digest"}))
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _wrong_part(manifest: Mapping[str, Any]) -> str | None:
    """The first key of a manifest that is not as it must be."""
    model, shards = manifest.get("model"), manifest.get("shards")
    if not _is_count(manifest.get("generation")):
        return "generation"
    if not _is_count(manifest.get("entities", 0)):
        return "entities"
    if manifest.get("dtype") not in list(STORED_DTYPES):
        return "dtype"
    if (
        not isinstance(model, dict)
        or not all(isinstance(model.get(key), str) for key in ("name", "fingerprint"))
        or not isinstance(model.get("config"), dict)
    ):
        return "model"
    if not isinstance(shards, list) or not shards:
        return "shards"
    for entry in shards:
        if not isinstance(entry, dict) or not _is_count(entry.get("count")):
            return "shards"
        if not _are_file_facts(entry.get("files"), shard_files(entry.get("name"))):
            return "shards"
    if len({entry["name"] for entry in shards}) < len(shards):
        return "shards"
    shard_files(manifest.get("matcher"))
    if "removed" not in manifest:
        return "removed"
    if manifest["removed"] is not None:
        shard_files(manifest["removed"])
    if manifest.get("names") is not None and not _is_part_entry(manifest["names"]):  # an older index has none
        return "names"
    if not _are_file_facts(manifest.get("files", {}), ()):
        return "files"
    return None


def _is_part_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and _are_file_facts(entry.get("files"), shard_files(entry.get("name"))[:1])


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_file_facts(files: Any, names: Sequence[str]) -> bool:
    """Whether `files` gives sizes and checksums, those of `names` at least, and names no file elsewhere."""
    if not isinstance(files, dict) or not set(names) <= files.keys():
        return False
    return all(
        is_part(name) and isinstance(facts, dict) and _is_count(facts.get("bytes")) for name, facts in files.items()
    )


def state_of(manifest: Mapping[str, Any]) -> tuple[int, list[str]]:
    """What tells the states of an index apart; the names of shards are random."""
    return manifest["generation"], [entry["name"] for entry in manifest["shards"]]


def files_of(manifest: Mapping[str, Any]) -> list[str]:
    """The names of the files that an index consists of."""
    files = [MANIFEST, shard_files(manifest["matcher"])[0]]
    for entry in manifest["shards"]:
        files += shard_files(entry["name"])
    if manifest["removed"]:
        files.append(shard_files(manifest["removed"])[0])
    if manifest.get("names"):
        files.append(shard_files(manifest["names"]["name"])[0])
    return files


def is_part(name: str) -> bool:
    """Whether a file name is one that parts of indexes have."""
    return _PART.fullmatch(name) is not None


def verify_files(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Compares every file of an index with the checksum that was taken when it was written.

    Raises:
        EntityIndexError: if a file differs or is missing.
    """
    files = dict(manifest.get("files", {}))
    for entry in [*manifest["shards"], *filter(None, [manifest.get("names")])]:
        files |= entry["files"]
    for file, expected in files.items():
        path = directory / file
        try:
            found = file_facts(path) if path.is_file() else None
        except OSError as error:
            raise EntityIndexError(f"{path} cannot be read: {error}.") from error
        if found is None:
            raise EntityIndexError(f"{path} is missing. Restore the file, or build the index again.")
        if found != expected:
            raise EntityIndexError(
                f"{path} is not what was written: its checksum differs. Restore the file, or build the index again."
            )


# --- Changing -------------------------------------------------------------------------------------------------------


@contextmanager
def locked_for_change(directory: Path, manifest: Manifest) -> Iterator[None]:
    """Holds an index for one change of what was opened; what a failed change has written is deleted.

    Raises:
        EntityIndexError: if another process holds it, or has changed it since it was opened.
    """
    with locked(directory):
        if state_of(read_manifest(directory)) != state_of(manifest):
            raise EntityIndexError(
                f"The index {directory} was changed by another process since it was opened. Open it again "
                "with EntityIndex.from_pretrained and repeat the change."
            )
        try:
            yield
        except BaseException:
            with suppress(OSError, EntityIndexError):
                remove_strays(directory, read_manifest(directory))
            raise


def publish(
    directory: Path, manifest: Manifest, store: Store, matcher: Matcher | None = None, names_anew: bool = False
) -> None:
    """Makes a list of files the index: what it lacks is written, it is replaced in one step, and what it no longer
    names is deleted after that."""
    if matcher is not None:
        manifest["matcher"] = _write_matcher(directory, matcher)
    manifest["removed"] = (
        _write_removed(directory, manifest["generation"], store.removed) if store.removed_count else None
    )
    manifest["entities"] = len(store) - store.removed_count
    manifest["names"] = _write_names(directory, store, names_anew)
    own = [shard_files(name)[0] for name in (manifest["matcher"], manifest["removed"]) if name]
    manifest["files"] = {file: file_facts(directory / file) for file in own}
    manifest["digest"] = sealed(manifest)["digest"]
    card = directory / "README.md"
    if is_index_card(card) or not (card.exists() or card.is_symlink()):
        write_text(card, card_of_index(directory.resolve().name, manifest, store))
    else:
        logger.info("%s is none that was written from an index, and stays as it is.", card)
    write_json(directory / MANIFEST, manifest)
    try:
        remove_strays(directory, manifest)
    except OSError as error:
        # The change is made: an error now must not be told as its failure.
        logger.warning("The index %s was changed, but files of its old state are left: %s", directory, error)


def save_copy(directory: Path, manifest: Manifest, store: Store, matcher: Matcher) -> None:
    """Writes an index into another directory, without its removed entities; one that is there is replaced."""
    with locked(directory):
        before = set(directory.iterdir())
        manifest = {**manifest, "generation": next_generation(directory)}
        try:
            manifest["shards"] = [
                write_shard(directory, shard) for shard in store.compacted(shard_size, new_shard_name)
            ]
            kept = Store([read_shard(directory, entry) for entry in manifest["shards"]])
            publish(directory, manifest, kept, matcher)
        except BaseException:
            named: list[str] = []
            with suppress(EntityIndexError):
                named = files_of(read_manifest(directory))
            for path in set(directory.iterdir()) - before:
                if is_part(path.name) and path.name not in named:
                    with suppress(OSError):
                        path.unlink()
            raise


def remove_strays(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Deletes parts that no list names: of older generations, and of changes that were interrupted.

    Raises:
        OSError: if one cannot be deleted; the others are.
    """
    named = set(files_of(manifest))
    with suppress(EntityIndexError):
        if unfinished := unfinished_build(directory):
            # A build that is to replace this index goes on later.
            named |= {file for entry in unfinished["shards"] for file in shard_files(entry["name"])}
        else:
            (directory / BUILD_STATE).unlink(missing_ok=True)
    errors = []
    for path in list(directory.iterdir()):
        if (is_part(path.name) and path.name not in named) or _TEMPORARY.fullmatch(path.name):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                errors.append(error)
    if errors:
        raise errors[0]


def delete_index(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Deletes an index, and its directory where nothing else lies there. What cannot be deleted stays."""
    own = [MANIFEST, "README.md", BUILD_STATE, PART_OF, LOCK, *files_of(manifest)]
    with suppress(OSError):
        own += [path.name for path in directory.iterdir() if is_part(path.name) or _TEMPORARY.fullmatch(path.name)]
    for name in own:  # the list of files is the first: without it the rest is no index
        with suppress(OSError):
            (directory / name).unlink(missing_ok=True)
    with suppress(OSError):
        directory.resolve().rmdir()
        if directory.is_symlink():
            directory.unlink()


def unfinished_build(directory: Path) -> dict[str, Any] | None:
    """The state of a build that was interrupted before its index was there.

    Raises:
        EntityIndexError: if it cannot be read.
    """
    path = directory / BUILD_STATE
    if not path.exists():
        return None
    try:
        state = read_json(path)
        files = [name for entry in state["shards"] for name in shard_files(entry["name"])]
        known = isinstance(state["build"], str) and isinstance(files, list)
        for entry in state["shards"]:
            if not _are_file_facts(entry["files"], shard_files(entry["name"])):
                raise ValueError("the files of a shard are not told as they must be")
        json_text(state).encode()  # half characters could not be written again
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EntityIndexError(
            f"{path} cannot be read: {error!r}. Delete it, and the build starts from the beginning."
        ) from error
    with suppress(EntityIndexError):
        # Interrupted between the last two steps.
        known = known and read_manifest(directory).get("build") != state["build"]
    return state if known else None


def next_generation(directory: Path) -> int:
    """The number of the next state of the index in a directory; 1 where there is none."""
    try:
        return read_manifest(directory)["generation"] + 1
    except EntityIndexError:
        return 1


def new_shard_name(number: int) -> str:
    """A name that no other shard has or had; in the order of names the shards are in the order of entities."""
    return f"shard-{number:06d}-{secrets.token_hex(6)}"


def shortlist_path(directory: Path, manifest: Mapping[str, Any]) -> Path:
    """Where the approximate shortlist of one state of an index is stored."""
    return directory / f"first-stage-{manifest['generation']:05d}.faiss"


# --- Single files ---------------------------------------------------------------------------------------------------


def _write_removed(directory: Path, generation: int, removed: Tensor) -> str:
    name = f"removed-{generation:05d}"
    rows = removed.nonzero().squeeze(1)
    write_atomically(directory / shard_files(name)[0], lambda path: save_file({"rows": rows}, path))
    return name


def _read_removed(directory: Path, name: str | None, count: int) -> Tensor | None:
    if name is None:
        return None
    path = directory / shard_files(name)[0]
    try:
        rows = load_file(regular(path))["rows"]
        if rows.dtype != torch.int64 or rows.dim() != 1 or (len(rows) and not 0 <= rows.min() <= rows.max() < count):
            raise ValueError("it does not hold rows of this index")
        if len(rows.unique()) != len(rows):
            raise ValueError("it holds a row twice")
    except (OSError, RuntimeError, SafetensorError, KeyError, ValueError) as error:
        raise EntityIndexError(
            f"The index file {path} is missing or damaged: {error}. Restore it, or build the index again."
        ) from error
    removed = torch.zeros(count, dtype=torch.bool)
    removed[rows] = True
    return removed


def names_path(directory: Path, manifest: Mapping[str, Any]) -> Path | None:
    """Where the names of an index are stored; `None` for one that was made without."""
    entry = manifest.get("names")
    return None if entry is None else directory / shard_files(entry["name"])[0]


def _write_names(directory: Path, store: Store, anew: bool) -> dict[str, Any]:
    """Writes the names of all rows, and gives their entry of the manifest, where versions that know of no names pass
    over it. Names of shards that were there are not read again, unless they are to be made anew."""
    shards = [shard.name for shard in store.shards]
    before, known, names = (None, [], None) if anew else _names_before(directory)
    if before is not None and known == shards:
        return before
    same = 0
    while same < min(len(known), len(shards)) and known[same] == shards[same]:
        same += 1
    rest = NameTable.of((record for shard in store.shards[same:] for record in shard.table), store.starts[same])
    made = rest if names is None or not same else names.up_to(store.starts[same]).followed_by(rest)
    name = f"names-{secrets.token_hex(6)}"
    path = directory / shard_files(name)[0]
    write_atomically(path, lambda temporary: made.save(temporary, shards))
    return {"name": name, "files": {path.name: file_facts(path)}}


def _names_before(directory: Path) -> tuple[dict[str, Any] | None, list[str], NameTable | None]:
    """The names that lie in a directory: their entry of the manifest, the shards that they are of, and themselves."""
    with suppress(EntityIndexError):
        manifest = read_manifest(directory)
        if path := names_path(directory, manifest):
            names, known = NameTable.load(path, sum(entry["count"] for entry in manifest["shards"]))
            return manifest["names"], known, names
    return None, [], None


def _write_matcher(directory: Path, matcher: Matcher) -> str:
    weights = {name: t.detach().float().cpu().contiguous() for name, t in matcher.state_dict().items()}
    name = f"matcher-{secrets.token_hex(6)}"
    write_atomically(directory / shard_files(name)[0], lambda path: save_file(weights, path))
    return name


def _read_matcher(directory: Path, manifest: Mapping[str, Any]) -> Matcher:
    path = directory / shard_files(manifest["matcher"])[0]
    facts = manifest["model"]
    try:
        # Without memory for its weights until they are read: a list of files may claim any size.
        with torch.device("meta"):
            matcher = Matcher(MimicConfig.from_dict(facts["config"]))
    except Exception as error:  # whatever the classes of configurations raise at values that are none
        raise EntityIndexError(
            f"{directory / MANIFEST} is damaged: it holds no model's configuration: {error!r}. Build the index again."
        ) from error
    try:
        weights = {name: tensor.float() for name, tensor in load_file(regular(path)).items()}
        matcher.load_state_dict(weights, assign=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EntityIndexError(
            f"The index file {path} is missing or damaged: {error}. Restore it, or build the index again."
        ) from error
    check_facts(facts, matcher, path)
    return matcher


__all__ = [
    "BUILD_STATE",
    "MANIFEST",
    "SHARD_ENTITIES",
    "files_of",
    "is_part",
    "locked_for_change",
    "names_path",
    "new_manifest",
    "new_shard_name",
    "next_generation",
    "open_directory",
    "publish",
    "read_manifest",
    "remove_strays",
    "save_copy",
    "sealed",
    "shard_size",
    "shortlist_path",
    "state_of",
    "unfinished_build",
    "verify_files",
]

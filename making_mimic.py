"""Makes the contents of an index (built, joined or opened), and saves them.

Each function returns a matcher and the contents that it scores. Knows nothing of searches.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from .building_mimic import Builder, build_in_directory, build_in_memory, shards_of_features
from .contents_mimic import Contents
from .directory_mimic import new_manifest, open_directory, save_copy
from .errors_mimic import EntityIndexError
from .files_mimic import is_there
from .identity_mimic import copy_of_matcher, model_facts
from .index_hub_mimic import download_index
from .joining_mimic import merge_parts
from .matching_mimic import EntityFeatures, Matcher
from .modeling_mimic import MimicModel
from .parts_mimic import build_part, checked_part, process_of_launch
from .saving_mimic import directory_of
from .store_mimic import Store

Made = tuple[Matcher, Contents]
_OUTPUT = "`output_dir`"


def opened(directory: Path, read_only: bool = False) -> Made:
    """The index in a directory. Raises as `open_directory` does."""
    manifest, store, matcher = open_directory(directory)
    return matcher, Contents(manifest, store, directory, read_only)


def downloaded(repo_id: str, repo_type: str, subfolder: str, revision: str | None, **options: Any) -> Made:
    """The index of a Hub repository, whatever directories of that name this machine has. Arguments, and what is raised,
    as of [`EntityIndex.from_pretrained`]."""
    return opened(download_index(repo_id, repo_type, subfolder, revision, **options), read_only=True)


def opened_by_name(
    name_or_path: str | os.PathLike[str], subfolder: str, repo_type: str, revision: str | None, **options: Any
) -> Made:
    """The index in a directory or, where there is none, of a Hub repository: see [`EntityIndex.from_pretrained`]."""
    if not os.fspath(name_or_path):
        directory_of(name_or_path, "`name_or_path`")
    if is_there(name_or_path):
        return opened(Path(name_or_path) / subfolder)
    return downloaded(str(name_or_path), repo_type, subfolder, revision, **options)


def built(
    builder: Builder,
    entities: Any,
    output_dir: str | os.PathLike[str] | None,
    overwrite: bool = False,
    shard: tuple[int, int] | str | None = None,
    patience: float = 600.0,
) -> Made:
    """An index of a knowledge base that is encoded now, or of one part of it: see [`EntityIndex.build`]."""
    launched = process_of_launch() if shard == "auto" and output_dir is not None else None
    if launched is not None:
        whole = directory_of(cast(Any, output_dir), _OUTPUT)
        return opened(build_part(builder, entities, whole, *launched, overwrite, patience, wait=True))
    if shard is not None and shard != "auto":
        index, parts = checked_part(shard)
        if output_dir is None:
            raise ValueError("`shard` needs an `output_dir`, where the parts are joined.")
        return opened(
            build_part(builder, entities, directory_of(output_dir, _OUTPUT), index, parts, overwrite, patience)
        )
    if output_dir is None:
        manifest, store = build_in_memory(builder, entities)
        return copy_of_matcher(builder.model), Contents(manifest, store)
    directory = directory_of(output_dir, _OUTPUT)
    build_in_directory(builder, entities, directory, overwrite)
    return opened(directory)


def of_features(
    features: EntityFeatures, records: Any, model: MimicModel, dtype: str, shard_entities: int | None
) -> Made:
    """An index, in memory, of entities that were encoded before: see [`EntityIndex.from_features`]."""
    shards = shards_of_features(features, records, model, dtype, shard_entities)
    return copy_of_matcher(model), Contents(new_manifest(dtype, model_facts(model)), Store(shards))


def merged(
    parts: Iterable[str | os.PathLike[str]], output_dir: str | os.PathLike[str], move: bool, overwrite: bool
) -> Made:
    """One index of several: see [`EntityIndex.merge`]."""
    if isinstance(parts, str | os.PathLike):
        raise ValueError(f"`parts` must be a list of directories, got {str(parts)!r}.")
    directory = directory_of(output_dir, _OUTPUT)
    merge_parts([directory_of(part, "A part") for part in parts], directory, move=move, overwrite=overwrite)
    return opened(directory)


def save(matcher: Matcher, contents: Contents, save_directory: str | os.PathLike[str]) -> None:
    """Stores an index in a directory, unless it lies there already; removed entities are left out.

    Raises:
        EntityIndexError: if no entity is left, or another process is changing an index there.
    """
    directory = directory_of(save_directory, "`save_directory`")
    if not len(contents):
        raise EntityIndexError("All entities of this index were removed: there is nothing to save.")
    if contents.directory is None or directory.resolve() != contents.directory.resolve():
        save_copy(directory, contents.manifest, contents.store, matcher)


__all__ = ["built", "downloaded", "merged", "of_features", "opened", "opened_by_name", "save"]

"""Where the contents of an index come from, and where they go: built, joined or opened, and saved.

Each function gives a matcher and the contents that it scores. Knows nothing of searches.
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
from .identity_mimic import copy_of_matcher, model_facts
from .joining_mimic import merge_parts
from .matching_mimic import EntityFeatures, Matcher
from .modeling_mimic import MimicModel
from .parts_mimic import build_part, checked_part, process_of_launch
from .store_mimic import Store

Made = tuple[Matcher, Contents]


def opened(directory: Path, read_only: bool = False) -> Made:
    """The index in a directory. Raises as `open_directory` does."""
    manifest, store, matcher = open_directory(directory)
    return matcher, Contents(manifest, store, directory, read_only)


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
        whole = Path(cast(Any, output_dir))
        return opened(build_part(builder, entities, whole, *launched, overwrite, patience, wait=True))
    if shard is not None and shard != "auto":
        index, parts = checked_part(shard)
        if output_dir is None:
            raise ValueError("`shard` needs an `output_dir`, where the parts are joined.")
        return opened(build_part(builder, entities, Path(output_dir), index, parts, overwrite, patience))
    if output_dir is None:
        manifest, store = build_in_memory(builder, entities)
        return copy_of_matcher(builder.model), Contents(manifest, store)
    build_in_directory(builder, entities, Path(output_dir), overwrite)
    return opened(Path(output_dir))


def of_features(
    features: EntityFeatures, records: Any, model: MimicModel, dtype: str, shard_entities: int | None
) -> Made:
    """An index, in memory, of entities that were encoded before: see [`EntityIndex.from_features`]."""
    shards = shards_of_features(features, records, model, dtype, shard_entities)
    return copy_of_matcher(model), Contents(new_manifest(dtype, model_facts(model)), Store(shards))


def merged(parts: Iterable[str | os.PathLike[str]], output_dir: Path, move: bool, overwrite: bool) -> Made:
    """One index of several: see [`EntityIndex.merge`]."""
    if isinstance(parts, str | os.PathLike):
        raise ValueError(f"`parts` must be a list of directories, got {str(parts)!r}.")
    merge_parts([Path(part) for part in parts], output_dir, move=move, overwrite=overwrite)
    return opened(output_dir)


def save(matcher: Matcher, contents: Contents, directory: Path) -> None:
    """Stores an index in a directory, unless it lies there already; removed entities are left out.

    Raises:
        EntityIndexError: if no entity is left, or another process is changing an index there.
    """
    if not len(contents):
        raise EntityIndexError("All entities of this index were removed: there is nothing to save.")
    if contents.directory is None or directory.resolve() != contents.directory.resolve():
        save_copy(directory, contents.manifest, contents.store, matcher)


__all__ = ["built", "merged", "of_features", "opened", "save"]

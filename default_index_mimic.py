"""The index of a pipeline: one that is given, one that is built from entities, or the default one of the checkpoint.

A checkpoint's configuration comes from outside. Of the places that it may name, only a folder of the checkpoint or a
Hub repository is opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .configuration_mimic import MimicConfig
from .errors_mimic import EntityIndexError
from .files_mimic import is_there
from .index_card_mimic import hub_id
from .index_mimic import EntityIndex
from .making_mimic import downloaded
from .modeling_mimic import MimicModel
from .processing_mimic import MimicProcessor

_BAR_FROM_ENTITIES = 500


def index_of_entities(
    model: MimicModel, processor: MimicProcessor, entities: Any, options: Mapping[str, Any]
) -> EntityIndex:
    """An index of entities, with a progress bar where they are many; `options` as of [`EntityIndex.build`]."""
    count = len(entities) if hasattr(entities, "__len__") else _BAR_FROM_ENTITIES
    return EntityIndex.build(model, processor, entities, **{"show_progress": count >= _BAR_FROM_ENTITIES, **options})


def opened_index(config: MimicConfig, index: Any, options: Mapping[str, Any]) -> Any:
    """An index, by its directory or Hub id, or as it is; where none is given the configuration's default, or `None`.

    Args:
        config: the model's.
        index: what was given.
        options: as of [`EntityIndex.from_pretrained`].

    Raises:
        EntityIndexError: if it cannot be opened, or the configuration names a place that is not to be opened.
    """
    if index is None:
        return _default_index(config, options) if config.default_index else None
    if isinstance(index, str | os.PathLike):
        return EntityIndex.from_pretrained(index, **options)
    return index


def _default_index(config: MimicConfig, options: Mapping[str, Any]) -> EntityIndex:
    """The index that a checkpoint names: in a folder of its own, or a repository of the Hub."""
    name, revision, checkpoint = config.default_index, config.default_index_revision, str(config.name_or_path or "")
    if not isinstance(name, str) or not (revision is None or isinstance(revision, str)):
        raise EntityIndexError(
            f"The checkpoint {checkpoint!r} names {name!r}, of the revision {revision!r}, as its default index: these "
            "must be strings. Pass `index=` or `entities=`."
        )
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    own_folder = inside and bool(checkpoint) and is_there(Path(checkpoint, name), directory=True)
    of_repository = inside and "/" not in name and bool(checkpoint) and not is_there(checkpoint)
    if not own_folder and not of_repository and (not inside or hub_id(name) is None):
        raise EntityIndexError(
            f"The checkpoint {checkpoint!r} names {name[:200]!r} as its default index, a place that is not in the "
            "checkpoint and no Hub repository. If you want that index, or another, pass `index=` or `entities=`."
        )
    try:
        if own_folder:
            return EntityIndex.from_pretrained(Path(checkpoint, name), **options)
        if of_repository:
            asked = {"repo_type": "model", "subfolder": name, "revision": None, **options}
            return EntityIndex(*downloaded(checkpoint, **asked))
        asked = {"repo_type": "dataset", "subfolder": "", "revision": revision, **options}
        return EntityIndex(*downloaded(name, **asked))
    except (EntityIndexError, OSError) as error:  # without a network, or none of that name
        raise EntityIndexError(
            f"{error} The checkpoint {checkpoint!r} names {name!r} as its default index; to use another knowledge "
            "base, pass `index=` or `entities=`."
        ) from error


__all__ = ["index_of_entities", "opened_index"]

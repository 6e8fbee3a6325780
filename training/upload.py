"""Uploads a training: a model with its code, card and results, and an index in a repository of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..configuration_mimic import MimicConfig
from ..hub_files_mimic import REPLACED, hub_files
from ..index_mimic import EntityIndex

INDEX_FOLDER = "index"


@contextmanager
def uploaded_index(
    output_dir: Path, config: MimicConfig, repo_id: str, *, source: str | None, private: bool | None, token: str | None
) -> Iterator[None]:
    """Uploads the index of an output directory, if there is one, to `{repo_id}-index`. Within the context the model's
    configuration, there too, names it as its default; afterwards it names the index beside it again.

    Args:
        output_dir: has the index in its folder `index`.
        config: the model's.
        repo_id: of the model.
        source: Hub id of the data set, for the index's page.
        private, token: as of [`EntityIndex.push_to_hub`].
    """
    local_index = config.default_index
    try:
        if (output_dir / INDEX_FOLDER).is_dir():
            index = EntityIndex.from_pretrained(output_dir / INDEX_FOLDER)
            config.default_index = f"{repo_id}-index"
            index.push_to_hub(config.default_index, token=token, private=private, model_id=repo_id, source=source)
            config.save_pretrained(output_dir)
        yield
    finally:
        if config.default_index != local_index:
            config.default_index = local_index
            config.save_pretrained(output_dir)


def upload_run(output_dir: Path, repo_id: str, *, commit_message: str, revision: str | None, token: str | None) -> Any:
    """Uploads what of an output directory belongs to a checkpoint, in one commit that replaces the one before.

    Args:
        output_dir: the files of [`hub_files`] are taken.
        repo_id: of the model; it exists.
        commit_message, revision, token: as of `huggingface_hub.HfApi.create_commit`.

    Returns:
        the commit.
    """
    files, _ = hub_files(output_dir, "model")
    api = HfApi(token=token)
    there = api.list_repo_files(repo_id, revision=revision)
    old = [path for path in there if any(fnmatchcase(path, pattern) for pattern in REPLACED["model"])]
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path, file) for path, file in files.items()),
            *(CommitOperationDelete(path) for path in old if path not in files),
        ],
        commit_message=commit_message,
        revision=revision,
    )


__all__ = ["INDEX_FOLDER", "upload_run", "uploaded_index"]

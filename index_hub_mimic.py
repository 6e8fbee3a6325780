"""An index on the Hub: a data set repository of its own, written in one commit and read from one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from .directory_mimic import MANIFEST, Manifest, files_of, is_part, open_directory, read_manifest, save_copy, sealed
from .errors_mimic import EntityIndexError
from .files_mimic import json_text
from .hub_files_mimic import refuse_links
from .index_card_mimic import card_of_index, hub_id
from .markdown_mimic import plain_line
from .matching_mimic import Matcher
from .store_mimic import Store


def upload_index(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    token: str | bool | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Sends the files of an index to its repository, which then holds no parts of an older one; gives the commit's
    address."""
    api = HfApi(token=token)
    there = api.list_repo_files(repo_id, repo_type="dataset", revision=revision)
    info = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(name) for name in there if is_part(name) and name not in files),
        ],
        commit_message=commit_message,
        repo_type="dataset",
        revision=revision,
    )
    return str(info.commit_url)


@contextmanager
def files_for_hub(
    repo_id: str,
    directory: Path | None,
    manifest: Manifest,
    store: Store,
    matcher: Matcher,
    *,
    from_cache: bool = False,
    model_id: str | None = None,
    license: str | None = None,
    source: str | None = None,
) -> Iterator[dict[str, Path | bytes]]:
    """The content of each file of a repository of an index, which lies in memory or in a directory.

    Args:
        repo_id: the repository's id.
        from_cache: whether the directory is one of the Hub's cache.
        model_id, license, source: as of [`EntityIndex.push_to_hub`].

    Raises:
        EntityIndexError: if no entity is left.
    """
    if len(store) == store.removed_count:
        raise EntityIndexError("All entities of this index were removed: there is nothing to publish.")
    with tempfile.TemporaryDirectory() as scratch:
        if directory is None or store.removed_count:
            directory = Path(scratch)
            save_copy(directory, manifest, store, matcher)
            store = open_directory(directory)[1]
        manifest = read_manifest(directory)
        if not from_cache:  # the files of the Hub's cache are links to its blobs
            refuse_links(directory, [directory / name for name in files_of(manifest)])
        made_by = manifest["model"]["name"]
        model_id = model_id or hub_id(made_by)
        # A path on this machine is nothing to publish.
        manifest["model"]["name"] = plain_line(model_id or Path(made_by).name)
        card = card_of_index(repo_id, manifest, store, model_id=model_id, license=license, source=source)
        yield {
            **{name: directory / name for name in files_of(manifest)},
            MANIFEST: json_text(sealed(manifest)).encode(),
            "README.md": card.encode(),
        }


def download_index(repo_id: str, repo_type: str, subfolder: str, revision: str | None, **options: Any) -> Path:
    """The folder of the Hub's cache with the files of an index, all of one commit.

    Raises:
        EntityIndexError: if there is no such repository, or no index in it.
    """
    options |= {"repo_id": repo_id, "repo_type": repo_type}
    folder = subfolder.strip("/")
    place = f"the folder {folder} of {repo_id}" if folder else repo_id
    if "/" not in repo_id and repo_type == "dataset":  # no need to ask the Hub
        raise EntityIndexError(
            f"There is no directory {repo_id!r}, and it is not the id of a Hub repository (user/name) either."
        )
    try:
        # The commit of the list of files is the one that they are taken from, even if the branch moves meanwhile.
        listed = Path(hf_hub_download(filename=MANIFEST, subfolder=folder or None, revision=revision, **options))
    except HFValidationError as error:
        raise EntityIndexError(
            f"There is no directory {repo_id!r}, and it is not the id of a Hub repository (user/name) either."
        ) from error
    except (GatedRepoError, LocalEntryNotFoundError):
        raise  # these say what to do
    except RepositoryNotFoundError as error:
        raise EntityIndexError(
            f"There is no directory {repo_id!r}, and the Hub shows no {repo_type} repository of that name. "
            f"{_hint(repo_id, repo_type, options.get('token'))}"
        ) from error
    except EntryNotFoundError as error:
        raise EntityIndexError(
            f"{place} on the Hub is not an entity index: it has no {MANIFEST}. EntityIndex.push_to_hub uploads one."
        ) from error
    root = listed.parents[len(Path(folder).parts)]
    prefix = f"{folder}/" if folder else ""
    patterns = [f"{prefix}{name}" for name in files_of(read_manifest(listed.parent))]
    snapshot_download(revision=root.name, allow_patterns=patterns, **options)
    return listed.parent


def _hint(repo_id: str, repo_type: str, token: str | bool | None) -> str:
    """What may be meant by the id of a repository that is not there."""
    other = "model" if repo_type == "dataset" else "dataset"
    try:
        HfApi(token=token).repo_info(repo_id, repo_type=other)
    except (HTTPError, OSError):
        return "If it is private, log in with `hf auth login` or pass `token`, for a pipeline in `index_kwargs`."
    if repo_type == "model":
        return 'There is a data set of that name: leave `repo_type="model"` out.'
    return (
        "There is a model of that name, but an index is a repository of its own: EntityIndex.build makes one of a "
        "knowledge base, push_to_hub uploads it."
    )


__all__ = ["download_index", "files_for_hub", "upload_index"]

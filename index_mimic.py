"""A knowledge base, encoded once: built, stored, changed, searched and shared.

`EntityIndex` is what a user sees of an index. It passes each call on to the file that does the work, and computes
nothing itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from .building_mimic import Builder
from .contents_mimic import Contents
from .index_hub_mimic import files_for_hub, upload_index
from .making_mimic import built, merged, of_features, opened, opened_by_name, save
from .matching_mimic import EntityFeatures, Matcher
from .modeling_mimic import MimicModel
from .processing_mimic import MimicProcessor
from .searchable_mimic import SearchableIndex
from .snapshot_mimic import Snapshot


class EntityIndex(SearchableIndex):
    """A knowledge base encoded by a [`MimicModel`], to be searched for the entities that mentions mean.

    An index lives in memory, or in a directory that is memory-mapped: opening it reads next to nothing. It keeps what
    scoring needs of the model, so that the features of mentions are all that a search takes; [`check_model`] tells
    whether a model is the one that made the index.

    Example:

    ```python
    >>> index = EntityIndex.build(model, processor, knowledge_base, "my-index")
    >>> index.link(model, processor, [{"mention": "Orange", "text": "Orange opened a shop."}], top_k=1)
    [[{'entity_id': 'brand:orange', 'name': 'Orange', 'description': 'A company.', 'score': 7.1, ...}]]
    ```

    `in` and iteration speak of ids; [`entities`] gives the records. Made by [`EntityIndex.build`],
    [`EntityIndex.from_features`] and [`EntityIndex.from_pretrained`].
    """

    def __init__(self, matcher: Matcher, contents: Contents) -> None:
        self._state = Snapshot(matcher.eval().requires_grad_(False), contents)

    def __reduce__(self) -> Any:
        # A worker process opens a stored index itself; memory-mapped files cannot be sent to it.
        contents = self._contents
        if contents.directory is None:
            return type(self), (self.state.matcher, contents)
        return _reopened, (type(self), contents.directory, contents.read_only)

    @property
    def state(self) -> Snapshot:
        """What it holds now; a change puts another state in its place."""
        return self._state

    @property
    def _contents(self) -> Contents:
        return self._state.contents

    def _become(self, contents: Contents) -> None:
        if contents is not self._contents:
            self._state = Snapshot(self._state.matcher, contents)

    # --- What it holds

    def __repr__(self) -> str:
        place = "in memory" if self.directory is None else str(self.directory)
        return f"EntityIndex({len(self):,} entities, {self.dtype}, {self.bytes_per_entity:,.0f} bytes each, {place})"

    @property
    def bytes_per_entity(self) -> float:
        """Bytes of features for each stored entity, its own data not counted."""
        store = self._contents.store
        return store.feature_bytes / max(1, len(store))

    @property
    def directory(self) -> Path | None:
        """Where the index is stored; `None` if it is in memory."""
        return self._contents.directory

    # --- Tables beside it

    def build_names(self) -> None:
        """Makes the table of names anew: of an index that was made without, by an earlier version, or whose table is
        damaged. A stored index keeps it.

        Raises:
            EntityIndexError: if another process is changing the index.
        """
        self._become(self._contents.with_names())

    def build_shortlist(self, factory: str | None = None, *, show_progress: bool = True) -> None:
        """Makes the approximate shortlist of [`search`], and stores it beside the index.

        It is not part of the index: after a change of the index it has to be made again, and it is not uploaded.

        Args:
            factory: faiss's description of the index, such as "IVF4096,SQ8" or "HNSW32". By default an inverted file
                with 8-bit vectors, or, below 50,000 entities, a plain scan.

        Raises:
            ImportError: if faiss is not installed.
            ValueError: if faiss does not know the description.
        """
        self.state.build_shortlist(factory, show_progress)

    # --- Build

    @classmethod
    def build(
        cls,
        model: MimicModel,
        processor: MimicProcessor,
        entities: Any,
        output_dir: str | os.PathLike[str] | None = None,
        *,
        dtype: str = "float16",
        batch_size: int = 64,
        num_workers: int | None = None,
        on_image_error: str = "warn",
        overwrite: bool = False,
        shard_entities: int | None = None,
        shard: tuple[int, int] | str | None = "auto",
        show_progress: bool = True,
        allow_urls: bool | str | None = None,
        image_root: bool | str | os.PathLike[str] | None = None,
        encoding_dtype: str | None = None,
        compile_encoder: bool = False,
        patience: float = 600.0,
    ) -> EntityIndex:
        """Encodes a knowledge base.

        With an `output_dir` memory stays bounded whatever the number of entities, and a build that was interrupted
        goes on where it stopped when the same call is made again.

        Args:
            model, processor: what encodes; the work is done on the model's device.
            entities: a `datasets.Dataset`, a `pandas.DataFrame`, a list or any iterable of dicts with `id`, `name`,
                `description` and `images` (a list of images, of which the first is used; a single image; or nothing).
                Other plain fields are kept with the entity.
            output_dir: where the index is stored; in memory if absent.
            dtype: "float32", "float16" or "int8".
            batch_size: entities encoded at a time.
            num_workers: processes that read and resize images beside the one that encodes. Unless told, none for
                fewer than 2,048 entities, else as many as half of the cores, 4 at most.
            on_image_error: "warn" goes on without an image that cannot be read, "raise" stops.
            overwrite: whether an index that is in `output_dir` is replaced, once the new one is complete; and
                whether an unfinished build of something else is given up.
            shard_entities: entities in a file, and those that an interruption may cost. Unless told 8,192, and more
                where an index has hundreds of files, up to 65,536.
            shard: `(i, n)` encodes the i-th (from 0) of n parts of the entities only, in a folder of `output_dir`. Each
                part goes on by itself after an interruption; the call that completes the last one joins them to the
                index in `output_dir` and gives that, all others give their part. Where machines do not share
                `output_dir`, join the parts with [`merge`]. "auto": where `accelerate launch` or `torchrun` started
                several processes, and there is an `output_dir`, each encodes its part, waits for the others, and gives
                the whole index; so all must call this. `None`: this process encodes all.
            show_progress: whether to show a progress bar.
            allow_urls: whether images that are named by an address are read: `True` (public addresses),
                `"private"` (those of this machine and of private networks too) or `False`.
            image_root: whether images that are named by a path are read from this machine: `True` (any), `False`, or
                the folder that they must be in. Both default to what a list or DataFrame that the caller made needs,
                which is everything, and to nothing for a data set, whose rows bring their images along.
            encoding_dtype: what the encoder computes in: "auto" for bfloat16 where the CPU or the GPU computes it,
                which is faster, "bfloat16", "float32", or "float16" on a GPU. Unless told, what the model's weights
                are in. The units compute in float32, and what is stored is of `dtype`.
            compile_encoder: whether the encoder is compiled (`torch.compile`), which takes a minute or so and pays for
                thousands of entities. A CPU needs a C++ compiler for it, a GPU triton. The last digits differ.
            patience: in parts, seconds after which a process is given up that is waited for and gives no sign of life.

        Raises:
            EntityIndexError: if there are no entities, `output_dir` already holds an index, an unfinished build of
                other entities or of another model is there, or the model gives an entity numbers that are not finite.
            ValueError: if an entity has no id, or two have the same.
        """
        builder = Builder(
            model,
            processor,
            dtype=dtype,
            batch_size=batch_size,
            num_workers=num_workers,
            on_image_error=on_image_error,
            shard_entities=shard_entities,
            show_progress=show_progress,
            allow_urls=allow_urls,
            image_root=image_root,
            encoding_dtype=encoding_dtype,
            compile_encoder=compile_encoder,
        )
        return cls(*built(builder, entities, output_dir, overwrite, shard, patience))

    @classmethod
    def from_features(
        cls,
        features: EntityFeatures,
        records: Any,
        model: MimicModel,
        *,
        dtype: str = "float16",
        shard_entities: int | None = None,
    ) -> EntityIndex:
        """An index, in memory, of entities that were encoded before; [`save_pretrained`] stores it.

        Args:
            features ([`EntityFeatures`]): N entities, from [`MimicModel.encode_entities`].
            records: N records in the same order, as `entities` of [`build`]; their images are not read.
            model: what made the features.
            dtype, shard_entities: as in [`build`].

        Raises:
            ValueError: if the numbers differ, an entity has no id, or two have the same.
        """
        return cls(*of_features(features, records, model, dtype, shard_entities))

    @classmethod
    def merge(
        cls,
        parts: Iterable[str | os.PathLike[str]],
        output_dir: str | os.PathLike[str],
        *,
        move: bool = False,
        overwrite: bool = False,
    ) -> EntityIndex:
        """Joins stored indexes of one model to one, without encoding anything again.

        Files are linked where the file system can, else copied. The order is that of the parts.

        Args:
            parts: directories of indexes. That of an index on the Hub is `from_pretrained(...).directory`.
            output_dir: where the joined index is stored.
            move: whether the parts' files are deleted once the index is complete; their directories, too, where
                nothing else lies in them.
            overwrite: whether an index that is in `output_dir` is replaced.

        Raises:
            EntityIndexError: if a part is missing, damaged or unfinished, parts differ in model or precision, two have
                an entity of the same id, or `output_dir` holds an index already.
        """
        return cls(*merged(parts, output_dir, move, overwrite))

    # --- Change

    def add(self, model: MimicModel, processor: MimicProcessor, entities: Any, **options: Any) -> None:
        """Adds entities; what is there is not encoded again. All are added, or none.

        Args:
            model, processor, entities: as in [`build`]; the ids must be new.
            **options: `batch_size`, `num_workers`, `on_image_error`, `show_progress`, `encoding_dtype`,
                `compile_encoder`, `allow_urls` and `image_root` of [`build`].

        Raises:
            ValueError: if an id is already there, or twice among the new ones.
            EntityIndexError: if the model is not the index's, or another process is changing the index.
        """
        self.check_model(model, processor)
        builder = Builder(model, processor, self.dtype, **options)
        self._become(self._contents.with_entities(builder, entities, replace=False))

    def update(self, model: MimicModel, processor: MimicProcessor, entities: Any, **options: Any) -> None:
        """Replaces entities that are there by new versions of them. Arguments as of [`add`].

        Raises:
            UnknownEntityError: if an id is not there.
            ValueError, EntityIndexError: as in [`add`].
        """
        self.check_model(model, processor)
        builder = Builder(model, processor, self.dtype, **options)
        self._become(self._contents.with_entities(builder, entities, replace=True))

    def remove(self, entity_ids: Iterable[str]) -> None:
        """Removes entities: no search finds them any more. [`compact`] frees their space.

        Raises:
            UnknownEntityError: if an id is not there; then none is removed.
            EntityIndexError: if another process is changing the index.
        """
        self._become(self._contents.without(entity_ids))

    def compact(self) -> None:
        """Frees the space of removed entities, and joins small files.

        Raises:
            EntityIndexError: if no entity is left, or another process is changing the index.
        """
        self._become(self._contents.compacted())

    # --- Save and load

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Stores the index in a directory; removed entities are left out. A README.md of your own that is there stays.

        Args:
            save_directory: the directory; an index that is there is replaced, once this one is complete.
            push_to_hub: whether to upload it too, see [`push_to_hub`]; `repo_id` defaults to the directory's name.
            **kwargs: arguments of [`push_to_hub`].

        Raises:
            EntityIndexError: if no entity is left, or another process is changing an index there.
        """
        save(self.state.matcher, self._contents, save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload entity index",
        model_id: str | None = None,
        license: str | None = None,
        source: str | None = None,
    ) -> str:
        """Uploads the index to a data set repository of its own, in one commit, and gives its address.

        Its entities then show in the Hub's data viewer, and `EntityIndex.from_pretrained(repo_id)` opens it. One model
        can serve several indexes. After an interruption the same call sends only what is not up yet. The page of the
        repository is written from what is in the index, and replaced at each upload.

        Args:
            repo_id: "user/name"; created if there is none.
            private: whether a repository that is created is private.
            token: as in `huggingface_hub.HfApi`.
            revision: the branch; it must exist. "main" by default.
            commit_message: title of the commit.
            model_id: Hub id of the model that made the index, for the page. Known already if the model was loaded
                from there.
            license: the license of the entities' texts, as the Hub spells it ("cc-by-sa-4.0"), for the page.
            source: Hub id of the data set that the entities are from, for the page.
        """
        repo_id = HfApi(token=token).create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        with self.files_for_hub(repo_id, model_id=model_id, license=license, source=source) as files:
            return upload_index(files, repo_id, token=token, revision=revision, commit_message=commit_message)

    def files_for_hub(self, repo_id: str, **about: str | None) -> AbstractContextManager[dict[str, Path | bytes]]:
        """A context with the content of each file of a repository of this index, as [`push_to_hub`] sends it.

        Args:
            repo_id: the repository's id.
            **about: `model_id`, `license` and `source`, as of [`push_to_hub`].
        """
        held, matcher = self._contents, self.state.matcher
        return files_for_hub(
            repo_id, held.directory, held.manifest, held.store, matcher, from_cache=held.read_only, **about
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        subfolder: str = "",
        repo_type: str = "dataset",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> EntityIndex:
        """Opens an index: its features are memory-mapped and read when a search needs them.

        From the Hub, the index's files and no others are downloaded, all of one commit.

        Args:
            name_or_path: a directory, or the id of a Hub repository that [`push_to_hub`] made.
            subfolder: the folder of the index within it.
            repo_type: "dataset", which is what [`push_to_hub`] makes, or "model" for an index that was uploaded in a
                folder of its model's repository.
            revision, cache_dir, token, local_files_only, force_download: as in `huggingface_hub.snapshot_download`.

        Raises:
            EntityIndexError: if there is no index, its build is unfinished, it is damaged, or of a newer format.
            huggingface_hub.errors.HfHubHTTPError: if the Hub does not give it: the token is wrong, the repository is
                gated, or there is no such revision.
        """
        return cls(
            *opened_by_name(
                name_or_path,
                subfolder,
                repo_type,
                revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        )

    def verify(self) -> None:
        """Reads all of an index: of a stored one every file is compared with the checksum that was taken when it was
        written; of any, every entity must be found by an id of its own, and its features must be finite, and such as
        the index's model can give: no larger than its layer norms leave them, and in accord with each other.

        Raises:
            EntityIndexError: if something is wrong. Says what, and which entity's.
        """
        self.state.verify()


def _reopened(kind: type[EntityIndex], directory: Path, read_only: bool) -> EntityIndex:
    return kind(*opened(directory, read_only))


__all__ = ["EntityIndex"]

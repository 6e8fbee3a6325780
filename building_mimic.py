"""Building an index: the records of a knowledge base encoded, shard by shard, in bounded memory.

What is finished is kept: a build that was interrupted goes on after its last whole shard. Knows nothing of searches.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .directory_mimic import (
    BUILD_STATE,
    MANIFEST,
    SHARD_ENTITIES,
    Manifest,
    locked,
    new_manifest,
    new_shard_name,
    next_generation,
    publish,
    unfinished_build,
    write_json,
)
from .errors_mimic import EntityIndexError
from .identity_mimic import model_facts, same_model
from .matching_mimic import EntityFeatures
from .modeling_mimic import MimicModel
from .processing_mimic import MimicProcessor
from .records_mimic import Records, duplicate_id, in_order_of_length, table_record
from .store_mimic import (
    STORED_DTYPES,
    Shard,
    Store,
    make_shard,
    quantized,
    read_shard,
    shard_files,
    table_line,
    write_shard,
)


@dataclass
class Builder:
    """Encodes records into shards.

    Args:
        model, processor: what encodes; the work is done on the model's device.
        dtype: "float32", "float16" or "int8".
        batch_size: entities encoded at a time.
        num_workers: processes that read and resize images beside the one that encodes.
        on_image_error: "warn" goes on without an image that cannot be read, "raise" stops.
        shard_entities: entities in a shard; 8,192 unless told.
        show_progress: whether to show a progress bar.

    Raises:
        ValueError: if one of them is not valid.
    """

    model: MimicModel
    processor: MimicProcessor
    dtype: str = "float16"
    batch_size: int = 64
    num_workers: int = 0
    on_image_error: str = "warn"
    shard_entities: int = field(default_factory=lambda: SHARD_ENTITIES)
    show_progress: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(STORED_DTYPES)}, got {self.dtype!r}.")
        for name in ("batch_size", "shard_entities"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {getattr(self, name)!r}.")
        if self.on_image_error not in ("raise", "warn"):
            raise ValueError(f'`on_image_error` must be "raise" or "warn", got {self.on_image_error!r}.')

    def shards(
        self,
        records: Records,
        keep: Callable[[Shard], Shard] = lambda shard: shard,
        done: Sequence[Shard] = (),
        added_to: Store | None = None,
        replace: bool = False,
    ) -> Iterator[Shard]:
        """Encodes the rest of the records, a shard at a time.

        Args:
            records: what is encoded.
            keep: stores a shard, and gives it as it is stored; the one in memory is let go.
            done: shards of the records before, whose ids must not come again.
            added_to: what the shards are to be added to; its ids must not come again either, unless they are to be
                replaced.
        """
        seen = _SeenIds(done, None if replace else added_to)
        number = len(done) + (len(added_to.shards) if added_to else 0)
        finished = sum(len(shard) for shard in done)
        was_training = self.model.training
        self.model.eval()
        progress = tqdm(
            total=records.total,
            initial=finished,
            desc="Encoding entities",
            unit=" entities",
            disable=not self.show_progress,
        )
        try:
            with progress:
                while shard := self._shard(records, new_shard_name(number), progress):
                    seen.check(shard)
                    shard = keep(shard)
                    seen.shards.append(shard)
                    number += 1
                    yield shard
        finally:
            self.model.train(was_training)

    def _shard(self, records: Records, name: str, progress: Any) -> Shard | None:
        kept: list[dict[str, Any]] = []
        parts: list[dict[str, Tensor]] = []
        while left := self.shard_entities - len(kept):
            some = records.take(min(records.at_once or left, left))
            if not len(some):
                break
            self._encode(some, kept, parts, progress)
        if not kept:
            return None
        return make_shard(name, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, kept)

    def _encode(self, records: Any, kept: list[dict[str, Any]], parts: list[dict[str, Tensor]], progress: Any) -> None:
        """Appends what the table keeps of some records, and their features."""
        # In the order of length where the model can leave padding out: batches are then dense.
        order = in_order_of_length(records) if self.model.config.mask_text_padding else list(range(len(records)))
        loader = DataLoader(
            records,
            batch_size=self.batch_size,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=_Collate(self.processor, self.on_image_error),
            worker_init_fn=_quiet_tokenizers,
        )
        encoded: list[dict[str, Any]] = []
        batches: list[dict[str, Tensor]] = []
        device = self.model.device
        for batch_records, inputs, troubles in loader:
            for trouble in troubles:
                warnings.warn(trouble, stacklevel=2)
            with torch.inference_mode():
                features = self.model.encode_entities(**{name: t.to(device) for name, t in inputs.items()})
                batches.append(quantized(features, self.model.matcher, STORED_DTYPES[self.dtype]))
            encoded.extend(batch_records)
            progress.update(len(batch_records))
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        parts.append({name: torch.cat([batch[name] for batch in batches])[back] for name in batches[0]})
        kept.extend(encoded[row] for row in back.tolist())


def build_in_memory(builder: Builder, entities: Any) -> tuple[Manifest, Store]:
    """An index of a knowledge base, in memory.

    Raises:
        EntityIndexError: if there are no entities.
        ValueError: if an entity has no id, or two have the same.
    """
    shards = list(builder.shards(Records(entities)))
    if not shards:
        raise EntityIndexError(_EMPTY)
    return new_manifest(builder.dtype, model_facts(builder.model)), Store(shards)


def build_in_directory(builder: Builder, entities: Any, directory: Path, overwrite: bool) -> None:
    """Writes an index of a knowledge base into a directory, or goes on with a build that was interrupted there.

    Raises:
        EntityIndexError: if there are no entities, an index is there already, or an unfinished build of something
            else; the last two are replaced with `overwrite`.
        ValueError: if an entity has no id, or two have the same.
    """
    with locked(directory):
        if (directory / MANIFEST).exists() and not overwrite:
            raise EntityIndexError(
                f"{directory} already holds an index. Name another directory, or pass overwrite=True to replace it."
            )
        records = Records(entities)
        manifest = new_manifest(builder.dtype, model_facts(builder.model))
        state = {"build": secrets.token_hex(8), "dtype": manifest["dtype"], "model": manifest["model"], "shards": []}
        done: list[Shard] = []
        if unfinished := unfinished_build(directory):
            try:
                done = _resumed(directory, unfinished, state, records)
                state = unfinished
            except EntityIndexError as error:
                if not overwrite:
                    raise
                if not records.again:
                    (directory / BUILD_STATE).unlink()
                    raise EntityIndexError(
                        f"The unfinished build in {directory} was given up, but the entities come from a generator, of "
                        "which some were read to compare them with it. Call build again with a new generator."
                    ) from error
                records = Records(entities)

        def written(shard: Shard) -> Shard:
            state["shards"].append(write_shard(directory, shard))
            write_json(directory / BUILD_STATE, state)
            return read_shard(directory, state["shards"][-1])

        shards = [*done, *builder.shards(records, written, done)]
        if not shards:
            raise EntityIndexError(_EMPTY)
        manifest |= {"build": state["build"], "shards": state["shards"], "generation": next_generation(directory)}
        publish(directory, manifest, Store(shards), builder.model.matcher)


def shards_of_features(
    features: EntityFeatures, records: Any, model: MimicModel, dtype: str, shard_entities: int = SHARD_ENTITIES
) -> list[Shard]:
    """Shards of entities that were encoded before.

    Args:
        features: of N entities, from [`MimicModel.encode_entities`].
        records: N records with `id`, in the same order.

    Raises:
        ValueError: if the numbers differ, an entity has no id, or two have the same.
    """
    if dtype not in STORED_DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(STORED_DTYPES)}, got {dtype!r}.")
    source = Records(records)
    kept = [table_record(record) for record in source.skip(len(features) + 1)]
    if len(kept) != len(features) or not kept:
        raise ValueError(f"There are features of {len(features)} entities, but {len(kept)} records or more.")
    with torch.no_grad():
        stored = quantized(features, model.matcher, STORED_DTYPES[dtype])
    seen = _SeenIds((), None)
    for number, start in enumerate(range(0, len(kept), shard_entities)):
        rows = slice(start, start + shard_entities)
        shard = make_shard(new_shard_name(number), {name: t[rows] for name, t in stored.items()}, kept[rows])
        seen.check(shard)
        seen.shards.append(shard)
    return seen.shards


_EMPTY = "The knowledge base is empty: there is nothing to build an index of."


class _Collate:
    """Turns records into what the table keeps and what the model reads; runs in worker processes."""

    def __init__(self, processor: MimicProcessor, on_image_error: str) -> None:
        self.processor, self.on_image_error = processor, on_image_error

    def __call__(self, records: list[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Tensor], list[str]]:
        """The table's records, the model's inputs, and what is to be warned of."""
        kept = [table_record(record) for record in records]
        names, descriptions = ([record[name] for record in kept] for name in ("name", "description"))
        with warnings.catch_warnings(record=True) as caught:
            # Those of a worker process would be lost.
            warnings.simplefilter("always")
            inputs = self.processor.process_entities(
                names,
                descriptions,
                [record.get("images") for record in records],
                on_image_error=self.on_image_error,
                labels=[f"Entity {record['id']!r}" for record in kept],
            )
        return kept, dict(inputs), [str(warning.message) for warning in caught]


def _resumed(directory: Path, state: dict[str, Any], fresh: dict[str, Any], records: Records) -> list[Shard]:
    """The finished shards of an unfinished build, if it is of the same entities and model; records are passed over."""
    try:
        same = same_model(state["model"], fresh["model"]) and state["dtype"] == fresh["dtype"]
        entries = [(entry, entry["files"][shard_files(entry["name"])[1]]["sha256"]) for entry in state["shards"]]
        counts = [int(entry["count"]) for entry in state["shards"]]
    except (KeyError, TypeError, ValueError) as error:
        raise EntityIndexError(
            f"{directory / BUILD_STATE} is damaged: {error!r}. Delete it, and the build starts from the beginning."
        ) from error
    for (_, expected), count in zip(entries, counts, strict=True):
        if not same:
            break
        digest = hashlib.sha256()
        for record in records.skip(count):
            digest.update(table_line(table_record(record)))
        same = digest.hexdigest() == expected
    if not same:
        raise EntityIndexError(
            f"{directory} holds an unfinished build of another model, of another precision, or of other entities. "
            "Build into another directory, or pass overwrite=True to give that build up."
        )
    return [read_shard(directory, entry) for entry, _ in entries]


class _SeenIds:
    """Refuses an id that was there before, in shards or in a store."""

    def __init__(self, shards: Sequence[Shard], store: Store | None) -> None:
        self.shards, self._store = list(shards), store

    def check(self, shard: Shard) -> None:
        for hashed in np.unique(shard.hashes[1:][shard.hashes[1:] == shard.hashes[:-1]]):
            ids = _ids_with(shard, hashed)
            for entity_id in ids:
                if ids.count(entity_id) > 1:
                    raise duplicate_id(entity_id)
        for before in self.shards:
            for entity_id in _common_ids(before, shard):
                raise duplicate_id(entity_id)
        for before in self._store.shards if self._store else []:
            for entity_id in _common_ids(before, shard):
                # One that was removed is free again.
                if self._store is not None and self._store.row(entity_id) is not None:
                    raise duplicate_id(entity_id)


def _common_ids(one: Shard, other: Shard) -> Iterator[str]:
    places = np.searchsorted(one.hashes, other.hashes).clip(max=len(one) - 1)
    for hashed in np.unique(other.hashes[one.hashes[places] == other.hashes]):
        for entity_id in _ids_with(other, hashed):
            if one.rows_of(entity_id, int(hashed)):
                yield entity_id


def _ids_with(shard: Shard, hashed: Any) -> list[str]:
    return [shard.table[int(row)]["id"] for row in shard.hash_rows[shard.hashes == hashed]]


def _quiet_tokenizers(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


__all__ = ["Builder", "build_in_directory", "build_in_memory", "shards_of_features"]

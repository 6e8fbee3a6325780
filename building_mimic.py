"""Builds an index: encodes the records of a knowledge base, shard by shard, in bounded memory.

Finished shards are kept, and an interrupted build goes on after the last one. Knows nothing of searches.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import multiprocessing
import os
import secrets
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    Manifest,
    new_manifest,
    new_shard_name,
    next_generation,
    publish,
    shard_size,
    unfinished_build,
)
from .encoding_mimic import EntityEncoder, check_compiles, encoding_dtype, image_digest
from .errors_mimic import EntityIndexError
from .features_mimic import joined
from .files_mimic import locked, write_json
from .identity_mimic import copy_of_matcher, model_facts, same_model
from .image_sources_mimic import ImagePlaces, file_named, is_placed
from .images_mimic import first_image
from .matching_mimic import EntityFeatures
from .modeling_mimic import MimicModel
from .precision_mimic import STORED_DTYPES, quantized
from .processing_mimic import MimicProcessor
from .records_mimic import Records, duplicate_id, in_order_of_length, is_absent, table_record
from .store_mimic import IdRows, Shard, Store, make_shard, read_shard, shard_files, table_line, write_shard


@dataclass
class Builder:
    """Encodes records into shards.

    Args:
        model, processor: what encodes; the work is done on the model's device.
        dtype: "float32", "float16" or "int8".
        batch_size: entities encoded at a time.
        num_workers: processes that read and resize images beside the one that encodes; unless told none for small
            knowledge bases, and for large ones as many as half of the cores, 4 at most.
        on_image_error: "warn" goes on without an image that cannot be read, "raise" stops.
        allow_urls, image_root: where images that are named by a string are read from; see [`places_of`].
        shard_entities: entities in a shard; unless told 8,192, and more where an index has many shards.
        show_progress: whether to show a progress bar.
        encoding_dtype, compile_encoder: what the encoder computes in, and whether it is compiled, as
            [`EntityEncoder`] has it.

    Raises:
        ValueError: if one of them is not valid.
    """

    model: MimicModel
    processor: MimicProcessor
    dtype: str = "float16"
    batch_size: int = 64
    num_workers: int | None = None
    on_image_error: str = "warn"
    shard_entities: int | None = None
    show_progress: bool = True
    allow_urls: bool | str | None = None
    image_root: bool | str | os.PathLike[str] | None = None
    encoding_dtype: str | None = None
    compile_encoder: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(STORED_DTYPES)}, got {self.dtype!r}.")
        for name in ("batch_size", "shard_entities"):
            value = getattr(self, name)
            if not (value is None and name == "shard_entities") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if self.on_image_error not in ("raise", "warn"):
            raise ValueError(f'`on_image_error` must be "raise" or "warn", got {self.on_image_error!r}.')
        encoding_dtype(self.encoding_dtype, self.model.device)
        if self.compile_encoder:
            check_compiles(self.model.device)

    def records(self, entities: Any) -> Records:
        """A knowledge base as it is read here."""
        return Records(entities, self.allow_urls, self.image_root)

    def shards(
        self,
        records: Records,
        keep: Callable[[Shard, ImagesRead], Shard] = lambda shard, _: shard,
        done: Sequence[Shard] = (),
        added_to: Store | None = None,
        replace: bool = False,
    ) -> Iterator[Shard]:
        """Encodes the rest of the records, a shard at a time.

        Args:
            records: what is encoded.
            keep: stores a shard, told what its images were, and gives it as it is stored; the one in memory is let go.
            done: shards of the records before, whose ids must not come again.
            added_to: what the shards are to be added to; its ids must not come again either, unless they are to be
                replaced.
        """
        seen = _SeenIds(done, None if replace else added_to)
        number = len(done) + (len(added_to.shards) if added_to else 0)
        finished = sum(len(shard) for shard in done)
        was_training = self.model.training
        self.model.eval()
        encoder = EntityEncoder(self.model, self.encoding_dtype, self.compile_encoder)
        collate = _Collate(self.processor, self.on_image_error)
        progress = tqdm(
            total=records.total,
            initial=finished,
            desc="Encoding entities",
            unit=" entities",
            disable=not self.show_progress,
        )
        try:
            with progress:
                stored = finished + (len(added_to) if added_to else 0)
                while found := self._shard(
                    records, new_shard_name(number), self._size(stored), encoder, collate, progress
                ):
                    seen.check(found[0])
                    shard = keep(*found)
                    seen.add(shard)
                    number += 1
                    stored += len(shard)
                    yield shard
        finally:
            self.model.train(was_training)

    def _size(self, stored: int) -> int:
        return self.shard_entities or shard_size(stored)

    def _shard(
        self, records: Records, name: str, size: int, encoder: EntityEncoder, collate: _Collate, progress: Any
    ) -> tuple[Shard, ImagesRead] | None:
        part = _Encoded()
        while left := size - len(part.kept):
            some = records.take(min(records.at_once or left, left))
            if not len(some):
                break
            self._encode(some, part, encoder, collate, progress)
        if not part.kept:
            return None
        features = {key: joined([batch[key] for batch in part.features]) for key in part.features[0]}
        return make_shard(name, features, part.kept), part.images

    def _encode(self, records: Any, part: _Encoded, encoder: EntityEncoder, collate: _Collate, progress: Any) -> None:
        """Appends what the table keeps of some records, and their features."""
        # In the order of length where the model can leave padding out: batches are then dense.
        order = in_order_of_length(records) if self.model.config.mask_text_padding else list(range(len(records)))
        loader = DataLoader(
            records,
            batch_size=self.batch_size,
            sampler=order,
            num_workers=_workers(len(records)) if self.num_workers is None else self.num_workers,
            collate_fn=collate,
            worker_init_fn=_quiet_tokenizers,
        )
        encoded: list[tuple[dict[str, Any], tuple[str, str]]] = []
        batches: list[dict[str, Tensor]] = []
        for batch_records, inputs, digests, images, troubles in loader:
            part.images.unreadable += len(troubles)
            for trouble in troubles:
                warnings.warn(trouble, stacklevel=2)
            features = encoder(inputs, digests)
            with torch.inference_mode():
                ids = [record["id"] for record in batch_records]
                batches.append(quantized(features, self.model.matcher, STORED_DTYPES[self.dtype], ids))
            encoded.extend(zip(batch_records, images, strict=True))
            progress.update(len(batch_records))
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        part.features.append({name: joined([batch[name] for batch in batches])[back] for name in batches[0]})
        for row in back.tolist():
            record, image = encoded[row]
            part.kept.append(record)
            part.images.add(*image)


class ImagesRead:
    """What the images of some entities were when they were encoded."""

    def __init__(self) -> None:
        self._digests: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._count = 0
        self.unreadable = 0

    def add(self, kind: str, image: str) -> None:
        """Takes the next entity's image into account, of which `image` tells whether it is the same."""
        digest = self._digests.setdefault(kind, hashlib.sha256())
        digest.update(f"{self._count} {image}\n".encode("utf-8", "surrogatepass"))
        self._counts[kind] = self._counts.get(kind, 0) + 1
        self._count += 1

    def facts(self) -> dict[str, Any]:
        """Of each kind of image a number and a checksum, as JSON has them."""
        return {kind: [self._counts[kind], digest.hexdigest()] for kind, digest in self._digests.items()}


def _same_images(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether facts are of the same images. Where they come in another form, such as bytes in the place of files, only
    which entities have one is compared."""
    if before.get(_NO_IMAGE) != now.get(_NO_IMAGE):
        return False
    counts = [{kind: facts[0] for kind, facts in item.items()} for item in (before, now)]
    return counts[0] != counts[1] or dict(before) == dict(now)


class _Encoded:
    """The entities of a shard that is being made."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []
        self.features: list[dict[str, Tensor]] = []
        self.images = ImagesRead()


def build_in_memory(builder: Builder, entities: Any) -> tuple[Manifest, Store]:
    """An index of a knowledge base, in memory.

    Raises:
        EntityIndexError: if there are no entities.
        ValueError: if an entity has no id, or two have the same.
    """
    shards = list(builder.shards(builder.records(entities)))
    if not shards:
        raise EntityIndexError(_EMPTY)
    return new_manifest(builder.dtype, model_facts(builder.model, builder.processor)), Store(shards)


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
                f"{directory} already holds an index. Name another directory, or pass overwrite=True (--overwrite) to "
                "replace it."
            )
        records = builder.records(entities)
        manifest = new_manifest(builder.dtype, model_facts(builder.model, builder.processor))
        state = {
            "build": secrets.token_hex(8),
            "dtype": manifest["dtype"],
            "model": manifest["model"],
            "encoding_dtype": builder.encoding_dtype,
            "compiled": builder.compile_encoder,
            "shards": [],
            "images": [],
        }
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
                records = builder.records(entities)
            if len(done) < len(state["shards"]):
                records = _images_changed(directory, state, done, records, entities)

        def written(shard: Shard, images: ImagesRead) -> Shard:
            state["shards"].append(write_shard(directory, shard))
            state["images"].append({"seen": images.facts(), "unreadable": images.unreadable})
            write_json(directory / BUILD_STATE, state)
            return read_shard(directory, state["shards"][-1])

        shards = [*done, *builder.shards(records, written, done)]
        if not shards:
            raise EntityIndexError(_EMPTY)
        manifest |= {"build": state["build"], "shards": state["shards"], "generation": next_generation(directory)}
        publish(directory, manifest, Store(shards), copy_of_matcher(builder.model))


def shards_of_features(
    features: EntityFeatures, records: Any, model: MimicModel, dtype: str, shard_entities: int | None = None
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
        stored = quantized(features, model.matcher, STORED_DTYPES[dtype], [record["id"] for record in kept])
    seen, start = _SeenIds((), None), 0
    shards: list[Shard] = []
    while start < len(kept):
        rows = slice(start, start + (shard_entities or shard_size(start)))
        shard = make_shard(new_shard_name(len(shards)), {name: t[rows] for name, t in stored.items()}, kept[rows])
        seen.check(shard)
        seen.add(shard)
        shards.append(shard)
        start = rows.stop
    return shards


# Of so many at a time and more, images are read by processes of their own.
_MANY_ENTITIES = 2048
_EMPTY = "The knowledge base is empty: there is nothing to build an index of."


class _Collate:
    """Turns records into what the table keeps and what the model reads; runs in worker processes."""

    def __init__(self, processor: MimicProcessor, on_image_error: str) -> None:
        self.processor, self.on_image_error = copy.copy(processor), on_image_error
        setattr(self.processor, "resized", _Resized(processor))  # noqa: B010 (a method, to type checkers)

    def __call__(
        self, records: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Tensor], list[bytes], list[tuple[str, str]], list[str]]:
        """The table's records, the model's inputs, the images' digests, what they were, and what is to be warned of."""
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
        images = [_image_seen(record) for record in records]
        digests = [image_digest(pixels) for pixels in inputs["pixel_values"]]
        return kept, dict(inputs), digests, images, [str(warning.message) for warning in caught]


class _Resized:
    """Resizes images as a processor does, but one that comes again is not decoded again, as long as it is remembered.

    One that cannot be read is not remembered: it is an error each time.
    """

    def __init__(self, processor: MimicProcessor) -> None:
        self._processor = processor
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._bytes = 0

    def __call__(self, image: Any, **kwargs: Any) -> np.ndarray | None:
        digest = None if kwargs else _bytes_digest(image)
        if digest is None:
            return self._processor.resized(image, **kwargs)
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return self._kept[digest]
        made = self._processor.resized(image)
        if made is not None:
            self._kept[digest] = made
            self._bytes += made.nbytes
            while self._bytes > _KEPT_BYTES:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return made


def _bytes_digest(image: Any) -> bytes | None:
    """What tells the image of a file, or of its bytes, from others; `None` where that cannot be told before it is
    read."""
    source, places = _source(image)
    try:
        if isinstance(source, bytes | bytearray | memoryview):
            return hashlib.sha256(source).digest()
        if isinstance(source, str | os.PathLike) and "::" not in os.fspath(source):  # a member's file is the archive
            with open(file_named(source, places), "rb") as file:
                small = os.fstat(file.fileno()).st_size <= _KEPT_BYTES
                return hashlib.file_digest(file, "sha256").digest() if small else None
    except (OSError, ValueError):  # reading it says what is wrong
        pass
    return None


def _source(image: Any) -> tuple[Any, ImagePlaces]:
    """What names or holds an image, out of its wrappings, and where it may be read from."""
    places = ImagePlaces()
    if is_placed(image):
        image, places = image.source, image.places
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    return image, places


_NO_IMAGE = "none"
# What each process keeps of images that may come again.
_KEPT_BYTES = 32 * 2**20


def _image_seen(record: Mapping[str, Any]) -> tuple[str, str]:
    """In what form the image that is encoded of a record is given, and what tells whether it is still the same: of a
    file its size and time, of data in memory a checksum, of anything else its name."""
    image, places = _source(first_image(record.get("images")))
    if is_absent(image):
        return _NO_IMAGE, ""
    if isinstance(image, str | os.PathLike):
        try:
            facts = os.stat(file_named(image, places))
            return "file", f"{os.fspath(image)!r} {facts.st_size} {facts.st_mtime_ns}"
        except (OSError, ValueError):
            return "file", repr(os.fspath(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return "bytes", hashlib.sha256(image).hexdigest()
    try:
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        return "pixels", f"{getattr(image, 'size', '')} {getattr(image, 'mode', '')} {digest}"
    except Exception:  # whatever an image that cannot be decoded raises
        return "other", type(image).__name__


def _resumed(directory: Path, state: dict[str, Any], fresh: dict[str, Any], records: Records) -> list[Shard]:
    """The finished shards of an unfinished build, if it is of the same entities and model, up to the first whose images
    are others now; the records of all are passed over."""
    try:
        same = same_model(state["model"], fresh["model"]) and state["dtype"] == fresh["dtype"]
        same &= state.get("encoding_dtype") == fresh["encoding_dtype"]
        same &= bool(state.get("compiled")) == fresh["compiled"]
        entries = [(entry, entry["files"][shard_files(entry["name"])[1]]["sha256"]) for entry in state["shards"]]
        counts = [int(entry["count"]) for entry in state["shards"]]
        # Builds of older versions have none.
        images = [(dict(item["seen"]), int(item["unreadable"])) for item in state.setdefault("images", [])]
        if images and len(images) != len(entries):
            raise ValueError("it tells the images of another number of shards")
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise EntityIndexError(
            f"{directory / BUILD_STATE} is damaged: {error!r}. Delete it, and the build starts from the beginning."
        ) from error
    unchanged, unreadable = len(entries), 0
    for number, ((_, expected), count) in enumerate(zip(entries, counts, strict=True)):
        if not same:
            break
        digest, seen = hashlib.sha256(), ImagesRead()
        for record in records.skip(count, images=bool(images)):
            digest.update(table_line(table_record(record)))
            if images:
                seen.add(*_image_seen(record))
        same = digest.hexdigest() == expected
        if images and not _same_images(images[number][0], seen.facts()):
            unchanged = min(unchanged, number)
        elif images and unchanged == len(entries):
            unreadable += images[number][1]
    if not same:
        raise EntityIndexError(
            f"{directory} holds an unfinished build of another model, another precision, another `compile_encoder`, or "
            "other entities. Build into another directory, or pass overwrite=True (--overwrite) to discard that "
            "build."
        )
    if unreadable:
        warnings.warn(
            f"Of the entities that are encoded already in {directory}, {unreadable} have no image: theirs could not be "
            "read. To try these again, start anew in another directory, or use EntityIndex.update.",
            stacklevel=2,
        )
    return [read_shard(directory, entry) for entry, _ in entries[:unchanged]]


def _images_changed(
    directory: Path, state: dict[str, Any], done: Sequence[Shard], records: Records, entities: Any
) -> Records:
    """Gives up the shards of an unfinished build after those that are done, and gives the records that follow these."""
    count = sum(len(shard) for shard in done)
    warnings.warn(
        f"Images have changed since the build in {directory} was interrupted: what was encoded after the first "
        f"{count:,} entities is encoded again.",
        stacklevel=2,
    )
    for name in ("shards", "images"):
        del state[name][len(done) :]
    write_json(directory / BUILD_STATE, state)
    if not records.again:
        raise EntityIndexError(
            f"Images have changed since the build in {directory} was interrupted, so entities must be encoded again "
            "that were read already, and these come from a generator. Call build again with a new generator."
        )
    records = records.anew(entities)
    for _ in records.skip(count):
        pass
    return records


class _SeenIds:
    """Refuses an id that was there before, in shards or in a store."""

    def __init__(self, shards: Sequence[Shard], store: Store | None) -> None:
        self._rows, self._starts, self._store = IdRows(), [0], store
        self._shards: list[Shard] = []
        for shard in shards:
            self.add(shard)

    def add(self, shard: Shard) -> None:
        self._rows.add(shard)
        self._shards.append(shard)
        self._starts.append(self._starts[-1] + len(shard))

    def check(self, shard: Shard) -> None:
        """Refuses a shard that holds an id twice, or one that was there before.

        Raises:
            ValueError: naming the id.
        """
        hashes = shard.hashes
        doubtful = self._rows.has(hashes)
        doubtful[1:] |= hashes[1:] == hashes[:-1]
        doubtful[:-1] |= hashes[1:] == hashes[:-1]
        if self._store is not None:
            doubtful |= self._store.ids.has(hashes)
        inside: set[str] = set()
        for row, hashed in zip(shard.hash_rows[doubtful].tolist(), hashes[doubtful].tolist(), strict=True):
            entity_id = shard.table[row]["id"]
            # One that was removed is free again.
            known = entity_id in inside or (self._store is not None and self._store.row(entity_id) is not None)
            if known or any(self._id(before) == entity_id for before in self._rows.rows(hashed)):
                raise duplicate_id(entity_id)
            inside.add(entity_id)

    def _id(self, row: int) -> str:
        number = bisect.bisect_right(self._starts, row) - 1
        return self._shards[number].table[row - self._starts[number]]["id"]


def _workers(count: int) -> int:
    """How many processes read images beside the one that encodes, unless told: where starting them is cheap."""
    if count < _MANY_ENTITIES or multiprocessing.get_start_method() != "fork":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if multiprocessing.current_process().daemon else min(4, cores // 2)


def _quiet_tokenizers(_: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


__all__ = ["Builder", "ImagesRead", "build_in_directory", "build_in_memory", "shards_of_features"]

"""Makes batches of mentions and the entities that they mean. Knows the processor, but no model."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub.utils import chunk_iterable
from torch import Tensor
from tqdm.auto import tqdm

from ..errors_mimic import MimicImageError
from ..image_sources_mimic import placed
from ..images_mimic import first_image, listed
from ..processing_mimic import MimicProcessor
from ..records_mimic import entity_id_of, is_absent, plain_record
from ..texts_mimic import check_unicode
from .knowledge_base import KnowledgeBase


class MentionEntityCollator:
    """Joins mentions with the entities that they mean into a batch for [`MimicModel`].

    A batch of M mentions holds `input_ids`, `attention_mask` and `pixel_values` of the mentions; the same with the
    prefix `entity_` of their answers; `labels`, int64 of shape (M,), the row of each answer among the N entities;
    `entity_labels`, int64 of shape (N,), their numbers in the knowledge base. All are tensors.

    Which image of an entity is taken is drawn from the seed and the mentions that make up the batch. It so differs
    from epoch to epoch with their order, and is the same again in every run, however many processes load the data and
    wherever training was interrupted.

    Args:
        processor ([`MimicProcessor`]): makes texts and images into tensors.
        entities: a [`KnowledgeBase`], or what makes one.
        random_images (`bool`, defaults to `True`): whether an entity's image is drawn at random, as in training, or
            is its first, as in evaluation.
        seed (`int`, defaults to 43): of the random images.
        merge_duplicates (`bool`, defaults to `False`): whether an entity that several mentions of the batch mean is
            in it once. The published batches have it once for each, so that it is its own negative.
        hard_negatives (`int`, defaults to 0): so many wrong entities join the batch for each mention, drawn from the
            numbers in its field `hard_negatives`, where it has one. What is in the batch already does not come again.
        unreadable_log (path, *optional*): JSON Lines file to which images that cannot be read are appended. Each is
            warned of and taken as absent in any case.
        allow_urls, image_root (*optional*): where images of mentions and entities that are named by a string are read
            from, as in [`EntityIndex.build`]. By default from anywhere if the entities are a list or DataFrame, and
            from nowhere if they are a data set. A [`KnowledgeBase`] has its own.

    Example:

    ```python
    >>> collator = MentionEntityCollator(processor, entities)
    >>> trainer = Trainer(model, args, data_collator=collator, train_dataset=mentions)
    ```
    """

    def __init__(
        self,
        processor: MimicProcessor,
        entities: KnowledgeBase | datasets.Dataset | Sequence[Mapping[str, Any]],
        *,
        random_images: bool = True,
        seed: int = 43,
        merge_duplicates: bool = False,
        hard_negatives: int = 0,
        unreadable_log: str | Path | None = None,
        allow_urls: bool | str | None = None,
        image_root: bool | str | Path | None = None,
    ) -> None:
        self.processor = processor
        if not isinstance(entities, KnowledgeBase):
            entities = KnowledgeBase(entities, allow_urls, image_root)
        elif allow_urls is not None or image_root is not None:
            raise ValueError("A KnowledgeBase has `allow_urls` and `image_root` of its own; set them where it is made.")
        self.knowledge_base = entities
        self.random_images = random_images
        self.seed = seed
        self.merge_duplicates = merge_duplicates
        self.hard_negatives = hard_negatives
        self.unreadable_log = None if unreadable_log is None else Path(unreadable_log)
        self._records = self.knowledge_base.entities()
        self._reported: set[str] = set()
        self._normalized: np.ndarray | None = None

    def __call__(self, mentions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some mentions: dicts with `mention`, `sentence` (or `text`), `image`, `answer` and `id`,
        for messages. `start` and `end`, the place of a mention in its sentence, are for the context window "mention".

        Raises:
            ValueError: if an answer is not in the knowledge base.
        """
        mentions = [plain_record(mention) for mention in mentions]
        for mention in mentions:
            if not isinstance(mention, Mapping):
                raise ValueError(f"A mention of a batch must be a dict, got {type(mention).__name__}.")
        if not mentions:
            raise ValueError("A batch needs one mention at least.")
        rows = [self._row(mention) for mention in mentions]
        if self.merge_duplicates:
            entity_rows = list(dict.fromkeys(rows))
            position = {row: place for place, row in enumerate(entity_rows)}
            labels = [position[row] for row in rows]
        else:
            entity_rows, labels = rows, list(range(len(rows)))
        entity_rows = entity_rows + self._wrong_entities(mentions, rows)
        draw = self._draw(mentions)
        entities = [self._records[row] for row in entity_rows]
        images = [_pick(entity.get("images"), draw) for entity in entities]
        batch = self.encode_mentions(mentions)
        joined = self._inputs(
            self.processor.entity_texts(
                *(
                    [_text(entity.get(name), name, f"Entity {entity['id']!r}") for entity in entities]
                    for name in ("name", "description")
                )
            ),
            [image for image, _ in images],
            [f"entity {entity['id']}, image {place}" for entity, (_, place) in zip(entities, images, strict=True)],
        )
        batch |= {f"entity_{name}": tensor for name, tensor in joined.items()}
        batch["labels"] = torch.tensor(labels)
        batch["entity_labels"] = torch.tensor(entity_rows)
        return batch

    def encode_mentions(self, mentions: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `pixel_values` of mentions alone."""
        return self._inputs(
            self._texts_of(mentions),
            [self._mentions_image(mention) for mention in mentions],
            [f"mention {mention.get('id')}" for mention in mentions],
        )

    def cache_pixels(
        self, mentions: Iterable[Mapping[str, Any]], num_threads: int = 1, show_progress: bool = True
    ) -> list[dict[str, Any]]:
        """Decodes and resizes the images of mentions and of all entities once, and keeps them in memory.

        Batches are the same bit by bit. An image takes 3 bytes for each pixel of the backbone's input: 150 kB at
        224 x 224.

        Args:
            mentions: the mentions of the training data.
            num_threads: how many images are decoded at a time.

        Returns:
            The mentions, to be used in place of those given.
        """

        def resize(record: Mapping[str, Any], name: str, what: str) -> dict[str, Any]:
            value = record.get(name)
            if name == "image":
                return {**record, name: self._resized(self._mentions_image(record), f"{what} {record.get('id')}")}
            resized = [self._resized(item, f"{what} {record['id']}, image {i}") for i, item in enumerate(listed(value))]
            return {**record, name: resized}

        def all_of(records: Iterable[Mapping[str, Any]], total: int | None, name: str, what: str) -> list[dict]:
            with ThreadPoolExecutor(max(1, num_threads)) as pool:
                # In slices, so that the bytes of no more than a slice wait for a thread.
                done: list[dict[str, Any]] = []
                bar = tqdm(total=total, desc=f"Resizing images ({what})", disable=not show_progress)
                for part in chunk_iterable(records, 256):
                    part = list(part)
                    done += pool.map(lambda record: resize(record, name, what), part)
                    bar.update(len(part))
                bar.close()
                return done

        self._records = all_of(self.knowledge_base.entities(), len(self.knowledge_base), "images", "entity")
        return all_of(mentions, length(mentions), "image", "mention")

    def _mentions_image(self, mention: Mapping[str, Any]) -> Any:
        """The image of a mention, with the places that it may be read from."""
        return placed(first_image(mention.get("image")), self.knowledge_base.places)

    def _row(self, mention: Mapping[str, Any]) -> int:
        try:
            return self.knowledge_base.row(
                entity_id_of(field_of(mention, "answer"), f"The answer of mention {mention.get('id')!r}")
            )
        except KeyError:
            raise ValueError(
                f"The answer {mention.get('answer')!r} of mention {mention.get('id')!r} is not in the knowledge base, "
                "so it cannot be trained on. Leave such mentions out first."
            ) from None

    def _draw(self, mentions: Sequence[Mapping[str, Any]]) -> random.Random | None:
        if not self.random_images:
            return None
        names = [f"{mention.get('id')}\0{mention['answer']}" for mention in mentions]
        return _drawing([str(self.seed), *names])

    def _wrong_entities(self, mentions: Sequence[Mapping[str, Any]], answers: list[int]) -> list[int]:
        """Hard negatives of a batch, each once, and none that is an answer in it."""
        if not self.hard_negatives:
            return []
        draw = _drawing(["hard", str(self.seed), *(str(mention.get("id")) for mention in mentions)])
        taken, found = set(answers), []
        for mention in mentions:
            pool = [row for row in mention.get("hard_negatives") or [] if row not in taken]
            for row in draw.sample(pool, min(self.hard_negatives, len(pool))):
                taken.add(row)
                found.append(row)
        return found

    def _texts_of(self, mentions: Sequence[Mapping[str, Any]]) -> list[str]:
        """The templates of mentions, filled: the part of each sentence that the processor's context window shows."""
        heads, bodies = (
            [_text(field_of(mention, name), name, f"Mention {mention.get('id')!r}") for mention in mentions]
            for name in ("mention", "sentence")
        )
        starts, ends = ([mention.get(name) for mention in mentions] for name in ("start", "end"))
        try:
            return self.processor.mention_texts(heads, bodies, starts, ends)
        except ValueError as error:
            if len(mentions) == 1:
                raise ValueError(f"Mention {mentions[0].get('id')!r}: {error}") from error
            return [text for mention in mentions for text in self._texts_of([mention])]

    def _inputs(self, texts: list[str], sources: list[Any], names: list[str]) -> dict[str, Tensor]:
        for text, name in zip(texts, names, strict=True):
            check_unicode(text, f"The text of {name.partition(',')[0]}")
        inputs = self.processor.tokenize(texts)
        pixel_values = self.processor.blank_pixels(len(sources))
        for row, (source, name) in enumerate(zip(sources, names, strict=True)):
            image = self._resized(source, name)
            if image is not None:
                self._normalize(image, pixel_values[row])
        return {**inputs, "pixel_values": pixel_values}

    def _resized(self, source: Any, name: str) -> np.ndarray | None:
        if source is None or isinstance(source, _Resized):
            return source
        try:
            resized = self.processor.resized(source)
            return None if resized is None else resized.view(_Resized)
        except MimicImageError as error:
            self._report(name, error)
            return None

    def _normalize(self, image: np.ndarray, out: Tensor) -> None:
        if self._normalized is None:
            # What the image processor makes of each of the 256 values, for each channel.
            ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
            settings = {"do_resize": False, "do_center_crop": False, "return_tensors": "np"}
            table = self.processor.image_processor([ramp], **settings)["pixel_values"]
            self._normalized = table[0].reshape(3, 256).astype(np.float32)
        for channel, values in enumerate(self._normalized):
            np.take(values, image[channel], out=out[channel].numpy())

    def _report(self, name: str, error: MimicImageError) -> None:
        if name in self._reported:
            return
        self._reported.add(name)
        warnings.warn(f"The image of {name} is left out: {error}", stacklevel=2)
        if self.unreadable_log is not None:
            # One short write in append mode: lines of several processes do not mix.
            with open(self.unreadable_log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"image": name, "error": str(error)}, ensure_ascii=False) + "\n")


def unreadable_images(log: Path) -> list[dict[str, str]]:
    """The images that could not be read, each once: `image` and `error`, from a collator's `unreadable_log`."""
    try:
        lines = log.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    found: dict[str, dict[str, str]] = {}
    for line in filter(None, lines):
        entry = json.loads(line)
        found.setdefault(entry["image"], entry)
    return list(found.values())


class _Resized(np.ndarray):
    """An image that is resized already, as against an array of pixels that a record has for an image."""


def _text(value: Any, name: str, whose: str) -> str:
    """A text of a record; an absent one is empty.

    Raises:
        ValueError: if it is something else.
    """
    if is_absent(value):
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{whose}: `{name}` must be a string, got {type(value).__name__}.")
    return value


def _pick(images: Any, draw: random.Random | None) -> tuple[Any, int]:
    """One of an entity's images and its number: at random, or the first."""
    images = listed(images)
    if not images:
        return None, 0
    place = 0 if draw is None or len(images) == 1 else draw.randrange(len(images))
    return images[place], place


def field_of(mention: Mapping[str, Any], name: str) -> Any:
    """A field of a mention; `text`, the pipeline's word, is another for `sentence`.

    Raises:
        ValueError: if it has no such field.
    """
    if name not in mention and name == "sentence" and "text" in mention:
        name = "text"
    if name not in mention:
        raise ValueError(f"Mention {mention.get('id')!r} has no field `{name}`; it has {', '.join(map(str, mention))}.")
    return mention[name]


def length(items: Any) -> int | None:
    return len(items) if hasattr(items, "__len__") else None


def _drawing(names: Sequence[str]) -> random.Random:
    # As bytes, which gives what the text would: an id may hold half a character, which is no reason to end a training.
    return random.Random("\0".join(names).encode(errors="surrogatepass"))

"""The mentions and entities of a training, read from a data set or an archive. Knows no model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm

from ..datasets_scripts.builders import load_raw
from ..records_mimic import entity_id_of, undecoded
from .arguments import DataArguments, MimicTrainingArguments
from .knowledge_base import KnowledgeBase, require_columns

logger = logging.getLogger("mimic_el.train")


MENTION_COLUMNS = ("mention", "sentence", "image", "answer")


MISSING_LOG = "mentions_without_entity.jsonl"


class StreamedMentions(torch.utils.data.IterableDataset):
    """Mentions read as they come, in another order each epoch, without those whose answer is not in the knowledge base.

    Args:
        stream: the mentions.
        knowledge_base: has the answers.
        length: the number of mentions that have an entity, so that epochs can be counted.
        shuffle_buffer, seed: of the order.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        knowledge_base: KnowledgeBase,
        length: int,
        shuffle_buffer: int,
        seed: int,
    ) -> None:
        self.stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.knowledge_base = knowledge_base
        self.length = length

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (mention for mention in self.stream if _has_entity(mention, self.knowledge_base))


def load_data(data: DataArguments, cache_dir: str | None = None) -> tuple[dict[str, Any], KnowledgeBase]:
    """The mentions of each split (a `datasets.Dataset`, or an `IterableDataset` when streaming) and the entities.

    Raises:
        ValueError: if there is no such data set, or it has not the columns that a data set must have.
    """
    name = str(data.dataset_name)
    if data.data_dir is not None:
        splits, entities = load_raw(name, data.data_dir, streaming=data.streaming, cache_dir=cache_dir)
        if isinstance(entities, datasets.IterableDataset):
            entities = datasets.Dataset.from_generator(
                _rows_of, features=entities.features, gen_kwargs={"stream": entities}, cache_dir=cache_dir
            )
    else:
        options: dict[str, Any] = {"revision": data.dataset_revision, "cache_dir": cache_dir}
        if Path(name).is_dir():
            # The cache of `datasets` knows a directory by its name and card alone, and would give the old rows of one
            # that was written anew. The description of the configuration is part of the key.
            options["description"] = _fingerprint(Path(name))
        try:
            splits = datasets.load_dataset(name, "mentions", streaming=data.streaming, **options)
            entities = datasets.load_dataset(name, "entities", split="kb", **options)
        except (ValueError, OSError) as error:  # also without the Hub
            raise ValueError(
                f"The data set {name!r} cannot be loaded: {str(error).rstrip('.')}. A data set has the configurations "
                "mentions and entities (with the split kb); docs/datasets.md says how to make one."
            ) from error
    mentions = {split: undecoded(part, "image") for split, part in splits.items()}
    for split, part in mentions.items():
        require_columns(part.column_names, MENTION_COLUMNS, f"the mentions of the split {split}")
    root = data.image_root or (name if data.data_dir is None and Path(name).is_dir() else None)
    urls = {"none": False, "public": True}.get(data.allow_urls, data.allow_urls)
    return mentions, KnowledgeBase(entities, urls, root)


def _fingerprint(directory: Path) -> str:
    """Differs where the paths, sizes or times of the files of a directory differ."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def _rows_of(stream: datasets.IterableDataset) -> Iterator[Mapping[str, Any]]:
    yield from stream


def training_mentions(
    mentions: Any, knowledge_base: KnowledgeBase, data: DataArguments, args: MimicTrainingArguments
) -> tuple[Any, int]:
    """The mentions that can be trained on, and the number of those that cannot: their answer is null or not an entity.

    They are named in `mentions_without_entity.jsonl` in the output directory.

    Raises:
        ValueError: if none can be trained on, or some cannot and `args.missing_answers` is "error".
    """
    if data.max_train_mentions is not None:
        mentions = first(mentions, data.max_train_mentions)
    is_stream = isinstance(mentions, datasets.IterableDataset)
    names = [name for name in ("id", "mention", "answer") if name in mentions.column_names]
    rows = mentions.select_columns(names)
    if is_stream:
        rows = tqdm(rows, desc="Counting the training's mentions", disable=args.disable_tqdm)
    kept: list[int] = []
    missing: list[dict[str, Any]] = []
    of_no_entity = 0
    for row, mention in enumerate(rows):
        if _has_entity(mention, knowledge_base):
            kept.append(row)
        elif mention["answer"] is None:
            of_no_entity += 1
        else:
            missing.append({"split": "train", "row": row, **mention})
    if of_no_entity:
        logger.info("%d training mentions are of no entity (their answer is null). They are left out.", of_no_entity)
    if missing:
        log = Path(args.output_dir or ".") / MISSING_LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in missing), encoding="utf-8")
        message = (
            f"The answers of {len(missing):,} of {len(missing) + len(kept):,} training mentions are not in the "
            f"knowledge base, such as {missing[0]['answer']!r}; all are listed in {log}"
        )
        if args.missing_answers == "error":
            raise ValueError(f"{message}.")
        logger.warning("%s. They are left out.", message)
    if not kept:
        raise ValueError("There are no mentions to train on whose answer is in the knowledge base.")
    if is_stream:
        stream = StreamedMentions(mentions, knowledge_base, len(kept), data.shuffle_buffer, args.seed)
        return stream, len(missing) + of_no_entity
    return mentions.select(kept) if missing or of_no_entity else mentions, len(missing) + of_no_entity


def _has_entity(mention: Mapping[str, Any], knowledge_base: KnowledgeBase) -> bool:
    answer = mention["answer"]
    if answer is None:  # a mention of no entity, which `prepare --keep_nil` keeps
        return False
    return entity_id_of(answer, f"The answer of mention {mention.get('id')!r}") in knowledge_base


def first(mentions: Any, count: int) -> Any:
    if isinstance(mentions, datasets.IterableDataset):
        return mentions.take(count)
    return mentions.select(range(min(count, len(mentions))))

"""Training and evaluating MIMIC with `transformers.Trainer`: what batches hold, the recipe, ranking a knowledge base.

The parts are usable on their own: a plain `Trainer` needs a [`MimicModel`], a [`MentionEntityCollator`] as its
`data_collator`, and `remove_unused_columns=False`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, speed_metrics

from ..errors_mimic import MimicImageError
from ..images_mimic import load_image
from ..index_mimic import EntityIndex
from ..modeling_mimic import MentionFeatures, MimicModel
from ..processing_mimic import MimicProcessor
from .model_card import TrainingRun

HITS_AT = (1, 3, 5, 10, 20)
INDEX_FOLDER = "index"
MISSING_ANSWERS = ("exclude", "miss", "error")
# Mentions whose features are held at once while they are ranked: some 30 kB each in the published model.
_MENTIONS_AT_ONCE = 8192
# Knowledge bases of fewer entities are encoded in memory during evaluation.
_ENTITIES_IN_MEMORY = 10_000
_METRIC = Path(__file__).parent.parent / "metrics" / "mel_ranking"


@functools.cache
def mel_ranking() -> evaluate.EvaluationModule:
    """The project's ranking metric, metrics/mel_ranking."""
    return evaluate.load(str(_METRIC), keep_in_memory=True)


# --- Data -----------------------------------------------------------------------------------------------------------


def undecoded(data: Any) -> Any:
    """A data set whose column `image` stays bytes, to be decoded by [`load_image`] within its limits; others as is."""
    features = getattr(data, "features", None) or {}
    if isinstance(features.get("image"), datasets.Image):
        return data.cast_column("image", datasets.Image(decode=False))
    return data


class KnowledgeBase(Sequence[Mapping[str, Any]]):
    """The entities that mentions are linked to: a sequence of dicts that also knows their ids.

    Pictures stay bytes, to be decoded by [`load_image`] within its limits.

    Args:
        entities: a `datasets.Dataset`, or a sequence of dicts, with `id`, `name`, `description` and `images`.

    Raises:
        ValueError: if there are no entities, or two share an id.
    """

    def __init__(self, entities: datasets.Dataset | Sequence[Mapping[str, Any]]) -> None:
        self._entities: Any = entities
        if isinstance(entities, datasets.Dataset):
            require_columns(entities.column_names, ("id", "name", "description", "images"), "the entities")
            # As Arrow, nothing is decoded. (A cast to undecoded pictures would write the data set anew.)
            self._entities = entities.with_format("arrow")
        self._rows: dict[str, int] = {}
        duplicates = []
        for row, entity_id in enumerate(self.column("id")):
            if self._rows.setdefault(entity_id, row) != row:
                duplicates.append(entity_id)
        if not self._rows:
            raise ValueError("The knowledge base is empty: there is no entity to link to.")
        if duplicates:
            raise ValueError(
                f"{len(duplicates)} entities have the id of another, such as {duplicates[0]!r}. Ids must be unique."
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, entity_id: object) -> bool:
        """Whether there is an entity of that id."""
        return entity_id in self._rows

    def __getitem__(self, row: Any) -> Any:
        if isinstance(self._entities, datasets.Dataset):
            return self._entities[row].to_pylist()[0]
        return self._entities[row]

    def column(self, name: str) -> Iterator[Any]:
        """The values of one field of all entities."""
        if isinstance(self._entities, datasets.Dataset):
            for table in self._entities.select_columns([name]).iter(1000):
                yield from table[name].to_pylist()
        else:
            yield from (entity[name] for entity in self._entities)

    def row(self, entity_id: str) -> int:
        """The number of an entity, from 0; `KeyError` where there is none of that id."""
        return self._rows[entity_id]


def require_columns(present: Iterable[str] | None, needed: Iterable[str], what: str) -> None:
    """Raises a `ValueError` that names the columns which are not there."""
    present = list(present or [])
    missing = [name for name in needed if name not in present]
    if missing:
        raise ValueError(f"{what.capitalize()} have no column {', '.join(missing)}; they have {', '.join(present)}.")


class MentionEntityCollator:
    """Joins mentions with the entities that they mean into a batch for [`MimicModel`].

    A batch of M mentions holds `input_ids`, `attention_mask` and `pixel_values` of the mentions; the same with the
    prefix `entity_` of their answers; `labels`, int64 of shape (M,), the row of each answer among the N entities;
    `entity_labels`, int64 of shape (N,), their numbers in the knowledge base; and `return_loss`.

    Which picture of an entity is taken is drawn from the seed and the mentions that make up the batch. It so differs
    from epoch to epoch with their order, and is the same again in every run, however many processes load the data and
    wherever training was interrupted.

    Args:
        processor ([`MimicProcessor`]): makes texts and pictures into tensors.
        entities: a [`KnowledgeBase`], or what makes one.
        random_images (`bool`, defaults to `True`): whether an entity's picture is drawn at random, as in training, or
            is its first, as in evaluation.
        seed (`int`, defaults to 43): of the random pictures.
        merge_duplicates (`bool`, defaults to `False`): whether an entity that several mentions of the batch mean is
            in it once. The published batches have it once for each, so that it is its own negative.
        unreadable_log (path, *optional*): JSON Lines file to which pictures that cannot be read are appended. Each is
            warned of and taken as absent in any case.

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
        unreadable_log: str | Path | None = None,
    ) -> None:
        self.processor = processor
        self.knowledge_base = entities if isinstance(entities, KnowledgeBase) else KnowledgeBase(entities)
        self.random_images = random_images
        self.seed = seed
        self.merge_duplicates = merge_duplicates
        self.unreadable_log = None if unreadable_log is None else Path(unreadable_log)
        self._records: Sequence[Mapping[str, Any]] = self.knowledge_base
        self._reported: set[str] = set()
        self._normalised: np.ndarray | None = None

    def __call__(self, mentions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of some mentions: dicts with `mention`, `sentence`, `image`, `answer` and, for messages, `id`.

        Raises:
            ValueError: if an answer is not in the knowledge base.
        """
        rows = [self._row(mention) for mention in mentions]
        if self.merge_duplicates:
            entity_rows = list(dict.fromkeys(rows))
            position = {row: place for place, row in enumerate(entity_rows)}
            labels = [position[row] for row in rows]
        else:
            entity_rows, labels = rows, list(range(len(rows)))
        draw = self._draw(mentions)
        entities = [self._records[row] for row in entity_rows]
        images = [_pick(entity.get("images"), draw) for entity in entities]
        batch = self.encode_mentions(mentions)
        joined = self._inputs(
            [entity["name"] or "" for entity in entities],
            [entity["description"] or "" for entity in entities],
            [image for image, _ in images],
            [f"entity {entity['id']}, image {place}" for entity, (_, place) in zip(entities, images, strict=True)],
        )
        batch |= {f"entity_{name}": tensor for name, tensor in joined.items()}
        batch["labels"] = torch.tensor(labels)
        batch["entity_labels"] = torch.tensor(entity_rows)
        return {**batch, "return_loss": True}

    def encode_mentions(self, mentions: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `pixel_values` of mentions alone."""
        return self._inputs(
            [mention["mention"] or "" for mention in mentions],
            [mention["sentence"] or "" for mention in mentions],
            [mention.get("image") for mention in mentions],
            [f"mention {mention.get('id')}" for mention in mentions],
        )

    def cache_pixels(
        self, mentions: Iterable[Mapping[str, Any]], num_threads: int = 1, show_progress: bool = True
    ) -> list[dict[str, Any]]:
        """Decodes and resizes the pictures of mentions and of all entities once, and keeps them in memory.

        Batches are the same bit by bit. A picture takes 3 bytes for each pixel of the backbone's input: 150 kB at
        224 x 224.

        Args:
            mentions: the mentions of the training data.
            num_threads: how many pictures are decoded at a time.

        Returns:
            The mentions, to be used in place of those given.
        """

        def resize(record: Mapping[str, Any], name: str, what: str) -> dict[str, Any]:
            value = record.get(name)
            if name == "image":
                return {**record, name: self._resized(value, f"{what} {record.get('id')}")}
            pictures = [self._resized(item, f"{what} {record['id']}, image {i}") for i, item in enumerate(value or [])]
            return {**record, name: pictures}

        def all_of(records: Iterable[Mapping[str, Any]], total: int | None, name: str, what: str) -> list[dict]:
            with ThreadPoolExecutor(max(1, num_threads)) as pool:
                # In slices, so that the bytes of no more than a slice wait for a thread.
                done: list[dict[str, Any]] = []
                bar = tqdm(total=total, desc=f"Resizing pictures ({what})", disable=not show_progress)
                for part in _slices(records, 256):
                    done += pool.map(lambda record: resize(record, name, what), part)
                    bar.update(len(part))
                bar.close()
                return done

        self._records = all_of(self.knowledge_base, len(self.knowledge_base), "images", "entity")
        return all_of(mentions, _length(mentions), "image", "mention")

    def _row(self, mention: Mapping[str, Any]) -> int:
        try:
            return self.knowledge_base.row(mention["answer"])
        except KeyError:
            raise ValueError(
                f"The answer {mention.get('answer')!r} of mention {mention.get('id')!r} is no entity of the knowledge "
                "base, so it cannot be trained on. Leave such mentions out first."
            ) from None

    def _draw(self, mentions: Sequence[Mapping[str, Any]]) -> random.Random | None:
        if not self.random_images:
            return None
        names = [f"{mention.get('id')}\0{mention['answer']}" for mention in mentions]
        return random.Random("\0".join([str(self.seed), *names]))

    def _inputs(self, heads: list[str], bodies: list[str], pictures: list[Any], names: list[str]) -> dict[str, Tensor]:
        separator = self.processor.separator
        inputs = self.processor.tokenize([head + separator + body for head, body in zip(heads, bodies, strict=True)])
        images = [self._read(picture, name) for picture, name in zip(pictures, names, strict=True)]
        # Pictures that were resized before are normalised here; the processor leaves their rows zero.
        pixel_values = self.processor.pixels([None if isinstance(i, np.ndarray) else i for i in images])
        for row, image in enumerate(images):
            if isinstance(image, np.ndarray):
                self._normalise(image, pixel_values[row])
        return {**inputs, "pixel_values": pixel_values}

    def _read(self, picture: Any, name: str) -> Any:
        if picture is None or isinstance(picture, np.ndarray):
            return picture
        try:
            return load_image(picture, correct=self.processor.correct_images)
        except MimicImageError as error:
            self._report(name, error)
            return None

    def _resized(self, picture: Any, name: str) -> np.ndarray | None:
        image = self._read(picture, name)
        if image is None:
            return None
        resized = self.processor.image_processor([image], do_rescale=False, do_normalize=False, return_tensors="np")
        return resized["pixel_values"][0]

    def _normalise(self, image: np.ndarray, out: Tensor) -> None:
        if self._normalised is None:
            # What the image processor makes of each of the 256 values, for each channel.
            ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
            table = self.processor.image_processor([ramp], do_resize=False, return_tensors="np")["pixel_values"]
            self._normalised = table[0].reshape(3, 256).astype(np.float32)
        for channel, values in enumerate(self._normalised):
            np.take(values, image[channel], out=out[channel].numpy())

    def _report(self, name: str, error: MimicImageError) -> None:
        if name in self._reported:
            return
        self._reported.add(name)
        warnings.warn(f"The picture of {name} is left out. {error}", stacklevel=2)
        if self.unreadable_log is not None:
            # One short write in append mode: lines of several processes do not mix.
            with open(self.unreadable_log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"picture": name, "error": str(error)}, ensure_ascii=False) + "\n")


def _pick(images: Any, draw: random.Random | None) -> tuple[Any, int]:
    """One of an entity's pictures and its number: at random, or the first."""
    if images is None or (isinstance(images, list | tuple) and not images):
        return None, 0
    if not isinstance(images, list | tuple):
        return images, 0
    place = 0 if draw is None or len(images) == 1 else draw.randrange(len(images))
    return images[place], place


def _length(items: Any) -> int | None:
    return len(items) if hasattr(items, "__len__") else None


def _slices(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    part: list[Any] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


# --- Evaluation -----------------------------------------------------------------------------------------------------


@dataclass
class RankedMentions:
    """Mentions with the ranks of their answers in a knowledge base, in the order in which they came.

    Args:
        ids, answers (`list[str]`): of the M mentions.
        kinds (`list[str]`, *optional*): the column `kind`, where the mentions have one.
        ranks (`numpy.ndarray` of shape `(M,)`, float64): from 1; NaN where the answer is not in the knowledge base.
        candidates (`list[list[tuple[str, float]]]`, *optional*): the best entities and their scores, best first.
    """

    ids: list[str]
    answers: list[str]
    kinds: list[str] | None
    ranks: np.ndarray
    candidates: list[list[tuple[str, float]]] | None = None

    def metrics(self, missing: str = "exclude") -> dict[str, float]:
        """`hits@k` for k in 1, 3, 5, 10, 20, `mrr` and `mean_rank`; `mentions`, the number that they are over, and
        `missing_answers`, the mentions whose answer is not in the knowledge base. Where the mentions have kinds, also
        Hits@1, MRR and number of each kind, such as `KIND_mrr`.

        Args:
            missing: what a missing answer counts: see metrics/mel_ranking.
        """
        metrics = self._metrics(self.ranks, missing)
        for kind in sorted(set(self.kinds or [])):
            ranks = self.ranks[[own == kind for own in self.kinds or []]]
            if missing == "miss" or not np.isnan(ranks).all():
                own = self._metrics(ranks, missing)
                metrics |= {f"{kind}_{name}": own[name] for name in ("hits@1", "mrr", "mentions")}
        return metrics

    @staticmethod
    def _metrics(ranks: np.ndarray, missing: str) -> dict[str, float]:
        metrics = dict(mel_ranking().compute(ranks=ranks, ks=list(HITS_AT), missing=missing))
        count, absent = metrics.pop("count"), metrics.pop("missing")
        return {**metrics, "mentions": count, "missing_answers": absent}

    def records(self) -> Iterator[dict[str, Any]]:
        """For each mention a dict of `id`, `answer`, `rank` (`None` where the answer is not in the knowledge base),
        `kind` where there is one, and `candidates`, a list of `entity_id` and `score`."""
        for row, (mention_id, answer) in enumerate(zip(self.ids, self.answers, strict=True)):
            rank = float(self.ranks[row])
            record: dict[str, Any] = {"id": mention_id, "answer": answer, "rank": None if math.isnan(rank) else rank}
            if self.kinds is not None:
                record["kind"] = self.kinds[row]
            if self.candidates is not None:
                record["candidates"] = [{"entity_id": i, "score": round(s, 5)} for i, s in self.candidates[row]]
            yield record


def rank_mentions(
    model: MimicModel,
    collator: MentionEntityCollator,
    index: EntityIndex,
    mentions: Iterable[Mapping[str, Any]],
    *,
    top_k: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
    show_progress: bool = True,
) -> RankedMentions:
    """Ranks the answer of each mention among all entities of an index.

    Memory is bounded by the features of 8,192 mentions, the index's own needs, and the results.

    Args:
        model: made the index.
        collator: encodes the mentions; only its `encode_mentions` is used.
        index: the knowledge base.
        mentions: dicts with `mention`, `sentence`, `image`, `answer` and `id`, maybe `kind`; a data set or any
            iterable.
        top_k: how many of the best entities to note for each mention.
        batch_size, num_workers: of encoding.

    Raises:
        ValueError: if there are no mentions, or the model's features are not finite.
    """
    mentions = undecoded(mentions)
    if not hasattr(mentions, "__getitem__") and not isinstance(mentions, torch.utils.data.IterableDataset):
        mentions = list(mentions)
    loader: DataLoader = DataLoader(
        mentions,  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=functools.partial(_encoded_and_named, collator),
    )
    results = RankedMentions([], [], [], np.empty(0), [] if top_k else None)
    ranks: list[np.ndarray] = []
    features: list[MentionFeatures] = []
    waiting: list[str] = []
    was_training = model.training
    model.eval()
    total = _length(mentions)
    try:
        with torch.inference_mode(), tqdm(total=total, desc="Encoding mentions", disable=not show_progress) as bar:
            for inputs, named in loader:
                encoded = model.encode_mentions(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
                if not all(tensor.isfinite().all() for tensor in encoded.tensors.values()):
                    raise ValueError(
                        "The model's features of mentions are not finite: training has diverged. Try a smaller "
                        "learning rate."
                    )
                features.append(encoded)  # on the model's device: that is where ranking is done
                waiting += named["answer"]
                results.ids += named["id"]
                results.kinds += named["kind"]
                if len(waiting) >= _MENTIONS_AT_ONCE:
                    ranks.append(_rank(index, features, waiting, top_k, results, show_progress))
                    features, waiting = [], []
                bar.update(len(named["id"]))
            if waiting:
                ranks.append(_rank(index, features, waiting, top_k, results, show_progress))
    finally:
        model.train(was_training)
    if not ranks:
        raise ValueError("There are no mentions to rank.")
    results.ranks = np.concatenate(ranks)
    if all(kind is None for kind in results.kinds or []):
        results.kinds = None
    return results


def _encoded_and_named(
    collator: MentionEntityCollator, mentions: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    named = {name: [mention.get(name) for mention in mentions] for name in ("id", "answer", "kind")}
    return collator.encode_mentions(mentions), named


def _rank(
    index: EntityIndex,
    features: list[MentionFeatures],
    answers: list[str],
    top_k: int,
    results: RankedMentions,
    show_progress: bool,
) -> np.ndarray:
    joined = MentionFeatures.cat(features)
    results.answers += answers
    if results.candidates is not None:
        found = index.search(joined, top_k=min(top_k, len(index)), show_progress=show_progress)
        for entity_ids, scores in zip(found.entity_ids, found.scores, strict=True):
            results.candidates.append([(i, float(s)) for i, s in zip(entity_ids, scores, strict=False)])
    return index.rank(joined, answers, show_progress=show_progress).ranks


def in_batch_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for a plain `Trainer`: each mention's answer among the entities of its batch.

    The metrics are those of `mel_ranking`. They tell whether training works; they are no figures for a paper, for
    which the answer is ranked among the whole knowledge base, as [`MimicTrainer`] does.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    labels = prediction.label_ids[0] if isinstance(prediction.label_ids, tuple) else prediction.label_ids
    # The Trainer pads the rows of smaller batches with -100.
    scores = np.where(logits == -100, -np.inf, logits.astype(np.float64))
    return dict(mel_ranking().compute(predictions=scores, references=labels, ks=list(HITS_AT)))


# --- Training -------------------------------------------------------------------------------------------------------

_PARENT_FIELDS = {parent.name: parent for parent in dataclasses.fields(TrainingArguments)}


def _recipe(name: str, value: Any) -> Any:
    """A field of TrainingArguments with the published recipe's default."""
    return field(default=value, metadata=_PARENT_FIELDS[name].metadata)


@dataclass
class MimicTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose defaults are the published recipe.

    AdamW with a constant rate of 1e-5, eps 1e-4 and weight decay 1e-4, no clipping of gradients, batches of 128, at
    most 20 epochs, an evaluation every 2 epochs, the best checkpoint by MRR, a stop after 3 evaluations without gain,
    seed 43, float32.

    Args:
        eval_epochs (`int`, defaults to 2): with `eval_strategy="epoch"`, evaluate after every so many epochs, and after
            the last.
        early_stopping_patience (`int`, defaults to 3): stop after so many evaluations without gain; 0 never stops.
        missing_answers (`str`, defaults to "exclude"): what an evaluated mention counts whose answer is not in the
            knowledge base: "exclude", "miss" or "error", as in metrics/mel_ranking.
        index_dtype (`str`, defaults to "float32"): in what the knowledge base's features are kept for evaluation and
            in the index that training leaves.
    """

    per_device_train_batch_size: int = _recipe("per_device_train_batch_size", 128)
    per_device_eval_batch_size: int = _recipe("per_device_eval_batch_size", 128)
    num_train_epochs: float = _recipe("num_train_epochs", 20.0)
    learning_rate: float = _recipe("learning_rate", 1e-5)
    lr_scheduler_type: str = _recipe("lr_scheduler_type", "constant")
    weight_decay: float = _recipe("weight_decay", 1e-4)
    adam_epsilon: float = _recipe("adam_epsilon", 1e-4)
    max_grad_norm: float = _recipe("max_grad_norm", 0.0)
    seed: int = _recipe("seed", 43)
    eval_strategy: str = _recipe("eval_strategy", "epoch")
    save_strategy: str = _recipe("save_strategy", "epoch")
    save_total_limit: int | None = _recipe("save_total_limit", 2)
    load_best_model_at_end: bool = _recipe("load_best_model_at_end", True)
    metric_for_best_model: str | None = _recipe("metric_for_best_model", "mrr")
    greater_is_better: bool | None = _recipe("greater_is_better", True)
    restore_callback_states_from_checkpoint: bool = _recipe("restore_callback_states_from_checkpoint", True)
    remove_unused_columns: bool = _recipe("remove_unused_columns", False)
    logging_steps: float = _recipe("logging_steps", 10)
    # A checkpoint that is pushed while training goes on would lack the model's code.
    hub_strategy: str = _recipe("hub_strategy", "end")
    do_train: bool = _recipe("do_train", True)
    do_eval: bool = _recipe("do_eval", True)
    do_predict: bool = _recipe("do_predict", True)
    eval_epochs: int = field(
        default=2, metadata={"help": "With eval_strategy epoch: evaluate after every so many epochs, and the last."}
    )
    early_stopping_patience: int = field(
        default=3, metadata={"help": "Stop after so many evaluations without gain in the metric; 0: never."}
    )
    missing_answers: str = field(
        default="exclude",
        metadata={
            "help": "What an evaluated mention counts whose answer is not in the knowledge base: exclude (it is only "
            "counted), miss (no hit), error (stop).",
            "choices": list(MISSING_ANSWERS),
        },
    )
    index_dtype: str = field(
        default="float32",
        metadata={
            "help": "In what the features of the knowledge base are kept, in evaluation and in the saved index.",
            "choices": ["float32", "float16", "int8"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_epochs < 1:
            raise ValueError(f"eval_epochs must be at least 1, got {self.eval_epochs}.")
        if self.early_stopping_patience < 0:
            raise ValueError(f"early_stopping_patience must not be negative, got {self.early_stopping_patience}.")
        if self.missing_answers not in MISSING_ANSWERS:
            raise ValueError(f"missing_answers must be one of {MISSING_ANSWERS}, got {self.missing_answers!r}.")


class EvaluateEveryFewEpochs(TrainerCallback):
    """Leaves out the evaluations that `eval_strategy="epoch"` asks for except every `epochs`-th and the last."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.eval_strategy == "epoch" and state.global_step < state.max_steps:
            control.should_evaluate &= round(state.epoch or 0) % self.epochs == 0


class MimicTrainer(Trainer):
    """A `Trainer` that evaluates by ranking each mention's answer among the whole knowledge base.

    Args:
        model ([`MimicModel`]): to be trained.
        args ([`MimicTrainingArguments`]): how; a plain `TrainingArguments` is taken as it is.
        entities: the knowledge base: a [`KnowledgeBase`], a `datasets.Dataset`, or a sequence of dicts.
        processing_class ([`MimicProcessor`]): saved with every checkpoint.
        train_dataset, eval_dataset: mentions, with the columns `id`, `mention`, `sentence`, `image` and `answer`.
        data_collator: a [`MentionEntityCollator`]; made from the above if absent.
        **kwargs: everything else that `Trainer` takes.

    Example:

    ```python
    >>> trainer = MimicTrainer(
    ...     model, args, entities=entities, processing_class=processor, train_dataset=train, eval_dataset=validation
    ... )
    >>> trainer.train()
    >>> trainer.evaluate()["eval_mrr"]
    ```
    """

    def __init__(
        self,
        model: MimicModel,
        args: TrainingArguments,
        *,
        entities: KnowledgeBase | datasets.Dataset | Sequence[Mapping[str, Any]],
        processing_class: MimicProcessor,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: MentionEntityCollator | None = None,
        **kwargs: Any,
    ) -> None:
        if data_collator is None:
            data_collator = MentionEntityCollator(processing_class, entities, seed=args.seed)
        self.run = TrainingRun(base_model=model.name_or_path or None)
        self.collator = data_collator
        self.knowledge_base = data_collator.knowledge_base
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=undecoded(train_dataset),
            eval_dataset=undecoded(eval_dataset),
            processing_class=processing_class,
            **kwargs,
        )
        if isinstance(args, MimicTrainingArguments):
            self.add_callback(EvaluateEveryFewEpochs(args.eval_epochs))
            if args.early_stopping_patience and args.eval_strategy != "no":
                self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Everything but the parameters with "bias" in their name, as published: layer norm weights decay too."""
        return [name for name, _ in model.named_parameters() if "bias" not in name]

    def build_index(self, output_dir: str | Path | None = None) -> EntityIndex:
        """The knowledge base encoded by the model as it is now; in memory, or in a directory that is emptied first."""
        if output_dir is not None:
            shutil.rmtree(output_dir, ignore_errors=True)
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        try:
            return EntityIndex.build(
                model,
                self.collator.processor,
                self.knowledge_base,
                output_dir,
                dtype=getattr(self.args, "index_dtype", "float32"),
                batch_size=self.args.eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
                show_progress=not self.args.disable_tqdm,
            )
        finally:
            model.train(was_training)

    def rank(self, mentions: Any, index: EntityIndex | None = None, top_k: int = 0) -> RankedMentions:
        """Ranks the answers of mentions among the whole knowledge base: see [`rank_mentions`].

        Args:
            mentions: as `eval_dataset`.
            index: the knowledge base encoded by the model as it is now; encoded for this call if absent.
            top_k: how many of the best entities to note for each mention.
        """
        scratch = None
        if index is None:
            if len(self.knowledge_base) > _ENTITIES_IN_MEMORY:
                # Not uploaded with the rest, for the underscore.
                scratch = Path(self.args.output_dir or ".") / "_evaluation_index"
            index = self.build_index(scratch)
        try:
            return rank_mentions(
                self.accelerator.unwrap_model(self.model),
                self.collator,
                index,
                mentions,
                top_k=top_k,
                batch_size=self.args.eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
                show_progress=not self.args.disable_tqdm,
            )
        finally:
            if scratch is not None:
                del index
                shutil.rmtree(scratch, ignore_errors=True)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        index: EntityIndex | None = None,
    ) -> dict[str, float]:
        """Ranks the answers of the evaluation's mentions among the whole knowledge base.

        Args:
            eval_dataset: mentions in place of the trainer's, or a dict of several.
            ignore_keys: not used.
            metric_key_prefix: goes before the names of the metrics.
            index: as in [`~MimicTrainer.rank`].

        Returns:
            `dict[str, float]`: `eval_mrr`, `eval_hits@1` and the others of [`RankedMentions.metrics`], and the time.
        """
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            several: dict[str, float] = {}
            for name, mentions in eval_dataset.items():
                several |= self.evaluate(mentions, ignore_keys, f"{metric_key_prefix}_{name}", index)
            return several
        if eval_dataset is None:
            raise ValueError("There is nothing to evaluate on: no `eval_dataset` was given.")

        def measure() -> dict[str, float]:
            start = time.time()
            ranked = self.rank(eval_dataset, index)
            metrics = ranked.metrics(getattr(self.args, "missing_answers", "exclude"))
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
            return metrics | speed_metrics(metric_key_prefix, start, num_samples=len(ranked.ids))

        metrics = self._on_main_process(measure)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the card of `self.run` into the output directory; `model_name` is its title."""
        if self.is_world_process_zero():
            self.run.has_index = (Path(self.args.output_dir or ".") / INDEX_FOLDER).is_dir()
            self.run.observe(self)
            self.run.write(self.args.output_dir or ".", kwargs.get("model_name"))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Uploads model, processor, code, card and results to the Hub, and the index, if the output directory has one
        in `index`, to a repository of its own, which the uploaded model names as its default.

        Args:
            commit_message, token, revision, private: as in `Trainer.push_to_hub`.
            blocking: not used; the upload is waited for.
            **kwargs: `model_name` is the card's title; the repository's id by default.

        Returns:
            The commit; `None` in all processes but the main one.
        """
        args = self.args
        token = token or args.hub_token
        if self.hub_model_id is None:
            if private is not None:
                args.hub_private_repo = private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        output_dir = Path(args.output_dir or ".")
        repo_id = str(self.hub_model_id)
        config = self.accelerator.unwrap_model(self.model).config
        local_index = config.default_index
        try:
            if (output_dir / INDEX_FOLDER).is_dir():
                index = EntityIndex.from_pretrained(output_dir / INDEX_FOLDER)
                config.default_index = f"{repo_id}-index"
                index.push_to_hub(
                    config.default_index,
                    token=token,
                    private=args.hub_private_repo if private is None else private,
                    model_id=repo_id,
                    source=self.run.dataset_id,
                )
                config.save_pretrained(output_dir)
            self.create_model_card(model_name=kwargs.get("model_name") or repo_id)
            return HfApi(token=token).upload_folder(
                repo_id=repo_id,
                folder_path=output_dir,
                commit_message=commit_message,
                ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*", f"{INDEX_FOLDER}/*", "training_args.bin"],
                revision=revision or args.hub_revision,
            )
        finally:
            # The checkpoint here goes on with the index beside it.
            if config.default_index != local_index:
                config.default_index = local_index
                config.save_pretrained(output_dir)

    def _on_main_process(self, function: Callable[[], Any]) -> Any:
        """The function's result, or its exception, in all processes; only the main one runs it."""
        if self.args.world_size <= 1:
            return function()
        outcome: list[Any] = [None]
        if self.is_world_process_zero():
            try:
                outcome = [function()]
            except Exception as error:
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]


__all__ = [
    "HITS_AT",
    "INDEX_FOLDER",
    "KnowledgeBase",
    "MentionEntityCollator",
    "MimicTrainer",
    "MimicTrainingArguments",
    "RankedMentions",
    "in_batch_metrics",
    "mel_ranking",
    "rank_mentions",
    "require_columns",
    "undecoded",
]

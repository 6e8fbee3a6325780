"""The `multimodal-entity-linking` pipeline."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Pipeline
from transformers.utils import logging

from .answers_mimic import calibrated_links, calibration_for, needs_calibration
from .calibration_mimic import Calibration, is_newer, proper_fraction
from .configuration_mimic import PIPELINE_TASK, MimicConfig, check_context_window
from .documents_mimic import NAMES, Item, NumberedItems, Reading, StreamedItems, detector_of, read_item
from .errors_mimic import EntityIndexError, MentionError
from .explain_mimic import Explainer
from .files_mimic import is_there, no_space_told
from .image_sources_mimic import ImagePlaces
from .index_card_mimic import hub_id
from .index_mimic import EntityIndex
from .items_mimic import Answer, Answers, answered
from .mentions_mimic import Mention, check_on_error, features_of, tokens_of
from .modeling_mimic import MimicModel
from .processing_mimic import MimicProcessor
from .records_mimic import placed_record, places_of, undecoded
from .rerank_mimic import Reranker, reranked
from .search_mimic import METHODS
from .searchable_mimic import BY_NAME

logger = logging.get_logger(__name__)

_BAR_FROM_ENTITIES = 500
# The arguments of a call.
_CALL = (
    *("top_k", "candidates", "method", "min_probability", "coverage", "context_window", "mention_detector"),
    *("reranker", "rerank_top_k", "on_error", "on_image_error"),
)


_COMPUTING = threading.RLock()
if hasattr(os, "register_at_fork"):  # a forked process has no thread that would give the lock back
    os.register_at_fork(after_in_child=lambda: _COMPUTING._at_fork_reinit())  # type: ignore[attr-defined]


class MultimodalEntityLinkingPipeline(Pipeline):
    """Tells which entities of a knowledge base a text speaks of, from the text and its image.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> linker = pipeline("multimodal-entity-linking", model=path, trust_remote_code=True, entities=knowledge_base)
    >>> linker({"mention": "Orange", "text": "Orange opened a shop on the corner.", "image": "photo.png"}, top_k=1)
    [{'entity_id': 'brand:orange', 'name': 'Orange', 'description': 'A company.', 'score': 7.1, ...}]
    >>> linker({"text": "Orange opened a shop on the corner.", "image": "photo.png"}, top_k=1)
    [{'mention': 'Orange', 'start': 0, 'end': 6, 'context_window': 'mention', 'entities': [...]}]
    ```

    A mention is a dict with `mention` and `text` (or `sentence`), and may have `start` and `end` (its place in the
    text), `image` (a path, a URL, a PIL image or the bytes of a file) and `candidates` (ids of the entities that it may
    mean). It gives a list of entities, best first. A document is the same without `mention`: its mentions are found, or
    given as `spans`, and it gives a list of dicts, one for each, with their `entities`. A list of mentions or documents
    gives a list of answers; a data set or generator gives them one after the other.

    Args:
        index ([`EntityIndex`] or `str`, *optional*): the knowledge base, encoded; or its directory or Hub repository.
            Defaults to the `default_index` of the model's configuration, which may name a folder of the checkpoint too.
        entities (*optional*): in place of `index`, a knowledge base that is encoded now: a `datasets.Dataset` or a list
            of dicts with `id`, `name`, `description`, `images` and perhaps `aliases`.
        index_kwargs (`dict`, *optional*): with `index`, arguments of [`EntityIndex.from_pretrained`] (`revision`,
            `token`, ...).
        build_kwargs (`dict`, *optional*): with `entities`, arguments of [`EntityIndex.build`] (`dtype`,
            `batch_size`, ...).
        allow_urls, image_root (*optional*): where images that are named by a string are read from, in `entities` and
            in a data set of mentions; see [`EntityIndex.build`]. Where they are given, they hold for mentions that a
            caller passes, too: a service for strangers says `allow_urls=False, image_root=False`.
        top_k (`int`, defaults to 5): number of entities for each mention. Also an argument of the call, as all that
            follow.
        min_probability (`float`, *optional*): of a calibrated model, only answers that are at least so probable.
        coverage (`float`, *optional*): of a calibrated model, in the place of the best `top_k` answers the smallest set
            that holds the right one of so many mentions, such as 0.95: see [`Calibration.threshold`].
        candidates (*optional*): what every mention of the call may mean: ids; "names" for the entities that bear its
            name, and all where there are none; "names+search" for these and what the search finds, `top_k` of each.
        method (`str`, defaults to "pruned"): or "exhaustive"; the entities found are the same.
        context_window (*optional*): "start" or "mention": which part of a long text is read. By default "mention" for
            documents, and what the configuration says for mentions.
        mention_detector (*optional*): what finds the mentions of a document: "names" of the knowledge base (the
            default), a token-classification pipeline, its directory or Hub id, or a callable that takes a text and
            gives pairs of start and end, or dicts with `start` and `end`.
        reranker (*optional*): a callable that takes a mention and its `rerank_top_k` best entities and gives a score
            for each, by which they are sorted; they then have `rerank_score` too, and no probability.
        rerank_top_k (`int`, defaults to 10): how many entities a re-ranker sees.
        on_error (`str`, defaults to "raise"): what follows from an item that cannot be linked. "raise" ends the call,
            after the answers of those before it, with an error that names its row and id; "warn" gives an empty list
            in its place; "return" a dict with `error`, the message, and `error_type`.
        on_image_error (`str`, defaults to "raise"): an image that cannot be read is such an error; with "warn" the item
            is linked without.

    Raises:
        EntityIndexError: if the index was made by another model.
        ValueError: if both `index` and `entities` are given, or an argument is not valid.
        MentionError: if a mention or document is not as described.
        MimicImageError: if an image cannot be read.
        UnknownEntityError: if a candidate is not in the index.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False
    _pipeline_calls_generate = False

    model: MimicModel
    processor: MimicProcessor
    _loaded_detector: tuple[str, Any] | None = None

    def __init__(
        self,
        *args: Any,
        index: EntityIndex | str | os.PathLike[str] | None = None,
        entities: Any = None,
        index_kwargs: Mapping[str, Any] | None = None,
        build_kwargs: Mapping[str, Any] | None = None,
        allow_urls: bool | str | None = None,
        image_root: bool | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        local_files_only = kwargs.pop("local_files_only", None)  # transformers' pipeline() hands it on
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError(
                "The pipeline needs the model's processor: pass processor=MimicProcessor.from_pretrained(...), or "
                "name the model by its directory or Hub id."
            )
        if index is not None and entities is not None:
            raise ValueError("Pass either `index` or `entities`, not both.")
        if entities is not None and index_kwargs:
            raise ValueError("`index_kwargs` are for opening an index; for building one of `entities`, `build_kwargs`.")
        if entities is None and build_kwargs:
            raise ValueError("`build_kwargs` are for building an index of `entities`; none are given.")
        index_kwargs = dict(index_kwargs or {})
        self._entities: Any = None  # whose images explanations show
        self._places: dict[str, Any] = {"allow_urls": allow_urls, "image_root": image_root}
        if entities is not None:
            count = len(entities) if hasattr(entities, "__len__") else _BAR_FROM_ENTITIES
            options = {"show_progress": count >= _BAR_FROM_ENTITIES, **self._places, **(build_kwargs or {})}
            index = EntityIndex.build(self.model, self.processor, entities, **options)
            if hasattr(entities, "__getitem__") and not hasattr(entities, "iloc"):
                self._entities = entities
        elif index is not None or self._config.default_index:
            if local_files_only is not None:
                index_kwargs.setdefault("local_files_only", local_files_only)
            if index is None:
                index = _default_index(self._config, index_kwargs)
            elif isinstance(index, str | os.PathLike):
                index = EntityIndex.from_pretrained(index, **index_kwargs)
        self._index: EntityIndex | None = None
        self._known_calibration: tuple[Any, Any, Calibration | None] | None = None
        if index is not None:
            self.index = index

    @property
    def _config(self) -> MimicConfig:
        return self.model.config  # type: ignore[return-value]

    @property
    def index(self) -> EntityIndex:
        """The knowledge base that mentions are linked to. Another may be set; it must be of the same model."""
        if self._index is None:
            raise EntityIndexError(
                "This pipeline has no knowledge base to link to. Pass `entities=` (a data set or list of dicts with "
                "id, name, description and images) or `index=` (an EntityIndex, its directory or Hub id) to pipeline()."
            )
        return self._index

    @index.setter
    def index(self, index: EntityIndex) -> None:
        if not hasattr(index, "check_model"):
            raise TypeError(f"`index` must be an EntityIndex, its directory or Hub id, got {type(index).__name__}.")
        index.check_model(self.model, self.processor)
        self._index = index

    @property
    def calibration(self) -> Calibration | None:
        """What answers' probabilities come from; `None` where the model was not calibrated. Warns once of a knowledge
        base that is not the one it was calibrated with."""
        block, index = self._config.calibration, self.index
        known = self._known_calibration
        if known is None or known[0] is not block or known[1] is not index:
            known = self._known_calibration = block, index, calibration_for(self._config, index)
        return known[2]

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        candidates: Sequence[str] | str | None = None,
        method: str | None = None,
        min_probability: float | None = None,
        coverage: float | None = None,
        context_window: str | None = None,
        mention_detector: Any = None,
        on_error: str | None = None,
        on_image_error: str | None = None,
        reranker: Any = None,
        rerank_top_k: int | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise TypeError(
                f"The pipeline {PIPELINE_TASK} has no parameter {', '.join(sorted(unknown))}; it takes "
                f"{', '.join(_CALL[:-1])} and {_CALL[-1]}."
            )
        if isinstance(candidates, str) and candidates not in BY_NAME:
            raise ValueError(
                f"`candidates` must be a list of entity ids, got the string {candidates!r}. (By name they are "
                f"{' or '.join(map(repr, BY_NAME))}.)"
            )
        # What is wrong with the call must not be taken for a fault of each of its mentions.
        for name, value in (("top_k", top_k), ("rerank_top_k", rerank_top_k)):
            if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__") or value < 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if reranker is not None and not callable(reranker):
            raise TypeError(
                "`reranker` must be a callable that takes a mention and its entities and gives a score for each, got "
                f"{type(reranker).__name__}."
            )
        if method is not None and method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
        self._check_probabilities(min_probability, coverage, top_k, reranker)
        if context_window is not None:
            check_context_window(f"The pipeline {PIPELINE_TASK}", context_window)
        if on_error is not None:
            check_on_error(on_error)
        if on_image_error not in (None, "raise", "warn"):
            raise ValueError(f'`on_image_error` must be "raise" or "warn", got {on_image_error!r}.')
        reading = {"on_image_error": on_image_error, "keep_source": None if reranker is None else True}
        forward: dict[str, Any] = {"top_k": top_k, "method": method, "candidates": candidates}
        forward |= {"reranker": reranker, "rerank_top_k": rerank_top_k}
        forward |= {"min_probability": min_probability, "coverage": coverage}
        answering = {
            "context_window": context_window,
            "on_error": on_error,
            "detector": None if mention_detector is None else self._detector(mention_detector),
        }
        return tuple(  # type: ignore[return-value]
            {name: value for name, value in parameters.items() if value is not None}
            for parameters in (reading, forward, answering)
        )

    def _detector(self, given: Any) -> Any:
        """What finds mentions; one that is named by a directory or Hub id is loaded once, not in every call."""
        if not isinstance(given, str | os.PathLike) or given == NAMES:
            return detector_of(given) or NAMES
        name, known = os.fspath(given), self._loaded_detector
        if known is None or known[0] != name:
            known = self._loaded_detector = name, detector_of(name)
        return known[1]

    def _check_probabilities(
        self, min_probability: Any, coverage: Any, top_k: int | None, reranker: Reranker | None
    ) -> None:
        """Makes sure that what was asked of probabilities can be done, whatever the mentions are."""
        if reranker is not None and (min_probability is not None or coverage is not None):
            raise ValueError(
                "`min_probability` and `coverage` are of the model's own answers: those of a `reranker` have no "
                "probabilities. Leave one of them out."
            )
        if min_probability is not None:
            proper_fraction("min_probability", min_probability)
        if coverage is not None:
            proper_fraction("coverage", coverage, ends=False)
            if top_k is not None:
                raise ValueError("`coverage` gives a set of the size that it takes: leave `top_k` out.")
        block: Any = self._config.calibration
        for name, value in (("min_probability", min_probability), ("coverage", coverage)):
            if value is not None and (block is None or is_newer(block)):
                raise needs_calibration(name, self._config)
        if coverage is not None:
            Calibration.from_dict(block).threshold(coverage)

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Links one mention or document, a list of them, or a data set: see the class.

        Args:
            inputs: one mention or document, or several.
            **kwargs: the arguments of the class from `top_k` on, and `batch_size` and `num_workers` as of any pipeline.
        """
        if hasattr(inputs, "iloc") and hasattr(inputs, "to_dict"):  # a DataFrame
            inputs = inputs.to_dict("records")
        places = places_of(inputs, "image", **self._places)
        if isinstance(inputs, Mapping):
            return super().__call__(placed_record(inputs, "image", places), **kwargs)
        if isinstance(inputs, list | tuple):
            inputs = [placed_record(mention, "image", places) for mention in inputs]
            return super().__call__(inputs, **kwargs) if inputs else []
        inputs = undecoded(inputs, "image")
        if hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__") and not isinstance(inputs, str | bytes):
            inputs = _Mentions(inputs, places)
        elif hasattr(inputs, "__iter__") and not isinstance(inputs, str | bytes):
            inputs = _Stream(placed_record(mention, "image", places) for mention in inputs)
        return super().__call__(inputs, **kwargs)

    def run_single(
        self,
        inputs: Any,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Any:
        item = self.preprocess(inputs, **preprocess_params)
        return next(self._answers([item], 1, forward_params, postprocess_params))

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterable[Any]:
        reading = Reading(self.processor, preprocess_params)
        sized = isinstance(inputs, Sized)
        items = NumberedItems(inputs, reading) if sized else StreamedItems(inputs, reading)
        if not sized and num_workers > 1:
            logger.warning("A generator cannot be read by several processes: `num_workers` is set to 1.")
            num_workers = 1
        # Workers are forked while the tokenizer's own threads must not run.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        loader: DataLoader[Any] = DataLoader(items, num_workers=num_workers, batch_size=None, collate_fn=_as_it_is)
        return Answers(
            lambda: self._answers(loader, batch_size, forward_params, postprocess_params),
            len(inputs) if sized else None,
        )

    def preprocess(self, input_: Any, **options: Any) -> Item:
        return read_item(input_, None, self.processor, **options)

    def _answers(
        self, items: Iterable[Item], batch_size: int, forward_params: dict[str, Any], answering: dict[str, Any]
    ) -> Iterator[Any]:
        self.index  # noqa: B018  without one, nothing can be linked

        def link(mentions: Sequence[Mention]) -> Any:
            inputs: dict[str, Any] = {**tokens_of(self.processor, mentions), "mentions": mentions}
            return self.forward(inputs, **forward_params)["found"]

        on_error = answering.get("on_error", "raise")
        return answered(items, lambda item: self._opened(item, answering), link, self.postprocess, batch_size, on_error)

    def _opened(self, item: Item, answering: dict[str, Any]) -> Answer:
        """An answer that waits for its mentions to be linked."""
        if item.error is not None:
            return Answer(item, error=item.error)
        # The start of a document says nothing of a mention at its end.
        usual = "mention" if item.is_document else str(self._config.context_window)
        window = answering.get("context_window", usual)
        spans = item.spans or []
        if item.is_document and item.spans is None:
            detector = answering.get("detector", NAMES)
            try:
                spans = self.index.find_mentions(item.text) if detector == NAMES else detector(item.text)
            except MentionError as error:
                return Answer(item, error=error)
        return Answer(item, item.mentions(spans, window))

    def forward(self, model_inputs: dict[str, Any], **forward_params: Any) -> Any:
        # Of calls in several threads one computes at a time, with all of the machine; together they would be slower.
        with _COMPUTING:
            return super().forward(model_inputs, **forward_params)

    def _forward(
        self,
        input_tensors: dict[str, Any],
        top_k: int = 5,
        method: str = "pruned",
        candidates: Sequence[str] | str | None = None,
        reranker: Reranker | None = None,
        rerank_top_k: int = 10,
        min_probability: float | None = None,
        coverage: float | None = None,
    ) -> dict[str, Any]:
        mentions: list[Mention] = input_tensors["mentions"]
        was_training = self.model.training
        if was_training:  # what dropout leaves out would be drawn at random
            self.model.eval()
        try:
            features = features_of(
                self.model,
                input_tensors["input_ids"],
                input_tensors["attention_mask"],
                [mention.image for mention in mentions],
            )
        finally:
            if was_training:
                self.model.train()
        allowed = [candidates if mention.candidates is None else mention.candidates for mention in mentions]
        names = [mention.mention for mention in mentions]
        if self.calibration is not None and reranker is None:
            found = calibrated_links(
                self.index,
                self.calibration,
                features,
                names,
                top_k,
                candidates=allowed,
                method=method,
                min_probability=min_probability,
                coverage=coverage,
            )
            return {"found": found}
        wanted = top_k if reranker is None else max(top_k, rerank_top_k)
        found = self.index.link_encoded(features, wanted, candidates=allowed, names=names, method=method)
        if reranker is not None:
            found = [
                reranked(reranker, mention, entities, rerank_top_k, top_k)
                for mention, entities in zip(mentions, found, strict=True)
            ]
        return {"found": found}

    def postprocess(self, model_outputs: Answer, on_error: str = "raise") -> Any:
        return model_outputs.result(on_error)

    def explain(
        self,
        mention: Mapping[str, Any],
        *,
        entity_id: str | None = None,
        versus: str | None = None,
        top_k: int = 1,
        images: Any = None,
        context_window: str | None = None,
    ) -> Any:
        """Why a mention is linked as it is: what each word, each patch of an image and each unit adds.

        Args:
            mention: one mention, as the pipeline takes it.
            entity_id: the entity to be explained; the best one by default.
            versus: the id of a rival. With it, what the entity has more than the rival is explained.
            top_k: how many of the best entities to explain, where `entity_id` does not name one.
            images: images of the entities, by id or as records: see [`EntityImages`]. By default those of the
                `entities` that the pipeline was made with.
            context_window: as of the call.

        Returns:
            an [`Explanation`], or a list of them where `top_k` is more than 1.

        Raises:
            MentionError, ValueError: if the mention is not as described.
            UnknownEntityError: if an entity is not in the index.
            MimicImageError: if an image cannot be read.
        """
        ids = [entity_id]
        if entity_id is None:
            options = {} if context_window is None else {"context_window": context_window}
            # One more than is wanted: the rival may be among them.
            found = self(mention, top_k=top_k + (versus is not None), **options)
            ids = [one["entity_id"] for one in found if one["entity_id"] not in (None, versus)][:top_k]
        explainer = Explainer(self.model, self.processor, self.index, self._entities if images is None else images)
        explained = [explainer.explain(mention, str(one), versus, context_window) for one in ids]
        return explained if top_k > 1 else explained[0]

    def save_pretrained(self, save_directory: str | os.PathLike[str], save_index: bool = False, **kwargs: Any) -> None:
        """Saves model and processor, so that the pipeline is loaded from there again.

        Args:
            save_directory: the directory.
            save_index: whether the index is saved in its folder `index`, and made the default.
            **kwargs: as of any pipeline.
        """
        with no_space_told(Path(save_directory)):
            if save_index:
                self.index.save_pretrained(Path(save_directory) / "index")
                self._config.default_index = "index"
                self._config.default_index_revision = None
            self.model.save_pretrained(save_directory, **kwargs)
            self.processor.save_pretrained(save_directory, **kwargs)


class _Mentions(Dataset[Any]):
    """A data set of any library, as torch's."""

    def __init__(self, records: Any, places: ImagePlaces) -> None:
        self.records = records
        self.places = places

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> Any:
        return placed_record(self.records[row], "image", self.places)


class _Stream(IterableDataset[Any]):
    """A generator as a data set of torch: transformers 5.10 would read all of a plain one before it begins."""

    def __init__(self, records: Iterator[Any]) -> None:
        self.records = records

    def __iter__(self) -> Iterator[Any]:
        return self.records


def _as_it_is(item: Any) -> Any:
    return item


def _default_index(config: MimicConfig, index_kwargs: dict[str, Any]) -> EntityIndex:
    """The index that a checkpoint names: in a folder of its own, or a repository of the Hub.

    A configuration is input from outside: nothing else on this machine is opened.
    """
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
            return EntityIndex.from_pretrained(Path(checkpoint, name), **index_kwargs)
        if of_repository:
            return EntityIndex.from_hub(checkpoint, **{"repo_type": "model", "subfolder": name, **index_kwargs})
        return EntityIndex.from_hub(name, **{"revision": revision, **index_kwargs})
    except (EntityIndexError, OSError) as error:  # without a network, or none of that name
        raise EntityIndexError(
            f"{error} The checkpoint {checkpoint!r} names {name!r} as its default index; to use another knowledge "
            "base, pass `index=` or `entities=`."
        ) from error


__all__ = ["MultimodalEntityLinkingPipeline"]

"""The `multimodal-entity-linking` pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Pipeline
from transformers.utils import logging

from .answers_mimic import answers_of, calibration_for
from .calibration_mimic import Calibration
from .calls_mimic import checked_call
from .configuration_mimic import MimicConfig
from .default_index_mimic import index_of_entities, opened_index
from .documents_mimic import NAMES, Item, NumberedItems, Reading, StreamedItems, detector_of, read_item
from .errors_mimic import EntityIndexError, MentionError
from .explain_mimic import Explainer
from .image_sources_mimic import ImagePlaces
from .index_mimic import EntityIndex
from .items_mimic import Answer, Answers, answered
from .mentions_mimic import Mention, checked_record, features_of, mention_parts, tokens_of
from .modeling_mimic import MimicModel, weight_files
from .processing_mimic import MimicProcessor
from .records_mimic import placed_record, places_of, plain_record, records_of_table, undecoded
from .saving_mimic import directory_of, save_whole
from .snapshot_mimic import at_least
from .turns_mimic import COMPUTING

logger = logging.get_logger(__name__)


class MultimodalEntityLinkingPipeline(Pipeline):
    """Links the mentions of a text, with an image, to the entities of a knowledge base.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> linker = pipeline("multimodal-entity-linking", model=path, trust_remote_code=True, entities=knowledge_base)
    >>> linker({"mention": "Orange", "text": "Orange opened a shop on the corner.", "image": "photo.png"}, top_k=1)
    [{'entity_id': 'brand:orange', 'name': 'Orange', 'description': 'A company.', 'score': 7.1, ...}]
    >>> linker({"text": "Orange opened a shop on the corner.", "image": "photo.png"}, top_k=1)
    [{'mention': 'Orange', 'start': 0, 'end': 6, 'context_window': 'mention', 'entities': [...]}]
    ```

    A mention is a dict with `mention` and `text` (or `sentence`). It may have `start` and `end` (its place in the
    text), `image` (a path, a URL, a PIL image or the bytes of a file) and `candidates` (ids of the entities that it
    may mean). It gives a list of entities, best first. A document is the same without `mention`. Its mentions are
    found, or given as `spans`, and it gives a list with a dict for each mention, which has its `entities`. A string is
    a document without an image. A list of mentions or documents gives a list of results; a data set or generator gives
    the results one after the other.

    Args:
        index ([`EntityIndex`] or `str`, *optional*): the encoded knowledge base, or its directory or Hub repository.
            Defaults to the `default_index` of the configuration, which may also name a folder of the checkpoint.
        entities (*optional*): in place of `index`, a knowledge base to encode now: a `datasets.Dataset` or a list of
            dicts with `id`, `name`, `description`, `images` and perhaps `aliases`.
        index_kwargs (`dict`, *optional*): with `index`, arguments of [`EntityIndex.from_pretrained`] (`revision`,
            `token`, ...).
        build_kwargs (`dict`, *optional*): with `entities`, arguments of [`EntityIndex.build`] (`dtype`,
            `batch_size`, ...).
        allow_urls, image_root (*optional*): which places images may be read from that `entities`, or a data set of
            mentions, name by a string; see [`EntityIndex.build`]. If given, they also hold for mentions that a caller
            passes: a service for strangers passes `allow_urls=False, image_root=False`.
        top_k (`int`, defaults to 5): number of entities for each mention. This argument and all that follow are also
            arguments of the call.
        min_probability (`float`, *optional*): give only answers that are at least this probable; needs a calibrated
            model.
        coverage (`float`, *optional*): in place of the best `top_k` answers, give the smallest set that holds the right
            one for this share of mentions, such as 0.95; needs a calibrated model. See [`Calibration.threshold`].
        candidates (*optional*): what every mention of the call may mean: a list of ids; "names" for the entities that
            have its name, or all if there are none; "names+search" for these and those that the search finds, `top_k`
            of each.
        method (`str`, defaults to "pruned"): or "exhaustive"; the entities found are the same.
        context_window (*optional*): "start" or "mention": which part of a long text is read. By default "mention" for
            documents, and what the configuration says for mentions.
        mention_detector (*optional*): what finds the mentions of a document: "names" of the knowledge base (the
            default), a token-classification pipeline, its directory or Hub id, or a callable that takes a text and
            returns pairs of start and end, or dicts with `start` and `end`.
        reranker (*optional*): a callable that takes a mention and its `rerank_top_k` best entities and returns a score
            for each. They are sorted by it, and then have a `rerank_score` and no probability.
        rerank_top_k (`int`, defaults to 10): how many entities a re-ranker sees.
        on_error (`str`, defaults to "raise"): what to do with an item that cannot be linked. "raise" ends the call with
            an error that names its row and id, after the results of the items before it; "warn" gives an empty list;
            "return" gives a dict with `error` (the message) and `error_type`.
        on_image_error (`str`, defaults to "raise"): an image that cannot be read is such an error; with "warn", the
            item is linked without it.

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
        self._entities: Any = None  # whose images explanations show
        self._places: dict[str, Any] = {"allow_urls": allow_urls, "image_root": image_root}
        if entities is not None:
            index = index_of_entities(self.model, self.processor, entities, {**self._places, **(build_kwargs or {})})
            if hasattr(entities, "__getitem__") and not hasattr(entities, "iloc"):
                self._entities = entities
        else:
            local = {} if local_files_only is None else {"local_files_only": local_files_only}
            index = opened_index(self._config, index, {**local, **(index_kwargs or {})})
        self._index: EntityIndex | None = None
        self._known_calibration: tuple[Any, Any, int, Calibration | None] | None = None
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
        known, size = self._known_calibration, len(index)  # which changes where entities are added
        if known is None or known[0] is not block or known[1] is not index or known[2] != size:
            known = self._known_calibration = block, index, size, calibration_for(self._config, index)
        return known[3]

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        reading, linking, answering = checked_call(self._config, **parameters)
        if "detector" in answering:
            answering["detector"] = self._detector(answering["detector"])
        return reading, linking, answering

    def _detector(self, given: Any) -> Any:
        """What finds mentions; one that is named by a directory or Hub id is loaded once, not in every call."""
        if not isinstance(given, str | os.PathLike) or given == NAMES:
            return detector_of(given) or NAMES
        name, known = os.fspath(given), self._loaded_detector
        if known is None or known[0] != name:
            known = self._loaded_detector = name, detector_of(name)
        return known[1]

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Links one mention or document, a list of them, or a data set: see the class.

        Args:
            inputs: one mention or document, or several.
            **kwargs: the arguments of the class from `top_k` on, and `batch_size` and `num_workers` as of any pipeline.
        """
        places = places_of(inputs, "image", **self._places)
        inputs = plain_record(records_of_table(inputs))
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
        with COMPUTING.turn(self.model):
            return super().forward(model_inputs, **forward_params)

    def _forward(
        self,
        input_tensors: dict[str, Any],
        **options: Any,
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
        return {"found": answers_of(self.index, self.calibration, features, mentions, **options)}

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
            entity_id: the entity to be explained; by default the best one, where the mention is thought to be of none,
                too.
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
        mention_parts(checked_record(mention))  # a document is refused
        top_k = at_least("top_k", top_k, 1)
        ids = [entity_id]
        if entity_id is None:
            options = {} if context_window is None else {"context_window": context_window}
            # More than are wanted: "not in the knowledge base" and the rival may be among them.
            found = self(mention, top_k=top_k + (self.calibration is not None) + (versus is not None), **options)
            ids = [one["entity_id"] for one in found if one["entity_id"] not in (None, versus)][:top_k]
            if not ids:
                raise ValueError(
                    f"There is no entity to explain but the rival, {versus!r}: give another `versus`, or none."
                )
        explainer = Explainer(self.model, self.processor, self.index, self._entities if images is None else images)
        explained = [explainer.explain(mention, str(one), versus, context_window) for one in ids]
        return explained if top_k > 1 else explained[0]

    def save_pretrained(self, save_directory: str | os.PathLike[str], save_index: bool = False, **kwargs: Any) -> None:
        """Saves model and processor, so that the pipeline is loaded from there again.

        Args:
            save_directory: the directory.
            save_index: whether the index is saved in its folder `index`, and made the default.
            **kwargs: as of any pipeline.

        Raises:
            SaveError: if the directory cannot be written, such as on a full disk. What was there is then as it was.
            EntityIndexError: the same of the index, or if it has no entities.
        """
        directory = directory_of(save_directory, "`save_directory`")
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", directory.resolve().name)
        config = self._config
        named = config.default_index, config.default_index_revision

        def save(place: str) -> None:
            self.model.save_pretrained(place, **kwargs)
            self.processor.save_pretrained(place, **kwargs)
            if save_index:  # when there was room for all else
                self.index.save_pretrained(directory / "index")

        if save_index:
            config.default_index, config.default_index_revision = "index", None
        try:
            save_whole(directory, save, weight_files(kwargs.get("variant")))
        except BaseException:
            config.default_index, config.default_index_revision = named
            raise


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


__all__ = ["MultimodalEntityLinkingPipeline"]

"""The `multimodal-entity-linking` pipeline."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import Pipeline

from .configuration_mimic import PIPELINE_TASK, MimicConfig
from .errors_mimic import EntityIndexError
from .image_sources_mimic import ImagePlaces
from .index_mimic import EntityIndex
from .mentions_mimic import mention_parts
from .modeling_mimic import MimicModel
from .processing_mimic import MimicProcessor
from .records_mimic import placed_record, places_of, undecoded

_BAR_FROM_ENTITIES = 500


class MultimodalEntityLinkingPipeline(Pipeline):
    """Tells which entity of a knowledge base a mention means, from its sentence and its image.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> linker = pipeline("multimodal-entity-linking", model=path, trust_remote_code=True, entities=knowledge_base)
    >>> linker({"mention": "Orange", "text": "Orange opened a shop on the corner.", "image": "photo.png"}, top_k=1)
    [{'entity_id': 'brand:orange', 'name': 'Orange', 'description': 'A company.', 'score': 7.1, ...}]
    ```

    A mention is a dict with `mention` and `text` (or `sentence`), and may have `image` (a path, a URL, a PIL image or
    the bytes of a file) and `candidates` (ids of the entities that it may mean). One dict gives a list of entities,
    best first; a list of dicts gives a list of such lists; a data set or generator gives them one after the other.

    Args:
        index ([`EntityIndex`] or `str`, *optional*): the knowledge base, encoded; or its directory or Hub repository.
            Defaults to the `default_index` of the model's configuration, which may name a folder of the checkpoint too.
        entities (*optional*): in place of `index`, a knowledge base that is encoded now: a `datasets.Dataset` or a list
            of dicts with `id`, `name`, `description` and `images`.
        index_kwargs (`dict`, *optional*): with `index`, arguments of [`EntityIndex.from_pretrained`] (`revision`,
            `token`, ...).
        build_kwargs (`dict`, *optional*): with `entities`, arguments of [`EntityIndex.build`] (`dtype`,
            `batch_size`, ...).
        allow_urls, image_root (*optional*): where images that are named by a string are read from, in `entities` and
            in a data set of mentions; see [`EntityIndex.build`]. What a caller gives as a dict is read from anywhere.
        top_k (`int`, defaults to 5): number of entities for each mention. Also an argument of the call.
        candidates (`list[str]`, *optional*): ids that every mention of the call may mean.

    Raises:
        EntityIndexError: if the index was made by another model.
        ValueError: if both `index` and `entities` are given, or a mention is not as described.
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
        self._places: dict[str, Any] = {"allow_urls": allow_urls, "image_root": image_root}
        if entities is not None:
            count = len(entities) if hasattr(entities, "__len__") else _BAR_FROM_ENTITIES
            options = {"show_progress": count >= _BAR_FROM_ENTITIES, **self._places, **(build_kwargs or {})}
            index = EntityIndex.build(self.model, self.processor, entities, **options)
        elif index is not None or self._config.default_index:
            if local_files_only is not None:
                index_kwargs.setdefault("local_files_only", local_files_only)
            if index is None:
                index = _default_index(self._config, index_kwargs)
            elif isinstance(index, str | os.PathLike):
                index = EntityIndex.from_pretrained(index, **index_kwargs)
        self._index: EntityIndex | None = None
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

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        candidates: Sequence[str] | None = None,
        method: str | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise TypeError(
                f"The pipeline {PIPELINE_TASK} has no parameter {', '.join(sorted(unknown))}; it takes top_k, "
                "candidates and method."
            )
        if isinstance(candidates, str):
            raise ValueError(f"`candidates` must be a list of entity ids, got the string {candidates!r}.")
        forward = {"top_k": top_k, "method": method}
        preprocess = {"candidates": candidates}
        return (
            {name: value for name, value in preprocess.items() if value is not None},
            {name: value for name, value in forward.items() if value is not None},
            {},
        )

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Links one mention, a list of mentions, or a data set of them: see the class.

        Args:
            inputs: one mention or several.
            **kwargs: `top_k`, `candidates`, `method` ("pruned" or "exhaustive"), and `batch_size` and `num_workers`
                as of any pipeline.
        """
        if isinstance(inputs, Mapping):
            return super().__call__(inputs, **kwargs)
        if isinstance(inputs, list | tuple):
            return super().__call__(list(inputs), **kwargs) if inputs else []
        places = places_of(inputs, "image", **self._places)
        inputs = undecoded(inputs, "image")
        if hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__") and not isinstance(inputs, str | bytes):
            inputs = _Mentions(inputs, places)
        elif hasattr(inputs, "__iter__") and not isinstance(inputs, str | bytes | Generator):
            inputs = (placed_record(mention, "image", places) for mention in inputs)
        return super().__call__(inputs, **kwargs)

    def preprocess(self, input_: Mapping[str, Any], candidates: Sequence[str] | None = None) -> dict[str, Any]:
        mention, text, image = mention_parts(input_)
        own = input_.get("candidates")
        if isinstance(own, str):
            raise ValueError(f"`candidates` of a mention must be a list of entity ids, got the string {own!r}.")
        inputs = dict(self.processor.process_mentions([mention], [text], [image]))
        inputs["candidates"] = _Candidates(candidates if own is None else own)
        return inputs

    def _forward(self, input_tensors: dict[str, Any], top_k: int = 5, method: str = "pruned") -> dict[str, Any]:
        given = input_tensors.pop("candidates")
        candidates = [item.ids for item in (given if isinstance(given, list) else [given])]
        index = self.index
        was_training = self.model.training
        if was_training:  # what dropout leaves out would be drawn at random
            self.model.eval()
        try:
            mentions = self.model.encode_mentions(**input_tensors)
        finally:
            if was_training:
                self.model.train()
        linked = index.link_encoded(mentions, top_k, candidates=candidates, method=method)
        return {"found": [_Found(entities) for entities in linked]}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        found = model_outputs["found"]
        return (found[0] if isinstance(found, list) else found).entities

    def save_pretrained(self, save_directory: str | os.PathLike[str], save_index: bool = False, **kwargs: Any) -> None:
        """Saves model and processor, so that the pipeline is loaded from there again.

        Args:
            save_directory: the directory.
            save_index: whether the index is saved in its folder `index`, and made the default.
            **kwargs: as of any pipeline.
        """
        if save_index:
            self.index.save_pretrained(Path(save_directory) / "index")
            self._config.default_index = "index"
            self._config.default_index_revision = None
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


class _Candidates:
    """A mention's candidates; batching must not take their list apart."""

    def __init__(self, ids: Sequence[str] | None) -> None:
        self.ids = ids


class _Found:
    """The entities found for one mention; unbatching must not take their list apart."""

    def __init__(self, entities: list[dict[str, Any]]) -> None:
        self.entities = entities


class _Mentions(Dataset[Any]):
    """A data set of any library, as torch's."""

    def __init__(self, records: Any, places: ImagePlaces) -> None:
        self.records = records
        self.places = places

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> Any:
        return placed_record(self.records[row], "image", self.places)


def _default_index(config: MimicConfig, index_kwargs: dict[str, Any]) -> EntityIndex:
    """The index that a checkpoint names: in a folder of its own, or else a directory or repository elsewhere."""
    name, checkpoint = str(config.default_index), str(config.name_or_path or "")
    place, options = name, index_kwargs
    # A configuration is input from outside: it may name a folder of its checkpoint, not any on this machine.
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise EntityIndexError(
            f"The checkpoint {checkpoint!r} names {name!r} as its default index, a place that is not in the checkpoint "
            "and no Hub repository. If you want that index, or another, pass `index=` or `entities=`."
        )
    if checkpoint and Path(checkpoint, name).is_dir():
        place = os.path.join(checkpoint, name)
    elif "/" not in name and checkpoint and not Path(checkpoint).exists():
        place, options = checkpoint, {"repo_type": "model", "subfolder": name, **index_kwargs}
    elif config.default_index_revision and not Path(name).is_dir():
        options = {"revision": config.default_index_revision, **index_kwargs}
    try:
        return EntityIndex.from_pretrained(place, **options)
    except (EntityIndexError, OSError) as error:  # without a network, or none of that name
        raise EntityIndexError(
            f"{error} The checkpoint {checkpoint!r} names {name!r} as its default index; to use another knowledge "
            "base, pass `index=` or `entities=`."
        ) from error


__all__ = ["MultimodalEntityLinkingPipeline"]

"""What the page does, without its layout: links, explanations, and entities that a visitor adds. Knows no Gradio."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from transformers import pipeline

from mimic_el.configuration_mimic import PIPELINE_TASK
from mimic_el.errors_mimic import MimicError, MimicImageError
from mimic_el.explain_mimic import EntityImages, Explainer
from mimic_el.explanation_mimic import Explanation
from mimic_el.images_mimic import load_image
from mimic_el.index_mimic import EntityIndex

MAX_TEXT = 20_000
MAX_IMAGE_BYTES = 10 * 2**20
MAX_OWN_ENTITIES = 50
MAX_NAME, MAX_DESCRIPTION = 200, 2_000


class PageError(MimicError, ValueError):
    """What a visitor asked cannot be done, with why."""


@dataclass(frozen=True)
class Settings:
    """What a page shows; read from a YAML file, or given on the command line.

    Args:
        model: a MIMIC checkpoint, a directory or a Hub id.
        index: its index, likewise; the one that the model names by default.
        entities: a data set with the columns `id` and `images`, for the entities' images: a directory or a Hub id.
        title, description: what heads the page.
        examples: lists of a text, an image's path as seen from the file (or nothing), and a mention (or nothing).
        allow_urls: whether an image may be given as an address, which the server then downloads.
    """

    model: str
    index: str | None = None
    entities: str | None = None
    title: str = "Multimodal entity linking"
    description: str = "Which entity of the knowledge base does each mention mean? The text and the image decide."
    examples: tuple[tuple[str, str | None, str | None], ...] = ()
    allow_urls: bool = False

    @classmethod
    def read(cls, path: str | Path, **changes: Any) -> Settings:
        """The settings of a file, with changes where they are not `None`.

        Raises:
            PageError: if the file is not as described.
        """
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise PageError(f"The page's settings {path} cannot be read: {error}") from error
        names = set(cls.__dataclass_fields__)
        if not isinstance(values, dict) or not set(values) <= names:
            unknown = sorted(set(values) - names) if isinstance(values, dict) else [type(values).__name__]
            raise PageError(f"{path}: unknown settings {unknown}; there are {', '.join(sorted(names))}.")
        values |= {name: value for name, value in changes.items() if value is not None}
        if not values.get("model"):
            raise PageError(f"{path} names no model: set `model` to a MIMIC checkpoint, a directory or a Hub id.")
        examples = []
        for example in values.get("examples") or ():
            if not isinstance(example, list | tuple) or not 1 <= len(example) <= 3:
                raise PageError(f"{path}: an example is a list of a text, an image and a mention; got {example!r}.")
            text, image, mention = (*example, None, None)[:3]
            examples.append((str(text), str(path.parent / image) if image else None, mention or None))
        return cls(**{**values, "examples": tuple(examples)})


def _written(what: str, value: Any) -> str:
    """What a visitor wrote, or nothing; a program may send anything."""
    if not isinstance(value, str | None):
        raise PageError(f"`{what}` is a text, got {type(value).__name__}.")
    return value or ""


class OwnEntities:
    """Entities that a visitor added: an index of their own, beside the shared one. It never changes."""

    def __init__(self, records: Sequence[Mapping[str, Any]] = (), index: EntityIndex | None = None) -> None:
        self.records, self.index = list(records), index

    def __contains__(self, entity_id: str) -> bool:
        return self.index is not None and entity_id in self.index


class Linking:
    """Links and explains for a page.

    Args:
        linker: the pipeline.
        images: images of the index's entities: what [`Explainer`] takes.
        allow_urls: whether images may be given as addresses.
    """

    def __init__(self, linker: Any, images: Any = None, allow_urls: bool = False) -> None:
        self.linker, self.allow_urls = linker, allow_urls
        self.images = EntityImages(images)
        # One model, many visitors: torch uses all cores for one of them already.
        self._turn = threading.Lock()

    @classmethod
    def of(cls, settings: Settings) -> Linking:
        """Opens what the settings name."""
        import mimic_el.registration  # noqa: F401 - so that the package's own code is used, not the checkpoint's
        from mimic_el.modeling_mimic import MimicModel
        from mimic_el.processing_mimic import MimicProcessor

        model = MimicModel.from_pretrained(settings.model)
        processor = MimicProcessor.from_pretrained(settings.model)
        load: Any = pipeline
        linker = load(PIPELINE_TASK, model=model, processor=processor, index=settings.index)
        return cls(linker, _entity_records(settings.entities), settings.allow_urls)

    @property
    def index(self) -> EntityIndex:
        return self.linker.index

    def link(
        self,
        text: str,
        image: Any = None,
        mention: str | None = None,
        top_k: float = 5,
        own: OwnEntities | None = None,
    ) -> list[dict[str, Any]]:
        """The mentions of a text, each with its entities: `mention`, `start`, `end` and `entities`.

        Args:
            text: at most `MAX_TEXT` characters.
            image: as [`load_image`] takes it.
            mention: the words to be linked; without it, the names of the knowledge base in the text.
            top_k: entities of each mention, 1 to 20.
            own: what the visitor added.

        Raises:
            PageError: if something of it is missing or too large.
            MimicImageError: if the image cannot be read.
        """
        text, mention = _written("text", text).strip("\n"), _written("mention", mention).strip()
        if not text.strip():
            raise PageError("Write a text first.")
        if len(text) > MAX_TEXT:
            raise PageError(f"The text has {len(text):,} characters; at most {MAX_TEXT:,} are read here.")
        if not isinstance(top_k, int | float) or not 1 <= top_k <= 20:
            raise PageError(f"Between 1 and 20 entities can be shown, not {str(top_k)[:80]}.")
        document: dict[str, Any] = {"text": text, "image": image}
        if mention:
            start = text.find(mention)
            if start < 0:
                raise PageError(f"“{mention}” does not occur in the text. Write it as it stands there.")
            document["spans"] = [[start, start + len(mention)]]
        with self._turn:
            linked = self.linker(document, top_k=int(top_k))
            if own is not None and own.index is not None:
                linked = [self._with_own(document, one, own, int(top_k)) for one in linked]
        if not linked:
            raise PageError("No name of the knowledge base occurs in this text. Name the mention to be linked.")
        return linked

    def _with_own(
        self, document: Mapping[str, Any], linked: dict[str, Any], own: OwnEntities, top_k: int
    ) -> dict[str, Any]:
        """A mention's entities with the visitor's own among them: scores of one model can be compared."""
        one = {**document, "mention": linked["mention"], "start": linked["start"], "end": linked["end"]}
        one.pop("spans", None)
        ours = own.index.link(self.linker.model, self.linker.processor, [one], top_k)[0]  # type: ignore[union-attr]
        both = [*(found for found in linked["entities"] if found["score"] is not None), *ours]
        # Probabilities were for the knowledge base without these.
        both = [{name: value for name, value in found.items() if name != "probability"} for found in both]
        return {**linked, "entities": sorted(both, key=lambda found: -found["score"])[:top_k]}

    def explain(
        self,
        text: str,
        image: Any,
        start: int,
        end: int,
        entity_id: str,
        versus: str | None = None,
        own: OwnEntities | None = None,
    ) -> Explanation:
        """Why the mention at a place of the text got an entity: see [`Explainer.explain`]."""
        if not all(isinstance(place, int) for place in (start, end)):
            raise PageError("`start` and `end` are the places of a mention in the text: integers.")
        text, entity_id = _written("text", text), _written("entity_id", entity_id)
        versus = _written("versus", versus) or None
        if len(text) > MAX_TEXT:
            raise PageError(f"The text has {len(text):,} characters; at most {MAX_TEXT:,} are read here.")
        index: Any = self.index if own is None or own.index is None else _Both(self.index, own)
        images = self.images if own is None else _BothImages(self.images, own)
        mention = {"mention": text[start:end], "text": text, "image": image, "start": start, "end": end}
        with self._turn:
            explainer = Explainer(self.linker.model, self.linker.processor, index, images)
            return explainer.explain(mention, entity_id, versus)

    def with_entity(self, own: OwnEntities, name: str, description: str, image: Any) -> tuple[OwnEntities, str]:
        """The visitor's entities with one more, and its id.

        Raises:
            PageError: if it has no name, something of it is too long, or there are too many.
            MimicImageError: if the image cannot be read.
        """
        name, description = _written("name", name).strip(), _written("description", description).strip()
        if not name:
            raise PageError("The entity needs a name.")
        if len(name) > MAX_NAME or len(description) > MAX_DESCRIPTION:
            raise PageError(f"A name has at most {MAX_NAME} characters here, a description {MAX_DESCRIPTION:,}.")
        if len(own.records) >= MAX_OWN_ENTITIES:
            raise PageError(f"At most {MAX_OWN_ENTITIES} entities can be added here.")
        entity_id = f"own:{len(own.records) + 1}"
        image = load_image(image)
        record = {"id": entity_id, "name": name, "description": description, "images": [image] if image else []}
        with self._turn:
            added = EntityIndex.build(
                self.linker.model, self.linker.processor, [record], dtype="float32", show_progress=False
            )
            records = [*own.records, record]
            if own.index is None:
                return OwnEntities(records, added), entity_id
            features = type(added.features([entity_id])).cat(
                [own.index.features([one["id"] for one in own.records]), added.features([entity_id])]
            )
            plain = [{key: value for key, value in one.items() if key != "images"} for one in records]
            return OwnEntities(records, EntityIndex.from_features(features, plain, self.linker.model)), entity_id

    def thumbnail(self, entity_id: str, own: OwnEntities | None, side: int = 96) -> Image.Image | None:
        """A small image of an entity; `None` where there is none at hand."""
        images = self.images if own is None else _BothImages(self.images, own)
        try:
            image = images.get(entity_id)
        except MimicImageError:
            return None
        if image is None:
            return None
        image = image.copy()
        image.thumbnail((side, side))
        return image


class _Both:
    """The shared index and a visitor's own, for an explanation."""

    def __init__(self, shared: EntityIndex, own: OwnEntities) -> None:
        self._shared, self._own = shared, own

    def _of(self, entity_id: str) -> EntityIndex:
        return self._own.index if entity_id in self._own else self._shared  # type: ignore[return-value]

    def entity(self, entity_id: str) -> dict[str, Any]:
        return self._of(entity_id).entity(entity_id)

    def features(self, entity_ids: Sequence[str]) -> Any:
        return self._of(entity_ids[0]).features(entity_ids)


class _BothImages:
    """Images of the shared index's entities and of a visitor's own."""

    def __init__(self, shared: Any, own: OwnEntities) -> None:
        self._shared = shared
        self._own = {record["id"]: record["images"] for record in own.records}

    def get(self, entity_id: str) -> Image.Image | None:
        if entity_id in self._own:
            return next(iter(self._own[entity_id]), None)
        return self._shared.get(entity_id)


def image_of_request(value: str | None, allow_urls: bool) -> Image.Image | None:
    """An image that came with a request, as base64, as a data URI, or, where that is allowed, as an address.

    Never a path: a request must not read the server's files.

    Raises:
        PageError: if it is not a string, or too large.
        MimicImageError: if it is none of these, or no image.
    """
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise PageError(f"An image is a string of base64 or a data URI, not {type(value).__name__}.")
    if len(value) > MAX_IMAGE_BYTES * 4 // 3 + 1024:
        raise PageError(f"The image is larger than the {MAX_IMAGE_BYTES // 2**20} MB that are taken here.")
    return load_image(value, allow_urls=allow_urls, image_root=False)


def _entity_records(name: str | None) -> Any:
    """The records of a data set of entities, images undecoded, as a directory or the Hub has them."""
    if name is None:
        return None
    import datasets

    try:
        return datasets.load_dataset(name, "entities", split="kb")
    except (ValueError, OSError) as error:
        raise PageError(
            f"The entities' images cannot be had: the data set {name!r} cannot be loaded: {error}"
        ) from error


__all__ = ["Linking", "OwnEntities", "PageError", "Settings", "image_of_request"]

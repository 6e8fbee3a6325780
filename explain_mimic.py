"""Explains links: for a mention and ids of entities, what each word and each patch of an image adds.

It reads the mention and the entities again, gives them to attribution_mimic, and maps the result to words and images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attribution_mimic import POINTS, Attribution, Contributions, Encoded, adjusted
from .explanation_mimic import ExplainedSide, Explanation, UnitContribution, WordContribution
from .features_mimic import PairScores
from .images_mimic import first_image, load_image
from .index_mimic import EntityIndex
from .matching_mimic import UNITS
from .mentions_mimic import mention_parts, mention_place
from .modeling_mimic import MimicModel
from .processing_mimic import MimicProcessor
from .records_mimic import entity_id_of, is_absent, placed_record, places_of, undecoded

# Features that an image has a part in. What an index rounds changes them by a hundredth, another image by much more.
_OF_THE_IMAGE = ("image_", "cross_modal")
_SAME_IMAGE = 0.1


class Explainer:
    """Explains the links of one model and index.

    Args:
        model, processor, index: as of the pipeline.
        images: images of entities, which an index does not hold: a mapping of ids, or records with `id` and `images`
            (a list of dicts, a data set). Where an entity's image is not at hand, what it adds is not divided.
        points: as of [`Attribution`]: more are more faithful, and take longer.
    """

    def __init__(
        self, model: MimicModel, processor: MimicProcessor, index: EntityIndex, images: Any = None, points: int = POINTS
    ) -> None:
        self._model, self._processor, self._index = model, processor, index
        self._images = images if isinstance(images, EntityImages) else EntityImages(images)
        self._attribution = Attribution(model, processor.process_mentions([""], [""], [None]), points)

    def explain(
        self,
        mention: Mapping[str, Any],
        entity_id: str,
        versus: str | None = None,
        context_window: str | None = None,
    ) -> Explanation:
        """Why an entity has the score that it has, or, with a rival, what it has more than that.

        Args:
            mention: as the pipeline takes one, with `start` and `end` where they are known.
            entity_id, versus: the entity, and the rival.
            context_window: which part of a long text is read: see [`MimicConfig`]. The processor's own by default.

        Raises:
            ValueError: if the mention is not as the pipeline takes it, or entity and rival are the same.
            UnknownEntityError: if an entity is not in the index.
            MimicImageError: if an image cannot be read.
        """
        if versus == entity_id:
            raise ValueError(f"`versus` is the entity itself ({entity_id!r}); name another one.")
        ids = [entity_id] if versus is None else [entity_id, versus]
        head, body, source = mention_parts(mention)
        image = load_image(source)
        start, end = mention_place(mention, head, body)
        (filled,) = self._processor.mention_texts([head], [body], [start], [end], context_window)
        inputs = {**self._processor.tokenize([filled]), "pixel_values": self._processor.pixels([image])}
        read = self._attribution.encode(inputs)
        pairs = [_Pair(self, read, one) for one in ids]
        best = pairs[0]
        of_mention, of_entity = best.contributions
        rival_side = None
        if versus is not None:
            of_rival = pairs[1].contributions
            of_mention = _less(of_mention, of_rival[0])
            rival_side = pairs[1].side(_less(Contributions(np.zeros(1), np.zeros(1)), of_rival[1]))
        rounding = [pair.stored_score - float(pair.scores.total) for pair in pairs]
        return Explanation(
            entity=best.found(),
            versus=None if versus is None else pairs[1].found(),
            units=_units(best.stored, None if versus is None else pairs[1].stored),
            mention_side=self.side(head, body, image, of_mention, filled, start),
            entity_side=best.side(of_entity),
            versus_side=rival_side,
            baseline=0.0 if versus is not None else best.baseline,
            rounding=rounding[0] - (rounding[1] if versus is not None else 0.0),
        )

    def side(
        self,
        title: str,
        body: str,
        image: Any,
        contributions: Contributions,
        filled: str | None = None,
        place: int | None = None,
    ) -> ExplainedSide:
        """The contributions laid over a title, a text and an image.

        Args:
            title, body: the mention and its text, or the entity's name and description.
            image: the image, read; `None` where there is none.
            contributions: of the tokens and patches.
            filled: the template as the tokenizer was given it, if that is not all of `body`.
            place: where in `body` the mention begins, if that is known.
        """
        title_words, body_words = self._words(title, body, contributions.tokens, filled, place)
        side = ExplainedSide(title, body, title_words, body_words, whole_image=contributions.whole_image)
        if image is not None and not contributions.whole_image:
            side.image = image
            side.patches = self._grid(contributions.patches)
            side.box = _seen(image.size, self._processor.image_processor)
        return side

    def _words(
        self, title: str, body: str, amounts: np.ndarray, filled: str | None, place: int | None
    ) -> tuple[list[WordContribution], list[WordContribution]]:
        """The words of both texts that were read. What the template's own tokens would add goes to the words."""
        head = title + self._processor.separator
        part = body if filled is None else filled[len(head) :]
        # Of a long text a part is read, with the mention in it.
        shift = 0 if place is None else max(0, body.find(part, max(0, place - len(part))))
        words = self._read_words(title, part)
        kept = np.array([amounts[tokens].sum() for _, _, _, tokens in words])
        if len(kept):
            kept = adjusted(kept, float(amounts.sum()))
        found: tuple[list[WordContribution], list[WordContribution]] = ([], [])
        for (which, start, end, _), amount in zip(words, kept, strict=True):
            moved = shift if which else 0
            start, end = start + moved, end + moved
            found[which].append(WordContribution((title, body)[which][start:end], start, end, float(amount)))
        return found

    def _read_words(self, title: str, body: str) -> list[tuple[int, int, int, list[int]]]:
        """The words that the model reads: of which text (0 or 1), from where to where in it, and their tokens."""
        separator = self._processor.separator
        text = title + separator + body
        encoded = self._processor.tokenizer(
            [text], truncation=True, max_length=self._processor.text_max_length, return_offsets_mapping=True
        )
        start_of_body = len(title) + len(separator)
        found: dict[int, tuple[int, int, int, list[int]]] = {}
        for place, (word, (start, end)) in enumerate(
            zip(encoded.word_ids(0), encoded["offset_mapping"][0], strict=True)
        ):
            if word is None or start >= end or (len(title) <= start and end <= start_of_body):
                continue
            while start < end and text[start].isspace():
                start += 1
            which, first = (0, 0) if start < len(title) else (1, start_of_body)
            _, before, after, tokens = found.get(word, (which, start - first, end - first, []))
            found[word] = which, min(before, start - first), max(after, end - first), [*tokens, place]
        return list(found.values())

    def _grid(self, amounts: np.ndarray) -> np.ndarray:
        """The patches in rows and columns. What stands before them, such as a class token, goes to them."""
        vision: Any = self._model.config.backbone_config.vision_config
        across = vision.image_size // vision.patch_size
        patches = amounts[-across * across :]
        return adjusted(patches, float(amounts.sum())).reshape(across, across)

    # --- What a pair needs

    def image_of(self, entity_id: str) -> Any:
        return self._images.get(entity_id)


class _Pair:
    """The mention with one entity: what the index has of it, and what reading it again gives."""

    def __init__(self, explainer: Explainer, mention: Encoded, entity_id: str) -> None:
        self._explainer = explainer
        attribution, processor = explainer._attribution, explainer._processor
        self.record = explainer._index.entity(entity_id)
        self.image = explainer.image_of(entity_id)
        name, description = self.record["name"], self.record["description"]
        entity = attribution.encode(processor.process_entities([name], [description], [self.image]))
        features = explainer._index.features([entity_id]).to(mention.mask.device, torch.float32)
        known = None
        if not _same(attribution.entity_features(entity).tensors, features.tensors):
            if self.image is not None:
                warnings.warn(
                    f"The image given for entity {entity_id!r} is not the one that the index was built with; what its "
                    "image adds is not divided.",
                    stacklevel=4,
                )
            known = {name: t for name, t in features.tensors.items() if name.startswith(_OF_THE_IMAGE)}
        self.scores = attribution.scores(mention, entity, known)
        self.stored = attribution.scores(mention, entity, features.tensors)
        self.baseline = float(attribution.baseline_scores(mention, entity).total)
        self.contributions = attribution.contributions(mention, entity, known)

    @property
    def stored_score(self) -> float:
        return float(self.stored.total)

    def found(self) -> dict[str, Any]:
        scores = {"score": self.stored.total, "text_score": self.stored.text, "image_score": self.stored.image}
        answer = {"entity_id": self.record["id"], "name": self.record["name"]}
        answer |= {"description": self.record["description"]}
        return answer | {n: float(s) for n, s in (scores | {"cross_modal_score": self.stored.cross_modal}).items()}

    def side(self, contributions: Contributions) -> ExplainedSide:
        return self._explainer.side(self.record["name"], self.record["description"], self.image, contributions)


class EntityImages:
    """Images of entities by id.

    Args:
        source: a mapping of ids (or what has its `get`), or records with `id` and `images`, of which a data set is read
            only where it is asked; `None` for no images.
    """

    def __init__(self, source: Any = None) -> None:
        self._places = places_of(source, "images")
        self._source: Any = {} if source is None else undecoded(source, "images")
        self._rows: dict[str, int] | None = None
        if not hasattr(self._source, "get"):
            # A column of a data set is read without its images.
            is_dataset = hasattr(source, "column_names") and not isinstance(source, Sequence)
            ids: Iterable[Any] = source["id"] if is_dataset else (one["id"] for one in source)
            self._rows = {entity_id_of(entity_id): row for row, entity_id in enumerate(ids)}

    def get(self, entity_id: str) -> Any:
        """The entity's image, RGB; `None` where it has none or it is not known.

        Raises:
            MimicImageError: if it cannot be read.
        """
        if self._rows is None:
            found = self._source.get(entity_id)
        else:
            row = self._rows.get(entity_id)
            record = {} if row is None else placed_record(self._source[row], "images", self._places)
            found = record.get("images")
        found = first_image(found)
        return None if is_absent(found) else load_image(found)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether an image's features are those that an index holds, which may have been rounded."""
    names = [name for name in one if name.startswith(_OF_THE_IMAGE) and not name.endswith("stats")]
    return all((one[n] - other[n]).norm() <= _SAME_IMAGE * max(1e-6, float(other[n].norm())) for n in names)


def _less(one: Contributions, other: Contributions) -> Contributions:
    return Contributions(one.tokens - other.tokens, one.patches - other.patches, one.whole_image - other.whole_image)


def _units(entity: PairScores, rival: PairScores | None) -> dict[str, UnitContribution]:
    found = {}
    for name in ("text", "image", "cross_modal"):
        score = float(getattr(entity, name)) / UNITS
        lead = None if rival is None else score - float(getattr(rival, name)) / UNITS
        found[name] = UnitContribution(score, lead)
    return found


def _seen(size: tuple[int, int], image_processor: Any) -> tuple[float, float, float, float]:
    """The part of an image of that size that the model sees: all, or its middle where it is cropped."""
    if not getattr(image_processor, "do_center_crop", False):
        return 0.0, 0.0, 1.0, 1.0
    width, height = size
    crop = image_processor.crop_size
    edge = image_processor.size.get("shortest_edge") or min(crop["width"], crop["height"])
    scale = edge / min(width, height)
    across, down = min(1.0, crop["width"] / (width * scale)), min(1.0, crop["height"] / (height * scale))
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


__all__ = ["EntityImages", "Explainer"]

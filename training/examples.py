"""What a model card shows of a trained model: a mention that it links, and one whose link is explained."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors_mimic import MimicImageError
from ..explain_mimic import EntityImages, Explainer
from ..explanation_mimic import Explanation
from ..index_mimic import EntityIndex
from ..modeling_mimic import MimicModel
from ..pipeline_mimic import MultimodalEntityLinkingPipeline
from ..processing_mimic import MimicProcessor
from .knowledge_base import KnowledgeBase

_SHOWN = 3


def example_of(
    model: MimicModel, processor: MimicProcessor, index: EntityIndex, mentions: Iterable[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The first mention that can be read, and what the pipeline makes of it; `None` where there is none.

    Returns:
        a dict of its `mention`, `sentence`, `answer`, `row` and `has_image`, and `linked`, the pipeline's answer.
    """
    for row, mention, linked in _linked(model, processor, index, mentions):
        shown = {name: mention[name] for name in ("mention", "sentence", "answer")}
        return {**shown, "row": row, "has_image": mention["image"] is not None, "linked": linked}
    return None


def explained_example(
    model: MimicModel,
    processor: MimicProcessor,
    index: EntityIndex,
    mentions: Iterable[Mapping[str, Any]],
    knowledge_base: KnowledgeBase,
    tried: int = 200,
) -> Explanation | None:
    """Why a mention with an image is linked as it is; `None` where there is none.

    The mention is one whose answer is found before another entity of the same name, if there is one among the first
    that are tried; else the first with an image.
    """
    chosen: tuple[dict[str, Any], list[str]] | None = None
    with_images = itertools.islice((mention for mention in mentions if mention["image"] is not None), tried)
    for _, mention, linked in _linked(model, processor, index, with_images):
        found = [entity for entity in linked if entity["entity_id"] is not None]
        ids = [entity["entity_id"] for entity in found[:2]]
        if len(ids) < 2:
            continue
        tells_apart = ids[0] == mention["answer"] and found[0]["name"] == found[1]["name"]
        if tells_apart or chosen is None:
            chosen = mention, ids
        if tells_apart:
            break
    if chosen is None:
        return None
    images = EntityImages({entity_id: knowledge_base.entity(entity_id)["images"] for entity_id in chosen[1]})
    try:
        return Explainer(model, processor, index, images).explain(chosen[0], *chosen[1])
    except MimicImageError:
        return None  # an entity's image that cannot be read; training has told of it


def _linked(
    model: MimicModel, processor: MimicProcessor, index: EntityIndex, mentions: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[int, dict[str, Any], list[dict[str, Any]]]]:
    """The mentions that can be read, each with its row and its entities."""
    linker = MultimodalEntityLinkingPipeline(model=model, processor=processor, index=index)
    for row, mention in enumerate(mentions):
        try:
            yield row, dict(mention), linker(dict(mention), top_k=min(_SHOWN, len(index)))
        except ValueError:  # an empty mention, an image that cannot be read
            continue


__all__ = ["example_of", "explained_example"]

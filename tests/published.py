"""A tiny checkpoint and knowledge base, in forms that another process can be told of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from PIL import Image
from tiny import knowledge_base, mentions_of, tiny_processor
from tiny_clip import tiny_model

from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor

TASK = "multimodal-entity-linking"
ROOT = Path(__file__).resolve().parents[1]
CODE_FILES = {path.name for path in ROOT.glob("*_mimic.py")} - {"training.py"}


def tiny_linker(seed: int = 0, **settings: Any) -> tuple[MimicModel, MimicProcessor]:
    model = tiny_model(seed, **{"text_max_length": 40, **settings})
    return model, tiny_processor(model)


def save_linker(directory: Path, seed: int = 0, **settings: Any) -> Path:
    """A checkpoint as training leaves one: weights, configuration, processor and code."""
    model, processor = tiny_linker(seed, **settings)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def entities_and_mentions(directory: Path, count: int = 12) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Entities, and a mention of each, whose images are files in the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    entities = knowledge_base(count)
    for entity in entities:
        entity["images"] = [_saved(image, directory / f"{entity['id']}.png") for image in entity["images"]]
    return entities, mentions_of(entities)


def _saved(image: Image.Image, path: Path) -> str:
    image.save(path)
    return str(path)


def same_links(ours: list[list[dict[str, Any]]], theirs: list[list[dict[str, Any]]]) -> bool:
    """Whether two answers of the pipeline name the same entities, with the same scores but for rounding."""
    flat = [[link for links in answer for link in links] for answer in (ours, theirs)]
    if [len(links) for links in ours] != [len(links) for links in theirs]:
        return False
    return all(
        one["entity_id"] == other["entity_id"] and math.isclose(one["score"], other["score"], rel_tol=1e-5)
        for one, other in zip(*flat, strict=True)
    )

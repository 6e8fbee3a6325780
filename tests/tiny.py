"""Small knowledge bases, indexes and processors for `tiny_clip`'s model; features with no encoder behind them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import tiny_tokenizer

from mimic_el import directory_mimic, sampling_mimic
from mimic_el.calibration_mimic import Calibration
from mimic_el.configuration_mimic import MimicConfig
from mimic_el.index_mimic import EntityIndex
from mimic_el.matching_mimic import EntityFeatures, MentionFeatures, MimicEncoderOutput
from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor

WORDS = ["Orange", "Georgia", "Turkey", "Apple", "Shell", "Jaguar", "Python", "Swift", "Mercury", "Java"]


def tiny_processor(model: MimicModel) -> MimicProcessor:
    config = model.config
    image_processor = MimicProcessor.image_processor_for(config.backbone_config)
    return MimicProcessor(image_processor, tiny_tokenizer(), text_max_length=config.text_max_length)


def random_image(seed: int, size: int = 16) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def knowledge_base(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Entities e0, e1, ... with texts of different lengths, of which every third has no image."""
    return [
        {
            "id": f"e{number}",
            "qid": f"Q{number}" if number % 2 else None,
            "name": f"{WORDS[number % len(WORDS)]} {number}",
            "description": "thing " * (number % 4),
            "images": [] if number % 3 == 2 else [random_image(number)],
        }
        for number in range(start, start + count)
    ]


def mentions_of(entities: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A mention of each entity, as the pipeline takes it."""
    return [
        {"mention": entity["name"], "text": f"{entity['name']} here.", "image": next(iter(entity["images"]), None)}
        for entity in entities
    ]


def encode_mentions(model: MimicModel, processor: MimicProcessor, mentions: list[dict[str, Any]]) -> MentionFeatures:
    heads, texts, images = ([mention[name] for mention in mentions] for name in ("mention", "text", "image"))
    with torch.no_grad():
        return model.encode_mentions(**processor.process_mentions(heads, texts, images))


def random_encoded(
    config: MimicConfig, count: int, seed: int = 0, clusters: int | None = None, noise: float = 0.3
) -> tuple[MimicEncoderOutput, torch.Tensor]:
    """What an encoder might give for `count` mentions or entities, and their token masks.

    With `clusters`, item i is that many-th centre i % clusters plus noise, and the same centre whatever the seed: what
    training makes of mentions and their entities.
    """
    backbone: Any = config.backbone_config
    patches = (backbone.vision_config.image_size // backbone.vision_config.patch_size) ** 2 + 1
    length, size = config.text_max_length, backbone.text_config.hidden_size
    shapes = {
        "text_embeds": (backbone.projection_dim,),
        "text_tokens": (length, size),
        "image_embeds": (config.image_hidden_size,),
        "image_tokens": (patches, config.image_hidden_size),
    }
    own = torch.Generator().manual_seed(1000 + seed)
    shared = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = torch.randn(count, *shape, generator=own)
        if clusters is not None:
            centres = torch.randn(clusters, *shape, generator=shared)
            tensors[name] = centres[torch.arange(count) % clusters] + noise * tensors[name]
    tensors["text_embeds"] = torch.nn.functional.normalize(tensors["text_embeds"], dim=-1)
    lengths = torch.randint(2, length + 1, (count, 1), generator=own)
    return MimicEncoderOutput(**tensors), torch.arange(length) < lengths


def index_of(
    model: MimicModel,
    encoded: MimicEncoderOutput,
    mask: torch.Tensor,
    dtype: str = "float32",
    shards: int = 1,
    repeat: int = 1,
) -> EntityIndex:
    """An index in memory of given encoder outputs, named e0, e1, ...; with `repeat` they are there as often, bit for
    bit the same."""
    with torch.no_grad():
        features = model.matcher.entity_features(encoded, mask)
    features = EntityFeatures.cat([features] * repeat)
    records = [{"id": f"e{row}", "name": f"E {row}", "description": ""} for row in range(len(features))]
    return EntityIndex.from_features(features, records, model, dtype=dtype, shard_entities=-(-len(features) // shards))


def mention_features(model: MimicModel, encoded: MimicEncoderOutput, mask: torch.Tensor) -> MentionFeatures:
    with torch.no_grad():
        return model.matcher.mention_features(encoded, mask)


def built_by_twos(
    linker: tuple[MimicModel, MimicProcessor], entities: Any, directory: Path | None, **options: Any
) -> EntityIndex:
    """An index with two entities in a shard."""
    return EntityIndex.build(*linker, entities, directory, shard_entities=2, show_progress=False, **options)


def bound_few_pairs() -> None:
    """Has a small index searched as a large one is, not by scoring what few pairs it has."""
    sampling_mimic._FEW_PAIRS = 0


def once(items: Iterable[Any]) -> Iterator[Any]:
    """A generator: no length, no second reading."""
    yield from items


def small_shards(monkeypatch: pytest.MonkeyPatch, entities: int) -> None:
    """Makes the shards of all that is built, changed and saved from now on hold so many entities."""
    monkeypatch.setattr(directory_mimic, "SHARD_ENTITIES", entities)


def assert_same_index(one: EntityIndex, other: EntityIndex, parts: tuple[MimicModel, MimicProcessor]) -> None:
    """The same entities in the same order, and the same answers."""
    assert list(one.entities()) == list(other.entities())
    mentions = encode_mentions(*parts, mentions_of(knowledge_base(4)))
    found, wanted = one.search(mentions, 5), other.search(mentions, 5)
    assert found.entity_ids == wanted.entity_ids
    # Rounding differs with the batch in which an entity was encoded.
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-5)


def assert_equal_bytes(one: EntityIndex, other: EntityIndex) -> None:
    assert list(one.entities()) == list(other.entities())
    rows = slice(0, len(other))
    found, wanted = (index._contents.store.full(rows, torch.device("cpu")).tensors for index in (one, other))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
    one.verify()


# One that looks at so many of the best entities.
CALIBRATION_DEPTH = 16


def calibration_of(index: EntityIndex, **changes: Any) -> Calibration:
    """One in which NIL, the best and the rest all have something; sets for 99% hold more than the best 16."""
    settings: dict[str, Any] = {
        "depth": CALIBRATION_DEPTH,
        "nil_rate": 0.2,
        "evidence": {"lead": (0.1, 0.1), "near_name": (0.5, 0.5)},
        "lines": {"nil": (-1.0, -0.5, -0.5), "rest": (0.0, 0.1, 0.2), "sharpness": (2.0, 0.1, 0.1)},
        "thresholds": tuple(np.linspace(0.5, 0.0001, 99)),
        "mentions": 200,
        "index": {"entities": len(index), "dtype": index.dtype, "ids": ["e0", "e7", "e40"]},
    }
    return Calibration(**{**settings, **changes})

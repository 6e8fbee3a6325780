"""Explanations of links: sums that come out, words where they stand, entities whose image is not at hand."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest
from tiny import knowledge_base, random_image, tiny_processor
from tiny_clip import tiny_model

from mimic_el.errors_mimic import UnknownEntityError
from mimic_el.explain_mimic import EntityImages, Explainer
from mimic_el.index_mimic import EntityIndex

MENTION = {"mention": "Orange", "text": "Orange opened a shop.", "image": random_image(50, 32)}


@pytest.fixture(scope="module")
def made() -> tuple[Any, ...]:
    model = tiny_model(text_max_length=40)  # the tokens are bytes
    processor = tiny_processor(model)
    entities = knowledge_base(6)
    return model, processor, entities, EntityIndex.build(model, processor, entities, show_progress=False)


def explainer(made: tuple[Any, ...], index: EntityIndex | None = None, images: Any = "all") -> Explainer:
    model, processor, entities, own = made
    return Explainer(model, processor, index or own, entities if images == "all" else images)


def total(why: Any) -> float:
    return sum(side.total for side in why.sides) + why.baseline + why.rounding


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("versus", [None, "e1", "e5"])
def test_contributions_add_up_to_the_score_or_the_lead_that_the_index_gives(made, dtype, versus):
    model, processor, entities, _ = made
    index = EntityIndex.build(model, processor, entities, dtype=dtype, show_progress=False)
    found = index.link(model, processor, [MENTION], top_k=6)[0]
    scores = {one["entity_id"]: one["score"] for one in found}
    why = explainer(made, index).explain(MENTION, "e0", versus)
    expected = scores["e0"] - (scores[versus] if versus else 0)
    assert why.explained == pytest.approx(expected, abs=1e-3)
    assert total(why) == pytest.approx(expected, abs=1e-3)
    assert sum(unit.score for unit in why.units.values()) == pytest.approx(scores["e0"], abs=1e-3)
    if versus:
        assert sum(unit.lead or 0 for unit in why.units.values()) == pytest.approx(expected, abs=1e-3)
    assert abs(why.rounding) < {"float32": 1e-3, "float16": 0.05, "int8": 0.3}[dtype]


def test_words_stand_where_they_say_in_any_script(made):
    text = "Öl «A» 🍏 מח، نو 新い! "
    why = explainer(made).explain({"mention": "A", "text": text}, "e0")
    assert [text[word.start : word.end] for word in why.text] == [word.word for word in why.text]
    assert why.text
    assert all(word.word.strip() == word.word != "" for word in why.text)
    assert [(word.word, word.start) for word in why.mention_side.title_words] == [("A", 0)]
    assert why.mention_image is None


def test_only_the_words_that_were_read_are_explained(made):
    why = explainer(made).explain({"mention": "Apple", "text": "here " * 500}, "e0")
    assert 0 < len(why.text) < 10
    assert total(why) == pytest.approx(why.explained, abs=1e-3)


def test_patches_are_laid_out_in_rows(made):
    model = made[0]
    vision = model.config.backbone_config.vision_config
    across = vision.image_size // vision.patch_size
    why = explainer(made).explain(MENTION, "e0", "e2")
    assert why.mention_image is not None
    assert why.entity_image is not None
    assert why.mention_image.shape == why.entity_image.shape == (across, across)
    assert why.versus_side is not None
    assert why.versus_side.patches is None  # e2 has no image
    assert why.mention_side.box == (0, 0, 1, 1)


@pytest.mark.parametrize("images", [None, {"e0": random_image(99)}], ids=["not at hand", "another one"])
def test_an_image_that_is_not_the_indexs_is_not_divided(made, images):
    with pytest.warns(UserWarning, match="is not the one") if images else _nothing():
        why = explainer(made, images=images).explain(MENTION, "e0")
    assert why.entity_image is None
    assert why.entity_side.whole_image
    assert total(why) == pytest.approx(why.explained, abs=1e-3)
    assert why.rounding == pytest.approx(0, abs=1e-3)


def test_images_come_from_a_mapping_records_or_a_data_set(made):
    entities = made[2]
    rows = [{"id": one["id"], "images": one["images"][:1]} for one in entities]
    features = datasets.Features({"id": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    sources = [{one["id"]: one["images"] for one in rows}, rows, datasets.Dataset.from_list(rows, features=features)]
    for source in sources:
        images = EntityImages(source)
        assert np.array_equal(np.asarray(images.get("e0")), np.asarray(entities[0]["images"][0]))
        assert images.get("e2") is None
        assert images.get("nobody") is None


def test_what_cannot_be_explained_is_refused(made):
    with pytest.raises(UnknownEntityError, match="nobody"):
        explainer(made).explain(MENTION, "nobody")
    with pytest.raises(ValueError, match="the entity itself"):
        explainer(made).explain(MENTION, "e0", "e0")
    with pytest.raises(ValueError, match="`text` of a mention is missing"):
        explainer(made).explain({"mention": "Apple"}, "e0")


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

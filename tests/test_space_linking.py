"""What the page does, without a browser."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from published import ROOT, save_linker, tiny_linker
from tiny import knowledge_base, random_image
from transformers import pipeline

from mimic_el import EntityIndex
from mimic_el.errors_mimic import MimicImageError
from mimic_el.space.linking import MAX_OWN_ENTITIES, Linking, OwnEntities, PageError, Settings, image_of_request

TEXT = "Orange 0 and Georgia 1 went to see Turkey 2."


@pytest.fixture(scope="module")
def linking() -> Linking:
    model, processor = tiny_linker()
    entities = knowledge_base(8)
    load: Any = pipeline
    linker = load("multimodal-entity-linking", model=model, processor=processor, entities=entities)
    return Linking(linker, entities)


def test_names_of_the_knowledge_base_are_found(linking: Linking):
    linked = linking.link(TEXT, random_image(1), top_k=3)
    assert [one["mention"] for one in linked] == ["Orange 0", "Georgia 1", "Turkey 2"]
    assert all(TEXT[one["start"] : one["end"]] == one["mention"] for one in linked)
    assert [len(one["entities"]) for one in linked] == [3, 3, 3]


def test_a_mention_may_be_named(linking: Linking):
    linked = linking.link(TEXT, None, "see", top_k=2)
    assert [(one["mention"], len(one["entities"])) for one in linked] == [("see", 2)]


def test_an_own_entity_is_found_among_the_others_by_its_score(linking: Linking):
    own, first = linking.with_entity(OwnEntities(), "See", "The see.", random_image(70))
    own, second = linking.with_entity(own, "Other", "", None)
    assert (first, second) == ("own:1", "own:2")
    entities = linking.link(TEXT, None, "see", top_k=20, own=own)[0]["entities"]
    assert {one["entity_id"] for one in entities} == {f"e{n}" for n in range(8)} | {"own:1", "own:2"}
    scores = [one["score"] for one in entities]
    assert scores == sorted(scores, reverse=True)
    # The same entity in an index with all others has the same score.
    everything = [
        *knowledge_base(8),
        {"id": "own:1", "name": "See", "description": "The see.", "images": [random_image(70)]},
    ]
    index = EntityIndex.build(linking.linker.model, linking.linker.processor, everything, dtype="float32")
    mention = {"mention": "see", "text": TEXT, "start": 31, "end": 34}
    found = index.link(linking.linker.model, linking.linker.processor, [mention], 20)[0]
    expected = next(one["score"] for one in found if one["entity_id"] == "own:1")
    score = next(one["score"] for one in entities if one["entity_id"] == "own:1")
    assert score == pytest.approx(expected, abs=0.02)
    assert len(linking.index) == 8


def test_a_link_and_a_rival_of_ones_own_are_explained(linking: Linking):
    own, entity_id = linking.with_entity(OwnEntities(), "See", "The see.", random_image(70))
    why = linking.explain(TEXT, random_image(1), 31, 34, "e0", entity_id, own)
    assert why.mention_side.title == "see"
    assert why.versus is not None
    assert why.versus["name"] == "See"
    assert sum(side.total for side in why.sides) + why.rounding == pytest.approx(why.explained, abs=1e-3)
    shown = linking.thumbnail(entity_id, own)
    assert shown is not None
    assert shown.size == (16, 16)
    assert linking.thumbnail("e2", own) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "  "}, "Write a text first"),
        ({"text": "a" * 20_001}, "at most 20,000"),
        ({"text": "Orange", "mention": "Apple"}, "“Apple” does not occur"),
        ({"text": "Orange", "mention": "Orange", "top_k": 0}, "Between 1 and 20"),
        ({"text": "nothing that is known"}, "No name of the knowledge base"),
    ],
)
def test_what_cannot_be_linked_is_told(linking: Linking, arguments: dict[str, Any], message: str):
    with pytest.raises(PageError, match=message):
        linking.link(**arguments)


def test_what_cannot_be_added_is_told(linking: Linking):
    with pytest.raises(PageError, match="needs a name"):
        linking.with_entity(OwnEntities(), " ", "x", None)
    with pytest.raises(PageError, match="at most 200 characters"):
        linking.with_entity(OwnEntities(), "x" * 201, "", None)
    with pytest.raises(PageError, match="At most 50"):
        linking.with_entity(OwnEntities([{}] * MAX_OWN_ENTITIES), "x", "", None)


def test_a_request_reads_no_file_and_no_address(tmp_path: Path):
    place = tmp_path / "image.png"
    random_image(1).save(place)
    encoded = base64.b64encode(place.read_bytes()).decode("ascii")
    assert isinstance(image_of_request(encoded, False), Image.Image)
    assert isinstance(image_of_request(f"data:image/png;base64,{encoded}", False), Image.Image)
    assert image_of_request("", False) is None
    for hostile in (str(place), f"file://{place}", "../image.png", f"zip://image.png::{place}"):
        with pytest.raises(MimicImageError, match="no file is read"):
            image_of_request(hostile, True)
    with pytest.raises(MimicImageError, match="its format is unknown"):
        image_of_request("data:image/png,abc", True)
    # An address is read only where that is allowed, and one of this machine not even then.
    with pytest.raises(MimicImageError, match="URLs are not read"):
        image_of_request("http://127.0.0.1:9/a.png", False)
    with pytest.raises(MimicImageError, match="private network"):
        image_of_request("http://127.0.0.1:9/a.png", True)
    with pytest.raises(PageError, match="not dict"):
        image_of_request({"path": str(place)}, False)  # type: ignore[arg-type]
    with pytest.raises(MimicImageError):
        image_of_request(base64.b64encode(b"no image").decode("ascii"), False)


def test_settings_come_from_a_file_and_are_checked(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text("model: some/model\ntitle: Birds\nexamples:\n- [A crane, crane.png]\n- [Another]\n", "utf-8")
    settings = Settings.read(path, model=None, index="other/index")
    assert (settings.model, settings.index, settings.title) == ("some/model", "other/index", "Birds")
    assert settings.examples == (("A crane", str(tmp_path / "crane.png"), None), ("Another", None, None))
    for text, message in [
        ("title: x", "names no model"),
        ("model: x\ntitel: y", "unknown settings"),
        ("- a", "unknown settings"),
        ("model: [", "cannot be read"),
        ("model: x\nexamples: [5]", "an example is a list"),
    ]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(PageError, match=message):
            Settings.read(path)
    with pytest.raises(PageError, match="cannot be read"):
        Settings.read(tmp_path / "nothing.yaml")


def test_settings_name_what_is_opened(tmp_path: Path):
    save_linker(tmp_path / "model", default_index="index")
    model, processor = tiny_linker()
    EntityIndex.build(model, processor, knowledge_base(4), tmp_path / "model" / "index", show_progress=False)
    linking = Linking.of(Settings(str(tmp_path / "model")))
    assert len(linking.index) == 4
    assert linking.thumbnail("e0", None) is None
    sample = Linking.of(Settings(str(tmp_path / "model"), entities=str(ROOT / "datasets_scripts" / "sample")))
    shown = sample.thumbnail("brand:arm", None)
    assert shown is not None
    assert max(shown.size) <= 96


@pytest.mark.parametrize("value", [5, 1.5, True, ["Orange 0"], {"a": 1}])
def test_what_a_program_sends_in_the_place_of_a_text_is_told(linking: Linking, value: Any):
    for ask in (
        lambda: linking.link(value),
        lambda: linking.link(TEXT, None, value),
        lambda: linking.explain(value, None, 0, 8, "e0"),
        lambda: linking.explain(TEXT, None, 0, 8, value),
        lambda: linking.explain(TEXT, None, 0, 8, "e0", value),
        lambda: linking.with_entity(OwnEntities(), value, "", None),
        lambda: linking.with_entity(OwnEntities(), "See", value, None),
    ):
        with pytest.raises(PageError, match="is a text, got"):
            ask()


@pytest.mark.parametrize("value", [None, "x", float("nan"), float("inf"), -1, 0, 10**400, [3]])
def test_what_is_no_number_is_told(linking: Linking, value: Any):
    with pytest.raises(PageError, match="Between 1 and 20"):
        linking.link(TEXT, None, None, value)
    if value not in (-1, 0, 10**400):
        with pytest.raises(PageError, match="integers"):
            linking.explain(TEXT, None, value, 8, "e0")


def test_a_text_to_be_explained_is_as_short_as_one_to_be_linked(linking: Linking):
    with pytest.raises(PageError, match="at most 20,000 are read"):
        linking.explain("x" * 30_000, None, 0, 8, "e0")

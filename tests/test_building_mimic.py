"""A build that is interrupted and run again: what is kept of it must be what would be built now."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    assert_equal_bytes,
    encode_mentions,
    knowledge_base,
    mentions_of,
    random_image,
    small_shards,
    tiny_processor,
)
from tiny_clip import tiny_model

from mimic_el import building_mimic
from mimic_el.errors_mimic import EntityIndexError
from mimic_el.index_mimic import EntityIndex
from mimic_el.matching_mimic import EntityFeatures, Matcher
from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor


class Interrupted(list[dict[str, Any]]):
    """A knowledge base that a user stops reading at its 25th entity."""

    def __getitem__(self, row: Any) -> Any:
        if row == 25:
            raise KeyboardInterrupt
        return super().__getitem__(row)


@pytest.fixture(scope="module")
def model() -> MimicModel:
    return tiny_model(text_max_length=24)


@pytest.fixture(scope="module")
def processor(model: MimicModel) -> MimicProcessor:
    return tiny_processor(model)


@pytest.mark.parametrize("form", ["a path", "the file's bytes"])
@pytest.mark.parametrize("before", ["unreadable", "another", "missing", "the same"])
def test_images_that_changed_are_encoded_again(
    form: str, before: str, model: MimicModel, processor: MimicProcessor, tmp_path: Path
):
    path = tmp_path / "image.png"

    def save(what: str) -> None:
        if what == "unreadable":
            path.write_bytes(b"no image")
        elif what == "missing":
            path.unlink(missing_ok=True)
        else:
            random_image(3 if what == "another" else 4).save(path)

    def records() -> list[dict[str, Any]]:
        image: Any = str(path)
        if form == "the file's bytes":
            image = path.read_bytes() if path.exists() else None
        # The image is that of an entity of the second shard.
        return [{"id": f"P{row}", "name": f"P {row}", "images": [image] if row == 13 else []} for row in range(40)]

    options: dict[str, Any] = {"shard_entities": 10, "dtype": "float32", "show_progress": False}
    save(before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(KeyboardInterrupt):
            EntityIndex.build(model, processor, Interrupted(records()), tmp_path / "index", **options)
    if before != "the same":
        save("now")
        with pytest.warns(UserWarning, match="what was encoded after the first 10 entities is encoded again"):
            index = EntityIndex.build(model, processor, records(), tmp_path / "index", **options)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            index = EntityIndex.build(model, processor, records(), tmp_path / "index", **options)
    fresh = EntityIndex.build(model, processor, records(), **options)
    cpu = torch.device("cpu")
    for name, tensor in fresh._contents.store.full(slice(0, 40), cpu).tensors.items():
        torch.testing.assert_close(index._contents.store.full(slice(0, 40), cpu).tensors[name], tensor)
    index.verify()


def test_features_that_are_not_finite_are_refused_by_the_entitys_name(
    model: MimicModel, processor: MimicProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encode = Matcher.entity_features

    def broken(matcher: Matcher, *args: Any) -> EntityFeatures:
        features = encode(matcher, *args)
        features.tensors["text_local"][2, 0] = torch.nan
        return features

    monkeypatch.setattr(Matcher, "entity_features", broken)
    kb = [{"id": f"P{row}", "name": f"P {row}"} for row in range(8)]
    for place in (None, tmp_path / "index"):
        words = r"`text_local` values that are not finite, or too large, of entity 'P[0-9]'"
        with pytest.raises(EntityIndexError, match=words):
            EntityIndex.build(model, processor, kb, place, show_progress=False)


# --- Images that come again


def watched_decoding(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is resized from now on."""
    seen: list[Any] = []
    original = MimicProcessor.resized

    def resized(self: MimicProcessor, image: Any, **kwargs: Any) -> Any:
        seen.append(image)
        return original(self, image, **kwargs)

    monkeypatch.setattr(MimicProcessor, "resized", resized)
    return seen


def images_that_come_again(folder: Path) -> tuple[list[Any], int]:
    """Images in many forms, and how many of them are of other bytes than all before, or cannot be told before they are
    read."""
    one, copy_of_one, other, broken = (folder / name for name in ("1.png", "copy.png", "2.png", "broken.png"))
    random_image(1).save(one)
    random_image(2).save(other)
    copy_of_one.write_bytes(one.read_bytes())
    broken.write_bytes(b"no image")
    archive = folder / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(one, "1.png")
        file.write(other, "2.png")
    new = [str(one), other, f"zip://1.png::{archive}", f"zip://2.png::{archive}", random_image(3), random_image(3)]
    again = [one, str(copy_of_one), one.read_bytes(), {"bytes": other.read_bytes(), "path": None}, {"path": str(one)}]
    # One that cannot be read is tried, and told of, each time.
    return [*new, *again, str(broken), None, broken, *again], len(new) + 2 + 1


def records_of(images: list[Any]) -> list[dict[str, Any]]:
    return [{"id": f"P{row}", "name": f"P {row}", "images": [image]} for row, image in enumerate(images)]


def features_of(index: EntityIndex) -> dict[str, torch.Tensor]:
    return index._contents.store.full(slice(0, len(index)), torch.device("cpu")).tensors


def test_equal_images_are_decoded_once(
    model: MimicModel, processor: MimicProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images, count = images_that_come_again(tmp_path)
    options: dict[str, Any] = {"dtype": "float32", "batch_size": 4, "show_progress": False, "shard_entities": 9}
    built, warned, seen = {}, {}, []
    for kept in (building_mimic._KEPT_BYTES, 0):
        monkeypatch.setattr(building_mimic, "_KEPT_BYTES", kept)
        with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            decoded = watched_decoding(patch)
            built[kept] = EntityIndex.build(model, processor, records_of(images), **options)
        seen.append(len(decoded))
        warned[kept] = [str(warning.message) for warning in caught]
    assert seen == [count, len(images)]  # in other shards too
    first, other = (features_of(index) for index in built.values())
    assert all(torch.equal(tensor, other[name]) for name, tensor in first.items())
    one, again = warned.values()
    assert one == again
    assert sum("It is encoded without an image" in text for text in one) == 2
    assert "resized" not in vars(processor)


def test_only_so_many_images_are_remembered(
    model: MimicModel, processor: MimicProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    side = processor.image_processor.size["height"]
    monkeypatch.setattr(building_mimic, "_KEPT_BYTES", 2 * 3 * side * side)  # two of them
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        random_image(number).save(path)
    seen = watched_decoding(monkeypatch)
    order = [0, 1, 0, 2, 0, 1]  # 1 was forgotten when 2 came
    EntityIndex.build(model, processor, records_of([paths[row] for row in order]), show_progress=False)
    assert seen == [paths[row] for row in (0, 1, 2, 1)]


def test_what_workers_do_can_be_sent_to_them(processor: MimicProcessor, tmp_path: Path):
    """As it is where processes are not forked."""
    random_image(1).save(tmp_path / "1.png")
    records = records_of([tmp_path / "1.png", None, tmp_path / "1.png"])
    collate = building_mimic._Collate(processor, "warn")
    here, there = collate(records), pickle.loads(pickle.dumps(collate))(records)
    assert here[0] == there[0]
    assert torch.equal(here[1]["pixel_values"], there[1]["pixel_values"])
    assert here[2:] == there[2:]


# --- Autocast


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_an_index_is_made_changed_and_saved_under_autocast_as_without(
    dtype: str,
    autocast: torch.dtype,
    model: MimicModel,
    processor: MimicProcessor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_shards(monkeypatch, 4)

    def made(folder: Path) -> tuple[EntityIndex, EntityIndex, EntityFeatures]:
        index = EntityIndex.build(model, processor, knowledge_base(10), dtype=dtype, show_progress=False)
        index.remove(["e2", "e7"])
        index.add(model, processor, knowledge_base(3, start=20), show_progress=False)
        index.compact()
        index.save_pretrained(folder)
        opened = EntityIndex.from_pretrained(folder)
        opened.verify()
        opened.check_model(model)
        return index, opened, opened.features(["e9", "e0", "e22"])

    plain = made(tmp_path / "plain")
    with torch.autocast("cpu", autocast):
        cast = made(tmp_path / "cast")
    for one, other in zip(cast[:2], plain[:2], strict=True):
        assert_equal_bytes(one, other)
    for name, tensor in plain[2].tensors.items():
        assert torch.equal(cast[2].tensors[name], tensor)


def test_a_shortlist_is_made_and_asked_under_autocast(model: MimicModel, processor: MimicProcessor) -> None:
    pytest.importorskip("faiss")
    entities = knowledge_base(20)
    index = EntityIndex.build(model, processor, entities, show_progress=False)
    mentions = encode_mentions(model, processor, mentions_of(entities[:6]))
    with torch.autocast("cpu", torch.bfloat16):
        index.build_shortlist(show_progress=False)
        found = index.search(mentions, 3, num_candidates=10)
    assert found.entity_ids == index.search(mentions, 3, num_candidates=10).entity_ids

"""The builders and `load_raw` give what the archives hold."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from mel_archives import PACKINGS, an_image, mention, noise, sound_archive, to_json, write_folder

from mimic_el.datasets_scripts.builders import BUILDERS, WikiMel, load_raw


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_folder(sound_archive(), tmp_path / "data")


def image_bytes(dataset: datasets.Dataset, column: str) -> list[Any]:
    feature = datasets.Image(decode=False)
    is_list = isinstance(dataset.features[column], datasets.List)
    raw = dataset.cast_column(column, datasets.List(feature) if is_list else feature)[column]
    return [[item["bytes"] for item in cell] if is_list else cell and cell["bytes"] for cell in raw]


def test_a_builder_is_used_as_a_class(archive: Path, tmp_path: Path) -> None:
    builder = WikiMel(config_name="mentions", data_dir=str(archive), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    train = builder.as_dataset(split="train")
    assert train["mention"] == ["Anna", "Ben Beta", "Gamma"]
    assert image_bytes(train, "image") == [an_image(5), an_image(6), None]
    assert train[0]["image"].size == (8, 6)


def test_every_data_set_has_both_configurations() -> None:
    assert set(BUILDERS) == {"wikimel", "richpediamel", "wikidiverse", "custom"}
    for builder in BUILDERS.values():
        assert set(builder.builder_configs) == {"mentions", "entities"}


@pytest.mark.parametrize("packing", ["folder", "tar of zips"])
def test_load_raw(tmp_path: Path, packing: str) -> None:
    (tmp_path / "data").mkdir()
    place = PACKINGS[packing](sound_archive(), tmp_path / "data")
    mentions, entities = load_raw("wikimel", place, cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in mentions.items()} == {"train": 3, "validation": 1, "test": 1}
    assert mentions["test"][0]["answer"] == "0"
    assert entities["id"] == ["0", "1", "2", "3"]
    assert entities["name"] == ["Anna Alpha", "Ben Beta", "Café Gamma", "Dora"]
    assert image_bytes(entities, "images") == [[an_image(1), an_image(2)], [an_image(3)], [], [an_image(4)]]


def test_streaming_gives_the_same_rows(archive: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    mentions, entities = load_raw("wikimel", archive, cache_dir=cache)
    streamed, streamed_entities = load_raw("wikimel", archive, cache_dir=cache, streaming=True)
    assert isinstance(streamed_entities, datasets.IterableDataset)
    assert streamed_entities.features == entities.features
    for split in mentions:
        assert list(streamed[split].remove_columns("image")) == list(mentions[split].remove_columns("image"))
    first = next(iter(streamed["train"]))
    assert first["image"].tobytes() == mentions["train"][0]["image"].tobytes()
    assert list(streamed_entities.remove_columns("images")) == list(entities.remove_columns("images"))


def test_changed_data_are_read_anew(archive: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    before, _ = load_raw("wikimel", archive, cache_dir=cache)
    (archive / "WIKIMEL_test.json").write_bytes(to_json([mention("Dora", "Dora again", "Q3")]))
    after, _ = load_raw("wikimel", archive, cache_dir=cache)
    assert before["test"]["sentence"] == ["Anna again"]
    assert after["test"]["sentence"] == ["Dora again"]


def test_unusable_images_are_left_out_and_logged(
    archive: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (archive / "kb_image" / "Q0_0.jpg").write_bytes(noise(0)[:-6000])
    (archive / "mention_image" / "m0.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        mentions, entities = load_raw("wikimel", archive, cache_dir=str(tmp_path / "cache"))
    assert image_bytes(entities, "images")[0] == [an_image(2)]
    assert image_bytes(mentions["train"], "image") == [None, an_image(6), None]
    assert (
        "wikimel, kb: 1 unreadable_image, e.g. kb_entity.json, row 0: 'Q0_0.jpg': it cannot be decoded" in caplog.text
    )
    assert "wikimel, train: 1 missing_image, e.g. WIKIMEL_train.json, row 0: 'm0.jpg' is not in" in caplog.text


def test_options(archive: Path, tmp_path: Path) -> None:
    (archive / "mention_image" / "m0.jpg").write_bytes(noise(0))
    mentions, _ = load_raw("wikimel", archive, cache_dir=str(tmp_path / "cache"), image_size=32)
    assert mentions["train"][0]["image"].size == (32, 32)
    mentions, entities = load_raw("wikimel", archive, cache_dir=str(tmp_path / "cache"), use_images=False)
    assert mentions["train"][0]["image"] is None
    assert entities["images"] == [[], [], [], []]


def test_unusable_archive_says_all_that_is_wrong(archive: Path) -> None:
    (archive / "qid2id.json").unlink()
    (archive / "WIKIMEL_dev.json").write_bytes(b"[1,\n2,]")
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_raw("wikimel", archive)
    assert "missing_file: qid2id.json" in str(caught.value)
    assert "broken_json: WIKIMEL_dev.json: line 2" in str(caught.value)


def test_builder_without_a_folder() -> None:
    with pytest.raises(ValueError, match="WikiMel needs data_dir"):
        WikiMel(config_name="mentions")

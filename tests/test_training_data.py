"""The mentions that a training takes, and those that it leaves out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from tiny import tiny_processor
from tiny_clip import tiny_model

from mimic_el.errors_mimic import MimicImageError
from mimic_el.images_mimic import load_image
from mimic_el.training import MentionEntityCollator
from mimic_el.training.arguments import DataArguments, MimicTrainingArguments
from mimic_el.training.data import load_data, training_mentions
from mimic_el.training.knowledge_base import KnowledgeBase

ENTITIES = [{"id": "1", "name": "Ann", "description": "", "images": []}]


@pytest.mark.parametrize("streaming", [False, True])
def test_mentions_of_no_entity_are_left_out_of_training(tmp_path: Path, streaming: bool) -> None:
    rows = [
        {"id": str(number), "mention": "Ann", "sentence": "Ann", "image": None, "answer": answer}
        for number, answer in enumerate(["1", None, "2", "1", None])
    ]
    mentions = datasets.Dataset.from_list(rows)
    data = DataArguments(dataset_name="x", streaming=streaming)
    args = MimicTrainingArguments(output_dir=str(tmp_path), report_to="none", disable_tqdm=True)
    kept, left_out = training_mentions(
        mentions.to_iterable_dataset() if streaming else mentions, KnowledgeBase(ENTITIES), data, args
    )
    assert sorted(row["id"] for row in kept) == ["0", "3"]
    assert left_out == 3
    # Listed are those whose answer should be there and is not.
    assert (tmp_path / "mentions_without_entity.jsonl").read_text().count("\n") == 1


def test_a_folder_of_data_names_images_in_it_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in ("mentions", "entities"):
        (folder / name).mkdir(parents=True)
    for place in (folder, tmp_path):
        Image.new("RGB", (9, 9)).save(place / "photo.png")
    names = ["photo.png", str(tmp_path / "photo.png"), "http://127.0.0.1:9/photo.png"]
    entities = [{**ENTITIES[0], "id": str(row), "images": [name]} for row, name in enumerate(names)]
    mentions = [
        {"id": str(row), "mention": "Ann", "sentence": "Ann", "image": name, "answer": "0"}
        for row, name in enumerate(names)
    ]
    datasets.Dataset.from_list(entities).to_parquet(folder / "entities" / "kb-00000-of-00001.parquet")
    datasets.Dataset.from_list(mentions).to_parquet(folder / "mentions" / "train-00000-of-00001.parquet")
    splits = {"mentions": "train", "entities": "kb"}
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}/{split}-*\n"
        for name, split in splits.items()
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")

    def read(**switches: Any) -> list[bool]:
        loaded, knowledge_base = load_data(DataArguments(dataset_name=str(folder), **switches), str(tmp_path / "cache"))
        collator = MentionEntityCollator(tiny_processor(tiny_model()), knowledge_base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen = collator.encode_mentions(list(loaded["train"]))["pixel_values"]
            images = [entity["images"][0] for entity in knowledge_base.entities()]
            again = collator.processor.pixels(images, on_image_error="warn")
        assert [bool(row.any()) for row in again] == [bool(row.any()) for row in seen]
        return [bool(row.any()) for row in seen]

    assert read() == [True, False, False]
    assert read(image_root=str(tmp_path)) == [True, True, False]
    options = DataArguments(dataset_name=str(folder), allow_urls="public")
    _, knowledge_base = load_data(options, str(tmp_path / "cache"))
    with pytest.raises(MimicImageError, match="an address of this machine"):
        load_image(knowledge_base.entities()[2]["images"][0])

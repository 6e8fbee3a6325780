"""The mentions that a training takes, and those that it leaves out."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from mimic_el.training.arguments import DataArguments, MimicTrainingArguments
from mimic_el.training.data import training_mentions
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

"""Tests of training/hard_negatives.py, and of what the collator and the trainer make of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_data
from gloo import run_together
from python_processes import ForkingPython, own_python
from transformers import set_seed

from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor
from mimic_el.training import MentionEntityCollator, MimicTrainer, MimicTrainingArguments
from mimic_el.training.arguments import ModelArguments
from mimic_el.training.hard_negatives import MentionsWithNegatives, best_wrong_entities, merged_without_answers
from mimic_el.training.start import build_model


@pytest.fixture(scope="module")
def parts() -> tuple[MimicModel, MimicProcessor]:
    set_seed(0)
    args = ModelArguments(
        from_scratch=True, clip_config=toy_data.CLIP_CONFIG, text_max_length=16, vocab_size=600, **toy_data.SIZES
    )
    return build_model(args, toy_data.mentions("train", 20), toy_data.knowledge_base())


def plain_best(model: MimicModel, collator: MentionEntityCollator, mentions: list[Any], count: int) -> list[list[int]]:
    """The best wrong entities, from all scores."""
    names = [{**mentions[0], "answer": name} for name in collator.knowledge_base]
    entities = {n.removeprefix("entity_"): t for n, t in collator(names).items() if n.startswith("entity_")}
    entities.pop("labels")
    with torch.no_grad():
        encoded = model.encode_mentions(**collator.encode_mentions(mentions))
        scores = model.score(encoded, model.encode_entities(**entities)).logits.numpy()
    answers = [collator.knowledge_base.row(mention["answer"]) for mention in mentions]
    orders = [np.argsort(-own, kind="stable").tolist() for own in scores]
    return [[row for row in order if row != answer][:count] for order, answer in zip(orders, answers, strict=True)]


def test_best_wrong_entities_are_those_of_all_scores(
    hub: Any, parts: tuple[MimicModel, MimicProcessor], tmp_path: Path
) -> None:
    model, processor = parts
    knowledge_base, mentions = toy_data.knowledge_base(), toy_data.mentions("train", 11)
    collator = MentionEntityCollator(processor, knowledge_base, random_images=False)
    wanted = plain_best(model.eval(), collator, mentions, 4)
    found = best_wrong_entities(
        model, collator, knowledge_base, mentions, 1, tmp_path / "x", batch_size=4, dtype="float32", show_progress=False
    )
    assert found.tolist() == wanted
    assert found.dtype == np.int32

    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    code = """
        import sys
        from pathlib import Path
        sys.path.insert(0, tests)
        import toy_data
        from mimic_el import MimicModel, MimicProcessor
        from mimic_el.training import MentionEntityCollator
        from mimic_el.training.hard_negatives import best_wrong_entities
        model, processor = MimicModel.from_pretrained(path), MimicProcessor.from_pretrained(path)
        knowledge_base, mentions = toy_data.knowledge_base(), toy_data.mentions("train", 11)
        collator = MentionEntityCollator(processor, knowledge_base, random_images=False)
        result = best_wrong_entities(
            model.eval(), collator, knowledge_base, mentions, 1, Path("scratch"), batch_size=4, dtype="float32",
            show_progress=False).tolist()
    """
    python: ForkingPython = own_python(hub)
    both = run_together(
        python, 2, code, tmp_path / "run", tests=str(Path(__file__).parent), path=str(tmp_path / "model")
    )
    assert both == [wanted, wanted]


def test_parts_are_merged_without_the_answers() -> None:
    first = np.array([[0, 2], [1, -1]]), np.array([[5.0, 4.0], [1.0, -np.inf]])
    second = np.array([[7, 9], [8, 7]]), np.array([[5.0, 4.5], [3.0, 2.0]])
    # Mention 0 means entity 7; its best are then 0, 9 and 2. Mention 1 means 8; it has two others.
    merged = merged_without_answers([first, second], np.array([7, 8]), 3)
    assert merged.tolist() == [[0, 9, 2], [7, 1, -1]]
    # Equal scores: in the order of the entities.
    equal = np.array([[9, 4, 6]]), np.zeros((1, 3))
    assert merged_without_answers([equal], np.array([4]), 4).tolist() == [[6, 9, -1, -1]]


def test_hard_negatives_are_extra_columns_and_no_answers(parts: tuple[MimicModel, MimicProcessor]) -> None:
    collator = MentionEntityCollator(parts[1], toy_data.knowledge_base(), hard_negatives=2)
    mentions = MentionsWithNegatives(toy_data.mentions("train", 9))
    assert collator([mentions[0], mentions[1]])["entity_labels"].tolist() == [0, 1]  # none are known yet
    mentions.table = np.array([[1, 5, 6, -1]] + [[5, 0, 7, 8]] * 8, dtype=np.int32)
    batch = collator([mentions[0], mentions[1]])
    assert batch["labels"].tolist() == [0, 1]
    columns = batch["entity_labels"].tolist()
    assert columns[:2] == [0, 1]  # the answers
    assert sorted(columns[2:4]) == [5, 6]  # 1 is an answer
    assert len(columns) == 6
    assert set(columns[4:]) == {7, 8}  # 5 is there, 0 is an answer
    assert len(batch["entity_input_ids"]) == 6
    assert parts[0](**batch).logits.shape == (2, 6)
    assert collator([mentions[0], mentions[1]])["entity_labels"].tolist() == columns  # drawn from seed and mentions


def test_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be searched for a stream"):
        MentionsWithNegatives(toy_data.mention_dataset("train", 9).to_iterable_dataset())


def test_training_searches_them_every_few_epochs_and_goes_on_with_those_of_the_checkpoint(
    parts: tuple[MimicModel, MimicProcessor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []
    batches: list[int] = []

    class Watched(MimicTrainer):
        def find_hard_negatives(self) -> np.ndarray:
            searched.append(self.state.global_step)
            return super().find_hard_negatives()

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            batches.append(len(inputs["entity_labels"]) - len(inputs["labels"]))
            return super().training_step(model, inputs, *args, **kwargs)

    def train(output: Path, resume: str | None = None) -> dict[str, Any]:
        model = copy.deepcopy(parts[0])
        args = MimicTrainingArguments(
            output_dir=str(output), use_cpu=True, report_to="none", eval_strategy="no", load_best_model_at_end=False,
            save_strategy="steps", save_steps=5, disable_tqdm=True, num_train_epochs=5, learning_rate=1e-2,
            per_device_train_batch_size=6, hard_negatives=1, hard_negatives_epochs=2, save_total_limit=9,
        )  # fmt: skip
        trainer = Watched(
            model, args, entities=toy_data.knowledge_base(), processing_class=parts[1],
            train_dataset=toy_data.mention_dataset("train", 12),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return dict(model.state_dict())

    whole = train(tmp_path / "out")
    assert searched == [4, 8]  # two steps an epoch: when the third and the fifth begin
    assert batches[:4] == [0] * 4
    assert min(batches[4:]) > 0
    searched.clear()
    # Within the third epoch: its hard negatives are those of the model at its beginning, which are in the checkpoint.
    resumed = train(tmp_path / "again", str(tmp_path / "out" / "checkpoint-5"))
    assert searched == [8]
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6, msg=name)

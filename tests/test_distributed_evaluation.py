"""Tests of training/distributed_evaluation.py: several processes rank as one does, and none waits for ever."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_data
from gloo import outcomes_together, run_together
from python_processes import ForkingPython, own_python
from transformers import set_seed

from mimic_el.training import MimicTrainer, MimicTrainingArguments
from mimic_el.training.arguments import ModelArguments
from mimic_el.training.distributed_evaluation import RecordsBetween
from mimic_el.training.start import build_model

TESTS = str(Path(__file__).parent)

_EVALUATE = """
import sys
sys.path.insert(0, tests)
import toy_data
from mimic_el import MimicModel, MimicProcessor, MimicTrainer, MimicTrainingArguments
from mimic_el.training import distributed_evaluation
model, processor = MimicModel.from_pretrained(path), MimicProcessor.from_pretrained(path)
args = MimicTrainingArguments(output_dir="out", use_cpu=True, ddp_backend="gloo", report_to="none", disable_tqdm=True,
                              eval_strategy="no", load_best_model_at_end=False, per_device_eval_batch_size=4,
                              ddp_timeout=globals().get("timeout", 60))
entities = toy_data.entities()[:known]
trainer = MimicTrainer(model, args, entities=entities, processing_class=processor)
mentions = toy_data.mention_dataset("val", 11)
"""


@pytest.fixture(scope="module")
def python(hub: Any) -> ForkingPython:
    return own_python(hub)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> MimicTrainer:
    set_seed(0)
    parts = ModelArguments(
        from_scratch=True, clip_config=toy_data.CLIP_CONFIG, text_max_length=16, vocab_size=600, **toy_data.SIZES
    )
    model, processor = build_model(parts, toy_data.mentions("train", 20), toy_data.knowledge_base())
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    args = MimicTrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        eval_strategy="no",
        load_best_model_at_end=False,
    )
    return MimicTrainer(model, args, entities=toy_data.entities()[:7], processing_class=processor)


def test_several_processes_rank_as_one(python: ForkingPython, trainer: MimicTrainer, tmp_path: Path) -> None:
    """Seven of nine entities are known, so that some answers are missing; blocks of mentions that do not come out
    even; a stream; and more processes than entities."""
    mentions = toy_data.mention_dataset("val", 11)
    ranked = trainer.rank(mentions)
    wanted = [None if np.isnan(rank) else rank for rank in ranked.ranks]
    code = (
        _EVALUATE
        + """
distributed_evaluation.MENTIONS_AT_ONCE = 4
distributed_evaluation.ENTITIES_IN_MEMORY = 2
encoded_by_all = distributed_evaluation.encoded_by_all
distributed_evaluation.encoded_by_all = lambda *a, **k: encoded_by_all(*a, **k, at_once=4)
ranked = [trainer._rank_by_all(source) for source in (mentions, mentions.to_iterable_dataset())]
metrics = trainer.evaluate(mentions)
few = trainer.rank(mentions.select([4]))  # fewer than processes
assert few.ids == ["val-4"] and str(few.ranks[0]) == str(ranked[0].ranks[4])
import os, torch
torch.distributed.barrier()
result = [[[None if r != r else float(r) for r in item.ranks] for item in ranked],
          ranked[0].ids, ranked[0].kinds, metrics["eval_mrr"], os.listdir("out") if os.path.isdir("out") else []]
"""
    )
    options = {"connect": False, "tests": TESTS, "path": str(trainer.args.output_dir), "known": 7}
    for count in (2, 3):
        for found in run_together(python, count, code, tmp_path / str(count), **options):
            assert found[0] == [wanted, wanted]
            assert found[1:3] == [ranked.ids, ranked.kinds]
            assert found[3] == pytest.approx(ranked.metrics()["mrr"])
            assert not any("index" in name for name in found[4])
    few = {**options, "known": 2}
    one_entity = [found[0] for found in run_together(python, 3, code, tmp_path / "few", **few)]
    assert one_entity[0] == one_entity[1] == one_entity[2]
    assert one_entity[0][0].count(None) < 11


def test_a_failure_in_one_is_the_error_of_all(python: ForkingPython, trainer: MimicTrainer, tmp_path: Path) -> None:
    code = (
        _EVALUATE
        + """
from mimic_el.index_mimic import EntityIndex
if rank == 1:
    def full(*args, **kwargs):
        raise OSError("No space left on device")
    EntityIndex.build = full
trainer.evaluate(mentions)
"""
    )
    options = {"connect": False, "tests": TESTS, "path": str(trainer.args.output_dir), "known": 9}
    outcomes, _ = outcomes_together(python, 2, code, tmp_path / "run", **options)
    assert outcomes[1] == ("error", "OSError: No space left on device")
    assert outcomes[0] == (
        "error",
        "ProcessError: Process 1 of 2 failed in encoding the knowledge base: OSError: No space left on device",
    )


@pytest.mark.parametrize(
    ("point", "count"), [("count_better", 2), ("_arrays_of_all", 3)], ids=["while it works", "in an exchange"]
)
def test_a_process_that_is_killed_is_named(
    python: ForkingPython, trainer: MimicTrainer, tmp_path: Path, point: str, count: int
) -> None:
    """After it has ranked a part of the mentions; the same evaluation again is not disturbed by what it left."""
    code = (
        _EVALUATE
        + """
import os, signal
from mimic_el.index_mimic import EntityIndex
encoded_by_all = distributed_evaluation.encoded_by_all
distributed_evaluation.encoded_by_all = lambda *a, **k: encoded_by_all(*a, **k, at_once=4)
distributed_evaluation.ENTITIES_IN_MEMORY = 2
calls = []
def dying(function):
    def called(*args, **kwargs):
        calls.append(1)
        if dies and rank == 1 and len(calls) == (2 if point == "count_better" else 4):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return called
place = EntityIndex if point == "count_better" else distributed_evaluation
setattr(place, point, dying(getattr(place, point)))
result = trainer.evaluate(mentions)["eval_mrr"]
"""
    )
    options = {"connect": False, "tests": TESTS, "path": str(trainer.args.output_dir), "known": 9, "timeout": 3}
    options["point"] = point
    outcomes, output = outcomes_together(python, count, code, tmp_path / "killed", dies=True, **options)
    assert outcomes[1] == ("killed", None)
    for kind, message in outcomes[::2]:
        assert kind == "error", output
        assert message.startswith(f"ProcessError: Process 1 of {count} gave no sign of life for"), output
    if count == 2:
        again = run_together(python, count, code, tmp_path / "again", dies=False, **options)
        mentions = toy_data.mention_dataset("val", 11)
        model: Any = trainer.model
        processor: Any = trainer.processing_class
        whole = MimicTrainer(model, trainer.args, entities=toy_data.entities(), processing_class=processor)
        assert again == [pytest.approx(whole.rank(mentions).metrics()["mrr"])] * 2


def test_records_between_are_read_by_number() -> None:
    records = [{"id": str(number)} for number in range(10)]
    between = RecordsBetween(records, slice(3, 7))
    assert [record["id"] for record in between] == ["3", "4", "5", "6"]
    assert [record["id"] for record in between[1:3]] == ["4", "5"]
    with pytest.raises(IndexError):
        between[4]

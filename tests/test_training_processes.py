"""Tests of training by several processes: MimicTrainer end to end, what is refused, and how a failure ends all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import outcomes_together, run_together
from python_processes import ForkingPython, own_python

from mimic_el.training.arguments import MimicTrainingArguments
from mimic_el.training.callbacks import batch_note
from mimic_el.training.processes import refuse_other_engines

TESTS = str(Path(__file__).parent)

# The weights that a Trainer leaves of the toy data: 39 mentions, batches of 16, so that the last has 7.
_TRAIN = """
import copy, sys, warnings
warnings.filterwarnings("ignore", ".gradient_checkpointing. is deprecated")
sys.path.insert(0, tests)
import torch, toy_data
from transformers import set_seed
from mimic_el import MimicTrainer, MimicTrainingArguments
from mimic_el.training.arguments import ModelArguments
from mimic_el.training.data import StreamedMentions
from mimic_el.training.start import build_model

set_seed(0)
knowledge_base = toy_data.knowledge_base()
parts = ModelArguments(from_scratch=True, clip_config=toy_data.CLIP_CONFIG, text_max_length=16, vocab_size=600,
                       **toy_data.SIZES)
model, processor = build_model(parts, toy_data.mentions("train", 39), knowledge_base)
result = {}
for name, options in runs.items():
    options = dict(options)
    train = toy_data.mention_dataset("train", 39)
    if options.pop("stream", False):
        train = StreamedMentions(train.to_iterable_dataset(), knowledge_base, 39, 8, 43)
    args = MimicTrainingArguments(
        output_dir=f"{results}/{name}", use_cpu=True, ddp_backend="gloo", report_to="none", save_strategy="no",
        eval_strategy="no", load_best_model_at_end=False, disable_tqdm=True, learning_rate=1e-2, max_grad_norm=1.0,
        num_train_epochs=2, optim="sgd", **options)
    own = copy.deepcopy(model)  # DistributedDataParallel leaves hooks on it
    trainer = MimicTrainer(own, args, entities=knowledge_base, processing_class=processor, train_dataset=train)
    trainer.collator.random_images = False
    trainer.train()
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    torch.save(state, f"{results}/{name}-{rank}.pt")
    result[name] = [trainer.state.global_step, [row["loss"] for row in trainer.state.log_history if "loss" in row]]
"""


@pytest.fixture(scope="module")
def python(hub: Any) -> ForkingPython:
    return own_python(hub)


def test_trainers_of_several_processes_leave_the_weights_of_one(python: ForkingPython, tmp_path: Path) -> None:
    each = {"per_device_train_batch_size": 16, "logging_steps": 1}
    half = {"per_device_train_batch_size": 8, "logging_steps": 1}
    alone = {
        "plain": each,
        "stream": {**each, "stream": True},
        "accumulated": {**half, "gradient_accumulation_steps": 2},
        "cached": {**each, "cached_batch_size": 5, "gradient_checkpointing": True},
    }
    together = {
        "plain": half,
        "stream": {**half, "stream": True},
        "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "cached": {**half, "cached_batch_size": 5, "gradient_checkpointing": True},
    }
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    [reference] = run_together(
        python, 1, _TRAIN, tmp_path / "a", connect=False, tests=TESTS, runs=alone, results=str(one)
    )
    found = run_together(python, 2, _TRAIN, tmp_path / "b", connect=False, tests=TESTS, runs=together, results=str(two))
    for name, (steps, losses) in reference.items():
        assert found[0][name][0] == steps == 6  # two epochs of batches of 16, 16 and 7, or two times 8, 8, 7
        wanted = torch.load(one / f"{name}-0.pt")
        for rank in range(2):
            assert found[rank][name][1] in ([], pytest.approx(losses, rel=1e-4))  # only the first process logs
            for key, value in torch.load(two / f"{name}-{rank}.pt").items():
                torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=1e-6, msg=f"{name}, {key}")
    plain, cached = torch.load(one / "plain-0.pt"), torch.load(one / "cached-0.pt")
    for key, value in plain.items():
        torch.testing.assert_close(cached[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_slow_failing_and_killed_processes(python: ForkingPython, tmp_path: Path) -> None:
    """Waiting has no limit of time, the error of one is that of all, and what was killed is not waited for."""
    code = """
        import os, signal, time
        from datetime import timedelta
        import torch
        from torch import distributed as dist
        from mimic_el.training import processes
        dist.init_process_group("gloo", rank=rank, world_size=count, timeout=timedelta(seconds=1))
        processes._PULSE = 0.05

        def slow():
            time.sleep(2.0 if rank == 1 else 0.0)
            return rank

        result = [processes.all_of_them("slow work", slow)]
        def failing():
            if rank == 1:
                raise ValueError("no such thing")
        try:
            processes.all_of_them("failing work", failing)
        except Exception as error:
            result.append(f"{type(error).__name__}: {error}")
        def killed():
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        try:
            processes.all_of_them("fatal work", killed, silence=0.5)
        except processes.ProcessError as error:
            result.append(str(error))
    """
    outcomes, output = outcomes_together(python, 2, code, tmp_path, connect=False)
    assert outcomes[1] == ("killed", None)
    assert outcomes[0][0] == "result", output
    done, failed, silent = outcomes[0][1]
    assert done == 0
    assert failed == "ProcessError: Process 1 of 2 failed in failing work: ValueError: no such thing"
    assert "Process 1 of 2 gave no sign of life" in silent


def test_different_data_is_refused_in_all_processes(python: ForkingPython, tmp_path: Path) -> None:
    code = """
        import sys
        sys.path.insert(0, tests)
        import toy_data
        from mimic_el.training.processes import check_same_data
        knowledge_base = toy_data.knowledge_base()
        check_same_data(knowledge_base, toy_data.mention_dataset("train", 9))
        result = "same"
        check_same_data(knowledge_base, toy_data.mention_dataset("train" if rank else "test", 9))
    """
    outcomes, _ = outcomes_together(python, 2, code, tmp_path, tests=TESTS)
    assert [kind for kind, _ in outcomes] == ["error", "error"]
    assert all("Process 1 has other mentions or entities than process 0" in message for _, message in outcomes)


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_engines_that_cut_up_parameters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    args = MimicTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    refuse_other_engines(args)
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        refuse_other_engines(args)


def test_the_log_says_what_a_step_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def note(count: int, **options: Any) -> str:
        monkeypatch.setattr(MimicTrainingArguments, "world_size", count)
        return batch_note(MimicTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options))

    assert note(1) == "1 process, 128 mentions in a batch."
    assert note(2) == (
        "2 processes, 128 mentions in a batch, 64 at most in each; the negatives are the entities of all processes."
    )
    assert "3 processes, 128 mentions in a batch, 43 at most in each" in note(3)
    own = note(2, per_device_train_batch_size=128, gather_negatives=False, gradient_accumulation_steps=4)
    assert "256 mentions in a batch, 128 at most in each; the negatives are the entities of the mention's own" in own
    assert "gradients of 4 batches are added up, which adds no negatives" in own
    assert note(1, cached_batch_size=16, hard_negatives=2).endswith(
        "encoded 16 at a time; 2 hard negatives for each mention from epoch 3 on."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cached_batch_size": 0}, "cached_batch_size must be at least 1"),
        ({"hard_negatives": -1}, "hard_negatives must not be negative"),
        ({"hard_negatives_epochs": 0}, "hard_negatives_epochs must be at least 1"),
        ({"hard_negatives": 1, "dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "outlive an epoch"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MimicTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)

"""Tests of training by several processes: MimicTrainer end to end, what is refused, and how a failure ends all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy_data
from gloo import outcomes_together, run_together
from python_processes import ForkingPython, own_python
from transformers import set_seed

from mimic_el.training import processes
from mimic_el.training.arguments import MimicTrainingArguments, ModelArguments
from mimic_el.training.callbacks import batch_note
from mimic_el.training.processes import check_enough, check_launch
from mimic_el.training.resume import fault_of
from mimic_el.training.start import build_model

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


# Six steps with a checkpoint after each second one, in which a process may be killed at a point of the fourth.
_KILLED = """
import os, signal, sys, warnings
warnings.filterwarnings("ignore", ".gradient_checkpointing. is deprecated")
sys.path.insert(0, tests)
import torch, toy_data
from transformers import TrainerCallback
from mimic_el import MimicModel, MimicProcessor, MimicTrainer, MimicTrainingArguments
from mimic_el.training import gather, grad_cache, trainer as trainers

class AtStep(TrainerCallback):
    step = 0
    def on_step_begin(self, args, state, control, **kwargs):
        AtStep.step = state.global_step

def end(*_):
    if AtStep.step == 3 and rank == victim:
        if fault == "full":
            raise OSError(28, "No space left on device")
        os.kill(os.getpid(), signal.SIGSTOP if fault == "stopped" else signal.SIGKILL)

def fails_first(module, name):
    function = getattr(module, name)
    def failing(*args, **kwargs):
        end()
        return function(*args, **kwargs)
    setattr(module, name, failing)

if point == "gather of negatives":
    fails_first(gather, "_gathered_rows")
elif point == "gradients of features":
    fails_first(grad_cache, "summed_rows")
elif point == "checkpoint":
    fails_first(trainers.MimicTrainer, "_save_checkpoint")
result = {}
for name, options in runs.items():
    model, processor = MimicModel.from_pretrained(start), MimicProcessor.from_pretrained(start)
    args = MimicTrainingArguments(
        output_dir=f"{results}/{name}", use_cpu=True, ddp_backend="gloo", ddp_timeout=timeout, report_to="none",
        save_strategy="steps", save_steps=2, eval_strategy="no", load_best_model_at_end=False, disable_tqdm=True,
        learning_rate=1e-2, max_steps=6, per_device_train_batch_size=5, **options)
    trainer = MimicTrainer(model, args, entities=toy_data.knowledge_base(), processing_class=processor,
                           train_dataset=toy_data.mention_dataset("train", 25), callbacks=[AtStep()])
    if point == "all-reduce":
        [parameter for parameter in model.parameters() if parameter.requires_grad][-1].register_hook(end)
    trainer.train(resume_from_checkpoint=resume)
    torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), f"{results}/{name}-{rank}.pt")
    result[name] = trainer.state.global_step
"""

_GONE = "Process {0} of {1} gave no sign of life for"
_KEEPER = "Process 0 of {1}, which keeps the processes in touch, is gone, in training"
_OPTIONS: dict[str, dict[str, Any]] = {"plain": {}, "cached": {"cached_batch_size": 3}}


@pytest.fixture(scope="module")
def undisturbed(python: ForkingPython, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the tests of killed processes share: the model to start from, and the weights that should come out."""
    folder = tmp_path_factory.mktemp("undisturbed")
    set_seed(0)
    parts = ModelArguments(
        from_scratch=True, clip_config=toy_data.CLIP_CONFIG, text_max_length=16, vocab_size=600, **toy_data.SIZES
    )
    for made in build_model(parts, toy_data.mentions("train", 20), toy_data.knowledge_base()):
        made.save_pretrained(folder / "start")
    given = {
        "tests": TESTS,
        "start": str(folder / "start"),
        "victim": None,
        "fault": "",
        "point": "",
        "resume": None,
        "timeout": 10,
    }
    together = {"connect": False, **given}
    run_together(python, 2, _KILLED, folder / "run", runs=_OPTIONS, results=str(folder), **together)
    return {**together, "weights": {name: torch.load(folder / f"{name}-0.pt") for name in _OPTIONS}}


@pytest.mark.parametrize(
    ("name", "point", "count", "victim", "fault", "told"),
    [
        ("plain", "gather of negatives", 3, 1, "killed", _GONE),
        ("plain", "all-reduce", 2, 0, "killed", _KEEPER),
        ("plain", "all-reduce", 2, 1, "stopped", _GONE),
        ("cached", "gradients of features", 2, 1, "killed", _GONE),
        ("plain", "checkpoint", 2, 0, "full", "Process 0 of 2 failed in training: OSError: [Errno 28] No space left"),
    ],
    ids=["killed-in-gather", "killed-main-process", "stopped", "killed-in-cached-step", "disk-full-in-checkpoint"],
)
def test_a_process_that_ends_in_a_step_is_named_and_training_goes_on(
    python: ForkingPython,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    name: str,
    point: str,
    count: int,
    victim: int,
    fault: str,
    told: str,
) -> None:
    """Nobody waits for ever; the same command goes on from the last checkpoint and leaves the same weights."""
    weights = {**undisturbed}.pop("weights")[name]
    given = {key: value for key, value in undisturbed.items() if key != "weights"}
    given |= {"runs": {name: _OPTIONS[name]}, "results": str(tmp_path)}
    # What was stopped keeps its connections.
    failing = {**given, "victim": victim, "fault": fault, "point": point, "timeout": 5 if fault == "stopped" else 10}
    outcomes, output = outcomes_together(python, count, _KILLED, tmp_path / "killed", limit=30, **failing)
    expected = {"killed": "killed", "stopped": "hangs", "full": "error"}[fault]
    for rank, (kind, message) in enumerate(outcomes):
        assert kind == (expected if rank == victim else "error"), f"{outcomes}\n{output}"
        if rank != victim:
            assert message.startswith("ProcessError: " + told.format(victim, count)), outcomes
            assert fault == "full" or "The same command" in message or "Run the same command again" in message
    checkpoint = tmp_path / name / "checkpoint-2"
    assert fault_of(checkpoint) is None
    assert not (tmp_path / name / "checkpoint-4").exists()
    if fault == "killed" and count == 2:
        again = run_together(python, 2, _KILLED, tmp_path / "again", **{**given, "resume": str(checkpoint)})
        assert again == [{name: 6}] * 2
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}-{rank}.pt")
            for key, value in weights.items():
                torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=key)


def test_what_processes_do_not_share_is_refused_in_all(
    python: ForkingPython, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """Other mentions, as many of them too; another knowledge base; other options; fewer mentions than processes."""
    code = """
        import os, sys
        sys.path.insert(0, tests)
        import toy_data
        from mimic_el import MimicModel, MimicProcessor, MimicTrainer, MimicTrainingArguments
        model, processor = MimicModel.from_pretrained(start), MimicProcessor.from_pretrained(start)

        def attempt(what, mentions=9, entities=9, checkpoint=None, **options):
            options = {"output_dir": "out", "use_cpu": True, "ddp_backend": "gloo", "report_to": "none", "max_steps": 1,
                       "eval_strategy": "no", "load_best_model_at_end": False, "disable_tqdm": True, **options}
            args = MimicTrainingArguments(**options)
            known = toy_data.entities()
            data = toy_data.mention_dataset("train", mentions)
            data = data if what == "train" else data.select([*range(1, 9), 0] if rank else range(9))
            trainer = MimicTrainer(model, args, entities=known[9 - entities :], processing_class=processor,
                                   train_dataset=data)
            try:
                trainer.train(checkpoint) if what == "train" else trainer.rank(data)
            except ValueError as error:
                result.append(str(error))

        result = []
        attempt("train", mentions=9 + rank)
        attempt("rank")
        attempt("train", entities=9 - rank)
        attempt("train", learning_rate=1e-3 * (1 + rank))
        attempt("train", mentions=1)
        # A machine that does not share the output directory sees no checkpoint there, or another.
        os.makedirs(f"own-{rank}/checkpoint-{5 + rank}")
        attempt("train", checkpoint=None if rank else "elsewhere/checkpoint-5")
        attempt("train", checkpoint=True, output_dir=f"own-{rank}")
        model.config.symmetric_loss = bool(rank)
        attempt("train")
    """
    for found in run_together(python, 2, code, tmp_path, connect=False, tests=TESTS, start=undisturbed["start"]):
        others = "Process 1 has other mentions or entities than process 0. All processes must read the same data"
        assert [message[: len(others)] for message in found[:3]] == [others] * 3
        assert found[3].startswith("Process 1 of 2 has another value of learning_rate than process 0: 0.002, not 0.001")
        assert found[4] == "2 processes cannot share 1 training mention: start 1 at most."
        assert found[5].startswith("Process 1 of 2 goes on from the beginning, process 0 from checkpoint-5. The output")
        assert found[6].startswith("Process 1 of 2 goes on from checkpoint-6, process 0 from checkpoint-5. The output")
        assert found[7].startswith(
            "Process 1 of 2 has another value of the model's symmetric_loss than process 0: True"
        )
        assert len(found) == 8


def test_more_processes_than_mentions_in_a_batch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "process_count", lambda: 200)
    check_enough(200, range(200))
    with pytest.raises(ValueError, match="200 processes cannot share a batch of 128 mentions: start 128 at most"):
        check_enough(128, range(1000))


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_engines_that_cut_up_parameters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    args = MimicTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    check_launch(args)
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        check_launch(args)


def test_what_no_batch_of_mentions_can_be_dealt_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Their length; and processes of srun that would each be the only one."""
    args = MimicTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    check_launch(args)
    assert not caplog.messages
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    check_launch(args)
    assert "srun has started 4 processes, and each trains alone" in caplog.text
    args.train_sampling_strategy = "group_by_length"
    with pytest.raises(ValueError, match="cannot be grouped by length"):
        check_launch(args)


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

"""Tests of training/resume.py: a checkpoint counts only if its files are whole."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mimic_el.training.arguments import MimicTrainingArguments
from mimic_el.training.hard_negatives import TABLE
from mimic_el.training.resume import checkpoint_to_resume, fault_of


def checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    save_file({"weight": torch.zeros(100)}, directory / "model.safetensors")
    torch.save({"state": torch.zeros(100)}, directory / "optimizer.pt")
    for name in ("training_args.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth"):
        torch.save({"state": torch.zeros(100)}, directory / name)
    for name in ("trainer_state.json", "config.json", "tokenizer.json", "processor_config.json"):
        (directory / name).write_text(json.dumps({"global_step": 1}))
    index = {"weight_map": {"weight": "model.safetensors", "bias": "model-2.safetensors"}}
    save_file({"bias": torch.zeros(100)}, directory / "model-2.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    np.save(directory / TABLE, np.zeros(100))
    return directory


@pytest.mark.parametrize("left", [0.5, 0.0])
@pytest.mark.parametrize(
    "name",
    [
        *("trainer_state.json", "config.json", "tokenizer.json", "processor_config.json"),
        *("model.safetensors", "model-2.safetensors", "model.safetensors.index.json", TABLE, "optimizer.pt"),
        *("scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth", "training_args.bin"),
    ],
)
def test_a_cut_file_is_named_and_the_checkpoint_before_is_taken(
    tmp_path: Path, name: str, left: float, caplog: pytest.LogCaptureFixture
) -> None:
    whole, cut = checkpoint(tmp_path / "checkpoint-5"), checkpoint(tmp_path / "checkpoint-10")
    assert fault_of(cut) is None
    data = (cut / name).read_bytes()
    (cut / name).write_bytes(data[: int(len(data) * left)])
    args: Any = MimicTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert checkpoint_to_resume(args) == str(whole)
    assert name in caplog.text
    args.resume_from_checkpoint = str(cut)
    with pytest.raises(ValueError, match=name):
        checkpoint_to_resume(args)


WRONG_STEPS: list[Any] = ["1", True, -1, 1.5, None, float("nan"), 10**400]
WRONG_LOGS: list[Any] = [5, {}, [1], "x"]


@pytest.mark.parametrize(
    "changes",
    [
        *({"global_step": value} for value in WRONG_STEPS),
        *({"log_history": value} for value in WRONG_LOGS),
        *({"stateful_callbacks": []}, {"best_metric": "0.5"}, {"best_model_checkpoint": 5}, {"epoch": []}),
        {"a field of tomorrow": 1},
        [{"global_step": 1}],
    ],
    ids=str,
)
def test_states_that_no_training_can_go_on_with(changes: Any, tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "checkpoint-5")
    state = {"global_step": 1, "epoch": 0.5, "best_metric": None, "log_history": [{"loss": 1.0}]}
    (made / "trainer_state.json").write_text(json.dumps(state))
    assert fault_of(made) is None
    (made / "trainer_state.json").write_text(json.dumps(changes if isinstance(changes, list) else {**state, **changes}))
    told = "holds no mapping" if isinstance(changes, list) else next(iter(changes))
    assert told in str(fault_of(made))


@pytest.mark.parametrize("name", ["trainer_state.json", "config.json", "optimizer.pt", "model.safetensors", TABLE])
def test_a_named_pipe_and_what_is_nested_too_deeply(name: str, tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "checkpoint-5")
    if name.endswith(".json"):
        (made / name).write_text("[" * 100_000)
        assert f"its {name} cannot be read (it is nested too deeply)" == fault_of(made)
    (made / name).unlink()
    os.mkfifo(made / name)
    assert name in str(fault_of(made))


def test_a_checkpoint_that_lacks_one_of_the_files_of_its_weights(tmp_path: Path) -> None:
    lacking = checkpoint(tmp_path / "checkpoint-5")
    (lacking / "model-2.safetensors").unlink()
    assert fault_of(lacking) == "it lacks its model-2.safetensors"

"""Tests of training/resume.py: a checkpoint counts only if its files are whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mimic_el.training.arguments import MimicTrainingArguments
from mimic_el.training.resume import checkpoint_to_resume, fault_of


def checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    save_file({"weight": torch.zeros(100)}, directory / "model.safetensors")
    torch.save({"state": torch.zeros(100)}, directory / "optimizer.pt")
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    return directory


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt"])
def test_a_cut_file_is_named_and_the_checkpoint_before_is_taken(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, cut = checkpoint(tmp_path / "checkpoint-5"), checkpoint(tmp_path / "checkpoint-10")
    assert fault_of(cut) is None
    data = (cut / name).read_bytes()
    (cut / name).write_bytes(data[: len(data) // 2])
    args: Any = MimicTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert checkpoint_to_resume(args) == str(whole)
    assert name in caplog.text
    args.resume_from_checkpoint = str(cut)
    with pytest.raises(ValueError, match=name):
        checkpoint_to_resume(args)

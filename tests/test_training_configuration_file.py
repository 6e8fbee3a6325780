"""Configuration files of trainings: what may come from anywhere is read within limits, and what is wrong is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from mimic_el import train

FILES: dict[str, bytes] = {
    "is nested too deeply": b"output_dir: " + b"[" * 2000,
    "cannot be read: .*utf-8": b"output_dir: caf\xe9",
    "cannot be read: .*digits": b"seed: " + b"1" * 5000,
    "cannot be read: .*more than 1,048,576 bytes": b"output_dir: " + b"x" * 2**20,
    "must hold a mapping": b"",
    "is neither YAML nor JSON": b"output_dir: !!python/object/apply:os.system ['true']",
    "there is no option": b"1: 2",
}


@pytest.mark.parametrize("told", FILES)
def test_files_that_cannot_be_taken(told: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(FILES[told])
    with pytest.raises(ValueError, match=rf"c\.yaml.*{told}"):
        train.parse_args([str(path)])


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.yaml")
    with pytest.raises(ValueError, match=r"c\.yaml cannot be read: .* not a regular file"):
        train.parse_args([str(tmp_path / "c.yaml")])


WRONG: list[tuple[str, Any]] = [
    *[("output_dir", value) for value in ([1], {"a": 1}, True)],
    *[("num_train_epochs", value) for value in ([2], True, {"x": 2})],
    *[("seed", value) for value in (1.5, [1], False)],
    *[("from_scratch", value) for value in ({"a": 1}, 2, [True])],
    ("lr_scheduler_type", {"x": "cosine"}),
    ("dataset_name", ["a", "b"]),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_values_of_another_kind(name: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "out", "from_scratch": True, "dataset_name": "x", name: value}))
    with pytest.raises(ValueError, match=rf"c\.yaml: `{name}` must be|SchedulerType"):
        train.parse_args([str(path)])


def test_values_as_yaml_has_them(tmp_path: Path) -> None:
    text = (
        "\ufeffoutput_dir: 2001-01-01\nrun_name: 5\nlearning_rate: 1e-5\nnum_train_epochs: 3\nbackbone: x\n"
        "dataset_name: x\nlr_scheduler_kwargs: {a: 1}\nuse_cpu: true\nreport_to: [none]\nwarmup_steps: 0.1\n"
    )
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    model, _, args = train.parse_args([str(tmp_path / "c.yaml")])
    assert (args.output_dir, args.run_name, args.learning_rate) == ("2001-01-01", "5", 1e-5)
    assert (args.num_train_epochs, args.lr_scheduler_kwargs, model.backbone) == (3, {"a": 1}, "x")
    assert args.warmup_steps == 0.1

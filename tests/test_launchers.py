"""Tests of the lines of docs/training.md and docs/scale.md that start several processes.

`accelerate launch` itself starts those that train; it uses the launcher that torchrun is. What they do under it is
tested in processes that are started with the same variables of the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import toy_data
import yaml
from gloo import outcomes_together
from python_processes import own_python
from tiny import knowledge_base, tiny_processor
from tiny_clip import tiny_model

from mimic_el.index_mimic import EntityIndex
from mimic_el.training.resume import fault_of

ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


def test_accelerate_launch_trains(tmp_path: Path) -> None:
    data = toy_data.write_dataset(tmp_path / "data", train=toy_data.mentions("train", 8))
    settings = {"dataset_name": str(data), "from_scratch": True, "clip_config": toy_data.CLIP_CONFIG, "vocab_size": 600}
    settings |= {"text_max_length": 16, **toy_data.SIZES, "use_cpu": True, "per_device_train_batch_size": 2}
    settings |= {"max_steps": 2, "report_to": "none", "eval_strategy": "no", "load_best_model_at_end": False}
    settings |= {"output_dir": "out", "disable_tqdm": True}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    run = subprocess.run(
        [sys.executable, "-m", *ACCELERATE, "-m", "mimic_el.train", "c.yaml"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stdout
    assert "2 processes, 4 mentions in a batch, 2 at most in each; the negatives are the entities of all" in run.stdout
    assert fault_of(tmp_path / "out" / "checkpoint-2") is None
    assert len(EntityIndex.from_pretrained(tmp_path / "out" / "index")) == 9


def test_two_processes_of_the_command_line_build_one_index(hub: Any, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model).save_pretrained(tmp_path / "model")
    entities = [{name: entity[name] for name in ("id", "name", "description")} for entity in knowledge_base(5)]
    (tmp_path / "entities.jsonl").write_text("".join(json.dumps(entity) + "\n" for entity in entities))
    places = {name: str(tmp_path / name) for name in ("model", "index")}
    command = ["index", "build", "--entities", str(tmp_path / "entities.jsonl"), "--device", "cpu"]
    command += ["--model", places["model"], "--output_dir", places["index"]]
    code = """
        from mimic_el import cli
        result = cli.main(command)
    """
    outcomes, output = outcomes_together(own_python(hub), 2, code, tmp_path / "run", connect=False, command=command)
    assert outcomes == [("result", 0)] * 2, output
    assert output.count(f"Wrote 5 entities to {places['index']}.") == 1
    index = EntityIndex.from_pretrained(tmp_path / "index")
    assert list(index) == [entity["id"] for entity in entities]
    index.verify()

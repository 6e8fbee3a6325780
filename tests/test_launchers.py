"""Tests of the lines of docs/training.md and docs/scale.md that start several processes, by the launchers themselves.

That `torchrun` trains is tested in test_train.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import toy_data
import yaml
from tiny import knowledge_base, tiny_processor
from tiny_clip import tiny_model

from mimic_el.index_mimic import EntityIndex
from mimic_el.training.resume import fault_of

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )


def test_accelerate_launch_trains_and_torchrun_builds(tmp_path: Path) -> None:
    """Side by side, since most of what they take is to import the libraries."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model).save_pretrained(tmp_path / "model")
    entities = [{name: entity[name] for name in ("id", "name", "description")} for entity in knowledge_base(5)]
    (tmp_path / "entities.jsonl").write_text("".join(json.dumps(entity) + "\n" for entity in entities))
    data = toy_data.write_dataset(tmp_path / "data", train=toy_data.mentions("train", 8))
    settings = {"dataset_name": str(data), "from_scratch": True, "clip_config": toy_data.CLIP_CONFIG, "vocab_size": 600}
    settings |= {"text_max_length": 16, **toy_data.SIZES, "use_cpu": True, "per_device_train_batch_size": 2}
    settings |= {"max_steps": 2, "report_to": "none", "eval_strategy": "no", "load_best_model_at_end": False}
    settings |= {"output_dir": "out", "disable_tqdm": True}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))

    build = ("index", "build", "--model", "model", "--entities", "entities.jsonl", "--output_dir", "index")
    programs = [
        start(tmp_path, *ACCELERATE, "-m", "mimic_el.train", "c.yaml"),
        start(tmp_path, *TORCHRUN, "-m", "mimic_el.cli", *build, "--device", "cpu"),
    ]
    try:
        trained, built = [program.communicate(timeout=200)[0] for program in programs]
    finally:
        for program in programs:
            program.kill()
    assert [program.returncode for program in programs] == [0, 0], f"{trained}\n{built}"

    assert "2 processes, 4 mentions in a batch, 2 at most in each; the negatives are the entities of all" in trained
    assert fault_of(tmp_path / "out" / "checkpoint-2") is None
    assert len(EntityIndex.from_pretrained(tmp_path / "out" / "index")) == 9
    assert built.count("Wrote 5 entities to index.") == 1
    index = EntityIndex.from_pretrained(tmp_path / "index")
    assert list(index) == [entity["id"] for entity in entities]
    index.verify()

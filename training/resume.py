"""Which checkpoint a training goes on from, judged by the files in its directory. Loads no model."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files_mimic import read_json
from .arguments import MimicTrainingArguments
from .data import MISSING_LOG
from .hard_negatives import TABLE
from .upload import INDEX_FOLDER

logger = logging.getLogger("mimic_el.train")


UNREADABLE_LOG = "unreadable_images.jsonl"
STATE = "trainer_state.json"
_WHOLE = ("global_step", "max_steps")
_OTHER_KINDS: dict[str, type] = {
    "stateful_callbacks": dict,
    "trial_params": dict,
    "best_model_checkpoint": str,
    "trial_name": str,
    "is_local_process_zero": bool,
    "is_world_process_zero": bool,
    "is_hyper_param_search": bool,
}
_SAVED_BY_TORCH = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "training_args.bin")


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; `None` if all that training needs is there and whole."""
    if not (checkpoint / STATE).is_file():
        return f"it has no {STATE}"
    for path in sorted(checkpoint.iterdir()):
        if not path.is_dir() and not path.is_file():  # reading a named pipe would wait for ever
            return f"its {path.name} is not a regular file"
    read: dict[str, Any] = {}
    for path in sorted(checkpoint.glob("*.json")):
        try:
            read[path.name] = read_json(path)
        except (OSError, ValueError) as error:
            return f"its {path.name} cannot be read ({error})"
    if wrong := _wrong_in_state(read[STATE]):
        return f"its {STATE} {wrong}"
    for name in sorted(_shards(read.get("model.safetensors.index.json"))):
        if not (checkpoint / name).is_file():
            return f"it lacks its {name}"
    weights = sorted(checkpoint.glob("*.safetensors"))
    if not weights:
        return "it has no weights (*.safetensors)"
    for path in weights:
        try:
            with safe_open(path, framework="np"):  # compares the header with the file's size
                pass
        except (OSError, SafetensorError) as error:
            return f"its {path.name} is not whole ({error})"
    for path in sorted(path for pattern in _SAVED_BY_TORCH for path in checkpoint.glob(pattern)):
        # The end of a zip archive lists what is in it: a file that was cut has none.
        if not zipfile.is_zipfile(path):
            return f"its {path.name} is not whole"
    try:
        if (checkpoint / TABLE).exists():
            np.load(checkpoint / TABLE, mmap_mode="r")  # compares the header with the file's size
    except (OSError, ValueError, EOFError) as error:
        return f"its {TABLE} is not whole ({error})"
    return None


def _wrong_in_state(state: Any) -> str | None:
    """What keeps a Trainer from going on with a state; `None` if nothing does."""
    if not isinstance(state, dict):
        return "holds no mapping"
    fields = dataclasses.fields(TrainerState)
    kinds = {field.name: field.type.__name__ if isinstance(field.type, type) else str(field.type) for field in fields}
    if unknown := sorted(state.keys() - kinds):
        return f"has {unknown[0]!r:.60}, which this version of transformers does not know"
    for name, value in state.items():
        kind = kinds[name]
        if value is None and ("None" in kind or name == "log_history"):
            continue
        # A bool is an int to Python, and JSON has numbers that are none.
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63
        if kind.startswith(("int", "float")):
            fits = is_number and (name not in _WHOLE or (isinstance(value, int) and value >= 0))
        elif name == "log_history":
            fits = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
        else:
            fits = isinstance(value, _OTHER_KINDS.get(name, object))
        if not fits:
            return f"has a `{name}` that is none"
    return None


def _shards(index: Any) -> set[str]:
    """The files that hold a model's weights, as the list of a model in several files names them."""
    places = index.get("weight_map") if isinstance(index, dict) else None
    return {str(name) for name in places.values()} if isinstance(places, dict) else set()


def checkpoint_to_resume(args: MimicTrainingArguments, overwrite: bool = False) -> str | None:
    """The checkpoint from which training goes on, `None` for a new training.

    That is `resume_from_checkpoint` where it is given, else the last complete checkpoint in the output directory.

    Raises:
        ValueError: if the output directory holds a finished training, or there is no such checkpoint.
    """
    directory = Path(args.output_dir or ".")
    checkpoints = sorted(
        (path for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    results = [*directory.glob("*_results.json"), *directory.glob("predictions_*.jsonl"), directory / MISSING_LOG]
    if overwrite:
        for path in [*checkpoints, directory / INDEX_FOLDER]:
            shutil.rmtree(path, ignore_errors=True)
        for path in [*results, directory / UNREADABLE_LOG]:
            path.unlink(missing_ok=True)
        return None
    wanted = args.resume_from_checkpoint
    faults = {path: fault_of(path) for path in checkpoints}
    complete = [path for path in checkpoints if faults[path] is None]
    if wanted is not None and wanted.lower() not in ("last", "true"):
        fault = fault_of(Path(wanted))
        if fault is not None:
            raise ValueError(f"{wanted} is not a complete checkpoint of a training: {fault}.")
        return wanted
    if wanted is None and (directory / "train_results.json").is_file():
        raise ValueError(
            f"{directory} holds a finished training. Give another --output_dir, or --overwrite_output_dir to delete "
            "it, or --resume_from_checkpoint last to train it further."
        )
    if wanted is not None and not complete:
        raise ValueError(f"There is no complete checkpoint in {directory} to go on from.")
    for path in checkpoints:
        if path not in complete:
            logger.warning("%s is not complete and is left out of account: %s.", path, faults[path])
    return str(complete[-1]) if complete else None

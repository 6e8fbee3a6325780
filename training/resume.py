"""Which checkpoint a training goes on from, judged by the files in its directory. It loads no model."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .arguments import MimicTrainingArguments
from .data import MISSING_LOG
from .trainer import INDEX_FOLDER

logger = logging.getLogger("mimic_el.train")


UNREADABLE_LOG = "unreadable_images.jsonl"


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
    # The state is written last: without it the checkpoint is not complete.
    complete = [path for path in checkpoints if (path / "trainer_state.json").is_file()]
    if wanted is not None and wanted.lower() not in ("last", "true"):
        if not (Path(wanted) / "trainer_state.json").is_file():
            raise ValueError(f"{wanted} is no complete checkpoint of a training: it has no trainer_state.json.")
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
            logger.warning("%s is not complete and is left out of account.", path)
    return str(complete[-1]) if complete else None

"""What happens at the steps and epochs of a training: the callbacks of [`MimicTrainer`]. Knows no model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .arguments import MimicTrainingArguments
from .hard_negatives import TABLE, MentionsWithNegatives

logger = logging.getLogger("mimic_el.train")


class EvaluateEveryFewEpochs(TrainerCallback):
    """Leaves out the evaluations that `eval_strategy="epoch"` asks for except every `epochs`-th and the last."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.eval_strategy == "epoch" and state.global_step < state.max_steps:
            control.should_evaluate &= round(state.epoch or 0) % self.epochs == 0


class SessionTime(TrainerCallback, ExportableState):
    """Keeps in each checkpoint how many seconds training took up to it, so that sessions can be added up."""

    def __init__(self) -> None:
        self.before = 0.0
        self._start: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start = time.monotonic()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: under `before`, the seconds of all sessions so far."""
        now = 0.0 if self._start is None else time.monotonic() - self._start
        return {"args": {}, "attributes": {"before": self.before + now}}


class RefreshHardNegatives(TrainerCallback):
    """Has the hard negatives searched anew when an epoch begins, after every so many, and keeps them in checkpoints."""

    def __init__(self, search: Callable[[], np.ndarray], mentions: MentionsWithNegatives, epochs: int) -> None:
        self.search, self.mentions, self.epochs = search, mentions, epochs

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch = round(state.epoch or 0)
        # In the middle of an epoch, after an interruption, those of the checkpoint are still good.
        if epoch and epoch % self.epochs == 0 and abs(epoch - (state.epoch or 0)) < 1e-6:
            self.mentions.table = self.search()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.mentions.table is not None and args.should_save:
            folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            np.save(folder / TABLE, self.mentions.table)


class BatchNote(TrainerCallback):
    """Says in the log what a step is: how many processes, and what a mention's negatives are."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.should_log:
            logger.info("%s", batch_note(args))


def batch_note(args: TrainingArguments) -> str:
    """What a step is, in words."""
    each, count = args.per_device_train_batch_size, args.world_size
    total = args.batch_of_all(each) if isinstance(args, MimicTrainingArguments) else each * count
    processes = "1 process" if count == 1 else f"{count} processes"
    note = f"{processes}, {total} mentions in a batch"
    if count > 1:
        gather = getattr(args, "gather_negatives", False)
        note += f", {each} at most in each; the negatives are the entities of "
        note += "all processes" if gather else "the mention's own process"
    if args.gradient_accumulation_steps > 1:
        note += f"; gradients of {args.gradient_accumulation_steps} batches are added up, which adds no negatives"
    if chunk := getattr(args, "cached_batch_size", None):
        note += f"; encoded {chunk} at a time"
    if isinstance(args, MimicTrainingArguments) and args.hard_negatives:
        first = args.hard_negatives_epochs + 1
        note += f"; {args.hard_negatives} hard negatives for each mention from epoch {first} on"
    return note + "."

"""Checks of several processes that work on one training: whether they have the same data and options."""

from __future__ import annotations

import hashlib
import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import distributed as dist
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .arguments import CONFIG_ARGUMENTS
from .gather import process_count
from .knowledge_base import KnowledgeBase

logger = logging.getLogger("mimic_el.train")


def use_timeout(timeout: timedelta) -> None:
    """Has collective operations wait so long at most. transformers 5.23 makes groups of CPUs without `ddp_timeout`."""
    dist.distributed_c10d._set_pg_timeout(timeout)


def set_for_ddp(args: TrainingArguments) -> None:
    """Sets what DistributedDataParallel needs to train a model whose one encoder serves both sides."""
    args.ddp_find_unused_parameters = False
    if args.device.type == "cpu":
        # To accelerate it is "cpu:0". Older transformers would have torch load an optimizer to that, which it cannot.
        vars(args)["_setup_devices"] = torch.device("cpu")
    # Reentrant checkpointing goes back through the encoder once for each side, for which DDP is not made.
    name = "activation_checkpointing_kwargs"  # the new name of gradient_checkpointing_kwargs
    name = name if hasattr(args, name) else "gradient_checkpointing_kwargs"
    setattr(args, name, {**(getattr(args, name) or {}), "use_reentrant": False})


def check_same_data(knowledge_base: KnowledgeBase, mentions: Any) -> None:
    """Makes sure that all processes read the same data: each takes its part of what should be one batch.

    Raises:
        ValueError: in all processes, if one has others.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in knowledge_base:
        digest.update(f"{name}\0".encode(errors="surrogatepass"))
    if not isinstance(mentions, torch.utils.data.IterableDataset):
        digest.update(str(len(mentions)).encode())
        if isinstance(mentions, datasets.Dataset):
            names = [name for name in ("id", "answer") if name in mentions.column_names]
            digest.update(repr(mentions.select_columns(names)[:]).encode(errors="surrogatepass"))
    own = int.from_bytes(digest.digest(), "big", signed=True)
    every: list[Any] = [None] * process_count()
    dist.all_gather_object(every, own)
    if len(set(every)) > 1:
        other = next(place for place, value in enumerate(every) if value != every[0])
        raise ValueError(
            f"Process {other} has other mentions or entities than process 0. All processes must read the same data: "
            "the same data set, revision and options."
        )


# What must be the same in all processes: it decides how many steps there are, what one is, and what is exchanged in it.
_SETTINGS = """
    adam_beta1 adam_beta2 adam_epsilon bf16 cached_batch_size data_seed dataloader_drop_last eval_epochs eval_steps
    eval_strategy fp16 full_determinism gather_negatives gradient_accumulation_steps hard_negatives
    hard_negatives_epochs index_dtype learning_rate load_best_model_at_end logging_steps logging_strategy
    lr_scheduler_type max_grad_norm max_steps missing_answers num_train_epochs optim per_device_eval_batch_size
    per_device_train_batch_size save_steps save_strategy seed warmup_steps weight_decay
""".split()  # noqa: SIM905


def check_same_settings(args: TrainingArguments, config: Any) -> None:
    """Makes sure that all processes were given the same options, and a model that is configured alike.

    Raises:
        ValueError: in all processes, naming one that was not, and the option.
    """
    own = {name: repr(getattr(args, name, None)) for name in _SETTINGS}
    own |= {f"the model's {name}": repr(getattr(config, name, None)) for name in CONFIG_ARGUMENTS}
    every: list[Any] = [None] * process_count()
    dist.all_gather_object(every, own)
    for place, other in enumerate(every):
        for name in [*every[0], *other]:
            one, another = every[0].get(name), other.get(name)
            if one != another:
                raise ValueError(
                    f"Process {place} of {len(every)} has another value of {name} than process 0: {another}, not "
                    f"{one}. All processes must be given the same options and the same model."
                )


def check_same_start(checkpoint: str | bool | None, output_dir: str | None) -> None:
    """Makes sure that all processes go on from the same checkpoint, or all begin.

    Args:
        checkpoint: as `resume_from_checkpoint` of `Trainer.train`; `True` for the last in `output_dir`.

    Raises:
        ValueError: in all processes, naming one that does not.
    """
    if process_count() == 1:
        return
    own = get_last_checkpoint(output_dir or ".") if checkpoint is True else checkpoint or None
    every: list[Any] = [None] * process_count()
    dist.all_gather_object(every, None if own is None else Path(own).name)
    for place, other in enumerate(every):
        if other != every[0]:
            told, first = (name or "the beginning" for name in (other, every[0]))
            raise ValueError(
                f"Process {place} of {len(every)} goes on from {told}, process 0 from {first}. The output directory, "
                "with the checkpoints in it, must be one that all processes share."
            )


def check_enough(batch: int, mentions: Any) -> None:
    """Makes sure that each process has a mention in each step.

    Args:
        batch: mentions of a step in all processes together.
        mentions: of the training.

    Raises:
        ValueError: naming how many processes there may be.
    """
    count = process_count()
    if batch < count:
        raise ValueError(
            f"{count} processes cannot share a batch of {batch} mentions: start {batch} at most, or give each its own "
            "number with --per_device_train_batch_size."
        )
    if not isinstance(mentions, torch.utils.data.IterableDataset) and len(mentions) < count:
        raise ValueError(
            f"{count} processes cannot share {len(mentions)} training mention{'s' * (len(mentions) > 1)}: start "
            f"{len(mentions)} at most."
        )


def check_launch(args: TrainingArguments) -> None:
    """Refuses what would split batches or parameters in ways that MIMIC's loss cannot use, and warns of processes that
    do not know of each other.

    Raises:
        ValueError: naming the setting, and what to do.
    """
    step = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if args.world_size == 1 and step.isdecimal() and int(step) > 1:
        logger.warning(
            "srun has started %s processes, and each trains alone, for it was not told of the others. To train "
            "together, have srun start one torchrun a machine: see docs/training.md. To train apart, give each its own "
            "output_dir.",
            step,
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would split batches in ways that MIMIC's loss "
            f"cannot use. Start one process a GPU: `torchrun --nproc-per-node {args.n_gpu} -m mimic_el.train ...`, "
            "or show one GPU alone: `CUDA_VISIBLE_DEVICES=0`."
        )
    sharded = {
        "DeepSpeed": args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true",
        "FSDP": args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true",
    }
    for name, wanted in sharded.items():
        if wanted:
            raise ValueError(
                f"{name} is not supported: the loss uses the matcher's parameters outside the model's `forward`, where "
                f"{name} has them in parts. The model fits one GPU; for large batches there is --cached_batch_size."
            )
    grouped = (
        getattr(args, "group_by_length", False) or getattr(args, "train_sampling_strategy", "") == "group_by_length"
    )
    if grouped:
        raise ValueError("Batches cannot be grouped by length: all texts have the same. Leave that option out.")
    accelerator = args.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if args.world_size > 1 and getattr(accelerator, name, None):
            raise ValueError(f"accelerator_config: `{name}` is not for MimicTrainer, which deals out batches itself.")

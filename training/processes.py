"""Several processes that work on one training: do they have the same data, and how they wait for each other.

A collective operation fails, or hangs, where a process comes late or not at all. So what takes long is done with
[`all_of_them`]: each process does its own part, tells that it is done or what went wrong, and waits without a limit as
long as the others are alive. A failure in one is then the error of all.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import datasets
import torch
from torch import distributed as dist
from transformers import TrainingArguments

from ..errors_mimic import MimicError
from .gather import process_count, process_index
from .knowledge_base import KnowledgeBase

logger = logging.getLogger("mimic_el.train")

Result = TypeVar("Result")

# A process that is alive says so every so many seconds; silent for so many, it is given up.
_PULSE, _SILENCE = 2.0, 120.0
_calls = itertools.count()


class ProcessError(MimicError, RuntimeError):
    """Another process of the same training failed, or is gone."""


def all_of_them(what: str, function: Callable[[], Result], *, silence: float = _SILENCE) -> Result:
    """This process's result of a function that all processes call at the same point, each for its own part of the work.

    Waits for the others as long as they are alive, however long that takes.

    Args:
        what: names the work in messages, such as "ranking mentions".
        function: must use no collective operation that another process may not reach.
        silence: seconds after which a process that gives no sign of life is given up.

    Raises:
        ProcessError: if another process failed, with its message, or is gone.
    """
    if process_count() == 1:
        return function()
    call, own, count = next(_calls), process_index(), process_count()
    store = dist.PrefixStore(f"mimic-el/{call}", dist.distributed_c10d._get_default_store())
    with _pulse(store, own):
        try:
            result = function()
        except BaseException as error:
            store.set(f"outcome-{own}", f"{type(error).__name__}: {error}")
            raise
        store.set(f"outcome-{own}", "")
        _wait_for_others(store, what, own, count, silence)
    return result


@contextmanager
def _pulse(store: Any, own: int) -> Iterator[None]:
    """Tells the others that this process is alive."""
    done = threading.Event()

    def beat() -> None:
        for number in itertools.count():
            try:
                store.set(f"alive-{own}", str(number))
            except Exception:  # the store is gone with its process: the main thread will hear of it
                return
            if done.wait(_PULSE):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _wait_for_others(store: Any, what: str, own: int, count: int, silence: float) -> None:
    waiting = set(range(count)) - {own}
    seen: dict[int, tuple[str, float]] = {}
    pause = 0.01
    while waiting:
        for other in sorted(waiting):
            try:
                if store.check([f"outcome-{other}"]):
                    if fault := store.get(f"outcome-{other}").decode():
                        raise ProcessError(f"Process {other} of {count} failed in {what}: {fault}")
                    waiting.discard(other)
                    continue
                sign = store.get(f"alive-{other}").decode() if store.check([f"alive-{other}"]) else ""
            except (dist.DistStoreError, dist.DistNetworkError) as error:
                raise ProcessError(
                    f"The process that keeps the {count} processes in touch is gone, in {what}: {error}"
                ) from error
            now = time.monotonic()
            if sign != seen.get(other, (None, now))[0]:
                seen[other] = sign, now
            elif now - seen[other][1] > silence:
                raise ProcessError(
                    f"Process {other} of {count} gave no sign of life for {silence:.0f} seconds in {what}. It was "
                    "probably killed, for want of memory for instance; see its own messages."
                )
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)


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


def refuse_other_engines(args: TrainingArguments) -> None:
    """Refuses what would split batches or parameters in ways that MIMIC's loss cannot use.

    Raises:
        ValueError: naming the setting, and what to do.
    """
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
    accelerator = args.accelerator_config
    for name in ("split_batches", "dispatch_batches"):
        if args.world_size > 1 and getattr(accelerator, name, None):
            raise ValueError(f"accelerator_config: `{name}` is not for MimicTrainer, which deals out batches itself.")

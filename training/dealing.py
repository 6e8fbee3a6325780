"""Shares the mentions of a step among several processes: each gets its part of one batch. Knows no model.

Together the parts are the batch that one process would have, in its order, so n processes train as one does. The last
batch of an epoch is smaller, and is shared evenly too. If it has fewer mentions than there are processes, the first
mentions of the epoch fill it up, because a process without a mention could not take part in the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import TrainingArguments


def part_of(count: int, index: int, parts: int) -> slice:
    """The `index`-th of so many parts of `count` items, whose sizes differ by one at most; the first are larger."""
    size, larger = divmod(count, parts)
    start = index * size + min(index, larger)
    return slice(start, start + size + (index < larger))


class DealtBatches(BatchSampler):
    """One process's part of each batch.

    Args:
        sampler: the numbers of an epoch's mentions; the same in all processes.
        batch_size: mentions of a step in all processes together.
        index, processes: which of how many processes this is.
        drop_last: whether a last batch that is smaller is left out.
    """

    def __init__(
        self, sampler: Sampler[int] | Iterable[int], batch_size: int, index: int, processes: int, drop_last: bool
    ) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self.index, self.processes = index, processes

    def __iter__(self) -> Iterator[list[int]]:
        first: list[int] = []
        for batch in super().__iter__():
            first = first or batch
            batch = _filled(batch, first, self.processes)
            yield batch[part_of(len(batch), self.index, self.processes)]


class DealtStream(torch.utils.data.IterableDataset):
    """One process's mentions of a stream, to be joined into batches of [`batch_size`].

    Args:
        stream: gives the same mentions in the same order in all processes.
        batch_size, index, processes: as of [`DealtBatches`].
    """

    def __init__(self, stream: Any, batch_size: int, index: int, processes: int) -> None:
        self.stream, self.total, self.index, self.processes = stream, batch_size, index, processes
        own = part_of(batch_size, index, processes)
        self.batch_size = own.stop - own.start

    def __len__(self) -> int:
        whole, rest = divmod(len(self.stream), self.total)
        own = part_of(max(rest, self.processes) if rest else 0, self.index, self.processes)
        return whole * self.batch_size + own.stop - own.start

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        mentions = iter(self.stream)
        first: list[Any] = []
        while batch := list(itertools.islice(mentions, self.total)):
            first = first or batch
            batch = _filled(batch, first, self.processes)
            yield from batch[part_of(len(batch), self.index, self.processes)]


def dealt_loader(
    dataset: Any,
    sampler_of: Callable[[Any], Any],
    collate: Callable[[list[Any]], Any],
    batch_size: int,
    args: TrainingArguments,
    accelerator: Accelerator,
) -> DataLoader:
    """This process's part of each batch of the training, on its device.

    Args:
        dataset: the mentions, by number or as a stream; the same in all processes.
        sampler_of: gives the order of mentions that have numbers.
        collate: makes a batch of its mentions.
        batch_size: mentions of a step in all processes together.
        args: says which process this is, and how batches are loaded.
        accelerator: knows the device.
    """
    index, count = args.process_index, args.world_size
    options: dict[str, Any] = {
        "collate_fn": collate,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
    }
    if isinstance(dataset, torch.utils.data.IterableDataset):
        stream = DealtStream(dataset, batch_size, index, count)
        loader = DataLoader(stream, batch_size=stream.batch_size, **options)
    else:
        batches = DealtBatches(sampler_of(dataset), batch_size, index, count, args.dataloader_drop_last)
        loader = DataLoader(dataset, batch_sampler=batches, **options)
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,  # it is dealt out already
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=list(accelerator.rng_types or []),
        dispatch_batches=False,
        use_seedable_sampler=True,  # the same order in all processes
        data_seed=args.data_seed,
        non_blocking=accelerator.non_blocking,
    )


def _filled(batch: list[Any], first: list[Any], least: int) -> list[Any]:
    return batch + list(itertools.islice(itertools.cycle(first), max(0, least - len(batch))))

"""The loss of a batch that several processes share: each mention's negatives are the entities of all processes.

The processes exchange the features of entities, about 20 kB each in the published model, and the gradients with
respect to them. Process p has M_p of all M mentions, and its loss is the sum over these times n / M.
DistributedDataParallel takes the mean of the gradients of n processes, which is then the gradient of one process with
the whole batch. Knows features and scores, but not what encodes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..matching_mimic import EntityFeatures, MentionFeatures
from ..modeling_mimic import MimicModel, loss_of_scores

_Features = TypeVar("_Features", EntityFeatures, MentionFeatures)


def process_count() -> int:
    """How many processes share a batch; 1 where none were launched."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


class _GatheredRows(torch.autograd.Function):
    """The rows of all processes, in their order. The gradient of a row is the sum of what all processes have of it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.counts = counts
        return _gathered_rows(own, counts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return summed_rows(gradient, ctx.counts), None


def _gathered_rows(own: Tensor, counts: Sequence[int]) -> Tensor:
    padded = own.new_zeros((max(counts), *own.shape[1:]))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def summed_rows(gradient: Tensor, counts: Sequence[int]) -> Tensor:
    """Of gradients of gathered rows, the sum over all processes for this process's rows."""
    if len(counts) == 1:
        return gradient
    gradient = gradient.contiguous().clone()
    dist.all_reduce(gradient)
    start = sum(counts[: process_index()])
    return gradient[start : start + counts[process_index()]]


def packed(features: EntityFeatures | MentionFeatures) -> Tensor:
    """Features as one matrix, a row an item: one exchange in place of one for each tensor. Masks become numbers."""
    dtype = next(tensor.dtype for tensor in features.tensors.values() if tensor.is_floating_point())
    return torch.cat(
        [
            tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
            for tensor in (tensor.to(dtype) for tensor in features.tensors.values())
        ],
        dim=1,
    )


def unpacked(matrix: Tensor, like: _Features) -> _Features:
    """The features of a matrix that [`packed`] made; `like` has their names, shapes and dtypes."""
    widths = [math.prod(tensor.shape[1:]) for tensor in like.tensors.values()]
    columns = matrix.split(widths, dim=1)
    return type(like)(
        {
            name: part.reshape(len(matrix), *tensor.shape[1:]).to(tensor.dtype)
            for part, (name, tensor) in zip(columns, like.tensors.items(), strict=True)
        }
    )


@dataclass
class SharedBatch:
    """What one process knows of a batch that n share: M of its mentions, and N entities of all processes.

    Args:
        mention_counts, entity_counts: how many each process has.
        labels (`torch.LongTensor` of shape `(M,)`): the column of each own mention's answer among the N.
        own_labels (`torch.LongTensor` of shape `(M,)`): the same among this process's own entities.
        columns (`torch.LongTensor` of shape `(N,)`): which of all processes' entities count.
        entity_numbers (`torch.LongTensor` of shape `(N,)`, *optional*): equal ones mark the same entity.
        answer_numbers (`torch.LongTensor`, *optional*): of the answers of all processes' mentions.
    """

    mention_counts: list[int]
    entity_counts: list[int]
    labels: Tensor
    own_labels: Tensor
    columns: Tensor
    entity_numbers: Tensor | None = None
    answer_numbers: Tensor | None = None

    @classmethod
    def of(
        cls,
        mention_count: int,
        entity_count: int,
        labels: Tensor,
        entity_numbers: Tensor | None,
        *,
        merge: bool = False,
        gather: bool = True,
    ) -> SharedBatch:
        """Exchanges sizes and numbers.

        Args:
            labels: the row of each own mention's answer among the own entities; the other rows are hard negatives.
            entity_numbers: of the own entities.
            merge: whether an entity that is there several times counts once, as `merge_duplicates` has it.
            gather: whether the batch is shared at all; if not, it is this process's alone, and nothing is exchanged.

        Raises:
            ValueError: if labels or numbers do not fit, in all processes alike.
        """
        device = labels.device
        fits = labels.shape == (mention_count,) and bool(((labels >= 0) & (labels < entity_count)).all())
        fits &= entity_numbers is None or entity_numbers.shape == (entity_count,)
        own_sizes = torch.tensor([mention_count, entity_count, fits, entity_numbers is not None], device=device)
        sizes = _of_all(own_sizes) if gather else own_sizes.unsqueeze(0)
        if not bool(sizes[:, 2].all()) or len(sizes[:, 3].unique()) > 1:
            raise ValueError(
                "`labels` must hold the row of each mention's answer among the process's own entities, and "
                f"`entity_labels` a number for each of these, in all processes or in none; processes "
                f"{(sizes[:, 2] == 0).nonzero().flatten().tolist()} have others."
            )
        mentions, entities = sizes[:, 0].tolist(), sizes[:, 1].tolist()
        own_first = sum(entities[: process_index()]) if gather else 0
        columns = torch.arange(sum(entities), device=device)
        every_label = labels + own_first
        if entity_numbers is None:
            return cls(mentions, entities, every_label, labels, columns)
        numbers = _all_rows(entity_numbers, entities)
        answered = torch.zeros_like(columns, dtype=torch.bool)
        answered[_all_rows(every_label, mentions)] = True
        # A hard negative that is another mention's answer is a column already.
        kept = _first_of_each(numbers, answered, merge)
        place = torch.full_like(columns, -1)
        place[kept] = torch.arange(len(kept), device=device)
        if merge:
            first = {number: column for column, number in zip(kept.tolist(), numbers[kept].tolist(), strict=True)}
            every_label = torch.tensor([first[number] for number in entity_numbers[labels].tolist()], device=device)
        answers = _all_rows(entity_numbers[labels], mentions)
        return cls(mentions, entities, place[every_label], labels, kept, numbers[kept], answers)

    @property
    def first_mention(self) -> int:
        return sum(self.mention_counts[: process_index()]) if len(self.mention_counts) > 1 else 0

    @property
    def weight(self) -> float:
        """What the mean over the own mentions is multiplied by."""
        if len(self.mention_counts) == 1:
            return 1.0
        return self.mention_counts[process_index()] * len(self.mention_counts) / sum(self.mention_counts)

    def loss(
        self,
        model: MimicModel,
        scores: Sequence[Tensor],
        reverse: Sequence[Tensor] | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """This process's loss, or what some of its mentions add to it.

        Args:
            model: says what the loss is.
            scores: of these mentions, each of shape (M, N).
            reverse: for the symmetric loss, those of these mentions' answers, each of shape (M, all mentions).
            rows (`torch.LongTensor`): which of the own mentions these are; all unless told.
        """
        own = torch.arange(len(self.labels), device=self.labels.device)
        own = own if rows is None else rows
        labels = self.labels[own]
        not_rivals = not_rival_mentions = None
        if model.config.ignore_duplicate_answers and self.entity_numbers is not None:
            answers = self.entity_numbers[labels].unsqueeze(1)
            place, no = torch.arange(len(own), device=own.device), own.new_zeros(()).bool()
            not_rivals = (answers == self.entity_numbers).index_put((place, labels), no)
            assert self.answer_numbers is not None
            not_rival_mentions = (answers == self.answer_numbers).index_put((place, own + self.first_mention), no)
        loss = loss_of_scores(scores, labels, not_rivals, reverse, own + self.first_mention, not_rival_mentions)
        return loss * (self.weight * len(own) / len(self.labels))


def gathered(features: _Features, counts: Sequence[int]) -> _Features:
    """The features of all processes, with gradients that reach those that made them."""
    if len(counts) == 1:
        return features
    return unpacked(gathered_matrix(packed(features), counts), features)


def gathered_matrix(matrix: Tensor, counts: Sequence[int]) -> Tensor:
    """The same of features that are [`packed`]."""
    if len(counts) == 1:
        return matrix
    widths = _of_all(torch.tensor([matrix.shape[1]], device=matrix.device)).flatten().tolist()
    if len(set(widths)) > 1:
        raise ValueError(f"The processes' features differ in width: {widths}. Texts must have one length in all.")
    return _GatheredRows.apply(matrix, counts)


def shared_loss(
    model: MimicModel,
    mentions: MentionFeatures,
    entities: EntityFeatures,
    labels: Tensor,
    entity_numbers: Tensor | None = None,
    merge: bool = False,
) -> Tensor:
    """The loss of this process's mentions against the entities of all processes; called by all of them.

    Args:
        model: scores; only its matcher is used.
        mentions, entities: of this process, M and some.
        labels, entity_numbers, merge: as of [`SharedBatch.of`].

    Returns:
        `torch.Tensor` of shape `()`: its mean over the processes is the loss of one process with the whole batch.
    """
    batch = SharedBatch.of(len(mentions), len(entities), labels, entity_numbers, merge=merge)
    every = gathered(entities, batch.entity_counts)[batch.columns]
    scores = model.score(mentions, every).all_logits()
    reverse = None
    if model.config.symmetric_loss:
        answers = entities[batch.own_labels]
        reverse = [part.T for part in model.score(gathered(mentions, batch.mention_counts), answers).all_logits()]
    return batch.loss(model, scores, reverse)


def without_unused_parameters(model: MimicModel) -> list[str]:
    """Takes out of training the parameters that no loss depends on, such as CLIP's temperature, and names them.

    DistributedDataParallel waits for the gradients of all parameters. It can look for those that will have none, but
    not through the loss, which here is computed outside of the model's `forward`.
    """
    size = model.config.text_max_length
    texts = torch.arange(2 * size, device=model.device).view(2, size) % 2
    state = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"), torch.enable_grad():
        model.zero_grad()
        model(input_ids=texts, entity_input_ids=texts, return_loss=True).loss.backward()
    unused = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    for (name, parameter), gradient in zip(model.named_parameters(), state, strict=True):
        parameter.grad = gradient
        if name in unused:
            parameter.requires_grad_(False)
    return unused


def _of_all(own: Tensor) -> Tensor:
    """A small tensor of each process, stacked."""
    if process_count() == 1:
        return own.unsqueeze(0)
    parts = [torch.empty_like(own) for _ in range(process_count())]
    dist.all_gather(parts, own)
    return torch.stack(parts)


def _all_rows(own: Tensor, counts: Sequence[int]) -> Tensor:
    return own if len(counts) == 1 else _gathered_rows(own, counts)


def _first_of_each(numbers: Tensor, answered: Tensor, merge: bool) -> Tensor:
    """The columns that count: all answers, or the first column of each; of the others, those that are none."""
    seen: set[int] = set(numbers[answered].tolist())
    kept, merged = [], set[int]()
    for column, (number, is_answer) in enumerate(zip(numbers.tolist(), answered.tolist(), strict=True)):
        if is_answer and not (merge and number in merged):
            merged.add(number)
        elif is_answer or number in seen:
            continue
        seen.add(number)
        kept.append(column)
    return torch.tensor(kept, device=numbers.device, dtype=torch.long)

"""A step over a batch of any size in the memory of a small one (GradCache: Gao et al., "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup", 2021).

    encode the batch chunk by chunk, without a graph
    for some mentions after the others:
        score them with all entities, without a graph; what they add to the loss, and its gradient for these scores
        score block by block again, with a graph: the gradients of the features, and of what scores alone need
    encode chunk by chunk again, with a graph, from the same random state, and go back with the features' gradients

Loss and gradients are those of a plain step. What is kept of the whole batch are its inputs, and its features with
their gradients.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..matching_mimic import EntityFeatures, MentionFeatures
from ..modeling_mimic import MimicModel
from .gather import SharedBatch, gathered_matrix, packed, summed_rows, unpacked

_ENTITY = "entity_"
# Pairs whose scores have a graph at a time, by the bytes of their attention; a graph holds several times as much.
_BLOCK_BYTES, _BLOCK_BYTES_GPU = 16 * 2**20, 128 * 2**20


@dataclass
class _Chunk:
    """Some mentions and some entities of a batch, encoded together.

    Args:
        inputs: for the model's `forward`.
        mentions, entities: their places in the batch; `None` where there are none.
        random_state: from which they were encoded first.
    """

    inputs: dict[str, Tensor]
    mentions: slice | None
    entities: slice | None
    random_state: list[Any] = field(default_factory=list)


def cached_step(
    model: nn.Module,
    inner: MimicModel,
    inputs: dict[str, Any],
    chunk_size: int,
    backward: Callable[[Tensor], Any],
    *,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    merge: bool = False,
    gather: bool = False,
) -> Tensor:
    """The loss of a batch; its gradients are added to the parameters'.

    Args:
        model: what is called last, once: where gradients of processes are averaged when they are complete.
        inner: the model itself; called for all other chunks.
        inputs: a batch of [`MentionEntityCollator`].
        chunk_size: mentions and entities that are encoded at a time.
        backward: called with a scalar for each chunk, whose gradients add up to those of the loss.
        context: in which forward passes are run, such as autocast.
        merge, gather: as of [`SharedBatch.of`].
    """
    numbers = inputs.get("entity_labels")
    chunks = list(_chunks(inputs, chunk_size))
    mentions, entities = _Features(), _Features()
    with torch.no_grad(), context():
        for chunk in chunks:
            chunk.random_state = _random_state(inner.device)
            part = inner(**chunk.inputs, return_scores=False)
            mentions.append(part.mention_features)
            entities.append(part.entity_features)
    del part
    batch = SharedBatch.of(
        len(mentions.matrix), len(entities.matrix), inputs["labels"], numbers, merge=merge, gather=gather
    )
    loss, mention_gradient, entity_gradient, matcher_gradients = _gradients_of_features(
        inner, mentions, entities, batch
    )
    for chunk in chunks:
        is_last = chunk is chunks[-1]
        with _random_state_of(chunk.random_state, inner.device):
            with context():
                part = (model if is_last else inner)(**chunk.inputs, return_scores=False)
            total = loss.new_zeros(())
            if chunk.mentions is not None:
                total = total + (packed(part.mention_features) * mention_gradient[chunk.mentions]).sum()
            if chunk.entities is not None:
                total = total + (packed(part.entity_features) * entity_gradient[chunk.entities]).sum()
            if is_last:
                for parameter, gradient in matcher_gradients:
                    total = total + (parameter * gradient).sum()
            backward(total)  # within the random state, from which checkpointed layers are run again
    return loss


def _chunks(inputs: dict[str, Any], size: int) -> Iterator[_Chunk]:
    """The last holds mentions and entities, so that all parameters take part in it."""
    mentions = _parts(len(inputs["input_ids"]), size)
    entities = _parts(len(inputs["entity_input_ids"]), size)
    names = ("input_ids", "attention_mask", "pixel_values")
    pairs = itertools.zip_longest(reversed(mentions), reversed(entities))
    for own_mentions, own_entities in reversed(list(pairs)):
        chunk = _Chunk({}, own_mentions, own_entities)
        for rows, prefix in ((own_mentions, ""), (own_entities, _ENTITY)):
            if rows is not None:
                chunk.inputs |= {prefix + name: inputs[prefix + name][rows] for name in names}
        yield chunk


def _parts(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _Features:
    """The features of mentions or entities, kept once: as the matrix of [`packed`]."""

    def __init__(self, parts: list[Tensor] | None = None, like: Any = None) -> None:
        self._parts = parts or []
        self._like = like

    def append(self, features: MentionFeatures | EntityFeatures | None) -> None:
        if features is not None:
            self._like = features
            self._parts.append(packed(features))

    @property
    def matrix(self) -> Tensor:
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0]

    def of_all(self, counts: Sequence[int]) -> _Features:
        """Those of all processes."""
        return self if len(counts) == 1 else _Features([gathered_matrix(self.matrix, counts)], self._like)

    def unpacked(self, matrix: Tensor) -> Any:
        """The features that are some rows of the matrix."""
        return unpacked(matrix, self._like)

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return self._like.tensors["text_key" if self._like.side == "mention" else "text_query"].shape[1]


def _gradients_of_features(
    model: MimicModel, mentions: _Features, entities: _Features, batch: SharedBatch
) -> tuple[Tensor, Tensor, Tensor, list[tuple[nn.Parameter, Tensor]]]:
    """The loss, its gradients with respect to the own features, as matrices of [`packed`], and those with respect to
    parameters that scoring uses."""
    symmetric = bool(model.config.symmetric_loss)
    device = batch.labels.device
    block_bytes = _BLOCK_BYTES if device.type == "cpu" else _BLOCK_BYTES_GPU
    side = max(1, int((block_bytes // (4 * mentions.length * entities.length)) ** 0.5))
    every = entities.of_all(batch.entity_counts)
    every_mention = mentions.of_all(batch.mention_counts) if symmetric else mentions

    parameters = [parameter for parameter in model.matcher.parameters() if parameter.requires_grad]
    of_parameters: list[Tensor | None] = [None] * len(parameters)
    of_mentions, of_every = torch.zeros_like(mentions.matrix), torch.zeros_like(every.matrix)
    if symmetric:
        of_every_mention, of_entities = torch.zeros_like(every_mention.matrix), torch.zeros_like(entities.matrix)

    def scored(some_mentions: _Features, rows: Tensor, some_entities: _Features, columns: Tensor) -> list[Tensor]:
        """The scores of all units, without a graph."""
        with torch.no_grad():
            return list(
                model.score(
                    some_mentions.unpacked(some_mentions.matrix[rows]),
                    some_entities.unpacked(some_entities.matrix[columns]),
                ).all_logits()
            )

    def go_back(
        some_mentions: _Features,
        rows: Tensor,
        mention_sum: Tensor,
        some_entities: _Features,
        columns: Tensor,
        entity_sum: Tensor,
        gradients: list[Tensor],
    ) -> None:
        """Adds what some pairs' scores give to the gradients."""
        of_rows = some_mentions.matrix[rows].requires_grad_()
        of_columns = some_entities.matrix[columns].requires_grad_()
        pairs = model.matcher(some_mentions.unpacked(of_rows), some_entities.unpacked(of_columns))
        outputs = [pairs.total, pairs.text, pairs.image, pairs.cross_modal]
        found = torch.autograd.grad(
            outputs, [of_rows, of_columns, *parameters], gradients, allow_unused=True, materialize_grads=False
        )
        mention_sum.index_add_(0, rows, found[0])
        entity_sum.index_add_(0, columns, found[1])
        for place, gradient in enumerate(found[2:]):
            if gradient is not None:
                known = of_parameters[place]
                of_parameters[place] = gradient if known is None else known + gradient

    loss = torch.zeros((), device=device)
    all_places = torch.arange(len(batch.columns), device=device).split(side)
    all_mentions = torch.arange(len(every_mention.matrix), device=device).split(side)
    for rows in torch.arange(len(mentions.matrix), device=device).split(side):
        blocks = [scored(mentions, rows, every, batch.columns[places]) for places in all_places]
        scores = [torch.cat(parts, dim=1).requires_grad_() for parts in zip(*blocks, strict=True)]
        reverse, answers = None, batch.own_labels[rows]
        if symmetric:
            blocks = [scored(every_mention, others, entities, answers) for others in all_mentions]
            reverse = [torch.cat(parts).T.contiguous().requires_grad_() for parts in zip(*blocks, strict=True)]
        of_these = batch.loss(model, scores, reverse, rows)
        loss = loss + of_these.detach()
        of_scores = torch.autograd.grad(of_these, [*scores, *(reverse or [])])
        for places in all_places:
            block = [part[:, places] for part in of_scores[:4]]
            go_back(mentions, rows, of_mentions, every, batch.columns[places], of_every, block)
        for others in all_mentions if symmetric else ():
            block = [part[:, others].T for part in of_scores[4:]]
            go_back(every_mention, others, of_every_mention, entities, answers, of_entities, block)
    entity_gradient = summed_rows(of_every, batch.entity_counts)
    if symmetric:
        entity_gradient = entity_gradient + of_entities
        of_mentions = of_mentions + summed_rows(of_every_mention, batch.mention_counts)
    of_matcher = [(p, g) for p, g in zip(parameters, of_parameters, strict=True) if g is not None]
    return loss, of_mentions, entity_gradient, of_matcher


def _random_state(device: torch.device) -> list[Any]:
    states: list[Any] = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


@contextlib.contextmanager
def _random_state_of(states: list[Any], device: torch.device) -> Iterator[None]:
    """The random state that was kept; the present one comes back afterwards."""
    now = _random_state(device)
    _set_random_state(states, device)
    try:
        yield
    finally:
        _set_random_state(now, device)


def _set_random_state(states: list[Any], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)

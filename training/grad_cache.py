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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..matching_mimic import EntityFeatures, MentionFeatures
from ..modeling_mimic import MimicModel
from .gather import SharedBatch, gathered, packed, summed_rows, unpacked

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
    parts: list[Any] = []
    with torch.no_grad(), context():
        for chunk in chunks:
            chunk.random_state = _random_state(inner.device)
            parts.append(inner(**chunk.inputs, return_scores=False))
    mentions = MentionFeatures.cat([part.mention_features for part in parts if part.mention_features is not None])
    entities = EntityFeatures.cat([part.entity_features for part in parts if part.entity_features is not None])
    del parts
    batch = SharedBatch.of(len(mentions), len(entities), inputs["labels"], numbers, merge=merge, gather=gather)
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


def _gradients_of_features(
    model: MimicModel, mentions: MentionFeatures, entities: EntityFeatures, batch: SharedBatch
) -> tuple[Tensor, Tensor, Tensor, list[tuple[nn.Parameter, Tensor]]]:
    """The loss, its gradients with respect to the own features, as matrices of [`packed`], and those with respect to
    parameters that scoring uses."""
    symmetric = bool(model.config.symmetric_loss)
    with torch.no_grad():
        every = gathered(entities, batch.entity_counts)
        every_mention = gathered(mentions, batch.mention_counts) if symmetric else mentions
        columns_of_all = every[batch.columns]

    parameters = [parameter for parameter in model.matcher.parameters() if parameter.requires_grad]
    of_parameters: list[Tensor | None] = [None] * len(parameters)
    every_matrix, mention_matrix = packed(every), packed(mentions)
    entity_gradient, mention_gradient = torch.zeros_like(every_matrix), torch.zeros_like(mention_matrix)
    if symmetric:
        own_matrix, every_mention_matrix = packed(entities), packed(every_mention)
        of_own, of_every_mention = torch.zeros_like(own_matrix), torch.zeros_like(every_mention_matrix)

    def go_back(
        mention_rows: Tensor,
        mention_source: Tensor,
        mention_sum: Tensor,
        columns: Tensor,
        entity_source: Tensor,
        entity_sum: Tensor,
        gradients: list[Tensor],
    ) -> None:
        """Adds what some pairs' scores give to the gradients."""
        some_mentions = mention_source[mention_rows].requires_grad_()
        some_entities = entity_source[columns].requires_grad_()
        pairs = model.matcher(unpacked(some_mentions, mentions), unpacked(some_entities, entities))
        outputs = [pairs.total, pairs.text, pairs.image, pairs.cross_modal]
        found = torch.autograd.grad(
            outputs, [some_mentions, some_entities, *parameters], gradients, allow_unused=True, materialize_grads=False
        )
        mention_sum.index_add_(0, mention_rows, found[0])
        entity_sum.index_add_(0, columns, found[1])
        for place, gradient in enumerate(found[2:]):
            if gradient is not None:
                known = of_parameters[place]
                of_parameters[place] = gradient if known is None else known + gradient

    device = batch.labels.device
    length = mentions.tensors["text_key"].shape[1] * entities.tensors["text_query"].shape[1]
    block_bytes = _BLOCK_BYTES if device.type == "cpu" else _BLOCK_BYTES_GPU
    side = max(1, int((block_bytes // (4 * length)) ** 0.5))
    loss = torch.zeros((), device=device)
    for rows in torch.arange(len(mentions), device=device).split(side):
        with torch.no_grad():
            scores = [part.requires_grad_() for part in model.score(mentions[rows], columns_of_all).all_logits()]
            reverse = None
            if symmetric:
                answers = model.score(every_mention, entities[batch.own_labels[rows]]).all_logits()
                reverse = [part.T.contiguous().requires_grad_() for part in answers]
        of_rows = batch.loss(model, scores, reverse, rows)
        loss = loss + of_rows.detach()
        of_scores = torch.autograd.grad(of_rows, [*scores, *(reverse or [])])
        for places in torch.arange(len(batch.columns), device=device).split(side):
            block = [part[:, places] for part in of_scores[:4]]
            go_back(rows, mention_matrix, mention_gradient, batch.columns[places], every_matrix, entity_gradient, block)
        if symmetric:
            for others in torch.arange(len(every_mention), device=device).split(side):
                block = [part[:, others].T for part in of_scores[4:]]
                columns = batch.own_labels[rows]
                go_back(others, every_mention_matrix, of_every_mention, columns, own_matrix, of_own, block)
    of_entities = summed_rows(entity_gradient, batch.entity_counts)
    if symmetric:
        of_entities = of_entities + of_own
        mention_gradient = mention_gradient + summed_rows(of_every_mention, batch.mention_counts)
    of_matcher = [(p, g) for p, g in zip(parameters, of_parameters, strict=True) if g is not None]
    return loss, mention_gradient, of_entities, of_matcher


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

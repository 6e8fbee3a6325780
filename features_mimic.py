"""Named tensors that go from the encoder to the units, the index and the search; and the scores of pairs.

Knows no layer. Shapes: B mentions or entities, L text tokens, P image tokens (the class token and the patches).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .layers_mimic import is_traced

# The largest size of a feature: of larger ones, sums of products might not be finite, and scores would have no order.
# A layer norm's output is fifteen orders of magnitude smaller.
LARGEST = 1e15


def can_be_scored(tensor: Tensor) -> Tensor:
    """Which rows of a feature, (B,), are finite and no larger than `LARGEST` throughout."""
    if not tensor.is_floating_point():
        return torch.ones(len(tensor), dtype=torch.bool, device=tensor.device)
    small = torch.isfinite(tensor) if tensor.dtype == torch.float16 else tensor.abs() <= LARGEST
    return small.unsqueeze(1).flatten(1).all(dim=1)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Without autocast."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.cat` of tensors in any precision. Under autocast in bfloat16 on a CPU, `torch.cat` refuses float16."""
    with full_precision(tensors[0].device):
        return torch.cat(list(tensors))


@dataclass
class MimicEncoderOutput(ModelOutput):
    """What the encoder makes of a batch of B mentions or entities.

    Args:
        text_embeds (`torch.Tensor` of shape `(B, projection_dim)`): pooled text, of length 1.
        text_tokens (`torch.Tensor` of shape `(B, L, text hidden size)`): last hidden state of the text, padding too.
        image_embeds (`torch.Tensor` of shape `(B, image_hidden_size)`): pooled image.
        image_tokens (`torch.Tensor` of shape `(B, P, image_hidden_size)`): last hidden state of the image.
        text_model_output, vision_model_output (`BaseModelOutputWithPooling`, *optional*): the outputs of the backbone's
            two models, with `hidden_states` and `attentions`, where these were asked for.
    """

    text_embeds: Tensor = None  # type: ignore[assignment]
    text_tokens: Tensor = None  # type: ignore[assignment]
    image_embeds: Tensor = None  # type: ignore[assignment]
    image_tokens: Tensor = None  # type: ignore[assignment]
    text_model_output: Any = None
    vision_model_output: Any = None


class PairScores(NamedTuple):
    """Scores of pairs of mentions and entities, all of one shape: their mean, and those of the three units."""

    total: Tensor
    text: Tensor
    image: Tensor
    cross_modal: Tensor


class _Features:
    """Named tensors of the same first dimension, one row an item."""

    # What the features are of. Not told by the class: code that a checkpoint brings has classes of its own.
    side = ""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        if not is_traced():
            counts = {name: tensor.shape[0] for name, tensor in tensors.items()}
            if len(set(counts.values())) > 1:
                raise ValueError(f"{type(self).__name__}: the tensors differ in their first dimension: {counts}.")
        self.tensors = tensors

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0] if self.tensors else 0

    @property
    def device(self) -> torch.device:
        return self.tensors["text_embed"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["text_embed"].dtype

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The items that a slice, or a tensor of indices or booleans, picks; a slice makes views."""
        if not isinstance(rows, slice | Tensor):
            raise TypeError(f"{type(self).__name__} is indexed by a slice or a tensor, not {type(rows).__name__}.")
        return self._map(lambda tensor: tensor[rows])

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={tuple(tensor.shape[1:])}" for name, tensor in self.tensors.items())
        return f"{type(self).__name__}({len(self)} items: {shapes})"

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)({name: function(tensor) for name, tensor in self.tensors.items()})

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The features moved or cast, with the arguments of `torch.Tensor.to`; masks are moved only."""

        def move(tensor: Tensor) -> Tensor:
            moved = tensor.to(*args, **kwargs)
            return moved if tensor.is_floating_point() else tensor.to(moved.device)

        return self._map(move)

    def detach(self) -> Self:
        return self._map(Tensor.detach)

    @classmethod
    def cat(cls, parts: Iterable[Self]) -> Self:
        """The items of several batches in one."""
        parts = list(parts)
        if not parts:
            raise ValueError(f"{cls.__name__}.cat: nothing to join.")
        return cls({name: joined([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class EntityFeatures(_Features):
    """Features of N entities, as [`MimicModel.encode_entities`] makes them; indexed by entity."""

    side = "entity"


class MentionFeatures(_Features):
    """Features of M mentions, as [`MimicModel.encode_mentions`] makes them; indexed by mention."""

    side = "mention"


def add_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def pick_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, under what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


__all__ = [
    "LARGEST",
    "EntityFeatures",
    "MentionFeatures",
    "MimicEncoderOutput",
    "PairScores",
    "add_prefix",
    "can_be_scored",
    "full_precision",
    "joined",
    "pick_prefix",
]

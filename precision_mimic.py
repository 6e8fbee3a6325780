"""The precision in which features are stored, and the names and shapes of a model's features.

Knows neither shards nor files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .errors_mimic import EntityIndexError
from .features_mimic import can_be_scored
from .matching_mimic import EntityFeatures, Matcher, MimicEncoderOutput, full_precision

# What features may be stored in.
STORED_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
# Kept in float32 whatever the rest is stored in: a few numbers an entity, made from the stored vectors.
_EXACT = ("text_bias", "image_query_stats", "image_key_stats")


def quantized(
    features: EntityFeatures, matcher: Matcher, dtype: torch.dtype, ids: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Features as they are stored. What is made from vectors is made anew, from the vectors as they were rounded.

    Args:
        ids: the entities', for messages.

    Raises:
        EntityIndexError: if a number is not finite, or too large, for the precision or for scores.
    """
    with full_precision(features.device):
        return _quantized(features, matcher, dtype, ids)


def _quantized(
    features: EntityFeatures, matcher: Matcher, dtype: torch.dtype, ids: Sequence[str] | None
) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    rounded: dict[str, Tensor] = {}
    for name, tensor in features.tensors.items():
        tensor = tensor.detach().to("cpu")
        if name in _EXACT or tensor.dtype == torch.bool:
            stored[name] = tensor if tensor.dtype == torch.bool else tensor.float()
            continue
        tensor = tensor.float()
        _check_finite(name, tensor, ids)
        if dtype == torch.int8:
            scale = tensor.abs().amax(dim=-1).clamp(min=1e-12) / 127
            stored[name] = (tensor / scale.unsqueeze(-1)).round().to(torch.int8)
            stored[name + "_scale"] = scale
        else:
            stored[name] = tensor.to(dtype)
            if wrong := whose((~can_be_scored(stored[name])).nonzero()[:, 0], ids):
                raise EntityIndexError(
                    f'The values of `{name}` are too large for float16; use dtype="float32". They are those of {wrong}.'
                )
        rounded[name] = dequantized(stored, name)
    stored |= matcher.vdlu.entity_stats(rounded, stored)
    for name in _EXACT:
        _check_finite(name, stored[name], ids)
    return stored


def _check_finite(name: str, tensor: Tensor, ids: Sequence[str] | None) -> None:
    if wrong := whose((~can_be_scored(tensor)).nonzero()[:, 0], ids):
        raise EntityIndexError(
            f"The model gives `{name}` values that are not finite, or too large, of {wrong}; no index can be made of "
            "it."
        )


def whose(rows: Tensor, ids: Sequence[str] | None) -> str:
    """Rows in words; nothing if there are none."""
    shown = ", ".join(repr(ids[row]) if ids else str(row) for row in rows[:3].tolist())
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return shown and f"{'entity' if len(rows) == 1 else 'entities'} {shown}{more}"


def dequantized(stored: Mapping[str, Tensor], name: str) -> Tensor:
    tensor = stored[name]
    if tensor.dtype == torch.int8:
        return tensor.float() * stored[name + "_scale"].unsqueeze(-1)
    return tensor if tensor.dtype == torch.bool else tensor.float()


# Features of one model have the same names and shapes, but for the number of tokens, which is their first dimension.
TOKENS = ("text_query", "text_query_scale", "text_key", "text_value", "text_mask")


def layout_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: (tensor.dim(), *tensor.shape[2 if name in TOKENS else 1 :]) for name, tensor in tensors.items()}


def _blank(matcher: Matcher) -> tuple[MimicEncoderOutput, Tensor]:
    """What an encoder gives for one item, all zeros, and its mask: for the shapes."""
    projected, hidden = matcher.tglu.fc_cls.in_features, matcher.tglu.fc_query.in_features
    image = matcher.vdlu.dual_ent2men.cls_fc.in_features
    shapes = {
        "text_embeds": (projected,),
        "text_tokens": (1, hidden),
        "image_embeds": (image,),
        "image_tokens": (1, image),
    }
    device = matcher.tglu.fc_cls.weight.device
    zeros = {name: torch.zeros(1, *shape, device=device) for name, shape in shapes.items()}
    return MimicEncoderOutput(**zeros), torch.ones(1, 1, device=device)


def mention_layout(matcher: Matcher) -> dict[str, tuple[int, ...]]:
    return layout_of(matcher.mention_features(*_blank(matcher)).tensors)


def stored_layout(matcher: Matcher, dtype: torch.dtype) -> dict[str, Tensor]:
    """Features of one entity as they are stored, all zeros: for names, shapes and precision."""
    return quantized(matcher.entity_features(*_blank(matcher)), matcher, dtype)


__all__ = [
    "STORED_DTYPES",
    "TOKENS",
    "dequantized",
    "layout_of",
    "mention_layout",
    "quantized",
    "stored_layout",
    "whose",
]

"""The matcher: features of mentions and of entities, and the score of each pair of them.

Together with the files that it is made of (units_mimic, layers_mimic and features_mimic), this is the only place that
knows the names of features, the numbers that units keep with their vectors, and the weights of the total score. It
does not know how texts and images are encoded, nor how features are stored or searched.

Shapes: M mentions, N entities, L text tokens, P image tokens (the class token and the patches).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .configuration_mimic import MimicConfig
from .features_mimic import (
    EntityFeatures,
    MentionFeatures,
    MimicEncoderOutput,
    PairScores,
    add_prefix,
    full_precision,
    pick_prefix,
)
from .layers_mimic import UnitLayerNorm, UnitLinear, at_least_float32, is_traced
from .units_mimic import CrossModalFusionUnit, TextGlobalLocalUnit, VisionDualDirection, VisionDualUnit

# The total is the mean of the units' scores; the text and the image unit are themselves means of two parts.
UNITS = 3
HALF_UNITS = 2 * UNITS


class Matcher(nn.Module):
    """The layer norms that mentions and entities share, and the three units.

    A model calls its matcher, whatever it wants of it, with tensors alone, and is given tensors: so hooks that are
    attached to the call, and what they fetch, gather or move, work for it as for any layer.
    """

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        eps = config.layer_norm_eps
        self.text_cls_layernorm = UnitLayerNorm(config.text_embed_width, eps=eps)
        self.text_tokens_layernorm = UnitLayerNorm(config.text_width, eps=eps)
        self.image_cls_layernorm = UnitLayerNorm(config.image_hidden_size, eps=eps)
        self.image_tokens_layernorm = UnitLayerNorm(config.image_hidden_size, eps=eps)
        self.tglu = TextGlobalLocalUnit(config)
        self.vdlu = VisionDualUnit(config)
        self.cmfu = CrossModalFusionUnit(config)

    def forward(self, one: Any, other: Any, side: str | None = None) -> Any:
        """Scores of all pairs, or features of one side.

        Args:
            one, other: without `side`, features of M mentions and of N entities, or the dicts of their tensors. With
                it, a [`MimicEncoderOutput`] and the attention mask of its texts.
            side: "mention" or "entity".

        Returns:
            [`PairScores`] of shape (M, N), float32; with `side`, a dict of the features' tensors.
        """
        if side is not None:
            with full_precision(one.text_embeds.device):
                return self._features(one, other, side)
        mention, entity = getattr(one, "tensors", one), getattr(other, "tensors", other)
        with full_precision(mention["text_embed"].device):
            return _mean_of(*(unit(mention, entity) for unit in (self.tglu, self.vdlu, self.cmfu)))

    def mention_features(self, encoded: MimicEncoderOutput, mask: Tensor) -> MentionFeatures:
        return MentionFeatures(self(encoded, mask, side="mention"))

    def entity_features(self, encoded: MimicEncoderOutput, mask: Tensor) -> EntityFeatures:
        return EntityFeatures(self(encoded, mask, side="entity"))

    def score_pairs(
        self, mentions: MentionFeatures, entities: EntityFeatures, local: Tensor | None = None
    ) -> PairScores:
        """Scores of mention i with entity i only; the logits have the shape (pairs,). `local` as in the text unit."""
        mention, entity = mentions.tensors, entities.tensors
        with full_precision(mention["text_embed"].device):
            return _mean_of(
                self.tglu.score_pairs(mention, entity, local),
                self.vdlu.score_pairs(mention, entity),
                self.cmfu.score_pairs(mention, entity),
            )

    def _features(self, encoded: MimicEncoderOutput, mask: Tensor, side: str) -> dict[str, Tensor]:
        device = self._device()
        text_embeds = self.text_cls_layernorm(_moved(encoded.text_embeds, device))
        text_tokens = self.text_tokens_layernorm(_moved(encoded.text_tokens, device))
        image_embeds = self.image_cls_layernorm(_moved(encoded.image_embeds, device))
        image_tokens = self.image_tokens_layernorm(_moved(encoded.image_tokens, device))
        of_text, of_image = (
            (self.tglu.entity_features, self.vdlu.entity_features)
            if side == "entity"
            else (self.tglu.mention_features, self.vdlu.mention_features)
        )
        return (
            of_text(text_embeds, text_tokens, mask.to(text_embeds.device))
            | of_image(image_embeds, image_tokens)
            | self.cmfu.features(text_embeds, image_tokens)
        )

    def _device(self) -> torch.device | None:
        """Where the weights are: the encoder may be elsewhere. `None` if they are fetched when they are needed."""
        device = next(self.parameters()).device
        return None if device.type == "meta" else device


def _moved(x: Tensor, device: torch.device | None) -> Tensor:
    return at_least_float32(x if device is None else x.to(device))


def _mean_of(text: Tensor, image: Tensor, cross_modal: Tensor) -> PairScores:
    total = (text + image + cross_modal) / UNITS
    return PairScores(total=total, text=text, image=image, cross_modal=cross_modal)


__all__ = [
    "HALF_UNITS",
    "UNITS",
    "CrossModalFusionUnit",
    "EntityFeatures",
    "Matcher",
    "MentionFeatures",
    "MimicEncoderOutput",
    "PairScores",
    "TextGlobalLocalUnit",
    "UnitLinear",
    "VisionDualDirection",
    "VisionDualUnit",
    "add_prefix",
    "at_least_float32",
    "full_precision",
    "is_traced",
    "pick_prefix",
]

"""The dual encoders that MIMIC can stand on: what each family does in its own way, one adapter each.

An adapter answers two kinds of questions. Of a configuration: how wide the features are, how large an image is, how
many tokens a text may have. Of a model: what its pooled texts and images are, projected but not normalized, and what
its tokens are. Nothing else in this project asks which family a backbone is of.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor, nn


class Backbone:
    """A family: two towers, `text_model` and `vision_model`, whose pooled outputs are projected to one width.

    Every method takes a configuration or a model of the family, so that an adapter has no state.
    """

    model_type = ""
    #: Name of the class of transformers.
    model_class = ""
    #: Name of the encoder's attribute that holds the model: the first part of the names of its parameters.
    attribute = "backbone"

    def build(self, config: Any) -> Any:
        """A model with random weights."""
        return getattr(transformers, self.model_class)._from_config(config)

    def text_width(self, config: Any) -> int:
        """Width of a text's tokens."""
        return config.text_config.hidden_size

    def text_embed_width(self, config: Any) -> int:
        """Width of a pooled text."""
        return config.projection_dim

    def image_width(self, config: Any) -> int:
        """Width of an image's tokens."""
        return config.vision_config.hidden_size

    def image_embed_width(self, config: Any) -> int:
        """Width of a pooled image."""
        return config.projection_dim

    def image_size(self, config: Any) -> int:
        """Side of the square that the model sees, in pixels."""
        return config.vision_config.image_size

    def token_embedding(self, model: Any) -> nn.Module:
        return model.text_model.embeddings.token_embedding

    def set_token_embedding(self, model: Any, value: nn.Module) -> None:
        model.text_model.embeddings.token_embedding = value

    def columns(self, config: Any, input_ids: Tensor, attention_mask: Tensor) -> int:
        """How many columns hold all that the pooled texts and the tokens of a batch depend on."""
        return int(attention_mask.bool().any(dim=0).nonzero().max()) + 1

    def encode_texts(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pooled texts `(B, text_embed_width)` and tokens `(B, L, text_width)`."""
        text = model.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return model.text_projection(text.pooler_output), text.last_hidden_state

    def encode_images(self, model: Any, pixel_values: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Pooled images `(B, image_embed_width)` and tokens `(B, P, image_width)`."""
        image = model.vision_model(pixel_values=pixel_values, **kwargs)
        return model.visual_projection(image.pooler_output), image.last_hidden_state


class _CLIP(Backbone):
    """Texts are pooled at the first end-of-text token, which a causal mask lets see what stands before it."""

    model_type = "clip"
    model_class = "CLIPModel"
    attribute = "clip"

    def columns(self, config: Any, input_ids: Tensor, attention_mask: Tensor) -> int:
        eos: Any = config.text_config.eos_token_id
        ends = input_ids if eos == 2 else (input_ids == eos).int()  # 2 is a mistake of old configurations
        columns = attention_mask.bool().any(dim=0)
        columns[ends.argmax(dim=1)] = True
        return int(columns.nonzero().max()) + 1


BACKBONES: dict[str, Backbone] = {backbone.model_type: backbone for backbone in (_CLIP(),)}


def backbone_of(config: Any) -> Backbone:
    """The adapter for a backbone's configuration."""
    return BACKBONES[config.model_type]


__all__ = ["BACKBONES", "Backbone", "backbone_of"]

"""The encoder of mentions and entities: a backbone, and its image features projected to the width of the units."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .backbones_mimic import backbone_of
from .configuration_mimic import MimicConfig
from .matching_mimic import MimicEncoderOutput, is_traced


class Encoder(nn.Module):
    """A dual encoder, with its image features projected to the units' width. The same for mentions and entities.

    Args:
        config ([`MimicConfig`]): whose `backbone_config` says which dual encoder.
    """

    # Modules under one name or the other, which type checkers would else take for tensors.
    clip: Any

    def __init__(self, config: MimicConfig) -> None:
        super().__init__()
        backbone: Any = config.backbone_config
        self.mask_padding = config.mask_text_padding
        self.pooling = config.text_pooling
        self.adapter = backbone_of(backbone)
        self.set_backbone(self.adapter.build(backbone))
        self.image_cls_fc = nn.Linear(config.image_embed_width, config.image_hidden_size)
        self.image_tokens_fc = nn.Linear(config.image_width, config.image_hidden_size)

    @property
    def backbone(self) -> Any:
        """The dual encoder, a model of transformers."""
        return getattr(self, self.adapter.attribute)

    def set_backbone(self, model: nn.Module) -> None:
        setattr(self, self.adapter.attribute, model)
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Leaves out of training what no gradient reaches, which is an error where several processes train."""
        for parameter in self.adapter.unused(self.backbone, self.pooling):
            parameter.requires_grad_(False)

    def no_split_modules(self) -> set[str]:
        """Classes of the backbone's modules that must stay whole on one device."""
        models = [part for part in self.backbone.modules() if isinstance(part, PreTrainedModel)]
        return {name for model in models for name in model._no_split_modules or ()}

    def get_input_embeddings(self) -> nn.Module:
        return self.adapter.token_embedding(self.backbone)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.adapter.set_token_embedding(self.backbone, value)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, **kwargs: Any
    ) -> MimicEncoderOutput:
        """What the backbone makes of texts and images; `**kwargs` are handed to its text and vision models.

        Their own outputs are kept where hidden states or attentions are asked for.
        """
        kwargs["return_dict"] = True
        with_states = any(kwargs.get(name) for name in ("output_hidden_states", "output_attentions"))
        # What makes a batch smaller would leave gaps in the states; and a graph must not depend on the batch's values.
        whole = with_states or is_traced() or self._will_be_trained()
        text_embeds, text_tokens, text = self.encode_texts(input_ids, attention_mask, whole, **kwargs)
        image_embeds, image_tokens, image = self.encode_images(pixel_values, whole, **kwargs)
        return MimicEncoderOutput(
            text_embeds=text_embeds,
            text_tokens=text_tokens,
            image_embeds=image_embeds,
            image_tokens=image_tokens,
            text_model_output=text if with_states else None,
            vision_model_output=image if with_states else None,
        )

    def _will_be_trained(self) -> bool:
        """Whether all is computed as in training: with a graph, or to be computed again with one. Random numbers, as
        of dropout, must then be drawn for the same tensors."""
        return torch.is_grad_enabled() or self.training

    def encode_texts(
        self, input_ids: Tensor, attention_mask: Tensor, whole: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """Pooled texts, of length 1, their tokens, and all that the text model gives.

        Args:
            whole: whether nothing of the batch may be left out; padding that counts nowhere is, else.
        """
        length = kept = input_ids.shape[1]
        if self.mask_padding and not whole:
            kept = self.adapter.columns(self.backbone.config, input_ids, attention_mask)
        mask = attention_mask[:, :kept]
        pooled, output = self.adapter.encode_texts(self.backbone, input_ids[:, :kept], mask, self.pooling, **kwargs)
        tokens = output.last_hidden_state
        if self.mask_padding and not self._will_be_trained():
            # No score depends on padding: zeros, so that features do not depend on the rest of the batch either.
            tokens = tokens.masked_fill(~mask[:, :, None].bool().to(tokens.device), 0)
            tokens = tokens if whole else F.pad(tokens, (0, 0, 0, length - kept))
        return F.normalize(pooled, dim=-1), tokens, output

    def encode_images(self, pixel_values: Tensor, whole: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor, Any]:
        """Pooled images and tokens, in the units' width, and all that the vision model gives; `whole` as of texts."""
        rows = None
        if not whole:
            # Whatever has no image has the same blank one, which is encoded once.
            blank = ~pixel_values.flatten(1).any(dim=1)
            if int(blank.sum()) > 1:
                shown = (~blank).nonzero().squeeze(1)
                rows = torch.zeros(len(blank), dtype=torch.long, device=blank.device)
                rows[shown] = torch.arange(1, len(shown) + 1, device=blank.device)
                pixel_values = torch.cat([pixel_values[blank][:1], pixel_values[shown]])
        pooled, output = self.adapter.encode_images(self.backbone, pixel_values, **kwargs)
        embeds = self.image_cls_fc(F.normalize(pooled, dim=-1))
        tokens = self.image_tokens_fc(output.last_hidden_state)
        if rows is not None:
            embeds, tokens = embeds[rows.to(embeds.device)], tokens[rows.to(tokens.device)]
        return embeds, tokens, output


__all__ = ["Encoder"]

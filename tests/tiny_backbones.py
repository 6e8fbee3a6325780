"""A tiny checkpoint of each family of backbones: transformers' own classes, random weights, saved to disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "[SEP]"]
# Some tokenizers of transformers add special tokens of their own to the 260.
TEXT: dict[str, Any] = {
    "vocab_size": 270,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION: dict[str, Any] = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte; `<s>` before a text and `</s>` after it, and padding that is neither."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", sep_token="[SEP]"
    )


@dataclass
class Family:
    """How a tiny model of a family is made, and what is to be expected of it."""

    name: str
    side: int
    build: Callable[[], PreTrainedModel]
    pixels: dict[str, Any] = field(default_factory=dict)  # preprocessor_config.json
    settings: dict[str, Any] = field(default_factory=dict)  # of MimicConfig
    masked: bool = True  # whether its texts are read with a mask
    tokens: int = 10  # of an image


def _clip() -> PreTrainedModel:
    vision = {**VISION, "image_size": 24, "patch_size": 8}
    config = transformers.CLIPConfig(
        text_config={**TEXT, **IDS, "max_position_embeddings": 40}, vision_config=vision, projection_dim=14
    )
    return transformers.CLIPModel(config)


def _metaclip() -> PreTrainedModel:
    vision = {**VISION, "image_size": 24, "patch_size": 8}
    config = transformers.MetaClip2Config(
        text_config={**TEXT, **IDS, "max_position_embeddings": 40}, vision_config=vision, projection_dim=14
    )
    return transformers.MetaClip2Model(config)


def _siglip() -> PreTrainedModel:
    config = transformers.SiglipConfig(
        text_config={**TEXT, **IDS, "max_position_embeddings": 44, "projection_size": 14},
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
    )
    return transformers.SiglipModel(config)


def _siglip2() -> PreTrainedModel:
    config = transformers.Siglip2Config(
        text_config={**TEXT, **IDS, "max_position_embeddings": 44, "projection_size": 14},
        vision_config={**VISION, "num_patches": 9, "patch_size": 4},
    )
    return transformers.Siglip2Model(config)


def _chinese_clip() -> PreTrainedModel:
    config = transformers.ChineseCLIPConfig(
        text_config={**TEXT, **IDS, "max_position_embeddings": 50},
        vision_config={**VISION, "image_size": 24, "patch_size": 8},
        projection_dim=14,
    )
    return transformers.ChineseCLIPModel(config)


def _altclip() -> PreTrainedModel:
    config = transformers.AltCLIPConfig(
        text_config={**TEXT, **IDS, "max_position_embeddings": 50, "project_dim": 18},
        vision_config={**VISION, "image_size": 24, "patch_size": 8},
        projection_dim=14,
    )
    return transformers.AltCLIPModel(config)


def _two_towers(text: Any, vision: Any = None) -> PreTrainedModel:
    vision = vision or transformers.ViTConfig(**VISION, image_size=24, patch_size=8)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=14)
    return transformers.VisionTextDualEncoderModel(config)


def _bert() -> PreTrainedModel:
    return _two_towers(transformers.BertConfig(**TEXT, pad_token_id=1, max_position_embeddings=64))


def _roberta() -> PreTrainedModel:
    return _two_towers(
        transformers.XLMRobertaConfig(**TEXT, **IDS, max_position_embeddings=50),
        transformers.Dinov2Config(
            hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
        ),
    )


def _without_a_pooler() -> PreTrainedModel:
    text = transformers.DistilBertConfig(vocab_size=270, dim=16, n_layers=2, n_heads=2, hidden_dim=24, pad_token_id=1)
    return _two_towers(text)


_CROPPED = {
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 24, "width": 24},
    "do_center_crop": True,
    "resample": 3,
}
_SQUARE = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
FAMILIES = {
    family.name: family
    for family in (
        Family("clip", 24, _clip),
        Family("metaclip_2", 24, _metaclip, _CROPPED),
        Family("siglip", 32, _siglip, _SQUARE, {"text_max_length": 44}, masked=False, tokens=16),
        Family("siglip2", 12, _siglip2, {}, {"text_max_length": 44}, masked=False, tokens=9),
        Family("chinese_clip", 24, _chinese_clip, {"size": {"height": 24, "width": 24}, "resample": 3}),
        Family("altclip", 24, _altclip, _CROPPED),
        Family("bert and vit", 24, _bert, {"size": 24, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
        Family("xlm-roberta and dinov2", 24, _roberta),
        Family("distilbert and vit", 24, _without_a_pooler, {}, {"text_pooling": "mean"}),
    )
}


def save_family(family: Family, path: Path) -> Path:
    """A checkpoint with a tokenizer, and an image processor where the family has one of its own."""
    torch.manual_seed(0)
    model = family.build()
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights as they are initialized are so small that all inputs look alike.
            parameter.copy_(parameter * 5 if parameter.dim() > 1 else parameter + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    if family.pixels:
        (path / "preprocessor_config.json").write_text(json.dumps(family.pixels))
    return path

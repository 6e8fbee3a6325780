"""A CLIP small enough to run in a test: its configuration, a checkpoint of it with a tokenizer, inputs for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from mimic_el.configuration_mimic import MimicConfig
from mimic_el.modeling_mimic import MimicModel

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's own tokenizer, with no merges: a token for each byte, and for each byte that ends a word."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{char}</w>" for char in alphabet), BOS, EOS]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])


def tiny_clip_config(positions: int = 40) -> CLIPConfig:
    """Width 16, 2 layers, 3 x 3 patches; fits `tiny_tokenizer`."""
    common = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPConfig(
        text_config={
            "vocab_size": 514,
            "hidden_size": 16,
            "intermediate_size": 24,
            "max_position_embeddings": positions,
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 513,
            **common,
        },
        vision_config={"hidden_size": 12, "intermediate_size": 20, "image_size": 24, "patch_size": 8, **common},
        projection_dim=14,
    )


def save_tiny_clip(path: Path, tokenizer: bool = True) -> Path:
    """A CLIP checkpoint with random weights, as `from_pretrained` loads it."""
    torch.manual_seed(0)
    CLIPModel(tiny_clip_config()).save_pretrained(path)
    if tokenizer:
        tiny_tokenizer().save_pretrained(path)
    return path


def tiny_config(**settings: Any) -> MimicConfig:
    """Sizes that differ from each other, so that none can stand for another."""
    sizes = {"image_hidden_size": 10, "tglu_hidden_size": 8, "vdlu_hidden_size": 6, "cmfu_hidden_size": 9}
    return MimicConfig(**{"backbone_config": tiny_clip_config(), "text_max_length": 12, **sizes, **settings})


def tiny_model(seed: int = 0, **settings: Any) -> MimicModel:
    """A model whose layer norms and biases are random too, so that no term of the equations vanishes.

    Its matcher has the same weights whatever version of transformers drew those of the encoder before.
    """
    torch.manual_seed(seed)
    model = MimicModel(tiny_config(**settings)).eval()
    generator = torch.Generator().manual_seed(7 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("matcher") and parameter.dim() > 1:
                bound = parameter.shape[1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            elif name.startswith("matcher"):
                weight = float(name.endswith("norm.weight"))
                parameter.normal_(weight, 0.3, generator=generator)
            elif parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.startswith("encoder.clip"):
                parameter.mul_(5)  # CLIP starts from weights so small that all inputs look alike
    return model


def tiny_inputs(count: int, seed: int = 0, prefix: str = "", length: int = 12) -> dict[str, Tensor]:
    """Texts of different lengths, padded with the end-of-text token, and images, of which every third is absent."""
    generator = torch.Generator().manual_seed(7 + seed)
    lengths = torch.randint(3, length + 1, (count, 1), generator=generator)
    positions = torch.arange(length)
    input_ids = torch.randint(0, 512, (count, length), generator=generator)
    input_ids[:, 0] = 512
    input_ids = torch.where(positions < lengths - 1, input_ids, 513)
    pixel_values = torch.randn(count, 3, 24, 24, generator=generator)
    pixel_values[2::3] = 0
    return {
        f"{prefix}input_ids": input_ids,
        f"{prefix}attention_mask": (positions < lengths).long(),
        f"{prefix}pixel_values": pixel_values,
    }

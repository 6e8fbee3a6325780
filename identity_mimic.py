"""Which model made an index: what tells models apart, and how that is compared.

An index holds features that mean something to one model only. It notes the configuration that the features depend on,
the weights of the matcher, and a sample of the encoder's weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .configuration_mimic import MimicConfig
from .errors_mimic import EntityIndexError
from .matching_mimic import Matcher
from .modeling_mimic import MimicModel


def model_facts(model: MimicModel) -> dict[str, Any]:
    """What an index notes of the model that made it; plain values, as JSON has them."""
    return {
        "name": model_name(model),
        "fingerprint": _fingerprint(model.config, model.matcher),
        "probe": _probe(model),
        "config": _without_paths(model.config.to_dict()),
    }


def check_made_by(facts: Mapping[str, Any], model: MimicModel) -> None:
    """Makes sure that facts that an index noted are of this model.

    Raises:
        EntityIndexError: if they are of another.
    """
    same = facts["fingerprint"] == _fingerprint(model.config, model.matcher)
    if not same or not _same_probe(facts["probe"], _probe(model)):
        raise EntityIndexError(
            f"This index was made by the model {facts['name']!r}, and the model {model_name(model)!r} has other "
            "weights or another configuration: its scores would mean nothing. Use the model that made the index, "
            "or build the index again with EntityIndex.build(model, processor, entities, output_dir)."
        )


def same_model(facts: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two notes are of the same model. Raises `KeyError` or `TypeError` where one is damaged."""
    return facts["fingerprint"] == other["fingerprint"] and _same_probe(facts["probe"], other["probe"])


def model_name(model: MimicModel) -> str:
    """The model's Hub id, or its directory's absolute path, which no Hub id looks like."""
    name = str(model.config.name_or_path or type(model).__name__)
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def copy_of_matcher(model: MimicModel) -> Matcher:
    """The model's matcher, in float32 on the CPU: what scoring needs of the model."""
    config: Any = model.config
    copy = Matcher(config)
    copy.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in model.matcher.state_dict().items()})
    return copy


def _fingerprint(config: Any, matcher: nn.Module) -> str:
    """A hash of the configuration that features depend on, and of the weights of the matcher."""
    digest = hashlib.sha256(json.dumps(_features_config(config), sort_keys=True).encode())
    for name, tensor in sorted(matcher.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _features_config(config: MimicConfig) -> dict[str, Any]:
    """The part of a configuration that the features depend on."""
    backbone: Any = config.backbone_config
    own = ("image_hidden_size", "tglu_hidden_size", "vdlu_hidden_size", "cmfu_hidden_size", "text_max_length")
    names = (*own, "layer_norm_eps", "mask_text_padding")
    result: dict[str, Any] = {name: getattr(config, name) for name in names}
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    text, vision = backbone.text_config, backbone.vision_config
    facts: dict[str, Any] = {
        "projection_dim": getattr(backbone, "projection_dim", None),
        "text_config": {name: getattr(text, name, None) for name in (*sizes, "vocab_size", "max_position_embeddings")},
        "vision_config": {name: getattr(vision, name, None) for name in (*sizes, "image_size", "patch_size")},
    }
    if backbone.model_type != "clip":  # whose facts are those of the indexes that were there before other families
        facts["model_type"] = [backbone.model_type, text.model_type, vision.model_type]
        result["text_pooling"] = config.text_pooling
    result["backbone_config"] = facts
    return result


def _probe(model: MimicModel) -> dict[str, Any]:
    """A sample of the encoder's weights; with the fingerprint of the matcher it tells models apart.

    Hashing all of an encoder would take as long as a search. What training changes it changes everywhere.
    """
    samples, dtype = [], ""
    for parameter in model.encoder.parameters():
        flat = parameter.detach().flatten()
        samples.append(flat[:: max(1, len(flat) // 16)][:16].float().cpu())
        dtype = dtype or str(parameter.dtype).removeprefix("torch.")
    values = torch.cat(samples).numpy()
    few = values[:: max(1, len(values) // 64)]
    return {"dtype": dtype, "sha256": hashlib.sha256(values.tobytes()).hexdigest(), "values": few.tolist()}


def _same_probe(one: Any, other: Mapping[str, Any]) -> bool:
    if not isinstance(one, Mapping) or one.keys() != other.keys():
        return False
    if one["dtype"] == other["dtype"]:
        return one["sha256"] == other["sha256"]
    # The same model in another precision: its weights are rounded.
    here, there = one["values"], other["values"]
    return len(here) == len(there) and bool(np.allclose(here, there, rtol=1e-2, atol=1e-4))


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the names of the directories that it was loaded from."""
    parts = {name: _without_paths(value) if isinstance(value, dict) else value for name, value in config.items()}
    parts.pop("_name_or_path", None)
    return parts


__all__ = ["check_made_by", "copy_of_matcher", "model_facts", "model_name", "same_model"]

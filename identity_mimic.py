"""Which model and processor an index belongs to: what is noted of them, and how it is compared.

The features in an index mean something to one model only. An index notes everything that they depend on:

- the configuration, except for what cannot change a feature (`_NOT_IN_FEATURES`);
- all weights of the matcher and of the encoder, as they are in memory, also if they are quantized;
- the processor: its settings, those for images, the tokenizer's vocabulary, and the tokens of some texts.

Not noted: `reduce_jpeg` and `fast_resize` of a processor, which an index may be built with to be faster; merges of a
tokenizer that none of those texts uses; weights that are on a disk or nowhere ("meta"); changes through `.data` later
on; and, if the model is loaded in another precision than the one that made the index, changes that a sample of each
tensor does not show.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .configuration_mimic import MimicConfig
from .errors_mimic import EntityIndexError
from .matching_mimic import Matcher
from .modeling_mimic import MimicModel
from .weights_mimic import matcher_shape, matcher_weights, state_at_hand

_VERSION = 2
# Of a model's own configuration what features depend on; what the rest is for, a test lists.
_OWN = (
    "backbone_config",
    "image_hidden_size",
    "tglu_hidden_size",
    "vdlu_hidden_size",
    "cmfu_hidden_size",
    "text_max_length",
    "layer_norm_eps",
    "mask_text_padding",
    "text_pooling",
)
# Of a backbone's configuration, and of those within it, what no feature depends on: names, how it was initialized, how
# it is trained, in which precision and by which kernels it is computed, and what else it may return.
_NOT_IN_FEATURES = (
    *("_attn_implementation", "_commit_hash", "_name_or_path", "architectures", "attention_dropout"),
    *("attention_probs_dropout_prob", "attn_implementation", "auto_map", "chunk_size_feed_forward"),
    *("classifier_dropout", "drop_path_rate", "dropout", "dtype", "finetuning_task", "gradient_checkpointing"),
    *("hidden_dropout", "hidden_dropout_prob", "id2label", "initializer_factor", "initializer_range", "label2id"),
    *("logit_bias_init_value", "logit_scale_init_value", "name_or_path", "num_labels", "output_attentions"),
    *("output_hidden_states", "prefix", "problem_type", "projection_dropout", "quantization_config", "return_dict"),
    *("return_loss", "task_specific_params", "tie_word_embeddings", "tokenizer_class", "torch_dtype"),
    *("transformers_version", "use_cache"),
)
_NOT_IN_PIXELS = (
    *("_processor_class", "auto_map", "data_format", "device", "disable_grouping", "feature_extractor_type"),
    *("image_processor_type", "input_data_format", "processor_class", "return_tensors"),
)
# Letters of several scripts, capitals, marks, numbers, spaces, and what ends and joins words.
_TEXTS = (
    "Orange [SEP] Orange opened a shop on the corner of 5th Avenue.",
    "  The QUICK brown fox -- doesn't; it's \"quoted\" (1984/2001) @home #tag 50% & more…  ",
    "Ærøskøbing, Łódź, Þórshöfn, İstanbul, naïve café Cafe\u0301 ﬁne Ⅷ ½",
    "Москва Αθήνα القاهرة ירושלים नई दिल्ली กรุงเทพ",
    "東京 서울 北京市 ひらがなカタカナ",
    "🍊👩‍👩‍👧 internationalization uncharacteristically antidisestablishmentarianism",
    "",
)
_SAMPLE = 4096


def model_facts(model: MimicModel, processor: Any = None) -> dict[str, Any]:
    """What an index notes of what made it; plain values, as JSON has them.

    Args:
        processor: what its entities were read with; not noted where it is not known.
    """
    matcher = copy_of_matcher(model)
    facts = {
        "name": model_name(model),
        "identity": _VERSION,
        "config": _plain(_without_paths(model.config.to_dict())),
        "matcher": _matcher_digest(matcher),
        "encoder": _encoder_facts(model),
        "processor": None if processor is None else _processor_facts(processor),
    }
    return {**facts, "fingerprint": _fingerprint(facts, matcher)}


def check_facts(facts: Mapping[str, Any], matcher: nn.Module, where: Path) -> None:
    """Makes sure that the facts that an index noted, and the matcher that lies with it, belong together.

    Raises:
        EntityIndexError: if one of them was changed.
    """
    try:
        if facts.get("identity") is None:
            same = facts["fingerprint"] == _first_fingerprint(MimicConfig.from_dict(dict(facts["config"])), matcher)
        else:
            same = facts["fingerprint"] == _fingerprint(facts, matcher)
    except Exception:  # whatever the classes of configurations raise at values that are none
        same = False
    if not same:
        raise EntityIndexError(
            f"The matcher in {where} and the configuration that its index notes are not those that the index was made "
            "with: one of them was changed or damaged. Restore it, or build the index again."
        )


def check_made_by(facts: Mapping[str, Any], model: MimicModel, processor: Any = None) -> None:
    """Makes sure that facts that an index noted are of this model, and of this processor where it is given.

    Raises:
        EntityIndexError: if they are of another. Says in what it differs.
    """
    if differences := _differences(facts, model, processor):
        shown = "; ".join(differences[:5]) + (" ..." if len(differences) > 5 else "")
        raise EntityIndexError(
            f"This index was made by the model {facts['name']!r}, and the model {model_name(model)!r} has other "
            f"weights or another configuration: its scores would mean nothing. What differs: {shown}. Use the model "
            "and processor that made the index, or build the index again with EntityIndex.build(model, processor, "
            "entities, output_dir)."
        )


def same_model(facts: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two notes are of the same model and processor. Raises `KeyError` or `TypeError` where one is damaged."""
    if facts.get("identity") != other["identity"]:
        return False
    return (
        facts["matcher"] == other["matcher"]
        and not _unlike(_of_features(facts["config"]), _of_features(other["config"]))
        and not _unlike(facts["processor"] or {}, other["processor"] or {})
        and _same_encoder(facts["encoder"], other["encoder"])
    )


def model_name(model: MimicModel) -> str:
    """The model's Hub id, or its directory's absolute path, which no Hub id looks like."""
    name = str(model.config.name_or_path or type(model).__name__)
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    return name.encode("utf-8", "backslashreplace").decode()  # a directory's name may be no text


def copy_of_matcher(model: MimicModel) -> Matcher:
    """The model's matcher, in float32 on the CPU, with adapters merged: what scoring needs of the model."""
    matcher = matcher_shape(model.config)
    matcher.load_state_dict(matcher_weights(model), assign=True)
    return matcher


def _differences(facts: Mapping[str, Any], model: MimicModel, processor: Any) -> list[str]:
    """In what a model and its processor differ from what an index notes, in words."""
    here = _of_features(_plain(model.config.to_dict()))
    matcher = copy_of_matcher(model)
    try:
        found = _unlike(_of_features(facts["config"]), here)
        if facts.get("identity") is None:
            if facts["fingerprint"] != _first_fingerprint(model.config, matcher):
                found.append("the matcher's weights or sizes")
            if not _same_probe(facts["probe"], _probe(model)):
                found.append("the encoder's weights")
            return found
        if facts["matcher"] != _matcher_digest(matcher):
            found.append("the matcher's weights")
        if not _same_encoder(facts["encoder"], _encoder_facts(model)):
            found.append("the encoder's weights")
        if processor is not None and facts["processor"] is not None:
            found += [f"the processor's {item}" for item in _unlike(facts["processor"], _processor_facts(processor))]
        return found
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise EntityIndexError(
            f"What this index notes of the model that made it is damaged: {error!r}. Build the index again."
        ) from error


# --- Configuration and processor


def _of_features(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration, as a dict, that features depend on."""

    def kept(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: kept(item) for name, item in value.items() if name not in _NOT_IN_FEATURES}

    return {name: kept(config[name]) for name in _OWN if name in config}


def _unlike(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The names of what differs, with both values. What only one side has is of another version of a library."""
    found = []
    for name in [name for name in there if name in here]:
        one, other = there[name], here[name]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += _unlike(one, other, f"{prefix}{name}.")
        elif one != other:
            found.append(f"{prefix}{name} ({str(one)[:40]} there, {str(other)[:40]} here)")
    return found


def _processor_facts(processor: Any) -> dict[str, Any]:
    settings = _plain(processor.image_processor.to_dict())
    return {
        "text_max_length": processor.text_max_length,
        "correct_images": processor.correct_images,
        "separator": processor.separator,
        "image_processor": {name: value for name, value in settings.items() if name not in _NOT_IN_PIXELS},
        "tokenizer": {"vocabulary": _vocabulary(processor.tokenizer), "texts": _tokens(processor)},
    }


_VOCABULARIES: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()


def _vocabulary(tokenizer: Any) -> str:
    """A hash of the tokens and their numbers."""
    known = _VOCABULARIES.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
        known = _VOCABULARIES[tokenizer] = (len(tokenizer), hashlib.sha256(text.encode()).hexdigest())
    return known[1]


def _tokens(processor: Any) -> str:
    """A hash of what the tokenizer makes of some texts."""
    inputs = processor.tokenize(list(_TEXTS))
    numbers = [inputs["input_ids"].tolist(), inputs["attention_mask"].tolist()]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the names of the directories that it was loaded from."""
    parts = {name: _without_paths(value) if isinstance(value, dict) else value for name, value in config.items()}
    parts.pop("_name_or_path", None)
    return parts


# --- Weights


def _fingerprint(facts: Mapping[str, Any], matcher: nn.Module) -> str:
    """A hash of all that facts say of what features depend on, and of the weights of a matcher."""
    known = [_VERSION, _of_features(facts["config"]), facts["encoder"], facts["processor"], _matcher_digest(matcher)]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _matcher_digest(matcher: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(matcher.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


_ENCODERS: WeakKeyDictionary[Any, tuple[Any, dict[str, Any]]] = WeakKeyDictionary()


def _encoder_facts(model: MimicModel) -> dict[str, Any]:
    """A hash of all of the encoder's weights, and of each a sample, which tells it in another precision.

    Hashing takes a second for a gigabyte, so what was hashed is remembered until a weight is changed.
    """
    encoder = model.encoder
    state = [item for item in state_at_hand(encoder).values() if isinstance(item, Tensor)]
    key = None
    if not any(tensor.is_inference() for tensor in state):  # these do not say whether they were changed
        key = [(tensor.data_ptr() if _is_plain(tensor) else id(tensor), tensor._version) for tensor in state]
        key.append(_probe(model)["sha256"])  # a change by way of `.data` counts no version
    known = _ENCODERS.get(encoder)
    if known is not None and key is not None and known[0] == key:
        return known[1]
    digest, kinds = hashlib.sha256(), set()
    for tensor in state:
        kinds |= _kinds(tensor)
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        for piece in _bytes_of(tensor):
            digest.update(piece)
    samples = [_moments(parameter) for parameter in encoder.parameters()]
    facts = {
        "dtype": " ".join(sorted(kinds)),
        "sha256": digest.hexdigest(),
        "sample": " ".join("? ?" if item is None else f"{item[0]:.4e} {item[1]:.4e}" for item in samples),
    }
    _ENCODERS[encoder] = (key, facts)
    return facts


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def _kinds(tensor: Tensor) -> set[str]:
    """Names of the types of the numbers that a tensor is stored in."""
    if hasattr(tensor, "__tensor_flatten__"):
        return set().union(*(_kinds(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]))
    return {str(tensor.dtype).removeprefix("torch.")}


def _bytes_of(tensor: Tensor) -> Iterator[Any]:
    """The bytes that a tensor is stored in; of one that is made of others, such as quantized ones, theirs."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _bytes_of(getattr(tensor, name))
    elif tensor.is_meta or not tensor.numel():
        yield b"-"
    else:
        tensor = tensor.detach()
        tensor = tensor.int_repr() if tensor.is_quantized else tensor
        yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _moments(parameter: Tensor) -> tuple[float, float] | None:
    """Mean and standard deviation of a sample of a parameter's values; `None` where they cannot be had."""
    try:
        values = _dequantized(parameter)
        if values.is_meta or not values.numel():
            return None
        values = values.detach().flatten()
        if len(values) > _SAMPLE:
            generator = torch.Generator().manual_seed(0)
            values = values[torch.randint(len(values), (_SAMPLE,), generator=generator).to(values.device)]
        values = values.double().cpu()
        return float(values.mean()), float(values.std(correction=0))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None


def _dequantized(parameter: Any) -> Tensor:
    """A parameter's values, whatever library quantized it."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        try:
            import bitsandbytes
        except ImportError as error:
            raise TypeError("what made this parameter is not installed") from error
        return bitsandbytes.functional.dequantize_4bit(parameter.data, state)
    scale = getattr(parameter, "SCB", None)
    if scale is not None:
        return parameter.data.float() * scale.unsqueeze(1) / 127
    if hasattr(parameter, "__tensor_flatten__") or parameter.is_quantized:
        return parameter.dequantize()
    if not parameter.is_floating_point():
        raise TypeError("whole numbers of an unknown scale")
    return parameter


def _same_encoder(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one["dtype"] == other["dtype"]:
        return one["sha256"] == other["sha256"]
    # The same model in another precision: its weights are rounded.
    here, there = one["sample"].split(), other["sample"].split()
    if len(here) != len(there):
        return False
    whole = any("int" in item["dtype"] for item in (one, other))
    share = 0.15 if whole else 0.01
    for (mean, deviation), (other_mean, other_deviation) in zip(_pairs(here), _pairs(there), strict=True):
        if "?" in (mean, other_mean):
            continue
        allowed = share * (max(float(deviation), float(other_deviation)) + abs(float(mean)) / 2) + 1e-6
        if abs(float(mean) - float(other_mean)) > allowed or abs(float(deviation) - float(other_deviation)) > allowed:
            return False
    return True


def _pairs(items: list[str]) -> Iterator[tuple[str, str]]:
    return zip(items[::2], items[1::2], strict=True)


# --- Indexes of the first version, which noted less


def _first_fingerprint(config: Any, matcher: nn.Module) -> str:
    backbone: Any = config.backbone_config
    names = [name for name in _OWN if name not in ("backbone_config", "text_pooling")]
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
    digest = hashlib.sha256(json.dumps(result, sort_keys=True).encode())
    for name, tensor in sorted(matcher.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _probe(model: MimicModel) -> dict[str, Any]:
    """Sixteen values of each of the encoder's weights."""
    samples, dtype = [], ""
    for parameter in model.encoder.parameters():
        if parameter.is_meta or not _is_plain(parameter):
            continue
        flat = parameter.detach().flatten()
        samples.append(flat[:: max(1, len(flat) // 16)][:16].float().cpu())
        dtype = dtype or str(parameter.dtype).removeprefix("torch.")
    values = torch.cat([*samples, torch.empty(0)])
    few = values[:: max(1, len(values) // 64)]
    return {"dtype": dtype, "sha256": hashlib.sha256(values.numpy().tobytes()).hexdigest(), "values": few.tolist()}


def _same_probe(one: Any, other: Mapping[str, Any]) -> bool:
    if not isinstance(one, Mapping) or one.keys() != other.keys():
        return False
    if one["dtype"] == other["dtype"]:
        return one["sha256"] == other["sha256"]
    here, there = torch.tensor(one["values"]), torch.tensor(other["values"])
    return here.shape == there.shape and torch.allclose(here, there, rtol=1e-2, atol=1e-4)


__all__ = ["check_facts", "check_made_by", "copy_of_matcher", "model_facts", "model_name", "same_model"]

"""Which model and processor made an index: whatever changes a feature is noticed, and nothing else is."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import knowledge_base, tiny_processor
from tiny_clip import tiny_model
from torch import nn

from mimic_el import identity_mimic
from mimic_el.configuration_mimic import MimicConfig
from mimic_el.errors_mimic import EntityIndexError
from mimic_el.identity_mimic import check_facts, check_made_by, copy_of_matcher, model_facts, same_model
from mimic_el.index_mimic import EntityIndex
from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor

# What of a model's configuration no feature depends on. Whoever adds a field decides: here, or in `_OWN`.
NOT_IN_FEATURES = {
    "ignore_duplicate_answers",
    "symmetric_loss",
    "default_index",
    "default_index_revision",
    "calibration",  # of scores
    "context_window",  # of mentions; an index holds entities
}


@pytest.fixture(scope="module")
def model() -> MimicModel:
    return tiny_model()


@pytest.fixture
def facts(model: MimicModel) -> dict[str, Any]:
    """As they come back from a file."""
    return json.loads(json.dumps(model_facts(model, tiny_processor(model))))


def test_each_field_of_the_configuration_is_decided():
    fields = set(inspect.signature(MimicConfig.__init__).parameters) - {"self", "kwargs"}
    assert fields == NOT_IN_FEATURES | set(identity_mimic._OWN)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "eos_token_id", 5),
        ("text_config", "layer_norm_eps", 1.0),
        ("text_config", "hidden_act", "relu"),
        ("vision_config", "layer_norm_eps", 1e-3),
        ("vision_config", "num_channels", 4),
        (None, "layer_norm_eps", 1e-2),
        (None, "mask_text_padding", True),
        (None, "text_max_length", 9),
    ],
)
def test_a_configuration_that_changes_features(
    part: str | None, name: str, value: Any, model: MimicModel, facts: dict[str, Any]
):
    other = copy.deepcopy(model)
    config: Any = other.config if part is None else getattr(other.config.backbone_config, part)
    setattr(config, name, value)
    with pytest.raises(EntityIndexError, match=rf"{name} \(.* there, {value} here\)"):
        check_made_by(facts, other)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "attention_dropout", 0.9),
        ("vision_config", "initializer_range", 0.5),
        (None, "symmetric_loss", True),
        (None, "default_index", "elsewhere"),
    ],
)
def test_a_configuration_that_changes_no_feature(
    part: str | None, name: str, value: Any, model: MimicModel, facts: dict[str, Any]
):
    other = copy.deepcopy(model)
    setattr(other.config if part is None else getattr(other.config.backbone_config, part), name, value)
    check_made_by(facts, other, tiny_processor(model))


def halves(weight: torch.Tensor) -> None:
    weight[1::2, 1:] += 0.5


def one(weight: torch.Tensor) -> None:
    weight.view(-1)[-1] += 1e-3


@pytest.mark.parametrize("change", [halves, one])
def test_weights_that_were_changed(change: Callable[[torch.Tensor], None], model: MimicModel, facts: dict[str, Any]):
    for way in ("in place", "by .data", "as another tensor"):
        other = copy.deepcopy(model)
        check_made_by(facts, other)  # what was hashed is remembered
        embedding: Any = other.get_input_embeddings()
        with torch.no_grad():
            if way == "as another tensor":
                changed = embedding.weight.clone()
                change(changed)
                embedding.weight = nn.Parameter(changed)
            else:
                change(embedding.weight if way == "in place" else embedding.weight.data)
        if (way, change) == ("by .data", one):
            continue  # only a sample of the weights is compared for that
        with pytest.raises(EntityIndexError, match="the encoder's weights"):
            check_made_by(facts, other)


def test_another_precision(model: MimicModel, facts: dict[str, Any]):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        other = copy.deepcopy(model)
        other.encoder.to(dtype)
        check_made_by(facts, other)
        with torch.no_grad():
            halves(other.get_input_embeddings().weight)  # type: ignore[arg-type]
        with pytest.raises(EntityIndexError, match="the encoder's weights"):
            check_made_by(facts, other)


class Quantized(nn.Parameter):
    """As bitsandbytes keeps a weight: whole numbers, and a scale for each row beside them."""

    SCB: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Quantized:
        scale = weight.detach().abs().amax(dim=1)
        whole = (weight.detach() / scale[:, None] * 127).round().to(torch.int8)
        parameter = torch.Tensor._make_subclass(cls, whole, False)
        parameter.SCB = scale
        return parameter


def quantized(model: MimicModel) -> MimicModel:
    other = copy.deepcopy(model)
    for module in other.encoder.modules():
        if isinstance(module, nn.Linear):
            module.weight = Quantized.of(module.weight)
    return other


def test_quantized_weights(model: MimicModel, facts: dict[str, Any]):
    other = quantized(model)
    check_made_by(facts, other)
    own = json.loads(json.dumps(model_facts(other)))
    check_made_by(own, other)
    check_made_by(own, quantized(model))
    check_made_by(own, model)
    strange = quantized(tiny_model(seed=1))
    strange.matcher = model.matcher
    for known in (facts, own):
        with pytest.raises(EntityIndexError, match="the encoder's weights"):
            check_made_by(known, strange)


def test_tensors_that_are_made_of_others(model: MimicModel):
    """As torchao keeps a weight: its bytes are those of its parts."""
    torchao = pytest.importorskip("torchao.quantization")
    other = copy.deepcopy(model)
    torchao.quantize_(other.encoder, torchao.Int8WeightOnlyConfig())
    own = json.loads(json.dumps(model_facts(other)))
    check_made_by(own, other)
    check_made_by(own, model)
    check_made_by(json.loads(json.dumps(model_facts(model))), other)


def changed_processor(model: MimicModel, change: Callable[[Any], Any]) -> MimicProcessor:
    processor = tiny_processor(model)
    change(processor)
    return processor


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: setattr(p.image_processor, "image_mean", [0, 0, 0]), "image_mean"),
        (lambda p: setattr(p.image_processor, "image_std", [1, 1, 1]), "image_std"),
        (lambda p: setattr(p.image_processor, "do_rescale", False), "do_rescale"),
        (lambda p: setattr(p.image_processor, "resample", 0), "resample"),
        (lambda p: setattr(p.image_processor, "size", {"height": 8, "width": 8}), "size"),
        (lambda p: setattr(p, "text_max_length", 9), "text_max_length"),
        (lambda p: setattr(p, "correct_images", False), "correct_images"),
        (lambda p: p.tokenizer.add_tokens(["Orange"]), "vocabulary"),
        (lambda p: setattr(p.tokenizer, "pad_token", "a</w>"), "texts"),
        (lambda p: setattr(p.tokenizer, "padding_side", "left"), "texts"),
    ],
)
def test_another_processor(change: Callable[[Any], Any], told: str, model: MimicModel, facts: dict[str, Any]):
    with pytest.raises(EntityIndexError, match=rf"the processor's [a-z_.]*{told}"):
        check_made_by(facts, model, changed_processor(model, change))


def test_a_processor_that_was_saved_and_loaded(model: MimicModel, facts: dict[str, Any], tmp_path: Path):
    tiny_processor(model).save_pretrained(tmp_path)
    check_made_by(facts, model, MimicProcessor.from_pretrained(tmp_path))


def test_the_matcher_and_the_configuration_of_an_index_belong_together(model: MimicModel, facts: dict[str, Any]):
    matcher = copy_of_matcher(model)
    check_facts(facts, matcher, Path("x"))
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda f: f["config"].update(layer_norm_eps=1e-2),
        lambda f: f["config"]["backbone_config"]["text_config"].update(eos_token_id=5),
        lambda f: f["processor"].update(correct_images=False),
        lambda f: f["encoder"].update(sha256="0"),
        lambda f: f.update(fingerprint="0"),
        lambda f: f.update(encoder=None),
        lambda f: f.pop("processor"),
    ]
    for change in changes:
        other = copy.deepcopy(facts)
        change(other)
        with pytest.raises(EntityIndexError, match="changed or damaged"):
            check_facts(other, matcher, Path("x"))
    with torch.no_grad():
        matcher.tglu.fc_key.bias[0] += 1e-6
    with pytest.raises(EntityIndexError, match="changed or damaged"):
        check_facts(facts, matcher, Path("x"))


def first_facts(model: MimicModel) -> dict[str, Any]:
    """As indexes of the first version noted them."""
    return {
        "name": "MimicModel",
        "fingerprint": identity_mimic._first_fingerprint(model.config, model.matcher),
        "probe": identity_mimic._probe(model),
        "config": json.loads(json.dumps(model.config.to_dict())),
    }


def test_an_index_of_the_first_version(model: MimicModel):
    old = first_facts(model)
    check_facts(old, copy_of_matcher(model), Path("x"))
    check_made_by(old, model, tiny_processor(model))
    half = copy.deepcopy(model)
    half.encoder.to(torch.bfloat16)
    check_made_by(old, half)
    assert not same_model(old, model_facts(model)), "a build goes on with what notes as much"
    other = copy.deepcopy(model)
    other.config.backbone_config.text_config.eos_token_id = 5
    with pytest.raises(EntityIndexError, match="eos_token_id"):
        check_made_by(old, other)
    changed = copy.deepcopy(old)
    changed["config"]["layer_norm_eps"] = 1e-2
    with pytest.raises(EntityIndexError, match="changed or damaged"):
        check_facts(changed, copy_of_matcher(model), Path("x"))
    for damage in (lambda f: f.pop("probe"), lambda f: f.update(probe={"dtype": "float16", "sha256": "", "values": 5})):
        damaged = copy.deepcopy(old)
        damage(damaged)
        with pytest.raises(EntityIndexError):
            check_made_by(damaged, model)


def test_whatever_takes_a_processor_compares_it(model: MimicModel):
    processor = tiny_processor(model)
    index = EntityIndex.build(model, processor, knowledge_base(3), show_progress=False)
    index.check_model(model)
    index.check_model(model, processor)
    other = changed_processor(model, lambda p: setattr(p, "correct_images", False))
    for act in (
        lambda: index.check_model(model, other),
        lambda: index.link(model, other, [{"mention": "Orange", "text": "Orange."}]),
        lambda: index.add(model, other, knowledge_base(1, 9), show_progress=False),
        lambda: index.update(model, other, knowledge_base(1), show_progress=False),
    ):
        with pytest.raises(EntityIndexError, match="correct_images"):
            act()

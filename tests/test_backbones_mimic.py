"""Each family of backbones under MIMIC, against transformers' own class of that family."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hub_server import Hub
from published import TASK, same_links
from python_processes import ForkingPython, clean_python
from tiny import encode_mentions, knowledge_base, mentions_of, random_image
from tiny_backbones import FAMILIES, TEXT, VISION, Family, byte_tokenizer, save_family
from torch import Tensor
from torch.nn import functional as F
from transformers import pipeline

from mimic_el import EntityIndex, MimicConfig, MimicModel, MimicProcessor
from mimic_el.backbones_mimic import BACKBONES

SIZES = {"image_hidden_size": 10, "tglu_hidden_size": 8, "vdlu_hidden_size": 6, "cmfu_hidden_size": 9}
HEADS = ["Orange", "a", "Georgia in the Caucasus"]
BODIES = ["Orange opened a shop on the corner.", "", "It borders Turkey, and a sentence that is too long for it."]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backbones")
    return {name: save_family(family, root / name) for name, family in FAMILIES.items()}


@pytest.fixture(params=FAMILIES.values(), ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture
def path(family: Family, checkpoints: dict[str, Path]) -> Path:
    return checkpoints[family.name]


@pytest.fixture
def model(family: Family, path: Path) -> MimicModel:
    torch.manual_seed(1)
    return MimicModel.from_backbone(path, **SIZES, **family.settings).eval()


@pytest.fixture
def processor(path: Path, model: MimicModel) -> MimicProcessor:
    config: Any = model.config
    return MimicProcessor.from_backbone(path, config)


@pytest.fixture
def inputs(processor: MimicProcessor) -> dict[str, Tensor]:
    return dict(processor.process_mentions(HEADS, BODIES, [random_image(1, 40), None, random_image(2, 50)]))


def family_class(family: Family) -> Any:
    return type(family.build())


def test_features_are_those_of_the_family(
    family: Family, path: Path, model: MimicModel, inputs: dict[str, Tensor]
) -> None:
    own: Any = family_class(family).from_pretrained(path).eval()
    texts = {"input_ids": inputs["input_ids"]}
    if family.masked:
        texts["attention_mask"] = inputs["attention_mask"]
    with torch.no_grad():
        encoded = model.encode(**inputs)
        if "text_pooling" in family.settings:  # which this class cannot do: its own text model has no pooling layer
            text = own.text_model(**texts)
            mask = inputs["attention_mask"].unsqueeze(-1)
            text_embeds = own.text_projection((text.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1))
        else:
            text = own.get_text_features(**texts)
            text_embeds = text.pooler_output
        if family.name == "siglip2":
            image = own.get_image_features(**patches(inputs["pixel_values"], side=family.side, size=4))
        else:
            image = own.get_image_features(pixel_values=inputs["pixel_values"])
        image_embeds = model.encoder.image_cls_fc(F.normalize(image.pooler_output, dim=-1))
        image_tokens = model.encoder.image_tokens_fc(image.last_hidden_state)
    close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
    close(encoded.text_embeds, F.normalize(text_embeds, dim=-1))
    close(encoded.text_tokens, text.last_hidden_state)
    close(encoded.image_embeds, image_embeds)
    close(encoded.image_tokens, image_tokens)
    assert encoded.image_tokens.shape[1] == family.tokens
    assert not torch.allclose(encoded.text_embeds[0], encoded.text_embeds[1], atol=1e-3)
    assert not torch.allclose(encoded.image_embeds[0], encoded.image_embeds[2], atol=1e-3)


def patches(pixels: Tensor, side: int, size: int) -> dict[str, Tensor]:
    """What SigLIP 2 of variable resolution reads: patches, row by row, of images whose channels come last."""
    rows = side // size
    result: dict[str, list[Tensor]] = {"pixel_values": [], "pixel_attention_mask": [], "spatial_shapes": []}
    for image in pixels.numpy():
        blocks = [
            image[:, row * size : (row + 1) * size, column * size : (column + 1) * size].transpose(1, 2, 0).ravel()
            for row in range(rows)
            for column in range(rows)
        ]
        result["pixel_values"].append(torch.tensor(np.stack(blocks)))
        result["pixel_attention_mask"].append(torch.ones(rows**2, dtype=torch.long))
        result["spatial_shapes"].append(torch.tensor([rows, rows]))
    return {name: torch.stack(values) for name, values in result.items()}


def test_padding_that_does_not_count_changes_nothing(
    family: Family, path: Path, processor: MimicProcessor, inputs: dict[str, Tensor]
) -> None:
    """With `mask_text_padding` columns of padding are not computed; all that is kept is what it was."""
    torch.manual_seed(1)
    masked = MimicModel.from_backbone(path, mask_text_padding=True, **SIZES, **family.settings).eval()
    short = dict(processor.process_mentions(HEADS[:2], ["It is.", ""]))
    with torch.no_grad():
        less = masked.encode(**short)
    whole = masked.encode(**short)  # with gradients nothing is left out
    torch.testing.assert_close(less.text_embeds, whole.text_embeds, rtol=1e-5, atol=1e-5)
    tokens = short["attention_mask"].bool()
    torch.testing.assert_close(less.text_tokens[tokens], whole.text_tokens[tokens], rtol=1e-5, atol=1e-5)


def test_save_and_load(family: Family, model: MimicModel, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = MimicModel.from_pretrained(tmp_path).eval()
    assert type(loaded.config.backbone_config) is type(model.config.backbone_config)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    adapter = BACKBONES[model.config.backbone_config.model_type]
    assert all(
        name.startswith((f"encoder.{adapter.attribute}.", "encoder.image_", "matcher.")) for name in loaded.state_dict()
    )
    expected, found = model.encode(**inputs), loaded.encode(**inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_a_card_calls_it(checkpoints: dict[str, Path]) -> None:
    found = {name: MimicConfig.from_backbone(path).backbone_config for name, path in checkpoints.items()}
    said = {name: BACKBONES[config.model_type].described(config) for name, config in found.items()}
    assert said["clip"] == "a CLIP encoder"
    assert said["altclip"] == "an AltCLIP encoder"
    assert said["metaclip_2"] == "a MetaCLIP 2 encoder"
    assert said["bert and vit"] == "a dual encoder of two models, 'bert' for texts and 'vit' for images"
    assert len(set(said.values())) == len({(c.model_type, c.text_config.model_type) for c in found.values()})


def test_published_names_of_parameters(checkpoints: dict[str, Path]) -> None:
    names = set(MimicModel.from_backbone(checkpoints["clip"]).state_dict())
    assert "encoder.clip.text_model.embeddings.token_embedding.weight" in names
    assert "encoder.clip.visual_projection.weight" in names


def test_attention_and_checkpointing(family: Family, path: Path, inputs: dict[str, Tensor]) -> None:
    losses, gradients = [], []
    for attention in ("eager", "sdpa"):
        torch.manual_seed(1)
        model = MimicModel.from_backbone(path, attn_implementation=attention, **SIZES, **family.settings).eval()
        towers = (model.encoder.backbone.text_model, model.encoder.backbone.vision_model)
        assert {tower.config._attn_implementation for tower in towers} == {attention}
        if attention == "sdpa":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
            for module in model.modules():  # what training draws at random would differ
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                for name in ("dropout", "attention_dropout", "dropout_prob"):
                    if isinstance(getattr(module, name, None), float):
                        setattr(module, name, 0.0)
        output = model(**inputs, **{f"entity_{name}": tensor for name, tensor in inputs.items()}, return_loss=True)
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append(model.get_input_embeddings().weight.grad)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=3e-5)


def test_modules_that_stay_whole(family: Family, model: MimicModel) -> None:
    classes = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= classes
    assert "Matcher" in model._no_split_modules
    assert len(model._no_split_modules) > 2  # layers of the towers, too


def test_training_decreases_the_loss(family: Family, model: MimicModel, inputs: dict[str, Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**inputs, **{f"entity_{name}": tensor for name, tensor in inputs.items()}, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    # Where several processes train, one that no gradient reaches is an error.
    assert not [name for name, part in model.named_parameters() if part.requires_grad and part.grad is None]


def test_a_pooling_layer_that_is_not_used_is_not_trained(checkpoints: dict[str, Path]) -> None:
    model = MimicModel.from_backbone(checkpoints["bert and vit"], text_pooling="first", **SIZES)
    model.encode(torch.tensor([[0, 5, 2]])).text_embeds.sum().backward()
    text = dict(model.encoder.backbone.text_model.named_parameters())
    assert {name for name, part in text.items() if not part.requires_grad} == {
        "pooler.dense.weight",
        "pooler.dense.bias",
    }
    assert all(part.grad is not None for part in text.values() if part.requires_grad)


def test_index_and_pipeline(family: Family, model: MimicModel, processor: MimicProcessor) -> None:
    entities = knowledge_base(6)
    mentions = mentions_of(entities)
    index = EntityIndex.build(model, processor, entities, dtype="float32", show_progress=False)
    with torch.no_grad():
        names, descriptions, images = (
            [entity[key] for entity in entities] for key in ("name", "description", "images")
        )
        features = model.encode_entities(**processor.process_entities(names, descriptions, images))
        scores = model.score(encode_mentions(model, processor, mentions), features).logits
    linker = pipeline(TASK, model=model, processor=processor, index=index)
    for row, found in enumerate(linker(mentions, top_k=6)):
        assert [answer["score"] for answer in found] == pytest.approx(
            scores[row].sort(descending=True).values.tolist(), rel=1e-4
        )


@pytest.fixture(scope="module")
def clean(hub: Hub) -> ForkingPython:
    return clean_python(hub)


@pytest.mark.parametrize("name", ["siglip", "altclip", "bert and vit"])
def test_remote_code(clean: ForkingPython, checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Where nothing of this project is installed: three families that share the least."""
    torch.manual_seed(1)
    model = MimicModel.from_backbone(checkpoints[name], **SIZES)
    config: Any = model.config
    processor = MimicProcessor.from_backbone(checkpoints[name], config)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    entities = [{**entity, "images": []} for entity in knowledge_base(5)]
    mentions = mentions_of(entities)
    code = """
        from transformers import pipeline
        linker = pipeline(model=place, trust_remote_code=True, entities=entities)
        result = linker(mentions, top_k=3)
    """
    theirs = clean.run(code, place=str(tmp_path), entities=entities, mentions=mentions)
    ours = pipeline(TASK, model=model, processor=processor, entities=entities)(mentions, top_k=3)
    assert same_links(theirs, ours)


# --- Texts and images as the family has them ----------------------------------------------------------------------


def test_pixels_are_those_of_the_checkpoint(family: Family, path: Path, processor: MimicProcessor) -> None:
    image = random_image(3, 60)
    found = processor.pixels([image])
    assert found.shape == (1, 3, family.side, family.side)
    if not family.pixels or family.name == "clip":
        return
    kind = "ViTImageProcessor" if isinstance(family.pixels["size"], int) else "CLIPImageProcessor"
    defaults = {"do_center_crop": False, "image_mean": processor.image_processor.image_mean}
    own = getattr(transformers, kind + "Pil")(
        **{**defaults, "image_std": processor.image_processor.image_std, **family.pixels}
    )
    np.testing.assert_allclose(found, own([image], return_tensors="np")["pixel_values"], atol=1e-6)


def test_images_are_cropped_in_training_too(checkpoints: dict[str, Path]) -> None:
    processor = MimicProcessor.from_backbone(checkpoints["altclip"])
    wide = random_image(3, 60).resize((90, 30))
    resized = processor.resized(wide)
    assert resized is not None
    assert resized.shape == (3, 24, 24)
    assert torch.equal(processor.normalized(resized), processor.pixels([wide])[0])
    processor.correct_images = False
    assert torch.equal(processor.pixels([wide])[0], processor.normalized(resized))


def test_length_of_texts(checkpoints: dict[str, Path]) -> None:
    """SigLIP reads texts that are padded to all its positions; the others as the published model."""
    assert MimicConfig.from_backbone(checkpoints["siglip"]).text_max_length == 44
    assert MimicConfig.from_backbone(checkpoints["siglip"], text_max_length=20).text_max_length == 20
    assert MimicConfig.from_backbone(checkpoints["altclip"]).text_max_length == 40
    processor = MimicProcessor.from_backbone(checkpoints["siglip"])
    assert processor.process_mentions("a", "b")["input_ids"].shape == (1, 44)


def test_clip_has_the_published_pixels(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Whatever crop its own image processor has."""
    config = MimicConfig.from_backbone(checkpoints["clip"])
    own = {
        "size": {"shortest_edge": 24},
        "crop_size": {"height": 24, "width": 24},
        "resample": 3,
        "do_center_crop": True,
    }
    one = MimicProcessor.image_processor_for(config.backbone_config)
    other = MimicProcessor.image_processor_for(config.backbone_config, own)
    assert one.to_dict() == other.to_dict()
    assert (one.resample, one.do_center_crop) == (1, False)


# --- What cannot be a backbone --------------------------------------------------------------------------------------

SOME: dict[str, Any] = {**VISION, "image_size": 24, "patch_size": 8}


def from_config(config: Any, path: Path, **kwargs: Any) -> MimicConfig:
    config.save_pretrained(path)
    return MimicConfig.from_backbone(path, **kwargs)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.BertConfig(), r"of type 'bert'.*one of the types clip, siglip, siglip2, metaclip_2"),
        (transformers.CLIPTextConfig(), r"one tower .*\('clip_text_model'\): it has no vision tower"),
        (transformers.SiglipVisionConfig(), "it has no text tower"),
        (transformers.BlipConfig(), "of type 'blip'.*from_vision_text_pretrained"),
    ],
)
def test_models_that_are_no_dual_encoder(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        from_config(config, tmp_path)
    with pytest.raises(ValueError, match=message):
        MimicModel.from_backbone(tmp_path)
    with pytest.raises(ValueError, match=message):
        MimicProcessor.from_backbone(tmp_path)


def test_a_model_with_its_own_code(tmp_path: Path) -> None:
    """Is refused, and its code not run."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "my_clip", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="own code, which is not run"):
        MimicModel.from_backbone(tmp_path)


def test_a_tokenizer_with_its_own_code(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    save_family(FAMILIES["bert and vit"], tmp_path)
    (tmp_path / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    tokenizer = tmp_path / "tokenizer_config.json"
    code = '"auto_map": {"AutoTokenizer": [null, "own.Own"]}, "tokenizer_class": "Own", '
    tokenizer.write_text(
        tokenizer.read_text().replace("{", "{" + code, 1).replace('"tokenizer_class": "TokenizersBackend"', '"x": 0')
    )
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        MimicProcessor.from_backbone(tmp_path)
    processor = MimicProcessor.from_backbone(tmp_path, trust_remote_code=True)
    assert type(processor.tokenizer).__name__ == "Own"


def two_towers(text: Any = None, vision: Any = None) -> Any:
    text = text or transformers.BertConfig(**TEXT)
    vision = vision or transformers.ViTConfig(**SOME)
    return transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (two_towers(transformers.XLMRobertaConfig(**TEXT, max_position_embeddings=41)), {}, "only 39 positions"),
        (two_towers(transformers.T5Config(vocab_size=260)), {}, "is an encoder with a decoder"),
        (two_towers(vision=transformers.ConvNextConfig()), {}, r"\(a 'convnext'\) has no `hidden_size`"),
        (two_towers(vision=transformers.ViTConfig(**{**SOME, "image_size": (24, 32)})), {}, "must be integers"),
        (two_towers(vision=transformers.ViTConfig(**{**SOME, "patch_size": (8, 4)})), {}, "must be integers"),
        (two_towers(), {"text_pooling": "max"}, "must be one of first, mean"),
        (transformers.CLIPConfig(), {"text_pooling": "mean"}, "has its own way to pool"),
        (transformers.SiglipConfig(vision_config={"vision_use_head": False}), {}, "has no pooling"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_work(config: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MimicConfig.from_backbone(config, **settings)


def test_towers_that_are_unknown() -> None:
    values = {"model_type": "vision-text-dual-encoder", "text_config": {"model_type": "nothing"}, "vision_config": {}}
    with pytest.raises(ValueError, match=r"towers of the .* are of types that this transformers does not have"):
        MimicConfig(values)


def test_a_text_tower_without_pooling_needs_to_be_told(checkpoints: dict[str, Path]) -> None:
    model = MimicModel.from_backbone(checkpoints["distilbert and vit"], **SIZES)
    with pytest.raises(ValueError, match=r'no pooling layer.*text_pooling="mean" or "first"'):
        model.encode(torch.tensor([[0, 5, 2]]))


def test_a_tokenizer_without_padding(tmp_path: Path) -> None:
    save_family(FAMILIES["bert and vit"], tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no padding token; set `tokenizer\.pad_token`"):
        MimicProcessor.from_backbone(tmp_path)


def test_an_image_processor_of_another_size(checkpoints: dict[str, Path]) -> None:
    config = MimicConfig.from_backbone(checkpoints["siglip"]).backbone_config
    for own, made in (({"size": {"height": 20, "width": 32}}, "20 x 32"), ({"size": {"shortest_edge": 32}}, "0 x 0")):
        with pytest.raises(ValueError, match=f"makes images of {made} pixels .* but the model reads 32 x 32"):
            MimicProcessor.image_processor_for(config, own)


def test_a_model_that_is_given(checkpoints: dict[str, Path]) -> None:
    """Its weights are shared; one tower of it is not enough."""
    own = transformers.SiglipModel.from_pretrained(checkpoints["siglip"])
    model = MimicModel.from_backbone(own, **SIZES)
    assert model.encoder.backbone is own
    assert model.config.text_max_length == 44
    with pytest.raises(TypeError, match="of the model type 'siglip_text_model'"):
        MimicModel.from_backbone(own.text_model)
    with pytest.raises(TypeError, match="must be a SiglipModel, got SiglipForImageClassification"):
        MimicModel.from_backbone(transformers.SiglipForImageClassification(own.config))


def test_every_family_is_tested() -> None:
    assert {family_class(family).config_class.model_type for family in FAMILIES.values()} == set(BACKBONES)

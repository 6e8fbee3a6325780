from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, BertConfig, CLIPConfig

from mimic_el.configuration_mimic import PIPELINE_TASK, MimicConfig
from mimic_el.tests.tiny_clip import save_tiny_clip, tiny_clip_config, tiny_config


def test_defaults_are_the_published_model() -> None:
    config = MimicConfig()
    sizes = (config.image_hidden_size, config.tglu_hidden_size, config.vdlu_hidden_size, config.cmfu_hidden_size)
    assert sizes == (96, 96, 96, 96)
    assert config.text_max_length == 40
    assert config.layer_norm_eps == 1e-5
    deviations = (config.mask_text_padding, config.ignore_duplicate_answers, config.symmetric_loss)
    assert deviations == (False, False, False)
    clip: Any = config.backbone_config  # ViT-B/32
    assert clip.projection_dim == 512
    assert (clip.text_config.hidden_size, clip.text_config.num_hidden_layers) == (512, 12)
    assert (clip.vision_config.hidden_size, clip.vision_config.num_hidden_layers) == (768, 12)
    assert (clip.vision_config.image_size, clip.vision_config.patch_size) == (224, 32)


def test_sizes_that_are_not_the_default_survive_saving(tmp_path: Path) -> None:
    config = tiny_config(
        mask_text_padding=True,
        ignore_duplicate_answers=True,
        symmetric_loss=True,
        layer_norm_eps=1e-6,
        default_index="someone/index",
        default_index_revision="v1",
    )
    loaded: Any
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mimic"
    for loaded in (MimicConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded).__name__ == "MimicConfig"
        assert isinstance(loaded.backbone_config, CLIPConfig)
        saved, restored = config.to_dict(), loaded.to_dict()
        for values in (saved, restored):
            values.pop("_name_or_path", None)
        assert restored == saved
        # The file says where the pipeline's code is, and what is loaded knows it.
        assert list(json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]) == [PIPELINE_TASK]
        assert list(loaded.custom_pipelines) == [PIPELINE_TASK]
    assert loaded.vdlu_hidden_size == 6
    assert loaded.default_index_revision == "v1"
    assert loaded.backbone_config.vision_config.patch_size == 8


def test_backbone_as_a_dict_or_a_configuration() -> None:
    clip = tiny_clip_config()
    for given in (clip, clip.to_dict()):
        assert MimicConfig(given).backbone_config.to_dict() == clip.to_dict()


def test_from_backbone(tmp_path: Path) -> None:
    path = save_tiny_clip(tmp_path / "clip", tokenizer=False)
    for backbone in (path, str(path), tiny_clip_config()):
        config: Any = MimicConfig.from_backbone(backbone, cmfu_hidden_size=7, text_max_length=12)
        assert config.cmfu_hidden_size == 7
        assert config.image_hidden_size == 96
        assert config.text_max_length == 12
        assert config.backbone_config.text_config.vocab_size == 514


def test_from_a_backbone_that_is_none(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of type 'bert'\. MIMIC needs a dual encoder"):
        MimicConfig.from_backbone(tmp_path)
    with pytest.raises(OSError, match="nowhere"):
        MimicConfig.from_backbone(tmp_path / "nowhere")


def test_a_mimic_checkpoint_is_no_backbone(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type 'mimic'"):
        MimicConfig.from_backbone(tmp_path)


@pytest.mark.parametrize(
    "name", ["image_hidden_size", "tglu_hidden_size", "vdlu_hidden_size", "cmfu_hidden_size", "text_max_length"]
)
@pytest.mark.parametrize("value", [0, -3, 1.5, "96", None, True])
def test_sizes_must_be_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be a positive integer, got {value!r}"):
        MimicConfig(**{name: value})


@pytest.mark.parametrize("value", [0, -1e-5, "1e-5", None, True, float("nan"), float("inf")])
def test_the_epsilon_must_be_a_positive_number(value: Any) -> None:
    with pytest.raises(ValueError, match=f"`layer_norm_eps` must be a positive number, got {value!r}"):
        MimicConfig(layer_norm_eps=value)


@pytest.mark.parametrize("name", ["mask_text_padding", "ignore_duplicate_answers", "symmetric_loss"])
@pytest.mark.parametrize("value", ["false", 0, None])
def test_switches_must_be_true_or_false(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be True or False, got {value!r}"):
        MimicConfig(**{name: value})


def clip_with(part: str, **changes: Any) -> CLIPConfig:
    clip = tiny_clip_config()
    for name, value in changes.items():
        setattr(getattr(clip, part), name, value)
    return clip


def test_combinations_that_cannot_work() -> None:
    with pytest.raises(ValueError, match=r"`text_max_length` is 78, .* only 77 positions .* Use 77 or less"):
        MimicConfig(text_max_length=78)
    with pytest.raises(ValueError, match=r"`image_size` \(24\) holds no patch of `patch_size` 32"):
        MimicConfig(clip_with("vision_config", patch_size=32))
    with pytest.raises(ValueError, match="must be integers"):
        MimicConfig(clip_with("vision_config", image_size=[24, 32]))
    for part in ("text_config", "vision_config"):
        with pytest.raises(ValueError, match=rf"`{part}`, `hidden_size` .* is not a multiple"):
            MimicConfig(clip_with(part, num_attention_heads=5))


def test_backbones_of_another_kind() -> None:
    with pytest.raises(TypeError, match="of the model type 'bert'; MIMIC needs a dual encoder"):
        MimicConfig(BertConfig())
    with pytest.raises(TypeError, match="got str"):
        MimicConfig("openai/clip-vit-base-patch32")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="of model type 'blip'; MIMIC needs a dual encoder"):
        MimicConfig({"model_type": "blip"})

"""The dual encoders that MIMIC can be built on: an adapter for each family.

An adapter answers two kinds of questions. About a configuration: how wide the features are, how large an image is, how
many tokens a text may have, how pixels are prepared. About a model: its pooled texts and images, projected but not
normalized, and its tokens. No other file asks which family a backbone belongs to.

To add a family, write its adapter and add it to `BACKBONES`.

Shapes: B texts or images, L text tokens, P image tokens.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.image_utils import PILImageResampling

_CLIP_PIXELS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": int(PILImageResampling.BICUBIC),
}
_PLAIN_PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": int(PILImageResampling.BICUBIC)}
# Text models that count positions from the one after their padding's id.
_OFFSET_POSITIONS = frozenset(
    {"altclip_text_model", "camembert", "data2vec-text", "ibert", "longformer", "luke", "mpnet", "roberta"}
    | {"roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)
TEXT_POOLINGS = ("first", "mean")


class Backbone:
    """An adapter. This one fits families of two towers, `text_model` and `vision_model`, whose pooled outputs are
    projected to one width; others override what differs.

    Every method takes a configuration or a model of the family: an adapter has no state.
    """

    model_type = ""
    #: Name of the class of transformers.
    model_class = ""
    #: What the family is called.
    title = ""
    #: The attribute of the encoder that holds the model: where the names of its parameters begin.
    attribute = "backbone"
    #: Settings of the image processor, where the checkpoint has none of its own.
    pixels: dict[str, Any] = _CLIP_PIXELS
    #: Whether `text_pooling` of a configuration may say how texts are pooled.
    takes_pooling = False

    def class_(self) -> Any:
        """The class of transformers."""
        return getattr(transformers, self.model_class)

    def described(self, config: Any) -> str:
        """What the encoder is, for a card."""
        return f"{'an' if self.title[0] in 'AEIOU' else 'a'} {self.title} encoder"

    def build(self, config: Any) -> Any:
        """A model with random weights."""
        # A precision that the configuration was saved with is not the model's that is made here.
        dtype = None if config.dtype is None else torch.get_default_dtype()
        return self.class_()._from_config(config, dtype=dtype)

    def config_from(self, values: dict[str, Any]) -> Any:
        """A configuration from what config.json holds."""
        return AutoConfig.for_model(self.model_type, **{k: v for k, v in values.items() if k != "model_type"})

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

    def positions(self, config: Any) -> int | None:
        """How many tokens a text may have; `None` if there is no limit."""
        text = config.text_config
        count = getattr(text, "max_position_embeddings", None)
        if not isinstance(count, int) or count < 1:
            return None
        if text.model_type in _OFFSET_POSITIONS:
            return count - (text.pad_token_id or 0) - 1
        return count

    def text_length(self, config: Any) -> int | None:
        """To how many tokens texts were padded when the family was trained, where that matters."""
        return None

    def check(self, config: Any) -> None:
        """Refuses a configuration that cannot be a backbone.

        Raises:
            ValueError: saying what is wrong with it.
        """
        text, vision = config.text_config, config.vision_config
        image_size, patch_size = self.image_size(config), getattr(vision, "patch_size", None)
        if not _is_integer(image_size) or not _is_integer(patch_size):
            raise ValueError(
                "MimicConfig: the backbone's `image_size` and `patch_size` must be integers (square images), got "
                f"{image_size!r} and {patch_size!r}."
            )
        if patch_size < 1 or image_size < patch_size:
            raise ValueError(
                f"MimicConfig: the backbone's `image_size` ({image_size}) holds no patch of `patch_size` {patch_size}."
            )
        for name, part in (("text_config", text), ("vision_config", vision)):
            width, heads = getattr(part, "hidden_size", None), getattr(part, "num_attention_heads", None)
            if not _is_integer(width):
                raise ValueError(
                    f"MimicConfig: the backbone's `{name}` (a {part.model_type!r}) has no `hidden_size`: MIMIC needs "
                    "towers that give a sequence of tokens of one width."
                )
            if _is_integer(heads) and width % heads:
                raise ValueError(
                    f"MimicConfig: in the backbone's `{name}`, `hidden_size` ({width}) is not a multiple of "
                    f"`num_attention_heads` ({heads})."
                )

    def image_settings(self, config: Any, own: dict[str, Any] | None = None) -> dict[str, Any]:
        """Settings of the image processor: the checkpoint's own, where it has them, else the family's.

        Args:
            own: what the checkpoint's preprocessor_config.json holds.
        """
        side = self.image_size(config)
        square = {"height": side, "width": side}
        if not own:
            return {**self.pixels, "size": square, "do_center_crop": False}
        names = ("size", "crop_size", "do_center_crop", "do_resize", "do_rescale", "do_normalize", "rescale_factor")
        settings = {name: own[name] for name in names if own.get(name) is not None}
        settings |= {name: own.get(name) or value for name, value in self.pixels.items()}
        if isinstance(own.get("resample"), int):
            settings["resample"] = own["resample"]
        settings.setdefault("do_center_crop", "crop_size" in settings)
        settings.setdefault("size", {"shortest_edge": side} if settings["do_center_crop"] else square)
        for name, default in (("size", "shortest_edge" if settings["do_center_crop"] else ""), ("crop_size", "")):
            if isinstance(settings.get(name), int):  # as older versions saved it
                edge = settings[name]
                settings[name] = {default: edge} if default else {"height": edge, "width": edge}
        return settings

    def unused(self, model: Any, pooling: str | None = None) -> list[nn.Parameter]:
        """Parameters that no feature depends on: by default the scale of the backbone's own similarities."""
        return list(model.parameters(recurse=False))

    def token_embedding(self, model: Any) -> nn.Module:
        return model.text_model.get_input_embeddings()

    def set_token_embedding(self, model: Any, value: nn.Module) -> None:
        model.text_model.set_input_embeddings(value)

    def columns(self, config: Any, input_ids: Tensor, attention_mask: Tensor) -> int:
        """How many columns hold all that the pooled texts and the tokens of a batch depend on."""
        return int(attention_mask.bool().any(dim=0).nonzero().max()) + 1

    def encode_texts(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, pooling: str | None = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Pooled texts `(B, text_embed_width)`, and the text model's output, its last hidden state the tokens, `(B, L,
        text_width)`."""
        text = model.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return model.text_projection(text.pooler_output), text

    def encode_images(self, model: Any, pixel_values: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        """Pooled images `(B, image_embed_width)`, and the vision model's output, its last hidden state the tokens, `(B,
        P, image_width)`."""
        image = model.vision_model(pixel_values=pixel_values, **kwargs)
        return model.visual_projection(image.pooler_output), image


class _PooledAtEnd(Backbone):
    """Texts are pooled at the first end-of-text token, which a causal mask lets see what stands before it."""

    def columns(self, config: Any, input_ids: Tensor, attention_mask: Tensor) -> int:
        columns = attention_mask.bool().any(dim=0)
        columns[self.ends(config, input_ids).argmax(dim=1)] = True
        return int(columns.nonzero().max()) + 1

    def ends(self, config: Any, input_ids: Tensor) -> Tensor:
        return (input_ids == config.text_config.eos_token_id).int()


class _CLIP(_PooledAtEnd):
    model_type = "clip"
    title = "CLIP"
    model_class = "CLIPModel"
    attribute = "clip"

    def config_from(self, values: dict[str, Any]) -> Any:
        return transformers.CLIPConfig(**{key: value for key, value in values.items() if key != "model_type"})

    def image_settings(self, config: Any, own: dict[str, Any] | None = None) -> dict[str, Any]:
        """As the published model does it: Lanczos, the whole image into the square, no crop."""
        side = self.image_size(config)
        settings = {"size": {"height": side, "width": side}, "do_center_crop": False}
        settings |= {name: (own or {}).get(name) or self.pixels[name] for name in ("image_mean", "image_std")}
        return {**settings, "resample": PILImageResampling.LANCZOS}

    def ends(self, config: Any, input_ids: Tensor) -> Tensor:
        eos: Any = config.text_config.eos_token_id
        return input_ids if eos == 2 else (input_ids == eos).int()  # 2 is a mistake of old configurations

    def token_embedding(self, model: Any) -> nn.Module:
        return model.text_model.embeddings.token_embedding

    def set_token_embedding(self, model: Any, value: nn.Module) -> None:
        model.text_model.embeddings.token_embedding = value


class _MetaCLIP2(_PooledAtEnd):
    """CLIP in many languages."""

    model_type = "metaclip_2"
    title = "MetaCLIP 2"
    model_class = "MetaClip2Model"
    attribute = "metaclip_2"


class _ChineseCLIP(Backbone):
    """Texts are read by BERT and pooled at their first token, without BERT's own pooling layer."""

    model_type = "chinese_clip"
    title = "Chinese-CLIP"
    model_class = "ChineseCLIPModel"
    attribute = "chinese_clip"

    def encode_texts(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, pooling: str | None = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        text = model.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return model.text_projection(text.last_hidden_state[:, 0]), text


class _AltCLIP(_ChineseCLIP):
    """Texts are read by XLM-RoBERTa, its tokens brought to the width of CLIP's."""

    model_type = "altclip"
    title = "AltCLIP"
    model_class = "AltCLIPModel"
    attribute = "altclip"

    def text_width(self, config: Any) -> int:
        return config.text_config.project_dim


class _SigLIP(Backbone):
    """SigLIP, and the checkpoints of SigLIP 2 of a fixed resolution, which are of the same type.

    No projections and no class token: an image is pooled by attention, a text at the last of all its columns, padding
    or not. The text model was trained without a mask, on texts padded to all its positions.
    """

    model_type = "siglip"
    title = "SigLIP"
    model_class = "SiglipModel"
    attribute = "siglip"
    pixels = _PLAIN_PIXELS

    def text_embed_width(self, config: Any) -> int:
        return config.text_config.projection_size

    def image_embed_width(self, config: Any) -> int:
        return config.vision_config.hidden_size

    def text_length(self, config: Any) -> int | None:
        return config.text_config.max_position_embeddings

    def check(self, config: Any) -> None:
        super().check(config)
        if not getattr(config.vision_config, "vision_use_head", True):
            raise ValueError(
                "MimicConfig: the backbone's vision tower has no pooling (`vision_use_head` is false): it gives no "
                "pooled image. Use a whole SigLIP checkpoint."
            )

    def columns(self, config: Any, input_ids: Tensor, attention_mask: Tensor) -> int:
        return input_ids.shape[1]

    def encode_texts(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, pooling: str | None = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        text = model.text_model(input_ids=input_ids, **kwargs)
        return text.pooler_output, text

    def encode_images(self, model: Any, pixel_values: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        image = model.vision_model(pixel_values=pixel_values, **kwargs)
        return image.pooler_output, image


class _SigLIP2(_SigLIP):
    """SigLIP 2 of variable resolution (NaFlex), with every image in the square of its `num_patches`."""

    model_type = "siglip2"
    title = "SigLIP 2"
    model_class = "Siglip2Model"
    attribute = "siglip2"
    pixels = {**_PLAIN_PIXELS, "resample": int(PILImageResampling.BILINEAR)}  # noqa: RUF012

    def image_size(self, config: Any) -> int:
        return math.isqrt(config.vision_config.num_patches) * config.vision_config.patch_size

    def image_settings(self, config: Any, own: dict[str, Any] | None = None) -> dict[str, Any]:
        kept = ("image_mean", "image_std", "resample", "do_rescale", "do_normalize", "rescale_factor")
        given = {name: own[name] for name in kept if own.get(name) is not None} if own else {}
        return {**super().image_settings(config), **given}

    def encode_images(self, model: Any, pixel_values: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        size = model.config.vision_config.patch_size
        batch, channels, height, width = pixel_values.shape
        rows, columns = height // size, width // size
        # Each patch as one vector, its pixels row by row and the channels of a pixel side by side.
        patches = pixel_values.reshape(batch, channels, rows, size, columns, size).permute(0, 2, 4, 3, 5, 1)
        image = model.vision_model(
            pixel_values=patches.reshape(batch, rows * columns, -1),
            pixel_attention_mask=torch.ones(batch, rows * columns, dtype=torch.long, device=pixel_values.device),
            spatial_shapes=torch.tensor([[rows, columns]] * batch, device=pixel_values.device),
            **kwargs,
        )
        return image.pooler_output, image


class _TwoTowers(Backbone):
    """Any text encoder with any vision encoder, joined by projections: a `VisionTextDualEncoderModel`.

    `text_pooling` may say how texts are pooled before the projection, where the text encoder's own pooling layer is
    absent or was never trained: "mean" of the tokens that are not padding, or the "first" token.
    """

    model_type = "vision-text-dual-encoder"
    model_class = "VisionTextDualEncoderModel"
    attribute = "dual_encoder"
    pixels = {**_PLAIN_PIXELS, "resample": int(PILImageResampling.BILINEAR)}  # noqa: RUF012
    takes_pooling = True

    def described(self, config: Any) -> str:
        text, vision = config.text_config.model_type, config.vision_config.model_type
        return f"a dual encoder of two models, {text!r} for texts and {vision!r} for images"

    def config_from(self, values: dict[str, Any]) -> Any:
        try:
            return super().config_from(values)
        except (KeyError, ValueError) as error:
            towers = {part: (values.get(part) or {}).get("model_type") for part in ("text_config", "vision_config")}
            raise ValueError(
                f"MimicConfig: the towers of the {self.model_type!r} backbone are of types that this transformers "
                f"does not have, or has none of them ({towers}): {error}"
            ) from error

    def check(self, config: Any) -> None:
        super().check(config)
        if getattr(config.text_config, "is_encoder_decoder", False):
            raise ValueError(
                f"MimicConfig: the backbone's text tower (a {config.text_config.model_type!r}) is an encoder with a "
                "decoder; MIMIC needs an encoder alone."
            )

    def unused(self, model: Any, pooling: str | None = None) -> list[nn.Parameter]:
        found = super().unused(model)
        pooler = getattr(model.text_model, "pooler", None)
        if pooling is not None and pooler is not None:
            found += pooler.parameters()
        # What stands for patches that pretraining hides.
        return found + [part for name, part in model.named_parameters() if name.endswith("mask_token")]

    def columns(self, config: Any, input_ids: Tensor, attention_mask: Tensor) -> int:
        tower = _TOWERS.get(config.text_config.model_type)
        if tower is None:
            return super().columns(config, input_ids, attention_mask)
        return tower.columns(config, input_ids, attention_mask)

    def encode_texts(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, pooling: str | None = None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        text = model.text_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        tokens = text.last_hidden_state
        if pooling == "mean":
            mask = attention_mask.to(tokens.dtype).unsqueeze(-1)
            pooled = (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        elif pooling == "first":
            pooled = tokens[:, 0]
        else:
            pooled = _pooled(text, "text", ' Say how to pool: text_pooling="mean" or "first".')
        return model.text_projection(pooled), text

    def encode_images(self, model: Any, pixel_values: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        image = model.vision_model(pixel_values=pixel_values, **kwargs)
        if image.last_hidden_state.dim() != 3:
            raise ValueError(
                f"The backbone's vision tower gives no sequence of tokens but {tuple(image.last_hidden_state.shape)}; "
                "use a vision transformer."
            )
        return model.visual_projection(_pooled(image, "vision")), image


_FAMILIES = (_CLIP(), _SigLIP(), _SigLIP2(), _MetaCLIP2(), _ChineseCLIP(), _AltCLIP(), _TwoTowers())
BACKBONES: dict[str, Backbone] = {backbone.model_type: backbone for backbone in _FAMILIES}
# Of text towers that pool at a place of their own.
_TOWERS: dict[str, Backbone] = {
    f"{name}_text_model": BACKBONES[name] for name in ("clip", "metaclip_2", "siglip", "siglip2")
}


def backbone_of(config: Any) -> Backbone:
    """The adapter for a backbone's configuration.

    Raises:
        TypeError: if it is of no family that has one.
    """
    model_type = getattr(config, "model_type", None)
    if not isinstance(config, PreTrainedConfig) or model_type not in BACKBONES:
        kind = f"a {type(config).__name__}" if model_type is None else f"of the model type {model_type!r}"
        raise TypeError(f"MimicConfig: the backbone's configuration is {kind}; {SUPPORTED}")
    return BACKBONES[model_type]


def config_of(values: dict[str, Any], where: str) -> Any:
    """The configuration of a backbone from what its config.json holds.

    Args:
        where: what messages call it.

    Raises:
        ValueError: if it is of no family that has an adapter, or holds wrong values.
    """
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in BACKBONES:
        try:
            return BACKBONES[model_type].config_from(values)
        except Exception as error:  # the libraries have their own for each wrong value
            raise ValueError(
                f"{where} is no configuration of a model of type {model_type!r}: {' '.join(str(error).split()):.500}"
            ) from error
    problem = f"{where} is a model of type {model_type!r}. "
    if str(model_type).endswith(("_text_model", "_vision_model")):
        missing = "vision" if str(model_type).endswith("_text_model") else "text"
        problem = f"{where} is one tower of a dual encoder ({model_type!r}): it has no {missing} tower. "
    elif "auto_map" in values:
        problem += "It brings its own code, which is not run: there is no adapter that knows its outputs. "
    raise ValueError(problem + SUPPORTED)


SUPPORTED = (
    f"MIMIC needs a dual encoder of one of the types {', '.join(BACKBONES)}. A text encoder and a vision encoder make "
    "one with VisionTextDualEncoderModel.from_vision_text_pretrained(vision, text)."
)


def _pooled(output: Any, tower: str, hint: str = "") -> Tensor:
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        raise ValueError(f"The backbone's {tower} tower has no pooling layer: it gives no `pooler_output`.{hint}")
    return pooled


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["BACKBONES", "SUPPORTED", "TEXT_POOLINGS", "Backbone", "backbone_of", "config_of"]

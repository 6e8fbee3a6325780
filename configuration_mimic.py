"""Configuration of MIMIC, the multi-grained multimodal interaction network for entity linking."""

from __future__ import annotations

import os
from typing import Any

from transformers import CLIPConfig, PreTrainedConfig

from .backbones_mimic import backbone_of

PIPELINE_TASK = "multimodal-entity-linking"
_CUSTOM_PIPELINES = {
    PIPELINE_TASK: {
        "impl": "pipeline_mimic.MultimodalEntityLinkingPipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}


class MimicConfig(PreTrainedConfig):
    """Configuration of a [`MimicModel`].

    The defaults are those of the published model (Luo et al., "Multi-Grained Multimodal Interaction Network for Entity
    Linking", KDD 2023) on CLIP ViT-B/32.

    Args:
        backbone_config (`CLIPConfig` or `dict`, *optional*):
            The CLIP model that encodes mentions and entities. Defaults to CLIP ViT-B/32.
        image_hidden_size (`int`, defaults to 96):
            Width to which the image features are projected before the units (`dv` in the published code).
        tglu_hidden_size (`int`, defaults to 96):
            Width of the text unit (TGLU).
        vdlu_hidden_size (`int`, defaults to 96):
            Width of the image unit (VDLU).
        cmfu_hidden_size (`int`, defaults to 96):
            Width of the cross-modal unit (CMFU).
        text_max_length (`int`, defaults to 40):
            Number of tokens to which every text is truncated or padded.
        layer_norm_eps (`float`, defaults to 1e-5):
            Epsilon of the layer norms outside the backbone.
        mask_text_padding (`bool`, defaults to `False`):
            Whether the text unit leaves padding tokens out of its attention. The published model does not.
        ignore_duplicate_answers (`bool`, defaults to `False`):
            Whether the loss leaves out a negative that is the mention's own answer, there because another mention of
            the batch has the same answer. The published loss does not.
        symmetric_loss (`bool`, defaults to `False`):
            Whether the loss also ranks mentions for each entity. The published loss only ranks entities for each
            mention.
        default_index (`str`, *optional*):
            Directory or Hub repository of the [`EntityIndex`] that the pipeline uses when it is given none.
        default_index_revision (`str`, *optional*):
            Revision of `default_index`.

    Raises:
        TypeError: if `backbone_config` is neither a `CLIPConfig` nor a `dict` of one.
        ValueError: if a size is not a positive integer, or `text_max_length` is more than the backbone has positions.

    Example:

    ```python
    >>> from mimic_el import MimicConfig, MimicModel

    >>> config = MimicConfig()  # the published model
    >>> model = MimicModel(config)  # with random weights
    ```
    """

    model_type = "mimic"
    sub_configs = {"backbone_config": CLIPConfig}  # noqa: RUF012  transformers reads this attribute
    _auto_class = "AutoConfig"

    def __init__(
        self,
        backbone_config: CLIPConfig | dict[str, Any] | None = None,
        image_hidden_size: int = 96,
        tglu_hidden_size: int = 96,
        vdlu_hidden_size: int = 96,
        cmfu_hidden_size: int = 96,
        text_max_length: int = 40,
        layer_norm_eps: float = 1e-5,
        mask_text_padding: bool = False,
        ignore_duplicate_answers: bool = False,
        symmetric_loss: bool = False,
        default_index: str | None = None,
        default_index_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone_config = _as_clip_config(backbone_config)
        self.image_hidden_size = image_hidden_size
        self.tglu_hidden_size = tglu_hidden_size
        self.vdlu_hidden_size = vdlu_hidden_size
        self.cmfu_hidden_size = cmfu_hidden_size
        self.text_max_length = text_max_length
        self.layer_norm_eps = layer_norm_eps
        self.mask_text_padding = mask_text_padding
        self.ignore_duplicate_answers = ignore_duplicate_answers
        self.symmetric_loss = symmetric_loss
        self.default_index = default_index
        self.default_index_revision = default_index_revision
        self._check()
        super().__init__(**kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: it tells transformers where the pipeline's code is, too."""
        return {**super().to_diff_dict(), "custom_pipelines": _CUSTOM_PIPELINES}

    @property
    def text_width(self) -> int:
        """Width of the backbone's text tokens."""
        return backbone_of(self.backbone_config).text_width(self.backbone_config)

    @property
    def text_embed_width(self) -> int:
        """Width of the backbone's pooled text."""
        return backbone_of(self.backbone_config).text_embed_width(self.backbone_config)

    @property
    def image_width(self) -> int:
        """Width of the backbone's image tokens."""
        return backbone_of(self.backbone_config).image_width(self.backbone_config)

    @property
    def image_embed_width(self) -> int:
        """Width of the backbone's pooled image."""
        return backbone_of(self.backbone_config).image_embed_width(self.backbone_config)

    @property
    def image_size(self) -> int:
        """Side of the square image that the backbone sees, in pixels."""
        return backbone_of(self.backbone_config).image_size(self.backbone_config)

    def _check(self) -> None:
        sizes = ("image_hidden_size", "tglu_hidden_size", "vdlu_hidden_size", "cmfu_hidden_size", "text_max_length")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"MimicConfig: `{name}` must be a positive integer, got {value!r}.")
        if not self.layer_norm_eps > 0:
            raise ValueError(f"MimicConfig: `layer_norm_eps` must be positive, got {self.layer_norm_eps!r}.")
        text: Any = self.backbone_config.text_config
        positions = text.max_position_embeddings
        if self.text_max_length > positions:
            raise ValueError(
                f"MimicConfig: `text_max_length` is {self.text_max_length}, but the backbone's text encoder has only "
                f"{positions} positions (`max_position_embeddings`). Use {positions} or less."
            )
        vision: Any = self.backbone_config.vision_config
        if isinstance(vision.image_size, int) and isinstance(vision.patch_size, int):
            if vision.patch_size < 1 or vision.image_size < vision.patch_size:
                raise ValueError(
                    f"MimicConfig: the backbone's `image_size` ({vision.image_size}) holds no patch of `patch_size` "
                    f"{vision.patch_size}."
                )
        else:
            raise ValueError(
                "MimicConfig: the backbone's `image_size` and `patch_size` must be integers (square images), got "
                f"{vision.image_size!r} and {vision.patch_size!r}."
            )
        for name, part in (("text_config", text), ("vision_config", vision)):
            if part.hidden_size % part.num_attention_heads:
                raise ValueError(
                    f"MimicConfig: in the backbone's `{name}`, `hidden_size` ({part.hidden_size}) is not a multiple "
                    f"of `num_attention_heads` ({part.num_attention_heads})."
                )

    @classmethod
    def from_backbone(cls, backbone: str | os.PathLike[str] | CLIPConfig, **kwargs: Any) -> MimicConfig:
        """The configuration of a MIMIC model on top of a CLIP checkpoint.

        Args:
            backbone: Hub id or directory of a CLIP checkpoint, or its `CLIPConfig`.
            **kwargs: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download` and `subfolder` say how to
                find the checkpoint; everything else is passed to `MimicConfig`.

        Raises:
            ValueError: if the checkpoint is not a CLIP model.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        if isinstance(backbone, CLIPConfig):
            return cls(backbone_config=backbone, **kwargs)
        config_dict, _ = PreTrainedConfig.get_config_dict(backbone, **hub_kwargs)
        if config_dict.get("model_type") != "clip":
            raise ValueError(
                f"{str(backbone)!r} is a model of type {config_dict.get('model_type')!r}; MIMIC needs a CLIP model "
                '(`model_type` "clip"), such as "openai/clip-vit-base-patch32".'
            )
        return cls(backbone_config=CLIPConfig.from_dict(config_dict), **kwargs)


HUB_KWARGS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def _as_clip_config(value: CLIPConfig | dict[str, Any] | None) -> CLIPConfig:
    if value is None:
        return CLIPConfig()
    if isinstance(value, CLIPConfig):
        return value
    if isinstance(value, dict):
        if value.get("model_type", "clip") != "clip":
            raise TypeError(
                f"MimicConfig: `backbone_config` is of model type {value['model_type']!r}; only CLIP is supported."
            )
        return CLIPConfig(**{key: item for key, item in value.items() if key != "model_type"})
    raise TypeError(
        f"MimicConfig: `backbone_config` must be a CLIPConfig or a dict of one, got {type(value).__name__}."
    )


__all__ = ["MimicConfig"]

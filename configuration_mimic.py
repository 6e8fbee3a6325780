"""`MimicConfig`, the configuration of MIMIC (the multi-grained multimodal interaction network for entity linking)."""

from __future__ import annotations

import math
import os
from typing import Any

from transformers import AutoConfig, CLIPConfig, PreTrainedConfig

from .backbones_mimic import BACKBONES, SUPPORTED, TEXT_POOLINGS, backbone_of, config_of
from .calibration_mimic import Calibration, is_newer
from .saving_mimic import damage_told, save_and_push

PIPELINE_TASK = "multimodal-entity-linking"
CONTEXT_WINDOWS = ("start", "mention")
_CUSTOM_PIPELINES = {
    PIPELINE_TASK: {
        "impl": "pipeline_mimic.MultimodalEntityLinkingPipeline",
        "pt": ["AutoModel"],
        "type": "multimodal",
    }
}


class _InstalledPipelines(dict[str, Any]):
    """The `custom_pipelines` of a checkpoint whose task is registered already.

    `pipeline()` infers the task from the keys, and then asks `task in custom_pipelines` whether the checkpoint's own
    code is to be run for it. It is not: the registered pipeline is.
    """

    def __contains__(self, task: object) -> bool:
        return task != PIPELINE_TASK and super().__contains__(task)


class MimicConfig(PreTrainedConfig):
    """Configuration of a [`MimicModel`].

    The defaults are those of the published model (Luo et al., "Multi-Grained Multimodal Interaction Network for Entity
    Linking", KDD 2023) on CLIP ViT-B/32.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            The dual encoder that encodes mentions and entities: the configuration of a CLIP, SigLIP, SigLIP 2,
            MetaCLIP 2, Chinese-CLIP, AltCLIP or VisionTextDualEncoder model. Defaults to CLIP ViT-B/32.
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
        text_pooling (`str`, *optional*):
            How a VisionTextDualEncoder backbone pools texts: "mean" of the tokens that are not padding, or the "first"
            token. By default with the text encoder's own pooling layer. The other families have their own way.
        context_window (`str`, defaults to "start"):
            Which part of a mention's text is read where not all of it fits in `text_max_length` tokens: "start", as
            published, or "mention", the words around the mention.
        calibration (`dict`, *optional*):
            What turns scores into probabilities, as [`Calibration.to_dict`] has it. `mimic_el.training.calibrate`
            writes it. One of a newer version is kept as it is, and not used.

    Raises:
        TypeError: if `backbone_config` is not the configuration of a supported dual encoder, or a `dict` of one.
        CalibrationError: if `calibration` is none.
        ValueError: if a size is not a positive integer, `layer_norm_eps` not a positive number or a switch neither true
            nor false, or `text_max_length` is more than the backbone has positions.

    Example:

    ```python
    >>> from mimic_el import MimicConfig, MimicModel

    >>> config = MimicConfig()  # the published model
    >>> model = MimicModel(config)  # with random weights
    ```
    """

    model_type = "mimic"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012  transformers reads this attribute
    _auto_class = "AutoConfig"
    # Set where the package is installed and has registered the task: its code then runs, and not the checkpoint's.
    pipeline_is_installed = False

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
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
        text_pooling: str | None = None,
        context_window: str = "start",
        calibration: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone_config = _as_backbone_config(backbone_config)
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
        self.text_pooling = text_pooling
        self.context_window = context_window
        self.calibration = calibration
        self._check()
        check_context_window("MimicConfig", context_window)
        self._check_calibration()
        if self.pipeline_is_installed and "custom_pipelines" in kwargs:
            kwargs["custom_pipelines"] = _InstalledPipelines(kwargs["custom_pipelines"])
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The values; where the pipeline's code is belongs to the file, not to them."""
        values = super().to_dict()
        values.pop("custom_pipelines", None)
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: it tells transformers where the pipeline's code is, too."""
        return {**super().to_diff_dict(), "custom_pipelines": _CUSTOM_PIPELINES}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """A checkpoint's configuration; arguments as of any configuration.

        Raises:
            LoadError: if its file is damaged.
        """
        with damage_told("configuration", pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the configuration and its code; arguments as of any configuration.

        Raises:
            SaveError: if the directory cannot be written, such as on a full disk. What was there is then as it was.
        """
        save_and_push(save_directory, super().save_pretrained, push_to_hub, **kwargs)

    @property
    def has_no_defaults_at_init(self) -> bool:
        """Whether config.json holds all of the backbone, and not only what differs from its class's defaults: older
        transformers make those without arguments, which a VisionTextDualEncoder does not take there."""
        return bool(getattr(self.backbone_config, "has_no_defaults_at_init", False))

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The configuration of the backbone's text model, whose vocabulary grows where tokens are added."""
        return self.backbone_config.get_text_config(*args, **kwargs)

    def _check_calibration(self) -> None:
        if self.calibration is not None and not is_newer(self.calibration):
            Calibration.from_dict(self.calibration)

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

    # Own code and not huggingface_hub's `strict`, whose errors are neither ValueError nor TypeError and would wrap
    # CalibrationError, and which refuses a backbone that is given by position, and 1 where a float is expected.
    def _check(self) -> None:
        sizes = ("image_hidden_size", "tglu_hidden_size", "vdlu_hidden_size", "cmfu_hidden_size", "text_max_length")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"MimicConfig: `{name}` must be a positive integer, got {value!r:.200}.")
        epsilon = self.layer_norm_eps
        if not isinstance(epsilon, int | float) or isinstance(epsilon, bool) or not 0 < epsilon < math.inf:
            raise ValueError(f"MimicConfig: `layer_norm_eps` must be a positive number, got {epsilon!r:.200}.")
        for name in ("mask_text_padding", "ignore_duplicate_answers", "symmetric_loss"):
            if not isinstance(value := getattr(self, name), bool):  # "false" would be true
                raise ValueError(f"MimicConfig: `{name}` must be True or False, got {value!r:.200}.")
        self._check_backbone()

    def _check_backbone(self) -> None:
        adapter = backbone_of(self.backbone_config)
        adapter.check(self.backbone_config)
        positions = adapter.positions(self.backbone_config)
        if positions is not None and self.text_max_length > positions:
            raise ValueError(
                f"MimicConfig: `text_max_length` is {self.text_max_length}, but the backbone's text encoder has only "
                f"{positions} positions (`max_position_embeddings`). Use {positions} or less."
            )
        if self.text_pooling is not None and not adapter.takes_pooling:
            raise ValueError(
                f"MimicConfig: `text_pooling` is {self.text_pooling!r}, but a backbone of type {adapter.model_type!r} "
                "has its own way to pool texts. Leave it out."
            )
        if self.text_pooling not in (None, *TEXT_POOLINGS):
            raise ValueError(
                f"MimicConfig: `text_pooling` must be one of {', '.join(TEXT_POOLINGS)} or None, got "
                f"{self.text_pooling!r}."
            )

    @classmethod
    def from_backbone(cls, backbone: str | os.PathLike[str] | PreTrainedConfig, **kwargs: Any) -> MimicConfig:
        """The configuration of a MIMIC model on top of a pretrained dual encoder.

        Args:
            backbone: Hub id or directory of a checkpoint, or its configuration.
            **kwargs: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download` and `subfolder` say how to
                find the checkpoint; everything else is passed to `MimicConfig`. `text_max_length` defaults to the
                length of the texts that the family was trained on, where that matters (SigLIP), else to 40.

        Raises:
            TypeError, ValueError: if the checkpoint is not of a supported type.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        kwargs.pop("trust_remote_code", None)  # nothing of a checkpoint's code is run here
        if isinstance(backbone, PreTrainedConfig):
            config = backbone
        else:
            values, _ = PreTrainedConfig.get_config_dict(backbone, **hub_kwargs)
            config = config_of(values, repr(str(backbone)))
        length = backbone_of(config).text_length(config)
        if length is not None:
            kwargs.setdefault("text_max_length", length)
        return cls(backbone_config=config, **kwargs)


def check_context_window(owner: str, value: Any) -> None:
    """Raises a `ValueError` for a context window that there is not."""
    if value not in CONTEXT_WINDOWS:
        raise ValueError(f"{owner}: `context_window` must be one of {', '.join(CONTEXT_WINDOWS)}, got {value!r:.200}.")


HUB_KWARGS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def _as_backbone_config(value: PreTrainedConfig | dict[str, Any] | None) -> Any:
    if value is None:
        return CLIPConfig()
    if isinstance(value, dict):
        model_type = value.get("model_type", "clip")  # of old configurations
        if not isinstance(model_type, str) or model_type not in BACKBONES:
            raise TypeError(f"MimicConfig: `backbone_config` is of model type {model_type!r:.100}; {SUPPORTED}")
        return config_of({**value, "model_type": model_type}, "`backbone_config`")
    if not isinstance(value, PreTrainedConfig):
        raise TypeError(
            f"MimicConfig: `backbone_config` must be a configuration or a dict of one, got {type(value).__name__}."
        )
    backbone_of(value)
    return value


__all__ = ["MimicConfig"]

"""MIMIC: an encoder for mentions and entities, the matcher that scores each pair of them, and the loss.

The model is that of Luo et al., "Multi-Grained Multimodal Interaction Network for Entity Linking" (KDD 2023). How pairs
are scored is in matching_mimic, what encodes them in encoder_mimic; of indexes and searches it knows nothing.

transformers brings along with this file what lines of this form name, and what those files name, wherever the line
stands. So a checkpoint that is saved carries the pipeline's code too, which is not imported here:

    from .pipeline_mimic import MultimodalEntityLinkingPipeline

Shapes: M mentions, N entities, L text tokens, P image tokens (the class token and the patches).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from .backbones_mimic import backbone_of
from .configuration_mimic import HUB_KWARGS, MimicConfig
from .encoder_mimic import Encoder
from .matching_mimic import (
    EntityFeatures,
    Matcher,
    MentionFeatures,
    MimicEncoderOutput,
    PairScores,
    at_least_float32,
    is_traced,
)
from .saving_mimic import damage_told, save_and_push

logger = logging.get_logger(__name__)

# What a CPU's cache holds is twice as fast as what it does not; a GPU wants more at a time.
_SCORE_BLOCK_BYTES, _SCORE_BLOCK_BYTES_GPU = 16 * 2**20, 256 * 2**20
_SCORE_BLOCK_MENTIONS = 32
_STATES = ("output_hidden_states", "output_attentions")


@dataclass
class MimicOutput(ModelOutput):
    """Scores of all pairs of a batch.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): the contrastive loss, where it was asked for.
        logits (`torch.Tensor` of shape `(M, N)`, float32): the total score, mean of the three below.
        text_logits (`torch.Tensor` of shape `(M, N)`, float32): score of the text unit (TGLU).
        image_logits (`torch.Tensor` of shape `(M, N)`, float32): score of the image unit (VDLU).
        cross_modal_logits (`torch.Tensor` of shape `(M, N)`, float32): score of the cross-modal unit (CMFU).
        mention_features ([`MentionFeatures`], *optional*): of the M mentions, where they were asked for.
        entity_features ([`EntityFeatures`], *optional*): of the N entities, where they were asked for.
        mention_encoder_output, entity_encoder_output ([`MimicEncoderOutput`], *optional*): what the encoder made of
            either, where hidden states or attentions were asked for; these are in its `text_model_output` and
            `vision_model_output`.
    """

    loss: Tensor | None = None
    logits: Tensor = None  # type: ignore[assignment]
    text_logits: Tensor = None  # type: ignore[assignment]
    image_logits: Tensor = None  # type: ignore[assignment]
    cross_modal_logits: Tensor = None  # type: ignore[assignment]
    mention_features: MentionFeatures | None = None
    entity_features: EntityFeatures | None = None
    mention_encoder_output: MimicEncoderOutput | None = None
    entity_encoder_output: MimicEncoderOutput | None = None

    def all_logits(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The total score and those of the three units: what the loss is the sum over."""
        return self.logits, self.text_logits, self.image_logits, self.cross_modal_logits


class MimicPreTrainedModel(PreTrainedModel):
    """Weight initialization, loading and saving of MIMIC models."""

    config_class = MimicConfig
    base_model_prefix = "mimic"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["Matcher"]  # noqa: RUF012  and the backbone's, see MimicModel
    # Small beside the encoder, and its arithmetic is float32 whatever the encoder's is. Quantizers obey the first only.
    _keep_in_fp32_modules = ["matcher"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["matcher"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The loss is a mean over the batch, not over a number of items that the Trainer could pass.
    accepts_loss_kwargs = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            LoadError: if its files are damaged.
        """
        with damage_told("model", pretrained_model_name_or_path):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        model.encoder.freeze_unused()  # loading makes every parameter trainable
        return loaded

    def save_pretrained(  # type: ignore[override]  # the other options by name
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the model, its configuration and its code; arguments as of any model.

        Raises:
            SaveError: if the directory cannot be written, such as on a full disk. What was there is then as it was.
        """

        def save(place: str, **options: Any) -> None:
            weights = dict(state_dict) if state_dict is not None and push_to_hub else state_dict  # saving empties it
            super(MimicPreTrainedModel, self).save_pretrained(place, is_main_process, weights, **options)

        if kwargs.get("distributed_checkpoint"):  # all processes write into one directory
            save(os.fspath(save_directory), push_to_hub=push_to_hub, **kwargs)
        else:
            save_and_push(save_directory, save, push_to_hub, weight_files(kwargs.get("variant")), **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The published model's own layers start from PyTorch's default (CLIP's are initialized by CLIP).
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class MimicModel(MimicPreTrainedModel):
    """MIMIC: scores how well each entity fits each mention.

    Args:
        config ([`MimicConfig`]): the configuration; the weights are random until loaded.

    Example:

    ```python
    >>> from transformers import AutoModel, AutoProcessor

    >>> model = AutoModel.from_pretrained(path, trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    >>> mentions = model.encode_mentions(**processor.process_mentions(["Orange"], ["Orange opened a shop."], [photo]))
    >>> entities = model.encode_entities(**processor.process_entities(names, descriptions, images))
    >>> model.score(mentions, entities).logits.argmax(dim=-1)
    ```
    """

    _auto_class = "AutoModel"

    def __init__(self, config: MimicConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self._no_split_modules = sorted({*self.encoder.no_split_modules(), "Matcher"})
        with _at_least_float32_made():
            self.matcher = Matcher(config)
        self.post_init()

    @classmethod
    def from_backbone(cls, backbone: str | os.PathLike[str] | PreTrainedModel, **kwargs: Any) -> MimicModel:
        """A MIMIC model on a pretrained dual encoder, its own layers initialized at random: where fine-tuning starts.

        Args:
            backbone: Hub id or directory of a CLIP, SigLIP, SigLIP 2, MetaCLIP 2, Chinese-CLIP, AltCLIP or
                VisionTextDualEncoder checkpoint, or such a model (whose weights are then shared).
            **kwargs: what finds the checkpoint (`revision`, `cache_dir`, `token`, `local_files_only`,
                `force_download`, `subfolder`); `dtype` and `attn_implementation`, for the backbone; and everything
                that `MimicConfig` takes.

        Raises:
            TypeError, ValueError: if the checkpoint is of a type that is not supported, or the configuration does not
                fit it.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
        model_kwargs = {key: kwargs.pop(key) for key in ("dtype", "attn_implementation") if key in kwargs}
        if isinstance(backbone, PreTrainedModel):
            dual = backbone
            config = MimicConfig.from_backbone(dual.config, **kwargs)
            if not isinstance(dual, backbone_of(dual.config).class_()):
                raise TypeError(
                    f"A backbone of type {dual.config.model_type!r} must be a {backbone_of(dual.config).model_class}, "
                    f"got {type(dual).__name__}."
                )
        else:
            config = MimicConfig.from_backbone(backbone, **hub_kwargs, **kwargs)
            family = backbone_of(config.backbone_config).class_()
            dual = family.from_pretrained(backbone, **hub_kwargs, **model_kwargs)
            config.backbone_config = dual.config
        model = cls(config)
        model.encoder.set_backbone(dual)
        for layer in (model.encoder.image_cls_fc, model.encoder.image_tokens_fc):
            layer.to(dual.dtype)
        return model

    @property
    def device(self) -> torch.device:
        """Where inputs belong: where the first weight is or, if Accelerate offloaded it, is moved to."""
        device = super().device
        if device.type == "meta":
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
            moved_to = (getattr(hook, "execution_device", None) for hook in hooks)
            device = next((torch.device(place) for place in moved_to if place is not None), device)
        return device

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> MimicEncoderOutput:
        """Encodes texts and images of mentions or entities, before anything is specific to either.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): the tokens, L at most the backbone's positions.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): 1 for tokens, 0 for padding.
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`, *optional*): the images; zeros where there is none.
            **kwargs: handed to the backbone's text and vision models; with `output_hidden_states` or
                `output_attentions` their outputs are returned too.

        Raises:
            ValueError: if the shapes do not fit each other.
        """
        return self._encoded(input_ids, attention_mask, pixel_values, "", kwargs)[0]

    def encode_mentions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> MentionFeatures:
        """Features of M mentions, to be scored against any entities. Arguments as of [`~MimicModel.encode`], which
        returns hidden states and attentions."""
        _refuse_states(kwargs)
        encoded, attention_mask = self._encoded(input_ids, attention_mask, pixel_values, "", kwargs)
        return MentionFeatures(self.matcher(encoded, attention_mask, side="mention"))

    def encode_entities(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> EntityFeatures:
        """Features of N entities, to be scored against any mentions. Arguments as of [`~MimicModel.encode`], which
        returns hidden states and attentions."""
        _refuse_states(kwargs)
        encoded, attention_mask = self._encoded(input_ids, attention_mask, pixel_values, "entity_", kwargs)
        return EntityFeatures(self.matcher(encoded, attention_mask, side="entity"))

    def _encoded(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        prefix: str,
        kwargs: dict[str, Any],
    ) -> tuple[MimicEncoderOutput, Tensor]:
        """What the encoder gives, and the mask of the texts."""
        input_ids, attention_mask, pixel_values = self._checked(input_ids, attention_mask, pixel_values, prefix)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        for name in _STATES:
            if name not in kwargs and getattr(self.config, name, False):
                kwargs[name] = True
        return self.encoder(input_ids, attention_mask, pixel_values, **kwargs), attention_mask

    def _checked(
        self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor | None, prefix: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        if input_ids.dim() != 2 or input_ids.shape[0] == 0:
            raise ValueError(
                f"`{prefix}input_ids` must have the shape (batch, tokens), at least one row; got "
                f"{tuple(input_ids.shape)}."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`{prefix}attention_mask` has the shape {tuple(attention_mask.shape)}, `{prefix}input_ids` "
                f"{tuple(input_ids.shape)}: they must be equal."
            )
        vision: Any = self.config.backbone_config.vision_config
        side = self.config.image_size
        shape = (input_ids.shape[0], vision.num_channels, side, side)
        if pixel_values is None:
            pixel_values = torch.zeros(shape, dtype=self.dtype, device=input_ids.device)
        if tuple(pixel_values.shape) != shape:
            raise ValueError(
                f"`{prefix}pixel_values` has the shape {tuple(pixel_values.shape)}, but this model and "
                f"{shape[0]} texts need {shape}."
            )
        return input_ids, attention_mask, pixel_values

    def score(self, mentions: MentionFeatures, entities: EntityFeatures, block_bytes: int | None = None) -> MimicOutput:
        """Scores each of M mentions against each of N entities.

        Args:
            mentions ([`MentionFeatures`]): from [`~MimicModel.encode_mentions`].
            entities ([`EntityFeatures`]): from [`~MimicModel.encode_entities`].
            block_bytes (`int`, *optional*): memory, in bytes, that the largest intermediate tensor may take; 16 MiB on
                a CPU, 256 MiB elsewhere, unless told. Pairs are scored in blocks of that size, so peak memory grows
                with the block and the output, not with M x N x L x L.

        Returns:
            [`MimicOutput`] without a loss; its tensors are float32 of shape (M, N).

        Raises:
            TypeError: if the arguments are swapped, or not features.
        """
        if getattr(mentions, "side", None) != "mention" or getattr(entities, "side", None) != "entity":
            raise TypeError(
                "MimicModel.score takes MentionFeatures (from encode_mentions) and EntityFeatures (from "
                f"encode_entities), got {type(mentions).__name__} and {type(entities).__name__}."
            )
        if block_bytes is None:
            on_cpu = mentions.tensors["text_key"].device.type == "cpu"
            block_bytes = _SCORE_BLOCK_BYTES if on_cpu else _SCORE_BLOCK_BYTES_GPU
        if is_traced():  # neither the numbers of mentions and entities nor blocks of them are known
            return _as_output(self.matcher(mentions.tensors, entities.tensors))
        shape = (len(mentions), len(entities))
        names = ("logits", "text_logits", "image_logits", "cross_modal_logits")
        whole: dict[str, Any] = {}
        if 0 in shape:
            whole = {name: at_least_float32(mentions.tensors["text_embed"]).new_empty(shape) for name in names}
        for rows, column_blocks in _pair_blocks(mentions, entities, block_bytes):
            for columns in column_blocks:
                part = _as_output(self.matcher(mentions[rows].tensors, entities[columns].tensors))
                if part.logits.shape == shape:
                    return part
                # Into one place: kept one by one, they would scatter what the blocks leave free of the memory.
                for name, block in part.items():
                    if name not in whole:
                        whole[name] = block.new_empty(shape)
                    whole[name][rows, columns] = block
        return MimicOutput(**whole)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        entity_input_ids: Tensor | None = None,
        entity_attention_mask: Tensor | None = None,
        entity_pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        return_loss: bool | None = None,
        return_features: bool = False,
        return_scores: bool = True,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> MimicOutput | tuple[Tensor, ...]:
        """Encodes M mentions and N entities and scores all pairs.

        Args:
            input_ids (`torch.LongTensor` of shape `(M, L)`): tokens of the mentions.
            attention_mask (`torch.Tensor` of shape `(M, L)`, *optional*): 1 for tokens, 0 for padding.
            pixel_values (`torch.Tensor` of shape `(M, 3, H, W)`, *optional*): images; zeros where there is none.
            entity_input_ids (`torch.LongTensor` of shape `(N, L)`): tokens of the entities.
            entity_attention_mask (`torch.Tensor` of shape `(N, L)`, *optional*): 1 for tokens, 0 for padding.
            entity_pixel_values (`torch.Tensor` of shape `(N, 3, H, W)`, *optional*): images of the entities.
            labels (`torch.LongTensor` of shape `(M,)`, *optional*): for the loss, the row of each mention's answer
                among the entities. Defaults to the entity in the mention's own row, which needs M = N.
            return_loss (`bool`, *optional*): whether to return the loss. By default, if `labels` are given.
            return_features (`bool`, defaults to `False`): whether to return the features that were scored, too.
            return_scores (`bool`, defaults to `True`): whether to score the pairs. Without, the features are all that
                is returned, and either side may be left out: training that scores the entities of several processes,
                or encodes its batch part by part, does so.
            return_dict (`bool`, *optional*): whether to return a [`MimicOutput`] or a tuple.
            output_hidden_states, output_attentions (`bool`, *optional*): whether to return the hidden states and
                attentions of the backbone's models, in `mention_encoder_output` and `entity_encoder_output`.
            **kwargs: `entity_labels` (`torch.LongTensor` of shape `(N,)`): equal numbers mark the same entity; used
                if the configuration says `ignore_duplicate_answers`. It has no place of its own because a `Trainer`
                computes no evaluation loss unless it is given all arguments that are called labels. Everything else is
                handed to the backbone's text and vision models.

        Raises:
            ValueError: if the shapes do not fit each other.
        """
        entity_labels: Tensor | None = kwargs.pop("entity_labels", None)
        self._check_trained_well(labels is not None, return_loss is None and return_scores)
        kwargs |= {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        if not return_scores:
            output = MimicOutput()
            if input_ids is not None:
                output["mention_features"] = self.encode_mentions(input_ids, attention_mask, pixel_values, **kwargs)
            if entity_input_ids is not None:
                output["entity_features"] = self.encode_entities(
                    entity_input_ids, entity_attention_mask, entity_pixel_values, **kwargs
                )
            return output
        if input_ids is None or entity_input_ids is None:
            missing = "entity_input_ids" if entity_input_ids is None else "input_ids"
            raise ValueError(
                f"MimicModel scores mentions against entities and was given no `{missing}`. To encode mentions or "
                "entities alone, call `encode_mentions` or `encode_entities`."
            )
        mention, mention_mask = self._encoded(input_ids, attention_mask, pixel_values, "", kwargs)
        mentions = MentionFeatures(self.matcher(mention, mention_mask, side="mention"))
        entity, entity_mask = self._encoded(
            entity_input_ids, entity_attention_mask, entity_pixel_values, "entity_", kwargs
        )
        entities = EntityFeatures(self.matcher(entity, entity_mask, side="entity"))
        output = self.score(mentions, entities)
        if return_loss or (return_loss is None and labels is not None):
            output = MimicOutput(loss=self.contrastive_loss(output, labels, entity_labels), **output)
        if return_features:
            output = MimicOutput(**output, mention_features=mentions, entity_features=entities)
        if mention.text_model_output is not None:
            output = MimicOutput(**output, mention_encoder_output=mention, entity_encoder_output=entity)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _check_trained_well(self, has_labels: bool, asks_for_nothing: bool) -> None:
        """Refuses, or warns of, two ways in which a Trainer that knows nothing of the loss would spoil it."""
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "torch.nn.DataParallel, which a Trainer uses where it sees several GPUs, cuts a batch into parts that "
                "MIMIC's labels and negatives do not fit. Start one process a GPU (`torchrun --nproc-per-node GPUS "
                "...`), or show one GPU alone (`CUDA_VISIBLE_DEVICES=0`)."
            )
        if self.training and not has_labels and asks_for_nothing and torch.is_grad_enabled() and not is_traced():
            logger.warning_once(
                "MimicModel was called in training without `labels`: it returns no loss, and a loss of its `logits` "
                "trains the total score alone, without the units. A Trainer's `label_smoothing_factor` and "
                "`compute_loss_func` take the labels away: leave them out."
            )

    def contrastive_loss(
        self, output: MimicOutput, labels: Tensor | None = None, entity_labels: Tensor | None = None
    ) -> Tensor:
        """The sum of the cross-entropies of the total score and of each unit's, each mention's answer against the
        other entities of the batch (section 4.5 of the paper).

        Args:
            output: scores of shape (M, N).
            labels, entity_labels: as in [`~MimicModel.forward`].

        Returns:
            `torch.Tensor` of shape `()`, float32.
        """
        count, entity_count = output.logits.shape
        device = output.logits.device
        if labels is None:
            if count != entity_count:
                raise ValueError(
                    f"The loss of {count} mentions against {entity_count} entities needs `labels`: the row of each "
                    "mention's answer among the entities."
                )
            labels = torch.arange(count, device=device)
        labels = labels.to(device)
        known = not is_traced()
        if labels.shape != (count,) or (
            known and count and not 0 <= int(labels.min()) <= int(labels.max()) < entity_count
        ):
            raise ValueError(
                f"`labels` must hold {count} rows of entities, each from 0 to {entity_count - 1}; got the shape "
                f"{tuple(labels.shape)} and values from {int(labels.min())} to {int(labels.max())}."
            )
        own = torch.arange(count, device=device)
        not_rivals = not_rival_mentions = None
        if self.config.ignore_duplicate_answers and entity_labels is not None:
            if entity_labels.shape != (entity_count,):
                raise ValueError(
                    f"`entity_labels` must hold a number for each of {entity_count} entities; got the shape "
                    f"{tuple(entity_labels.shape)}."
                )
            entity_labels = entity_labels.to(device)
            answers = entity_labels[labels].unsqueeze(1)
            not_rivals = (answers == entity_labels).index_put((own, labels), own.new_zeros(()).bool())
            not_rival_mentions = (answers == answers.T).fill_diagonal_(False)
        reverse = None
        if self.config.symmetric_loss:  # each mention's answer against all mentions
            reverse = [logits[:, labels].T for logits in output.all_logits()]
        return loss_of_scores(output.all_logits(), labels, not_rivals, reverse, own, not_rival_mentions)


def weight_files(variant: str | None = None) -> str:
    """A pattern of the names of a checkpoint's weights. Those of one that is replaced must go: a single file that is
    left would be loaded in the place of several."""
    part = re.escape(f".{variant}") if variant else ""
    return rf"model{part}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{part}\.json"


def loss_of_scores(
    scores: Sequence[Tensor],
    labels: Tensor,
    not_rivals: Tensor | None = None,
    reverse: Sequence[Tensor] | None = None,
    own: Tensor | None = None,
    not_rival_mentions: Tensor | None = None,
) -> Tensor:
    """The sum of cross-entropies that [`MimicModel.contrastive_loss`] is, from scores of any origin.

    Args:
        scores: of the total and of each unit, each of shape (M, N).
        labels: the column of each mention's answer, (M,).
        not_rivals: booleans (M, N): columns that are no negatives of a mention.
        reverse: where mentions are ranked for each answer too, their scores, each of shape (M, all mentions).
        own: the column of each mention itself in these, (M,).
        not_rival_mentions: booleans of that shape: mentions that are no negatives of an answer.
    """
    loss = scores[0].new_zeros(())
    for place, logits in enumerate(scores):
        loss = loss + F.cross_entropy(
            logits if not_rivals is None else logits.masked_fill(not_rivals, -torch.inf), labels
        )
        if reverse is not None and own is not None:
            backward = reverse[place]
            if not_rival_mentions is not None:
                backward = backward.masked_fill(not_rival_mentions, -torch.inf)
            loss = loss + F.cross_entropy(backward, own)
    return loss


def _as_output(scores: PairScores) -> MimicOutput:
    return MimicOutput(
        logits=scores.total,
        text_logits=scores.text,
        image_logits=scores.image,
        cross_modal_logits=scores.cross_modal,
    )


def _refuse_states(kwargs: dict[str, Any]) -> None:
    for name in _STATES:
        if kwargs.get(name):
            raise ValueError(
                f"Features have no room for what `{name}` asks for: call `MimicModel.encode`, or the model, with it."
            )


@contextlib.contextmanager
def _at_least_float32_made() -> Iterator[None]:
    """Parameters that are made meanwhile are in float32 where others are made in half precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(before, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _pair_blocks(
    mentions: MentionFeatures, entities: EntityFeatures, block_bytes: int
) -> Iterator[tuple[slice, list[slice]]]:
    """Cuts M x N pairs into blocks whose attention matrix takes at most `block_bytes` (one pair at least)."""
    per_pair = 4 * mentions.tensors["text_key"].shape[1] * entities.tensors["text_query"].shape[1]
    pairs = max(1, block_bytes // per_pair)
    # Some mentions at a time, so that what is read of an entity serves them all.
    columns = max(1, min(len(entities), pairs // max(1, min(len(mentions), _SCORE_BLOCK_MENTIONS))))
    rows = max(1, pairs // columns)
    for start in range(0, len(mentions), rows):
        yield slice(start, start + rows), [slice(i, i + columns) for i in range(0, len(entities), columns)]


__all__ = ["EntityFeatures", "MentionFeatures", "MimicModel", "MimicOutput", "loss_of_scores", "weight_files"]

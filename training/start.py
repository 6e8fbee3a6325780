"""The model and processor that a training starts from. Knows no trainer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPTokenizer

from ..configuration_mimic import MimicConfig
from ..modeling_mimic import MimicModel
from ..processing_mimic import MimicProcessor
from .arguments import ModelArguments
from .knowledge_base import KnowledgeBase


def build_model(
    model_args: ModelArguments, mentions: Iterable[Mapping[str, Any]] | None, knowledge_base: KnowledgeBase
) -> tuple[MimicModel, MimicProcessor]:
    """The model and the processor that training starts from; `mentions` are the texts of a new tokenizer."""
    overrides = model_args.config_overrides()
    hub = {"revision": model_args.model_revision, "cache_dir": model_args.cache_dir}
    if model_args.model_name_or_path is not None:
        with _naming("--model_name_or_path", model_args.model_name_or_path):
            return load_model(model_args.model_name_or_path, model_args, **overrides, **hub)
    images = {} if model_args.correct_images is None else {"correct_images": model_args.correct_images}
    kwargs = {} if model_args.attn_implementation is None else {"attn_implementation": model_args.attn_implementation}
    if model_args.backbone is not None:
        settings: dict[str, Any] = {**hub, **images}
        with _naming("--backbone", model_args.backbone):
            model = MimicModel.from_backbone(model_args.backbone, dtype=torch.float32, **overrides, **hub, **kwargs)
            config: Any = model.config
            return model, MimicProcessor.from_backbone(model_args.backbone, config, **settings)
    clip = _clip_config(model_args.clip_config)
    tokenizer = train_tokenizer(_texts(mentions or [], knowledge_base), model_args.vocab_size)
    length = overrides.get("text_max_length", MimicConfig().text_max_length)
    tokenizer.model_max_length = length
    text = {"max_position_embeddings": length, **clip.get("text_config", {}), "vocab_size": len(tokenizer)}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = MimicConfig(CLIPConfig(**{**clip, "text_config": text}), **overrides)
    model = MimicModel._from_config(config, **kwargs)
    image_processor = MimicProcessor.image_processor_for(config.backbone_config)
    texts: dict[str, Any] = {"text_max_length": config.text_max_length, "context_window": config.context_window}
    return model, MimicProcessor(image_processor, tokenizer, **{**texts, **images})


@contextmanager
def _naming(option: str, name: str) -> Iterator[None]:
    """Names what cannot be loaded: without a network transformers says only that the Hub cannot be reached."""
    try:
        yield
    except OSError as error:
        if error.errno is not None or name in str(error):
            raise
        where = "" if Path(name).exists() else "there is no directory of this name, and as a Hub id: "
        raise ValueError(f"{option} {name}: {where}{error}") from error


def load_model(path: str, model_args: ModelArguments, **kwargs: Any) -> tuple[MimicModel, MimicProcessor]:
    """A MIMIC checkpoint's model, in float32, and processor."""
    if model_args.attn_implementation is not None:
        kwargs["attn_implementation"] = model_args.attn_implementation
    model = MimicModel.from_pretrained(path, dtype=torch.float32, **kwargs)
    hub = {name: kwargs[name] for name in ("revision", "cache_dir") if name in kwargs}
    processor = MimicProcessor.from_pretrained(path, **hub)
    processor.text_max_length = model.config.text_max_length
    processor.context_window = model.config.context_window
    if model_args.correct_images is not None:
        processor.correct_images = model_args.correct_images
    return model, processor


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is made from given texts; it can spell every other text too."""
    tokenizer = CLIPTokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # All word ends are named first: those that the trainer meets itself get numbers in an order that differs from
        # run to run, and those that it does not meet would be unknown, which to CLIP is the end of the text.
        special_tokens=[tokenizer.bos_token, tokenizer.eos_token, *(character + "</w>" for character in alphabet)],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.backend_tokenizer.train_from_iterator(texts, trainer)
    trained = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges: Any = [tuple(merge) for merge in trained["merges"]]
    return CLIPTokenizer(vocab=trained["vocab"], merges=merges)


def _texts(mentions: Iterable[Mapping[str, Any]], knowledge_base: KnowledgeBase) -> Iterator[str]:
    for name, description in zip(knowledge_base.column("name"), knowledge_base.column("description"), strict=True):
        yield f"{name or ''} [SEP] {description or ''}"
    if isinstance(mentions, datasets.Dataset | datasets.IterableDataset):
        mentions = mentions.select_columns(["mention", "sentence"])
    for mention in mentions:
        yield f"{mention['mention'] or ''} [SEP] {mention['sentence'] or ''}"


def _clip_config(given: dict | str | None) -> dict[str, Any]:
    if isinstance(given, str):
        source = given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8")
        given = yaml.safe_load(source)
    if not isinstance(given, dict):
        raise ValueError(f"--clip_config must be a mapping like a CLIPConfig, got {type(given).__name__}.")
    return {name: value for name, value in given.items() if name != "model_type"}

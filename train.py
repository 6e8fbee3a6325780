"""Train and evaluate MIMIC: `python train.py CONFIG.yaml`, or `python train.py --dataset_name ... --backbone ...`.

The defaults are the published recipe. The output directory ends up a checkpoint that `AutoModel`, `AutoProcessor` and
`pipeline("multimodal-entity-linking")` load, with its model card, the metrics and predictions of the test split, and
the encoded knowledge base in `index`. Run the same command again to go on after an interruption.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import yaml
from tokenizers import pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPTokenizer, HfArgumentParser, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from mimic_el.configuration_mimic import MimicConfig
from mimic_el.datasets_scripts.builders import BUILDERS, load_raw
from mimic_el.index_mimic import EntityIndex
from mimic_el.modeling_mimic import MimicModel
from mimic_el.pipeline_mimic import MultimodalEntityLinkingPipeline
from mimic_el.processing_mimic import MimicProcessor
from mimic_el.training import (
    INDEX_FOLDER,
    KnowledgeBase,
    MentionEntityCollator,
    MimicTrainer,
    MimicTrainingArguments,
    RankedMentions,
    require_columns,
    undecoded,
)
from mimic_el.training.model_card import TrainingRun

logger = logging.getLogger("mimic_el.train")

MENTION_COLUMNS = ("mention", "sentence", "image", "answer")
UNREADABLE_LOG = "unreadable_images.jsonl"
MISSING_LOG = "mentions_without_entity.jsonl"
# The arguments of `ModelArguments` that are `MimicConfig`'s.
_CONFIG_ARGUMENTS = (
    "text_max_length",
    "image_hidden_size",
    "tglu_hidden_size",
    "vdlu_hidden_size",
    "cmfu_hidden_size",
    "mask_text_padding",
    "ignore_duplicate_answers",
    "symmetric_loss",
)


# --- Arguments ------------------------------------------------------------------------------------------------------


def _switch(text: str) -> Any:
    """An option that is true where it has no value, and `None` (whatever the checkpoint says) where it is absent."""
    return field(default=None, metadata={"help": text, "nargs": "?", "const": True})


@dataclass
class ModelArguments:
    """Which model is trained. One of `model_name_or_path`, `backbone` and `from_scratch` says where it starts."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A MIMIC checkpoint to go on from: a directory or a Hub id."}
    )
    backbone: str | None = field(
        default=None,
        metadata={"help": "A CLIP checkpoint to start from, such as openai/clip-vit-base-patch32 (the published)."},
    )
    from_scratch: bool = field(
        default=False,
        metadata={"help": "Start from random weights, with a tokenizer made from the training texts; see clip_config."},
    )
    clip_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "With from_scratch: the CLIPConfig, as a JSON or YAML file, a JSON string, or (in a configuration "
            "file) a mapping. The vocabulary's size and special tokens are filled in."
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "With from_scratch: size of the tokenizer's vocabulary."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the checkpoint."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    text_max_length: int | None = field(default=None, metadata={"help": "Tokens of a text (published: 40)."})
    image_hidden_size: int | None = field(default=None, metadata={"help": "Width of image features (published: 96)."})
    tglu_hidden_size: int | None = field(default=None, metadata={"help": "Width of the text unit (published: 96)."})
    vdlu_hidden_size: int | None = field(default=None, metadata={"help": "Width of the image unit (published: 96)."})
    cmfu_hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the cross-modal unit (published: 96)."}
    )
    mask_text_padding: bool | None = _switch(
        "Leave padding out of the text unit's attention. The published model does not."
    )
    ignore_duplicate_answers: bool | None = _switch(
        "An answer that several mentions of a batch share is no negative of itself. In the published loss it is."
    )
    symmetric_loss: bool | None = _switch("Also rank the mentions for each entity. The published loss does not.")
    correct_images: bool | None = _switch(
        "Apply a camera's orientation, show white behind transparency, scale 16-bit pictures (the default of new "
        "models). The published preprocessing does none of it."
    )

    def __post_init__(self) -> None:
        starts = [bool(self.model_name_or_path), bool(self.backbone), self.from_scratch]
        if sum(starts) != 1:
            raise ValueError(
                "Say where the model starts: exactly one of --backbone CLIP (a Hub id or directory), "
                "--model_name_or_path CHECKPOINT and --from_scratch."
            )
        if self.from_scratch and self.clip_config is None:
            raise ValueError("--from_scratch needs --clip_config: a CLIPConfig as a JSON or YAML file.")

    def config_overrides(self) -> dict[str, Any]:
        """What `MimicConfig` is given."""
        return {name: getattr(self, name) for name in _CONFIG_ARGUMENTS if getattr(self, name) is not None}


@dataclass
class DataArguments:
    """What it is trained and evaluated on."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set with the configurations mentions and entities: a Hub id or a directory. With data_dir: "
            f"{', '.join(BUILDERS)}."
        },
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the data set."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "The archive, or folder of archives, that the data set's authors publish, read as it is."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the mentions as they are needed, in place of copying them to disk first. The entities are "
            "still copied (not to memory): each mention's answer must be found."
        },
    )
    shuffle_buffer: int = field(
        default=4096, metadata={"help": "With streaming: mentions among which the next is drawn."}
    )
    cache_pixels: bool = field(
        default=False,
        metadata={
            "help": "Keep the training's pictures decoded and resized in memory: 150 kB each at 224 x 224. For small "
            "data sets and many epochs."
        },
    )
    merge_duplicates: bool = field(
        default=False,
        metadata={
            "help": "An answer that several mentions of a batch share is in the batch once, which saves encoding it "
            "again. In the published batches it is there for each of them, and so is its own negative."
        },
    )
    max_train_mentions: int | None = field(default=None, metadata={"help": "Train on the first so many mentions only."})
    max_eval_mentions: int | None = field(
        default=None, metadata={"help": "Evaluate on the first so many mentions of a split only."}
    )
    top_k: int = field(default=10, metadata={"help": "Best entities noted for each mention of the test split."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the checkpoints and results of an earlier training in output_dir."}
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None:
            raise ValueError("--dataset_name says what to train on: a Hub id or a directory (see docs/datasets.md).")
        if self.data_dir is not None and self.dataset_name not in BUILDERS:
            raise ValueError(
                f"--data_dir is for the archives of {', '.join(BUILDERS)}; say which with --dataset_name, not "
                f"{self.dataset_name!r}. A prepared data set is a --dataset_name alone."
            )


def parse_args(argv: Sequence[str] | None = None) -> tuple[ModelArguments, DataArguments, MimicTrainingArguments]:
    """Arguments from the command line: options, or a YAML or JSON file and options that go before what it says.

    Raises:
        ValueError: if the file is no mapping, or has a key that is no option.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    kinds: Any = (ModelArguments, DataArguments, MimicTrainingArguments)
    parser = HfArgumentParser(kinds, description=__doc__)
    if argv and not argv[0].startswith("-"):
        path = Path(argv.pop(0))
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"The configuration file {path} cannot be read: {error.strerror}.") from error
        except yaml.YAMLError as error:
            raise ValueError(f"The configuration file {path} is neither YAML nor JSON: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"The configuration file {path} must hold a mapping of options to values.")
        options = {action.dest for action in parser._actions}
        for name in settings:
            if name not in options:
                near = difflib.get_close_matches(str(name), options, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise ValueError(f"{path}: there is no option {name!r}.{hint}")
        # YAML reads 1e-5 as a string; argparse converts the defaults that are strings.
        parser.set_defaults(**settings)
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)  # type: ignore[return-value]


# --- Data -----------------------------------------------------------------------------------------------------------


class StreamedMentions(torch.utils.data.IterableDataset):
    """Mentions read as they come, in another order each epoch, without those whose answer is no entity.

    Args:
        stream: the mentions.
        knowledge_base: has the answers.
        length: the number of mentions that have an entity, so that epochs can be counted.
        shuffle_buffer, seed: of the order.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        knowledge_base: KnowledgeBase,
        length: int,
        shuffle_buffer: int,
        seed: int,
    ) -> None:
        self.stream = stream.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.knowledge_base = knowledge_base
        self.length = length

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (mention for mention in self.stream if mention["answer"] in self.knowledge_base)


def load_data(data: DataArguments, cache_dir: str | None = None) -> tuple[dict[str, Any], KnowledgeBase]:
    """The mentions of each split (a `datasets.Dataset`, or an `IterableDataset` when streaming) and the entities.

    Raises:
        ValueError: if there is no such data set, or it has not the columns that a data set must have.
    """
    name = str(data.dataset_name)
    if data.data_dir is not None:
        splits, entities = load_raw(name, data.data_dir, streaming=data.streaming, cache_dir=cache_dir)
        if isinstance(entities, datasets.IterableDataset):
            entities = datasets.Dataset.from_generator(
                _rows_of, features=entities.features, gen_kwargs={"stream": entities}, cache_dir=cache_dir
            )
    else:
        options: dict[str, Any] = {"revision": data.dataset_revision, "cache_dir": cache_dir}
        if Path(name).is_dir():
            # The cache of `datasets` knows a directory by its name and card alone, and would give the old rows of one
            # that was written anew. The description of the configuration is part of the key.
            options["description"] = _fingerprint(Path(name))
        try:
            splits = datasets.load_dataset(name, "mentions", streaming=data.streaming, **options)
            entities = datasets.load_dataset(name, "entities", split="kb", **options)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"The data set {name!r} cannot be loaded: {error} A data set has the configurations mentions and "
                "entities (with the split kb); docs/datasets.md says how to make one."
            ) from error
    mentions = {split: undecoded(part) for split, part in splits.items()}
    for split, part in mentions.items():
        require_columns(part.column_names, MENTION_COLUMNS, f"the mentions of the split {split}")
    return mentions, KnowledgeBase(entities)


def _fingerprint(directory: Path) -> str:
    """Differs where the paths, sizes or times of the files of a directory differ."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def _rows_of(stream: datasets.IterableDataset) -> Iterator[Mapping[str, Any]]:
    yield from stream


def training_mentions(
    mentions: Any, knowledge_base: KnowledgeBase, data: DataArguments, args: MimicTrainingArguments
) -> tuple[Any, int]:
    """The mentions that can be trained on, and the number of those that cannot: their answer is no entity.

    They are named in `mentions_without_entity.jsonl` in the output directory.

    Raises:
        ValueError: if none can be trained on, or some cannot and `args.missing_answers` is "error".
    """
    if data.max_train_mentions is not None:
        mentions = _first(mentions, data.max_train_mentions)
    is_stream = isinstance(mentions, datasets.IterableDataset)
    names = [name for name in ("id", "mention", "answer") if name in mentions.column_names]
    rows = mentions.select_columns(names)
    if is_stream:
        rows = tqdm(rows, desc="Counting the training's mentions", disable=args.disable_tqdm)
    kept: list[int] = []
    missing: list[dict[str, Any]] = []
    for row, mention in enumerate(rows):
        if mention["answer"] in knowledge_base:
            kept.append(row)
        else:
            missing.append({"split": "train", "row": row, **mention})
    if missing:
        log = Path(args.output_dir or ".") / MISSING_LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in missing), encoding="utf-8")
        message = (
            f"The answers of {len(missing):,} of {len(missing) + len(kept):,} training mentions are not in the "
            f"knowledge base, such as {missing[0]['answer']!r}; all are listed in {log}"
        )
        if args.missing_answers == "error":
            raise ValueError(f"{message}.")
        logger.warning("%s. They are left out.", message)
    if not kept:
        raise ValueError("There are no mentions to train on whose answer is in the knowledge base.")
    if is_stream:
        stream = StreamedMentions(mentions, knowledge_base, len(kept), data.shuffle_buffer, args.seed)
        return stream, len(missing)
    return mentions.select(kept) if missing else mentions, len(missing)


def _first(mentions: Any, count: int) -> Any:
    if isinstance(mentions, datasets.IterableDataset):
        return mentions.take(count)
    return mentions.select(range(min(count, len(mentions))))


# --- Model ----------------------------------------------------------------------------------------------------------


def build_model(
    model_args: ModelArguments, mentions: Iterable[Mapping[str, Any]] | None, knowledge_base: KnowledgeBase
) -> tuple[MimicModel, MimicProcessor]:
    """The model and the processor that training starts from; `mentions` are the texts of a new tokenizer."""
    overrides = model_args.config_overrides()
    hub = {"revision": model_args.model_revision, "cache_dir": model_args.cache_dir}
    if model_args.model_name_or_path is not None:
        return load_model(model_args.model_name_or_path, model_args, **overrides, **hub)
    images = {} if model_args.correct_images is None else {"correct_images": model_args.correct_images}
    kwargs = {} if model_args.attn_implementation is None else {"attn_implementation": model_args.attn_implementation}
    if model_args.backbone is not None:
        model = MimicModel.from_backbone(model_args.backbone, dtype=torch.float32, **overrides, **hub, **kwargs)
        config: Any = model.config
        processor = MimicProcessor.from_backbone(model_args.backbone, config, **hub, **images)
        return model, processor
    clip = _clip_config(model_args.clip_config)
    tokenizer = train_tokenizer(_texts(mentions or [], knowledge_base), model_args.vocab_size)
    length = overrides.get("text_max_length", MimicConfig().text_max_length)
    tokenizer.model_max_length = length
    text = {"max_position_embeddings": length, **clip.get("text_config", {}), "vocab_size": len(tokenizer)}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = MimicConfig(CLIPConfig(**{**clip, "text_config": text}), **overrides)
    model = MimicModel._from_config(config, **kwargs)
    image_processor = MimicProcessor.image_processor_for(config.backbone_config)
    return model, MimicProcessor(image_processor, tokenizer, text_max_length=config.text_max_length, **images)


def load_model(path: str, model_args: ModelArguments, **kwargs: Any) -> tuple[MimicModel, MimicProcessor]:
    """A MIMIC checkpoint's model, in float32, and processor."""
    if model_args.attn_implementation is not None:
        kwargs["attn_implementation"] = model_args.attn_implementation
    model = MimicModel.from_pretrained(path, dtype=torch.float32, **kwargs)
    hub = {name: kwargs[name] for name in ("revision", "cache_dir") if name in kwargs}
    processor = MimicProcessor.from_pretrained(path, **hub)
    processor.text_max_length = model.config.text_max_length
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


# --- Running --------------------------------------------------------------------------------------------------------


def checkpoint_to_resume(args: MimicTrainingArguments, overwrite: bool = False) -> str | None:
    """The checkpoint from which training goes on, `None` for a new training.

    That is `resume_from_checkpoint` where it is given, else the last complete checkpoint in the output directory.

    Raises:
        ValueError: if the output directory holds a finished training, or there is no such checkpoint.
    """
    directory = Path(args.output_dir or ".")
    checkpoints = sorted(
        (path for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    results = [*directory.glob("*_results.json"), *directory.glob("predictions_*.jsonl"), directory / MISSING_LOG]
    if overwrite:
        for path in [*checkpoints, directory / INDEX_FOLDER]:
            shutil.rmtree(path, ignore_errors=True)
        for path in [*results, directory / UNREADABLE_LOG]:
            path.unlink(missing_ok=True)
        return None
    wanted = args.resume_from_checkpoint
    # The state is written last: without it the checkpoint is not complete.
    complete = [path for path in checkpoints if (path / "trainer_state.json").is_file()]
    if wanted is not None and wanted.lower() not in ("last", "true"):
        if not (Path(wanted) / "trainer_state.json").is_file():
            raise ValueError(f"{wanted} is no complete checkpoint of a training: it has no trainer_state.json.")
        return wanted
    if wanted is None and (directory / "train_results.json").is_file():
        raise ValueError(
            f"{directory} holds a finished training. Give another --output_dir, or --overwrite_output_dir to delete "
            "it, or --resume_from_checkpoint last to train it further."
        )
    if wanted is not None and not complete:
        raise ValueError(f"There is no complete checkpoint in {directory} to go on from.")
    for path in checkpoints:
        if path not in complete:
            logger.warning("%s is not complete and is left out of account.", path)
    return str(complete[-1]) if complete else None


def write_predictions(path: Path, ranked: RankedMentions) -> None:
    """Writes a line of JSON for each mention: see [`RankedMentions.records`]."""
    with open(path, "w", encoding="utf-8") as file:
        for record in ranked.records():
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def unreadable_pictures(output_dir: Path) -> list[dict[str, str]]:
    """The pictures that could not be read, each once."""
    try:
        lines = (output_dir / UNREADABLE_LOG).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        entry = json.loads(line)
        found.setdefault(entry["picture"], entry)
    return list(found.values())


def example_of(
    model: MimicModel, processor: MimicProcessor, index: EntityIndex, mentions: Iterable[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The first mention that can be read, and what the pipeline makes of it, for the card."""
    linker = MultimodalEntityLinkingPipeline(model=model, processor=processor, index=index)
    for row, mention in enumerate(mentions):
        try:
            linked = linker(dict(mention), top_k=min(3, len(index)))
        except ValueError:  # an empty mention, a picture that cannot be read
            continue
        shown = {name: mention[name] for name in ("mention", "sentence", "answer")}
        return {**shown, "row": row, "has_image": mention["image"] is not None, "linked": linked}
    return None


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains and evaluates as the arguments say; returns all metrics."""
    model_args, data_args, args = parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logger.setLevel(logging.INFO if args.should_log else logging.WARNING)
    if args.should_log:
        transformers.utils.logging.set_verbosity_warning()
    output_dir = Path(args.output_dir or ".")
    checkpoint = checkpoint_to_resume(args, data_args.overwrite_output_dir) if args.do_train else None
    set_seed(args.seed)

    mentions, knowledge_base = load_data(data_args, model_args.cache_dir)
    for split, wanted in (("train", args.do_train), ("validation", args.do_train and args.eval_strategy != "no")):
        if wanted and split not in mentions:
            raise ValueError(
                f"The data set has no split {split!r}; it has {', '.join(mentions)}. To train without evaluation: "
                "--eval_strategy no --no_load_best_model_at_end."
            )
    train: Any = None
    left_out = 0
    if not args.do_train:
        args.eval_strategy = IntervalStrategy.NO  # the Trainer's own checks are about training
    else:
        train, left_out = training_mentions(mentions["train"], knowledge_base, data_args, args)
    evaluated = {split: mentions[split] for split in ("validation", "test") if split in mentions}
    if data_args.max_eval_mentions is not None:
        evaluated = {split: _first(part, data_args.max_eval_mentions) for split, part in evaluated.items()}

    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
        model, processor = load_model(checkpoint, model_args)
    elif args.do_train or model_args.model_name_or_path is not None:
        model, processor = build_model(model_args, mentions.get("train"), knowledge_base)
    else:
        raise ValueError("To evaluate without training, name the checkpoint with --model_name_or_path.")
    for name in ("bos", "eos", "pad"):  # the Trainer aligns them, with a warning
        setattr(model.config, f"{name}_token_id", getattr(processor.tokenizer, f"{name}_token_id"))

    output_dir.mkdir(parents=True, exist_ok=True)
    collator = MentionEntityCollator(
        processor,
        knowledge_base,
        seed=args.seed,
        merge_duplicates=data_args.merge_duplicates,
        unreadable_log=output_dir / UNREADABLE_LOG,
    )
    if data_args.cache_pixels and train is not None:
        if data_args.streaming:
            raise ValueError("--cache_pixels keeps all pictures in memory, which --streaming is there to avoid.")
        train = collator.cache_pixels(train, os.cpu_count() or 1, show_progress=not args.disable_tqdm)
    trainer = MimicTrainer(
        model,
        args,
        entities=knowledge_base,
        processing_class=processor,
        train_dataset=train,
        eval_dataset=evaluated.get("validation"),
        data_collator=collator,
    )
    trainer.run = TrainingRun(
        dataset=str(data_args.dataset_name),
        dataset_revision=data_args.dataset_revision,
        base_model=model_args.model_name_or_path or model_args.backbone,
        train_mentions=None if train is None else len(train),
        train_mentions_left_out=left_out,
        entities=len(knowledge_base),
    )

    if args.do_train:
        try:
            result = trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            logger.error("Interrupted. The same command goes on from the last checkpoint in %s.", output_dir)
            raise SystemExit(130) from None
        trainer.save_model(_internal_call=True)  # pushed, if at all, when everything is there
        trainer.save_state()
        metrics: dict[str, Any] = {**result.metrics, "train_mentions": len(train), "train_mentions_left_out": left_out}
        metrics["unreadable_images"] = len(unreadable_pictures(output_dir))
        trainer.run.unreadable_images = metrics["unreadable_images"]
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
    if not trainer.is_world_process_zero():
        return {}

    # From here on nothing is shared between processes.
    index = trainer.build_index(output_dir / INDEX_FOLDER)
    # Found beside the checkpoint by the pipeline.
    trained = trainer.accelerator.unwrap_model(trainer.model)
    trained.config.default_index = INDEX_FOLDER
    trained.config.save_pretrained(output_dir)
    results: dict[str, float] = {}
    for split, wanted in (("validation", args.do_eval), ("test", args.do_predict)):
        if not wanted or split not in evaluated:
            continue
        ranked = trainer.rank(evaluated[split], index, top_k=data_args.top_k if split == "test" else 0)
        measured = ranked.metrics(args.missing_answers)
        trainer.run.metrics[split] = measured
        prefix = "eval" if split == "validation" else split
        metrics = {f"{prefix}_{name}": value for name, value in measured.items()}
        if measured["missing_answers"]:
            logger.warning(
                "The answers of %d %s mentions are not in the knowledge base.", measured["missing_answers"], split
            )
        trainer.log_metrics(prefix, metrics)
        trainer.save_metrics(prefix, metrics)
        results |= metrics
        if split == "test":
            write_predictions(output_dir / "predictions_test.jsonl", ranked)
            trainer.run.example = example_of(trained, processor, index, evaluated[split])
    unreadable = unreadable_pictures(output_dir)
    if unreadable:
        logger.warning("%d pictures could not be read; see %s.", len(unreadable), output_dir / UNREADABLE_LOG)
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    return results


if __name__ == "__main__":
    main()

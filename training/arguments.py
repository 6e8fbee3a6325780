"""The options of training: the published recipe, where the model starts, and its data. Loads no model and no data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    TrainingArguments,
)

from ..datasets_scripts.builders import BUILDERS

MISSING_ANSWERS = ("exclude", "miss", "error")
# Mentions of a step in all processes together, as published.
PUBLISHED_BATCH = 128


# The arguments of `ModelArguments` that are `MimicConfig`'s.
CONFIG_ARGUMENTS = (
    "text_max_length",
    "image_hidden_size",
    "tglu_hidden_size",
    "vdlu_hidden_size",
    "cmfu_hidden_size",
    "mask_text_padding",
    "ignore_duplicate_answers",
    "symmetric_loss",
    "context_window",
    "text_pooling",
)


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
        metadata={
            "help": "A CLIP or other dual encoder to start from, such as openai/clip-vit-base-patch32 (the published)."
        },
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
        "Do not use an answer that several mentions of a batch share as a negative of itself, as the published loss "
        "does."
    )
    symmetric_loss: bool | None = _switch("Also rank the mentions for each entity. The published loss does not.")
    context_window: str | None = field(
        default=None,
        metadata={
            "help": "Which part is read of a text longer than text_max_length: its start, as published, or the "
            "words around the mention.",
            "choices": ["start", "mention"],
        },
    )
    text_pooling: str | None = field(
        default=None,
        metadata={
            "help": "How a backbone of any two encoders pools texts: the mean of the tokens, or the first. By default "
            "with the text encoder's own pooling layer.",
            "choices": ["first", "mean"],
        },
    )
    correct_images: bool | None = _switch(
        "Apply a camera's orientation, show white behind transparency, scale 16-bit images (the default of new "
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
        return {name: getattr(self, name) for name in CONFIG_ARGUMENTS if getattr(self, name) is not None}


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
        default=4096, metadata={"help": "With streaming: how many mentions to shuffle at a time."}
    )
    cache_pixels: bool = field(
        default=False,
        metadata={
            "help": "Keep the training's images decoded and resized in memory: 150 kB each at 224 x 224. For small "
            "data sets and many epochs."
        },
    )
    merge_duplicates: bool = field(
        default=False,
        metadata={
            "help": "Encode an answer that several mentions of a batch share only once. In the published batches it "
            "is there for each of them, and so is its own negative."
        },
    )
    max_train_mentions: int | None = field(
        default=None, metadata={"help": "Train on only this many mentions, the first ones."}
    )
    max_eval_mentions: int | None = field(
        default=None, metadata={"help": "Evaluate on only this many mentions of a split, the first ones."}
    )
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "For a data set that names image files by a path: the folder that they must be in (default: the "
            "data set's own folder). Images in the data set itself are always read."
        },
    )
    allow_urls: str = field(
        default="none",
        metadata={
            "help": "Which addresses are read, if the data set names images by one: none, public, or private (of this "
            "machine and of private networks too).",
            "choices": ["none", "public", "private"],
        },
    )
    top_k: int = field(default=10, metadata={"help": "How many entities to write for each mention of the test split."})
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
        if self.cache_pixels and self.streaming:
            raise ValueError("--cache_pixels keeps all images in memory, which --streaming is there to avoid.")


_PARENT_FIELDS = {parent.name: parent for parent in dataclasses.fields(TrainingArguments)}


def _recipe(name: str, value: Any, text: str | None = None) -> Any:
    """A field of TrainingArguments with the published recipe's default."""
    return field(default=value, metadata=_PARENT_FIELDS[name].metadata if text is None else {"help": text})


@dataclass
class MimicTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose defaults are the published recipe.

    AdamW with a constant rate of 1e-5, eps 1e-4 and weight decay 1e-4, no clipping of gradients, batches of 128, at
    most 20 epochs, an evaluation every 2 epochs, the best checkpoint by MRR, a stop after 3 evaluations without gain,
    seed 43, float32.

    Args:
        eval_epochs (`int`, defaults to 2): with `eval_strategy="epoch"`, evaluate after every so many epochs, and after
            the last.
        early_stopping_patience (`int`, defaults to 3): stop after so many evaluations without gain; 0 never stops.
        missing_answers (`str`, defaults to "exclude"): what an evaluated mention counts whose answer is not in the
            knowledge base: "exclude", "miss" or "error", as in metrics/mel_ranking.
        index_dtype (`str`, defaults to "float32"): in what the knowledge base's features are kept for evaluation and
            in the index that training leaves.
        gather_negatives (`bool`, defaults to `True`): with several processes, whether a mention's negatives are the
            entities of all of them: so n processes train as one does with the whole batch. Without, they are those of
            its own process.
        cached_batch_size (`int`, *optional*): encode at most so many mentions and entities at a time (GradCache): a
            batch of any size then takes the memory of a small one, and encodes and scores once more. Loss and
            gradients are those of the plain step.
        hard_negatives (`int`, defaults to 0): so many wrong entities join a batch for each of its mentions, drawn from
            those that the model thinks best of the mention. The published batches have none.
        hard_negatives_epochs (`int`, defaults to 2): after every so many epochs the model's best wrong entities are
            searched anew; the first so many epochs are trained without.
        calibrate (`bool`, *optional*): whether the trained model is calibrated on the validation split. By default it
            is, if there is such a split and something follows from it.
        nil_rate (`float`, *optional*): of the calibration: see [`calibrate`].

    `per_device_train_batch_size` is by default what makes 128 mentions of all processes together, as published.
    `gradient_accumulation_steps` adds up gradients; it adds no negatives.
    """

    per_device_train_batch_size: int | None = _recipe(  # type: ignore[assignment]
        "per_device_train_batch_size",
        None,
        "Mentions of a step in each process. By default, all processes together have 128.",
    )
    per_device_eval_batch_size: int = _recipe("per_device_eval_batch_size", 128)
    num_train_epochs: float = _recipe("num_train_epochs", 20.0)
    learning_rate: float = _recipe("learning_rate", 1e-5)
    lr_scheduler_type: str = _recipe("lr_scheduler_type", "constant")
    weight_decay: float = _recipe("weight_decay", 1e-4)
    adam_epsilon: float = _recipe("adam_epsilon", 1e-4)
    max_grad_norm: float = _recipe("max_grad_norm", 0.0)
    seed: int = _recipe("seed", 43)
    eval_strategy: str = _recipe("eval_strategy", "epoch")
    save_strategy: str = _recipe("save_strategy", "epoch")
    save_total_limit: int | None = _recipe("save_total_limit", 2)
    load_best_model_at_end: bool = _recipe("load_best_model_at_end", True)
    metric_for_best_model: str | None = _recipe("metric_for_best_model", "mrr")
    greater_is_better: bool | None = _recipe("greater_is_better", True)
    restore_callback_states_from_checkpoint: bool = _recipe("restore_callback_states_from_checkpoint", True)
    remove_unused_columns: bool = _recipe("remove_unused_columns", False)
    logging_steps: float = _recipe("logging_steps", 10)
    # A checkpoint that is pushed while training goes on would lack the model's code.
    hub_strategy: str = _recipe("hub_strategy", "end")
    do_train: bool = _recipe("do_train", True)
    do_eval: bool = _recipe("do_eval", True)
    do_predict: bool = _recipe("do_predict", True)
    eval_epochs: int = field(
        default=2, metadata={"help": "With eval_strategy epoch: evaluate after every so many epochs, and the last."}
    )
    early_stopping_patience: int = field(
        default=3, metadata={"help": "Stop after so many evaluations without gain in the metric; 0: never."}
    )
    missing_answers: str = field(
        default="exclude",
        metadata={
            "help": "What an evaluated mention counts whose answer is not in the knowledge base: exclude (it is only "
            "counted), miss (no hit), error (stop).",
            "choices": list(MISSING_ANSWERS),
        },
    )
    index_dtype: str = field(
        default="float32",
        metadata={
            "help": "In what the features of the knowledge base are kept, in evaluation and in the saved index.",
            "choices": ["float32", "float16", "int8"],
        },
    )
    gather_negatives: bool = field(
        default=True,
        metadata={
            "help": "With several processes, a mention's negatives are the entities of all of them, so that they train "
            "as one process does with the whole batch. Without, those of its own process."
        },
    )
    cached_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Encode at most so many mentions and entities at a time (GradCache): a batch of any size in the "
            "memory of a small one, with the same loss and gradients; all is encoded and scored once more."
        },
    )
    hard_negatives: int = field(
        default=0,
        metadata={
            "help": "So many wrong entities join a batch for each of its mentions, drawn from those that the model "
            "thinks best. Published: none."
        },
    )
    hard_negatives_epochs: int = field(
        default=2, metadata={"help": "Search the hard negatives anew after every so many epochs; the first have none."}
    )
    calibrate: bool | None = field(
        default=None,
        metadata={
            "help": "Calibrate the trained model on the validation split, so that answers have probabilities (default: "
            "if there is one, and it tells enough). With do_train false: calibrate the checkpoint.",
            "nargs": "?",
            "const": True,
        },
    )
    nil_rate: float | None = field(
        default=None,
        metadata={
            "help": "Share of mentions to be expected whose entity is not in the knowledge base (default: as in the "
            "validation split, if 20 or more are so; else 0.2)."
        },
    )

    def __post_init__(self) -> None:
        if self.output_dir == "":
            raise ValueError('output_dir is empty. Name a directory; "." is the working directory.')
        # Told from a value that was given: 128 cannot be divided by every number of processes.
        self._batch_is_published = self.per_device_train_batch_size is None
        if self._batch_is_published:
            self.per_device_train_batch_size = PUBLISHED_BATCH
        super().__post_init__()
        if self._batch_is_published:
            self.per_device_train_batch_size = -(-PUBLISHED_BATCH // self.world_size)
        if self.eval_epochs < 1:
            raise ValueError(f"eval_epochs must be at least 1, got {self.eval_epochs}.")
        if self.early_stopping_patience < 0:
            raise ValueError(f"early_stopping_patience must not be negative, got {self.early_stopping_patience}.")
        if self.missing_answers not in MISSING_ANSWERS:
            raise ValueError(f"missing_answers must be one of {MISSING_ANSWERS}, got {self.missing_answers!r}.")
        if self.cached_batch_size is not None and self.cached_batch_size < 1:
            raise ValueError(f"cached_batch_size must be at least 1, got {self.cached_batch_size}.")
        if self.hard_negatives < 0:
            raise ValueError(f"hard_negatives must not be negative, got {self.hard_negatives}.")
        if self.hard_negatives_epochs < 1:
            raise ValueError(f"hard_negatives_epochs must be at least 1, got {self.hard_negatives_epochs}.")
        if self.hard_negatives and self.dataloader_persistent_workers:
            raise ValueError(
                "hard_negatives change from epoch to epoch, which workers that outlive an epoch do not see: leave "
                "dataloader_persistent_workers off."
            )
        if self.nil_rate is not None and not 0 <= self.nil_rate < 1:
            raise ValueError(f"nil_rate must be at least 0 and below 1, got {self.nil_rate}.")

    def batch_of_all(self, of_each: int) -> int:
        """Mentions of a step in all processes, where each takes `of_each` at most."""
        if self._batch_is_published and of_each == self.per_device_train_batch_size:
            return PUBLISHED_BATCH
        return of_each * self.world_size

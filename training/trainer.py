"""`MimicTrainer`, a `transformers.Trainer` that evaluates by ranking a whole knowledge base."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_utils import PredictionOutput, speed_metrics

from ..index_mimic import EntityIndex
from ..modeling_mimic import MimicModel
from ..processing_mimic import MimicProcessor
from ..records_mimic import undecoded
from .arguments import MimicTrainingArguments
from .calibration import ForgetCalibration
from .callbacks import BatchNote, EvaluateEveryFewEpochs, RefreshHardNegatives, SessionTime
from .collator import MentionEntityCollator
from .dealing import dealt_loader
from .distributed_evaluation import ENTITIES_IN_MEMORY, index_by_all, own_part, ranked_by_all
from .evaluation import RankedMentions, rank_mentions
from .gather import shared_loss, without_unused_parameters
from .grad_cache import cached_step
from .hard_negatives import TABLE, MentionsWithNegatives, best_wrong_entities
from .knowledge_base import KnowledgeBase
from .model_card import TrainingRun
from .processes import (
    check_enough,
    check_launch,
    check_same_data,
    check_same_settings,
    check_same_start,
    set_for_ddp,
    use_timeout,
)
from .upload import INDEX_FOLDER, upload_run, uploaded_index
from .watch import in_touch, of_the_main_process


class MimicTrainer(Trainer):
    """A `Trainer` that evaluates by ranking each mention's answer among the whole knowledge base.

    Args:
        model ([`MimicModel`]): to be trained.
        args ([`MimicTrainingArguments`]): how; or a plain `TrainingArguments`, with its own defaults.
        entities: the knowledge base: a [`KnowledgeBase`], a `datasets.Dataset`, or a sequence of dicts.
        processing_class ([`MimicProcessor`]): saved with every checkpoint.
        train_dataset, eval_dataset: mentions, with the columns `id`, `mention`, `sentence` (or `text`), `image` and
            `answer`.
        data_collator: a [`MentionEntityCollator`]; made from the above if absent.
        **kwargs: everything else that `Trainer` takes.

    Example:

    ```python
    >>> trainer = MimicTrainer(
    ...     model, args, entities=entities, processing_class=processor, train_dataset=train, eval_dataset=validation
    ... )
    >>> trainer.train()
    >>> trainer.evaluate()["eval_mrr"]
    ```
    """

    def __init__(
        self,
        model: MimicModel,
        args: TrainingArguments,
        *,
        entities: KnowledgeBase | datasets.Dataset | Sequence[Mapping[str, Any]],
        processing_class: MimicProcessor,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: MentionEntityCollator | None = None,
        **kwargs: Any,
    ) -> None:
        _check_fit(model, args, processing_class)
        check_launch(args)
        if data_collator is None:
            data_collator = MentionEntityCollator(processing_class, entities, seed=args.seed)
        self.run = TrainingRun(base_model=model.name_or_path or None)
        self.collator = data_collator
        self.knowledge_base = data_collator.knowledge_base
        args.remove_unused_columns = False  # the collator's columns are not the model's arguments
        train_dataset = undecoded(train_dataset, "image")
        hard_negatives = getattr(args, "hard_negatives", 0)
        if hard_negatives and train_dataset is not None:
            train_dataset = MentionsWithNegatives(train_dataset)
            data_collator.hard_negatives = hard_negatives
        launched = dist.is_available() and dist.is_initialized()  # with one process, too
        if launched:
            set_for_ddp(args)
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=undecoded(eval_dataset, "image"),
            processing_class=processing_class,
            **kwargs,
        )
        if launched:
            without_unused_parameters(model)
            use_timeout(args.ddp_timeout_delta)
        self._merge = data_collator.merge_duplicates
        self.add_callback(BatchNote())
        if isinstance(train_dataset, MentionsWithNegatives) and isinstance(args, MimicTrainingArguments):
            self.add_callback(RefreshHardNegatives(self.find_hard_negatives, train_dataset, args.hard_negatives_epochs))
        self.add_callback(SessionTime())
        self.add_callback(ForgetCalibration())
        if isinstance(args, MimicTrainingArguments):
            self.add_callback(EvaluateEveryFewEpochs(args.eval_epochs))
            if args.early_stopping_patience and args.eval_strategy != "no":
                self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    @property
    def seconds_before(self) -> float:
        """Seconds that the sessions before this one trained, up to the checkpoint that it went on from."""
        return next((item.before for item in self.callback_handler.callbacks if isinstance(item, SessionTime)), 0.0)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Everything but the parameters with "bias" in their name, as published: layer norm weights decay too."""
        return [name for name, _ in model.named_parameters() if "bias" not in name]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As [`transformers.Trainer.train`]. With several processes, one that fails or is gone is named by the others.

        Raises:
            ProcessError: then.
        """
        with in_touch("training", silence=self.args.ddp_timeout):
            check_same_start(resume_from_checkpoint, self.args.output_dir)
            return super().train(resume_from_checkpoint, *args, **kwargs)

    # --- Batches and their loss

    def get_train_dataloader(self) -> DataLoader:
        """The batches; of several processes each gets its part of what one would have (see dealing.py)."""
        count = self.args.world_size
        if count == 1 or self.train_dataset is None:
            return super().get_train_dataloader()
        args, each = self.args, self._train_batch_size
        total = args.batch_of_all(each) if isinstance(args, MimicTrainingArguments) else each * count
        check_same_settings(args, self._mimic_model().config)
        check_same_data(self.knowledge_base, self.train_dataset)
        check_enough(total, self.train_dataset)
        prepared = dealt_loader(
            self.train_dataset, self._get_train_sampler, self.data_collator, total, args, self.accelerator
        )
        self.accelerator._dataloaders.append(prepared)
        return prepared

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of a batch; in training by several processes, with the entities of all as negatives."""
        gather = getattr(self.args, "gather_negatives", False) and self.args.world_size > 1
        if return_outputs or not model.training or not gather:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        labels, numbers = inputs["labels"], inputs.get("entity_labels")
        encoded = {name: value for name, value in inputs.items() if not name.endswith("labels")}
        output = model(**encoded, return_scores=False)
        inner = self.accelerator.unwrap_model(model)
        return shared_loss(inner, output.mention_features, output.entity_features, labels, numbers, self._merge)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """A step of the Trainer's, or with `cached_batch_size` one that encodes the batch part by part."""
        chunk = getattr(self.args, "cached_batch_size", None)
        if chunk is None:
            return super().training_step(model, inputs, *args, **kwargs)
        model.train()
        inputs = self._prepare_inputs(inputs)
        steps = self.current_gradient_accumulation_steps
        loss = cached_step(
            model,
            self.accelerator.unwrap_model(model),
            inputs,
            chunk,
            lambda part: self.accelerator.backward(part / steps),
            context=self.compute_loss_context_manager,
            gather=getattr(self.args, "gather_negatives", False),
            merge=self._merge,
        )
        return loss / steps

    def find_hard_negatives(self) -> np.ndarray:
        """The wrong entities that the model as it is now thinks best of each training mention, as numbers in the
        knowledge base; see [`best_wrong_entities`]. Called by all processes."""
        mentions = self.train_dataset
        assert isinstance(mentions, MentionsWithNegatives)
        return best_wrong_entities(
            self._mimic_model(),
            self.collator,
            self.knowledge_base,
            mentions.mentions,
            self.collator.hard_negatives,
            Path(self.args.output_dir or ".") / "_hard_negatives_index",
            **self._encoding(),
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        table = Path(resume_from_checkpoint) / TABLE
        if isinstance(self.train_dataset, MentionsWithNegatives) and table.is_file():
            self.train_dataset.table = np.load(table, allow_pickle=False)

    def _mimic_model(self) -> MimicModel:
        return self.accelerator.unwrap_model(self.model)

    # --- The knowledge base

    def build_index(self, output_dir: str | Path | None = None) -> EntityIndex:
        """The knowledge base encoded by the model as it is now; in memory, or in a directory that is emptied first.

        With an `output_dir` it is called by all processes: each encodes a part.
        """
        model, processor, options = self._mimic_model(), self.collator.processor, self._encoding()
        if output_dir is None:
            records = self.knowledge_base.entities()
            return EntityIndex.build(model, processor, records, shard=None, **options)
        with in_touch("encoding the knowledge base", silence=self.args.ddp_timeout):
            return index_by_all(model, processor, self.knowledge_base, Path(output_dir), **options)

    def rank(self, mentions: Any, index: EntityIndex | None = None, top_k: int = 0, depth: int = 0) -> RankedMentions:
        """Ranks the answers of mentions among the whole knowledge base: see [`rank_mentions`]. Without an index it is
        called by all processes, each of which has a part of it.

        Args:
            mentions: as `eval_dataset`.
            index: the knowledge base encoded by the model as it is now; encoded for this call if absent.
            top_k: how many of the best entities to note for each mention.
            depth: if not 0, of how many of the best entities the scores are noted, for a calibration.
        """
        if index is None and self.args.world_size > 1:
            if top_k or depth:
                raise ValueError("With several processes `top_k` and `depth` need an `index`: see build_index.")
            return self._rank_by_all(mentions)
        scratch = None
        if index is None:
            if len(self.knowledge_base) > ENTITIES_IN_MEMORY:
                # Not uploaded with the rest, for the underscore.
                scratch = Path(self.args.output_dir or ".") / "_evaluation_index"
            index = self.build_index(scratch)
        try:
            return rank_mentions(
                self._mimic_model(),
                self.collator,
                index,
                mentions,
                top_k=top_k,
                depth=depth,
                batch_size=self.args.eval_batch_size,
                num_workers=self.args.dataloader_num_workers,
                show_progress=not self.args.disable_tqdm,
            )
        finally:
            if scratch is not None:
                del index
                shutil.rmtree(scratch, ignore_errors=True)

    def _rank_by_all(self, mentions: Any) -> RankedMentions:
        """As [`rank`], by all processes together, each with its part of the knowledge base."""
        model, mentions = self._mimic_model(), undecoded(mentions, "image")
        scratch = Path(self.args.output_dir or ".") / "_evaluation_index"
        with in_touch("evaluation", silence=self.args.ddp_timeout):
            check_same_settings(self.args, model.config)
            check_same_data(self.knowledge_base, mentions)
            with own_part(model, self.collator, self.knowledge_base, scratch, **self._encoding()) as part:
                return ranked_by_all(
                    model,
                    self.collator,
                    part,
                    mentions,
                    batch_size=self.args.eval_batch_size,
                    num_workers=self.args.dataloader_num_workers,
                )

    def _encoding(self) -> dict[str, Any]:
        """How the knowledge base is encoded."""
        return {
            "dtype": getattr(self.args, "index_dtype", "float32"),
            "batch_size": self.args.eval_batch_size,
            "num_workers": self.args.dataloader_num_workers,
            "show_progress": not self.args.disable_tqdm,
        }

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        index: EntityIndex | None = None,
    ) -> dict[str, float]:
        """Ranks the answers of the evaluation's mentions among the whole knowledge base.

        Args:
            eval_dataset: mentions in place of the trainer's, or a dict of several.
            ignore_keys: not used.
            metric_key_prefix: goes before the names of the metrics.
            index: as in [`~MimicTrainer.rank`].

        Returns:
            `dict[str, float]`: `eval_mrr`, `eval_hits@1` and the others of [`RankedMentions.metrics`], and the time.
        """
        eval_dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, dict):
            several: dict[str, float] = {}
            for name, mentions in eval_dataset.items():
                several |= self.evaluate(mentions, ignore_keys, f"{metric_key_prefix}_{name}", index)
            return several
        if eval_dataset is None:
            raise ValueError("There is nothing to evaluate on: no `eval_dataset` was given.")
        _, metrics = self._measured(eval_dataset, metric_key_prefix, index)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        index: EntityIndex | None = None,
    ) -> PredictionOutput:
        """As [`evaluate`], of a test split. Its `predictions` are the ranks of the answers in the whole knowledge base,
        (M,), NaN where one is not in it; its `label_ids` are `None`. For the entities found call [`rank`]."""
        ranked, metrics = self._measured(test_dataset, metric_key_prefix, index)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(predictions=ranked.ranks, label_ids=None, metrics=metrics)

    def _measured(
        self, mentions: Any, prefix: str, index: EntityIndex | None
    ) -> tuple[RankedMentions, dict[str, float]]:
        """Mentions with the ranks of their answers, and the metrics of these; the same in all processes."""

        def measure() -> tuple[RankedMentions, dict[str, float]]:
            start = time.time()
            ranked = self.rank(mentions, index)
            metrics = ranked.metrics(getattr(self.args, "missing_answers", "exclude"))
            metrics = {f"{prefix}_{name}": value for name, value in metrics.items()}
            return ranked, metrics | speed_metrics(prefix, start, num_samples=len(ranked.ids))

        together = index is None and self.args.world_size > 1
        with in_touch("evaluation", silence=self.args.ddp_timeout):
            return measure() if together else of_the_main_process("evaluation", measure)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`transformers.Trainer.save_model`]."""
        super().save_model(output_dir, _internal_call)
        if output_dir in (None, self.args.output_dir):
            # What an index notes as its model: not the checkpoint any more that training started from.
            self._mimic_model().config.name_or_path = str(self.args.output_dir or ".")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the card of `self.run` into the output directory; `model_name` is its title."""
        if self.is_world_process_zero():
            self.run.has_index = (Path(self.args.output_dir or ".") / INDEX_FOLDER).is_dir()
            self.run.observe(
                self,
                entities=len(self.knowledge_base),
                correct_images=self.collator.processor.correct_images,
                seconds_before=self.seconds_before,
            )
            self.run.write(self.args.output_dir or ".", kwargs.get("model_name"))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Uploads model, processor, code, card and results to the Hub (the files of [`hub_files`]), and the index, if
        the output directory has one in `index`, to a repository of its own, which the uploaded model names as its
        default.

        Args:
            commit_message, token, revision, private: as in `Trainer.push_to_hub`.
            blocking: not used; the upload is waited for.
            **kwargs: `model_name` is the card's title; the repository's id by default.

        Returns:
            The commit; `None` in all processes but the main one.
        """
        args = self.args
        token = token or args.hub_token
        if self.hub_model_id is None:
            if private is not None:
                args.hub_private_repo = private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        repo_id = str(self.hub_model_id)
        with uploaded_index(
            Path(args.output_dir or "."),
            self._mimic_model().config,  # type: ignore[arg-type]
            repo_id,
            source=self.run.dataset_id,
            private=args.hub_private_repo if private is None else private,
            token=token,
        ):
            self.create_model_card(model_name=kwargs.get("model_name") or repo_id)
            return upload_run(
                Path(args.output_dir or "."),
                repo_id,
                commit_message=commit_message or "End of training",
                revision=revision or args.hub_revision,
                token=token,
            )


def _check_fit(model: MimicModel, args: TrainingArguments, processor: MimicProcessor) -> None:
    """Refuses a processor that reads other words than the model's, and a loss that would not be MIMIC's."""
    reads, told = getattr(processor, "context_window", None), getattr(model.config, "context_window", None)
    if reads != told:
        raise ValueError(
            f"The processor's `context_window` is {reads!r}, the model's configuration says {told!r}: what is "
            "trained on would not be what is linked. Give both the same."
        )
    if args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor is not for MIMIC: the Trainer would smooth the total score's loss and drop "
            "those of the three units. Leave it 0."
        )

"""Trains and evaluates MIMIC: `mimic-el train CONFIG.yaml`, or `mimic-el train --dataset_name ... --backbone ...`.

The defaults are the published recipe. The output directory ends up a checkpoint that `AutoModel`, `AutoProcessor` and
`pipeline("multimodal-entity-linking")` load, with its model card, the metrics and predictions of the test split, and
the encoded knowledge base in `index`. The validation split calibrates it, so that answers have probabilities. Run the
same command again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import IntervalStrategy

from mimic_el.console import busy_machine, did_you_mean, harmless, tolerate_any_text
from mimic_el.errors_mimic import CalibrationError, MimicError
from mimic_el.index_mimic import EntityIndex
from mimic_el.modeling_mimic import MimicModel
from mimic_el.saving_mimic import is_full
from mimic_el.training.arguments import DataArguments, MimicTrainingArguments, ModelArguments
from mimic_el.training.calibration import DEPTH, calibration_report
from mimic_el.training.collator import MentionEntityCollator, unreadable_images
from mimic_el.training.configuration_file import settings_of
from mimic_el.training.data import first, load_data, training_mentions
from mimic_el.training.evaluation import RankedMentions
from mimic_el.training.examples import example_of, explained_example
from mimic_el.training.model_card import TrainingRun
from mimic_el.training.resume import UNREADABLE_LOG, checkpoint_to_resume
from mimic_el.training.start import build_model, load_model
from mimic_el.training.trainer import MimicTrainer
from mimic_el.training.upload import INDEX_FOLDER

logger = logging.getLogger("mimic_el.train")


def option_parser() -> HfArgumentParser:
    """The parser of all options. Its help has the project's own first, then the rest of `TrainingArguments`."""
    kinds: Any = (ModelArguments, DataArguments, MimicTrainingArguments)
    usage = "%(prog)s [CONFIG.yaml] [--option value ...]"
    parser = HfArgumentParser(kinds, description=__doc__, usage=usage, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    own = {name for kind in (ModelArguments, DataArguments) for name in kind.__dataclass_fields__}
    recipe = set(MimicTrainingArguments.__annotations__)
    titles = {
        "The model": {name for name in own if name in ModelArguments.__dataclass_fields__},
        "The data": {name for name in own if name in DataArguments.__dataclass_fields__},
        "The training: the published recipe, and what is this project's own": recipe,
    }
    groups = {title: parser.add_argument_group(title) for title in titles}
    rest = parser.add_argument_group("Everything else that transformers.TrainingArguments has")
    for action in list(parser._actions):
        title = next((title for title, names in titles.items() if action.dest in names), None)
        if action.dest != "help":
            (groups[title] if title else rest)._group_actions.append(action)
    kept = [*groups.values(), rest]
    parser._action_groups = [group for group in parser._action_groups if group.title == "options"] + kept
    parser._action_groups[0]._group_actions = [action for action in parser._actions if action.dest == "help"]
    return parser


def parse_args(argv: Sequence[str] | None = None) -> tuple[ModelArguments, DataArguments, MimicTrainingArguments]:
    """Arguments from the command line: options, or a YAML or JSON file and options that go before what it says.

    Raises:
        ValueError: if the file cannot be read, or has a key that is not an option or a value of the wrong kind.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = option_parser()
    if argv and not argv[0].startswith("-"):
        path = Path(argv.pop(0))
        if not path.is_file() and path.name == str(path) and not path.suffix:
            packaged = {item.stem: item for item in (Path(__file__).parent / "configs").glob("*.yaml")}
            if path.name not in packaged:
                raise ValueError(
                    f"There is no configuration {path.name!r}: name a YAML or JSON file, or one of "
                    f"{', '.join(sorted(packaged))}.{did_you_mean(path.name, packaged)}"
                )
            path = packaged[path.name]
        settings = settings_of(path, (ModelArguments, DataArguments, MimicTrainingArguments))
        data = Path(__file__).parent / str(settings.get("dataset_name"))
        if path.resolve().parent == Path(__file__).resolve().parent / "configs" and data.is_dir():
            settings["dataset_name"] = str(data)  # a data set of the package, wherever the command runs
        # YAML reads 1e-5 as a string; argparse converts the defaults that are strings.
        parser.set_defaults(**settings)
    known = list(parser._option_string_actions)
    for word in argv:
        option = word.partition("=")[0]
        if option.startswith("--") and option != "--" and option not in known:
            raise ValueError(f"There is no option {option!r}.{did_you_mean(option, known)}")
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)  # type: ignore[return-value]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains and evaluates as the arguments say; returns all metrics."""
    model_args, data_args, args = parse_args(argv)
    if not args.do_train and model_args.model_name_or_path is None:
        raise ValueError("To evaluate without training, name the checkpoint with --model_name_or_path.")
    _start_logging(args)
    output_dir = Path(args.output_dir or ".")
    checkpoint = checkpoint_to_resume(args, data_args.overwrite_output_dir) if args.do_train else None
    set_seed(args.seed)
    mentions, knowledge_base = load_data(data_args, model_args.cache_dir)
    _check_splits(mentions, args)
    train, left_out = None, 0
    if args.do_train:
        train, left_out = training_mentions(mentions["train"], knowledge_base, data_args, args)
    else:
        args.eval_strategy = IntervalStrategy.NO  # the Trainer's own checks are about training
    evaluated: dict[str, Any] = {split: mentions[split] for split in ("validation", "test") if split in mentions}
    if data_args.max_eval_mentions is not None:
        evaluated = {split: first(part, data_args.max_eval_mentions) for split, part in evaluated.items()}

    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
        model, processor = load_model(checkpoint, model_args)
    else:
        model, processor = build_model(model_args, mentions.get("train"), knowledge_base)
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
    if train is not None:
        _train(trainer, checkpoint)
    index = trainer.build_index(output_dir / INDEX_FOLDER)
    if not trainer.is_world_process_zero():
        return {}  # from here on nothing is shared between processes
    results = _evaluate(trainer, index, evaluated, data_args.top_k)
    if unreadable := unreadable_images(output_dir / UNREADABLE_LOG):
        logger.warning("%d images could not be read; see %s.", len(unreadable), output_dir / UNREADABLE_LOG)
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    return results


def _start_logging(args: MimicTrainingArguments) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logger.setLevel(logging.INFO if args.should_log else logging.WARNING)
    if args.should_log:
        transformers.utils.logging.set_verbosity_warning()
        if args.device.type == "cpu" and (note := busy_machine(torch.get_num_threads())):
            logger.info(note)


def _check_splits(mentions: Mapping[str, Any], args: MimicTrainingArguments) -> None:
    for split, wanted in (("train", args.do_train), ("validation", args.do_train and args.eval_strategy != "no")):
        if wanted and split not in mentions:
            raise ValueError(
                f"The data set has no split {split!r}; it has {', '.join(mentions)}. To train without evaluation: "
                "--eval_strategy no --no_load_best_model_at_end."
            )
    if args.calibrate and "validation" not in mentions:
        raise ValueError("--calibrate needs a validation split, and the data set has none.")


def _train(trainer: MimicTrainer, checkpoint: str | None) -> None:
    """Trains, from the start or on from a checkpoint, and saves the model and what is noted of the training."""
    args, output_dir = trainer.args, Path(trainer.args.output_dir or ".")
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        logger.error("Interrupted. The same command goes on from the last checkpoint in %s.", output_dir)
        raise SystemExit(130) from None
    trainer.save_model(_internal_call=True)  # pushed, if at all, when everything is there
    trainer.save_state()
    run, count = trainer.run, len(trainer.train_dataset)  # type: ignore[arg-type]
    run.unreadable_images = len(unreadable_images(output_dir / UNREADABLE_LOG))
    metrics: dict[str, Any] = {
        **result.metrics,
        "train_mentions": count,
        "train_mentions_left_out": run.train_mentions_left_out,
        "unreadable_images": run.unreadable_images,
    }
    if trainer.seconds_before:  # the Trainer counts this session alone
        seconds = metrics["train_runtime"] + trainer.seconds_before
        steps, all_steps = trainer.state.global_step, max(1, trainer.state.max_steps)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        samples = args.max_steps * batch if args.max_steps > 0 else count * args.num_train_epochs
        metrics["train_runtime"] = round(seconds, 4)
        metrics["train_steps_per_second"] = round(steps / seconds, 3)
        metrics["train_samples_per_second"] = round(samples * steps / all_steps / seconds, 3)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)


def _evaluate(trainer: MimicTrainer, index: EntityIndex, evaluated: Mapping[str, Any], top_k: int) -> dict[str, float]:
    """Calibrates the model, ranks the validation and the test split, and writes down what came out."""
    args: Any = trainer.args
    output_dir, model = Path(args.output_dir or "."), trainer.accelerator.unwrap_model(trainer.model)
    model.config.default_index = INDEX_FOLDER  # the pipeline finds it beside the checkpoint
    model.config.save_pretrained(output_dir)
    ranked: dict[str, RankedMentions] = {}
    if args.calibrate or (args.calibrate is None and args.do_train and "validation" in evaluated):
        ranked["validation"] = trainer.rank(evaluated["validation"], index, depth=DEPTH)
        if _calibrated(model, index, ranked["validation"], args):
            if args.do_train:
                model.config.save_pretrained(output_dir)
            else:
                trainer.save_model(_internal_call=True)  # a checkpoint of its own
    results: dict[str, float] = {}
    if args.do_eval and "validation" in evaluated:
        found = ranked.get("validation") or trainer.rank(evaluated["validation"], index)
        results |= _note_metrics(trainer, "validation", "eval", found)
    if args.do_predict and "test" in evaluated:
        found = trainer.rank(evaluated["test"], index, top_k=top_k)
        results |= _note_metrics(trainer, "test", "test", found)
        found.write(output_dir / "predictions_test.jsonl")
        run, collator = trainer.run, trainer.collator
        run.example = example_of(model, collator.processor, index, evaluated["test"])
        run.explanation = explained_example(
            model, collator.processor, index, evaluated["test"], collator.knowledge_base
        )
        report = run.calibration = calibration_report(model, index, found.scored)
        if report is not None:
            trainer.save_metrics(
                "calibration", {f"calibration_{name}": value for name, value in report.figures.items()}
            )
    return results


def _note_metrics(trainer: MimicTrainer, split: str, prefix: str, ranked: RankedMentions) -> dict[str, float]:
    """Logs and saves the metrics of a split, notes them for the card, and gives them with their prefix."""
    measured = ranked.metrics(getattr(trainer.args, "missing_answers", "exclude"))
    trainer.run.metrics[split] = measured
    metrics = {f"{prefix}_{name}": value for name, value in measured.items()}
    if measured["missing_answers"]:
        logger.warning(
            "The answers of %d %s mentions are not in the knowledge base.", measured["missing_answers"], split
        )
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    return metrics


def _calibrated(model: MimicModel, index: EntityIndex, ranked: RankedMentions, args: MimicTrainingArguments) -> bool:
    """Calibrates the model on ranked mentions; returns whether that was possible. It must be where it is asked for."""
    try:
        ranked.calibrate(model, index, args.nil_rate)
    except CalibrationError as error:
        if args.calibrate:
            raise
        logger.warning("The model is not calibrated, so its answers have no probabilities. %s", error)
        return False
    return True


def run(argv: Sequence[str] | None = None) -> None:
    """The command: [`main`], but what the user can mend is one line and the exit status 2.

    With `--log_level debug` the place in the code is shown as well.
    """
    tolerate_any_text()
    try:
        main(argv)
    except (MimicError, ValueError, OSError) as error:  # no such checkpoint, a full disk, a Hub that does not answer
        if "debug" in (argv or sys.argv):
            raise
        told = " ".join(str(error).split())
        if is_full(error):
            told += (
                ". Make room. The same command goes on with a training from its last checkpoint; one that has ended is "
                "evaluated with --no_do_train --model_name_or_path OUTPUT_DIR in place of where the model starts."
            )
        print(f"train: error: {harmless(told)}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    run()

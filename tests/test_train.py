"""Training: batches, the published recipe, evaluation against the whole knowledge base, the script."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import mel_archives
import numpy as np
import pytest
import torch
import toy_data
import transformers
import yaml
from gloo import run_together
from PIL import Image
from python_processes import own_python
from transformers import AutoModel, AutoProcessor, Trainer, TrainerCallback, TrainingArguments, set_seed

from mimic_el import train
from mimic_el.index_mimic import EntityIndex
from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor
from mimic_el.training import (
    KnowledgeBase,
    MentionEntityCollator,
    MimicTrainer,
    MimicTrainingArguments,
    in_batch_metrics,
    rank_mentions,
)
from mimic_el.training.collator import unreadable_images
from mimic_el.training.data import MISSING_LOG
from mimic_el.training.evaluation import RankedMentions
from mimic_el.training.resume import UNREADABLE_LOG
from mimic_el.training.start import train_tokenizer

# Its type knows the library's own tasks alone.
pipeline: Any = transformers.pipeline

ROOT = Path(__file__).parents[1]
FROM_SCRATCH: dict[str, Any] = {
    "from_scratch": True,
    "clip_config": toy_data.CLIP_CONFIG,
    "vocab_size": 700,
    "text_max_length": 12,
    **toy_data.SIZES,
}
QUICK: dict[str, Any] = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_data.write_dataset(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="module")
def parts() -> tuple[MimicModel, MimicProcessor]:
    """A small model with random weights, and its processor."""
    set_seed(0)
    args = train.ModelArguments(**FROM_SCRATCH)
    return train.build_model(args, toy_data.mentions("train", 36), toy_data.knowledge_base())


@pytest.fixture
def model(parts: tuple[MimicModel, MimicProcessor]) -> MimicModel:
    config: Any = parts[0].config
    model = MimicModel(config)
    model.load_state_dict(parts[0].state_dict())
    return model


@pytest.fixture
def processor(parts: tuple[MimicModel, MimicProcessor]) -> MimicProcessor:
    return parts[1]


def write_config(path: Path, **settings: Any) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the script, from a configuration file."""
    directory = tmp_path_factory.mktemp("trained")
    settings = {"dataset_name": str(data_dir), "output_dir": str(directory / "out"), **FROM_SCRATCH, **QUICK}
    train.main([write_config(directory / "toy.yaml", **settings)])
    return directory / "out"


# --- The recipe


def test_defaults_are_the_published_recipe(tmp_path: Path) -> None:
    args = MimicTrainingArguments(output_dir=str(tmp_path))
    assert (args.learning_rate, args.weight_decay, args.adam_epsilon) == (1e-5, 1e-4, 1e-4)
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.999)
    assert args.lr_scheduler_type == "constant"
    assert args.get_warmup_steps(1000) == 0
    assert args.max_grad_norm == 0
    assert args.per_device_train_batch_size == 128
    assert args.num_train_epochs == 20
    assert (args.eval_strategy, args.eval_epochs) == ("epoch", 2)
    assert (args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better) == (True, "mrr", True)
    assert args.early_stopping_patience == 3
    assert args.seed == 43
    assert not args.bf16
    assert not args.fp16


def test_optimiser_has_the_published_groups(model: MimicModel, processor: MimicProcessor, tmp_path: Path) -> None:
    args = MimicTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    mentions = toy_data.mentions("val", 1)
    trainer = MimicTrainer(model, args, entities=toy_data.entities(), processing_class=processor, eval_dataset=mentions)
    optimiser = trainer.create_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}

    assert isinstance(optimiser, torch.optim.AdamW)
    decayed, plain = optimiser.param_groups
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {names[p] for p in decayed["params"]} == {name for name in trained if "bias" not in name}
    assert {names[p] for p in plain["params"]} == {name for name in trained if "bias" in name}
    # Layer norms decay, unlike in most recipes.
    assert "matcher.tglu.layer_norm.weight" in {names[p] for p in decayed["params"]}
    assert "encoder.clip.vision_model.post_layernorm.weight" in {names[p] for p in decayed["params"]}
    for group, decay in ((decayed, 1e-4), (plain, 0.0)):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-5, (0.9, 0.999), 1e-4, decay)
        assert not group["amsgrad"]


def test_benchmark_configurations_are_the_published_recipe() -> None:
    recipe = MimicTrainingArguments(output_dir="x", use_cpu=True)
    for name in ("wikimel", "richpediamel", "wikidiverse"):
        model_args, data_args, args = train.parse_args([str(ROOT / "configs" / f"{name}.yaml"), "--use_cpu"])
        assert model_args.backbone == "openai/clip-vit-base-patch32"
        assert model_args.config_overrides() == {}
        assert model_args.correct_images is False
        assert name in str(data_args.dataset_name)
        same = set(vars(recipe)) - {
            "output_dir",
            "logging_dir",
            "dataloader_num_workers",
            "run_name",
            "distributed_state",
        }
        assert {key: vars(args)[key] for key in same} == {key: vars(recipe)[key] for key in same}


def test_evaluates_every_second_epoch_and_stops_early(
    model: MimicModel, processor: MimicProcessor, tmp_path: Path
) -> None:
    # A rate of zero never gains: the first evaluation is the best, and three more without gain stop the training.
    settings = {**QUICK, "num_train_epochs": 20, "learning_rate": 0.0, "per_device_train_batch_size": 18}
    args = MimicTrainingArguments(output_dir=str(tmp_path), save_only_model=True, **settings)
    trainer = MimicTrainer(
        model,
        args,
        entities=toy_data.knowledge_base(),
        processing_class=processor,
        train_dataset=toy_data.mention_dataset("train", 36),
        eval_dataset=toy_data.mention_dataset("val", 9),
    )
    trainer.train()
    evaluations = [entry["epoch"] for entry in trainer.state.log_history if "eval_mrr" in entry]
    assert evaluations == [2, 4, 6, 8]
    assert trainer.state.best_global_step == 4


def test_last_epoch_is_evaluated(model: MimicModel, processor: MimicProcessor, tmp_path: Path) -> None:
    args = MimicTrainingArguments(output_dir=str(tmp_path), **{**QUICK, "num_train_epochs": 3})
    trainer = MimicTrainer(
        model,
        args,
        entities=toy_data.knowledge_base(),
        processing_class=processor,
        train_dataset=toy_data.mentions("train", 16),
        eval_dataset=toy_data.mentions("val", 9),
    )
    trainer.train()
    assert [entry["epoch"] for entry in trainer.state.log_history if "eval_mrr" in entry] == [2, 3]


# --- Batches


def test_batch_joins_mentions_with_their_answers(processor: MimicProcessor) -> None:
    entities, mentions = toy_data.entities(), toy_data.mentions("train", 12)
    batch = MentionEntityCollator(processor, entities, random_images=False)(mentions)

    answers = [next(entity for entity in entities if entity["id"] == mention["answer"]) for mention in mentions]
    expected = processor.process_mentions(
        [m["mention"] for m in mentions], [m["sentence"] for m in mentions], [m["image"] for m in mentions]
    )
    expected_entities = processor.process_entities(
        [e["name"] for e in answers], [e["description"] for e in answers], [e["images"] for e in answers]
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(batch[name], tensor, rtol=0, atol=0)
    for name, tensor in expected_entities.items():
        torch.testing.assert_close(batch[f"entity_{name}"], tensor, rtol=0, atol=0)
    assert batch["labels"].tolist() == list(range(12))
    assert batch["entity_labels"].tolist() == [number % 9 for number in range(12)]
    assert all(isinstance(value, torch.Tensor) for value in batch.values())


def test_batch_with_merged_duplicates(model: MimicModel, processor: MimicProcessor) -> None:
    mentions = toy_data.mentions("train", 12)  # three of the nine answers twice
    batch, merged = (
        MentionEntityCollator(processor, toy_data.entities(), random_images=False, merge_duplicates=merge)(mentions)
        for merge in (False, True)
    )
    assert merged["entity_labels"].tolist() == list(range(9))
    assert merged["labels"].tolist() == [*range(9), 0, 1, 2]
    assert torch.equal(merged["entity_pixel_values"], batch["entity_pixel_values"][:9])
    scores = model(**batch).logits
    assert torch.allclose(model(**merged).logits, scores[:, :9])
    assert model(**merged).loss < model(**batch).loss


def test_images_are_drawn_from_seed_and_batch(processor: MimicProcessor) -> None:
    mentions = [mention for mention in toy_data.mentions("train", 36) if mention["answer"] != "animal:swift"]

    def images(batch: list[dict[str, Any]], seed: int = 43) -> torch.Tensor:
        return MentionEntityCollator(processor, toy_data.entities(), seed=seed)(batch)["entity_pixel_values"]

    drawn = images(mentions)
    first = MentionEntityCollator(processor, toy_data.entities(), random_images=False)(mentions)["entity_pixel_values"]
    is_first = (drawn == first).flatten(1).all(dim=1)
    assert 0.2 < is_first.float().mean() < 0.8  # two images each
    assert torch.equal(drawn, images(mentions))
    assert not torch.equal(drawn, images(mentions, seed=44))
    assert not torch.equal(drawn, images(mentions[::-1]).flip(0))


def test_cached_pixels_are_the_same_bit_by_bit(processor: MimicProcessor) -> None:
    mentions = toy_data.mentions("train", 12)
    plain, cached = (MentionEntityCollator(processor, toy_data.knowledge_base()) for _ in range(2))
    cached_mentions = cached.cache_pixels(mentions, num_threads=2, show_progress=False)
    expected, got = plain(mentions), cached(cached_mentions)
    assert isinstance(cached_mentions[0]["image"], np.ndarray)
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]) if isinstance(tensor, torch.Tensor) else tensor is got[name]


def test_unreadable_images_are_warned_of_listed_and_left_out(processor: MimicProcessor, tmp_path: Path) -> None:
    entities, mentions = toy_data.entities(), toy_data.mentions("train", 3)
    mentions[1]["image"] = {"bytes": b"no image", "path": None}
    entities[2]["images"] = [str(tmp_path / "absent.png")]
    log = tmp_path / UNREADABLE_LOG
    collator = MentionEntityCollator(processor, entities, unreadable_log=log)
    with pytest.warns(UserWarning, match="image of (mention train-1|entity animal:orange, image 0) is left out"):
        batch = collator(mentions)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collator(mentions)  # once is enough
    MentionEntityCollator(processor, entities, unreadable_log=log).cache_pixels(mentions, show_progress=False)
    assert not batch["pixel_values"][1].any()
    assert not batch["entity_pixel_values"][2].any()
    assert batch["pixel_values"][0].any()
    listed = unreadable_images(log)
    assert [entry["image"] for entry in listed] == ["mention train-1", "entity animal:orange, image 0"]
    assert "no image file" in listed[1]["error"]


def test_answer_that_is_no_entity_is_refused_in_a_batch(processor: MimicProcessor) -> None:
    mentions = [*toy_data.mentions("train", 1), {**toy_data.mentions("train", 1)[0], "answer": "Q1", "id": "x"}]
    with pytest.raises(ValueError, match=r"answer 'Q1' of mention 'x' is not in the knowledge base"):
        MentionEntityCollator(processor, toy_data.entities())(mentions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.clear(), "is empty"),
        (lambda rows: rows.append(rows[3]), "1 entities have the id of another, such as 'company:georgia'"),
    ],
)
def test_bad_knowledge_bases_are_refused(change: Callable[[list], Any], message: str) -> None:
    rows = toy_data.entities()
    change(rows)
    with pytest.raises(ValueError, match=message):
        KnowledgeBase(rows)
    if rows:
        with pytest.raises(ValueError, match=message):
            KnowledgeBase(datasets.Dataset.from_list(rows, features=toy_data.entity_features()))


def test_knowledge_base_of_a_data_set_decodes_nothing() -> None:
    assert [{**entity, "qid": None} for entity in toy_data.knowledge_base().entities()] == toy_data.entities()


# --- Evaluation


def test_evaluation_ranks_among_the_whole_knowledge_base(
    model: MimicModel, processor: MimicProcessor, tmp_path: Path
) -> None:
    mentions, entities = toy_data.mentions("val", 11), toy_data.entities()
    mentions[3]["answer"] = "Q1"
    args = MimicTrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=4, **QUICK)
    trainer = MimicTrainer(model, args, entities=entities, processing_class=processor, eval_dataset=mentions)
    metrics = trainer.evaluate()

    # The oracle: all scores at once, and a sort.
    with torch.no_grad():
        scores = model.score(
            model.encode_mentions(**trainer.collator.encode_mentions(mentions)),
            model.encode_entities(
                **processor.process_entities(
                    [e["name"] for e in entities], [e["description"] for e in entities], [e["images"] for e in entities]
                )
            ),
        ).logits
    ids = [entity["id"] for entity in entities]
    ranks = [
        1 + scores[row].argsort(descending=True).tolist().index(ids.index(mention["answer"]))
        for row, mention in enumerate(mentions)
        if mention["answer"] in ids
    ]
    assert len(set(scores.flatten().tolist())) == scores.numel()  # no ties
    assert metrics["eval_mean_rank"] == pytest.approx(np.mean(ranks))
    assert metrics["eval_mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert metrics["eval_hits@3"] == pytest.approx(np.mean([rank <= 3 for rank in ranks]))
    assert (metrics["eval_mentions"], metrics["eval_missing_answers"]) == (10, 1)
    predicted: Any = trainer.predict(mentions)
    np.testing.assert_array_equal(predicted.predictions[[row for row in range(11) if row != 3]], ranks)
    assert np.isnan(predicted.predictions[3])
    assert predicted.metrics["test_mrr"] == metrics["eval_mrr"]
    words = [rank for row, rank in zip([r for r in range(11) if r != 3], ranks, strict=True) if row % 2]
    assert metrics["eval_text_mrr"] == pytest.approx(np.mean([1 / rank for rank in words]))
    assert metrics["eval_both_mentions"] == 6

    args.missing_answers = "miss"
    counted = trainer.evaluate()
    assert counted["eval_mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 11)
    args.missing_answers = "error"
    with pytest.raises(ValueError, match="1 of 11 mentions are not among"):
        trainer.evaluate()


def test_ranking_in_batches_of_any_size_and_from_a_stream(model: MimicModel, processor: MimicProcessor) -> None:
    collator = MentionEntityCollator(processor, toy_data.entities())
    index = EntityIndex.build(model.eval(), processor, toy_data.entities(), dtype="float32", show_progress=False)
    mentions = toy_data.mention_dataset("val", 11)
    whole = rank_mentions(model, collator, index, mentions, top_k=20, show_progress=False)
    stream = mentions.to_iterable_dataset()
    parts = rank_mentions(model, collator, index, stream, top_k=20, batch_size=2, num_workers=1, show_progress=False)
    assert whole.ids == parts.ids == [f"val-{number}" for number in range(11)]
    np.testing.assert_array_equal(whole.ranks, parts.ranks)
    assert [[found["entity_id"] for found in row] for row in whole.entities or []] == [
        [found["entity_id"] for found in row] for row in parts.entities or []
    ]
    record = next(whole.records())
    assert len(record["entities"]) == 9
    assert record["entities"][int(record["rank"]) - 1]["entity_id"] == record["answer"] == "company:orange"
    assert whole.kinds == [mention["kind"] for mention in toy_data.mentions("val", 11)]
    with pytest.raises(ValueError, match="no mentions to rank"):
        rank_mentions(model, collator, index, [], show_progress=False)


def test_mentions_of_another_form(model: MimicModel, processor: MimicProcessor, tmp_path: Path) -> None:
    """With `text` for `sentence`, as the pipeline calls it; and with a field missing. Plain arguments do as well."""
    given, wanted = toy_data.mention_dataset("train", 9), toy_data.mentions("train", 9)
    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no")
    trainer = MimicTrainer(
        model,
        args,
        entities=toy_data.entities(),
        processing_class=processor,
        train_dataset=given.rename_column("sentence", "text"),
        eval_dataset=given.rename_column("sentence", "text"),
    )
    ranks: list[Any] = [trainer.predict(mentions).predictions for mentions in (given, trainer.eval_dataset)]
    np.testing.assert_array_equal(*ranks)
    trainer.train()
    for name in ("mention", "sentence", "answer"):
        without = [{key: value for key, value in mention.items() if key != name} for mention in wanted]
        for use in (trainer.evaluate, trainer.collator):
            with pytest.raises(ValueError, match=f"Mention 'train-0' has no field `{name}`; it has id, "):
                use(without)


def test_an_index_names_the_model_that_was_trained(
    model: MimicModel, processor: MimicProcessor, tmp_path: Path
) -> None:
    """And not the one that training started from, on whose page at the Hub it would be found otherwise."""
    model.config.name_or_path = "alice/base"
    args = TrainingArguments(str(tmp_path / "mine"), use_cpu=True, disable_tqdm=True)
    trainer = MimicTrainer(model, args, entities=toy_data.entities(), processing_class=processor)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    assert trainer.build_index().made_by["name"] == "alice/base"
    trainer.save_model()
    assert trainer.build_index().made_by["name"] == str(tmp_path / "mine")


def test_diverged_model_is_an_error_and_no_rank(model: MimicModel, processor: MimicProcessor) -> None:
    index = EntityIndex.build(model.eval(), processor, toy_data.entities(), dtype="float32", show_progress=False)
    collator = MentionEntityCollator(processor, toy_data.entities())
    with torch.no_grad():
        model.encoder.clip.text_projection.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite: training has diverged"):
        rank_mentions(model, collator, index, toy_data.mentions("val", 3), show_progress=False)


# --- A plain Trainer


def test_plain_trainer(model: MimicModel, processor: MimicProcessor, tmp_path: Path) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path),
        remove_unused_columns=False,
        per_device_train_batch_size=9,
        per_device_eval_batch_size=9,
        num_train_epochs=6,
        learning_rate=1e-3,
        eval_strategy="epoch",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        args,
        data_collator=MentionEntityCollator(processor, toy_data.knowledge_base()),
        train_dataset=toy_data.mention_dataset("train", 36),
        eval_dataset=toy_data.mention_dataset("val", 13),  # the last batch is smaller
        processing_class=processor,
        compute_metrics=in_batch_metrics,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    metrics = trainer.evaluate()
    assert metrics["eval_count"] == 13
    assert 1 <= metrics["eval_mean_rank"] <= 9
    # By hand, batch by batch.
    ranks: list[float] = []
    for rows in (range(9), range(9, 13)):
        batch = trainer.data_collator([toy_data.mentions("val", 13)[row] for row in rows])
        with torch.no_grad():
            scores = model.eval()(**batch).logits
        ranks += (1 + (scores > scores.diagonal().unsqueeze(1)).sum(dim=1)).tolist()
    assert metrics["eval_mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))


# --- The script


def test_output_is_a_checkpoint_that_everything_loads(trained: Path, data_dir: Path) -> None:
    results = json.loads((trained / "all_results.json").read_text())
    assert results["train_mentions"] == 36
    assert results["test_mentions"] == 9
    model = AutoModel.from_pretrained(trained, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(trained, trust_remote_code=True)
    assert model.dtype == torch.float32
    assert processor.text_max_length == model.config.text_max_length == 12

    lines = [json.loads(line) for line in (trained / "predictions_test.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"test-{number}" for number in range(9)]
    assert np.mean([line["rank"] == 1 for line in lines]) == pytest.approx(results["test_hits@1"])
    # The pipeline, which finds the index by itself, gives the first mention the entities that were written down.
    linker = pipeline("multimodal-entity-linking", model=str(trained), trust_remote_code=True)
    mention = datasets.load_dataset(str(data_dir), "mentions", split="test")[0]
    linked = linker(mention, top_k=9)
    assert [row["entity_id"] for row in linked] == [row["entity_id"] for row in lines[0]["entities"]]
    assert [row["score"] for row in linked] == pytest.approx([r["score"] for r in lines[0]["entities"]], abs=1e-4)


def test_best_checkpoint_is_kept(trained: Path) -> None:
    state = json.loads((trained / "trainer_state.json").read_text())
    evaluations = {entry["step"]: entry["eval_mrr"] for entry in state["log_history"] if "eval_mrr" in entry}
    assert state["best_metric"] == max(evaluations.values())
    results = json.loads((trained / "eval_results.json").read_text())
    assert results["eval_mrr"] == pytest.approx(state["best_metric"])


class StopAt(TrainerCallback):
    """An interruption from the keyboard."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop_at", [7, 16])  # within the second epoch of five steps, and after an evaluation
def test_interrupted_training_goes_on_as_if_it_had_not_been(
    data_dir: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    settings = {"dataset_name": str(data_dir), "output_dir": str(tmp_path / "out"), **FROM_SCRATCH, **QUICK}
    command = [write_config(tmp_path / "toy.yaml", **settings)]
    if stop_at == 7:  # from a checkpoint in the middle of an epoch, with other processes loading the data
        command += ["--save_strategy", "steps", "--save_steps", "3", "--eval_strategy", "steps", "--eval_steps", "15"]
        command += ["--no_load_best_model_at_end", "--dataloader_num_workers", "1", "--do_predict", "false"]
    init = MimicTrainer.__init__

    def interrupted(self: MimicTrainer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.add_callback(StopAt(stop_at))

    with monkeypatch.context() as patch:
        patch.setattr(MimicTrainer, "__init__", interrupted)
        with pytest.raises(SystemExit) as stopped:
            train.main(command)
    assert stopped.value.code == 130
    last = 6 if stop_at == 7 else 15
    broken = tmp_path / "out" / "checkpoint-17"  # killed while it was written
    broken.mkdir()
    assert train.checkpoint_to_resume(train.parse_args(command)[2]) == str(tmp_path / "out" / f"checkpoint-{last}")
    broken.rmdir()

    train.main(command)
    if stop_at == 7:
        reference = tmp_path / "reference"
        train.main([*command, "--output_dir", str(reference)])
    else:
        reference = trained
    resumed, whole = (AutoModel.from_pretrained(path, trust_remote_code=True) for path in (tmp_path / "out", reference))
    for (name, one), other in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=name)
    # Time and speed are of all sessions together: every step, and every mention of every epoch.
    told = json.loads((tmp_path / "out" / "train_results.json").read_text())
    results = json.loads((reference / "train_results.json").read_text())
    for name in ("steps", "samples"):
        counts = [run[f"train_{name}_per_second"] * run["train_runtime"] for run in (told, results)]
        assert counts[0] == pytest.approx(counts[1], rel=0.01)


def test_finished_training_is_not_overwritten_unasked(trained: Path, data_dir: Path) -> None:
    args = MimicTrainingArguments(output_dir=str(trained), use_cpu=True)
    with pytest.raises(ValueError, match="holds a finished training"):
        train.checkpoint_to_resume(args)
    args.resume_from_checkpoint = "last"
    assert str(train.checkpoint_to_resume(args)).endswith("checkpoint-20")
    args.resume_from_checkpoint = str(data_dir)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        train.checkpoint_to_resume(args)


def test_evaluation_without_training(trained: Path, data_dir: Path, tmp_path: Path) -> None:
    arguments = ["--model_name_or_path", str(trained), "--dataset_name", str(data_dir), "--no_do_train", "--use_cpu"]
    results = train.main([*arguments, "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"])
    expected = json.loads((trained / "test_results.json").read_text())
    assert {name: results[name] for name in ("test_mrr", "test_hits@1")} == pytest.approx(
        {name: expected[name] for name in ("test_mrr", "test_hits@1")}
    )
    with pytest.raises(ValueError, match="--model_name_or_path"):
        train.main([write_config(tmp_path / "x.yaml", dataset_name=str(data_dir), **FROM_SCRATCH), "--no_do_train"])


def test_mentions_without_entity_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lost = [{**mention, "answer": "Q1"} for mention in toy_data.mentions("lost", 2)]
    data = toy_data.write_dataset(
        tmp_path / "toy",
        train=[*toy_data.mentions("train", 16), *lost],
        validation=toy_data.mentions("val", 4),
        test=[*lost, *toy_data.mentions("test", 4)],
    )
    settings = {"dataset_name": str(data), "output_dir": str(tmp_path / "out"), **FROM_SCRATCH, **QUICK}
    command = [write_config(tmp_path / "toy.yaml", **settings), "--num_train_epochs", "1"]
    results = train.main(command)
    assert (results["test_mentions"], results["test_missing_answers"]) == (4, 2)
    saved = json.loads((tmp_path / "out" / "train_results.json").read_text())
    assert (saved["train_mentions"], saved["train_mentions_left_out"]) == (16, 2)
    listed = [json.loads(line) for line in (tmp_path / "out" / MISSING_LOG).read_text().splitlines()]
    assert [(row["row"], row["id"], row["answer"]) for row in listed] == [(16, "lost-0", "Q1"), (17, "lost-1", "Q1")]
    assert "answers of 2 of 18 training mentions are not in the knowledge base" in caplog.text
    assert "answers of 2 test mentions" in caplog.text
    first = json.loads((tmp_path / "out" / "predictions_test.jsonl").read_text().splitlines()[0])
    assert first["rank"] is None
    with pytest.raises(ValueError, match="answers of 2 of 18 training mentions"):
        train.main([*command, "--overwrite_output_dir", "--missing_answers", "error"])


def test_streaming_trains_on_the_same_mentions(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # At the end of each pass over a shuffled stream `datasets` waits five seconds for its own threads.
    monkeypatch.setattr("datasets.iterable_dataset.time.sleep", lambda seconds: None)
    _, data_args, args = train.parse_args(
        [write_config(tmp_path / "toy.yaml", dataset_name=str(data_dir), streaming=True, **FROM_SCRATCH, **QUICK)]
    )
    mentions, knowledge_base = train.load_data(data_args)
    stream, left_out = train.training_mentions(mentions["train"], knowledge_base, data_args, args)
    assert (len(stream), left_out) == (36, 0)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([mention["id"] for mention in stream])
    assert sorted(orders[0]) == sorted(mention["id"] for mention in toy_data.mentions("train", 36))
    assert orders[0] == orders[2] != orders[1]
    results = train.main([str(tmp_path / "toy.yaml"), "--output_dir", str(tmp_path / "out"), "--num_train_epochs", "2"])
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert (state["global_step"], state["epoch"]) == (10, 2)
    assert results["test_mentions"] == 9


@pytest.mark.parametrize("streaming", [False, True])
def test_authors_archives_are_trained_on_as_they_are(tmp_path: Path, streaming: bool) -> None:
    archive = mel_archives.write_folder(mel_archives.sound_archive(), tmp_path / "archive")
    settings = {"dataset_name": "wikimel", "data_dir": str(archive), "streaming": streaming, **FROM_SCRATCH, **QUICK}
    settings |= {"output_dir": str(tmp_path / "out"), "num_train_epochs": 1}
    results = train.main([write_config(tmp_path / "c.yaml", **settings)])
    assert results["test_mentions"] >= 1
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["train_mentions"] >= 1
    assert len(EntityIndex.from_pretrained(tmp_path / "out" / "index")) == 4


def test_several_processes_train_and_agree_on_the_metrics(hub: Any, data_dir: Path, tmp_path: Path) -> None:
    """On a data set, and on a stream. That a launcher starts them is tested in test_launchers.py."""
    configs = []
    for streaming in (False, True):
        settings = {"dataset_name": str(data_dir), "streaming": streaming, **FROM_SCRATCH, **QUICK}
        settings |= {"output_dir": str(tmp_path / f"out-{streaming}"), "num_train_epochs": 2, "ddp_backend": "gloo"}
        configs.append(write_config(tmp_path / f"{streaming}.yaml", **settings))
    code = """
        from mimic_el import train
        for config in configs:
            train.main([config])
    """
    run_together(own_python(hub), 2, code, tmp_path / "run", connect=False, configs=configs)
    for streaming in (False, True):
        state = json.loads((tmp_path / f"out-{streaming}" / "trainer_state.json").read_text())
        assert state["global_step"] == 6  # 36 mentions, twice, in batches of 8 in each of two processes
        results = json.loads((tmp_path / f"out-{streaming}" / "test_results.json").read_text())
        assert results["test_mentions"] == 9


def test_pushed_output_is_loaded_from_the_hub(
    hub: Any, empty_cache: Path, model: MimicModel, processor: MimicProcessor, tmp_path: Path
) -> None:
    token = hub.add_user("someone", token="hf_toy")
    args = MimicTrainingArguments(
        output_dir=str(tmp_path / "out"), hub_model_id="someone/toy", hub_token=token, use_cpu=True, disable_tqdm=True
    )
    trainer = MimicTrainer(
        model, args, entities=toy_data.entities(), processing_class=processor, eval_dataset=toy_data.mentions("val", 9)
    )
    index = trainer.build_index(tmp_path / "out" / "index")
    model.config.default_index = "index"
    trainer.evaluate(index=index)
    trainer.push_to_hub()
    linker = pipeline("multimodal-entity-linking", model="someone/toy", trust_remote_code=True)
    local = pipeline("multimodal-entity-linking", model=str(tmp_path / "out"), trust_remote_code=True)
    mention = toy_data.mentions("test", 1)[0]
    assert linker.model.config.default_index == "someone/toy-index"
    assert local.model.config.default_index == "index"
    assert linker(mention) == local(mention)


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """While predictions are written, after other processes have ended: what was there stays."""

    class Ranked(RankedMentions):
        def records(self) -> Any:
            yield {"id": "1"}
            raise OSError(28, "No space left on device")

    (tmp_path / "predictions_test.jsonl").write_text("before")
    ranked = Ranked([], [], None, np.empty(0))

    def main(argv: Any) -> None:
        ranked.write(tmp_path / "predictions_test.jsonl")

    monkeypatch.setattr(train, "main", main)
    with pytest.raises(SystemExit):
        train.run([])
    told = capsys.readouterr().err
    assert told.startswith("train: error: [Errno 28] No space left on device. Make room. The same command goes on")
    assert [path.name for path in tmp_path.iterdir()] == ["predictions_test.jsonl"]
    assert (tmp_path / "predictions_test.jsonl").read_text() == "before"


# --- Arguments


def test_options_go_before_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("dataset_name: someone/data\nbackbone: someone/clip\nlearning_rate: 2e-5\nbf16: false\n")
    model_args, data_args, args = train.parse_args([str(path), "--seed", "1", "--symmetric_loss", "--use_cpu"])
    assert (args.learning_rate, args.seed, args.weight_decay) == (2e-5, 1, 1e-4)
    assert (data_args.dataset_name, model_args.backbone) == ("someone/data", "someone/clip")
    assert model_args.config_overrides() == {"symmetric_loss": True}
    json_path = tmp_path / "c.json"
    json_path.write_text(json.dumps({"dataset_name": "x", "backbone": "y", "correct_images": False}))
    model_args, _, args = train.parse_args([str(json_path), "--learning_rate", "0.1", "--use_cpu"])
    assert (model_args.correct_images, args.learning_rate) == (False, 0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dataset_name": "x", "backbone": "y", "learningrate": 1},
            "no option 'learningrate'. Did you mean learning_r",
        ),
        ({"dataset_name": "x"}, "exactly one of"),
        ({"dataset_name": "x", "backbone": "y", "from_scratch": True}, "exactly one of"),
        ({"dataset_name": "x", "from_scratch": True}, "needs --clip_config"),
        ({"backbone": "y"}, "--dataset_name"),
        ({"dataset_name": "user/x", "backbone": "y", "data_dir": "z"}, "say which with --dataset_name"),
        ({"dataset_name": "x", "backbone": "y", "eval_epochs": 0}, "eval_epochs"),
        (["dataset_name"], "must hold a mapping"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, settings: Any, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=message):
        train.parse_args([str(path), "--use_cpu"])


def test_configuration_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.yaml cannot be read"):
        train.parse_args([str(tmp_path / "absent.yaml")])


def test_data_set_without_a_column_or_configuration(tmp_path: Path) -> None:
    rows = toy_data.mentions("train", 2)
    directory = toy_data.write_dataset(tmp_path / "toy", train=rows)
    datasets.Dataset.from_list([{"id": "1"}]).to_parquet(directory / "mentions" / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="no column mention, sentence, image, answer; they have id"):
        train.load_data(train.DataArguments(dataset_name=str(directory)))
    with pytest.raises(ValueError, match="configurations mentions and entities"):
        train.load_data(train.DataArguments(dataset_name=str(tmp_path)))


# --- The tokenizer of a model from scratch


def test_tokenizer_spells_every_text_and_is_the_same_every_time() -> None:
    texts = ["An orange is a fruit.", "Georgia [SEP] a country", "Swift"] * 3
    tokenizer = train_tokenizer(texts, 600)
    assert tokenizer.get_vocab() == train_tokenizer(texts, 600).get_vocab()
    assert len(tokenizer) <= 600
    # CLIP pools at the first end of text, which must be the last token of any text; a 2 would pool elsewhere.
    assert tokenizer.eos_token_id == 1
    for text in ("orange", "Ünïcode ☕ 🍊", "\u4e2d\u6587 x", "a'b_c", ""):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
    assert len(tokenizer("orange")["input_ids"]) == 3


def test_the_card_shows_why_a_mention_is_linked(trained: Path) -> None:
    with Image.open(trained / "explanation.png") as image:
        assert image.width > 600
    assert "](explanation.png)" in (trained / "README.md").read_text(encoding="utf-8")

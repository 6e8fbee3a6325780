"""Model cards say what the training did, in Markdown and in metadata that the Hub accepts."""

import re
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import toy_data
import yaml
from hub_server import check_card
from huggingface_hub import ModelCard
from PIL import Image
from transformers import set_seed

from mimic_el import train
from mimic_el.hub_files_mimic import hub_files
from mimic_el.training import MimicTrainer, MimicTrainingArguments, model_card
from mimic_el.training.model_card import PUBLISHED, TrainingRun, draw_curves

METRICS = {"hits@1": 0.875, "hits@3": 0.95, "hits@5": 1.0, "mrr": 0.9123456789, "mean_rank": 1.5, "mentions": 5169}
LOG = [
    {"loss": 9.0, "epoch": 1.0, "step": 5},
    {"loss": 5.0, "epoch": 2.0, "step": 10},
    {"eval_mrr": 0.5, "eval_hits@1": 0.25, "epoch": 2.0, "step": 10},
]


def a_run(**changes: Any) -> TrainingRun:
    settings: dict[str, Any] = {
        "dataset": "someone/wikimel",
        "dataset_revision": "0123abc",
        "base_model": "openai/clip-vit-base-patch32",
        "train_mentions": 18092,
        "entities": 109976,
        "metrics": {"test": {**METRICS, "missing_answers": 0}},
        "log_history": LOG,
    }
    return TrainingRun(**{**settings, **changes})


def text_of(run: TrainingRun, name: str = "someone/mimic-wikimel") -> str:
    card = str(run.card(name))
    errors, warnings = check_card(card, "model")
    assert (errors, warnings) == ([], [])
    return card


def metadata_of(card: str) -> Any:
    return ModelCard(card).data


def test_metrics_are_in_the_index_of_the_hub() -> None:
    metadata = metadata_of(text_of(a_run()))
    results = {result.metric_type: result for result in metadata.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == pytest.approx(
        {name: METRICS[name] for name in ("hits@1", "hits@3", "hits@5", "mrr", "mean_rank")}, abs=1e-6
    )
    mrr = results["mrr"]
    assert (mrr.dataset_type, mrr.dataset_name, mrr.dataset_split) == ("someone/wikimel", "wikimel", "test")
    assert (mrr.dataset_config, mrr.dataset_revision) == ("mentions", "0123abc")
    assert mrr.task_type == "multimodal-entity-linking"
    assert metadata.base_model == "openai/clip-vit-base-patch32"
    assert metadata.datasets == ["someone/wikimel"]
    assert metadata.license == "apache-2.0"
    assert metadata.library_name == "transformers"


def test_results_stand_beside_the_published() -> None:
    card = text_of(a_run())
    assert "| This model, test | 5,169 | 87.50 | 95.00 | 100.00 | 91.23 | 1.50 |" in card
    assert "| Published MIMIC, test |  | 87.98 | 95.07 | 96.37 | 91.82 | 11.02 |" in card
    assert "109,976 entities" in card
    assert "Published MIMIC" not in text_of(a_run(dataset="someone/own-data"))
    for name, published in PUBLISHED.items():
        assert a_run(dataset=f"x/{name}").benchmark == name
        assert set(published) == {"hits@1", "hits@3", "hits@5", "mrr", "mean_rank"}


def test_kinds_have_their_lines() -> None:
    metrics = {**METRICS, "image_hits@1": 0.5, "image_mrr": 0.75, "image_mentions": 200}
    assert "| This model, test, kind image | 200 | 50.00 |  |  | 75.00 |  |" in text_of(
        a_run(metrics={"test": metrics})
    )


def test_what_was_left_out_is_told() -> None:
    metrics = {"validation": {**METRICS, "missing_answers": 0}, "test": {**METRICS, "missing_answers": 12}}
    run = a_run(metrics=metrics, train_mentions_left_out=3, unreadable_images=7)
    card = text_of(run)
    assert "answers of 12 test mentions are not in the knowledge base. They are not part of the figures." in card
    assert "18,092 (3 left out: their answer is not in the knowledge base)" in card
    assert "| Images that could not be read | 7 |" in card
    run.arguments["missing_answers"] = "miss"
    assert "knowledge base. They count as misses." in text_of(run)


def test_directories_are_told_by_their_name_alone(tmp_path: Path) -> None:
    (tmp_path / "own-data").mkdir()
    (tmp_path / "base").mkdir()
    run = a_run(dataset=str(tmp_path / "own-data"), base_model=str(tmp_path / "base"))
    card = text_of(run)
    assert str(tmp_path) not in card
    assert "`own-data`" in card
    assert "started from `base`" in card
    assert metadata_of(card).datasets is None
    assert metadata_of(card).base_model is None


def test_the_encoder_is_named() -> None:
    assert "on a SigLIP 2 encoder, started from" in text_of(a_run(encoder="a SigLIP 2 encoder"))
    assert "CLIP encoder" not in text_of(a_run())


def test_example_is_shown_with_its_output() -> None:
    linked = [
        {"entity_id": "brand:orange", "name": "Orange", "score": 7.123456, "text_score": 1.0},
        {"entity_id": "emoji:1f34a", "name": "Orange", "score": 5.0, "text_score": 2.0},
    ]
    example = {"row": 3, "mention": "Orange", "sentence": "Orange opened a shop.", "answer": "brand:orange"}
    card = text_of(a_run(example={**example, "has_image": True, "linked": linked}, has_index=True))
    assert (
        'linker = pipeline("multimodal-entity-linking", model="someone/mimic-wikimel", trust_remote_code=True)' in card
    )
    assert 'load_dataset("someone/wikimel", "mentions", split="test")[3]' in card
    assert "# [{'entity_id': 'brand:orange', 'name': 'Orange', 'score': 7.12, 'text_score': 1.0}," in card
    assert "#  {'entity_id': 'emoji:1f34a', 'name': 'Orange', 'score': 5.0, 'text_score': 2.0}]" in card
    # Without an index of its own the model is given the entities.
    assert 'load_dataset("someone/wikimel", "entities", split="kb")' in text_of(a_run())
    assert 'split="kb")' not in card


def test_snippet_is_python() -> None:
    for has_index in (True, False):
        snippet = text_of(a_run(has_index=has_index)).partition("```python\n")[2].partition("```")[0]
        compile(snippet, "card", "exec")


def test_curves_are_drawn_where_matplotlib_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert draw_curves(LOG, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > image.height
    assert not draw_curves([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    run = a_run()
    run.write(tmp_path / "with", "someone/mimic")
    assert f"({model_card.CURVES})" in (tmp_path / "with" / "README.md").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(model_card.importlib.util, "find_spec", lambda name: None)
    run.write(tmp_path / "without", "someone/mimic")
    assert model_card.CURVES not in (tmp_path / "without" / "README.md").read_text()


def test_trainer_writes_a_card_of_what_it_did(tmp_path: Path) -> None:
    set_seed(0)
    start = train.ModelArguments(
        from_scratch=True, clip_config=toy_data.CLIP_CONFIG, vocab_size=700, text_max_length=12, **toy_data.SIZES
    )
    model, processor = train.build_model(start, toy_data.mentions("train", 9), toy_data.knowledge_base())
    args = MimicTrainingArguments(
        output_dir=str(tmp_path / "mine"),
        num_train_epochs=2,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = MimicTrainer(
        model,
        args,
        entities=toy_data.knowledge_base(),
        processing_class=processor,
        train_dataset=toy_data.mention_dataset("train", 18),
        eval_dataset=toy_data.mention_dataset("val", 9),
    )
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "mine" / "README.md").read_text()
    assert check_card(card, "model") == ([], [])
    assert card.count("\n# mine\n") == 1
    assert "| Mentions | 18 |" in card
    assert "| Steps | 2 (2 epochs) |" in card
    assert "`learning_rate=0.001`" in card
    assert "`mask_text_padding=False`" in card
    assert "transformers 5" in card
    assert "started from random weights" in card
    best = max(entry["eval_mrr"] for entry in trainer.state.log_history if "eval_mrr" in entry)
    assert f"{100 * best:.2f}" in card
    assert (tmp_path / "mine" / model_card.CURVES).is_file()


def test_hub_ids_are_told_from_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "wikimel").mkdir(parents=True)
    assert TrainingRun(dataset="data/wikimel").dataset_id is None
    assert TrainingRun(dataset="someone/wikimel").dataset_id == "someone/wikimel"
    assert TrainingRun(dataset="wikimel").dataset_id is None
    assert TrainingRun(dataset="/some/where/else").dataset_id is None
    assert TrainingRun().dataset_id is None


@pytest.mark.skipif(not hasattr(huggingface_hub, "EvalResultEntry"), reason="huggingface_hub is too old for it")
def test_test_figures_are_written_as_leaderboards_read_them(tmp_path: Path) -> None:
    metrics = {"hits@1": 0.5, "hits@3": 0.75, "hits@5": 0.75, "mrr": 0.61234567, "mean_rank": 3.0, "mentions": 4}
    run = TrainingRun(
        dataset="someone/wikimel", dataset_revision="abc", metrics={"test": metrics, "validation": metrics}
    )
    run.write(tmp_path)
    entries = yaml.safe_load((tmp_path / ".eval_results" / "wikimel.yaml").read_text())
    parsed = huggingface_hub.parse_eval_result_entries(entries)
    assert [(entry.dataset_id, entry.task_id, entry.value, entry.dataset_revision) for entry in parsed] == [
        ("someone/wikimel", "hits_at_1", 50.0, "abc"),
        ("someone/wikimel", "hits_at_3", 75.0, "abc"),
        ("someone/wikimel", "hits_at_5", 75.0, "abc"),
        ("someone/wikimel", "mrr", 61.2346, "abc"),
    ]
    files, _ = hub_files(tmp_path, "model")
    assert ".eval_results/wikimel.yaml" in files
    # Of a data set that is nowhere on the Hub there is no leaderboard.
    TrainingRun(dataset=str(tmp_path), metrics={"test": metrics}).write(tmp_path / "b")
    assert not (tmp_path / "b" / ".eval_results").exists()


def test_texts_of_data_are_no_markup_in_a_model_card() -> None:
    hostile = "[a](https://x.org) ![b](c.png)\n# Heading <img src=d> | `e`"
    linked = [{"entity_id": hostile, "name": hostile, "description": "", "score": 1.0}]
    example = {
        "row": 0,
        "mention": hostile,
        "sentence": hostile,
        "answer": hostile,
        "has_image": True,
        "linked": linked,
    }
    kinds = {f"{hostile}_{name}": 0.5 for name in ("hits@1", "mrr")}
    run = TrainingRun(
        dataset="x/y", dataset_revision=hostile, hardware=hostile, example=example, arguments={"optim": hostile},
        versions={"torch": hostile}, model={"parameters": hostile}, metrics={"test": {"hits@1": 0.5, **kinds}},
    )  # fmt: skip
    text = run.card(hostile).text
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text, flags=re.DOTALL)
    for markup in ("](https://x", "](c.png", "<img", "\n# Heading"):
        assert markup not in outside.replace("\\", "\\ "), markup


def test_long_texts_of_data_are_cut() -> None:
    long = "orange " * 20_000
    linked = [{"entity_id": long, "name": long, "description": long, "score": 1.0}]
    example = {"row": 0, "mention": long, "sentence": long, "answer": long, "has_image": False, "linked": linked}
    assert len(text_of(a_run(example=example))) < 8000


def test_names_that_are_no_paths_and_no_text(tmp_path: Path) -> None:
    """Of data set, base model and revision; all metadata can be written, and nothing is long."""
    (tmp_path / "loop").symlink_to("loop")
    for name in ("a\0b", "half \ud800", "x" * 100_000, str(tmp_path / "loop"), "caf\udce9/b"):
        run = a_run(dataset=name, base_model=name, dataset_revision=name)
        text = text_of(run, name)
        assert text.encode().count(b"\0") == 0
        assert len(text) < 15_000
        run.write(tmp_path / "card", name)


def test_long_lists_are_cut() -> None:
    kinds = {f"kind {number}_{name}": 0.5 for number in range(200) for name in ("hits@1", "mrr")}
    text = text_of(a_run(metrics={"test": {**METRICS, **kinds}}))
    assert text.count("| This model, test, kind ") == 50
    assert "| This model, test, 150 more kinds |" in text

"""Training ends with a calibrated model; predictions, results and the card tell how sure it is."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_data
import yaml
from huggingface_hub import ModelCard
from test_train import FROM_SCRATCH, QUICK

from mimic_el import Calibration, CalibrationError, EntityIndex, MimicModel, MimicProcessor, train
from mimic_el.training import MentionEntityCollator, MimicTrainer, MimicTrainingArguments, calibrate, rank_mentions
from mimic_el.training.model_card import RELIABILITY, TrainingRun, draw_reliability
from mimic_el.training.reliability import CalibrationReport

SETTINGS = {**FROM_SCRATCH, **QUICK, "num_train_epochs": 3}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy data set; every tenth mention of its validation split has no entity."""
    validation = toy_data.mentions("val", 150)
    for mention in validation[::10]:
        mention["answer"] = None
    splits = {"train": toy_data.mentions("train", 36), "validation": validation, "test": toy_data.mentions("test", 60)}
    return toy_data.write_dataset(tmp_path_factory.mktemp("data") / "toy", **splits)


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    directory = tmp_path_factory.mktemp("trained")
    settings = {"dataset_name": str(data_dir), "output_dir": str(directory / "out"), "nil_rate": 0.3, **SETTINGS}
    (directory / "toy.yaml").write_text(yaml.safe_dump(settings))
    return directory / "out", train.main([str(directory / "toy.yaml")])


def test_training_leaves_a_calibrated_model(trained: tuple[Path, dict[str, float]]) -> None:
    output_dir, results = trained
    calibration = Calibration.from_dict(MimicModel.from_pretrained(output_dir).config.calibration)
    assert calibration.nil_rate == 0.3
    assert calibration.index["entities"] == 9
    assert 0 <= calibration.measured["ece"] <= 1
    # The validation's own figures are those without a calibration: the mentions of no entity are only counted.
    assert results["eval_missing_answers"] == 15
    assert results["eval_mentions"] == 135
    measured = json.loads((output_dir / "calibration_results.json").read_text())
    assert measured["calibration_mentions"] == 60
    assert 0.1 < measured["calibration_nil"] < 0.5


def test_predictions_have_probabilities(trained: tuple[Path, dict[str, float]]) -> None:
    output_dir, _ = trained
    records = [json.loads(line) for line in (output_dir / "predictions_test.jsonl").read_text().splitlines()]
    assert len(records) == 60
    for record in records:
        probabilities = [entity["probability"] for entity in record["entities"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert len(probabilities) == 9
        assert sum(probabilities) + record["nil_probability"] == pytest.approx(1, abs=1e-4)


def test_card_tells_how_sure_it_is(trained: tuple[Path, dict[str, float]]) -> None:
    output_dir, _ = trained
    card = ModelCard.load(output_dir / "README.md").text
    assert "## How sure it is" in card
    assert "60 test mentions, for 30% of which" in card
    assert "| Expected calibration error of the answer given (15 bins) |" in card
    assert f"]({RELIABILITY})" in card
    assert (output_dir / RELIABILITY).stat().st_size > 5000
    assert "they are not probabilities" not in card


def test_calibration_can_be_left_out_or_insisted_on(data_dir: Path, trained: Any, tmp_path: Path) -> None:
    few = toy_data.write_dataset(tmp_path / "few")
    common = ["--model_name_or_path", str(trained[0]), "--no_do_train", "--use_cpu", "--disable_tqdm", "true"]
    out = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(CalibrationError, match="9 mentions are too few"):
        train.main([*common, *out, "--dataset_name", str(few), "--calibrate"])
    # Without training a checkpoint keeps the calibration that it has.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train.main([*common, *out, "--dataset_name", str(data_dir)])
    before, after = (json.loads((path / "config.json").read_text()) for path in (trained[0], tmp_path / "out"))
    assert before["calibration"] == after["calibration"] is not None
    # Asked for, it leaves a checkpoint with another calibration.
    train.main([*common, *out, "--dataset_name", str(data_dir), "--calibrate", "--nil_rate", "0.5"])
    assert MimicModel.from_pretrained(tmp_path / "out").config.calibration["nil_rate"] == 0.5


@pytest.mark.parametrize("nil_rate", ["1", "-0.5"])
def test_bad_nil_rate(nil_rate: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nil_rate"):
        MimicTrainingArguments(str(tmp_path), nil_rate=float(nil_rate), use_cpu=True)


def test_ranked_mentions_have_what_a_calibration_needs(trained: Any) -> None:
    model = MimicModel.from_pretrained(trained[0])
    processor = MimicProcessor.from_pretrained(trained[0], trust_remote_code=False)
    index = EntityIndex.from_pretrained(trained[0] / "index")
    mentions = toy_data.mentions("val", 60)
    mentions[0]["answer"] = None
    collator = MentionEntityCollator(processor, toy_data.knowledge_base())
    model.config.calibration = None
    ranked = rank_mentions(model, collator, index, mentions, depth=16, show_progress=False)
    assert ranked.entities is None
    assert ranked.answers[0] is None
    assert np.isnan(ranked.ranks[0])
    assert ranked.scored is not None
    assert np.isnan(ranked.scored.answer_scores[0])
    assert ranked.scored.known[1:].all()
    # The place of an answer is its rank, where no scores are equal.
    assert (ranked.scored.places[1:] + 1).tolist() == ranked.ranks[1:].tolist()
    noted = rank_mentions(model, collator, index, mentions, top_k=3, show_progress=False)
    assert noted.nil_probabilities is None
    assert "probability" not in noted.entities[0][0]  # type: ignore[index]


def test_trainer_is_calibrated_and_training_on_forgets_it(trained: Any, tmp_path: Path) -> None:
    model = MimicModel.from_pretrained(trained[0])
    processor = MimicProcessor.from_pretrained(trained[0], trust_remote_code=False)
    trainer = MimicTrainer(
        model,
        MimicTrainingArguments(
            str(tmp_path),
            max_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            per_device_train_batch_size=8,
        ),
        entities=toy_data.knowledge_base(),
        processing_class=processor,
        train_dataset=toy_data.mention_dataset("train", 8),
    )
    calibration = calibrate(trainer, trainer.build_index(), toy_data.mentions("val", 80), show_progress=False)
    assert model.config.calibration == calibration.to_dict()
    trainer.train()
    assert model.config.calibration is None


def test_pictures_are_drawn_where_matplotlib_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"mentions": 100, "accuracy": 0.8, "ece": 0.02, "coverage_90": 0.91}
    report = CalibrationReport(
        0.25, figures, [(0.2, 0.5, 10)], [(0.2, 0.25, 10), (0.9, 0.8, 90)], [(1.0, 0.8), (0.5, 1.0)]
    )
    run = TrainingRun(dataset="someone/wikimel", calibration=report)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    card = str(run.write(tmp_path / "without"))
    assert "| Sets for 90%: share with the right answer | 0.910 |" in card
    assert "for 25% of which" in card
    assert not list((tmp_path / "without").glob("*.png"))
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert draw_reliability(report, tmp_path / RELIABILITY)
    assert f"]({RELIABILITY})" in str(run.write(tmp_path / "with"))

"""Fitting a calibration: known probabilities come back, coverage is kept, what cannot be fitted is told."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny
from tiny_clip import tiny_model

from mimic_el import Calibration, CalibrationError, EntityIndex
from mimic_el.training import calibration as calibration_module
from mimic_el.training.calibration import calibrate, conformal_thresholds, fit_calibration, mixture, scored_mentions
from mimic_el.training.reliability import Outcomes, ScoredMentions, calibration_error, error_of_perfect

DEPTH = 20


def drawn(mentions: int, seed: int, sharpness: float = 0.8, width: int = 60) -> ScoredMentions:
    """Mentions whose answers are drawn from a softmax of their scores, times `sharpness`, over all entities."""
    random = np.random.default_rng(seed)
    every = -np.sort(-random.normal(0, 2, (mentions, width)), axis=1) + random.normal(30, 3, (mentions, 1))
    chances = np.exp(sharpness * (every - every[:, :1]))
    places = (chances.cumsum(axis=1) < random.random((mentions, 1)) * chances.sum(axis=1, keepdims=True)).sum(axis=1)
    return ScoredMentions(
        scores=every[:, : DEPTH + 1],
        name_fits=np.full((mentions, 9), np.nan),
        places=np.where(places <= DEPTH, places, -1),
        answer_scores=every[np.arange(mentions), places],
        count=width,
    )


def test_probabilities_that_answers_were_drawn_with_come_back() -> None:
    calibration = fit_calibration(drawn(4000, 0), nil_rate=0.0)
    new = drawn(4000, 1)
    view = new.view(np.zeros(len(new), dtype=bool))
    found = view.probabilities(calibration)
    true = np.exp(0.8 * (view.scores - view.scores[:, :1]))
    true /= true.sum(axis=1, keepdims=True)
    within = found.entities / found.entities.sum(axis=1, keepdims=True)
    assert np.abs(within - true).mean() < 0.002
    assert found.nil.max() < 1e-9
    below = view.answer_scores < view.scores[:, -1]
    assert found.rest.mean() == pytest.approx(below.mean(), abs=0.025)


@pytest.mark.parametrize("nil_rate", [0.2, 0.5])
def test_probability_of_nil_is_how_often_it_is_so(nil_rate: float) -> None:
    calibration = fit_calibration(drawn(3000, 0), nil_rate=nil_rate)
    new = drawn(4000, 1)
    rows, without = mixture(new, nil_rate, np.random.default_rng(2))
    assert without.mean() == pytest.approx(nil_rate, abs=0.03)
    outcomes = Outcomes.of(calibration, new[rows].view(without))
    for said, seen in ((outcomes.nil, outcomes.is_nil), (outcomes.sure, outcomes.correct)):
        assert calibration_error(said, seen) < error_of_perfect(said) + 0.02
    figures = outcomes.figures()
    assert figures["auc_nil"] > 0.5
    assert figures["brier_best"] < figures["brier_best_before"]


def test_newton_finds_where_the_slope_is_zero() -> None:
    random = np.random.default_rng(0)
    inputs = np.concatenate([np.ones((200, 1)), random.normal(size=(200, 2))], axis=1)
    events = (random.random(200) < 1 / (1 + np.exp(-inputs @ [0.5, 1.0, -2.0]))).astype(float)
    line = calibration_module._logistic(inputs, events, np.ones(200))
    # The derivative of the penalized likelihood, with half an event and half of none at the mean.
    said = 1 / (1 + np.exp(-inputs @ line))
    slope = inputs.T @ (said - events) + np.array([1 / (1 + np.exp(-line[0])) - 0.5, *line[1:]])
    assert np.abs(slope).max() < 1e-4
    # No event at all, and one that can be told for sure: the lines stay finite.
    assert np.isfinite(calibration_module._logistic(inputs, np.zeros(200), np.ones(200))).all()
    assert np.isfinite(calibration_module._logistic(inputs, (inputs[:, 1] > 0).astype(float), np.ones(200))).all()


# --- Coverage


@pytest.mark.parametrize("count", [19, 40, 199])
def test_thresholds_are_the_order_statistics_of_the_definition(count: int) -> None:
    right = np.random.default_rng(count).random(count)
    thresholds = conformal_thresholds(right)
    ordered = sorted(right)
    for percent, threshold in enumerate(thresholds, start=1):
        place = (count + 1) * (100 - percent) // 100
        assert threshold == pytest.approx(ordered[min(place, count) - 1], rel=1e-5)
        assert threshold < ordered[min(place, count) - 1]
    # The next percent would need a mention that is not there.
    assert (count + 1) * (100 - len(thresholds)) // 100 >= 1
    assert len(thresholds) == 99 or (count + 1) * (100 - len(thresholds) - 1) // 100 < 1


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_sets_cover_as_many_as_was_asked(coverage: float) -> None:
    random = np.random.default_rng(0)
    covered = []
    for _ in range(2000):
        thresholds = conformal_thresholds(random.random(60))
        covered.append(1 - thresholds[round(coverage * 100) - 1])  # of uniform numbers, those above the threshold
    assert coverage - 0.005 <= np.mean(covered) <= coverage + 1 / 61 + 0.005


def test_sets_of_a_fit_cover_new_mentions() -> None:
    calibration = fit_calibration(drawn(3000, 0), nil_rate=0.2)
    new = drawn(5000, 1)
    rows, without = mixture(new, 0.2, np.random.default_rng(2))
    right = Outcomes.of(calibration, new[rows].view(without)).right
    for coverage in (0.8, 0.9, 0.95):
        assert (right >= calibration.threshold(coverage)).mean() == pytest.approx(coverage, abs=0.02)


def test_few_mentions_cover_less() -> None:
    calibration = fit_calibration(drawn(60, 0))
    assert calibration.mentions == 30
    assert len(calibration.thresholds) == 96  # 30 of 31
    with pytest.raises(CalibrationError, match=r"goes up to 0\.96"):
        calibration.threshold(0.99)


def test_mixture_has_the_share_of_nil_that_is_asked_for() -> None:
    scored = drawn(4000, 0)
    scored.answer_scores[:1600] = np.nan
    scored.places[:1600] = -1
    for rate in (0.0, 0.1, 0.4, 0.7):
        rows, without = mixture(scored, rate, np.random.default_rng(0))
        view = scored[rows].view(without)
        assert view.nil.mean() == pytest.approx(rate, abs=0.03)
        assert len(set(rows.tolist())) == len(rows)
        assert scored.known[rows].sum() == 2400  # no mention with an entity is lost


def test_share_of_nil_is_that_of_the_mentions_where_they_tell_it() -> None:
    scored = drawn(400, 0)
    assert fit_calibration(scored).nil_rate == calibration_module.NIL_RATE
    scored.answer_scores[:100], scored.places[:100] = np.nan, -1
    assert fit_calibration(scored).nil_rate == 0.25
    assert fit_calibration(scored, nil_rate=0.5).nil_rate == 0.5


# --- What cannot be fitted


def _changed(**arrays: Any) -> ScoredMentions:
    return dataclasses.replace(drawn(80, 0), **arrays)


@pytest.mark.parametrize(
    ("scored", "message"),
    [
        (drawn(49, 0), "49 mentions are too few .* at least 50"),
        (_changed(places=np.zeros(80, dtype=int)), "right one for all of the 80 mentions"),
        (_changed(places=np.ones(80, dtype=int)), "right one for none of the 80 mentions"),
        (_changed(answer_scores=np.full(80, np.nan)), "None of the 80 answers is in the index"),
        (_changed(scores=np.ones((80, DEPTH + 1))), "all equal"),
        (_changed(scores=np.full((80, DEPTH + 1), np.nan)), "mention 0 .* not finite"),
        (_changed(scores=np.full((80, DEPTH + 1), np.inf)), "mention 0 .* not finite"),
    ],
)
def test_mentions_that_nothing_follows_from_are_told(scored: ScoredMentions, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fit_calibration(scored)


@pytest.mark.parametrize("nil_rate", [-0.1, 1, 1.5, float("nan"), "half"])
def test_nil_rate_must_be_a_share(nil_rate: Any) -> None:
    with pytest.raises(ValueError, match="nil_rate"):
        fit_calibration(drawn(80, 0), nil_rate=nil_rate)


# --- Of a model and an index


@pytest.fixture(scope="module")
def linked() -> tuple[Any, Any, EntityIndex, list[dict[str, Any]]]:
    """A small model, its processor, an index of 40 entities, and 60 mentions of 45 of them."""
    model = tiny_model()
    processor = tiny.tiny_processor(model)
    entities = tiny.knowledge_base(45)
    index = EntityIndex.build(model, processor, entities[:40], dtype="float32", show_progress=False)
    mentions = [
        {**mention, "answer": entity["id"]}
        for mention, entity in zip(tiny.mentions_of(entities * 2), entities * 2, strict=True)
    ]
    return model, processor, index, mentions[:60]


def test_scored_mentions_are_what_a_search_of_all_finds(linked: Any) -> None:
    model, processor, index, mentions = linked
    scored, noted = scored_mentions(model, processor, index, mentions, depth=16)
    features = tiny.encode_mentions(model, processor, mentions)
    every = index.search(features, top_k=40, method="exhaustive")
    assert scored.scores == pytest.approx(every.scores[:, :17])
    for row, mention in enumerate(mentions):
        if mention["answer"] in index:
            place = every.entity_ids[row].index(mention["answer"])
            assert scored.answer_scores[row] == pytest.approx(every.scores[row, place])
            assert scored.places[row] == (place if place < 17 else -1)
        else:
            assert np.isnan(scored.answer_scores[row])
    assert 0 < len(noted) <= 16
    assert all(entity_id in index for entity_id in noted)
    assert scored.known.sum() == sum(mention["answer"] in index for mention in mentions) < 60


def test_calibrate_writes_into_the_configuration_and_travels(linked: Any, tmp_path: Any) -> None:
    model, processor, index, mentions = linked
    calibration = calibrate(model, index, mentions, processor=processor, depth=16, show_progress=False)
    try:
        assert Calibration.from_dict(model.config.calibration) == calibration
        assert calibration.index["entities"] == 40
        assert calibration.index["dtype"] == "float32"
        assert calibration.unlike(len(index), index.dtype, 0) is None
        model.save_pretrained(tmp_path)
        assert Calibration.from_dict(type(model).from_pretrained(tmp_path).config.calibration) == calibration
        again = calibrate(model, index, iter(mentions), processor=processor, depth=16, show_progress=False)
        assert again == calibration  # nothing is left to chance
    finally:
        model.config.calibration = None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mentions": []}, CalibrationError, "no mentions"),
        ({"mentions": [{"mention": "a", "text": "a"}]}, ValueError, "no `answer`"),
        ({"depth": 3}, ValueError, "`depth`"),
        ({"processor": None}, ValueError, "processor"),
    ],
)
def test_bad_arguments_of_calibrate(linked: Any, change: dict[str, Any], error: type[Exception], message: str) -> None:
    model, processor, index, mentions = linked
    arguments = {"mentions": mentions, "processor": processor, "show_progress": False, **change}
    with pytest.raises(error, match=message):
        calibrate(model, index, **arguments)
    assert model.config.calibration is None

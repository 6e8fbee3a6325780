"""Figures of probabilities, against definitions written out and cases counted by hand."""

import numpy as np
import pytest

from mimic_el.calibration_mimic import Calibration
from mimic_el.training.reliability import (
    Outcomes,
    ScoredMentions,
    accuracy_kept,
    best_f1,
    calibration_error,
    error_of_perfect,
    precision_recall_f1,
    reliability_curve,
    roc_area,
)

RANDOM = np.random.default_rng(0)


def test_calibration_error_worked_by_hand() -> None:
    said = np.array([0.05, 0.05, 0.95, 0.95, 1.0])
    seen = np.array([0, 1, 1, 1, 0])
    # Two bins of ten: 0.05 said and 1 of 2 seen; 2.9 / 3 said and 2 of 3 seen.
    assert calibration_error(said, seen, bins=10) == pytest.approx((2 * 0.45 + 3 * abs(2.9 / 3 - 2 / 3)) / 5)
    assert reliability_curve(said, seen, bins=10) == [
        (pytest.approx(0.05), 0.5, 2),
        (pytest.approx(2.9 / 3), pytest.approx(2 / 3), 3),
    ]
    assert calibration_error(np.array([1.0, 1.0]), np.array([1, 1])) == 0


def test_error_of_perfect_probabilities_falls_with_their_number() -> None:
    few, many = (error_of_perfect(RANDOM.random(count)) for count in (100, 10_000))
    assert 0.05 < few < 0.15
    assert many < 0.02
    assert error_of_perfect(np.ones(100)) == 0


def test_roc_area_is_how_often_an_event_is_above_another() -> None:
    values, events = RANDOM.integers(0, 6, 60).astype(float), RANDOM.random(60) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in values[events] for b in values[~events]]
    assert roc_area(values, events) == pytest.approx(np.mean(pairs))


def test_precision_recall_and_f1_counted_by_hand() -> None:
    said, so = np.array([1, 1, 1, 0, 0], dtype=bool), np.array([1, 1, 0, 1, 1], dtype=bool)
    assert precision_recall_f1(said, so) == pytest.approx((2 / 3, 2 / 4, 4 / 7))
    assert precision_recall_f1(~said & said, so) == (0, 0, 0)


def test_best_f1_is_that_of_the_best_of_all_thresholds() -> None:
    values, so = RANDOM.integers(0, 20, 80).astype(float), RANDOM.random(80) < 0.3
    expected = max(precision_recall_f1(values <= threshold, so)[2] for threshold in values)
    found, threshold = best_f1(values, so)
    assert found == pytest.approx(expected)
    assert precision_recall_f1(values <= threshold, so)[2] == pytest.approx(expected)


def test_accuracy_of_what_is_left_when_the_least_sure_are_set_aside() -> None:
    sure, correct = np.array([0.9, 0.2, 0.8, 0.5]), np.array([1, 0, 1, 0])
    assert accuracy_kept(sure, correct, [0, 0.25, 0.5, 1]) == pytest.approx([1 / 2, 2 / 3, 1, 1])


# --- Taking answers out


def scored() -> ScoredMentions:
    """Three mentions, a depth of 3: the answer is the best, the third, and below; the last has no entity."""
    return ScoredMentions(
        scores=np.array([[9.0, 8, 7, 6], [5, 4, 3, 2], [8, 7, 6, 5], [3, 2, 1, 0]]),
        name_fits=np.array([[1.0, 0.5, 0], [0, 0.1, 0.9], [0, 0, 0], [0.2, 0.3, 0.4]]),
        places=np.array([0, 2, -1, -1]),
        answer_scores=np.array([9.0, 3.0, 1.0, np.nan]),
        count=10,
    )


def test_view_with_and_without_answers() -> None:
    kept = scored().view(np.zeros(4, dtype=bool))
    assert kept.scores.tolist() == [[9, 8, 7], [5, 4, 3], [8, 7, 6], [3, 2, 1]]
    assert kept.best_right.tolist() == [True, False, False, False]
    assert kept.nil.tolist() == [False, False, False, True]
    assert kept.counts.tolist() == [10, 10, 10, 10]
    gone = scored().view(np.ones(4, dtype=bool))
    # What a search of a knowledge base without the answer finds.
    assert gone.scores.tolist() == [[8, 7, 6], [5, 4, 2], [8, 7, 6], [3, 2, 1]]
    assert gone.name_fits.tolist() == [[0.5, 0], [0, 0.1], [0, 0], [0.2, 0.3]]
    assert not gone.best_right.any()
    assert gone.nil.all()
    assert gone.counts.tolist() == [9, 9, 9, 10]


def test_outcomes_and_their_figures() -> None:
    calibration = Calibration(
        16, 0.3, {"best": (5.0, 1.0)}, {"nil": (0.0, -1.0), "rest": (-9.0, 0.0), "sharpness": (0, 0)}
    )
    view = scored().view(np.array([False, True, False, False]))
    outcomes, found = Outcomes.of(calibration, view), view.probabilities(calibration)
    assert outcomes.before == pytest.approx(1 / np.exp(view.scores - view.scores[:, :1]).sum(axis=1))
    assert outcomes.right == pytest.approx(
        [found.entities[0, 0], found.nil[1], float(found.at(np.full((4, 1), 1.0))[2, 0]), found.nil[3]]
    )
    assert outcomes.lead.tolist() == [1, 1, 1, 1]
    # p(NIL) of best scores 9, 5, 8, 3: 0.02, 0.5, 0.05, 0.88; the best of three entities has at most 0.67 of the rest.
    assert outcomes.says_nil.tolist() == [False, True, False, True]
    assert outcomes.correct.tolist() == [True, True, False, True]
    figures = outcomes.figures()
    assert (figures["accuracy"], figures["nil"], figures["mentions"]) == (0.75, 0.5, 4)
    assert (figures["nil_precision"], figures["nil_recall"], figures["nil_f1"]) == (1, 1, 1)
    assert figures["brier"] == pytest.approx(np.mean((outcomes.sure - [1, 1, 0, 1]) ** 2))
    assert figures["auc_nil"] == 1

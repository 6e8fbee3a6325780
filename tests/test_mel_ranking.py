"""The `mel_ranking` metric against a brute-force oracle and against figures of the published implementation."""

import math
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

METRIC = Path(__file__).parents[1] / "metrics" / "mel_ranking"

# Ranks of 40 answers among 300 entities, and the metrics of them, from the published implementation.
PUBLISHED_RANKS = [
    1,
    65,
    1,
    34,
    2,
    259,
    7,
    224,
    5,
    239,
    2,
    234,
    5,
    29,
    3,
    123,
    5,
    130,
    2,
    187,
    1,
    16,
    7,
    102,
    6,
    55,
    2,
    18,
    1,
    237,
    7,
    90,
    6,
    173,
    3,
    94,
    4,
    62,
    6,
    217,
]
PUBLISHED_METRICS = {
    "hits@1": 0.1,
    "hits@3": 0.25,
    "hits@5": 0.35,
    "hits@10": 0.5,
    "hits@20": 0.55,
    "mrr": 0.21902494745935996,
    "mean_rank": 66.6,
}


@pytest.fixture(scope="module")
def metric() -> evaluate.Metric:
    return evaluate.load(str(METRIC))


def brute_force_rank(scores: list[float], answer: int) -> float:
    """The mean of the answer's places over both extreme ways of sorting equals."""
    others = [score for place, score in enumerate(scores) if place != answer]
    first = 1 + sum(score > scores[answer] for score in others)
    last = 1 + sum(score >= scores[answer] for score in others)
    return (first + last) / 2


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_metrics_of_scores_are_those_of_brute_force(metric: evaluate.Metric, data: st.DataObject) -> None:
    # Few distinct values, so that ties are the rule.
    rows = data.draw(st.lists(st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=8), min_size=1, max_size=6))
    answers = [data.draw(st.integers(0, len(scores) - 1)) for scores in rows]
    ranks = [brute_force_rank(scores, answer) for scores, answer in zip(rows, answers, strict=True)]

    computed = metric.compute(predictions=rows, references=answers, ks=[1, 2])

    assert computed["hits@1"] == pytest.approx(sum(rank <= 1 for rank in ranks) / len(ranks))
    assert computed["hits@2"] == pytest.approx(sum(rank <= 2 for rank in ranks) / len(ranks))
    assert computed["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    assert computed["mean_rank"] == pytest.approx(sum(ranks) / len(ranks))
    assert (computed["count"], computed["missing"]) == (len(ranks), 0)
    assert metric.compute(ranks=ranks, ks=[1, 2]) == pytest.approx(computed)


def test_published_figures(metric: evaluate.Metric) -> None:
    computed = metric.compute(ranks=PUBLISHED_RANKS)
    assert {name: computed[name] for name in PUBLISHED_METRICS} == pytest.approx(PUBLISHED_METRICS, rel=1e-6)


def test_constant_scores_earn_nothing(metric: evaluate.Metric) -> None:
    computed = metric.compute(predictions=np.zeros((3, 9)), references=np.array([0, 4, 8]))
    assert computed["mean_rank"] == 5
    assert computed["hits@1"] == computed["hits@3"] == 0


def test_batches_add_up(metric: evaluate.Metric) -> None:
    metric.add_batch(predictions=[[3.0, 1.0], [1.0, 2.0]], references=[0, 0])
    metric.add(prediction=[1.0, 2.0, 3.0], reference=0)
    assert metric.compute(ks=[1]) == pytest.approx(
        {"hits@1": 1 / 3, "mrr": (1 + 1 / 2 + 1 / 3) / 3, "mean_rank": 2, "count": 3, "missing": 0}
    )


def test_answers_that_are_not_candidates(metric: evaluate.Metric) -> None:
    scores = {"predictions": [[1.0, 2.0], [1.0, 2.0], [5.0]], "references": [1, -1, -1], "ks": [1]}
    assert metric.compute(**scores) == {"hits@1": 1, "mrr": 1, "mean_rank": 1, "count": 1, "missing": 2}
    counted = metric.compute(**scores, missing="miss")
    assert counted == pytest.approx({"hits@1": 1 / 3, "mrr": 1 / 3, "mean_rank": 1, "count": 3, "missing": 2})
    with pytest.raises(ValueError, match="2 of 3 mentions are not among the candidates"):
        metric.compute(**scores, missing="error")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"predictions": [[1.0, math.nan]], "references": [0]}, "mention 0: a score is NaN"),
        ({"predictions": [[1.0], [1.0]], "references": [0, 1]}, "mention 1: position 1 of the answer, among 1"),
        ({"predictions": [[1.0]], "references": [-2]}, "mention 0: position -2"),
        ({"ranks": []}, "nothing to rank"),
        ({"ranks": [0.5]}, "at least 1"),
        ({"ranks": [math.inf]}, "finite"),
        ({"ranks": [math.nan]}, "none of the 1 answers"),
        ({"ranks": [1], "ks": []}, "`ks`"),
        ({"ranks": [1], "ks": [0]}, "`ks`"),
        ({"ranks": [1], "missing": "ignore"}, "`missing`"),
        ({"ranks": [1], "predictions": [[1.0]], "references": [0]}, "not both"),
    ],
)
def test_bad_input_is_refused(metric: evaluate.Metric, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric.compute(**arguments)


def test_misses_alone_are_no_error_where_they_count() -> None:
    computed = evaluate.load(str(METRIC), keep_in_memory=True).compute(ranks=[math.nan, math.nan], missing="miss")
    assert (computed["hits@1"], computed["mrr"], computed["count"], computed["missing"]) == (0, 0, 2, 2)
    assert math.isnan(computed["mean_rank"])


@pytest.mark.parametrize("ks", [2, [2], (2,), np.array([2]), range(2, 3), np.int64(2)])
def test_one_k_or_several_in_any_sequence(ks: Any) -> None:
    figures = evaluate.load(str(METRIC)).compute(ranks=[1, 2, 4], ks=ks)
    assert {name: value for name, value in figures.items() if name.startswith("hits")} == {"hits@2": 2 / 3}


@pytest.mark.parametrize("ks", [[], 0, [0], [1.5], 1.5, "5", [None], [True]])
def test_what_is_no_k_is_refused(ks: Any) -> None:
    with pytest.raises(ValueError, match="`ks` must hold positive whole numbers"):
        evaluate.load(str(METRIC)).compute(ranks=[1, 2, 4], ks=ks)

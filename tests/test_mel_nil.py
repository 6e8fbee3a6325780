"""The `mel_nil` metric against counts made by hand."""

import math
from pathlib import Path

import evaluate
import pytest

METRIC = Path(__file__).parents[1] / "metrics" / "mel_nil"


@pytest.fixture(scope="module")
def metric() -> evaluate.EvaluationModule:
    return evaluate.load(str(METRIC), keep_in_memory=True)


def test_figures_of_ten_mentions_counted_by_hand(metric: evaluate.EvaluationModule) -> None:
    # Right entity 3 times, wrong entity 1, NIL in its place 1; NIL found 2 times, missed 3.
    said = ["a", "b", "c", "x", None, None, "NIL", "y", "z", "w"]
    right = ["a", "b", "c", "d", "e", None, "nil", None, "Nil", None]
    figures = metric.compute(predictions=said, references=right)
    assert figures == pytest.approx(
        {
            "accuracy": 5 / 10,
            "in_kb_accuracy": 3 / 5,
            "in_kb_precision": 3 / 7,
            "nil_precision": 2 / 3,
            "nil_recall": 2 / 5,
            "nil_f1": 2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5),
            "count": 10,
            "nil_count": 5,
        }
    )


def test_figures_over_nothing_are_nan(metric: evaluate.EvaluationModule) -> None:
    figures = metric.compute(predictions=["a", "b"], references=["a", "c"])
    assert figures["accuracy"] == figures["in_kb_accuracy"] == figures["in_kb_precision"] == 0.5
    assert all(math.isnan(figures[f"nil_{name}"]) for name in ("precision", "recall", "f1"))
    assert math.isnan(metric.compute(predictions=[None], references=[None])["in_kb_accuracy"])


def test_answers_that_are_given_one_by_one_count_the_same(metric: evaluate.EvaluationModule) -> None:
    said, right = ["a", "NIL", "b"], ["a", "NIL", "nil"]  # the library takes no None one by one
    for one, other in zip(said, right, strict=True):
        metric.add(prediction=one, reference=other)
    assert metric.compute()["accuracy"] == metric.compute(predictions=said, references=right)["accuracy"] == 2 / 3


@pytest.mark.parametrize(("said", "right"), [([], []), (["a"], ["a", "b"])])
def test_what_cannot_be_counted_is_an_error(
    metric: evaluate.EvaluationModule, said: list[str], right: list[str]
) -> None:
    with pytest.raises(ValueError, match="mel_nil"):
        metric.compute(predictions=said, references=right)

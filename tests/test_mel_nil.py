"""The `mel_nil` metric against counts made by hand."""

import math
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pandas as pd
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


SAME = [375, "375", 375.0, np.int64(375), np.float32(375)]
NONE = [None, math.nan, np.float32("nan"), "", "nil", pd.NA]


@pytest.mark.parametrize("way", ["compute", "add", "add_batch"])
def test_one_id_and_what_is_none_however_a_table_gives_them(metric: evaluate.EvaluationModule, way: str) -> None:
    """Five ways to write one id and six to say NIL: all are right, and none is where it stands against another id."""
    for said, right, accuracy in (
        (SAME + NONE, SAME[1:] + SAME[:1] + NONE[1:] + NONE[:1], 1),
        (SAME + NONE, ["375.0"] * 5 + ["0"] * 6, 0),
        (SAME + NONE, NONE[:5] + (SAME + SAME)[:6], 0),
    ):
        if way == "add":
            for one, other in zip(said, right, strict=True):
                metric.add(prediction=one, reference=other)
        elif way == "add_batch":
            metric.add_batch(predictions=said, references=right)
        given = {} if way != "compute" else {"predictions": said, "references": right}
        assert metric.compute(**given)["accuracy"] == accuracy


@pytest.mark.parametrize("answer", [True, np.True_, 375.5, 2.0**60, [375], b"375"])
def test_what_is_no_id_is_refused(metric: evaluate.EvaluationModule, answer: Any) -> None:
    with pytest.raises(ValueError, match="mel_nil: an answer is an id"):
        metric.compute(predictions=["1"], references=[answer])


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

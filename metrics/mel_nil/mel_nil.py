"""Entity linking with NIL: accuracy over all mentions; precision, recall and F1 of saying that there is no entity."""

import math
import numbers

import datasets
import evaluate

_DESCRIPTION = """
How well mentions are linked where some of them mean no entity of the knowledge base (NIL). Each mention has one
answer, an entity's id or NIL. The accuracy over all mentions counts an answer as right where it is the entity, or
where both are NIL. NIL precision is the share of the NIL answers that are right, NIL recall the share of the NIL
mentions that are found, NIL F1 their harmonic mean.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str | int | None]`): the answer given to each mention: an entity's id (375, "375" and 375.0 are
        one), or what says that it has none: `None`, NaN, an empty string or "NIL" (in any case).
    references (`list[str | int | None]`): the right answer, in the same form.

Returns:
    `dict[str, float]`, figures between 0 and 1, NaN where there is nothing to count:
    `accuracy`: right answers among all mentions;
    `in_kb_accuracy`: right answers among the mentions that have an entity, a NIL answer counting as wrong;
    `in_kb_precision`: right answers among those that name an entity;
    `nil_precision`, `nil_recall`, `nil_f1`: of NIL;
    `count`, `nil_count`: the mentions, and those of them that have no entity.

Raises:
    ValueError: if there are no mentions, the numbers of predictions and references differ, or an answer is not an id.

Examples:

    >>> mel_nil = evaluate.load("metrics/mel_nil")
    >>> mel_nil.compute(predictions=["Q1", None, None, "Q4"], references=["Q1", None, "Q3", "Q5"])["accuracy"]
    0.5
"""

_CITATION = """
@inproceedings{ji2011knowledge,
    title = {Knowledge Base Population: Successful Approaches and Challenges},
    author = {Ji, Heng and Grishman, Ralph},
    booktitle = {Proceedings of the 49th Annual Meeting of the Association for Computational Linguistics},
    year = {2011},
}
"""


def nil_metrics(predictions, references):
    """The metrics of given answers; see the module's description."""
    if len(predictions) != len(references):
        raise ValueError(f"mel_nil: {len(predictions)} predictions for {len(references)} references.")
    if not len(predictions):
        raise ValueError("mel_nil: there are no mentions.")
    said, right = [_folded(answer) for answer in predictions], [_folded(answer) for answer in references]
    same = [one == other for one, other in zip(said, right, strict=True)]
    both_nil = sum(one is None and other is None for one, other in zip(said, right, strict=True))
    said_nil, nil = said.count(None), right.count(None)
    linked = sum(same) - both_nil
    return {
        "accuracy": sum(same) / len(same),
        "in_kb_accuracy": _share(linked, len(right) - nil),
        "in_kb_precision": _share(linked, len(said) - said_nil),
        "nil_precision": _share(both_nil, said_nil),
        "nil_recall": _share(both_nil, nil),
        "nil_f1": _share(2 * both_nil, said_nil + nil),
        "count": len(same),
        "nil_count": nil,
    }


def _folded(answer):
    """An answer as text; `None` for NIL. As everywhere in the project, an integer is the id that writes it, and so is
    375.0, which pandas makes of 375 in a column where some are missing; what is missing is NIL."""
    if answer is None or type(answer).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(answer, str):
        return None if answer.casefold() in ("", "nil") else answer
    if type(answer).__name__ not in ("bool", "bool_"):  # numpy's, too: that of 2.0 can be an index
        if hasattr(answer, "__index__"):
            return str(answer.__index__())
        if isinstance(answer, numbers.Real):
            number = float(answer)
            if math.isnan(number):
                return None
            if abs(number) <= 2**53 and number.is_integer():
                return str(int(number))
    raise ValueError(f"mel_nil: an answer is an id (a string or an integer), or None or NIL; got {answer!r}.")


def _written(answer):
    """An answer as the library stores it."""
    folded = _folded(answer)
    return "NIL" if folded is None else folded


def _share(part, whole):
    return part / whole if whole else float("nan")


class MelNil(evaluate.Metric):
    """Metrics of entity linking with NIL."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def compute(self, *, predictions=None, references=None, **kwargs):
        """Compute the metrics."""
        if predictions is None or references is None:
            return super().compute(predictions=predictions, references=references, **kwargs)
        return nil_metrics(list(predictions), list(references), **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add one mention."""
        super().add(prediction=_written(prediction), reference=_written(reference), **kwargs)

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add several mentions."""
        said, right = ([_written(answer) for answer in answers] for answers in (predictions, references))
        super().add_batch(predictions=said, references=right, **kwargs)

    def _compute(self, predictions, references):
        return nil_metrics(predictions, references)

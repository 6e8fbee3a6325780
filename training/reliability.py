"""How well probabilities hold: what a calibration says of mentions, compared with what is true. Knows arrays only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..calibration_mimic import Calibration, Probabilities

BINS = 15
COVERAGES = (80, 90, 95)


@dataclass
class ScoredMentions:
    """The best entities of M mentions, one more than are looked at, so that the answer can be taken out.

    Args:
        scores (`numpy.ndarray` of shape `(M, K + 1)`): best first; NaN where the knowledge base has fewer.
        name_fits (`numpy.ndarray` of shape `(M, SOME + 1)`): how well their names fit the mentions; NaN where unknown.
        places (`numpy.ndarray` of shape `(M,)`, int64): where the answer is among them, from 0; -1 if it is not.
        answer_scores (`numpy.ndarray` of shape `(M,)`): the answer's score; NaN where it is not in the knowledge base.
        count (`int`): entities of the knowledge base.
    """

    scores: np.ndarray
    name_fits: np.ndarray
    places: np.ndarray
    answer_scores: np.ndarray
    count: int

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: np.ndarray) -> ScoredMentions:
        arrays = {name: getattr(self, name)[rows] for name in ("scores", "name_fits", "places", "answer_scores")}
        return dataclasses.replace(self, **arrays)

    @classmethod
    def cat(cls, parts: Sequence[ScoredMentions]) -> ScoredMentions:
        """The mentions of several parts, one after the other."""
        names = ("scores", "name_fits", "places", "answer_scores")
        return cls(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}, count=parts[0].count
        )

    @property
    def known(self) -> np.ndarray:
        """Whether the answer is in the knowledge base, (M,)."""
        return ~np.isnan(self.answer_scores)

    def view(self, without: np.ndarray) -> View:
        """The mentions as a search for the best K finds them, where the answers of some, (M,), are taken out of the
        knowledge base."""
        without = without & self.known
        out = np.where(without & (self.places >= 0), self.places, -1)
        best_right = ~without & (self.places == 0)
        return View(
            scores=_without(self.scores, out),
            name_fits=_without(self.name_fits, out),
            counts=self.count - without.astype(np.float64),
            answer_scores=np.where(without, np.nan, self.answer_scores),
            best_right=best_right,
        )


@dataclass
class View:
    """M mentions and their K best entities.

    Args:
        scores (`numpy.ndarray` of shape `(M, K)`), name_fits (`numpy.ndarray` of shape `(M, SOME)`): as in
            [`ScoredMentions`].
        counts (`numpy.ndarray` of shape `(M,)`): of the entities.
        answer_scores (`numpy.ndarray` of shape `(M,)`): NaN where the entity is not in the knowledge base.
        best_right (`numpy.ndarray` of shape `(M,)`, bool): whether the best entity is the answer.
    """

    scores: np.ndarray
    name_fits: np.ndarray
    counts: np.ndarray
    answer_scores: np.ndarray
    best_right: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def nil(self) -> np.ndarray:
        """Whether the entity is not in the knowledge base, (M,)."""
        return np.isnan(self.answer_scores)

    def probabilities(self, calibration: Calibration) -> Probabilities:
        """What a calibration says of them."""
        return calibration.probabilities(self.scores, self.counts, self.name_fits)


def _without(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Each row without one value: that at its place, or the last where the place is -1 or past the end."""
    width = values.shape[1]
    places = np.where((places < 0) | (places >= width), width - 1, places)
    columns = np.arange(width - 1)[None, :]
    return np.take_along_axis(values, columns + (columns >= places[:, None]), axis=1)


@dataclass
class Outcomes:
    """What was said of M mentions, and what is so; arrays of shape (M,).

    Args:
        best, nil: probabilities of the best entity and of NIL.
        right: the probability of the right answer, NIL where that is right.
        best_right, is_nil: whether the best entity is the answer, and whether NIL is.
        score, lead: the best score, and how far it is above the second.
        before: the best entity's probability by a softmax of the scores as they are.
    """

    best: np.ndarray
    nil: np.ndarray
    right: np.ndarray
    best_right: np.ndarray
    is_nil: np.ndarray
    score: np.ndarray
    lead: np.ndarray
    before: np.ndarray

    @classmethod
    def of(cls, calibration: Calibration, view: View) -> Outcomes:
        """Of mentions, by a calibration."""
        found = view.probabilities(calibration)
        best = np.nan_to_num(found.entities[:, 0], nan=0.0)
        right = np.where(view.nil, found.nil, found.at(np.nan_to_num(view.answer_scores)[:, None])[:, 0])
        scores = np.where(np.isnan(view.scores), -np.inf, view.scores)
        before = 1 / np.exp(scores - scores[:, :1]).sum(axis=1)
        lead = view.scores[:, 0] - view.scores[:, 1] if view.scores.shape[1] > 1 else np.zeros(len(view))
        lead = np.nan_to_num(lead, nan=0.0)
        return cls(best, found.nil, right, view.best_right, view.nil, view.scores[:, 0], lead, before)

    @property
    def sure(self) -> np.ndarray:
        """The probability of the answer that is given: the best entity, or NIL where that is more probable."""
        return np.maximum(self.best, self.nil)

    @property
    def says_nil(self) -> np.ndarray:
        """Whether NIL is the answer that is given."""
        return self.nil > self.best

    @property
    def correct(self) -> np.ndarray:
        """Whether the answer that is given is right."""
        return np.where(self.says_nil, self.is_nil, self.best_right)

    def figures(self) -> dict[str, float]:
        """The figures of a report: `accuracy`, all answers with NIL; `ece` and `brier` of the answer that is given;
        `ece_best`, `brier_best` and `auc_best` of the best entity's probability, and with `_before` of the softmax of
        the scores; `ece_nil`, `auc_nil`, `nil_precision`, `nil_recall` and `nil_f1`, where there are NIL mentions."""
        correct = self.correct.astype(np.float64)
        right = self.best_right.astype(np.float64)
        figures = {
            "mentions": len(correct),
            "nil": float(self.is_nil.mean()),
            "accuracy": float(correct.mean()),
            "ece": calibration_error(self.sure, correct),
            "brier": float(((self.sure - correct) ** 2).mean()),
            "ece_best": calibration_error(self.best, right),
            "ece_best_before": calibration_error(self.before, right),
            "brier_best": float(((self.best - right) ** 2).mean()),
            "brier_best_before": float(((self.before - right) ** 2).mean()),
        }
        if 0 < right.mean() < 1:
            figures["auc_best"] = roc_area(self.best, self.best_right)
        if 0 < self.is_nil.mean() < 1:
            precision, recall, f1 = precision_recall_f1(self.says_nil, self.is_nil)
            figures |= {"ece_nil": calibration_error(self.nil, self.is_nil), "auc_nil": roc_area(self.nil, self.is_nil)}
            figures |= {"nil_precision": precision, "nil_recall": recall, "nil_f1": f1}
        return figures


@dataclass
class CalibrationReport:
    """How well probabilities hold, for a card and its images.

    Args:
        nil_rate: the share of mentions without an entity that was expected.
        figures: those of [`Outcomes.figures`]; `ece_of_chance`, see [`error_of_perfect`]; and `coverage_80` and the
            like, the share of mentions whose set holds the right answer.
        before, after: the [`reliability_curve`] of the best entity, by the softmax of the scores as they are and by the
            calibration.
        kept: shares of mentions that are kept, and the accuracy of these, the surest ones.
    """

    nil_rate: float
    figures: dict[str, float]
    before: list[tuple[float, float, int]]
    after: list[tuple[float, float, int]]
    kept: list[tuple[float, float]]

    @classmethod
    def of(cls, calibration: Calibration, outcomes: Outcomes) -> CalibrationReport:
        """Of mentions that the calibration was not made from."""
        figures = outcomes.figures()
        figures["ece_of_chance"] = error_of_perfect(outcomes.sure)
        for percent in COVERAGES:
            if percent <= len(calibration.thresholds):
                reached = outcomes.right >= calibration.thresholds[percent - 1]
                figures[f"coverage_{percent}"] = float(reached.mean())
        shares = np.linspace(1, 0, 20, endpoint=False)
        kept = accuracy_kept(outcomes.sure, outcomes.correct, list(1 - shares))
        return cls(
            calibration.nil_rate,
            figures,
            reliability_curve(outcomes.before, outcomes.best_right),
            reliability_curve(outcomes.best, outcomes.best_right),
            [(float(share), accuracy) for share, accuracy in zip(shares, kept, strict=True)],
        )


def calibration_error(probabilities: np.ndarray, events: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error: over bins of equal width, the mean distance of the mean probability from the
    share of events, weighted by the number in the bin (Naeini, Cooper and Hauskrecht, AAAI 2015; Guo et al., ICML
    2017)."""
    parts = reliability_curve(probabilities, events, bins)
    return sum(count * abs(said - seen) for said, seen, count in parts) / max(1, len(probabilities))


def reliability_curve(
    probabilities: np.ndarray, events: np.ndarray, bins: int = BINS
) -> list[tuple[float, float, int]]:
    """For each bin that is not empty: the mean probability, the share of events, and the number."""
    number = np.minimum((np.asarray(probabilities) * bins).astype(int), bins - 1)
    curve = []
    for place in range(bins):
        inside = number == place
        if inside.any():
            said, seen = float(np.mean(probabilities[inside])), float(np.mean(events[inside]))
            curve.append((said, seen, int(inside.sum())))
    return curve


def error_of_perfect(probabilities: np.ndarray, bins: int = BINS, draws: int = 100, seed: int = 0) -> float:
    """The calibration error that chance alone makes: the mean for events drawn with just these probabilities."""
    random = np.random.default_rng(seed)
    errors = [
        calibration_error(probabilities, random.random(len(probabilities)) < probabilities, bins) for _ in range(draws)
    ]
    return float(np.mean(errors))


def roc_area(values: np.ndarray, events: np.ndarray) -> float:
    """The area under the ROC curve: how often an event's value is above another's; equal ones count half."""
    events = np.asarray(events, dtype=bool)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    yes, no = int(events.sum()), int((~events).sum())
    return float((ranks[events].sum() - yes * (yes + 1) / 2) / (yes * no))


def precision_recall_f1(said: np.ndarray, so: np.ndarray) -> tuple[float, float, float]:
    """Precision, recall and F1 of what was said to be so; 0 where there is none."""
    hits, said_count, so_count = int((said & so).sum()), int(said.sum()), int(so.sum())
    return hits / max(1, said_count), hits / max(1, so_count), 2 * hits / max(1, said_count + so_count)


def best_f1(values: np.ndarray, so: np.ndarray) -> tuple[float, float]:
    """The greatest F1 that saying "so" of all values up to a threshold can have, and that threshold."""
    order = np.argsort(values, kind="stable")
    hits = np.cumsum(so[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + max(1, int(so.sum())))
    ends = np.append(values[order][1:] != values[order][:-1], True)  # equal values go together
    place = int(np.where(ends, f1, -1).argmax())
    return float(f1[place]), float(values[order][place])


def accuracy_kept(sure: np.ndarray, correct: np.ndarray, set_aside: Sequence[float]) -> list[float]:
    """The accuracy of the mentions that are left when a share of them, those with the least sure answers, is set
    aside."""
    order = np.argsort(-sure, kind="stable")
    kept = [max(1, round(len(order) * (1 - share))) for share in set_aside]
    return [float(correct[order[:count]].mean()) for count in kept]


__all__ = [
    "BINS",
    "COVERAGES",
    "CalibrationReport",
    "Outcomes",
    "ScoredMentions",
    "View",
    "accuracy_kept",
    "best_f1",
    "calibration_error",
    "error_of_perfect",
    "precision_recall_f1",
    "reliability_curve",
    "roc_area",
]

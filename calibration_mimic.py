"""How sure an answer is: turns the scores of a mention's best entities into probabilities of entities and of NIL.

NIL is the answer "not in the knowledge base". The model is small, so that it can be checked. It uses a few numbers
that are known when a mention is linked, called its evidence: how high the best score is, how far it is ahead of the
next ones, whether the names fit. Three linear functions ("lines"), each with a bias and a weight for each number,
give:

    p(NIL)            = sigmoid(line of nil)
    p(rest)           = (1 - p(NIL)) * sigmoid(line of rest): the entity is not among the best K
    p(entity)         = (1 - p(NIL) - p(rest)) * softmax of scores * exp(line of sharpness), among the best K

NIL and all entities add up to one. No entity below the K-th may be more probable than the K-th. So with N entities,
p(rest) is at most N - K times the probability of the K-th, and is cut there. Below the K-th, the probability falls
exponentially with the score. The rate is such that all of these entities add up to p(rest), if their scores continue
along the logarithm of the rank.

The weights are fitted by training/calibration.py and stored in the model's configuration. Knows arrays only: no index,
no model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors_mimic import CalibrationError

VERSION = 1
NIL_NAME = "not in the knowledge base"
# What the lines may go by; see `evidence_of`.
EVIDENCE = ("best", "lead", "lead_of_some", "lead_of_all", "name", "near_name")
LINES = ("nil", "rest", "sharpness")
# Entities that `lead_of_some` and `near_name` look at.
SOME = 8
LEAST_DEPTH, MOST_DEPTH = 2 * SOME, 65_536
_MOST_EXPONENT = 30.0
# Of a block that was made elsewhere: what is above is not a calibration.
_MOST_IDS, _MOST_ID_LENGTH, _MOST_FIGURES = 64, 512, 64
_MOST_NUMBER = 1e9
# An index is another one where it has so many times more or fewer entities, or lacks so many of the noted ids.
_OTHER_SIZE, _OTHER_IDS = 1.25, 0.2


@dataclass(frozen=True)
class Probabilities:
    """Probabilities of M mentions' answers; those of the best K, `rest` and `nil` of a mention add up to one.

    Args:
        entities (`numpy.ndarray` of shape `(M, n)`, float64): of the entities whose scores were given; NaN where a
            mention has fewer.
        nil (`numpy.ndarray` of shape `(M,)`, float64): that the entity is not in the knowledge base.
        rest (`numpy.ndarray` of shape `(M,)`, float64): of all entities below the K-th together.
        most_rest (`numpy.ndarray` of shape `(M,)`, float64): the most that `rest` could be.
        last (`numpy.ndarray` of shape `(M,)`, float64): the score of the K-th entity.
        log_last (`numpy.ndarray` of shape `(M,)`, float64): the logarithm of its probability.
        sharpness, rest_sharpness (`numpy.ndarray` of shape `(M,)`, float64): how fast the logarithm of the
            probability rises with the score above the K-th, and falls below it.
    """

    entities: np.ndarray
    nil: np.ndarray
    rest: np.ndarray
    most_rest: np.ndarray
    last: np.ndarray
    log_last: np.ndarray
    sharpness: np.ndarray
    rest_sharpness: np.ndarray

    def at(self, scores: np.ndarray) -> np.ndarray:
        """The probabilities of entities of given scores, (M, n), wherever they stand."""
        with np.errstate(invalid="ignore"):
            over = scores - self.last[:, None]
            slope = np.where(over >= 0, self.sharpness[:, None], self.rest_sharpness[:, None])
            return np.exp(np.minimum(self.log_last[:, None] + slope * over, 0.0))

    def lowest_score(self, probability: float | np.ndarray) -> np.ndarray:
        """The score that an entity of each mention must have to be so probable, of shape `(M,)`; the probability may be
        another for each mention."""
        with np.errstate(invalid="ignore", divide="ignore"):
            over = np.log(probability) - self.log_last
            lowest = self.last + over / np.where(over >= 0, self.sharpness, self.rest_sharpness)
        return np.where(np.asarray(probability) > 0, lowest, -np.inf)


@dataclass(frozen=True)
class Calibration:
    """What turns scores into probabilities, for one model and one kind of knowledge base.

    Args:
        depth (`int`): K, of how many of the best entities the scores are looked at.
        nil_rate (`float`): the share of mentions without an entity that it is for.
        evidence (`dict[str, tuple[float, float]]`): mean and scale of each kind of evidence; see [`evidence_of`].
        lines (`dict[str, tuple[float, ...]]`): of "nil", "rest" and "sharpness": a bias, and a weight for each kind of
            evidence, which goes in less its mean and divided by its scale.
        thresholds (`tuple[float, ...]`): the number at place i, from 0, is the probability that an answer must have to
            be in the sets that cover i + 1 percent of the mentions; see [`~Calibration.threshold`].
        mentions (`int`): those that the thresholds were made from.
        index (`dict`): of the knowledge base: `entities`, their number; `dtype`; `ids`, some of them.
        measured (`dict[str, float]`): figures of mentions that the lines were not fitted on.
    """

    depth: int
    nil_rate: float
    evidence: dict[str, tuple[float, float]]
    lines: dict[str, tuple[float, ...]]
    thresholds: tuple[float, ...] = ()
    mentions: int = 0
    index: dict[str, Any] = dataclasses.field(default_factory=dict)
    measured: dict[str, float] = dataclasses.field(default_factory=dict)

    # --- Probabilities

    def probabilities(self, scores: Any, count: int | np.ndarray, name_fits: Any = None) -> Probabilities:
        """Probabilities from the scores of the best entities.

        Args:
            scores: array of shape `(M, n)`: the scores of each mention's n best entities, best first; NaN where it has
                fewer. There must be `depth` of them, or more, or all entities.
            count: the number of entities that the best were chosen from, of all mentions or of each, `(M,)`.
            name_fits: array of shape `(M, n)` or narrower: how well the entities' names fit the mentions' words, as
                [`name_fit`] tells; NaN, or absent, where that is not known.

        Raises:
            CalibrationError: if a score is infinite, or NaN before a number.
        """
        scores, counts = checked_scores(scores, count)
        best = scores[:, : self.depth]
        standard = self.standardized(evidence_of(best, name_fits))
        known = (~np.isnan(best)).sum(axis=1)
        left = np.maximum(counts - known, 0.0)
        log_nil, log_in = _log_sigmoids(self._line("nil", standard))
        # A mention without any candidate has no entity.
        log_nil, log_in = np.where(known > 0, log_nil, 0.0), np.where(known > 0, log_in, -np.inf)
        sharpness = np.exp(np.clip(self._line("sharpness", standard), -_MOST_EXPONENT, _MOST_EXPONENT))
        last = np.where(known > 0, best[np.arange(len(best)), np.maximum(known - 1, 0)], 0.0)
        # Probabilities as multiples of the K-th's.
        log_sum = np.where(known > 0, _log_sum((best - last[:, None]) * sharpness[:, None]), 0.0)
        with np.errstate(divide="ignore"):
            most_odds = np.log(left) - log_sum
            log_odds = np.minimum(self._line("rest", standard), most_odds)
        log_rest, log_best = _log_sigmoids(log_odds)
        log_most, _ = _log_sigmoids(most_odds)
        log_last = np.where(known > 0, log_in + log_best - log_sum, -np.inf)
        rest, most = np.exp(log_in + log_rest), np.exp(log_in + log_most)
        fall = _rest_sharpness(best, known, counts, np.exp(np.minimum(log_odds + log_sum, 700.0)))
        found = Probabilities(scores, np.exp(log_nil), rest, most, last, log_last, sharpness, fall)
        return dataclasses.replace(found, entities=found.at(scores))

    def standardized(self, evidence: Mapping[str, np.ndarray]) -> np.ndarray:
        """Evidence less its mean and divided by its scale, (M, kinds); 0, the mean, where there is none (NaN)."""
        columns = [(evidence[name] - mean) / scale for name, (mean, scale) in self.evidence.items()]
        return np.nan_to_num(np.stack(columns, axis=1), nan=0.0) if columns else np.zeros((len(evidence["best"]), 0))

    def _line(self, name: str, standard: np.ndarray) -> np.ndarray:
        bias, *weights = self.lines[name]
        return bias + standard @ np.array(weights)

    def threshold(self, coverage: float) -> float:
        """The probability that an answer must have to be in a set that covers so many of the mentions.

        Split conformal prediction (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005; with
        this score Sadinle, Lei and Wasserman, "Least ambiguous set-valued classifiers with bounded error levels", JASA
        2019). The probabilities of the right answers (NIL is one) of n mentions, which the lines were not fitted on,
        are put in order; the threshold is the floor((n + 1) * (1 - coverage))-th smallest. If those n mentions and a
        new one are exchangeable, the set of all answers that reach the threshold holds the right answer of the new one
        with a probability of at least `coverage`, and, where no two probabilities are equal, of at most
        `coverage + 1 / (n + 1)`. This holds on average over such mentions, not for each kind of them. Of all sets with
        that coverage, those by the true probabilities are the smallest on average. A set may be empty.

        The coverage is rounded up to a whole percent.

        Raises:
            ValueError: if `coverage` is not between 0 and 1.
            CalibrationError: if so few mentions were used that no threshold covers so many.
        """
        coverage = proper_fraction("coverage", coverage, ends=False)
        percent = math.ceil(round(coverage * 100, 6))
        if percent > len(self.thresholds):
            most = len(self.thresholds) / 100
            raise CalibrationError(
                f"`coverage` is {coverage:g}, but this calibration, of {self.mentions} mentions, goes up to {most:g}. "
                "Ask for less, or calibrate on more mentions."
            )
        return self.thresholds[percent - 1]

    # --- The knowledge base that it is for

    def unlike(self, entities: int, dtype: str, missing: int) -> str | None:
        """In which way a knowledge base is not the one that the calibration is for; `None` if it is.

        Args:
            entities: the number of its entities.
            dtype: in what its features are stored.
            missing: how many of the `ids` of `index` it lacks.
        """
        known, ids = int(self.index.get("entities", 0)), self.index.get("ids", ())
        ways = []
        if known and not known / _OTHER_SIZE <= entities <= known * _OTHER_SIZE:
            ways.append(f"it has {entities:,} entities, not {known:,}")
        if missing > _OTHER_IDS * len(ids):
            ways.append(f"it lacks {missing} of {len(ids)} entities that the calibration noted")
        if self.index.get("dtype", dtype) != dtype:
            ways.append(f"its features are stored in {dtype}, not {self.index['dtype']}")
        return ", and ".join(ways) or None

    # --- As plain values

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a configuration."""
        evidence = {}
        for place, (name, (mean, scale)) in enumerate(self.evidence.items(), start=1):
            evidence[name] = {"mean": mean, "scale": scale, **{line: self.lines[line][place] for line in LINES}}
        return {
            "version": VERSION,
            "depth": self.depth,
            "nil_rate": self.nil_rate,
            "bias": {line: self.lines[line][0] for line in LINES},
            "evidence": evidence,
            "coverage": {"mentions": self.mentions, "thresholds": list(self.thresholds)},
            "index": dict(self.index),
            "measured": dict(self.measured),
        }

    @classmethod
    def from_dict(cls, values: Any) -> Calibration:
        """From the plain values of a configuration, which may come from anywhere.

        Raises:
            CalibrationError: if it is not a calibration, or one of a newer version.
        """
        if is_newer(values):
            raise CalibrationError(
                f"The model's calibration has version {values['version']}, and this code knows version {VERSION}. Use "
                "a newer mimic-el, or calibrate the model again (mimic-el calibrate)."
            )
        block = _part(values, "calibration", _KEYS)
        _whole(block["version"], "version", VERSION, VERSION)
        if not isinstance(block["evidence"], Mapping) or not set(block["evidence"]) <= set(EVIDENCE):
            raise _wrong("evidence", f"a mapping with some of {', '.join(EVIDENCE)}", block["evidence"])
        bias = _part(block["bias"], "bias", LINES)
        lines = {line: [_number(bias[line], f"bias.{line}")] for line in LINES}
        evidence = {}
        for name in (name for name in EVIDENCE if name in block["evidence"]):  # JSON keeps no order
            part = _part(block["evidence"][name], f"evidence.{name}", ("mean", "scale", *LINES))
            mean = _number(part["mean"], f"evidence.{name}.mean")
            evidence[name] = mean, _number(part["scale"], f"evidence.{name}.scale", 1e-9)
            for line in LINES:
                lines[line].append(_number(part[line], f"evidence.{name}.{line}"))
        coverage = _part(block["coverage"], "coverage", ("mentions", "thresholds"))
        thresholds = coverage["thresholds"]
        if not isinstance(thresholds, list | tuple) or len(thresholds) > 99:
            raise _wrong("coverage.thresholds", "a list of at most 99 numbers", thresholds)
        limits = [_number(value, "coverage.thresholds", 0, 1) for value in thresholds]
        if any(later > earlier for earlier, later in itertools.pairwise(limits)):
            raise _wrong("coverage.thresholds", "numbers that do not rise", thresholds)
        return cls(
            depth=_whole(block["depth"], "depth", LEAST_DEPTH, MOST_DEPTH),
            nil_rate=_number(block["nil_rate"], "nil_rate", 0, 1),
            evidence=evidence,
            lines={line: tuple(numbers) for line, numbers in lines.items()},
            thresholds=tuple(limits),
            mentions=_whole(coverage["mentions"], "coverage.mentions", 0, 10**12),
            index=_checked_index(block["index"]),
            measured=_checked_figures(block["measured"]),
        )


# --- Scores and names -------------------------------------------------------------------------------------------------


def checked_scores(scores: Any, count: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (M, n) and numbers of entities (M,), in float64.

    Raises:
        CalibrationError: if a score is infinite, or NaN before a number.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(f"Scores must have the shape (mentions, entities), got {scores.shape}.")
    there = ~np.isnan(scores)
    bad = np.isinf(scores).any(axis=1) | (there[:, 1:] & ~there[:, :-1]).any(axis=1)
    if bad.any():
        raise CalibrationError(f"The scores of mention {int(bad.argmax())} are not finite: they have no probabilities.")
    counts = np.broadcast_to(np.asarray(count, dtype=np.float64), len(scores))
    return scores, np.maximum(counts, there.sum(axis=1))


def evidence_of(scores: np.ndarray, name_fits: Any = None) -> dict[str, np.ndarray]:
    """What the lines go by, each of shape (M,); NaN where a mention has too few entities for it.

    `best`: the best score. `lead`: how far it is above the second; `lead_of_some`: above the mean of the next 8;
    `lead_of_all`: above the mean of all others that are given. `name`: how well the best entity's name fits the
    mention's words; `near_name`: the best such fit among the best 8. A fit goes in with its fourth power: what counts
    is how near it is to a whole one.
    """
    best, others = scores[:, 0], scores[:, 1:]
    fits = np.full((len(scores), 1), np.nan) if name_fits is None else np.asarray(name_fits, dtype=np.float64)[:, :SOME]
    near = np.where(np.isnan(fits), -np.inf, fits).max(axis=1)
    return {
        "best": best,
        "lead": best - _mean(others[:, :1]),
        "lead_of_some": best - _mean(others[:, :SOME]),
        "lead_of_all": best - _mean(others),
        "name": fits[:, 0] ** 4,
        "near_name": np.where(np.isfinite(near), near, np.nan) ** 4,
    }


def name_fit(mention: str, names: Sequence[str]) -> float:
    """How well an entity's names fit the words of a mention, from 0 to 1: the share of the letters' triples that a
    mention and a name have in common, of those of the shorter one, for the name that has most."""
    own = _triples(mention)
    others = [_triples(name) for name in names]
    return max((len(own & other) / min(len(own), len(other)) for other in others if other and own), default=0.0)


def _triples(text: str) -> set[str]:
    words = " ".join(text.casefold().split())
    padded = f" {words} "
    return {padded[place : place + 3] for place in range(len(padded) - 2)} if words else set()


def _mean(scores: np.ndarray) -> np.ndarray:
    """The mean of what is there in each row; NaN for nothing."""
    there = ~np.isnan(scores)
    known = there.sum(axis=1)
    total = np.where(there, scores, 0.0).sum(axis=1)
    return np.where(known > 0, total / np.maximum(known, 1), np.nan)


def _log_sigmoids(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of sigmoid(logits) and of sigmoid(-logits)."""
    return -np.logaddexp(0.0, -logits), -np.logaddexp(0.0, logits)


def _log_sum(terms: np.ndarray) -> np.ndarray:
    """The logarithm of the sum of exp(terms) in each row; NaN terms are not there."""
    terms = np.where(np.isnan(terms), -np.inf, terms)
    top = np.maximum(terms.max(axis=1, keepdims=True), -1e300)
    with np.errstate(divide="ignore"):
        return (top + np.log(np.exp(terms - top).sum(axis=1, keepdims=True)))[:, 0]


def _rest_sharpness(scores: np.ndarray, known: np.ndarray, count: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The rate at which the probability falls below the K-th entity, so that all there, as multiples of the K-th's, add
    up to what is wanted, (M,).

    Against the logarithm of the rank the scores are drawn out along the line through the ranks K / 2 and K, so that
    probabilities fall as a power of the rank; the power is found by bisection.
    """
    rows, last = np.arange(len(scores)), np.maximum(known - 1, 0)
    middle = np.maximum(known // 2 - 1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (scores[rows, middle] - scores[rows, last]) / np.log((last + 1) / (middle + 1))
        span = np.log(count / np.maximum(known, 1))
    low, high = np.zeros(len(scores)), np.full(len(scores), math.log(1e12))
    for _ in range(60):
        mid = (low + high) / 2
        rate = 1 - np.expm1(mid)
        rate = np.where(np.abs(rate) < 1e-9, 1e-9, rate)
        # The integral of (r / K) ** -power for r from K to N.
        much = known * np.expm1(np.clip(rate * span, -700, 700)) / rate > wanted
        low, high = np.where(much, mid, low), np.where(much, high, mid)
    steepest = np.exp(_MOST_EXPONENT)
    return np.minimum(np.expm1(low) / np.maximum(np.nan_to_num(slope, nan=0.0), 1e-9), steepest)


# --- Values from outside ----------------------------------------------------------------------------------------------

_KEYS = ("version", "depth", "nil_rate", "bias", "evidence", "coverage", "index", "measured")


def proper_fraction(name: str, value: Any, ends: bool = True) -> float:
    """A number from 0 to 1; without the ends, between them.

    Raises:
        ValueError: if it is not.
    """
    number = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
    if not number or not (0 <= value <= 1) or (not ends and value in (0, 1)):
        how = "from 0 to 1" if ends else "between 0 and 1, such as 0.95"
        raise ValueError(f"`{name}` must be a number {how}, got {value!r}.")
    return float(value)


def is_newer(values: Any) -> bool:
    """Whether a calibration's plain values are of a version that this code does not know yet."""
    version = values.get("version") if isinstance(values, Mapping) else None
    return isinstance(version, int) and not isinstance(version, bool) and version > VERSION


def _wrong(where: str, what: str, value: Any) -> CalibrationError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return CalibrationError(
        f"The model's calibration cannot be used: `{where}` must be {what}, got {shown}. Calibrate the model again "
        "(mimic-el calibrate), or take `calibration` out of its config.json."
    )


def _part(value: Any, where: str, names: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not set(names) <= set(value):
        raise _wrong(where, f"a mapping with {', '.join(names)}", value)
    return value


def _number(value: Any, where: str, least: float = -_MOST_NUMBER, most: float = _MOST_NUMBER) -> float:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not least <= value <= most:  # NaN is not
        raise _wrong(where, f"a number from {least:g} to {most:g}", value)
    return float(value)


def _whole(value: Any, where: str, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _wrong(where, f"a whole number from {least} to {most}", value)
    return value


def _checked_index(value: Any) -> dict[str, Any]:
    part = _part(value, "index", ("entities", "dtype", "ids"))
    ids, dtype = part["ids"], part["dtype"]
    if not isinstance(dtype, str) or len(dtype) > 32:
        raise _wrong("index.dtype", "a short string", dtype)
    if (
        not isinstance(ids, list | tuple)
        or len(ids) > _MOST_IDS
        or not all(isinstance(item, str) and len(item) <= _MOST_ID_LENGTH for item in ids)
    ):
        raise _wrong("index.ids", f"a list of at most {_MOST_IDS} ids", ids)
    return {"entities": _whole(part["entities"], "index.entities", 0, 10**12), "dtype": dtype, "ids": list(ids)}


def _checked_figures(value: Any) -> dict[str, float]:
    if (
        not isinstance(value, Mapping)
        or len(value) > _MOST_FIGURES
        or not all(isinstance(name, str) and len(name) <= 64 for name in value)
    ):
        raise _wrong("measured", f"a mapping of at most {_MOST_FIGURES} names to numbers", value)
    return {name: _number(number, f"measured.{name}") for name, number in value.items()}


__all__ = [
    "EVIDENCE",
    "LEAST_DEPTH",
    "LINES",
    "MOST_DEPTH",
    "NIL_NAME",
    "SOME",
    "VERSION",
    "Calibration",
    "Probabilities",
    "checked_scores",
    "evidence_of",
    "is_newer",
    "name_fit",
    "proper_fraction",
]

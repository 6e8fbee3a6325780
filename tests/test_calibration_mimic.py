"""Probabilities from the best scores, against the plain equations; blocks from outside."""

import copy
import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimic_el import CalibrationError, MimicConfig
from mimic_el.calibration_mimic import VERSION, Calibration, evidence_of, name_fit

DEPTH = 16
CALIBRATION = Calibration(
    depth=DEPTH,
    nil_rate=0.25,
    evidence={"best": (10.0, 2.0), "lead": (1.0, 0.5), "lead_of_all": (4.0, 1.5), "near_name": (0.5, 0.25)},
    lines={
        "nil": (-0.5, -1.0, 0.5, -0.25, -1.5),
        "rest": (-2.0, 0.25, -0.75, 0.5, 0.0),
        "sharpness": (0.25, 0.125, 0.0, -0.25, 0.5),
    },
    thresholds=(0.9, 0.6, 0.1),
    mentions=60,
    index={"entities": 1000, "dtype": "float32", "ids": [f"Q{row}" for row in range(10)]},
    measured={"ece": 0.02},
)


def some_scores(mentions: int, entities: int, seed: int = 0) -> np.ndarray:
    return -np.sort(-np.random.default_rng(seed).normal(8, 2, (mentions, entities)), axis=1)


def plain(scores: list[float], count: int, fits: list[float] | None) -> tuple[list[float], float, float]:
    """The module's equations for one mention, in plain Python: entities, NIL, rest."""
    best = scores[:DEPTH]
    others = [best[0] - score for score in best[1:]]
    given: dict[str, Any] = {"best": best[0], "lead": others[0] if others else None}
    given["lead_of_all"] = sum(others) / len(others) if others else None
    given["near_name"] = None if fits is None else max(fits[:8]) ** 4
    lines = {}
    for line, (bias, *weights) in CALIBRATION.lines.items():
        lines[line] = bias
        for (name, (mean, scale)), weight in zip(CALIBRATION.evidence.items(), weights, strict=True):
            if given[name] is not None:
                lines[line] += weight * (given[name] - mean) / scale
    nil, rest = (1 / (1 + math.exp(-lines[name])) for name in ("nil", "rest"))
    sharp = [math.exp(math.exp(lines["sharpness"]) * (score - best[0])) for score in best]
    shares = [value / sum(sharp) for value in sharp]
    # No entity below the K-th is more probable than the K-th.
    most = (count - len(best)) * shares[-1]
    rest = min(rest, most / (1 + most))
    return [(1 - nil) * (1 - rest) * share for share in shares], nil, (1 - nil) * rest


@pytest.mark.parametrize("count", [1000, 40, DEPTH, 17])
@pytest.mark.parametrize("named", [True, False])
def test_probabilities_are_those_of_the_equations_and_add_up_to_one(count: int, named: bool) -> None:
    scores = some_scores(20, DEPTH)
    fits = np.random.default_rng(1).random((20, 9)) if named else None
    found = CALIBRATION.probabilities(scores, count, fits)
    for row in range(20):
        entities, nil, rest = plain(scores[row].tolist(), count, None if fits is None else fits[row].tolist())
        assert found.entities[row] == pytest.approx(entities)
        assert (found.nil[row], found.rest[row]) == pytest.approx((nil, rest))
    assert found.entities.sum(axis=1) + found.nil + found.rest == pytest.approx(np.ones(20))
    assert (found.rest <= found.most_rest + 1e-12).all()
    assert (found.rest == 0).all() == (count == DEPTH)


def test_mentions_of_few_entities_and_of_none() -> None:
    scores = np.array([[9.0, 7.0, 4.0], [9.0, np.nan, np.nan], [np.nan] * 3])
    found = CALIBRATION.probabilities(scores, np.array([3, 1, 0]))
    assert found.entities[0] == pytest.approx(plain([9.0, 7.0, 4.0], 3, None)[0])
    assert found.entities[1, 0] == pytest.approx(plain([9.0], 1, None)[0][0])
    assert np.isnan(found.entities[1, 1:]).all()
    assert np.isnan(found.entities[2]).all()
    assert found.nil[2] == 1
    assert np.nansum(found.entities, axis=1) + found.nil == pytest.approx(np.ones(3))


def test_equal_scores_have_equal_probabilities_and_higher_ones_no_less() -> None:
    scores = np.array([[9.0, 9.0, *[5.0] * 14]])
    found = CALIBRATION.probabilities(scores, 500)
    assert found.entities[0, 0] == found.entities[0, 1]
    assert len(set(found.entities[0, 2:])) == 1
    assert (np.diff(CALIBRATION.probabilities(some_scores(30, DEPTH), 500).entities, axis=1) <= 0).all()


@pytest.mark.parametrize("spread", [0.5, 2.0, 8.0])
def test_what_is_below_the_best_stays_under_its_bound_when_all_is_scored(spread: float) -> None:
    scores = 20 - spread * np.log(np.arange(1, 4001)) + 0 * some_scores(10, 1)  # along the logarithm of the rank
    found = CALIBRATION.probabilities(scores[:, :DEPTH], 4000)
    below = found.at(scores[:, DEPTH:])
    assert (below <= found.entities[:, -1:] + 1e-15).all()
    assert (np.diff(below, axis=1) <= 0).all()
    assert (below.sum(axis=1) <= found.most_rest + 1e-12).all()
    # These scores are as the estimate takes them to be, so that all of them add up to one.
    assert below.sum(axis=1) == pytest.approx(found.rest, rel=0.1)
    bent = np.where(np.arange(4000) < DEPTH, scores, scores - 3)  # others are lower, and still under the bound
    assert (found.at(bent[:, DEPTH:]).sum(axis=1) <= found.most_rest).all()


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-9, 0.999), st.integers(0, 10**6))
def test_lowest_score_is_where_the_probability_is_reached(probability: float, seed: int) -> None:
    scores = some_scores(4, 60, seed % 100)
    found = CALIBRATION.probabilities(scores[:, :DEPTH], 60)
    every = found.at(scores)
    reached = scores >= found.lowest_score(probability)[:, None]
    clear = np.abs(every - probability) > 1e-9 * probability
    assert (reached == (every >= probability))[clear].all()


def test_all_scores_reach_no_probability_at_all() -> None:
    found = CALIBRATION.probabilities(some_scores(2, DEPTH), 100)
    assert (found.lowest_score(0.0) == -np.inf).all()


def test_scores_that_have_no_order_are_refused() -> None:
    for bad in ([np.inf, 1.0], [np.nan, 1.0], [1.0, -np.inf]):
        with pytest.raises(CalibrationError, match="mention 1"):
            CALIBRATION.probabilities(np.array([[2.0, 1.0], bad]), 2)
    with pytest.raises(ValueError, match="shape"):
        CALIBRATION.probabilities(np.array([1.0]), 2)


def test_far_scores_overflow_nothing() -> None:
    scores = np.array([[3e4, *np.linspace(0, -3e4, DEPTH - 1)], [0.0] * DEPTH])
    with np.errstate(all="raise", under="ignore"):
        found = CALIBRATION.probabilities(scores, 10**7, np.ones((2, 9)))
    assert np.isfinite(found.entities).all()
    assert found.entities.sum(axis=1) + found.nil + found.rest == pytest.approx(np.ones(2))


def test_evidence_worked_by_hand() -> None:
    evidence = evidence_of(np.array([[10.0, 7.0, 5.0, *[1.0] * 8]]), np.array([[0.5, 1.0, 0.0]]))
    assert {name: float(value[0]) for name, value in evidence.items()} == pytest.approx(
        {
            "best": 10.0,
            "lead": 3.0,
            "lead_of_some": 10 - (7 + 5 + 6) / 8,
            "lead_of_all": 10 - (7 + 5 + 8) / 10,
            "name": 0.5**4,
            "near_name": 1.0,
        }
    )


@pytest.mark.parametrize(
    ("mention", "names", "fit"),
    [
        ("Orange", ["Orange"], 1.0),
        ("ORANGE ", ["orange"], 1.0),
        ("Truman", ["Harry S. Truman"], 1.0),  # the shorter one is whole in the longer
        ("abc", ["abd"], 1 / 3),  # " ab" of " ab", "abc", "bc "
        ("Orange", ["Lemon", "Orange"], 1.0),
        ("Orange", [], 0.0),
        ("Orange", ["", "  "], 0.0),
        ("x", ["y"], 0.0),
    ],
)
def test_name_fit(mention: str, names: list[str], fit: float) -> None:
    assert name_fit(mention, names) == pytest.approx(fit)


# --- Coverage and the knowledge base


@pytest.mark.parametrize(("coverage", "threshold"), [(0.01, 0.9), (0.011, 0.6), (0.02, 0.6), (0.03, 0.1)])
def test_coverage_is_rounded_up_to_a_percent(coverage: float, threshold: float) -> None:
    assert CALIBRATION.threshold(coverage) == threshold


@pytest.mark.parametrize("coverage", [0, 1, 1.0, 0.0, -0.1, 1.5, math.nan, "0.9", True, None])
def test_coverage_must_be_between_zero_and_one(coverage: Any) -> None:
    with pytest.raises(ValueError, match="`coverage` must be a number between 0 and 1"):
        CALIBRATION.threshold(coverage)


def test_coverage_that_too_few_mentions_allow() -> None:
    with pytest.raises(CalibrationError, match=r"0\.95.*60 mentions, goes up to 0\.03"):
        CALIBRATION.threshold(0.95)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ((1000, "float32", 0), None),
        ((1200, "float32", 2), None),
        ((1300, "float32", 0), "it has 1,300 entities, not 1,000"),
        ((700, "float32", 0), "it has 700 entities"),
        ((1000, "int8", 0), "stored in int8, not float32"),
        ((1000, "float32", 3), "it lacks 3 of 10 entities that the calibration noted"),
        ((10, "float16", 10), "10 entities, not 1,000, and it lacks 10 .*, and its features"),
    ],
)
def test_another_knowledge_base_is_told(facts: tuple[int, str, int], said: str | None) -> None:
    way = CALIBRATION.unlike(*facts)
    assert (way is None) == (said is None)
    assert said is None or re.search(said, str(way))


# --- Blocks from outside


def test_round_trip_through_json_and_a_configuration(tmp_path: Any) -> None:
    block = json.loads(json.dumps(CALIBRATION.to_dict()))
    assert Calibration.from_dict(block) == CALIBRATION
    MimicConfig(calibration=block).save_pretrained(tmp_path)
    assert Calibration.from_dict(MimicConfig.from_pretrained(tmp_path).calibration) == CALIBRATION
    assert MimicConfig().calibration is None


def _with(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(block: dict[str, Any]) -> None:
        for name in path[:-1]:
            block = block[name]
        block[path[-1]] = value

    return change


def _removed(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda block: block.pop(name)


HOSTILE = {
    "no version": _removed("version"),
    "version 0": _with("version", value=0),
    "version as text": _with("version", value="9"),
    "no lines": _removed("bias"),
    "a line less": _with("bias", value={"nil": 0.0}),
    "depth of none": _with("depth", value=0),
    "depth without end": _with("depth", value=10**9),
    "depth as a fraction": _with("depth", value=64.0),
    "rate above one": _with("nil_rate", value=1.5),
    "NaN": _with("bias", "nil", value=math.nan),
    "infinity": _with("bias", "sharpness", value=math.inf),
    "a number as text": _with("bias", "rest", value="1"),
    "a truth as number": _with("bias", "rest", value=True),
    "a huge whole number": _with("bias", "rest", value=10**400),
    "unknown evidence": _with("evidence", "__class__", value={"mean": 0, "scale": 1}),
    "scale of none": _with("evidence", "best", "scale", value=0.0),
    "evidence as a list": _with("evidence", value=[1, 2]),
    "rising thresholds": _with("coverage", "thresholds", value=[0.1, 0.2]),
    "too many thresholds": _with("coverage", "thresholds", value=[0.5] * 100),
    "thresholds above one": _with("coverage", "thresholds", value=[2.0]),
    "thresholds as text": _with("coverage", "thresholds", value="0.5"),
    "too many ids": _with("index", "ids", value=["Q"] * 100),
    "a long id": _with("index", "ids", value=["Q" * 10**6]),
    "an id that is none": _with("index", "ids", value=[7]),
    "figures without end": _with("measured", value={str(n): 1.0 for n in range(1000)}),
    "figures as text": _with("measured", value={"ece": "<script>"}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile_block_is_refused_with_what_to_do(change: Callable[[dict[str, Any]], None]) -> None:
    block = copy.deepcopy(CALIBRATION.to_dict())
    change(block)
    with pytest.raises(CalibrationError, match=r"cannot be used.*Calibrate the model again") as caught:
        MimicConfig(calibration=block)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("block", [[], "none", 3, {}])
def test_block_that_is_none(block: Any) -> None:
    with pytest.raises(CalibrationError, match="cannot be used"):
        MimicConfig(calibration=block)


def test_block_of_a_newer_version_is_kept_and_not_used(tmp_path: Any) -> None:
    block = {"version": VERSION + 1, "flux": [1, 2, 3]}
    MimicConfig(calibration=block).save_pretrained(tmp_path)
    assert MimicConfig.from_pretrained(tmp_path).calibration == block
    with pytest.raises(CalibrationError, match="newer mimic-el, or calibrate the model again"):
        Calibration.from_dict(block)

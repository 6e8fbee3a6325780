"""Calibration: learns how sure an answer is, from mentions with known answers. See calibration_mimic.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..answers_mimic import calibration_for, name_fits
from ..calibration_mimic import (
    LEAST_DEPTH,
    LINES,
    MOST_DEPTH,
    SOME,
    Calibration,
    evidence_of,
    proper_fraction,
)
from ..errors_mimic import CalibrationError
from ..index_mimic import EntityIndex
from ..mentions_mimic import encoded_mentions
from ..modeling_mimic import MentionFeatures, MimicModel
from ..processing_mimic import MimicProcessor
from ..records_mimic import entity_id_of, is_absent, undecoded
from ..snapshot_mimic import SearchResult
from .reliability import CalibrationReport, Outcomes, ScoredMentions

LEAST_MENTIONS = 50
DEPTH = 64
# The share of NIL mentions where the calibration's own do not tell it, and of how many they do.
NIL_RATE, _ENOUGH_NIL = 0.2, 20
# With so many own NIL mentions, those whose answer is taken out are not needed.
_MANY_NIL = 50
_AT_ONCE = 1024
_NOTED_IDS = 16
# Where no mention has no entity: p(NIL) is next to nothing.
_NEVER = -40.0

Array = NDArray[np.float64]


def calibrate(
    model: Any,
    index: EntityIndex,
    mentions: Iterable[Mapping[str, Any]],
    *,
    processor: MimicProcessor | None = None,
    nil_rate: float | None = None,
    depth: int = DEPTH,
    seed: int = 0,
    batch_size: int = 32,
    on_image_error: str = "warn",
    show_progress: bool = True,
) -> Calibration:
    """Learns from mentions how sure an answer is, and writes it into the model's configuration.

    From then on the model's pipeline tells probabilities, and [`~MimicModel.save_pretrained`] saves them with it. Half
    of the mentions, drawn by the seed, are what the probabilities are fitted on, by maximum likelihood with a little
    regularization; the other half is what `coverage` and the figures in `measured` rest on. Use mentions that the model
    was not trained on, of the kind that is to be linked.

    A mention whose answer is `None`, empty, "nil" or not in the index has no entity: its right answer is NIL. Where
    there are fewer than 50 of those, each other mention serves as one too, its answer left out of what is found.

    Args:
        model ([`MimicModel`] or [`MimicTrainer`]): made the index.
        index: the knowledge base that is to be used.
        mentions: dicts with `mention`, `text` (or `sentence`), `answer` and, where there is one, `image`.
        processor: of the model; a trainer has its own.
        nil_rate: the share of mentions without an entity that is to be expected; that of the mentions given if at
            least 20 of them have none, and 0.2 otherwise.
        depth: of how many of the best entities the scores are looked at. Each linked mention is searched so deep.
        seed: of the halves, and of which answers are taken out.
        batch_size, on_image_error, show_progress: of encoding, as in [`EntityIndex.link`].

    Raises:
        CalibrationError: if there are fewer than 50 mentions, no answer is in the index, the best entity is right for
            all mentions or for none, or scores are all equal.
        EntityIndexError: if the index is of another model.
        ValueError: if a mention or an argument is not as described.
    """
    trainer = None if isinstance(model, MimicModel) else model
    if trainer is not None:
        processor = processor or trainer.collator.processor
        model = trainer.accelerator.unwrap_model(trainer.model)
    if processor is None:
        raise ValueError("`calibrate` needs the model's processor: pass processor=MimicProcessor.from_pretrained(...).")
    scored, noted = scored_mentions(
        model,
        processor,
        index,
        mentions,
        depth=depth,
        batch_size=batch_size,
        on_image_error=on_image_error,
        show_progress=show_progress,
    )
    about = {"entities": len(index), "dtype": index.dtype, "ids": noted}
    calibration = fit_calibration(scored, nil_rate=nil_rate, seed=seed, index=about)
    model.config.calibration = calibration.to_dict()
    return calibration


def calibration_report(
    model: MimicModel, index: EntityIndex, scored: ScoredMentions | None, seed: int = 0
) -> CalibrationReport | None:
    """How well a calibrated model's probabilities are kept by mentions that it was not calibrated on; `None` where the
    model is not calibrated.

    Args:
        model: is calibrated.
        index: the knowledge base that was searched.
        scored: the mentions. A share of them, as the calibration expects it, has no entity: answers are taken out.
        seed: of which answers are.
    """
    calibration = calibration_for(model.config, index, warn=False)  # type: ignore[arg-type]
    if calibration is None or scored is None:
        return None
    rows, without = mixture(scored, calibration.nil_rate, np.random.default_rng(seed))
    if not len(rows):
        return None
    return CalibrationReport.of(calibration, Outcomes.of(calibration, scored[rows].view(without)))


class ForgetCalibration(TrainerCallback):
    """Takes the calibration out of a model that is trained on: it was another model's."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        config: Any = getattr(kwargs.get("model"), "config", None)
        if getattr(config, "calibration", None) is not None:
            config.calibration = None


def scored_mentions(
    model: MimicModel,
    processor: MimicProcessor,
    index: EntityIndex,
    mentions: Iterable[Mapping[str, Any]],
    *,
    depth: int = DEPTH,
    batch_size: int = 32,
    on_image_error: str = "warn",
    show_progress: bool = False,
) -> tuple[ScoredMentions, list[str]]:
    """The best entities of mentions with known answers, and some of the answers' ids; arguments as of [`calibrate`].

    Raises:
        CalibrationError: if there are no mentions.
    """
    if not isinstance(depth, int) or not LEAST_DEPTH <= depth <= MOST_DEPTH:
        raise ValueError(f"`depth` must be a whole number from {LEAST_DEPTH} to {MOST_DEPTH}, got {depth!r}.")
    index.check_model(model)
    parts = []
    noted: dict[str, None] = {}
    for block in _blocks(undecoded(mentions, "image")):
        answers = [_answer_of(mention, index) for mention in block]
        encoded = encoded_mentions(model, processor, block, batch_size, on_image_error, show_progress)
        features = encoded.features
        if features is None:
            continue
        words = [mention.mention for mention in encoded.mentions]
        found = index.search(features, top_k=min(depth + 1, len(index)), show_progress=show_progress)
        parts.append(scored_of(index, features, found, words, answers, depth))
        noted |= dict.fromkeys(answer for answer in answers if answer is not None)
    if not parts:
        raise CalibrationError("There are no mentions to calibrate on.")
    return ScoredMentions.cat(parts), some_of(noted)


def scored_of(
    index: EntityIndex,
    features: MentionFeatures,
    found: SearchResult,
    words: Sequence[str],
    answers: Sequence[str | None],
    depth: int,
) -> ScoredMentions:
    """What a search for the best `depth` + 1 found, with the scores of the answers.

    Args:
        index: was searched.
        features: of M mentions.
        found: the search's result.
        words: of the mentions.
        answers: ids of their entities; `None`, or one that the index does not have, where there is none.
        depth: K.
    """
    answers = [answer if answer is not None and answer in index else None for answer in answers]
    width = min(depth + 1, found.scores.shape[1])
    scores = np.full((len(answers), depth + 1), np.nan)
    scores[:, :width] = found.scores[:, :width]
    places = np.full(len(answers), -1)
    answer_scores = np.full(len(answers), np.nan)
    for row, (ids, answer) in enumerate(zip(found.entity_ids, answers, strict=True)):
        if answer is not None and answer in ids[:width]:
            places[row] = ids.index(answer)
            answer_scores[row] = scores[row, places[row]]
    deeper = [row for row, answer in enumerate(answers) if answer is not None and places[row] < 0]
    if deeper:
        chosen = features[torch.tensor(deeper, device=features.device)]
        single = index.search(chosen, top_k=1, candidates=[[str(answers[row])] for row in deeper])
        answer_scores[deeper] = single.scores[:, 0]
    fits = name_fits(index, list(words), found.entity_ids, SOME + 1)
    return ScoredMentions(scores, fits, places, answer_scores, len(index))


def some_of(entity_ids: Iterable[str]) -> list[str]:
    """A few of many ids, to know a knowledge base by."""
    every = list(entity_ids)
    return every[:: max(1, len(every) // _NOTED_IDS)][:_NOTED_IDS]


def _blocks(mentions: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    rows = iter(mentions)
    while block := list(itertools.islice(rows, _AT_ONCE)):
        yield block


def _answer_of(mention: Mapping[str, Any], index: EntityIndex) -> str | None:
    """The id of a mention's answer; `None` where it has none in the index."""
    if not isinstance(mention, Mapping) or "answer" not in mention:
        raise ValueError(
            "A mention to calibrate on must be a dict with `mention`, `text` and `answer`; one has no `answer`. Where "
            "the entity is not in the knowledge base, the answer is None."
        )
    answer = mention["answer"]
    return None if is_absent(answer) or answer not in index else entity_id_of(answer)


# --- Fitting ----------------------------------------------------------------------------------------------------------


def fit_calibration(
    scored: ScoredMentions,
    *,
    nil_rate: float | None = None,
    seed: int = 0,
    index: Mapping[str, Any] | None = None,
) -> Calibration:
    """The calibration of scored mentions; arguments and errors as of [`calibrate`].

    Args:
        scored: M mentions.
        index: what is noted of the knowledge base.
    """
    known = scored.known
    _check_mentions(scored, known)
    own = int((~known).sum())
    if nil_rate is None:
        nil_rate = own / len(scored) if own >= _ENOUGH_NIL else NIL_RATE
    nil_rate = proper_fraction("nil_rate", nil_rate)
    if nil_rate == 1:
        raise ValueError("`nil_rate` must be below 1: if no mention has an entity, there is nothing to link.")
    random = np.random.default_rng(seed)
    order = random.permutation(len(scored))
    fitted, kept = scored[order[: len(order) // 2]], scored[order[len(order) // 2 :]]
    calibration = _fit_lines(fitted, nil_rate, dict(index or {"entities": scored.count, "dtype": "", "ids": []}))
    rows, without = mixture(kept, nil_rate, random)
    outcomes = Outcomes.of(calibration, kept[rows].view(without))
    return Calibration(
        calibration.depth,
        calibration.nil_rate,
        calibration.evidence,
        calibration.lines,
        conformal_thresholds(outcomes.right),
        len(rows),
        calibration.index,
        {name: _short(value) for name, value in outcomes.figures().items()},
    )


def _check_mentions(scored: ScoredMentions, known: np.ndarray) -> None:
    if len(scored) < LEAST_MENTIONS:
        raise CalibrationError(
            f"{len(scored)} mentions are too few to calibrate on: at least {LEAST_MENTIONS} are needed, and a few "
            "hundred are better."
        )
    if not np.isfinite(scored.scores[:, 0]).all():
        row = int((~np.isfinite(scored.scores[:, 0])).argmax())
        raise CalibrationError(
            f"The scores of mention {row} (counted from 0) are not finite: nothing follows from them."
        )
    if not known.any():
        raise CalibrationError(
            f"None of the {len(scored)} answers is in the index. Are the mentions of the same data set, with the same "
            "ids?"
        )
    spread = np.nanmax(scored.scores, axis=1) - np.nanmin(scored.scores, axis=1)
    if not (spread > 0).any():
        raise CalibrationError(
            "The scores of each mention's entities are all equal: the model tells none from another, or the index has "
            "one entity."
        )
    right = scored.places[known] == 0
    if right.all() or not right.any():
        which = "all" if right.all() else "none"
        raise CalibrationError(
            f"The best entity is the right one for {which} of the {len(right)} mentions whose answer is in the index: "
            "nothing tells sure answers from unsure ones. Calibrate on more mentions, and on such as the model was not "
            "trained on."
        )


def _fit_lines(scored: ScoredMentions, nil_rate: float, index: dict[str, Any]) -> Calibration:
    """The three lines, without thresholds and figures."""
    known = scored.known
    inside = scored[known].view(np.zeros(int(known.sum()), dtype=bool))
    outside = scored if int((~known).sum()) < _MANY_NIL else scored[~known]
    outside_view = outside.view(np.ones(len(outside), dtype=bool))
    depth = inside.scores.shape[1]
    kinds = [evidence_of(view.scores, view.name_fits) for view in (inside, outside_view)]
    evidence = {}
    for name in kinds[0]:
        values = np.concatenate([kind[name] for kind in kinds])
        values = values[np.isfinite(values)]
        if len(values) and values.std() > 1e-6 * (1 + abs(values.mean())):  # what never changes tells nothing
            evidence[name] = _short(values.mean()), _short(values.std())
    empty = Calibration(max(depth, LEAST_DEPTH), _short(nil_rate), evidence, {}, index=index)
    here, gone = (_with_ones(empty.standardized(kind)) for kind in kinds)
    # Of both kinds as many as the rate says, and in all as many as there are mentions.
    count = len(scored)
    if nil_rate == 0:
        nil = np.zeros(here.shape[1])
        nil[0] = _NEVER
    else:
        weights = np.repeat([(1 - nil_rate) * count / len(here), nil_rate * count / len(gone)], [len(here), len(gone)])
        nil = _logistic(np.concatenate([here, gone]), np.repeat([0.0, 1.0], [len(here), len(gone)]), weights)
    below = inside.answer_scores < np.nanmin(inside.scores, axis=1)
    rest = _logistic(here, below.astype(np.float64), np.ones(len(here)))
    sharpness = _fit_sharpness(here[~below], inside.scores[~below], inside.answer_scores[~below])
    lines = {
        name: tuple(_short(value) for value in line) for name, line in zip(LINES, (nil, rest, sharpness), strict=True)
    }
    return Calibration(empty.depth, empty.nil_rate, evidence, lines, index=index)


def _with_ones(values: Array) -> Array:
    return np.concatenate([np.ones((len(values), 1)), values], axis=1)


def _logistic(inputs: Array, events: Array, weights: Array) -> Array:
    """Bias and weights of a logistic regression: maximum likelihood with a standard normal prior on each weight, and
    half an event and half of none at the mean, so that the bias stays finite."""
    prior = np.eye(inputs.shape[1])
    prior[0, 0] = 0.0
    mean = np.zeros((1, inputs.shape[1]))
    mean[0, 0] = 1.0
    inputs = np.concatenate([inputs, mean, mean])
    events, weights = np.append(events, [0.0, 1.0]), np.append(weights, [0.5, 0.5])

    def loss(line: Array) -> tuple[float, Array, Array]:
        logits = inputs @ line
        said = 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
        value = (weights * (np.logaddexp(0.0, logits) - events * logits)).sum() + line @ prior @ line / 2
        slope = inputs.T @ (weights * (said - events)) + prior @ line
        return float(value), slope, (inputs * (weights * said * (1 - said))[:, None]).T @ inputs + prior

    return _lowest(loss, np.zeros(inputs.shape[1]))


def _fit_sharpness(inputs: Array, scores: Array, answer_scores: Array) -> Array:
    """The line whose exponential the scores are multiplied with, by maximum likelihood of the answers in a softmax of
    each mention's scores, with a standard normal prior on each weight and on the bias."""
    prior = np.eye(inputs.shape[1])
    relative = np.where(np.isnan(scores), -np.inf, scores - scores[:, :1])
    finite = np.where(np.isfinite(relative), relative, 0.0)
    answers = answer_scores - scores[:, 0]

    def loss(line: Array) -> tuple[float, Array, Array]:
        factor = np.exp(np.clip(inputs @ line, -30, 30))
        terms = np.where(np.isfinite(relative), factor[:, None] * finite, -np.inf)
        log_sum = np.log(np.exp(terms).sum(axis=1))  # the best has the term 0
        said = np.exp(terms - log_sum[:, None])
        mean = (said * finite).sum(axis=1)
        spread = (said * (finite - mean[:, None]) ** 2).sum(axis=1)
        value = (log_sum - factor * answers).sum() + line @ prior @ line / 2
        slope = inputs.T @ (factor * (mean - answers)) + prior @ line
        # Without the term of the exponential's own curvature, which may be negative.
        return float(value), slope, (inputs * (factor**2 * spread)[:, None]).T @ inputs + prior

    return _lowest(loss, np.zeros(inputs.shape[1]))


def _lowest(loss: Callable[[Array], tuple[float, Array, Array]], line: Array) -> Array:
    """Where a loss with a positive curvature is lowest, by Newton's method with steps that are halved until they
    help."""
    value, slope, curvature = loss(line)
    for _ in range(100):
        step = np.linalg.solve(curvature, slope)
        share = 1.0
        while share > 1e-8:
            tried = line - share * step
            lower = loss(tried)
            if lower[0] < value:
                break
            share /= 2
        else:
            return line
        gain = value - lower[0]
        line, (value, slope, curvature) = tried, lower
        if gain < 1e-9 * (1 + abs(value)):
            break
    return line


def mixture(scored: ScoredMentions, nil_rate: float, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mentions drawn so that a share of them has no entity, as is to be expected of new ones.

    Returns:
        rows of mentions, each at most once, and for which of these the answer is taken out. Where too many have no
        entity of themselves, some are left out; where too few, answers are taken out.
    """
    known = scored.known
    own = float((~known).mean())
    if own > nil_rate:
        keep = nil_rate * known.sum() / max(1e-12, (1 - nil_rate) * (~known).sum())
        rows = (known | (random.random(len(known)) < keep)).nonzero()[0]
        return rows, np.zeros(len(rows), dtype=bool)
    take = (nil_rate - own) / (1 - own) if own < 1 else 0.0
    return np.arange(len(known)), known & (random.random(len(known)) < take)


def conformal_thresholds(right: np.ndarray) -> tuple[float, ...]:
    """For each whole percent the probability that an answer must reach; see [`Calibration.threshold`].

    Args:
        right: the probabilities of the right answers of n mentions.
    """
    ordered = np.sort(right)
    thresholds: list[float] = []
    for percent in range(1, 100):
        place = math.floor((len(ordered) + 1) * (100 - percent) / 100 + 1e-9)
        if place < 1:
            break
        # A little less, so that rounding leaves in what is there.
        value = _short(float(ordered[min(place, len(ordered)) - 1]) * (1 - 2e-6))
        thresholds.append(min(value, thresholds[-1]) if thresholds else value)
    return tuple(thresholds)


def _short(value: float) -> float:
    """Seven digits: a configuration is to be read."""
    return float(f"{float(value):.7g}")


__all__ = [
    "DEPTH",
    "LEAST_MENTIONS",
    "NIL_RATE",
    "ForgetCalibration",
    "calibrate",
    "calibration_report",
    "conformal_thresholds",
    "fit_calibration",
    "mixture",
    "scored_mentions",
    "scored_of",
    "some_of",
]

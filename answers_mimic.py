"""Answers of mentions: the entities that an index finds, re-ranked, or with probabilities and NIL among them.

This file stands between the index, which knows scores, and calibration_mimic.py, which knows only arrays.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from .calibration_mimic import NIL_NAME, SOME, Calibration, Probabilities, is_newer, name_fit
from .configuration_mimic import MimicConfig
from .errors_mimic import CalibrationError
from .index_mimic import EntityIndex
from .matching_mimic import MentionFeatures
from .mentions_mimic import Mention
from .names_mimic import names_of
from .rerank_mimic import Reranker, reranked
from .searchable_mimic import limited_by_name

# Below all scores, and above what a float32 cannot hold.
_LOWEST = -1e30
_HOW = (
    "Calibrate it on mentions with known answers: `mimic-el calibrate`, or mimic_el.training.calibrate(model, index, "
    "mentions, processor=processor)."
)


def answers_of(
    index: EntityIndex,
    calibration: Calibration | None,
    features: MentionFeatures,
    mentions: Sequence[Mention],
    top_k: int = 5,
    *,
    candidates: Sequence[str] | str | None = None,
    method: str = "pruned",
    reranker: Reranker | None = None,
    rerank_top_k: int = 10,
    min_probability: float | None = None,
    coverage: float | None = None,
) -> list[list[dict[str, Any]]]:
    """The answers of M mentions, best first.

    Args:
        index: the knowledge base.
        calibration: of the model, if it has one: then, and without a re-ranker, answers have probabilities.
        features: of the mentions.
        mentions: what they say, and perhaps candidates of their own.
        others: as of [`MultimodalEntityLinkingPipeline`].
    """
    allowed = [candidates if mention.candidates is None else mention.candidates for mention in mentions]
    words = [mention.mention for mention in mentions]
    if calibration is not None and reranker is None:
        return calibrated_links(
            index,
            calibration,
            features,
            words,
            top_k,
            candidates=allowed,
            method=method,
            min_probability=min_probability,
            coverage=coverage,
        )
    wanted = top_k if reranker is None else max(top_k, rerank_top_k)
    found = index.link_encoded(features, wanted, candidates=allowed, names=words, method=method)
    if reranker is None:
        return found
    return [
        reranked(reranker, mention, entities, rerank_top_k, top_k)
        for mention, entities in zip(mentions, found, strict=True)
    ]


def calibration_for(config: MimicConfig, index: EntityIndex, warn: bool = True) -> Calibration | None:
    """A model's calibration, to be used with an index; `None` where there is none that this code knows.

    Args:
        warn: whether to warn of a newer version, and of an index of another size or kind than it was made with.
    """
    block: Any = config.calibration
    if block is None:
        return None
    if is_newer(block):
        if warn:
            warnings.warn(
                f"The model's calibration has version {block['version']}, which this code does not know: answers have "
                "no probabilities. Use a newer mimic-el, or calibrate the model again.",
                stacklevel=2,
            )
        return None
    calibration = Calibration.from_dict(block)
    missing = sum(entity_id not in index for entity_id in calibration.index.get("ids", ()))
    unlike = calibration.unlike(len(index), index.dtype, missing)
    if warn and unlike is not None:
        warnings.warn(
            f"This is not the knowledge base that the model was calibrated with: {unlike}. Probabilities may be "
            "off. To correct them, calibrate the model with a few hundred mentions with known answers "
            "(mimic-el calibrate).",
            stacklevel=2,
        )
    return calibration


def needs_calibration(name: str, config: MimicConfig) -> CalibrationError:
    """The error of an option that needs probabilities, for a model that has none."""
    if config.calibration is not None:
        return CalibrationError(
            f"`{name}` needs a calibration that this code knows, and the model's is of a newer version. Use a newer "
            "mimic-el, or calibrate the model again."
        )
    return CalibrationError(f"`{name}` needs probabilities, and this model was not calibrated. {_HOW}")


def calibrated_links(
    index: EntityIndex,
    calibration: Calibration,
    mentions: MentionFeatures,
    words: Sequence[str],
    top_k: int = 5,
    *,
    candidates: Sequence[Any],
    method: str = "pruned",
    min_probability: float | None = None,
    coverage: float | None = None,
) -> list[list[dict[str, Any]]]:
    """As [`EntityIndex.link_encoded`], with probabilities, and with NIL in its place.

    How sure an answer is depends on all that it could be. So each mention is searched in the whole knowledge base, as
    deep as the calibration needs, whatever `top_k` and its candidates are. Candidates limit what is answered: their
    probabilities, and that of NIL, are those given that the answer is one of them or NIL.

    Args:
        index: the knowledge base.
        calibration: of the model.
        mentions: M mentions.
        words: what they say.
        top_k: number of answers for each mention, NIL counted.
        candidates: for each mention, as in [`EntityIndex.link`].
        method: as in [`EntityIndex.search`].
        min_probability: only answers that are at least so probable are given.
        coverage: in the place of the best `top_k`, the set that holds the right answer of so many mentions: see
            [`Calibration.threshold`].

    Returns:
        for each mention its answers, most probable first.
    """
    limits, named = limited_by_name(index.state, candidates, words)
    depth = min(max(calibration.depth, top_k), len(index))

    def link(rows: Sequence[int], k: int, allowed: Sequence[Any], **options: Any) -> list[list[dict[str, Any]]]:
        some = mentions[torch.tensor(rows, device=mentions.device)]
        return index.link_encoded(some, k, candidates=allowed, method=method, **options)

    limited = [row for row, ids in enumerate(limits) if ids is not None]
    # First, since a candidate may be unknown.
    among = link(limited, depth, [limits[row] for row in limited]) if limited else []
    linked = index.link_encoded(mentions, depth, method=method)
    said = _probabilities(index, calibration, linked, words)
    counts = np.full(len(linked), len(index))
    for row, entities in zip(limited, among, strict=True):
        linked[row], counts[row] = entities, len(_each_once(limits[row]))
    given = _given(said, _scores_of(linked), counts, limited, len(index) - depth)
    least = min_probability
    if coverage is not None:
        top_k, least = len(index) + 1, calibration.threshold(coverage)
        lowest = said.lowest_score(least * given)
        last = said.at(_scores_of([entities[-1:] for entities in linked]))[:, 0] / given
        for row, entities in enumerate(linked):
            # All that were found are in the set, so that there may be more.
            if 0 < len(entities) < counts[row] and last[row] >= least:
                # What rounding leaves in is left out again.
                floor = max(lowest[row] - 1e-6 * (1 + abs(lowest[row])), _LOWEST)
                one = mentions[torch.tensor([row], device=mentions.device)]
                better, equal = index.count_better(one, [floor], [None])
                most = max(1, int(better[0] + equal[0]))
                linked[row] = link([row], most, [limits[row]], min_score=floor)[0]
    if named:
        rows = list(named)
        for row, entities in zip(rows, link(rows, top_k, list(named.values())), strict=True):
            found = {entity["entity_id"] for entity in linked[row]}
            linked[row] = [*linked[row], *(entity for entity in entities if entity["entity_id"] not in found)]
            named[row] = {entity["entity_id"] for entity in entities}
    with np.errstate(divide="ignore", invalid="ignore"):
        every = said.at(_scores_of(linked)) / given[:, None]
        nil = np.where(given > 0, said.nil / given, 1.0)
    return [
        _answers(entities, every[row], float(nil[row]), top_k, least, named.get(row, ()))
        for row, entities in enumerate(linked)
    ]


def _each_once(candidates: Any) -> Any:
    return candidates if isinstance(candidates, torch.Tensor) else set(candidates)


def _given(
    said: Probabilities, scores: np.ndarray, counts: np.ndarray, limited: Sequence[int], below: int
) -> np.ndarray:
    """The probability that a mention's answer is NIL or a candidate, (M,); 1 where all entities are candidates.

    Args:
        scores: of the best candidates of each mention, (M, n); NaN where it has fewer.
        counts: the number of its candidates, (M,).
        limited: the rows of the mentions that have candidates of their own.
        below: the number of entities below the K-th, whose probabilities add up to `said.rest`.
    """
    given = np.ones(len(counts))
    known = ~np.isnan(scores)
    found, probabilities = known.sum(axis=1), np.where(known, said.at(scores), 0.0)
    for row in limited:
        # Of those that were not looked at none is more probable than the last one that was.
        left = int(counts[row] - found[row])
        unseen = min(left * said.rest[row] / max(1, below), left * probabilities[row, max(0, found[row] - 1)])
        given[row] = said.nil[row] + probabilities[row].sum() + unseen
    return given


def _scores_of(linked: Sequence[Sequence[dict[str, Any]]]) -> np.ndarray:
    """The scores of each mention's entities, (M, n); NaN where it has fewer than others."""
    scores = np.full((len(linked), max(1, max(map(len, linked), default=1))), np.nan)
    for row, entities in enumerate(linked):
        scores[row, : len(entities)] = [found["score"] for found in entities]
    return scores


def _probabilities(
    index: EntityIndex, calibration: Calibration, linked: Sequence[Sequence[dict[str, Any]]], words: Sequence[str]
) -> Probabilities:
    """Of the best entities of each mention, in the whole knowledge base."""
    ids = [[found["entity_id"] for found in entities[:SOME]] for entities in linked]
    return calibration.probabilities(_scores_of(linked), len(index), name_fits(index, words, ids))


def _answers(
    entities: Sequence[dict[str, Any]],
    probabilities: np.ndarray,
    nil: float,
    top_k: int,
    least: float | None,
    named: Collection[str],
) -> list[dict[str, Any]]:
    """Entities and NIL, most probable first: the best `top_k`, and those that are given for their name."""
    answers = [
        {**found, "probability": probability}
        for found, probability in zip(entities, probabilities.tolist(), strict=False)
    ]
    place = sum(answer["probability"] >= nil for answer in answers)
    answers.insert(place, {"entity_id": None, "name": NIL_NAME, "score": None, "probability": nil})
    answers = answers[:top_k] + [answer for answer in answers[top_k:] if answer["entity_id"] in named]
    return [answer for answer in answers if least is None or answer["probability"] >= least]


def name_fits(
    index: EntityIndex, words: Sequence[str], entity_ids: Sequence[Sequence[str]], some: int = SOME
) -> np.ndarray:
    """How well the names of the best entities of each mention fit its words, `(M, some)`; NaN where there is none."""
    fits = np.full((len(words), some), np.nan)
    wanted = list(dict.fromkeys(entity_id for ids in entity_ids for entity_id in ids[:some]))
    # In one go: the index may be on other machines.
    names = {
        entity_id: names_of(record)
        for entity_id, record in zip(wanted, index.state.records_of(wanted), strict=True)
        if record is not None  # it was removed since
    }
    for row, (mention, ids) in enumerate(zip(words, entity_ids, strict=True)):
        for place, entity_id in enumerate(ids[:some]):
            if entity_id in names:
                fits[row, place] = name_fit(mention, names[entity_id])
    return fits


__all__ = ["answers_of", "calibrated_links", "calibration_for", "name_fits", "needs_calibration"]

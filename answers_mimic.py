"""The answers of mentions: the entities that an index finds, re-ranked, or with probabilities and NIL among them.

Between the index, which knows scores, and calibration_mimic.py, which knows arrays.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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
            f"This is not the knowledge base that the model was calibrated with: {unlike}. Probabilities may be off; a "
            "few hundred mentions with known answers renew them (mimic-el calibrate).",
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

    Each mention is searched as deep as the calibration needs, whatever `top_k` is.

    Args:
        index: the knowledge base.
        calibration: of the model.
        mentions: M mentions.
        words: what they say.
        top_k: number of answers for each mention, NIL counted.
        candidates: for each mention, as in [`EntityIndex.link`]. Probabilities are then among them.
        method: as in [`EntityIndex.search`].
        min_probability: only answers that are at least so probable are given.
        coverage: in the place of the best `top_k`, the set that holds the right answer of so many mentions: see
            [`Calibration.threshold`].

    Returns:
        for each mention its answers, most probable first.
    """
    depth = min(max(calibration.depth, top_k), len(index))
    options: dict[str, Any] = {"method": method}
    linked = index.link_encoded(mentions, depth, candidates=candidates, names=words, **options)
    counts = np.array(
        [
            _number_of_candidates(given, len(found), depth, len(index))
            for given, found in zip(candidates, linked, strict=True)
        ]
    )
    said = _probabilities(index, calibration, linked, counts, words)
    least = min_probability
    if coverage is not None:
        top_k, least = len(index) + 1, calibration.threshold(coverage)
        lowest = said.lowest_score(least)
        for row, entities in enumerate(linked):
            # All that were found are in the set, so that there may be more.
            if len(entities) < counts[row] and said.entities[row, len(entities) - 1] >= least:
                one = mentions[torch.tensor([row], device=mentions.device)]
                # What rounding leaves in is left out again.
                options["min_score"] = max(lowest[row] - 1e-6 * (1 + abs(lowest[row])), _LOWEST)
                better, equal = index.count_better(one, [options["min_score"]], [None])
                most = max(1, int(better[0] + equal[0]))
                linked[row] = index.link_encoded(
                    one, most, candidates=[candidates[row]], names=[words[row]], **options
                )[0]
    width = max(map(len, linked), default=0)
    scores = np.array(
        [[found["score"] for found in entities] + [np.nan] * (width - len(entities)) for entities in linked]
    )
    every = said.at(scores.reshape(len(linked), width))
    return [
        _answers(entities, every[row], nil, top_k, least)
        for row, (entities, nil) in enumerate(zip(linked, said.nil.tolist(), strict=True))
    ]


def _number_of_candidates(given: Any, found: int, depth: int, entities: int) -> int:
    """Among how many entities a mention's best ones were chosen."""
    if isinstance(given, str):  # by name: these are few, or all of the knowledge base
        return found if found < depth else entities
    return entities if given is None else len(set(given))


def _probabilities(
    index: EntityIndex,
    calibration: Calibration,
    linked: Sequence[Sequence[dict[str, Any]]],
    counts: np.ndarray,
    words: Sequence[str],
) -> Probabilities:
    scores = np.full((len(linked), max(1, max(map(len, linked), default=1))), np.nan)
    for row, entities in enumerate(linked):
        scores[row, : len(entities)] = [found["score"] for found in entities]
    ids = [[found["entity_id"] for found in entities[:SOME]] for entities in linked]
    return calibration.probabilities(scores, counts, name_fits(index, words, ids))


def _answers(
    entities: Sequence[dict[str, Any]], probabilities: np.ndarray, nil: float, top_k: int, least: float | None
) -> list[dict[str, Any]]:
    """Entities and NIL, most probable first."""
    answers = [
        {**found, "probability": probability}
        for found, probability in zip(entities, probabilities.tolist(), strict=False)
    ]
    place = sum(answer["probability"] >= nil for answer in answers)
    answers.insert(place, {"entity_id": None, "name": NIL_NAME, "score": None, "probability": nil})
    return [answer for answer in answers[:top_k] if least is None or answer["probability"] >= least]


def name_fits(
    index: EntityIndex, words: Sequence[str], entity_ids: Sequence[Sequence[str]], some: int = SOME
) -> np.ndarray:
    """How well the names of the best entities of each mention fit its words, `(M, some)`; NaN where there is none."""
    fits = np.full((len(words), some), np.nan)
    for row, (mention, ids) in enumerate(zip(words, entity_ids, strict=True)):
        for place, entity_id in enumerate(ids[:some]):
            fits[row, place] = name_fit(mention, names_of(index.entity(entity_id)))
    return fits


__all__ = ["answers_of", "calibrated_links", "calibration_for", "name_fits", "needs_calibration"]

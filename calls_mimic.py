"""The options of a call of the pipeline, checked before any mention is read.

A wrong option must not look like a fault of each of the mentions. Knows no index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .answers_mimic import needs_calibration
from .calibration_mimic import Calibration, is_newer, proper_fraction
from .configuration_mimic import PIPELINE_TASK, MimicConfig, check_context_window
from .mentions_mimic import check_on_error
from .rerank_mimic import Reranker
from .search_mimic import METHODS
from .searchable_mimic import BY_NAME

# The arguments of a call.
_CALL = (
    *("top_k", "candidates", "method", "min_probability", "coverage", "context_window", "mention_detector"),
    *("reranker", "rerank_top_k", "on_error", "on_image_error"),
)


def checked_call(
    config: MimicConfig,
    *,
    top_k: int | None = None,
    candidates: Sequence[str] | str | None = None,
    method: str | None = None,
    min_probability: float | None = None,
    coverage: float | None = None,
    context_window: str | None = None,
    mention_detector: Any = None,
    on_error: str | None = None,
    on_image_error: str | None = None,
    reranker: Reranker | None = None,
    rerank_top_k: int | None = None,
    **unknown: Any,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The parameters of reading items, of linking mentions, and of answering; what is not said is left out.

    Args:
        config: the model's.
        others: as of [`MultimodalEntityLinkingPipeline`].

    Raises:
        TypeError, ValueError: if there is no such parameter, or one has no such value.
        CalibrationError: if probabilities are asked for, and the model has none.
    """
    if unknown:
        raise TypeError(
            f"The pipeline {PIPELINE_TASK} has no parameter {', '.join(sorted(unknown))}; it takes "
            f"{', '.join(_CALL[:-1])} and {_CALL[-1]}."
        )
    if isinstance(candidates, str) and candidates not in BY_NAME:
        raise ValueError(
            f"`candidates` must be a list of entity ids, got the string {candidates!r}. (By name they are "
            f"{' or '.join(map(repr, BY_NAME))}.)"
        )
    if candidates is not None and not isinstance(candidates, str):
        if not isinstance(candidates, Iterable):
            raise ValueError(f"`candidates` must be a list of entity ids, got {type(candidates).__name__}.")
        candidates = list(candidates)  # a generator can be read only once, and there may be several mentions
    for name, value in (("top_k", top_k), ("rerank_top_k", rerank_top_k)):
        if value is not None and (isinstance(value, bool | np.bool_) or not hasattr(value, "__index__") or value < 1):
            raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    if reranker is not None and not callable(reranker):
        raise TypeError(
            "`reranker` must be a callable that takes a mention and its entities and gives a score for each, got "
            f"{type(reranker).__name__}."
        )
    if method is not None and method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    _check_probabilities(config, min_probability, coverage, top_k, reranker)
    if context_window is not None:
        check_context_window(f"The pipeline {PIPELINE_TASK}", context_window)
    if on_error is not None:
        check_on_error(on_error)
    if on_image_error not in (None, "raise", "warn"):
        raise ValueError(f'`on_image_error` must be "raise" or "warn", got {on_image_error!r}.')
    reading = {"on_image_error": on_image_error, "keep_source": None if reranker is None else True}
    linking = {
        "top_k": top_k,
        "method": method,
        "candidates": candidates,
        "reranker": reranker,
        "rerank_top_k": rerank_top_k,
        "min_probability": min_probability,
        "coverage": coverage,
    }
    answering = {"context_window": context_window, "on_error": on_error, "detector": mention_detector}
    return _said(reading), _said(linking), _said(answering)


def _said(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


def _check_probabilities(
    config: MimicConfig, min_probability: Any, coverage: Any, top_k: int | None, reranker: Reranker | None
) -> None:
    """Makes sure that what was asked of probabilities can be done, whatever the mentions are."""
    if reranker is not None and (min_probability is not None or coverage is not None):
        raise ValueError(
            "`min_probability` and `coverage` are of the model's own answers: those of a `reranker` have no "
            "probabilities. Leave one of them out."
        )
    if min_probability is not None:
        proper_fraction("min_probability", min_probability)
    if coverage is not None:
        proper_fraction("coverage", coverage, ends=False)
        if top_k is not None:
            raise ValueError("`coverage` gives a set of the size that it takes: leave `top_k` out.")
    block: Any = config.calibration
    for name, value in (("min_probability", min_probability), ("coverage", coverage)):
        if value is not None and (block is None or is_newer(block)):
            raise needs_calibration(name, config)
    if coverage is not None:
        Calibration.from_dict(block).threshold(coverage)


__all__ = ["checked_call"]

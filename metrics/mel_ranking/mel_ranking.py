"""Ranking metrics of entity linking: Hits@k, mean reciprocal rank and mean rank, with the realistic rank for ties."""

import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
How well mentions are linked to entities: each mention's answer is ranked among its candidates (usually the whole
knowledge base) by score. Hits@k is the fraction of mentions whose answer is among the first k, MRR the mean of
1 / rank, and the mean rank is what it says. Where several candidates have the answer's score, its rank is the mean of
the best and the worst place among them (the realistic rank), so that a constant score earns nothing.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[float]]`): for each mention, the score of each of its candidates; higher is better. The
        numbers of candidates may differ.
    references (`list[int]`): for each mention, the position of its answer among its candidates; -1 where the answer
        is not among them.
    ranks (`list[float]`, *optional*): in place of `predictions` and `references`, the rank of each answer, from 1; NaN
        where the answer is not among the candidates. For knowledge bases whose scores nobody wants to hold at once.
    ks (`list[int]`, defaults to `[1, 3, 5, 10, 20]`): the k of Hits@k; one number or several.
    missing (`str`, defaults to `"exclude"`): what a mention whose answer is not among its candidates counts:
        `"exclude"`: nothing; it is only counted in `missing`. `"miss"`: no hit at any k, and a reciprocal rank of 0;
        the mean rank leaves it out, and is NaN if no answer is there. `"error"`: a `ValueError` is raised.

Returns:
    `dict[str, float]`: `hits@k` for each k, and `mrr`, between 0 and 1; `mean_rank`, from 1; `count`, the mentions that
    the figures are over; `missing`, the mentions whose answer is not among their candidates.

Raises:
    ValueError: if there is nothing to rank, a score is NaN, a reference is no position of a candidate, or a rank is
        below 1.

Examples:

    >>> mel_ranking = evaluate.load("metrics/mel_ranking")
    >>> mel_ranking.compute(predictions=[[0.9, 0.3, 0.5], [0.2, 0.2, 0.1]], references=[2, 0], ks=[1, 2])
    {'hits@1': 0.0, 'hits@2': 1.0, 'mrr': 0.5833333333333333, 'mean_rank': 1.75, 'count': 2, 'missing': 0}
    >>> mel_ranking.compute(ranks=[1, 4, float("nan")], ks=[1])
    {'hits@1': 0.5, 'mrr': 0.625, 'mean_rank': 2.5, 'count': 2, 'missing': 1}
"""

_CITATION = """
@inproceedings{luo2023mimic,
    title = {Multi-Grained Multimodal Interaction Network for Entity Linking},
    author = {Luo, Pengfei and Xu, Tong and Wu, Shiwei and Zhu, Chen and Xu, Linli and Chen, Enhong},
    booktitle = {Proceedings of the 29th ACM SIGKDD Conference on Knowledge Discovery and Data Mining},
    year = {2023},
    doi = {10.1145/3580305.3599439}
}
"""


def realistic_rank(scores, answer):
    """The rank, from 1, of the candidate at position `answer`: the mean of its best and worst place among equals.

    Args:
        scores: `(N,)` array of scores; higher is better.
        answer: position of the answer; -1 where it is not among the candidates, which gives NaN.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if answer == -1:
        return math.nan
    if not 0 <= answer < len(scores):
        raise ValueError(f"position {answer} of the answer, among {len(scores)} candidates (-1 says: not among them)")
    if np.isnan(scores).any():
        raise ValueError("a score is NaN, so nothing can be ranked by it")
    own = scores[answer]
    return 1 + np.count_nonzero(scores > own) + (np.count_nonzero(scores == own) - 1) / 2


def ranking_metrics(ranks, ks=(1, 3, 5, 10, 20), missing="exclude"):
    """The metrics of given ranks; see the module's description."""
    if missing not in ("exclude", "miss", "error"):
        raise ValueError(f'mel_ranking: `missing` must be "exclude", "miss" or "error", got {missing!r}.')
    given, ks = ks, list(ks) if np.iterable(ks) else [ks]
    if not ks or not all(hasattr(k, "__index__") and type(k).__name__ not in ("bool", "bool_") and k >= 1 for k in ks):
        raise ValueError(f"mel_ranking: `ks` must hold positive whole numbers, got {given!r}.")
    ranks = np.asarray(ranks, dtype=np.float64)
    if ranks.ndim != 1 or ranks.size == 0:
        raise ValueError(f"mel_ranking: there is nothing to rank: ranks of shape {ranks.shape}.")
    found = ranks[~np.isnan(ranks)]
    absent = ranks.size - found.size
    if absent and missing == "error":
        raise ValueError(f"mel_ranking: the answers of {absent} of {ranks.size} mentions are not among the candidates.")
    if found.size == 0 and missing != "miss":
        raise ValueError(f"mel_ranking: none of the {ranks.size} answers is among its candidates.")
    if (found < 1).any() or np.isinf(found).any():
        raise ValueError("mel_ranking: ranks must be finite and at least 1.")
    count = ranks.size if missing == "miss" else found.size
    metrics = {f"hits@{k}": float((found <= k).sum() / count) for k in ks}
    metrics["mrr"] = float((1 / found).sum() / count)
    metrics["mean_rank"] = float(found.mean()) if found.size else math.nan
    return {**metrics, "count": int(count), "missing": int(absent)}


class MelRanking(evaluate.Metric):
    """Ranking metrics of entity linking."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2307.09721"],
        )

    def compute(self, *, predictions=None, references=None, ranks=None, **kwargs):
        """Compute the metrics."""
        if ranks is None:
            return super().compute(predictions=predictions, references=references, **kwargs)
        if predictions is not None or references is not None:
            raise ValueError("mel_ranking: give either `ranks`, or `predictions` and `references`, not both.")
        return ranking_metrics(ranks, **kwargs)

    def _compute(self, predictions, references, ks=(1, 3, 5, 10, 20), missing="exclude"):
        ranks = []
        for row, (scores, answer) in enumerate(zip(predictions, references, strict=True)):
            try:
                ranks.append(realistic_rank(scores, answer))
            except ValueError as error:
                raise ValueError(f"mel_ranking: mention {row}: {error}.") from error
        return ranking_metrics(ranks, ks, missing)

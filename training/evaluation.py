"""Ranks the answers of mentions among a whole knowledge base, and computes the metrics. Knows no trainer."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EvalPrediction

from ..answers_mimic import calibration_for
from ..calibration_mimic import Calibration
from ..errors_mimic import CalibrationError
from ..files_mimic import write_atomically
from ..index_mimic import EntityIndex
from ..modeling_mimic import MentionFeatures, MimicModel
from ..records_mimic import entity_id_of, is_absent, undecoded
from ..snapshot_mimic import SearchResult
from .calibration import fit_calibration, scored_of, some_of
from .collator import MentionEntityCollator, field_of, length
from .reliability import ScoredMentions

HITS_AT = (1, 3, 5, 10, 20)


# Mentions whose features are held at once while they are ranked: some 30 kB each in the published model.
_MENTIONS_AT_ONCE = 8192


_METRIC = Path(__file__).parent.parent / "metrics" / "mel_ranking"


@functools.cache
def mel_ranking() -> evaluate.EvaluationModule:
    """The project's ranking metric, metrics/mel_ranking."""
    return evaluate.load(str(_METRIC), keep_in_memory=True)


@dataclass
class RankedMentions:
    """Mentions with the ranks of their answers in a knowledge base, in the order in which they came.

    Args:
        ids (`list[str]`): of the M mentions.
        answers (`list[str | None]`): ids of their entities; `None` where the data set says that there is none.
        kinds (`list[str]`, *optional*): the column `kind`, where the mentions have one.
        ranks (`numpy.ndarray` of shape `(M,)`, float64): from 1; NaN where the answer is not in the knowledge base.
        entities (`list[list[dict]]`, *optional*): the best entities, best first: `entity_id`, `name` and `score`, and
            `probability` where the model is calibrated.
        mentions, texts (`list[str]`): what is linked, and the text that it stands in.
        nil_probabilities (`list[float]`, *optional*): that the entity is not in the knowledge base, where the best
            entities are noted and the model is calibrated.
        scored ([`ScoredMentions`], *optional*): what a calibration is fitted on and measured with.
    """

    ids: list[str]
    answers: list[str | None]
    kinds: list[str] | None
    ranks: np.ndarray
    entities: list[list[dict[str, Any]]] | None = None
    mentions: list[str | None] = field(default_factory=list)
    texts: list[str | None] = field(default_factory=list)
    nil_probabilities: list[float] | None = None
    scored: ScoredMentions | None = None

    def metrics(self, missing: str = "exclude") -> dict[str, float]:
        """`hits@k` for k in 1, 3, 5, 10, 20, `mrr` and `mean_rank`; `mentions`, the number that they are over, and
        `missing_answers`, the mentions whose answer is not in the knowledge base. Where the mentions have kinds, also
        Hits@1, MRR and number of each kind, such as `KIND_mrr`.

        Args:
            missing: what a missing answer counts: see metrics/mel_ranking.
        """
        metrics = self._metrics(self.ranks, missing)
        for kind in sorted(set(self.kinds or [])):
            ranks = self.ranks[[own == kind for own in self.kinds or []]]
            if missing == "miss" or not np.isnan(ranks).all():
                own = self._metrics(ranks, missing)
                metrics |= {f"{kind}_{name}": own[name] for name in ("hits@1", "mrr", "mentions")}
        return metrics

    @staticmethod
    def _metrics(ranks: np.ndarray, missing: str) -> dict[str, float]:
        metrics = dict(mel_ranking().compute(ranks=ranks, ks=list(HITS_AT), missing=missing))
        count, absent = metrics.pop("count"), metrics.pop("missing")
        if math.isnan(metrics["mean_rank"]):  # no answer is in the knowledge base, and each counts as a miss
            del metrics["mean_rank"]
        return {**metrics, "mentions": count, "missing_answers": absent}

    def calibrate(self, model: MimicModel, index: EntityIndex, nil_rate: float | None = None) -> None:
        """Calibrates the model that they were ranked with, where their scores are noted in `scored`.

        Args:
            model, index: what ranked them.
            nil_rate: as of [`~mimic_el.training.calibrate`].

        Raises:
            CalibrationError: if these mentions cannot calibrate it.
        """
        if self.scored is None:
            raise CalibrationError("There are no mentions whose scores are noted.")
        known = (answer for answer, rank in zip(self.answers, self.ranks, strict=True) if answer and rank == rank)
        about = {"entities": len(index), "dtype": index.dtype, "ids": some_of(known)}
        model.config.calibration = fit_calibration(self.scored, nil_rate=nil_rate, index=about).to_dict()

    def records(self) -> Iterator[dict[str, Any]]:
        """For each mention a dict of `id`, `mention`, `text`, `answer`, `rank` (`None` where the answer is not in the
        knowledge base), `kind` where there is one, and `entities`, a list of `entity_id`, `name` and `score`. Where the
        model is calibrated, `nil_probability` too, and each entity's `probability`."""
        for row, (mention_id, answer) in enumerate(zip(self.ids, self.answers, strict=True)):
            rank = float(self.ranks[row])
            record: dict[str, Any] = {"id": mention_id}
            if self.mentions:
                record |= {"mention": self.mentions[row], "text": self.texts[row]}
            record |= {"answer": answer, "rank": None if math.isnan(rank) else rank}
            if self.kinds is not None:
                record["kind"] = self.kinds[row]
            if self.nil_probabilities is not None:
                record["nil_probability"] = round(self.nil_probabilities[row], 5)
            if self.entities is not None:
                record["entities"] = [
                    {name: round(value, 5) if isinstance(value, float) else value for name, value in found.items()}
                    for found in self.entities[row]
                ]
            yield record

    def write(self, path: Path) -> None:
        """Writes [`records`] as JSON Lines. The file is whole, or as it was before."""

        def write(temporary: Path) -> None:
            with open(temporary, "w", encoding="utf-8") as file:
                for record in self.records():
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")

        write_atomically(path, write)


def rank_mentions(
    model: MimicModel,
    collator: MentionEntityCollator,
    index: EntityIndex,
    mentions: Iterable[Mapping[str, Any]],
    *,
    top_k: int = 0,
    depth: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
    show_progress: bool = True,
) -> RankedMentions:
    """Ranks the answer of each mention among all entities of an index.

    Memory is bounded by the features of 8,192 mentions, the index's own needs, and the results.

    Args:
        model: made the index.
        collator: encodes the mentions; only its `encode_mentions` is used.
        index: the knowledge base.
        mentions: dicts with `mention`, `sentence`, `image`, `answer` and `id`, maybe `kind`; a data set or any
            iterable.
        top_k: how many of the best entities to note for each mention; with their probabilities, if the model is
            calibrated.
        depth: if not 0, of how many of the best entities `scored` is noted; the calibration's depth where that is more.
        batch_size, num_workers: of encoding.

    Raises:
        ValueError: if there are no mentions, or the model's features are not finite.
    """
    mentions = undecoded(mentions, "image")
    if not hasattr(mentions, "__getitem__") and not isinstance(mentions, torch.utils.data.IterableDataset):
        mentions = list(mentions)
    loader: DataLoader = DataLoader(
        mentions,  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=functools.partial(encoded_and_named, collator),
    )
    results = RankedMentions([], [], [], np.empty(0), [] if top_k else None)
    config: Any = model.config
    calibration = calibration_for(config, index) if top_k else None
    if calibration is not None:
        results.nil_probabilities = []
        depth = max(depth, calibration.depth)
    ranks: list[np.ndarray] = []
    scored: list[ScoredMentions] = []
    features: list[MentionFeatures] = []
    waiting: list[str | None] = []

    def rank_waiting() -> None:
        joined = MentionFeatures.cat(features)
        ranks.append(index.rank(joined, waiting, show_progress=show_progress).ranks)
        words = [str(mention) for mention in results.mentions[len(results.answers) :]]
        results.answers += waiting
        if not top_k and not depth:
            return
        found = index.search(joined, top_k=min(max(top_k, depth + 1), len(index)), show_progress=show_progress)
        if depth:
            scored.append(scored_of(index, joined, found, words, waiting, depth))
        _note_entities(index, found, top_k, scored[-1] if scored else None, calibration, results)

    was_training = model.training
    model.eval()
    total = length(mentions)
    try:
        with torch.inference_mode(), tqdm(total=total, desc="Encoding mentions", disable=not show_progress) as bar:
            for inputs, named in loader:
                features.append(finite_features(model, inputs))
                waiting += named["answer"]
                results.ids += named["id"]
                results.kinds += named["kind"]
                results.mentions += named["mention"]
                results.texts += named["text"]
                if len(waiting) >= _MENTIONS_AT_ONCE:
                    rank_waiting()
                    features.clear()
                    waiting.clear()
                bar.update(len(named["id"]))
            if waiting:
                rank_waiting()
    finally:
        model.train(was_training)
    if not ranks:
        raise ValueError("There are no mentions to rank.")
    results.ranks = np.concatenate(ranks)
    results.scored = ScoredMentions.cat(scored) if scored else None
    if all(kind is None for kind in results.kinds or []):
        results.kinds = None
    return results


def finite_features(model: MimicModel, inputs: Mapping[str, Tensor]) -> MentionFeatures:
    """Features of mentions, on the model's device, where ranking is done.

    Raises:
        ValueError: if they are not finite.
    """
    encoded = model.encode_mentions(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
    if not all(tensor.isfinite().all() for tensor in encoded.tensors.values()):
        raise ValueError(
            "The model's features of mentions are not finite: training has diverged. Try a smaller learning rate."
        )
    return encoded


def encoded_and_named(
    collator: MentionEntityCollator, mentions: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """What the model encodes of some mentions, and their `id`, `answer`, `kind`, `mention` and `text`."""
    named = {name: [mention.get(name) for mention in mentions] for name in ("id", "kind")}
    answers = [field_of(mention, "answer") for mention in mentions]
    named["answer"] = [
        None if is_absent(answer) else entity_id_of(answer, f"The answer of mention {mention_id!r}")
        for mention_id, answer in zip(named["id"], answers, strict=True)
    ]
    named["mention"] = [field_of(mention, "mention") for mention in mentions]
    named["text"] = [field_of(mention, "sentence") for mention in mentions]
    return collator.encode_mentions(mentions), named


def _note_entities(
    index: EntityIndex,
    found: SearchResult,
    top_k: int,
    scored: ScoredMentions | None,
    calibration: Calibration | None,
    results: RankedMentions,
) -> None:
    if results.entities is None:
        return
    probabilities = None
    if calibration is not None and scored is not None and results.nil_probabilities is not None:
        width = max(top_k, calibration.depth)
        said = calibration.probabilities(found.scores[:, :width], scored.count, scored.name_fits)
        results.nil_probabilities += said.nil.tolist()
        probabilities = said.entities
    for row, (entity_ids, scores) in enumerate(zip(found.entity_ids, found.scores, strict=True)):
        noted = []
        for place, entity_id in enumerate(entity_ids[:top_k]):
            entity = {"entity_id": entity_id, "name": index.entity(entity_id)["name"], "score": float(scores[place])}
            if probabilities is not None:
                entity["probability"] = float(probabilities[row, place])
            noted.append(entity)
        results.entities.append(noted)


def in_batch_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for a plain `Trainer`: each mention's answer among the entities of its batch.

    The metrics are those of `mel_ranking`. They tell whether training works; they are not figures for a paper, for
    which the answer is ranked among the whole knowledge base, as [`MimicTrainer`] does.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    labels = prediction.label_ids[0] if isinstance(prediction.label_ids, tuple) else prediction.label_ids
    # The Trainer pads the rows of smaller batches with -100.
    scores = np.where(logits == -100, -np.inf, logits.astype(np.float64))
    return dict(mel_ranking().compute(predictions=scores, references=labels, ks=list(HITS_AT)))

"""How well probabilities are kept: `python benchmarks/calibration.py --data_dir DATA`, then with `--table`.

A small text model is trained, once, on the sentences of MELBench (its archives in `--data_dir`): for 3,000 entities
that have several sentences, one sentence each is held out as a mention, and another describes the entity. With
`--checkpoint`, a trained checkpoint with its index, such as `make demo` leaves, is measured on the sample data set.

For each of three seeds, 1,000 of the held out mentions are drawn to calibrate on, and the others test (the sample has
splits of its own). A share of all mentions' answers (0, 20 and 50%) is taken out of the knowledge base, the model is
calibrated against that knowledge base, told that share, and measured. All mentions are searched once, deep enough that
what is taken out can be left out of what was found: the best that are left are those of the smaller knowledge base.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_data
import numpy as np
import torch

from mimic_el import EntityIndex, MimicConfig, MimicModel, MimicProcessor
from mimic_el.calibration_mimic import SOME, Calibration, name_fit
from mimic_el.mentions_mimic import encoded_mentions
from mimic_el.names_mimic import names_of
from mimic_el.training.calibration import DEPTH, fit_calibration
from mimic_el.training.model_card import draw_reliability
from mimic_el.training.reliability import (
    COVERAGES,
    CalibrationReport,
    Outcomes,
    ScoredMentions,
    accuracy_kept,
    best_f1,
    precision_recall_f1,
    roc_area,
)
from mimic_el.training.start import train_tokenizer

SHARES = (0.0, 0.2, 0.5)
SEEDS = (0, 1, 2)
TRAIN_SEED = 0
SET_ASIDE = (0.0, 0.1, 0.3, 0.5)
MENTIONS, CALIBRATION_MENTIONS = 3000, 1000
# How deep mentions are searched, of a knowledge base that is large; and for how many of them sets are made.
DEEPER, LARGE = 160, 1000
SETS = 300
ROWS = {
    "nil": "share of mentions without an entity",
    "accuracy": "accuracy, NIL among the answers",
    "ece_best_before": "ECE of the best entity, softmax of the scores",
    "ece_best": "ECE of the best entity, calibrated",
    "ece": "ECE of the answer given, calibrated",
    "ece_of_chance": "ECE that chance makes of perfect probabilities",
    "brier_best_before": "Brier score of the best entity, softmax of the scores",
    "brier_best": "Brier score of the best entity, calibrated",
    "brier": "Brier score of the answer given, calibrated",
    "right_score": "area, best entity right or wrong: raw score",
    "right_lead": "area, best entity right or wrong: margin",
    "right": "area, best entity right or wrong: probability",
    "nil_score": "area, NIL or not: raw score",
    "nil_lead": "area, NIL or not: margin",
    "auc_nil": "area, NIL or not: p(NIL)",
    "f1_score": "NIL F1: best threshold on the raw score",
    "f1_lead": "NIL F1: best threshold on the margin",
    "f1_nil": "NIL F1: best threshold on p(NIL)",
    "nil_precision": "NIL precision of the answers given",
    "nil_recall": "NIL recall of the answers given",
    "nil_f1": "NIL F1 of the answers given",
    **{f"coverage_{p}": f"sets for {p}%: covered" for p in COVERAGES},
    **{f"size_{p}": f"sets for {p}%: mean size" for p in COVERAGES},
    **{f"median_{p}": f"sets for {p}%: median size" for p in COVERAGES},
    **{f"kept_{s:.0%}": f"accuracy, least sure {s:.0%} set aside" for s in SET_ASIDE[1:]},
    "below": f"answers below the best {DEPTH}",
    "rest": "the same, as the calibration has it",
    "most_rest": "the bound of it",
    "slower": f"time of a search for {DEPTH} + 1, in those for 5",
}


# --- Real text --------------------------------------------------------------------------------------------------------


class Text:
    """Entities and mentions of MELBench.

    Every entity has a name and one sentence as its description. Of some with several sentences one is held out.
    """

    def __init__(self, data_dir: Path, seed: int) -> None:
        self.random = random.Random(seed)
        records = sorted(set(bench_data.read_records(data_dir)))
        sentences: dict[str, set[str]] = defaultdict(set)
        of_entity: dict[str, list[tuple[str, str, str, str]]] = defaultdict(list)
        for record in records:
            sentences[record[0]].add(record[3])
            of_entity[record[0]].append(record)
        self.sentences = {entity: sorted(texts) for entity, texts in sentences.items()}
        several = [entity for entity, texts in self.sentences.items() if len(texts) > 1]
        self.random.shuffle(several)
        chosen = several[:MENTIONS]
        self.held = {entity: self.random.choice(self.sentences[entity]) for entity in chosen}
        self.entities = [
            {
                "id": entity,
                "name": of_entity[entity][0][1],
                "description": self.random.choice([text for text in texts if text != self.held.get(entity)]),
                "images": None,
            }
            for entity, texts in self.sentences.items()
        ]
        held = [next(record for record in of_entity[entity] if record[3] == self.held[entity]) for entity in chosen]
        self.mentions = [{"mention": r[2], "text": r[3], "answer": r[0]} for r in held]
        self.train = [record for record in records if record[3] != self.held.get(record[0])]

    def _other(self, entity: str, but: str) -> str:
        """Another sentence about the entity that is not held out, or half of the words of its only one."""
        known = [text for text in self.sentences[entity] if text not in (but, self.held.get(entity))]
        if known:
            return self.random.choice(known)
        return " ".join(word for word in but.split() if self.random.random() < 0.5)

    def batch(self, processor: MimicProcessor, count: int) -> dict[str, Any]:
        """A batch for training."""
        records = self.random.sample(self.train, count)
        nothing = [None] * count
        mentions = processor.process_mentions([r[2] for r in records], [r[3] for r in records], nothing)
        entities = processor.process_entities(
            [r[1] for r in records], [self._other(r[0], r[3]) for r in records], nothing
        )
        return dict(mentions) | {f"entity_{name}": tensor for name, tensor in entities.items()}


def train(text: Text, place: Path, seed: int, steps: int) -> None:
    """Trains a small model on the text and encodes its knowledge base."""
    tokenizer = train_tokenizer([part for record in text.train for part in record[1:]], 8192)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(seed)
    common = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 192, "intermediate_size": 384}
    # Mentions and entities have no images, so that the image encoder is next to nothing.
    nothing = {**common, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = MimicConfig(
        backbone_config={
            "text_config": {**common, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 40},
            "vision_config": {**nothing, "image_size": 16, "patch_size": 8},
            "projection_dim": 512,
        }
    )
    model = MimicModel(config).train()
    processor = MimicProcessor(MimicProcessor.image_processor_for(config.backbone_config), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=1e-4)
    for step in range(steps):
        batch = text.batch(processor, 48)
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min(1.0, (step + 1) / 50, 1.05 - step / steps)
        output = model(**batch, return_loss=True)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {float(output.loss.detach()):.2f}", flush=True)
    processor.save_pretrained(place)
    model.eval().save_pretrained(place)


# --- Measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """M mentions, and what a search of the whole knowledge base found.

    Args:
        mentions: their words and answers.
        features: of them.
        entity_ids: the best entities of each.
        scores: theirs, (M, n).
        answer_scores: the scores of the answers.
        slower: the time of a search for as many as a calibration needs, in times of one for 5.
    """

    mentions: list[dict[str, Any]]
    features: Any
    entity_ids: list[list[str]]
    scores: np.ndarray
    answer_scores: np.ndarray
    slower: float


def search(model: MimicModel, processor: MimicProcessor, index: EntityIndex, mentions: list[dict[str, Any]]) -> Found:
    """Searches for all mentions, deeper than a calibration needs."""
    features: Any = encoded_mentions(model, processor, mentions, 64).features
    some, seconds = features[torch.arange(min(300, len(mentions)))], []
    for top_k in (5, 5, DEPTH + 1):  # the first warms up
        start = time.perf_counter()
        index.search(some, top_k=min(top_k, len(index)))
        seconds.append(time.perf_counter() - start)
    found = index.search(features, top_k=DEEPER if len(index) > LARGE else len(index))
    single = index.search(features, top_k=1, candidates=[[mention["answer"]] for mention in mentions])
    return Found(mentions, features, found.entity_ids, found.scores, single.scores[:, 0], seconds[2] / seconds[1])


def scored_without(found: Found, index: EntityIndex, taken_out: set[str]) -> ScoredMentions:
    """What a search of the knowledge base without some entities would have found."""
    count = len(found.mentions)
    left = len(index) - len(taken_out)
    scores, fits = np.full((count, DEPTH + 1), np.nan), np.full((count, SOME + 1), np.nan)
    places = np.full(count, -1)
    answer_scores = found.answer_scores.astype(np.float64)
    for row, (mention, ids) in enumerate(zip(found.mentions, found.entity_ids, strict=True)):
        kept = [place for place, entity_id in enumerate(ids) if entity_id not in taken_out][: DEPTH + 1]
        if len(kept) < min(DEPTH + 1, left):
            raise ValueError(f"Of the {len(ids)} entities found for mention {row} too many are taken out.")
        scores[row, : len(kept)] = found.scores[row, kept]
        for place, own in enumerate(kept[: SOME + 1]):
            fits[row, place] = name_fit(mention["mention"], names_of(index.entity(ids[own])))
        if mention["answer"] in taken_out:
            answer_scores[row] = np.nan
        else:
            places[row] = next((place for place, own in enumerate(kept) if ids[own] == mention["answer"]), -1)
    return ScoredMentions(scores, fits, places, answer_scores, left)


def measure(
    found: Found,
    index: EntityIndex,
    fitted: np.ndarray,
    tested: np.ndarray,
    share: float,
    seed: int,
    work_dir: Path,
    name: str,
) -> dict[str, float]:
    """The figures of one knowledge base, out of which that share of the answers was taken."""
    distinct = sorted({mention["answer"] for mention in found.mentions})
    taken_out = set(random.Random(seed).sample(distinct, round(share * len(distinct))))
    every = scored_without(found, index, taken_out)
    known, scored = every[fitted], every[tested]
    about = {"entities": every.count, "dtype": index.dtype, "ids": []}
    calibration = fit_calibration(known, nil_rate=share, seed=seed, index=about)
    outcomes = as_they_are(calibration, scored)
    report = CalibrationReport.of(calibration, outcomes)
    draw_reliability(report, work_dir / f"{name}-{share:.0%}.png")
    figures = dict(report.figures)
    figures["right_score"] = roc_area(outcomes.score, outcomes.best_right)
    figures["right_lead"] = roc_area(outcomes.lead, outcomes.best_right)
    figures["right"] = roc_area(outcomes.best, outcomes.best_right)
    if share:
        figures["nil_score"] = roc_area(-outcomes.score, outcomes.is_nil)
        figures["nil_lead"] = roc_area(-outcomes.lead, outcomes.is_nil)
        # The threshold of each is the best one for the mentions that the model was calibrated on.
        before = as_they_are(calibration, known)
        for signal, sign in (("score", 1), ("lead", 1), ("nil", -1)):
            _, threshold = best_f1(sign * getattr(before, signal), before.is_nil)
            said = sign * getattr(outcomes, signal) <= threshold
            figures[f"f1_{signal}"] = precision_recall_f1(said, outcomes.is_nil)[2]
    for part, accuracy in zip(SET_ASIDE, accuracy_kept(outcomes.sure, outcomes.correct, SET_ASIDE), strict=True):
        figures[f"kept_{part:.0%}"] = accuracy
    probabilities = scored.view(np.zeros(len(scored), dtype=bool)).probabilities(calibration)
    figures["below"] = float((scored.answer_scores < np.nanmin(scored.scores[:, :DEPTH], axis=1)).mean())
    figures["rest"], figures["most_rest"] = float(probabilities.rest.mean()), float(probabilities.most_rest.mean())
    figures["slower"] = found.slower
    rows = tested[:SETS]
    smaller = without(index, taken_out, work_dir / "smaller")
    return figures | sets(found.features[torch.from_numpy(rows)], smaller, calibration, every[rows])


def as_they_are(calibration: Calibration, scored: ScoredMentions) -> Outcomes:
    """What a calibration says of mentions, no further answer taken out."""
    return Outcomes.of(calibration, scored.view(np.zeros(len(scored), dtype=bool)))


def without(index: EntityIndex, taken_out: set[str], place: Path) -> EntityIndex:
    """A copy of the index without some entities."""
    shutil.rmtree(place, ignore_errors=True)
    index.save_pretrained(place)
    smaller = EntityIndex.from_pretrained(place)
    if taken_out:
        smaller.remove(sorted(taken_out))
    return smaller


def sets(features: Any, index: EntityIndex, calibration: Calibration, scored: ScoredMentions) -> dict[str, float]:
    """Sizes of the sets for each coverage, NIL counted."""
    found = scored.view(np.zeros(len(scored), dtype=bool)).probabilities(calibration)
    figures: dict[str, float] = {}
    for percent in COVERAGES:
        threshold = calibration.threshold(percent / 100)
        sizes = (found.entities >= threshold).sum(axis=1).astype(np.float64)
        # All of the best K are in the set: there may be more.
        more = ((sizes == DEPTH) & (sizes < len(index))).nonzero()[0]
        if len(more):
            lowest = np.maximum(found.lowest_score(threshold)[more], -1e30)
            better, equal = index.count_better(features[torch.from_numpy(more)], lowest, [None] * len(more))
            sizes[more] = better + equal
        sizes += found.nil >= threshold
        figures[f"size_{percent}"], figures[f"median_{percent}"] = float(sizes.mean()), float(np.median(sizes))
    return figures


def table(results: list[dict[str, dict[str, float]]]) -> str:
    """The figures of several seeds: the mean, and the least and the greatest."""
    lines = ["| | " + " | ".join(f"{share:.0%} taken out" for share in SHARES) + " |"]
    lines.append("| --- |" + " ---: |" * len(SHARES))
    for name, label in ROWS.items():
        cells = []
        for share in SHARES:
            values = [result[str(share)][name] for result in results if name in result[str(share)]]
            digits = 1 if name.startswith(("size", "median", "slower")) else 3
            few = [f"{value:.{digits}f}" for value in (np.mean(values), min(values), max(values))] if values else []
            cells.append(f"{few[0]} ({few[1]} to {few[2]})" if few else "")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Trains and measures, or prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_dir", type=Path, help="folder with Wikidata-MEL.zip and Richpedia-MEL.zip of MELBench")
    parser.add_argument("--checkpoint", type=Path, help="in its place a checkpoint, measured on the sample data set")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/calibration"), help="where all is kept")
    parser.add_argument("--train_steps", type=int, default=450)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only_train", action="store_true", help="train and encode, and measure in another call")
    parser.add_argument("--table", action="store_true", help="print what was measured")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = "sample" if args.checkpoint else "text"
    results_file = args.work_dir / f"{name}.json"
    if args.table:
        results = json.loads(results_file.read_text())
        print(f"{len(results)} seeds. {bench_data.machine()}\n\n{table(results)}")
        return
    args.work_dir.mkdir(parents=True, exist_ok=True)
    place = args.checkpoint or args.work_dir / "text"
    if args.checkpoint:
        from datasets import load_dataset

        sample = str(Path(__file__).resolve().parent.parent / "datasets_scripts" / "sample")
        parts = [list(load_dataset(sample, "mentions", split=split)) for split in ("validation", "test")]
        mentions, first = [*parts[0], *parts[1]], len(parts[0])
    else:
        text = Text(args.data_dir, TRAIN_SEED)
        mentions, first = text.mentions, CALIBRATION_MENTIONS
        if not (place / "config.json").exists():
            train(text, place, TRAIN_SEED, args.train_steps)
    model = MimicModel.from_pretrained(place).eval()
    processor = MimicProcessor.from_pretrained(place)
    if not (place / "index" / "index_config.json").exists():
        EntityIndex.build(model, processor, text.entities, place / "index", batch_size=256, show_progress=False)
    if args.only_train:
        return
    index = EntityIndex.from_pretrained(place / "index")
    found = search(model, processor, index, mentions)
    results = []
    for seed in SEEDS:
        order = np.arange(len(mentions)) if args.checkpoint else np.random.default_rng(seed).permutation(len(mentions))
        figures = {}
        for share in SHARES:
            fitted, tested = order[:first], order[first:]
            figures[str(share)] = measure(found, index, fitted, tested, share, seed, args.work_dir, f"{name}-{seed}")
            print(f"seed {seed}, {share:.0%}: ECE {figures[str(share)]['ece']:.3f}", flush=True)
        results.append(figures)
        results_file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

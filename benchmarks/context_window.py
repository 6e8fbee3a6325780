"""What reading around the mention is worth: `python benchmarks/context_window.py --data_dir FOLDER`.

Trains two models on the real sentences of the MELBench archives, text alone, from the same weights, on the same
batches: one reads a sentence from its start, as published, the other around the mention (`context_window`). Each ranks
the answers of mentions that it was not trained on, among the same entities; an entity is described by another sentence
about it, or by half of the words of its only one. The sentences that are longer than the 40 tokens are ranked apart:
for the others both read the same. MELBench's texts are single sentences; so each is then put in the middle of a
paragraph, between two real sentences before it and two behind it, as a user's document would have it, and the same
models rank those.

Prints Hits@1 and MRR in percent as a Markdown table, and leaves the models in `--work_dir`, for benchmarks/names.py.
Takes about six minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import Any

import torch
from bench_data import World, machine, new_model, parser, read_records
from tqdm.auto import tqdm

from mimic_el import EntityIndex, KnowledgeBase, MentionEntityCollator, MimicModel, MimicProcessor, rank_mentions
from mimic_el.configuration_mimic import CONTEXT_WINDOWS

Record = tuple[str, str, str, str]


def mention_of(number: int, record: Record, around: Sequence[str] = ("", "")) -> dict[str, Any]:
    """A mention as training takes it, its sentence perhaps with text before and behind it."""
    answer, _, mention, sentence = record
    before, behind = around
    text = f"{before}{sentence}{behind}"
    place = sentence.find(mention)
    known = {"start": len(before) + place, "end": len(before) + place + len(mention)} if place >= 0 else {}
    return {"id": str(number), "answer": answer, "mention": mention, "sentence": text, "image": None, **known}


def paragraphs(records: Sequence[Record], source: Sequence[Record], seed: int) -> list[dict[str, Any]]:
    """Mentions in the middle of paragraphs of five real sentences."""
    draw = random.Random(seed)
    made = []
    for number, record in enumerate(records):
        one, two, three, four = (draw.choice(source)[3] for _ in range(4))
        made.append(mention_of(number, record, (f"{one} {two} ", f" {three} {four}")))
    return made


def entities_of(world: World, ids: Sequence[str]) -> list[dict[str, Any]]:
    return [{"id": one, "name": world.names[one], "description": world.description(one), "images": []} for one in ids]


def train(
    model: MimicModel,
    processor: MimicProcessor,
    batches: Sequence[tuple[list[Record], list[dict[str, Any]]]],
    window: str,
) -> None:
    """Trains on batches of records and their entities."""
    model.config.context_window = processor.context_window = window
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=1e-4)
    steps = len(batches)
    with tqdm(batches, desc=f"Training, {window}", unit=" steps") as bar:
        for step, (records, entities) in enumerate(bar):
            collator = MentionEntityCollator(processor, KnowledgeBase(entities))
            batch = collator([mention_of(number, record) for number, record in enumerate(records)])
            for group in optimizer.param_groups:
                group["lr"] = 5e-4 * min(1.0, (step + 1) / 50, 1.05 - step / steps)
            output = model(**{k: v for k, v in batch.items() if not k.endswith("labels")}, return_loss=True)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar.set_postfix(loss=f"{float(output.loss):.2f}")
    model.eval()


def one_each(records: Sequence[Record], count: int, draw: random.Random) -> list[Record]:
    """Some records, no two of one entity."""
    chosen: dict[str, Record] = {}
    while len(chosen) < count:
        record = draw.choice(records)
        chosen.setdefault(record[0], record)
    return list(chosen.values())


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--batch_size", type=int, default=24)
    arguments.add_argument("--mentions", type=int, default=800, help="test mentions of each kind, at most")
    arguments.add_argument("--entities", type=int, default=3000)
    arguments.set_defaults(train_steps=200)
    args: argparse.Namespace = arguments.parse_args()
    torch.set_num_threads(args.threads)
    world = World(read_records(args.data_dir))
    model, processor = new_model([text for record in world.train for text in record[1:]])
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def length(record: Record) -> int:
        return len(processor.tokenizer(f"{record[2]}{processor.separator}{record[3]}")["input_ids"])

    cut = [record for record in world.test if len(record[3]) > 80 and length(record) > processor.text_max_length]
    share = len(cut) / len(world.test)
    hidden = 0
    for record in cut:  # of how many the mention itself is behind what is read from the start
        place = record[3].find(record[2])
        hidden += place > 0 and length((*record[:3], record[3][:place])) >= processor.text_max_length
    everything, cut = world.test[: args.mentions], cut[: args.mentions]
    asked = [*everything, *cut]
    ids = list(dict.fromkeys(record[0] for record in asked))
    others = sorted(set(world.names) - set(ids))
    ids += random.Random(1).sample(others, max(0, min(args.entities - len(ids), len(others))))
    knowledge = entities_of(world, ids)
    draw = random.Random(2)
    batches = []
    for _ in range(args.train_steps):
        records = one_each(world.train, args.batch_size, draw)
        entities = [
            {"id": r[0], "name": r[1], "description": world.description(r[0], but=r[3]), "images": []} for r in records
        ]
        batches.append((records, entities))
    sets = {
        "sentences": [mention_of(number, record) for number, record in enumerate(everything)],
        "sentences that are cut": [mention_of(number, record) for number, record in enumerate(cut)],
        "paragraphs": paragraphs(everything, world.test, 3),
    }
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for window in CONTEXT_WINDOWS:
        model.load_state_dict(start)
        train(model, processor, batches, window)
        model.save_pretrained(args.work_dir / f"text-{window}")
        processor.save_pretrained(args.work_dir / f"text-{window}")
        index = EntityIndex.build(model, processor, knowledge, dtype="float32", show_progress=False)
        collator = MentionEntityCollator(processor, KnowledgeBase(knowledge))
        for name, mentions in sets.items():
            ranked = rank_mentions(model, collator, index, mentions, show_progress=False)
            figures.setdefault(name, {})[window] = ranked.metrics()

    print(f"\n{machine()}; {args.train_steps} steps of {args.batch_size}, ranked among {len(ids):,} entities")
    print(
        f"Of the test mentions {share:.1%} stand in a sentence that is cut; of {hidden} of these the mention is too.\n"
    )
    print("| read | mentions | Hits@1, from the start | Hits@1, around the mention | MRR, start | MRR, around |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, of in figures.items():
        one, other = (of[window] for window in CONTEXT_WINDOWS)
        cells = [f"{100 * metrics[key]:.1f}" for key in ("hits@1", "mrr") for metrics in (one, other)]
        print(f"| {name} | {len(sets[name]):,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

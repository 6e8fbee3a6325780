"""What names are worth: `python benchmarks/names.py --data_dir FOLDER --sample_model runs/demo`.

- `detector`: how well the names of the knowledge base find the mentions of MELBench's real sentences. Right are the
  mentions that their authors marked; a sentence has other names besides, so that precision is a lower bound.
- `speed`: a table of 10^6 names, opened and looked for in a text of 1,000 words (times of the processor), beside a dict
  of the same names that is asked for every part of the text.
- `sample`, `text`: `candidates="names"` and `"names+search"` beside the search of all: Hits@1, whether the answer is
  among the candidates, and time; on the sample's test mentions with the demo's model (`--sample_model`), and on
  MELBench's text with the model that benchmarks/context_window.py leaves in `--work_dir`.

Prints Markdown.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_data import World, machine, parser, read_records
from context_window import entities_of, mention_of

from mimic_el import EntityIndex, MimicModel, MimicProcessor
from mimic_el.mentions_mimic import encoded_mentions
from mimic_el.names_mimic import NameTable
from mimic_el.spans_mimic import fold, folded_name, place_of

PARTS = ("detector", "speed", "sample", "text")
TOP_K = 10


def seconds(call: Callable[[], Any], times: int = 5) -> tuple[float, Any]:
    """The shortest of some times of the processor, and the result; others may use the machine too."""
    best, result = float("inf"), None
    for _ in range(times):
        start = time.process_time()
        result = call()
        best = min(best, time.process_time() - start)
    return best, result


def detector(world: World) -> None:
    """Prints precision and recall on MELBench's mentions, with the entities' names alone and with aliases."""
    aliases: dict[str, set[str]] = {}
    for entity, _, mention, _ in world.train:
        aliases.setdefault(entity, set()).add(mention)
    tables = {
        "names": NameTable.of({"name": name} for name in world.names.values()),
        "names and aliases": NameTable.of(
            {"name": name, "aliases": sorted(aliases.get(entity, ()))} for entity, name in world.names.items()
        ),
    }
    marked: dict[str, set[tuple[int, int]]] = {}
    bearers: dict[tuple[str, tuple[int, int]], str] = {}
    for _, name, mention, sentence in world.test:
        place = place_of(mention, sentence)
        if place is not None:
            marked.setdefault(sentence, set()).add(place)
            bearers[sentence, place] = name
    for _, _, mention, sentence in world.train:  # of a sentence that is tested, all mentions that are marked
        if sentence in marked and (place := place_of(mention, sentence)):
            marked[sentence].add(place)
    total = sum(map(len, marked.values()))
    print(f"\n## The default detector on MELBench: {len(world.names):,} entities; {len(marked):,} test sentences with ")
    print(f"{total:,} mentions that are marked. Aliases: what the entities are called in the other nine tenths.\n")
    figures: dict[str, list[str]] = {}
    for label, names in tables.items():
        found_count = exact = touched = named = named_exact = 0
        for sentence, places in marked.items():
            found = names.spans_in(sentence)
            found_count += len(found)
            for place in places:
                hit = place in found
                exact += hit
                touched += any(start < place[1] and place[0] < end for start, end in found)
                if folded_name(bearers.get((sentence, place), "")) == folded_name(sentence[place[0] : place[1]]):
                    named += 1
                    named_exact += hit
        figures[label] = [
            f"{found_count:,}",
            f"{exact / found_count:.1%}",
            f"{exact / total:.1%}",
            f"{named_exact / named:.1%}",
            f"{touched / total:.1%}",
        ]
    lines = (
        "places found",
        "precision: of these, marked ones",
        "recall: of the mentions, found exactly",
        "of those that are written as their entity's name",
        "recall, where a part of the mention is enough",
    )
    print("| | " + " | ".join(figures) + " |\n| --- | --- | --- |")
    for line, cells in zip(lines, zip(*figures.values(), strict=True), strict=True):
        print(f"| {line} | " + " | ".join(cells) + " |")


def speed(world: World, count: int) -> None:
    """Prints what a table of many names costs, beside a dict."""
    draw = random.Random(0)
    words = sorted({word for sentences in world.sentences.values() for text in sentences for word in text.split()})
    names = list(world.names.values())
    while len(names) < count:
        names.append(" ".join(draw.choices(words, k=draw.choice([1, 2, 2, 2, 3, 3, 4, 6]))))
    text = " ".join(record[3] for record in world.test)
    text = " ".join(text.split()[:1000])
    table = NameTable.of({"name": name} for name in names)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "names.safetensors"
        table.save(path, ["shard"])
        opening, (opened, _) = seconds(lambda: NameTable.load(path, count))
        searching, found = seconds(lambda: opened.spans_in(text))
        size = path.stat().st_size / count
    start = time.process_time()
    known: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        known.setdefault(folded_name(name), []).append(row)
    making = time.process_time() - start
    longest = int(opened.sizes.nonzero()[0].max())

    def every_part() -> int:
        folded = fold(text)
        begins, stops = folded.boundaries
        ends, hits = stops.tolist(), 0
        for begin in begins.tolist():
            first = bisect.bisect_right(ends, begin)
            hits += sum(folded.text[begin:stop] in known for stop in ends[first : first + longest])
        return hits

    plain, hits = seconds(every_part)
    print(f"\n## {count:,} names ({size:.0f} bytes each on disk), a text of 1,000 words\n")
    print("| | table of the index | dict, asked for every part |\n| --- | --- | --- |")
    print(f"| to open | {1000 * opening:.1f} ms | {1000 * making:,.0f} ms to make |")
    print(f"| to find the names in a text | {1000 * searching:.1f} ms | {1000 * plain:,.0f} ms |")
    print(f"\n{len(found)} names found; {hits} parts are names, those too common and within others counted.")


def ways(index: EntityIndex, model: Any, processor: Any, mentions: list[dict[str, Any]], answers: list[str]) -> None:
    """Prints what each choice of candidates does."""
    encoded = encoded_mentions(model, processor, mentions)
    features: Any = encoded.features
    said = [mention["mention"] for mention in mentions]
    print("| candidates | Hits@1 | answer among the candidates | entities scored for a mention | time |")
    print("| --- | --- | --- | --- | --- |")
    base = 0.0
    for way in (None, "names", "names+search"):
        options: dict[str, Any] = {} if way is None else {"candidates": way, "names": said}
        took, linked = seconds(functools.partial(index.link_encoded, features, TOP_K, **options), times=3)
        base = base or took
        first = sum(bool(found) and found[0]["entity_id"] == a for found, a in zip(linked, answers, strict=True))
        bearers = [index._contents.bearers(name) for name in said]
        named = [
            None if rows is None else {index._contents.store.record(int(r))["id"] for r in rows} for rows in bearers
        ]
        if way is None:
            sizes, among = [len(index)] * len(said), sum(answer in index for answer in answers)
            label = f"all, {TOP_K} best given"
            among = sum(any(e["entity_id"] == a for e in found) for found, a in zip(linked, answers, strict=True))
        elif way == "names":
            sizes = [len(index) if ids is None else len(ids) for ids in named]
            among = sum(ids is None or a in ids for ids, a in zip(named, answers, strict=True))
            label = '`"names"`'
        else:
            sizes = [len(index)] * len(said)
            among = sum(any(e["entity_id"] == a for e in found) for found, a in zip(linked, answers, strict=True))
            label = f'`"names+search"`, {TOP_K} of each'
        count = len(answers)
        print(
            f"| {label} | {first / count:.1%} | {among / count:.1%} | {sum(sizes) / count:,.1f} | {took / base:.2f} |"
        )
    without = sum(ids is None for ids in named)
    print(f"\n{count:,} mentions, of which {without:,} are no entity's name. Time: the search of all is 1.")


def sample(path: Path) -> None:
    """Prints the ways on the sample's test mentions."""
    from mimic_el.train import DataArguments, load_data

    splits, _ = load_data(DataArguments(dataset_name=str(Path(__file__).parent.parent / "datasets_scripts" / "sample")))
    mentions = [{**mention, "text": mention["sentence"]} for mention in splits["test"]]
    model, processor = MimicModel.from_pretrained(path).eval(), MimicProcessor.from_pretrained(path)
    index = EntityIndex.from_pretrained(path / "index")
    print(f"\n## The sample, {len(index):,} entities\n")
    ways(index, model, processor, mentions, [str(mention["answer"]) for mention in mentions])


def real_text(args: argparse.Namespace, world: World) -> None:
    """Prints the ways on MELBench's text."""
    path = args.work_dir / "text-mention"
    if not (path / "config.json").exists():
        raise SystemExit(f"There is no model in {path}: run benchmarks/context_window.py first.")
    model, processor = MimicModel.from_pretrained(path).eval(), MimicProcessor.from_pretrained(path)
    records = world.test[: args.mentions]
    ids = list(dict.fromkeys(record[0] for record in records))
    others = sorted(set(world.names) - set(ids))
    ids += random.Random(1).sample(others, min(args.entities - len(ids), len(others)))
    index = EntityIndex.build(model, processor, entities_of(world, ids), dtype="float32", show_progress=False)
    print(f"\n## MELBench's text, {len(index):,} entities\n")
    mentions = [{**mention_of(row, r), "text": r[3]} for row, r in enumerate(records)]
    ways(index, model, processor, mentions, [record[0] for record in records])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments.add_argument("--names", type=int, default=10**6)
    arguments.add_argument("--mentions", type=int, default=1000)
    arguments.add_argument("--entities", type=int, default=10000)
    arguments.add_argument("--sample_model", type=Path, default=Path("runs/demo"), help="what `make demo` leaves")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    world = World(read_records(args.data_dir))
    print(machine())
    if "detector" in args.parts:
        detector(world)
    if "speed" in args.parts:
        speed(world, args.names)
    if "sample" in args.parts:
        sample(args.sample_model)
    if "text" in args.parts:
        real_text(args, world)


if __name__ == "__main__":
    main()

"""Trains a small model from scratch on the sample data set, measures it, and shows some links (`make demo`).

The checkpoint, with its card and its index, is then in runs/demo, and an image of the links in runs/demo/linked.png.
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont

from mimic_el import train
from mimic_el.calibration_mimic import LEAST_DEPTH, Calibration
from mimic_el.console import parse
from mimic_el.images_mimic import first_image, load_image
from mimic_el.index_mimic import EntityIndex
from mimic_el.training import KnowledgeBase, MentionEntityCollator, rank_mentions
from mimic_el.training.calibration import scored_mentions
from mimic_el.training.reliability import ScoredMentions

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "datasets_scripts" / "sample"
CONFIG = ROOT / "configs" / "sample.yaml"
OUTPUT_DIR = Path("runs/demo")
LINKED = "linked.png"
KINDS = ("text", "image", "both")
SHOWN = ("hits@1", "mrr")
TOP_K = 3

# For all mentions and for each kind: Hits@1 and MRR.
Figures = dict[str, dict[str, float]]


def name_match(mentions: Iterable[Mapping[str, Any]], knowledge_base: KnowledgeBase) -> Figures:
    """What to expect of choosing at random among the entities that have the mention's name.

    Among n such entities the answer is first with probability 1/n, and its reciprocal rank is H(n)/n on average, H
    being the harmonic numbers. Where the answer has another name, it comes after them at random among all others.
    """
    named: dict[str, set[str]] = defaultdict(set)
    for entity_id, name in zip(knowledge_base.column("id"), knowledge_base.column("name"), strict=True):
        named[_folded(name)].add(entity_id)
    total = len(knowledge_base)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, total + 1))])
    expected: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for mention in mentions:
        matches = named.get(_folded(mention["mention"]), set())
        before, group = (0, len(matches)) if mention["answer"] in matches else (len(matches), total - len(matches))
        hit = 1 / group if before == 0 else 0.0
        reciprocal = (harmonic[before + group] - harmonic[before]) / group
        for kind in ("all", mention["kind"]):
            expected[kind].append((hit, float(reciprocal)))
    means = {kind: np.mean(values, axis=0) for kind, values in expected.items()}
    return {kind: {"hits@1": float(hit), "mrr": float(mrr)} for kind, (hit, mrr) in means.items()}


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())


def figures_of(metrics: Mapping[str, float]) -> Figures:
    """The table's figures among the metrics of ranked mentions."""
    figures = {"all": {name: metrics[name] for name in SHOWN}}
    for kind in KINDS:
        if f"{kind}_mrr" in metrics:
            figures[kind] = {name: metrics[f"{kind}_{name}"] for name in SHOWN}
    return figures


def with_nil(scored: ScoredMentions, calibration: Calibration, kinds: Sequence[str], taken_out: bool) -> Figures:
    """Figures of answers among which is NIL, that the entity is not in the knowledge base.

    Args:
        scored: the mentions and all entities.
        calibration: tells probabilities.
        kinds: of the mentions.
        taken_out: whether each mention's entity is taken out of the knowledge base, so that NIL is right.
    """
    view = scored.view(np.full(len(scored), taken_out))
    said = view.probabilities(calibration)
    right = np.where(view.nil, said.nil, said.at(np.nan_to_num(view.answer_scores)[:, None])[:, 0])
    others = np.concatenate([said.entities, said.nil[:, None]], axis=1)
    above, equal = (others > right[:, None]).sum(axis=1), (others == right[:, None]).sum(axis=1)
    ranks = 1 + above + (np.maximum(equal, 1) - 1) / 2  # equal ones share the mean of their places
    figures: Figures = {}
    for kind in ("all", *sorted(set(kinds))):
        own = ranks if kind == "all" else ranks[[item == kind for item in kinds]]
        figures[kind] = {"hits@1": float((own <= 1).mean()), "mrr": float((1 / own).mean())}
    return figures


def without_images(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mentions or entities as if they had no images."""
    hidden: dict[str, Any] = {"image": None, "images": []}
    return [{name: hidden.get(name, value) for name, value in record.items()} for record in records]


def table(rows: Mapping[str, Figures], counts: Mapping[str, int]) -> str:
    """Hits@1 and MRR in percent, a line for each row, columns for all mentions and for each kind."""
    width = max(len(label) for label in rows)
    kinds = [kind for kind in ("all", *KINDS) if kind in counts]
    heads = "".join(f"{f'{kind} ({counts[kind]})':>18}" for kind in kinds)
    lines = [f"{'':{width}}{heads}", f"{'':{width}}" + f"{'Hits@1':>10}{'MRR':>8}" * len(kinds)]
    for label, figures in rows.items():
        cells = "".join(f"{100 * figures[kind]['hits@1']:10.1f}{100 * figures[kind]['mrr']:8.1f}" for kind in kinds)
        lines.append(f"{label:{width}}{cells}")
    return "\n".join(lines)


def choose(mentions: Sequence[Mapping[str, Any]]) -> list[int]:
    """Mentions to show: the first of each kind, and two that share a name and differ in their answer and image."""
    chosen = [next(row for row, mention in enumerate(mentions) if mention["kind"] == kind) for kind in KINDS]
    first: dict[str, int] = {}
    for row, mention in enumerate(mentions):
        if mention["kind"] != "image" or row in chosen:
            continue
        other = first.setdefault(_folded(mention["mention"]), row)
        if mentions[other]["answer"] != mention["answer"]:
            return [*chosen, other, row]
    return chosen


def draw_links(
    mentions: Sequence[Mapping[str, Any]], linked: Sequence[Sequence[Mapping[str, Any]]], knowledge_base: KnowledgeBase
) -> Image.Image:
    """An image with a line for each mention: its image and sentence, then its best entities, the answer framed."""
    side, gap, text_width, cell = 96, 16, 300, 190
    height = side + 2 * gap + 14
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    columns = max(len(entities) for entities in linked)
    left = gap + side + gap + text_width
    sheet = Image.new("RGB", (left + columns * cell + gap, height * len(mentions) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (mention, entities) in enumerate(zip(mentions, linked, strict=True)):
        top = line * height + gap
        _paste(sheet, mention["image"], (gap, top), side)
        draw.text((gap + side + gap, top), _latin(mention["mention"]), font=font, fill="black")
        sentence = "\n".join(textwrap.wrap(_latin(mention["sentence"]), 44)[:4])
        draw.text((gap + side + gap, top + 24), sentence, font=small, fill="#555555")
        for place, found in enumerate(entities):
            x = left + place * cell
            if found["entity_id"] is None:
                _paste(sheet, None, (x, top), side, "none of them")
                draw.text((x, top + side + 4), _latin(found["name"]), font=small, fill="black")
                draw.text((x + side + 6, top), sureness(found).strip(), font=small, fill="#555555")
                continue
            entity = knowledge_base.entity(found["entity_id"])
            _paste(sheet, first_image(entity["images"]), (x, top), side)
            if found["entity_id"] == mention["answer"]:
                draw.rectangle((x - 3, top - 3, x + side + 2, top + side + 2), outline="#2e8b57", width=3)
            draw.text((x, top + side + 4), _latin(found["entity_id"])[:24], font=small, fill="black")
            draw.text((x + side + 6, top), f"{found['score']:.2f}", font=small, fill="#555555")
            draw.text((x + side + 6, top + 18), sureness(found).strip(), font=small, fill="#555555")
    return sheet


def _paste(sheet: Image.Image, source: Any, place: tuple[int, int], side: int, absent: str = "no image") -> None:
    image = load_image(source)
    if image is None:
        ImageDraw.Draw(sheet).rectangle((*place, place[0] + side - 1, place[1] + side - 1), outline="#cccccc")
        ImageDraw.Draw(sheet).text((place[0] + 12, place[1] + side // 2 - 8), absent, fill="#888888")
    else:
        sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), place)


def _latin(text: str) -> str:
    """The characters that Pillow's own font has; others as question marks."""
    return text.encode("latin-1", "replace").decode("latin-1")


def sureness(found: Mapping[str, Any]) -> str:
    """An answer's probability, where it has one."""
    return f"{100 * found['probability']:3.0f}%  " if "probability" in found else ""


def main(argv: Sequence[str] | None = None) -> dict[str, Figures]:
    """Runs the demonstration; returns the rows of its table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config", type=Path, default=CONFIG, help="configuration of the training (default: the sample's)"
    )
    parser.add_argument("--dataset", type=Path, default=SAMPLE, help="directory of the data set (default: the sample)")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help="where to write (default: %(default)s)")
    threads = min(2, os.cpu_count() or 1)
    parser.add_argument(
        "--threads", type=int, default=threads, help="CPU threads to compute with (default: %(default)s)"
    )
    args = parse(parser, argv)
    start = time.time()
    torch.set_num_threads(args.threads)

    print("Training a small model from random weights on the sample. About three minutes on two cores.", flush=True)
    command = [str(args.config), "--dataset_name", str(args.dataset), "--output_dir", str(args.output_dir)]
    if (args.output_dir / "train_results.json").is_file():
        command.append("--overwrite_output_dir")  # a finished run; an interrupted one goes on
    results = train.main(command)

    print("\nMeasuring the baselines.", flush=True)
    data = train.DataArguments(dataset_name=str(args.dataset))
    splits, knowledge_base = train.load_data(data)
    mentions = list(splits["test"])
    load_pipeline: Any = transformers.pipeline
    linker = load_pipeline("multimodal-entity-linking", model=str(args.output_dir), trust_remote_code=True)
    collator = MentionEntityCollator(linker.processor, knowledge_base)
    hidden = without_images(knowledge_base.entities())
    blind = EntityIndex.build(linker.model, linker.processor, hidden, dtype="float32", show_progress=False)
    ranked = rank_mentions(linker.model, collator, blind, without_images(mentions), show_progress=False)
    rows = {
        "Exact name, at random": name_match(mentions, knowledge_base),
        "MIMIC, images hidden": figures_of(ranked.metrics()),
        "MIMIC": figures_of({n.removeprefix("test_"): v for n, v in results.items() if n.startswith("test_")}),
    }
    if linker.calibration is not None:
        depth = max(len(linker.index), LEAST_DEPTH)
        scored, _ = scored_mentions(linker.model, linker.processor, linker.index, mentions, depth=depth)
        kinds = [mention["kind"] for mention in mentions]
        rows["MIMIC, NIL may be the answer"] = with_nil(scored, linker.calibration, kinds, taken_out=False)
        rows["MIMIC, the entity taken out"] = with_nil(scored, linker.calibration, kinds, taken_out=True)
    counts = Counter(mention["kind"] for mention in mentions)
    print(f"\nTest mentions, ranked among {len(knowledge_base)} entities, in percent:\n")
    print(table(rows, {"all": len(mentions), **counts}))
    (args.output_dir / "demo_results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")

    shown = [mentions[row] for row in choose(mentions)]
    linked = linker(shown, top_k=TOP_K)
    for mention, entities in zip(shown, linked, strict=True):
        image = "an image" if mention["image"] else "no image"
        print(f"\n{mention['mention']!r} in {mention['sentence']!r} ({image}; the answer is {mention['answer']})")
        for found in entities:
            if found["entity_id"] is None:
                print(f"    {'':6}  {sureness(found)}{found['name']}")
                continue
            mark = "*" if found["entity_id"] == mention["answer"] else " "
            parts = ", ".join(f"{part} {found[f'{part}_score']:.2f}" for part in ("text", "image", "cross_modal"))
            print(
                f"  {mark} {found['score']:6.2f}  {sureness(found)}{found['entity_id']:28} {found['name']:16} ({parts})"
            )
    draw_links(shown, linked, knowledge_base).save(args.output_dir / LINKED)
    minutes, seconds = divmod(round(time.time() - start), 60)
    print(
        f"\nThe checkpoint is in {args.output_dir}, its index in {args.output_dir / 'index'}, an image of these links "
        f"in {args.output_dir / LINKED}. That took {minutes} min {seconds} s."
    )
    return rows


if __name__ == "__main__":
    main()

"""How faithful explanations are: words and patches are taken out in the order of what they are said to add.

For each test mention its best entity is explained against the runner-up. The words of the mention's text, and the
patches of its image, are then taken out in steps, those first that add most to the lead; the mention is encoded again
each time. The area under that curve, as a share of the lead before, is the measure: the sooner the lead falls, the
smaller. Beside it: the order of plain attention (of the pooled token in the last layer, mean over heads), and a random
order.

Says too, for each kind of mention, for how many the image unit's share of the lead is the largest.

python benchmarks/explanations.py --model runs/demo --dataset datasets_scripts/sample
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import CLIPConfig

from mimic_el import EntityIndex, MimicConfig, MimicModel, MimicProcessor, train
from mimic_el.attribution_mimic import POINTS, Attribution, Contributions
from mimic_el.explain_mimic import Explainer
from mimic_el.explanation_mimic import Explanation
from mimic_el.images_mimic import load_image

STEPS = np.linspace(0, 1, 11)
ORDERS = ("explanation", "attention", "random")


class Deletion:
    """Deletes words and patches of mentions, and scores what is left."""

    def __init__(self, model: MimicModel, processor: MimicProcessor, index: EntityIndex) -> None:
        self.model, self.processor, self.index = model, processor, index

    def leads(self, heads: list[str], texts: list[str], pixels: torch.Tensor, ids: Sequence[str]) -> np.ndarray:
        """The lead of the first of two entities, for each variant of a mention."""
        inputs = self.processor.process_mentions(heads, texts)
        inputs["pixel_values"] = pixels
        with torch.no_grad():
            mentions = self.model.encode_mentions(**inputs)
            scores = self.model.score(mentions, self.index.features(ids)).logits
        return (scores[:, 0] - scores[:, 1]).numpy()

    def without_words(self, why: Explanation, order: Sequence[int], pixels: torch.Tensor, ids: Sequence[str]) -> float:
        """The area when words of the text are taken out in an order."""
        words, text = why.text, why.mention_side.body
        texts = []
        for share in STEPS:
            gone = {order[place] for place in range(round(share * len(order)))}
            kept, at = [], 0
            for place, word in enumerate(words):
                kept.append(text[at : word.start])
                kept.append("" if place in gone else text[word.start : word.end])
                at = word.end
            texts.append(" ".join("".join([*kept, text[at:]]).split()))
        heads = [why.mention_side.title] * len(texts)
        return _area(self.leads(heads, texts, pixels.expand(len(texts), -1, -1, -1), ids))

    def without_patches(
        self, why: Explanation, order: Sequence[int], pixels: torch.Tensor, ids: Sequence[str]
    ) -> float:
        """The area when patches of the image are made blank in an order."""
        rows, columns = why.mention_image.shape  # type: ignore[union-attr]
        height, width = pixels.shape[-2] // rows, pixels.shape[-1] // columns
        variants = pixels.repeat(len(STEPS), 1, 1, 1)
        for step, share in enumerate(STEPS):
            for patch in order[: round(share * len(order))]:
                top, left = patch // columns * height, patch % columns * width
                variants[step, :, top : top + height, left : left + width] = 0
        heads, texts = [why.mention_side.title] * len(STEPS), [why.mention_side.body] * len(STEPS)
        return _area(self.leads(heads, texts, variants, ids))


def _area(leads: np.ndarray) -> float:
    """Mean of the curve between its ends, as a share of the lead before anything is taken out."""
    return float(np.trapezoid(leads, STEPS) / leads[0])


def attention_of(model: MimicModel, inputs: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """How much the pooled token attends to each token and to each patch, in the last layer, mean over heads."""
    clip = model.encoder.backbone
    with torch.no_grad():
        text = clip.text_model(inputs["input_ids"], inputs["attention_mask"], output_attentions=True)
        image = clip.vision_model(inputs["pixel_values"], output_attentions=True)
    eos = int((inputs["input_ids"][0] == model.config.backbone_config.text_config.eos_token_id).int().argmax())
    return text.attentions[-1][0, :, eos].mean(0).numpy(), image.attentions[-1][0, :, 0, 1:].mean(0).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="runs/demo", help="a checkpoint with its index")
    parser.add_argument(
        "--dataset", default="datasets_scripts/sample", help="a data set with entities and a test split"
    )
    parser.add_argument("--mentions", type=int, default=None, help="so many of the test mentions (default: all)")
    parser.add_argument("--points", type=int, default=POINTS, help="of the integrated gradients through the encoder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time_only", action="store_true", help="time one link of a CLIP ViT-B/32 with random weights")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file of what is printed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.time_only:
        time_of_one(args.points)
        return
    splits, knowledge_base = train.load_data(train.DataArguments(dataset_name=args.dataset))
    # Attention that can be looked at.
    model = MimicModel.from_pretrained(args.model, attn_implementation="eager").eval()
    processor = MimicProcessor.from_pretrained(args.model)
    index = EntityIndex.from_pretrained(Path(args.model, "index"))
    explainer = Explainer(model, processor, index, knowledge_base.entities(), args.points)
    deletion = Deletion(model, processor, index)
    mentions = list(splits["test"])[: args.mentions]
    random = np.random.default_rng(0)
    areas: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    largest: dict[str, list[bool]] = defaultdict(list)
    seconds = []
    for mention in tqdm(mentions, desc="Explaining"):
        mention = dict(mention) | {"image": load_image(mention["image"])}
        best, rival = index.link(model, processor, [mention], top_k=2)[0]
        ids, kind = [best["entity_id"], rival["entity_id"]], mention.get("kind") or "all"
        start = time.perf_counter()
        why = explainer.explain(mention, *ids)
        seconds.append(time.perf_counter() - start)
        leads = {name: unit.lead for name, unit in why.units.items()}
        largest[kind].append(max(leads, key=leads.get) == "image")  # type: ignore[arg-type]
        inputs = processor.process_mentions([mention["mention"]], [mention["sentence"]], [mention["image"]])
        of_tokens, of_patches = attention_of(model, inputs)
        parts = {
            "words": ([word.contribution for word in why.text], deletion.without_words),
            "patches": ([] if why.mention_image is None else why.mention_image.ravel(), deletion.without_patches),
        }
        read = explainer.side(mention["mention"], mention["sentence"], None, Contributions(of_tokens, np.zeros(1)))
        attended = {"words": [word.contribution for word in read.body_words], "patches": of_patches}
        for part, (amounts, delete) in parts.items():
            if len(amounts) < 3:
                continue
            for order in ORDERS:
                by = {"explanation": amounts, "attention": attended[part], "random": random.random(len(amounts))}[order]
                area = delete(why, np.argsort(-np.asarray(by), kind="stable").tolist(), inputs["pixel_values"], ids)
                areas[part, kind, order].append(area)
                areas[part, "all", order].append(area)
    report(areas, largest, seconds, args.output)


def time_of_one(points: int) -> None:
    """How long the contributions to one score take, beside encoding its mention alone."""
    model = MimicModel(MimicConfig(backbone_config=CLIPConfig())).eval()
    eos = model.config.backbone_config.text_config.eos_token_id

    def item(seed: int, tokens: int, shown: bool) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 40_000, (1, 40), generator=generator)
        ids[:, tokens:] = eos
        pixels = torch.randn(1, 3, 224, 224, generator=generator) * shown
        return {"input_ids": ids, "attention_mask": (torch.arange(40) <= tokens).long()[None], "pixel_values": pixels}

    attribution = Attribution(model, item(0, 3, shown=False), points)
    times: dict[str, list[float]] = defaultdict(list)
    for seed in range(1, 8):
        start = time.perf_counter()
        mention = attribution.encode(item(seed, 24, shown=True))
        times["encoding a mention"].append(time.perf_counter() - start)
        start = time.perf_counter()
        entity = attribution.encode(item(seed + 100, 16, shown=True))
        attribution.contributions(mention, entity)
        times["encoding an entity, and the contributions"].append(time.perf_counter() - start)
    for name, seconds in times.items():
        print(f"{name}: {np.median(seconds) * 1e3:.0f} ms, median of {len(seconds)}, {torch.get_num_threads()} threads")


def report(
    areas: Mapping[tuple[str, str, str], list[float]],
    largest: Mapping[str, list[bool]],
    seconds: Sequence[float],
    output: Path | None,
) -> None:
    print("\n| taken out | mentions | number | explanation | attention | random |\n" + "|---" * 6 + "|")
    for part, kind in dict.fromkeys((part, kind) for part, kind, _ in areas):
        # The median: where a lead is next to nothing, its shares are without bounds.
        values = [np.median(areas[part, kind, order]) for order in ORDERS]
        cells = " | ".join(f"{value:.3f}" for value in values)
        print(f"| {part} | {kind} | {len(areas[part, kind, 'random'])} | {cells} |")
    for kind, ones in largest.items():
        print(f"{kind}: the image unit's share of the lead is the largest for {sum(ones)} of {len(ones)}")
    print(f"median time of an explanation: {np.median(seconds) * 1e3:.0f} ms")
    if output is not None:
        medians = {" ".join(key): float(np.median(values)) for key, values in areas.items()}
        output.write_text(json.dumps(medians, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

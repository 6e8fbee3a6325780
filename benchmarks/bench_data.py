"""What the benchmarks measure on: a model trained for a few minutes, and knowledge bases of any size.

Scores of random weights are spread as no trained model's are, and the bounds of a search depend on that spread. So a
model of the published matcher's size (40 tokens, units 96 wide, projections 512 wide) on a small CLIP-shaped encoder is
trained on real mention text: the MELBench archives, where an entity is named by its own records and has another
sentence, or half of its only one, as its description. Images are synthetic: a pattern for each entity, and noise.
Without the archives the text of the built-in sample takes their place.

The model and its knowledge base are kept in `--work_dir`, so that the benchmarks of one machine share them.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from mimic_el import EntityIndex, MentionFeatures, MimicConfig, MimicModel, MimicProcessor
from mimic_el.training.start import train_tokenizer

SIDE = 64


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all benchmarks share."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    result.add_argument("--data_dir", type=Path, help="folder with Wikidata-MEL.zip and Richpedia-MEL.zip of MELBench")
    result.add_argument("--work_dir", type=Path, default=Path("runs/bench"), help="where model and indexes are kept")
    result.add_argument("--train_steps", type=int, default=400, help="steps that the model is trained, once")
    result.add_argument("--threads", type=int, default=2)
    return result


def machine() -> str:
    """One line on the machine and the libraries."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return f"{cpu}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}"


# --- Text and images --------------------------------------------------------------------------------------------


def read_records(data_dir: Path | None) -> list[tuple[str, str, str, str]]:
    """Real mentions: entity id, entity name, mention, sentence."""
    if data_dir is None:
        return _sample_records()
    records = []
    with zipfile.ZipFile(data_dir / "Wikidata-MEL.zip") as archive:
        for record in json.loads(archive.read("Wikidata-MEL.json")).values():
            for parts in zip(record["answer"], record["entities"], record["mentions"], strict=True):
                records.append((*parts, record["sentence"]))
    with zipfile.ZipFile(data_dir / "Richpedia-MEL.zip") as archive:
        for record in json.loads(archive.read("Richpedia-MEL.json")).values():
            records.append((record["answer"], record["entities"], record["mentions"], record["sentence"]))
    return records


def _sample_records() -> list[tuple[str, str, str, str]]:
    from datasets import load_dataset

    sample = str(Path(__file__).resolve().parent.parent / "datasets_scripts" / "sample")
    names = {row["id"]: row["name"] for row in load_dataset(sample, "entities", split="kb").remove_columns("images")}
    mentions = load_dataset(sample, "mentions", split="train").remove_columns("image")
    return [(row["answer"], names[row["answer"]], row["mention"], row["sentence"]) for row in mentions]


def drawn(entity: str, noise: float, rng: np.random.Generator) -> Image.Image:
    """The pattern of an entity, under noise."""
    own = np.random.default_rng(abs(hash_of(entity)))
    pattern = own.uniform(0, 255, (4, 4, 3))
    image = np.asarray(Image.fromarray(pattern.astype(np.uint8)).resize((SIDE, SIDE)), dtype=np.float64)
    return Image.fromarray(np.clip(image + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8))


def hash_of(text: str) -> int:
    """A number that is the same in every run, unlike `hash`."""
    value = 0
    for char in text.encode():
        value = (value * 1000003 + char) % 2**61
    return value


class World:
    """Entities and mentions made of records; the last tenth of the mentions is never trained on."""

    def __init__(self, records: list[tuple[str, str, str, str]], seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        records = sorted(set(records))
        self.random.shuffle(records)
        self.sentences: dict[str, list[str]] = {}
        self.names: dict[str, str] = {}
        for entity, name, _, sentence in records:
            self.names.setdefault(entity, name)
            self.sentences.setdefault(entity, []).append(sentence)
        cut = len(records) * 9 // 10
        self.train, self.test = records[:cut], records[cut:]

    def description(self, entity: str, but: str = "") -> str:
        """Another sentence about the entity than the mention's, or half of the words of its only one."""
        others = [sentence for sentence in self.sentences[entity] if sentence != but]
        if others:
            return self.random.choice(others)
        words = self.sentences[entity][0].split()
        return " ".join(word for word in words if self.random.random() < 0.5)

    def entities(self, count: int) -> Iterator[dict[str, Any]]:
        """`count` entities: each real one once, then again under new ids with other words and images."""
        made = 0
        for turn in range(10**9):
            for entity, name in self.names.items():
                if made == count:
                    return
                made += 1
                entity_id = entity if turn == 0 else f"{entity}-{turn}"
                image = drawn(entity_id, 20, self.numbers) if self.random.random() < 0.7 else None
                yield {"id": entity_id, "name": name, "description": self.description(entity), "images": image}

    def mention_inputs(self, processor: MimicProcessor, records: list[tuple[str, str, str, str]]) -> dict[str, Any]:
        images = [drawn(r[0], 60, self.numbers) if self.random.random() < 0.7 else None for r in records]
        return dict(processor.process_mentions([r[2] for r in records], [r[3] for r in records], images))

    def entity_inputs(self, processor: MimicProcessor, records: list[tuple[str, str, str, str]]) -> dict[str, Any]:
        images = [drawn(r[0], 20, self.numbers) if self.random.random() < 0.7 else None for r in records]
        texts = [self.description(r[0], but=r[3]) for r in records]
        return dict(processor.process_entities([r[1] for r in records], texts, images))


# --- Model --------------------------------------------------------------------------------------------------------


def new_model(texts: list[str]) -> tuple[MimicModel, MimicProcessor]:
    """The published matcher on a small encoder, with random weights and a tokenizer made of the texts."""
    tokenizer = train_tokenizer(texts, 8192)
    common = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 192, "intermediate_size": 384}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = MimicConfig(
        backbone_config={
            "text_config": {**common, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 40},
            "vision_config": {**common, "image_size": SIDE, "patch_size": 16},
            "projection_dim": 512,
        }
    )
    processor = MimicProcessor(MimicProcessor.image_processor_for(config.backbone_config), tokenizer)
    return MimicModel(config), processor


def trained_model(args: argparse.Namespace) -> tuple[MimicModel, MimicProcessor, World]:
    """The model of `--work_dir`, trained first if it is not there."""
    torch.set_num_threads(args.threads)
    world = World(read_records(args.data_dir))
    place = args.work_dir / "model"
    if (place / "config.json").exists():
        return MimicModel.from_pretrained(place).eval(), MimicProcessor.from_pretrained(place), world
    model, processor = new_model([text for record in world.train for text in record[1:]])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=1e-4)
    with tqdm(range(args.train_steps), desc="Training", unit=" steps") as steps:
        for step in steps:
            batch = world.random.sample(world.train, min(48, len(world.train)))
            entities = {f"entity_{k}": v for k, v in world.entity_inputs(processor, batch).items()}
            for group in optimizer.param_groups:
                group["lr"] = 5e-4 * min(1.0, (step + 1) / 50, 1.05 - step / args.train_steps)
            output = model(**world.mention_inputs(processor, batch), **entities, return_loss=True)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps.set_postfix(loss=f"{float(output.loss):.2f}")
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return model.eval(), processor, world


def built_index(args: argparse.Namespace, count: int, dtype: str = "float16") -> EntityIndex:
    """An index of `count` entities in `--work_dir`, built first if it is not there."""
    place = args.work_dir / f"index-{count}-{dtype}"
    if not (place / "index_config.json").exists():
        model, processor, _ = trained_model(args)
        entities = World(read_records(args.data_dir)).entities(count)
        EntityIndex.build(model, processor, entities, place, dtype=dtype, batch_size=128)
    return EntityIndex.from_pretrained(place)


def mention_features(model: MimicModel, processor: MimicProcessor, world: World, count: int) -> Any:
    """Features of test mentions, and the ids of their entities."""
    records = (world.test * (count // len(world.test) + 1))[:count]
    parts = []
    with torch.inference_mode():
        for start in range(0, count, 64):
            inputs = world.mention_inputs(processor, records[start : start + 64])
            parts.append(model.encode_mentions(**inputs))
    return MentionFeatures.cat(parts), [record[0] for record in records]

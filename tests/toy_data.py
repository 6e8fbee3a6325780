"""A toy data set and model for tests of training: coloured squares, three entities to a name."""

import io
from pathlib import Path
from typing import Any

import datasets
import yaml
from PIL import Image

from mimic_el.training import KnowledgeBase

COLOURS = ("red", "green", "blue", "yellow")
NAMES = ("Orange", "Georgia", "Swift")
KINDS = ("company", "place", "animal")

CLIP_CONFIG: dict[str, Any] = {
    "projection_dim": 16,
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    },
}
SIZES = {"image_hidden_size": 8, "tglu_hidden_size": 8, "vdlu_hidden_size": 8, "cmfu_hidden_size": 8}


def png(colour: str, size: int = 20) -> dict[str, Any]:
    """An image as `datasets` gives one that it did not decode."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{colour}.png"}


def entities() -> list[dict[str, Any]]:
    """Nine entities: every name with every kind. Each has two images of different size, but the last has none."""
    rows = []
    for name in NAMES:
        for place, kind in enumerate(KINDS):
            images = [png(COLOURS[place], 20), png(COLOURS[place + 1], 24)]
            row = {"id": f"{kind}:{name.lower()}", "qid": None, "name": name, "description": f"A {kind}."}
            rows.append({**row, "images": images})
    rows[-1]["images"] = []
    return rows


def mentions(split: str, count: int) -> list[dict[str, Any]]:
    """`count` mentions, their answers going round the entities; every fifth without an image."""
    known = entities()
    rows = []
    for number in range(count):
        entity = known[number % len(known)]
        rows.append(
            {
                "id": f"{split}-{number}",
                "mention": entity["name"],
                "sentence": f"{entity['name']} is the {entity['description'][2:-1]} number {number}.",
                "image": None if number % 5 == 4 else png(COLOURS[number % 4], 18),
                "answer": entity["id"],
                "kind": "text" if number % 2 else "both",
            }
        )
    return rows


def mention_features() -> datasets.Features:
    names = ("id", "mention", "sentence", "image", "answer", "kind")
    return datasets.Features({n: datasets.Image() if n == "image" else datasets.Value("string") for n in names})


def entity_features() -> datasets.Features:
    names = ("id", "qid", "name", "description")
    return datasets.Features({n: datasets.Value("string") for n in names} | {"images": datasets.List(datasets.Image())})


def mention_dataset(split: str, count: int) -> datasets.Dataset:
    return datasets.Dataset.from_list(mentions(split, count), features=mention_features())


def knowledge_base() -> KnowledgeBase:
    return KnowledgeBase(datasets.Dataset.from_list(entities(), features=entity_features()))


def write_dataset(directory: Path, **splits: list[dict[str, Any]]) -> Path:
    """The toy data set as a directory that `load_dataset` reads; `splits` in place of train, validation and test."""
    splits = splits or {"train": mentions("train", 36), "validation": mentions("val", 9), "test": mentions("test", 9)}
    files: dict[str, list[dict[str, str]]] = {"mentions": [], "entities": []}
    tables = {
        ("mentions", split): datasets.Dataset.from_list(r, features=mention_features()) for split, r in splits.items()
    }
    tables["entities", "kb"] = datasets.Dataset.from_list(entities(), features=entity_features())
    for (config, split), table in tables.items():
        path = directory / config / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path)
        files[config].append({"split": split, "path": f"{config}/{split}-*.parquet"})
    configs = [{"config_name": config, "data_files": paths} for config, paths in files.items()]
    (directory / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n", encoding="utf-8")
    return directory

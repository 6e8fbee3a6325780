"""Builds the sample data set: a few hundred entities with colliding names, and mentions of them.

The drawings come from published packages of flags, brand logos and pictograms, which are read as they were
published (never unpacked, never installed). Download them into a folder by name and version, then build:

    mkdir packages && cd packages && npm pack $(python -m mimic_el.datasets_scripts.build_sample --list_packages)
    python -m mimic_el.datasets_scripts.build_sample --packages_dir packages --output_dir sample

What is said of the entities is in `sample_sources/`: `entities.tsv` lists them by the identifier of their source,
`texts.toml` has the text forms, `card.md` is the card's text. `sample_entities` reads the list and the packages,
`sample_text` writes the texts, `sample_images` makes the images; here they become rows, files and a card. The same
inputs, seed and library versions give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from mimic_el.console import given_path
from mimic_el.datasets_scripts.sample_entities import (
    PACKAGES,
    SOURCES,
    Entity,
    PackageStore,
    SampleError,
    add_drawings,
    read_entities,
    senses,
    short_name,
)
from mimic_el.datasets_scripts.sample_images import catalogue_image, encode, photograph
from mimic_el.datasets_scripts.sample_text import (
    KINDS,
    SPLITS,
    FormChooser,
    Forms,
    check_pools,
    choose_name,
    compose,
    eligible,
    read_forms,
)

SIZES = {"train": 6000, "validation": 420, "test": 600}
SHARD = "{split}-00000-of-00001.parquet"


def stable_rng(*key: object) -> np.random.Generator:
    """A generator that depends on the key alone, so that one image's seed does not hang on how many came before."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def entity_rows(entities: Sequence[Entity]) -> Iterator[dict[str, Any]]:
    for entity in tqdm(entities, desc="entities", unit="entity"):
        stem = re.sub(r"[^a-z0-9]+", "-", entity.id)
        images = [
            {"bytes": encode(catalogue_image(drawing), 75), "path": f"{stem}.{short_name(drawing.package)}.webp"}
            for drawing in entity.kb_drawings
        ]
        yield {
            "id": entity.id,
            "qid": None,
            "name": entity.name,
            "description": entity.description,
            "images": images,
            "category": entity.category,
        }


def rounds(items: Sequence[Any], rng: np.random.Generator) -> Iterator[Any]:
    """All items in a random order, then again in another, without end: each comes up equally often."""
    while True:
        for index in rng.permutation(len(items)):
            yield items[int(index)]


def mention_rows(entities: Sequence[Entity], forms: Forms, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """The mentions of one split, a third of each kind, in a random order.

    Raises:
        SampleError: the forms of the split do not suffice for that many different texts.
    """
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    for kind in KINDS:
        # Texts and images draw from generators of their own, so that other texts leave the images as they are.
        text_rng, image_rng = stable_rng(seed, split, kind, "texts"), stable_rng(seed, split, kind, "images")
        chooser = FormChooser(forms, split, text_rng)
        choice = rounds(eligible(entities, kind), image_rng)
        for _ in range(count // len(KINDS)):
            entity: Entity = next(choice)
            for _ in range(100):
                form = chooser.choose(entity, kind)
                text = compose(form, choose_name(entity, kind, text_rng), forms.slots_for(entity, kind), text_rng)
                if (text.text, entity.name) not in seen:
                    break
            else:
                raise SampleError(f"There are too few text forms for {count} mentions in {split}.")
            seen.add((text.text, entity.name))
            drawing = None
            if kind != "text":
                options = entity.kb_drawings if split == "train" else entity.drawings
                drawing = options[int(image_rng.integers(len(options)))]
            rows.append(
                {
                    "mention": text.mention,
                    "sentence": text.text,
                    # Half of the mentions that the text decides have no image, half one without a subject.
                    "photo": kind != "text" or bool(image_rng.random() < 0.5),
                    "answer": entity.id,
                    "kind": kind,
                    "form": text.form,
                    "drawing": drawing,
                }
            )
    order = stable_rng(seed, split, "order").permutation(len(rows))
    shuffled = [rows[int(index)] for index in order]
    for number, row in enumerate(tqdm(shuffled, desc=split, unit="mention")):
        drawing, photo = row["drawing"], row.pop("photo")
        row["id"] = f"{split}-{number:05d}"
        row["image"] = None
        row["drawing"] = None if drawing is None else short_name(drawing.package)
        if photo:
            image = photograph(drawing, stable_rng(seed, split, number, "photo"))
            row["image"] = {"bytes": encode(image, 62), "path": f"{row['id']}.webp"}
    return shuffled


def write_parquet(rows: Sequence[dict[str, Any]], features: Any, path: Path) -> None:
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[name] for row in rows] for name in features}
    unfinished = path.with_suffix(".unfinished")
    Dataset.from_dict(columns, features=features).to_parquet(str(unfinished))
    os.replace(unfinished, path)


def card(entities: Sequence[Entity], splits: dict[str, list[dict[str, Any]]], seed: int) -> str:
    """The data set's README.md: the text of card.md with the counts filled in."""
    groups = [group for group in senses(entities).values() if len(group) > 1]
    versions = {name: metadata.version(name) for name in ("resvg-py", "pillow", "numpy", "datasets", "pyarrow")}
    shown = {e.id: {short_name(drawing.package) for drawing in e.kb_drawings} for e in entities}
    drawn = [row for row in splits["test"] if row["drawing"] is not None]
    unseen = sum(row["drawing"] not in shown[row["answer"]] for row in drawn)
    counts = "\n".join(
        f"| {split} | {len(rows):,} | " + " | ".join(f"{sum(r['kind'] == k for r in rows):,}" for k in KINDS) + " |"
        for split, rows in splits.items()
    )
    kinds = Counter(entity.id.partition(":")[0] for entity in entities)
    return string.Template((SOURCES / "card.md").read_text(encoding="utf-8")).substitute(
        entities=len(entities),
        colliding=sum(map(len, groups)),
        groups=len(groups),
        emoji=kinds["emoji"],
        flags=kinds["flag"],
        brands=kinds["brand"],
        pictograms=kinds["pictogram"],
        images=sum(len(entity.kb_drawings) for entity in entities),
        counts=counts,
        forms=f"{len({row['form'] for rows in splits.values() for row in rows}):,}",
        unseen=unseen,
        shown=len(drawn),
        packages="\n".join(
            f"| {p.name} | {p.version} | {p.license} | [{p.role}]({p.project}) |" for p in PACKAGES.values()
        ),
        python=platform.python_version(),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        seed=seed,
    )


def build(packages_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str], seed: int = 0) -> None:
    """Writes the sample data set (Parquet files and card) to a folder.

    Args:
        packages_dir: where the archives of `PACKAGES` lie.
        output_dir: made where it does not exist; files of an earlier build are replaced.
        seed: of the texts, the images and the order.

    Raises:
        SampleError: a package is missing or altered, or an input of `sample_sources` is at fault.
    """
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    text = Value("string")
    entity_features = Features(
        id=text, qid=text, name=text, description=text, images=List(ImageFeature()), category=text
    )
    mention_features = Features(
        id=text, mention=text, sentence=text, image=ImageFeature(), answer=text, kind=text, form=text, drawing=text
    )
    forms = read_forms()
    entities = read_entities()
    check_pools(entities, forms)
    add_drawings(entities, PackageStore(packages_dir))
    output = Path(output_dir)
    write_parquet(list(entity_rows(entities)), entity_features, output / "entities" / SHARD.format(split="kb"))
    splits = {split: mention_rows(entities, forms, split, SIZES[split], seed) for split in SPLITS}
    for split, rows in splits.items():
        write_parquet(rows, mention_features, output / "mentions" / SHARD.format(split=split))
    (output / "README.md").write_text(card(entities, splits, seed), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mimic_el.datasets_scripts.build_sample",
        description="Build the sample data set from published packages of flags, logos and pictograms.",
        allow_abbrev=False,
    )
    parser.add_argument("--packages_dir", help="folder with the archives that npm pack downloaded")
    parser.add_argument("--output_dir", type=given_path, help="folder to write the data set to")
    parser.add_argument("--seed", type=int, default=0, help="of texts, images and order (default: %(default)s)")
    parser.add_argument("--list_packages", action="store_true", help="print the packages to download, and stop")
    options = parser.parse_args(arguments)
    if options.list_packages:
        print(" ".join(f"{package.name}@{package.version}" for package in PACKAGES.values()))
        return 0
    if options.packages_dir is None or options.output_dir is None:
        parser.error("--packages_dir and --output_dir are needed (or --list_packages)")
    try:
        build(options.packages_dir, options.output_dir, options.seed)
    except SampleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

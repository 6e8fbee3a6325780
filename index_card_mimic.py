"""The page of an index on the Hub, written from what is in the index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from tqdm.auto import tqdm

from .files_mimic import regular
from .markdown_mimic import code, escaped, listed, metadata_text, plain_line, table
from .store_mimic import Store, TableFacts

_TASK = "multimodal-entity-linking"
_SIZES = ((10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M"), (10**8, "100M"))
_EXAMPLES = 3
_CELL_CHARACTERS = 80
_ROUNDED = {
    "float32": "stored as they were computed",
    "float16": "rounded to float16, so scores differ slightly from those of the model itself",
    "int8": "rounded to 8 bits, so scores differ from those of the model itself and close entities may change places",
}


def card_of_index(place: str, manifest: Mapping[str, Any], store: Store, **about: str | None) -> str:
    """The text of an index's README.md.

    Args:
        place: the index's Hub id, or the name of its directory.
        manifest: the index's list of parts.
        store: what it holds.
        about: `model_id`, `license` and `source`, as of [`index_card`]; the model's id is known already if it was
            loaded from the Hub.
    """
    facts = TableFacts()
    for entry, shard in zip(manifest["shards"], store.shards, strict=True):
        facts += TableFacts.stored(entry.get("facts")) or TableFacts.of(shard.table)
    about["model_id"] = about.get("model_id") or hub_id(manifest["model"]["name"])
    return index_card(place, manifest, len(store) - store.removed_count, facts, store.records(), **about)


def hub_id(name: str) -> str | None:
    """The name, if it is a Hub id with a namespace."""
    return name if "/" in name and _is_hub_id(name) else None


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _linked(name: str, prefix: str = "") -> str:
    return f"[{name}](https://huggingface.co/{prefix}{name})" if _is_hub_id(name) else code(name)


def index_card(
    place: str,
    manifest: Mapping[str, Any],
    count: int,
    facts: TableFacts,
    examples: Iterable[Mapping[str, Any]],
    *,
    model_id: str | None = None,
    license: str | None = None,
    source: str | None = None,
) -> str:
    """The text of README.md.

    Args:
        place: the index's Hub id, or the name of its directory.
        manifest: the index's list of parts.
        count: the number of entities.
        facts: of all entities in its tables.
        examples: the entities' own data, of which the first are shown.
        model_id: the Hub id of the model that made it, if it is there.
        license: the license's name as the Hub spells it.
        source: the Hub id of the data set that the entities are from.
    """
    size = sum(file["bytes"] for entry in manifest["shards"] for file in entry["files"].values())
    config, made_by = manifest["model"]["config"], manifest["model"]["name"]
    title = plain_line(place.rpartition("/")[2])
    model = _linked(model_id) if model_id else _cell(Path(made_by).name)
    model_id = model_id if model_id and _is_hub_id(model_id) else None
    data = DatasetCardData(
        license=license and metadata_text(license),
        pretty_name=title,
        size_categories=[_size_category(count)],
        source_datasets=[source] if source and _is_hub_id(source) else None,
        base_model=model_id,
        task_categories=["text-retrieval"],
        tags=["entity-linking", _TASK, "mimic", "entity-index"],
        configs=[{"config_name": "entities", "data_files": [{"split": "kb", "path": "shard-*.jsonl"}]}],
        # The files do not all have all fields.
        dataset_info=[
            {
                "config_name": "entities",
                "features": [
                    {"name": name, "list": "string"} if kind == "list" else {"name": name, "dtype": kind}
                    for name, kind in facts.fields.items()
                ],
            }
        ],
    )
    share = f"{facts.described:,} ({facts.described / count:.0%})" if count else "0"
    if facts.described:
        share += f", of {facts.characters / facts.described:,.0f} characters on average"
    rows = [
        ("Entities", f"{count:,}"),
        ("With a description", share),
        ("Fields", listed(map(_cell, facts.fields))),
        ("Features stored as", manifest["dtype"]),
        ("Size", f"{tqdm.format_sizeof(size)}B ({size / max(1, count):,.0f} bytes an entity, its data included)"),
        ("Model", model),
    ]
    if source:
        rows.append(("Made from", _linked(source, "datasets/")))
    shown = ["id", "name", "description"]
    example_rows = [[_cell(record.get(name, "")) for name in shown] for record in islice(examples, _EXAMPLES)]
    quoted_place = json.dumps(plain_line(place), ensure_ascii=False)
    text = f"""# {escaped(title)}: {count:,} entities to link mentions to

This is a knowledge base, encoded for multimodal entity linking: given a mention, its sentence and its image, the MIMIC
model {model} finds the entity that is meant among those of this index. One model can have any number of indexes.

## Use

```python
from transformers import pipeline

linker = pipeline(
    "{_TASK}",
    model="{model_id or "THE-MODEL"}",
    index={quoted_place},
    trust_remote_code=True,
)
linker({{"mention": "Orange", "text": "Orange opened a shop on the corner.", "image": "photo.png"}}, top_k=3)
```
{"" if model_id else _NO_MODEL_ID}
The features are memory-mapped and read when a search needs them, so opening the index takes little time and memory.
The entities, without their features, are a data set:

```python
from datasets import load_dataset

entities = load_dataset({quoted_place}, "entities", split="kb")
```

## What is in it

{table(("", ""), rows)}

The first entities:

{table(shown, example_rows)}

## Limits

- The index belongs to the model above. Another model, or the same one trained further, is refused.
- An entity is its name and description, cut at {config["text_max_length"]} tokens together, and its first image,
  as they were when the index was made. `EntityIndex.update`, `add` and `remove` change it.
- Every mention gets its best entities, whether or not the right one is among them. An entity that is not in the
  knowledge base cannot be found, and it covers some people, places and times better than others.
- Features are {_ROUNDED.get(manifest["dtype"], manifest["dtype"])}.

## License

{_license(license, source)}
"""
    return f"---\n{data.to_yaml()}\n---\n\n{_OURS}\n\n{text}"


def is_index_card(path: Path) -> bool:
    """Whether a file is a page that was written from an index, or empty, so that it may be written anew."""
    try:
        text = regular(path).read_bytes()
    except OSError:
        return False
    return not text.strip() or _OURS.encode() in text


_OURS = "<!-- Written from the index, and anew whenever it changes. Without this line it stays as you made it. -->"
_NO_MODEL_ID = """
`THE-MODEL` is the directory or Hub id of the model named above.
"""


def _license(license: str | None, source: str | None) -> str:
    of = _linked(source, "datasets/") if source else "the knowledge base it was made from"
    if license is None:
        return f"That of {of}."
    return f"{code(license)}, after {of}."


def _size_category(count: int) -> str:
    for number, (limit, name) in enumerate(_SIZES):
        if count < limit:
            return f"{_SIZES[number - 1][1]}<n<{name}" if number else f"n<{name}"
    return "100M<n<1B"


def _cell(text: Any) -> str:
    return escaped(text, _CELL_CHARACTERS)


__all__ = ["card_of_index", "hub_id", "index_card"]

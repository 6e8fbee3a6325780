"""What commands read: tables of entities and mentions, data sets, checkpoints. Errors name the line."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors_mimic import MimicError
from .options import AllowUrls

_TABLES = (".jsonl", ".json", ".csv")
_INPUTS = ("id", "text", "sentence", "image", "candidates", "spans", "start", "end")


class CommandError(MimicError, ValueError):
    """What was asked on the command line cannot be done, with why."""


# --- Entities ---------------------------------------------------------------------------------------------------------


def read_entities(source: str) -> Any:
    """Entities for an index: of a data set (a directory or a Hub id), a JSON Lines or a CSV file.

    Raises:
        CommandError: if there are none.
    """
    path = Path(source)
    if path.is_file() or path.suffix.lower() in _TABLES:
        if not path.is_file():
            raise CommandError(f"There is no file {source}.")
        if path.suffix.lower() not in _TABLES:
            raise CommandError(f"{source} is not a table of entities: its name must end in {', '.join(_TABLES)}.")
        return _Records(source)
    import datasets

    try:
        # Streamed from a directory: the cache of `datasets` would give the old rows of one that was written anew.
        return datasets.load_dataset(source, "entities", split="kb", streaming=path.is_dir())
    except (ValueError, OSError) as error:
        raise CommandError(
            f"The entities {source!r} cannot be loaded: {one_line(error)} They are a data set's directory or Hub id, "
            "with the configuration `entities` and the split `kb`, or a JSON Lines or CSV file."
        ) from error


class _Records:
    """Records of a table, read anew each time: a build that goes on compares what it has with them first."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        read = _csv_rows if Path(self.path).suffix.lower() == ".csv" else _json_lines
        for number, record in read(self.path):
            if record.get("id") in (None, ""):
                raise CommandError(f"{self.path}, line {number}: the entity has no `id`.")
            images = record.get("images", record.get("image"))
            if isinstance(images, str):
                images = images.split("|") if read is _csv_rows else [images]
            if not isinstance(images, list | None) or not all(isinstance(image, str) for image in images or []):
                raise CommandError(f"{self.path}, line {number}: `images` must be paths or URLs.")
            seen = [_seen_from(self.path, image) for image in images or [] if image]
            yield {**{name: value for name, value in record.items() if name != "image"}, "images": seen}


def image_places(source: str, image_root: str | None, allow_urls: AllowUrls) -> dict[str, Any]:
    """Where the images that a table of entities names are read from: by default from its own folder alone."""
    root: str | bool | None = image_root
    if root is None and Path(source).exists():
        root = source if Path(source).is_dir() else os.path.dirname(os.path.abspath(source))
    return {"image_root": root, "allow_urls": allow_urls.switch}


# --- Mentions ---------------------------------------------------------------------------------------------------------


def mentions_of(place: str) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Number of the line, record, and what the pipeline is given of it, of each mention or document in a file."""
    for number, record in _json_lines(place):
        inputs = {name: record[name] for name in _INPUTS if record.get(name) is not None}
        if "mention" in record:
            inputs["mention"] = record["mention"]  # one that is null is no document
        if isinstance(record.get("image"), str):
            inputs["image"] = _seen_from(place, record["image"])
        yield number, record, inputs


def read_mentions(source: str, split: str) -> Any:
    """Mentions with answers, of a data set (a directory or a Hub id) or a JSON Lines file.

    Raises:
        CommandError: if there are none.
    """
    if Path(source).suffix.lower() in (".jsonl", ".json"):
        if not Path(source).is_file():
            raise CommandError(f"There is no file {source}.")
        return _answered(source)
    import datasets

    try:
        return datasets.load_dataset(source, "mentions", split=split)
    except (ValueError, OSError) as error:
        raise CommandError(
            f"The mentions {source!r} cannot be loaded: {one_line(error)} They are a data set's directory or Hub id, "
            f"with the configuration `mentions` and the split {split!r}, or a JSON Lines file."
        ) from error


def _answered(place: str) -> Iterator[dict[str, Any]]:
    for number, record, inputs in mentions_of(place):
        if "answer" not in record:
            raise CommandError(
                f"{place}, line {number}: the mention has no `answer`; where the entity is not in the knowledge base, "
                "it is null."
            )
        yield {**inputs, "answer": record["answer"]}


# --- Tables -----------------------------------------------------------------------------------------------------------


def _json_lines(place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    file = sys.stdin if place == "-" else open(place, encoding="utf-8-sig")  # noqa: SIM115
    try:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CommandError(
                    f"{place}, line {number}: not JSON: {error}. Each line must be a JSON object."
                ) from error
            if not isinstance(record, dict):
                raise CommandError(f"{place}, line {number}: not an object, but a {type(record).__name__}.")
            yield number, record
    except UnicodeDecodeError as error:
        raise CommandError(f"{place} is not UTF-8: {error}") from error
    finally:
        if place != "-":
            file.close()


def _csv_rows(place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(place, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise CommandError(f"{place}, line {reader.line_num}: not as many cells as the header has.")
                yield reader.line_num, dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise CommandError(f"{place}, line {reader.line_num}: not CSV: {error}") from error


def _seen_from(place: str, image: str | None) -> str | None:
    """A path in a table, as seen from the table; an address as it is."""
    if not image or place == "-" or re.match(r"data:|[a-z][a-z0-9+.-]+://", image[:64], re.IGNORECASE):
        return image or None
    return os.path.join(os.path.dirname(os.path.abspath(place)), image)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def load_model(source: str, device: str | None) -> tuple[Any, Any]:
    """Model and processor; the package's own code, never a checkpoint's."""
    import torch
    from transformers import PreTrainedConfig

    from ..configuration_mimic import MimicConfig
    from ..modeling_mimic import MimicModel
    from ..processing_mimic import MimicProcessor

    try:
        if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
            raise CommandError(f"{source} is not a MIMIC checkpoint: it has no config.json.")
        values, _ = PreTrainedConfig.get_config_dict(source)
        if values.get("model_type") != MimicConfig.model_type:
            raise CommandError(f"{source} is not a MIMIC checkpoint: its model type is {values.get('model_type')!r}.")
        # Without this, transformers would ask at the keyboard whether to run the code that the checkpoint brings.
        own: dict[str, Any] = {"trust_remote_code": False}
        model = MimicModel.from_pretrained(source, **own)
        processor = MimicProcessor.from_pretrained(source, **own)
    except Exception as error:  # a damaged configuration fails in many ways
        if isinstance(error, MimicError):
            raise
        where = "" if Path(source).exists() else f" There is no directory {source!r}; as a Hub id:"
        raise CommandError(f"The model {source!r} cannot be loaded.{where} {one_line(error)}") from error
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else f"{accelerator.type}:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return model.eval().to(device), processor
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"There is no device {device!r}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


__all__ = ["CommandError", "image_places", "load_model", "mentions_of", "one_line", "read_entities", "read_mentions"]

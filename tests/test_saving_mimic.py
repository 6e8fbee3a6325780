"""Directories that a caller saves in: what was there stays as it was where saving fails, and goes where it succeeds."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_processor
from tiny_clip import tiny_config, tiny_model

from mimic_el.errors_mimic import EntityIndexError, LoadError, MimicError, SaveError
from mimic_el.modeling_mimic import MimicModel
from mimic_el.pipeline_mimic import MultimodalEntityLinkingPipeline
from mimic_el.processing_mimic import MimicProcessor

MODEL = tiny_model()
PROCESSOR = tiny_processor(MODEL)
DOORS: dict[str, Callable[..., Any]] = {
    "configuration": tiny_config().save_pretrained,
    "processor": PROCESSOR.save_pretrained,
    "model": MODEL.save_pretrained,
    "pipeline": MultimodalEntityLinkingPipeline(model=MODEL, processor=PROCESSOR).save_pretrained,
}


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more bytes than that into a file, whatever library writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("door", DOORS)
def test_where_nothing_can_be_written(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At the first file or the last, by Python or by a library in Rust: told in our words, and nothing is lost."""
    save, place = DOORS[door], tmp_path / "there"
    place.mkdir()
    save(place)
    before = contents(place)
    assert before["config.json" if door != "processor" else "processor_config.json"]
    for size in (10, 2000, 30_000):
        if size >= max(map(len, before.values())):
            continue
        with files_of_at_most(size), pytest.raises(SaveError, match=r"there cannot be saved to: .*as it was"):
            save(place)
        with files_of_at_most(size), pytest.raises(SaveError):
            save(tmp_path / "new")
        assert contents(place) == before
        assert [path.name for path in tmp_path.iterdir()] == ["there"]

    def full(*paths: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(paths[1]))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)  # the code
        with pytest.raises(SaveError, match=r"there cannot be saved to: no space is left on its disk\. Make room"):
            save(place)
    assert contents(place) == before


@pytest.mark.parametrize("door", DOORS)
def test_what_lies_in_the_way(door: str, tmp_path: Path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "there" / "configuration_mimic.py" / "in").mkdir(parents=True)
    for name in ("file", "file/below", "there"):
        with pytest.raises(SaveError, match=f"{name} cannot be saved to: (?!.*saving-)"):
            DOORS[door](tmp_path / name)
    with pytest.raises(MimicError, match="`save_directory` is empty"):
        DOORS[door]("")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["configuration_mimic.py"]


def test_an_index_and_a_pipeline_with_its_index(tmp_path: Path):
    entities = [{"id": f"e{number}", "name": "E", "description": ""} for number in range(9)]
    linker = MultimodalEntityLinkingPipeline(model=MODEL, processor=PROCESSOR, entities=entities)
    linker.save_pretrained(tmp_path, save_index=True)
    before = contents(tmp_path)
    largest = max(len(data) for name, data in before.items() if "shard" in name)
    for size in (10, 1000, largest - 1):
        with files_of_at_most(size), pytest.raises(EntityIndexError, match=r"shard.* cannot be written: .*too large"):
            linker.index.save_pretrained(tmp_path / "index")
        with files_of_at_most(size), pytest.raises(MimicError):
            linker.save_pretrained(tmp_path, save_index=True)
        assert contents(tmp_path) == before
    linker.model.config.default_index = None
    (tmp_path / "other" / "index").parent.mkdir()
    (tmp_path / "other" / "index").write_text("text")
    with pytest.raises(EntityIndexError, match=r"index.*cannot be made a directory"):
        linker.save_pretrained(tmp_path / "other", save_index=True)
    assert linker.model.config.default_index is None
    assert set(contents(tmp_path / "other")) == {"index"}


@pytest.mark.parametrize("door", ["model", "pipeline"])
@pytest.mark.parametrize("sizes", [("1MB", "20KB"), ("20KB", "1MB"), ("20KB", "40KB")])
def test_weights_of_a_checkpoint_that_is_replaced(door: str, sizes: tuple[str, str], tmp_path: Path):
    """In one file or several, none that is left is loaded in the place of a new one; what is not ours stays."""
    DOORS[door](tmp_path, max_shard_size=sizes[0])
    (tmp_path / "model.fp16.safetensors").write_text("another's")
    other = tiny_model(seed=1)
    save = other.save_pretrained
    if door == "pipeline":
        save = MultimodalEntityLinkingPipeline(model=other, processor=PROCESSOR).save_pretrained
    save(tmp_path, max_shard_size=sizes[1])
    loaded = MimicModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in other.state_dict().items())
    assert (tmp_path / "model.fp16.safetensors").read_text() == "another's"


DAMAGES: dict[str, bytes] = {
    "nested": b"[" * 100_000,
    "no mapping": b"[1]",
    "no UTF-8": b'{"a": "\xff"}',
    "no JSON": b"{",
    "a number": b"1" * 5000,
}
WRONG: dict[str, list[Any]] = {
    "backbone_config": [
        "x",
        {"model_type": ["clip"]},
        {"model_type": "clip", "id2label": "x"},
        {"model_type": "clip", "projection_dim": [[]]},
        {"model_type": "clip", "dtype": "true"},
    ],
    "image_processor": [5, {"size": [[]]}, {"image_processor_type": [1]}, {"auto_map": 5}],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    MODEL.save_pretrained(directory)
    PROCESSOR.save_pretrained(directory)
    return directory


def load(directory: Path) -> None:
    MimicModel.from_pretrained(directory)
    MimicProcessor.from_pretrained(directory)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_of_a_checkpoint(damage: str, name: str, saved: Path, tmp_path: Path):
    place = shutil.copytree(saved, tmp_path / "there")
    (place / name).write_bytes(DAMAGES[damage])
    with pytest.raises((LoadError, OSError), match="there"):  # transformers has a sentence for files that are no JSON
        load(place)


@pytest.mark.parametrize("key", WRONG)
def test_wrong_values_in_files_of_a_checkpoint(key: str, saved: Path, tmp_path: Path):
    place = shutil.copytree(saved, tmp_path / "there")
    path = place / ("config.json" if key == "backbone_config" else "processor_config.json")
    before = json.loads(path.read_text())
    for value in WRONG[key]:
        path.write_text(json.dumps({**before, key: value}))
        with pytest.raises((LoadError, TypeError), match=r"there|MimicConfig: `backbone_config`"):
            load(place)


def test_weights_of_another_configuration(saved: Path, tmp_path: Path):
    place = shutil.copytree(saved, tmp_path / "there")
    tiny_config(tglu_hidden_size=5).save_pretrained(place)
    with pytest.raises(LoadError, match="its weights do not fit its configuration"):
        load(place)

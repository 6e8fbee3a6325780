"""Parquet files: cut by size, whole or not there, remembered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Features, Image, List, Value, load_dataset
from mel_archives import noise

from mimic_el.datasets_scripts import shards
from mimic_el.datasets_scripts.shards import Manifest, Shard, plan_shards, row_bytes, write_shard

FEATURES = Features({"id": Value("string"), "image": Image(), "images": List(Image())})


def rows(count: int) -> list[dict[str, Any]]:
    image = {"bytes": noise(0), "path": "a.png"}
    return [{"id": str(i), "image": image if i % 2 else None, "images": [image] * (i % 3)} for i in range(count)]


@pytest.mark.parametrize(
    ("sizes", "limit", "bounds"),
    [
        ([5, 5, 5], 10, [(0, 2), (2, 3)]),
        ([50, 1, 50], 10, [(0, 1), (1, 2), (2, 3)]),
        ([1] * 5, 100, [(0, 5)]),
        ([0, 0], 1, [(0, 2)]),
    ],
)
def test_plan(sizes: list[int], limit: int, bounds: list[tuple[int, int]]) -> None:
    plan = plan_shards("mentions", "train", sizes, limit)
    assert [(shard.start, shard.stop) for shard in plan] == bounds
    assert [shard.path for shard in plan] == [
        f"mentions/train-{index:05d}-of-{len(bounds):05d}.parquet" for index in range(len(bounds))
    ]


def test_written_rows_are_read_by_datasets(tmp_path: Path) -> None:
    count, size = write_shard(tmp_path / "a" / "x.parquet", iter(rows(7)), FEATURES)
    assert (count, size) == (7, (tmp_path / "a" / "x.parquet").stat().st_size)
    loaded = load_dataset("parquet", data_files=str(tmp_path / "a" / "x.parquet"), split="train")
    assert loaded.features == FEATURES
    assert loaded.cast_column("image", Image(decode=False))["image"][:2] == [None, rows(2)[1]["image"]]
    assert [len(images) for images in loaded["images"]] == [0, 1, 2, 0, 1, 2, 0]
    assert loaded[1]["image"].size == (64, 64)


def test_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROW_GROUP_BYTES", 40_000)
    write_shard(tmp_path / "x.parquet", rows(30), FEATURES)
    metadata = pq.read_metadata(tmp_path / "x.parquet")
    sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    assert sum(sizes) == 30
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    groups = [rows(30)[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    assert all(len(group) == 1 or sum(map(row_bytes, group)) <= 40_000 for group in groups)


def test_images_are_not_compressed_again(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.parquet", rows(5), FEATURES)
    group = pq.read_metadata(tmp_path / "x.parquet").row_group(0)
    columns = [group.column(index) for index in range(group.num_columns)]
    compression = {column.path_in_schema: column.compression for column in columns}
    assert compression == {
        "id": "SNAPPY",
        "image.bytes": "UNCOMPRESSED",
        "image.path": "SNAPPY",
        "images.list.element.bytes": "UNCOMPRESSED",
        "images.list.element.path": "SNAPPY",
    }


def test_an_interrupted_file_does_not_appear(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield from rows(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "x.parquet", broken(), FEATURES)
    assert not (tmp_path / "x.parquet").exists()
    write_shard(tmp_path / "x.parquet", rows(3), FEATURES)
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_manifest(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path / "out", "input 1")
    shard = Shard("mentions/a.parquet", 0, 3)
    assert not manifest.is_complete(shard)
    _, size = write_shard(tmp_path / "out" / shard.path, rows(3), FEATURES)
    manifest.shards[shard.path] = {"rows": 3, "bytes": size}
    manifest.save()
    assert Manifest(tmp_path / "out", "input 1").is_complete(shard)
    with pytest.raises(FileExistsError, match="another input or other options"):
        Manifest(tmp_path / "out", "input 2")
    (tmp_path / "out" / shard.path).write_bytes(b"cut")
    assert not Manifest(tmp_path / "out", "input 1").is_complete(shard)
    manifest.path.write_text("{")
    with pytest.raises(FileExistsError, match="damaged"):
        Manifest(tmp_path / "out", "input 1")


def test_manifest_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="was not written by this command"):
        Manifest(tmp_path, "input")

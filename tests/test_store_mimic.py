"""How an index is stored: bit for bit, in so many bytes, and safely read whatever the files hold."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import index_of, mention_features, random_encoded, small_shards
from tiny_clip import tiny_model
from torch import Tensor

from mimic_el import directory_mimic, files_mimic, store_mimic
from mimic_el.configuration_mimic import MimicConfig
from mimic_el.errors_mimic import EntityIndexError
from mimic_el.index_mimic import EntityIndex
from mimic_el.matching_mimic import EntityFeatures, Matcher
from mimic_el.modeling_mimic import MimicModel
from mimic_el.precision_mimic import dequantized, quantized
from mimic_el.store_mimic import Store, make_shard, read_shard, write_shard

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
COUNT = 12


@pytest.fixture(scope="module")
def model() -> MimicModel:
    return tiny_model()


@pytest.fixture(scope="module")
def features(model: MimicModel) -> EntityFeatures:
    with torch.no_grad():
        return model.matcher.entity_features(*random_encoded(model.config, COUNT))


def records(count: int = COUNT) -> list[dict[str, Any]]:
    return [
        {
            "id": f"e{row}",
            "name": "Ünï \u2028\n\u0000 „🍊“"[row % 7 :],
            "description": '"\\{}',
            "year": row,
            "true": True,
        }
        for row in range(count)
    ]


# --- Numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_bit_for_bit(dtype: str, model: MimicModel, features: EntityFeatures, tmp_path: Path):
    with torch.no_grad():
        stored = quantized(features, model.matcher, DTYPES[dtype])
    written = make_shard("shard-1", stored, records())
    read = read_shard(tmp_path, write_shard(tmp_path, written))
    assert list(read.table) == records()
    assert read.tensors.keys() == stored.keys()
    for name, tensor in read.tensors.items():
        assert tensor.dtype == stored[name].dtype
        assert tensor.shape == stored[name].shape
        assert tensor.contiguous().numpy().tobytes() == stored[name].contiguous().numpy().tobytes(), name
    np.testing.assert_array_equal(read.hashes, written.hashes)
    for record in records():
        row = int(record["id"][1:])
        assert Store([read]).row(record["id"]) == row
        assert read.table[row] == record
    assert Store([read]).row("nobody") is None


def test_float32_is_what_the_model_gives(model: MimicModel, features: EntityFeatures):
    stored = quantized(features, model.matcher, torch.float32)
    for name, tensor in features.tensors.items():
        torch.testing.assert_close(stored[name], tensor, rtol=1e-5, atol=1e-6)
        if not name.endswith("stats"):
            assert torch.equal(stored[name], tensor)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_rounding_is_as_small_as_the_precision_allows(dtype: str, model: MimicModel, features: EntityFeatures):
    stored = quantized(features, model.matcher, DTYPES[dtype])
    for name, tensor in features.tensors.items():
        if name == "text_bias" or name.endswith("stats"):
            assert stored[name].dtype == torch.float32, "a few numbers, which scores hang on"
            continue
        error = (dequantized(stored, name) - tensor).abs()
        # Half a step: of the 127 to the largest number of the vector, or of 11 binary digits.
        half_step = tensor.abs().amax(dim=-1, keepdim=True) / 254 if dtype == "int8" else tensor.abs() * 2.0**-11
        assert (error <= half_step * 1.001 + 1e-7).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_an_entity_belong_to_its_vectors_as_rounded(dtype: str, model: MimicModel, features: EntityFeatures):
    """Squares of the rounded vectors, not rounded squares: expanded sums must cancel."""
    stored = quantized(features, model.matcher, DTYPES[dtype])
    q, z = dequantized(stored, "image_query_q"), dequantized(stored, "image_key_z")
    torch.testing.assert_close(stored["image_query_stats"][:, 0], q.square().sum(dim=-1))
    torch.testing.assert_close(stored["image_key_stats"][:, 0], z.square().sum(dim=-1))


def test_zero_vectors(model: MimicModel, features: EntityFeatures):
    """Their largest number, which int8 divides by, is zero."""
    zeros = EntityFeatures({name: torch.zeros_like(tensor) for name, tensor in features.tensors.items()})
    for dtype in DTYPES.values():
        stored = quantized(zeros, model.matcher, dtype)
        assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in stored.values())
        assert not dequantized(stored, "text_query").any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["text_query", "text_bias", "image_key_stats"])
def test_values_that_are_not_finite_are_refused(name: str, value: float, model: MimicModel, features: EntityFeatures):
    tensors = {key: tensor.clone() for key, tensor in features.tensors.items()}
    tensors[name].view(COUNT, -1)[3, -1] = value
    for dtype in DTYPES.values():
        with pytest.raises(EntityIndexError, match=f"`{name}` values that are not finite"):
            quantized(EntityFeatures(tensors), model.matcher, dtype)


def test_values_beyond_float16_are_refused(model: MimicModel, features: EntityFeatures):
    large = EntityFeatures({**features.tensors, "text_local": features.tensors["text_local"] * 1e6})
    with pytest.raises(EntityIndexError, match='`text_local` are too large for float16; use dtype="float32"'):
        quantized(large, model.matcher, torch.float16)
    for dtype in (torch.float32, torch.int8):
        restored = dequantized(quantized(large, model.matcher, dtype), "text_local")
        torch.testing.assert_close(restored, large.tensors["text_local"], rtol=1e-2, atol=1e5)


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 10_500), ("int8", 5_500)])
def test_bytes_of_an_entity_at_the_published_dimensions(dtype: str, limit: int, tmp_path: Path):
    config = MimicConfig()
    matcher = Matcher(config).requires_grad_(False)
    stored = quantized(matcher.entity_features(*random_encoded(config, 64)), matcher, DTYPES[dtype])
    shard = make_shard("shard-1", stored, records(64))
    assert Store([shard]).feature_bytes / 64 <= limit
    write_shard(tmp_path, shard)
    header_and_numbers = 4096 + 64 * 24
    assert (tmp_path / "shard-1.safetensors").stat().st_size <= 64 * limit + header_and_numbers


@pytest.mark.parametrize(("dtype", "agreement"), [("float16", 1.0), ("int8", 0.9)])
def test_ranking_is_that_of_float32(dtype: str, agreement: float):
    model = tiny_model()
    encoded, mask = random_encoded(model.config, 300, 1, 100)
    mentions = mention_features(model, *random_encoded(model.config, 100, 2, 100))
    first = [row[0] for row in index_of(model, encoded, mask, "float32").search(mentions, 1).entity_ids]
    same = [row[0] for row in index_of(model, encoded, mask, dtype).search(mentions, 1).entity_ids]
    assert np.mean([one == other for one, other in zip(first, same, strict=True)]) >= agreement


# --- Rows of several shards


@pytest.fixture
def store(model: MimicModel, features: EntityFeatures) -> Store:
    stored = quantized(features, model.matcher, torch.int8)
    parts = torch.arange(COUNT).split([5, 1, 6])
    return Store(
        [
            make_shard(f"shard-{n}", {k: t[rows] for k, t in stored.items()}, [records()[row] for row in rows.tolist()])
            for n, rows in enumerate(parts)
        ]
    )


@pytest.mark.parametrize(
    "rows",
    [slice(0, COUNT), slice(4, 7), slice(5, 6), torch.tensor([11, 0, 5, 5, 4, 6, 0]), torch.tensor([7])],
    ids=str,
)
def test_rows_come_as_asked_for(rows: Any, store: Store, model: MimicModel, features: EntityFeatures):
    stored = quantized(features, model.matcher, torch.int8)
    full = store.full(rows, CPU).tensors
    assert full.keys() == features.tensors.keys()
    for name, tensor in full.items():
        assert torch.equal(tensor, dequantized(stored, name)[rows]), name
    some = store.gather(rows, ["text_local", "nothing"], CPU)
    assert some.keys() == {"text_local"}
    assert torch.equal(some["text_local"], dequantized(stored, "text_local")[rows])


def test_records_and_removed_rows(store: Store):
    assert [store.record(row) for row in range(COUNT)] == records()
    assert store.alive(0, COUNT) is None
    removed = torch.zeros(COUNT, dtype=torch.bool)
    removed[[0, 5, 8]] = True
    some = Store(store.shards, removed)
    assert [record["id"] for record in some.records()] == [f"e{row}" for row in (1, 2, 3, 4, 6, 7, 9, 10, 11)]
    assert some.row("e5") is None
    assert some.row("e6") == 6
    alive = some.alive(4, 9)
    assert alive is not None
    assert alive.tolist() == [True, False, True, True, False]
    compact = list(some.compacted(lambda _: 4, "shard-{}".format))
    assert [len(shard) for shard in compact] == [4, 4, 1]
    assert [record["id"] for shard in compact for record in shard.table] == [r["id"] for r in some.records()]
    kept = (~removed).nonzero().squeeze(1)
    for name in store.shards[0].tensors:
        before = torch.cat([shard.tensors[name] for shard in store.shards])[kept]
        assert torch.equal(torch.cat([shard.tensors[name] for shard in compact]), before), "copied as it is stored"


def test_ids_whose_hashes_collide(model: MimicModel, features: EntityFeatures, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_mimic, "hash_id", lambda entity_id: 7)
    stored = quantized(features, model.matcher, torch.float32)
    shard = make_shard("shard-1", stored, records())
    store = Store([shard])
    assert [store.row(f"e{row}") for row in range(COUNT)] == list(range(COUNT))
    assert store.row("e12") is None


# --- Damaged files


@pytest.fixture
def saved(model: MimicModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index of two shards, with a removed entity."""
    small_shards(monkeypatch, COUNT // 2)
    place = tmp_path / "index"
    index_of(model, *random_encoded(model.config, COUNT), dtype="float16").save_pretrained(place)
    index = EntityIndex.from_pretrained(place)
    index.remove(["e3"])
    index.verify()
    assert [len(shard) for shard in EntityIndex.from_pretrained(place)._contents.store.shards] == [COUNT // 2] * 2
    return place


def files(place: Path, pattern: str) -> list[Path]:
    found = sorted(place.glob(pattern))
    assert found
    return found


def change_manifest(place: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = place / "index_config.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    # With a digest that fits: what is tested is what finds a change beside it.
    path.write_text(json.dumps(directory_mimic.sealed(manifest)))


def change_tensors(place: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes what is in the first shard's file, with its size in the list of files made to fit."""
    path = files(place, "shard-*.safetensors")[0]
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    fit_size(place, path)


def fit_size(place: Path, path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for entry in manifest["shards"]:
            if path.name in entry["files"]:
                entry["files"][path.name]["bytes"] = path.stat().st_size

    change_manifest(place, change)


@pytest.mark.parametrize("pattern", ["shard-*.safetensors", "shard-*.jsonl", "matcher-*", "removed-*"])
@pytest.mark.parametrize("damage", ["missing", "short", "long", "empty"])
def test_files_that_are_missing_or_of_another_size(pattern: str, damage: str, saved: Path):
    path = files(saved, pattern)[-1]
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"short": data[:-7], "long": data + b"\n{}", "empty": b""}[damage])
    with pytest.raises(EntityIndexError, match=r"Restore (it|the file), or build the index again") as raised:
        EntityIndex.from_pretrained(saved)
    assert path.name in str(raised.value)


@pytest.mark.parametrize("pattern", ["shard-*.safetensors", "shard-*.jsonl", "matcher-*", "removed-*"])
def test_a_flipped_bit_is_found(pattern: str, saved: Path):
    """The sizes are right: only a checksum tells."""
    path = files(saved, pattern)[0]
    data = bytearray(path.read_bytes())
    data[-8] ^= 4
    path.write_bytes(data)
    # A matcher is small, and all scores hang on it: it is compared when the index is opened.
    with pytest.raises(EntityIndexError, match=r"checksum differs|changed or damaged") as raised:
        EntityIndex.from_pretrained(saved).verify()
    assert path.name in str(raised.value)


def test_verify_names_a_file_that_went_missing(saved: Path):
    index = EntityIndex.from_pretrained(saved)
    path = files(saved, "shard-*.jsonl")[0]
    path.unlink()
    with pytest.raises(EntityIndexError, match=f"{path.name} is missing"):
        index.verify()


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\0" * 8, b"\x10\0\0\0\0\0\0\0not json at all!", b"{}"])
def test_garbage_in_place_of_features(header: bytes, saved: Path):
    path = files(saved, "shard-*.safetensors")[0]
    data = path.read_bytes()
    path.write_bytes(header + data[len(header) :])
    with pytest.raises(EntityIndexError, match="is damaged"):
        EntityIndex.from_pretrained(saved)


def drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    "change",
    [
        drop("table.offsets"),
        drop("table.hashes"),
        drop("feature.text_query"),
        drop("feature.image_key_stats"),
        put("table.offsets", lambda offsets: offsets.double()),
        put("table.offsets", lambda offsets: offsets[:0]),
        put("table.offsets", lambda offsets: offsets[:-1]),
        put("table.offsets", lambda offsets: offsets.unsqueeze(0)),
        put("table.offsets", lambda offsets: offsets + 10**12),
        put("table.hashes", lambda hashes: hashes.int()),
        put("table.hashes", lambda hashes: hashes[:-1]),
        put("table.hash_rows", lambda rows: rows.long()),
        put("table.hash_rows", lambda rows: rows[:-1]),
        put("feature.text_local", lambda local: local[:, :-1]),
        put("feature.text_local", lambda local: local[:-1]),
        put("feature.text_local", lambda local: local.float()),
        put("feature.text_local", lambda local: local.sum()),
        put("feature.text_query", lambda query: query[:, :-1]),
        put("feature.text_query", lambda query: query.flatten(1)),
        put("feature.text_bias", lambda bias: bias.half()),
        lambda tensors: tensors.update({"feature.more": torch.zeros(COUNT // 2)}),
    ],
)
def test_features_that_are_not_as_they_must_be(change: Callable[[dict[str, Tensor]], Any], saved: Path):
    change_tensors(saved, change)
    with pytest.raises(EntityIndexError, match="uild the index again"):
        EntityIndex.from_pretrained(saved)


@pytest.mark.parametrize(
    "change",
    [
        put("table.offsets", lambda offsets: torch.cat([offsets[:1], -offsets[1:-1], offsets[-1:]])),
        put("table.offsets", lambda offsets: torch.cat([offsets[:1], offsets[1:-1].flip(0), offsets[-1:]])),
        put("table.offsets", lambda offsets: torch.cat([offsets[:1], offsets[1:-1] + 1, offsets[-1:]])),
        put("table.hash_rows", lambda rows: rows + COUNT),
        put("table.hash_rows", lambda rows: rows - COUNT),
    ],
)
def test_table_that_points_elsewhere(change: Callable[[dict[str, Tensor]], Any], saved: Path):
    """Not found at once, which would take reading the whole table, but where it is read."""
    change_tensors(saved, change)
    index = EntityIndex.from_pretrained(saved)
    with pytest.raises(EntityIndexError, match="entity table is damaged at row"):
        [index.entity(record["id"]) for record in records() if record["id"] != "e3"]


@pytest.mark.parametrize(
    "line", [b"{" * 3, b"[" * 100_000, b"[]", b'"id"', b"{}", b'{"id": 5}', b'{"id": "e0"', b"\xff\xfe\xfa"]
)
def test_table_with_a_line_that_is_no_entity(line: bytes, saved: Path):
    path = files(saved, "shard-*.jsonl")[0]
    lines = path.read_bytes().splitlines(keepends=True)
    first = line.ljust(len(lines[0]) - 1) + b"\n"
    path.write_bytes(first + b"".join(lines[1:]))
    fit_size(saved, path)
    change_tensors(
        saved, put("table.offsets", lambda offsets: torch.cat([offsets[:1], offsets[1:] + len(first) - len(lines[0])]))
    )
    index = EntityIndex.from_pretrained(saved)
    assert index._contents.store.record(1)["id"] == "e1"
    with pytest.raises(EntityIndexError, match="entity table is damaged at row 0"):
        list(index)


@pytest.mark.parametrize("rows", [torch.tensor([COUNT]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([[0]])])
def test_removed_rows_that_are_none(rows: Tensor, saved: Path):
    save_file({"rows": rows}, files(saved, "removed-*")[0])
    with pytest.raises(EntityIndexError, match="does not hold rows of this index"):
        EntityIndex.from_pretrained(saved)


# --- The list of files


@pytest.mark.parametrize("text", ["", "{", "[]", '"index"', "null", "[" * 100_000, "\ud800", "{}"])
def test_garbage_in_place_of_the_list(text: str, saved: Path):
    (saved / "index_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(EntityIndexError, match=r"damaged|does not describe an entity index"):
        EntityIndex.from_pretrained(saved)


def test_newer_format(saved: Path):
    change_manifest(saved, lambda manifest: manifest.update(version=2))
    with pytest.raises(EntityIndexError, match=r"has the format 2, newer than the 1 .* Update the code"):
        EntityIndex.from_pretrained(saved)


@pytest.mark.parametrize(
    "name", ["../shard-1", "/etc/passwd", "shard-1/../../x", "shard-\0", "", "SHARD", "shard-1.x", 5]
)
@pytest.mark.parametrize("key", ["shards", "matcher", "removed"])
def test_names_that_lead_elsewhere(key: str, name: Any, saved: Path):
    def change(manifest: dict[str, Any]) -> None:
        if key == "shards":
            entry = manifest["shards"][0]
            entry["name"] = name
            entry["files"] = {
                f"{name}{end}": facts
                for end, facts in zip((".safetensors", ".jsonl"), entry["files"].values(), strict=True)
            }
        else:
            manifest[key] = name

    change_manifest(saved, change)
    with pytest.raises(EntityIndexError, match="is not a valid name"):
        EntityIndex.from_pretrained(saved)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "index_config.json"])
def test_verify_reads_no_file_elsewhere(name: str, saved: Path):
    change_manifest(saved, lambda manifest: manifest["files"].update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(EntityIndexError, match="`files` is missing or not valid"):
        EntityIndex.from_pretrained(saved)


STRANGE: tuple[Any, ...] = ("x", -1.5, [], [[]], {"a": 1})


@pytest.mark.parametrize(
    "change",
    [
        *[lambda m, key=key: m.pop(key) for key in ("generation", "dtype", "model", "shards", "matcher", "format")],
        *[
            lambda m, key=key, value=value: m.update({key: value})
            for key in ("generation", "dtype", "model", "shards", "matcher", "removed", "files", "version")
            for value in STRANGE
        ],
        lambda m: m["shards"][0].pop("files"),
        lambda m: m["shards"][0].pop("count"),
        lambda m: m["shards"][0].update(count=10**15),
        lambda m: m["shards"][0]["files"].clear(),
        lambda m: [facts.pop("bytes") for facts in m["shards"][0]["files"].values()],
        lambda m: m["shards"].append("x"),
        lambda m: m["model"].pop("fingerprint"),
        lambda m: m["model"].update(config=None),
        lambda m: m["model"]["config"].update(tglu_hidden_size=-1),
        lambda m: m["model"]["config"].update(tglu_hidden_size=7),
        lambda m: m["model"]["config"].update(tglu_hidden_size=10**9),
        lambda m: m["model"]["config"].update(backbone_config="x"),
        lambda m: m["model"]["config"].update(backbone_config={"model_type": "bert"}),
        lambda m: m.update(dtype="int8"),
    ],
)
def test_list_that_is_not_as_it_must_be(change: Callable[[dict[str, Any]], Any], saved: Path):
    change_manifest(saved, change)
    with pytest.raises(EntityIndexError):
        EntityIndex.from_pretrained(saved)


def test_no_index_there(tmp_path: Path):
    with pytest.raises(EntityIndexError, match=r"There is no entity index in .* it has no index_config.json"):
        EntityIndex.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(EntityIndexError, match="There is no entity index"):
        EntityIndex.from_pretrained(tmp_path / "file")


# --- Writing


def test_files_may_be_read_as_the_user_wishes(saved: Path):
    """safetensors makes files that only their owner may read; an index may be for all."""
    usual = saved / "usual"
    usual.touch()
    mode = stat.S_IMODE(usual.stat().st_mode)
    for path in files(saved, "*-*.*"):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_a_file_is_whole_or_not_there(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files_mimic.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    files_mimic.write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KB."""
    place = tmp_path / "little"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], capture_output=True)
    if mount.returncode:
        pytest.skip("cannot mount a file system here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk(little_disk: Path, model: MimicModel):
    """What fits is stored; what does not leaves no trace, and is an error that says so."""
    small = index_of(model, *random_encoded(model.config, 20))
    large = index_of(model, *random_encoded(model.config, 500))
    place = little_disk / "index"
    small.save_pretrained(place)
    before = sorted(os.listdir(place))
    with pytest.raises(EntityIndexError, match=r"No space is left on the disk of .*: make room"):
        large.save_pretrained(place)
    index = EntityIndex.from_pretrained(place)
    index.verify()
    assert len(index) == 20
    index.remove(["e1"])
    assert len(os.listdir(place)) == len(before) + 1, "the removed rows, and nothing left behind"

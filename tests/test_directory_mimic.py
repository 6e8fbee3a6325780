"""The directory of an index: few files however it grows, any number of them, and no damage that goes unnoticed."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_files_mimic import in_time  # noqa: F401  a fixture
from tiny import index_of, knowledge_base, mention_features, random_encoded, small_shards, tiny_processor
from tiny_clip import tiny_model

from mimic_el import building_mimic, directory_mimic, store_mimic
from mimic_el.directory_mimic import sealed, shard_size
from mimic_el.errors_mimic import EntityIndexError, UnknownEntityError
from mimic_el.index_mimic import EntityIndex
from mimic_el.matching_mimic import MentionFeatures
from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor

resource = pytest.importorskip("resource")
MANIFEST = "index_config.json"
COUNT = 12


@pytest.fixture(scope="module")
def model() -> MimicModel:
    return tiny_model()


@pytest.fixture(scope="module")
def processor(model: MimicModel) -> MimicProcessor:
    return tiny_processor(model)


@pytest.fixture(scope="module")
def mentions(model: MimicModel) -> MentionFeatures:
    return mention_features(model, *random_encoded(model.config, 4, seed=1, clusters=5))


def clusters(model: MimicModel, count: int, **options: Any) -> EntityIndex:
    return index_of(model, *random_encoded(model.config, count, clusters=5), **options)


@pytest.fixture
def few_files() -> Iterator[None]:
    """A process that may have few files open: fewer than an index has."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def sizes(place: Path) -> list[int]:
    return [entry["count"] for entry in json.loads((place / MANIFEST).read_text())["shards"]]


# --- Many shards


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
@pytest.mark.usefixtures("few_files")
def test_more_shards_than_files_may_be_open(
    model: MimicModel, processor: MimicProcessor, mentions: MentionFeatures, tmp_path: Path, monkeypatch: Any
):
    count = 50
    kb = [{"id": f"e{row}", "name": f"n {row}"} for row in range(count)]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(building_mimic, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        EntityIndex.build(model, processor, kb, tmp_path, shard_entities=1, show_progress=False)
    monkeypatch.undo()
    built = EntityIndex.build(model, processor, kb, tmp_path, shard_entities=1, show_progress=False)
    assert sizes(tmp_path) == [1] * count
    opened = EntityIndex.from_pretrained(tmp_path)
    assert list(opened) == [entity["id"] for entity in kb]
    found = built.search(mentions, 7)
    assert opened.search(mentions, 7).entity_ids == found.entity_ids
    opened.verify()
    opened.add(model, processor, [{"id": "new", "name": "n"}], show_progress=False)
    assert sizes(tmp_path) == [count + 1], "what is small is joined"
    opened.remove(["new"])
    opened.compact()
    assert EntityIndex.from_pretrained(tmp_path).search(mentions, 7).entity_ids == found.entity_ids


def test_shards_grow_with_an_index():
    """A hundred million entities are some 1,600 shards; none is larger than memory holds while it is made."""
    stored, count = 0, 0
    while stored < 10**8:
        stored, count = stored + shard_size(stored), count + 1
    assert shard_size(0) == 8192
    assert shard_size(10**12) == 65_536
    assert 1_000 < count < 2_000


def test_shards_of_a_large_index(model: MimicModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    small_shards(monkeypatch, 2)
    monkeypatch.setattr(directory_mimic, "_SHARDS_BEFORE_GROWTH", 3)
    clusters(model, 60, shards=30).save_pretrained(tmp_path)
    # Each as large as a third of what is before it, in steps of 2, from 2 to 8 times 2.
    assert sizes(tmp_path) == [2, 2, 2, 2, 2, 2, 4, 4, 6, 8, 10, 14, 2]
    features = model.matcher.entity_features(*random_encoded(model.config, 60))
    records = [{"id": str(row)} for row in range(60)]
    EntityIndex.from_features(features, records, model).save_pretrained(tmp_path)
    assert sizes(tmp_path) == [2, 2, 2, 2, 2, 2, 4, 4, 6, 8, 10, 14, 2]


def test_each_call_of_add_does_not_cost_a_file(
    model: MimicModel, processor: MimicProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small_shards(monkeypatch, 16)
    kb = knowledge_base(41)
    index = EntityIndex.build(model, processor, kb[:20], tmp_path, show_progress=False)
    for number, entity in enumerate(kb[20:], 21):
        index.add(model, processor, [entity], show_progress=False)
        if number == 25:
            index.remove(["e22"])
        assert len(sizes(tmp_path)) <= number / 16 + 5
    assert sum(sizes(tmp_path)) == 41, "a removed row stays until the index is compacted"
    whole = EntityIndex.build(model, processor, kb, show_progress=False)
    whole.remove(["e22"])
    index.verify()
    for found in (index, EntityIndex.from_pretrained(tmp_path)):
        assert list(found.entities()) == list(whole.entities())
        row = found._contents.row("e40")
        assert row is not None
        there, here = (i._contents.store.full(torch.tensor([row]), torch.device("cpu")) for i in (whole, found))
        torch.testing.assert_close(here.tensors, there.tensors, rtol=1e-2, atol=1e-2)


# --- Errors after a change


def test_an_error_while_cleaning_up_is_not_told_as_one_of_the_change(
    model: MimicModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    clusters(model, COUNT).save_pretrained(tmp_path)
    index = EntityIndex.from_pretrained(tmp_path)
    unlink = Path.unlink

    def failing(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("shard-"):
            raise OSError(errno.EACCES, "Permission denied")
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", failing)
        index.remove(["e1"])
        index.compact()
    assert "files of its old state are left" in caplog.text
    index.remove(["e2"])
    assert "e2" not in EntityIndex.from_pretrained(tmp_path)
    assert len(list(tmp_path.glob("shard-*.jsonl"))) == 1, "they are deleted later"


def test_a_file_that_vanishes_while_it_is_opened(model: MimicModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another process has committed in between: the list is read again. Otherwise it is told."""
    clusters(model, COUNT).save_pretrained(tmp_path)
    size_of = store_mimic.size_of

    def gone(path: Path) -> int | None:
        size = size_of(path)
        path.unlink()
        return size

    monkeypatch.setattr(store_mimic, "size_of", gone)
    with pytest.raises(EntityIndexError):
        EntityIndex.from_pretrained(tmp_path)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("name", ["matcher-*", "removed-*", "shard-*.jsonl", "shard-*.safetensors", MANIFEST])
def test_a_pipe_in_the_place_of_a_file(name: str, model: MimicModel, tmp_path: Path):
    clusters(model, COUNT).save_pretrained(tmp_path)
    EntityIndex.from_pretrained(tmp_path).remove(["e1"])
    path = next(tmp_path.glob(name))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(EntityIndexError):
        EntityIndex.from_pretrained(tmp_path)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("what", ["pipe", "zero"])
def test_a_pipe_in_the_place_of_the_state_of_a_build(what: str, model: MimicModel, tmp_path: Path):
    clusters(model, COUNT).save_pretrained(tmp_path)
    path = tmp_path / "build_state.json"
    os.mkfifo(path) if what == "pipe" else path.symlink_to("/dev/zero")
    EntityIndex.from_pretrained(tmp_path).remove(["e1"])
    assert "e1" not in EntityIndex.from_pretrained(tmp_path)


# --- Damage


@pytest.fixture(scope="module")
def sound(model: MimicModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of three shards of four entities, one of them removed."""
    place = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch, 4)
        clusters(model, COUNT).save_pretrained(place)
        EntityIndex.from_pretrained(place).remove(["e5"])
    return place


@pytest.fixture
def place(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "index"))


def answers(place: Path, mentions: MentionFeatures, model: MimicModel) -> Any:
    """All that a user sees of an index; the errors of this package are answers, too."""
    index = EntityIndex.from_pretrained(place)
    index.check_model(model)
    found = [index.search(mentions, 5, method=method) for method in ("pruned", "exhaustive")]
    ranks = index.rank(mentions, ["e0", "e1", "e2", "e3"]).ranks.tolist()
    records = [index.entity(f"e{row}") if f"e{row}" in index else None for row in range(COUNT)]
    return [len(index), list(index), records, [(f.entity_ids, f.scores.tolist()) for f in found], ranks]


def is_noticed(place: Path, sound_answers: Any, mentions: MentionFeatures, model: MimicModel) -> bool:
    """Whether damage is refused or found, or changes no answer. Any other error fails."""
    try:
        same = answers(place, mentions, model) == sound_answers
    except (EntityIndexError, UnknownEntityError):
        return True
    try:
        EntityIndex.from_pretrained(place).verify()
    except EntityIndexError:
        return True
    return same


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places in a list of files: of what it holds, and of what holds it."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


VALUES: tuple[Any, ...] = (None, True, -1, 0, 10**30, 1e999, "", "x", "../../x", "\ud800", [], {}, [[]], {"a": 1})


def mutations(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changed lists of files, one change in each: every place has its turn, the values take turns."""
    for number, path in enumerate(leaves(manifest)):
        for step in (0, 5):
            changed = copy.deepcopy(manifest)
            holder: Any = changed
            for key in path[:-1]:
                holder = holder[key]
            value = VALUES[(number + step) % len(VALUES)]
            if (number + step) % 4 == 0:
                del holder[path[-1]]
                yield f"{path} deleted", changed
            elif (number + step) % 4 == 1 and isinstance(holder, list):
                holder.append(copy.deepcopy(holder[path[-1]]))
                yield f"{path} twice", changed
            else:
                holder[path[-1]] = value
                yield f"{path} = {value!r}", changed


def test_a_list_of_files_with_any_change(place: Path, mentions: MentionFeatures, model: MimicModel):
    """Whoever changes the list and its digest with it gets an error of ours, or the right answers.

    Of some hundred changes a few are tried; MUTATIONS_STEP=1 tries all.
    """
    expected = answers(place, mentions, model)
    manifest = json.loads((place / MANIFEST).read_text())
    unnoticed = []
    some = list(mutations(manifest))[:: int(os.environ.get("MUTATIONS_STEP", "13"))]
    for what, changed in some:
        (place / MANIFEST).write_text(json.dumps(sealed(changed)))
        if not is_noticed(place, expected, mentions, model):
            unnoticed.append(what)
    assert len(some) >= 20
    assert not unnoticed


def test_a_list_of_files_has_a_digest(place: Path):
    path = place / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["model"]["name"] = "another"
    path.write_text(json.dumps(manifest))
    with pytest.raises(EntityIndexError, match="it is not what was written, as its own digest shows"):
        EntityIndex.from_pretrained(place)
    del manifest["digest"], manifest["entities"]
    path.write_text(json.dumps(manifest))
    assert len(EntityIndex.from_pretrained(place)) == COUNT - 1, "those of the first version have none"


def refit(place: Path) -> None:
    """Makes sizes, checksums and digest fit files that were changed: what a forger does."""
    path = place / MANIFEST
    manifest = json.loads(path.read_text())
    for files in (manifest["files"], *(entry["files"] for entry in [*manifest["shards"], manifest["names"]])):
        for name in files:
            files[name] = directory_mimic.file_facts(place / name)
    path.write_text(json.dumps(sealed(manifest)))


def change_lines(place: Path, change: Callable[[list[bytes]], Any]) -> None:
    """Changes the lines of the first shard's table; its offsets are made to fit."""
    path = min(place.glob("shard-*.jsonl"))
    lines = path.read_bytes().splitlines(keepends=True)
    change(lines)
    path.write_bytes(b"".join(lines))
    features = path.with_suffix(".safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(features).items()}
    tensors["table.offsets"] = torch.tensor([0, *map(len, lines)]).cumsum(0)
    save_file(tensors, features)
    refit(place)


LINES: dict[str, Callable[[list[bytes]], Any]] = {
    "an id twice": lambda lines: lines.__setitem__(1, lines[0]),
    "another id": lambda lines: lines.__setitem__(1, lines[1].replace(b"e1", b"x1")),
    "a name that is not a text": lambda lines: lines.__setitem__(1, b'{"id": "e1", "name": ["a"], "description": 5}\n'),
    "half of a character": lambda lines: lines.__setitem__(1, b'{"id": "e1", "name": "\\ud800", "description": ""}\n'),
    "a number that is none": lambda lines: lines.__setitem__(1, b'{"id": "e1", "name": "", "x": NaN}\n'),
    "lines in another order": lambda lines: lines.reverse(),
    "an empty id": lambda lines: lines.__setitem__(1, b'{"id": "", "name": ""}\n'),
}


@pytest.mark.parametrize("name", LINES)
def test_a_table_with_any_change(name: str, place: Path, mentions: MentionFeatures, model: MimicModel):
    expected = answers(place, mentions, model)
    change_lines(place, LINES[name])
    assert is_noticed(place, expected, mentions, model)
    with pytest.raises(EntityIndexError):
        EntityIndex.from_pretrained(place).verify()
    index = EntityIndex.from_pretrained(place)
    for act in (lambda: index.remove(["e7"]), index.compact):
        try:
            act()
        except (EntityIndexError, UnknownEntityError):
            continue


TENSORS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "hashes in no order": lambda t: t.update({"table.hashes": t["table.hashes"].flip(0)}),
    "rows twice": lambda t: t["table.hash_rows"].fill_(1),
    "a number that is not finite": lambda t: t["feature.text_local"][2].fill_(torch.nan),
    "an infinite number": lambda t: t["feature.image_key_stats"][0, 0].fill_(torch.inf),
}


@pytest.mark.parametrize("name", TENSORS)
def test_features_with_any_change(name: str, place: Path, mentions: MentionFeatures, model: MimicModel):
    expected = answers(place, mentions, model)
    path = min(place.glob("shard-*.safetensors"))
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    TENSORS[name](tensors)
    save_file(tensors, path)
    refit(place)
    assert is_noticed(place, expected, mentions, model)
    with pytest.raises(EntityIndexError, match=r"'e[02]'" if name.endswith(("finite", "number")) else "damaged"):
        EntityIndex.from_pretrained(place).verify()


def test_a_shard_or_the_removed_rows_taken_out(place: Path):
    manifest = json.loads((place / MANIFEST).read_text())
    for change in (
        lambda m: m.update(removed=None),
        lambda m: m["shards"].pop(1),
        lambda m: m["shards"].append(m["shards"][0]),
        lambda m: m.update(entities=12),
    ):
        changed = copy.deepcopy(manifest)
        change(changed)
        (place / MANIFEST).write_text(json.dumps(sealed(changed)))
        with pytest.raises(EntityIndexError):
            EntityIndex.from_pretrained(place)


def test_shards_in_another_order_are_found(place: Path):
    """Rows that were removed, and those of names, would be other entities'."""
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["shards"].reverse()
    (place / MANIFEST).write_text(json.dumps(sealed(manifest)))
    index = EntityIndex.from_pretrained(place)
    for act in (index.verify, lambda: index.find("Orange")):
        with pytest.raises(EntityIndexError, match="in another order"):
            act()


@pytest.mark.parametrize("name", ["rows", "written", "texts", "hashes", "order"])
def test_names_that_are_not_those_of_the_tables_are_found(name: str, place: Path):
    path = next(place.glob("names-*"))
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors[name][:2] = tensors[name][:2].flip(0) if name != "texts" else tensors[name][:2] + 1
    save_file(tensors, path, metadata=metadata)
    refit(place)
    with pytest.raises(EntityIndexError, match="does not hold the names"):
        EntityIndex.from_pretrained(place).verify()
    EntityIndex.from_pretrained(place).build_names()
    EntityIndex.from_pretrained(place).verify()


@pytest.mark.parametrize("change", ["build_names", "remove", "compact"])
def test_names_by_the_rules_of_another_version(change: str, place: Path, caplog: pytest.LogCaptureFixture):
    """They are passed over, told, and made anew by the next change."""
    index = EntityIndex.from_pretrained(place)
    expected = {record["name"]: index.find(record["name"]) for record in index.entities()}
    path = next(place.glob("names-*"))
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # noqa: SIM118
    # Other arrays, even.
    save_file({"later": tensors["hashes"]}, path, metadata={**metadata, "rules": "2"})
    refit(place)
    opened = EntityIndex.from_pretrained(place)
    opened.verify()
    assert {name: opened.find(name) for name in expected} == expected
    assert "names by the rules '2'" in caplog.text
    assert "Call build_names()" in caplog.text
    caplog.clear()
    getattr(opened, change)(*[["e1"]] * (change == "remove"))
    again = EntityIndex.from_pretrained(place)
    again.verify()
    assert again.find("E 2") == expected["E 2"]
    assert not caplog.text


@pytest.mark.parametrize("which", ["one shard", "all shards"])
@pytest.mark.parametrize("length", [0, 1])
def test_features_of_another_number_of_tokens_are_refused(which: str, length: int, place: Path):
    shards = sorted(place.glob("shard-*.safetensors"))
    if which == "all shards" and length:
        pytest.skip("texts of one token are possible")
    for path in shards if which == "all shards" else shards[:1]:
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        tensors["feature.text_query"] = tensors["feature.text_query"][:, :length].clone()
        save_file(tensors, path)
    refit(place)
    with pytest.raises(EntityIndexError, match="are not those that this index's model makes"):
        EntityIndex.from_pretrained(place)


def test_a_removed_row_twice(place: Path):
    path = next(place.glob("removed-*"))
    save_file({"rows": torch.tensor([5, 5])}, path)
    refit(place)
    with pytest.raises(EntityIndexError, match="holds a row twice"):
        EntityIndex.from_pretrained(place)


def test_verify_reads_an_index_in_memory_too(model: MimicModel):
    index = clusters(model, COUNT)
    index.verify()
    index._contents.store.shards[0].tensors["text_embed"][4, 0] = torch.nan
    with pytest.raises(EntityIndexError, match="`text_embed` of entity 'e4' are not finite"):
        index.verify()
    index.remove(["e4"])
    index.verify()


def test_half_a_character_in_a_manifest_is_refused_when_it_is_opened(place: Path):
    """It could be read, and not written again: the next change would fail."""
    manifest = json.loads((place / "index_config.json").read_text())
    manifest["model"]["name"] = "\ud800"
    (place / "index_config.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(EntityIndexError, match="is damaged"):
        EntityIndex.from_pretrained(place)

"""Tests of parts_mimic.py: parts of an index built by processes that may fail, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from gloo import outcomes_together
from python_processes import own_python
from tiny import assert_equal_bytes, assert_same_index, knowledge_base, once, tiny_processor
from tiny import built_by_twos as build
from tiny_clip import tiny_model

from mimic_el import building_mimic, files_mimic, parts_mimic
from mimic_el.directory_mimic import files_of, read_manifest
from mimic_el.errors_mimic import EntityIndexError, MimicImageError
from mimic_el.index_mimic import EntityIndex
from mimic_el.modeling_mimic import MimicModel
from mimic_el.parts_mimic import checked_part
from mimic_el.processing_mimic import MimicProcessor

ENTITIES = 11
now_of_this_machine = time.time


@pytest.fixture(scope="module")
def parts() -> tuple[MimicModel, MimicProcessor]:
    model = tiny_model()
    return model, tiny_processor(model)


@pytest.mark.parametrize("count", [1, 3, ENTITIES])
def test_the_last_part_joins_all(parts: tuple[MimicModel, MimicProcessor], tmp_path: Path, count: int) -> None:
    whole = build(parts, knowledge_base(ENTITIES), None)
    order = list(range(count))[::-1]
    for number in order:
        index = build(parts, knowledge_base(ENTITIES), tmp_path / "index", shard=(number, count))
        if number:
            assert len(index) in (ENTITIES // count, ENTITIES // count + 1)
            with pytest.raises(EntityIndexError, match="There is no entity index"):
                EntityIndex.from_pretrained(tmp_path / "index")
    assert_same_index(index, whole, parts)
    index.verify()
    assert index.directory == tmp_path / "index"
    assert not list((tmp_path / "index").glob("part-*"))
    with pytest.raises(EntityIndexError, match="already holds an index"):
        build(parts, knowledge_base(ENTITIES), tmp_path / "index", shard=(0, count))


def test_a_part_that_was_interrupted_goes_on(
    parts: tuple[MimicModel, MimicProcessor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what it had not finished is encoded again; the other part is not touched."""
    entities = knowledge_base(ENTITIES)
    build(parts, entities, tmp_path / "index", shard=(0, 2))
    write_shard = building_mimic.write_shard
    written: list[str] = []

    def killed(directory: Path, shard: Any) -> Any:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(shard.name)
        return write_shard(directory, shard)

    with monkeypatch.context() as patch:
        patch.setattr(building_mimic, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            build(parts, entities, tmp_path / "index", shard=(1, 2))
    encoded: list[int] = []

    def counted(directory: Path, shard: Any) -> Any:
        encoded.append(len(shard))
        return write_shard(directory, shard)

    with monkeypatch.context() as patch:
        patch.setattr(building_mimic, "write_shard", counted)
        index = build(parts, entities, tmp_path / "index", shard=(1, 2))
    assert encoded == [2, 1]  # 5 entities, of which a shard of 2 was there
    assert_same_index(index, build(parts, entities, None), parts)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0), 3, "1/2", (True, 2), (0.0, 2), (np.True_, 2)])
def test_a_shard_that_is_none(parts: tuple[MimicModel, MimicProcessor], tmp_path: Path, shard: Any) -> None:
    with pytest.raises(ValueError, match="`shard` must be the number of a part"):
        build(parts, knowledge_base(4), tmp_path / "index", shard=shard)


def test_a_shard_in_numbers_of_numpy() -> None:
    """As Ray Data, or a table of jobs, has them."""
    assert checked_part(np.array([1, 2])) == (1, 2)
    assert [type(number) for number in checked_part((np.int64(0), np.uint8(1)))] == [int, int]


def test_entities_that_cannot_be_cut_into_parts(parts: tuple[MimicModel, MimicProcessor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 entities cannot be built in 3 parts"):
        build(parts, knowledge_base(2), tmp_path / "index", shard=(0, 3))
    with pytest.raises(ValueError, match="not a generator"):
        build(parts, once(knowledge_base(4)), tmp_path / "index", shard=(0, 2))
    with pytest.raises(ValueError, match="needs an `output_dir`"):
        build(parts, knowledge_base(4), None, shard=(0, 2))


def test_parts_of_what_is_read_one_after_the_other(parts: tuple[MimicModel, MimicProcessor], tmp_path: Path) -> None:
    """A table that is read anew each time, a data set that is streamed, and what has a length but no numbers."""

    class Table:
        def __iter__(self) -> Any:
            return iter(knowledge_base(ENTITIES))

    whole = build(parts, knowledge_base(ENTITIES), None)
    plain = [{**entity, "images": []} for entity in knowledge_base(ENTITIES)]
    streamed = datasets.Dataset.from_list(plain).to_iterable_dataset()
    sized: Any = {entity["id"]: entity for entity in plain}.values()
    for name, entities in (("table", Table()), ("streamed", streamed), ("sized", sized)):
        for number in range(3):
            index = build(parts, entities, tmp_path / name, shard=(number, 3))
        assert list(index) == list(whole)
        if name == "table":
            assert_same_index(index, whole, parts)
        with pytest.raises(ValueError, match="11 entities cannot be built in 12 parts"):
            build(parts, entities, tmp_path / "more", shard=(0, 12))


def test_parts_of_a_data_set_read_no_files_that_it_names(
    parts: tuple[MimicModel, MimicProcessor], tmp_path: Path
) -> None:
    """As a whole build: the rows of a data set may be somebody else's."""
    secret = tmp_path / "secret.png"
    next(iter(knowledge_base(1)[0]["images"])).save(secret)
    rows = [{"id": f"e{row}", "name": f"E{row}", "description": "", "images": [str(secret)]} for row in range(4)]
    with pytest.raises(MimicImageError):
        build(parts, datasets.Dataset.from_list(rows), tmp_path / "a", shard=(1, 2), on_image_error="raise")
    allowed = build(
        parts, datasets.Dataset.from_list(rows), tmp_path / "b", shard=(1, 2), on_image_error="raise", image_root=True
    )
    assert list(allowed) == ["e2", "e3"]
    assert len(build(parts, rows, tmp_path / "c", shard=(1, 2), on_image_error="raise")) == 2


# --- Processes that were started together

# Builds an index of 11 entities in several processes, by the same call in each.
_TOGETHER = """
import os, signal, sys
sys.path.insert(0, tests)
import tiny, tiny_clip
from mimic_el import EntityIndex, building_mimic, joining_mimic, parts_mimic

parts_mimic._PAUSES = 0.01, 0.05
model = tiny_clip.tiny_model()
write_shard, written = building_mimic.write_shard, []

fault = faults.get(str(rank))

def noted(directory, shard):
    if fault in ("killed", "stopped") and len(written) == 1:
        os.kill(os.getpid(), signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    if fault == "full" and len(written) == 1:
        raise OSError(28, "No space left on device")
    written.append(len(shard))
    return write_shard(directory, shard)

building_mimic.write_shard = noted
if fault == "killed in joining":
    publish = joining_mimic.publish
    def killed(directory, *args):
        try:
            os.close(os.open(first, os.O_CREAT | os.O_EXCL))  # of those that come to this, the first
        except FileExistsError:
            return publish(directory, *args)
        os.kill(os.getpid(), signal.SIGKILL)
    joining_mimic.publish = killed
entities = tiny.knowledge_base(number, start=5 if fault == "other data" else 0)
options = {"encoding_dtype": "bfloat16"} if fault == "other options" else {}
index = EntityIndex.build(model, tiny.tiny_processor(model), entities, place, shard_entities=2, show_progress=False,
                          patience=patience, **options)
result = [list(index), str(index.directory), written]
"""


@pytest.fixture(scope="module")
def together(hub: Any) -> Any:
    def run(
        folder: Path,
        count: int,
        *,
        connect: bool = True,
        faults: Any = (),
        number: int = ENTITIES,
        patience: float = 60.0,
    ) -> Any:
        outcomes, output = outcomes_together(
            own_python(hub),
            count,
            _TOGETHER,
            folder.with_name(f"{folder.name}-outcomes-{len(list(folder.parent.iterdir()))}"),
            connect=connect,
            tests=str(Path(__file__).parent),
            faults=dict(faults),
            place=str(folder),
            number=number,
            patience=patience,
            first=str(folder.with_name("first")),
        )
        stopped = [rank for rank, fault in dict(faults).items() if fault == "stopped"]
        assert all(kind != "hangs" for rank, (kind, _) in enumerate(outcomes) if rank not in stopped), output
        return outcomes

    return run


@pytest.mark.parametrize(("count", "connect"), [(2, True), (3, False)], ids=["connected", "only-started"])
def test_processes_that_are_started_together_build_one_index(
    parts: tuple[MimicModel, MimicProcessor], together: Any, tmp_path: Path, count: int, connect: bool
) -> None:
    """Each encodes a part; all have the whole index."""
    outcomes = together(tmp_path / "index", count, connect=connect)
    whole = build(parts, knowledge_base(ENTITIES), None)
    assert [kind for kind, _ in outcomes] == ["result"] * count, outcomes
    for _, (ids, directory, _) in outcomes:
        assert (ids, directory) == (list(whole), str(tmp_path / "index"))
    sizes = [sum(value[2]) for _, value in outcomes]
    assert sum(sizes) == ENTITIES
    assert max(sizes) - min(sizes) <= 1
    assert_same_index(EntityIndex.from_pretrained(tmp_path / "index"), whole, parts)
    assert not list((tmp_path / "index").glob("part-*"))
    # Once more: all have it, and nothing is encoded. Other entities are refused.
    assert [value[2] for _, value in together(tmp_path / "index", count, connect=connect)] == [[]] * count
    for kind, message in together(tmp_path / "index", count, connect=connect, number=ENTITIES - 1):
        assert kind == "error"
        assert "already holds an index" in message
    # Nor is an index that was changed since what this build would give.
    EntityIndex.from_pretrained(tmp_path / "index").remove(["e0"])
    for kind, message in together(tmp_path / "index", count, connect=connect):
        assert kind == "error"
        assert "already holds an index" in message


@pytest.fixture(scope="module")
def undisturbed(together: Any, tmp_path_factory: pytest.TempPathFactory) -> EntityIndex:
    directory = tmp_path_factory.mktemp("undisturbed") / "index"
    assert [kind for kind, _ in together(directory, 2)] == ["result", "result"]
    return EntityIndex.from_pretrained(directory)


@pytest.mark.parametrize("fault", ["killed", "stopped", "full"])
def test_a_process_that_ends_is_not_waited_for_and_its_part_goes_on(
    undisturbed: EntityIndex, together: Any, tmp_path: Path, fault: str
) -> None:
    """Killed, or stopped, or by a full disk: nothing is lost but its last shard."""
    one, other = together(tmp_path / "index", 2, faults={1: fault}, patience=1.0)
    assert one[0] == "error"
    assert "Waited for part-00001-of-00002" in one[1]
    assert "none gave a sign of life for 1 seconds" in one[1]
    assert "pass shard=None" in one[1]
    assert "no space" in other[1].lower() if fault == "full" else other[0] in ("killed", "hangs")
    outcomes = together(tmp_path / "index", 2)
    assert [kind for kind, _ in outcomes] == ["result", "result"]
    assert [value[2] for _, value in outcomes] == [[], [2, 1]]  # of 5 entities 2 were stored
    assert_equal_bytes(EntityIndex.from_pretrained(tmp_path / "index"), undisturbed)


def test_one_that_is_killed_while_it_joins_the_parts_is_stood_in_for(
    undisturbed: EntityIndex, together: Any, tmp_path: Path
) -> None:
    """Between the links to the shards and the list of files; the other joins them, and nothing is left over."""
    outcomes = together(tmp_path / "index", 2, faults=dict.fromkeys(range(2), "killed in joining"))
    assert sorted(kind for kind, _ in outcomes) == ["killed", "result"]
    index = EntityIndex.from_pretrained(tmp_path / "index")
    assert_equal_bytes(index, undisturbed)
    left = {path.name for path in (tmp_path / "index").iterdir()}
    assert left - {path.name for path in Path(str(undisturbed.directory)).iterdir() if "-" not in path.name} == {
        file for file in files_of(read_manifest(tmp_path / "index")) if "-" in file
    }
    # Once more, after the fact: both have it, and nothing is encoded.
    assert [value[2] for _, value in together(tmp_path / "index", 2)] == [[], []]


def test_clocks_that_differ(
    parts: tuple[MimicModel, MimicProcessor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of machines and of the file system: an index of before is not taken for the one that is built, and one of
    this launch is."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    directory = tmp_path / "index"
    hour = 3600.0
    for ahead in (-hour, hour):
        shutil.rmtree(directory, ignore_errors=True)
        for number in range(2):
            build(parts, knowledge_base(6), directory, shard=(number, 2))
        # The old index was written by a machine whose clock is wrong; the new one has another name in it.
        now = time.time() + ahead
        os.utime(directory / "index_config.json", (now, now))
        renamed = [{**entity, "name": f"New {entity['id']}"} for entity in knowledge_base(6)]
        build(parts, renamed, directory, shard=(1, 2), overwrite=True)
        assert (directory / "part-00001-of-00002").exists()
        index = build(parts, renamed, directory, shard=(0, 2), overwrite=True)
        assert index.entity("e0")["name"] == "New e0"
        assert not list(directory.glob("part-*"))
        # A process that comes when they are joined already, whose clock is wrong.
        with monkeypatch.context() as patch:
            patch.setattr(parts_mimic.time, "time", lambda ahead=ahead: now_of_this_machine() + ahead)
            for since, joined_now in ((-60.0, True), (60.0, False)):
                patch.setattr(parts_mimic, "_STARTED", time.time() + since)
                together = parts_mimic._Together(directory, 0, 2, True, 1.0)
                together.whole = {
                    name: value
                    for name, value in json.loads((directory / "part_of.json").read_text()).items()
                    if name not in ("builds", "generation", "first_shard")
                }
                assert together.was_joined() is joined_now


def test_a_directory_that_a_dead_machine_holds_is_given_up(
    parts: tuple[MimicModel, MimicProcessor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without locks, where nobody can tell whether the owner is alive."""
    monkeypatch.setattr(files_mimic, "_flock", lambda *_: False)
    monkeypatch.setattr(files_mimic, "_LOCK_SECONDS", 0.05)
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / ".lock-owner").write_text("a-machine-that-is-gone 1")
    with pytest.raises(EntityIndexError, match=r"the file .*\.lock-owner says that another process"):
        build(parts, knowledge_base(4), tmp_path / "index", shard=(0, 2), patience=0.2)
    (tmp_path / "index" / ".lock-owner").unlink()
    assert len(build(parts, knowledge_base(4), tmp_path / "index", shard=(0, 2), patience=0.2)) == 2
    with pytest.raises(ValueError, match="`patience` must be a number of seconds above 0"):
        build(parts, knowledge_base(4), tmp_path / "index", shard=(1, 2), patience=0)


def test_a_process_whose_part_was_joined_before_it_came_has_the_index(
    parts: tuple[MimicModel, MimicProcessor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its part was complete since an earlier launch, so the others did not wait for it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    build(parts, knowledge_base(6), tmp_path / "index", shard=(0, 2))
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        index = build(parts, knowledge_base(6), tmp_path / "index")
        assert list(index) == [f"e{row}" for row in range(6)]
        assert not list((tmp_path / "index").glob("part-*"))


def test_processes_with_other_data_and_too_many_processes_are_refused(together: Any, tmp_path: Path) -> None:
    for fault, told in (("other data", "parts of different entities"), ("other options", "another encoding_dtype")):
        for kind, message in together(tmp_path / fault, 2, faults={1: fault}, patience=2.0):
            assert kind == "error"
            assert told in message or "Waited for part-0000" in message
        assert not (tmp_path / fault / "index_config.json").exists()
    for kind, message in together(tmp_path / "few", 3, number=2):
        assert kind == "error"
        assert "2 entities cannot be built in 3 parts" in message


def test_a_part_of_other_entities_is_not_taken_for_this_one(
    parts: tuple[MimicModel, MimicProcessor], tmp_path: Path
) -> None:
    """Complete since an earlier call, as many, under other ids."""
    build(parts, knowledge_base(6, start=1), tmp_path / "index", shard=(0, 2))
    with pytest.raises(EntityIndexError, match=r"part-00000-of-00002 was begun as a part of other entities"):
        build(parts, knowledge_base(6), tmp_path / "index", shard=(0, 2))
    build(parts, knowledge_base(6), tmp_path / "index", shard=(0, 2), overwrite=True)
    assert list(build(parts, knowledge_base(6), tmp_path / "index", shard=(1, 2))) == [f"e{row}" for row in range(6)]


def test_overwriting_takes_nothing_of_what_is_given_up(
    parts: tuple[MimicModel, MimicProcessor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other part, complete since an earlier call with other entities, is not joined before it is made again."""
    build(parts, knowledge_base(6, start=1), tmp_path / "index", shard=(1, 2))
    first = build(parts, knowledge_base(6), tmp_path / "index", shard=(0, 2), overwrite=True)
    assert list(first) == ["e0", "e1", "e2"]
    encoded: list[int] = []
    write_shard = building_mimic.write_shard

    def noted(directory: Path, shard: Any) -> Any:
        encoded.append(len(shard))
        return write_shard(directory, shard)

    monkeypatch.setattr(building_mimic, "write_shard", noted)
    both = build(parts, knowledge_base(6), tmp_path / "index", shard=(1, 2), overwrite=True)
    assert list(both) == [f"e{row}" for row in range(6)]
    assert encoded == [2, 1]  # the first part was of the same, and is kept


def test_a_complete_part_whose_entities_have_changed(
    parts: tuple[MimicModel, MimicProcessor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one of many records, which the sample does not see."""
    monkeypatch.setattr(parts_mimic, "_SAMPLED", 2)
    build(parts, knowledge_base(6), tmp_path / "index", shard=(0, 2))
    changed = knowledge_base(6)
    changed[1]["description"] = "another"
    with pytest.raises(EntityIndexError, match="is complete, with entities as they were before"):
        build(parts, changed, tmp_path / "index", shard=(0, 2))
    build(parts, changed, tmp_path / "index", shard=(0, 2), overwrite=True)
    index = build(parts, changed, tmp_path / "index", shard=(1, 2))
    assert index.entity("e1")["description"] == "another"


def test_what_is_left_of_parts_that_were_joined_goes(parts: tuple[MimicModel, MimicProcessor], tmp_path: Path) -> None:
    """Where the process that joined them was killed before it had deleted them all."""
    build(parts, knowledge_base(6), tmp_path / "index", shard=(0, 2))
    own = tmp_path / "index" / "part-00000-of-00002"
    shutil.copytree(own, tmp_path / "kept")
    index = build(parts, knowledge_base(6), tmp_path / "index", shard=(1, 2))
    shutil.copytree(tmp_path / "kept", own, copy_function=shutil.copy2)
    again = build(parts, knowledge_base(6), tmp_path / "index", shard=(0, 2))
    assert list(again) == list(index)
    assert not own.exists()
    again.verify()

"""Tests of joining_mimic.py: stored indexes joined to one, what is refused, and what is left when it is killed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from gloo import outcomes_together
from python_processes import own_python
from tiny import assert_equal_bytes, assert_same_index, knowledge_base, tiny_processor
from tiny import built_by_twos as build
from tiny_clip import tiny_model

from mimic_el import joining_mimic
from mimic_el.errors_mimic import EntityIndexError
from mimic_el.index_mimic import EntityIndex
from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor


@pytest.fixture(scope="module")
def parts() -> tuple[MimicModel, MimicProcessor]:
    model = tiny_model()
    return model, tiny_processor(model)


def test_parts_of_machines_that_share_nothing_are_merged(
    parts: tuple[MimicModel, MimicProcessor], tmp_path: Path
) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    build(parts, knowledge_base(6), directories[0])
    second = build(parts, knowledge_base(6, start=6), directories[1])
    second.remove(["e7"])
    index = EntityIndex.merge(directories, tmp_path / "index")
    known = [entity for entity in knowledge_base(12) if entity["id"] != "e7"]
    assert_same_index(index, build(parts, known, None), parts)
    assert "e7" not in index
    linked = next((tmp_path / "index").glob("shard-*.safetensors"))
    assert os.stat(linked).st_nlink == 2  # nothing was copied
    assert len(EntityIndex.from_pretrained(directories[0])) == 6  # the parts stay
    index.compact()  # and are not changed by changes of the index
    assert len(EntityIndex.from_pretrained(directories[1])) == 5

    moved = EntityIndex.merge(directories, tmp_path / "moved", move=True)
    assert len(moved) == 11
    assert not any(directory.exists() for directory in directories)
    moved.verify()


def test_files_are_copied_where_they_cannot_be_linked(
    parts: tuple[MimicModel, MimicProcessor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(joining_mimic.os, "link", refuse)
    one = build(parts, knowledge_base(4), tmp_path / "a")
    assert_same_index(EntityIndex.merge([tmp_path / "a"], tmp_path / "index"), one, parts)


def test_a_merge_that_fails_leaves_nothing(
    parts: tuple[MimicModel, MimicProcessor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk, when the second shard is copied, a piece of it, and when the list of files is written."""
    build(parts, knowledge_base(6), tmp_path / "a")
    copyfile, calls = shutil.copyfile, []

    def full(source: Any, place: Any, *args: Any) -> Any:
        calls.append(place)
        if len(calls) < 3:
            return copyfile(source, place)
        place.write_bytes(source.read_bytes()[:100])
        raise OSError(28, "No space left on device")

    def no_links(*args: Any) -> Any:
        raise OSError("no links here")

    def no_list(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    for faults in ({"os.link": no_links, "shutil.copyfile": full}, {"publish": no_list}):
        with monkeypatch.context() as patch:
            for name, function in faults.items():
                patch.setattr(f"mimic_el.joining_mimic.{name}", function)
            with pytest.raises(EntityIndexError, match="No space is left on the disk"):
                EntityIndex.merge([tmp_path / "a"], tmp_path / "index", move=True)
        assert not list((tmp_path / "index").glob("shard-*"))
        assert len(EntityIndex.from_pretrained(tmp_path / "a")) == 6
    assert len(calls) == 3
    assert len(EntityIndex.merge([tmp_path / "a"], tmp_path / "index", move=True)) == 6


def test_parts_that_do_not_fit_are_refused(parts: tuple[MimicModel, MimicProcessor], tmp_path: Path) -> None:
    build(parts, knowledge_base(4), tmp_path / "a")
    build(parts, knowledge_base(4, start=3), tmp_path / "common")
    build(parts, knowledge_base(4, start=4), tmp_path / "int8", dtype="int8")
    other = tiny_model(seed=1)
    build((other, tiny_processor(other)), knowledge_base(4, start=4), tmp_path / "other")
    shutil.copytree(tmp_path / "a", tmp_path / "cut")
    (tmp_path / "empty").mkdir()
    next((tmp_path / "cut").glob("shard-*.jsonl")).unlink()
    for name, message in (
        ("common", "both have the entity 'e3'"),
        ("int8", "is stored in int8, the part .* in float16"),
        ("other", "was made by another model or processor"),
        ("cut", "lacks its file"),
        ("nothing", r"There is no directory .*nothing. Parts are directories; .*from_pretrained\('.*nothing'\)"),
        ("empty", "There is no entity index in"),
        ("a", "is named twice"),
    ):
        with pytest.raises(EntityIndexError, match=message):
            EntityIndex.merge([tmp_path / "a", tmp_path / name], tmp_path / "index")
        assert not list((tmp_path / "index").glob("shard-*"))
    with pytest.raises(EntityIndexError, match="There are no parts to merge"):
        EntityIndex.merge([], tmp_path / "index")
    with pytest.raises(ValueError, match="must be a list of directories"):
        EntityIndex.merge(str(tmp_path / "a"), tmp_path / "index")
    with pytest.raises(EntityIndexError, match="already holds an index"):
        EntityIndex.merge([tmp_path / "common"], tmp_path / "a")


def test_only_the_index_is_deleted_of_a_part_that_is_moved(
    parts: tuple[MimicModel, MimicProcessor], tmp_path: Path
) -> None:
    """Not what else lies there, such as the index that is made of it, or another part."""
    build(parts, knowledge_base(4), tmp_path / "a")
    build(parts, knowledge_base(4, start=4), tmp_path / "a" / "b")
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    index = EntityIndex.merge([tmp_path / "a", tmp_path / "link"], tmp_path / "a" / "index", move=True)
    assert list(index) == [f"e{number}" for number in range(8)]
    index.verify()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["index", "notes.txt"]
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("move", [False, True], ids=["linked", "moved"])
def test_a_process_that_is_killed_while_it_joins(
    parts: tuple[MimicModel, MimicProcessor], hub: Any, tmp_path: Path, move: bool
) -> None:
    """Between the links to the shards and the list of files: the parts are whole, and the same call joins them."""
    directories = [str(tmp_path / name) for name in ("a", "b")]
    for number, directory in enumerate(directories):
        build(parts, knowledge_base(3, start=3 * number), Path(directory))
    wanted = EntityIndex.merge(directories, tmp_path / "undisturbed")
    code = """
        import os, signal
        from mimic_el import EntityIndex, joining_mimic
        joining_mimic.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        EntityIndex.merge(directories, place, move=move)
    """
    place = tmp_path / "index"
    given = {"directories": directories, "place": str(place), "move": move}
    outcomes, _ = outcomes_together(own_python(hub), 1, code, tmp_path / "run", connect=False, **given)
    assert outcomes == [("killed", None)]
    left = set(place.glob("shard-*"))
    assert left
    with pytest.raises(EntityIndexError, match="There is no entity index"):
        EntityIndex.from_pretrained(place)
    for directory in directories:
        EntityIndex.from_pretrained(directory).verify()
    index = EntityIndex.merge(directories, place, move=move)
    assert_equal_bytes(index, wanted)
    assert not left & set(place.glob("shard-*"))
    assert len(list(place.glob("shard-*"))) == len(list((tmp_path / "undisturbed").glob("shard-*")))
    assert [Path(directory).exists() for directory in directories] == [not move] * 2

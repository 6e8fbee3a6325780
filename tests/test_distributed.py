"""Tests of distributed/: parts answer as one index does, whoever changes them.

Here parts are asked in this process; the actors that hold them are tested in test_distributed_actors.py.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch
from tiny import (
    calibration_of,
    encode_mentions,
    index_of,
    knowledge_base,
    mention_features,
    mentions_of,
    random_encoded,
    tiny_processor,
)
from tiny_clip import tiny_model

from mimic_el.distributed import RayEntityIndex, fitting
from mimic_el.distributed.actors import Actors, PartGoneError
from mimic_el.distributed.fitting import check_facts, check_ids, check_still
from mimic_el.distributed.part import Part
from mimic_el.distributed.state import PartedState
from mimic_el.errors_mimic import EntityIndexError, MimicImageError, UnknownEntityError
from mimic_el.identity_mimic import model_facts
from mimic_el.index_mimic import EntityIndex
from mimic_el.matching_mimic import EntityFeatures
from mimic_el.modeling_mimic import MentionFeatures, MimicModel
from mimic_el.pipeline_mimic import MultimodalEntityLinkingPipeline
from mimic_el.processing_mimic import MimicProcessor

ENTITIES, MENTIONS, PARTS = 90, 12, 2


class Here:
    """Parts that are asked where they are opened, without actors; in the place of `Actors`."""

    def __init__(self, places: list[str]) -> None:
        self.places, self.before_each = places, cast(Any, lambda name: None)
        self.parts = [Part(place, {}, "cpu") for place in places]

    def start_again(self, part: int) -> None:
        """As an actor that has died."""
        self.parts[part] = Part(self.places[part], {}, "cpu")

    @property
    def counts(self) -> list[int]:
        return [fact["count"] for fact in self.all("facts")]

    def check_open(self) -> None:
        pass

    def shared(self, value: Any) -> Any:
        return value

    def one(self, part: int, name: str, *args: Any, state: str | None = None) -> Any:
        return self.parts[part].ask(state, name, *args)

    def all(self, name: str, *args: Any, states: Any = None) -> list[Any]:
        return self.each(name, [args] * len(self.parts), states=states)

    def each(self, name: str, args: Any, kwargs: Any = None, states: Any = None) -> list[Any]:
        self.before_each(name)
        every = zip(self.parts, states or [None] * len(args), args, kwargs or [{}] * len(args), strict=True)
        return [None if own is None else part.ask(state, name, *own, **named) for part, state, own, named in every]

    def changed(self, part: int, state: str, made: Any, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.parts[part].change(state, name, *args, **kwargs)


def handle_on(actors: Here) -> RayEntityIndex:
    index = RayEntityIndex.__new__(RayEntityIndex)
    anything: Any = actors
    index.parts, index._options, index._actors, index._state = actors.places, {}, anything, PartedState(anything)
    return index


@pytest.fixture(scope="module")
def whole() -> tuple[MimicModel, EntityIndex, MentionFeatures]:
    """An index in which each entity is there three times, so that equal scores are in different parts."""
    model = tiny_model()
    encoded, mask = random_encoded(model.config, ENTITIES // 3, 1, clusters=10)
    mentions, mention_mask = random_encoded(model.config, MENTIONS, 2, clusters=10)
    return model, index_of(model, encoded, mask, repeat=3), mention_features(model, mentions, mention_mask)


@pytest.fixture(scope="module")
def directories(whole: tuple[MimicModel, EntityIndex, MentionFeatures], tmp_path_factory: Any) -> list[str]:
    model, index, _ = whole
    store, paths = index._contents.store, []
    for number in range(PARTS):
        rows = slice(number * ENTITIES // PARTS, (number + 1) * ENTITIES // PARTS)
        features = EntityFeatures(store.full(rows, torch.device("cpu")).tensors)
        records = [store.record(row) for row in range(rows.start, rows.stop)]
        paths.append(str(tmp_path_factory.mktemp("part") / f"part-{number}"))
        EntityIndex.from_features(features, records, model, dtype="float32").save_pretrained(paths[-1])
    return paths


@pytest.fixture(scope="module")
def parts(directories: list[str]) -> RayEntityIndex:
    return handle_on(Here(directories))


def assert_same_answers(found: Any, wanted: Any) -> None:
    assert found.entity_ids == wanted.entity_ids
    for name in ("scores", "text_scores", "image_scores", "cross_modal_scores"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, MENTIONS])
@pytest.mark.parametrize("top_k", [1, 7, 200])
def test_answers_are_those_of_one_index(parts: Any, whole: Any, count: int, top_k: int) -> None:
    _, index, mentions = whole
    assert_same_answers(parts.search(mentions[:count], top_k), index.search(mentions[:count], top_k))


def test_candidates_floors_and_ranks(parts: Any, whole: Any) -> None:
    _, index, mentions = whole
    allowed = [None if row % 3 == 0 else [f"e{(row + 7 * i) % ENTITIES}" for i in range(9)] for row in range(MENTIONS)]
    assert_same_answers(parts.search(mentions, 4, candidates=allowed), index.search(mentions, 4, candidates=allowed))
    floors = index.search(mentions, 5).scores[:, 3] - 1e-3
    found, wanted = parts.search(mentions, 9, min_score=floors), index.search(mentions, 9, min_score=floors)
    assert found.entity_ids == wanted.entity_ids
    answers = [None if row == 2 else f"e{(11 * row) % ENTITIES}" for row in range(MENTIONS)]
    np.testing.assert_array_equal(parts.rank(mentions, answers).ranks, index.rank(mentions, answers).ranks)
    # It may itself be a part of a knowledge base.
    scores = parts.answer_scores(mentions, answers)
    np.testing.assert_allclose(scores, index.answer_scores(mentions, answers), rtol=1e-5)
    of_answers, wanted = np.nan_to_num(scores), ["e1" if answer is None else answer for answer in answers]
    np.testing.assert_array_equal(
        parts.count_better(mentions, of_answers, wanted), index.count_better(mentions, of_answers, wanted)
    )


def test_the_bounds_of_one_part_prune_the_others(parts: Any, whole: Any) -> None:
    mentions = whole[2]
    apart = sum(EntityIndex.from_pretrained(place).search(mentions, 5).stats.exact_pairs for place in parts.parts)
    assert parts.search(mentions, 5).stats.exact_pairs < apart


def test_what_it_holds(parts: Any, whole: Any) -> None:
    model, index, _ = whole
    assert len(parts) == ENTITIES
    assert "e45" in parts
    assert "e90" not in parts
    assert list(parts) == list(index)
    assert parts.entity("e45") == index.entity("e45")
    for some in (["e89", "e0", "e45", "e0"], []):
        for name, tensor in index.features(some).tensors.items():
            torch.testing.assert_close(parts.features(some).tensors[name], tensor)
    with pytest.raises(UnknownEntityError, match="'nothere'"):
        parts.features(["e0", "nothere"])
    with pytest.raises(UnknownEntityError, match="'nothere'"):
        parts.entity("nothere")
    parts.check_model(model)
    with pytest.raises(EntityIndexError, match="made by"):
        parts.check_model(tiny_model(seed=3))


def test_what_is_refused(parts: Any, whole: Any, directories: list[str], tmp_path: Path) -> None:
    mentions = whole[2]
    with pytest.raises(ValueError, match="candidates for 1"):
        parts.search(mentions, candidates=[None])
    with pytest.raises(UnknownEntityError, match="'nothere'"):
        parts.search(mentions, candidates=[["nothere"]] * MENTIONS)
    with pytest.raises(ValueError, match="`method` must be one of"):
        parts.search(mentions, method="guess")
    with pytest.raises(EntityIndexError, match="An index in parts has no shortlist"):
        parts.search(mentions, num_candidates=10)
    with pytest.raises(EntityIndexError, match="named twice"):
        RayEntityIndex([directories[0], directories[0]])
    facts = [{"dtype": "float32", "model": model_facts(model)} for model in (whole[0], tiny_model(seed=3))]
    with pytest.raises(EntityIndexError, match="made by another model or processor than the part a"):
        check_facts(["a", "b"], facts)
    with pytest.raises(EntityIndexError, match="The part b is stored in int8"):
        check_facts(["a", "b"], [facts[0], {**facts[0], "dtype": "int8"}])


def answer(ask: Any, index: Any) -> Any:
    """What an index answers, or the class of its error."""
    try:
        found = ask(index)
    except Exception as error:
        return type(error)
    if hasattr(found, "entity_ids"):
        return found.entity_ids, found.scores.shape
    return found.tolist() if isinstance(found, np.ndarray) else found


def test_wrong_arguments_are_answered_as_by_one_index(parts: Any, whole: Any) -> None:
    """Or taken alike, such as candidates from a generator, and scores that have a column for each entity wanted."""
    model, index, mentions = whole
    processor = tiny_processor(model)
    every: list[str | None] = ["e1"] * MENTIONS
    for top_k in (0, -1, True, "3", 2.5, None, 10**12):
        assert answer(lambda i, k=top_k: i.search(mentions, k), parts) == answer(
            lambda i, k=top_k: i.search(mentions, k), index
        )
    candidates: list[Any] = [[["e1"]], [[]], [[1]], ["e1"], [5], [[["e1"]]], [[True]], [["\ud800"]]]
    features: list[Any] = [None, 5, "x", {}]
    records: list[Any] = [{}, [5], [{}], [{"id": "new", "name": 5}], [None]]
    scores: list[Any] = [1.0, None, "x", [1.0], np.nan]
    calls: list[Any] = [
        *(lambda i, c=c: i.search(mentions, 5, candidates=c * MENTIONS) for c in candidates),
        lambda i: i.search(mentions, 5, candidates=[iter(["e1", "e50"]), *[None] * (MENTIONS - 1)]),
        lambda i: i.search(mentions, 5, candidates=7),
        *(lambda i, s=s: i.search(mentions, 5, min_score=s) for s in ([1.0], [[1.0]], "x", np.nan, np.inf, 1e300)),
        *(lambda i, m=m: i.search(m, 5) for m in [*features, mentions[:0]]),
        *(lambda i, m=m: i.rank(m, every) for m in features),
        *(lambda i, a=a: i.answer_scores(mentions, a) for a in (every[1:], 5, None)),
        lambda i: i.rank(mentions, [None] * MENTIONS, method="guess"),
        *(lambda i, s=s: i.count_better(mentions, s, every)[0] for s in scores),
        lambda i: i.find("E 1", max_distance=-1),
        lambda i: i.find("E 1", max_distance=1.5),
        lambda i: i.find("\ud800"),
        lambda i: i.remove([["e1"]]),
        lambda i: i.remove(["e1", None]),
        *(lambda i, e=e: i.add(model, processor, e) for e in records),
        *(lambda i, e=e: i.update(model, processor, e) for e in [*records[:3], [{"id": "\ud800"}]]),
    ]
    for number, ask in enumerate(calls):
        assert answer(ask, parts) == answer(ask, index), number
    assert len(parts) == len(index) == ENTITIES


@pytest.mark.parametrize("name", ["text_embed", "image_query_q"])
def test_the_mention_that_is_not_finite_is_told_by_its_own_number(name: str, parts: Any, whole: Any) -> None:
    mentions = whole[2][:]
    mentions.tensors[name] = mentions.tensors[name].clone()
    mentions.tensors[name][7] = torch.nan
    for index in (parts, whole[1]):
        with pytest.raises(ValueError, match="features of mention 7 are not finite"):
            index.search(mentions)


WRONG_OPTIONS: dict[str, list[Any]] = {
    "patience": [0, -1, "x", float("nan"), float("inf"), True],
    "max_restarts": [-2, "x", True],
    "actor_options": [5, "ab", [{}], [5, 5]],
}


@pytest.mark.parametrize(
    "options", [{name: value} for name, values in WRONG_OPTIONS.items() for value in values], ids=str
)
def test_wrong_options_are_told_before_an_actor_is_started(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}`"):
        RayEntityIndex(["a/one", "a/two"], **options)


@pytest.mark.parametrize("places", [None, 5, "one", [], [5], [None], [""], ["zero\0"], [b"one"]], ids=str)
def test_what_are_no_parts(places: Any) -> None:
    with pytest.raises(ValueError, match=r"`parts` must be|A part"):
        RayEntityIndex(places)


def check_ids_of(places: list[str]) -> None:
    check_ids(places, cast(Any, Here(places)))


@pytest.mark.parametrize("at_once", [2**22, 7])
def test_an_id_in_two_parts_is_refused_unless_it_was_removed(
    at_once: int, directories: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "_HASHES_AT_ONCE", at_once)
    check_ids_of(directories)
    copy = tmp_path / "copy"
    shutil.copytree(directories[1], copy)
    index = EntityIndex.from_pretrained(copy)
    index.remove([f"e{number}" for number in range(45, 89)])
    with pytest.raises(EntityIndexError, match=r"part-1 and .*copy both have the entity 'e89'"):
        check_ids_of([*directories, str(copy)])
    EntityIndex.from_pretrained(directories[0]).save_pretrained(tmp_path / "other")
    both = EntityIndex.from_pretrained(tmp_path / "other")
    both.remove([f"e{number}" for number in range(1, 45)])
    check_ids_of([directories[1], str(tmp_path / "other")])


def test_a_part_that_was_replaced_while_its_actor_was_away(directories: list[str]) -> None:
    opened = Part(directories[0], {}, "cpu").ask(None, "facts")
    check_still(["a"], [{**opened, "state": "another"}], opened)
    for other in ({**opened, "dtype": "int8"}, {**opened, "model": model_facts(tiny_model(seed=3))}):
        with pytest.raises(EntityIndexError, match=r"part a was replaced by an index of another model or precision"):
            check_still(["a"], [other], opened)


def place_of_nothing(folder: Path, kind: str, part: str) -> Path:
    """What may lie in the place of a part, and is none."""
    place = folder / kind
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "empty file":
        place.touch()
    elif kind == "no index":
        place.mkdir()
    elif kind != "nothing":
        shutil.copytree(part, place)
        manifest = json.loads((place / "index_config.json").read_text())
        if kind == "newer":
            (place / "index_config.json").write_text(json.dumps({**manifest, "version": 99}))
        else:
            (place / manifest["shards"][0]["name"]).with_suffix(".safetensors").unlink()
            os.mkfifo((place / manifest["shards"][0]["name"]).with_suffix(".safetensors"))
    return place


@pytest.mark.parametrize("kind", ["pipe", "empty file", "no index", "newer", "shard is a pipe", "nothing"])
def test_what_is_no_part_is_told_as_of_one_index(kind: str, directories: list[str], tmp_path: Path) -> None:
    """At once; and where it is there later, it is opened."""
    place = place_of_nothing(tmp_path, kind, directories[0])
    with pytest.raises(EntityIndexError) as alone:
        EntityIndex.from_pretrained(place)
    part = Part(str(place), {}, "cpu")
    with pytest.raises(EntityIndexError) as told:
        part.ask(None, "facts")
    assert str(told.value) == f"The part {place} cannot be opened: {alone.value}"
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    shutil.copytree(directories[0], place)
    assert part.ask(None, "facts")["count"] == ENTITIES // PARTS


# --- Parts that other processes change


class Disturbed:
    """An index in two parts of 6 entities, two handles on them, and a way to change what is stored of them."""

    def __init__(self, folder: Path) -> None:
        self.model = tiny_model()
        self.processor = tiny_processor(self.model)
        self.known = {entity["id"]: entity for entity in knowledge_base(20)}
        self.places = [str(folder / f"p{number}") for number in range(2)]
        for number, place in enumerate(self.places):
            EntityIndex.build(*self.linker, self.entities(range(6 * number, 6 * number + 6)), place, **OPTIONS)
        self.actors = Here(self.places)
        self.index, self.other = handle_on(self.actors), handle_on(self.actors)
        self.features = encode_mentions(*self.linker, mentions_of(self.entities(range(5))))

    @property
    def linker(self) -> tuple[MimicModel, MimicProcessor]:
        return self.model, self.processor

    def entities(self, numbers: Any) -> list[dict[str, Any]]:
        return [self.known[f"e{number}"] for number in numbers]

    def change_stored(self, part: int, removed: Any = (), added: Any = ()) -> None:
        """As another process does."""
        stored = EntityIndex.from_pretrained(self.places[part])
        stored.remove([f"e{number}" for number in removed])
        if added:
            stored.add(*self.linker, self.entities(added), show_progress=False)
        stored.compact()

    def assert_holds(self, numbers: Any, index: Any = None) -> None:
        """The answers are those of one index of these entities."""
        index = self.index if index is None else index
        whole = EntityIndex.build(*self.linker, self.entities(numbers), **OPTIONS)
        found, wanted = index.search(self.features, 20), whole.search(self.features, 20)
        assert found.entity_ids == wanted.entity_ids
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4)
        answers = [f"e{number}" for number in (0, 1, 2, 8, 13)]
        np.testing.assert_array_equal(
            index.rank(self.features, answers).ranks, whole.rank(self.features, answers).ranks
        )
        assert len(index) == len(whole)
        assert sorted(index) == sorted(whole)


OPTIONS: dict[str, Any] = {"dtype": "float32", "show_progress": False}


@pytest.fixture
def disturbed(tmp_path: Path) -> Disturbed:
    return Disturbed(tmp_path)


def test_what_another_process_stores_is_seen_as_a_whole_or_not_at_all(disturbed: Disturbed) -> None:
    before, after = range(12), [0, 2, *range(6, 12), 12, 13]
    disturbed.change_stored(0, removed=[1, 3, 4, 5], added=[12, 13])
    disturbed.assert_holds(before)
    disturbed.actors.start_again(0)
    disturbed.assert_holds(after)
    assert "e1" not in disturbed.index
    # In the middle of a question: between the searches of the parts, or before the records of what is found, or the
    # ranks, are asked.
    features, answers = disturbed.features, [f"e{number}" for number in (0, 7, 2, 8, 13)]
    asks: dict[tuple[str, int], Any] = {
        # Of candidates that can be read only once.
        ("search", 2): lambda index: index.search(features, 9, candidates=[iter(["e0", "e9"]), *[None] * 4]).entity_ids,
        ("records", 1): lambda index: [[i["entity_id"] for i in one] for one in index.link_encoded(features, 20)],
        ("count_better", 1): lambda index: str(index.rank(features, answers).ranks),
    }
    for number, ((name, call), ask) in enumerate(asks.items()):
        calls: list[str] = []

        def disturb(
            asked: str, name: str = name, call: int = call, calls: list[str] = calls, gone: int = number
        ) -> None:
            calls.append(asked)
            if asked == name and calls.count(name) == call:
                disturbed.change_stored(1, removed=[6 + gone])
                disturbed.actors.start_again(1)

        disturbed.actors.before_each = disturb
        found = ask(disturbed.index)
        disturbed.actors.before_each = lambda name: None
        assert calls.count(name) > call
        now = [entity for entity in after if entity not in range(6, 7 + number)]
        assert found == ask(EntityIndex.build(*disturbed.linker, disturbed.entities(now), **OPTIONS)), name


def test_changes_of_a_part_that_another_process_has_changed(disturbed: Disturbed) -> None:
    """Each is made of what is stored by then; an id that is there by then is refused."""
    disturbed.change_stored(0, removed=[1, 3, 4], added=[12])
    with pytest.raises(ValueError, match="'e12' is already in the index"):
        disturbed.index.add(*disturbed.linker, disturbed.entities([12, 13]), show_progress=False)
    disturbed.index.add(*disturbed.linker, disturbed.entities([13]), show_progress=False)
    disturbed.assert_holds([0, 2, 5, 12, 13, *range(6, 12)])
    # One of the two parts that a change concerns.
    disturbed.change_stored(1, removed=[7])
    disturbed.index.remove(["e0", "e8"])
    disturbed.assert_holds([2, 5, 12, 13, 6, 9, 10, 11])
    disturbed.change_stored(1, removed=[9])
    with pytest.raises(UnknownEntityError, match="'e9'"):
        disturbed.index.remove(iter(["e2", "e9"]))
    # Nothing is changed then; and another handle on the same actors has all that.
    disturbed.assert_holds([2, 5, 12, 13, 6, 10, 11], disturbed.other)


def test_what_cannot_be_one_index_any_more(disturbed: Disturbed) -> None:
    disturbed.change_stored(0, added=[8])
    disturbed.actors.start_again(0)
    for _ in range(2):
        with pytest.raises(EntityIndexError, match="both have the entity 'e8'"):
            disturbed.index.search(disturbed.features)
    disturbed.change_stored(0, removed=[8])
    disturbed.actors.start_again(0)
    disturbed.assert_holds(range(12))
    reading = disturbed.index.entities()
    next(reading)
    disturbed.other.remove(["e11"])
    with pytest.raises(EntityIndexError, match="p1 was changed while its entities were read"):
        list(reading)
    other = tiny_model(seed=3)
    shutil.rmtree(disturbed.places[1])
    EntityIndex.build(other, tiny_processor(other), disturbed.entities([7]), disturbed.places[1], **OPTIONS)
    disturbed.actors.start_again(1)
    with pytest.raises(EntityIndexError, match="p1 was replaced by an index of another model"):
        disturbed.index.search(disturbed.features)


def test_the_pipeline_takes_it_and_it_changes(tmp_path: Path) -> None:
    model = tiny_model()
    processor: MimicProcessor = tiny_processor(model)
    known = knowledge_base(8)
    for number in range(2):
        EntityIndex.build(model, processor, known[4 * number : 4 * number + 4], tmp_path / f"p{number}", **OPTIONS)
    whole = EntityIndex.build(model, processor, known, **OPTIONS)
    mentions = [{"mention": m["mention"], "text": m["text"], "image": m["image"]} for m in mentions_of(known[:3])]
    index = handle_on(Here([str(tmp_path / "p0"), str(tmp_path / "p1")]))
    anything: Any = index
    linker = MultimodalEntityLinkingPipeline(model=model, processor=processor, index=anything)
    alone = MultimodalEntityLinkingPipeline(model=model, processor=processor, index=whole)

    def same() -> None:
        for one, other in zip(linker(mentions, top_k=4), alone(mentions, top_k=4), strict=True):
            assert [item["entity_id"] for item in one] == [item["entity_id"] for item in other]
            assert [item["name"] for item in one] == [item["name"] for item in other]
            np.testing.assert_allclose([i["score"] for i in one], [i["score"] for i in other], rtol=1e-4)

    same()
    for candidates in ("names", "names+search"):
        found = linker(mentions, candidates=candidates, top_k=2)
        wanted = alone(mentions, candidates=candidates, top_k=2)
        assert [[item["entity_id"] for item in one] for one in found] == [
            [item["entity_id"] for item in one] for one in wanted
        ]
    whys = [which.explain(mentions[0], entity_id="e1", versus="e6") for which in (linker, alone)]
    assert whys[0].explained == pytest.approx(whys[1].explained, abs=1e-3)
    model.config.calibration = calibration_of(whole).to_dict()
    for one, other in zip(linker(mentions, top_k=4), alone(mentions, top_k=4), strict=True):
        expected = {item["entity_id"]: item["probability"] for item in other}
        assert {item["entity_id"]: item["probability"] for item in one} == pytest.approx(expected, rel=1e-3)
    model.config.calibration = None
    assert index.find("orange 0") == whole.find("orange 0") == ["e0"]
    assert index.find("Georgja 1") == whole.find("Georgja 1")
    more = knowledge_base(3, start=8)
    index.add(model, processor, more, show_progress=False)
    whole.add(model, processor, more, show_progress=False)
    assert len(index) == 11
    same()
    index.remove(["e0", "e9", "e5"])
    whole.remove(["e0", "e9", "e5"])
    assert len(index) == 8
    same()
    renamed = [{**knowledge_base(1, start=row)[0], "name": f"Orange {row}00"} for row in (1, 6)]
    index.update(model, processor, renamed, show_progress=False)
    whole.update(model, processor, renamed, show_progress=False)
    assert index.entity("e6")["name"] == "Orange 600"
    assert len(index) == 8
    same()
    # A data set may name any file or address: none is read unless that is said, as in one index.
    images = datasets.Dataset.from_list([{"id": "e20", "name": "Pear", "images": [str(tmp_path / "x.png")]}])
    for one in (index, whole):
        with pytest.raises(MimicImageError, match="image_root="):
            one.add(model, processor, images, on_image_error="raise", show_progress=False)
    with pytest.raises(UnknownEntityError, match="'nobody'"):
        index.update(model, processor, [*renamed, {**renamed[0], "id": "nobody"}], show_progress=False)
    with pytest.raises(ValueError, match="'e1' is there twice"):
        index.update(model, processor, [renamed[0], renamed[0]], show_progress=False)
    # Names of both parts, one of which is the beginning of another's; and a document.
    text = "Orange 600 lies by Mercury 8, Orange 100 and Apple 3."
    assert index.find_mentions(text) == whole.find_mentions(text) != []
    [one], [other] = index.link(model, processor, mentions[1:2], 3), whole.link(model, processor, mentions[1:2], 3)
    assert [item["entity_id"] for item in one] == [item["entity_id"] for item in other]
    places = [[(m["start"], m["end"]) for m in which({"text": text}, top_k=1)] for which in (linker, alone)]
    assert places[0] == places[1]
    index.save_pretrained(tmp_path / "joined")
    joined = EntityIndex.from_pretrained(tmp_path / "joined")
    assert list(joined) == list(index)
    assert not joined._contents.store.removed.any()
    assert sorted(joined) == sorted(whole)
    joined.verify()
    with pytest.raises(ValueError, match="'e10' is already in the index"):
        index.add(model, processor, knowledge_base(1, start=10), show_progress=False)
    with pytest.raises(UnknownEntityError, match="'e0'"):
        index.remove(["e1", "e0"])
    assert "e1" in index
    (tmp_path / "p1").rename(tmp_path / "elsewhere")
    with pytest.raises(EntityIndexError, match="p1 cannot be read from this machine"):
        index.save_pretrained(tmp_path / "more")


class _Dying:
    """The actor of a part that dies in a change, after it was made or before."""

    def __init__(self, part: Part, after: bool) -> None:
        self.part, self.after, self.deaths = part, after, 0
        self.ask = self.change = self

    def options(self, **_: Any) -> Any:
        return self

    def remote(self, state: str | None, name: str, *args: Any, **kwargs: Any) -> Any:
        if name != "remove":
            return self.part.ask(state, name, *args, **kwargs)
        if self.deaths:
            return self.part.change(state, name, *args, **kwargs)
        self.deaths += 1
        if self.after:
            self.part.change(state, name, *args, **kwargs)
        self.part = Part(self.part._place, {}, "cpu")
        raise PartGoneError("it died")


@pytest.mark.parametrize("after", [True, False], ids=["after it was made", "before"])
def test_a_change_whose_actor_dies_is_made_once(
    after: bool, directories: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(directories[0], tmp_path / "part")
    actors: Any = Actors.__new__(Actors)
    actors.places, actors.actors = [str(tmp_path / "part")], [_Dying(Part(str(tmp_path / "part"), {}, "cpu"), after)]
    monkeypatch.setattr(actors, "_get", lambda part, ask, ref=None, **_: ask() if ref is None else ref)
    index = handle_on(actors)
    index.remove(["e1", "e3"])
    assert actors.actors[0].deaths == 1
    assert "e1" not in index
    assert len(index) == len(EntityIndex.from_pretrained(tmp_path / "part")) == ENTITIES // PARTS - 2

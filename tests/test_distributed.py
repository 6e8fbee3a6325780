"""Tests of distributed/ on a local Ray cluster of two nodes: the answers are those of one index, whoever dies."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pytest
import torch
from tiny import (
    encode_mentions,
    index_of,
    knowledge_base,
    mention_features,
    mentions_of,
    random_encoded,
    tiny_processor,
)
from tiny_clip import tiny_model

from mimic_el.distributed import RayEntityIndex
from mimic_el.distributed import index as distributed_index
from mimic_el.distributed.index import _check_facts, _check_ids
from mimic_el.distributed.part import Part
from mimic_el.errors_mimic import EntityIndexError, MimicImageError, UnknownEntityError
from mimic_el.identity_mimic import model_facts
from mimic_el.index_mimic import EntityIndex
from mimic_el.matching_mimic import EntityFeatures
from mimic_el.modeling_mimic import MentionFeatures, MimicModel
from mimic_el.pipeline_mimic import MultimodalEntityLinkingPipeline
from mimic_el.processing_mimic import MimicProcessor

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

# Deprecations within Ray are no fault of ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"
)

ENTITIES, MENTIONS, PARTS = 90, 12, 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes on this machine, of which the second has the resource `second`."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    node = {"num_cpus": 4, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(num_cpus=4, object_store_memory=80 * 2**20, resources={"second": 4})
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"env_vars": {"PYTHONPATH": paths}, "worker_process_setup_hook": "tiny.bound_few_pairs"}
    ray.init(cluster.address, runtime_env=environment, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


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
def parts(cluster: Any, directories: list[str]) -> Iterator[RayEntityIndex]:
    options: list[dict[str, Any]] = [{}, {"resources": {"second": 1}}]
    with RayEntityIndex(directories, actor_options=options) as index:
        yield index


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
    gold, wanted = np.nan_to_num(scores), ["e1" if answer is None else answer for answer in answers]
    np.testing.assert_array_equal(
        parts.count_better(mentions, gold, wanted), index.count_better(mentions, gold, wanted)
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
    with pytest.raises(EntityIndexError, match=r"part-none \(1 of 1\) cannot be reached: .*EntityIndexError"):
        RayEntityIndex([tmp_path / "part-none"], local_files_only=True)
    facts = [{"dtype": "float32", "model": model_facts(model)} for model in (whole[0], tiny_model(seed=3))]
    with pytest.raises(EntityIndexError, match="made by another model or processor than the part a"):
        _check_facts(["a", "b"], facts)
    with pytest.raises(EntityIndexError, match="The part b is stored in int8"):
        _check_facts(["a", "b"], [facts[0], {**facts[0], "dtype": "int8"}])


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


class Here:
    """Parts that are asked where they are opened, without actors."""

    def __init__(self, places: list[str]) -> None:
        self.places = places
        self.parts = [Part(place, {}, "cpu") for place in places]

    def __len__(self) -> int:
        return len(self.parts)

    def all(self, name: str, *args: Any) -> list[Any]:
        return [part.ask(None, name, *args) for part in self.parts]


@pytest.mark.parametrize("at_once", [2**22, 7])
def test_an_id_in_two_parts_is_refused_unless_it_was_removed(
    at_once: int, directories: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed_index, "_HASHES_AT_ONCE", at_once)
    _check_ids(cast(Any, Here(directories)), ENTITIES)
    copy = tmp_path / "copy"
    shutil.copytree(directories[1], copy)
    index = EntityIndex.from_pretrained(copy)
    index.remove([f"e{number}" for number in range(45, 89)])
    with pytest.raises(EntityIndexError, match=r"part-1 and .*copy both have the entity 'e89'"):
        _check_ids(cast(Any, Here([*directories, str(copy)])), ENTITIES + 1)
    EntityIndex.from_pretrained(directories[0]).save_pretrained(tmp_path / "other")
    both = EntityIndex.from_pretrained(tmp_path / "other")
    both.remove([f"e{number}" for number in range(1, 45)])
    _check_ids(cast(Any, Here([directories[1], str(tmp_path / "other")])), 46)


def test_a_part_that_was_replaced_while_its_actor_was_away(directories: list[str], whole: Any) -> None:
    expected = Part(directories[0], {}, "cpu").facts()
    assert Part(directories[1], {}, "cpu").ask(expected, "has", ["e1", "e50"]) == [False, True]
    for other in ({**expected, "dtype": "int8"}, {**expected, "model": model_facts(tiny_model(seed=3))}):
        with pytest.raises(EntityIndexError, match=r"part-0 was replaced by an index of another model or precision"):
            Part(directories[0], {}, "cpu").ask(other, "has", ["e1"])


def test_the_pipeline_takes_it_it_changes_and_a_part_that_stays_away_is_named(cluster: Any, tmp_path: Path) -> None:
    model = tiny_model()
    processor: MimicProcessor = tiny_processor(model)
    options: dict[str, Any] = {"dtype": "float32", "show_progress": False}
    known = knowledge_base(8)
    for number in range(2):
        EntityIndex.build(model, processor, known[4 * number : 4 * number + 4], tmp_path / f"p{number}", **options)
    whole = EntityIndex.build(model, processor, known, **options)
    mentions = [{"mention": m["mention"], "text": m["text"], "image": m["image"]} for m in mentions_of(known[:3])]
    with RayEntityIndex([tmp_path / "p0", tmp_path / "p1"], max_restarts=0) as index:
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
        features = encode_mentions(model, processor, mentions_of(known[:1]))
        ray.kill(index._actors.actors[1])
        with pytest.raises(EntityIndexError, match=r"p1 \(2 of 2\) cannot be reached"):
            index.search(features, 3)
    with pytest.raises(EntityIndexError, match="was closed"):
        index.search(features)


def test_actors_killed_while_questions_are_asked(parts: Any, whole: Any) -> None:
    """Of 1,000 mentions, in 250 calls of four threads, none is answered wrong, and none is lost."""
    _, index, mentions = whole
    wanted = [index.search(mentions[row : row + 4], 3) for row in range(0, MENTIONS, 4)]
    calls = itertools.count()
    answered: list[int] = []
    killers: list[threading.Timer] = []

    def ask() -> None:
        while (number := next(calls)) < 250:
            if number in (50, 150):
                # Both are killed, one after the other, while they search or before.
                part = parts._actors.actors[int(number == 150)]
                killers.append(threading.Timer(0.002, lambda part=part: ray.kill(part, no_restart=False)))
                killers[-1].start()
            block = number % len(wanted)
            assert_same_answers(parts.search(mentions[4 * block : 4 * block + 4], 3), wanted[block])
            answered.append(number)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(ask) for _ in range(4)]:
            done.result()
    assert len(killers) == 2
    for killer in killers:
        killer.join()
    assert sorted(answered) == list(range(250))

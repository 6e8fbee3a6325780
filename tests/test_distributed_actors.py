"""Tests of distributed/ on a local Ray cluster of two nodes: the answers are those of one index, whoever dies."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import encode_mentions, knowledge_base, mentions_of, tiny_processor
from tiny_clip import tiny_model

from mimic_el.distributed import RayEntityIndex
from mimic_el.errors_mimic import EntityIndexError, UnknownEntityError
from mimic_el.index_mimic import EntityIndex

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

# Deprecations within Ray are no fault of ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::ResourceWarning"
)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes on this machine, of which the second has the resource `second`."""
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_prestart_worker_first_driver", "0")  # none but the actors that are asked for
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node, resources={"second": 1})
    ray.init(cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_actors_answer_as_one_index_whoever_dies(cluster: Any, tmp_path: Path) -> None:
    """One test, since most of what it takes is to start processes."""
    model = tiny_model()
    processor, known = tiny_processor(model), knowledge_base(12)
    options: dict[str, Any] = {"dtype": "float32", "show_progress": False}
    for number in range(2):
        EntityIndex.build(model, processor, known[6 * number : 6 * number + 6], tmp_path / f"p{number}", **options)
    whole = EntityIndex.build(model, processor, known, **options)
    mentions = encode_mentions(model, processor, mentions_of(known))
    with RayEntityIndex([tmp_path / "p0", tmp_path / "p1"], actor_options=[{}, {"resources": {"second": 1}}]) as index:
        ask_while_actors_are_killed(index, whole, mentions)

        # Models, images and errors go to the actors and back.
        for one in (index, whole):
            one.add(model, processor, knowledge_base(2, start=12), show_progress=False)
            one.update(model, processor, [{**known[7], "name": "Orange 700"}], show_progress=False)
            one.remove(["e0", "e9"])
        assert len(index) == len(whole) == 12
        assert index.entity("e7") == whole.entity("e7")
        found, wanted = index.search(mentions, 9), whole.search(mentions, 9)
        assert found.entity_ids == wanted.entity_ids
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4)
        answers = [entity["id"] for entity in known]
        np.testing.assert_array_equal(index.rank(mentions, answers).ranks, whole.rank(mentions, answers).ranks)
        with pytest.raises(UnknownEntityError, match="'nobody'"):
            index.remove(["e1", "nobody"])
        broken = mentions[:]
        broken.tensors["text_embed"] = broken.tensors["text_embed"].clone()
        broken.tensors["text_embed"][7] = torch.nan
        with pytest.raises(ValueError, match="features of mention 7 are not finite"):
            index.search(broken)

        # Sent to another process, as to the replicas of a service, it is the same index.
        sent = ray.cloudpickle.loads(ray.cloudpickle.dumps(index))
        sent.remove(["e1"])
        whole.remove(["e1"])
        assert index.search(mentions, 5).entity_ids == whole.search(mentions, 5).entity_ids
        assert len(index) == len(sent) == 11

        ray.kill(index._actors.actors[1])
        with pytest.raises(EntityIndexError, match=r"p1 \(2 of 2\) cannot be reached.* No answer is given without it"):
            index.search(mentions, 3)
    with pytest.raises(EntityIndexError, match="was closed"):
        index.search(mentions)


def ask_while_actors_are_killed(parts: RayEntityIndex, index: EntityIndex, mentions: Any) -> None:
    """Of 1,000 mentions, in 250 calls of four threads, none is answered wrong, and none is lost."""
    wanted = [index.search(mentions[row : row + 4], 3) for row in range(0, len(mentions), 4)]
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
            found = parts.search(mentions[4 * block : 4 * block + 4], 3)
            assert found.entity_ids == wanted[block].entity_ids
            np.testing.assert_allclose(found.scores, wanted[block].scores, rtol=1e-4)
            answered.append(number)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(ask) for _ in range(4)]:
            done.result()
    assert len(killers) == 2
    for killer in killers:
        killer.join()
    assert sorted(answered) == list(range(250))

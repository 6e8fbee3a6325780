"""The search: the same answer as exhaustive scoring and as the plain equations, whatever the data and the blocks."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import index_of, mention_features, random_encoded
from tiny_clip import tiny_model
from torch import Tensor

from mimic_el import pruning_mimic, sampling_mimic, search_mimic
from mimic_el.bounds_mimic import MentionBounds, hull_distance
from mimic_el.errors_mimic import EntityIndexError
from mimic_el.index_mimic import EntityIndex
from mimic_el.modeling_mimic import MentionFeatures, MimicModel
from mimic_el.pairs_mimic import ENT2MEN, MEN2ENT, KeptRows, _grouped, score_pairs
from mimic_el.pruning_mimic import Stages, _different
from mimic_el.search_mimic import METHODS, Searcher

CPU = torch.device("cpu")
ENTITIES, MENTIONS = 120, 20


@dataclass
class Case:
    model: MimicModel
    index: EntityIndex
    mentions: MentionFeatures
    expected: Tensor  # float64 scores of the plain equations, of the features before they were stored

    @property
    def stored_scores(self) -> Tensor:
        """Scores of all pairs by the model, from the features as they are stored."""
        entities = self.index._contents.store.full(slice(0, len(self.index._contents.store)), CPU)
        with torch.no_grad():
            return self.model.score(self.mentions, entities).logits


def make_case(
    entities: int = ENTITIES,
    mentions: int = MENTIONS,
    dtype: str = "float32",
    shards: int = 1,
    clusters: int | None = None,
    noise: float = 0.3,
    seed: int = 0,
    repeat: int = 1,
    images: int | None = None,
    **config: Any,
) -> Case:
    """With `repeat`, each entity is there that many times; with `images`, there are no more than so many of them."""
    model = tiny_model(seed, **config)
    encoded, mask = random_encoded(model.config, entities, 1, clusters, noise)
    mention, mention_mask = random_encoded(model.config, mentions, 2, clusters, noise)
    if images is not None:
        for side in (encoded, mention):
            for name in ("image_embeds", "image_tokens"):
                side[name] = side[name][torch.arange(len(side[name])) % images]
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    masks = (mention_mask, mask) if model.config.mask_text_padding else (None, None)
    plain = oracle.scores(
        weights,
        {name: tensor.double() for name, tensor in mention.items()},
        {name: tensor.double() for name, tensor in encoded.items()},
        *masks,
    )
    index = index_of(model, encoded, mask, dtype, shards, repeat)
    return Case(model, index, mention_features(model, mention, mention_mask), plain["logits"].repeat(1, repeat))


def small_blocks(monkeypatch: pytest.MonkeyPatch, block_bytes: int, sub_block: int) -> None:
    """Makes searches work on few pairs at a time."""
    monkeypatch.setattr(
        search_mimic,
        "_searcher",
        lambda matcher, rows, device: Searcher(matcher, rows, block_bytes=block_bytes, sub_block=sub_block),
    )


def best(scores: Tensor, k: int) -> list[list[str]]:
    """Ids of the k best of each row; equals in the order of entities."""
    order = scores.sort(dim=1, descending=True, stable=True)
    return [
        [f"e{row}" for row, score in zip(rows[:k], values[:k], strict=True) if score > -math.inf]
        for rows, values in zip(order.indices.tolist(), order.values.tolist(), strict=True)
    ]


def check(case: Case, k: int, scores: Tensor, tolerance: float = 1e-5) -> None:
    """Both searches find the k best of `scores`, and the same ones."""
    pruned = case.index.search(case.mentions, k)
    exhaustive = case.index.search(case.mentions, k, method="exhaustive")
    assert pruned.entity_ids == best(scores, k)
    assert exhaustive.entity_ids == pruned.entity_ids
    expected = scores.sort(dim=1, descending=True).values[:, : pruned.scores.shape[1]].numpy()
    scale = 1 + np.abs(expected[np.isfinite(expected)]).max()
    np.testing.assert_allclose(pruned.scores, expected, rtol=0, atol=tolerance * scale)
    np.testing.assert_allclose(exhaustive.scores, expected, rtol=0, atol=tolerance * scale)
    for stats in (pruned.stats, exhaustive.stats):
        assert stats.pairs == len(case.mentions) * len(case.index._contents.store)
        assert 0 < stats.exact_pairs <= stats.pairs


# --- The best entities


@pytest.mark.parametrize("clusters", [None, 12], ids=["random", "clustered"])
@pytest.mark.parametrize("mask", [False, True], ids=["all-tokens", "masked"])
def test_both_searches_find_what_the_plain_equations_find(mask: bool, clusters: int | None):
    case = make_case(clusters=clusters, mask_text_padding=mask)
    check(case, 10, case.expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("mask", [False, True], ids=["all-tokens", "masked"])
def test_small_blocks_many_shards_and_every_precision(dtype: str, mask: bool, monkeypatch: pytest.MonkeyPatch):
    """Blocks, sub-blocks and shards whose borders meet nowhere; compared with the stored features' own scores."""
    case = make_case(clusters=30, dtype=dtype, shards=7, mask_text_padding=mask)
    small_blocks(monkeypatch, block_bytes=20_000, sub_block=13)
    scores = case.stored_scores
    check(case, 10, scores)
    # What is rounded moves scores a little.
    allowed = {"float32": 1e-5, "float16": 5e-3, "int8": 5e-2}[dtype]
    assert (scores - case.expected).abs().max() <= allowed * case.expected.abs().max()


@pytest.mark.parametrize("dense", [-1, 2], ids=["images-for-all", "images-for-what-is-left"])
@pytest.mark.parametrize("few", [0, 10**6], ids=["many-images", "few-images"])
@pytest.mark.parametrize("images", [None, 9, 1])
@pytest.mark.parametrize("first", [ENT2MEN, MEN2ENT])
def test_every_way_of_scoring_images(
    dense: int, few: int, images: int | None, first: int, monkeypatch: pytest.MonkeyPatch
):
    """The image unit is scored for all pairs or for those that are left, by image or by pair, in either order of its
    directions, and images that several have once."""
    monkeypatch.setattr(pruning_mimic, "_DENSE", dense)
    monkeypatch.setattr(pruning_mimic, "_FEW_DENSE", dense)
    monkeypatch.setattr(pruning_mimic, "_FEW", few)
    monkeypatch.setattr(Stages, "_tighter_direction", lambda *_: first)
    case = make_case(entities=2 * ENTITIES, clusters=40, images=images, shards=3)
    small_blocks(monkeypatch, block_bytes=30_000, sub_block=13)
    check(case, 7, case.expected)
    answers = [f"e{row}" for row in range(MENTIONS)]
    expected = [oracle.realistic_rank(case.expected[row], row) for row in range(MENTIONS)]
    np.testing.assert_array_equal(case.index.rank(case.mentions, answers).ranks, expected)


@pytest.mark.parametrize("fraction", [0, 0.02])
def test_mentions_for_which_bounds_do_not_pay(fraction: float, monkeypatch: pytest.MonkeyPatch):
    """All of their pairs are scored, some others' not: both lists are right."""
    monkeypatch.setattr(search_mimic, "EXHAUSTIVE_FRACTION", fraction)
    monkeypatch.setattr(search_mimic, "_ROUND", 2)
    monkeypatch.setattr(search_mimic, "_PATIENCE", 1)
    case = make_case(entities=4 * ENTITIES, clusters=60, shards=3)
    small_blocks(monkeypatch, block_bytes=60_000, sub_block=50)
    scored: list[int] = []
    all_scores = Searcher._all_scores

    def watched(self: Searcher, query: Any, *rest: int) -> Any:
        scored.append(len(query))
        return all_scores(self, query, *rest)

    monkeypatch.setattr(Searcher, "_all_scores", watched)
    found = case.index.search(case.mentions, 5)
    assert found.entity_ids == best(case.expected, 5)
    answers = [f"e{(7 * row) % ENTITIES}" for row in range(MENTIONS)]
    ranks = case.index.rank(case.mentions, answers).ranks
    expected = [oracle.realistic_rank(case.expected[row], (7 * row) % ENTITIES) for row in range(MENTIONS)]
    np.testing.assert_array_equal(ranks, expected)
    assert any(0 < count < MENTIONS for count in scored), "no block had mentions of both kinds"


@pytest.mark.parametrize(("entities", "pruned"), [(1365, False), (1366, True)])
def test_few_pairs_are_scored_without_bounds(entities: int, pruned: bool, monkeypatch: pytest.MonkeyPatch):
    """Looking at bounds would take longer than that. With 2 mentions, 3 x 1365 is at most 4096."""
    monkeypatch.setattr(sampling_mimic, "_FEW_PAIRS", 4096)
    case = make_case(entities=entities, mentions=2, clusters=500, noise=0.1)
    found = case.index.search(case.mentions, 3)
    assert found.entity_ids == case.index.search(case.mentions, 3, method="exhaustive").entity_ids
    ranks = case.index.rank(case.mentions, ["e0", "e1"])
    assert ranks.ranks.tolist() == [oracle.realistic_rank(case.expected[row], row) for row in range(2)]
    for stats in (found.stats, ranks.stats):
        assert (stats.hull_pairs > 0) == pruned == (stats.exact_pairs < stats.pairs == 2 * entities)


@pytest.mark.parametrize("mentions", [1, 8])
def test_ranks_of_few_mentions_where_bounds_decide_little(mentions: int):
    """What is bounded before all pairs are scored is a small part of them."""
    case = make_case(entities=20 * ENTITIES, mentions=mentions)
    worst = case.expected.argsort(dim=1)[:, 10 * ENTITIES].tolist()
    ranks = case.index.rank(case.mentions, [f"e{row}" for row in worst])
    assert ranks.ranks.tolist() == [oracle.realistic_rank(case.expected[row], worst[row]) for row in range(mentions)]
    assert ranks.stats.exact_pairs == ranks.stats.pairs == 20 * ENTITIES * mentions
    assert ranks.stats.hull_pairs <= ranks.stats.pairs / 16
    assert ranks.stats.image_pairs <= ranks.stats.pairs / 7


def test_what_a_sample_reads_is_what_its_rows_hold():
    """Of kept features and others, by number and by slice, in the order that is asked for."""
    case = make_case(shards=3, dtype="float16")
    store, rows = case.index._contents.store, torch.tensor([3, 50, 51, 119])
    kept = KeptRows(store, rows, ("text_embed", "text_local"), CPU)
    names = ("text_local", "text_query", "text_embed", "no such name")
    for picked in (torch.tensor([2, 0, 2]), slice(1, 3)):
        expected = store.gather(rows[picked], names, CPU)
        got = kept.gather(picked, names, CPU)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_ranks_of_answers_that_are_badly_ranked():
    """Where most entities score above the answer, bounds decide nothing: they are made for a sample alone. Counted is
    what costs time; the ranks are those of the plain equations."""
    case = make_case(entities=4 * ENTITIES)
    worst = case.expected.argsort(dim=1)[:, 2 * ENTITIES].tolist()
    ranks = case.index.rank(case.mentions, [f"e{row}" for row in worst])
    expected = [oracle.realistic_rank(case.expected[row], worst[row]) for row in range(MENTIONS)]
    np.testing.assert_array_equal(ranks.ranks, expected)
    assert ranks.stats.hull_pairs + ranks.stats.image_pairs <= 0.25 * ranks.stats.pairs
    # Of an answer that few entities come near to, few pairs are scored exactly, as before.
    near = make_case(entities=4 * ENTITIES, clusters=60)
    stats = near.index.rank(near.mentions, [row[0] for row in best(near.expected, 1)]).stats
    assert stats.exact_fraction < 0.2


@pytest.mark.parametrize(("k", "most"), [(60, 0.6), (5 * ENTITIES, 0.4)], ids=["few", "a-large-part"])
@pytest.mark.parametrize("removed", [False, True], ids=["all", "some-removed"])
def test_the_best_where_bounds_decide_little(k: int, most: float, removed: bool):
    """Random features: of mentions for which a sample shows that, all pairs are scored, and none is bounded before."""
    case = make_case(entities=20 * ENTITIES)
    gone = [f"e{row}" for row in range(0, 20 * ENTITIES, 3)] if removed else []
    case.index.remove(gone)
    scores = case.expected.clone()
    scores[:, [int(name[1:]) for name in gone]] = -torch.inf
    pruned, exhaustive = (case.index.search(case.mentions, k, method=method) for method in METHODS)
    assert pruned.entity_ids == exhaustive.entity_ids
    assert pruned.scores.tobytes() == exhaustive.scores.tobytes()
    # Among so many some scores differ by rounding alone: what was found scores as much as the best do.
    expected = scores.sort(dim=1, descending=True).values[:, :k]
    found = scores.gather(1, torch.tensor([[int(name[1:]) for name in row] for row in pruned.entity_ids]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * (1 + float(expected.abs().max())))
    assert all(len(set(row)) == k for row in pruned.entity_ids)
    assert pruned.stats.hull_pairs <= most * pruned.stats.pairs
    assert pruned.stats.exact_fraction <= 1


@pytest.mark.parametrize("constant", ["dual_men2ent", "dual_ent2men"])
def test_the_direction_that_tells_more_comes_first(constant: str, monkeypatch: pytest.MonkeyPatch):
    """A direction that gives every pair the most that it may leaves out none."""
    model = tiny_model()
    with torch.no_grad():
        model.matcher.vdlu.get_submodule(constant).layer_norm.weight.zero_()
    index = index_of(model, *random_encoded(model.config, ENTITIES, 1))
    mentions = mention_features(model, *random_encoded(model.config, MENTIONS, 2))
    chosen = []
    telling = Stages._tighter_direction

    def told(*args: Any) -> int:
        chosen.append(telling(*args))
        return chosen[-1]

    monkeypatch.setattr(Stages, "_tighter_direction", told)
    pruned = index.search(mentions, 5)
    assert set(chosen) == {ENT2MEN if constant == "dual_men2ent" else MEN2ENT}
    assert pruned.entity_ids == index.search(mentions, 5, method="exhaustive").entity_ids


@pytest.mark.parametrize("k", [1, ENTITIES - 1, ENTITIES, ENTITIES + 7])
def test_any_number_of_entities(k: int):
    case = make_case(clusters=12)
    check(case, k, case.expected)
    assert case.index.search(case.mentions, k).scores.shape == (MENTIONS, min(k, ENTITIES))


@pytest.mark.parametrize("mentions", [1, 2 * search_mimic._MENTION_BLOCK + 3])
def test_any_number_of_mentions(mentions: int):
    case = make_case(mentions=mentions, clusters=12)
    check(case, 3, case.expected)


def test_an_index_of_one():
    case = make_case(entities=1, mentions=3)
    check(case, 5, case.expected)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("blocks", [None, (30_000, 11)], ids=["one-block", "small-blocks"])
def test_equals_come_in_the_order_of_entities(
    dtype: str, blocks: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
):
    """Each of 4 entities is there 50 times: every score ties with 49 others, more than any allowance for ties."""
    case = make_case(entities=4, repeat=50, shards=3, dtype=dtype)
    if blocks:
        small_blocks(monkeypatch, *blocks)
    expected = [[f"e{4 * copy + int(row[0][1:]) % 4}" for copy in range(30)] for row in best(case.expected, 1)]
    assert case.index.search(case.mentions, 30).entity_ids == expected
    assert case.index.search(case.mentions, 30, method="exhaustive").entity_ids == expected


@pytest.mark.parametrize("method", ["pruned", "exhaustive"])
def test_constant_scores(method: str, monkeypatch: pytest.MonkeyPatch):
    """Where all entities are equal, nothing can be left out: the first ones are the answer."""
    case = make_case(entities=1, repeat=300, mentions=5)
    small_blocks(monkeypatch, block_bytes=8_000, sub_block=16)
    found = case.index.search(case.mentions, 40, method=method)
    assert found.entity_ids == [[f"e{row}" for row in range(40)]] * 5
    ranks = case.index.rank(case.mentions, ["e7"] * 5, method=method).ranks
    assert ranks.tolist() == [150.5] * 5, "a constant score earns the middle of the list"


@pytest.mark.parametrize("repeat", [1, 30])
def test_bounds_that_are_tight(repeat: int):
    """Of a mention with one token the bounds are the score itself, but for rounding: equals are at the very edge."""
    model = tiny_model(mask_text_padding=True)
    index = index_of(model, *random_encoded(model.config, 300 // repeat, 1), repeat=repeat)
    encoded, mask = random_encoded(model.config, MENTIONS, 2)
    mask[:, 1:] = False
    mentions = mention_features(model, encoded, mask)
    pruned = index.search(mentions, 40)
    exhaustive = index.search(mentions, 40, method="exhaustive")
    assert pruned.entity_ids == exhaustive.entity_ids
    number = len(index) // repeat
    for row in pruned.entity_ids:
        places = [int(entity_id[1:]) for entity_id in row]
        copies = [place for place in places if place % number == places[0] % number]
        assert copies == sorted(copies)
    answers = [f"e{3 * row}" for row in range(MENTIONS)]
    ranks = index.rank(mentions, answers).ranks
    np.testing.assert_array_equal(ranks, index.rank(mentions, answers, method="exhaustive").ranks)


@pytest.mark.parametrize("counts", [[1], [1, 1, 1], [40], [3, 0, 17, 1, 64], [2] * 30], ids=str)
def test_groups_hold_every_pair_once(counts: list[int]):
    generator = torch.Generator().manual_seed(0)
    mention_rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    mention_rows = mention_rows[torch.randperm(len(mention_rows), generator=generator)]
    owners, table, valid = _grouped(mention_rows)
    assert sorted(table[valid].tolist()) == list(range(len(mention_rows)))
    assert torch.equal(mention_rows[table[valid]], owners.unsqueeze(1).expand_as(table)[valid])


def test_different_images_are_told_apart():
    """By all of their numbers, not by the one that they are sorted by."""
    generator = torch.Generator().manual_seed(0)
    stats, vectors = (torch.randn(4, size, generator=generator) for size in (7, 3))
    same_number = vectors[:1] + torch.eye(3)[:1]
    images = {
        "image_key_z": torch.cat([vectors, vectors[:2], same_number, vectors[1:2]]),
        "image_key_stats": torch.cat([stats, stats[:2], stats[:1], stats[1:2]]),
    }
    different, number_of = _different(images)
    assert len(different["image_key_z"]) == 5
    for name, tensor in images.items():
        assert torch.equal(different[name][number_of], tensor)
    alone, number_of = _different({name: tensor[:4] for name, tensor in images.items()})
    assert number_of.tolist() == [0, 1, 2, 3]
    assert torch.equal(alone["image_key_z"], vectors)


def test_a_pair_scores_the_same_in_any_company():
    """What decides ties must not depend on which other pairs are scored in the same call."""
    case = make_case()
    generator = torch.Generator().manual_seed(0)
    mention_rows = torch.arange(MENTIONS).repeat_interleave(ENTITIES)
    entity_rows = torch.arange(ENTITIES).repeat(MENTIONS)
    matcher, store = case.index.state.matcher, case.index._contents.store
    together = score_pairs(matcher, case.mentions, mention_rows, store, entity_rows, 2**30).total
    for size, block_bytes in ((1, 2**30), (7, 2**30), (300, 30_000)):
        some = torch.randperm(len(mention_rows), generator=generator)[:size]
        alone = score_pairs(matcher, case.mentions, mention_rows[some], store, entity_rows[some], block_bytes).total
        torch.testing.assert_close(alone, together[some], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_removed_entities_are_not_found(dtype: str, monkeypatch: pytest.MonkeyPatch):
    case = make_case(clusters=12, dtype=dtype, shards=4)
    small_blocks(monkeypatch, block_bytes=20_000, sub_block=13)
    scores = case.stored_scores
    gone = sorted({int(row[0][1:]) for row in best(scores, 1)} | set(range(40, 95)))
    case.index.remove([f"e{row}" for row in gone])
    scores[:, gone] = -math.inf
    check(case, 10, scores)
    left = ENTITIES - len(gone)
    assert all(len(row) == left for row in case.index.search(case.mentions, ENTITIES).entity_ids)
    before = case.index.search(case.mentions, 10)
    case.index.compact()
    after = case.index.search(case.mentions, 10)
    assert after.entity_ids == before.entity_ids
    np.testing.assert_allclose(after.scores, before.scores, rtol=1e-6)


@pytest.mark.parametrize("part", ["cmfu.gate_layer_norm", "vdlu.dual_ent2men.layer_norm", "tglu.layer_norm"])
def test_scores_a_thousand_times_as_large(part: str):
    """A unit may outweigh the others by far; rounding then is large beside them. Equals aside, the answer stands."""
    case = make_case(clusters=30)
    encoded, mask = random_encoded(case.model.config, ENTITIES, 1, 30)
    mention, mention_mask = random_encoded(case.model.config, MENTIONS, 2, 30)
    norm: Any = case.model.matcher.get_submodule(part)
    with torch.no_grad():
        norm.weight.mul_(1000)
    index = index_of(case.model, encoded, mask)
    mentions = mention_features(case.model, mention, mention_mask)
    pruned = index.search(mentions, 10)
    exhaustive = index.search(mentions, 10, method="exhaustive")
    assert pruned.entity_ids == exhaustive.entity_ids
    np.testing.assert_array_equal(pruned.scores, exhaustive.scores)


def test_scores_of_the_units():
    case = make_case(clusters=12)
    found = case.index.search(case.mentions, 4)
    total = (found.text_scores + found.image_scores + found.cross_modal_scores) / 3
    np.testing.assert_allclose(total, found.scores, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        scored = case.model.score(case.mentions, case.index._contents.store.full(slice(0, ENTITIES), CPU))
    for row, ids in enumerate(found.entity_ids):
        column = int(ids[0][1:])
        for name in ("text", "image", "cross_modal"):
            expected = float(scored[f"{name}_logits"][row, column])
            assert getattr(found, f"{name}_scores")[row, 0] == pytest.approx(expected, rel=1e-4, abs=1e-4)


# --- Candidates


@pytest.mark.parametrize(
    ("many", "together"), [(0, 1), (10**6, 10**6), (10**6, 50)], ids=["bounded", "all-scored", "all-scored-in-parts"]
)
def test_candidates_restrict_the_answer(many: int, together: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search_mimic, "_MANY_CANDIDATES", many)
    monkeypatch.setattr(search_mimic, "_PAIRS_TOGETHER", together)
    case = make_case(clusters=12, shards=3)
    candidates = [
        None if row % 3 == 0 else [f"e{(7 * row + step) % ENTITIES}" for step in range(11 * (row % 5))]
        for row in range(MENTIONS)
    ]
    found = case.index.search(case.mentions, 3, candidates=candidates)
    for row, allowed in enumerate(candidates):
        scores = case.expected[row : row + 1].clone()
        if allowed is not None:
            hidden = [column for column in range(ENTITIES) if f"e{column}" not in allowed]
            scores[:, hidden] = -math.inf
        assert found.entity_ids[row] == best(scores, 3)[0]
        number = len(found.entity_ids[row])
        assert not np.isnan(found.scores[row, :number]).any()
        assert np.isnan(found.scores[row, number:]).all()


def test_candidates_may_repeat_but_must_be_there():
    case = make_case(mentions=1)
    assert case.index.search(case.mentions, 5, candidates=[["e3", "e3", "e3"]]).entity_ids == [["e3"]]
    case.index.remove(["e3"])
    with pytest.raises(KeyError, match="2 of the entities are not in this index of 119: 'e3', 'nobody'"):
        case.index.search(case.mentions, candidates=[["e3", "e4", "nobody"]])
    with pytest.raises(ValueError, match="the string 'e4'"):
        case.index.search(case.mentions, candidates=["e4"])
    with pytest.raises(ValueError, match="1 mentions, but candidates for 2"):
        case.index.search(case.mentions, candidates=[["e4"], ["e5"]])


# --- Ranks


@pytest.mark.parametrize("mask", [False, True], ids=["all-tokens", "masked"])
@pytest.mark.parametrize("method", ["pruned", "exhaustive"])
def test_ranks_are_those_of_all_scores(method: str, mask: bool, monkeypatch: pytest.MonkeyPatch):
    """With ties, removed entities, answers that are removed, unknown, or not told."""
    case = make_case(
        entities=ENTITIES // 4, repeat=4, mentions=2 * MENTIONS, clusters=12, shards=3, mask_text_padding=mask
    )
    small_blocks(monkeypatch, block_bytes=40_000, sub_block=13)
    gone = list(range(5, 50, 3))
    case.index.remove([f"e{row}" for row in gone])
    kept = torch.tensor([row for row in range(ENTITIES) if row not in gone])
    answers: list[str | None] = [f"e{(11 * row) % ENTITIES}" for row in range(2 * MENTIONS)]
    answers[3], answers[4], answers[5] = None, "nobody", "e5"
    expected = []
    for row, answer in enumerate(answers):
        if answer is None or answer == "nobody" or int(answer[1:]) in gone:
            expected.append(math.nan)
        else:
            place = int((kept == int(answer[1:])).nonzero())
            expected.append(oracle.realistic_rank(case.expected[row, kept], place))
    ranked = case.index.rank(case.mentions, answers, method=method)
    np.testing.assert_array_equal(ranked.ranks, expected)
    assert ranked.ranks.dtype == np.float64
    assert 0 < ranked.stats.exact_pairs <= ranked.stats.pairs


def test_ranks_of_no_known_answer():
    case = make_case(mentions=2)
    ranked = case.index.rank(case.mentions, [None, "nobody"])
    assert np.isnan(ranked.ranks).all()
    assert ranked.stats.pairs == 0
    with pytest.raises(ValueError, match="2 mentions, but answers for 1"):
        case.index.rank(case.mentions, ["e1"])


@pytest.mark.parametrize("answer", ["", True, b"e1", ["e1"], 0.5])
def test_ranks_of_what_is_no_id(answer: Any):
    case = make_case(mentions=2)
    message = r"The answer of mention 1 \(counted from 0\) is .*An id must be a string"
    for call in (
        lambda answers: case.index.rank(case.mentions, answers),
        lambda answers: case.index.answer_scores(case.mentions, answers),
        lambda answers: case.index.count_better(case.mentions, [0.0, 0.0], answers),
    ):
        with pytest.raises(ValueError, match=message):
            call(["e1", answer])
    # What is absent, as Arrow and pandas have it, is no answer.
    assert np.isnan(case.index.rank(case.mentions, cast(Any, [None, math.nan])).ranks).all()


# --- Work


def test_bounds_spare_work_where_features_are_as_training_makes_them():
    case = make_case(entities=2000, clusters=500, noise=0.1)
    pruned = case.index.search(case.mentions, 5)
    assert pruned.stats.exact_pairs < 0.1 * pruned.stats.pairs
    assert pruned.stats.hull_pairs < pruned.stats.pairs
    assert pruned.stats.exact_fraction == pruned.stats.exact_pairs / pruned.stats.pairs
    assert pruned.entity_ids == case.index.search(case.mentions, 5, method="exhaustive").entity_ids
    answers = [f"e{row}" for row in range(MENTIONS)]
    ranked = case.index.rank(case.mentions, answers)
    assert ranked.stats.exact_pairs < 0.1 * ranked.stats.pairs
    np.testing.assert_array_equal(ranked.ranks, case.index.rank(case.mentions, answers, method="exhaustive").ranks)


def anonymous_memory() -> int:
    """Bytes of this process that are no pages of files: those of memory-mapped features the system takes back when it
    needs them."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def peak_memory(work: Callable[[], Any]) -> int:
    """Bytes that some work needs at its worst beside those that were there before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, unseen
    start, highest, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            highest[0] = max(highest[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(0, highest[0] - start)


def peaks(place: Path, block: int) -> list[list[int]]:
    """Peak memory of search and rank with 1 and 16 mentions, for 10,000 and then for 40,000 entities."""
    search_mimic._searcher = lambda matcher, rows, device: Searcher(matcher, rows, block_bytes=block, sub_block=1024)
    model = tiny_model()
    mentions = mention_features(model, *random_encoded(model.config, 16, 2, 500, 0.1))
    answers = [f"e{row}" for row in range(16)]
    enough, found = [0] * 4, []
    for entities, runs in ((10_000, 2), (40_000, 4)):
        stored = place / str(entities)
        index_of(model, *random_encoded(model.config, entities, 1, 500, 0.1)).save_pretrained(stored)
        index = EntityIndex.from_pretrained(stored)
        index.search(mentions[:1], 3)
        works: list[Callable[[], Any]] = []
        for some, named in ((mentions[:1], answers[:1]), (mentions, answers)):
            works += [partial(index.search, some, 3), partial(index.rank, some, named)]
        found.append([least_peak(work, most, runs) for work, most in zip(works, enough, strict=True)])
        enough = [limit(small, block) for small in found[0]]
    return found


def least_peak(work: Callable[[], Any], enough: int, runs: int) -> int:
    """The least of a few runs, since what the allocator happens to keep only ever adds; no more than it takes."""
    least = peak_memory(work)
    for _ in range(runs - 1):
        if least > enough:
            least = min(least, peak_memory(work))
    return least


def limit(small: int, block: int) -> int:
    """What the larger knowledge base may take, where the smaller one takes so much."""
    # 30,000 entities more have 12 MB of features, and with 16 mentions 2 MB of each kind of scores.
    return min(small + 2 * block, 8 * block)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux's /proc and glibc")
def test_memory_grows_with_the_block_and_not_with_the_knowledge_base(tmp_path: Path):
    """Peak memory of search and rank beside the memory-mapped features, in blocks of 1 MiB."""
    block = 2**20
    # In a process of its own: what other tests left of the heap would be measured too.
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; "
        f"import test_search_mimic; print(test_search_mimic.peaks(Path({str(tmp_path)!r}), {block}))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    small, large = json.loads(ran.stdout)
    assert min(large) > 0, "nothing was measured"
    for one, other in zip(small, large, strict=True):
        assert other <= limit(one, block), (small, large)


# --- What is refused


def test_what_is_refused():
    case = make_case(mentions=3)
    index, mentions = case.index, case.mentions
    entities = index._contents.store.full(slice(0, 2), CPU)
    with pytest.raises(TypeError, match=r"searched with MentionFeatures.* got EntityFeatures"):
        index.search(entities)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be one of pruned, exhaustive, got 'fast'"):
        index.search(mentions, method="fast")
    for k in (0, -1, 1.5, "3", None, True):
        with pytest.raises(ValueError, match="`top_k` must be a positive integer"):
            index.search(mentions, k)  # type: ignore[arg-type]
    two: Any = np.int64(2)
    assert index.search(mentions, two).scores.shape == (3, 2)
    index.remove([f"e{row}" for row in range(ENTITIES)])
    for answer in (lambda: index.search(mentions), lambda: index.rank(mentions, ["e1"] * 3)):
        with pytest.raises(ValueError, match="no entities"):
            answer()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["text_value", "text_embed", "image_key_stats", "cross_modal"])
def test_mentions_that_are_not_finite_are_refused(name: str, value: float):
    """Comparisons with NaN are false: such a mention would get an empty answer, and nobody would know why."""
    case = make_case(mentions=3)
    case.mentions.tensors[name][1, 0] = value
    for answer in (lambda: case.index.search(case.mentions), lambda: case.index.rank(case.mentions, ["e1"] * 3)):
        with pytest.raises(ValueError, match=f"mention 1 are not finite, or too large .`{name}`"):
            answer()


def test_mentions_of_another_shape_are_refused():
    case = make_case()
    other = tiny_model(tglu_hidden_size=7)
    mentions = mention_features(other, *random_encoded(other.config, 2))
    with pytest.raises(ValueError, match="not features of this index's model"):
        case.index.search(mentions)
    masked = tiny_model(mask_text_padding=True)
    with pytest.raises(ValueError, match="not features of this index's model"):
        case.index.search(mention_features(masked, *random_encoded(masked.config, 2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mask", [False, True], ids=["all-tokens", "masked"])
def test_mentions_of_another_precision(dtype: torch.dtype, mask: bool):
    """A model in double or half precision gives such features."""
    case = make_case(clusters=12, mask_text_padding=mask)
    mentions = case.mentions.to(dtype)
    pruned = case.index.search(mentions, 5)
    assert pruned.entity_ids == case.index.search(mentions, 5, method="exhaustive").entity_ids
    if dtype == torch.float64:
        assert pruned.entity_ids == case.index.search(case.mentions, 5).entity_ids


# --- The bounds


def bounds_of(values: Tensor, mask: Tensor | None = None) -> MentionBounds:
    """Bounds for the value vectors (M, L, d) of mentions."""
    unit: Any = SimpleNamespace(mask_padding=mask is not None, layer_norm=SimpleNamespace(eps=1e-5))
    tensors = {"text_value": values} if mask is None else {"text_value": values, "text_mask": mask}
    matcher: Any = SimpleNamespace(tglu=unit)
    return MentionBounds.of(matcher, MentionFeatures(tensors))


KINDS = ("plain", "far", "near the origin", "equal", "line", "through the origin", "uneven")


def hard_points(kind: str, length: int, size: int, generator: torch.Generator) -> Tensor:
    """Value vectors of one mention (L, d), of a kind that is hard to bound."""
    values = torch.randn(length, size, generator=generator)
    if kind == "far":
        return values * 1e-3 + torch.randn(size, generator=generator)
    if kind == "near the origin":
        return values - values.mean(dim=0) + 1e-4 * torch.randn(size, generator=generator)
    if kind == "equal":
        return values[:1].expand(length, size).clone()
    if kind == "line":
        return values[:1] * torch.linspace(0.5, 3, length).unsqueeze(1)
    if kind == "through the origin":
        return values[:1] * torch.linspace(-1, 1, length).unsqueeze(1)
    if kind == "uneven":
        return values * 10 ** (8 * torch.rand(length, 1, generator=generator) - 4)
    return values


@st.composite
def values_of_a_mention(draw: st.DrawFn) -> Tensor:
    shape = draw(st.sampled_from([(1, 1), (1, 8), (2, 3), (5, 2), (12, 8), (40, 32)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return hard_points(draw(st.sampled_from(KINDS)), *shape, generator) * 10.0 ** draw(st.integers(-8, 8))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(values_of_a_mention(), st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e6]))
def test_bounds_hold_for_any_attention(values: Tensor, seed: int, scale: float):
    """`c . w / sqrt(|c|^2 / d + eps)` for points c of the hull, corners and edges too, lies within both bounds."""
    generator = torch.Generator().manual_seed(seed)
    length, size = values.shape
    weights = torch.cat(
        [
            torch.eye(length, dtype=torch.float64),
            torch.full((1, length), 1 / length, dtype=torch.float64),
            (4 * torch.randn(40, length, generator=generator, dtype=torch.float64)).softmax(dim=1),
            (50 * torch.randn(40, length, generator=generator, dtype=torch.float64)).softmax(dim=1),
        ]
    )
    local = scale * torch.randn(20, size, generator=generator)
    local[0] = values[0]
    local[1] = -values.mean(dim=0)
    local[2] = 0
    context = weights @ values.double()
    length_of = (context.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    exact = (context / length_of) @ local.double().T  # (points of the hull, entities)
    bounds = bounds_of(values.unsqueeze(0))
    norm = local.norm(dim=1)
    # No part of the score is larger than |w| sqrt(d); rounding is small beside that.
    slack = 1e-5 * norm.double() * math.sqrt(size) + 1e-30
    low, high = bounds.hull(0, local)
    ball = bounds.ball(torch.cat([local, norm.unsqueeze(1)], dim=1))[0]
    for bound in (low, high, ball):
        assert torch.isfinite(bound).all()
    assert (exact >= low.double() - slack).all()
    assert (exact <= high.double() + slack).all()
    assert (exact <= ball.double() + slack).all()


def nearest_to_the_origin(sets: Tensor, steps: int = 2000) -> Tensor:
    """The squared distances of hulls (M, L, d) from the origin, by accelerated projected gradients in float64."""
    sets = sets.double()
    scale = sets.norm(dim=2).amax(dim=1).clamp(min=1e-300)
    sets = sets / scale[:, None, None]
    gram = sets @ sets.transpose(1, 2)
    rate = 1 / torch.linalg.eigvalsh(gram)[:, -1:].clamp(min=1e-300)
    weights = ahead = torch.full(sets.shape[:2], 1 / sets.shape[1], dtype=torch.float64)
    momentum = 1.0
    for _ in range(steps):
        target = ahead - rate * (gram @ ahead.unsqueeze(-1)).squeeze(-1)
        # The nearest point of the simplex.
        ordered = target.sort(dim=1, descending=True).values
        excess = (ordered.cumsum(dim=1) - 1) / torch.arange(1, sets.shape[1] + 1)
        number = (ordered > excess).sum(dim=1, keepdim=True)
        moved = (target - excess.gather(1, number - 1)).clamp(min=0)
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead, weights, momentum = moved + (momentum - 1) / following * (moved - weights), moved, following
    return (weights.unsqueeze(1) @ sets).square().sum(dim=(1, 2)) * scale.square()


@pytest.mark.parametrize("shape", [(1, 4), (5, 2), (12, 8), (40, 32)], ids=str)
def test_hull_distance_is_below_the_true_one(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.randint(-8, 9, (len(KINDS) * 12, 1, 1), generator=generator)
    sets = torch.stack([hard_points(kind, *shape, generator) for kind in KINDS for _ in range(12)]) * scales
    found = hull_distance(sets).squeeze(1).double()
    assert torch.isfinite(found).all()
    assert (found <= nearest_to_the_origin(sets) * (1 + 1e-9)).all()


def test_hull_distance_is_close_where_the_origin_is_outside():
    generator = torch.Generator().manual_seed(0)
    sets = torch.randn(50, 12, 8, generator=generator) + 2 * torch.randn(50, 1, 8, generator=generator)
    found, true = hull_distance(sets).squeeze(1), nearest_to_the_origin(sets)
    assert (found <= true).all()
    assert (found >= 0.97 * true - 1e-3).all()
    assert (true > 1).any()


def test_padding_does_not_widen_the_bounds():
    """A padding token's value is no point of the hull: bounds with it must be those without it."""
    values = torch.randn(2, 6, 8)
    values[:, 4:] *= 1000
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    local = torch.randn(9, 8)
    for row in range(2):
        masked = bounds_of(values, mask).hull(row, local)
        alone = bounds_of(values[:, :4]).hull(row, local)
        torch.testing.assert_close(masked, alone, rtol=1e-3, atol=1e-3)


# --- Numbers that have no order


def every_question(index: EntityIndex, mentions: MentionFeatures) -> dict[str, Callable[[], Any]]:
    count = len(mentions)
    ids = [list(index)] * count
    return {
        "pruned": lambda: index.search(mentions, len(index)),
        "exhaustive": lambda: index.search(mentions, len(index), method="exhaustive"),
        "the best": lambda: index.search(mentions, 1, method="exhaustive"),
        "candidates": lambda: index.search(mentions, 3, candidates=ids),
        "ranks": lambda: index.rank(mentions, ["e1"] * count, method="exhaustive"),
        "its rank": lambda: index.rank(mentions, ["e4"] * count),
    }


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "name", ["text_embed", "cross_modal", "image_query_q", "image_key_z", "image_key_a", "image_key_k"]
)
def test_scores_whose_sums_overflow_are_refused_by_the_entitys_name(name: str, sign: int):
    """Finite where they are stored, infinite once they are squared or added: a score divided by an infinite length
    looks sound, and one of minus infinity looks like that of a removed entity."""
    case = make_case(entities=12, mentions=3)
    stored = case.index._contents.store.shards[0].tensors[name]
    stored[4] = sign * 2e38 * torch.sign(stored[4])
    for answer in every_question(case.index, case.mentions).values():
        with pytest.raises(EntityIndexError, match="the entity 'e4' are not finite, or too large"):
            answer()
    case.index.remove(["e4"])
    for what, answer in every_question(case.index, case.mentions).items():
        if what not in ("its rank", "candidates"):
            answer()


def test_a_score_of_minus_infinity_is_refused_where_all_mentions_have_it():
    """With one mention whose text points the other way, no sum is NaN."""
    case = make_case(entities=12, mentions=1)
    stored = case.index._contents.store.shards[0].tensors["text_embed"]
    stored[4] = -3e38 * torch.sign(case.mentions.tensors["text_embed"][0])
    for answer in every_question(case.index, case.mentions).values():
        with pytest.raises(EntityIndexError, match="'e4' are not finite, or too large"):
            answer()


@pytest.mark.parametrize("value", [1e16, 3e38])
@pytest.mark.parametrize("name", ["text_embed", "text_value", "image_key_z"])
def test_mentions_that_are_too_large_are_refused(name: str, value: float):
    case = make_case(mentions=3)
    case.mentions.tensors[name][2].view(-1)[0] = value
    for answer in every_question(case.index, case.mentions).values():
        with pytest.raises(ValueError, match=f"mention 2 are not finite, or too large .`{name}`"):
            answer()

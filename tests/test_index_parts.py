"""Parts of a knowledge base: ranks and searches of several indexes add up to those of one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import index_of, mention_features, random_encoded
from tiny_clip import tiny_model

from mimic_el.index_mimic import EntityIndex
from mimic_el.matching_mimic import EntityFeatures
from mimic_el.modeling_mimic import MentionFeatures, MimicModel

ENTITIES, MENTIONS = 90, 14


def cut(index: EntityIndex, model: MimicModel, bounds: list[int]) -> list[EntityIndex]:
    """The rows of an index between bounds, as indexes of their own."""
    store = index._contents.store
    parts = []
    for start, stop in zip([0, *bounds], [*bounds, len(index)], strict=True):
        features = EntityFeatures(store.full(slice(start, stop), torch.device("cpu")).tensors)
        records = [store.record(row) for row in range(start, stop)]
        parts.append(EntityIndex.from_features(features, records, model, dtype="float32"))
    return parts


@pytest.fixture(scope="module", params=[1, 3], ids=["different", "equals"])
def case(request: pytest.FixtureRequest) -> tuple[MimicModel, EntityIndex, MentionFeatures]:
    """With equals, each entity is there three times, in other parts too."""
    model = tiny_model()
    encoded, mask = random_encoded(model.config, ENTITIES // request.param, 1, clusters=10)
    mentions, mention_mask = random_encoded(model.config, MENTIONS, 2, clusters=10)
    index = index_of(model, encoded, mask, repeat=request.param)
    return model, index, mention_features(model, mentions, mention_mask)


@pytest.mark.parametrize("method", ["pruned", "exhaustive"])
@pytest.mark.parametrize("bounds", [[], [40], [1, 30, 31, 89]])
def test_ranks_are_the_sums_over_parts(
    case: tuple[MimicModel, EntityIndex, MentionFeatures], bounds: list[int], method: str
) -> None:
    model, index, mentions = case
    answers = [None if row == 3 else f"e{(7 * row) % ENTITIES}" for row in range(MENTIONS)]
    parts = cut(index, model, bounds)
    scores = np.stack([part.answer_scores(mentions, answers) for part in parts])
    assert (np.isnan(scores).sum(axis=0) == [len(parts) - (answer is not None) for answer in answers]).all()
    of_answers = np.nan_to_num(scores).sum(axis=0)
    counts = np.sum([part.count_better(mentions, of_answers, answers, method=method) for part in parts], axis=0)
    ranks = 1 + counts[0] + counts[1] / 2
    ranks[3] = np.nan
    np.testing.assert_array_equal(ranks, index.rank(mentions, answers).ranks)


@pytest.mark.parametrize("method", ["pruned", "exhaustive"])
@pytest.mark.parametrize("candidates", [False, True])
def test_a_floor_leaves_out_what_is_below(
    case: tuple[MimicModel, EntityIndex, MentionFeatures], method: str, candidates: bool
) -> None:
    _, index, mentions = case
    allowed = [[f"e{row}" for row in range(0, ENTITIES, 2)]] * MENTIONS if candidates else None
    whole = index.search(mentions, 12, candidates=allowed)
    # For each mention another number of entities reaches the floor: none, some, or all that are wanted.
    floors = np.array([whole.scores[row, row % 12] - 1e-3 for row in range(MENTIONS)])
    floors[0] = whole.scores[0, 0] + 1
    found = index.search(mentions, 12, candidates=allowed, method=method, min_score=floors)
    for row in range(MENTIONS):
        count = int((whole.scores[row] >= floors[row]).sum())
        assert found.entity_ids[row] == whole.entity_ids[row][:count]
        np.testing.assert_allclose(found.scores[row, :count], whole.scores[row, :count], rtol=1e-6)
        assert np.isnan(found.scores[row, count:]).all()
    assert found.entity_ids[0] == []
    everything = index.search(mentions, 12, candidates=allowed, method=method, min_score=-1e9)
    assert everything.entity_ids == whole.entity_ids


def test_a_floor_spares_work(case: tuple[MimicModel, EntityIndex, MentionFeatures]) -> None:
    _, index, mentions = case
    best = index.search(mentions, 1)
    pruned = index.search(mentions, 10, min_score=best.scores[:, 0] + 10)
    assert pruned.stats.exact_pairs == 0
    assert pruned.entity_ids == [[]] * MENTIONS


def test_what_is_refused(case: tuple[MimicModel, EntityIndex, MentionFeatures]) -> None:
    _, index, mentions = case
    for wrong in ([1.0, 2.0], float("nan")):
        with pytest.raises(ValueError, match="`min_score` must be a number, or one for each of 14 mentions"):
            index.search(mentions, min_score=wrong)
    with pytest.raises(ValueError, match="answers for 1"):
        index.count_better(mentions, [0.0] * MENTIONS, ["e1"])

"""Which scores are equal, in which order they come, and what becomes of those that are no numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny import index_of, mention_features, random_encoded
from tiny_clip import tiny_model

from mimic_el import search_mimic
from mimic_el.errors_mimic import EntityIndexError
from mimic_el.index_mimic import EntityIndex
from mimic_el.matching_mimic import EntityFeatures, MentionFeatures
from mimic_el.modeling_mimic import MimicModel
from mimic_el.pairs_mimic import best_order
from mimic_el.search_mimic import Searcher

METHODS = ("pruned", "exhaustive")


@pytest.fixture(scope="module")
def model() -> MimicModel:
    return tiny_model()


def test_the_order_of_scores():
    """Worked by hand: what is closer than a millionth of 1 + the score is equal, and so is what that joins."""
    close = 1.5e-6
    scores = torch.tensor([[1.0, 2.0, 2.0 + close, 2.0 - close, -torch.inf, 1.0, 3.0, 2.1]])
    rows = torch.tensor([[4, 9, 2, 7, -1, 3, 8, 1]])
    order = best_order(scores, rows)
    assert rows.gather(1, order).tolist() == [[8, 1, 2, 7, 9, 3, 4, -1]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_equals_come_in_the_order_of_rows_whatever_is_scored_with_them(dtype: str, model: MimicModel):
    """In every method, with every company of mentions and entities, in blocks of every size."""
    mentions = mention_features(model, *random_encoded(model.config, 11, seed=3))
    for seed, (different, count, k) in enumerate([(1, 3, 2), (2, 17, 5), (4, 34, 1), (4, 70, 5), (3, 70, 9)]):
        drawn = random.Random(seed)
        encoded, mask = random_encoded(model.config, different, seed=seed)
        kind = torch.tensor([drawn.randrange(different) for _ in range(count)])
        with torch.no_grad():
            each = model.matcher.entity_features(encoded, mask)
            scores = model.score(
                mentions,
                EntityIndex.from_features(  # as they are stored
                    each, [{"id": str(row)} for row in range(different)], model, dtype=dtype
                )._contents.store.full(slice(0, different), torch.device("cpu")),
            ).logits
        every = EntityFeatures({name: tensor[kind] for name, tensor in each.tensors.items()})
        index = EntityIndex.from_features(
            every, [{"id": f"e{row}"} for row in range(count)], model, dtype=dtype, shard_entities=30
        )
        expected = []
        for row in range(len(mentions)):
            kinds = scores[row].argsort(descending=True).tolist()
            gaps = scores[row][kinds].diff().abs()
            assert not len(gaps) or float(gaps.min()) > 1e-4, "kinds that are equal by chance"
            expected.append([f"e{place}" for one in kinds for place in (kind == one).nonzero()[:, 0].tolist()][:k])
        everyone = [[f"e{row}" for row in range(count)]] * len(mentions)
        for method in METHODS:
            assert index.search(mentions, k, method=method).entity_ids == expected
            for row in range(0, len(mentions), 5):
                assert index.search(mentions[row : row + 1], k, method=method).entity_ids == [expected[row]]
        assert index.search(mentions, k, candidates=everyone).entity_ids == expected
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                search_mimic,
                "_searcher",
                lambda matcher, rows, device: Searcher(matcher, rows, block_bytes=2_000, sub_block=7),
            )
            for method in METHODS:
                assert index.search(mentions, k, method=method).entity_ids == expected


# --- What is not a number


def damaged(model: MimicModel, name: str, row: int, value: float) -> EntityIndex:
    index = index_of(model, *random_encoded(model.config, 60, clusters=8), shards=2)
    shard = index._contents.store.shards[row // 30]
    shard.tensors[name] = shard.tensors[name].clone()
    shard.tensors[name][row % 30].view(-1)[0] = value
    return index


NAMES = ("text_embed", "text_local", "text_bias", "text_query", "cross_modal", "image_query_m", "image_query_stats",
         "image_key_k", "image_key_stats", "image_key_z")  # fmt: skip


@pytest.fixture(scope="module")
def mentions(model: MimicModel) -> MentionFeatures:
    return mention_features(model, *random_encoded(model.config, 12, seed=1, clusters=8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_an_entity_whose_features_are_no_numbers(name: str, value: float, model: MimicModel, mentions: MentionFeatures):
    """Whoever it hides, and whoever hides it: an error that names it, or an answer that is right."""
    sound = index_of(model, *random_encoded(model.config, 60, clusters=8), shards=2)
    answers = [f"e{row}" for row in range(12)]
    right = [answers_of(sound, mentions, answers, "pruned")]
    sound.remove(["e44"])
    right.append(answers_of(sound, mentions, answers, "pruned"))
    index = damaged(model, name, 44, value)
    for method in METHODS:
        for number, found in enumerate(answers_of(index, mentions, answers, method)):
            # Its bounds may be sound, and tell that it is not among the answers.
            assert "'e44'" in found if isinstance(found, str) else found in [expected[number] for expected in right]
    with pytest.raises(EntityIndexError, match="'e44'"):
        index.verify()
    index.remove(["e44"])
    for method in METHODS:
        assert answers_of(index, mentions, answers, method) == right[1]


def answers_of(index: EntityIndex, mentions: MentionFeatures, answers: list[str], method: str) -> list[Any]:
    """What is found and ranked, or what an error says."""
    found: list[Any] = []
    for ask in (
        lambda: index.search(mentions, 9, method=method).entity_ids,
        lambda: index.rank(mentions, answers, method=method).ranks.tolist(),
    ):
        try:
            found.append(ask())
        except EntityIndexError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("name", ["text_embed", "text_local", "text_bias", "text_query", "cross_modal"])
def test_a_number_that_is_far_too_large(name: str, model: MimicModel, mentions: MentionFeatures):
    """As a flipped bit makes it: the methods do not give different answers."""
    index = damaged(model, name, 44, 3e38)
    found = [answers_of(index, mentions, [f"e{row}" for row in range(12)], method) for method in METHODS]
    for pruned, exhaustive in zip(*found, strict=True):
        assert pruned == exhaustive or isinstance(pruned, str) or isinstance(exhaustive, str)


def test_candidates_that_are_no_numbers(model: MimicModel, mentions: MentionFeatures):
    index = damaged(model, "text_query", 44, torch.nan)
    with pytest.raises(EntityIndexError, match="'e44'"):
        index.search(mentions, 3, candidates=[["e1", "e44"]] * 12)


# --- Autocast


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_autocast_changes_nothing(dtype: str, model: MimicModel, mentions: MentionFeatures):
    encoded = random_encoded(model.config, 60, clusters=8)
    index = index_of(model, *encoded, dtype=dtype)
    answers = [f"e{row}" for row in range(12)]
    candidates = [[f"e{row}" for row in range(20)]] * 12
    asked = [
        *(lambda method=method: index.search(mentions, 7, method=method) for method in METHODS),
        lambda: index.search(mentions, 7, candidates=candidates),
    ]
    for ask in asked:
        plain = ask()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = ask()
        assert found.entity_ids == plain.entity_ids
        assert found.scores.tobytes() == plain.scores.tobytes()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for method in METHODS:
            ranks = index.rank(mentions, answers, method=method).ranks
            np.testing.assert_array_equal(ranks, index.rank(mentions, answers).ranks)
        built = index_of(model, *encoded, dtype=dtype)
    for name, tensor in index._contents.store.shards[0].tensors.items():
        assert torch.equal(built._contents.store.shards[0].tensors[name], tensor)

"""What words and patches add: sums that come out, and captum's own integrated gradients."""

from __future__ import annotations

import pytest
import torch
from tiny import random_image, tiny_processor
from tiny_clip import tiny_model

from mimic_el.attribution_mimic import Attribution, Encoded, adjusted
from mimic_el.matching_mimic import MimicEncoderOutput
from mimic_el.modeling_mimic import MimicModel

EMPTY = ([""], [""], [None])
MENTION = (["Orange"], ["Orange opened a shop on the corner."], [random_image(1)])
ENTITY = (["Orange"], ["A company that sells telephones."], [random_image(2)])


@pytest.fixture(scope="module")
def model() -> MimicModel:
    return tiny_model()


@pytest.fixture(scope="module")
def attribution(model: MimicModel) -> Attribution:
    return Attribution(model, tiny_processor(model).process_mentions(*EMPTY))


def encoded(attribution: Attribution, model: MimicModel, item: tuple) -> Encoded:
    return attribution.encode(tiny_processor(model).process_mentions(*item))


@pytest.mark.parametrize(
    ("mention", "entity"),
    [
        (MENTION, ENTITY),
        ((["Orange"], ["Orange opened a shop."], [None]), ENTITY),
        (MENTION, (["Orange"], [""], [None])),
        (EMPTY, ENTITY),
    ],
    ids=["both images", "mention without image", "entity without image", "empty mention"],
)
def test_contributions_add_up_to_the_score_less_the_baseline(attribution, model, mention, entity):
    mention, entity = encoded(attribution, model, mention), encoded(attribution, model, entity)
    expected = attribution.scores(mention, entity).total - attribution.baseline_scores(mention, entity).total
    of_mention, of_entity = attribution.contributions(mention, entity)
    assert of_mention.total + of_entity.total == pytest.approx(float(expected), abs=1e-3)


def test_scores_are_those_of_the_model(attribution, model):
    processor = tiny_processor(model)
    with torch.no_grad():
        mentions = model.encode_mentions(**processor.process_mentions(*MENTION))
        entities = model.encode_entities(**processor.process_entities(*ENTITY))
        expected = model.score(mentions, entities)
    scores = attribution.scores(encoded(attribution, model, MENTION), encoded(attribution, model, ENTITY))
    for ours, theirs in [(scores.total, expected.logits), (scores.text, expected.text_logits)]:
        torch.testing.assert_close(ours, theirs[0], atol=1e-4, rtol=1e-5)


def test_nothing_is_added_by_what_is_not_there(attribution, model):
    of_mention, of_entity = attribution.contributions(
        encoded(attribution, model, (["Orange"], ["Orange here."], [None])), encoded(attribution, model, EMPTY)
    )
    assert not of_mention.patches.any()
    assert not of_entity.patches.any()
    assert not of_entity.tokens.any()


def test_gradients_through_the_matcher_are_those_of_captum(attribution, model):
    captum = pytest.importorskip("captum.attr")
    mention, entity = encoded(attribution, model, MENTION), encoded(attribution, model, ENTITY)
    baseline = encoded(attribution, model, EMPTY)
    names = list(mention.outputs)

    def score(*tensors: torch.Tensor) -> torch.Tensor:
        sides = [MimicEncoderOutput(**dict(zip(names, part, strict=True))) for part in (tensors[:4], tensors[4:])]
        count = len(tensors[0])
        return model.matcher.score_pairs(
            model.matcher.mention_features(sides[0], mention.mask.expand(count, -1)),
            model.matcher.entity_features(sides[1], entity.mask.expand(count, -1)),
        ).total

    expected = captum.IntegratedGradients(score).attribute(
        tuple(side.outputs[name] for side in (mention, entity) for name in names),
        tuple(baseline.outputs[name] for _ in range(2) for name in names),
        n_steps=64,
    )
    of_mention, of_entity, _ = attribution.mean_gradients(mention, entity, {}, 64)
    for side, gradients, theirs in ((mention, of_mention, expected[:4]), (entity, of_entity, expected[4:])):
        for name, one in zip(names, theirs, strict=True):
            ours = gradients[name] * (side.outputs[name] - baseline.outputs[name])
            torch.testing.assert_close(ours, one.float(), atol=1e-4, rtol=1e-4)


def test_stored_features_take_the_place_of_an_image_that_is_not_at_hand(attribution, model):
    mention = encoded(attribution, model, MENTION)
    whole, without = encoded(attribution, model, ENTITY), encoded(attribution, model, (*ENTITY[:2], [None]))
    features = attribution.entity_features(whole).tensors
    stored = {name: t for name, t in features.items() if name.startswith(("image_", "cross_modal"))}
    expected = attribution.scores(mention, whole).total - attribution.baseline_scores(mention, whole).total
    of_mention, of_entity = attribution.contributions(mention, without, stored)
    assert of_mention.total + of_entity.total == pytest.approx(float(expected), abs=1e-3)
    assert of_entity.whole_image
    assert not of_entity.patches.any()


def test_a_model_in_training_stays_so_and_gets_no_gradients(model):
    model.train()
    try:
        attribution = Attribution(model, tiny_processor(model).process_mentions(*EMPTY))
        attribution.contributions(encoded(attribution, model, MENTION), encoded(attribution, model, ENTITY))
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.eval()


def test_estimates_are_adjusted_in_proportion_to_their_size():
    torch.testing.assert_close(adjusted(torch.tensor([1.0, -1.0, 2.0]).numpy(), 6.0).tolist(), [2.0, 0.0, 4.0])
    assert adjusted(torch.zeros(4).numpy(), 2.0).tolist() == [0.5] * 4

"""The model against the plain transcription of its equations (`oracle.py`), and as a model of transformers.

How close float32 has to be to the float64 transcription: 1e-4, for a score of 1 or less, and relative to the score
above that. Some inputs are harder than float32 allows: means a hundred times the differences that matter, or vectors
that cancel to the last digits. There the plain form in float32 loses digits too, and the factored form may lose
`NO_WORSE` times as much: it makes roundings of the same size in another order.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, BertConfig, CLIPModel

from mimic_el.configuration_mimic import MimicConfig
from mimic_el.matching_mimic import (
    CrossModalFusionUnit,
    EntityFeatures,
    Matcher,
    MentionFeatures,
    MimicEncoderOutput,
    PairScores,
    TextGlobalLocalUnit,
    VisionDualDirection,
)
from mimic_el.modeling_mimic import MimicModel, MimicOutput
from mimic_el.tests import oracle
from mimic_el.tests.tiny_clip import save_tiny_clip, tiny_clip_config, tiny_config, tiny_inputs, tiny_model

settings.register_profile("mimic", deadline=None, derandomize=True, max_examples=60)
properties = settings.get_profile("mimic")

TOLERANCE = 1e-4
NO_WORSE = 2
LOGITS = ("logits", "text_logits", "image_logits", "cross_modal_logits")
HALVES = (torch.bfloat16, torch.float16)


def weights_of(module: nn.Module, prefix: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor.detach().to(dtype) for name, tensor in module.state_dict().items()}


def assert_accurate(factored: Tensor, plain: Tensor, exact: Tensor, unavoidable: float = 0.0) -> None:
    """`factored` is as near `exact`, the float64 transcription, as the file's docstring says; `plain` is float32.

    The latter two may have more rows and columns, of mentions and entities like the others: the plain form's error of
    one pair alone may be small by luck. So may all of them, where `unavoidable` is larger.
    """
    assert factored.dtype == torch.float32
    hard = max((plain - exact).abs().max().item(), unavoidable)
    exact = exact[: factored.shape[0], : factored.shape[1]]
    error = (factored - exact).abs()
    excess = (error - TOLERANCE * exact.abs().clamp(min=1) - NO_WORSE * hard).max().item()
    assert excess <= 0, f"off by {error.max():.1e}, where {hard:.1e} is lost in any case"


# --- Random cases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Sizes and magnitudes of a random comparison; the numbers follow from the seed."""

    mentions: int
    entities: int
    tokens: int
    patches: int
    size: int
    weight_scale: float
    input_scale: float
    mean: float  # what is added to every input
    spread: float  # how far the items differ from each other, relative to `input_scale`
    masked: bool
    blank: bool  # the first item of each side has no image: all its image tokens are alike
    seed: int


cases = st.builds(
    Case,
    mentions=st.integers(1, 4),
    entities=st.integers(1, 5),
    tokens=st.integers(1, 9),
    patches=st.integers(1, 6),
    size=st.sampled_from([1, 2, 3, 8, 24, 96]),
    weight_scale=st.sampled_from([0.1, 0.5, 1.0, 3.0]),
    input_scale=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    mean=st.sampled_from([0.0, 0.0, 1.0, 100.0]),
    spread=st.sampled_from([1.0, 1.0, 1e-2, 1e-4]),
    masked=st.booleans(),
    blank=st.booleans(),
    seed=st.integers(0, 2**31),
)


# How many mentions and entities the plain form scores; the factored one the first few of them, as the case says.
SAMPLE = 16


class Draw:
    """Random tensors of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def inputs(self, *shape: int) -> Tensor:
        """The same for all items, and what makes them differ."""
        common = self.normal(*shape[1:])
        return self.case.input_scale * (common + self.case.spread * self.normal(*shape)) + self.case.mean

    def fill(self, module: nn.Module) -> None:
        """Random weights: matrices that keep lengths, times the case's scale; layer norms near the identity."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                values = self.normal(*parameter.shape)
                if parameter.dim() > 1:
                    values = values * self.case.weight_scale / math.sqrt(parameter.shape[1])
                elif "norm" in name and name.endswith("weight"):
                    values = 1 + 0.3 * values
                parameter.copy_(values)

    def mask(self, count: int) -> Tensor:
        lengths = torch.randint(1, self.case.tokens + 1, (count, 1), generator=self.generator)
        return (torch.arange(self.case.tokens) < lengths).long()

    def tokens_of_image(self, count: int) -> Tensor:
        tokens = self.inputs(count, self.case.patches, self.case.size)
        if self.case.blank:
            tokens[0] = tokens[0, :1]
        return tokens


def sized_config(case: Case) -> MimicConfig:
    """Every width is the case's size."""
    clip: Any = tiny_clip_config()
    clip.projection_dim = clip.text_config.hidden_size = case.size
    clip.text_config.num_attention_heads = 1
    size = case.size
    return MimicConfig(clip, size, size, size, size, mask_text_padding=case.masked)


def in_both(function: Callable[..., Tensor], module: nn.Module, prefix: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What the transcription gives in float32 and in float64."""
    plain = function(weights_of(module, prefix, torch.float32), *inputs)
    doubled = (x.double() if x.is_floating_point() else x for x in inputs)
    return plain, function(weights_of(module, prefix), *doubled)


# --- Each unit ----------------------------------------------------------------------------------------------------


@properties
@given(case=cases)
def test_text_unit(case: Case) -> None:
    draw, unit = Draw(case), TextGlobalLocalUnit(sized_config(case))
    draw.fill(unit)
    t_m, T_m = draw.inputs(SAMPLE, case.size), draw.inputs(SAMPLE, case.tokens, case.size)
    t_e, T_e = draw.inputs(SAMPLE, case.size), draw.inputs(SAMPLE, case.tokens, case.size)
    mask_m, mask_e = draw.mask(SAMPLE), draw.mask(SAMPLE)
    inputs = [t_m, T_m, t_e, T_e, *([mask_m, mask_e] if case.masked else [])]
    with torch.no_grad():
        plain, exact = in_both(partial(oracle.tglu, unit="unit"), unit, "unit", *inputs)
        some, few = slice(case.mentions), slice(case.entities)
        mentions = unit.mention_features(t_m[some], T_m[some], mask_m[some])
        entities = unit.entity_features(t_e[few], T_e[few], mask_e[few])
        assert_accurate(unit(mentions, entities), plain, exact)


@properties
@given(case=cases)
def test_dual_unit(case: Case) -> None:
    draw, unit = Draw(case), VisionDualDirection(sized_config(case))
    draw.fill(unit)
    q, k = draw.inputs(SAMPLE, case.size), draw.inputs(SAMPLE, case.size)
    Z = draw.tokens_of_image(SAMPLE)
    with torch.no_grad():
        plain, exact = in_both(partial(oracle.dual, unit="unit"), unit, "unit", q, k, Z)
        some, few = slice(case.mentions), slice(case.entities)
        assert_accurate(unit(unit.query_features(q[some]), unit.key_features(k[few], Z[few])), plain, exact)


@properties
@given(case=cases)
def test_cross_modal_unit(case: Case) -> None:
    draw, unit = Draw(case), CrossModalFusionUnit(sized_config(case))
    draw.fill(unit)
    t_m, t_e = draw.inputs(SAMPLE, case.size), draw.inputs(SAMPLE, case.size)
    V_m, V_e = draw.tokens_of_image(SAMPLE), draw.tokens_of_image(SAMPLE)
    with torch.no_grad():
        plain, exact = in_both(partial(oracle.cmfu, unit="unit"), unit, "unit", t_m, V_m, t_e, V_e)
        some, few = slice(case.mentions), slice(case.entities)
        scores = unit(unit.features(t_m[some], V_m[some]), unit.features(t_e[few], V_e[few]))
        assert_accurate(scores, plain, exact)


# --- Where squares cancel -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cancelling:
    """How nearly the two sums of the dual unit vanish: `z + q'` and `g h + k'`."""

    case: Case
    first: float | None  # how far z is from -q', relative to its size; None for anywhere
    second: float | None  # how far k' is from -g h
    shift: float  # added to all entries of z, q' and k': a layer norm ignores it


distances = st.sampled_from([None, 1.0, 0.3, 0.1, 0.03, 1e-2, 1e-3, 1e-4, 1e-6, 0.0])
cancelling = st.builds(
    Cancelling,
    # Of 2 or 3 numbers a layer norm leaves little more than signs, which says little about accuracy.
    case=cases.filter(lambda case: case.size > 3),
    first=distances,
    second=distances,
    shift=st.sampled_from([0.0, 0.0, 10.0, 1000.0]),
)


def cancelling_unit(given: Cancelling) -> tuple[VisionDualDirection, Tensor, Tensor, Tensor]:
    """A unit whose projections are the identity, with queries, keys and tokens such that row i cancels with row i."""
    case = replace(given.case, mean=0.0, spread=1.0)
    draw, unit = Draw(case), VisionDualDirection(sized_config(case))
    draw.fill(unit)
    size, count = case.size, SAMPLE
    with torch.no_grad():
        for layer in (unit.cls_fc, unit.tokens_fc):
            layer.weight.copy_(torch.eye(size))
        q, k = draw.inputs(SAMPLE, size) + given.shift, draw.inputs(count, size) + given.shift
        Z = draw.tokens_of_image(count) - given.shift
        weights = weights_of(unit, "unit")
        projected = oracle.linear(weights, "unit.cls_fc", q.double())
        if given.first is not None:
            Z = (-projected - weights["unit.tokens_fc.bias"]).float().unsqueeze(1)
            Z = Z + given.first * case.input_scale * draw.normal(count, case.patches, size)
        if given.second is not None:
            z = oracle.linear(weights, "unit.tokens_fc", Z.double()).mean(dim=1)
            normed = oracle.layer_norm(weights, "unit.add_layer_norm", z + projected)
            h = oracle.linear(weights, "unit.fc", normed)
            gh = torch.tanh(oracle.linear(weights, "unit.gate_fc", h)) * h
            k = (-gh - weights["unit.cls_fc.bias"] + given.shift).float()
            k = k + given.second * gh.abs().mean().float() * draw.normal(count, size)
    return unit, q, k, Z


def rounding_of_vectors(unit: VisionDualDirection, q: Tensor, k: Tensor, Z: Tensor, exact: Tensor) -> float:
    """How far a score is off if only q', k' and z are rounded to float32, as every form in float32 rounds them."""
    weights, generator = weights_of(unit, "unit"), torch.Generator().manual_seed(0)
    z = Z.double().mean(dim=1, keepdim=True)

    def rounded(x: Tensor, layer: str) -> Tensor:
        largest = (x + weights[f"unit.{layer}.bias"]).abs().amax(dim=-1, keepdim=True)
        return x + 2**-24 * largest * torch.randn(x.shape, generator=generator, dtype=x.dtype)

    errors = []
    for _ in range(4):
        inputs = rounded(q.double(), "cls_fc"), rounded(k.double(), "cls_fc"), rounded(z, "tokens_fc")
        errors.append((oracle.dual(weights, *inputs, unit="unit") - exact).abs().max().item())
    return max(errors)


@settings(properties, max_examples=150)
@given(given=cancelling)
def test_dual_unit_where_vectors_cancel(given: Cancelling) -> None:
    unit, q, k, Z = cancelling_unit(given)
    some, few = slice(given.case.mentions), slice(given.case.entities)
    with torch.no_grad():
        plain, exact = in_both(partial(oracle.dual, unit="unit"), unit, "unit", q, k, Z)
        unavoidable = rounding_of_vectors(unit, q, k, Z, exact)
        query, key = unit.query_features(q[some]), unit.key_features(k[few], Z[few])
        assert_accurate(unit(query, key), plain, exact, unavoidable)
        # Pairs of a list, and not of a matrix, are computed in another way.
        rows, columns = torch.cartesian_prod(torch.arange(given.case.mentions), torch.arange(given.case.entities)).T
        pairs = unit.score_pairs({n: t[rows] for n, t in query.items()}, {n: t[columns] for n, t in key.items()})
        assert_accurate(pairs.view(given.case.mentions, given.case.entities), plain, exact, unavoidable)


@settings(properties, max_examples=100)
@given(given=cancelling)
def test_no_key_scores_more_than_the_most(given: Cancelling) -> None:
    """Of any query; and a key that is the query itself, where nothing else counts, scores nearly that."""
    unit, q, k, Z = cancelling_unit(given)
    with torch.no_grad():
        query, key = unit.query_features(q), unit.key_features(k, Z)
        most = query["stats"][:, VisionDualDirection.QUERY_STATS.index("upper_bound")]
        rounding = 1e-5 * (most.abs() + query["m"].norm(dim=1) * q.shape[1] ** 0.5)
        assert (unit(query, key) <= (most + rounding).unsqueeze(1)).all()
        unit.gate_fc.weight.zero_()
        unit.gate_fc.bias.zero_()
        # So long that what the gate lets through does not turn it.
        key["k"] = 1e6 * query["m"] / query["m"].norm(dim=1, keepdim=True)
        key["stats"] = unit.key_stats(key, key["stats"][:, -1])
        assert ((unit.score_pairs(query, key) - most).abs() <= 10 * rounding).all()


def test_gradients_where_vectors_cancel() -> None:
    """The pairs that are computed again pass their gradients on: as the transcription's in float64."""
    case = Case(3, 3, 1, 2, 8, 1.0, 1.0, 0.0, 1.0, False, False, seed=5)
    for first, second in ((1e-2, None), (None, 1e-2), (0.1, 0.1)):
        unit, *inputs = cancelling_unit(Cancelling(case, first, second, 0.0))
        unit.double()
        inputs = [x.double().requires_grad_() for x in inputs]
        q, k, Z = inputs
        factored = unit(unit.query_features(q), unit.key_features(k, Z)).square().sum()
        ours = torch.autograd.grad(factored, [*unit.parameters(), *inputs])
        weights = {f"unit.{name}": parameter for name, parameter in unit.named_parameters()}
        plain = oracle.dual(weights, q, k, Z, unit="unit").square().sum()
        theirs = torch.autograd.grad(plain, [*unit.parameters(), *inputs])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * max(1.0, b.abs().max().item()))


# --- All units ----------------------------------------------------------------------------------------------------


def random_sides(case: Case) -> tuple[Matcher, list[dict[str, Tensor]], list[Tensor]]:
    """A matcher, what an encoder could give for mentions and entities, and their masks."""
    draw, matcher = Draw(case), Matcher(sized_config(case))
    draw.fill(matcher)
    sides, masks = [], []
    for _ in range(2):
        sides.append(
            {
                "text_embeds": F.normalize(draw.inputs(SAMPLE, case.size), dim=-1),
                "text_tokens": draw.inputs(SAMPLE, case.tokens, case.size),
                "image_embeds": draw.inputs(SAMPLE, case.size),
                "image_tokens": draw.tokens_of_image(SAMPLE),
            }
        )
        masks.append(draw.mask(SAMPLE))
    return matcher, sides, masks


def factored_scores(
    matcher: Matcher, sides: list[dict[str, Tensor]], masks: list[Tensor], cast: torch.dtype | None = None
) -> dict[str, Tensor]:
    mentions = matcher.mention_features(MimicEncoderOutput(**sides[0]), masks[0])
    entities = matcher.entity_features(MimicEncoderOutput(**sides[1]), masks[1])
    return named(matcher(mentions.to(cast), entities.to(cast)) if cast else matcher(mentions, entities))


def named(scores: PairScores) -> dict[str, Tensor]:
    return dict(zip(LOGITS, (scores.total, scores.text, scores.image, scores.cross_modal), strict=True))


def plain_scores(
    case: Case, weights: dict[str, Tensor], sides: list[dict[str, Tensor]], masks: list[Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    mention, entity = ({name: tensor.to(dtype) for name, tensor in side.items()} for side in sides)
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    return oracle.scores(weights, mention, entity, *(masks if case.masked else ()))


@properties
@given(case=cases)
def test_all_scores(case: Case) -> None:
    matcher, sides, masks = random_sides(case)
    weights = weights_of(matcher, "matcher")
    with torch.no_grad():
        picked = (slice(case.mentions), slice(case.entities))
        some = [{name: t[rows] for name, t in side.items()} for side, rows in zip(sides, picked, strict=True)]
        factored = factored_scores(matcher, some, [mask[rows] for mask, rows in zip(masks, picked, strict=True)])
        plain = plain_scores(case, weights, sides, masks, torch.float32)
        exact = plain_scores(case, weights, sides, masks, torch.float64)
    for name in LOGITS:
        assert factored[name].shape == (case.mentions, case.entities)
        assert_accurate(factored[name], plain[name], exact[name])


@pytest.mark.parametrize("dtype", HALVES)
@settings(properties, max_examples=30)
@given(case=cases)
def test_half_precision_inputs(case: Case, dtype: torch.dtype) -> None:
    """Half-precision weights and encoder outputs lose less than where the plain form computes in that precision."""
    matcher, sides, masks = random_sides(case)
    matcher.to(dtype)
    sides = [{name: tensor.to(dtype) for name, tensor in side.items()} for side in sides]
    weights = weights_of(matcher, "matcher")
    with torch.no_grad():
        factored = factored_scores(matcher, sides, masks)
        plain = plain_scores(case, weights, sides, masks, dtype)
        exact = plain_scores(case, weights, sides, masks, torch.float64)
    for name in LOGITS:
        assert_no_worse_than_half(factored[name], plain[name], exact[name])


def assert_no_worse_than_half(factored: Tensor, plain: Tensor, exact: Tensor, rounding: float = TOLERANCE) -> None:
    assert factored.isfinite().all()
    error = (factored - exact).abs().max().item()
    plain_error = (plain.double() - exact).abs().max().item()  # not a number where float16 overflows
    allowed = plain_error + rounding * exact.abs().max().clamp(min=1).item()
    assert not error > allowed, f"off by {error:.1e}, the plain form in half precision by {plain_error:.1e}"


@pytest.mark.parametrize("dtype", HALVES)
@settings(properties, max_examples=30)
@given(case=cases.filter(lambda case: case.size > 3))
def test_features_cast_to_half_precision(case: Case, dtype: torch.dtype) -> None:
    """As an index may keep them: no worse than the plain form in that precision, but for the rounding itself."""
    matcher, sides, masks = random_sides(replace(case, mean=0.0, spread=1.0, input_scale=min(case.input_scale, 1.0)))
    weights = weights_of(matcher, "matcher")
    with torch.no_grad():
        factored = factored_scores(matcher, sides, masks, cast=dtype)
        plain = plain_scores(case, weights, sides, masks, dtype)
        exact = plain_scores(case, weights, sides, masks, torch.float64)
    for name in LOGITS:
        assert_no_worse_than_half(factored[name], plain[name], exact[name], rounding=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALVES)
@settings(properties, max_examples=20)
@given(case=cases)
def test_scoring_ignores_autocast(case: Case, dtype: torch.dtype) -> None:
    matcher, sides, masks = random_sides(case)
    with torch.no_grad():
        outside = factored_scores(matcher, sides, masks)
        with torch.autocast("cpu", dtype):
            inside = factored_scores(matcher, sides, masks)
    for name in LOGITS:
        assert torch.equal(inside[name], outside[name])


# --- The model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> MimicModel:
    return tiny_model()


def both_sides(mentions: int, entities: int) -> dict[str, Tensor]:
    return tiny_inputs(mentions) | tiny_inputs(entities, seed=1, prefix="entity_")


def plain_forward(model: MimicModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores by the transcription, in float64, of what the model's encoder gives."""
    masked = model.config.mask_text_padding
    sides, masks = [], []
    for prefix in ("", "entity_"):
        side = {name: inputs[prefix + name] for name in ("input_ids", "attention_mask", "pixel_values")}
        sides.append({name: tensor.double() for name, tensor in model.encode(**side).items()})
        masks.append(side["attention_mask"])
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    return oracle.scores(weights, sides[0], sides[1], *(masks if masked else ()))


@pytest.mark.parametrize(("mentions", "entities"), [(1, 1), (1, 5), (4, 1), (3, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_forward(mentions: int, entities: int, masked: bool) -> None:
    model, inputs = tiny_model(mask_text_padding=masked), both_sides(mentions, entities)
    with torch.no_grad():
        output, expected = model(**inputs), plain_forward(model, inputs)
        as_tuple = model(**inputs, return_dict=False)
    assert output.loss is None
    for name in LOGITS:
        torch.testing.assert_close(output[name].double(), expected[name], rtol=1e-5, atol=1e-5)
    if mentions > 1 < entities:
        assert expected["logits"].std() > 0.1  # scores that differ
    assert isinstance(as_tuple, tuple)
    assert all(torch.equal(a, output[name]) for a, name in zip(as_tuple, LOGITS, strict=True))


def test_every_weight_has_the_gradient_of_the_equations() -> None:
    """In float64, through encoder and units: the factored form's gradients are the transcription's."""
    model = tiny_model().double()
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in both_sides(4, 4).items()}
    model(**inputs, return_loss=True).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == {name for name, _ in model.named_parameters()} - {"encoder.clip.logit_scale"}
    model.zero_grad()
    sides = [
        model.encode(**{name: inputs[prefix + name] for name in ("input_ids", "attention_mask", "pixel_values")})
        for prefix in ("", "entity_")
    ]
    oracle.loss(oracle.scores(dict(model.named_parameters()), sides[0], sides[1])).backward()
    for name, parameter in model.named_parameters():
        if name in ours:
            assert parameter.grad is not None
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-8, atol=1e-10)


def test_entities_alike_and_without_images_have_finite_gradients() -> None:
    model, inputs = tiny_model(), both_sides(3, 3)
    for prefix in ("", "entity_"):
        inputs[f"{prefix}pixel_values"].zero_()
        inputs[f"{prefix}input_ids"] = inputs["input_ids"][:1].expand(3, -1)
        inputs[f"{prefix}attention_mask"] = inputs["attention_mask"][:1].expand(3, -1)
    output = model(**inputs, return_loss=True)
    assert torch.allclose(output.logits, output.logits[0, 0].expand(3, 3))
    assert output.loss.item() == pytest.approx(4 * math.log(3), rel=1e-5)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_features_are_returned_where_asked_for(model: MimicModel) -> None:
    with torch.no_grad():
        output = model(**both_sides(3, 4), return_features=True)
        again = model.score(output.mention_features, output.entity_features)
    for name in LOGITS:
        assert torch.equal(again[name], output[name])
    assert "mention_features" not in model(**both_sides(3, 4))


def test_other_arguments_reach_the_backbone(model: MimicModel) -> None:
    seen = []
    part = model.encoder.clip.text_model
    handle = part.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**both_sides(2, 2), output_hidden_states=True)
    handle.remove()
    assert [kwargs["output_hidden_states"] for kwargs in seen] == [True, True]


def test_the_parts_make_the_whole(model: MimicModel) -> None:
    """Encode, join, pick and score by hand: as `forward`, whatever the size of a block."""
    inputs = both_sides(5, 7)
    with torch.no_grad():
        whole = model(**inputs)
        mentions = model.encode_mentions(**tiny_inputs(5))
        entity = tiny_inputs(7, seed=1)
        halves = [model.encode_entities(**{n: t[rows] for n, t in entity.items()}) for rows in (slice(3), slice(3, 7))]
        entities = EntityFeatures.cat(halves)
        assert len(mentions) == 5
        assert len(entities) == 7
        for block_bytes in (1, 4 * 12 * 12 * 3, 4 * 12 * 12 * 14, 2**28):
            output = model.score(mentions, entities, block_bytes=block_bytes)
            for name in LOGITS:
                torch.testing.assert_close(output[name], whole[name], rtol=1e-5, atol=1e-5)
        for some, few in ((0, 7), (5, 0)):
            assert model.score(mentions[:some], entities[:few]).cross_modal_logits.shape == (some, few)
        rows, columns = torch.tensor([4, 0, 4]), torch.tensor([6, 6, 1])
        aligned = named(model.matcher.score_pairs(mentions[rows], entities[columns]))
        for name in LOGITS:
            torch.testing.assert_close(aligned[name], whole[name][rows, columns], rtol=1e-5, atol=1e-5)


def test_features_are_handled_like_tensors(model: MimicModel) -> None:
    with torch.no_grad():
        features = model.encode_mentions(**tiny_inputs(4))
    assert [
        len(features[rows]) for rows in (slice(1, 3), torch.tensor([0, 3]), torch.tensor([True] * 3 + [False]))
    ] == [
        2,
        2,
        3,
    ]
    assert {t.dtype for t in features.to(torch.float16).tensors.values()} == {torch.float16}
    assert not any(t.requires_grad for t in model.encode_mentions(**tiny_inputs(4)).detach().tensors.values())
    assert "MentionFeatures(4 items" in repr(features)
    with pytest.raises(TypeError, match="slice or a tensor"):
        features[0]  # type: ignore[index]
    with pytest.raises(ValueError, match="nothing to join"):
        MentionFeatures.cat([])
    with pytest.raises(ValueError, match="differ in their first dimension"):
        MentionFeatures({"a": torch.ones(2), "b": torch.ones(3)})


def test_blank_images(model: MimicModel) -> None:
    """None, zeros, and one or several of them, encoded with gradients or without: all the same."""
    inputs = tiny_inputs(4)
    inputs["pixel_values"][1:] = 0
    text = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        together, absent = model.encode(**inputs), model.encode(**text)
    with_gradients = model.encode(**inputs)
    for name in together:
        torch.testing.assert_close(together[name], with_gradients[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together[name][1:], absent[name][1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_what_padding_says(masked: bool) -> None:
    """With `mask_text_padding` the tokens after the end of a text change no score; in the published model they do."""
    model, inputs = tiny_model(mask_text_padding=masked), both_sides(3, 3)
    changed = dict(inputs)
    for name in ("input_ids", "entity_input_ids"):
        mask = inputs[name.replace("input_ids", "attention_mask")]
        assert (mask == 0).any()
        changed[name] = torch.where(mask == 0, 7, inputs[name])
    with torch.no_grad():
        before, after = model(**inputs).logits, model(**changed).logits
    assert torch.allclose(before, after, atol=1e-5) == masked
    with torch.enable_grad():
        torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=1e-5)


# --- The loss -----------------------------------------------------------------------------------------------------


def plain_loss(
    logits: dict[str, Tensor], labels: list[int], entities: list[int], ignore: bool = False, symmetric: bool = False
) -> float:
    """One mention after the other, one rival after the other; `entities` says which entity each row is."""
    total = 0.0
    count = len(labels)
    for name in LOGITS:
        scores = logits[name].tolist()
        for i, answer in enumerate(labels):
            rivals = [
                j for j in range(len(entities)) if j != answer and not (ignore and entities[j] == entities[answer])
            ]
            terms = [math.exp(scores[i][j]) for j in (answer, *rivals)]
            total += (math.log(sum(terms)) - scores[i][answer]) / count
            if symmetric:
                rivals = [
                    j for j in range(count) if j != i and not (ignore and entities[labels[j]] == entities[answer])
                ]
                terms = [math.exp(scores[j][answer]) for j in (i, *rivals)]
                total += (math.log(sum(terms)) - scores[i][answer]) / count
    return total


@pytest.fixture(scope="module")
def output(model: MimicModel) -> MimicOutput:
    with torch.no_grad():
        return model(**both_sides(4, 6))


def test_published_loss(model: MimicModel) -> None:
    with torch.no_grad():
        output = model(**both_sides(4, 4), return_loss=True)
    assert output.loss.item() == pytest.approx(oracle.loss(output).item(), rel=1e-6)
    assert output.loss.item() == pytest.approx(plain_loss(output, [0, 1, 2, 3], [0, 1, 2, 3]), rel=1e-5)


def test_labels_ask_for_the_loss(model: MimicModel, output: MimicOutput) -> None:
    labels = [5, 0, 0, 2]
    inputs = both_sides(4, 6) | {"labels": torch.tensor(labels)}
    with torch.no_grad():
        assert model(**inputs).loss.item() == pytest.approx(plain_loss(output, labels, list(range(6))), rel=1e-5)
        assert model(**inputs, return_loss=False).loss is None


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [2, 1, 2, 1]])
def test_options_of_the_loss(output: MimicOutput, labels: list[int], symmetric: bool, ignore: bool) -> None:
    """Entities that are in the batch twice, and mentions that share a row."""
    model = tiny_model(ignore_duplicate_answers=ignore, symmetric_loss=symmetric)
    entities = [70, 80, 70, 90, 80, 60]
    loss = model.contrastive_loss(output, torch.tensor(labels), torch.tensor(entities)).item()
    assert loss == pytest.approx(plain_loss(output, labels, entities, ignore, symmetric), rel=1e-5)
    published = plain_loss(output, labels, entities, False, symmetric)
    if ignore:  # it makes a difference, and none where nobody says which entities are the same
        assert loss < published - 1e-3
        assert model.contrastive_loss(output, torch.tensor(labels)).item() == pytest.approx(published, rel=1e-5)


def test_loss_of_one_pair_is_zero(model: MimicModel) -> None:
    assert model(**both_sides(1, 1), return_loss=True).loss.item() == 0


# --- What is refused ----------------------------------------------------------------------------------------------


def test_bad_inputs(model: MimicModel, output: MimicOutput) -> None:
    inputs = both_sides(2, 3)

    def refused(message: str, error: type[Exception] = ValueError, **changes: Any) -> None:
        with pytest.raises(error, match=message):
            model(**{name: value for name, value in (inputs | changes).items() if value is not None})

    refused("was given no `entity_input_ids`", entity_input_ids=None)
    refused(r"`input_ids` must have the shape \(batch, tokens\).*got \(12,\)", input_ids=inputs["input_ids"][0])
    refused(r"`entity_input_ids` must have.*got \(0, 12\)", entity_input_ids=inputs["input_ids"][:0])
    refused(r"`entity_attention_mask` has the shape \(2, 12\)", entity_attention_mask=inputs["attention_mask"])
    refused(
        r"`pixel_values` has the shape \(2, 3, 32, 32\).*need \(2, 3, 24, 24\)", pixel_values=torch.ones(2, 3, 32, 32)
    )
    refused(r"`entity_pixel_values` has the shape \(2,", entity_pixel_values=inputs["pixel_values"])
    refused("loss of 2 mentions against 3 entities needs `labels`", return_loss=True)
    refused("`labels` must hold 2 rows of entities, each from 0 to 2", labels=torch.tensor([0, 3]))
    refused("`labels` must hold 2 rows of entities, each from 0 to 2", labels=torch.tensor([-100, 1]))
    refused("`labels` must hold 2 rows", labels=torch.tensor([1]))
    with pytest.raises(ValueError, match="`entity_labels` must hold a number for each of 6 entities"):
        tiny_model(ignore_duplicate_answers=True).contrastive_loss(output, torch.arange(4), torch.arange(4))

    with torch.no_grad():
        mentions, entities = model.encode_mentions(**tiny_inputs(2)), model.encode_entities(**tiny_inputs(2))
    with pytest.raises(TypeError, match="got EntityFeatures and MentionFeatures"):
        model.score(entities, mentions)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got Tensor and EntityFeatures"):
        model.score(torch.ones(2, 2), entities)  # type: ignore[arg-type]


# --- A model of transformers --------------------------------------------------------------------------------------


def test_save_and_load(model: MimicModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    inputs = both_sides(2, 3)
    with torch.no_grad():
        expected = model(**inputs).logits
        for loaded in (MimicModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
            assert type(loaded).__name__ == "MimicModel"
            assert not loaded.training
            assert torch.equal(loaded(**inputs).logits, expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_model(model: MimicModel, tmp_path: Path, dtype: torch.dtype) -> None:
    """The encoder is in half precision, the units are not; scores are float32 and near the transcription's."""
    model.save_pretrained(tmp_path)
    half = MimicModel.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.encoder.parameters()} == {dtype}
    assert {p.dtype for p in half.matcher.parameters()} == {torch.float32}
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in both_sides(3, 4).items()}
    with torch.no_grad():
        output, exact = half(**inputs), plain_forward(half, inputs)
    for name in LOGITS:
        assert output[name].dtype == torch.float32
        torch.testing.assert_close(output[name].double(), exact[name], rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # without images, the blank ones that are made have the encoder's precision
        assert half.encode(inputs["input_ids"]).image_tokens.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(dtype: torch.dtype) -> None:
    """Forward and backward under autocast: the error is the encoder's, the units add nothing to it."""
    model, inputs = tiny_model(), both_sides(3, 3)
    with torch.autocast("cpu", dtype):
        output = model(**inputs, return_loss=True)
        with torch.no_grad():
            exact = plain_forward(model, inputs)
    for name in LOGITS:
        assert output[name].dtype == torch.float32
        torch.testing.assert_close(output[name].double(), exact[name], rtol=1e-4, atol=1e-4)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_gradient_checkpointing() -> None:
    inputs, gradients = both_sides(2, 2), []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model(**inputs, return_loss=True).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_attention_implementations(model: MimicModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    inputs, logits = both_sides(2, 3), []
    for implementation in ("eager", "sdpa"):
        loaded = MimicModel.from_pretrained(tmp_path, attn_implementation=implementation)
        assert loaded.encoder.clip.text_model.config._attn_implementation == implementation
        assert loaded.encoder.clip.vision_model.config._attn_implementation == implementation
        with torch.no_grad():
            logits.append(loaded(**inputs).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_own_layers_start_as_pytorch_initialises_them() -> None:
    torch.manual_seed(3)
    first = MimicModel(tiny_config())
    torch.manual_seed(3)
    second = MimicModel(tiny_config())
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.isfinite().all()
    for module in [*first.matcher.modules(), first.encoder.image_cls_fc, first.encoder.image_tokens_fc]:
        if isinstance(module, nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            for parameter in (module.weight, module.bias):
                assert 0 < parameter.abs().max() <= bound
            if module.weight.numel() > 60:
                assert module.weight.abs().max() > 0.8 * bound


def test_from_backbone(tmp_path: Path) -> None:
    path = save_tiny_clip(tmp_path / "clip")
    clip = CLIPModel.from_pretrained(path)
    model = MimicModel.from_backbone(path, text_max_length=12, vdlu_hidden_size=6)
    assert model.config.vdlu_hidden_size == 6
    assert model.config.backbone_config.to_dict() == clip.config.to_dict()
    expected = clip.state_dict()
    assert model.encoder.clip.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.encoder.clip.state_dict().items())
    shared = MimicModel.from_backbone(clip, text_max_length=12)
    assert shared.encoder.clip is clip
    inputs = both_sides(2, 2)
    for built in (model, shared):
        assert built(**inputs, return_loss=True).loss.isfinite()

    half = MimicModel.from_backbone(path, text_max_length=12, dtype=torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in half.encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.matcher.parameters()} == {torch.float32}
    assert half.encoder.clip.text_model.config._attn_implementation == "eager"


def test_from_a_backbone_that_is_none(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of type 'bert'\. MIMIC needs a dual encoder"):
        MimicModel.from_backbone(tmp_path)


def test_text_embeddings_can_be_exchanged() -> None:
    model = tiny_model()
    table = nn.Embedding(514, 16)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
    assert model.encoder.clip.text_model.embeddings.token_embedding is table


def test_copies_and_inference_mode(model: MimicModel) -> None:
    inputs = both_sides(2, 2)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)

"""Features that a model's matcher can have given, and those that it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import index_of, random_encoded
from tiny_clip import tiny_model

from mimic_el.errors_mimic import EntityIndexError
from mimic_el.index_mimic import EntityIndex
from mimic_el.modeling_mimic import MimicModel
from mimic_el.precision_mimic import STORED_DTYPES, quantized
from mimic_el.soundness_mimic import impossible_feature

COUNT, ROW = 9, 4
FEATURES = [
    "text_embed",
    "text_query",
    "text_local",
    "text_bias",
    "cross_modal",
    *(f"image_query_{name}" for name in ("q", "a", "m", "stats")),
    *(f"image_key_{name}" for name in ("z", "a", "k", "stats")),
]


def stretched(seed: int, factor: float, **config: Any) -> MimicModel:
    """A model whose layers and layer norms have weights of very different sizes."""
    model = tiny_model(seed, **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.matcher.parameters():
            parameter.mul_(factor)
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def stored_of(model: MimicModel, dtype: str, size: float = 1.0) -> dict[str, torch.Tensor]:
    encoded, mask = random_encoded(model.config, COUNT)
    for name in encoded:
        encoded[name] = encoded[name] * size
    with torch.no_grad():
        features = model.matcher.entity_features(encoded, mask)
    return quantized(features, model.matcher, STORED_DTYPES[dtype])


def found(model: MimicModel, stored: dict[str, torch.Tensor]) -> tuple[str, list[int]] | None:
    wrong = impossible_feature(model.matcher, stored, torch.ones(COUNT, dtype=torch.bool))
    return None if wrong is None else (wrong[0], wrong[1].tolist())


@pytest.mark.parametrize("dtype", STORED_DTYPES)
@pytest.mark.parametrize("factor", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("mask", [False, True], ids=["all-tokens", "masked"])
def test_what_a_model_gives_is_possible(dtype: str, factor: float, mask: bool):
    """Whatever its weights and inputs are: inputs of no size at all, too, such as where there is no image."""
    for seed in range(3):
        model = stretched(seed, factor, mask_text_padding=mask)
        for size in (0.0, 1e-4, 1.0, 1e4):
            assert found(model, stored_of(model, dtype, size)) is None


@pytest.mark.parametrize("dtype", STORED_DTYPES)
def test_weights_of_a_matcher_at_its_beginning_or_its_end_are_possible(dtype: str):
    """So small that float16 has few bits left for what they give, no weights at all, and very large ones."""
    for factor in (0.0, 1e-7, 1e-6, 1e-4, 10.0):
        model = tiny_model()
        with torch.no_grad():
            for parameter in model.matcher.parameters():
                parameter.mul_(factor)
        for size in (1e-3, 1.0, 100.0):
            assert found(model, stored_of(model, dtype, size)) is None, (factor, size)


@pytest.mark.parametrize("dtype", STORED_DTYPES)
@pytest.mark.parametrize("name", FEATURES)
def test_one_number_that_is_much_too_large_is_found(name: str, dtype: str):
    """From the largest that may be stored down to a hundred times the feature's length."""
    model = tiny_model()
    stored = stored_of(model, dtype)
    length = float(stored[name].detach().float().norm(dim=-1).max()) if name != "text_bias" else 1.0
    for value in (3e38, 1e25, 1e10, 6e4, 100 * max(length, 1)):
        changed = {key: tensor.clone() for key, tensor in stored.items()}
        if changed[name].dtype == torch.int8:
            changed[name + "_scale"].view(COUNT, -1)[ROW] = value
        elif changed[name].dtype == torch.float16 and value > 65504:
            continue
        else:
            changed[name].view(COUNT, -1)[ROW, 0] = value
        wrong = found(model, changed)
        assert wrong is not None, value
        # What follows from a number that is wrong is wrong beside it: the unit is named, in any case.
        side = "text" if name.startswith("text") else name.rpartition("_")[0]
        assert wrong[0].startswith(side)
        assert wrong[1] == [ROW]


@pytest.mark.parametrize("dtype", STORED_DTYPES)
@pytest.mark.parametrize("name", ["text_local", "image_query_a", "image_query_m", "image_key_a"])
def test_what_follows_from_another_entitys_features_is_found(name: str, dtype: str):
    """Vectors of a usual length, and of the wrong entity."""
    model = tiny_model()
    stored = stored_of(model, dtype)
    stored[name][ROW] = -stored[name][ROW]
    wrong = found(model, stored)
    assert wrong is not None
    assert wrong[1] == [ROW]


@pytest.mark.parametrize("column", range(8))
def test_a_number_that_is_not_that_of_its_vectors_is_found(column: int):
    """The bound of the image unit a hundredth too low would hide an entity from the pruned search alone."""
    model = tiny_model()
    for name in ("image_query_stats", "image_key_stats"):
        stored = stored_of(model, "float32")
        if column < stored[name].shape[1]:
            stored[name][ROW, column] -= 0.3 * (1 + stored[name][ROW, column].abs())
            assert found(model, stored) == (name, [ROW])


def test_verify_names_the_entity_unless_it_was_removed():
    model = tiny_model()
    encoded, mask = random_encoded(model.config, COUNT)
    index: EntityIndex = index_of(model, encoded, mask, shards=2)
    index.verify()
    index._contents.store.shards[1].tensors["cross_modal"][0] *= 3  # the sixth, e5
    with pytest.raises(
        EntityIndexError, match=r"`cross_modal` of entity 'e5' cannot come from the model of this index"
    ):
        index.verify()
    index.remove(["e5"])
    index.verify()

"""Encoding for indexes: precisions, and equal images once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import knowledge_base, random_image, small_shards, tiny_processor
from tiny_clip import tiny_clip_config, tiny_model
from torch import Tensor

from mimic_el import EntityIndex, MimicModel, MimicProcessor, encoding_mimic
from mimic_el.encoding_mimic import (
    EntityEncoder,
    check_compiles,
    compiled,
    computes_bfloat16,
    encoding_dtype,
    image_digest,
    in_precision,
)
from mimic_el.errors_mimic import EntityIndexError


@pytest.fixture(scope="module")
def model() -> MimicModel:
    return tiny_model().eval()


@pytest.fixture(scope="module")
def processor(model: MimicModel) -> MimicProcessor:
    return tiny_processor(model)


@pytest.fixture
def batches(processor: MimicProcessor) -> list[dict[str, Tensor]]:
    """Two batches of four entities with two images, and with none, in other orders."""
    images = [
        [random_image(1), None, random_image(1), random_image(2)],
        [random_image(2), random_image(3), None, random_image(1)],
    ]
    return [dict(processor.process_entities(list("abcd"), ["", "one", "two three", ""], row)) for row in images]


def digests(inputs: dict[str, Tensor]) -> list[bytes]:
    return [image_digest(pixels) for pixels in inputs["pixel_values"]]


def watched_images(model: MimicModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images the encoder is given from now on, at each call."""
    counts: list[int] = []
    encoder: Any = model.encoder
    original = encoder.encode_images

    def counting(pixel_values: Tensor, **kwargs: Any) -> Any:
        counts.append(len(pixel_values))
        return original(pixel_values, **kwargs)

    monkeypatch.setattr(encoder, "encode_images", counting)
    return counts


def same_features(found: Any, expected: Any, atol: float = 1e-5) -> None:
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-5, atol=atol)


def test_equal_images_are_encoded_once(
    model: MimicModel, batches: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        expected = [model.encode_entities(**inputs) for inputs in batches]
    counts = watched_images(model, monkeypatch)
    encoder = EntityEncoder(model)
    for inputs, features in zip(batches, expected, strict=True):
        same_features(encoder(inputs, digests(inputs)), features)
    assert counts == [3, 1]  # two images and none; one that was not there before


def test_what_is_forgotten_is_encoded_again(
    model: MimicModel, batches: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding_mimic, "_KEPT_BYTES", 1)  # of one image only
    with torch.no_grad():
        expected = model.encode_entities(**batches[1])
    counts = watched_images(model, monkeypatch)
    encoder = EntityEncoder(model)
    encoder(batches[0], digests(batches[0]))
    same_features(encoder(batches[1], digests(batches[1])), expected)
    assert counts == [3, 3]  # the last image of the first batch comes again


def test_images_that_all_differ_are_encoded_as_they_are(model: MimicModel, processor: MimicProcessor) -> None:
    """Bit for bit what the model gives."""
    inputs = dict(processor.process_entities(list("abc"), ["one"] * 3, [random_image(1), None, random_image(2)]))
    with torch.inference_mode():
        expected = model.encode_entities(**inputs)
    found = EntityEncoder(model)(inputs, digests(inputs))
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_digests_tell_images_apart() -> None:
    pixels = torch.randn(3, 24, 24)
    changed = pixels.clone()
    changed[1, 5, 5] += 1e-3
    assert image_digest(pixels) == image_digest(pixels.clone())
    assert image_digest(pixels) != image_digest(changed)


def test_another_precision_leaves_the_model_alone(model: MimicModel, batches: list[dict[str, Tensor]]) -> None:
    before = copy.deepcopy(model.state_dict())
    half = in_precision(model, torch.bfloat16)
    assert {parameter.dtype for parameter in half.encoder.parameters()} == {torch.bfloat16}
    assert half.matcher is model.matcher
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    whole = copy.deepcopy(model.encoder).to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, whole.pop(name)) for name, tensor in half.encoder.state_dict().items())
    assert not whole
    pairs = zip(model.encoder.parameters(), half.encoder.parameters(), strict=True)
    assert all(one.requires_grad == other.requires_grad for one, other in pairs)
    with torch.inference_mode():
        exact = model.encode_entities(**batches[0])
        rounded = EntityEncoder(half)(batches[0], digests(batches[0]))
        rough = EntityEncoder(model, "bfloat16")(batches[0], digests(batches[0]))
    same_features(rough, rounded)
    for name, tensor in exact.tensors.items():
        scale = tensor.float().abs().max()
        assert (rough.tensors[name].float() - tensor.float()).abs().max() < 0.1 * scale, name
    assert any(not torch.equal(rough.tensors[name], tensor) for name, tensor in exact.tensors.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert in_precision(model, torch.float32) is model
    assert in_precision(model, None) is model


def test_precisions_that_machines_have(monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoding_dtype(None, "cpu") is None
    assert encoding_dtype("float32", "cpu") == torch.float32
    monkeypatch.setattr(encoding_mimic, "computes_bfloat16", lambda device: True)
    assert encoding_dtype("auto", "cpu") == torch.bfloat16
    monkeypatch.setattr(encoding_mimic, "computes_bfloat16", lambda device: False)
    assert encoding_dtype("auto", "cpu") is None
    with pytest.warns(UserWarning, match="slower than in float32"):
        assert encoding_dtype("bfloat16", "cpu") == torch.bfloat16
    with pytest.raises(ValueError, match="for GPUs"):
        encoding_dtype("float16", "cpu")
    with pytest.raises(ValueError, match="must be one of auto, float32, bfloat16, float16 or None, got 'int8'"):
        encoding_dtype("int8", "cpu")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx512f avx512_bf16", True),
        ("Features : fp asimd bf16", True),
        ("flags : fpu avx512_bf16x", False),
    ],
)
def test_what_a_processor_says_it_can(flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor : 0\n{flags}\n")
    assert computes_bfloat16("cpu") == expected


# --- Building -----------------------------------------------------------------------------------------------------


def test_an_index_in_another_precision(model: MimicModel, processor: MimicProcessor, tmp_path: Path) -> None:
    entities = knowledge_base(7)
    plain = EntityIndex.build(model, processor, entities, dtype="float32", show_progress=False)
    half = EntityIndex.build(
        model, processor, entities, dtype="float32", encoding_dtype="bfloat16", show_progress=False
    )
    with torch.no_grad():
        mentions = model.encode_mentions(**processor.process_mentions(["Orange"], ["Orange here."], [random_image(0)]))
    one, other = (index.search(mentions, 7) for index in (plain, half))
    assert (one.scores != other.scores).any()
    assert abs(one.scores - other.scores).max() < 0.05 * abs(one.scores).max()
    with pytest.raises(ValueError, match="`encoding_dtype` must be one of"):
        EntityIndex.build(model, processor, entities, tmp_path, encoding_dtype="int4")
    assert not any(tmp_path.iterdir())


def test_a_build_goes_on_in_its_own_precision_only(
    model: MimicModel, processor: MimicProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_shards(monkeypatch, 4)
    entities = knowledge_base(10)

    def interrupted() -> Any:
        yield from entities[:8]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EntityIndex.build(model, processor, interrupted(), tmp_path, encoding_dtype="float32", show_progress=False)
    with pytest.raises(EntityIndexError, match="another precision"):
        EntityIndex.build(model, processor, entities, tmp_path, show_progress=False)
    EntityIndex.build(model, processor, entities, tmp_path, encoding_dtype="float32", show_progress=False)


def test_workers_for_many_entities(
    model: MimicModel, processor: MimicProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mimic_el import building_mimic

    asked: list[int] = []
    original: Any = building_mimic.DataLoader

    def loader(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["num_workers"])
        return original(*args, **{**kwargs, "num_workers": 0})

    monkeypatch.setattr(building_mimic, "DataLoader", loader)
    monkeypatch.setattr(building_mimic, "_MANY_ENTITIES", 5)
    monkeypatch.setattr(building_mimic.os, "sched_getaffinity", lambda _: range(6), raising=False)
    monkeypatch.setattr(building_mimic.multiprocessing, "get_start_method", lambda: "fork")
    for count, workers in ((4, None), (5, None), (5, 0)):
        EntityIndex.build(model, processor, knowledge_base(count), num_workers=workers, show_progress=False)
    monkeypatch.setattr(building_mimic.multiprocessing, "get_start_method", lambda: "spawn")
    EntityIndex.build(model, processor, knowledge_base(5), show_progress=False)
    assert asked == [0, 3, 0, 0]


# --- Compiled


def needs_compiler() -> None:
    try:
        check_compiles("cpu")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def shallow() -> MimicModel:
    """A model of one layer each, which takes less time to compile."""
    backbone = tiny_clip_config()
    backbone.text_config.num_hidden_layers = backbone.vision_config.num_hidden_layers = 1
    return tiny_model(backbone_config=backbone, mask_text_padding=True).eval()


def test_a_compiled_encoder_takes_batches_of_any_size(
    shallow: MimicModel, processor: MimicProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs are those of any compiler, and run without one."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda tower, **given: compile_(tower, backend="aot_eager", **given))
    encoder = EntityEncoder(shallow, compile_encoder=True)
    for texts in (["one", "two three", ""], ["four"] * 2, ["five six seven"]):
        images = [random_image(number) for number in range(len(texts))]
        inputs = dict(processor.process_entities(["a"] * len(texts), texts, images))
        with torch.no_grad():
            expected = shallow.encode_entities(**inputs)
        same_features(encoder(inputs, digests(inputs)), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own code
def test_a_compiled_encoder_has_the_weights_that_are_there_when_it_is_made(shallow: MimicModel) -> None:
    needs_compiler()
    pixels = torch.randn(3, 3, 24, 24)
    found = []
    for _ in range(2):
        with torch.inference_mode():
            expected = shallow.encoder.encode_images(pixels)[:2]
            made = compiled(shallow).encoder.encode_images(pixels)[:2]
        for one, other in zip(made, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        found.append(made[1])
        with torch.no_grad():
            for parameter in shallow.parameters():
                parameter.mul_(0.7)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_what_compiling_needs_is_looked_for_before_anything_is_encoded(
    model: MimicModel, processor: MimicProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder

    def none() -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler on a CPU"):
        EntityIndex.build(model, processor, knowledge_base(2), tmp_path, compile_encoder=True)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(encoding_mimic.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs the package triton"):
        check_compiles("cuda")
    check_compiles("mps")


def test_a_compiled_encoder_that_fails_says_what_to_do(
    model: MimicModel, processor: MimicProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no header")

    monkeypatch.setattr(encoding_mimic, "check_compiles", lambda _: None)
    monkeypatch.setattr("mimic_el.building_mimic.check_compiles", lambda _: None)
    monkeypatch.setattr(torch, "compile", lambda tower, **_: broken)
    with pytest.raises(EntityIndexError, match=r"compiled encoder does not run: no header\. Leave `compile_encoder`"):
        EntityIndex.build(model, processor, knowledge_base(2), compile_encoder=True, show_progress=False)


def test_a_build_goes_on_compiled_or_not_as_it_was(
    model: MimicModel, processor: MimicProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda tower, **_: tower)
    monkeypatch.setattr("mimic_el.building_mimic.check_compiles", lambda _: None)
    entities = knowledge_base(6)
    options: dict[str, Any] = {"shard_entities": 2, "show_progress": False}

    def interrupted() -> Any:
        yield from entities[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EntityIndex.build(model, processor, interrupted(), tmp_path, compile_encoder=True, **options)
    with pytest.raises(EntityIndexError, match="another `compile_encoder`"):
        EntityIndex.build(model, processor, entities, tmp_path, **options)
    EntityIndex.build(model, processor, entities, tmp_path, compile_encoder=True, **options)

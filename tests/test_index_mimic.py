"""The index of entities: built from anything, resumed, changed in place, and whole after a kill at any moment."""

from __future__ import annotations

import copy
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny import encode_mentions, knowledge_base, mentions_of, once, random_image, small_shards, tiny_processor
from tiny_clip import tiny_model

from mimic_el import building_mimic, directory_mimic, files_mimic, records_mimic, store_mimic
from mimic_el.errors_mimic import EntityIndexError, MimicImageError, UnknownEntityError
from mimic_el.index_mimic import EntityIndex
from mimic_el.modeling_mimic import EntityFeatures, MentionFeatures, MimicModel
from mimic_el.processing_mimic import MimicProcessor

COUNT = 18
SMALL = {"batch_size": 4, "shard_entities": 7, "show_progress": False}

Linker = tuple[MimicModel, MimicProcessor]


@pytest.fixture(scope="module")
def linker() -> Linker:
    model = tiny_model(text_max_length=24)
    return model, tiny_processor(model)


@pytest.fixture(scope="module")
def masking() -> Linker:
    """A model that masks padding, and so leaves it out."""
    model = tiny_model(text_max_length=24, mask_text_padding=True)
    return model, tiny_processor(model)


@pytest.fixture(scope="module")
def kb() -> list[dict[str, Any]]:
    return knowledge_base(COUNT)


@pytest.fixture(scope="module")
def mentions(linker: Linker, kb: list[dict[str, Any]]) -> MentionFeatures:
    return encode_mentions(*linker, mentions_of(kb))


def one_by_one(linker: Linker, entities: Iterable[Mapping[str, Any]]) -> EntityFeatures:
    """Features of entities that are encoded alone, with a gradient: nothing is shared, nothing is left out."""
    model, processor = linker
    parts = []
    for entity in entities:
        images = [entity["images"][0]] if entity["images"] else [None]
        inputs = processor.process_entities([entity["name"]], [entity["description"]], images)
        parts.append(model.encode_entities(**inputs).detach())
    return EntityFeatures.cat(parts)


def table(entities: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What an index keeps of entities, beside their features."""
    return [
        {name: value for name, value in entity.items() if name != "images" and value is not None} for entity in entities
    ]


def build(linker: Linker, entities: Any, place: Path | None = None, **options: Any) -> EntityIndex:
    return EntityIndex.build(*linker, entities, place, **{**SMALL, **options})


def links(index: EntityIndex, mentions: MentionFeatures, k: int = 5, method: str = "pruned") -> list[dict[str, float]]:
    """Ids and scores that are found, to 4 digits."""
    found = index.search(mentions, k, method=method)
    return [
        {entity_id: round(float(score), 3) for entity_id, score in zip(ids, scores, strict=False)}
        for ids, scores in zip(found.entity_ids, found.scores, strict=True)
    ]


def assert_same_links(one: EntityIndex, other: EntityIndex, mentions: MentionFeatures) -> None:
    """Both hold the same entities, with the same features but for rounding; their order may differ."""
    assert {i: one.entity(i) for i in one} == {i: other.entity(i) for i in other}
    for here, there in zip(links(one, mentions, len(one)), links(other, mentions, len(other)), strict=True):
        assert here.keys() == there.keys()
        for entity_id, score in here.items():
            assert score == pytest.approx(there[entity_id], rel=1e-3, abs=5e-3)


def strays(place: Path) -> set[str]:
    """Files that an index does not consist of."""
    manifest = json.loads((place / "index_config.json").read_text())
    return set(os.listdir(place)) - {*directory_mimic.files_of(manifest), "README.md", ".lock"}


# --- Building


@pytest.mark.parametrize("place", [None, "index"], ids=["memory", "disk"])
@pytest.mark.parametrize("which", ["linker", "masking"])
def test_it_holds_what_the_model_scores(
    which: str, place: str | None, kb: list[dict[str, Any]], tmp_path: Path, request: pytest.FixtureRequest
):
    """In the order of the knowledge base, whatever the batches, shards, blank images and lengths of texts."""
    linker: Linker = request.getfixturevalue(which)
    model = linker[0]
    index = build(linker, kb, tmp_path / place if place else None, dtype="float32")
    assert list(index.entities()) == table(kb)
    assert len(index) == COUNT
    features = one_by_one(linker, kb)
    mentions = encode_mentions(*linker, mentions_of(kb))
    with torch.no_grad():
        expected = model.score(mentions, features).logits.numpy()
    found = index.search(mentions, COUNT)
    for row, (ids, scores) in enumerate(zip(found.entity_ids, found.scores, strict=True)):
        np.testing.assert_allclose(scores, expected[row, [int(name[1:]) for name in ids]], rtol=1e-4, atol=1e-4)
    stored = index._contents.store.full(slice(0, COUNT), torch.device("cpu"))
    for name, tensor in features.tensors.items():
        if which == "masking" and name == "text_query":
            mask = features.tensors["text_mask"].unsqueeze(-1)
            tensor, kept = tensor * mask, stored.tensors[name] * mask
            torch.testing.assert_close(kept, tensor, rtol=1e-3, atol=1e-4)
        else:
            torch.testing.assert_close(stored.tensors[name], tensor, rtol=1e-3, atol=1e-3)


def test_padding_is_left_out_where_the_model_masks_it(
    masking: Linker, linker: Linker, kb: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    """Entities come sorted by length, so that little time goes to padding; the index is in the order asked for."""
    widths: dict[int, list[int]] = {}

    def watched(part: torch.nn.Module, name: int) -> None:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            widths.setdefault(name, []).append(kwargs["input_ids"].shape[1])

        handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))

    handles: list[Any] = []
    watched(masking[0].encoder.clip.text_model, 0)
    watched(linker[0].encoder.clip.text_model, 1)
    try:
        assert list(build(masking, kb, shard_entities=COUNT).entities()) == table(kb)
        build(linker, kb, shard_entities=COUNT)
    finally:
        for handle in handles:
            handle.remove()
    assert set(widths[1]) == {24}, "without a mask padding counts"
    assert widths[0] == sorted(widths[0])
    assert widths[0][0] < 24


def encoded_bytes(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def as_dataset(kb: list[dict[str, Any]], decode: bool = True) -> datasets.Dataset:
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "qid": datasets.Value("string"),
            "name": datasets.Value("string"),
            "description": datasets.Value("string"),
            "images": datasets.List(datasets.Image(decode=decode)),
        }
    )
    records = [
        {**entity, "images": [{"bytes": encoded_bytes(image), "path": None} for image in entity["images"]]}
        for entity in kb
    ]
    return datasets.Dataset.from_list(records, features=features)


class OnlyLength:
    """Has a length and can be iterated, but has no numbers."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def with_images(kb: list[dict[str, Any]], change: Callable[[Any], Any]) -> list[dict[str, Any]]:
    return [{**entity, "images": [change(image) for image in entity["images"]]} for entity in kb]


@pytest.mark.parametrize(
    "source",
    [
        tuple,
        iter,
        once,
        OnlyLength,
        lambda kb: map(dict, kb),
        as_dataset,
        lambda kb: as_dataset(kb, decode=False),
        lambda kb: as_dataset(kb).to_iterable_dataset(),
        lambda kb: as_dataset(kb[::-1]).select(range(COUNT - 1, -1, -1)),
        lambda kb: with_images(kb, encoded_bytes),
        lambda kb: with_images(kb, lambda image: {"bytes": encoded_bytes(image), "path": None}),
        lambda kb: [{**entity, "images": next(iter(entity["images"]), None)} for entity in kb],
        lambda kb: [{**entity, "images": entity["images"] or None} for entity in kb],
        lambda kb: (
            [
                {**entity, "images": (*entity["images"], "an image that is not used")}
                for entity in kb
                if entity["images"]
            ]
            and [{**entity, "images": [*entity["images"], "not used"] if entity["images"] else []} for entity in kb]
        ),
    ],
    ids=[
        "tuple",
        "iterator",
        "generator",
        "length and iterator",
        "map",
        "dataset",
        "undecoded dataset",
        "streamed dataset",
        "dataset with indices",
        "bytes",
        "undecoded images",
        "single images",
        "no list of images",
        "several images",
    ],
)
def test_any_source_of_entities(
    source: Callable[[Any], Any],
    linker: Linker,
    kb: list[dict[str, Any]],
    mentions: MentionFeatures,
    monkeypatch: pytest.MonkeyPatch,
):
    """Every record is there once, also where the end of a shard or of what is read at once falls between two."""
    monkeypatch.setattr(records_mimic, "_RECORDS_AT_ONCE", 5)
    index = build(linker, source(kb))
    assert list(index.entities()) == table(kb)
    assert links(index, mentions) == links(build(linker, kb), mentions)


def test_worker_processes_give_the_same_index(
    linker: Linker, kb: list[dict[str, Any]], mentions: MentionFeatures, recwarn: pytest.WarningsRecorder
):
    broken = [{**entity, "images": [b"no image"]} if entity["id"] == "e4" else entity for entity in kb]
    alone, helped = build(linker, broken), build(linker, broken, num_workers=2, shard_entities=COUNT)
    assert list(helped.entities()) == list(alone.entities())
    assert links(helped, mentions) == [pytest.approx(found, abs=2e-3) for found in links(alone, mentions)]
    said = [str(warning.message) for warning in recwarn if "Entity 'e4'" in str(warning.message)]
    assert len(said) == 2, "a warning comes back from a worker too"


def test_an_image_that_cannot_be_read(linker: Linker, kb: list[dict[str, Any]], tmp_path: Path):
    path = tmp_path / "missing.png"
    broken = [{**kb[0], "images": []}, {**kb[1], "images": [str(path)]}]
    with pytest.warns(UserWarning, match=f"Entity 'e1': There is no image file {path}. It is encoded without"):
        index = build(linker, broken)
    plain = build(linker, [{**entity, "images": []} for entity in kb[:2]])
    stored = index._contents.store.shards[0].tensors
    assert all(torch.equal(stored[name], tensor) for name, tensor in plain._contents.store.shards[0].tensors.items())
    with pytest.raises(MimicImageError, match=f"Entity 'e1': There is no image file {path}"):
        build(linker, broken, on_image_error="raise")


def test_progress(linker: Linker, kb: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]):
    build(linker, kb, show_progress=True)
    shown = capsys.readouterr().err
    assert "Encoding entities: 100%" in shown
    assert f"{COUNT}/{COUNT}" in shown
    assert "entities/s" in shown
    build(linker, once(kb), show_progress=True)
    assert f"{COUNT} entities [" in capsys.readouterr().err, "how long is left is not known, how many are done is"
    build(linker, kb)
    assert not capsys.readouterr().err


def test_the_model_is_left_as_it_was(linker: Linker, kb: list[dict[str, Any]]):
    """The index is made by the model without dropout and gradients, and is no part of it."""
    model, processor = linker
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.train()
    try:
        index = build(linker, kb)
        assert model.training
    finally:
        model.eval()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    before = {name: tensor.clone() for name, tensor in index.state.matcher.state_dict().items()}
    changed = copy.deepcopy(model)
    index = build((changed, processor), kb)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in index.state.matcher.state_dict().items())


@pytest.mark.parametrize("empty", [[], (), iter([])], ids=["list", "tuple", "iterator"])
@pytest.mark.parametrize("place", [None, "index"], ids=["memory", "disk"])
def test_empty_knowledge_base(place: str | None, empty: Any, linker: Linker, tmp_path: Path):
    with pytest.raises(EntityIndexError, match=r"knowledge base is empty"):
        build(linker, empty, tmp_path / place if place else None)
    with pytest.raises(EntityIndexError):
        EntityIndex.from_pretrained(tmp_path / "index")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "`dtype` must be one of float32, float16, int8, got 'float8'"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer, got 0"),
        ({"shard_entities": 0}, "`shard_entities` must be a positive integer, got 0"),
        ({"on_image_error": "ignore"}, "`on_image_error` must be"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str, linker: Linker, kb: list[dict[str, Any]]):
    with pytest.raises(ValueError, match=message):
        build(linker, kb, **options)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"name": "x"}, "needs an `id`; this record has none: {'name': 'x'}"),
        ({"id": None, "name": "x"}, "needs an `id`"),
        ("x", "needs an `id`; this record has none: x"),
        ({"id": "e9", "name": 5}, "Entity 'e9': `name` must be a string, got int"),
        ({"id": "e9", "description": ["x"]}, "Entity 'e9': `description` must be a string, got list"),
        ({"id": "e9", "name": "\ud800"}, "Entity 'e9' has text that is not valid Unicode"),
        ({"id": "e1", "name": "again"}, "The id 'e1' is there more than once"),
        ({"id": "e8", "name": "again"}, "The id 'e8' is there more than once"),
    ],
)
@pytest.mark.parametrize("source", [list, once], ids=["list", "generator"])
def test_records_that_are_refused(
    source: Callable[[Any], Any], record: Any, message: str, linker: Linker, kb: list[dict[str, Any]], tmp_path: Path
):
    """A duplicate in the same shard, and in one before it, among others."""
    with pytest.raises(ValueError, match=message):
        build(linker, source([*kb[:10], record]), tmp_path)
    with pytest.raises(EntityIndexError, match=r"interrupted. Run the same EntityIndex.build again"):
        EntityIndex.from_pretrained(tmp_path)
    # What was wrong is mended, and the build goes on.
    assert list(build(linker, source(kb), tmp_path).entities()) == table(kb)


@pytest.mark.parametrize("entities", [{"id": "e1", "name": "x"}, datasets.DatasetDict()], ids=["dict", "DatasetDict"])
def test_what_is_no_knowledge_base(entities: Any, linker: Linker):
    with pytest.raises(ValueError, match="not a single dict"):
        build(linker, entities)


def test_fields_that_are_kept(linker: Linker, kb: list[dict[str, Any]], tmp_path: Path):
    entities = [
        {"id": 7, "name": "Größe 🍊", "year": 1999, "weight": 0.5, "alive": True, "aliases": ["a"], "nothing": None},
        {"id": "e2", "name": None, "size": math.nan, "images": None},
        {"id": "e3", "description": "no name"},
    ]
    index = build(linker, entities, tmp_path)
    expected = [
        {"id": "7", "name": "Größe 🍊", "description": "", "year": 1999, "weight": 0.5, "alive": True}
        | {"aliases": ["a"]},
        {"id": "e2", "name": "", "description": ""},
        {"id": "e3", "name": "", "description": "no name"},
    ]
    assert list(EntityIndex.from_pretrained(tmp_path).entities()) == list(index.entities()) == expected
    assert index.entity("7") == expected[0]
    rows = datasets.load_dataset("json", data_files=str(tmp_path / "shard-*.jsonl"), split="train")
    assert rows["id"] == ["7", "e2", "e3"], "others can read the table too"


def test_hash_collisions(linker: Linker, kb: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    """Three ids of four have the same hash: they are told apart, and a duplicate among them is found."""
    monkeypatch.setattr(store_mimic, "hash_id", lambda entity_id: min(3, int(entity_id[1:]) % 4))
    index = build(linker, kb)
    assert [index.entity(f"e{row}")["id"] for row in range(COUNT)] == [f"e{row}" for row in range(COUNT)]
    assert "e99" not in index
    for again in ("e3", "e11", "e7"):
        with pytest.raises(ValueError, match=f"The id '{again}' is there more than once"):
            build(linker, [*kb[:12], {"id": again}, *kb[12:]])
        with pytest.raises(ValueError, match=f"The id '{again}' is there more than once"):
            build(linker, [*kb[:12], {"id": again}], shard_entities=100)
    index.remove(["e5"])
    assert "e5" not in index
    assert index.entity("e9")["id"] == "e9"


def test_what_it_says_of_itself(linker: Linker, kb: list[dict[str, Any]], tmp_path: Path):
    index = build(linker, kb, tmp_path, dtype="int8")
    assert index.dtype == "int8"
    assert index.directory == tmp_path
    size = sum(
        tensor.numel() * tensor.element_size()
        for shard in index._contents.store.shards
        for tensor in shard.tensors.values()
    )
    assert index.bytes_per_entity == size / COUNT
    assert repr(index) == f"EntityIndex({COUNT} entities, int8, {size / COUNT:,.0f} bytes each, {tmp_path})"
    assert "e3" in index
    assert "nobody" not in index
    assert 3 not in index
    assert list(index) == [entity["id"] for entity in kb]
    assert all(entity_id in index for entity_id in index)
    with pytest.raises(UnknownEntityError, match=f"1 of the entities are not in this index of {COUNT}: 'nobody'"):
        index.entity("nobody")
    memory = build(linker, kb)
    assert memory.directory is None
    assert "in memory" in repr(memory)
    memory.verify()


@pytest.mark.parametrize("place", [None, "index"], ids=["memory", "disk"])
def test_it_can_be_sent_to_a_worker_process(
    place: str | None, linker: Linker, kb: list[dict[str, Any]], mentions: MentionFeatures, tmp_path: Path
):
    index = build(linker, kb, tmp_path / place if place else None)
    for other in (pickle.loads(pickle.dumps(index)), copy.deepcopy(index)):
        assert links(other, mentions) == links(index, mentions)
        assert other.directory == index.directory
        other.check_model(linker[0])


@pytest.mark.parametrize("source", [list, once], ids=["list", "generator"])
def test_what_is_written_is_let_go(
    source: Callable[[Any], Any],
    linker: Linker,
    kb: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Of a knowledge base of any size, the features of one shard and the one before it are in memory."""
    make, alive, most = building_mimic.make_shard, weakref.WeakSet[Any](), [0]

    def watched(name: str, features: dict[str, torch.Tensor], records: Any) -> Any:
        alive.add(features["text_query"])
        most[0] = max(most[0], len(alive))
        return make(name, features, records)

    monkeypatch.setattr(building_mimic, "make_shard", watched)
    index = build(linker, source(kb), tmp_path, shard_entities=2)
    assert most[0] <= 2
    most[0] = 0
    small_shards(monkeypatch, 2)
    index.add(*linker, source(knowledge_base(COUNT, COUNT)), show_progress=False)
    assert most[0] <= 2
    index.update(*linker, source(kb), show_progress=False)
    assert most[0] <= 2


# --- Interruptions of a build


class Interrupted:
    """A knowledge base that a user stops reading at an entity, by Ctrl-C."""

    def __init__(self, entities: list[dict[str, Any]], at: int) -> None:
        self.entities, self.at = entities, at

    def __len__(self) -> int:
        return len(self.entities)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if row == self.at:
            raise KeyboardInterrupt
        return self.entities[row]


class Counted:
    """Counts the entities that a model encodes."""

    def __init__(self, model: MimicModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        matcher: Any = model.matcher
        features = matcher.entity_features

        def counting(encoded: Any, mask: torch.Tensor) -> EntityFeatures:
            self.count += len(mask)
            return features(encoded, mask)

        monkeypatch.setattr(matcher, "entity_features", counting)

    def since(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.fixture
def interrupted(linker: Linker, kb: list[dict[str, Any]], tmp_path: Path) -> Path:
    """A build of which two shards of seven are done."""
    place = tmp_path / "unfinished"
    with pytest.raises(KeyboardInterrupt):
        build(linker, Interrupted(kb, 15), place)
    return place


@pytest.mark.parametrize("source", [list, once, as_dataset], ids=["list", "generator", "dataset"])
def test_an_interrupted_build_goes_on(
    source: Callable[[Any], Any],
    interrupted: Path,
    linker: Linker,
    kb: list[dict[str, Any]],
    mentions: MentionFeatures,
    monkeypatch: pytest.MonkeyPatch,
):
    with pytest.raises(EntityIndexError, match=r"was interrupted. Run the same EntityIndex.build again"):
        EntityIndex.from_pretrained(interrupted)
    encoded = Counted(linker[0], monkeypatch)
    index = build(linker, source(kb), interrupted)
    assert encoded.since() == COUNT - 14, "what is done is not encoded again"
    assert list(index.entities()) == table(kb)
    assert links(index, mentions) == links(build(linker, kb), mentions)
    assert not strays(interrupted)
    index.verify()


def test_progress_of_a_build_that_goes_on(
    interrupted: Path, linker: Linker, kb: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
):
    build(linker, kb, interrupted, show_progress=True)
    assert "78%" in capsys.readouterr().err.partition("\r")[2].split("|")[0]


def changed(kb: list[dict[str, Any]], row: int, **fields: Any) -> list[dict[str, Any]]:
    return [*kb[:row], {**kb[row], **fields}, *kb[row + 1 :]]


@pytest.mark.parametrize(
    "change",
    [
        lambda kb: changed(kb, 3, id="other"),
        lambda kb: changed(kb, 3, name="other"),
        lambda kb: changed(kb, 13, description="other"),
        lambda kb: changed(kb, 3, qid="Q99"),
        lambda kb: kb[1:],
        lambda kb: kb[:10],
        lambda kb: [kb[1], kb[0], *kb[2:]],
        lambda kb: [{"id": "new", "name": "", "images": []}, *kb],
    ],
)
@pytest.mark.parametrize("source", [list, once], ids=["list", "generator"])
def test_a_build_goes_on_with_the_same_entities_only(
    source: Callable[[Any], Any],
    change: Callable[[Any], Any],
    interrupted: Path,
    linker: Linker,
    kb: list[dict[str, Any]],
    tmp_path: Path,
):
    with pytest.raises(EntityIndexError, match="unfinished build of another model"):
        build(linker, source(change(kb)), interrupted)
    # Nothing was lost by the attempt.
    assert list(build(linker, kb, interrupted).entities()) == table(kb)


def test_a_build_goes_on_where_what_is_left_changed(interrupted: Path, linker: Linker, kb: list[dict[str, Any]]):
    longer = [*changed(kb, 16, name="other"), {"id": "more", "name": "", "description": ""}]
    assert list(build(linker, longer, interrupted).entities()) == table(longer)


def other_models(model: MimicModel) -> Iterator[tuple[str, MimicModel]]:
    """Models that differ in one thing from a given one."""
    for part in ("encoder.clip.text_model.encoder.layers.1.mlp.fc1", "encoder.image_tokens_fc", "matcher.tglu.fc_key"):
        other = copy.deepcopy(model)
        layer: Any = other.get_submodule(part)
        with torch.no_grad():
            # Less than one step of training.
            layer.weight.mul_(1 + 1e-5)
        yield part, other
    other = copy.deepcopy(model)
    other.config.mask_text_padding = True
    yield "mask_text_padding", other
    yield "another seed", tiny_model(1, text_max_length=24)
    yield "another size", tiny_model(0, text_max_length=24, vdlu_hidden_size=7)


def test_a_build_goes_on_with_the_same_model_only(interrupted: Path, linker: Linker, kb: list[dict[str, Any]]):
    model, processor = linker
    for _, other in other_models(model):
        with pytest.raises(EntityIndexError, match="unfinished build of another model"):
            build((other, processor), kb, interrupted)
    with pytest.raises(EntityIndexError, match="another precision"):
        build(linker, kb, interrupted, dtype="int8")
    assert list(build((copy.deepcopy(model), processor), kb, interrupted).entities()) == table(kb)


@pytest.mark.parametrize("source", [list, OnlyLength])
def test_an_unfinished_build_can_be_given_up(
    source: Callable[[Any], Any],
    interrupted: Path,
    linker: Linker,
    kb: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
):
    encoded = Counted(linker[0], monkeypatch)
    index = build(linker, source(kb[5:]), interrupted, overwrite=True)
    assert encoded.since() == COUNT - 5
    assert list(index.entities()) == table(kb[5:])
    assert not strays(interrupted)


def test_a_generator_is_not_used_on_after_a_part_of_it_was_read(
    interrupted: Path, linker: Linker, kb: list[dict[str, Any]]
):
    with pytest.raises(EntityIndexError, match=r"was given up.* Call build again with a new generator"):
        build(linker, once(kb[5:]), interrupted, overwrite=True)
    assert list(build(linker, once(kb[5:]), interrupted).entities()) == table(kb[5:])
    assert not strays(interrupted)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shards": [{"name": "../x"}]}', '{"shards": 5}'])
def test_a_damaged_state_of_a_build(text: str, interrupted: Path, linker: Linker, kb: list[dict[str, Any]]):
    (interrupted / "build_state.json").write_text(text)
    with pytest.raises(EntityIndexError):
        build(linker, kb, interrupted)
    (interrupted / "build_state.json").unlink()
    assert list(build(linker, kb, interrupted).entities()) == table(kb)
    assert not strays(interrupted)


def test_a_finished_shard_that_is_damaged(interrupted: Path, linker: Linker, kb: list[dict[str, Any]]):
    path = sorted(interrupted.glob("shard-*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EntityIndexError, match="cut short"):
        build(linker, kb, interrupted)
    assert list(build(linker, kb, interrupted, overwrite=True).entities()) == table(kb)


def test_an_index_is_replaced_only_if_asked_and_once_the_new_one_is_complete(
    linker: Linker, kb: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    old = build(linker, kb[:5], tmp_path)
    with pytest.raises(EntityIndexError, match=r"already holds an index.* pass overwrite=True"):
        build(linker, kb, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        build(linker, Interrupted(kb, 15), tmp_path, overwrite=True)
    assert list(EntityIndex.from_pretrained(tmp_path).entities()) == table(kb[:5])
    # The old one may even be changed meanwhile: the shards of the new one are no strays.
    old.remove(["e0"])
    old.compact()
    assert list(EntityIndex.from_pretrained(tmp_path).entities()) == table(kb[1:5])
    encoded = Counted(linker[0], monkeypatch)
    assert list(build(linker, kb, tmp_path, overwrite=True).entities()) == table(kb)
    assert encoded.since() == COUNT - 14
    assert not strays(tmp_path)


def test_a_disk_that_fills_up(
    linker: Linker, kb: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At any file of a build."""
    save, left = store_mimic.save_file, [0]

    def full(tensors: Any, path: Any, *args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, *args)

    for module in (store_mimic, directory_mimic):
        monkeypatch.setattr(module, "save_file", full)
    encoded = Counted(linker[0], monkeypatch)
    for files in range(3):
        left[0] = files and 1
        with pytest.raises(EntityIndexError, match=r"No space is left on the disk.* run the same command again"):
            build(linker, kb, tmp_path)
        assert not list(tmp_path.glob(".*.tmp"))
    left[0] = 100
    assert encoded.since() == 7 + 14 + 11
    assert list(build(linker, kb, tmp_path).entities()) == table(kb)
    assert encoded.since() == 4
    assert not strays(tmp_path)


# --- Which model


def test_models_that_are_refused(linker: Linker, kb: list[dict[str, Any]]):
    model = linker[0]
    index = build(linker, kb[:2])
    index.check_model(model)
    for what, other in other_models(model):
        with pytest.raises(EntityIndexError, match="has other weights or another configuration"):  # noqa: PT012
            index.check_model(other)
            pytest.fail(f"a model of another {what} is accepted")
        with pytest.raises(EntityIndexError):
            index.add(other, linker[1], kb[2:])
    assert len(index) == 2


def test_the_same_model_in_another_guise_is_accepted(linker: Linker, kb: list[dict[str, Any]], tmp_path: Path):
    model = linker[0]
    index = build(linker, kb[:2], tmp_path / "index")
    model.save_pretrained(tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        index.check_model(MimicModel.from_pretrained(tmp_path / "model", dtype=dtype))
    half = MimicModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    made = build((half, linker[1]), kb[:2])
    made.check_model(model)
    made.check_model(half)
    wide = copy.deepcopy(model).double()
    index.check_model(wide)
    found = build((wide, linker[1]), kb, dtype="float32").search(encode_mentions(wide, linker[1], mentions_of(kb)), 3)
    assert (
        found.entity_ids
        == build(linker, kb, dtype="float32").search(encode_mentions(*linker, mentions_of(kb)), 3).entity_ids
    )


# --- Changes


@pytest.fixture(params=["memory", "disk"])
def index(request: pytest.FixtureRequest, linker: Linker, kb: list[dict[str, Any]], tmp_path: Path) -> EntityIndex:
    return build(linker, kb, tmp_path / "index" if request.param == "disk" else None)


def reopened(index: EntityIndex) -> EntityIndex:
    return index if index.directory is None else EntityIndex.from_pretrained(index.directory)


def test_changes_give_the_index_of_what_is_left(
    index: EntityIndex,
    linker: Linker,
    kb: list[dict[str, Any]],
    mentions: MentionFeatures,
    monkeypatch: pytest.MonkeyPatch,
):
    """After each change the index is the one that would be built of the entities it has; nothing else is encoded."""
    entities = {entity["id"]: entity for entity in kb}
    encoded = Counted(linker[0], monkeypatch)

    def check(encodings: int) -> None:
        assert encoded.since() == encodings
        assert len(index) == len(entities)
        fresh = build(linker, list(entities.values()))
        encoded.since()
        for some in (index, reopened(index)):
            assert_same_links(some, fresh, mentions)
        if index.directory is not None:
            assert not strays(index.directory)
            reopened(index).verify()

    new = knowledge_base(5, start=COUNT)
    index.add(*linker, new, batch_size=2, show_progress=False)
    entities |= {entity["id"]: entity for entity in new}
    check(5)
    index.remove(["e0", "e7", f"e{COUNT}", "e7"])
    for gone in ("e0", "e7", f"e{COUNT}"):
        del entities[gone]
        assert gone not in index
    check(0)
    newer = [
        {**entities[name], "name": f"Newer {name}", "images": [random_image(99)]} for name in ("e3", f"e{COUNT + 1}")
    ]
    index.update(*linker, once(newer), show_progress=False)
    entities |= {entity["id"]: entity for entity in newer}
    check(2)
    # An id that was removed is free again.
    index.add(*linker, [kb[7]], show_progress=False)
    entities["e7"] = kb[7]
    check(1)
    index.remove(["e7"])
    del entities["e7"]
    check(0)
    index.compact()
    check(0)
    assert len(index._contents.store) == len(index), "no space is left to removed entities"
    assert len(index._contents.store.shards) == 1
    index.update(*linker, [kb[3]], show_progress=False)
    entities["e3"] = kb[3]
    check(1)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            lambda index, linker, kb: index.add(*linker, [*knowledge_base(1, COUNT), kb[3]]),
            ValueError,
            "The id 'e3' is there more than once",
        ),
        (
            lambda index, linker, kb: index.add(*linker, knowledge_base(1, COUNT) * 2),
            ValueError,
            f"The id 'e{COUNT}' is there more",
        ),
        (lambda index, linker, kb: index.add(*linker, [{"name": "x"}]), ValueError, "needs an `id`"),
        (lambda index, linker, kb: index.update(*linker, [kb[3], {"id": "nobody"}]), UnknownEntityError, "'nobody'"),
        (
            lambda index, linker, kb: index.update(*linker, [kb[3], kb[3]]),
            ValueError,
            "The id 'e3' is there more than once",
        ),
        (
            lambda index, linker, kb: index.remove(["e3", "nobody"]),
            UnknownEntityError,
            "1 of the entities .*: 'nobody'",
        ),
        (lambda index, linker, kb: index.remove("e3"), ValueError, "takes a list of entity ids, got the string 'e3'"),
    ],
)
def test_a_change_is_made_as_a_whole_or_not_at_all(
    change: Callable[[EntityIndex, Linker, Any], None],
    kind: type[Exception],
    message: str,
    index: EntityIndex,
    linker: Linker,
    kb: list[dict[str, Any]],
    mentions: MentionFeatures,
    monkeypatch: pytest.MonkeyPatch,
):
    small_shards(monkeypatch, 1)  # something is written before the change fails
    before = links(index, mentions)
    with pytest.raises(kind, match=message):
        change(index, linker, kb)
    assert list(index.entities()) == list(reopened(index).entities()) == table(kb)
    assert links(index, mentions) == before
    if index.directory is not None:
        assert not strays(index.directory)
    index.remove(["e3"])  # and it can be changed again
    assert "e3" not in reopened(index)


def test_adding_nothing_changes_nothing(index: EntityIndex, linker: Linker, kb: list[dict[str, Any]]):
    other = reopened(index)
    index.add(*linker, [], show_progress=False)
    index.update(*linker, iter([]), show_progress=False)
    other.remove(["e1"])
    assert "e1" not in reopened(other)


def test_an_index_without_entities(index: EntityIndex, linker: Linker, kb: list[dict[str, Any]], tmp_path: Path):
    index.remove(record["id"] for record in list(index.entities()))
    assert len(index) == len(reopened(index)) == 0
    assert list(index.entities()) == []
    for action in (index.compact, lambda: index.save_pretrained(tmp_path / "other")):
        with pytest.raises(EntityIndexError, match="All entities of this index were removed"):
            action()
    index.add(*linker, kb[:2], show_progress=False)
    assert list(index.entities()) == list(reopened(index).entities()) == table(kb[:2])


def test_saving_a_copy(
    index: EntityIndex, linker: Linker, kb: list[dict[str, Any]], mentions: MentionFeatures, tmp_path: Path
):
    index.remove(["e4", "e11"])
    place = tmp_path / "copy" / "deep"
    index.save_pretrained(place)
    copied = EntityIndex.from_pretrained(place)
    assert list(copied.entities()) == list(index.entities())
    assert len(copied._contents.store) == COUNT - 2, "removed entities are left out"
    found, expected = copied.search(mentions, 5), index.search(mentions, 5)
    assert found.entity_ids == expected.entity_ids
    # Features of a file lie otherwise in memory, which may round a sum otherwise.
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    assert not strays(place)
    copied.verify()
    # Over an index that is there.
    index.remove(["e5"])
    index.save_pretrained(place)
    assert "e5" not in EntityIndex.from_pretrained(place)
    assert not strays(place)
    with pytest.raises(EntityIndexError, match="changed by another process"):
        copied.remove(["e6"])
    # To its own place.
    own = EntityIndex.from_pretrained(place)
    own.save_pretrained(place / "." / ".." / "deep")
    assert list(EntityIndex.from_pretrained(place).entities()) == list(own.entities())


def test_files_of_others_are_left_alone(linker: Linker, kb: list[dict[str, Any]], tmp_path: Path):
    index = build(linker, kb, tmp_path)
    (tmp_path / "shard-photos").mkdir()
    theirs = [
        "shard-photos/a.png",
        "shard-1.txt",
        "matcher-notes.md",
        "removed-by-hand",
        ".secret.tmp",
        "model.safetensors",
    ]
    for name in theirs:
        (tmp_path / name).write_text("mine")
    ours = [
        "shard-0a-1b.safetensors",
        "shard-0a-1b.jsonl",
        ".shard-0a.jsonl.77.tmp",
        ".index_config.json.1.tmp",
        ".tmpAb3dE9",
    ]
    for name in ours:
        (tmp_path / name).write_text("left by a kill")
    index.remove(["e1"])
    assert all((tmp_path / name).exists() for name in theirs)
    assert not any((tmp_path / name).exists() for name in ours)


def test_an_index_of_the_hubs_cache_is_not_changed(linker: Linker, kb: list[dict[str, Any]], tmp_path: Path):
    index = build(linker, kb, tmp_path / "cache")
    index = EntityIndex(index.state.matcher, dataclasses.replace(index._contents, read_only=True))
    with pytest.raises(EntityIndexError, match="lies in the Hub's cache"):
        index.remove(["e1"])
    assert pickle.loads(pickle.dumps(index))._contents.read_only
    index.save_pretrained(tmp_path / "own")
    EntityIndex.from_pretrained(tmp_path / "own").remove(["e1"])


# --- Several processes


def test_what_another_process_changed_is_not_overwritten(linker: Linker, kb: list[dict[str, Any]], tmp_path: Path):
    build(linker, kb, tmp_path)
    one, other = EntityIndex.from_pretrained(tmp_path), EntityIndex.from_pretrained(tmp_path)
    one.remove(["e1"])
    for change in (
        lambda: other.remove(["e2"]),
        other.compact,
        lambda: other.add(*linker, knowledge_base(1, COUNT), show_progress=False),
        lambda: other.update(*linker, [kb[0]], show_progress=False),
    ):
        with pytest.raises(
            EntityIndexError, match=r"was changed by another process since it was opened. Open it again"
        ):
            change()
    assert "e2" in EntityIndex.from_pretrained(tmp_path)
    one.remove(["e3"])


@pytest.mark.parametrize("how", ["overwritten", "deleted and built", "saved over"])
def test_an_index_that_was_built_anew_is_another(how: str, linker: Linker, kb: list[dict[str, Any]], tmp_path: Path):
    """A process with the old one open must not make its list of files the index: those files are gone."""
    old = build(linker, kb, tmp_path / "index")
    new = build(linker, kb[:9])
    if how == "overwritten":
        build(linker, kb[:9], tmp_path / "index", overwrite=True)
    elif how == "saved over":
        new.save_pretrained(tmp_path / "index")
    else:
        shutil.rmtree(tmp_path / "index")
        build(linker, kb[:9], tmp_path / "index")
    with pytest.raises(EntityIndexError, match="changed by another process"):
        old.remove(["e1"])
    found = EntityIndex.from_pretrained(tmp_path / "index")
    found.verify()
    assert list(found.entities()) == table(kb[:9])


def test_two_writers_at_once(linker: Linker, kb: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index = build(linker, kb, tmp_path)
    monkeypatch.setattr(files_mimic, "_LOCK_SECONDS", 0.1)
    with files_mimic.locked(tmp_path):
        for change in (
            lambda: index.remove(["e1"]),
            lambda: build(linker, kb, tmp_path, overwrite=True),
            lambda: build(linker, kb).save_pretrained(tmp_path),
        ):
            with pytest.raises(EntityIndexError, match="Another process is building or changing the index"):
                change()
        assert len(EntityIndex.from_pretrained(tmp_path)) == COUNT, "readers are not kept out"
    index.remove(["e1"])


def test_a_reader_goes_on_while_files_are_replaced(
    linker: Linker, kb: list[dict[str, Any]], mentions: MentionFeatures, tmp_path: Path
):
    build(linker, kb, tmp_path).remove(["e2"])
    reader, writer = EntityIndex.from_pretrained(tmp_path), EntityIndex.from_pretrained(tmp_path)
    before = links(reader, mentions)
    writer.compact()
    writer.remove([f"e{row}" for row in range(3, COUNT)])
    writer.compact()
    assert list(writer.entities()) == table(kb[:2])
    assert links(reader, mentions) == before
    assert list(reader.entities()) == table(kb[:2] + kb[3:])


def test_files_that_are_replaced_while_an_index_is_opened(
    linker: Linker, kb: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    build(linker, kb, tmp_path).remove(["e2"])
    writer = EntityIndex.from_pretrained(tmp_path)
    read, changes = directory_mimic.read_shard, [2]

    def slow(*args: Any) -> Any:
        if changes[0]:
            changes[0] -= 1
            with monkeypatch.context() as plain:
                plain.setattr(directory_mimic, "read_shard", read)
                writer.compact()
        return read(*args)

    monkeypatch.setattr(directory_mimic, "read_shard", slow)
    index = EntityIndex.from_pretrained(tmp_path)
    assert list(index.entities()) == table(kb[:2] + kb[3:])
    assert changes == [0]


# --- Kills


def fork(work: Callable[[], Any]) -> int:
    """Runs work in a child process, and gives its id."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def ended(child: int) -> int:
    """0 if a child did its work, else the signal that killed it."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def moments_of(work: Callable[[], Any], place: Path, copies: Path) -> list[Path]:
    """Does work in a child process, and gives what a kill at each moment would have left of a directory.

    The directory is copied before and after each change of it, and at the end: a process that is killed leaves the
    files as they are. That kills leave no more than this is tested below, at random moments. As after a kill, the
    process is no more when the copies are looked at.
    """
    copies.mkdir()

    def copied() -> None:
        step = itertools.count()

        def copy() -> None:
            to = copies / str(next(step))
            shutil.copytree(place, to) if place.exists() else to.mkdir()

        def around(change: Callable[..., Any]) -> Callable[..., Any]:
            def changing(*args: Any, **kwargs: Any) -> Any:
                copy()
                result = change(*args, **kwargs)
                copy()
                return result

            return changing

        unlink = Path.unlink

        def unlinking(path: Path, missing_ok: bool = False) -> None:
            (around(unlink) if path.exists() else unlink)(path, missing_ok=missing_ok)

        os.replace = around(os.replace)
        Path.unlink = unlinking  # type: ignore[method-assign, assignment]
        work()
        copy()

    assert ended(fork(copied)) == 0
    return sorted(copies.iterdir(), key=lambda path: int(path.name))


# Each directory is read whole, in the way that costs least where entities are few.
EVERY = "exhaustive"

linux = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")


@linux
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_build_that_is_killed_at_any_moment(
    linker: Linker, kb: list[dict[str, Any]], mentions: MentionFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It opens not at all or whole, and goes on with no more than one shard to be encoded again."""
    few = kb[:9]
    expected = links(build(linker, few, shard_entities=4), mentions, method=EVERY)
    encoded = Counted(linker[0], monkeypatch)
    whole = tmp_path / "whole"
    *moments, end = moments_of(lambda: build(linker, few, whole, shard_entities=4), whole, tmp_path / "moments")
    assert len(moments) > 20
    assert list(EntityIndex.from_pretrained(end).entities()) == table(few)
    for place in moments:
        done = len(list(place.glob("shard-*.safetensors")))
        if not (place / "index_config.json").exists():
            with pytest.raises(EntityIndexError, match=r"There is no entity index|interrupted"):
                EntityIndex.from_pretrained(place)
            encoded.since()
            build(linker, few, place, shard_entities=4)
            assert encoded.since() <= max(0, 9 - 4 * (done - 1)), "a shard that was written is not encoded again"
        index = EntityIndex.from_pretrained(place)
        assert list(index.entities()) == table(few)
        assert links(index, mentions, method=EVERY) == expected
        index.verify()
        index.remove(["e1"])
        assert not strays(place)


CHANGES: dict[str, Callable[[EntityIndex, Linker, list[dict[str, Any]]], Any]] = {
    "add": lambda index, linker, kb: index.add(*linker, kb[6:8], show_progress=False),
    "update": lambda index, linker, kb: index.update(*linker, [{**kb[1], "name": "New"}], show_progress=False),
    "remove": lambda index, linker, kb: index.remove(["e1", "e5"]),
    "compact": lambda index, linker, kb: index.compact(),
    "save over": lambda index, linker, kb: build(linker, kb[3:5]).save_pretrained(index.directory),  # type: ignore[arg-type]
    "build over": lambda index, linker, kb: build(linker, kb[3:5], index.directory, overwrite=True),
}


@linux
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_is_killed_at_any_moment(
    change: str, linker: Linker, kb: list[dict[str, Any]], mentions: MentionFeatures, tmp_path: Path
):
    """The index is the old one or the new one; the next change clears away what was left."""
    original = tmp_path / "original"
    build(linker, kb[:6], original, shard_entities=4).remove(["e2"])
    old = links(EntityIndex.from_pretrained(original), mentions, method=EVERY)
    shutil.copytree(original, tmp_path / "new")
    CHANGES[change](EntityIndex.from_pretrained(tmp_path / "new"), linker, kb)
    new = links(EntityIndex.from_pretrained(tmp_path / "new"), mentions, method=EVERY)
    opened = EntityIndex.from_pretrained(original)
    moments = moments_of(lambda: CHANGES[change](opened, linker, kb), original, tmp_path / "moments")
    assert len(moments) > 5
    seen = []
    for place in moments:
        index = EntityIndex.from_pretrained(place)
        index.verify()
        found = links(index, mentions, method=EVERY)
        assert found in (old, new)
        seen.append(found == new)
        if place == moments[-1]:
            break
        if change == "build over":
            assert list(build(linker, kb[3:5], place, overwrite=True).entities()) == table(kb[3:5])
        else:
            index.remove(["e4"])
        assert not strays(place)
    assert seen == sorted(seen), "old before, new after one moment"
    assert seen[-1]
    assert old == new or not seen[0]


@linux
@pytest.mark.filterwarnings("ignore:.*fork")
def test_kills_at_random_moments(linker: Linker, kb: list[dict[str, Any]], tmp_path: Path):
    """By the clock, not between known steps: a chain of builds and changes that goes on until it is done."""

    def work() -> None:
        index = build(linker, kb, tmp_path, overwrite=True, shard_entities=2)
        index.remove(["e1"])
        index.update(*linker, [kb[2]], show_progress=False)
        index.compact()

    generator = random.Random(0)
    for _ in range(12):
        child = fork(work)
        time.sleep(generator.uniform(0, 0.4))
        os.kill(child, signal.SIGKILL)
        ended(child)
        if (tmp_path / "index_config.json").exists():
            index = EntityIndex.from_pretrained(tmp_path)
            index.verify()
            assert {"e0", "e2"} <= set(index)
            assert len(index) in (COUNT, COUNT - 1)
    index = build(linker, kb, tmp_path, overwrite=True, shard_entities=2)
    assert list(index.entities()) == table(kb)
    assert not strays(tmp_path)


def test_warnings_are_not_swallowed(linker: Linker, kb: list[dict[str, Any]]):
    """What someone else warns of while an index is built is still heard."""

    def entities() -> Iterator[dict[str, Any]]:
        warnings.warn("the source is old", stacklevel=1)
        yield from kb

    with pytest.warns(UserWarning, match="the source is old"):
        build(linker, entities())


@pytest.mark.parametrize("value", [None, 5, 1.5, True, b"Orange", ["Orange"]])
def test_what_is_no_text_is_not_looked_for(value: Any):
    model = tiny_model(text_max_length=24)
    index = EntityIndex.build(model, tiny_processor(model), knowledge_base(3), show_progress=False)
    for ask in (index.find, index.find_mentions):
        with pytest.raises(TypeError, match=r"is a string, got"):
            ask(value)
    if not isinstance(value, list | bytes | None):
        mentions = encode_mentions(model, tiny_processor(model), mentions_of(knowledge_base(1)))
        with pytest.raises(ValueError, match="must be a list of entity ids, got"):
            index.search(mentions, candidates=[value])

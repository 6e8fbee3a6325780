"""Documents in, links out: mentions found or marked, context around them, names, and what is wrong with an item."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny import random_image, tiny_processor
from tiny_clip import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast, pipeline

from mimic_el import (
    EntityIndex,
    EntityIndexError,
    MentionError,
    MultimodalEntityLinkingPipeline,
    UnknownEntityError,
    preparation_mimic,
)
from mimic_el.directory_mimic import read_manifest
from mimic_el.files_mimic import write_json
from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor

TASK = "multimodal-entity-linking"
linked: Any = pipeline  # the tasks that transformers knows by type are its own
Linker = MultimodalEntityLinkingPipeline

TEXT = "Orange opened a shop beside the Apple store in Georgia."
PLACES = [(0, 6), (32, 37), (47, 54)]
ENTITIES = [
    {"id": "orange:company", "name": "Orange", "description": "company", "aliases": ["France Télécom"]},
    {"id": "orange:fruit", "name": "orange", "description": "fruit"},
    {"id": "apple", "name": "Apple", "description": "company", "images": [random_image(1)]},
    {"id": "georgia:state", "name": "Georgia", "description": "state", "images": [random_image(2)]},
    {"id": "georgia:country", "name": "Georgia", "description": "country", "aliases": ["Sakartvelo", "საქართველო"]},
    {"id": "java", "name": "Java", "description": "island"},
]


@pytest.fixture(scope="module")
def model() -> MimicModel:
    return tiny_model(text_max_length=24)


@pytest.fixture(scope="module")
def processor(model: MimicModel) -> MimicProcessor:
    return tiny_processor(model)


@pytest.fixture(scope="module")
def linker(model: MimicModel, processor: MimicProcessor) -> Linker:
    return linked(TASK, model=model, processor=processor, entities=ENTITIES, build_kwargs={"dtype": "float32"})


def ids(entities: list[dict[str, Any]]) -> list[str]:
    return [found["entity_id"] for found in entities]


def places(answer: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(found["start"], found["end"]) for found in answer]


def assert_near(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert ids(one) == ids(other)
    np.testing.assert_allclose([e["score"] for e in one], [e["score"] for e in other], rtol=1e-4, atol=1e-4)


# --- What comes out


def test_the_names_of_the_knowledge_base_are_found(linker: Linker):
    answer = linker({"text": TEXT, "image": random_image(5)}, top_k=2)
    assert places(answer) == PLACES
    assert [found["mention"] for found in answer] == ["Orange", "Apple", "Georgia"]
    for found in answer:
        assert list(found) == ["mention", "start", "end", "context_window", "entities"]
        assert found["context_window"] == "mention"
        alone = {"mention": found["mention"], "text": TEXT, "image": random_image(5)}
        alone |= {"start": found["start"], "end": found["end"]}
        assert_near(found["entities"], linker(alone, top_k=2, context_window="mention"))


def test_a_string_is_a_document_without_an_image(linker: Linker):
    wanted = linker({"text": TEXT})
    assert linker(TEXT) == wanted
    for given in ([TEXT, TEXT], (text for text in (TEXT, TEXT))):
        for answer in linker(given):
            assert places(answer) == places(wanted)
    with pytest.raises(MentionError, match="is not valid Unicode"):
        linker("half \ud83d")


def test_own_spans(linker: Linker):
    """In the order in which they are given, overlapping ones too; pairs and dicts, of any integers."""
    spans = [(32, 37), (0, 6), (0, 13)]
    for given in (
        spans,
        [list(span) for span in spans],
        np.array(spans),
        [{"start": start, "end": end, "label": "x"} for start, end in spans],
        [(np.int64(start), torch.tensor(end)) for start, end in spans],
    ):
        answer = linker({"text": TEXT, "spans": given}, top_k=1)
        assert places(answer) == spans
        assert [found["mention"] for found in answer] == ["Apple", "Orange", "Orange opened"]


@pytest.mark.parametrize("text", ["", " \n", "No name here.", "🍊"])
def test_a_document_without_mentions(text: str, linker: Linker):
    assert linker({"text": text}) == []
    assert linker({"text": text, "spans": []}) == []
    assert linker([{"text": text}, {"text": TEXT}, {"text": text}], batch_size=2)[::2] == [[], []]


def test_offsets_are_those_of_the_given_text(linker: Linker):
    text = "🍊🍊 ＯＲＡＮＧＥ, cafe\u0301 and \u201cFrance  Te\u0301le\u0301com\u201d, საქართველო"
    answer = linker({"text": text}, top_k=1)
    assert [found["mention"] for found in answer] == ["ＯＲＡＮＧＥ", "France  Te\u0301le\u0301com", "საქართველო"]
    assert all(text[found["start"] : found["end"]] == found["mention"] for found in answer)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_documents_and_mentions_in_any_source(batch_size: int, linker: Linker):
    """Batched with others', each is linked as it is alone."""
    items = [
        {"text": TEXT, "image": random_image(5)},
        {"mention": "Java", "text": "Java is an island."},
        {"text": "nothing"},
        {"text": "Java and Apple and Java", "spans": [[0, 4], [19, 23]]},
        {"mention": "Georgia", "text": TEXT, "start": 47, "end": 54, "image": random_image(6)},
    ]
    alone = [linker(item, top_k=2) for item in items]
    rows = datasets.Dataset.from_list([{"text": item["text"]} for item in items])
    assert [places(answer) for answer in linker(rows, batch_size=batch_size)] == [
        places(linker({"text": item["text"]})) for item in items
    ]
    for source in (items, iter(items), (item for item in items)):
        answers = list(linker(source, top_k=2, batch_size=batch_size))
        assert len(answers) == len(alone)
        for answer, expected in zip(answers, alone, strict=True):
            if answer and "entities" in answer[0]:
                assert places(answer) == places(expected)
                for one, other in zip(answer, expected, strict=True):
                    assert_near(one["entities"], other["entities"])
            else:
                assert_near(answer, expected)


@pytest.mark.parametrize(("mentions", "batch_size"), [(10, 1), (10, 4), (70, 1), (70, 16)])
def test_an_image_is_read_and_encoded_once(
    mentions: int, batch_size: int, linker: Linker, monkeypatch: pytest.MonkeyPatch
):
    read: list[Any] = []
    encoded: list[int] = []
    load = preparation_mimic.load_image

    def counted_reading(source: Any, *args: Any, **options: Any) -> Any:
        read.append(source)
        return load(source, *args, **options)

    monkeypatch.setattr(preparation_mimic, "load_image", counted_reading)
    encode = linker.model.encoder.encode_images

    def counted(pixel_values: torch.Tensor, *args: Any, **options: Any) -> Any:
        encoded.append(int(pixel_values.flatten(1).any(dim=1).sum()))
        return encode(pixel_values, *args, **options)

    monkeypatch.setattr(linker.model.encoder, "encode_images", counted)
    document = {"text": "Apple " * mentions, "image": random_image(5)}
    expected = linker(
        {"mention": "Apple", "text": "Apple " * mentions, "image": random_image(5)}, context_window="mention"
    )
    for inputs in (document, [document]):
        read.clear()
        encoded.clear()
        answers = linker(inputs, batch_size=batch_size)
        answer = answers if inputs is document else answers[0]
        assert len(answer) == mentions
        assert len(read) == 1
        assert sum(encoded) == 1, "other than blank ones"
        assert_near(answer[0]["entities"], expected)


# --- Context


def test_context_around_the_mention(linker: Linker):
    """What is far from a mention in the middle of a long text makes no difference, what is beside it does."""
    far = "word " * 40
    text = f"{far}the company Apple sells {far}"
    start = text.index("Apple")
    mention = {"mention": "Apple", "start": start, "end": start + 5}
    own = linker({"text": text, "spans": [[start, start + 5]]})[0]
    for same in ({**mention, "text": text}, {"mention": "Apple", "text": text}):
        assert_near(own["entities"], linker(same, context_window="mention"))
    assert own["context_window"] == "mention"
    from_start = linker({"text": text, "spans": [[start, start + 5]]}, context_window="start")[0]
    assert from_start["context_window"] == "start"
    assert_near(from_start["entities"], linker({**mention, "text": text}))
    assert from_start["entities"] != own["entities"]
    other = text.replace("company", "island")
    assert linker({**mention, "text": other}) == linker({**mention, "text": text}), "published: the start alone"
    changed = linker({"text": other, "spans": [[start - 1, start + 4]]})[0]
    assert changed["entities"][0]["score"] != own["entities"][0]["score"]


def test_the_configuration_says_what_is_read(processor: MimicProcessor):
    model = tiny_model(text_max_length=24, context_window="mention")
    text = "word " * 40 + "Apple"
    index = EntityIndex.build(model, processor, ENTITIES, dtype="float32", show_progress=False)
    own = linked(TASK, model=model, processor=processor, index=index)
    mention = {"mention": "Apple", "text": text}
    around = own(mention)
    assert around == own(mention, context_window="mention")
    assert around != own(mention, context_window="start")
    assert_near(index.link(model, processor, [mention])[0], around)
    assert_near(
        index.link(model, processor, [mention], context_window="start")[0], own(mention, context_window="start")
    )


# --- Names and aliases


def test_find(linker: Linker, tmp_path: Path):
    linker.index.save_pretrained(tmp_path)
    for index in (linker.index, EntityIndex.from_pretrained(tmp_path)):
        assert index.find("Orange") == ["orange:company"]
        assert index.find("ORANGE") == ["orange:company", "orange:fruit"]
        assert index.find("sakartvelo") == ["georgia:country"]
        assert index.find("Georgia") == ["georgia:state", "georgia:country"]
        assert index.find("nobody") == index.find("") == []
        assert index.entity("georgia:country")["aliases"] == ["Sakartvelo", "საქართველო"]


def test_nearly_the_name(linker: Linker):
    pytest.importorskip("rapidfuzz")
    assert linker.index.find("Gorgia") == ["georgia:state", "georgia:country"]
    assert linker.index.find("Gorgia", max_distance=0) == []
    assert linker.index.find("Jav") == ["java"]
    assert linker.index.find("Xyva") == [], "a third of its characters at most"


def test_names_follow_the_changes_of_an_index(model: MimicModel, processor: MimicProcessor, tmp_path: Path):
    quiet: dict[str, Any] = {"show_progress": False}
    stored = EntityIndex.build(model, processor, ENTITIES, tmp_path / "index", **quiet)
    in_memory = EntityIndex.build(model, processor, ENTITIES, **quiet)
    for index in (stored, in_memory):
        assert index.find_mentions("Mercury and Java") == [(12, 16)]
        index.add(model, processor, [{"id": "mercury", "name": "Mercury", "aliases": ["Hermes"]}], **quiet)
        index.remove(["java"])
        index.update(model, processor, [{"id": "apple", "name": "Apfel"}], **quiet)

    def check(index: EntityIndex) -> None:
        assert index.find_mentions("Mercury, Java, Hermes, Apple, Apfel") == [(0, 7), (15, 21), (30, 35)]
        assert index.find("java") == index.find("Apple") == []
        assert index.find("hermes") == ["mercury"]
        assert index.find("Georgia") == ["georgia:state", "georgia:country"]

    stored.save_pretrained(tmp_path / "saved")
    for index in (stored, in_memory, EntityIndex.from_pretrained(tmp_path / "index")):
        check(index)
        index.verify()
    stored.compact()
    in_memory.compact()
    for index in (stored, in_memory, EntityIndex.from_pretrained(tmp_path / "saved")):
        check(index)
    assert len(list((tmp_path / "index").glob("names-*"))) == 1


def test_an_index_without_names(linker: Linker, tmp_path: Path):
    """As older versions made it."""
    linker.index.save_pretrained(tmp_path)
    manifest = read_manifest(tmp_path)
    name = manifest.pop("names")["name"]
    del manifest["digest"]
    write_json(tmp_path / "index_config.json", manifest)
    (tmp_path / f"{name}.safetensors").unlink()
    index = EntityIndex.from_pretrained(tmp_path)
    old = linked(TASK, model=linker.model, processor=linker.processor, index=index)
    mention = {"mention": "Apple", "text": TEXT}
    assert_near(old(mention), linker(mention))
    with pytest.raises(EntityIndexError, match=r"did not store names.* Call index.build_names\(\)"):
        old({"text": TEXT})
    with pytest.raises(EntityIndexError, match="build_names"):
        old(mention, candidates="names")
    assert places(old({"text": TEXT, "spans": PLACES})) == PLACES
    index.build_names()
    assert places(old({"text": TEXT})) == PLACES
    index.verify()
    assert EntityIndex.from_pretrained(tmp_path).find("sakartvelo") == ["georgia:country"]


def test_candidates_by_name(linker: Linker):
    mention = {"mention": "ORANGE", "text": TEXT}
    named = linker(mention, candidates="names")
    assert sorted(ids(named)) == ["orange:company", "orange:fruit"]
    assert_near(named, linker(mention, candidates=["orange:company", "orange:fruit"]))
    unknown = {"mention": "Nobody", "text": TEXT}
    assert_near(linker(unknown, candidates="names"), linker(unknown))
    best = ids(linker(mention, top_k=2))
    both = linker(mention, candidates="names+search", top_k=2)
    assert set(ids(both)) == set(best) | set(ids(named))
    assert len(set(ids(both))) == len(both)
    assert [found["score"] for found in both] == sorted((found["score"] for found in both), reverse=True)
    own = {**mention, "candidates": ["java"]}
    assert ids(linker(own, candidates="names")) == ["java"]
    answer = linker({"text": TEXT}, candidates="names")
    assert [sorted(ids(found["entities"])) for found in answer] == [
        ["orange:company", "orange:fruit"],
        ["apple"],
        ["georgia:country", "georgia:state"],
    ]
    link = linker.index.link
    assert_near(link(linker.model, linker.processor, [mention], candidates="names")[0], named)
    with pytest.raises(ValueError, match="got the string 'nam'"):
        linker(mention, candidates="nam")


# --- Detectors


def by_hand(text: str) -> Iterator[Any]:
    yield 32, 37
    yield {"start": np.int64(0), "end": np.int32(7)}  # with the space behind it
    yield [32, 37]


@pytest.mark.parametrize("given_at", ["call", "pipeline"])
def test_any_callable_finds_mentions(given_at: str, linker: Linker):
    """Pairs and dicts, of numpy's integers, twice, with white space: in the order of the text, each once."""
    if given_at == "call":
        answer = linker({"text": TEXT}, mention_detector=by_hand)
    else:
        own = linked(TASK, model=linker.model, processor=linker.processor, index=linker.index, mention_detector=by_hand)
        answer = own({"text": TEXT})
        assert places(own({"text": TEXT}, mention_detector="names")) == PLACES
    assert places(answer) == [(0, 6), (32, 37)]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "must be a list of .* got NoneType"),
        ("Orange", "must be a list of .* got str"),
        ([5], "number 0: it must be"),
        ([(0,)], "number 0: it must be"),
        ([(0, 6), (6, 0)], "number 1: The span from 6 to 0 has no characters"),
        ([(0, 600)], "The span from 0 to 600 is not in the text, which has 55 characters"),
        ([(-3, 2)], "is not in the text"),
        ([(0, 1.5)], "`end` must be an integer"),
        ([("0", "6")], "`start` must be an integer"),
        ([{"start": 0}], "it needs `start` and `end`"),
        ([{"start": None, "end": None}], "its `start` or `end` is missing"),
    ],
)
def test_detectors_and_spans_that_are_nonsense(found: Any, message: str, linker: Linker):
    def detector(text: str) -> Any:
        return found

    with pytest.raises(MentionError, match=f"the mention detector detector gives.*{message}"):
        linker({"text": TEXT}, mention_detector=detector)
    if found is not None:
        with pytest.raises(MentionError, match=f"Mention 1: `spans`.*{message}"):
            linker([{"text": TEXT}, {"text": TEXT, "spans": found}])
    answers = linker([{"text": TEXT}, {"text": ""}], mention_detector=detector, on_error="return")
    assert answers[0]["error_type"] == "MentionError"
    assert answers[0]["error"].startswith("Mention 0: What the mention detector detector gives")


def test_a_detector_that_raises(linker: Linker):
    def broken(text: str) -> Any:
        raise RuntimeError("out of order")

    with pytest.raises(MentionError, match="The mention detector broken fails with RuntimeError: out of order"):
        linker({"text": TEXT}, mention_detector=broken)
    with pytest.raises(TypeError, match=r"`mention_detector` must be .* got int"):
        linker({"text": TEXT}, mention_detector=5)


@pytest.fixture(scope="module")
def classifier() -> Any:
    """A token-classification pipeline that reads 16 tokens and takes every "Apple" and "Java" for a place."""
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "Apple", "Java", "word"]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)
    size: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 0, "num_attention_heads": 1, "intermediate_size": 8}
    labels: dict[str, Any] = {"id2label": {0: "O", 1: "B-LOC"}, "label2id": {"O": 0, "B-LOC": 1}}
    model = BertForTokenClassification(BertConfig(vocab_size=len(words), max_position_embeddings=16, **size, **labels))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        embeddings = model.bert.embeddings
        embeddings.LayerNorm.weight.fill_(1)
        embeddings.word_embeddings.weight[4:6, 0] = 5
        model.classifier.weight[1, 0] = 5
        model.classifier.bias[0] = 1
    return linked("token-classification", model=model.eval(), tokenizer=fast)


def test_a_token_classifier_finds_mentions(linker: Linker, classifier: Any, tmp_path: Path):
    """The pipeline itself, or its directory; in a text that is longer than it reads, too."""
    text = "word Apple word " + "word " * 40 + "Java"
    expected = [(5, 10), (text.index("Java"), len(text))]
    classifier.save_pretrained(tmp_path)
    for detector in (classifier, str(tmp_path), tmp_path):
        assert places(linker({"text": text}, mention_detector=detector, top_k=1)) == expected
        assert (
            linker({"text": ""}, mention_detector=detector) == linker({"text": "word"}, mention_detector=detector) == []
        )


def test_a_detector_that_is_named_is_loaded_once(linker: Linker, classifier: Any, tmp_path: Path):
    classifier.save_pretrained(tmp_path / "one")
    classifier.save_pretrained(tmp_path / "two")
    text = "word Apple"
    assert places(linker({"text": text}, mention_detector=tmp_path / "one")) == [(5, 10)]
    shutil.rmtree(tmp_path / "one")
    assert places(linker({"text": text}, mention_detector=str(tmp_path / "one"))) == [(5, 10)]
    assert places(linker({"text": text}, mention_detector=tmp_path / "two")) == [(5, 10)]
    with pytest.raises(OSError, match="one"):  # the last one is kept
        linker({"text": text}, mention_detector=tmp_path / "one")


# --- What is wrong with an item

BAD: list[tuple[Any, str]] = [
    ({"mention": "", "text": "x", "id": "m7"}, r"\(id 'm7'\): `mention` is empty"),
    ({"mention": "x", "text": None}, "`text` of a mention is missing"),
    ({"mention": None, "text": "x"}, "`mention` of a mention is missing"),
    ({"mention": "x", "text": "\ud800"}, "`text` of a mention is not valid Unicode"),
    ({"text": "\ud800"}, "`text` of a mention is not valid Unicode"),
    ({"mention": "x", "text": "x", "image": "/no/such.png"}, "There is no image file /no/such.png"),
    ({"text": "x", "image": b"GIF89a"}, "given bytes"),
    ({"mention": "x", "text": "x", "candidates": ["nobody"]}, "1 of the entities are not in this index"),
    ({"text": TEXT, "candidates": ["nobody"]}, "1 of the entities are not in this index"),
    ({"text": TEXT, "spans": [[0, 6], [3, 3]]}, "`spans`, number 1: The span from 3 to 3 has no characters"),
    ({"text": TEXT, "spans": [[6, 7]]}, "there is only white space from 6 to 7"),
    ({"text": TEXT, "spans": 5}, "`spans` must be a list"),
    ({"text": TEXT, "spans": [], "mention": "Orange"}, "either `mention`, for one mention, or `spans`"),
    ({"mention": "Orange", "text": TEXT, "start": 60}, "The place of the mention 'Orange': The span from 60 to 66"),
    ({"mention": "Orange", "text": TEXT, "start": "x"}, "`start` must be an integer"),
    (5, "A mention must be a dict .* got int"),
]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("bad", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_one_bad_item(bad: Any, message: str, batch_size: int, linker: Linker):
    """It is named by its row and id; the others are answered, or come before the error."""
    good = {"mention": "Java", "text": "Java."}
    items = [good, bad, {"text": TEXT}]
    streamed = iter(linker((item for item in items), batch_size=batch_size))
    assert len(next(streamed)) == 5
    with pytest.raises((MentionError, ValueError, UnknownEntityError), match=f"^Mention 1.*{message}"):
        next(streamed)
    with pytest.warns(UserWarning, match=f"Mention 1.*{message}.* It is not linked"):
        answers = linker(items, on_error="warn", batch_size=batch_size)
    assert [len(answer) for answer in answers] == [5, 0, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = linker(items, on_error="return", batch_size=batch_size)
    assert set(answers[1]) == {"error", "error_type"}
    assert [len(answers[0]), len(answers[2])] == [5, 3]


def test_on_error_of_an_index(linker: Linker):
    """The same for plain mentions."""
    good = {"mention": "Java", "text": "Java."}
    link: Any = linker.index.link
    for bad, message in BAD:
        if isinstance(bad, dict) and ("spans" in bad or "mention" not in bad):
            continue
        arguments: list[Any] = [linker.model, linker.processor, [good, bad, good]]
        options: dict[str, Any] = {}
        if isinstance(bad, dict) and "candidates" in bad:
            options["candidates"] = [None, bad["candidates"], None]
            message = "Mention 1: " + message
        with pytest.raises(
            ValueError if not options else UnknownEntityError,
            match=f"^Mention 1.*{message}".replace("Mention 1.*Mention 1", "Mention 1"),
        ):
            link(*arguments, **options)
        with pytest.warns(UserWarning, match="Mention 1"):
            assert [len(answer) for answer in link(*arguments, on_error="warn", **options)] == [5, 0, 5]
        assert set(link(*arguments, on_error="return", **options)[1]) == {"error", "error_type"}


def test_images_that_cannot_be_read(linker: Linker):
    """The default stays: they are an error. With "warn" the item is linked without."""
    for item in ({"mention": "Java", "text": "Java.", "id": 3}, {"text": "Java.", "id": 3}):
        with pytest.raises(ValueError, match="There is no image file"):
            linker({**item, "image": "/no/such.png"})
        with pytest.warns(UserWarning, match=r"Mention 3: There is no image file /no/such.png. It is encoded without"):
            assert linker({**item, "image": "/no/such.png"}, on_image_error="warn") == linker(item)


def test_arguments_are_no_faults_of_items(linker: Linker):
    for options in (
        {"top_k": 0},
        {"method": "fast"},
        {"context_window": "middle"},
        {"on_error": "ignore"},
        {"on_image_error": "ignore"},
        {"candidates": "all"},
    ):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
            linker([{"text": TEXT}], **{"on_error": "warn", **options})


def test_worker_processes(linker: Linker):
    items = datasets.Dataset.from_list(
        [{"text": TEXT, "id": "a"}, {"text": None, "id": "b"}, {"text": "Java", "id": "c"}]
    )
    answers = list(linker(items, num_workers=1, batch_size=2, on_error="return"))
    assert places(answers[0]) == PLACES
    assert answers[1]["error"].startswith("Mention 1 (id 'b'): `text` of a mention is missing")
    assert places(answers[2]) == [(0, 4)]


def test_a_megabyte_of_text(linker: Linker):
    text = "word " * 100_000 + "Java" + " word" * 100_000
    answer = linker({"text": text}, top_k=1)
    assert places(answer) == [(500_000, 500_004)]
    assert_near(answer[0]["entities"], linker({"text": "word " * 100 + "Java" + " word" * 100}, top_k=1)[0]["entities"])
    with pytest.raises(MentionError, match="has 10,000,001 characters, more than the 10,000,000 that are read"):
        linker({"text": "x" * 10_000_001})

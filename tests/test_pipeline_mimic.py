"""The pipeline: mentions of any kind in, entities out, and words for whatever is wrong."""

from __future__ import annotations

import copy
import http.server
import io
import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from tiny import knowledge_base, mentions_of, once, random_image, tiny_processor
from tiny_clip import tiny_model
from transformers import pipeline

from mimic_el import (
    EntityIndex,
    EntityIndexError,
    MimicImageError,
    MultimodalEntityLinkingPipeline,
    UnknownEntityError,
)
from mimic_el.modeling_mimic import MimicModel
from mimic_el.processing_mimic import MimicProcessor

TASK = "multimodal-entity-linking"
linked: Any = pipeline  # the tasks that transformers knows by type are its own
COUNT = 12
SCORES = ("score", "text_score", "image_score", "cross_modal_score")

Linker = MultimodalEntityLinkingPipeline


@pytest.fixture(scope="module")
def model() -> MimicModel:
    return tiny_model(text_max_length=24)


@pytest.fixture(scope="module")
def processor(model: MimicModel) -> MimicProcessor:
    return tiny_processor(model)


@pytest.fixture(scope="module")
def kb() -> list[dict[str, Any]]:
    return knowledge_base(COUNT)


@pytest.fixture(scope="module")
def mentions(kb: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of which every third has no image, and some have candidates."""
    found = mentions_of(kb)
    for row in (1, 2, 6):
        found[row]["candidates"] = [f"e{(row + step) % COUNT}" for step in range(row)]
    return found


def make(model: MimicModel, processor: MimicProcessor, **options: Any) -> Linker:
    return linked(TASK, model=model, processor=processor, **options)


@pytest.fixture(scope="module")
def linker(model: MimicModel, processor: MimicProcessor, kb: list[dict[str, Any]]) -> Linker:
    return make(model, processor, entities=kb, build_kwargs={"dtype": "float32"})


@pytest.fixture(scope="module")
def checkpoint(linker: Linker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an index."""
    path = tmp_path_factory.mktemp("checkpoint")
    linker.save_pretrained(path, save_index=True)
    linker.model.config.default_index = None
    return path


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [(entity["entity_id"], entity["name"]) for entity in found] == [
        (entity["entity_id"], entity["name"]) for entity in expected
    ]
    for one, other in zip(found, expected, strict=True):
        for name in SCORES:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4)


def assert_all_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


# --- What comes out


def test_entities_and_their_scores(linker: Linker, kb: list[dict[str, Any]], tmp_path: Path):
    """The best entities, best first, with the scores that the model gives."""
    kb[0]["images"][0].save(tmp_path / "photo.png")
    mention = {"mention": "Orange", "text": "Orange opened a shop.", "image": str(tmp_path / "photo.png")}
    found = linker(mention, top_k=3)
    model, processor = linker.model, linker.processor
    with torch.no_grad():
        one = model.encode_mentions(**processor.process_mentions(["Orange"], [mention["text"]], [kb[0]["images"][0]]))
        names, descriptions, images = ([entity[key] for entity in kb] for key in ("name", "description", "images"))
        scores = model.score(one, model.encode_entities(**processor.process_entities(names, descriptions, images)))
    order = scores.logits[0].argsort(descending=True).tolist()
    expected = [
        {
            "entity_id": f"e{row}",
            "name": kb[row]["name"],
            "description": kb[row]["description"],
            "score": float(scores.logits[0, row]),
            "text_score": float(scores.text_logits[0, row]),
            "image_score": float(scores.image_logits[0, row]),
            "cross_modal_score": float(scores.cross_modal_logits[0, row]),
        }
        for row in order[:3]
    ]
    assert_same(found, expected)
    assert [list(entity) for entity in found] == [["entity_id", "name", "description", *SCORES]] * 3
    assert all(type(entity[name]) is float for entity in found for name in SCORES)


def test_number_of_entities(
    linker: Linker, model: MimicModel, processor: MimicProcessor, mentions: list[dict[str, Any]]
):
    mention = mentions[0]
    assert len(linker(mention)) == 5
    assert len(linker(mention, top_k=1)) == 1
    assert len(linker(mention, top_k=COUNT + 5)) == COUNT
    other = make(model, processor, index=linker.index, top_k=2)
    assert len(other(mention)) == 2
    assert len(other(mention, top_k=4)) == 4
    for k in (0, -1, "3", 1.5):
        with pytest.raises(ValueError, match=r"`top_k` must be a positive integer"):
            linker(mention, top_k=k)


def test_exhaustive_scoring_finds_the_same(linker: Linker, mentions: list[dict[str, Any]]):
    assert linker(mentions, method="exhaustive") == linker(mentions)
    with pytest.raises(ValueError, match="`method` must be one of pruned, exhaustive, got 'fast'"):
        linker(mentions[0], method="fast")


# --- What goes in


class Sequence:
    """Numbered and with a length, and nothing else."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        return self.items[row]


def png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def as_dataset(mentions: list[dict[str, Any]]) -> datasets.Dataset:
    """The schema of the project's data sets, with candidates in addition."""
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "mention": datasets.Value("string"),
            "sentence": datasets.Value("string"),
            "image": datasets.Image(),
            "candidates": datasets.List(datasets.Value("string")),
        }
    )
    records = [
        {
            "id": f"m{row}",
            "mention": mention["mention"],
            "sentence": mention["text"],
            "image": mention["image"] and {"bytes": png(mention["image"]), "path": None},
            "candidates": mention.get("candidates"),
        }
        for row, mention in enumerate(mentions)
    ]
    return datasets.Dataset.from_list(records, features=features)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize(
    "source",
    [
        list,
        tuple,
        iter,
        once,
        Sequence,
        as_dataset,
        lambda mentions: as_dataset(mentions).to_iterable_dataset(),
        lambda mentions: as_dataset(mentions).cast_column("image", datasets.Image(decode=False)),
    ],
    ids=["list", "tuple", "iterator", "generator", "sequence", "dataset", "streamed dataset", "undecoded dataset"],
)
@pytest.mark.filterwarnings("ignore:You seem to be using the pipelines sequentially")
def test_any_source_of_mentions(
    source: Callable[[Any], Any], batch_size: int, linker: Linker, mentions: list[dict[str, Any]]
):
    """Batched or not, each mention is linked as it would be alone, with or without image and candidates."""
    alone = [linker(mention, top_k=3) for mention in mentions]
    assert [len(found) for found in alone] == [min(3, len(m.get("candidates", range(COUNT)))) for m in mentions]
    found = linker(source(mentions), top_k=3, batch_size=batch_size)
    if source in (list, tuple):
        assert type(found) is list
    assert_all_same(list(found), alone)


def test_a_list_of_one_gives_a_list(linker: Linker, mentions: list[dict[str, Any]]):
    assert_all_same(linker(mentions[:1]), [linker(mentions[0])])


@pytest.mark.parametrize(
    "empty", [[], (), iter([]), Sequence([]), datasets.Dataset.from_dict({})], ids=lambda e: type(e).__name__
)
def test_nothing_in_nothing_out(empty: Any, linker: Linker):
    assert list(linker(empty)) == []


def test_worker_processes(linker: Linker, mentions: list[dict[str, Any]]):
    alone = [linker(mention) for mention in mentions]
    assert_all_same(list(linker(as_dataset(mentions), num_workers=1, batch_size=4)), alone)


def test_a_source_that_never_ends(linker: Linker, mentions: list[dict[str, Any]]):
    """Mentions are read when they are linked, not all before."""

    def forever() -> Iterator[dict[str, Any]]:
        while True:
            yield mentions[0]

    found = linker(forever(), top_k=1)
    assert next(iter(found)) == linker(mentions[0], top_k=1)


def test_tables_and_their_rows_are_mentions(linker: Linker, mentions: list[dict[str, Any]]) -> None:
    """Of pandas and Arrow, with what is missing as they write it: answers are those of the same dicts."""
    plain = [{"mention": mention["mention"], "text": mention["text"], "image": None} for mention in mentions[:3]]
    expected = linker(plain)
    frame = pd.DataFrame(plain).convert_dtypes()
    rows = [row for _, row in frame.iterrows()]
    for given in (frame, pa.Table.from_pylist(plain), pa.RecordBatch.from_pylist(plain), rows, iter(rows)):
        assert list(linker(given)) == expected
    assert linker(rows[0]) == expected[0]
    assert linker(frame.assign(image=[pd.NA, pd.NaT, np.float32("nan")])) == expected


@pytest.fixture(scope="module")
def photo() -> Any:
    return random_image(5, 20)


@pytest.fixture
def url(photo: Any) -> Iterator[str]:
    """The address of an image on a web server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/photo.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(png(photo))

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/photo.png"
    server.shutdown()
    server.server_close()


def test_any_kind_of_image(linker: Linker, photo: Any, url: str, tmp_path: Path):
    photo.save(tmp_path / "photo.png")
    mention = {"mention": "Orange", "text": "Orange opened a shop."}
    expected = linker({**mention, "image": photo})
    bare = linker({**mention, "image": None})
    assert bare != expected
    for same in (
        str(tmp_path / "photo.png"),
        tmp_path / "photo.png",
        png(photo),
        {"bytes": png(photo), "path": None},
        {"bytes": None, "path": str(tmp_path / "photo.png")},
        url,
        photo.convert("RGBA"),
    ):
        assert linker({**mention, "image": same}) == expected, same
    assert linker(mention) == bare
    assert linker({**mention, "image": ""}) == bare
    with pytest.raises(MimicImageError, match=r"nothing.png cannot be downloaded: HTTP Error 404"):
        linker({**mention, "image": url.replace("photo", "nothing")})


def test_a_mention_need_not_be_in_its_sentence(linker: Linker):
    """Hundreds of the benchmarks' real mentions are not; texts may be of any length, none too."""
    for text in ("Nothing of the kind.", "", "word " * 5000, "🍊" * 100, "\u0000\u200f"):
        found = linker({"mention": "Orange", "text": text})
        assert len(found) == 5
        assert all(math.isfinite(entity["score"]) for entity in found)


def test_sentence_is_another_word_for_text(linker: Linker):
    mention = {"mention": "Orange", "text": "Orange opened a shop."}
    expected = linker(mention)
    assert linker({"mention": "Orange", "sentence": "Orange opened a shop.", "id": 7}) == expected
    assert linker({"mention": "Orange", "sentence": "Orange opened a shop.", "text": None}) == expected
    assert linker({**mention, "sentence": "something else"}) == expected


# --- Candidates


def test_candidates(linker: Linker):
    mention = {"mention": "Orange", "text": "Orange opened a shop."}
    everything = linker(mention, top_k=COUNT)
    some = ["e3", "e7", "e2"]
    expected = [entity for entity in everything if entity["entity_id"] in some]
    assert_same(linker({**mention, "candidates": some}), expected)
    assert_same(linker(mention, candidates=some), expected)
    assert_all_same(linker([mention, mention], candidates=some, batch_size=2), [expected] * 2)
    assert_same(linker({**mention, "candidates": ("e3", "e3")}), [e for e in expected if e["entity_id"] == "e3"])
    # A mention's own candidates come before those of the call.
    assert_same(linker({**mention, "candidates": some}, candidates=["e1"]), expected)
    assert linker({**mention, "candidates": []}) == []
    assert len(linker({**mention, "candidates": None}, top_k=COUNT)) == COUNT


def test_candidates_that_are_not_there(linker: Linker):
    mention = {"mention": "Orange", "text": "Orange opened a shop."}
    with pytest.raises(UnknownEntityError, match=f"1 of the entities are not in this index of {COUNT}: 'nobody'"):
        linker([mention, {**mention, "candidates": ["e1", "nobody"]}], batch_size=2)
    with pytest.raises(ValueError, match="must be a list of entity ids, got the string 'e1'"):
        linker({**mention, "candidates": "e1"})
    with pytest.raises(ValueError, match="must be a list of entity ids, got the string 'e1'"):
        linker(mention, candidates="e1")


# --- The knowledge base


def test_a_knowledge_base_or_an_index(
    model: MimicModel,
    processor: MimicProcessor,
    kb: list[dict[str, Any]],
    mentions: list[dict[str, Any]],
    tmp_path: Path,
):
    """A list, a data set, an index in memory, its directory as text or path: the links are the same."""
    index = EntityIndex.build(model, processor, kb, tmp_path / "index", show_progress=False)
    expected = make(model, processor, entities=kb)(mentions)
    rows = [{**entity, "images": [{"bytes": png(image), "path": None} for image in entity["images"]]} for entity in kb]
    features = {"id": "string", "qid": "string", "name": "string", "description": "string"}
    dataset = datasets.Dataset.from_list(
        rows,
        features=datasets.Features(
            {name: datasets.Value(kind) for name, kind in features.items()}
            | {"images": datasets.List(datasets.Image())}
        ),
    )
    for options in ({"entities": dataset}, {"entities": once(kb)}, {"index": index}):
        assert_all_same(make(model, processor, **options)(mentions), expected)
    for place in (tmp_path / "index", str(tmp_path / "index")):
        assert_all_same(make(model, processor, index=place)(mentions), expected)
    kept = make(model, processor, entities=kb, build_kwargs={"output_dir": tmp_path / "kept", "dtype": "int8"})
    assert kept.index.directory == tmp_path / "kept"
    assert kept.index.dtype == "int8"


def test_another_index_can_be_set(
    model: MimicModel, processor: MimicProcessor, kb: list[dict[str, Any]], mentions: list[dict[str, Any]]
):
    linker = make(model, processor, entities=kb)
    linker.index = EntityIndex.build(model, processor, kb[:2], show_progress=False)
    assert {entity["entity_id"] for entity in linker(mentions[0])} == {"e0", "e1"}
    other = tiny_model(1, text_max_length=24)
    foreign = EntityIndex.build(other, tiny_processor(other), kb[:2], show_progress=False)
    with pytest.raises(
        EntityIndexError, match="has other weights or another configuration: its scores would mean nothing"
    ):
        linker.index = foreign
    with pytest.raises(EntityIndexError, match="has other weights"):
        make(model, processor, index=foreign)
    assert len(linker.index) == 2, "it keeps the one that it had"


def test_knowledge_bases_that_are_refused(
    model: MimicModel, processor: MimicProcessor, kb: list[dict[str, Any]], linker: Linker, tmp_path: Path
):
    with pytest.raises(ValueError, match="either `index` or `entities`, not both"):
        make(model, processor, entities=kb, index=linker.index)
    with pytest.raises(EntityIndexError, match="knowledge base is empty"):
        make(model, processor, entities=[])
    with pytest.raises(ValueError, match="The id 'e1' is there more than once"):
        make(model, processor, entities=[*kb, kb[1]])
    with pytest.raises(TypeError, match="`index` must be an EntityIndex, its directory or Hub id, got int"):
        make(model, processor, index=5)
    with pytest.raises(EntityIndexError, match="There is no entity index in"):
        make(model, processor, index=tmp_path)


def test_no_knowledge_base(
    model: MimicModel, processor: MimicProcessor, mentions: list[dict[str, Any]], linker: Linker
):
    bare = make(model, processor)
    with pytest.raises(EntityIndexError, match=r"no knowledge base to link to. Pass `entities=` .* or `index=`"):
        bare(mentions[0])
    bare.index = linker.index
    assert bare(mentions[0]) == linker(mentions[0])


# --- Saving and loading


def test_saved_with_its_index_and_loaded_without_naming_the_task(
    checkpoint: Path, linker: Linker, mentions: list[dict[str, Any]], tmp_path: Path
):
    loaded = linked(model=str(checkpoint), trust_remote_code=True)
    assert loaded.task == TASK
    assert loaded.index.directory == checkpoint / "index"
    assert_all_same(loaded(mentions), linker(mentions))
    # The folder is found where the checkpoint is, not where it was saved.
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    moved = linked(TASK, model=str(tmp_path / "elsewhere"), trust_remote_code=True, top_k=2)
    assert moved.index.directory == tmp_path / "elsewhere" / "index"
    assert_all_same(moved(mentions), linker(mentions, top_k=2))


def test_saved_without_its_index(
    linker: Linker, kb: list[dict[str, Any]], mentions: list[dict[str, Any]], tmp_path: Path
):
    linker.save_pretrained(tmp_path)
    assert not (tmp_path / "index").exists()
    loaded = linked(TASK, model=str(tmp_path), trust_remote_code=True, entities=kb, build_kwargs={"dtype": "float32"})
    assert_all_same(loaded(mentions), linker(mentions))


def test_another_knowledge_base_than_the_default(checkpoint: Path, kb: list[dict[str, Any]]):
    options = {"model": str(checkpoint), "trust_remote_code": True}
    assert len(linked(TASK, **options, entities=kb[:2]).index) == 2
    index = EntityIndex.from_pretrained(checkpoint / "index")
    assert linked(TASK, **options, index=index).index is index


@pytest.mark.parametrize("name", ["../secret", "/absolute", "index/../../secret", ".."])
def test_a_checkpoint_names_no_index_outside_of_it(
    name: str, checkpoint: Path, mentions: list[dict[str, Any]], tmp_path: Path
):
    """Its configuration is input from outside. The index is there, so that it would be opened."""
    place = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, place)
    shutil.copytree(checkpoint / "index", tmp_path / "secret")
    if name == "/absolute":
        name = str(tmp_path / "secret")
    model = MimicModel.from_pretrained(place)
    model.config.default_index = name
    model.save_pretrained(place)
    with pytest.raises(ValueError, match=r"a place that is not in the checkpoint .* pass `index=` or `entities=`"):
        linked(TASK, model=str(place), trust_remote_code=True)
    chosen = linked(TASK, model=str(place), trust_remote_code=True, index=tmp_path / "secret")
    assert len(chosen(mentions[0])) == 5


@pytest.mark.parametrize("name", ["secret/index", "secret", "./secret", "~/secret", "x" * 5000, "http://a/b", "a\0b"])
def test_a_default_index_is_no_folder_of_the_working_directory(
    name: str, linker: Linker, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The index is there, so that it would be opened; the Hub, which is asked for a name that may be one, has none."""
    for place in ("secret", "secret/index"):
        shutil.copytree(checkpoint / "index", tmp_path / place)
    monkeypatch.chdir(tmp_path)
    config = copy.deepcopy(linker.model.config)
    config.name_or_path, config.default_index = str(checkpoint), name
    monkeypatch.setattr(linker.model, "config", config)
    with pytest.raises(EntityIndexError, match=r"pass `index=` or `entities=`"):
        make(linker.model, linker.processor, index_kwargs={"local_files_only": True})


@pytest.mark.parametrize(("name", "revision"), [(5, None), (["index"], None), ("a/b", 5)])
def test_a_default_index_that_is_no_name(
    name: Any, revision: Any, linker: Linker, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    config = copy.deepcopy(linker.model.config)
    config.name_or_path, config.default_index, config.default_index_revision = str(checkpoint), name, revision
    monkeypatch.setattr(linker.model, "config", config)
    with pytest.raises(EntityIndexError, match="must be strings"):
        make(linker.model, linker.processor)


def test_a_default_index_of_another_model(checkpoint: Path, kb: list[dict[str, Any]], tmp_path: Path):
    place = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, place)
    other = tiny_model(1, text_max_length=24)
    EntityIndex.build(other, tiny_processor(other), kb, place / "index", overwrite=True, show_progress=False)
    with pytest.raises(ValueError, match="has other weights or another configuration"):
        linked(TASK, model=str(place), trust_remote_code=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, checkpoint: Path, mentions: list[dict[str, Any]], linker: Linker):
    """The index was made in float32 by the same model; scores are near."""
    half = linked(TASK, model=str(checkpoint), trust_remote_code=True, dtype=dtype)
    scores = [found[0]["score"] for found in half(mentions)]
    np.testing.assert_allclose(scores, [found[0]["score"] for found in linker(mentions)], rtol=0.05, atol=0.3)


# --- What is refused


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "in a batch"])
@pytest.mark.parametrize(
    ("mention", "message"),
    [
        ({}, r"`text` of a mention is missing; the mention's keys are \[\]"),
        ({"mention": "x"}, r"`text` of a mention is missing; the mention's keys are \['mention'\]"),
        ({"mention": None, "text": "x"}, "`mention` of a mention is missing"),
        ({"mention": 5, "text": "x"}, "`mention` of a mention must be a string, got int"),
        ({"mention": "x", "text": ["x"]}, "`text` of a mention must be a string, got list"),
        ({"mention": "", "text": "x"}, "`mention` is empty: say which words of the text are to be linked"),
        ({"mention": " \n", "text": "x"}, "`mention` is empty"),
        (7, 'A mention must be a dict such as {"mention": "Orange".* got int'),
        (None, "A mention must be a dict .* got NoneType"),
        ({"mention": "x", "text": "y", "image": "/no/such.png"}, "There is no image file /no/such.png"),
        ({"mention": "x", "text": "y", "image": b"GIF89a"}, "given bytes"),
        (
            {"mention": "x", "text": "y", "image": 5},
            "An image must be a PIL image, a path, a URL, bytes or None, got int",
        ),
        ({"mention": "x", "text": "y", "image": "file:///no/such.png"}, "There is no image file /no/such.png"),
    ],
)
def test_mentions_that_are_refused(
    mention: Any, message: str, batched: bool, linker: Linker, mentions: list[dict[str, Any]]
):
    with pytest.raises(ValueError, match=message):
        linker([mentions[0], mention, mentions[1]], batch_size=3) if batched else linker(mention)
    assert len(linker(mentions[0])) == 5


def test_unknown_parameters(
    linker: Linker, model: MimicModel, processor: MimicProcessor, mentions: list[dict[str, Any]]
):
    with pytest.raises(TypeError, match=r"has no parameter topk; it takes top_k, candidates, .* and "):
        linker(mentions[0], topk=3)
    with pytest.raises(TypeError, match="has no parameter kb"):
        make(model, processor, kb=[])


def test_a_model_without_its_processor(model: MimicModel):
    with pytest.raises(ValueError, match="processor"):
        MultimodalEntityLinkingPipeline(model=model)


# --- A checkpoint where this package is installed -----------------------------------------------------------------


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("task", [{"task": TASK}, {}], ids=["task named", "task inferred"])
def test_a_checkpoint_needs_no_remote_code_and_runs_none(
    task: dict[str, str],
    trust: bool | None,
    linker: Linker,
    kb: list[dict[str, Any]],
    mentions: list[dict[str, Any]],
    tmp_path: Path,
):
    if not task and trust is False:
        pytest.skip("transformers then asks the Hub for the task.")
    linker.save_pretrained(tmp_path)
    (tmp_path / "pipeline_mimic.py").write_text("raise SystemError('The code of the checkpoint was run.')")
    loaded = linked(**task, model=str(tmp_path), trust_remote_code=trust, entities=kb)
    assert type(loaded) is Linker
    assert type(loaded.model) is MimicModel
    assert type(loaded.processor) is MimicProcessor
    assert [found[0]["entity_id"] for found in loaded(mentions)] == [
        found[0]["entity_id"] for found in linker(mentions)
    ]
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"].keys() == {TASK}


@pytest.mark.parametrize("form", [dict, list, tuple, iter], ids=["one", "list", "tuple", "generator"])
def test_places_that_were_given_hold_for_every_form_of_input(linker, tmp_path, form):
    place = tmp_path / "image.png"
    random_image(1).save(place)
    model, processor = linker.model, linker.processor
    load: Any = pipeline
    careful = load(TASK, model=model, processor=processor, index=linker.index, image_root=False, allow_urls=False)
    for source, message in [(str(place), "no file is read"), ("http://127.0.0.1:9/a.png", "URLs are not read")]:
        mention = {"mention": "Orange", "text": "Orange here.", "image": source}
        inputs = mention if form is dict else form([mention])
        with pytest.raises(MimicImageError, match=message):
            list(careful(inputs))


def test_a_link_is_explained_as_the_pipeline_gives_it(linker, kb, mentions):
    found = linker(mentions[0], top_k=2)
    why = linker.explain(mentions[0], images=kb)
    assert why.entity["entity_id"] == found[0]["entity_id"]
    assert why.explained == pytest.approx(found[0]["score"], abs=1e-3)
    rival = linker.explain(mentions[0], versus=found[0]["entity_id"], images=kb)
    assert rival.entity["entity_id"] == found[1]["entity_id"]
    assert rival.explained == pytest.approx(found[1]["score"] - found[0]["score"], abs=1e-3)
    several = linker.explain(mentions[0], top_k=2)
    assert [one.entity["entity_id"] for one in several] == [one["entity_id"] for one in found]
    assert linker.explain(mentions[0], entity_id="e3", images=kb).entity["entity_id"] == "e3"
    for item, options, message in (
        ({"text": "Orange here."}, {}, "`mention` of a mention is missing"),
        ([mentions[0]], {}, "must be a dict .* got list"),
        (mentions[0], {"top_k": 0}, "`top_k` must be a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            linker.explain(item, **options)


def test_a_long_text_is_explained_where_it_was_read(linker):
    text = "word " * 300 + "Orange here. " + "word " * 300
    start = text.index("Orange")
    mention = {"mention": "Orange", "text": text, "start": start, "end": start + 6}
    why = linker.explain(mention, context_window="mention")
    assert "Orange" in [word.word for word in why.text]
    assert all(text[word.start : word.end] == word.word for word in why.text)
    assert [word.start for word in linker.explain(mention).text][:1] in ([0], [])

"""The handler of Inference Endpoints, under their contract: a directory in, then dicts in and lists out."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub
from published import ROOT, entities_and_mentions, save_linker, tiny_linker
from python_processes import ForkingPython, clean_python
from tiny import random_image

from mimic_el import EntityIndex
from mimic_el.scripts.endpoint_handler import EndpointHandler


@pytest.fixture(scope="module")
def clean(hub: Hub) -> ForkingPython:
    return clean_python(hub)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it is pushed: with its index, named as the default, and the handler."""
    directory = save_linker(tmp_path_factory.mktemp("endpoint"), default_index="index")
    entities, _ = entities_and_mentions(directory.parent / "images")
    model, processor = tiny_linker()
    EntityIndex.build(model, processor, entities, directory / "index", show_progress=False)
    shutil.copy(ROOT / "scripts" / "endpoint_handler.py", directory / "handler.py")
    return directory


def as_base64(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def test_it_answers_where_only_transformers_is_installed(clean: ForkingPython, checkpoint: Path):
    code = """
        import sys
        sys.path.insert(0, path)
        from handler import EndpointHandler
        handler = EndpointHandler(path)
        mention = {"mention": "Orange", "text": "Orange opened a shop.", "image": image}
        one = handler({"inputs": mention, "parameters": {"top_k": 2}})
        several = handler({"inputs": [mention, {"mention": "Apple", "text": "An Apple."}], "parameters": {"top_k": 1}})
        uri = handler({"inputs": {**mention, "image": "data:image/png;base64," + image}, "parameters": {"top_k": 2}})
        result = [one, several, uri]
    """
    one, several, uri = clean.run(code, path=str(checkpoint), image=as_base64(random_image(1)))
    assert [set(found) >= {"entity_id", "name", "score"} for found in one] == [True, True]
    assert [len(entities) for entities in several] == [1, 1]
    assert several[0][0]["entity_id"] == one[0]["entity_id"]
    assert uri == one


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"inputs": "Orange"}, "An input is an object such as"),
        ({}, "An input is an object such as"),
        ({"inputs": {"mention": "a", "text": "a", "image": "/etc/passwd"}}, "no file is read"),
        ({"inputs": {"mention": "a", "text": "a", "image": "photo.png"}}, "no file is read"),
        ({"inputs": {"mention": "a", "text": "a", "image": "http://127.0.0.1/a.png"}}, "URLs are not read"),
        ({"inputs": {"mention": "a", "text": "a", "image": {"path": "/etc/passwd"}}}, "a string of base64"),
        ({"inputs": {"mention": "a", "text": "x" * 200_000}}, "at most 100,000 characters"),
        ({"inputs": [{"mention": "a", "text": "a"}] * 300}, "At most 256 inputs"),
        ({"inputs": {"mention": "a", "text": "a"}, "parameters": [1]}, "`parameters` must be an object"),
        ({"inputs": {"text": "a", "spans": [[0, 1]] * 2000}}, "at most 1,000 `spans`"),
        # A request must not make the server load a model, from wherever, nor start processes.
        (
            {"inputs": {"text": "a"}, "parameters": {"mention_detector": "someone/model"}},
            "No parameter 'mention_detector'",
        ),
        ({"inputs": {"text": "a"}, "parameters": {"reranker": "someone/model"}}, "No parameter 'reranker'"),
        ({"inputs": {"text": "a"}, "parameters": {"num_workers": 64}}, "No parameter 'num_workers'"),
        ({"inputs": {"text": "a"}, "parameters": {"batch_size": 10**9}}, "No parameter 'batch_size'"),
        ({"inputs": {"mention": "a", "text": "a"}, "parameters": {"candidates": 5}}, "`candidates` must be a list"),
        ({"inputs": {"mention": "a", "text": "a", "candidates": 5}}, "`candidates` .* must be a list"),
    ],
)
def test_what_it_does_not_take_is_told(checkpoint: Path, request_: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        EndpointHandler(str(checkpoint))(request_)


def test_an_address_is_read_only_if_asked_for_and_never_a_private_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    request = {"inputs": {"mention": "a", "text": "a", "image": "http://127.0.0.1:9/image.png"}}
    monkeypatch.setenv("MIMIC_ALLOW_URLS", "1")
    with pytest.raises(ValueError, match=r"private|this machine"):
        EndpointHandler(str(checkpoint))(request)

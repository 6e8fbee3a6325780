"""Re-ranking: a callable's scores decide the order; adapters for cross-encoders and for decision pipelines."""

from __future__ import annotations

import string
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_image, tiny_processor
from tiny_clip import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, pipeline

from mimic_el import CrossEncoderReranker, DecisionReranker, MentionError, MultimodalEntityLinkingPipeline
from mimic_el.rerank_mimic import _marked

linked: Any = pipeline
Linker = MultimodalEntityLinkingPipeline
NAMES = ["Orange", "Apple", "Georgia", "Java", "Shell", "Orange", "none of these"]
ENTITIES = [{"id": f"e{row}", "name": name, "description": "thing " * (row % 3)} for row, name in enumerate(NAMES)]
MENTION = {"mention": "Orange", "text": "So Orange opened.", "start": 3, "end": 9}


@pytest.fixture(scope="module")
def linker() -> Linker:
    model = tiny_model(text_max_length=24)
    return linked("multimodal-entity-linking", model=model, processor=tiny_processor(model), entities=ENTITIES)


def backwards(mention: dict[str, Any], entities: list[dict[str, Any]]) -> Any:
    """The worst first."""
    return np.arange(len(entities))


def ids(entities: Sequence[dict[str, Any]]) -> list[str]:
    return [found["entity_id"] for found in entities]


def test_scores_decide_the_order(linker: Linker):
    plain = linker(MENTION, top_k=4)
    found = linker(MENTION, top_k=2, reranker=backwards, rerank_top_k=4)
    assert ids(found) == ids(plain)[::-1][:2]
    assert [entity["rerank_score"] for entity in found] == [3.0, 2.0]
    kept = {entity["entity_id"]: entity for entity in plain}
    for entity in found:
        score = entity.pop("rerank_score")
        assert type(score) is float
        assert entity == kept[entity["entity_id"]], "MIMIC's scores stay"


def test_what_the_reranker_does_not_see_comes_behind(linker: Linker):
    plain = ids(linker(MENTION, top_k=5))
    found = linker(MENTION, top_k=5, reranker=backwards, rerank_top_k=2)
    assert ids(found) == [plain[1], plain[0], *plain[2:]]
    assert [entity["rerank_score"] for entity in found] == [1.0, 0.0, None, None, None]


def test_what_the_reranker_is_given(linker: Linker):
    seen = []

    def reranker(mention: dict[str, Any], entities: list[dict[str, Any]]) -> list[float]:
        seen.append((mention, ids(entities)))
        entities[0]["name"] = "changed"  # its own copy
        return [0.0] * len(entities)

    image = random_image(3)
    found = linker([{"text": MENTION["text"], "image": image}], reranker=reranker, rerank_top_k=3, top_k=3)
    [answer] = found[0]
    assert seen == [({**MENTION, "image": image}, ids(answer["entities"]))]
    assert all(entity["name"] != "changed" for entity in answer["entities"]), "equal scores keep MIMIC's order"
    own = linked(
        "multimodal-entity-linking",
        model=linker.model,
        processor=linker.processor,
        index=linker.index,
        reranker=backwards,
        rerank_top_k=2,
    )
    assert [entity["rerank_score"] for entity in own(MENTION, top_k=2)] == [1.0, 0.0]


def test_it_sees_the_bearers_of_the_name_too(linker: Linker):
    seen = []

    def reranker(mention: dict[str, Any], entities: list[dict[str, Any]]) -> list[float]:
        seen.extend(ids(entities))
        return [float(entity["entity_id"] == "e5") for entity in entities]

    found = linker(MENTION, top_k=1, reranker=reranker, rerank_top_k=2, candidates="names+search")
    assert {"e0", "e5"} <= set(seen)
    assert ids(found) == ["e5"]


def test_no_entities_no_question(linker: Linker):
    assert linker({**MENTION, "candidates": []}, reranker=backwards) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "must give a number for each of the 5 entities, got 1"),
        ([float("nan")] * 5, "must give a number for each"),
        (["x"] * 5, "fails with ValueError"),
        (None, "fails with TypeError"),
    ],
)
def test_rerankers_that_give_nonsense(given: Any, message: str, linker: Linker):
    def reranker(mention: Any, entities: Any) -> Any:
        return given

    with pytest.raises(MentionError, match=f"The re-ranker reranker {message}"):
        linker(MENTION, reranker=reranker, rerank_top_k=5)
    answers = linker([MENTION, MENTION], reranker=reranker, rerank_top_k=5, on_error="return")
    assert [answer["error_type"] for answer in answers] == ["MentionError"] * 2
    with pytest.raises(TypeError, match="`reranker` must be a callable"):
        linker(MENTION, reranker="a-model")
    with pytest.raises(ValueError, match="`rerank_top_k` must be a positive integer"):
        linker(MENTION, reranker=reranker, rerank_top_k=0)


def test_the_marked_text():
    assert _marked(MENTION) == "So **Orange** opened."
    assert _marked({"mention": "Orange", "text": "Nothing."}) == "**Orange**: Nothing."
    text = "x" * 1000 + "Orange" + "y" * 1000
    assert _marked({"text": text, "start": 1000, "end": 1006}) == "x" * 400 + "**Orange**" + "y" * 400


# --- Adapters


class Lengths:
    """In the place of a `CrossEncoder`: the length of both texts."""

    def predict(self, pairs: list[tuple[str, str]], show_progress_bar: bool) -> np.ndarray:
        self.pairs = pairs
        return np.array([len(one) + len(other) for one, other in pairs], dtype=np.float32)


def test_a_cross_encoder(linker: Linker):
    model = Lengths()
    found = linker(MENTION, reranker=CrossEncoderReranker(model), rerank_top_k=7, top_k=7)
    assert {pair[0] for pair in model.pairs} == {"So **Orange** opened."}
    texts = {entity["entity_id"]: f"{entity['name']}: {entity['description']}".removesuffix(": ") for entity in found}
    assert set(texts.values()) == {pair[1] for pair in model.pairs}
    for entity in found:
        assert entity["rerank_score"] == len("So **Orange** opened.") + len(texts[entity["entity_id"]])


def test_a_cross_encoder_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="pip install sentence-transformers"):
        CrossEncoderReranker("some/model")
    library: Any = types.ModuleType("sentence_transformers")
    library.CrossEncoder = lambda name: (name, Lengths())[1]
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    assert isinstance(CrossEncoderReranker("some/model").model, Lengths)


@pytest.fixture(scope="module")
def decide() -> Any:
    """A language model of random weights, which answers with the probability of the options' letters."""
    task: Any = "decision"
    try:
        from transformers.pipelines import decision  # noqa: F401
    except ImportError:
        pytest.skip("this version of transformers has no decision pipeline")
    words = ["[UNK]", *string.ascii_uppercase, "Orange", "Apple", "thing", "**", "So", "opened"]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    torch.manual_seed(0)
    size: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 512}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(words) + 2, bos_token_id=0, eos_token_id=0, **size))
    return linked(task, model=model.eval(), tokenizer=fast)


def test_a_decision_pipeline(linker: Linker, decide: Any):
    """A probability for each entity; what they lack to 1 is that of none of them."""
    requests = []

    def watched(request: dict[str, Any]) -> Any:
        requests.append(request)
        return decide(request)

    found = linker(MENTION, reranker=DecisionReranker(watched), rerank_top_k=7, top_k=7)
    [request] = requests
    assert request["state"] == {"text": "So **Orange** opened."}
    question = request["questions"]["entity"]
    assert question["instructions"] == 'Which of these is meant by "Orange", marked with ** in the text?'
    options = list(question["criteria"])
    assert sorted(options) == sorted([*NAMES[:5], "Orange (2)", "none of these (2)", "none of these"])
    assert options[-1] == "none of these"
    scores = [entity["rerank_score"] for entity in found]
    assert scores == sorted(scores, reverse=True)
    probabilities = decide(request)["entity"]["probabilities"]
    assert sorted(scores) == pytest.approx(sorted(list(probabilities.values())[:-1]))
    assert 1 - sum(scores) == pytest.approx(probabilities["none of these"])


def test_a_decision_model_that_sees_images(linker: Linker, tmp_path: Path):
    """The mention's image and those of the entities go along where the model reads images."""
    random_image(1).save(tmp_path / "e0.png")
    requests = []

    def decide(request: dict[str, Any]) -> Any:
        requests.append(request)
        options = request["questions"]["entity"]["criteria"]
        return {"entity": {"probabilities": dict.fromkeys(options, 1 / len(options))}}

    mention = {**MENTION, "image": random_image(2), "candidates": ["e0", "e1"]}
    images = {"e0": [tmp_path / "e0.png"]}
    linker(mention, reranker=DecisionReranker(decide, images))
    assert "assets" not in requests[0], "it reads no images"

    class Seeing:
        processor = types.SimpleNamespace(image_processor=object())

        def __call__(self, request: dict[str, Any]) -> Any:
            return decide(request)

    reranker = DecisionReranker(Seeing(), images)
    linker(mention, reranker=reranker)
    request = requests[1]
    criteria, assets = request["questions"]["entity"]["criteria"], request["assets"]
    assert request["state"]["image"] in assets
    [shown] = [name for name in assets if name in (criteria["Orange"] or "")]
    assert np.array_equal(np.asarray(assets[shown]), np.asarray(random_image(1)))
    assert np.array_equal(np.asarray(assets[request["state"]["image"]]), np.asarray(random_image(2)))
    assert len(assets) == 2


def test_a_version_without_decisions(monkeypatch: pytest.MonkeyPatch):
    from transformers.pipelines import PIPELINE_REGISTRY

    monkeypatch.setattr(PIPELINE_REGISTRY, "get_supported_tasks", lambda: ["ner"])
    with pytest.raises(ImportError, match=r'no pipeline\("decision"\): update it'):
        DecisionReranker("some/model")

"""The pipeline's answers with probabilities, against the calibration's equations over all scores; what it warns of."""

import warnings
from typing import Any

import numpy as np
import pytest
import tiny
from tiny import CALIBRATION_DEPTH, calibration_of
from tiny_clip import tiny_model

from mimic_el import Calibration, CalibrationError, EntityIndex, MultimodalEntityLinkingPipeline
from mimic_el.answers_mimic import calibration_for, name_fits
from mimic_el.calibration_mimic import NIL_NAME, VERSION

ENTITIES = 45
DEPTH = CALIBRATION_DEPTH


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, EntityIndex, list[dict[str, Any]]]:
    model = tiny_model()
    processor = tiny.tiny_processor(model)
    entities = tiny.knowledge_base(ENTITIES)
    index = EntityIndex.build(model, processor, entities, dtype="float32", show_progress=False)
    return model, processor, index, tiny.mentions_of(entities)[:10]


@pytest.fixture
def linker(parts: Any) -> Any:
    """A pipeline with a calibrated model."""
    model, processor, index, _ = parts
    model.config.calibration = calibration_of(index).to_dict()
    yield MultimodalEntityLinkingPipeline(model=model, processor=processor, index=index)
    model.config.calibration = None


def all_probabilities(parts: Any) -> tuple[list[dict[str, float]], np.ndarray]:
    """Of each mention the probabilities of all entities, by an exhaustive search, and that of NIL."""
    model, processor, index, mentions = parts
    features = tiny.encode_mentions(model, processor, mentions)
    found = index.search(features, top_k=ENTITIES, method="exhaustive")
    fits = name_fits(index, [mention["mention"] for mention in mentions], found.entity_ids)
    calibration = Calibration.from_dict(model.config.calibration)
    said = calibration.probabilities(found.scores[:, :DEPTH], ENTITIES, fits)
    every = said.at(found.scores)
    return [
        dict(zip(ids, row, strict=True)) for ids, row in zip(found.entity_ids, every.tolist(), strict=True)
    ], said.nil


def test_answers_have_the_probabilities_of_the_calibration(linker: Any, parts: Any) -> None:
    mentions = parts[3]
    every, nil = all_probabilities(parts)
    for answers, own, none in zip(linker(mentions, top_k=5), every, nil, strict=True):
        assert len(answers) == 5  # NIL counts
        expected = sorted([*own.values(), none], reverse=True)[:5]
        assert [answer["probability"] for answer in answers] == pytest.approx(expected, rel=1e-4)
        for answer in answers:
            if answer["entity_id"] is None:
                assert answer == {
                    "entity_id": None,
                    "name": NIL_NAME,
                    "score": None,
                    "probability": pytest.approx(none, rel=1e-4),
                }
            else:
                assert answer["probability"] == pytest.approx(own[answer["entity_id"]], rel=1e-4)
                assert answer["score"] == pytest.approx(
                    np.mean([answer["text_score"], answer["image_score"], answer["cross_modal_score"]]), rel=1e-4
                )


def test_probabilities_of_all_answers_add_up_to_one(linker: Any, parts: Any) -> None:
    # Of a search as deep as the knowledge base is large nothing is estimated.
    linker.model.config.calibration = calibration_of(parts[2], depth=64).to_dict()
    for answers in linker(parts[3], top_k=100):
        assert len(answers) == ENTITIES + 1
        assert sum(answer["probability"] for answer in answers) == pytest.approx(1)
    for answers in linker(parts[3], top_k=100, candidates=["e1", "e2", "e3"]):
        assert {answer["entity_id"] for answer in answers} == {"e1", "e2", "e3", None}
        assert sum(answer["probability"] for answer in answers) == pytest.approx(1)


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_candidates_limit_what_is_answered_and_not_how_sure_it_is(linker: Any, parts: Any, count: int) -> None:
    """Given that the answer is a candidate or NIL: a few candidates of one name are no sign of NIL."""
    every, nil = all_probabilities(parts)
    candidates = [f"e{place}" for place in range(count)]
    found = linker(parts[3], candidates=iter(candidates), top_k=20)
    for answers, own, none in zip(found, every, nil, strict=True):
        given = none + sum(own[entity_id] for entity_id in candidates)
        expected = {entity_id: own[entity_id] / given for entity_id in candidates} | {None: none / given}
        said = {answer["entity_id"]: answer["probability"] for answer in answers}
        assert said == pytest.approx(expected, rel=1e-3)
        assert list(said.values()) == sorted(said.values(), reverse=True)


def test_all_entities_as_candidates_change_nothing(linker: Any, parts: Any) -> None:
    ids = list(parts[2])
    for options in ({"top_k": 30}, {"coverage": 0.99}):
        free = linker(parts[3], **options)
        for limited, answers in zip(linker(parts[3], candidates=ids, **options), free, strict=True):
            assert [answer["entity_id"] for answer in limited] == [answer["entity_id"] for answer in answers]
            probabilities = [answer["probability"] for answer in answers]
            assert [answer["probability"] for answer in limited] == pytest.approx(probabilities, rel=1e-3)


def test_candidates_by_name_are_those_of_that_name(linker: Any, parts: Any) -> None:
    mentions = [{**mention, "mention": parts[2].entity(f"e{row}")["name"]} for row, mention in enumerate(parts[3])]
    bearers = [parts[2].find(mention["mention"]) for mention in mentions]
    limited = [{**mention, "candidates": ids} for mention, ids in zip(mentions, bearers, strict=True)]
    assert linker(mentions, candidates="names", top_k=20) == linker(limited, top_k=20)
    both = linker(mentions, candidates="names+search", top_k=2)
    for ids, answers, found in zip(bearers, both, linker(mentions, top_k=50), strict=True):
        known = {answer["entity_id"]: answer["probability"] for answer in found}
        said = {answer["entity_id"]: answer["probability"] for answer in answers}
        assert set(ids[:1]) <= set(said)
        assert next(iter(said)) == next(iter(known))
        assert said == pytest.approx({entity_id: known[entity_id] for entity_id in said}, rel=1e-5)


def test_one_mention_a_list_and_a_generator_have_the_same_answers(linker: Any, parts: Any) -> None:
    mentions = parts[3][:3]
    one_by_one = [linker(mention) for mention in mentions]
    for several in (linker(mentions, batch_size=2), list(linker(mention for mention in mentions))):
        for answers, wanted in zip(several, one_by_one, strict=True):
            assert [answer["entity_id"] for answer in answers] == [answer["entity_id"] for answer in wanted]
            probabilities = [answer["probability"] for answer in wanted]
            assert [answer["probability"] for answer in answers] == pytest.approx(probabilities, abs=1e-5)


@pytest.mark.parametrize("least", [0, 0.05, 0.3, 1])
def test_min_probability_leaves_out_what_is_less_probable(linker: Any, parts: Any, least: float) -> None:
    every, limited = linker(parts[3], top_k=8), linker(parts[3], top_k=8, min_probability=least)
    for answers, kept in zip(every, limited, strict=True):
        assert [a["entity_id"] for a in kept] == [a["entity_id"] for a in answers if a["probability"] >= least]
    assert least < 1 or limited == [[]] * len(limited)


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99])
def test_coverage_gives_all_answers_that_reach_the_threshold(linker: Any, parts: Any, coverage: float) -> None:
    threshold = calibration_of(parts[2]).threshold(coverage)
    every, nil = all_probabilities(parts)
    sizes = []
    for answers, own, none in zip(linker(parts[3], coverage=coverage), every, nil, strict=True):
        expected = {entity_id for entity_id, probability in own.items() if probability >= threshold}
        expected |= {None} if none >= threshold else set()  # type: ignore[arg-type]
        assert {answer["entity_id"] for answer in answers} == expected
        probabilities = [answer["probability"] for answer in answers]
        assert probabilities == sorted(probabilities, reverse=True)
        sizes.append(len(answers))
    assert coverage < 0.99 or max(sizes) > DEPTH + 1  # below the best 16 it was searched, too


def test_all_entities_above_a_score_are_those_of_an_exhaustive_search(parts: Any) -> None:
    model, processor, index, mentions = parts
    features = tiny.encode_mentions(model, processor, mentions)
    every = index.search(features, top_k=ENTITIES, method="exhaustive")
    for place in (0, 1, 20, ENTITIES - 1):
        floors = every.scores[:, place] - 1e-5
        expected = [
            [entity_id for entity_id, score in zip(ids, scores, strict=True) if score >= floor]
            for ids, scores, floor in zip(every.entity_ids, every.scores, floors, strict=True)
        ]
        for method in ("pruned", "exhaustive"):
            found = index.search(features, top_k=ENTITIES, min_score=floors, method=method)
            assert found.entity_ids == expected


def test_documents_have_probabilities_too(linker: Any, parts: Any) -> None:
    (found,) = linker([{"text": "Jaguar 5 here.", "mentions": [{"start": 0, "end": 8}]}])
    assert "probability" in found[0]["entities"][0]


def test_answers_of_a_reranker_have_no_probability(linker: Any, parts: Any) -> None:
    def reranker(mention: Any, entities: Any) -> list[float]:
        return [-float(place) for place in range(len(entities))]

    answers = linker(parts[3][0], reranker=reranker)
    assert all("rerank_score" in answer and "probability" not in answer for answer in answers)
    with pytest.raises(ValueError, match="Leave one of them out"):
        linker(parts[3][0], reranker=reranker, coverage=0.9)


# --- Bad input


def test_model_that_was_not_calibrated(parts: Any) -> None:
    model, processor, index, mentions = parts
    linker: Any = MultimodalEntityLinkingPipeline(model=model, processor=processor, index=index)
    assert linker.calibration is None
    assert all("probability" not in answer for answer in linker(mentions[0]))
    for option in ({"min_probability": 0.5}, {"coverage": 0.9}):
        with pytest.raises(CalibrationError, match=r"was not calibrated\. Calibrate it .*mimic-el calibrate"):
            linker(mentions[0], **option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_probability": 1.5}, "`min_probability` must be a number from 0 to 1"),
        ({"min_probability": -0.1}, "`min_probability`"),
        ({"min_probability": "0.5"}, "`min_probability`"),
        ({"coverage": 0}, "`coverage` must be a number between 0 and 1"),
        ({"coverage": 1}, "`coverage`"),
        ({"coverage": float("nan")}, "`coverage`"),
        ({"coverage": 0.9, "top_k": 3}, "leave `top_k` out"),
    ],
)
def test_bad_options(linker: Any, parts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        # A fault of the call is none of its mentions.
        linker(parts[3], on_error="return", **options)


def test_coverage_for_which_too_few_mentions_were_used(linker: Any, parts: Any) -> None:
    linker.model.config.calibration = calibration_of(parts[2], thresholds=(0.5,) * 80).to_dict()
    with pytest.raises(CalibrationError, match=r"goes up to 0\.8"):
        linker(parts[3][0], coverage=0.9)


def test_newer_calibration_is_told_and_not_used(linker: Any, parts: Any) -> None:
    linker.model.config.calibration = {"version": VERSION + 1}
    with pytest.warns(UserWarning, match="version 2, which this code does not know"):
        answers = linker(parts[3][0])
    assert "probability" not in answers[0]
    with pytest.raises(CalibrationError, match="newer version"):
        linker(parts[3][0], min_probability=0.5)


def test_another_index_is_told_once(linker: Any, parts: Any) -> None:
    model, processor, index, mentions = parts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linker(mentions[:2])
    others = {
        "float32, not int8": EntityIndex.build(
            model, processor, tiny.knowledge_base(ENTITIES), dtype="int8", show_progress=False
        ),
        "it has 20 entities, not 45, and it lacks 1 of 3 entities that the calibration noted": EntityIndex.build(
            model, processor, tiny.knowledge_base(20), dtype="float32", show_progress=False
        ),
    }
    for way, other in others.items():
        linker.index = other
        with pytest.warns(UserWarning, match="not the knowledge base that the model was calibrated with") as caught:
            linker(mentions[0])
        assert any(part in str(caught[0].message) for part in (way, "stored in int8, not float32"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            linker(mentions[0])
    other.add(model, processor, tiny.knowledge_base(12, start=20), show_progress=False)
    with pytest.warns(UserWarning, match="it has 32 entities, not 45"):
        linker(mentions[0])
    assert calibration_for(model.config, index) is not None


def test_the_best_entity_is_explained_where_the_mention_is_thought_to_be_of_none(linker: Any, parts: Any) -> None:
    lines = {"nil": (50.0, -0.5, -0.5), "rest": (0.0, 0.1, 0.2), "sharpness": (2.0, 0.1, 0.1)}
    linker.model.config.calibration = calibration_of(parts[2], lines=lines).to_dict()
    mention = parts[3][0]
    none, *entities = linker(mention, top_k=5)
    best = [entity["entity_id"] for entity in entities]
    assert none["entity_id"] is None
    assert linker.explain(mention).entity["entity_id"] == best[0]
    assert [why.entity["entity_id"] for why in linker.explain(mention, top_k=3)] == best[:3]
    assert linker.explain(mention, versus=best[0]).entity["entity_id"] == best[1]


def test_a_rival_that_is_all_there_is_cannot_be_explained_against(parts: Any) -> None:
    model, processor, _, mentions = parts
    index = EntityIndex.build(model, processor, tiny.knowledge_base(1), dtype="float32", show_progress=False)
    alone: Any = MultimodalEntityLinkingPipeline(model=model, processor=processor, index=index)
    with pytest.raises(ValueError, match="no entity to explain but the rival, 'e0'"):
        alone.explain(mentions[0], versus="e0")

"""Re-ranking: sorts the best entities of a search again, by a model that reads mention and entity together.

A re-ranker is any callable that takes a mention and its best entities and returns a score for each. This file has two
adapters for models of other libraries. Knows answers, but not how they were found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors_mimic import MentionError
from .images_mimic import first_image, load_image
from .mentions_mimic import Mention

# Takes a mention (`mention`, `text`, `start`, `end`, `image`) and its best entities, as the pipeline gives them; gives
# a score for each, the higher the better.
Reranker = Callable[[dict[str, Any], list[dict[str, Any]]], Sequence[float]]

_CHARACTERS_AROUND = 400
_NONE = "none of these"


def reranked(
    reranker: Reranker, mention: Mention, entities: Sequence[dict[str, Any]], rerank_top_k: int, top_k: int
) -> list[dict[str, Any]]:
    """A mention's best entities in the order of a re-ranker's scores, each with its `rerank_score`.

    Args:
        reranker: gives the scores.
        mention: what was linked.
        entities: what a search found, best first.
        rerank_top_k: how many of them the re-ranker sees, where more are wanted; it sees all where not.
        top_k: how many are given. Those that the re-ranker did not see come behind it, with `None` for a score.

    Raises:
        MentionError: if the re-ranker raises, or does not give a number for each.
    """
    seen = list(entities) if top_k <= rerank_top_k else list(entities[:rerank_top_k])
    if not seen:
        return []
    asked = {"mention": mention.mention, "text": mention.text, "start": mention.start, "end": mention.end}
    name = getattr(reranker, "__name__", type(reranker).__name__)
    try:
        given: Any = reranker({**asked, "image": mention.source}, [dict(entity) for entity in seen])
        scores = [float(score) for score in given]
    except Exception as error:
        raise MentionError(f"The re-ranker {name} fails with {type(error).__name__}: {error}") from error
    if len(scores) != len(seen) or not all(map(math.isfinite, scores)):
        raise MentionError(
            f"The re-ranker {name} must give a number for each of the {len(seen)} entities, got {len(scores)}: "
            f"{scores[:5]}."
        )
    order = sorted(range(len(seen)), key=lambda number: -scores[number])
    first = [{**seen[number], "rerank_score": scores[number]} for number in order]
    return [*first, *({**entity, "rerank_score": None} for entity in entities[len(seen) :])][:top_k]


class CrossEncoderReranker:
    """Scores entities with a `CrossEncoder` of sentence-transformers, from texts alone.

    Args:
        model: a `CrossEncoder` or anything with its `predict`, or the name or directory of one, for which
            sentence-transformers must be installed.
        **options: of `predict`, such as `batch_size`.

    Raises:
        ImportError: if sentence-transformers is needed and not installed.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        if not callable(getattr(model, "predict", None)):
            try:
                import sentence_transformers
            except ImportError as error:
                raise ImportError(
                    "A cross-encoder that is given by its name needs sentence-transformers: pip install "
                    "sentence-transformers"
                ) from error
            model = sentence_transformers.CrossEncoder(str(model))
        self.model, self.options = model, {"show_progress_bar": False, **options}

    def __call__(self, mention: Mapping[str, Any], entities: Sequence[Mapping[str, Any]]) -> list[float]:
        query = _marked(mention)
        pairs = [(query, _described(entity)) for entity in entities]
        return [float(score) for score in self.model.predict(pairs, **self.options)]


class DecisionReranker:
    """Scores entities with a "decision" pipeline of transformers: the probability of each among all of them and "none
    of these". What the scores lack to 1 is the probability that none is meant.

    Args:
        decide: `pipeline("decision", ...)`, which newer versions of transformers have, or the name or directory of a
            model for it.
        images: the entities' images, for a model that reads images: a mapping of ids, or a callable that takes an id.
            The mention's image is shown to such a model in any case.
        instructions: the question, with `{mention}` in it.

    Raises:
        ImportError: if a model is named and this version of transformers has no decision pipeline.
    """

    def __init__(
        self,
        decide: Any,
        images: Mapping[str, Any] | Callable[[str], Any] | None = None,
        instructions: str = 'Which of these is meant by "{mention}", marked with ** in the text?',
    ) -> None:
        if not callable(decide):
            decide = _decision_pipeline(str(decide))
        self.decide, self.instructions = decide, instructions
        self.image_of: Callable[[str], Any] = images if callable(images) else (images or {}).get
        self.reads_images = getattr(getattr(decide, "processor", None), "image_processor", None) is not None

    def __call__(self, mention: Mapping[str, Any], entities: Sequence[Mapping[str, Any]]) -> list[float]:
        assets: dict[str, Any] = {}

        def shown(image: Any) -> str | None:
            """What stands for an image in the request; `None` where there is none, or the model reads none."""
            loaded = load_image(first_image(image)) if self.reads_images else None
            if loaded is None:
                return None
            assets[f"\u27e6image {len(assets) + 1}\u27e7"] = loaded
            return next(reversed(assets))

        state = {"text": _marked(mention), "image": shown(mention.get("image"))}
        options: dict[str, Any] = {}
        keys = []
        for entity in entities:
            name, number = entity["name"] or entity["entity_id"], 1
            key = name
            while key in options or key == _NONE:
                number += 1
                key = f"{name} ({number})"
            keys.append(key)
            parts = [entity["description"], shown(self.image_of(entity["entity_id"]))]
            options[key] = " ".join(part for part in parts if part) or None
        options[_NONE] = "Something else is meant."
        question = self.instructions.format(mention=mention["mention"])
        request = {
            "state": {name: value for name, value in state.items() if value},
            "questions": {"entity": {"type": "choice", "instructions": question, "criteria": options}},
        }
        answers = self.decide({**request, "assets": assets} if assets else request)
        probabilities = answers["entity"]["probabilities"]
        return [float(probabilities[key]) for key in keys]


def _decision_pipeline(model: str) -> Any:
    from transformers import pipeline
    from transformers.pipelines import PIPELINE_REGISTRY

    task: Any = "decision"
    if task not in PIPELINE_REGISTRY.get_supported_tasks():
        raise ImportError(
            'This version of transformers has no pipeline("decision"): update it, or give a callable as the re-ranker.'
        )
    return pipeline(task, model=model)


def _marked(mention: Mapping[str, Any]) -> str:
    """The text around a mention, which is marked with **; the mention and its text, where its place is not known."""
    text, start, end = mention["text"], mention.get("start"), mention.get("end")
    if start is None or end is None:
        return f"**{mention['mention']}**: {text[: 2 * _CHARACTERS_AROUND]}"
    before, behind = text[max(0, start - _CHARACTERS_AROUND) : start], text[end : end + _CHARACTERS_AROUND]
    return f"{before}**{text[start:end]}**{behind}"


def _described(entity: Mapping[str, Any]) -> str:
    return f"{entity['name']}: {entity['description']}" if entity["description"] else str(entity["name"])


__all__ = ["CrossEncoderReranker", "DecisionReranker", "Reranker", "reranked"]

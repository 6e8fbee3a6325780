"""MIMIC for multimodal entity linking: the model, its pipeline, its index of entities, and its training.

`__all__` is the public interface. A name is loaded when it is first used, so `import mimic_el` is fast. Importing the
package also makes transformers know the model ("mimic") and the task ("multimodal-entity-linking"): `AutoConfig`,
`AutoModel`, `AutoProcessor` and `pipeline` then load any checkpoint of MIMIC with this package's code, without
`trust_remote_code`. The code in a checkpoint is not run, even if `trust_remote_code` is passed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from .registration import register_with_transformers

if TYPE_CHECKING:
    from .calibration_mimic import Calibration
    from .configuration_mimic import MimicConfig
    from .errors_mimic import (
        CalibrationError,
        EntityIndexError,
        LoadError,
        MentionError,
        MimicError,
        MimicImageError,
        SaveError,
        UnknownEntityError,
    )
    from .explain_mimic import EntityImages, Explainer
    from .explanation_mimic import Explanation
    from .index_mimic import EntityIndex
    from .modeling_mimic import EntityFeatures, MentionFeatures, MimicModel, MimicOutput
    from .pipeline_mimic import MultimodalEntityLinkingPipeline
    from .processing_mimic import MimicProcessor
    from .rerank_mimic import CrossEncoderReranker, DecisionReranker
    from .snapshot_mimic import RankResult, SearchResult
    from .training import (
        KnowledgeBase,
        MentionEntityCollator,
        MimicTrainer,
        MimicTrainingArguments,
        RankedMentions,
        mel_ranking,
        rank_mentions,
    )

# Where each public name is defined.
_HOMES = {
    "calibration_mimic": ["Calibration"],
    "configuration_mimic": ["MimicConfig"],
    "errors_mimic": [
        "CalibrationError",
        "EntityIndexError",
        "LoadError",
        "MentionError",
        "MimicError",
        "MimicImageError",
        "SaveError",
        "UnknownEntityError",
    ],
    "explain_mimic": ["EntityImages", "Explainer"],
    "explanation_mimic": ["Explanation"],
    "index_mimic": ["EntityIndex"],
    "modeling_mimic": ["EntityFeatures", "MentionFeatures", "MimicModel", "MimicOutput"],
    "pipeline_mimic": ["MultimodalEntityLinkingPipeline"],
    "processing_mimic": ["MimicProcessor"],
    "rerank_mimic": ["CrossEncoderReranker", "DecisionReranker"],
    "snapshot_mimic": ["RankResult", "SearchResult"],
    "training": [
        "KnowledgeBase",
        "MentionEntityCollator",
        "MimicTrainer",
        "MimicTrainingArguments",
        "RankedMentions",
        "mel_ranking",
        "rank_mentions",
    ],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("mimic-el")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Calibration",
    "CalibrationError",
    "CrossEncoderReranker",
    "DecisionReranker",
    "EntityFeatures",
    "EntityImages",
    "EntityIndex",
    "EntityIndexError",
    "Explainer",
    "Explanation",
    "KnowledgeBase",
    "LoadError",
    "MentionEntityCollator",
    "MentionError",
    "MentionFeatures",
    "MimicConfig",
    "MimicError",
    "MimicImageError",
    "MimicModel",
    "MimicOutput",
    "MimicProcessor",
    "MimicTrainer",
    "MimicTrainingArguments",
    "MultimodalEntityLinkingPipeline",
    "RankResult",
    "RankedMentions",
    "SaveError",
    "SearchResult",
    "UnknownEntityError",
    "mel_ranking",
    "rank_mentions",
]

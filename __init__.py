"""MIMIC for multimodal entity linking: the model, its pipeline, its index of entities.

What is imported from here is the public interface. Importing the package also makes transformers know the model
("mimic") and the task ("multimodal-entity-linking"), so that `AutoModel` and `pipeline` need no remote code.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_mimic import _PIPELINE_TASK, MimicConfig
from .index_mimic import EntityIndex, EntityIndexError, RankResult, SearchResult, UnknownEntityError
from .modeling_mimic import EntityFeatures, MentionFeatures, MimicModel, MimicOutput
from .pipeline_mimic import MultimodalEntityLinkingPipeline
from .processing_mimic import MimicImageError, MimicProcessor

AutoConfig.register(MimicConfig.model_type, MimicConfig, exist_ok=True)
AutoModel.register(MimicConfig, MimicModel, exist_ok=True)
AutoProcessor.register(MimicConfig, MimicProcessor, exist_ok=True)
if _PIPELINE_TASK not in PIPELINE_REGISTRY.get_supported_tasks():
    PIPELINE_REGISTRY.register_pipeline(
        _PIPELINE_TASK, pipeline_class=MultimodalEntityLinkingPipeline, pt_model=AutoModel, type="multimodal"
    )

__all__ = [
    "EntityFeatures",
    "EntityIndex",
    "EntityIndexError",
    "MentionFeatures",
    "MimicConfig",
    "MimicImageError",
    "MimicModel",
    "MimicOutput",
    "MimicProcessor",
    "MultimodalEntityLinkingPipeline",
    "RankResult",
    "SearchResult",
    "UnknownEntityError",
]

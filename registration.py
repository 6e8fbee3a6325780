"""Makes transformers know the model, its processor and the pipeline's task.

Importing transformers takes seconds that a command such as `mimic-el prepare --help` does not need. So nothing is
imported here: each entry is registered as soon as something else imports the table that it goes into.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def register_with_transformers() -> None:
    """Registers what can be registered now, and the rest when its table is imported."""
    waiting = {}
    for table, register in _TABLES.items():
        if table in sys.modules:
            register()
        else:
            waiting[table] = register
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function for each of some modules after it was imported; finds nothing by itself.

    A table may be imported while other modules of transformers, or ours, are half imported, and what we register needs
    them whole. So the functions wait until the outermost of these imports ends.
    """

    def __init__(self, functions: dict[str, Callable[[], None]]) -> None:
        self.functions = functions
        self.depth = 0
        self.ready: list[Callable[[], None]] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self.functions or not fullname.startswith(("transformers.", f"{__package__}.")):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_call(module: ModuleType) -> None:
            self.depth += 1
            try:
                execute(module)
                if function := self.functions.pop(fullname, None):
                    self.ready.append(function)
                while self.depth == 1 and self.ready:
                    self.ready.pop(0)()
            finally:
                self.depth -= 1

        spec.loader.exec_module = execute_then_call  # type: ignore[method-assign]
        return spec


def _register_config() -> None:
    from transformers import AutoConfig

    from .configuration_mimic import MimicConfig

    AutoConfig.register(MimicConfig.model_type, MimicConfig, exist_ok=True)
    MimicConfig.pipeline_is_installed = True  # by `_register_pipeline`, before anyone can call `pipeline`


def _register_model() -> None:
    from transformers import AutoModel

    from .modeling_mimic import MimicConfig, MimicModel

    AutoModel.register(MimicConfig, MimicModel, exist_ok=True)


def _register_processor() -> None:
    from transformers import AutoProcessor

    from .processing_mimic import MimicConfig, MimicProcessor

    AutoProcessor.register(MimicConfig, MimicProcessor, exist_ok=True)


def _register_pipeline() -> None:
    from transformers import AutoModel
    from transformers.pipelines import PIPELINE_REGISTRY

    from .configuration_mimic import PIPELINE_TASK
    from .pipeline_mimic import MultimodalEntityLinkingPipeline

    if PIPELINE_TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            PIPELINE_TASK, pipeline_class=MultimodalEntityLinkingPipeline, pt_model=AutoModel, type="multimodal"
        )


# The module of each of transformers' tables, and what puts our part into it.
_TABLES = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.models.auto.processing_auto": _register_processor,
    "transformers.pipelines": _register_pipeline,
}

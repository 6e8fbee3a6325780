"""The public gate: names load when they are used, and transformers knows the model however the imports are ordered."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mimic_el

KNOWN = """
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY
import transformers.models.auto.configuration_auto as configurations
import transformers.models.auto.processing_auto as processors
assert "mimic" in configurations.CONFIG_MAPPING
assert mimic_el.MimicConfig in AutoModel._model_mapping
assert mimic_el.MimicConfig in processors.PROCESSOR_MAPPING
assert "multimodal-entity-linking" in PIPELINE_REGISTRY.get_supported_tasks()
"""


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_the_package_loads_nothing_heavy():
    run("import sys, mimic_el; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)")


@pytest.mark.parametrize(
    "imports",
    [
        "import mimic_el; from transformers import AutoConfig",
        "import mimic_el; from transformers import CLIPModel",
        "from transformers import pipeline; import mimic_el",
        "import mimic_el; from mimic_el.index_mimic import EntityIndex",
    ],
)
def test_transformers_knows_the_model(imports: str):
    run(imports + KNOWN)


def test_every_public_name_is_there():
    for name in mimic_el.__all__:
        assert getattr(mimic_el, name) is not None
    assert set(mimic_el.__all__) <= set(dir(mimic_el))
    assert mimic_el.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mimic_el.nothing  # noqa: B018

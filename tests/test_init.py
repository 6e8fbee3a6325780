"""The public gate: names load when they are used, and transformers knows the model however the imports are ordered."""

from __future__ import annotations

import os
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
ORDERS = (
    "import mimic_el; from transformers import AutoConfig",
    "import mimic_el; from transformers import CLIPModel",
    "from transformers import pipeline; import mimic_el",
    "import mimic_el; from mimic_el.index_mimic import EntityIndex",
)
# What transformers takes most of its time for is loaded once; each order is then tried in a fork of that process.
TRIED = """
import os, sys, traceback
import torch, torch._dynamo, torch.distributed.tensor
assert not {"transformers", "mimic_el"} & set(sys.modules)
failed = []
for code in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            exec(code, {})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(code)
sys.exit(failed or 0)
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=240
    )


def test_importing_the_package_loads_nothing_heavy():
    done = run("import sys, mimic_el; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_transformers_knows_the_model():
    done = run(TRIED, *(order + KNOWN for order in ORDERS))
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    for name in mimic_el.__all__:
        assert getattr(mimic_el, name) is not None
    assert set(mimic_el.__all__) <= set(dir(mimic_el))
    assert mimic_el.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mimic_el.nothing  # noqa: B018

"""transformers' own tests, unedited, as they are run on a model: on MIMIC, and on CLIP as the control.

`run.py` beside this file unpacks them, and runs this file once for each; SUITE_SUBJECT says which.
"""

from __future__ import annotations

import functools
import os
import sys
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from mimic_el import MimicConfig, MimicModel, MimicProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the project's own tests
# These are transformers'.
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from tests.test_pipeline_mixin import PipelineTesterMixin
from tests.test_processing_common import ProcessorTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from tiny_clip import tiny_clip_config, tiny_tokenizer

IS_MIMIC = os.environ["SUITE_SUBJECT"] == "mimic"


def small_clip_config() -> CLIPConfig:
    return tiny_clip_config(positions=20)


class ModelTester:
    """What the suites ask for: a small configuration, and inputs for it."""

    batch_size, seq_length = 4, 12
    is_training = True

    def __init__(self, parent: Any) -> None:
        self.parent = parent

    def get_config(self) -> Any:
        if not IS_MIMIC:
            return small_clip_config()
        return MimicConfig(
            small_clip_config(),
            text_max_length=self.seq_length,
            image_hidden_size=10,
            tglu_hidden_size=8,
            vdlu_hidden_size=6,
            cmfu_hidden_size=9,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        inputs = self._side("")
        return self.get_config(), inputs | (self._side("entity_") if IS_MIMIC else {"return_loss": False})

    def _side(self, prefix: str) -> dict[str, Any]:
        size = (self.batch_size, self.seq_length)
        return {
            f"{prefix}input_ids": ids_tensor(size, 500),
            # Padded on the right, as CLIP's tokenizer does it: MIMIC reads what the encoder makes of padding, too, and
            # of a token that may look at none (the first, masked) two ways of attention make different things.
            f"{prefix}attention_mask": (
                torch.arange(self.seq_length) < ids_tensor((self.batch_size, 1), 10) + 2
            ).long(),
            f"{prefix}pixel_values": floats_tensor([self.batch_size, 3, 24, 24]),
        }


class ModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MimicModel if IS_MIMIC else CLIPModel,)
    _is_composite = True
    additional_model_inputs = (
        "pixel_values",
        # Without the mask of entities: the suite makes more rows of it, of random numbers.
        *(("entity_input_ids", "entity_pixel_values") if IS_MIMIC else ()),
    )

    def setUp(self) -> None:
        self.model_tester = ModelTester(self)

    def _prepare_for_class(self, inputs_dict: dict[str, Any], model_class: Any, return_labels: bool = False) -> Any:
        """What the suite's own does for the models that it knows: with labels the model gives a loss."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            inputs |= {"labels": torch.arange(ModelTester.batch_size)} if IS_MIMIC else {"return_loss": True}
        return inputs


_Mimic: Any = MimicModel


class ScoresWithClipsName(_Mimic):
    """MIMIC, whose score is in the output under the name that CLIP has for its own, too."""

    _auto_class = None

    @functools.wraps(MimicModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        return {**output, "logits_per_text": output.logits}


class AttentionTest(ModelTest):
    """The tests that compare ways of computing attention: they know the score by CLIP's name only."""

    all_model_classes = (ScoresWithClipsName if IS_MIMIC else CLIPModel,)


class TrainingTest(TrainingTesterMixin, unittest.TestCase):
    all_model_classes = ModelTest.all_model_classes

    @property
    def model_tester(self) -> Any:
        return ModelTester(self)


class PipelineTest(PipelineTesterMixin, unittest.TestCase):
    all_model_classes = ModelTest.all_model_classes
    pipeline_model_mapping = {  # noqa: RUF012  the suite's way
        "feature-extraction": all_model_classes[0],
        "zero-shot-image-classification": all_model_classes[0],
    }

    def setUp(self) -> None:
        self.model_tester = ModelTester(self)


class ConfigTest(unittest.TestCase):
    def setUp(self) -> None:
        self.model_tester = ModelTester(self)
        values = {"text_max_length": 12} if IS_MIMIC else {"projection_dim": 14}
        common = ["text_max_length", "backbone_config"] if IS_MIMIC else ["projection_dim", "text_config"]
        self.tester = ConfigTester(
            self,
            config_class=MimicConfig if IS_MIMIC else CLIPConfig,
            has_text_modality=False,
            common_properties=common,
            **values,
        )


def _config_test(name: str) -> Any:
    def test(self: ConfigTest) -> None:
        getattr(self.tester, name)()

    return test


for _name in dir(ConfigTester):
    if _name.startswith(("create_and_test_", "check_")):
        setattr(ConfigTest, f"test_{_name}", _config_test(_name))


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MimicProcessor if IS_MIMIC else CLIPProcessor

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return tiny_tokenizer()

    @classmethod
    def _setup_image_processor(cls) -> Any:
        return CLIPImageProcessor()


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)

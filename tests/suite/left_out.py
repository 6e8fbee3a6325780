"""The tests of transformers' suites that are not run here, each with its reason. For CLIP the same are left out."""

from __future__ import annotations

_TWO_ENCODERS = (
    "The model has a text and a vision encoder, whose hidden states and attentions are in the outputs of either; the "
    "whole has none of its own. transformers leaves it out for CLIP, too."
)

# Each key is the name of a test, as `Class.test`; its variant for float16 is meant, too.
LEFT_OUT: dict[str, str] = {
    "ModelTest.test_attention_outputs": _TWO_ENCODERS,
    "ModelTest.test_hidden_states_output": _TWO_ENCODERS,
    "ModelTest.test_retain_grad_hidden_states_attentions": _TWO_ENCODERS,
    "ModelTest.test_keep_in_fp32_modules": (
        "It wants no module in both of two lists. MIMIC's matcher is in both on purpose: quantizers obey one of them, "
        "loading in bfloat16 the other. What the lists are for is tested in tests/test_modeling_mimic.py."
    ),
    "PipelineTest.test_pipeline_zero_shot_image_classification": (
        "It compares the arguments of transformers' own pipeline with a list on the Hub, and no model is in it."
    ),
    "TrainingTest.test_training_overfit": (
        "It is for models whose loss needs `input_ids` and `labels` alone, and asks the configuration for its one "
        "vocabulary."
    ),
}


def reason_for(class_name: str, test: str) -> str | None:
    """Why a test is not run; `None` for one that is."""
    name = f"{class_name}.{test}"
    return next((reason for start, reason in LEFT_OUT.items() if name in (start, f"{start}_fp16")), None)

"""How exact the factored scores are: `python benchmarks/accuracy.py`.

Scores 32 mentions against 96 entities with units of the published sizes and random weights and inputs, in the factored
form of modeling_mimic.py and by the plain transcription of the equations in tests/oracle.py, and prints the largest
difference of each from the transcription in float64, as a Markdown table. In half precision, weights and inputs are
rounded first, and the float64 values are those of the rounded ones.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from mimic_el.configuration_mimic import MimicConfig
from mimic_el.matching_mimic import Matcher, MimicEncoderOutput
from mimic_el.tests import oracle

LOGITS = {"logits": "total", "text_logits": "text", "image_logits": "image", "cross_modal_logits": "cross-modal"}


def random_matcher(config: MimicConfig, scale: float) -> Matcher:
    """Matrices as they are initialized, times `scale`; layer norms and biases that leave no term out."""
    matcher = Matcher(config)
    with torch.no_grad():
        for name, parameter in matcher.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return matcher


def random_side(config: MimicConfig, count: int) -> dict[str, Tensor]:
    """What an encoder could give; every fourth item has no image, so that all its image tokens are nearly alike."""
    backbone: Any = config.backbone_config
    width, length = config.image_hidden_size, config.text_max_length
    patches = (backbone.vision_config.image_size // backbone.vision_config.patch_size) ** 2 + 1
    image_tokens = torch.randn(count, patches, width)
    image_tokens[::4] = image_tokens[:1, :1] + 0.01 * image_tokens[:1]
    return {
        "text_embeds": torch.nn.functional.normalize(torch.randn(count, backbone.projection_dim), dim=-1),
        "text_tokens": torch.randn(count, length, backbone.text_config.hidden_size),
        "image_embeds": torch.randn(count, width),
        "image_tokens": image_tokens,
    }


def differences(
    matcher: Matcher, mention: dict[str, Tensor], entity: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, tuple[float, float, float]]:
    """For each score: its largest size, and the largest errors of the factored and of the plain form."""
    matcher = matcher.to(dtype)
    mention, entity = ({name: t.to(dtype) for name, t in side.items()} for side in (mention, entity))
    weights = {f"matcher.{name}": tensor.detach() for name, tensor in matcher.state_dict().items()}
    mask = torch.ones(1)  # the published model has none
    with torch.inference_mode():
        factored = matcher(
            matcher.mention_features(MimicEncoderOutput(**mention), mask),
            matcher.entity_features(MimicEncoderOutput(**entity), mask),
        )
        plain = oracle.scores(weights, mention, entity)
        weights, mention, entity = ({n: t.double() for n, t in d.items()} for d in (weights, mention, entity))
        exact = oracle.scores(weights, mention, entity)
    return {
        name: (
            exact[name].abs().max().item(),
            (factored[name].double() - exact[name]).abs().max().item(),
            (plain[name].double() - exact[name]).abs().max().item(),
        )
        for name in LOGITS
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--mentions", type=int, default=32)
    parser.add_argument("--entities", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| weights | inputs | score | largest score | error, factored | error, plain |")
    print("| --- | --- | --- | --- | --- | --- |")
    config = MimicConfig()
    for scale in (1, 4):
        torch.manual_seed(arguments.seed)
        state = random_matcher(config, scale).state_dict()
        sides = random_side(config, arguments.mentions), random_side(config, arguments.entities)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            matcher = Matcher(config)
            matcher.load_state_dict(state)
            for name, (size, factored, plain) in differences(matcher, *sides, dtype).items():
                precision = str(dtype).removeprefix("torch.")
                print(
                    f"| initial x {scale} | {precision} | {LOGITS[name]} | {size:.1f} | {factored:.1e} | {plain:.1e} |"
                )


if __name__ == "__main__":
    main()

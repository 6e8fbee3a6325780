"""Ranking answers that are badly ranked, as those of a model at the start of its training: pruned against exhaustive.

    python benchmarks/ranks.py --entities 8192 --mentions 64

Features are random, of the published sizes; answers are random too, so that about half of the entities score above one.
Printed are processor times of both methods in one run, and how many pairs were bounded and scored.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from mimic_el import MimicConfig
from mimic_el.matching_mimic import Matcher, MimicEncoderOutput
from mimic_el.precision_mimic import quantized
from mimic_el.search_mimic import answer_ranks
from mimic_el.store_mimic import Store, make_shard

PART = 512


def encoded(config: MimicConfig, count: int, generator: torch.Generator) -> tuple[MimicEncoderOutput, torch.Tensor]:
    length, patches = config.text_max_length, 50
    shapes = {
        "text_embeds": (config.text_embed_width,),
        "text_tokens": (length, config.text_width),
        "image_embeds": (config.image_hidden_size,),
        "image_tokens": (patches, config.image_hidden_size),
    }
    tensors: Any = {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}
    return MimicEncoderOutput(**tensors), torch.ones(count, length, dtype=torch.bool)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entities", type=int, default=8192)
    parser.add_argument("--mentions", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    config = MimicConfig()
    matcher = Matcher(config).requires_grad_(False).eval()
    shards = []
    for start in range(0, args.entities, PART):
        features = matcher.entity_features(*encoded(config, PART, generator))
        records = [{"id": str(row)} for row in range(start, start + PART)]
        shards.append(make_shard(f"shard-{start}", quantized(features, matcher, torch.float16), records))
    store = Store(shards)
    mentions = matcher.mention_features(*encoded(config, args.mentions, generator))
    answers = torch.randint(len(store), (args.mentions,), generator=generator)
    seconds = {}
    for method in ("exhaustive", "pruned"):
        times = []
        for _ in range(args.repeats):
            start_time = time.process_time()
            _, stats = answer_ranks(matcher, store, mentions, answers, method=method, advance=lambda _: None)
            times.append(time.process_time() - start_time)
        seconds[method] = min(times)
        print(f"{method}: {seconds[method]:.2f} s, {stats}")
    print(f"pruned / exhaustive: {seconds['pruned'] / seconds['exhaustive']:.2f}")


if __name__ == "__main__":
    main()

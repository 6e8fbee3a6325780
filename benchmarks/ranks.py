"""Searching and ranking, pruned against exhaustive, where bounds decide little and where they decide nearly all.

    python benchmarks/ranks.py --entities 8192 --mentions 1 8 64

Features are of the published sizes. "random": all independent, and so are the answers, as with a model at the start of
its training: about half of the entities score above an answer. "grouped": entities are alike in groups, and a mention
is like its answer, as with a trained model: few entities score as much. The methods take turns; printed are the median
of both processor times, the median and the largest of the ratios of neighbors, and how many pairs were bounded and
scored.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mimic_el import MimicConfig
from mimic_el.directory_mimic import SHARD_ENTITIES
from mimic_el.matching_mimic import Matcher, MentionFeatures, MimicEncoderOutput
from mimic_el.pairs_mimic import SearchStats
from mimic_el.precision_mimic import quantized
from mimic_el.search_mimic import answer_ranks, best_entities
from mimic_el.store_mimic import Shard, Store, make_shard

# Entities whose features are drawn at once.
BLOCK = 512
# Entities of a group, and how far they are from its middle, relative to what tells groups apart.
GROUP, NEAR = 64, 0.4
PATCHES = 50


class World:
    """A matcher, entities and mentions of them, whose encoder outputs are drawn.

    Args:
        grouped: whether entities are alike in groups, and mentions like their answers.
    """

    def __init__(self, entities: int, grouped: bool) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.grouped = grouped
        self.config = MimicConfig()
        self.matcher = Matcher(self.config).requires_grad_(False).eval()
        self.shapes = {
            "text_embeds": (self.config.text_embed_width,),
            "text_tokens": (self.config.text_max_length, self.config.text_width),
            "image_embeds": (self.config.image_hidden_size,),
            "image_tokens": (PATCHES, self.config.image_hidden_size),
        }
        self.middles = self._drawn(-(-entities // GROUP)) if grouped else None
        shards = [
            self._shard(range(start, min(start + SHARD_ENTITIES, entities)))
            for start in range(0, entities, SHARD_ENTITIES)
        ]
        self.store = Store(shards)

    def mentions(self, count: int) -> tuple[MentionFeatures, torch.Tensor]:
        """So many mentions, and the rows of their answers."""
        answers = torch.randint(len(self.store), (count,), generator=self.generator)
        return self.matcher.mention_features(*self._encoded(answers)), answers

    def _shard(self, rows: range) -> Shard:
        parts = [
            quantized(self.matcher.entity_features(*self._encoded(some)), self.matcher, torch.float16)
            for some in torch.tensor(rows).split(BLOCK)
        ]
        features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return make_shard(f"shard-{rows.start}", features, [{"id": str(row)} for row in rows])

    def _encoded(self, rows: torch.Tensor) -> tuple[MimicEncoderOutput, torch.Tensor]:
        tensors: Any = self._drawn(len(rows))
        if self.middles is not None:
            middles = self.middles
            tensors = {name: middles[name][rows // GROUP] + NEAR * tensor for name, tensor in tensors.items()}
        return MimicEncoderOutput(**tensors), torch.ones(len(rows), self.config.text_max_length, dtype=torch.bool)

    def _drawn(self, count: int) -> dict[str, torch.Tensor]:
        return {name: torch.randn(count, *shape, generator=self.generator) for name, shape in self.shapes.items()}


@dataclass
class Ranks:
    """The ranks of the answers, by a method."""

    world: World
    mentions: MentionFeatures
    answers: torch.Tensor

    def __call__(self, method: str) -> tuple[torch.Tensor, SearchStats]:
        matcher, store = self.world.matcher, self.world.store
        return answer_ranks(matcher, store, self.mentions, self.answers, method=method, advance=lambda _: None)


@dataclass
class Search:
    """The rows of the best k entities, by a method."""

    world: World
    mentions: MentionFeatures
    k: int

    def __call__(self, method: str) -> tuple[torch.Tensor, SearchStats]:
        found = best_entities(
            self.world.matcher,
            self.world.store,
            self.mentions,
            self.k,
            method=method,
            candidates=[None] * len(self.mentions),
            advance=lambda _: None,
        )
        return found.rows, found.stats


def compare(what: str, ask: Callable[[str], tuple[torch.Tensor, SearchStats]], repeats: int) -> None:
    """Prints the processor times of both methods, which take turns, and makes sure that they answer the same."""
    times: dict[str, list[float]] = {"exhaustive": [], "pruned": []}
    answers: dict[str, torch.Tensor] = {}
    stats: dict[str, SearchStats] = {}
    for turn in range(repeats + 1):
        for method in sorted(times, reverse=turn % 2 == 1):
            start = time.process_time()
            answers[method], stats[method] = ask(method)
            if turn:  # the first of both only warms up
                times[method].append(time.process_time() - start)
    if not torch.equal(answers["pruned"], answers["exhaustive"]):
        raise SystemExit(f"{what}: the methods differ")
    ratios = [pruned / exhaustive for pruned, exhaustive in zip(times["pruned"], times["exhaustive"], strict=True)]
    counts = stats["pruned"]
    print(
        f"{what}: exhaustive {statistics.median(times['exhaustive']):.4f} s, "
        f"pruned {statistics.median(times['pruned']):.4f} s, "
        f"pruned / exhaustive: median {statistics.median(ratios):.3f}, largest {max(ratios):.3f}; "
        f"of {counts.pairs} pairs {counts.hull_pairs} bounded by the hull, {counts.exact_pairs} scored",
        flush=True,
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--entities", type=int, default=8192)
    parser.add_argument("--mentions", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--k", type=int, default=10, help="how many entities are searched for")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="threads of torch; its own default if not given")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for kind in ("random", "grouped"):
        world = World(args.entities, kind == "grouped")
        for count in args.mentions:
            mentions, answers = world.mentions(count)
            compare(f"{kind}, ranks of {count}", Ranks(world, mentions, answers), args.repeats)
            compare(f"{kind}, search for {count}", Search(world, mentions, args.k), args.repeats)


if __name__ == "__main__":
    main()

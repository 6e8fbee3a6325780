"""Searching a knowledge base: certified bounds against exhaustive scoring and against the plain transcription.

    python benchmarks/search.py --data_dir MELBENCH --entities 10000 100000 1000000

For each size: time per mention-entity pair of many mentions and of one, the pairs scored exactly, and whether the top
10 and the ranks are those of exhaustive scoring. The transcription is timed on a part of the pairs, in the same process
and between the others. Sizes above `--encode_at_most` repeat encoded entities with noise added to every vector.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import built_index, machine, mention_features, parser, trained_model
from scoring import encoded, transcribed

from mimic_el import EntityIndex
from mimic_el.index_mimic import _write_json, _write_matcher
from mimic_el.modeling_mimic import EntityFeatures
from mimic_el.store_mimic import _make_shard, _quantised, _write_shard


def enlarged(args: Any, count: int) -> EntityIndex:
    """An index of `count` entities made of a smaller one's, with a tenth of noise."""
    place = args.work_dir / f"index-{count}-{args.dtype}"
    if (place / "index_config.json").exists():
        return EntityIndex.from_pretrained(place)
    small = built_index(args, args.encode_at_most, args.dtype)
    manifest = {**small._manifest, "shards": [], "removed": None}
    generator = torch.Generator().manual_seed(0)
    place.mkdir(parents=True, exist_ok=True)
    made = 0
    while made < count:
        for first in range(0, len(small), 8192):
            rows = slice(first, min(first + 8192, len(small), first + count - made))
            features = small._store.full(rows, torch.device("cpu")).tensors
            for name, tensor in features.items():
                if tensor.dim() > 1 and not name.endswith("stats"):
                    noise = torch.randn(tensor.shape, generator=generator) * tensor.std(dim=0, keepdim=True) * 0.1
                    features[name] = tensor + noise
            stored = _quantised(EntityFeatures(features), small._matcher, getattr(torch, args.dtype))
            records = [{"id": str(made + row), "name": "", "description": ""} for row in range(rows.stop - first)]
            manifest["shards"].append(_write_shard(place, _make_shard(f"shard-{made:09d}", stored, records)))
            made += rows.stop - first
            if made == count:
                break
    manifest["matcher"] = _write_matcher(place, small._matcher)
    _write_json(Path(place) / "index_config.json", manifest)
    return EntityIndex.from_pretrained(place)


def timed(function: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--entities", type=int, nargs="+", default=[10_000, 100_000])
    arguments.add_argument("--mentions", type=int, default=256)
    arguments.add_argument("--check", type=int, default=16, help="mentions compared with exhaustive scoring")
    arguments.add_argument("--encode_at_most", type=int, default=100_000)
    arguments.add_argument("--dtype", default="float16")
    args = arguments.parse_args()
    model, processor, world = trained_model(args)
    indexes = {
        n: built_index(args, n, args.dtype) if n <= args.encode_at_most else enlarged(args, n) for n in args.entities
    }
    mentions, answers = mention_features(model, processor, world, args.mentions)
    _, mention, entity = encoded(args, 512)
    print(f"{machine()}; {args.dtype}\n")
    print(
        "| entities | transcription, us/pair | exhaustive, us/pair | certified, us/pair | ratio | scored exactly |"
        " one mention, ms | top 10 identical | ranks identical | ranks, us/pair |\n" + "|---" * 10 + "|"
    )
    for count, index in indexes.items():
        with torch.inference_mode():
            index.search(mentions[:2], 10)  # reads the files
            plain, _ = timed(lambda: transcribed(model, mention, entity))
            many, found = timed(lambda: index.search(mentions, 10))  # noqa: B023
            again, _ = timed(lambda: transcribed(model, mention, entity))
        one = min(timed(lambda: index.search(mentions[3:4], 10))[0] for _ in range(5))  # noqa: B023
        few = mentions[: args.check]
        slow, exhaustive = timed(lambda: index.search(few, 10, exact="exhaustive"))  # noqa: B023
        known = [a if a in index else next(iter(index))["id"] for a in answers]
        rank_time, ranks = timed(lambda: index.rank(mentions, known))  # noqa: B023
        checked = index.rank(few, known[: args.check], exact="exhaustive")
        same = sum(a == b for a, b in zip(found.entity_ids, exhaustive.entity_ids, strict=False))
        same_ranks = int((ranks.ranks[: args.check] == checked.ranks).sum())
        pairs = len(mentions) * count
        plain = min(plain, again) / (mention.text_embeds.shape[0] * entity.text_embeds.shape[0])
        print(
            f"| {count:,} | {plain * 1e6:.1f} | {slow / len(few) / count * 1e6:.2f} | {many / pairs * 1e6:.3f} | "
            f"{plain / (many / pairs):.0f} | {found.stats.exact_fraction:.3%} | {one * 1e3:.1f} | "
            f"{same} of {len(few)} | {same_ranks} of {len(few)} | {rank_time / pairs * 1e6:.3f} |"
        )
    encode, _ = timed(lambda: mention_features(model, processor, world, 1))
    print(f"\nEncoding one mention with this small encoder, its picture included: {encode * 1e3:.1f} ms")
    print(f"Mean reciprocal rank of {len(answers)} test mentions: {np.mean(1 / ranks.ranks):.3f}")


if __name__ == "__main__":
    main()

"""Searching a knowledge base: certified bounds against exhaustive scoring and against the plain transcription.

    python benchmarks/search.py --data_dir MELBENCH --entities 10000 100000 1000000

For each size: time per mention-entity pair of many mentions and of one, what share of the pairs gets which look, and
whether the top 10 and the ranks are those of exhaustive scoring; how long an index takes to open. The transcription is
timed in the same process, in the blocks that suit it best; and, for comparison, for all of some pairs at once.
`--num_candidates` adds the approximate shortlist of `faiss`, and its recall.

Sizes above `--encode_at_most` are mixtures: each new entity is made of two encoded ones.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from bench_data import built_index, machine, mention_features, parser, trained_model
from index_size import OPEN
from PIL import Image
from scoring import encoded, transcribed
from tqdm.auto import tqdm

from mimic_el import EntityIndex, MimicConfig, MimicModel
from mimic_el.directory_mimic import publish
from mimic_el.modeling_mimic import EntityFeatures
from mimic_el.precision_mimic import quantized
from mimic_el.store_mimic import Store, make_shard, read_shard, write_shard

K = 10


def enlarged(args: Any, count: int) -> EntityIndex:
    """An index of `count` entities: the encoded ones, and mixtures of two of them.

    A mixture is 0.8 of one and 0.6 of the other, each less the mean of all: the spread of every number stays as it is.
    """
    place = args.work_dir / f"index-{count}-{args.dtype}"
    if (place / "index_config.json").exists():
        return EntityIndex.from_pretrained(place)
    small = built_index(args, args.encode_at_most, args.dtype)
    manifest = {**small._contents.manifest, "shards": [], "removed": None}
    generator = torch.Generator().manual_seed(0)
    place.mkdir(parents=True, exist_ok=True)
    some = small._contents.store.full(slice(0, min(8192, len(small))), torch.device("cpu"))
    means = {
        name: tensor.mean(dim=0, keepdim=True) for name, tensor in some.tensors.items() if tensor.dtype != torch.bool
    }
    made = 0
    with tqdm(total=count, desc="Mixing", unit=" entities") as progress:
        while made < count:
            first = made % len(small)
            rows = slice(first, min(first + 8192, len(small), first + count - made))
            features = small._contents.store.full(rows, torch.device("cpu")).tensors
            if made >= len(small):
                other = torch.randint(len(small), (rows.stop - rows.start,), generator=generator)
                others = small._contents.store.full(other, torch.device("cpu")).tensors
                for name, mean in means.items():
                    features[name] = mean + 0.8 * (features[name] - mean) + 0.6 * (others[name] - mean)
            stored = quantized(EntityFeatures(features), small.state.matcher, getattr(torch, args.dtype))
            records = [
                {"id": str(made + row), "name": "", "description": ""}
                if made >= len(small)
                else small._contents.store.record(first + row)
                for row in range(rows.stop - first)
            ]
            manifest["shards"].append(write_shard(place, make_shard(f"shard-{made:09d}", stored, records)))
            made += rows.stop - first
            progress.update(rows.stop - first)
    store = Store([read_shard(place, entry) for entry in manifest["shards"]])
    publish(place, manifest, store, small.state.matcher)
    return EntityIndex.from_pretrained(place)


def timed(function: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def best_of(times: int, function: Any) -> tuple[float, Any]:
    """The least of some times, and the last result: what else the machine does only ever adds."""
    runs = [timed(function) for _ in range(times)]
    return min(run[0] for run in runs), runs[-1][1]


def encoding_time() -> float:
    """Seconds to encode one mention with a model of CLIP ViT-B/32's size; weights make no difference to that."""
    model = MimicModel(MimicConfig()).eval()
    size = model.config.backbone_config.vision_config.image_size
    image = torch.from_numpy(np.asarray(Image.new("RGB", (size, size), "red"), dtype=np.float32) / 255)
    inputs = {
        "input_ids": torch.randint(1, 1000, (1, model.config.text_max_length)),
        "attention_mask": torch.ones(1, model.config.text_max_length, dtype=torch.long),
        "pixel_values": image.permute(2, 0, 1).unsqueeze(0),
    }
    with torch.inference_mode():
        return best_of(5, lambda: model.encode_mentions(**inputs))[0]


def shortlisted(index: EntityIndex, mentions: Any, exact: list[list[str]], one: float, args: Any) -> None:
    """Time and recall of the approximate first stage."""
    build, _ = timed(lambda: index.build_shortlist(show_progress=False))
    print(
        f"\n{len(index):,} entities, faiss first stage, made in {build:.0f} s; certified search of one: {one:.0f} ms\n"
    )
    print(f"| candidates | probes | us/pair | one mention, ms | recall of the exact top {K} | of the top 1 |")
    print("|---" * 6 + "|")
    for count in args.num_candidates:
        for probes in args.nprobe:
            options = {"num_candidates": count, "nprobe": probes}
            many, found = best_of(2, lambda: index.search(mentions, K, **options))  # noqa: B023
            single = np.median([timed(lambda: index.search(mentions[n : n + 1], K, **options))[0] for n in range(8)])  # noqa: B023
            recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found.entity_ids, exact, strict=True)])
            top = np.mean([a[:1] == b[:1] for a, b in zip(found.entity_ids, exact, strict=True)])
            pairs = len(mentions) * len(index)
            print(
                f"| {count} | {probes} | {many / pairs * 1e6:.4f} | {single * 1e3:.1f} | {recall:.1%} | {top:.1%} |",
                flush=True,
            )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--entities", type=int, nargs="+", default=[10_000, 100_000])
    arguments.add_argument("--mentions", type=int, default=256)
    arguments.add_argument("--check", type=int, default=16, help="mentions compared with exhaustive scoring")
    arguments.add_argument("--encode_at_most", type=int, default=100_000)
    arguments.add_argument("--dtype", default="float16")
    arguments.add_argument("--num_candidates", type=int, nargs="*", default=[], help="candidates that it leaves")
    arguments.add_argument("--nprobe", type=int, nargs="*", default=[32], help="lists of its that are looked at")
    args = arguments.parse_args()
    model, processor, world = trained_model(args)
    mentions, answers = mention_features(model, processor, world, args.mentions)
    _, mention, entity = encoded(args, 512)
    print(f"{machine()}; {args.dtype}, {len(mentions)} mentions, the least of 3 times\n")
    print(
        "| entities | transcription, us/pair | all pairs at once, us/pair | exhaustive, us/pair | certified, us/pair |"
        " times faster | image unit | scored exactly | ranks, us/pair | times faster | one mention, ms | opens in, ms |"
        f" opening takes, MB | top {K} identical | ranks identical |\n" + "|---" * 15 + "|"
    )
    for count in args.entities:
        index = built_index(args, count, args.dtype) if count <= args.encode_at_most else enlarged(args, count)
        command = [sys.executable, "-c", OPEN, str(index.directory)]
        opened = [float(x) for x in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]
        known = [row for row, answer in enumerate(answers) if answer in index]
        there, theirs = mentions[torch.tensor(known)], [answers[row] for row in known]
        with torch.inference_mode():
            index.search(mentions[:2], K)  # reads the files
            at_once, _ = best_of(2, lambda: transcribed(model, mention, entity, len(entity.text_embeds)))
            before, _ = best_of(2, lambda: transcribed(model, mention, entity))
            many, found = best_of(3, lambda: index.search(mentions, K))  # noqa: B023
            rank, ranks = best_of(3, lambda: index.rank(there, theirs))  # noqa: B023
            after, _ = best_of(2, lambda: transcribed(model, mention, entity))
        one = float(np.median([timed(lambda: index.search(mentions[n : n + 1], K))[0] for n in range(16)])) * 1e3  # noqa: B023
        few = mentions[: args.check]
        slow, exhaustive = timed(lambda: index.search(few, K, method="exhaustive"))  # noqa: B023
        checked = index.rank(there[: args.check], theirs[: args.check], method="exhaustive")
        same = sum(a == b for a, b in zip(found.entity_ids, exhaustive.entity_ids, strict=False))
        same_ranks = int((ranks.ranks[: args.check] == checked.ranks).sum())
        pairs, ranked = len(mentions) * count, len(known) * count
        few_pairs = len(mention.text_embeds) * len(entity.text_embeds)
        at_once, plain = at_once / few_pairs, min(before, after) / few_pairs
        print(
            f"| {count:,} | {plain * 1e6:.1f} | {at_once * 1e6:.1f} | {slow / len(few) / count * 1e6:.2f} | "
            f"{many / pairs * 1e6:.4f} | {plain * pairs / many:.0f} | {found.stats.image_pairs / 2 / pairs:.1%} | "
            f"{found.stats.exact_fraction:.3%} | {rank / ranked * 1e6:.4f} | {plain * ranked / rank:.0f} | {one:.0f} | "
            f"{opened[0] * 1e3:.0f} | {opened[1]:.0f} | {same} of {len(few)} | {same_ranks} of {len(checked.ranks)} |",
            flush=True,
        )
        if args.num_candidates:
            shortlisted(index, mentions, found.entity_ids, one, args)
    print(f"\nEncoding one mention with a model of CLIP ViT-B/32's size: {encoding_time() * 1e3:.0f} ms")
    print(f"Mean reciprocal rank of the {len(known)} mentions whose entity is there: {np.mean(1 / ranks.ranks):.3f}")


if __name__ == "__main__":
    main()

"""What several processes, batches of any size and an index in parts cost, beside one process and one index.

    python benchmarks/scale.py training     # steps with 1 and 2 processes, and memory against the batch with GradCache
    python benchmarks/scale.py evaluation   # build and ranks with 1 and 2 processes
    python benchmarks/scale.py ray          # one index in a process, and the same in 1, 2 and 4 parts held by actors
    python benchmarks/scale.py accuracy     # what larger batches and hard negatives do on the sample: three seeds
    python benchmarks/scale.py arithmetic   # bytes and machines for 10^7 and 10^8 entities, from the published sizes

Each part prints a Markdown table, which docs/scale.md quotes. Processes are started by torchrun; each has `--threads`
threads.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIZES = [64, 256, 1024, 4096]


def model_of(width: int) -> Any:
    """A model of the published matcher's sizes on a small encoder."""
    from mimic_el import MimicConfig, MimicModel

    text = {"vocab_size": 1000, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 4}
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 4, "image_size": 64}
    common = {"num_attention_heads": 4}
    backbone = {
        "projection_dim": 512,
        "text_config": {**text, **common, "max_position_embeddings": 40, "eos_token_id": 999},
        "vision_config": {**vision, **common, "patch_size": 16},
    }
    torch.manual_seed(0)
    return MimicModel(MimicConfig(backbone))


def batch_of(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    batch: dict[str, torch.Tensor] = {}
    for prefix in ("", "entity_"):
        ids = torch.randint(0, 998, (count, 40), generator=generator)
        ids[:, -1] = 999
        batch[f"{prefix}input_ids"] = ids
        batch[f"{prefix}attention_mask"] = torch.ones_like(ids)
        batch[f"{prefix}pixel_values"] = torch.randn(count, 3, 64, 64, generator=generator)
    return batch | {"labels": torch.arange(count), "entity_labels": torch.arange(count)}


def peak_memory() -> float:
    """MB of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- Training ---------------------------------------------------------------------------------------------------------


def one_step(args: argparse.Namespace) -> None:
    """Run by each process: some steps of a batch that all share."""
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from mimic_el.training.dealing import part_of
    from mimic_el.training.gather import shared_loss, without_unused_parameters
    from mimic_el.training.grad_cache import cached_step

    torch.set_num_threads(args.threads)
    count, index = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    inner = model_of(args.width).train()
    model: Any = inner
    if count > 1:
        dist.init_process_group("gloo")
        without_unused_parameters(inner)
        model = DistributedDataParallel(inner)
    rows = part_of(args.batch, index, count)
    inputs = {name: tensor[rows].clone() for name, tensor in batch_of(args.batch).items()}
    inputs["labels"] -= rows.start
    before = peak_memory()
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        if args.chunk:
            cached_step(model, inner, inputs, args.chunk, torch.Tensor.backward, gather=count > 1)
        elif count > 1:
            encoded = {name: tensor for name, tensor in inputs.items() if not name.endswith("labels")}
            output = model(**encoded, return_scores=False)
            shared_loss(
                inner, output.mention_features, output.entity_features, inputs["labels"], inputs["entity_labels"]
            ).backward()
        else:
            model(**inputs).loss.backward()
        inner.zero_grad()
        seconds.append(time.perf_counter() - start)
    if index == 0:
        print(json.dumps({"seconds": statistics.median(seconds), "mb": peak_memory() - before}), flush=True)


def launched(processes: int, *options: str) -> dict[str, Any]:
    """What the first of some processes prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        raise SystemExit(run.stderr[-3000:])
    return json.loads(run.stdout.strip().splitlines()[-1])


def training(args: argparse.Namespace) -> None:
    common = ["--width", str(args.width), "--threads", str(args.threads), "--steps", str(args.steps)]
    print("| batch | processes | chunk | seconds a step | MB above the inputs, in a process | mentions a second |")
    print("|---" * 6 + "|")
    rows = [(64, 1, 0), (64, 2, 0), (256, 1, 0), (256, 2, 0), (256, 2, 32)]
    rows += [(size, 1, 32) for size in SIZES if size <= args.largest]
    for size, processes, chunk in rows:
        options = ["step", "--batch", str(size), *common]
        if chunk:
            options += ["--chunk", str(chunk)]
        if size >= 1024:
            options[options.index("--steps") + 1] = "1"
        found = launched(processes, *options)
        print(
            f"| {size:,} | {processes} | {chunk or ''} | {found['seconds']:.2f} | {found['mb']:,.0f} |"
            f" {size / found['seconds']:.1f} |",
            flush=True,
        )


# --- Build and evaluation ---------------------------------------------------------------------------------------------


def evaluate(args: argparse.Namespace) -> None:
    """Run by each process: the knowledge base in parts, and the ranks of all mentions."""
    from torch import distributed as dist

    from mimic_el import MentionEntityCollator
    from mimic_el.training import distributed_evaluation as together

    torch.set_num_threads(args.threads)
    count, index = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if count > 1:
        dist.init_process_group("gloo")
    model, processor, entities, mentions = sample(args)
    collator = MentionEntityCollator(processor, entities, random_images=False)
    start = time.perf_counter()
    with together.own_part(
        model, collator, collator.knowledge_base, Path("unused"), dtype="float32", batch_size=32, show_progress=False
    ) as part:
        built = time.perf_counter()
        ranked = together.ranked_by_all(model, collator, part, mentions, batch_size=32)
        done = time.perf_counter()
        assert part is not None
        held = part.bytes_per_entity * len(part)
    if index == 0:
        found = {"build": built - start, "rank": done - built, "mb": held / 1e6, "mrr": ranked.metrics()["mrr"]}
        print(json.dumps(found), flush=True)


def sample(args: argparse.Namespace) -> tuple[Any, Any, list[Any], list[Any]]:
    """A model with random weights, and the sample's entities and mentions, repeated to the numbers that are wanted."""
    import datasets

    from mimic_el import MimicProcessor
    from mimic_el.training.start import train_tokenizer

    folder = Path(__file__).parent.parent / "datasets_scripts" / "sample"
    known = datasets.load_dataset("parquet", data_files=str(folder / "entities" / "*.parquet"), split="train").to_list()
    asked = datasets.load_dataset("parquet", data_files=str(folder / "mentions" / "test*"), split="train").to_list()
    tokenizer = train_tokenizer([record["description"] for record in known], 900)
    tokenizer.model_max_length = 40
    model = model_of(args.width).eval()
    processor = MimicProcessor(MimicProcessor.image_processor_for(model.config.backbone_config), tokenizer)
    entities = [
        {**known[row % len(known)], "id": f"{known[row % len(known)]['id']}" + (f"-{row}" if row >= len(known) else "")}
        for row in range(args.entities)
    ]
    mentions = [asked[row % len(asked)] for row in range(args.mentions)]
    return model, processor, entities, mentions


def evaluation(args: argparse.Namespace) -> None:
    options = ["--width", str(args.width), "--threads", str(args.threads)]
    options += ["--entities", str(args.entities), "--mentions", str(args.mentions)]
    print("| processes | build, s | ranks, s | features in a process, MB | MRR |")
    print("|---" * 5 + "|")
    for processes in (1, 2, 1, 2):
        found = launched(processes, "evaluate", *options)
        print(
            f"| {processes} | {found['build']:.2f} | {found['rank']:.2f} | {found['mb']:.1f} | {found['mrr']:.4f} |",
            flush=True,
        )


# --- Ray --------------------------------------------------------------------------------------------------------------


def ray_parts(args: argparse.Namespace) -> None:
    import ray

    from mimic_el import EntityIndex
    from mimic_el.distributed import RayEntityIndex
    from mimic_el.matching_mimic import EntityFeatures, MimicEncoderOutput

    torch.set_num_threads(args.threads)
    model = model_of(args.width).eval()

    def encoded(count: int, seed: int) -> MimicEncoderOutput:
        """What training makes of mentions and entities: centers that both share, and noise."""
        own, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
        config: Any = model.config
        shapes = {
            "text_embeds": (512,),
            "text_tokens": (40, args.width),
            "image_embeds": (config.image_hidden_size,),
            "image_tokens": (17, config.image_hidden_size),
        }
        tensors = {}
        for name, shape in shapes.items():
            centers = torch.randn(500, *shape, generator=shared)
            noise = torch.randn(count, *shape, generator=own)
            tensors[name] = centers[torch.randint(0, 500, (count,), generator=own)] + 0.3 * noise
        tensors["text_embeds"] = torch.nn.functional.normalize(tensors["text_embeds"], dim=-1)
        return MimicEncoderOutput(**tensors)

    with torch.no_grad():
        mask = torch.ones(args.mentions, 40, dtype=torch.bool)
        mentions = model.matcher.mention_features(encoded(args.mentions, 1), mask)
        pieces = [
            model.matcher.entity_features(encoded(2000, 2 + n), torch.ones(2000, 40, dtype=torch.bool))
            for n in range(max(1, args.entities // 2000))
        ]
    features = EntityFeatures.cat(pieces)
    records = [{"id": f"e{row}", "name": f"E {row}", "description": ""} for row in range(len(features))]

    def seconds(function: Callable[[], Any], times: int) -> float:
        function()
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    with tempfile.TemporaryDirectory() as folder:
        whole = EntityIndex.from_features(features, records, model, dtype="float16")
        whole.save_pretrained(Path(folder) / "whole")
        whole = EntityIndex.from_pretrained(Path(folder) / "whole")
        wanted = whole.search(mentions, 10)
        one, many = seconds(lambda: whole.search(mentions[:1], 10), 15), seconds(lambda: whole.search(mentions, 10), 3)
        exact = wanted.stats.exact_pairs
        print(f"{len(features):,} entities, {args.mentions} mentions, top 10, {whole.bytes_per_entity:,.0f} bytes each")
        print("\n| parts | one mention, ms | mentions a second | pairs scored exactly | same answers |")
        print("|---" * 5 + "|")
        print(f"| no Ray | {1000 * one:.0f} | {args.mentions / many:.0f} | {exact:,} | |", flush=True)
        paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH")]))
        environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(args.threads)}}
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env=environment)
        for count in (1, 2, 4):
            places = []
            for number in range(count):
                rows = slice(number * len(features) // count, (number + 1) * len(features) // count)
                places.append(Path(folder) / f"{count}-{number}")
                part = EntityIndex.from_features(features[rows], records[rows], model, dtype="float16")
                part.save_pretrained(places[-1])
            with RayEntityIndex(places) as index:
                found = index.search(mentions, 10)
                same = found.entity_ids == wanted.entity_ids
                one = seconds(functools.partial(index.search, mentions[:1], 10), 15)
                many = seconds(functools.partial(index.search, mentions, 10), 3)
            print(
                f"| {count} | {1000 * one:.0f} | {args.mentions / many:.0f} | {found.stats.exact_pairs:,} | {same} |",
                flush=True,
            )
        ray.shutdown()


# --- Accuracy ---------------------------------------------------------------------------------------------------------


def accuracy(args: argparse.Namespace) -> None:
    """MRR of the sample's test split after the demo's training, with other batches and with hard negatives."""
    root = Path(__file__).parent.parent
    settings: dict[str, list[str]] = {
        "batch 32": ["--per_device_train_batch_size", "32", "--learning_rate", "1e-3"],
        "batch 128 (published)": [],
        "batch 512 (GradCache)": ["--per_device_train_batch_size", "512", "--cached_batch_size", "128"],
        "batch 128, 1 hard negative": ["--hard_negatives", "1", "--hard_negatives_epochs", "2"],
    }
    for name, options in settings.items():
        if args.only and args.only not in name:
            continue
        found = []
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "mimic_el.train", str(root / "configs" / "sample.yaml")]
                command += ["--output_dir", folder, "--seed", str(seed), "--disable_tqdm", "True", *options]
                command += ["--num_train_epochs", str(args.epochs), "--eval_strategy", "no", "--do_eval", "false"]
                command += ["--no_load_best_model_at_end", "--save_strategy", "no"]
                run = subprocess.run(command, capture_output=True, text=True, check=False)
                if run.returncode:
                    raise SystemExit(run.stderr[-3000:])
                found.append(json.loads((Path(folder) / "test_results.json").read_text())["test_mrr"])
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        shown = " ".join(f"{value:.4f}" for value in found)
        print(f"{name}: MRR {statistics.mean(found):.4f} +- {spread:.4f} ({shown})", flush=True)


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def arithmetic(args: argparse.Namespace) -> None:
    """What follows from the bytes that an index of the published sizes takes for an entity."""
    from mimic_el import EntityIndex, MimicConfig, MimicModel
    from mimic_el.matching_mimic import EntityFeatures, MimicEncoderOutput

    torch.manual_seed(0)
    backbone = {
        "projection_dim": 512,
        "text_config": {"vocab_size": 8, "num_hidden_layers": 1},
        "vision_config": {"num_hidden_layers": 1},
    }
    model = MimicModel(MimicConfig(backbone)).eval()
    encoded = MimicEncoderOutput(
        text_embeds=torch.nn.functional.normalize(torch.randn(8, 512), dim=-1),
        text_tokens=torch.randn(8, 40, 512),
        image_embeds=torch.randn(8, 96),
        image_tokens=torch.randn(8, 50, 96),
    )
    with torch.no_grad():
        features: EntityFeatures = model.matcher.entity_features(encoded, torch.ones(8, 40, dtype=torch.bool))
    records = [{"id": str(row), "name": "", "description": ""} for row in range(8)]
    print("| | bytes an entity | 10^7 entities, and machines of 64 GB | 10^8 entities, and machines of 64 GB |")
    print("|---" * 4 + "|")
    for dtype in ("float32", "float16", "int8"):
        size = EntityIndex.from_features(features, records, model, dtype=dtype).bytes_per_entity
        shown = [f"{size * count / 1e9:,.0f} GB, {-(-size * count // 64e9):.0f}" for count in (10**7, 10**8)]
        print(f"| {dtype} | {size:,.0f} | {' | '.join(shown)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parts = {"training": training, "evaluation": evaluation, "ray": ray_parts, "accuracy": accuracy}
    parts |= {"arithmetic": arithmetic, "step": one_step, "evaluate": evaluate}
    parser.add_argument("part", choices=list(parts), help="step and evaluate are what the processes run")
    parser.add_argument("--width", type=int, default=128, help="of the encoder")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=0)
    parser.add_argument("--largest", type=int, default=4096, help="largest batch of training")
    parser.add_argument("--entities", type=int, default=2000)
    parser.add_argument("--mentions", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--only", help="of accuracy: the settings whose name has this")
    args = parser.parse_args()
    parts[args.part](args)


if __name__ == "__main__":
    main()

"""How fast entities with images are encoded, end to end, beside the loop that a user would write.

    python benchmarks/encoding.py

The loop: CLIPModel and the image processor of transformers, float32, 32 items at a time. Ours: `EntityIndex.build`, in
its default and with each option that makes it faster. The model has the size of CLIP ViT-B/32 and random weights, which
make no difference to time; images are JPEG files of 1 to 2 megapixels, or the rows of a Parquet file. Each way runs in
a process of its own, one after the other, so that its peak memory is its own; the loop is measured again at the end,
which tells how steady the machine was.

Whether bfloat16 changes answers is measured with pretrained weights: benchmarks/real_text.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import machine
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from mimic_el import EntityIndex, MimicConfig, MimicModel, MimicProcessor
from mimic_el.encoding_mimic import in_precision
from mimic_el.training.start import train_tokenizer

SIZES = [(1280, 853), (1600, 1200), (1200, 1200), (1024, 1365)]
WORDS = "orange shop corner river city king album actor island bridge station film".split()  # noqa: SIM905
BUILDS: dict[str, dict[str, Any]] = {
    "float32": {"num_workers": 0},
    "float32, one worker": {"num_workers": 1},
    "bfloat16": {"num_workers": 0, "encoding_dtype": "bfloat16"},
    "bfloat16, one worker": {"num_workers": 1, "encoding_dtype": "bfloat16"},
    "bfloat16, one worker, JPEG reduced": {"num_workers": 1, "encoding_dtype": "bfloat16", "reduce_jpeg": True},
    "bfloat16, one worker, JPEG reduced, from Parquet": {
        "num_workers": 1,
        "encoding_dtype": "bfloat16",
        "reduce_jpeg": True,
        "parquet": True,
    },
}
LOOP = "the loop: CLIPModel, float32"


def entities(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Entities with an image file each, made once: smooth patterns under noise, as photographs compress."""
    place = args.work_dir / "images"
    place.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(0)
    result = []
    for number in range(args.entities):
        path = place / f"{number}.jpg"
        width, height = SIZES[number % len(SIZES)]
        if not path.exists():
            pattern = Image.fromarray(numbers.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            values = np.asarray(pattern.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
            values = values + numbers.normal(0, 8, values.shape).astype(np.float32)
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        words = numbers.choice(WORDS, 12)
        result.append({"id": str(number), "name": words[0], "description": " ".join(words), "images": [str(path)]})
    return result


def parquet(rows: list[dict[str, Any]], args: argparse.Namespace) -> Any:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    place = args.work_dir / f"{len(rows)}.parquet"
    features = Features(
        {"id": Value("string"), "name": Value("string"), "description": Value("string"), "images": List(ImageFeature())}
    )
    if not place.exists():
        given = [
            {**row, "images": [{"bytes": Path(p).read_bytes(), "path": None} for p in row["images"]]} for row in rows
        ]
        Dataset.from_list(given, features=features).to_parquet(str(place))
    return Dataset.from_parquet(str(place), cache_dir=str(args.work_dir / "cache"))


def tokenizer() -> Any:
    return train_tokenizer([" ".join(WORDS)], 600)


def core_seconds() -> float:
    """What this process and its children have used of cores, which other work on the machine hardly changes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def plain_loop(rows: list[dict[str, Any]]) -> tuple[float, float]:
    model = CLIPModel(CLIPConfig()).eval()
    images, texts = CLIPImageProcessorPil(), tokenizer()
    start, before = time.perf_counter(), core_seconds()
    with torch.inference_mode():
        for first in range(0, len(rows), 32):
            batch = rows[first : first + 32]
            pixels = images([Image.open(row["images"][0]).convert("RGB") for row in batch], return_tensors="pt")
            inputs = texts(
                [f"{row['name']} [SEP] {row['description']}" for row in batch],
                padding="max_length",
                truncation=True,
                max_length=40,
                return_tensors="pt",
            )
            model.get_image_features(**pixels)
            model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return time.perf_counter() - start, core_seconds() - before


def built(rows: list[dict[str, Any]], options: dict[str, Any], args: argparse.Namespace) -> tuple[float, float]:
    options = dict(options)
    model = MimicModel(MimicConfig()).eval()
    processor = MimicProcessor(MimicProcessor.image_processor_for(model.config.backbone_config), tokenizer())
    processor.reduce_jpeg = options.pop("reduce_jpeg", False)
    source = parquet(rows, args) if options.pop("parquet", False) else rows
    start, before = time.perf_counter(), core_seconds()
    EntityIndex.build(model, processor, source, batch_size=32, show_progress=False, **options)
    return time.perf_counter() - start, core_seconds() - before


def one_mention() -> dict[str, float]:
    """Milliseconds to encode one mention, the least of some."""
    model = MimicModel(MimicConfig()).eval()
    inputs = {
        "input_ids": torch.randint(1, 1000, (1, 40)),
        "attention_mask": torch.ones(1, 40, dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 224, 224),
    }
    times = {}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)):
        other, runs = in_precision(model, dtype), []
        given = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype or torch.float32)}
        for _ in range(9):
            start = time.perf_counter()
            with torch.inference_mode():
                other.encode_mentions(**given)
            runs.append((time.perf_counter() - start) * 1e3)
        times[name] = min(runs)
    return times


def decoding(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds of a core to read an image, and how far one that is reduced in decoding is from the exact one."""
    processor = MimicProcessor(MimicProcessor.image_processor_for(MimicConfig().backbone_config), tokenizer())
    times: dict[bool, list[float]] = {False: [], True: []}
    off, worst = [], 0
    for row in rows[:16]:
        pixels: dict[bool, Any] = {}
        for reduce in (False, True):
            processor.reduce_jpeg = reduce
            runs = []
            for _ in range(3):
                start = time.process_time()
                pixels[reduce] = processor.resized(row["images"][0])
                runs.append((time.process_time() - start) * 1e3)
            times[reduce].append(min(runs))
        difference = np.abs(pixels[True].astype(int) - pixels[False])
        worst = max(worst, int(difference.max()))
        off.append(float((difference > 1).mean()))
    return {"exact": np.mean(times[False]), "reduced": np.mean(times[True]), "worst": worst, "off": np.mean(off)}


def measured(way: str, args: argparse.Namespace) -> Any:
    """One way, in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--entities", str(args.entities)]
    command += ["--work_dir", str(args.work_dir), "--threads", str(args.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/bench_encoding"))
    parser.add_argument("--entities", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.way == "one":
        print(json.dumps(one_mention()))
        return
    rows = entities(args)
    if args.way == "decoding":
        print(json.dumps(decoding(rows)))
        return
    if args.way:
        seconds, cores = plain_loop(rows) if args.way == LOOP else built(rows, BUILDS[args.way], args)
        memory = (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        )
        print(json.dumps({"rate": len(rows) / seconds, "cores": cores / len(rows) * 1e3, "memory": memory / 1024}))
        return
    parquet(rows, args)
    print(f"{machine()}; {args.entities} entities\n")
    print("| | entities a second | times the loop | ms of a core an entity | peak memory, MB |")
    print("| --- | --- | --- | --- | --- |")
    first: dict[str, float] | None = None
    for way in (LOOP, *BUILDS, LOOP):
        found = measured(way, args)
        first = first or found
        cells = (f"{found['rate']:.1f}", f"{found['rate'] / first['rate']:.1f}", f"{found['cores']:.0f}")
        print(f"| {way} | {' | '.join(cells)} | {found['memory']:,.0f} |", flush=True)
    read = measured("decoding", args)
    print(
        f"\nReading an image: {read['exact']:.1f} ms of a core, {read['reduced']:.1f} ms where it is reduced, then",
        end=" ",
    )
    print(f"{read['off']:.2%} of the values off by more than 1 of 255, {read['worst']} at most.")
    one = measured("one", args)
    print(f"\nOne mention: {one['float32']:.0f} ms in float32, {one['bfloat16']:.0f} ms in bfloat16.")


if __name__ == "__main__":
    main()

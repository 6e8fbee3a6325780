"""How fast entities with images are encoded, end to end, beside the loop that a user would write.

    python benchmarks/encoding.py

The loop: CLIPModel and the image processor of transformers, float32, 32 items at a time. Ours: `EntityIndex.build`, in
its default and with each option that makes it faster. The model has the size of CLIP ViT-B/32 and random weights, which
make no difference to time; images are JPEG files of 1 to 2 megapixels, or the rows of a Parquet file. Each way runs in
a process of its own, one after the other, so that its peak memory is its own; the loop is measured again at the end,
which tells how steady the machine was. `--parts onnx` compares the two encoders with what ONNX Runtime makes of them,
where it is installed.

Whether bfloat16 changes answers is measured with pretrained weights: benchmarks/real_text.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
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

from mimic_el import EntityIndex, MimicConfig, MimicModel, MimicProcessor, MultimodalEntityLinkingPipeline
from mimic_el.encoding_mimic import in_precision
from mimic_el.training.start import train_tokenizer

SIZES = [(1280, 853), (1600, 1200), (1200, 1200), (1024, 1365)]
WORDS = "orange shop corner river city king album actor island bridge station film".split()  # noqa: SIM905
_FAST = {"num_workers": 0, "encoding_dtype": "bfloat16", "fast_resize": True}
BUILDS: dict[str, dict[str, Any]] = {
    "`EntityIndex.build`": {"num_workers": 0},
    "`fast_resize`": {"num_workers": 0, "fast_resize": True},
    "`fast_resize`, compiled": {"num_workers": 0, "fast_resize": True, "compile_encoder": True},
    "bfloat16": {"num_workers": 0, "encoding_dtype": "bfloat16"},
    "bfloat16, `reduce_jpeg`": {"num_workers": 0, "encoding_dtype": "bfloat16", "reduce_jpeg": True},
    "bfloat16, `fast_resize`": _FAST,
    "bfloat16, `fast_resize`, one worker": {**_FAST, "num_workers": 1},
    "bfloat16, `fast_resize`, compiled": {**_FAST, "compile_encoder": True},
    "bfloat16, `fast_resize`, from Parquet": {**_FAST, "parquet": True},
}
LOOP = "the loop: CLIPModel, float32"
BATCH = 32
FIRST = 2 * BATCH
PARTS = ("builds", "images", "mention", "onnx")


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


class _Watched(list[Any]):
    """Entities, and the time and what was used of cores when the first batches were done: what is done once is then
    done, such as copying, hashing or compiling the model."""

    began: tuple[float, float] | None = None

    def __getitem__(self, row: Any) -> Any:
        if row == FIRST:
            self.began = (time.perf_counter(), core_seconds())
        return super().__getitem__(row)


def costs(rows: Any, start: tuple[float, float]) -> dict[str, float]:
    """Of all entities, and of all but the first."""
    end = (time.perf_counter(), core_seconds())
    found = {"rate": len(rows) / (end[0] - start[0]), "cores": (end[1] - start[1]) / len(rows) * 1e3}
    began = getattr(rows, "began", None)
    if began is not None:
        rest = len(rows) - FIRST
        found |= {"steady_rate": rest / (end[0] - began[0]), "steady_cores": (end[1] - began[1]) / rest * 1e3}
    return found


def plain_loop(rows: list[dict[str, Any]]) -> dict[str, float]:
    model = CLIPModel(CLIPConfig()).eval()
    images, texts = CLIPImageProcessorPil(), tokenizer()
    rows = _Watched(rows)
    start = (time.perf_counter(), core_seconds())
    with torch.inference_mode():
        for first in range(0, len(rows), BATCH):
            batch = [rows[number] for number in range(first, min(first + BATCH, len(rows)))]
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
    return costs(rows, start)


def built(rows: list[dict[str, Any]], options: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    options = dict(options)
    model = MimicModel(MimicConfig()).eval()
    processor = MimicProcessor(MimicProcessor.image_processor_for(model.config.backbone_config), tokenizer())
    processor.reduce_jpeg = options.pop("reduce_jpeg", False)
    processor.fast_resize = options.pop("fast_resize", False)
    source: Any = parquet(rows, args) if options.pop("parquet", False) else _Watched(rows)
    start = (time.perf_counter(), core_seconds())
    EntityIndex.build(model, processor, source, batch_size=BATCH, show_progress=False, **options)
    return costs(source, start)


def one_mention(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Milliseconds of one mention with an image file: encoding alone, and the whole call; the least of some.

    The index has 16 entities, so that next to nothing of it is searching.
    """
    model = MimicModel(MimicConfig()).eval()
    processor = MimicProcessor(MimicProcessor.image_processor_for(model.config.backbone_config), tokenizer())
    mention = {"mention": "orange", "sentence": rows[0]["description"], "image": rows[1]["images"][0]}
    inputs = processor.process_mentions([mention["mention"]], [mention["sentence"]], [mention["image"]])
    index = EntityIndex.build(model, processor, rows[:16], show_progress=False)
    times = {}
    for name, dtype, fast in (("float32", None, False), ("bfloat16", torch.bfloat16, False), *_FAST_MENTION):
        # As MimicModel.from_pretrained(name, dtype="bfloat16") makes it.
        other = in_precision(model, dtype)
        processor.fast_resize = fast
        linker = MultimodalEntityLinkingPipeline(model=other, processor=processor, index=index)
        given = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype or torch.float32)}

        def encode(other: MimicModel = other, given: Any = given) -> None:
            with torch.inference_mode():
                other.encode_mentions(**given)

        def link(linker: Any = linker) -> None:
            linker(mention)

        times[name] = [least(encode) * 1e3, least(link) * 1e3]
    return times


_FAST_MENTION = [("bfloat16, `fast_resize`", torch.bfloat16, True)]


def least(function: Any, runs: int = 9, clock: Any = time.perf_counter) -> float:
    """Seconds of a call, the least of some."""
    found = []
    for _ in range(runs):
        start = clock()
        function()
        found.append(clock() - start)
    return min(found)


def decoding(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds of a core to read an image in each way, and how far what comes out is from the exact one: in levels
    of 255, and in the pooled image of a model with random weights, by length, beside what bfloat16 changes there."""
    model = MimicModel(MimicConfig()).eval()
    processor = MimicProcessor(MimicProcessor.image_processor_for(model.config.backbone_config), tokenizer())
    rows, exact, plain, result = rows[:16], None, None, {}

    def pooled(model: MimicModel, resized: list[Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        encoder: Any = model.encoder
        pixels = torch.stack([processor.normalized(image) for image in resized]).to(dtype)
        with torch.inference_mode():
            return encoder.encode_images(pixels, return_dict=True)[0].float()

    def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).mean())

    for way in ({}, {"reduce_jpeg": True}, {"fast_resize": True}, {"reduce_jpeg": True, "fast_resize": True}):
        for name in ("reduce_jpeg", "fast_resize"):
            setattr(processor, name, way.get(name, False))
        paths = [row["images"][0] for row in rows]
        times = [least(lambda path=path: processor.resized(path), 3, time.process_time) for path in paths]
        resized: list[Any] = [processor.resized(path) for path in paths]
        if exact is None or plain is None:
            exact, plain = np.stack(resized).astype(int), pooled(model, resized)
            rounded = pooled(in_precision(model, torch.bfloat16), resized, torch.bfloat16)
            result["bfloat16"] = {"pooled": apart(rounded, plain)}
        off = np.abs(np.stack(resized) - exact)
        result[", ".join(way) or "exact"] = {
            "ms": float(np.mean(times)) * 1e3,
            "any": float((off > 0).mean()),
            "more": float((off > 1).mean()),
            "worst": int(off.max()),
            "pooled": apart(pooled(model, resized), plain),
        }
    return result


class _Tower(torch.nn.Module):
    """One of the two encoders, as ONNX has it."""

    def __init__(self, model: MimicModel, texts: bool) -> None:
        super().__init__()
        self.encoder: Any = model.encoder
        self.texts = texts

    def forward(self, *inputs: torch.Tensor) -> Any:
        encode = self.encoder.encode_texts if self.texts else self.encoder.encode_images
        return encode(*inputs, True, return_dict=True)[:2]


def onnx(args: argparse.Namespace) -> list[str]:
    """Rows of a table: milliseconds of a core for a text and an image, 32 at a time and alone, by torch and by ONNX
    Runtime, and how far the largest of their outputs are from those of torch in float32."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    model = MimicModel(MimicConfig()).eval()
    masks = torch.ones(32, 40, dtype=torch.long)
    texts = {"input_ids": torch.randint(3, 1000, (32, 40)), "attention_mask": masks}
    cells: dict[str, list[str]] = {}
    for kind, inputs in (("text", texts), ("image", {"pixel_values": torch.randn(32, 3, 224, 224)})):
        tower, path = _Tower(model, kind == "text"), args.work_dir / f"{kind}.onnx"
        batch = torch.export.Dim("batch", min=1, max=4096)
        given: dict[str, Any] = {"input_names": list(inputs), "output_names": ["embeds", "tokens"], "dynamo": True}
        shapes = (tuple({0: batch} for _ in inputs),)
        with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
            torch.onnx.export(tower.eval(), tuple(inputs.values()), path, dynamic_shapes=shapes, **given)
        small = path.with_suffix(".int8.onnx")
        quantize_dynamic(path, small, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])
        rounded = _Tower(in_precision(model, torch.bfloat16), kind == "text").eval()
        ways: dict[str, Any] = {"torch, float32": _in_torch(tower), "torch, bfloat16": _in_torch(rounded)}
        for name, file in (("ONNX Runtime, float32", path), ("ONNX Runtime, int8", small)):
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            ways[name] = functools.partial(_in_onnx, session)
        exact = ways["torch, float32"](inputs)
        one = {key: tensor[:1] for key, tensor in inputs.items()}
        for name, run in ways.items():
            times = [least(functools.partial(run, some), 6, time.process_time) for some in (inputs, one)]
            off = max(float((a - b).abs().max()) for a, b in zip(run(inputs), exact, strict=True))
            cells.setdefault(name, []).extend([f"{times[0] / 32 * 1e3:.1f}", f"{times[1] * 1e3:.1f}", f"{off:.1g}"])
    return [f"| {name} | {' | '.join(found)} |" for name, found in cells.items()]


def _in_torch(tower: Any) -> Any:
    dtype = next(tower.parameters()).dtype

    def run(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode():
            moved = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs.values()]
            return [tensor.float() for tensor in tower(*moved)]

    return run


def _in_onnx(session: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in session.run(None, {k: v.numpy() for k, v in inputs.items()})]


def measured(way: str, args: argparse.Namespace) -> Any:
    """One way, in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--entities", str(args.entities)]
    command += ["--work_dir", str(args.work_dir), "--threads", str(args.threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--work_dir", type=Path, default=Path("runs/bench_encoding"))
    parser.add_argument("--entities", type=int, default=384, help="enough that beginning a build hardly counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=["builds", "images", "mention"])
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = entities(args)
    if args.way == "mention":
        print(json.dumps(one_mention(rows)))
    elif args.way == "images":
        print(json.dumps(decoding(rows)))
    elif args.way == "onnx":
        print(json.dumps(onnx(args)))
    elif args.way:
        found = plain_loop(rows) if args.way == LOOP else built(rows, BUILDS[args.way], args)
        used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print(json.dumps({**found, "memory": sum(used) / 1024}))
    else:
        report(rows, args)


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Prints what was asked for, each part in a process of its own."""
    print(f"{machine()}; {args.threads} threads, {args.entities} entities", flush=True)
    if "builds" in args.parts:
        parquet(rows, args)
        print(
            f"\n| | entities a second | without the first {FIRST} | ms of a core an entity | without the first", end=" "
        )
        print(f"{FIRST} | the loop's by it | peak memory, MB |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        loop: dict[str, float] | None = None
        for way in (LOOP, *BUILDS, LOOP):
            found = measured(way, args)
            loop = loop or found
            cells = [f"{found[name]:.1f}" if name in found else "" for name in ("rate", "steady_rate")]
            cells += [f"{found[name]:.0f}" if name in found else "" for name in ("cores", "steady_cores")]
            kind = "steady_cores" if "steady_cores" in found else "cores"
            cells += [f"{loop[kind] / found[kind]:.1f}", f"{found['memory']:,.0f}"]
            print(f"| {way} | {' | '.join(cells)} |", flush=True)
    if "images" in args.parts:
        read = measured("images", args)
        print("\n| an image | ms of a core | values off | by more than 1 | at most | the pooled image off by |")
        print("| --- | --- | --- | --- | --- | --- |")
        rounded = read.pop("bfloat16")
        for way, found in read.items():
            cells = [f"{found['ms']:.1f}", f"{found['any']:.2%}", f"{found['more']:.2%}", str(found["worst"])]
            print(f"| {way} | {' | '.join(cells)} | {found['pooled']:.3%} |")
        print(f"\nIn bfloat16 the pooled image is off by {rounded['pooled']:.3%}.", flush=True)
    if "mention" in args.parts:
        print("\n| one mention, ms | encoding | `linker(mention)` |")
        print("| --- | --- | --- |")
        for way, times in measured("mention", args).items():
            print(f"| {way} | {times[0]:.0f} | {times[1]:.0f} |", flush=True)
    if "onnx" in args.parts:
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            print(f"\nONNX is left out: {', '.join(missing)} not installed.")
            return
        print("\n| ms of a core | a text of 32 | one text | off by | an image of 32 | one image | off by |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        print("\n".join(measured("onnx", args)))


if __name__ == "__main__":
    main()

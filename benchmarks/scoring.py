"""Scoring every pair: the factored form against a straightforward transcription of the published equations.

    python benchmarks/scoring.py --data_dir MELBENCH

Both start from what the encoder gives for the same mentions and entities, and are timed in turn, several times, in one
process: the transcription for all pairs at once, and in blocks of the size that suited it best.

Peak memory of scoring given features is measured in a process of its own for each, for the factored form with 1x, 4x
and 16x as many entities, by looking at what the process holds every 2 ms.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_data import machine, parser, trained_model

from mimic_el.matching_mimic import MimicEncoderOutput
from mimic_el.modeling_mimic import MimicModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import oracle

MENTIONS, ENTITIES = 32, 512


def repeated(encoded: MimicEncoderOutput, times: int) -> MimicEncoderOutput:
    return MimicEncoderOutput(**{name: tensor.repeat_interleave(times, dim=0) for name, tensor in encoded.items()})


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def factored(model: MimicModel, mention: MimicEncoderOutput, entity: MimicEncoderOutput) -> torch.Tensor:
    matcher = model.matcher
    mentions = matcher.mention_features(mention, torch.ones(mention.text_tokens.shape[:2]))
    entities = matcher.entity_features(entity, torch.ones(entity.text_tokens.shape[:2]))
    return model.score(mentions, entities).logits


def transcribed(
    model: MimicModel, mention: MimicEncoderOutput, entity: MimicEncoderOutput, at_once: int = 64
) -> torch.Tensor:
    """The plain scores. 64 entities at a time were the fastest; fewer and more of them were slower."""
    weights = dict(model.state_dict())
    blocks = [
        oracle.scores(weights, mention, {n: tensor[start : start + at_once] for n, tensor in entity.items()})["logits"]
        for start in range(0, len(entity.text_embeds), at_once)
    ]
    return torch.cat(blocks, dim=1)


def encoded(args: Any, entities: int) -> tuple[MimicModel, MimicEncoderOutput, MimicEncoderOutput]:
    model, processor, world = trained_model(args)
    with torch.inference_mode():
        mention = model.encode(**world.mention_inputs(processor, world.test[:MENTIONS]))
        parts = world.test[:ENTITIES]
        entity = model.encode(**world.entity_inputs(processor, parts))
    return model, mention, repeated(entity, entities // ENTITIES)


def peak_growth(args: Any, form: str, entities: int) -> None:
    """Prints by how much scoring raises what this process holds in memory, its result included, in MB."""
    model, mention, entity = encoded(args, entities)
    with torch.inference_mode():
        mentions = model.matcher.mention_features(mention, torch.ones(mention.text_tokens.shape[:2]))
        features = model.matcher.entity_features(entity, torch.ones(entity.text_tokens.shape[:2]))

        def function(count: int, most: int) -> object:
            if form == "factored":
                return model.score(mentions[:count], features[:most]).logits
            some = MimicEncoderOutput(**{name: tensor[:count] for name, tensor in mention.items()})
            return transcribed(model, some, MimicEncoderOutput(**{n: tensor[:most] for n, tensor in entity.items()}))

        function(1, 1)  # loads what it needs
        before, peak, done = resident(), 0, threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.002):
                peak = max(peak, resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        function(MENTIONS, entities)
        done.set()
        watcher.join()
    print((peak - before) / 2**20)


def resident() -> int:
    """Bytes of memory that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--peak", nargs=2, metavar=("FORM", "ENTITIES"), help="used by the benchmark itself")
    args = arguments.parse_args()
    if args.peak:
        peak_growth(args, args.peak[0], int(args.peak[1]))
        return
    model, mention, entity = encoded(args, ENTITIES)
    pairs = MENTIONS * ENTITIES
    forms = {
        "transcription, all pairs at once": lambda: transcribed(model, mention, entity, ENTITIES),
        "transcription, 64 entities at a time": lambda: transcribed(model, mention, entity),
        "factored": lambda: factored(model, mention, entity),
    }
    with torch.inference_mode():
        scores = {name: form() for name, form in forms.items()}
        runs = [{name: seconds(form) for name, form in forms.items()} for _ in range(args.repeats)]
    best = {name: min(run[name] for run in runs) for name in forms}
    print(f"{machine()}\n{MENTIONS} mentions x {ENTITIES} entities, best of {args.repeats}\n")
    print("| form | microseconds per pair | factored is faster by |\n|---|---|---|")
    for name, value in best.items():
        print(f"| {name} | {value / pairs * 1e6:.2f} | {value / best['factored']:.1f} |")
    difference = (scores["factored"] - scores["transcription, all pairs at once"]).abs()
    print(
        f"\nLargest difference of scores: {float(difference.max()):.1e} (scores up to "
        f"{float(scores['factored'].abs().max()):.1f})\n"
    )
    print("| form | entities | peak memory of scoring, MB |\n|---|---|---|")
    for form, count in (("transcription", 512), ("factored", 512), ("factored", 2048), ("factored", 8192)):
        command = [sys.executable, *sys.argv, "--peak", form, str(count)]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"| {form} | {count} | {float(result.stdout.strip().splitlines()[-1]):.0f} |")


if __name__ == "__main__":
    main()

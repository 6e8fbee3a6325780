"""One pipeline and many threads: the time of the same calls made by so many threads at once, and one after the other.

Each call is one mention, every second with an image. Both ways take turns in one run, and so does a third: the threads
without the turns that the pipeline gives them, which is what computing at the same time would cost. Weights are random;
`--size` "small" is an encoder of two layers, "published" CLIP ViT-B/32's. `--threads` are torch's own, as many as the
machine has cores if they are not given.

python benchmarks/serving_threads.py --size small --callers 16 --calls 64
python benchmarks/serving_threads.py --size published --callers 8 --calls 8 --rounds 3 --threads 1
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from bench_data import World, drawn, machine, new_model, read_records
from PIL import Image

from mimic_el import (
    EntityIndex,
    MimicConfig,
    MimicModel,
    MimicProcessor,
    MultimodalEntityLinkingPipeline,
    turns_mimic,
)
from mimic_el.matching_mimic import EntityFeatures, MimicEncoderOutput


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=["small", "published"], default="small")
    parser.add_argument("--entities", type=int, default=4000)
    parser.add_argument("--callers", type=int, default=16, help="threads that call the pipeline")
    parser.add_argument("--calls", type=int, default=64, help="calls in all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of torch")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    world = World(read_records(None))
    linker = pipeline_of(args.size, world, args.entities)
    mentions = [
        {"mention": mention, "text": sentence, "image": photo(entity, world) if number % 2 else None}
        for number, (entity, _, mention, sentence) in enumerate((world.train * 9)[: args.calls])
    ]
    right = [linker(mention, top_k=5) for mention in mentions]
    ways: dict[str, Callable[[], Any]] = {
        "one after the other": lambda: [linker(mention, top_k=5) for mention in mentions],
        f"{args.callers} threads": lambda: at_once(linker, mentions, args.callers),
        f"{args.callers} threads, without turns": lambda: without_turns(linker, mentions, args.callers),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, answer in ways.items():
            start = time.perf_counter()
            found = answer()
            seconds[name].append(time.perf_counter() - start)
            ids = [[[one["entity_id"] for one in entities] for entities in some] for some in (found, right)]
            assert ids[0] == ids[1], f"{name}: other answers"
    print(f"{machine()}; {args.size} encoder, {args.entities:,} entities, {args.calls} calls, {args.rounds} rounds")
    alone = np.median(seconds["one after the other"])
    for name, taken in seconds.items():
        ratio = np.median(taken) / alone
        print(f"{name}: {np.median(taken) * 1e3 / args.calls:.1f} ms a call, {ratio:.2f} times one after the other")


def pipeline_of(size: str, world: World, entities: int) -> Any:
    model, processor = new_model([record[3] for record in world.train])
    if size == "published":
        backbone = MimicConfig().backbone_config
        text: Any = backbone.text_config
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(text, name, getattr(processor.tokenizer, name))
        model = MimicModel(MimicConfig(backbone_config=backbone.to_dict()))
        images = MimicProcessor.image_processor_for(model.config.backbone_config)
        processor = MimicProcessor(images, processor.tokenizer)
    return MultimodalEntityLinkingPipeline(model=model.eval(), processor=processor, index=index_of(model, entities))


def index_of(model: MimicModel, count: int) -> EntityIndex:
    """An index of entities that no encoder has seen: groups of alike ones, as a knowledge base has them."""
    generator, config = torch.Generator().manual_seed(0), model.config
    widths = {"text_embeds": config.text_embed_width, "image_embeds": config.image_hidden_size}
    tokens = {"text_tokens": (40, config.text_width), "image_tokens": (50, config.image_hidden_size)}
    parts = []
    for start in range(0, count, 1000):
        size = min(1000, count - start)
        encoded = {name: torch.randn(size, width, generator=generator) for name, width in widths.items()}
        encoded |= {name: torch.randn(size, *shape, generator=generator) for name, shape in tokens.items()}
        encoded["text_embeds"] = torch.nn.functional.normalize(encoded["text_embeds"], dim=-1)
        with torch.inference_mode():
            parts.append(model.matcher.entity_features(MimicEncoderOutput(**encoded), torch.ones(size, 40)))
    records = [{"id": f"e{row}", "name": f"E {row}", "description": ""} for row in range(count)]
    return EntityIndex.from_features(EntityFeatures.cat(parts), records, model, dtype="float16")


def photo(entity: str, world: World) -> Image.Image:
    """An image of the size of a photograph on a page."""
    return drawn(entity, 60, world.numbers).resize((640, 480))


def at_once(linker: Any, mentions: Sequence[dict[str, Any]], callers: int) -> list[Any]:
    answers: list[Any] = [None] * len(mentions)

    def call(number: int) -> None:
        for place in range(number, len(mentions), callers):
            answers[place] = linker(mentions[place], top_k=5)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def without_turns(linker: Any, mentions: Sequence[dict[str, Any]], callers: int) -> list[Any]:
    places = turns_mimic._places
    turns_mimic._places = lambda model: callers
    try:
        return at_once(linker, mentions, callers)
    finally:
        turns_mimic._places = places


if __name__ == "__main__":
    main()

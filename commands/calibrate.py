"""`mimic-el calibrate`: learns how sure a model's answers are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .inputs import CommandError, load_model, read_mentions
from .options import BatchOption, DeviceOption, ModelOption, path_of_option


def calibrate_(
    model: ModelOption,
    mentions: Annotated[
        str,
        typer.Option(
            "--mentions",
            help="Mentions with known answers, which the model was not trained on: JSON Lines with mention, text, "
            "answer (null where the entity is not in the knowledge base) and optionally image; or a data set (a "
            "directory or a Hub id).",
        ),
    ],
    split: Annotated[
        str, typer.Option("--split", help="The split to use, if the mentions are a data set.")
    ] = "validation",
    index: Annotated[
        str | None,
        typer.Option("--index", help="The knowledge base: an index (default: the one the model names)."),
    ] = None,
    nil_rate: Annotated[
        float | None,
        typer.Option(
            "--nil_rate",
            help="Share of mentions to expect whose entity is not in the knowledge base (default: as in --mentions).",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random choices.")] = 0,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output_dir",
            parser=path_of_option,
            metavar="PATH",
            help="Where the calibrated model is saved (default: the model's directory).",
        ),
    ] = None,
    batch_size: BatchOption = 32,
    device: DeviceOption = None,
) -> None:
    """Learn how sure answers are, from mentions with known answers. The model's answers then have probabilities."""
    if output_dir is None and not Path(model).is_dir():
        raise CommandError(f"{model} is not a directory: say with --output_dir where the calibrated model is saved.")
    from ..pipeline_mimic import MultimodalEntityLinkingPipeline
    from ..training.calibration import calibrate

    loaded, processor = load_model(model, device)
    linker = MultimodalEntityLinkingPipeline(model=loaded, processor=processor, device=loaded.device, index=index)
    calibration = calibrate(
        loaded,
        linker.index,
        read_mentions(mentions, split),
        processor=processor,
        nil_rate=nil_rate,
        seed=seed,
        batch_size=batch_size,
    )
    if output_dir is not None:
        loaded.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
    else:
        _write_calibration(Path(model) / "config.json", calibration.to_dict())
    typer.echo(json.dumps(calibration.measured, indent=1))


def _write_calibration(path: Path, block: dict[str, Any]) -> None:
    """Puts a calibration into a config.json, and leaves the rest of it as it is."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["calibration"] = block
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


__all__ = ["calibrate_"]

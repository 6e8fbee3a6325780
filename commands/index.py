"""`mimic-el index`: builds, shows and checks indexes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors_mimic import MimicError
from .inputs import CommandError, image_places, load_model, one_line, read_entities
from .options import (
    AllowUrls,
    AllowUrlsOption,
    BatchOption,
    DeviceOption,
    Dtype,
    EncodingDtype,
    ImageRootOption,
    ModelOption,
    OnImageError,
    path_of_option,
)

index_app = typer.Typer(
    help="Build an index of a knowledge base, show or check one.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@index_app.command("build")
def build(
    model: ModelOption,
    entities: Annotated[
        str,
        typer.Option(
            "--entities",
            help="A data set with the configuration `entities` (a directory or a Hub id), or JSON Lines or CSV with "
            "id, name, description and images (paths as seen from the file, and in its folder unless --image_root says "
            "another; in CSV separated by |).",
        ),
    ],
    output_dir: Annotated[
        Path, typer.Option("--output_dir", parser=path_of_option, metavar="PATH", help="Where the index is written.")
    ],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="What features are stored in.")] = Dtype.FLOAT16,
    batch_size: BatchOption = 64,
    num_workers: Annotated[
        int | None,
        typer.Option(
            "--num_workers",
            min=0,
            help="Extra processes that read images (default: up to 4 if there are many entities).",
        ),
    ] = None,
    on_image_error: Annotated[
        OnImageError, typer.Option("--on_image_error", help="Go on without an image that cannot be read, or stop.")
    ] = OnImageError.WARN,
    encoding_dtype: Annotated[
        EncodingDtype | None,
        typer.Option(
            "--encoding_dtype",
            help="What the encoder computes in (default: as the weights); auto is bfloat16 if the machine has it.",
        ),
    ] = None,
    compile_encoder: Annotated[
        bool, typer.Option("--compile", help="Compile the encoder first; pays for thousands of entities.")
    ] = False,
    fast_resize: Annotated[
        bool,
        typer.Option("--fast_resize", help="Shrink images by torch: faster, and off by 1 of 255 levels in places."),
    ] = False,
    image_root: ImageRootOption = None,
    allow_urls: AllowUrlsOption = AllowUrls.NONE,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index that is there, once the new one is complete.")
    ] = False,
    device: DeviceOption = None,
) -> None:
    """Encode a knowledge base. To go on after an interruption, run the same command again. With several GPUs, start
    `torchrun --nproc-per-node N -m mimic_el.cli index build ...`: each encodes a part."""
    rows = read_entities(entities)

    from ..index_mimic import EntityIndex
    from ..parts_mimic import process_of_launch

    loaded, processor = load_model(model, device)
    processor.fast_resize |= fast_resize
    try:
        index = EntityIndex.build(
            loaded,
            processor,
            rows,
            output_dir,
            dtype=dtype.value,
            batch_size=batch_size,
            num_workers=num_workers,
            on_image_error=on_image_error.value,
            overwrite=overwrite,
            encoding_dtype=encoding_dtype.value if encoding_dtype else None,
            compile_encoder=compile_encoder,
            **image_places(entities, image_root, allow_urls),
        )
    except ValueError as error:
        if isinstance(error, MimicError):
            raise
        raise CommandError(one_line(error)) from error
    launched = process_of_launch()
    if launched is None or launched[0] == 0:
        typer.echo(f"Wrote {len(index):,} entities to {output_dir}.")


@index_app.command("info")
def info(index: Annotated[str, typer.Argument(help="An index: a directory or a Hub id.")]) -> None:
    """Show what is in an index, as JSON."""
    from ..index_mimic import EntityIndex

    opened = EntityIndex.from_pretrained(index)
    facts = {
        "entities": len(opened),
        "dtype": opened.dtype,
        "bytes_per_entity": round(opened.bytes_per_entity),
        "directory": str(opened.directory),
    }
    typer.echo(json.dumps(facts, indent=1))


@index_app.command("verify")
def verify(index: Annotated[str, typer.Argument(help="An index: a directory or a Hub id.")]) -> None:
    """Check every file of an index. Files are compared with the checksums that were taken when they were written."""
    from ..index_mimic import EntityIndex

    opened = EntityIndex.from_pretrained(index)
    opened.verify()
    typer.echo(f"{index} is whole: {len(opened):,} entities.")


__all__ = ["index_app"]

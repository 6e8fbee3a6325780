"""Options that several commands share, and the values that they may have."""

from __future__ import annotations

import argparse
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..console import given_path


def path_of_option(text: str) -> Path:
    """The path that an option names."""
    try:
        return given_path(text)
    except argparse.ArgumentTypeError as error:
        raise typer.BadParameter(str(error)) from error


class Method(str, Enum):  # noqa: UP042 - typer shows a StrEnum's values as it does these
    """How an index is searched; both find the same entities."""

    PRUNED = "pruned"
    EXHAUSTIVE = "exhaustive"


class EncodingDtype(str, Enum):  # noqa: UP042
    """What the encoder computes in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Dtype(str, Enum):  # noqa: UP042
    """What the features of an index are stored in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"


class AllowUrls(str, Enum):  # noqa: UP042
    """Which addresses are read."""

    NONE = "none"
    PUBLIC = "public"
    PRIVATE = "private"

    @property
    def switch(self) -> bool | str:
        """The same as `EntityIndex.build` takes it."""
        return {"none": False, "public": True}.get(self.value, self.value)


class OnImageError(str, Enum):  # noqa: UP042
    """What to do with an image that cannot be read."""

    WARN = "warn"
    RAISE = "raise"


class OnError(str, Enum):  # noqa: UP042
    """What to do with a line that cannot be linked."""

    RAISE = "raise"
    WARN = "warn"
    RETURN = "return"


class Window(str, Enum):  # noqa: UP042
    """Which part of a long text is read."""

    START = "start"
    MENTION = "mention"


class ByName(str, Enum):  # noqa: UP042
    """Candidates that are found by the mention's name."""

    NAMES = "names"
    BOTH = "names+search"


ModelOption = Annotated[str, typer.Option("--model", help="A MIMIC checkpoint: a directory or a Hub id.")]
IndexOption = Annotated[
    str | None, typer.Option("--index", help="An index: a directory or a Hub id (default: the one the model names).")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda:0, ... (default: an accelerator if there is one)")
]
ImageRootOption = Annotated[
    str | None,
    typer.Option(
        "--image_root",
        help="The folder that the image files of entities must be in (default: the folder of the table; none for a "
        "data set, which holds its images).",
    ),
]
AllowUrlsOption = Annotated[
    AllowUrls, typer.Option("--allow_urls", help="Which addresses are read, where entities name their images by one.")
]
BatchOption = Annotated[int, typer.Option("--batch_size", min=1, help="Mentions or entities encoded at a time.")]

"""`mimic-el demo`: opens the page in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .inputs import CommandError
from .options import IndexOption


def demo(
    model: Annotated[
        str | None, typer.Option("--model", help="A MIMIC checkpoint with an index: a directory or a Hub id.")
    ] = None,
    index: IndexOption = None,
    entities: Annotated[
        str | None,
        typer.Option("--entities", help="A data set with the entities' images, to show them: a directory or a Hub id."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A file of settings such as space/config.yaml; options override it.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to serve at; 0.0.0.0 lets other machines in.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option("--port", help="The port (default: the first free one from 7860).")
    ] = None,
    mcp: Annotated[bool, typer.Option("--mcp", help="Serve the same functions to agents, as an MCP server.")] = False,
) -> None:
    """Open a page in the browser. Type a text, add an image, and see the entities and why they were found."""
    try:
        from ..space.app import launch
    except ImportError as error:
        raise CommandError(f'The page needs Gradio ({error}). Install it: pip install "mimic-el[space]"') from error
    from ..space.linking import Settings

    names = {"model": model, "index": index, "entities": entities}
    if config is not None:
        settings = Settings.read(config, **names)
    elif model is not None:
        settings = Settings(**{name: value for name, value in names.items() if value is not None})  # type: ignore[arg-type]
    else:
        raise CommandError("Name a model to link with: --model DIRECTORY_OR_HUB_ID, or a file of settings: --config.")
    launch(settings, server_name=host, server_port=port, mcp_server=mcp)


__all__ = ["demo"]

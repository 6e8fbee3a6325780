"""The console command `mimic-el`: one command for what a user of the installed package does.

Each subcommand imports what it needs only when it runs, so that `--help` is fast. `train`, `prepare`, `convert`, `push`
and `sample` are programs of their own: they get their arguments as they are.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .commands.calibrate import calibrate_
from .commands.demo import demo
from .commands.index import index_app
from .commands.inputs import CommandError, one_line, read_entities, read_mentions
from .commands.link import link
from .console import harmless, tolerate_any_text
from .errors_mimic import MimicError

app = typer.Typer(
    name="mimic-el",
    help="Multimodal entity linking with MIMIC: which entity of a knowledge base does a mention mean?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(index_app, name="index")
app.command()(link)
app.command("calibrate")(calibrate_)
app.command()(demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        from mimic_el import __version__

        typer.echo(f"mimic-el {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


# --- Programs of their own --------------------------------------------------------------------------------------------

_PROGRAMS = {
    "train": ("mimic_el.train", "Train and evaluate a model."),
    "prepare": (
        "mimic_el.datasets_scripts.prepare",
        "Make a Hub data set from an archive or your own tables.",
    ),
    "convert": ("mimic_el.scripts.convert_original_checkpoint", "Convert a checkpoint of the published code, or back."),
    "push": ("mimic_el.scripts.push_to_hub", "Publish a model, its index and data sets on the Hub."),
    "sample": ("mimic_el.scripts.demo", "Train a small model on the sample, and show some links."),
}


def _add_program(name: str, module: str, help: str) -> None:
    def command(context: typer.Context) -> None:
        arguments = list(context.args)
        # Parsers that have no name of their own take it from here.
        sys.argv = [f"mimic-el {name}", *arguments]
        program = importlib.import_module(module)
        result = getattr(program, "run", program.main)(arguments)
        raise typer.Exit(result if isinstance(result, int) else 0)

    settings = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
    app.command(name, help=help, context_settings=settings, add_help_option=False)(command)


for _name, (_module, _help) in _PROGRAMS.items():
    _add_program(_name, _module, _help)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 1 or 2 with a line on the standard error stream where something is wrong,
    130 where it was interrupted."""
    tolerate_any_text()
    try:
        app(args=None if argv is None else list(argv), prog_name="mimic-el")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has seen enough
        sys.stderr.close()
        return 1
    except MimicError as error:
        print(f"error: {harmless(one_line(error))}", file=sys.stderr)
        return 1
    except OSError as error:  # no such file, a full disk, a Hub that does not answer
        print(f"error: {harmless(one_line(error))}", file=sys.stderr)
        return 1
    return 0


__all__ = ["CommandError", "app", "main", "read_entities", "read_mentions"]

if __name__ == "__main__":
    sys.exit(main())

"""What all programs share at the command line: streams that can print any text, and hints for wrong options.

It loads no library, so that `--help` and wrong options are fast.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from .saving_mimic import empty_path
from .texts_mimic import CONTROLS


def tolerate_any_text() -> None:
    """Lets the standard streams write text that their encoding has not, such as cp1252 a `ł`, as escapes.

    A program must not end because of what is in the data that it talks about.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, stream: IO[str] | None = None) -> None:
    """Prints text, control characters and what the stream's encoding has not as escapes."""
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(harmless(text).encode(encoding, "backslashreplace").decode(encoding), file=stream)


def harmless(text: str) -> str:
    """Text for a terminal: control characters in it, which data may hold, are written as escapes, as JSON has them."""
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def takes_unicode(stream: IO[str]) -> bool:
    """Whether a stream can write any text as it is."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").replace("_", "") in ("utf8", "utf8sig")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean ...?` for the nearest of what is known, or nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What a parser makes of arguments; for an unknown option the error names the nearest one."""
    args, unknown = parser.parse_known_args(argv)
    for word in unknown:
        if word.startswith("--"):
            option = word.partition("=")[0]
            parser.error(f"there is no option {option}.{did_you_mean(option, parser._option_string_actions)}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def given_path(text: str) -> Path:
    """An option's path. An empty one, as of a variable that is not set, would stand for the working directory.

    Raises:
        argparse.ArgumentTypeError: if it is empty.
    """
    if wrong := empty_path(text):
        raise argparse.ArgumentTypeError(f"the path {wrong}")
    return Path(text)


def busy_machine(threads: int) -> str | None:
    """A note where others compute on this machine: as many threads as cores then slow each other down.

    Args:
        threads: that this process computes with.
    """
    try:
        load: Any = os.getloadavg()[0]
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on every system
        return None
    free = max(1, round(cores - load))
    if load < 0.5 * cores or threads <= free:
        return None
    return (
        f"The machine is shared (load {load:.1f} on {cores} cores), and {threads} threads compute here: "
        f"OMP_NUM_THREADS={free} may be faster."
    )

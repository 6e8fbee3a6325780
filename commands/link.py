"""`mimic-el link`: reads mentions or texts, and writes their entities as JSON Lines."""

from __future__ import annotations

import itertools
import json
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from tqdm.auto import tqdm

from ..console import harmless, takes_unicode
from ..errors_mimic import MimicError
from .inputs import CommandError, image_places, load_model, mentions_of, one_line, read_entities
from .options import (
    AllowUrls,
    AllowUrlsOption,
    BatchOption,
    ByName,
    DeviceOption,
    ImageRootOption,
    IndexOption,
    Method,
    ModelOption,
    OnError,
    OnImageError,
    Window,
    path_of_option,
)

# Mentions that are read, linked and written at a time, in batches.
_BATCHES_AT_ONCE = 16


def link(
    model: ModelOption,
    mentions: Annotated[
        str | None,
        typer.Argument(
            help="JSON Lines, each a document (text, and optionally spans) or a mention (mention, text, and optionally "
            "start and end), optionally with image (a path, as seen from the file), candidates and id; - is standard "
            "input."
        ),
    ] = None,
    mention: Annotated[
        str | None, typer.Option("--mention", help="The words to be linked, in place of a file.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", help="The text that they are from; without --mention, a document whose mentions to find."
        ),
    ] = None,
    image: Annotated[str | None, typer.Option("--image", help="The image beside it: a path or a URL.")] = None,
    index: IndexOption = None,
    entities: Annotated[
        str | None,
        typer.Option("--entities", help="In place of an index, entities to encode now: as in `mimic-el index build`."),
    ] = None,
    image_root: ImageRootOption = None,
    allow_urls: AllowUrlsOption = AllowUrls.NONE,
    top_k: Annotated[int | None, typer.Option("--top_k", min=1, help="Answers for each mention (default: 5).")] = None,
    method: Annotated[
        Method | None,
        typer.Option("--method", help="How the index is searched; both find the same entities (default: pruned)."),
    ] = None,
    candidates: Annotated[
        ByName | None,
        typer.Option(
            "--candidates",
            help="Only entities that have the mention's name, or these and what the search finds (default: all).",
        ),
    ] = None,
    mention_detector: Annotated[
        str | None,
        typer.Option(
            "--mention_detector",
            help="What finds the mentions of documents: a token-classification model, a directory or a Hub id "
            "(default: the names of the entities).",
        ),
    ] = None,
    context_window: Annotated[
        Window | None,
        typer.Option(
            "--context_window",
            help="The part of a long text that is read (default: around the mention for documents, what the model's "
            "configuration says for mentions).",
        ),
    ] = None,
    on_error: Annotated[
        OnError,
        typer.Option("--on_error", help="What to do with a line that cannot be linked: stop, warn, or write `error`."),
    ] = OnError.RAISE,
    on_image_error: Annotated[
        OnImageError, typer.Option("--on_image_error", help="Go on without an image that cannot be read, or stop.")
    ] = OnImageError.RAISE,
    min_probability: Annotated[
        float | None,
        typer.Option(
            "--min_probability", help="Give only answers that are at least this probable; needs a calibrated model."
        ),
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(
            "--coverage",
            help="Give sets of answers that hold the right one for this share of mentions, such as 0.9, in place of "
            "the best; needs a calibrated model.",
        ),
    ] = None,
    batch_size: BatchOption = 32,
    device: DeviceOption = None,
    output_file: Annotated[
        Path | None,
        typer.Option(
            "--output_file", parser=path_of_option, metavar="PATH", help="Where to write (default: standard output)."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on after an interruption, with the lines that the output file does not have."
        ),
    ] = False,
) -> None:
    """Link mentions, or whole texts, to entities. The output is JSON Lines: the lines of the input, each mention with
    its best `entities`, each document with its `mentions`."""
    single = {
        name: value for name, value in (("mention", mention), ("text", text), ("image", image)) if value is not None
    }
    if mention is not None and text is None:
        raise CommandError("--mention needs --text: the text that the mention is from.")
    if mentions is not None and single:
        raise CommandError("--mention, --text and --image are for a single one; in a file each line has its own.")
    if mentions is None and text is None:
        raise CommandError("Give either a file of mentions or documents, or --text, with --mention or without.")
    if index is not None and entities is not None:
        raise CommandError("Give either --index or --entities, not both.")
    if mentions is not None and mentions != "-" and not Path(mentions).is_file():
        raise CommandError(f"There is no file {mentions}.")
    if resume and (output_file is None or mentions in (None, "-")):
        raise CommandError("--resume goes on in an --output_file, with the lines of a file of mentions.")
    if output_file is not None and not output_file.parent.is_dir():
        raise CommandError(f"--output_file {output_file}: there is no directory {output_file.parent}. Make it first.")
    given = iter([(1, single, single)]) if mentions is None else mentions_of(mentions)
    if resume and output_file is not None and output_file.is_file():
        _skip_linked(given, output_file, str(mentions))
    place = {None: "the command line", "-": "standard input"}.get(mentions, str(mentions))

    from ..pipeline_mimic import MultimodalEntityLinkingPipeline

    loaded, processor = load_model(model, device)
    knowledge: dict[str, Any] = {"index": index}
    if entities is not None:
        places = image_places(entities, image_root, allow_urls)
        knowledge = {"entities": read_entities(entities), "build_kwargs": places}
    linker = MultimodalEntityLinkingPipeline(model=loaded, processor=processor, device=loaded.device, **knowledge)
    # Lines are told of here, by their numbers in the file.
    call: dict[str, Any] = {"batch_size": batch_size, "on_error": "return"}
    if top_k is not None or coverage is None:
        call["top_k"] = 5 if top_k is None else top_k
    for name, number in (("min_probability", min_probability), ("coverage", coverage)):
        if number is not None:
            call[name] = number
    for name, choice in (("method", method), ("candidates", candidates), ("context_window", context_window)):
        if choice is not None:
            call[name] = choice.value
    if mention_detector is not None:
        try:
            call["mention_detector"] = detector_of_name(mention_detector)
        except (OSError, ValueError, ImportError) as error:
            raise CommandError(f"--mention_detector {mention_detector!r}: {one_line(error)}") from error
    call["on_image_error"] = on_image_error.value
    mode = "a" if resume else "w"
    output: IO[str] = sys.stdout if output_file is None else open(output_file, mode, encoding="utf-8")  # noqa: SIM115
    # Where it would not stand among the results, and somebody sees it.
    bar = tqdm(desc="Linking", unit=" lines", disable=True if output_file is None else None)
    try:
        while block := list(itertools.islice(given, batch_size * _BATCHES_AT_ONCE)):
            lines = [f"{place}, line {number}" if mentions is not None else place for number, _, _ in block]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    found = linker([inputs for _, _, inputs in block], **call)
                except (MimicError, ValueError) as error:
                    raise CommandError(f"{place}: {error}") from error
            for warning in caught:
                print(f"warning: {harmless(_at_line(str(warning.message), lines))}", file=sys.stderr)
            for line, answer in zip(lines, found, strict=True):
                if isinstance(answer, dict) and on_error == OnError.RAISE:
                    raise CommandError(_of_line(line, answer["error"]))
            for line, (_, record, inputs), answer in zip(lines, block, found, strict=True):
                output.write(_linked_line(line, record, inputs, answer, on_error, output))
            output.flush()
            bar.update(len(block))
    finally:
        bar.close()
        if output_file is not None:
            output.close()


def _skip_linked(given: Iterator[tuple[int, dict[str, Any], Any]], output_file: Path, place: str) -> None:
    """Passes over the lines that an interrupted run has linked, and cuts off one that it wrote in part.

    Raises:
        CommandError: if the output is not of these lines.
    """
    whole = 0
    with open(output_file, "r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            number, record, _ = next(given, (0, None, None))
            if record is None or not _is_of(line, record):
                raise CommandError(
                    f"{output_file} is not what was linked of {place}{f', line {number}' if number else ''}: the lines "
                    "differ. Leave --resume out to link all anew, or name another --output_file."
                )
            whole += len(line)
        file.truncate(whole)


def _is_of(line: bytes, record: dict[str, Any]) -> bool:
    """Whether a line of the output is of a record: it has the record's own fields."""
    try:
        linked = json.loads(line)
    except (ValueError, RecursionError):
        return False
    own = [name for name in record if name not in ("entities", "mentions", "error", "error_type")]
    return isinstance(linked, dict) and all(
        name in linked and json.dumps(linked[name]) == json.dumps(record[name]) for name in own
    )


def detector_of_name(name: str) -> Any:
    """The detector of mentions that a model of token classification is."""
    from ..documents_mimic import detector_of

    return detector_of(name) or name


_MENTION_NUMBER = re.compile(r"^Mention (\d+)(?: \(id .*?\))?: ")


def _at_line(message: str, lines: Sequence[str]) -> str:
    """A message of the pipeline about one of its inputs, with the line that this is from."""
    number = _MENTION_NUMBER.match(message)
    return message if number is None else _of_line(lines[int(number[1])], message)


def _of_line(line: str, message: str) -> str:
    return f"{line}: {_MENTION_NUMBER.sub('', message, count=1)}"


def _linked_line(
    line: str, record: dict[str, Any], inputs: dict[str, Any], answer: Any, on_error: OnError, output: IO[str]
) -> str:
    """What is written for a line of the input: it, with what was found."""
    if isinstance(answer, dict):
        message = _of_line(line, answer["error"])
        answer = {"error": message, "error_type": answer["error_type"]}
        if on_error == OnError.WARN:
            print(f"warning: {harmless(message)}", file=sys.stderr)
            answer = []
    if not isinstance(answer, dict):
        answer = {"entities" if inputs.get("mention") is not None else "mentions": answer}
    text = json.dumps({**record, **answer}, ensure_ascii=not takes_unicode(output))
    return (harmless(text) if output.isatty() else text) + "\n"


__all__ = ["link"]

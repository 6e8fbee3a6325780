"""The console command `mimic-el`: one command for what a user of the installed package does.

Each subcommand imports what it needs when it runs, so that help costs next to nothing. Those that are programs of
their own (`train`, `prepare`, `convert`, `push`, `demo`) get their arguments untouched.
"""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from .console import takes_unicode, tolerate_any_text
from .errors_mimic import MimicError

_TABLES = (".jsonl", ".json", ".csv")
# Mentions that are read, linked and written at a time, in batches.
_BATCHES_AT_ONCE = 16

app = typer.Typer(
    name="mimic-el",
    help="Multimodal entity linking with MIMIC: which entity of a knowledge base does a mention mean?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
index_app = typer.Typer(
    help="Build an index of a knowledge base, show what is in one, check its files.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(index_app, name="index")


class CommandError(MimicError, ValueError):
    """What was asked on the command line cannot be done, with why."""


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
    """Which addresses are fetched."""

    NONE = "none"
    PUBLIC = "public"
    PRIVATE = "private"

    @property
    def switch(self) -> bool | str:
        """The same as `EntityIndex.build` takes it."""
        return {"none": False, "public": True}.get(self.value, self.value)


class OnImageError(str, Enum):  # noqa: UP042
    """What follows from an image that cannot be read."""

    WARN = "warn"
    RAISE = "raise"


class OnError(str, Enum):  # noqa: UP042
    """What follows from a line that cannot be linked."""

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
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda:0, ... (default: an accelerator if there is one)")
]
ImageRootOption = Annotated[
    str | None,
    typer.Option(
        "--image_root",
        help="The folder that the entities' image files must be in (default: that of the table; of a data set none, "
        "for it brings its images along).",
    ),
]
AllowUrlsOption = Annotated[
    AllowUrls, typer.Option("--allow_urls", help="Which addresses of entities' images are fetched.")
]
BatchOption = Annotated[int, typer.Option("--batch_size", min=1, help="Mentions or entities encoded at a time.")]


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


# --- Linking ----------------------------------------------------------------------------------------------------------


@app.command()
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
        str | None, typer.Option("--mention", help="In place of a file: the words to be linked.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", help="The text that they are from; without --mention, a document whose mentions to find."
        ),
    ] = None,
    image: Annotated[str | None, typer.Option("--image", help="The image beside it: a path or a URL.")] = None,
    index: Annotated[
        str | None,
        typer.Option("--index", help="An index: a directory or a Hub id (default: the one the model names)."),
    ] = None,
    entities: Annotated[
        str | None,
        typer.Option("--entities", help="In place of an index, entities to encode now: as in `mimic-el index build`."),
    ] = None,
    image_root: ImageRootOption = None,
    allow_urls: AllowUrlsOption = AllowUrls.NONE,
    top_k: Annotated[int | None, typer.Option("--top_k", min=1, help="Answers for each mention (default: 5).")] = None,
    method: Annotated[
        Method | None, typer.Option("--method", help="How the index is searched; the result is the same.")
    ] = None,
    candidates: Annotated[
        ByName | None,
        typer.Option(
            "--candidates", help="Entities that bear the mention's name, alone or with what the search finds."
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
        OnError, typer.Option("--on_error", help="Stop at a line that cannot be linked, warn of it, or write `error`.")
    ] = OnError.RAISE,
    on_image_error: Annotated[
        OnImageError, typer.Option("--on_image_error", help="Go on without an image that cannot be read, or stop.")
    ] = OnImageError.RAISE,
    min_probability: Annotated[
        float | None,
        typer.Option("--min_probability", help="Of a calibrated model: only answers that are at least so probable."),
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(
            "--coverage",
            help="Of a calibrated model: in place of the best, sets that hold the right answer of so many mentions.",
        ),
    ] = None,
    batch_size: BatchOption = 32,
    device: DeviceOption = None,
    output_file: Annotated[
        Path | None, typer.Option("--output_file", help="Where to write (default: standard output).")
    ] = None,
) -> None:
    """Link texts to entities: JSON Lines, each mention with its best `entities`, each document with its `mentions`."""
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
    given = iter([(1, single, single)]) if mentions is None else _mentions_of(mentions)
    place = {None: "the command line", "-": "standard input"}.get(mentions, str(mentions))

    from .pipeline_mimic import MultimodalEntityLinkingPipeline

    loaded, processor = _load(model, None)
    knowledge: dict[str, Any] = {"index": index}
    if entities is not None:
        places = image_places(entities, image_root, allow_urls)
        knowledge = {"entities": read_entities(entities), "build_kwargs": places}
    if device is not None:
        knowledge["device"] = device
    linker = MultimodalEntityLinkingPipeline(model=loaded, processor=processor, **knowledge)
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
            raise CommandError(f"--mention_detector {mention_detector!r}: {_one_line(error)}") from error
    call["on_image_error"] = on_image_error.value
    output: IO[str] = sys.stdout if output_file is None else open(output_file, "w", encoding="utf-8")  # noqa: SIM115
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
                print(f"warning: {_at_line(str(warning.message), lines)}", file=sys.stderr)
            for line, answer in zip(lines, found, strict=True):
                if isinstance(answer, dict) and on_error == OnError.RAISE:
                    raise CommandError(_of_line(line, answer["error"]))
            for line, (_, record, inputs), answer in zip(lines, block, found, strict=True):
                output.write(_linked_line(line, record, inputs, answer, on_error, output))
            output.flush()
    finally:
        if output_file is not None:
            output.close()


def detector_of_name(name: str) -> Any:
    """The detector of mentions that a model of token classification is."""
    from .documents_mimic import detector_of

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
            print(f"warning: {message}", file=sys.stderr)
            answer = []
    if not isinstance(answer, dict):
        answer = {"entities" if inputs.get("mention") is not None else "mentions": answer}
    return json.dumps({**record, **answer}, ensure_ascii=not takes_unicode(output)) + "\n"


def _mentions_of(place: str) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """Number of the line, record, and what the pipeline is given of it, of each mention or document in a file."""
    for number, record in _json_lines(place):
        inputs = {name: record[name] for name in _INPUTS if record.get(name) is not None}
        if "mention" in record:
            inputs["mention"] = record["mention"]  # one that is null is no document
        if isinstance(record.get("image"), str):
            inputs["image"] = _seen_from(place, record["image"])
        yield number, record, inputs


_INPUTS = ("id", "text", "sentence", "image", "candidates", "spans", "start", "end")


# --- Calibration ------------------------------------------------------------------------------------------------------


@app.command("calibrate")
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
    split: Annotated[str, typer.Option("--split", help="Of a data set, the split.")] = "validation",
    index: Annotated[
        str | None,
        typer.Option("--index", help="The knowledge base: an index (default: the one the model names)."),
    ] = None,
    nil_rate: Annotated[
        float | None,
        typer.Option(
            "--nil_rate",
            help="Share of mentions to be expected whose entity is not there (default: as in the mentions).",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what is left to chance.")] = 0,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output_dir", help="Where the calibrated model is saved (default: the model's directory)."),
    ] = None,
    batch_size: BatchOption = 32,
    device: DeviceOption = None,
) -> None:
    """Learn from mentions with known answers how sure an answer is, so that the model's answers have probabilities."""
    if output_dir is None and not Path(model).is_dir():
        raise CommandError(f"{model} is no directory: say with --output_dir where the calibrated model is saved.")
    from .pipeline_mimic import MultimodalEntityLinkingPipeline
    from .training.calibration import calibrate

    loaded, processor = _load(model, device)
    linker = MultimodalEntityLinkingPipeline(model=loaded, processor=processor, index=index)
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


def read_mentions(source: str, split: str) -> Any:
    """Mentions with answers, of a data set (a directory or a Hub id) or a JSON Lines file.

    Raises:
        CommandError: if there are none.
    """
    if Path(source).suffix.lower() in (".jsonl", ".json"):
        if not Path(source).is_file():
            raise CommandError(f"There is no file {source}.")
        return _answered(source)
    import datasets

    try:
        return datasets.load_dataset(source, "mentions", split=split)
    except (ValueError, OSError) as error:
        raise CommandError(
            f"The mentions {source!r} cannot be loaded: {_one_line(error)} They are a data set's directory or Hub id, "
            f"with the configuration `mentions` and the split {split!r}, or a JSON Lines file."
        ) from error


def _answered(place: str) -> Iterator[dict[str, Any]]:
    for number, record, inputs in _mentions_of(place):
        if "answer" not in record:
            raise CommandError(
                f"{place}, line {number}: the mention has no `answer`; where the entity is not in the knowledge base, "
                "it is null."
            )
        yield {**inputs, "answer": record["answer"]}


def _write_calibration(path: Path, block: dict[str, Any]) -> None:
    """Puts a calibration into a config.json, and leaves the rest of it as it is."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["calibration"] = block
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


# --- Index ------------------------------------------------------------------------------------------------------------


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
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where the index is written.")],
    dtype: Annotated[Dtype, typer.Option("--dtype", help="What features are stored in.")] = Dtype.FLOAT16,
    batch_size: BatchOption = 64,
    num_workers: Annotated[
        int | None,
        typer.Option("--num_workers", min=0, help="Processes that read images; some for large ones unless told."),
    ] = None,
    on_image_error: Annotated[
        OnImageError, typer.Option("--on_image_error", help="Go on without an image that cannot be read, or stop.")
    ] = OnImageError.WARN,
    encoding_dtype: Annotated[
        EncodingDtype | None,
        typer.Option("--encoding_dtype", help="What the encoder computes in; auto: bfloat16 where that is fast."),
    ] = None,
    fast_resize: Annotated[
        bool,
        typer.Option("--fast_resize", help="Shrink images by torch: much faster, off by 1 of 255 levels in places."),
    ] = False,
    image_root: ImageRootOption = None,
    allow_urls: AllowUrlsOption = AllowUrls.NONE,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index that is there, once the new one is complete.")
    ] = False,
    device: DeviceOption = None,
) -> None:
    """Encode a knowledge base. Run the same command again to go on after an interruption."""
    rows = read_entities(entities)

    from .index_mimic import EntityIndex

    loaded, processor = _load(model, device)
    processor.fast_resize |= fast_resize
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
        **image_places(entities, image_root, allow_urls),
    )
    typer.echo(f"Wrote {len(index):,} entities to {output_dir}.")


@index_app.command("info")
def info(index: Annotated[str, typer.Argument(help="An index: a directory or a Hub id.")]) -> None:
    """Show what is in an index, as JSON."""
    from .index_mimic import EntityIndex

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
    """Compare every file of an index with the checksum that was taken when it was written."""
    from .index_mimic import EntityIndex

    opened = EntityIndex.from_pretrained(index)
    opened.verify()
    typer.echo(f"{index} is whole: {len(opened):,} entities.")


class _Records:
    """Records of a table, read anew each time: a build that goes on compares what it has with them first."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        read = _csv_rows if Path(self.path).suffix.lower() == ".csv" else _json_lines
        for number, record in read(self.path):
            if record.get("id") in (None, ""):
                raise CommandError(f"{self.path}, line {number}: the entity has no `id`.")
            images = record.get("images", record.get("image"))
            if isinstance(images, str):
                images = images.split("|") if read is _csv_rows else [images]
            if not isinstance(images, list | None) or not all(isinstance(image, str) for image in images or []):
                raise CommandError(f"{self.path}, line {number}: `images` must be paths or URLs.")
            seen = [_seen_from(self.path, image) for image in images or [] if image]
            yield {**{name: value for name, value in record.items() if name != "image"}, "images": seen}


def image_places(source: str, image_root: str | None, allow_urls: AllowUrls) -> dict[str, Any]:
    """Where the images that a table of entities names are read from: by default from its own folder alone."""
    root: str | bool | None = image_root
    if root is None and Path(source).exists():
        root = source if Path(source).is_dir() else os.path.dirname(os.path.abspath(source))
    return {"image_root": root, "allow_urls": allow_urls.switch}


def read_entities(source: str) -> Any:
    """Entities for an index: of a data set (a directory or a Hub id), a JSON Lines or a CSV file.

    Raises:
        CommandError: if there are none.
    """
    path = Path(source)
    if path.is_file() or path.suffix.lower() in _TABLES:
        if not path.is_file():
            raise CommandError(f"There is no file {source}.")
        if path.suffix.lower() not in _TABLES:
            raise CommandError(f"{source} is no table of entities: its name must end in {', '.join(_TABLES)}.")
        return _Records(source)
    import datasets

    try:
        # Streamed from a directory: the cache of `datasets` would give the old rows of one that was written anew.
        return datasets.load_dataset(source, "entities", split="kb", streaming=path.is_dir())
    except (ValueError, OSError) as error:
        raise CommandError(
            f"The entities {source!r} cannot be loaded: {_one_line(error)} They are a data set's directory or Hub id, "
            "with the configuration `entities` and the split `kb`, or a JSON Lines or CSV file."
        ) from error


def _json_lines(place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    file = sys.stdin if place == "-" else open(place, encoding="utf-8-sig")  # noqa: SIM115
    try:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CommandError(f"{place}, line {number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise CommandError(f"{place}, line {number}: not an object, but a {type(record).__name__}.")
            yield number, record
    except UnicodeDecodeError as error:
        raise CommandError(f"{place} is not UTF-8: {error}") from error
    finally:
        if place != "-":
            file.close()


def _csv_rows(place: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(place, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise CommandError(f"{place}, line {reader.line_num}: not as many cells as the header has.")
                yield reader.line_num, dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise CommandError(f"{place}, line {reader.line_num}: not CSV: {error}") from error


def _seen_from(place: str, image: str | None) -> str | None:
    """A path in a table, as seen from the table; an address as it is."""
    if not image or place == "-" or re.match(r"data:|[a-z][a-z0-9+.-]+://", image[:64], re.IGNORECASE):
        return image or None
    return os.path.join(os.path.dirname(os.path.abspath(place)), image)


def _load(source: str, device: str | None) -> tuple[Any, Any]:
    """Model and processor; the package's own code, never a checkpoint's."""
    import torch
    from transformers import PreTrainedConfig

    from .configuration_mimic import MimicConfig
    from .modeling_mimic import MimicModel
    from .processing_mimic import MimicProcessor

    try:
        values, _ = PreTrainedConfig.get_config_dict(source)
        if values.get("model_type") != MimicConfig.model_type:
            raise CommandError(f"{source} is no MIMIC checkpoint: its model type is {values.get('model_type')!r}.")
        # Without this, transformers would ask at the keyboard whether to run the code that the checkpoint brings.
        own: dict[str, Any] = {"trust_remote_code": False}
        model = MimicModel.from_pretrained(source, **own)
        processor = MimicProcessor.from_pretrained(source, **own)
    except Exception as error:  # a damaged configuration fails in many ways
        if isinstance(error, MimicError):
            raise
        raise CommandError(f"The model {source!r} cannot be loaded: {_one_line(error)}") from error
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if accelerator is None else str(accelerator)
    try:
        return model.eval().to(device), processor
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"There is no device {device!r}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- The page ---------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option("--model", help="A MIMIC checkpoint with an index: a directory or a Hub id.")
    ] = None,
    index: Annotated[
        str | None,
        typer.Option("--index", help="An index: a directory or a Hub id (default: the one the model names)."),
    ] = None,
    entities: Annotated[
        str | None,
        typer.Option("--entities", help="A data set with the entities' images, to show them: a directory or a Hub id."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A file of settings, as space/config.yaml; options go before it.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="The address to serve at; others than this machine's are open.")
    ] = ("127.0.0.1"),
    port: Annotated[
        int | None, typer.Option("--port", help="The port (default: the first free one from 7860).")
    ] = None,
    mcp: Annotated[bool, typer.Option("--mcp", help="Serve the same functions to agents, as an MCP server.")] = False,
) -> None:
    """Open the page: type a text, add an image, see the entities and why."""
    try:
        from .space.app import launch
    except ImportError as error:
        raise CommandError(f'The page needs Gradio ({error}). Install it: pip install "mimic-el[space]"') from error
    from .space.linking import Settings

    names = {"model": model, "index": index, "entities": entities}
    if config is not None:
        settings = Settings.read(config, **names)
    elif model is not None:
        settings = Settings(**{name: value for name, value in names.items() if value is not None})  # type: ignore[arg-type]
    else:
        raise CommandError("Name a model to link with: --model DIRECTORY_OR_HUB_ID, or a file of settings: --config.")
    launch(settings, server_name=host, server_port=port, mcp_server=mcp)


# --- Programs of their own --------------------------------------------------------------------------------------------

_PROGRAMS = {
    "train": ("mimic_el.train", "Train and evaluate a model: mimic-el train CONFIG.yaml, or sample, wikimel, ..."),
    "prepare": ("mimic_el.datasets_scripts.prepare", "Turn the archives of a data set into a Hub data set."),
    "convert": ("mimic_el.scripts.convert_original_checkpoint", "Convert a checkpoint of the published code, or back."),
    "push": ("mimic_el.scripts.push_to_hub", "Publish a model, its index and data sets on the Hub."),
    "sample": ("mimic_el.scripts.demo", "Train a small model on the sample data set and show what it links."),
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
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    except OSError as error:  # no such file, a full disk, a Hub that does not answer
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


__all__ = ["CommandError", "app", "main", "read_entities", "read_mentions"]

if __name__ == "__main__":
    sys.exit(main())

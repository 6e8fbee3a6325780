"""Turn the archives of a multimodal entity linking data set into a Hub data set.

```bash
mimic-el prepare wikimel --data_dir WikiMEL --output_dir wikimel-hub
mimic-el prepare wikimel --data_dir WikiMEL.tar --push_to_hub me/wikimel
```

Everything is checked first and a report is printed; then rows are written to Parquet files, one at a time, and a card.
Run the same command again after an interruption: it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from PIL import Image
from tqdm.auto import tqdm

from mimic_el.console import given_path, harmless, parse, say, tolerate_any_text
from mimic_el.errors_mimic import MimicError
from mimic_el.hub_files_mimic import hub_files
from mimic_el.images_mimic import MAX_PIXELS

from .archives import ArchiveError
from .builders import encode, features_of
from .cards import CardFacts, SplitFacts, write_card
from .custom import CustomData
from .image_files import ImageFile, inspect_image, shrink_image
from .mimic_archive import MimicArchive
from .report import SPLITS, Report
from .shards import Manifest, Shard, plan_shards, row_bytes, write_atomically, write_shard
from .source import BENCHMARKS, EntityRow, MentionRow, Source
from .sources import open_source
from .splits import SharedSentences

logger = logging.getLogger(__name__)

CONFIGS = {"mentions": SPLITS, "entities": ("kb",)}
PROBLEMS_FILE = "problems.jsonl"
# Goes into the fingerprint: raise it when the same input gives other output.
_FORMAT_VERSION = 3


class PrepareError(MimicError):
    """The data set cannot be written as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Options:
    """What shapes the output.

    Attributes:
        source: `published` for the archive of the MIMIC authors, `original` for the data set's own release, `auto` for
            the first of these that is there.
        use_images: whether to store images.
        image_size: re-encode larger images so that their longest side has this many pixels; `None` keeps all bytes.
        max_image_pixels: images with more pixels are left out.
        max_shard_bytes: the size that a Parquet file should not exceed.
        strict: refuse where a row or an image would be left out or changed.
        num_workers: threads that check images.
        pretty_name: the name on the card, in place of the benchmark's.
        license: the license on the card, in place of what is known of the source's.
        keep_nil: keep mentions of no entity, with the answer null, in place of leaving them out.
    """

    source: str = "auto"
    use_images: bool = True
    image_size: int | None = None
    max_image_pixels: int = MAX_PIXELS
    max_shard_bytes: int = 500_000_000
    strict: bool = False
    num_workers: int = min(8, os.cpu_count() or 1)
    pretty_name: str | None = None
    license: str | None = None
    keep_nil: bool = False

    def fingerprint(self, source: Source) -> str:
        """Changes where other rows would be written."""
        return (
            f"{_FORMAT_VERSION} {source.fingerprint()} {self.image_size} {self.max_image_pixels} {self.max_shard_bytes}"
        )

    def card_options(self) -> dict[str, str]:
        """The options that shape the rows, as one types them."""
        options = {} if self.source == "auto" else {"source": self.source}
        if not self.use_images:
            options["without_images"] = ""
        if self.keep_nil:
            options["keep_nil"] = ""
        if self.image_size:
            options["image_size"] = str(self.image_size)
        if self.max_image_pixels != MAX_PIXELS:
            options["max_image_pixels"] = str(self.max_image_pixels)
        return options


def _images(row: MentionRow | EntityRow) -> list[ImageFile]:
    if isinstance(row, EntityRow):
        return row.images
    return [row.image] if row.image else []


class _CheckedImages:
    """Verdicts on images, kept in a file so that an interrupted check goes on where it stopped."""

    def __init__(self, path: Path | None, source: Source):
        self._folders = {"mentions": source.mention_images, "entities": source.entity_images}
        self.verdicts: dict[ImageFile, tuple[str, str] | None] = {}
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    config, name, problem = json.loads(line)
                    folder = self._folders[config]
                except (ValueError, KeyError, TypeError):  # the line that was being written at the interruption
                    continue
                if folder is not None:
                    self.verdicts[ImageFile(folder, name)] = tuple(problem) if problem else None
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115, see close
        self._file.write("\n")

    def add(self, image: ImageFile, problem: tuple[str, str] | None) -> None:
        self.verdicts[image] = problem
        if self._file:
            config = next(config for config, folder in self._folders.items() if folder is image.folder)
            self._file.write(json.dumps([config, image.name, problem]) + "\n")

    def close(self) -> None:
        if self._file:
            self._file.close()


def check_images(source: Source, options: Options, verdicts_path: Path | None = None) -> None:
    """Decode every image that a row names, once, and note the unusable ones in `source.bad_images`.

    Args:
        source: an open data set.
        options: `max_image_pixels` and `num_workers` are used.
        verdicts_path: a file that remembers what was checked, for the same source.
    """

    def check(image: ImageFile) -> tuple[str, str] | None:
        try:
            problem = inspect_image(image.read(), options.max_image_pixels)
        except ArchiveError as error:
            return error.kind, str(error)
        return problem and (problem[0], f"{image.name!r}: {problem[1]}")

    silent = Report()
    named: dict[ImageFile, None] = {}
    for config, splits in CONFIGS.items():
        for split in splits:
            for row in source.rows(config, split, silent):
                named.update(dict.fromkeys(_images(row)))
    checked = _CheckedImages(verdicts_path, source)
    try:
        left = [image for image in named if image not in checked.verdicts]
        bar = tqdm(total=len(named), initial=len(named) - len(left), desc="Checking images", unit="image")
        with bar, ThreadPoolExecutor(options.num_workers) as pool:
            # In small groups, so that few images are in memory and an interruption is answered at once.
            step = 16 * options.num_workers
            for group in (left[start : start + step] for start in range(0, len(left), step)):
                for image, problem in zip(group, pool.map(check, group), strict=True):
                    checked.add(image, problem)
                bar.update(len(group))
    finally:
        checked.close()
    source.bad_images = {image: problem for image, problem in checked.verdicts.items() if problem}


def survey(source: Source, report: Report, options: Options) -> dict[str, dict[str, array]]:
    """Go through all rows once: tell `report` what is wrong, count, compare with published figures.

    Returns:
        By configuration and split, the bytes that each row will take. Splits of mentions without rows are left out,
        because `datasets` loads no data set that has one.
    """
    sizes: dict[str, dict[str, array]] = {}
    shared = SharedSentences()
    entity_ids: set[str] = set()
    for config, splits in CONFIGS.items():
        for split in splits:
            of_split = sizes.setdefault(config, {}).setdefault(split, array("q"))
            for row in source.rows(config, split, report):
                images = _images(row)
                if isinstance(row, EntityRow):
                    report.statistics.add_entity(row.qid, row.description, len(images))
                    entity_ids.add(row.id)
                else:
                    if other := shared.earlier(split, row.sentence):
                        report.add("sentence_in_several_splits", row.file, row.row, f"also in {other}")
                    report.statistics.add_mention(split, row.mention, row.sentence, row.answer, bool(images))
                # An image that is shrunk takes about half a byte a pixel.
                limit = options.image_size**2 // 2 if options.image_size else sys.maxsize
                texts = row_bytes(encode(row, lambda image: b""))
                of_split.append(texts + sum(min(image.size, limit) for image in images))
        if not any(sizes[config].values()):
            report.add("no_rows", config, detail="see the findings on files and rows")
    for split in SPLITS:
        if not sizes["mentions"][split]:
            report.add("empty_split", split)
            del sizes["mentions"][split]
    answers = set().union(*report.statistics.answers.values())
    if isinstance(source, CustomData) and entity_ids and entity_ids == answers:
        detail = "every entity is the answer of a mention; linking to it is easier than to all that could be meant"
        report.add("closed_knowledge_base", source.benchmark.name, detail=detail)
    if isinstance(source, MimicArchive):
        found = {"test mentions": report.statistics.mentions["test"], "entities": report.statistics.entities}
        for what, published in source.benchmark.published.items():
            report.compare(what, found[what], published)
    return sizes


def validate(
    source: Source, report: Report, options: Options, verdicts_path: Path | None = None
) -> dict[str, dict[str, array]]:
    """Check everything: files' sums, every image, every row. Returns what [`survey`] does."""
    if source.archive_bytes:
        with tqdm(total=source.archive_bytes, desc="MD5 of archives", unit="B", unit_scale=True) as bar:
            source.hash_archives(report, bar.update)
    check_images(source, options, verdicts_path)
    return survey(source, report, options)


def _refuse(report: Report, options: Options) -> None:
    if report.fatal:
        kinds = ", ".join(report.fatal)
        raise PrepareError(f"Nothing was written: {kinds}. The report says where; repair that and run again.")
    if options.strict and report.errors:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.errors.items())
        raise PrepareError(f"Nothing was written, because of --strict: {kinds}.")


def _stored_rows(
    source: Source, config: str, split: str, shards: list[Shard], manifest: Manifest, options: Options
) -> Iterator[tuple[Shard, Iterator[dict[str, Any]]]]:
    """The shards that are left to write, each with its rows; rows of complete shards are passed over unread."""

    def read(image: ImageFile) -> bytes:
        data = source.read_image(image)
        return shrink_image(data, options.image_size) if options.image_size else data

    rows = iter(source.rows(config, split, Report()))
    position = 0
    for shard in shards:
        if manifest.is_complete(shard):
            continue
        skipped = islice(rows, shard.start - position, None)
        yield shard, (encode(row, read) for row in islice(skipped, shard.stop - shard.start))
        position = shard.stop


def write(source: Source, sizes: dict[str, dict[str, array]], manifest: Manifest, options: Options) -> None:
    """Write the Parquet files that `manifest` does not have yet."""
    plan = {
        (config, split): plan_shards(config, split, of_split, options.max_shard_bytes)
        for config, splits in sizes.items()
        for split, of_split in splits.items()
    }
    all_shards = [shard for shards in plan.values() for shard in shards]
    done = sum(shard.stop - shard.start for shard in all_shards if manifest.is_complete(shard))
    total = sum(shard.stop - shard.start for shard in all_shards)
    with tqdm(total=total, initial=done, desc="Writing rows", unit="row") as bar:
        for (config, split), shards in plan.items():
            features = features_of(config, source)
            for shard, rows in _stored_rows(source, config, split, shards, manifest, options):
                data_bytes = 0

                def counted(rows: Iterator[dict[str, Any]] = rows) -> Iterator[dict[str, Any]]:
                    nonlocal data_bytes
                    for row in rows:
                        data_bytes += row_bytes(row)
                        yield row
                        bar.update()

                count, file_bytes = write_shard(manifest.output_dir / shard.path, counted(), features)
                if count != shard.stop - shard.start:
                    raise PrepareError(
                        f"{shard.path} got {count} rows where {shard.stop - shard.start} were counted: the data "
                        "changed while it was read. Run again."
                    )
                manifest.shards[shard.path] = {"rows": count, "bytes": file_bytes, "data_bytes": data_bytes}
                manifest.save()
    for path in set(manifest.shards) - {shard.path for shard in all_shards}:
        del manifest.shards[path]
    manifest.save()


def _card_facts(source: Source, manifest: Manifest, options: Options) -> CardFacts:
    splits: dict[str, dict[str, SplitFacts]] = {}
    for config, names in CONFIGS.items():
        for split in names:
            shards = [facts for path, facts in manifest.shards.items() if path.startswith(f"{config}/{split}-")]
            if not shards:
                continue
            totals = [sum(shard[key] for shard in shards) for key in ("rows", "data_bytes", "bytes")]
            splits.setdefault(config, {})[split] = SplitFacts(*totals)
    features = {config: features_of(config, source) for config in CONFIGS}
    return CardFacts(splits, features, options.card_options(), options.pretty_name, options.license)


def _print(source: Source, report: Report, problems_path: Path) -> None:
    say(f"{source.benchmark.pretty_name}: {source.format}")
    say(report.text())
    say(f"Findings are listed in {problems_path}.")


def _open(name: str, data_dir: str | os.PathLike, report: Report, options: Options) -> Source:
    return open_source(
        name, data_dir, report, source=options.source, use_images=options.use_images, keep_nil=options.keep_nil
    )


def prepare(
    name: str, data_dir: str | os.PathLike, output_dir: str | os.PathLike, options: Options | None = None
) -> Report:
    """Check a data set and write it to a folder that `load_dataset` reads.

    The folder gets `mentions/*.parquet`, `entities/*.parquet`, the card `README.md` with its `figures/`, `report.json`
    and `problems.jsonl`; `.prepare/` in it is for resuming. What is there of the same run already is kept.

    Args:
        name: `wikimel`, `richpediamel`, `wikidiverse` or `custom`.
        data_dir: the folder, `.zip` or uncompressed `.tar` of the data set.
        output_dir: a folder that is new, empty, or holds an interrupted run of the same input and options.
        options: see [`Options`].

    Returns:
        The report, which is printed as well.

    Raises:
        PrepareError: the data cannot be used, or, with `strict`, something is wrong with it.
        ArchiveError: there is no such data set in `data_dir`.
        FileExistsError: `output_dir` holds something else.
    """
    options = options or Options()
    output = Path(output_dir)
    report = Report()
    opened = _open(name, data_dir, report, options)
    try:
        manifest = Manifest(output, options.fingerprint(opened))
        manifest.save()
        report.list_in(output / PROBLEMS_FILE)
        sizes = validate(opened, report, options, output / Manifest.FOLDER / "images.jsonl")
        report.close()
        _print(opened, report, output / PROBLEMS_FILE)
        _refuse(report, options)
        write(opened, sizes, manifest, options)
        write_atomically(output / "report.json", (json.dumps(report.to_dict(), indent=1) + "\n").encode())
        write_card(output, opened, report, _card_facts(opened, manifest, options))
    finally:
        report.abandon()
        opened.close()
    return report


def report_only(
    name: str, data_dir: str | os.PathLike, problems_path: str | os.PathLike, options: Options | None = None
) -> Report:
    """Check a data set as [`prepare`] does, print the report and list the findings; write nothing else.

    Raises:
        PrepareError: the data cannot be used, or, with `strict`, something is wrong with it.
        ArchiveError: there is no such data set in `data_dir`.
    """
    options, path = options or Options(), Path(problems_path)
    report = Report()
    source = _open(name, data_dir, report, options)
    try:
        report.list_in(path)
        validate(source, report, options)
        report.close()
    finally:
        report.abandon()
        source.close()
    _print(source, report, path)
    _refuse(report, options)
    return report


def push(output_dir: str | os.PathLike, repo_id: str, *, private: bool = False) -> str:
    """Upload a folder that [`prepare`] wrote. What is on the Hub already is not sent again.

    Args:
        output_dir: the folder.
        repo_id: the data set repository, made where it does not exist.
        private: make it private if it is new.

    Returns:
        The repository's address.

    Raises:
        HubFilesError: if a file is a symbolic link to a place outside of the folder; nothing is sent then.
    """
    files, _ = hub_files(output_dir, "dataset")
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True)
    # Files of an earlier version that had another number of shards.
    stale = [
        path
        for path in api.list_repo_files(repo_id, repo_type="dataset")
        if path not in files and any(fnmatchcase(path, f"{config}/*.parquet") for config in CONFIGS)
    ]
    api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path, file) for path, file in files.items()),
            *(CommitOperationDelete(path) for path in stale),
        ],
        commit_message="Upload the data set",
        repo_type="dataset",
    )
    return str(url)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn the archives of a multimodal entity linking data set into a Hub data set.",
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=list(BENCHMARKS), help="the data set; 'custom' for your own CSV or JSON Lines")
    parser.add_argument("--data_dir", required=True, help="its folder, .zip or uncompressed .tar")
    parser.add_argument(
        "--output_dir", type=given_path, help="the folder to write; with --push_to_hub alone, one in the cache"
    )
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the result to this data set repository")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--report_only", action="store_true", help="check and report, write no data")
    parser.add_argument("--strict", action="store_true", help="refuse where a row or image would be left out")
    parser.add_argument("--source", choices=("auto", "published", "original"), default="auto",
                        help="the archive of the MIMIC authors or the data set's own release")  # fmt: skip
    parser.add_argument("--keep_nil", action="store_true",
                        help="keep mentions of no entity, with the answer null")  # fmt: skip
    parser.add_argument("--without_images", action="store_true", help="texts alone")
    parser.add_argument("--image_size", type=_positive, help="shrink images to this many pixels at most a side")
    parser.add_argument("--max_image_pixels", type=_positive, default=MAX_PIXELS,
                        help="leave larger images out (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--max_shard_size", type=_size, default="500MB", help="of a Parquet file (default: %(default)s)"
    )
    parser.add_argument("--num_workers", type=_positive, default=Options.num_workers,
                        help="threads that check images (default: %(default)s)")  # fmt: skip
    parser.add_argument("--problems", help="with --report_only, where to list findings (default: NAME-problems.jsonl)")
    parser.add_argument("--pretty_name", help="the name on the card")
    parser.add_argument("--license", help="the license's identifier on the card")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _size(text: str) -> int:
    try:
        return convert_file_size_to_int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB") from error


def _run(args: argparse.Namespace) -> None:
    options = Options(
        args.source,
        not args.without_images,
        args.image_size,
        args.max_image_pixels,
        args.max_shard_size,
        args.strict,
        args.num_workers,
        args.pretty_name,
        args.license,
        args.keep_nil,
    )
    if args.push_to_hub and not args.report_only:
        HfApi().whoami()  # rather now than after the work
    if args.report_only:
        report_only(args.name, args.data_dir, args.problems or f"{args.name}-{PROBLEMS_FILE}", options)
        return
    output = Path(args.output_dir or Path(datasets.config.HF_DATASETS_CACHE) / "mimic_el" / args.name)
    prepare(args.name, args.data_dir, output, options)
    print(f"Written to {output}")
    if args.push_to_hub:
        print(f"Uploaded to {push(output, args.push_to_hub, private=args.private)}")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns 0, or 1 where nothing was written, or 130 where it was interrupted."""
    tolerate_any_text()
    parser = _parser()
    args = parse(parser, argv)
    if not (args.output_dir or args.push_to_hub or args.report_only):
        parser.error("give --output_dir, --push_to_hub or --report_only")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    # Images have a limit of ours, and those above it are reported.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", message="The metadata of an image cannot be read")  # a finding says so
    try:
        _run(args)
        return 0
    except KeyboardInterrupt:
        print("\nInterrupted. What is written is kept: run the same command again to go on.", file=sys.stderr)
        return 130
    except (MimicError, FileExistsError) as error:
        print(f"error: {harmless(str(error))}", file=sys.stderr)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        print(
            f"error: the Hub refuses: {error}\nLog in with `hf auth login`, or run the command again to go on.",
            file=sys.stderr,
        )
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {harmless(str(error))}\nRun the same command again once this is repaired.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""The benchmarks as `datasets` builders, and as data sets in one call.

`load_dataset` no longer runs loading scripts; a builder is used as a class:

```python
from mimic_el.datasets_scripts.builders import WikiMel

builder = WikiMel(config_name="mentions", data_dir="WikiMEL")
builder.download_and_prepare()
train = builder.as_dataset(split="train")
```

[`load_raw`] does this for both configurations.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets

from mimic_el.images_mimic import MAX_PIXELS

from .archives import ArchiveError
from .image_files import ImageFile, inspect_image, shrink_image, without_metadata
from .report import SPLITS, Report
from .source import BENCHMARKS, EntityRow, MentionRow, Source
from .sources import columns_of, open_source

logger = logging.getLogger(__name__)


def mention_features(extra_columns: dict[str, str] | None = None) -> datasets.Features:
    """The columns of `mentions`, then those of one format alone (by their name, the type of a `datasets.Value`)."""
    features = {
        "id": datasets.Value("string"),
        "mention": datasets.Value("string"),
        "sentence": datasets.Value("string"),
        "image": datasets.Image(),
        "answer": datasets.Value("string"),
        "start": datasets.Value("int32"),
        "end": datasets.Value("int32"),
    }
    return datasets.Features(features | {name: datasets.Value(type_) for name, type_ in (extra_columns or {}).items()})


def entity_features(extra_columns: dict[str, str] | None = None) -> datasets.Features:
    """The columns of `entities`, then those of one data set alone."""
    features = {
        "id": datasets.Value("string"),
        "qid": datasets.Value("string"),
        "name": datasets.Value("string"),
        "description": datasets.Value("string"),
        "images": datasets.List(datasets.Image()),
    }
    return datasets.Features(features | {name: datasets.Value(type_) for name, type_ in (extra_columns or {}).items()})


def features_of(config: str, source: Source) -> datasets.Features:
    """The columns of a configuration of a source."""
    if config == "entities":
        return entity_features(source.entity_columns)
    return mention_features(source.extra_columns)


def encode(row: MentionRow | EntityRow, read: Callable[[ImageFile], bytes]) -> dict[str, Any]:
    """A row as it is stored, its images as `{"bytes", "path"}` with the bytes that `read` gives."""

    def stored(image: ImageFile) -> dict[str, Any]:
        return {"bytes": read(image), "path": image.name.rpartition("/")[2]}

    if isinstance(row, EntityRow):
        images = [stored(image) for image in row.images]
        common = {"id": row.id, "qid": row.qid, "name": row.name, "description": row.description, "images": images}
        return {**common, **row.extra}
    return {
        "id": row.id,
        "mention": row.mention,
        "sentence": row.sentence,
        "image": None if row.image is None else stored(row.image),
        "answer": row.answer,
        "start": row.start,
        "end": row.end,
        **row.extra,
    }


def checked_rows(
    source: Source,
    config: str,
    split: str,
    report: Report,
    max_image_pixels: int = MAX_PIXELS,
    image_size: int | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of a split as they are stored, each image decoded first; one that cannot be is left out and reported.

    `image_size` as in [`mimic_el.datasets_scripts.archives.shrink_image`].
    """
    for row in source.rows(config, split, report):
        images = row.images if isinstance(row, EntityRow) else [row.image] if row.image else []
        data: dict[ImageFile, bytes] = {}
        for image in images:
            try:
                data[image] = source.read_image(image)
                problem = inspect_image(data[image], max_image_pixels)
            except ArchiveError as error:
                problem = error.kind, str(error)
            if problem:
                source.bad_images[image] = problem
                report.add(problem[0], row.file, row.row, f"{image.name!r}: {problem[1]}")
            if problem and problem[0] != "broken_metadata":
                data.pop(image, None)
                continue
            if problem:
                data[image] = without_metadata(data[image])
            if image_size:
                data[image] = shrink_image(data[image], image_size)
        if isinstance(row, EntityRow):
            row.images = [image for image in row.images if image in data]
        elif row.image not in data:
            row.image = None
        yield encode(row, data.__getitem__)


@dataclass
class MelConfig(datasets.BuilderConfig):
    """What to read: the configuration `mentions` or `entities` of the data set in `data_dir`.

    Args:
        source: `published`, `original` or `auto`, as in [`mimic_el.datasets_scripts.sources.open_source`].
        use_images: whether to read images.
        max_image_pixels: larger images are left out.
        image_size: re-encode larger images so that their longest side has this many pixels.
        keep_nil: keep mentions of no entity, with the answer `None`.
        fingerprint: tells versions of the data in one folder apart in the cache; [`load_raw`] fills it in.
    """

    source: str = "auto"
    use_images: bool = True
    max_image_pixels: int = MAX_PIXELS
    image_size: int | None = None
    keep_nil: bool = False
    fingerprint: str | None = None


class MelBuilder(datasets.GeneratorBasedBuilder):
    """Builds the configurations `mentions` and `entities` of one data set from a local copy of its archive.

    Findings are counted and logged; `mimic-el prepare` lists each of them.

    Raises:
        ValueError: from `download_and_prepare`, where the data cannot be read; the message says what is wrong where.
    """

    benchmark: ClassVar[str]

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = MelConfig
    BUILDER_CONFIGS: ClassVar[list[datasets.BuilderConfig]] = [MelConfig(name="mentions"), MelConfig(name="entities")]
    # Rows are held in memory until this many are together.
    DEFAULT_WRITER_BATCH_SIZE = 100

    config: MelConfig

    def __init__(self, *args: Any, **kwargs: Any):
        # Builders are called after their module unless told otherwise: four data sets would share one cache.
        kwargs.setdefault("dataset_name", self.benchmark)
        super().__init__(*args, **kwargs)

    @property
    def _data_dir(self) -> str:
        if not self.config.data_dir:
            raise ValueError(f"{type(self).__name__} needs data_dir, the folder or archive of {self.benchmark}")
        return self.config.data_dir

    def _info(self) -> datasets.DatasetInfo:
        of_mentions, of_entities = columns_of(self.benchmark, self._data_dir, self.config.source)
        is_kb = self.config.name == "entities"
        return datasets.DatasetInfo(features=entity_features(of_entities) if is_kb else mention_features(of_mentions))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        splits = ("kb",) if self.config.name == "entities" else SPLITS
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split in splits]

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.config
        source, report = open_checked(
            self.benchmark,
            self._data_dir,
            source=config.source,
            use_images=config.use_images,
            keep_nil=config.keep_nil,
        )
        try:
            rows = checked_rows(source, config.name, split, report, config.max_image_pixels, config.image_size)
            yield from enumerate(rows)
        finally:
            source.close()
        for kind, count in report.counts.items():
            level = logging.WARNING if kind in report.errors else logging.INFO
            logger.log(level, "%s, %s: %d %s, e.g. %s", self.benchmark, split, count, kind, report.examples[kind][0])


class WikiMel(MelBuilder):
    """WikiMEL: the archive of the MIMIC authors, or MELBench's `Wikidata-MEL.json`."""

    benchmark = "wikimel"


class RichpediaMel(MelBuilder):
    """RichpediaMEL: the archive of the MIMIC authors, or MELBench's `Richpedia-MEL.json`."""

    benchmark = "richpediamel"


class WikiDiverse(MelBuilder):
    """WikiDiverse: the archive of the MIMIC authors, or the data set's own release."""

    benchmark = "wikidiverse"


class Custom(MelBuilder):
    """Own data, see [`mimic_el.datasets_scripts.custom.CustomData`]."""

    benchmark = "custom"


BUILDERS: dict[str, type[MelBuilder]] = {
    builder.benchmark: builder for builder in (WikiMel, RichpediaMel, WikiDiverse, Custom)
}


def open_checked(
    name: str, data_dir: str | os.PathLike, *, source: str = "auto", use_images: bool = True, keep_nil: bool = False
) -> tuple[Source, Report]:
    """Open a data set that can be read.

    Raises:
        ValueError: a file is missing or broken; the message names all of them.
    """
    report = Report()
    opened = open_source(name, data_dir, report, source=source, use_images=use_images, keep_nil=keep_nil)
    if report.fatal:
        opened.close()
        problems = "\n".join(f"  {kind}: {example}" for kind in report.fatal for example in report.examples[kind])
        raise ValueError(f"{BENCHMARKS[name].pretty_name} in {data_dir} cannot be read:\n{problems}")
    return opened, report


def load_raw(
    name: str,
    data_dir: str | os.PathLike,
    *,
    source: str = "auto",
    use_images: bool = True,
    image_size: int | None = None,
    keep_nil: bool = False,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> tuple[datasets.DatasetDict | datasets.IterableDatasetDict, datasets.Dataset | datasets.IterableDataset]:
    """Load a data set from the archive its authors publish, without preparing it first.

    Args:
        name: `wikimel`, `richpediamel`, `wikidiverse` or `custom`.
        data_dir: the folder, `.zip` or uncompressed `.tar`.
        source: `published` for the archive of the MIMIC authors, `original` for the data set's own release, `auto` for
            the first of these that is there.
        use_images: whether to read images.
        image_size: re-encode larger images so that their longest side has this many pixels.
        keep_nil: keep mentions of no entity, with the answer `None`.
        streaming: read rows when they are asked for, instead of copying the data to the cache of `datasets` first.
        cache_dir: another folder for that cache.

    Returns:
        `mentions` with the splits `train`, `validation` and `test` (unless streaming, only those that have rows), and
        the entities.

    Raises:
        ValueError: a file is missing or broken; the message names all of them.
    """
    opened, _ = open_checked(name, data_dir, source=source, use_images=use_images, keep_nil=keep_nil)
    fingerprint = opened.fingerprint()
    opened.close()
    builders = {
        config: BUILDERS[name](
            config_name=config,
            data_dir=os.fspath(data_dir),
            cache_dir=cache_dir,
            source=source,
            use_images=use_images,
            image_size=image_size,
            keep_nil=keep_nil,
            fingerprint=fingerprint,
        )
        for config in ("mentions", "entities")
    }
    if streaming:
        splits = {split: _stream(builders["mentions"], split) for split in SPLITS}
        return datasets.IterableDatasetDict(splits), _stream(builders["entities"], "kb")
    for builder in builders.values():
        builder.download_and_prepare()
    # `datasets` has no data set without rows.
    written = [str(split) for split, facts in builders["mentions"].info.splits.items() if facts.num_examples]
    mentions = {split: builders["mentions"].as_dataset(split=split) for split in written}
    return datasets.DatasetDict(mentions), builders["entities"].as_dataset(split="kb")


def _stream(builder: MelBuilder, split: str) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(
        _examples, features=builder.info.features, gen_kwargs={"builder": builder, "split": split}, split=split
    )


def _examples(builder: MelBuilder, split: str) -> Iterator[dict[str, Any]]:
    for _, example in builder._generate_examples(split):
        yield example

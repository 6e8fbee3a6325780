"""What all formats of data sets share: rows, benchmarks, and the reading of files, fields and images.

A [`Source`] yields [`MentionRow`] and [`EntityRow`] objects, and reports everything that is wrong with them to a
[`Report`]. Rows are light: they only name their images, which are read when they are written or used. Each format has
its own file; [`mimic_el.datasets_scripts.sources`] finds the format of a folder.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import unquote

from .archives import READ_ERRORS, ArchiveError, DirectoryTree, Tree, load_json, open_nested
from .image_files import ImageFile, ImageFolder, without_metadata
from .report import Report
from .splits import SPLIT_WORDS

# The images of one entity must fit in one cell of an Arrow table.
MAX_ROW_IMAGE_BYTES = 1 << 30


@dataclass(frozen=True)
class Benchmark:
    """A published data set: how its files are called, and what is known of them.

    `aliases` are what its files' names begin with, in lower case without `_` and `-`; `published` are counts of the
    MIMIC paper.
    """

    name: str
    pretty_name: str
    aliases: tuple[str, ...]
    published: dict[str, int] = field(default_factory=dict)
    md5: dict[str, str] = field(default_factory=dict)
    melbench_file: str | None = None


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "wikimel",
            "WikiMEL",
            ("wikimel", "wikidatamel"),
            {"test mentions": 5_169, "entities": 109_976},
            melbench_file="Wikidata-MEL.json",
        ),
        Benchmark(
            "richpediamel",
            "RichpediaMEL",
            ("richpediamel",),
            {"test mentions": 3_562, "entities": 160_933},
            {
                "kb_entity.json": "ba086b054bf52d549f2a79503c76704a",
                "qid2id.json": "8059b7aa89a9314d5dc38607a8685eeb",
                "RichpediaMEL_dev.json": "831cdd92d70a93ea8a442798ec2fcde1",
                "RichpediaMEL_test.json": "9e07e5e970e01079d256311e5ac10bd8",
                "RichpediaMEL_train.json": "e1d0b2adb2a1114cefa63860ffa23982",
                "kb_image.zip": "961efc263bc8e2e7b257a28e8e703633",
                "mention_images.zip": "474c594ce8a95aa5dc9222365db0044e",
            },
            melbench_file="Richpedia-MEL.json",
        ),
        Benchmark(
            "wikidiverse",
            "WikiDiverse",
            ("wikidiverse",),
            {"test mentions": 2_078, "entities": 132_460},
        ),
        Benchmark("custom", "Custom", ()),
    )
}


@dataclass(slots=True)
class MentionRow:
    """A mention; `file` and `row` say where it comes from.

    `answer` is `None` for a mention of no entity. `start` and `end` are where it is in its sentence, in characters, or
    `None` where that is not known. `extra` are the columns of the source.
    """

    file: str
    row: int | str
    id: str
    mention: str
    sentence: str
    answer: str | None
    image: ImageFile | None
    start: int | None
    end: int | None
    extra: dict[str, Any]


@dataclass(slots=True)
class EntityRow:
    """An entity of the knowledge base; `file` and `row` say where it comes from."""

    file: str
    row: int | str
    id: str
    qid: str | None
    name: str
    description: str
    images: list[ImageFile]
    extra: dict[str, Any] = field(default_factory=dict)


class Source(ABC):
    """A data set as it lies on disk.

    Attributes:
        format: what the card and the log call the format.
        extra_columns: columns of `mentions` beyond the common ones, with their types.
        entity_columns: columns of `entities` beyond the common ones, with their types.
        is_closed: whether the knowledge base is no more than the answers of the mentions.
        bad_images: `(kind, detail)` of images that were found unusable; rows then come without them, but for
            `broken_metadata`, which is left out of the image.
    """

    format: ClassVar[str]
    extra_columns: dict[str, str] = {"source_id": "string"}  # noqa: RUF012 - a format may have its own for each source
    entity_columns: dict[str, str] = {}  # noqa: RUF012
    is_closed: ClassVar[bool] = False

    def __init__(
        self,
        benchmark: Benchmark,
        trees: list[Tree],
        prefix: str,
        report: Report,
        use_images: bool = True,
        keep_nil: bool = False,
    ):
        self.benchmark = benchmark
        self.trees = trees
        self.tree = trees[-1]
        self.prefix = prefix
        self.report = report
        self.use_images = use_images
        self.keep_nil = keep_nil
        self.bad_images: dict[ImageFile, tuple[str, str]] = {}
        self.mention_images: ImageFolder | None = None
        self.entity_images: ImageFolder | None = None
        self._used: list[tuple[Tree, str]] = []
        self._image_archives: list[str] = []
        self._entity_ids: set[str] | None = None
        self._names_here = sorted(
            name[len(prefix) :] for name in [*self.tree.files, *self.tree.refused] if name.startswith(prefix)
        )

    # What a format must say.

    @abstractmethod
    def entities(self, report: Report) -> Iterator[EntityRow]:
        """Every entity once, and to `report` what is wrong with them."""

    @abstractmethod
    def mentions(self, split: str, report: Report) -> Iterator[MentionRow]:
        """The mentions of a split whose answer is an entity, and to `report` what is wrong with them."""

    # What all formats share.

    @property
    def entity_ids(self) -> set[str]:
        """The ids that [`entities`] yields."""
        if self._entity_ids is None:
            self._entity_ids = {entity.id for entity in self.entities(Report())}
        return self._entity_ids

    def read_image(self, image: ImageFile) -> bytes:
        """An image's bytes, as they are stored; raises `ArchiveError` (`oversized_image`, `unreadable_image`)."""
        data = image.read()
        return without_metadata(data) if self.bad_images.get(image, ("",))[0] == "broken_metadata" else data

    def rows(self, config: str, split: str, report: Report) -> Iterator[MentionRow | EntityRow]:
        """[`entities`] for the configuration `entities`, else [`mentions`] of `split`."""
        yield from self.entities(report) if config == "entities" else self.mentions(split, report)

    def fingerprint(self) -> str:
        """Changes with the name, size or date of any file that is read."""
        digest = hashlib.sha256(f"{self.format} {self.use_images} {self.keep_nil}".encode())
        used = list(self._used)
        for folder in (self.mention_images, self.entity_images):
            used += sorted(folder.files.values(), key=lambda file: file[1]) if folder else []
        for tree, name in used:
            digest.update(f"{name}\0{tree.files[name]}\0{tree.changed(name)}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def hash_archives(self, report: Report, advance: Callable[[int], Any] = lambda count: None) -> None:
        """Report the MD5 sums of the archives of images; `advance` is told the bytes read, as it goes."""
        for name in self._image_archives:
            digest = hashlib.md5()
            try:
                with self.tree.open(name) as file:
                    while block := file.read(1 << 22):
                        digest.update(block)
                        advance(len(block))
            except READ_ERRORS as error:
                report.add("unreadable", name, detail=str(error))
                continue
            self._add_file(report, name, self.tree.files[name], digest.hexdigest())

    @property
    def archive_bytes(self) -> int:
        """Bytes that [`hash_archives`] reads."""
        return sum(self.tree.files[name] for name in self._image_archives)

    def close(self) -> None:
        """Close the archives."""
        for folder in (self.mention_images, self.entity_images):
            for tree in {id(tree): tree for tree, _ in folder.files.values()}.values() if folder else ():
                tree.close()
        for tree in reversed(self.trees):
            tree.close()

    def _add_file(self, report: Report, name: str, size: int, md5: str) -> None:
        base = name.rpartition("/")[2]
        report.add_file(base, size, md5, self.benchmark.md5.get(base))

    def _load(self, name: str | None, expected: str, kind: type, structure: str) -> Any:
        """A JSON file of the data set, or `None` and a finding where it cannot be used."""
        if name is None or (self.prefix + name not in self.tree.files and self.prefix + name not in self.tree.refused):
            here = [name for name in self._names_here if name.lower().endswith(".json") and "/" not in name]
            there = f"; there are {', '.join(here[:8])}" if here else ""
            self.report.add("missing_file", expected, detail=f"not in {self._place}{there}")
            return None
        path = self.prefix + name
        if path in self.tree.refused:
            refusal, reason = self.tree.refused[path]
            self.report.add(refusal, name, detail=reason)
            return None
        self._used.append((self.tree, path))
        try:
            loaded = load_json(self.tree, path)
        except ArchiveError as error:
            self.report.add(error.kind, name, detail=str(error))
            return None
        for key in loaded.duplicate_keys:
            self.report.add("duplicate_key", name, detail=f"key {key!r}")
        self._add_file(self.report, name, loaded.size, loaded.md5)
        if not isinstance(loaded.value, kind):
            self.report.add(
                "wrong_structure", name, detail=f"is a JSON {json_type(loaded.value)}; should be {structure}"
            )
            return None
        return loaded.value

    @property
    def _place(self) -> str:
        return f"{self.tree.label}/{self.prefix}".rstrip("/")

    def _split_file(self, split: str, suffix: str = "") -> str | None:
        """The file of a split: an alias or nothing, the split's word, `suffix` or nothing."""
        return find_split(self._names_here, self.benchmark.aliases, split, suffix)

    def _image_folder(self, names: tuple[str, ...]) -> ImageFolder | None:
        """The images in folders or zip archives called one of `names`, next to the JSON files."""
        parts: list[tuple[Tree, str]] = []
        found = []
        top = dict.fromkeys(name.partition("/")[0] for name in self._names_here)
        for name in top:
            path = self.prefix + name
            is_archive = name.lower().endswith(".zip") and name[:-4].lower() in names
            refusal, reason = self.tree.refused.get(path, ("", ""))
            if refusal and (is_archive or (name.lower() in names and refusal == "unsafe")):
                hint = "; put it there itself, or give the folder where it really is" if refusal == "unsafe" else ""
                self.report.add(refusal, name, detail=reason + hint)
            elif name.lower() in names and path not in self.tree.files:
                parts.append((self.tree, path + "/"))
                found.append(name)
            elif is_archive and path in self.tree.files:
                self._used.append((self.tree, path))
                try:
                    nested = open_nested(self.tree, path)
                except ArchiveError as error:
                    self.report.add(error.kind, name, detail=str(error))
                    continue
                self._image_archives.append(path)
                for member, (_, reason) in nested.refused.items():
                    self.report.add("unsafe_member", name, detail=f"{member!r} {reason}")
                parts.append((nested, ""))
                found.append(name)
        return ImageFolder(" and ".join(found), parts) if parts else None

    def _required_images(self, names: tuple[str, ...]) -> ImageFolder | None:
        if not self.use_images:
            return None
        before = self.report.fatal.total()
        folder = self._image_folder(names)
        if folder is None and self.report.fatal.total() == before:
            expected = " or ".join(f"{name}/ or {name}.zip" for name in names)
            self.report.add(
                "missing_file", names[0], detail=f"{expected} not in {self._place}; to do without: --without_images"
            )
        return folder

    def _report_unsafe_members(self) -> None:
        """The members of the data set's own archive that were refused."""
        for tree in self.trees:
            if not isinstance(tree, DirectoryTree):
                for name, (_, reason) in tree.refused.items():
                    self.report.add("unsafe_member", os.path.basename(tree.label), detail=f"{name!r} {reason}")

    # Fields of a row.

    def _clean(self, text: str, report: Report, file: str, row: int | str, name: str) -> str:
        """`text` without code points that are not characters (they cannot be stored as UTF-8)."""
        stored = whole(text)
        if stored is not text:
            report.add("broken_text", file, row, f"{name}: {text[:80]!r}")
        return stored

    def _unquote(self, text: str, report: Report, file: str, row: int | str, name: str) -> str:
        text = self._clean(text, report, file, row, name)
        plain = unquote(text)
        if "\ufffd" in plain and "\ufffd" not in text:
            report.add("broken_text", file, row, f"{name}: {text[:80]!r} is not URL-encoded UTF-8")
        return plain

    def _image(
        self,
        folder: ImageFolder | None,
        reference: str,
        report: Report,
        file: str,
        row: int | str,
        moved: bool = False,
    ) -> ImageFile | None:
        if folder is None:
            return None
        try:
            image, step = folder.find(reference, moved)
            kind, detail = self.bad_images.get(image, ("", ""))
            if kind == "broken_metadata":
                report.add(kind, file, row, detail)
            elif kind:
                raise ArchiveError(kind, detail)
        except ArchiveError as error:
            report.add(error.kind, file, row, str(error))
            return None
        report.resolved[step] += 1
        return image

    def _images(
        self, folder: ImageFolder | None, references: list[str], report: Report, file: str, row: int | str
    ) -> list[ImageFile]:
        images, total = [], 0
        for reference in references:
            image = self._image(folder, reference, report, file, row)
            if image is None:
                continue
            total += image.size
            if total > MAX_ROW_IMAGE_BYTES:
                report.add("oversized_image", file, row, f"{reference!r} and those after it: too much for one entity")
                break
            images.append(image)
        return images

    def _span(
        self,
        mention: str,
        sentence: str,
        report: Report,
        file: str,
        row: int | str,
        stated: tuple[int | None, int | None] = (None, None),
    ) -> tuple[int | None, int | None]:
        """Where a mention is in its sentence: as stated, or where it is once; and to `report` what is odd about it."""
        if not mention.strip():
            report.add("empty_mention", file, row, repr(mention))
        if mention not in sentence:
            report.add("mention_not_in_sentence", file, row, f"{mention[:80]!r}")
        start, end = stated
        if start is not None and end is not None:
            if 0 <= start <= end and sentence[start:end] == mention:
                return start, end
            report.add("wrong_span", file, row, f"{start} to {end} is not {mention[:80]!r}")
        return only_place(mention, sentence)

    def _leaves_nil(self, mention: Any, report: Report, file: str, row: int | str) -> bool:
        """Whether a mention of no entity is left out; either is reported."""
        report.add("nil_kept" if self.keep_nil else "nil_answer", file, row, f"mention {str(mention)[:80]!r}")
        return not self.keep_nil


class ClosedSource(Source):
    """A data set without a knowledge base: its entities are the answers of its own mentions."""

    is_closed = True
    _IMAGE_FOLDERS: ClassVar[tuple[str, ...]] = ("mention_image", "mention_images", "images", "image", "imgs")

    def __init__(self, benchmark: Benchmark, trees: list[Tree], prefix: str, report: Report, **options: bool):
        super().__init__(benchmark, trees, prefix, report, **options)
        detail = "the source has none; linking to this one is easier, and results do not compare with published ones"
        report.add("closed_knowledge_base", benchmark.name, detail=detail)

    def _optional_images(self) -> None:
        if self.use_images:
            self.mention_images = self._image_folder(self._IMAGE_FOLDERS)
        if self.mention_images is None:
            reason = f"no folder or zip archive called {', '.join(self._IMAGE_FOLDERS)}" if self.use_images else ""
            self.report.add("no_images", self.benchmark.name, detail=reason or "images left out on request")


def id_text(value: Any) -> str | None:
    """An id as a string, or `None` where it is none. As everywhere, 1 and 1.0 are the id "1"."""
    if isinstance(value, float) and abs(value) <= 2**53 and value.is_integer():
        return str(int(value))
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return str(value)


def whole(text: str) -> str:
    """`text` itself, or what can be stored of it as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # Two escaped halves that belong together become the character they were meant to be.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def is_nil(answer: Any) -> bool:
    """Whether an answer says that the mention is of no entity: null, NaN, nothing but white space, or `nil`."""
    if isinstance(answer, str):
        return answer.strip().lower() in ("", "nil")
    return answer is None or (isinstance(answer, float) and math.isnan(answer))


def only_place(mention: str, sentence: str) -> tuple[int | None, int | None]:
    """Where `mention` begins and ends in `sentence`, where it is there exactly once; else `(None, None)`."""
    start = sentence.find(mention) if mention else -1
    if start < 0 or sentence.find(mention, start + 1) >= 0:
        return None, None
    return start, start + len(mention)


def int_of(value: Any) -> int | None:
    """An integer of 32 bits that a number or a string of digits says; `None` for anything else."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**31) <= value < 2**31:
        return None
    return value


def json_type(value: Any) -> str:
    """What a value of JSON is, in words."""
    names = {dict: "object", list: "list", str: "string", int: "number", float: "number", bool: "true or false"}
    return "missing or null" if value is None else names.get(type(value), type(value).__name__)


def plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def find_split(names: list[str], aliases: tuple[str, ...], split: str, suffix: str = "") -> str | None:
    """The file of a split among `names`; one that begins with an alias wins over one that is the bare word."""
    words = [plain(start + word + suffix) + ".json" for start in (*aliases, "") for word in SPLIT_WORDS[split]]
    by_word = {plain(name): name for name in reversed(names) if "/" not in name}
    return next((by_word[word] for word in words if word in by_word), None)

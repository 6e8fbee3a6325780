"""The format of WikiDiverse's own files, and the pages of Wikipedia that its annotations name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import unquote

from .archives import Tree
from .report import SPLITS, Report
from .source import SPLIT_WORDS, Benchmark, ClosedSource, EntityRow, MentionRow, is_int32, is_nil, json_type, whole


class WikiDiverseRelease(ClosedSource):
    """WikiDiverse's own files: lists of `[sentence, image URL, topic, [[mention, type, start, end, entity URL], ...]]`.

    The release with candidates, one mention a row in eleven columns, is read as well. Entities are Wikipedia pages; an
    entity's id is its page's title with underscores.
    """

    format = "WikiDiverse's own release"
    extra_columns: ClassVar[dict[str, str]] = {
        "source_id": "string",
        "topic": "string",
        "mention_type": "string",
        "start": "int32",
        "end": "int32",
    }
    _IMAGE_FOLDERS = ("wikinewsimgs", *ClosedSource._IMAGE_FOLDERS)
    _CANDIDATES = "_w_10cands"

    def __init__(self, benchmark: Benchmark, trees: list[Tree], prefix: str, report: Report, use_images: bool = True):
        super().__init__(benchmark, trees, prefix, report, use_images)
        self._report_unsafe_members()
        self._files: dict[str, str] = {}
        self._rows: dict[str, list] = {}
        for split, words in SPLIT_WORDS.items():
            name = self._split_file(split) or self._split_file(split, self._CANDIDATES)
            self._files[split] = name or f"{words[-1] if split == 'validation' else split}.json"
            rows = self._load(name, self._files[split], list, "a list of [sentence, image URL, topic, mentions]")
            if rows and isinstance(rows[0], dict):
                detail = "holds objects, as the archive of the MIMIC authors does, but kb_entity.json is not there"
                report.add("wrong_structure", self._files[split], detail=detail)
                rows = None
            self._rows[split] = rows or []
        self._optional_images()

    @staticmethod
    def _parse(item: Any) -> tuple[str, str, str, list] | str:
        """`(sentence, image URL, topic, mentions)` of a row, or what is wrong with it."""
        if not isinstance(item, list):
            return f"is {json_type(item)}, not a list"
        if len(item) >= 11 and all(isinstance(item[at], str) for at in (0, 1, 2, 3, 6, 8)):
            return item[0], item[1], item[8], [[item[2], item[3], item[9], item[10], item[6]]]
        if len(item) < 4 or not all(isinstance(part, str) for part in item[:3]) or not isinstance(item[3], list):
            return "is not [sentence, image URL, topic, mentions]"
        return item[0], item[1], item[2], item[3]

    @staticmethod
    def _mention_problem(mention: Any) -> str | None:
        if not isinstance(mention, list) or len(mention) < 5:
            return "a mention is not [mention, type, start, end, entity URL]"
        if not isinstance(mention[0], str) or not isinstance(mention[4], str):
            return "a mention or its entity URL is not a string"
        return None

    def entities(self, report: Report) -> Iterator[EntityRow]:
        seen: set[str] = set()
        for split in SPLITS:
            for row, item in enumerate(self._rows[split]):
                parsed = self._parse(item)
                for mention in () if isinstance(parsed, str) else parsed[3]:
                    if self._mention_problem(mention) or is_nil(mention[4]):
                        continue
                    page = wikipedia_page(mention[4])
                    if page and page.id not in seen:
                        seen.add(page.id)
                        yield EntityRow(self._files[split], row, page.id, None, page.title, "", [])

    def mentions(self, split: str, report: Report) -> Iterator[MentionRow]:
        file = self._files[split]
        for row, item in enumerate(self._rows[split]):
            parsed = self._parse(item)
            if isinstance(parsed, str):
                report.add("bad_row", file, row, parsed)
                continue
            sentence, url, topic, mentions = parsed
            sentence = self._clean(sentence, report, file, row, "sentence")
            topic = self._clean(topic, report, file, row, "topic")
            image = self._image(self.mention_images, image_name(url), report, file, row) if url.strip() else None
            for number, annotation in enumerate(mentions):
                problem = self._mention_problem(annotation)
                if problem:
                    report.add("bad_row", file, row, problem)
                    continue
                surface, type_, start, end, entity = annotation[:5]
                if is_nil(entity):
                    report.add("nil_answer", file, row, f"mention {surface[:80]!r}")
                    continue
                page = wikipedia_page(entity)
                if page is None:
                    report.add("answer_without_entity", file, row, f"{entity[:80]!r} is not an address of an entity")
                    continue
                if page.repaired:
                    report.add("repaired_entity_url", file, row, f"{entity[:80]!r}")
                mention = self._clean(surface, report, file, row, "mention")
                self._check_mention(mention, sentence, report, file, row)
                span = [value if is_int32(value) else None for value in (start, end)]
                if None in span or not isinstance(type_, str):
                    report.add("bad_field", file, row, "the type or span of a mention is of another type")
                extra = {
                    "source_id": str(row),
                    "topic": topic,
                    "mention_type": self._clean(type_, report, file, row, "type") if isinstance(type_, str) else None,
                    "start": span[0],
                    "end": span[1],
                }
                yield MentionRow(file, row, f"{split}-{row}-{number}", mention, sentence, page.id, image, extra)


@dataclass(frozen=True)
class WikipediaPage:
    """A page: `id` is its title with underscores, before it the language where it is not English."""

    id: str
    title: str
    repaired: bool


def wikipedia_page(url: str) -> WikipediaPage | None:
    """The page that an address means; `None` for what is no address of a wiki's page.

    The release's annotations begin with stray characters now and then (`nhttps://...`, `]https://...`, `ttps://...`).
    """
    head, _, path = url.strip().partition("/wiki/")
    title = whole(unquote(path)).strip().replace("_", " ").strip()
    if not title:
        return None
    host = re.search(r"([a-z-]+)(?:\.m)?\.wikipedia\.org$", head)
    if host is None:
        return WikipediaPage(whole(f"{head}/wiki/{title.replace(' ', '_')}"), title, False)
    language = "" if host[1] == "en" else f"{host[1]}:"
    repaired = re.fullmatch(r"https?://[a-z-]+(?:\.m)?\.wikipedia\.org", head) is None
    return WikipediaPage(f"{language}{title.replace(' ', '_')}", title, repaired)


def image_name(url: str) -> str:
    """The file that WikiDiverse stores an image in: the MD5 sum of the address's last part, `.svg` as `.png`."""
    last = url.rpartition("/")[2]
    extension = re.search(r"\.(jpe?g|png|svg|gif|tiff?|webp)", last, re.IGNORECASE)
    suffix = extension[0] if extension else ""
    if suffix.lower() == ".svg":
        suffix = ".png"
    return hashlib.md5(last.encode("utf-8", "surrogatepass")).hexdigest() + suffix

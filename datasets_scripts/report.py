"""What is in a data set and what is wrong with it: findings are counted by kind, and listed in a JSON Lines file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

Severity = Literal["fatal", "error", "note"]


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    `fatal`: nothing can be written. `error`: a row or an image is left out or changed; `--strict` refuses. `note`:
    true of the data and worth knowing; `--strict` allows it.
    """

    severity: Severity
    effect: str


KINDS: dict[str, Kind] = {
    # Files.
    "missing_file": Kind("fatal", "a file or folder of the data set is not there"),
    "not_a_file": Kind("fatal", "something else than a file has a file's name"),
    "unsafe": Kind("fatal", "a file or folder of the data set lies outside of it"),
    "broken_archive": Kind("fatal", "an archive cannot be read"),
    "broken_json": Kind("fatal", "a file is not JSON"),
    "wrong_encoding": Kind("fatal", "a file's text is not in the encoding it should be in"),
    "wrong_structure": Kind("fatal", "a file is JSON, CSV or JSON Lines of another structure"),
    "open_quote": Kind("fatal", "a quote in a CSV file is not closed, and the rows after it became its text"),
    "oversized": Kind("fatal", "a file is too large to be what it should be"),
    "unreadable": Kind("fatal", "a file is damaged"),
    "unsafe_member": Kind("error", "archive members with unsafe names, links, encryption or absurd sizes, not read"),
    "duplicate_key": Kind("error", "JSON keys given twice in one object, of which the last counts"),
    "no_images": Kind("note", "no images come with the data, or they were not asked for"),
    "no_rows": Kind("fatal", "nothing that could be used is left of the entities or the mentions"),
    "empty_split": Kind("note", "splits without mentions, not written because they could not be loaded"),
    "closed_knowledge_base": Kind("note", "the knowledge base holds the mentions' own answers and nothing else"),
    "md5_differs": Kind("note", "files that differ from the published ones"),
    "size_differs": Kind("note", "counts that differ from the published ones"),
    "other_name": Kind("note", "fields that no row has, where one of another name may be meant"),
    "local_path": Kind("note", "columns of one's own with paths of files on a machine, left out of what is shared"),
    # Mentions.
    "bad_row": Kind("error", "rows without the fields they need, left out"),
    "answer_without_entity": Kind("error", "mentions whose answer is not in the knowledge base, left out"),
    "nil_answer": Kind("note", "mentions whose answer is 'nil', null or empty, left out"),
    "nil_kept": Kind("note", "mentions whose answer is 'nil', null or empty, kept with the answer null"),
    "sentence_in_several_splits": Kind(
        "note", "mentions whose sentence is in an earlier split too: what is tested was trained on"
    ),
    "image_in_several_splits": Kind("note", "an image goes with too many sentences to keep them all in one split"),
    "wrong_span": Kind("note", "places of mentions that hold something else, replaced by where the mention is once"),
    "duplicate_mention_id": Kind("note", "mentions that share a record's id, kept"),
    "empty_mention": Kind("note", "mentions of nothing but white space, kept"),
    "mention_not_in_sentence": Kind("note", "mentions that do not occur literally in their sentence, kept"),
    "repaired_entity_url": Kind("note", "entity addresses with a damaged beginning, repaired"),
    # Entities.
    "bad_entity": Kind("error", "entities without the fields they need, left out"),
    "duplicate_entity_id": Kind("error", "entities with an id given before, left out"),
    "duplicate_qid": Kind("note", "entities with a qid given before, kept"),
    "conflicting_name": Kind("note", "further names of an entity, of which the first counts"),
    # Fields of either.
    "bad_field": Kind("error", "optional fields of another type than expected, taken as empty"),
    "broken_text": Kind("error", "texts with characters that are none, replaced by U+FFFD"),
    # Images; the row is kept without it.
    "missing_image": Kind("error", "images that are named and not there"),
    "unreadable_image": Kind("error", "images that are damaged or none"),
    "oversized_image": Kind("error", "images above the limit of pixels or bytes"),
    "broken_metadata": Kind("error", "images whose metadata is damaged, stored without it"),
    "image_not_a_file": Kind("error", "images that are a folder or something else than a file"),
    "unsafe_image_path": Kind("error", "images named by a path that leaves their folder, refused"),
}
# Findings that leave a row of a table out.
LEFT_OUT = {
    "mentions": ("bad_row", "answer_without_entity", "nil_answer"),
    "entities": ("bad_entity", "duplicate_entity_id"),
}
IMAGE_KINDS = tuple(
    kind for kind in KINDS if kind.endswith("_image") or kind in ("image_not_a_file", "unsafe_image_path")
)

SPLITS = ("train", "validation", "test")


# A file may give every row fields of its own.
MAX_FIELD_NAMES = 50
# Of a small archive a list of millions of findings could be made.
MAX_LISTED = 100_000
MAX_DETAIL_CHARACTERS = 500


def printable(text: str) -> str:
    """`text` without what would steer a terminal or is no character."""
    return "".join(character if character.isprintable() else "?" for character in text)


@dataclass
class Statistics:
    """Counts over the rows that are kept. Lengths are in words, split at white space."""

    mentions: Counter[str] = field(default_factory=Counter)
    mentions_with_image: Counter[str] = field(default_factory=Counter)
    nil_mentions: Counter[str] = field(default_factory=Counter)
    answers: dict[str, set[str]] = field(default_factory=dict)
    sentence_words: Counter[int] = field(default_factory=Counter)
    mention_words: Counter[int] = field(default_factory=Counter)
    entities: int = 0
    entities_with_qid: int = 0
    entities_with_description: int = 0
    description_words: Counter[int] = field(default_factory=Counter)
    images_per_entity: Counter[int] = field(default_factory=Counter)

    def add_mention(self, split: str, mention: str, sentence: str, answer: str | None, has_image: bool) -> None:
        self.mentions[split] += 1
        self.mentions_with_image[split] += has_image
        if answer is None:
            self.nil_mentions[split] += 1
        else:
            self.answers.setdefault(split, set()).add(answer)
        self.sentence_words[len(sentence.split())] += 1
        self.mention_words[len(mention.split())] += 1

    def add_entity(self, qid: str | None, description: str, images: int) -> None:
        self.entities += 1
        self.entities_with_qid += qid is not None
        self.entities_with_description += bool(description.strip())
        self.description_words[len(description.split())] += 1
        self.images_per_entity[images] += 1

    def unseen_answers(self, split: str) -> int:
        """Distinct answers of `split` that are no answer in `train`."""
        return len(self.answers.get(split, set()) - self.answers.get("train", set()))

    def to_dict(self) -> dict[str, Any]:
        images = sum(count * number for count, number in self.images_per_entity.items())
        return {
            "mentions": {split: self.mentions[split] for split in SPLITS},
            "mentions_with_image": {split: self.mentions_with_image[split] for split in SPLITS},
            **({"nil_mentions": {split: self.nil_mentions[split] for split in SPLITS}} if self.nil_mentions else {}),
            "distinct_answers": {split: len(self.answers.get(split, ())) for split in SPLITS},
            "entities": self.entities,
            "entities_with_qid": self.entities_with_qid,
            "entities_with_description": self.entities_with_description,
            "entities_with_image": self.entities - self.images_per_entity[0],
            "entity_images": images,
        }


class Report:
    """Findings by kind, files read, images resolved; [`text`] prints it, [`to_dict`] gives it to programs."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.read: Counter[str] = Counter()
        self.resolved: Counter[str] = Counter()
        self.unused_fields: Counter[str] = Counter()
        self.files: dict[str, dict[str, Any]] = {}
        self.published: dict[str, dict[str, int]] = {}
        self.statistics = Statistics()
        self._path: Path | None = None
        self._file: TextIO | None = None
        self._early: list[str] = []

    def list_in(self, path: str | os.PathLike) -> None:
        """List every finding, past and to come, in a JSON Lines file, which appears whole on [`close`].

        A line has `file`, `row` (its position in the file counted from 0, its line number in a CSV or JSON Lines file
        counted from 1, or its key), `kind` and `detail`. Of a kind at most `MAX_LISTED` are listed.
        """
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(f"{self._path}.incomplete", "w", encoding="utf-8")  # noqa: SIM115, see close
        self._file.writelines(self._early)
        self._early = []

    def add(self, kind: str, file: str, row: int | str | None = None, detail: str = "") -> None:
        """Count a finding of one of `KINDS` and list it."""
        if kind not in KINDS:
            raise KeyError(f"{kind!r} is not a kind of finding")
        self.counts[kind] += 1
        detail = detail[:MAX_DETAIL_CHARACTERS]
        examples = self.examples.setdefault(kind, [])
        if len(examples) < 3:
            place = file if row is None else f"{file}, row {row}"
            examples.append(f"{place}: {detail}" if detail else place)
        if self.counts[kind] > MAX_LISTED:
            return
        # Escaped as ASCII, because a name may hold what is not a text.
        line = json.dumps({"file": file, "row": row, "kind": kind, "detail": detail}) + "\n"
        if self._file:
            self._file.write(line)
        elif row is None:
            self._early.append(line)

    def add_file(self, name: str, size: int, md5: str, expected_md5: str | None = None) -> None:
        """Record a file that was read, and a finding where its sum is not the published one."""
        self.files[name] = {"bytes": size, "md5": md5, "expected_md5": expected_md5}
        if expected_md5 not in (None, md5):
            self.add("md5_differs", name, detail=f"MD5 {md5}, published {expected_md5}")

    def leave_out(self, table: str, names: Iterable[str]) -> None:
        """Count fields of a row of `table` that have no column."""
        for name in names:
            key = f"{table}: {printable(name[:40])}"
            if key not in self.unused_fields and len(self.unused_fields) >= MAX_FIELD_NAMES:
                key = f"{table}: others"
            self.unused_fields[key] += 1

    def compare(self, what: str, found: int, published: int) -> None:
        """Record a published count, and a finding where ours differs."""
        self.published[what] = {"found": found, "published": published}
        if found != published:
            self.add("size_differs", what, detail=f"{found:,} found, {published:,} published")

    def close(self) -> None:
        """Write the list of findings out."""
        if self._file and self._path:
            for kind, count in self.counts.items():
                if count > MAX_LISTED:
                    detail = f"{count - MAX_LISTED:,} more of this kind are not listed"
                    self._file.write(json.dumps({"file": None, "row": None, "kind": kind, "detail": detail}) + "\n")
            self._file.close()
            self._file = None
            os.replace(f"{self._path}.incomplete", self._path)

    def abandon(self) -> None:
        """Stop listing without writing the list out, after an interruption; does nothing after [`close`]."""
        if self._file:
            self._file.close()
            self._file = None

    def _with(self, severity: Severity) -> Counter[str]:
        return Counter({kind: count for kind, count in self.counts.items() if KINDS[kind].severity == severity})

    @property
    def fatal(self) -> Counter[str]:
        """Findings that forbid writing."""
        return self._with("fatal")

    @property
    def errors(self) -> Counter[str]:
        """Findings that `--strict` refuses."""
        return self._with("error")

    def rows(self) -> dict[str, dict[str, Any]]:
        """Of `mentions` and `entities`, how many were read, kept and left out, by kind; what was not read is not there.

        `read` is the sum of the others: no row is lost without a finding. The entities of a data set without a
        knowledge base are not read but made of the mentions.
        """
        kept = {"mentions": self.statistics.mentions.total(), "entities": self.statistics.entities}
        return {
            table: {
                "read": self.read[table],
                "kept": kept[table],
                "left_out": {kind: self.counts[kind] for kind in kinds if self.counts[kind]},
            }
            for table, kinds in LEFT_OUT.items()
            if self.read[table]
        }

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain values; no path of this machine is in it."""
        return {
            **self.statistics.to_dict(),
            "rows": self.rows(),
            "problems": {kind: self.counts[kind] for kind in KINDS if self.counts[kind]},
            "images_found_by": dict(sorted(self.resolved.items())),
            "fields_left_out": dict(sorted(self.unused_fields.items())),
            "published": self.published,
            "files": self.files,
        }

    def text(self) -> str:
        """The report for reading."""
        stats = self.statistics.to_dict()
        lines = [f"{'':24}" + "".join(f"{split:>12}" for split in SPLITS) + f"{'all':>12}"]
        for label, key in (
            ("mentions", "mentions"),
            ("  with an image", "mentions_with_image"),
            *([("  of no entity", "nil_mentions")] if self.statistics.nil_mentions else []),
            ("  distinct answers", "distinct_answers"),
        ):
            values = stats[key]
            total = len(set().union(*self.statistics.answers.values())) if "answers" in key else sum(values.values())
            lines.append(f"{label:24}" + "".join(f"{values[split]:>12,}" for split in SPLITS) + f"{total:>12,}")
        lines.append(f"{'entities':24}{stats['entities']:>12,}")
        for label, key in (
            ("  with a qid", "entities_with_qid"),
            ("  with a description", "entities_with_description"),
            ("  with an image", "entities_with_image"),
            ("images of entities", "entity_images"),
        ):
            lines.append(f"{label:24}{stats[key]:>12,}")
        for table, counts in self.rows().items():
            left_out = counts["left_out"]
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
            out = f"{sum(left_out.values()):,} left out" + (f" ({kinds})." if kinds else ".")
            lines.append(f"Rows of {table}: {counts['read']:,} read, {counts['kept']:,} kept, {out}")
        if self.resolved:
            steps = {
                "exact": "by their name",
                "jpg": "by their name with .jpg",
                "case": "in another case",
                "extension": "with another extension",
            }
            found = ", ".join(f"{self.resolved[step]:,} {how}" for step, how in steps.items() if self.resolved[step])
            lines.append(f"Images found: {found}.")
        if self.unused_fields:
            fields = ", ".join(f"{name} ({count:,})" for name, count in sorted(self.unused_fields.items()))
            lines.append(f"Fields not carried over: {fields}.")
        for what, counts in self.published.items():
            verdict = (
                "as published" if counts["found"] == counts["published"] else f"published: {counts['published']:,}"
            )
            lines.append(f"{what}: {counts['found']:,} ({verdict})")
        for name, facts in self.files.items():
            expected = facts["expected_md5"]
            verdict = "" if expected is None else " (as published)" if expected == facts["md5"] else " (DIFFERS)"
            lines.append(f"MD5 {facts['md5']}  {name}{verdict}")
        for severity, title in (
            ("fatal", "Must be repaired first:"),
            ("error", "Wrong (refused with --strict):"),
            ("note", "Worth knowing:"),
        ):
            found_here = [kind for kind in KINDS if kind in self._with(severity)]  # type: ignore[arg-type]
            if found_here:
                lines.append(title)
            for kind in found_here:
                lines.append(f"  {self.counts[kind]:>8,}  {kind}: {KINDS[kind].effect}")
                lines += [f"{'':12}{text}" for text in self.examples[kind]]
        return "\n".join(map(printable, lines))

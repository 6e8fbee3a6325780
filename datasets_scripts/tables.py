"""Reads tables from outside, one row at a time: CSV (with commas, semicolons or tabs), JSON Lines and JSON.

A broken row is returned as a description of what is wrong, so that none is lost silently. Knows nothing of what the
columns mean.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, TextIO

from .archives import ArchiveError, Tree, load_json
from .source import json_type

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
# Of a cell of a CSV file; above the 131,072 that Python's reader takes.
MAX_CELL_CHARACTERS = 1 << 24
# Of a line of any table; longer ones are not read into memory.
MAX_LINE_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
# A file may give every row fields of its own.
MAX_COLUMNS = 10_000
_DELIMITERS = (",", ";", "\t")

Row = tuple[int, "dict[str, Any] | str"]


class Table:
    """A file of rows.

    Args:
        tree: where it lies.
        path: its path there.
        columns: those that it must have.

    Attributes:
        header: the columns that a CSV file has; `None` for the other formats, whose rows have fields of their own.

    Raises:
        ArchiveError: the file as a whole cannot be used; `kind` is the finding's.
    """

    def __init__(self, tree: Tree, path: str, columns: tuple[str, ...]) -> None:
        self.tree = tree
        self.path = path
        self.name = path.rpartition("/")[2]
        self.header: list[str] | None = None
        self._values: list[Any] | None = None
        self._encoding = "utf-8-sig"
        self._delimiter = ","
        suffix = self.name[self.name.rindex(".") :].lower()
        if suffix in (".csv", ".tsv"):
            self._open_csv(columns, "\t" if suffix == ".tsv" else None)
        elif suffix == ".json":
            self._open_json()

    def __iter__(self) -> Iterator[Row]:
        """`(number, row)`: of the line, counted from 1, or of the item of a JSON list, counted from 0; a string, what
        is wrong, in place of a broken row."""
        if self._values is not None:
            for number, value in enumerate(self._values):
                yield number, value if isinstance(value, dict) else f"is {json_type(value)}, not an object"
        elif self.header is not None:
            yield from self._csv_rows()
        else:
            yield from self._json_lines()

    # JSON and JSON Lines.

    def _open_json(self) -> None:
        try:
            loaded = load_json(self.tree, self.path).value
        except ArchiveError as error:
            with self.tree.open(self.path) as file:
                is_object = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
            if error.kind == "broken_json" and is_object:
                return  # JSON Lines under the name of JSON
            raise
        if not isinstance(loaded, list):
            raise ArchiveError("wrong_structure", f"is a JSON {json_type(loaded)}; should be a list of rows")
        self._values = loaded

    def _json_lines(self) -> Iterator[Row]:
        with self.tree.open(self.path) as file:
            for number, line in enumerate(_lines(file), start=1):
                if line is None:
                    yield number, f"is longer than {MAX_LINE_BYTES:,} bytes"
                    continue
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    yield number, f"not UTF-8 at byte {error.start} of the line"
                except (ValueError, RecursionError) as error:
                    yield number, f"not JSON: {error}"
                else:
                    yield number, value if isinstance(value, dict) else f"is {json_type(value)}, not an object"

    # CSV.

    def _text(self, errors: str) -> TextIO:
        errors = "replace" if self._encoding == "utf-16" else errors
        return io.TextIOWrapper(self.tree.open(self.path), self._encoding, errors, newline="")

    def _open_csv(self, columns: tuple[str, ...], delimiter: str | None) -> None:
        csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL_CHARACTERS))  # the whole process's; never lowered
        with self.tree.open(self.path) as file:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):  # a spreadsheet's "Unicode text"
                self._encoding = "utf-16"
        headers: dict[str, list[str]] = {}
        problem = ""
        for mark in [delimiter] if delimiter else _DELIMITERS:
            self._delimiter = mark
            with self._text("replace") as text:
                cells = next((cells for _, _, cells in self._split(text)), [])
            if isinstance(cells, str):
                problem = problem or cells
            else:
                headers[mark] = [cell.strip() for cell in cells]
        if not headers:
            raise ArchiveError("wrong_structure", f"its first row is not CSV: {problem}")
        # The separator with which the columns are there, or else most of them.
        self._delimiter = max(headers, key=lambda mark: (len({*columns} & {*headers[mark]}), len(headers[mark])))
        self.header = headers[self._delimiter]
        if len(self.header) > MAX_COLUMNS:
            raise ArchiveError("wrong_structure", f"has {len(self.header):,} columns, more than {MAX_COLUMNS:,}")
        if twice := {name for name in self.header if name and self.header.count(name) > 1}:
            raise ArchiveError("wrong_structure", f"has the column {min(twice)[:80]!r} twice")
        with self._text("replace") as text:
            self._refuse_open_quotes(text)

    def _split(self, text: TextIO) -> Iterator[tuple[list[str], int, list[str] | str]]:
        """Each row as its lines, the number of the last, and its cells, or what is wrong with it.

        Quotes are read strictly: what follows a closing one must be a separator or the line's end.
        """
        lines: list[str] = []

        def counted() -> Iterator[str]:
            while line := text.readline(MAX_LINE_BYTES):
                if len(line) == MAX_LINE_BYTES:
                    raise ArchiveError("wrong_structure", f"has a line of more than {MAX_LINE_BYTES:,} characters")
                lines.append(line)
                yield line

        reader = csv.reader(counted(), strict=True, delimiter=self._delimiter)
        while True:
            lines.clear()
            cells: list[str] | str
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                cells = str(error)
            if reader.line_num == 1 and re.fullmatch(r"sep=.\s*", lines[0]):
                continue  # a spreadsheet's note of the separator
            if cells:  # an empty line is none
                yield lines, reader.line_num, cells

    def _refuse_open_quotes(self, text: TextIO) -> None:
        """A quote that is not closed, or is closed in a later row, turns the rows between into the text of one cell.

        A row in several lines is taken for such where it is not CSV, or where each of its lines alone has the header's
        number of cells. Separators before a space do not count: they are a text's.
        """
        assert self.header is not None
        separator = re.compile(re.escape(self._delimiter) + r"(?! )")
        for lines, last, cells in self._split(text):
            if len(lines) > 1 and (
                isinstance(cells, str) or all(len(separator.split(line)) == len(self.header) for line in lines)
            ):
                first = last - len(lines) + 1
                why = f" ({cells})" if isinstance(cells, str) else ", though each has as many cells as the header"
                raise ArchiveError(
                    "open_quote",
                    f"lines {first} to {last} are one row{why}: a cell of line {first} begins with a quote that is not "
                    'closed there; close it, or where it is part of the text write the cell as """text"',
                )

    def _csv_rows(self) -> Iterator[Row]:
        assert self.header is not None
        with self._text("surrogateescape") as text:
            is_header = True
            for lines, last, cells in self._split(text):
                if is_header:
                    is_header = False
                elif isinstance(cells, str):
                    yield last, f"not CSV: {cells}"
                elif len(cells) != len(self.header):
                    over = f", in {len(lines)} lines" if len(lines) > 1 else ""
                    yield last, f"has {len(cells)} cells{over}; the header has {len(self.header)}"
                else:
                    yield last, dict(zip(self.header, cells, strict=True))


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file; `None` for one that is longer than `MAX_LINE_BYTES`, which is passed over in blocks."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_BLOCK_BYTES)
        yield None

"""Which format a folder or archive has, by the names of its files.

- [`MimicArchive`]: what the authors of MIMIC publish, with a knowledge base of names, descriptions and images;
- [`MelBench`]: MELBench's `Wikidata-MEL.json` and `Richpedia-MEL.json`;
- [`WikiDiverseRelease`]: WikiDiverse's own files;
- [`CustomData`]: your own tables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .archives import ArchiveError, Tree, open_nested, open_tree
from .custom import CustomData
from .melbench import MelBench
from .mimic_archive import MimicArchive
from .report import SPLITS, Report
from .source import BENCHMARKS, Benchmark, EntityRow, MentionRow, Source, find_split, plain
from .splits import SPLIT_WORDS, split_of
from .tables import TABLE_SUFFIXES
from .wikidiverse import WikiDiverseRelease, image_name, wikipedia_page


def _folders(tree: Tree) -> dict[str, list[str]]:
    """The JSON files' names by the folder they are in, the shallowest folders first."""
    folders: dict[str, list[str]] = {}
    for name in [*tree.files, *tree.refused]:
        if name.lower().endswith(".json"):
            folder, _, base = name.rpartition("/")
            folders.setdefault(folder + "/" if folder else "", []).append(base)
    return dict(sorted(folders.items(), key=lambda item: (item[0].count("/"), item[0])))


def _layouts(tree: Tree, benchmark: Benchmark) -> Iterator[tuple[int, type[Source], str]]:
    """`(how many files of it are there, format, folder)` for each format that a folder of `tree` could be."""
    for folder, names in _folders(tree).items():
        splits = [find_split(names, benchmark.aliases, split) for split in SPLITS]
        kb = [name for name in names if name in ("kb_entity.json", "qid2id.json")]
        if kb:
            yield len(kb) + sum(name is not None for name in splits), MimicArchive, folder
        elif benchmark.melbench_file and benchmark.melbench_file.lower() in map(str.lower, names):
            yield 1, MelBench, folder
        elif benchmark.name == "wikidiverse":
            suffix = WikiDiverseRelease._CANDIDATES
            splits += [find_split(names, benchmark.aliases, split, suffix) for split in SPLITS]
            if any(splits):
                yield sum(name is not None for name in splits), WikiDiverseRelease, folder


def _locate(
    trees: list[Tree], benchmark: Benchmark, which: str, depth: int = 2
) -> tuple[type[Source], list[Tree], str] | None:
    """The best layout in the innermost tree, or in an archive in it with the data set's name."""
    layouts = [
        layout
        for layout in _layouts(trees[-1], benchmark)
        if which == "auto" or (which == "published") == (layout[1] is MimicArchive)
    ]
    if layouts:
        # The archive of the MIMIC authors has more than the originals: prefer it, then the most complete folder.
        best = max(layouts, key=lambda layout: (layout[1] is MimicArchive, layout[0]))
        return best[1], trees, best[2]
    for name in sorted(trees[-1].files, key=lambda name: (name.count("/"), name)):
        base = plain(name.rpartition("/")[2])
        if depth and base.endswith((".zip", ".tar")) and any(alias in base for alias in benchmark.aliases):
            nested = open_nested(trees[-1], name)
            found = _locate([*trees, nested], benchmark, which, depth - 1)
            if found:
                return found
            nested.close()
    return None


def _open_layout(name: str, data_dir: str | os.PathLike, which: str) -> tuple[type[Source], list[Tree], str]:
    if name not in BENCHMARKS:
        raise ValueError(f"{name!r} is not a data set; choose one of {', '.join(BENCHMARKS)}")
    if which not in ("auto", "published", "original"):
        raise ValueError(f"source is {which!r}; choose auto, published or original")
    benchmark = BENCHMARKS[name]
    path = Path(data_dir)
    if path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
        path = path.parent
    tree = open_tree(path)
    if name == "custom":
        return CustomData, [tree], _folder_of_tables(tree) or ""
    found = _locate([tree], benchmark, which)
    if found is None:
        wanted = ["kb_entity.json (archive of the MIMIC authors)"] if which != "original" else []
        if which != "published":
            wanted.append(benchmark.melbench_file or "train.json, valid.json and test.json (WikiDiverse's own release)")
        there = ", ".join(sorted({entry.partition("/")[0] for entry in [*tree.files, *tree.refused]})[:10])
        links = [
            name for name, (kind, _) in tree.refused.items() if kind == "unsafe" and name.endswith((".zip", ".tar"))
        ]
        own = "These look like your own tables" if _folder_of_tables(tree) is not None else "For data of your own"
        tree.close()
        raise ArchiveError(
            "missing_file",
            f"no {benchmark.pretty_name} in {path}: looked for {' and '.join(wanted)}, in it and in archives with "
            f"{benchmark.pretty_name} in their name; it holds {there or 'nothing'}. "
            + (f"{links[0]} is a symbolic link that leaves the folder, and is not followed. " if links else "")
            + f"{own}: give `custom` as the data set (docs/datasets.md says what it reads)",
        )
    return found


def _folder_of_tables(tree: Tree) -> str | None:
    """The folder of own tables that lies nearest to the top; `None` where there is no table."""
    stems = ("entities", "mentions", *(word for words in SPLIT_WORDS.values() for word in words))
    tables = {f"{stem}{suffix}" for stem in stems for suffix in TABLE_SUFFIXES}
    found: dict[str, set[str]] = {}
    for name in [*tree.files, *tree.refused]:
        folder, _, base = name.rpartition("/")
        if base.lower() in tables:
            found.setdefault(folder, set()).add(base.lower().partition(".")[0])
    # A folder that has entities, before one of other files that are called train or test.
    nearest = min(
        found, key=lambda place: ("entities" not in found[place], place.count("/") + bool(place), place), default=None
    )
    return None if nearest is None else nearest + "/" if nearest else ""


def columns_of(name: str, data_dir: str | os.PathLike, source: str = "auto") -> tuple[dict[str, str], dict[str, str]]:
    """The columns of mentions and of entities beyond the common ones, with their types; raises as [`open_source`]."""
    kind, trees, prefix = _open_layout(name, data_dir, source)
    if kind is CustomData:  # whose columns are in its tables
        opened = kind(BENCHMARKS[name], trees, prefix, Report(), use_images=False)
        opened.close()
        return opened.extra_columns, opened.entity_columns
    for tree in reversed(trees):
        tree.close()
    return kind.extra_columns, kind.entity_columns


def open_source(
    name: str,
    data_dir: str | os.PathLike,
    report: Report,
    *,
    source: str = "auto",
    use_images: bool = True,
    keep_nil: bool = False,
) -> Source:
    """Open a data set where it lies.

    Args:
        name: `wikimel`, `richpediamel`, `wikidiverse` or `custom`.
        data_dir: the folder, `.zip` or uncompressed `.tar` of the data set, or a folder that holds such an archive.
        report: is told what is wrong with the files. After fatal findings the source yields what it can, so that one
            run names everything; nothing should be written from it.
        source: `published` for the archive of the MIMIC authors, `original` for the data set's own release, `auto` for
            the first of these that is there.
        use_images: whether to look for images.
        keep_nil: keep mentions of no entity, with the answer `None`, in place of leaving them out.

    Raises:
        ArchiveError: there is no such folder or archive, or it holds no data set of that name.
        ValueError: `name` or `source` is unknown.
    """
    kind, trees, prefix = _open_layout(name, data_dir, source)
    return kind(BENCHMARKS[name], trees, prefix, report, use_images=use_images, keep_nil=keep_nil)


__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "CustomData",
    "EntityRow",
    "MelBench",
    "MentionRow",
    "MimicArchive",
    "Source",
    "WikiDiverseRelease",
    "columns_of",
    "image_name",
    "open_source",
    "split_of",
    "wikipedia_page",
]

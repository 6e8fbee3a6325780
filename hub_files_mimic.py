"""The list of the files of a checkpoint, an index or a data set that go to the Hub.

Everything that uploads uses this list, so that all send the same files. A symbolic link that leads out of the folder
is never followed. Knows names and folders only: nothing of models, and nothing of the Hub.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from .errors_mimic import MimicError

# Of a checkpoint's directory, in which training leaves more: states of the optimizer, checkpoints, logs.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*_mimic.py",
    "README.md",
    "*.png",
    "*_results.json",
    "predictions_*.jsonl",
)
# Of a checkpoint too: figures as the Hub's leaderboards read them.
EVAL_RESULTS_FOLDER = ".eval_results"
INDEX_FILES = (
    "index_config.json",
    "shard-*.safetensors",
    "shard-*.jsonl",
    "removed-*.safetensors",
    "matcher-*.safetensors",
    "names-*.safetensors",
    "README.md",
)
# Of a data set's directory all but what is hidden or half written, in its folders too.
DATASET_FILES = ("*",)
_HALF_WRITTEN = ("*.incomplete", "*.partial", "*.tmp")
# What would be read beside the new files if it stayed on the Hub: parts of what had another number of parts.
REPLACED = {
    "model": ("*.safetensors", "*.safetensors.index.json"),
    "index": ("shard-*", "removed-*", "matcher-*", "names-*"),
    "dataset": ("*.parquet",),
}
_FILES = {"model": MODEL_FILES, "index": INDEX_FILES, "dataset": DATASET_FILES}


class HubFilesError(MimicError, ValueError):
    """A folder that must not be uploaded as it is, with which of its files and why."""


def hub_files(directory: str | os.PathLike[str], kind: str) -> tuple[dict[str, Path], list[str]]:
    """What of a directory goes to the Hub.

    Args:
        directory: a checkpoint, an index or a data set.
        kind: "model", "index" or "dataset".

    Returns:
        The files, by their path in the repository, sorted; and the names in the directory that are left out, folders
        with a slash at the end.

    Raises:
        HubFilesError: if a file that would go is a symbolic link to a place outside of the directory, or a folder is
            a link.
        ValueError: if there is no such kind.
    """
    if kind not in _FILES:
        raise ValueError(f"`kind` must be one of {', '.join(_FILES)}, got {kind!r}.")
    root = Path(directory)
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for path in sorted(root.iterdir()):
        inside = list(_inside(path, root)) if kind == "dataset" and not path.name.startswith(".") else [path]
        if kind == "model" and path.name == EVAL_RESULTS_FOLDER and path.is_dir():
            inside = sorted(path.glob("*.yaml"))
        wanted = [item for item in inside if _is_wanted(item, kind)]
        files |= {item.relative_to(root).as_posix(): item for item in wanted}
        left_out += [_name(item, root) for item in inside if item not in wanted]
    refuse_links(root, files.values())
    return files, left_out


def refuse_links(directory: str | os.PathLike[str], files: Iterable[Path]) -> None:
    """Refuses files whose content lies outside of a directory; they would be published unseen.

    Args:
        directory: the folder that is published. It may be a symbolic link itself.
        files: files in it.

    Raises:
        HubFilesError: if one of them, or a folder on the way to it, is a symbolic link that leads out of the directory.
    """
    root = Path(directory).resolve()
    for path in files:
        target = path.resolve()
        if not target.is_relative_to(root):
            raise HubFilesError(
                f"{path} is a symbolic link to {target}, outside of {directory}: what it leads to would be published. "
                "Put a copy in its place, or remove it."
            )


def _inside(path: Path, root: Path) -> Iterator[Path]:
    """The files at or below a path of a data set; hidden folders as they are."""
    if not path.is_dir() or path.name.startswith("."):
        yield path
        return
    if path.is_symlink():
        raise HubFilesError(
            f"{path} is a symbolic link to the folder {path.resolve()}; folders that are links are not published. Put "
            "a copy in its place, or remove it."
        )
    for item in sorted(path.iterdir()):
        yield from _inside(item, root)


def _is_wanted(path: Path, kind: str) -> bool:
    if not path.is_file():  # a folder, a pipe, a link to nothing
        return False
    if kind == "dataset" and (path.name.startswith(".") or _matches(path.name, _HALF_WRITTEN)):
        return False
    if path.parent.name == EVAL_RESULTS_FOLDER:
        return True
    return _matches(path.name, _FILES[kind])


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _name(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix()
    return f"{name}/" if path.is_dir() else name


__all__ = [
    "DATASET_FILES",
    "EVAL_RESULTS_FOLDER",
    "INDEX_FILES",
    "MODEL_FILES",
    "REPLACED",
    "HubFilesError",
    "hub_files",
    "refuse_links",
]

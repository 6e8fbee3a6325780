"""Directories that a caller names: checked, replaced as a whole, and errors that say which of their files is wrong.

What is saved is written next to what is there, and replaces it when everything is written. So nothing is lost if the
disk is full. Knows nothing of what is saved, and loads no library.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from .errors_mimic import EntityIndexError, LoadError, MimicError, SaveError

_OF_FILES = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, RecursionError)
_OF_LIBRARIES = ("SafetensorError", "StrictDataclass")
Saved = TypeVar("Saved")
_BESIDE = ".saving-"
_WHERE_BESIDE = re.compile(rf"{re.escape(_BESIDE)}[^/\\\\']+[/\\\\]?")
# How the libraries that are written in Rust tell errors of the system; tokenizers' are plain exceptions.
_OF_RUST = re.compile(r"\(os error \d+\)")


def empty_path(text: str) -> str | None:
    """What is wrong with a path that a caller gave, in words that follow its name; `None` where nothing is.

    An empty one, as of a variable that is not set, would stand for the working directory.
    """
    if not text:
        return 'is empty. Name one; "." is the working directory.'
    if "\0" in text:
        return f"{text!r:.200} holds a zero byte. Name another place."
    return None


def directory_of(path: str | os.PathLike[str], what: str = "The path of a directory") -> Path:
    """A path that a caller gave, as a path; an empty one would stand for the working directory.

    Args:
        path: the path.
        what: what messages call it.

    Raises:
        EntityIndexError: if it is empty, or cannot be a path.
    """
    if wrong := empty_path(os.fspath(path)):
        raise EntityIndexError(f"{what} {wrong}")
    return Path(path)


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or bool(
        re.search(rf"No space left|\(os error ({errno.ENOSPC}|{errno.EDQUOT})\)", str(error))
    )


def save_whole(
    save_directory: str | os.PathLike[str], save: Callable[[str], Saved], replaced: str | None = None
) -> Saved:
    """Saves into a directory: all files are written before one that is there is replaced.

    Args:
        save_directory: the directory, made if there is none.
        save: writes into the empty directory that it is given.
        replaced: a pattern of names: where `save` wrote such files, others that are there are deleted.

    Returns:
        what `save` gives.

    Raises:
        SaveError: if the disk is full, nothing may be written there, or what lies there is in the way. What was there
            is then as it was.
    """
    directory = directory_of(save_directory, "`save_directory`")
    with _errors_told(directory), _beside(directory) as beside:
        saved = save(os.fspath(beside))
        written = [path.relative_to(beside) for path in sorted(beside.rglob("*")) if not path.is_dir()]
        for name in written:
            if (directory / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(directory / name))
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
        for name in written:
            os.replace(beside / name, directory / name)
        if replaced is not None and any(re.fullmatch(replaced, str(name)) for name in written):
            for path in directory.iterdir():
                if re.fullmatch(replaced, path.name) and Path(path.name) not in written:
                    path.unlink()
    return saved


def save_and_push(
    save_directory: str | os.PathLike[str],
    save: Callable[..., Any],
    push_to_hub: bool = False,
    replaced: str | None = None,
    **options: Any,
) -> Any:
    """[`save_whole`] by a `save_pretrained` of transformers, which uploads it as well if that is asked for.

    Args:
        save_directory, replaced: as of [`save_whole`].
        save: takes a directory, `push_to_hub` and the options.
        push_to_hub: whether to upload; the repository is named as the directory unless `repo_id` is among the options.
    """
    saved = save_whole(save_directory, lambda place: save(place, push_to_hub=False, **options), replaced)
    if push_to_hub:
        options.setdefault("repo_id", Path(save_directory).resolve().name)
        with tempfile.TemporaryDirectory() as place:
            save(place, push_to_hub=True, **options)
    return saved


@contextmanager
def _beside(directory: Path) -> Iterator[Path]:
    """A new directory within one that is made if there is none; at the end it is gone, the other too if it is empty."""
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=_BESIDE, dir=directory))
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # it has files: all went well
                directory.rmdir()


@contextmanager
def _errors_told(directory: Path) -> Iterator[None]:
    """Tells what the system has against writing, whatever library tells of it."""
    try:
        yield
    except SaveError as error:  # of a part, which names the place where it was written at first
        raise _save_error(directory, error.__cause__ or error) from error.__cause__
    except MimicError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) is None and not _OF_RUST.search(str(error)):
            raise
        raise _save_error(directory, error) from error


@contextmanager
def damage_told(what: str, place: Any) -> Iterator[None]:
    """Tells as such what a library raises of files that are damaged, or hold what they should not.

    Errors that say themselves what is wrong pass: ours, those of the system, and of the Hub.

    Args:
        what: what is loaded, such as "model".
        place: its directory or Hub id.

    Raises:
        LoadError: in the place of other errors.
    """
    try:
        yield
    except (MimicError, OSError):
        raise
    except Exception as error:
        told = " ".join(str(error).split())
        is_of_files = isinstance(error, _OF_FILES) or type(error).__name__.startswith(_OF_LIBRARIES)
        if "ignore_mismatched_sizes" in told:
            told = "its weights do not fit its configuration, as the report above says"
        elif not is_of_files or told.startswith("Mimic"):
            raise
        raise LoadError(
            f"The {what} in {str(place)!a:.200} cannot be loaded ({type(error).__name__}: {told:.500}). One of its "
            "files is damaged, or holds what does not belong there: save or download it again."
        ) from error


def _save_error(directory: Path, error: BaseException) -> SaveError:
    place = ascii(os.fspath(directory)) if not os.fspath(directory).isprintable() else os.fspath(directory)
    if is_full(error):
        why, what_to_do = "no space is left on its disk", "Make room there"
    else:
        why, what_to_do = _WHERE_BESIDE.sub("", str(error)), "Look at what lies there and who may write there"
    told = SaveError(
        f"{place:.200} cannot be saved to: {why}. {what_to_do}, or name another directory. What was saved there before "
        "is as it was."
    )
    told.errno = getattr(error, "errno", None) or (errno.ENOSPC if is_full(error) else None)
    return told


__all__ = ["damage_told", "directory_of", "empty_path", "is_full", "save_and_push", "save_whole"]

"""A training's configuration file, which may come from anywhere: read within limits, its names and values checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..console import did_you_mean
from ..files_mimic import regular

_MOST_BYTES = 2**20
_KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "a text"}


def settings_of(path: Path, arguments: Iterable[type]) -> dict[str, Any]:
    """What a YAML or JSON file says, by the names of options.

    Args:
        path: the file.
        arguments: the dataclasses whose fields are the options.

    Raises:
        ValueError: if it cannot be read or is no mapping, has a key that is no option, or a value that is none for its
            option.
    """
    try:
        if regular(path).stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
        settings = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"The configuration file {path} cannot be read: {error.strerror or error}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"The configuration file {path} is neither YAML nor JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"The configuration file {path} is nested too deeply.") from error
    except ValueError as error:  # no UTF-8, a number of thousands of digits
        raise ValueError(f"The configuration file {path} cannot be read: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"The configuration file {path} must hold a mapping of options to values.")
    options: dict[str, Any] = {}  # not from the fields, whose types transformers' parser changes
    for kind in arguments:
        for base in reversed(kind.__mro__):
            options |= {name: hint for name, hint in vars(base).get("__annotations__", {}).items() if name[0] != "_"}
    for name, value in settings.items():
        if name not in options:
            raise ValueError(f"{path}: there is no option {name!r:.100}.{did_you_mean(str(name)[:100], options)}")
        settings[name] = _checked(path, name, value, options[name])
    return settings


def _checked(path: Path, name: str, value: Any, hint: Any) -> Any:
    """A value, if it is one for its option. A text stays one: the command line's parser converts it."""
    kind = hint.__name__ if isinstance(hint, type) else str(hint)
    kinds = set(re.findall(r"\w+", kind))
    if value is None or isinstance(value, str) or not kinds & {each.__name__ for each in _KINDS}:
        return value
    if isinstance(value, Mapping | list):
        if kinds & {"dict", "list"}:
            return value
    elif isinstance(value, bool):
        if "bool" in kinds:
            return value
    elif isinstance(value, int | float):
        if "float" in kinds or ("int" in kinds and isinstance(value, int)):
            return value
        if "str" in kinds:
            return str(value)
    elif "str" in kinds:  # YAML makes dates of texts
        return str(value)
    wanted = " or ".join(words for each, words in _KINDS.items() if each.__name__ in kinds)
    raise ValueError(f"{path}: `{name}` must be {wanted}, got {value!r:.200}.")


__all__ = ["settings_of"]

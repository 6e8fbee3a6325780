"""The versions that the tests run with: a floor for each dependency, and nothing below it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pinned(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {re.sub("[-_.]+", "-", package).lower(): Version(version) for package, version in pairs}


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in PROJECT["optional-dependencies"][name])]
    return [Requirement(line) for line in lines]


def test_the_oldest_versions_are_the_floors() -> None:
    oldest = pinned("constraints-oldest.txt")
    for requirement in requirements("dev"):
        name = requirement.name.lower().replace("_", "-")
        [floor] = [Version(specifier.version) for specifier in requirement.specifier if specifier.operator == ">="]
        assert name in oldest, f"constraints-oldest.txt lacks {name}"
        if name != "torch":  # see there
            assert oldest[name] == floor, name


def test_the_exact_versions_are_allowed() -> None:
    exact = pinned("constraints.txt")
    for requirement in requirements(*PROJECT["optional-dependencies"]):
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(exact[name]), name

"""The rule of the root: files that travel with a checkpoint are flat, and those that do not are elsewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAYS = {"__init__.py", "cli.py", "console.py", "registration.py", "train.py"}


def test_every_file_of_the_root_travels_or_is_known_to_stay():
    assert {path.name for path in ROOT.glob("*.py") if not path.stem.endswith("_mimic")} <= STAYS


def test_every_file_that_travels_is_in_the_contracts():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {part.strip() for layer in contracts[0]["layers"] for part in layer.split("|")}
    for path in ROOT.glob("*_mimic.py"):
        assert f"mimic_el.{path.stem}" in layers
        assert f"mimic_el.{path.stem}" in contracts[1]["source_modules"]


def test_every_file_that_travels_is_on_the_map():
    """docs/architecture.md has one line for each, and none for files that are gone."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+_mimic\.py)` \| \S", text, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in ROOT.glob("*_mimic.py"))

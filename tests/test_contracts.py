"""The rule of the root: files that travel with a checkpoint are flat, and those that do not are elsewhere."""

from __future__ import annotations

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

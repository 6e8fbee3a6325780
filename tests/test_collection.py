"""Tests have the same ids in every run, so that one can be named, run again, and shared out among processes; and they
run in a folder of any name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

FILES = ("test_archives.py", "test_builders.py", "test_cards.py", "test_prepare.py", "test_sources.py")


def test_ids_of_tests_that_build_archives_are_fixed() -> None:
    """Archives hold dates, and sets have an order of their own in each process: neither may reach an id."""
    here = Path(__file__).parent
    # One process each, and one id a line, whatever the options of the run around this are.
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    command = [sys.executable, "-m", "pytest", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    # Side by side, because what takes the time is importing.
    runs = [
        subprocess.Popen(
            [*command, *(str(here / file) for file in FILES)],
            cwd=here.parent,
            env={**environment, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed in ("1", "2")
    ]
    found = []
    for run in runs:
        output, _ = run.communicate()
        assert run.returncode == 0, output
        found.append([line for line in output.splitlines() if "::" in line])
    for file in FILES:
        assert any(f"{file}::" in test for test in found[0])
    assert found[0] == found[1]


def test_the_root_may_have_any_name_and_is_not_imported_by_it(tmp_path: Path) -> None:
    here, root = Path(__file__).parent, tmp_path / "any-name"
    (root / "tests").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported by the name of its folder')")
    shutil.copy(here.parent / "pyproject.toml", root)
    for name in ("conftest.py", "hub_server.py"):
        shutil.copy(here / name, root / "tests")
    (root / "tests" / "test_nothing.py").write_text("def test_nothing() -> None:\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout

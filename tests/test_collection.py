"""Tests have the same ids in every run, so that one can be named, run again, and shared out among processes; and they
run in a folder of any name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ("test_archives.py", "test_builders.py", "test_cards.py", "test_prepare.py", "test_sources.py")


def test_ids_of_tests_that_build_archives_are_fixed(request: pytest.FixtureRequest) -> None:
    """Archives hold dates, and sets have an order of their own in each process: neither may reach an id."""
    found = collected("1")
    # Those of this process, whose hashes are others, where it runs tests of each file; or else of a second process.
    own = [item.nodeid for item in request.session.items if item.path.name in FILES]
    own.sort(key=lambda test: FILES.index(test.partition("::")[0].rpartition("/")[2]))  # workers have an order of files
    if {test.partition("::")[0] for test in own} != {f"tests/{file}" for file in FILES}:
        own = collected("2")
    for file in FILES:
        assert any(f"{file}::" in test for test in found)
    assert [test for test in found if test in set(own)] == own


def collected(seed: str) -> list[str]:
    """The ids of these tests in a process that hashes strings in a way of its own."""
    here = Path(__file__).parent
    # One id a line, whatever the options of the run around this are.
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(here / file) for file in FILES)],
        cwd=here.parent,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return [line for line in run.stdout.splitlines() if "::" in line]


def test_the_root_may_have_any_name_and_is_not_imported_by_it(tmp_path: Path) -> None:
    here, root = Path(__file__).parent, tmp_path / "any-name"
    (root / "tests").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported by the name of its folder')")
    shutil.copy(here.parent / "pyproject.toml", root)
    for name in ("conftest.py", "hub_server.py", "scheduling.py"):
        shutil.copy(here / name, root / "tests")
    (root / "tests" / "test_nothing.py").write_text("def test_nothing() -> None:\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout

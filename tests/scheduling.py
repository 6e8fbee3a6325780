"""Which worker of pytest-xdist runs which tests: those of a file run in one, which makes what they share once.

Files that use the same forking processes (`python_processes`) stay together too, so that only one worker has to start
these. Files that take long come first, so that the workers end at the same time.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

FOLDER = Path(__file__).parent
SERVERS = ("own_python", "clean_python")  # a file that uses both goes with the first
# After those that use forking processes; the others follow by name. A file of more than 10 seconds belongs here.
LONG = (
    "test_search_mimic",
    "test_index_mimic",
    "test_distributed_actors",
    "test_space_app",
    "test_store_mimic",
    "test_pipeline_mimic",
    "test_pairs_mimic",
)


def longest_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests in the order in which workers get them; that of a file stays."""
    return sorted(items, key=lambda item: _rank(item.nodeid))


def _rank(nodeid: str) -> int:
    unit = unit_of(nodeid)
    long = [*SERVERS, *LONG]
    return long.index(unit) if unit in long else len(long)


def unit_of(nodeid: str) -> str:
    """What must run in one worker: the name of a file without its suffix, or of what several files use."""
    return _unit_of_file(nodeid.split("::", 1)[0].rpartition("/")[2])


@functools.cache
def _unit_of_file(name: str) -> str:
    text = (FOLDER / name).read_text(encoding="utf-8") if (FOLDER / name).is_file() else ""
    return next((server for server in SERVERS if f"{server}(" in text), name.removesuffix(".py"))


class FilesTogether(LoadScopeScheduling):
    """Gives each worker a unit, and the next when it is nearly through."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)

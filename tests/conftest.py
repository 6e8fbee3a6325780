"""Every test has a Hugging Face home of its own, and no Hub but one on localhost (`hub_server.Hub`)."""

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Several workers with a thread for each core would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))  # lets test files import hub_server

from hub_server import HUB_VARIABLES, Hub

# The same examples in every run.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

HUB = pytest.StashKey[Hub]()


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before any Hugging Face library reads it. Until a test asks for `hub`, no Hub answers."""
    hub = config.stash[HUB] = Hub()
    for name in [name for name in os.environ if name.startswith(HUB_VARIABLES)]:
        del os.environ[name]
    os.environ.update(hub.env())
    config.pluginmanager.register(_Root())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, unless another way to distribute tests was asked for."""
    if config.getvalue("dist") != "load":
        return None
    from scheduling import FilesTogether

    config.option.loadscopereorder = False  # the order is that of the tests
    return FilesTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        from scheduling import longest_first

        items[:] = longest_first(items)


def pytest_collection_finish() -> None:
    """What is imported by now stays: nobody who collects garbage need look through it again."""
    gc.collect()
    gc.freeze()


class _Root:
    """The root's folder may have any name. It is `mimic_el`, and no package of that other name: pytest would import it
    a second time, and what the second copy registers with transformers would take the place of the first."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        root = Path(__file__).parent.parent
        return pytest.Dir.from_parent(parent, path=path) if path == root else None


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[HUB].stop()


@pytest.fixture(scope="module")
def hub(pytestconfig: pytest.Config) -> Hub:
    """The Hub that HF_ENDPOINT names, without users and repositories when a test file starts to use it."""
    server = pytestconfig.stash[HUB].start()
    server.reset()
    return server


@pytest.fixture(autouse=True)
def _few_pairs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The indexes of tests are small: they are searched as large ones are, not by scoring what few pairs they have."""
    if "mimic_el.sampling_mimic" in sys.modules:
        monkeypatch.setattr(sys.modules["mimic_el.sampling_mimic"], "_FEW_PAIRS", 0)


@pytest.fixture(autouse=True)
def _hub_log_of_one_test(pytestconfig: pytest.Config) -> Iterator[None]:
    """A test does not see the requests and faults of another, and hears of requests that the Hub did not understand."""
    server = pytestconfig.stash[HUB]
    server.forget()
    yield
    for request in server.unsupported:
        warnings.warn(f"The test Hub does not implement {request.method} {request.path}", stacklevel=1)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new and empty cache for downloads of clients in this process; returns its path."""
    from huggingface_hub import HfFileSystem, constants

    HfFileSystem.clear_instance_cache()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    return tmp_path / "hub-cache"

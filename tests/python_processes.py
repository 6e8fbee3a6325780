"""Python processes that cost little to start, in two environments: a user's and this project's.

That of a user of the Hub has never heard of this project. It is a virtual environment whose packages are links to those
of the tests' own: transformers, torch, accelerate, Pillow and what they require, and nothing else. So neither
`mimic_el` nor `datasets` can be imported there.

Importing torch and transformers takes seconds. One process does so, and forks a child for each piece of code: a child
is in the state of a process that has only imported them and made what they make once, and has an empty cache of the
Hub's unless told otherwise.
"""

from __future__ import annotations

import atexit
import functools
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import traceback
import venv
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hub_server import Hub

PACKAGES = ("transformers", "torch", "accelerate", "pillow")
PRELOADED = """PIL.Image torch transformers transformers.pipelines transformers.trainer transformers.models.clip
    transformers.models.clip.modeling_clip transformers.models.clip.image_processing_pil_clip
    transformers.models.clip.tokenization_clip transformers.models.auto.processing_auto transformers.models.aimv2
    transformers.models.clip.tokenization_clip_fast torch.distributed.algorithms.ddp_comm_hooks
    torch.utils.serialization torch.profiler._cupti_monitor numpy.ctypeslib""".split()  # noqa: SIM905


class ForkingPython:
    """Runs code in children of one process.

    Args:
        python: the interpreter.
        preloaded: modules that the process imports before it forks.
        env: the whole environment of the processes.
        directory: for the caches, and the working directory of each piece of code.
    """

    def __init__(self, python: str | Path, preloaded: Iterable[str], env: dict[str, str], directory: Path) -> None:
        self.home = directory / "home"
        self._directory = directory
        self._count = 0
        self._process = subprocess.Popen(
            [python, "-I", __file__, *preloaded],
            env={**env, "HF_HOME": str(self.home), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        code: str,
        *,
        token: str | None = None,
        keep_cache: bool = False,
        folder: Path | None = None,
        **variables: Any,
    ) -> Any:
        """Runs `code` (dedented) and gives the value of its variable `result`.

        Args:
            token: for HF_TOKEN; anonymous without one.
            keep_cache: whether the code finds what earlier code downloaded.
            folder: its working directory; a new and empty one by default.
            **variables: what the code finds defined; like `result`, anything that JSON can carry.

        Raises:
            AssertionError: if the code fails or uses what is deprecated, with all that it wrote.
        """
        answer = self._ask(code, token, keep_cache, variables, folder)
        assert answer["error"] is None, f"{answer['traceback']}\n{answer['output']}"
        assert "deprecated" not in answer["output"].lower(), answer["output"]
        self.output: str = answer["output"]
        return answer["result"]

    def error(self, code: str, *, token: str | None = None, keep_cache: bool = False, **variables: Any) -> str:
        """Runs code that must fail, and gives the kind and the message of the error: "ValueError: no such thing"."""
        answer = self._ask(code, token, keep_cache, variables, None)
        assert answer["error"] is not None, f"No error, but the result {answer['result']!r}\n{answer['output']}"
        return answer["error"]

    def _ask(
        self, code: str, token: str | None, keep_cache: bool, variables: dict[str, Any], cwd: Path | None
    ) -> dict[str, Any]:
        if not keep_cache:
            shutil.rmtree(self.home, ignore_errors=True)
        self._count += 1
        folder = self._directory / f"run-{self._count}"
        folder.mkdir()
        request: dict[str, Any] = {"code": textwrap.dedent(code), "token": token, "variables": variables}
        request |= {"folder": folder, "cwd": cwd or folder}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request, default=os.fspath), file=self._process.stdin, flush=True)
        status = self._process.stdout.readline()
        output = (folder / "output").read_text(encoding="utf-8", errors="replace")
        if status != "0\n":
            raise AssertionError(f"The process ended with the status {status.strip()!r}.\n{output}")
        return {**json.loads((folder / "answer").read_text(encoding="utf-8")), "output": output}

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        shutil.rmtree(self._directory, ignore_errors=True)


@functools.cache
def clean_python(hub: Hub) -> ForkingPython:
    """Processes that know nothing of this project, and use the test Hub; one for a run of the tests."""
    directory = Path(tempfile.mkdtemp(prefix="clean-"))
    return _closed_at_exit(ForkingPython(make_environment(directory / "environment"), PRELOADED, hub.env(), directory))


@functools.cache
def own_python(hub: Hub) -> ForkingPython:
    """Processes that have this project installed, and use the test Hub; one for a run of the tests."""
    directory = Path(tempfile.mkdtemp(prefix="own-"))
    preloaded = [*PRELOADED, "datasets", "mimic_el", "mimic_el.train"]
    return _closed_at_exit(ForkingPython(sys.executable, preloaded, hub.env(), directory))


def _closed_at_exit(python: ForkingPython) -> ForkingPython:
    atexit.register(python.close)
    return python


def make_environment(directory: Path) -> Path:
    """Makes the environment, and gives its interpreter."""
    venv.create(directory, symlinks=True)
    [site] = (directory / "lib").glob("python*/site-packages")
    for distribution in _required(PACKAGES):
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))  # type: ignore[arg-type]
    return directory / "bin" / "python"


def _required(names: tuple[str, ...]) -> list[importlib.metadata.Distribution]:
    """The installed distributions of that name, and all that they require."""
    from packaging.requirements import Requirement

    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on another platform only
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return list(found.values())


# The process that forks


def _serve() -> None:
    import contextlib
    import gc

    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):  # other versions have other modules
            __import__(name)
    # What libraries make at first use, and keep: plugins of formats, and names of weights in all models.
    with contextlib.suppress(ImportError):
        from PIL import Image

        Image.init()
    with contextlib.suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("clip")
    # A child need not look through a million objects that stay, each time that it collects garbage.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _answer(request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _answer(request: dict[str, Any]) -> None:
    """Runs the code of a request in this process, and ends it."""
    status = 1
    try:
        folder = Path(request["folder"])
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(request["cwd"])
        if request["token"]:
            os.environ["HF_TOKEN"] = request["token"]
        script = folder / "script.py"
        script.write_text(request["code"], encoding="utf-8")
        names = {"__name__": "__main__", "__file__": str(script), **request["variables"]}
        answer: dict[str, Any] = {"result": None, "error": None, "traceback": None}
        warnings.filterwarnings("error", category=DeprecationWarning, module="transformers_modules")
        warnings.filterwarnings("error", category=FutureWarning, module="transformers_modules")
        try:
            exec(compile(request["code"], script, "exec"), names)
            answer["result"] = names.get("result")
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
            answer["traceback"] = traceback.format_exc()
        (folder / "answer").write_text(json.dumps(answer), encoding="utf-8")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()

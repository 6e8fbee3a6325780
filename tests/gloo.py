"""Code that several processes run together, connected by gloo, as `torchrun` would start them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from python_processes import ForkingPython

_LAUNCH = """
import json, os, signal, sys, time, traceback
from pathlib import Path

folder = Path(outcomes)
children = []
for rank in range(count):
    child = os.fork()
    if not child:
        status = 1
        try:
            import torch
            from torch import distributed as dist
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            if connect:
                dist.init_process_group("gloo", rank=rank, world_size=count)
            names = {"__name__": "__main__", "rank": rank, "count": count, **given}
            exec(compile(shared_code, "together", "exec"), names)
            (folder / f"result-{rank}").write_text(json.dumps(names.get("result")))
            status = 0
        except BaseException as error:
            (folder / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
            traceback.print_exc()
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(status)
    children.append(child)
deadline, running, stopped = time.monotonic() + limit, set(children), set()
while running - stopped and time.monotonic() < deadline:
    for child in list(running):
        ended, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if ended:
            (stopped.add if os.WIFSTOPPED(status) else running.discard)(child)
    time.sleep(0.01)
for child in running:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
result = [children.index(child) for child in running]
"""


def run_together(python: ForkingPython, count: int, code: str, folder: Path, **options: Any) -> list[Any]:
    """Runs `code` in `count` processes at once and gives what each has in `result`.

    The code finds `rank`, `count`, `dist`'s process group and the variables that are given.

    Raises:
        AssertionError: if one fails, or has not ended after a minute, with all that they wrote.
    """
    outcomes, output = outcomes_together(python, count, code, folder, **options)
    assert all(kind == "result" for kind, _ in outcomes), f"{outcomes}\n{output}"
    return [value for _, value in outcomes]


def outcomes_together(
    python: ForkingPython,
    count: int,
    code: str,
    folder: Path,
    *,
    limit: float = 60.0,
    connect: bool = True,
    **given: Any,
) -> tuple[list[tuple[str, Any]], str]:
    """For each process ("result", value), ("error", "Kind: message"), ("killed", None) or, if it still runs or was
    stopped when the others had ended, ("hangs", None); and all that they wrote.

    Args:
        limit: seconds after which processes that still run are ended.
        connect: whether the process group is there already; if not, the code makes it, as a Trainer does.
    """
    import json
    import socket

    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hanging = python.run(
        _LAUNCH,
        outcomes=folder,
        count=count,
        shared_code=textwrap.dedent(code),
        given=given,
        limit=limit,
        connect=connect,
        port=port,
    )
    outcomes: list[tuple[str, Any]] = []
    for rank in range(count):
        result, error = folder / f"result-{rank}", folder / f"error-{rank}"
        if rank in hanging:
            outcomes.append(("hangs", None))
        elif result.exists():
            outcomes.append(("result", json.loads(result.read_text())))
        else:
            outcomes.append(("error", error.read_text()) if error.exists() else ("killed", None))
    return outcomes, python.output

"""Tests of training/watch.py: processes that wait for each other, and what they say of one that fails or is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gloo import outcomes_together, run_together
from python_processes import ForkingPython, own_python


@pytest.fixture(scope="module")
def python(hub: Any) -> ForkingPython:
    return own_python(hub)


def test_slow_failing_and_killed_processes(python: ForkingPython, tmp_path: Path) -> None:
    """Waiting has no limit of time, the error of one is that of all, and what was killed is not waited for."""
    code = """
        import os, signal, time
        from datetime import timedelta
        import torch
        from torch import distributed as dist
        from mimic_el.training import watch
        dist.init_process_group("gloo", rank=rank, world_size=count, timeout=timedelta(seconds=1))
        watch._PULSE = 0.05

        def slow():
            time.sleep(2.0 if rank == 1 else 0.0)
            return rank

        result = [watch.all_of_them("slow work", slow)]
        def failing():
            if rank == 1:
                raise ValueError("no such thing")
        try:
            watch.all_of_them("failing work", failing)
        except Exception as error:
            result.append(f"{type(error).__name__}: {error}")
        def killed():
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        try:
            watch.all_of_them("fatal work", killed, silence=0.5)
        except watch.ProcessError as error:
            result.append(str(error))
    """
    outcomes, output = outcomes_together(python, 2, code, tmp_path, connect=False)
    assert outcomes[1] == ("killed", None)
    assert outcomes[0][0] == "result", output
    done, failed, silent = outcomes[0][1]
    assert done == 0
    assert failed == "ProcessError: Process 1 of 2 failed in failing work: ValueError: no such thing"
    assert "Process 1 of 2 gave no sign of life" in silent


def test_a_process_that_takes_another_way_is_named(python: ForkingPython, tmp_path: Path) -> None:
    """It has ended the work that another still waits for it in: no silence, and no failure."""
    code = """
        from mimic_el.training import watch
        result = []
        try:
            with watch.in_touch("work"):
                watch.all_of_them("the first half", lambda: None)
                if rank == 0:
                    watch.all_of_them("the second half", lambda: None)
        except watch.ProcessError as error:
            result.append(str(error))
    """
    first, second = run_together(python, 2, code, tmp_path)
    assert second == []
    assert first == [
        "Process 1 of 2 has ended the second half, while this one waits for it: all processes must make the same calls "
        "with the same data and options."
    ]

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mimic_el import turns_mimic
from mimic_el.turns_mimic import Turns


@pytest.mark.parametrize(("threads", "cores", "places"), [(4, 4, 1), (1, 4, 4), (2, 4, 2), (8, 4, 1), (3, 8, 2)])
def test_as_many_threads_compute_as_the_cores_are_enough_for(
    threads: int, cores: int, places: int, monkeypatch: pytest.MonkeyPatch
):
    """A model that is set to evaluate while it computes, or is elsewhere, is one thread's at a time."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(turns_mimic.os, "cpu_count", lambda: cores)
    turns = Turns()
    for training, expected in ((False, places), (True, 1)):
        model = SimpleNamespace(training=training, device=torch.device("cpu"))
        meeting, most, seen = threading.Barrier(expected), [0], threading.Lock()
        inside: set[int] = set()

        def compute(
            model: Any = model, most: Any = most, seen: Any = seen, inside: Any = inside, meeting: Any = meeting
        ):
            with turns.turn(model), turns.turn(model):  # one that calls another, as a reranker may
                with seen:
                    inside.add(threading.get_ident())
                    most[0] = max(most[0], len(inside))
                meeting.wait(timeout=30)  # only so many at once let each other go on
                with seen:
                    inside.discard(threading.get_ident())

        callers = [threading.Thread(target=compute) for _ in range(2 * expected)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(timeout=60)
        assert not any(caller.is_alive() for caller in callers)
        assert most[0] == expected


def test_an_error_gives_the_turn_back():
    turns = Turns()
    model = SimpleNamespace(training=True, device=torch.device("cpu"))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="fault"), turns.turn(model):
            raise RuntimeError("fault")

"""Limits how many threads compute with a model at once. Knows neither what they compute nor the pipeline."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Turns:
    """Turns of threads that compute: more at once than the machine has cores for would be slower than one by one."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._changed = threading.Condition()
        self._computing, self._alone = 0, False
        self._own = threading.local()

    @contextmanager
    def turn(self, model: Any) -> Iterator[None]:
        """Waits for a turn to compute with a model. Who has one has it for what it calls, too."""
        if getattr(self._own, "has_one", False):
            yield
            return
        with self._changed:
            places = _places(model)
            while self._alone or self._computing >= places:
                self._changed.wait()
                places = _places(model)
            self._computing += 1
            self._alone = places == 1
        self._own.has_one = True
        try:
            yield
        finally:
            self._own.has_one = False
            with self._changed:
                self._computing -= 1
                self._alone = False
                self._changed.notify_all()


def _places(model: Any) -> int:
    """How many threads may compute with a model at once: as many as have all the threads of torch's that they use,
    and one where the model is changed meanwhile: set to evaluate for as long, or its weights are fetched."""
    fetched = getattr(model, "hf_device_map", None) is not None
    if model.training or fetched or model.device.type != "cpu":
        return 1
    return max(1, (os.cpu_count() or 1) // torch.get_num_threads())


COMPUTING = Turns()
if hasattr(os, "register_at_fork"):  # a forked process has no thread that would give a turn back
    os.register_at_fork(after_in_child=COMPUTING.forget)


__all__ = ["COMPUTING", "Turns"]

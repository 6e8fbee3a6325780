"""How several processes of one training wait for each other, and how they report one that is lost.

A collective operation fails, or hangs, if a process comes late or not at all. So everything that takes long runs in
[`all_of_them`]: each process does its own part, says that it is done or what went wrong, and waits without a limit as
long as the others are alive. If one fails, all raise its error. What must use collective operations, such as a step,
runs [`in_touch`]: if an operation breaks, the others say which process is gone or failed, and why.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list
from torch import distributed as dist

from ..errors_mimic import MimicError
from .gather import process_count, process_index

Result = TypeVar("Result")

# A process that is alive says so every so many seconds; silent for so many, it is given up by those that wait for it.
# Where a connection broke, the one that has left so many of its signs out is the one that is gone.
_PULSE, _SILENCE, _SIGNS_MISSED = 2.0, 120.0, 5
_calls, _contexts = itertools.count(), itertools.count()
# What torch says where a connection to another process broke, or nothing came in time; some of it has no class.
_LOST = re.compile(r"\bgloo\b|nccl|connection (closed|reset) by peer", re.IGNORECASE)
_AGAIN = "Run the same command again: a training goes on from its last checkpoint."


class ProcessError(MimicError, RuntimeError):
    """Another process of the same training failed, or is gone."""


def all_of_them(what: str, function: Callable[[], Result], *, silence: float = _SILENCE) -> Result:
    """This process's result of a function that all processes call at the same point, each for its own part of the work.

    Waits for the others as long as they are alive, however long that takes.

    Args:
        what: names the work in messages, such as "ranking mentions".
        function: must use no collective operation that another process may not reach.
        silence: as of [`in_touch`].

    Raises:
        ProcessError: if another process failed, with its message, or is gone.
    """
    if process_count() == 1:
        return function()
    own, every = process_index(), set(range(process_count()))
    with in_touch(what, silence=silence) as watch:
        store = dist.PrefixStore(f"mimic-el/{next(_calls)}", dist.distributed_c10d._get_default_store())
        try:
            result = function()
        except BaseException as error:
            store.set(f"outcome-{own}", _told(error))
            raise
        store.set(f"outcome-{own}", "")
        pause = 0.01
        waiting = every - {own}
        while waiting:
            left = watch.left()  # before it is seen what they have done
            for other in sorted(waiting):
                try:
                    if store.check([f"outcome-{other}"]):
                        if fault := store.get(f"outcome-{other}").decode():
                            raise ProcessError(watch.failed(other, fault, what))
                        waiting.discard(other)
                except (dist.DistStoreError, dist.DistNetworkError) as error:
                    raise ProcessError(watch.reason(what, error)) from error
            if waiting:
                watch.check(waiting, waiting & left, what)
                time.sleep(pause)
                pause = min(1.5 * pause, 0.5)
    return result


def of_the_main_process(what: str, function: Callable[[], Result]) -> Result:
    """A function's result in all processes, which all call this; only the main one runs it.

    Args:
        what: names the work in messages.
        function: of no arguments; its result can be pickled.

    Raises:
        ProcessError: in the others, if it fails.
    """
    if process_count() == 1:
        return function()
    outcome: list[Any] = [all_of_them(what, function if process_index() == 0 else lambda: None)]
    broadcast_object_list(outcome)
    return outcome[0]


@contextmanager
def in_touch(what: str, *, silence: float = _SILENCE) -> Iterator[_Watch]:
    """A context in which processes may use collective operations. All of them enter it.

    Where an operation fails since another process failed or is gone, that process is named in the error. Within
    another such context it is the same.

    Args:
        what: names the work in messages.
        silence: seconds after which a process that gives no sign of life is given up, 120 at most.

    Raises:
        ProcessError: in the place of what a broken connection raises.
    """
    global _watch
    if process_count() == 1 or _watch is not None:
        yield _watch or _Watch(None, 0, 1, silence)
        return
    store = dist.distributed_c10d._get_default_store()
    watched = dist.PrefixStore(f"mimic-el/watch-{next(_contexts)}", store.clone() if hasattr(store, "clone") else store)
    watch = _watch = _Watch(watched, process_index(), process_count(), min(silence, _SILENCE))
    watch.start()
    try:
        yield watch
    except BaseException as error:
        if isinstance(error, ProcessError):
            watch.tell(echo=str(error))
            raise
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
            told = ProcessError(watch.reason(what, error))
            watch.tell(echo=str(told))
            raise told from error
        watch.tell(fault=_told(error))
        raise
    finally:
        _watch = None
        watch.leave()


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


class _Watch(threading.Thread):
    """Tells the other processes again and again that this one is alive, and notes what they tell.

    Time is counted in its own turns: where this process was stopped for a while, nobody else has been silent.

    Args:
        store: what the processes share.
        own, count: which of how many processes this is.
        silence: seconds after which a silent process is given up that is waited for.
    """

    def __init__(self, store: Any, own: int, count: int, silence: float) -> None:
        super().__init__(daemon=True)
        self._store, self._own, self._count, self._allowed = store, own, count, silence
        self._pulse = min(_PULSE, silence / 20)
        self._turns = 0
        self._signs: dict[int, tuple[int, int]] = {other: (-1, 0) for other in range(count) if other != own}
        self._told: dict[int, dict[str, Any]] = {}
        self._own_words: dict[str, Any] = {"fault": "", "echo": "", "left": False}
        self._wake, self._ends, self._is_lost = threading.Event(), False, False

    # --- The thread

    def run(self) -> None:
        while not self._is_lost:
            ends = self._ends
            try:
                words = {**self._own_words, "sign": self._turns, "heard": self._heard()}
                self._store.set(f"{self._own}", json.dumps(words))
                self._read()
            except Exception:  # the store is gone, with the process that keeps it
                self._is_lost = True
                return
            if ends:
                return
            if not self._wake.wait(self._pulse):
                self._turns += 1
            self._wake.clear()

    def _read(self) -> None:
        unknown = [other for other in self._signs if other not in self._told and self._store.check([f"{other}"])]
        asked = [*self._told, *unknown]
        for other, value in zip(
            asked, self._store.multi_get([f"{other}" for other in asked]) if asked else [], strict=True
        ):
            self._told[other] = told = json.loads(value)
            if told["sign"] != self._signs[other][0]:
                self._signs[other] = told["sign"], self._turns

    def _faults(self) -> dict[int, str]:
        """What went wrong in the other processes, of those that were at fault themselves."""
        return {other: told["fault"] for other, told in list(self._told.items()) if told["fault"]}

    def _silent(self, turns: float) -> list[int]:
        """The processes of which nothing was heard for so many turns."""
        return [o for o, (_, turn) in self._signs.items() if o not in self.left() and self._turns - turn > turns]

    # --- What this process says

    def tell(self, *, fault: str = "", echo: str = "") -> None:
        """Tells the others what went wrong here, or what this process was told of another's fault."""
        self._own_words |= {"fault": fault, "echo": echo}

    def leave(self) -> None:
        """Ends the signs of life. The process that keeps the store waits a while for the others to hear of that, since
        the store may end with it."""
        if self._store is None:
            return
        self._own_words["left"] = True
        if self._own == 0:
            self._wait(lambda: not self._have_not_heard(), hurry=True)
        self._ends = True
        self._wake.set()
        self.join()

    def _heard(self) -> list[int]:
        """The other processes that said that something went wrong."""
        return [other for other, words in list(self._told.items()) if words["fault"] or words["echo"]]

    def _have_not_heard(self) -> list[int]:
        """The other processes that are alive, and have not left, nor heard that something went wrong."""
        known = {other for other, words in list(self._told.items()) if words["left"] or self._own in words["heard"]}
        return [other for other in self._signs if other not in known.union(self._silent(_SIGNS_MISSED))]

    # --- What it knows of the others

    def left(self) -> set[int]:
        """The processes that have left the context."""
        return {other for other, words in list(self._told.items()) if words["left"]}

    def check(self, waiting: set[int], left: set[int], what: str) -> None:
        """Raises a `ProcessError` that names one of the processes that are waited for, if it failed, left or is
        silent."""
        if self._is_lost:
            raise ProcessError(self.reason(what, None))
        for other, fault in self._faults().items():
            if other in waiting:
                raise ProcessError(self.failed(other, fault, what))
        for other in left:
            raise ProcessError(self._told[other]["echo"] or self._ended(other, what))
        for other in self._silent(self._allowed / self._pulse):
            if other in waiting:
                raise ProcessError(self._gone(other, what, self._allowed))

    def failed(self, other: int, fault: str, what: str) -> str:
        return f"Process {other} of {self._count} failed in {what}: {fault}"

    def reason(self, what: str, error: BaseException | None) -> str:
        """Why a connection broke: waits until it is known which process failed, or gives no more signs of life."""
        self._wake.set()
        self._wait(lambda: bool(self._faults() or self._silent(_SIGNS_MISSED)))
        for other, fault in self._faults().items():
            return self.failed(other, fault, what)
        told = list(self._told.items())
        for other in self._silent(_SIGNS_MISSED):
            return self._gone(other, what, (self._turns - self._signs[other][1]) * self._pulse)
        for _, words in told:
            if words["echo"]:
                return words["echo"]
        if self._is_lost and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return (
                f"The launcher, which keeps the {self._count} processes in touch, is gone, in {what}: {error}. {_AGAIN}"
            )
        if self._is_lost:
            return (
                f"Process 0 of {self._count}, which keeps the processes in touch, is gone, in {what}: {error}. It was "
                f"probably killed, for want of memory for instance; see its own messages. {_AGAIN}"
            )
        for other in sorted(self.left()):
            return self._ended(other, what)
        return (
            f"A connection between the {self._count} processes broke, or nothing came in time, in {what}, though all "
            f"are alive: {error}. If one only takes long, raise --ddp_timeout. {_AGAIN}"
        )

    def _gone(self, other: int, what: str, seconds: float) -> str:
        return (
            f"Process {other} of {self._count} gave no sign of life for {seconds:.0f} seconds in {what}. It was "
            f"probably killed, for want of memory for instance; see its own messages. {_AGAIN}"
        )

    def _ended(self, other: int, what: str) -> str:
        return (
            f"Process {other} of {self._count} has ended {what}, while this one waits for it: all processes must make "
            "the same calls with the same data and options."
        )

    def _wait(self, known: Callable[[], bool], hurry: bool = False) -> None:
        """Waits until something is known, for a few pulses at most."""
        end = time.monotonic() + 2 * _SIGNS_MISSED * self._pulse
        while not known() and not self._is_lost and time.monotonic() < end:
            if hurry:
                self._wake.set()
            time.sleep(min(0.05, self._pulse / 4))


_watch: _Watch | None = None

"""The actors that hold the parts of an index: started, asked, started again, and named if they cannot be reached.

Knows nothing of what the parts are asked.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors_mimic import EntityIndexError
from .part import Part

# A part is told from one that only takes long by asking it this often whether it is there.
_ASK_SECONDS = 10.0
_CLOSED = "This index was closed."


class PartGoneError(EntityIndexError):
    """A part that stays away."""


class Actors:
    """One Ray actor for each part.

    Args:
        places: where each part is stored.
        options: of Ray's actors, for each part.
        opening: arguments with which a part is opened.
        patience: seconds after which a part is given up whose actor does not answer.
        max_restarts: how often an actor is started again; -1 for always.
    """

    def __init__(
        self,
        places: Sequence[str],
        options: Sequence[Mapping[str, Any]],
        opening: Mapping[str, Any],
        *,
        patience: float,
        max_restarts: int,
    ) -> None:
        self._ray = ray_at_work()
        self.places, self._patience = places, patience
        actor = self._ray.remote(Part)
        self.actors: list[Any] = []
        try:
            for place, chosen in zip(places, options, strict=True):
                device = "cuda" if chosen.get("num_gpus") else "cpu"
                defaults = {"max_restarts": max_restarts, "max_task_retries": -1, "max_concurrency": 4}
                self.actors.append(actor.options(**{**defaults, **chosen}).remote(place, opening, device))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.actors)

    def close(self) -> None:
        """Ends the actors. The parts stay where they are stored."""
        for actor in self.actors:
            self._ray.kill(actor)
        self.actors = []

    def check_open(self) -> None:
        """Raises an `EntityIndexError` if they were ended."""
        if not self.actors:
            raise EntityIndexError(_CLOSED)

    def shared(self, value: Any) -> Any:
        """A value that all parts are asked with, sent once."""
        return self._ray.put(value)

    def one(self, part: int, name: str, *args: Any, state: str | None = None) -> Any:
        """What one part answers.

        Args:
            state: what the question is about; any state unless told.

        Raises:
            PartChangedError: if the part is in another by now.
        """
        self.check_open()
        return self._get(part, lambda: self.actors[part].ask.remote(state, name, *args))

    def changed(
        self, part: int, state: str, made: Callable[[], bool] | None, name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Makes a change of one part once, and gives its facts: where its actor dies, it is seen whether the change
        was made before.

        Args:
            state: as of [`one`].
            made: tells that; `None` for a change that may be made twice.
        """
        for last in (False, True):
            method = self.actors[part].change.options(max_task_retries=0)
            ask = functools.partial(method.remote, state, name, *args, **kwargs)
            try:
                return self._get(part, ask, retry=False)
            except PartGoneError as error:
                facts = self.one(part, "facts")  # once it is there again
                if made is not None and made():
                    return facts
                if last:
                    raise EntityIndexError(str(error)) from error
        raise AssertionError

    def all(self, name: str, *args: Any, states: Sequence[str] | None = None) -> list[Any]:
        """What every part answers to the same question."""
        return self.each(name, [args] * len(self.actors), states=states)

    def each(
        self,
        name: str,
        args: Sequence[tuple | None],
        kwargs: Sequence[Mapping[str, Any]] | None = None,
        states: Sequence[str] | None = None,
    ) -> list[Any]:
        """What every part answers to its own question; `None` of one that is asked none. Raises as [`one`] does."""
        self.check_open()
        options = kwargs or [{}] * len(args)
        about: Sequence[str | None] = states or [None] * len(args)
        asks = [
            None if own is None else functools.partial(actor.ask.remote, state, name, *own, **named)
            for actor, own, named, state in zip(self.actors, args, options, about, strict=True)
        ]
        asked = [None if ask is None else ask() for ask in asks]
        answers: list[Any] = []
        faults: list[Exception] = []
        for part, (ask, ref) in enumerate(zip(asks, asked, strict=True)):
            try:
                answers.append(None if ask is None else self._get(part, ask, ref))
            except Exception as error:  # the others are waited for: Ray tells of answers that nobody takes
                faults.append(error)
        if faults:
            raise faults[0]
        return answers

    def _get(self, part: int, ask: Callable[[], Any], ref: Any = None, *, retry: bool = True) -> Any:
        """The answer of a part, however long its work takes as long as its actor is there.

        Raises:
            EntityIndexError: naming the part, if it stays away.
        """
        ray, end = self._ray, time.monotonic() + self._patience
        ref = ask() if ref is None else ref
        while True:
            try:
                return ray.get(ref, timeout=min(_ASK_SECONDS, self._patience))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.GetTimeoutError as error:
                if self._is_there(part):
                    end = time.monotonic() + self._patience
                elif time.monotonic() >= end:
                    raise PartGoneError(self._gone(part, "it does not answer")) from error
            except ray.exceptions.RayError as error:
                if not retry or time.monotonic() >= end or not self._comes_back(part, end):
                    raise PartGoneError(self._gone(part, _reason(error))) from error
                ref = ask()

    def _is_there(self, part: int) -> bool:
        try:
            return self._ray.get(self.actors[part].there.remote(), timeout=min(_ASK_SECONDS, self._patience))
        except self._ray.exceptions.RayError:
            return False

    def _comes_back(self, part: int, end: float) -> bool:
        """Whether an actor answers before a time."""
        while time.monotonic() < end:
            try:
                return self._ray.get(self.actors[part].there.remote(), timeout=max(0.1, end - time.monotonic()))
            except self._ray.exceptions.ActorDiedError:
                return False  # for good
            except self._ray.exceptions.RayError:
                time.sleep(0.2)
        return False

    def _gone(self, part: int, why: str) -> str:
        return (
            f"The part {self.places[part]} ({part + 1} of {len(self.places)}) cannot be reached: {why}. No answer is "
            "given without it."
        )


@dataclass(frozen=True)
class Moment:
    """The parts in the states that they have at one moment. What is asked of it is answered from these states alone.

    Its methods raise a `PartChangedError` where a part is in another state by now.

    Args:
        actors: hold the parts.
        facts: of each part, as it answers them.
    """

    actors: Actors
    facts: Sequence[Mapping[str, Any]]

    @property
    def counts(self) -> list[int]:
        """The numbers of entities."""
        return [fact["count"] for fact in self.facts]

    def all(self, name: str, *args: Any) -> list[Any]:
        return self.actors.all(name, *args, states=self._states)

    def each(
        self, name: str, args: Sequence[tuple | None], kwargs: Sequence[Mapping[str, Any]] | None = None
    ) -> list[Any]:
        return self.actors.each(name, args, kwargs, self._states)

    def one(self, part: int, name: str, *args: Any) -> Any:
        return self.actors.one(part, name, *args, state=self._states[part])

    def changed(
        self, part: int, made: Callable[[], bool] | None, name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As [`Actors.changed`]."""
        return self.actors.changed(part, self._states[part], made, name, *args, **kwargs)

    @property
    def _states(self) -> list[str]:
        return [fact["state"] for fact in self.facts]


def _reason(error: Exception) -> str:
    """The first line of what Ray says, or of what kept the actor from starting."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or [type(error).__name__])[-1 if errors else 0].rstrip(".")


def ray_at_work() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError('RayEntityIndex needs Ray: pip install "mimic-el[ray]".') from error
    if not ray.is_initialized():
        ray.init()
    return ray


__all__ = ["Actors", "Moment", "PartGoneError", "ray_at_work"]

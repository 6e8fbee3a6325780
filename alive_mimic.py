"""Signs of life between processes that share only a directory: which of the others still work.

Each process writes a growing number into a file of its own. The others compare what they read with what they read
before. No file times are used, and no clock but each process's own: the clocks of machines differ, and a network file
system may show file times late. Knows files, but not what the processes work on.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_EVERY = 5.0


@contextmanager
def alive(sign: Path, patience: float) -> Iterator[None]:
    """A context in which this process shows in a file that it is alive; the file is deleted at the end.

    Args:
        sign: the file; no other process writes it.
        patience: seconds that the others wait for a change. A disk that is full for so long is no sign of life.
    """
    done = threading.Event()

    def beat() -> None:
        for number in itertools.count():
            with suppress(OSError):
                sign.write_text(f"{number}")  # closed at once: so a network's file system shows it to whoever opens it
            if done.wait(min(_EVERY, patience / 20)):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(OSError):
            sign.unlink(missing_ok=True)


class Silence:
    """For how long some files, the signs of life of others, have not changed.

    Args:
        signs: the files; one that is not there has not changed either.
    """

    def __init__(self, signs: Iterable[Path]) -> None:
        self._seen: dict[Path, str | None] = dict.fromkeys(signs)
        self._since = time.monotonic()

    def seconds(self) -> float:
        """Seconds since one of the files was seen to change."""
        for sign, before in self._seen.items():
            if (now := _read(sign)) != before:
                self._seen[sign] = now
                self._since = time.monotonic()
        return time.monotonic() - self._since


def clock_ahead(sign: Path) -> float:
    """Seconds by which the clock of a file system is ahead of this process's, as a file shows that is written now.

    Raises:
        OSError: if it cannot be written.
    """
    sign.write_text("now")
    return sign.stat().st_mtime - time.time()


def _read(sign: Path) -> str | None:
    try:
        return sign.read_text()
    except (OSError, ValueError):
        return None


__all__ = ["Silence", "alive", "clock_ahead"]

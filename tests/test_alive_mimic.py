"""Tests of alive_mimic.py: signs of life, and silence, by a clock that the test sets."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from mimic_el import alive_mimic
from mimic_el.alive_mimic import Silence, alive, clock_ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(alive_mimic.time, "monotonic", lambda: now[0])
    return now


def test_silence_ends_with_any_change(tmp_path: Path, clock: list[float]) -> None:
    """Of what is read, whatever time the files have: those of a machine may be of another day."""
    signs = [tmp_path / "a", tmp_path / "b"]
    silence = Silence(signs)
    clock[0] += 7
    assert silence.seconds() == 7
    for number, sign in enumerate(signs):
        sign.write_text(f"{number}")
        os.utime(sign, (5, 5))
        assert silence.seconds() == 0
        clock[0] += 3
        os.utime(sign, (2e9, 2e9))
        assert silence.seconds() == 3
    signs[0].unlink()  # whoever ends has done something, too
    assert silence.seconds() == 0
    clock[0] += 2
    assert silence.seconds() == 2


def test_signs_change_as_long_as_the_work_goes_on(tmp_path: Path) -> None:
    sign = tmp_path / "sign"
    silence = Silence([sign])
    with alive(sign, patience=0.2):
        for _ in range(3):
            before = silence._seen[sign]
            while silence._seen[sign] == before:  # the test's own limit of time ends this where nothing changes
                silence.seconds()
    assert not sign.exists()
    assert not [thread for thread in threading.enumerate() if "beat" in thread.name]


def test_a_sign_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    with alive(tmp_path / "nothing" / "sign", patience=0.1):
        pass
    assert Silence([tmp_path / "nothing" / "sign"])._seen == {tmp_path / "nothing" / "sign": None}


def test_the_clock_of_a_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = alive_mimic.time.time
    for wrong in (-3600.0, 0.0, 3600.0):
        monkeypatch.setattr(alive_mimic.time, "time", lambda wrong=wrong: real() + wrong)
        assert clock_ahead(tmp_path / "sign") == pytest.approx(-wrong, abs=60)

"""The errors that a user can cause. Each says what was wrong, where, and what to do."""

from __future__ import annotations


class MimicError(Exception):
    """What a user can cause and mend: the base of this package's own errors."""


class MimicImageError(MimicError, ValueError):
    """An image that cannot be read, with what was wrong and where."""


class MentionError(MimicError, ValueError):
    """A mention or a document that cannot be linked as it is, with which of its fields and why."""


class EntityIndexError(MimicError, ValueError):
    """An index that is damaged, unfinished, locked, of another model, or used in a way that it does not allow."""


class CalibrationError(MimicError, ValueError):
    """Mentions that a model cannot be calibrated on, a calibration that cannot be used, or none where one is needed."""


class LoadError(MimicError, ValueError):
    """A model, its configuration or its processor whose files are damaged, or hold what they should not."""


class SaveError(MimicError, OSError):
    """A directory that a model, its configuration or its processor cannot be saved to, and why."""


class UnknownEntityError(MimicError, KeyError):
    """An id that is not in an index."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would show it quoted


__all__ = [
    "CalibrationError",
    "EntityIndexError",
    "LoadError",
    "MentionError",
    "MimicError",
    "MimicImageError",
    "SaveError",
    "UnknownEntityError",
]

"""The errors that a person, not a programmer, has to act on, and how their text is put together."""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Collection
from typing import Any


def shortened(items: Collection[Any], limit: int = 5, separator: str = ', ') -> str:
    """The first ``limit`` of many things, and how many more there are."""
    listed = list(items)
    more = f' and {len(listed) - limit} more' if len(listed) > limit else ''
    return separator.join(map(str, listed[:limit])) + more


def one_line(error: BaseException, limit: int | None = None) -> str:
    """The message of an exception on one line, cut off at ``limit``; its type if it has none."""
    text = str(error)
    if isinstance(error, KeyError) and error.args:
        # KeyError quotes its message, which often is nothing but the key.
        text = str(error.args[0])
        text = text if ' ' in text else f'no key {error.args[0]!r}'
    text = ' '.join(text.split()) or type(error).__name__
    return text if limit is None or len(text) <= limit else text[: limit - 3] + '...'


def reason(error: BaseException) -> str:
    """Why something failed, in one short line."""
    return f'{type(error).__name__}: {one_line(error, 150)}'


def likely(word: str, known: Collection[str], cutoff: float = 0.6) -> str:
    """``; did you mean ...?`` with the known word that resembles another; '' if none does."""
    found = difflib.get_close_matches(word, list(known), 1, cutoff)
    return f'; did you mean {found[0]}?' if found else ''


def shown(value: Any) -> str:
    """What a file has as a name, for one line on a terminal.

    A tuple may hold itself in parts so often that no memory takes the text of it.
    """
    if not isinstance(value, str):
        return type(value).__name__
    return value if re.fullmatch(r'[\w.]{1,99}', value) else repr(value[:99])


class UsageError(RuntimeError):
    """Something outside the program is wrong: a path, a file, an option.

    The command line tools print its message as one ``error: ...`` line and exit with code 2,
    so the message must name the offending value and say what to do.
    """


class MissingFileError(UsageError, FileNotFoundError):
    """A file that was named is not there."""


class UnsafeCheckpointError(UsageError, pickle.UnpicklingError):
    """A checkpoint holds more than tensors and mmengine's own records."""


class BrokenCheckpointError(UsageError):
    """A checkpoint cannot be read: cut off, damaged, or another kind of file."""


class SettingError(UsageError, ValueError):
    """A setting does not fit the model, its weights or the training.

    For what a hook or a backbone finds after the model has been built and before the first
    iteration; a ValueError raised while the config is built becomes a ``UsageError`` there.
    """


class CheckpointError(UsageError):
    """A training has nothing to show for its end: a checkpoint could not be written."""


class DivergenceError(UsageError):
    """A training has diverged: its losses are not finite any more."""


class BadSampleError(UsageError):
    """An image or its annotations cannot be used; the message names the file.

    A data loading worker hands its exception on as the text of a traceback. Only what was said
    first, at its end, is kept.
    """

    def __init__(self, message: str) -> None:
        marker = f'{type(self).__name__}: '
        super().__init__(message.rsplit(marker, 1)[-1].strip())

"""The errors that a person, not a programmer, has to act on."""


class UsageError(RuntimeError):
    """Something outside the program is wrong: a path, a file, an option.

    The command line tools print its message as one ``error: ...`` line and exit with code 2,
    so the message must name the offending value and say what to do.
    """


class MissingFileError(UsageError, FileNotFoundError):
    """A file that was named is not there."""


class UnsafeCheckpointError(UsageError):
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


class BadSampleError(UsageError):
    """An image or its annotations cannot be used; the message names the file.

    A data loading worker hands its exception on as the text of a traceback. Only what was said
    first, at its end, is kept.
    """

    def __init__(self, message: str) -> None:
        marker = f'{type(self).__name__}: '
        super().__init__(message.rsplit(marker, 1)[-1].strip())

"""Every error that a user can meet: one base class, one class per thing that can go wrong.

A message names the file, column, row or parameter, says what was found, and what to do next.
"""

from __future__ import annotations


def one_line(text: str, most: int | None = None) -> str:
    """A text from outside, such as an id or a path, for a message: control characters escaped.

    Args:
        text: Whatever.
        most: Characters after which it is cut; None: never.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return line if most is None or len(text) <= most else f"{line[:most]}…"


class UntwinError(Exception):
    """Base of all errors that untwin raises on purpose; the command line prints only their message."""


class ParameterError(UntwinError, ValueError):
    """A parameter has a value that makes no sense, or that is not supported; says which and why."""


class InputNotFoundError(UntwinError, FileNotFoundError):
    """An input path does not exist, or holds no file of the wanted type."""


class SchemaError(UntwinError):
    """A column is missing or has a type that untwin cannot read as an id or as an embedding."""


class DamagedFileError(UntwinError):
    """A file cannot be read; names the file."""


class OutputExistsError(UntwinError):
    """The output folder holds something that would be lost or mixed up."""


class OutputInUseError(UntwinError):
    """Another run works on the output folder; names its host, process and start time."""


class ChangedInputError(UntwinError):
    """A file of the input is not the one that the plan was made for; names the file."""


class StorageError(UntwinError):
    """The storage denies access, or cannot be used; names the file, folder or bucket."""


class ResourceError(UntwinError):
    """The memory budget or the disk is too small for the work; names what is needed."""


class RepeatedIdError(UntwinError):
    """The same id stands for different vectors; names up to ten such ids and their files."""


class TooManyRejectedError(UntwinError):
    """More than half of all rows could not be judged; names the commonest reasons."""


class TooManyRemovedError(UntwinError):
    """More rows would be removed than allowed; names the share, or the groups of rows."""


class ResultMismatchError(UntwinError):
    """A finished run does not add up: some row is not exactly one of kept, duplicate, rejected."""


class MissingExtraError(UntwinError, ImportError):
    """A package of an optional extra is not installed; names the extra."""


class MediaError(UntwinError):
    """A video or image cannot be decoded.

    Args:
        path: The file.
        reason: What is wrong with it, in words that fit behind its name.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.reason = reason

    def __str__(self) -> str:
        return ": ".join(self.args)

"""What a user is meant to read: the one error type, and text that any file or terminal takes.

Everything a user can cause (a wrong file, field, flag or setting) ends as `UserError`: one line that names the culprit
and the remedy. The command line prints it as `error: ...` and exits with `EXIT_USER_ERROR`; a launcher therefore knows
that a restart cannot mend it. Any other exception is a bug or a fault of the machine.
"""

from __future__ import annotations

import sys

EXIT_USER_ERROR = 2
"""The input, the recipe or a flag is wrong: running again changes nothing."""

EXIT_RUN_AGAIN = 75
"""The run stopped on request (a signal, RUN/stop) after a checkpoint: running again continues it (EX_TEMPFAIL)."""


class UserError(Exception):
    """A mistake in the input: one line that says what is wrong, where, and what to do about it."""


def told(error: UserError | PermissionError) -> int:
    """Say what is wrong, in one line on stderr; returns the exit code.

    A PermissionError is of a file of another user, anywhere in what a command was given; one that names no file is
    raised again.
    """
    said = str(error)
    if isinstance(error, PermissionError):
        if error.filename is None:
            raise error
        said = f"{error.filename}: {error.strerror}: see to it that this user may use it"
    print(f"error: {said}", file=sys.stderr)
    return EXIT_USER_ERROR


def one_line(said: object, most: int = 200) -> str:
    """What a library says, an error mostly, in one line: at most its first characters."""
    text = " ".join(str(said).split())
    return text if len(text) <= most else text[:most] + "..."


def printable(text: str) -> str:
    """The text with what no UTF-8 file can hold (a file name's wrong bytes, half of a surrogate pair) written out."""
    return text.encode("utf-8", "backslashreplace").decode()

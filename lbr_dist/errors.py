"""The one error type that a user is meant to read.

Everything a user can cause (a wrong file, field, flag or setting) ends as `UserError`: one line that names the culprit
and the remedy. The command line prints it as `error: ...` and exits with `EXIT_USER_ERROR`; a launcher therefore knows
that a restart cannot mend it. Any other exception is a bug or a fault of the machine.
"""

EXIT_USER_ERROR = 2
"""The input, the recipe or a flag is wrong: running again changes nothing."""

EXIT_RUN_AGAIN = 75
"""The run stopped on request (a signal, RUN/stop) after a checkpoint: running again continues it (EX_TEMPFAIL)."""


class UserError(Exception):
    """A mistake in the input: one line that says what is wrong, where, and what to do about it."""

"""The errors that a user can mend, each with the exit code that the command line gives it.

Raise one of these for what a user did or has; `assert` is for what we did.
The message is one line: what is wrong, where, and how to mend it.
"""


class LooptxError(Exception):
    """Something failed at run time (exit code 1)."""

    exit_code = 1


class UsageError(LooptxError, ValueError):
    """A wrong flag, key or combination of settings (exit code 2)."""

    exit_code = 2


class MissingError(LooptxError):
    """A package, extra or piece of hardware that is not here (exit code 3)."""

    exit_code = 3


class DataError(LooptxError):
    """Bad data or a bad checkpoint (exit code 4)."""

    exit_code = 4


class Interrupted(LooptxError):
    """Stopped by the user, after saving (exit code 130)."""

    exit_code = 130

"""The errors that a user can mend, each with the exit code that the command line gives it.

Raise one of these for what a user did or has; `assert` is for what we did.
The message is one line: what is wrong, where, and how to mend it.
"""

import errno


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


_REMEDIES = {
    errno.ENOSPC: "free some space or choose another place",
    errno.EDQUOT: "free some space or choose another place",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f) or choose another file system",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs, which hold all open files that this system allows",
    errno.ENOMEM: "free some memory, or raise its limit (ulimit -v)",
    errno.EAGAIN: "raise the limit on processes and threads (ulimit -u)",
    errno.ENOENT: "the folder is gone, so make it again or choose another place",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EROFS: "choose a place that you may write to",
    errno.EIO: "check the disk, or choose another place",
}


def remedy(error: OSError | int | None, other: str = "choose another place") -> str:
    """How to mend what the operating system refused. error: it, or its number."""
    number = error.errno if isinstance(error, OSError) else error
    return _REMEDIES.get(number or 0, other)

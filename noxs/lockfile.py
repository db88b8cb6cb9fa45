"""Whether a daemon runs, by the lock file that it holds for life."""

import fcntl
import os
from time import monotonic, sleep

from xenctypes.errors import BusError, ChaosError

ASKING = 1.0
"""Seconds that a lock may be held by those who only ask whether its daemon runs (``held``)."""


def held(path: str) -> bool:
    """Whether some process holds an flock on the file; False if there is no such file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def take(
    path: str, name: str, kind: type[ChaosError] = BusError, *, hint: str = "", wait: float = ASKING
) -> int:
    """The lock of a daemon, held for life by the descriptor returned.

    ``name`` is the daemon's, for the error of that ``kind`` which is raised if another one still
    holds the lock after ``wait`` seconds.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = monotonic() + wait
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if monotonic() > deadline:
                os.close(fd)
                raise kind(f"another {name} is running ({path} is locked)", hint=hint) from error
            sleep(0.01)
        else:
            return fd

"""Whether a daemon runs, by the lock file that it holds for life."""

import fcntl
import os

from xenctypes.errors import BusError


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


def take(path: str, name: str) -> int:
    """The lock of a daemon, held for life by the descriptor returned; it is never closed.

    ``name`` is the daemon's, for the BusError that is raised if another one holds the lock.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BusError(f"another {name} is running ({path} is locked)") from error
    return fd

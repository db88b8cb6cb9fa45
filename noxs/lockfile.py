"""Whether a daemon runs, by the lock file that it holds for life."""

import fcntl
import os


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

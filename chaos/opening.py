"""Files that other processes name, opened as if those had done so.

Where a path leads through /proc/self/fd or the like it names what this process has open, whoever
said the path: ``openat2`` refuses such links (RESOLVE_NO_MAGICLINKS, linux/openat2.h).
"""

from __future__ import annotations

import ctypes
import errno
import os

SYS_OPENAT2 = 437
AT_FDCWD = -100
RESOLVE_NO_MAGICLINKS = 0x02
PROC_SUPER_MAGIC = 0x9FA0  # linux/magic.h
STATFS_LONGS = 32
"""Room for struct statfs, whose first member is the file system's type."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def open_for_others(path: str, flags: int) -> int:
    """Open a file for reading that another process named: a descriptor, close-on-exec.

    Without blocking, for it may be a FIFO, and not as our terminal. Raises OSError, also for what
    procfs tells of this process, and ValueError for what is no path.
    """
    if "\0" in path:
        raise ValueError("embedded null byte")
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    how = _OpenHow(flags, 0, RESOLVE_NO_MAGICLINKS)
    fd = _libc.syscall(
        ctypes.c_long(SYS_OPENAT2),
        ctypes.c_long(AT_FDCWD),
        os.fsencode(path),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if fd < 0:
        failure = ctypes.get_errno()
        raise OSError(failure, os.strerror(failure), path)
    if _is_of_procfs(fd):
        os.close(fd)
        raise OSError(errno.EACCES, "procfs would tell of chaosd, not of you", path)
    return int(fd)


def _is_of_procfs(fd: int) -> bool:
    status = (ctypes.c_long * STATFS_LONGS)()
    return not _libc.fstatfs(fd, status) and status[0] == PROC_SUPER_MAGIC

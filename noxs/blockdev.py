"""What holds a disk's blocks: which one it is, and files as loop devices.

The ioctls are those of linux/loop.h. None of those used here asks the kernel for a capability
(lo_ioctl and loop_control_ioctl in drivers/block/loop.c): it counts who may open the device nodes,
which are root's, and the file. A loop device is read-only if it, or the file, was opened so.

A loop device that is not detached stays, whatever becomes of the process that made it. It carries a
tag, so that whose it is can be found out again. The flag that would detach it with its last user is
not set: between the moment a device number is given to blkback and the moment blkback opens it, the
number must not come to mean another file because a process died.
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import contextmanager
from errno import EBUSY, ENODEV, ENOENT, ENXIO
from struct import Struct
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

CONTROL = "/dev/loop-control"
SYSFS = "/sys/block"
SYSFS_DEV = "/sys/dev/block"
MAJOR = 7  # LOOP_MAJOR of linux/major.h
LOOP_CLR_FD, LOOP_GET_STATUS64, LOOP_CONFIGURE, LOOP_CTL_GET_FREE = 0x4C01, 0x4C05, 0x4C0A, 0x4C82
LO_FLAGS_READ_ONLY, LO_FLAGS_AUTOCLEAR, LO_FLAGS_DIRECT_IO = 1, 4, 16
BLKROGET = 0x125E  # linux/fs.h
INFO = Struct("=5Q4I64s64s32s2Q")
"""loop_info64: device, inode, rdevice, offset, size limit, number, encryption (two), flags, the
name (which is the tag), and what only encryption used."""
CONFIG = Struct(f"=2I{INFO.size}s64x")  # loop_config: descriptor, block size, loop_info64
TAG_MAX = 63  # bytes: LO_NAME_SIZE, less the final NUL
ATTEMPTS = 64  # to get a free device before another process does

_open, _close, _ioctl = os.open, os.close, fcntl.ioctl  # what the tests stand in for


class Loop(NamedTuple):
    """A bound loop device: its number, the file behind it (device and inode), and its tag.

    ``rdevice`` is the device number of a file that is itself a block device, else 0.
    """

    number: int
    device: int
    inode: int
    rdevice: int
    writable: bool
    tag: str

    @property
    def path(self) -> str:
        """Its device node."""
        return f"/dev/loop{self.number}"

    @property
    def identity(self) -> str:
        """That of the file, or of what is behind it: see ``blocks``."""
        if self.rdevice:
            return device_identity(os.major(self.rdevice), os.minor(self.rdevice))
        return file_identity(self.device, self.inode)


def file_identity(device: int, inode: int) -> str:
    """A regular file, whatever its name."""
    return f"file:{device:x}:{inode:x}"


def device_identity(major: int, minor: int) -> str:
    """A block device; of a bound loop device what is behind it."""
    loop = look(minor) if major == MAJOR else None
    return f"device:{major:x}:{minor:x}" if loop is None else loop.identity


def overlap(one: str, other: str) -> bool:
    """Whether two identities share blocks: they are the same, or a partition and its disk."""
    return one == other or _whole(one) == other or one == _whole(other)


def _whole(identity: str) -> str:
    """The disk that a partition is part of; of everything else itself."""
    kind, _, number = identity.partition(":")
    if kind != "device":
        return identity
    major, _, minor = number.partition(":")
    directory = f"{SYSFS_DEV}/{int(major, 16)}:{int(minor, 16)}"
    if not os.path.exists(f"{directory}/partition"):
        return identity
    try:
        with open(f"{directory}/../dev", encoding="ascii") as file:
            parent = file.read().split(":")
    except OSError:
        return identity  # it is going
    return device_identity(int(parent[0]), int(parent[1]))


def identity(status: os.stat_result) -> str:
    """What a path leads to: hard links of a file, and aliases in /dev, have the same."""
    if stat.S_ISBLK(status.st_mode):
        return f"device:{os.major(status.st_rdev):x}:{os.minor(status.st_rdev):x}"
    return file_identity(status.st_dev, status.st_ino)


def blocks(status: os.stat_result) -> str:
    """Whose blocks they are: of a loop device those of the file behind it."""
    if stat.S_ISBLK(status.st_mode):
        return device_identity(os.major(status.st_rdev), os.minor(status.st_rdev))
    return file_identity(status.st_dev, status.st_ino)


def attach(fd: int, tag: str, *, writable: bool) -> int:
    """Bind the open file to a free loop device, with direct I/O where the file can; its number.

    Raises OSError.
    """
    flags = LO_FLAGS_DIRECT_IO | (0 if writable else LO_FLAGS_READ_ONLY)
    info = INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, tag.encode()[:TAG_MAX], b"", b"", 0, 0)
    mode = os.O_RDWR if writable else os.O_RDONLY
    with _opened(CONTROL, os.O_RDWR) as control:
        for _ in range(ATTEMPTS):
            number = int(_ioctl(control, LOOP_CTL_GET_FREE))
            with _opened(f"/dev/loop{number}", mode) as device:
                try:
                    _ioctl(device, LOOP_CONFIGURE, CONFIG.pack(fd, 0, info))
                except OSError as error:
                    if error.errno != EBUSY:
                        raise
                    continue  # another process was quicker
            return number
    raise OSError(EBUSY, "no free loop device")


def detach(number: int) -> None:
    """Let a loop device go; at once, or when the last who has it open closes it. Raises OSError."""
    with _opened(f"/dev/loop{number}", os.O_RDONLY) as device:
        try:
            _ioctl(device, LOOP_CLR_FD)
        except OSError as error:
            if error.errno != ENXIO:  # not bound
                raise


def look(number: int) -> Loop | None:
    """What is behind a loop device; None if nothing is. Raises OSError."""
    try:
        with _opened(f"/dev/loop{number}", os.O_RDONLY) as device:
            raw = _ioctl(device, LOOP_GET_STATUS64, bytes(INFO.size))
    except OSError as error:
        if error.errno in {ENXIO, ENOENT, ENODEV}:
            return None
        raise
    device, inode, rdevice, _, _, _, _, _, flags, name, *_ = INFO.unpack(raw)
    tag = name.partition(b"\0")[0].decode(errors="replace")
    behind = rdevice if rdevice != device else 0
    return Loop(number, device, inode, behind, not flags & LO_FLAGS_READ_ONLY, tag)


def sequence(number: int) -> str:
    """What the kernel counts a loop device's files by, a new number for each; "" before Linux 5.15.

    Unlike the tag it can be seen without opening the device: /sys/block/<disk>/diskseq, in
    Documentation/ABI/stable/sysfs-block.
    """
    try:
        with open(f"{SYSFS}/loop{number}/diskseq", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def bound(sysfs: str = SYSFS) -> list[int]:
    """The numbers of all loop devices that are bound."""
    return [
        int(name.removeprefix("loop"))
        for name in os.listdir(sysfs)
        if name.startswith("loop") and os.path.exists(f"{sysfs}/{name}/loop/backing_file")
    ]


def read_only(fd: int) -> bool:
    """Whether an open block device takes no writes, as ``blockdev --getro`` has it."""
    return bool(int.from_bytes(_ioctl(fd, BLKROGET, bytes(4)), "little"))


@contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    fd = _open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        _close(fd)

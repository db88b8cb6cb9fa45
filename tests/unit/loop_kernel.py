"""Loop devices without a kernel: what noxs.blockdev opens and asks, played in memory."""

from __future__ import annotations

import os
import stat
from errno import EBUSY, ENOENT, ENXIO
from typing import TYPE_CHECKING, Any

from noxs import blockdev

if TYPE_CHECKING:
    import pytest


class LoopKernel:
    """``bound`` has, by number, what a device was configured with; ``stolen`` go to others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bound: dict[int, dict[str, Any]] = {}
        self.stolen: list[int] = []
        self.readonly_devices: set[int] = set()
        self.nodes: dict[int, tuple[str, int]] = {}
        monkeypatch.setattr(blockdev, "_open", self.open)
        monkeypatch.setattr(blockdev, "_close", self.close)
        monkeypatch.setattr(blockdev, "_ioctl", self.ioctl)
        monkeypatch.setattr(blockdev, "bound", lambda: sorted(self.bound))

    def open(self, path: str, flags: int) -> int:
        assert flags & os.O_CLOEXEC
        if path != blockdev.CONTROL and not path.startswith("/dev/loop"):
            raise OSError(ENOENT, os.strerror(ENOENT))
        fd = os.open("/dev/null", os.O_RDONLY)
        self.nodes[fd] = path, flags & os.O_ACCMODE
        return fd

    def close(self, fd: int) -> None:
        del self.nodes[fd]
        os.close(fd)

    def ioctl(self, fd: int, request: int, argument: bytes | int = 0) -> Any:
        if request == blockdev.BLKROGET:
            return int(fd in self.readonly_devices).to_bytes(4, "little")
        path, mode = self.nodes[fd]
        if request == blockdev.LOOP_CTL_GET_FREE:
            return next(n for n in range(1000) if n not in self.bound)
        number = int(path.removeprefix("/dev/loop"))
        if request == blockdev.LOOP_CONFIGURE:
            return self.configure(number, mode, argument)
        if number not in self.bound:
            raise OSError(ENXIO, os.strerror(ENXIO))
        if request == blockdev.LOOP_CLR_FD:
            return self.bound.pop(number)
        assert request == blockdev.LOOP_GET_STATUS64
        assert len(argument) == blockdev.INFO.size  # type: ignore[arg-type]
        return self.info(number)

    def configure(self, number: int, mode: int, argument: Any) -> int:
        if number in self.stolen:
            self.stolen.remove(number)
            self.bound[number] = {"status": os.stat("/"), "flags": 0, "name": b""}
            raise OSError(EBUSY, os.strerror(EBUSY))
        file, block_size, raw = blockdev.CONFIG.unpack(argument)
        assert block_size == 0
        *_, flags, name, _, _, _, _ = blockdev.INFO.unpack(raw)
        assert bool(flags & blockdev.LO_FLAGS_READ_ONLY) == (mode == os.O_RDONLY)
        self.bound[number] = {"status": os.fstat(file), "flags": flags, "name": name}
        return 0

    def info(self, number: int) -> bytes:
        status, flags, name = (self.bound[number][key] for key in ("status", "flags", "name"))
        rdevice = status.st_rdev if stat.S_ISBLK(status.st_mode) else 0
        return blockdev.INFO.pack(
            status.st_dev, status.st_ino, rdevice, 0, 0, number, 0, 0, flags, name, b"", b"", 0, 0
        )

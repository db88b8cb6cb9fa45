"""The kernel's side of a XenStore ring, as drivers/xen/xenbus/xenbus_comms.c plays it."""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from noxs import wire

SIZE = 1024
U32 = 0xFFFFFFFF


class Peer:
    """Sends a byte stream and collects another one through a page in a file."""

    def __init__(self, page: Any, notify: Callable[[], object] = lambda: None) -> None:
        self.page = page
        # Native words: struct's "<I" goes byte by byte, and the other side would see halves.
        self.indexes = memoryview(page)[2048:2076].cast("I")
        self.notify = notify
        self.to_send = b""
        self.got = b""

    def index(self, number: int) -> int:
        return self.indexes[number]

    def set_index(self, number: int, value: int) -> None:
        self.indexes[number] = value & U32

    def step(self) -> bool:
        """Move what can be moved; whether anything was."""
        moved = False
        while self.to_send:
            cons, prod = self.index(0), self.index(1)
            room = SIZE - ((prod - cons) & U32)
            assert room >= 0
            count = min(room, SIZE - prod % SIZE, len(self.to_send))
            if not count:
                break
            self.page[prod % SIZE : prod % SIZE + count] = self.to_send[:count]
            self.to_send = self.to_send[count:]
            self.set_index(1, prod + count)
            moved = True
            if prod <= self.index(0):
                self.notify()
        while True:
            cons, prod = self.index(2), self.index(3)
            held = (prod - cons) & U32
            assert held <= SIZE
            count = min(held, SIZE - cons % SIZE)
            if not count:
                break
            start = SIZE + cons % SIZE
            self.got += self.page[start : start + count]
            self.set_index(2, cons + count)
            moved = True
            if ((self.index(3) - cons) & U32) >= SIZE:
                self.notify()
        return moved

    def messages(self) -> list[wire.Message]:
        return wire.Decoder().feed(self.got)


def page_file(path: Path) -> mmap.mmap:
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 4096)

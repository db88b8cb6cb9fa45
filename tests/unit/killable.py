"""A daemon's ring and journal that kill it at chosen steps, by an exception.

What survives a kill is the page and the journal's files: everything else is thrown away.
"""

import os
from typing import Any

from noxs.journal import Journal
from noxs.ring import Ring


class Killed(BaseException):
    """Not an Exception: nothing may catch it on the way."""


class Steps:
    """Counts the steps, and kills at some of them."""

    def __init__(self, kills: Any = ()) -> None:
        self.kills = set(kills)
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        if self.count in self.kills:
            raise Killed


class KillableRing(Ring):
    __slots__ = ("steps",)

    def __init__(self, page: Any, steps: Any) -> None:
        self.steps = steps
        super().__init__(page)

    def received(self) -> bytes:
        self.steps()
        return super().received()

    def consume(self, count: int) -> None:
        self.steps()
        super().consume(count)
        self.steps()

    def send(self, data: bytes | bytearray) -> int:
        self.steps()
        prod = self._index[3]
        count = super().send(data)
        try:
            self.steps()
        except Killed:
            # Killed with the data copied and the index not yet stored.
            self._index[3] = prod
            raise
        self.steps()
        return count


class KillableJournal(Journal):
    def __init__(self, directory: Any, steps: Any, **more: Any) -> None:
        self.steps = steps
        super().__init__(directory, **more)

    def __del__(self) -> None:
        self.close()  # as the kernel does for whoever was killed

    def append(self, record: bytes) -> None:
        self.steps()
        before = self.length
        super().append(record)
        try:
            self.steps()
        except Killed:
            os.ftruncate(self._fd, before + (self.length - before) // 2)
            raise
        self.steps()

"""An attachment to a guest's console: one reader of its output, with a backlog that is bounded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Self

BACKLOG_MAX = 256 * 1024  # bytes; half for the oldest, half for the newest


class Attachment:
    """What a guest says from the moment of attaching on, for one reader.

    ``history`` is what it said before. ``ending`` is "" while attached, then "dead" (the domain
    died), "closed" (the daemon ends) or "left". A reader that falls behind by more than
    BACKLOG_MAX bytes loses the middle: a mark says how much.
    """

    __slots__ = ("_detach", "_head", "_lost", "_offer", "_send", "_tail", "_waiter", "ending",
                 "history")  # fmt: skip

    def __init__(
        self,
        history: bytes,
        offer: Callable[[bytes], int],
        send: Callable[[bytes], Awaitable[None]],
        detach: Callable[[Attachment], None],
    ) -> None:
        self.history = history
        self.ending = ""
        self._offer = offer
        self._send = send
        self._detach = detach
        self._head = bytearray()
        self._tail = bytearray()
        self._lost = 0
        self._waiter: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """What has come, all of it; waits for some. b"" once it has ended and all was read."""
        while not self._head and not self._tail and not self.ending:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        mark = f"\r\n[{self._lost} bytes lost]\r\n".encode() if self._lost else b""
        data = b"".join((self._head, mark, self._tail))
        self._head, self._tail, self._lost = bytearray(), bytearray(), 0
        return data

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        data = await self.read()
        if not data:
            raise StopAsyncIteration
        return data

    async def send(self, data: bytes) -> None:
        """Give the guest input; waits while it does not read. Returns when all is on its way.

        Also returns when the attachment has ended, the input then being lost.
        """
        if not self.ending:
            await self._send(data)

    def offer(self, data: bytes) -> int:
        """Give the guest what input there is room for, at once; returns how many bytes."""
        return 0 if self.ending else self._offer(data)

    def close(self) -> None:
        """Detach. What has come can still be read. Idempotent."""
        if not self.ending:
            self._detach(self)
            self.end("left")

    def feed(self, data: bytes) -> None:
        """For the hub: the guest said ``data``."""
        half = BACKLOG_MAX // 2
        if not self._tail and len(self._head) + len(data) <= half:
            self._head += data
        else:
            self._tail += data
            over = len(self._tail) - half
            if over > 0:
                del self._tail[:over]
                self._lost += over
        self._wake()

    def end(self, ending: str) -> None:
        """For the hub: no more comes."""
        self.ending = self.ending or ending
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

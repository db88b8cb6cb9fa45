"""What happened, for whoever wants to hear: a bounded history, and a token to go on from.

A token is "EPOCH-NUMBER": the epoch is this daemon's, so that a client learns when it has missed a
restart. Whoever asks for what is no longer kept gets a ``gap`` first.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

KEPT = 4096
BACKLOG = 1024
"""Events that may wait for one subscriber; one that is slower hears of a gap."""


class Events:
    """The events of one daemon."""

    def __init__(self) -> None:
        self.epoch = f"{time.time_ns() // 1000000:x}"
        self.count = 0
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._queues: set[asyncio.Queue[dict[str, Any] | None]] = set()

    def emit(self, kind: str, **data: Any) -> None:
        """Tell of an event; ``data`` is plain."""
        self.count += 1
        event = {"token": f"{self.epoch}-{self.count}", "time": time.time(), "event": kind, **data}
        self._kept.append(event)
        for queue in self._queues:
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                with contextlib.suppress(asyncio.QueueEmpty):
                    while True:
                        queue.get_nowait()
                queue.put_nowait(self._gap())

    def since(self, token: str) -> list[dict[str, Any]]:
        """The events after a token, a gap in front if not all are there. "" is: from the first."""
        epoch, _, number = token.partition("-")
        first = int(number) + 1 if number.isdigit() and len(number) < 16 else 1
        if token and epoch != self.epoch:
            return [self._gap(), *self._kept]
        oldest = self.count - len(self._kept) + 1
        kept = list(self._kept)[max(0, first - oldest) :]
        return [self._gap(), *kept] if first < oldest else kept

    async def subscribe(self, token: str | None) -> AsyncGenerator[dict[str, Any], None]:
        """Events as they come; with a token first those since then."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(BACKLOG)
        self._queues.add(queue)
        try:
            for event in [] if token is None else self.since(token):
                yield event
            while (event_ := await queue.get()) is not None:
                yield event_
        finally:
            self._queues.discard(queue)

    def close(self) -> None:
        """End every subscription."""
        for queue in self._queues:
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(None)

    def _gap(self) -> dict[str, Any]:
        token = f"{self.epoch}-{self.count}"
        return {"token": token, "time": time.time(), "event": "gap"}

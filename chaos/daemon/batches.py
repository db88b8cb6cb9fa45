"""Work that can wait a moment, done for many at once."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

T = TypeVar("T")

DELAY = 0.1
LATEST = 0.5
MOST = 64


class Batches(Generic[T]):
    """Items are gathered until none has come for DELAY seconds, then worked on together.

    ``work`` is awaited for at most MOST of them at a time, LATEST seconds after the first at the
    latest. Of a burst of creates each would otherwise cost a thread its start and a server its
    answer, while the next one waits. ``spawn`` runs a coroutine that ends with the daemon.
    """

    def __init__(
        self,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        work: Callable[[list[T]], Awaitable[None]],
    ) -> None:
        self._spawn = spawn
        self._work = work
        self._waiting: list[T] = []
        self._busy = False
        self._working = asyncio.Lock()
        self._added = 0.0

    def add(self, item: T) -> None:
        """Have an item worked on soon."""
        self._waiting.append(item)
        self._added = time.monotonic()
        self._begin()

    def _begin(self) -> None:
        if self._waiting and not self._busy:
            self._busy = True
            self._spawn(self._run())

    async def finish(self) -> None:
        """Work on all that waits now, and see what is being worked on done."""
        await self._work_on_some()
        while self._waiting:
            await self._work_on_some()

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._gather()
                await self._work_on_some()
        except Exception:
            self._busy = False
            self._begin()  # a failure is that of one batch
            raise
        self._busy = False

    async def _work_on_some(self) -> None:
        async with self._working:
            batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
            if batch:
                await self._work(batch)

    async def _gather(self) -> None:
        deadline = time.monotonic() + LATEST
        while len(self._waiting) < MOST:
            now = time.monotonic()
            pause = min(self._added + DELAY, deadline) - now
            if pause <= 0:
                break
            await asyncio.sleep(pause)

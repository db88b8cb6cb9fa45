"""A client's descriptors, used by the event loop: terminals, pipes, files, whatever they are.

They are shared with the client's shell, so O_NONBLOCK is never set on them, and reading one that
poll(2) calls readable may still block, when another process reads first. So each direction has a
thread of its own while it is in use: what blocks there, a stopped terminal for one, holds up
nobody else. A thread that is stuck in a write ends when the terminal goes on or is hung up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import termios
import threading
import tty
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self


class _Stream:
    """One direction of a descriptor, in a thread that does one thing at a time. Close it."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = os.dup(fd)
        self._loop = asyncio.get_running_loop()
        self._wanted: SimpleQueue[tuple[Callable[[], bytes], asyncio.Future[bytes]] | None]
        self._wanted = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the thread end once it can; it closes the descriptor. Call it once."""
        self._wanted.put(None)

    async def _do(self, work: Callable[[], bytes]) -> bytes:
        done: asyncio.Future[bytes] = self._loop.create_future()
        self._wanted.put((work, done))
        return await done

    def _run(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            work, done = wanted
            try:
                result: bytes | OSError = work()
            except OSError as error:
                result = error
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(_settle, done, result)
        self._release()

    def _release(self) -> None:
        os.close(self._fd)


class Outlet(_Stream):
    """Writes to a client's descriptor."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "outlet")

    async def write(self, data: bytes) -> None:
        """Write all of ``data``; raises OSError (BrokenPipeError above all) if that fails."""
        if data:
            await self._do(lambda: self._write(data))

    def _write(self, data: bytes) -> bytes:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        return b""


class Inlet(_Stream):
    """Reads from a client's descriptor."""

    def __init__(self, fd: int) -> None:
        self._closing = os.eventfd(0)
        super().__init__(fd, "inlet")

    async def read(self, size: int) -> bytes:
        """What can be read, at most ``size`` bytes; b"" at the end, or at a hangup."""
        return await self._do(lambda: self._read(size))

    def close(self) -> None:
        """End a read that waits, without taking input away from whoever reads next."""
        os.eventfd_write(self._closing, 1)
        super().close()

    def _read(self, size: int) -> bytes:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._closing, select.POLLIN)
        ready = [fd for fd, _ in poll.poll()]
        if self._closing in ready:
            return b""
        try:
            return os.read(self._fd, size)
        except OSError:  # EIO: the terminal was hung up
            return b""

    def _release(self) -> None:
        super()._release()
        os.close(self._closing)


def _settle(done: asyncio.Future[bytes], result: bytes | OSError) -> None:
    if done.done():
        return  # cancelled
    if isinstance(result, OSError):
        done.set_exception(result)
    else:
        done.set_result(result)


@contextlib.contextmanager
def raw(fd: int) -> Iterator[bool]:
    """Make a terminal raw for a while, if ``fd`` is one: yields whether it is.

    The changes do not wait for output to drain, as a stopped terminal would have them.
    """
    try:
        before = termios.tcgetattr(fd)
    except termios.error:
        yield False
        return
    tty.setraw(fd, termios.TCSANOW)
    try:
        yield True
    finally:
        with contextlib.suppress(termios.error):  # hung up
            termios.tcsetattr(fd, termios.TCSANOW, before)

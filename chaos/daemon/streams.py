"""A client's descriptors, used by the event loop: terminals, pipes, files, whatever they are.

They are shared with the client's shell, so O_NONBLOCK is never set on them, and reading one that
poll(2) calls readable may still block, when another process reads first. So each direction has a
thread of its own while it is in use: what blocks there, a stopped terminal for one, holds up
nobody else. It waits in poll(2) and writes no more than there is room for, so that it ends when
it is told to, though nobody ever reads; a file on a file system that does not answer it outlasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import io
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


PIECE = 4096
"""Bytes that a pipe which polls writable takes without blocking: PIPE_BUF of linux/limits.h."""
PIECE_TERMINAL = 128
"""The same of a terminal: it has room in pieces of 256 (drivers/tty/tty_buffer.c), and a newline
takes two bytes."""
OUTPUT_MAX = 4 << 20
"""Bytes of a command's output that may wait for whoever reads it when more comes."""
OUTPUTS_MAX = 256 << 20
"""The same for all commands together."""
OUTPUT_FREE = 1 << 16
"""Bytes that may wait whatever others have waiting."""


class _Stream:
    """One direction of a descriptor, in a thread that does one thing at a time. Close it."""

    def __init__(self, fd: int, name: str, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._fd = os.dup(fd)
        self._closing = os.eventfd(0)
        self._loop = loop or asyncio.get_running_loop()
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
        """Let the thread end once it can; it closes the descriptor. Call it once.

        A read that waits takes no input away from whoever reads next; what waits to be written is
        dropped.
        """
        os.eventfd_write(self._closing, 1)
        self._wanted.put(None)

    def join(self) -> None:
        """Wait for the thread's end, in another thread."""
        self._thread.join()

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
        os.close(self._fd)
        os.close(self._closing)

    def _await(self, event: int) -> bool:
        """For the thread: wait until the descriptor is ready; False when it is to end."""
        poll = select.poll()
        poll.register(self._fd, event)
        poll.register(self._closing, select.POLLIN)
        return all(fd != self._closing for fd, _ in poll.poll())


class Outlet(_Stream):
    """Writes to a client's descriptor. ``loop`` is the event loop, for another thread."""

    def __init__(self, fd: int, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._piece = 0
        super().__init__(fd, "outlet", loop)

    async def write(self, data: bytes) -> None:
        """Write all of ``data``; raises OSError (BrokenPipeError above all) if that fails."""
        if data:
            await self._do(lambda: self.put(data))

    def begin(self, work: Callable[[], bytes]) -> None:
        """Have something done in the thread, from any other; it raises nothing."""
        self._wanted.put((work, self._loop.create_future()))

    async def done(self) -> None:
        """Wait until all that was begun is done."""
        await self._do(lambda: b"")

    def put(self, data: bytes) -> bytes:
        """For the thread: write all of ``data``, or up to ``close``. OSError."""
        if not self._piece:
            if fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # it never polls writable
            self._piece = PIECE_TERMINAL if os.isatty(self._fd) else PIECE
        view = memoryview(data)
        while view and self._await(select.POLLOUT):
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(self._fd, view[: self._piece]) :]
        return b""


class Output(io.TextIOBase):
    """A verb's standard output or error, for any thread: writing to it never waits.

    What is written goes to the descriptor in a thread that begins with it; ``drain`` waits for
    that. Raises the OSError that writing met, and ENOBUFS where too much waits to be read.
    """

    _lock = threading.RLock()  # the collector may close what was forgotten
    _all = 0

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._outlet: Outlet | None = None
        self._pieces: list[bytes] = []
        self._waiting = 0
        self._pushing = False
        self._error: OSError | None = None

    def fileno(self) -> int:
        """The client's descriptor."""
        return self._fd

    def isatty(self) -> bool:
        """Whether that is a terminal; not for the event loop."""
        return os.isatty(self._fd)

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Have a text written."""
        data = text.encode("utf-8", "backslashreplace")
        with self._lock:
            if self.closed:
                raise ValueError("the output is closed")
            if self._error is not None:
                raise self._error
            if self._waiting > OUTPUT_MAX or (
                self._waiting > OUTPUT_FREE and Output._all > OUTPUTS_MAX
            ):
                raise OSError(errno.ENOBUFS, "the output is not read, and more would come")
            self._pieces.append(data)
            self._count(len(data))
            if self._outlet is None:
                self._outlet = Outlet(self._fd, self._loop)
            if not self._pushing:
                self._pushing = True
                self._outlet.begin(self._push)
        return len(text)

    async def drain(self) -> None:
        """Wait until what was written is out. OSError."""
        if self._outlet is not None:
            await self._outlet.done()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Drop what still waits. Idempotent."""
        if self.closed:
            return
        with self._lock:
            super().close()
            self._drop()
            if self._outlet is not None:
                self._outlet.close()

    def join(self) -> None:
        """Wait until the descriptor is used no more, in another thread."""
        if self._outlet is not None:
            self._outlet.join()

    def _count(self, change: int) -> None:
        self._waiting += change
        Output._all += change

    def _drop(self) -> None:
        self._count(-sum(map(len, self._pieces)))
        self._pieces.clear()

    def _push(self) -> bytes:
        assert self._outlet is not None
        while True:
            with self._lock:
                if not self._pieces:
                    self._pushing = False
                    return b""
                data = b"".join(self._pieces)
                self._pieces.clear()
            failure = None
            try:
                self._outlet.put(data)
            except OSError as error:
                failure = error
            with self._lock:
                self._count(-len(data))
                if failure is not None:
                    self._error = failure
                    self._drop()


class Input(io.TextIOBase):
    """A verb's standard input, which is but a descriptor here."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The client's descriptor."""
        return self._fd


class Inlet(_Stream):
    """Reads from a client's descriptor."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "inlet")

    async def read(self, size: int) -> bytes:
        """What can be read, at most ``size`` bytes; b"" at the end, or at a hangup."""
        return await self._do(lambda: self._read(size))

    def _read(self, size: int) -> bytes:
        if not self._await(select.POLLIN):
            return b""
        try:
            return os.read(self._fd, size)
        except OSError:  # EIO: the terminal was hung up
            return b""


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

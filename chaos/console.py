"""A guest's console: Dom0's end of the ring, who may consume it, and attaching to it.

The ring is the guest's memory (public/io/console.h): its indexes are copied once
and bounded before a byte is read. One process at a time consumes it: chaosd, or
a command where no chaosd has it. What it takes goes to the console log beside
the domain's record, so that whoever attaches next sees what the guest wrote before.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
from struct import Struct
from typing import TYPE_CHECKING

from chaos.consolelog import ConsoleLog
from chaos.death import DeathWatch
from xenctypes.errors import CallFailed, StateError
from xenctypes.evtchn import Evtchn
from xenctypes.public import EVTCHNSTAT_interdomain
from xenctypes.shared import store_u32

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from chaos.host import Host
    from chaos.registry import Record, Registry

IN_SIZE = 1024
OUT_SIZE = 2048
IN_AT, OUT_AT, INDEXES_AT = 0, IN_SIZE, IN_SIZE + OUT_SIZE
INDEXES = Struct("@4I")  # in_cons, in_prod, out_cons, out_prod
WORD_MASK = 0xFFFFFFFF
ESCAPE = b"\x1d"  # Ctrl-]


class ConsoleRing:
    """The ring's page as a memoryview, from Dom0's side."""

    def __init__(self, page: memoryview) -> None:
        self._page = page

    def pending(self) -> bool:
        """Whether the guest has written something that was not read."""
        _, _, cons, prod = INDEXES.unpack_from(self._page, INDEXES_AT)
        return bool(cons != prod)

    def read(self) -> bytes:
        """Take what the guest wrote, at most one ring full; b"" when there is nothing."""
        _, _, cons, prod = INDEXES.unpack_from(self._page, INDEXES_AT)
        size = min((prod - cons) & WORD_MASK, OUT_SIZE)
        start = cons % OUT_SIZE
        first = bytes(self._page[OUT_AT + start : OUT_AT + min(start + size, OUT_SIZE)])
        data = first + bytes(self._page[OUT_AT : OUT_AT + size - len(first)])
        store_u32(self._page, INDEXES_AT + 8, prod)
        return data

    def write(self, data: bytes) -> int:
        """Give the guest input; returns how many bytes the ring had room for."""
        cons, prod, *_ = INDEXES.unpack_from(self._page, INDEXES_AT)
        used = (prod - cons) & WORD_MASK
        count: int = min(len(data), max(0, IN_SIZE - used))
        for index in range(count):
            self._page[IN_AT + (prod + index) % IN_SIZE] = data[index]
        store_u32(self._page, INDEXES_AT + 4, (prod + count) & WORD_MASK)
        return count


class ConsoleLock:
    """Makes the consumer of a console one, among the processes that hold it so. Close it."""

    def __init__(self, directory: str, name: str) -> None:
        self._fd = os.open(
            f"{directory}/console.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise attached_elsewhere(name) from None

    def close(self) -> None:
        """Let the next one attach."""
        os.close(self._fd)


def attached_elsewhere(name: str) -> StateError:
    """The error of whoever comes second."""
    return StateError(
        f'the console of "{name}" is attached elsewhere', hint="leave it there with Ctrl-]"
    )


def bind_console(host: Host, bind: Callable[[int, int], int], domid: int, port: int) -> int | None:
    """Bind a guest's console channel with ``bind``: Dom0's port, 0 if the guest is past using it.

    None if another process has it bound, for Xen lets only one. Raises CallFailed.
    """
    try:
        return bind(domid, port)
    except CallFailed as error:
        if error.errno not in {errno.EINVAL, errno.ESRCH}:
            raise
    try:
        status = host.ctrl.evtchn_status(domid, port).status
    except CallFailed:
        return 0  # the domain is gone, or as good as that
    # Closed by the guest otherwise, or dying: what it wrote is still in the ring.
    return None if status == EVTCHNSTAT_interdomain else 0


class Console:
    """One domain's console, held by this process until ``close``."""

    def __init__(self, host: Host, names: Registry, record: Record) -> None:
        self._host = host
        self._stack = contextlib.ExitStack()
        try:
            directory = f"{names.path}/domains/{record.uuid}"
            self._stack.callback(ConsoleLock(directory, record.name).close)
            self.log = ConsoleLog(directory)
            frames = [record.console_frame]
            mapping = self._stack.enter_context(host.memory.map(record.domid, frames))
            self._ring = ConsoleRing(mapping.view)
            self._evtchn = self._stack.enter_context(Evtchn())
            self._port = self._bind(record)
            uuid = bytes.fromhex(record.uuid.replace("-", ""))
            self._death = self._stack.enter_context(DeathWatch(host, record.domid, uuid))
        except FileNotFoundError:
            self._stack.close()
            raise StateError(f'domain "{record.name}" is gone') from None
        except BaseException:
            self._stack.close()
            raise

    def _bind(self, record: Record) -> int:
        bind = self._evtchn.bind_interdomain
        port = bind_console(self._host, bind, record.domid, record.console_port)
        if port is None:
            raise attached_elsewhere(record.name)
        return port

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
        """Let go of the ring and its channel. Idempotent."""
        self._stack.close()

    def take(self) -> bytes:
        """What the guest has written, all that is there now; kept in the log too."""
        data = self._ring.read()
        if data:
            with contextlib.suppress(FileNotFoundError):  # destroyed under us
                self.log.append(data)
            self._notify()
        return data

    def _notify(self) -> None:
        if self._port:
            self._evtchn.notify(self._port)

    def attach(self, stdin: int, show: Callable[[bytes], None]) -> str:
        """Copy between the terminal and the guest until one of them ends it.

        ``stdin`` is a descriptor to read (-1: none). Returns "detached" after Ctrl-],
        "eof" when input ended, "dead" when the domain died, its last words shown.
        """
        poll = select.poll()
        for fd in (self._evtchn.fd if self._port else -1, self._death.fd):
            if fd >= 0:
                poll.register(fd, select.POLLIN)
        unsent = b""
        ending = ""
        listening = False
        while not ending:
            data = self.take()
            show(data)
            unsent = self._send(unsent)
            if self._death.check() is not None:
                ending = "dead"
                break
            if stdin >= 0 and listening != (len(unsent) < IN_SIZE):
                listening = not listening
                if listening:
                    poll.register(stdin, select.POLLIN)
                else:  # the guest does not read: let the terminal wait
                    poll.unregister(stdin)
            for fd in self._ready(poll, wait=not data):  # a guest that floods must not deafen us
                if fd == stdin:
                    typed, ending = _read_terminal(stdin, IN_SIZE - len(unsent))
                    unsent = self._send(unsent + typed)
        for _ in range(2):  # the ring may wrap
            show(self.take())
        return ending

    def _ready(self, poll: select.poll, *, wait: bool) -> list[int]:
        """Wait; take the events that came, and return the descriptors that have them."""
        timeout = self._death.timeout if wait else 0
        ready = [fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000)]
        if self._death.fd in ready:
            self._death.drain()
        if self._evtchn.fd in ready:
            self._evtchn.unmask(self._evtchn.pending())
        return ready

    def _send(self, data: bytes) -> bytes:
        """Put ``data`` into the ring; returns what did not fit."""
        count = self._ring.write(data)
        if count:
            self._notify()
        return data[count:]


def _read_terminal(stdin: int, size: int) -> tuple[bytes, str]:
    """What was typed, and how that ends the attachment: "detached", "eof" or ""."""
    data = os.read(stdin, size)
    before, left, _ = data.partition(ESCAPE)
    return before, "detached" if left else "" if data else "eof"

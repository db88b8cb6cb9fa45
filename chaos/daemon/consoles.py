"""The console hub: every guest's console drained into its log, at a bounded cost.

::

             event                  budget left
    guest ---------> queue of the ---------------> visit: ring -> log, attachments; input -> ring
      ^      port    waiting    |                           |
      |      masked             | budget spent              |
      |                         +----> asleep for a while --+ then unmask, and tell the guest
      +---------------------------------------------------------------------+

A port stays masked from its event until its visit, so that a guest can make the hub do no more
than its budget pays for: a token bucket, charged for each byte and each visit. Its ring stays
full meanwhile, and it waits or loses output as it likes. Visits are made in turns; after each
turn the hub rests in proportion to the CPU time that it took, so that however many guests
flood, all together get SHARE of a processor.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

from chaos.console import IN_SIZE, ConsoleRing, attached_elsewhere, bind_console
from chaos.consolelog import HISTORY_MAX, LOG_MAX, ConsoleLog
from chaos.daemon.attachment import Attachment
from xenctypes.errors import CallFailed, StateError
from xenctypes.evtchn import Evtchn

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos.host import Host
    from xenctypes.handle import Mapping

RATE = 256 * 1024  # tokens per second and guest; a byte costs one
BURST = 256 * 1024
VISIT_COST = 1024  # so that events without output are paid for too
TURN_VISITS = 16
SHARE = 0.25  # of a processor, for all consoles together
REST_MAX = 0.05  # seconds
EVENTS_MAX = 64  # taken at once
LOGS_TOTAL = 64 << 20  # bytes for the logs of all guests that go on writing, at most
LOGS_SHARE = 8  # and no more than this part of their file system, which records need too
LOG_MIN = 4096  # of each of a log's two files, however many guests there are
RETRY_SECONDS = 1.0  # until a console that another process holds is asked for again


class Channels(Protocol):
    """What the hub needs of xenctypes.evtchn.Evtchn."""

    @property
    def fd(self) -> int: ...  # noqa: D102 - as Evtchn's, and those below
    def bind_interdomain(self, domid: int, remote_port: int) -> int: ...  # noqa: D102
    def unbind(self, port: int) -> None: ...  # noqa: D102
    def notify(self, port: int) -> None: ...  # noqa: D102
    def take(self, limit: int) -> list[int]: ...  # noqa: D102
    def unmask(self, port: int) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class _Guest:
    """One guest's console. ``ring`` is None once removed; ``port`` 0 where no channel is left."""

    __slots__ = ("attachments", "channel", "deaf", "domid", "held", "inbox", "log", "mapping",
                 "name", "port", "queued", "refilled", "ring", "senders", "tokens",
                 "uuid")  # fmt: skip

    def __init__(
        self, uuid: str, name: str, domid: int, channel: int, mapping: Mapping, log: ConsoleLog
    ) -> None:
        self.uuid = uuid
        self.name = name
        self.domid = domid
        self.channel = channel  # the guest's end
        self.port = 0
        self.held = False  # by another process
        self.mapping = mapping
        self.ring: ConsoleRing | None = ConsoleRing(mapping.view)
        self.log = log
        self.deaf = False  # the log could not be written, and that was said
        self.tokens: float = BURST
        self.refilled = 0.0
        self.queued = False
        self.attachments: tuple[Attachment, ...] = ()
        self.inbox = b""  # input that the ring has no room for
        self.senders: tuple[asyncio.Future[None], ...] = ()  # waiting for the inbox to empty


class ConsoleHub:
    """The consoles of all guests, for a running event loop. Close it.

    ``path`` is where the guests' directories are. ``spent`` is the CPU time, in seconds, that they
    have taken so far.
    """

    def __init__(
        self,
        host: Host,
        *,
        evtchn: Channels | None = None,
        report: Callable[[str], None] | None = None,
        path: str = "",
    ) -> None:
        self._host = host
        self._logs_total = min(LOGS_TOTAL, _share_of(path)) if path else LOGS_TOTAL
        self._evtchn: Channels = Evtchn() if evtchn is None else evtchn
        self._report = _complain if report is None else report
        self._loop = asyncio.get_running_loop()
        self._guests: dict[str, _Guest] = {}
        self._by_port: dict[int, _Guest] = {}
        self._queue: deque[_Guest] = deque()
        self._turn_timer: asyncio.TimerHandle | None = None
        self._rest_until = 0.0
        self.spent = 0.0
        self._spent = 0.0  # CPU time for events since the last turn
        self._held: set[_Guest] = set()  # and some that were removed since
        self._held_timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._loop.add_reader(self._evtchn.fd, self._on_events)

    def __contains__(self, uuid: object) -> bool:
        return uuid in self._guests

    def add(self, uuid: str, name: str, domid: int, frame: int, port: int, directory: str) -> None:
        """Drain a guest's console from now on, into the log in ``directory``.

        ``frame`` is the machine frame of the ring, ``port`` the guest's end of its channel. Raises
        CallFailed if the frame cannot be mapped, StateError if the UUID is there already. Where
        another process has the console, the hub takes over once that lets go.
        """
        if uuid in self._guests:
            raise StateError(f'the console of "{name}" is drained already')
        mapping = self._host.memory.map(domid, [frame])
        guest = _Guest(uuid, name, domid, port, mapping, ConsoleLog(directory))
        guest.refilled = self._loop.time()
        try:
            self._bind(guest)
        except BaseException:
            mapping.close()
            raise
        self._guests[uuid] = guest

    def remove(self, uuid: str, ending: str = "dead") -> None:
        """Keep the guest's last words, end its attachments, let go of its memory. Idempotent.

        To be called when the domain is dead, before it is waited for to go: it cannot while we
        map its ring.
        """
        guest = self._guests.pop(uuid, None)
        if guest is None:
            return
        if not guest.held:
            for _ in range(2):  # the ring may wrap
                self._drain(guest)
        guest.ring = None
        for attachment in guest.attachments:
            attachment.end(ending)
        guest.attachments = ()
        guest.inbox = b""
        _wake(guest)
        try:
            if guest.port:
                self._by_port.pop(guest.port, None)
                self._evtchn.unbind(guest.port)
        except CallFailed as error:
            self._report(f"console of {guest.name}: {error}")
        finally:
            guest.port = 0
            try:
                guest.mapping.close()
            except CallFailed as error:
                self._report(f"console of {guest.name}: {error}")

    def rename(self, uuid: str, name: str) -> None:
        """The domain has another name now. One that is not here is none of our business."""
        if uuid in self._guests:
            self._guests[uuid].name = name

    def rekey(self, old: str, uuid: str, name: str, directory: str) -> None:
        """The domain has another UUID, name and directory now (finish_rekey, move_shell)."""
        guest = self._guests.pop(old, None)
        if guest is not None:
            guest.uuid, guest.name, guest.log = uuid, name, ConsoleLog(directory)
            self._guests[uuid] = guest

    def attach(self, uuid: str, history: int = HISTORY_MAX) -> Attachment:
        """Attach a reader, with at most ``history`` bytes of what was said before.

        Raises StateError if the hub does not have that console.
        """
        guest = self._guests.get(uuid)
        if guest is None:
            raise StateError(f"domain {uuid} has no console", hint="chaos logs shows what it said")
        if guest.held:
            raise attached_elsewhere(guest.name)
        self._refill(guest)
        if guest.tokens >= 0:  # what it has just said belongs to the history
            guest.tokens -= self._drain(guest)
        try:
            said = guest.log.read(history)
        except OSError as error:
            said = b""
            self._report(f"console of {guest.name}: its log: {error.strerror}")
        attachment = Attachment(
            said,
            lambda data: self._offer(guest, data),
            lambda data: self._send(guest, data),
            lambda attachment: _detach(guest, attachment),
        )
        guest.attachments = (*guest.attachments, attachment)
        return attachment

    def close(self) -> None:
        """Let go of every console; the guests go on. Idempotent."""
        for timer in (self._turn_timer, self._held_timer):
            if timer is not None:
                timer.cancel()
        self._turn_timer = self._held_timer = None
        for uuid in list(self._guests):
            self.remove(uuid, "closed")
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._evtchn.fd)
            self._evtchn.close()

    def _bind(self, guest: _Guest) -> None:
        port = bind_console(self._host, self._evtchn.bind_interdomain, guest.domid, guest.channel)
        guest.held = port is None
        if guest.held:
            self._held.add(guest)
            if self._held_timer is None:
                self._held_timer = self._loop.call_later(RETRY_SECONDS, self._retry)
            return
        guest.port = port or 0
        if guest.port:
            self._by_port[guest.port] = guest
        self._enqueue(guest)

    def _retry(self) -> None:
        self._held_timer = None
        held, self._held = self._held, set()
        for guest in held:
            if guest.ring is not None:
                try:
                    self._bind(guest)
                except CallFailed as error:
                    guest.held = False
                    self._report(f"console of {guest.name}: {error}")

    def _on_events(self) -> None:
        started = time.thread_time()
        for port in self._evtchn.take(EVENTS_MAX):
            guest = self._by_port.get(port)
            if guest is not None:  # else of one that was removed
                self._enqueue(guest)
        self._spent += time.thread_time() - started

    def _enqueue(self, guest: _Guest) -> None:
        if guest.ring is not None and not guest.queued:
            guest.queued = True
            self._queue.append(guest)
            self._plan_turn()

    def _plan_turn(self) -> None:
        if self._turn_timer is None:
            self._turn_timer = self._loop.call_at(self._rest_until, self._turn)

    def _turn(self) -> None:
        """Visit those who wait, a few of them; then rest, and let others have the loop."""
        self._turn_timer = None
        started = time.thread_time()
        for _ in range(min(TURN_VISITS, len(self._queue))):
            guest = self._queue.popleft()
            if guest.ring is not None:
                self._visit(guest)
        spent = self._spent + time.thread_time() - started
        self.spent += spent
        self._spent = 0.0
        self._rest_until = self._loop.time() + min(REST_MAX, spent * (1 / SHARE - 1))
        if self._queue:
            self._plan_turn()

    def _visit(self, guest: _Guest) -> None:
        self._refill(guest)
        if guest.tokens < 0:  # it stays queued, and masked
            self._loop.call_later(-guest.tokens / RATE, self._resume, guest)
            return
        guest.queued = False
        guest.tokens -= VISIT_COST + self._drain(guest)
        self._push(guest)
        if guest.port:
            try:
                self._evtchn.unmask(guest.port)
            except CallFailed as error:
                self._report(f"console of {guest.name}: {error}")

    def _resume(self, guest: _Guest) -> None:
        guest.queued = False
        self._enqueue(guest)

    def _refill(self, guest: _Guest) -> None:
        now = self._loop.time()
        guest.tokens = min(BURST, guest.tokens + (now - guest.refilled) * RATE)
        guest.refilled = now

    def _drain(self, guest: _Guest) -> int:
        """Take what the guest has written, at most a ring full; how many bytes that was."""
        assert guest.ring is not None
        data = guest.ring.read()
        if not data:
            return 0
        self._notify(guest)  # it has room
        try:
            guest.log.append(data, self._log_max())
            guest.deaf = False
        except FileNotFoundError:
            pass  # its record is gone: somebody destroyed it, and will tell us
        except OSError as error:
            if not guest.deaf:
                self._report(f"console of {guest.name}: not logged: {error.strerror}")
            guest.deaf = True
        for attachment in guest.attachments:
            attachment.feed(data)
        return len(data)

    def _log_max(self) -> int:
        """What each of a log's two files may have: less where many share the memory of /run."""
        share = self._logs_total // (2 * max(1, len(self._guests)))
        return max(LOG_MIN, min(LOG_MAX, share))

    def _notify(self, guest: _Guest) -> None:
        if guest.port:
            try:
                self._evtchn.notify(guest.port)
            except CallFailed as error:
                self._report(f"console of {guest.name}: {error}")

    def _offer(self, guest: _Guest, data: bytes) -> int:
        if guest.ring is None:
            return 0
        self._push(guest)
        taken = data[: IN_SIZE - len(guest.inbox)]
        guest.inbox += taken
        self._push(guest)
        return len(taken)

    async def _send(self, guest: _Guest, data: bytes) -> None:
        while data and guest.ring is not None:
            count = self._offer(guest, data)
            data = data[count:]
            if not count:  # the inbox is full: its next move into the ring wakes us
                waiter = self._loop.create_future()
                guest.senders = (*guest.senders, waiter)
                await waiter

    def _push(self, guest: _Guest) -> None:
        """Move input into the ring, as much as it has room for."""
        if guest.inbox and guest.ring is not None:
            count = guest.ring.write(guest.inbox)
            if count:
                guest.inbox = guest.inbox[count:]
                self._notify(guest)
                _wake(guest)


def _share_of(path: str) -> int:
    """How many bytes of a file system may be logs; OSError."""
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize // LOGS_SHARE or LOGS_TOTAL  # 0 blocks: no bound


def _wake(guest: _Guest) -> None:
    """Let those who wait for room in the inbox try again."""
    senders, guest.senders = guest.senders, ()
    for waiter in senders:
        if not waiter.done():
            waiter.set_result(None)


def _detach(guest: _Guest, attachment: Attachment) -> None:
    guest.attachments = tuple(other for other in guest.attachments if other is not attachment)


def _complain(line: str) -> None:
    sys.stderr.write(f"chaosd: {line}\n")

"""The loop that serves all stock guests' rings, each its share.

A guest's turn is what its ring holds. Guests that have something to do are served one turn each,
one after the other; who has used up its share of the processor, or sends too many requests, waits,
its event channel masked, until it has earned the next turn. Control clients (stores.py) are served
between the turns.
"""

from __future__ import annotations

import heapq
import os
from math import inf
from select import EPOLLIN
from time import monotonic

from noxs import snapshot
from noxs.guestring import GuestConnection, GuestRing
from noxs.guestview import Eye, Guest
from noxs.journal import Journal
from noxs.ring import ERROR_COMM, Ring
from noxs.service import Service
from xenctypes.errors import ChaosError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable
    from typing import Any, Protocol

    from noxs.bridge import Bridge
    from noxs.store import Connection
    from noxs.xenbus import Channel

    class Page(Protocol):
        """A guest's ring page, mapped."""

        @property
        def view(self) -> memoryview:
            """Its bytes."""

        def close(self) -> None:
            """Unmap it. Idempotent."""

    class Hardware(Protocol):
        """Ring pages and event channels; all methods raise ChaosError."""

        def fileno(self) -> int:
            """Readable while an event waits."""

        def map(self, domid: int) -> Page:
            """A guest's ring page."""

        def bind(self, domid: int, remote_port: int) -> int:
            """A new port, bound to the guest's."""

        def unbind(self, port: int) -> None:
            """Close a port."""

        def notify(self, port: int) -> None:
            """Send an event."""

        def take(self, limit: int) -> list[int]:
            """Ports that had an event, which stay masked until ``unmask``."""

        def unmask(self, port: int) -> None:
            """Let the next event of a port through."""


GUARD, GUARD_MAX = 0.02, 1.0
"""Seconds after which an idle ring is looked at once more: Linux decides without a barrier, after
its store, whether an event is needed (xb_write() in xenbus_comms.c). Twice as long each time."""
VISIT = 1e-4
"""Seconds of work that a visit counts as, besides what it takes: events cost, too."""
RETRY = 1.0
PORTS = 256
JOURNALS_SHARE = 8
"""All journals may take an eighth of their file system; above that a guest has its share of it."""
ROOMY = 0.75
"""Of what all journals may take: below that guests have no shares any more."""
SHARE_MIN = 1 << 16
"""Bytes that a guest may have kept however many guests there are."""
HINT = "destroy the guest and create it again"
"""What to do about a guest's journal."""


class GuestChannel:
    """A guest's event channel, as its ring wants it."""

    def __init__(self, hardware: Hardware, port: int) -> None:
        self._hardware = hardware
        self.port = port

    def fileno(self) -> int:
        """All guests' channels share one descriptor."""
        return self._hardware.fileno()

    def take(self) -> None:
        """The loop takes events."""

    def notify(self) -> None:
        """Wake the guest."""
        self._hardware.notify(self.port)


class GuestLoop(Service):
    """Serves guests until ``stop``.

    ``state`` is the directory of the guests' journals, "" for none; ``boot`` identifies the boot
    that they belong to.
    """

    def __init__(
        self,
        listener: socket,
        hardware: Hardware,
        bridge: Bridge,
        *,
        state: str = "",
        boot: str = "",
        admit: Callable[[socket, int, int], bool] = lambda _sock, uid, _gid: uid == 0,
        log: Callable[[str], None] = lambda _message: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        super().__init__(listener, admit=admit, log=log)
        self.hardware = hardware
        self.bridge = bridge
        self.state = state
        self.boot = boot
        self.clock = clock
        self.guests: dict[int, Guest] = {}
        self.by_port: dict[int, Guest] = {}
        self.by_serial: dict[int, Guest] = {}
        self.pages: dict[int, Page] = {}
        self.touched: set[Connection] = set()
        self.ready: dict[Guest, None] = {}
        self.timers: list[tuple[float, int]] = []
        self.masked: set[Guest] = set()
        self.serial = 0
        self.budget = _budget(state) if state else inf
        self.kept = 0
        self.crowded = False

    def adopt(self, guest: Guest) -> None:
        """Make an opened or restored guest known."""
        self.guests[guest.domid] = self.by_serial[guest.serial] = guest
        self._count(guest)
        for token, device in guest.devices.items():  # of a restored one
            there = device.restored(guest.store.tree)
            self.bridge.attach((guest.serial, token), device.front, device.back, there)

    def forget(self, guest: Guest) -> None:
        """Stop serving a guest, and remove its journal."""
        for token in guest.devices:
            self.bridge.detach((guest.serial, token))
        self.unmap(guest)
        self.ready.pop(guest, None)
        self.masked.discard(guest)
        guest.forget()
        del self.guests[guest.domid], self.by_serial[guest.serial]
        self.kept -= guest.kept
        self.remove_journal(guest)

    def flush_client(self, conn: Connection) -> None:
        """Send what a view has for a control client."""
        raise NotImplementedError

    # The loop

    def run(self) -> None:
        """Serve until ``stop``."""
        self.listen()
        self.poll.register(self.hardware.fileno(), EPOLLIN)
        self.poll.register(self.bridge.fileno(), EPOLLIN)
        while not self.stopping:
            self.turn(self._timeout())
        self.close()

    def turn(self, timeout: float) -> None:
        """Wait for events, for ``timeout`` seconds (< 0: for ever), and serve everybody once."""
        for fd, event in self.poll.poll(timeout):
            if self.serve_socket(fd, event):
                continue
            if fd == self.hardware.fileno():
                self._take_events()
            elif fd == self.bridge.fileno():
                self._hear_bridge()
        now = self.clock()
        while self.timers and self.timers[0][0] <= now:
            when, serial = heapq.heappop(self.timers)
            due = self.by_serial.get(serial)
            if due is not None and due.due == when:
                due.due = inf
                self.ready[due] = None
        for guest in list(self.ready):
            del self.ready[guest]
            self._serve_guest(guest)
        self._flush()

    def _timeout(self) -> float:
        if self.ready:
            return 0.0
        return max(0.0, self.timers[0][0] - self.clock()) if self.timers else -1.0

    def _take_events(self) -> None:
        for port in self.hardware.take(PORTS):
            guest = self.by_port.get(port)
            if guest is None:
                self.hardware.unmask(port)
                continue
            guest.guard = 0.0
            self.masked.add(guest)
            self.ready[guest] = None

    def _later(self, guest: Guest, when: float) -> None:
        if when < guest.due:
            guest.due = when
            heapq.heappush(self.timers, (when, guest.serial))

    def _serve_guest(self, guest: Guest) -> None:
        """One turn of a guest that had an event or whose time has come."""
        now = self.clock()
        guest.tick(now)
        self._forward(guest, now)
        if guest.unheard:
            self._show(guest)
        ring = guest.ring
        if ring is None:
            return
        wait = max(guest.work.wait(now), guest.requests.wait(now))
        if wait:
            self._later(guest, now + wait)
            return
        handled = ring.handled
        try:
            more = ring.turn(guest.journal)
        except OSError as error:
            self.complain_of(error)
            self._later(guest, now + RETRY)
            return
        except Exception as error:  # noqa: BLE001 - a bug that one guest meets is its own
            ring.cut_off(f"a bug: {error!r}")
            more = False
        self.compact(guest)
        end = self.clock()
        guest.work.take(end - now + VISIT, end)
        guest.requests.take(ring.handled - handled, end)
        if more:
            guest.guard = GUARD
            self.ready[guest] = None
            return
        if guest in self.masked:
            self.masked.discard(guest)
            self.hardware.unmask(guest.local_port)
        if guest.guard or ring.unsettled:
            guest.guard = guest.guard or GUARD
            self._later(guest, end + guest.guard)
            guest.guard = min(2 * guest.guard, GUARD_MAX) if ring.unsettled else 0.0

    def compact(self, guest: Guest) -> None:
        """Shorten a guest's journal, if it has grown long and can be."""
        self._count(guest)
        # Not from one look to the next: each change costs some guests a snapshot.
        self.crowded = self.kept > self.budget * (ROOMY if self.crowded else 1)
        guest.share = max(SHARE_MIN, self.budget // len(self.guests)) if self.crowded else inf
        try:
            guest.compact()
        except OSError as error:
            self.complain_of(error)
        self._count(guest)

    def _count(self, guest: Guest) -> None:
        size = guest.journal.base + guest.journal.length if guest.journal else 0
        self.kept += size - guest.kept
        guest.kept = size

    def complain_of(self, error: OSError) -> None:
        """Log that a journal cannot be written."""
        self.complain(f"a journal cannot be written: changes are refused, guests wait: {error}")

    def _flush(self) -> None:
        """Send what the views have for the sockets; have guests served that were sent something."""
        touched = self.touched
        while touched:
            conn = touched.pop()
            if isinstance(conn, (GuestConnection, Eye)):
                guest = self.guests.get(conn.domid)
                if guest is not None and (conn.out or isinstance(conn, Eye)):
                    self.ready[guest] = None
            else:
                self.flush_client(conn)

    # Devices

    def _forward(self, guest: Guest, now: float) -> None:
        """Pass on what the guest's front ends say, as often as it may; the rest stays dirty."""
        dirty = guest.eye.dirty
        while dirty:
            wait = guest.forwards.wait(now)
            if wait:
                self._later(guest, now + wait)
                return
            guest.forwards.take(1, now)
            token = next(iter(dirty))
            del dirty[token]
            device = guest.devices[token]
            refused = device.refused.copy()
            changes = device.changes(guest.store.tree)
            if changes:
                self.bridge.tell((guest.serial, token), changes)
            if device.refused - refused:
                names = b", ".join(sorted(device.refused)[:3]).decode("ascii", "replace")
                guest.store.log(f"{device.front.decode()}: not passed on: {names}")

    def _hear_bridge(self) -> None:
        """Show guests what their back ends say."""
        for (serial, token), found in self.bridge.found().items():
            guest = self.by_serial.get(serial)
            if guest is not None:
                guest.unheard[token] = found
                self._show(guest)

    def _show(self, guest: Guest) -> None:
        try:
            guest.show()
        except OSError as error:
            self.complain_of(error)
            self._later(guest, self.clock() + RETRY)
        self.compact(guest)

    # Guests' lives

    def make_guest(self, domid: int, uuid: str) -> Guest:
        """A guest that is not yet known, with an empty journal. OSError."""
        self.serial += 1
        journal = None
        if self.state:
            directory = f"{self.state}/{domid}.{uuid}"
            os.makedirs(directory, mode=0o700, exist_ok=True)
            journal = Journal(directory, hint=HINT)
        guest = Guest(
            domid,
            uuid,
            serial=self.serial,
            boot=self.boot,
            journal=journal,
            log=self.log,
            now=self.clock(),
        )
        guest.store.touched = self.touched
        return guest

    def make_ring(self, guest: Guest, port: int) -> GuestRing:
        """The guest's ring, mapped, with its channel bound. ChaosError."""
        domid = guest.domid
        self.pages[domid] = self.hardware.map(domid)
        guest.local_port = self.hardware.bind(domid, port)
        self.by_port[guest.local_port] = guest
        channel: Channel = GuestChannel(self.hardware, guest.local_port)
        return GuestRing(Ring(self.pages[domid].view), channel, guest.store, guest.conn)

    def unmap(self, guest: Guest) -> None:
        """Let go of a guest's page and channel."""
        guest.ring = None  # it looks into the page
        try:
            if self.by_port.pop(guest.local_port, None) is not None:
                self.hardware.unbind(guest.local_port)
        except ChaosError as error:
            self.log(str(error))
        guest.local_port = 0
        page = self.pages.pop(guest.domid, None)
        try:
            if page is not None:
                page.close()
        except ChaosError as error:
            self.log(str(error))

    def remove_journal(self, guest: Guest) -> None:
        """Close and remove a guest's journal."""
        if guest.journal is not None:
            guest.journal.close()
            remove_directory(guest.journal.directory)

    # Restart

    def restore(self, alive: Callable[[int], str | None]) -> None:
        """Bring back the guests that the journals tell of.

        ``alive`` gives the UUID of the domain with a number, None if there is none: a journal of
        a domain that is gone, or of an earlier boot, is removed.
        """
        for name in sorted(os.listdir(self.state)) if self.state else ():
            directory = f"{self.state}/{name}"
            domid, _, uuid = name.partition(".")
            if not domid.isdigit() or alive(int(domid)) != uuid:
                remove_directory(directory)
                continue
            try:
                self._restore(int(domid), uuid)
            except Exception as error:  # noqa: BLE001 - the others shall have theirs
                cause = str(error) if isinstance(error, ChaosError) else repr(error)
                self.log(f"domain {domid} has lost its store: {cause}")
                remove_directory(directory)

    def _restore(self, domid: int, uuid: str) -> None:
        guest = self.make_guest(domid, uuid)
        try:
            data, records = self._recover(guest)
            guest.restore(data, records, lambda guest: self.make_ring(guest, guest.port))
        except Exception:
            if guest.ring is not None:
                guest.ring.ring.fail(ERROR_COMM)
            self.unmap(guest)
            guest.forget()
            if guest.journal is not None:
                guest.journal.close()
            raise
        self.adopt(guest)
        self.ready[guest] = None

    def _recover(self, guest: Guest) -> tuple[dict[str, Any], list[bytes]]:
        assert guest.journal is not None
        state, records = guest.journal.recover()
        data = snapshot.load(state) if state else None
        if data is None or data["extra"]["boot"] != self.boot:
            raise StateError("its journal is of an earlier boot, or was never written", hint=HINT)
        return data, records

    def close(self) -> None:
        """Close everything; the journals stay, for the next start."""
        self.close_clients()
        self.bridge.stop()
        for guest in list(self.guests.values()):
            self.unmap(guest)
            if guest.journal is not None:
                guest.journal.close()
        self.poll.close()
        os.close(self.wake_fd)


def _budget(path: str) -> float:
    """How many bytes of a file system all journals may take. OSError."""
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize // JOURNALS_SHARE or inf  # 0 blocks: no bound


def remove_directory(path: str) -> None:
    """Remove a journal's directory."""
    for name in os.listdir(path):
        os.unlink(f"{path}/{name}")
    os.rmdir(path)

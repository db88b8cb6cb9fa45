"""The private stores of all stock guests, served from one loop, and their control socket.

A guest's turn is what its ring holds. Guests that have something to do are served one turn each,
one after the other; who has used up its share of the processor, or sends too many requests, waits,
its event channel masked, until it has earned the next turn. The control socket speaks the store
protocol over the views of all guests (docs/storesd.md), and is served between the turns.
"""

from __future__ import annotations

import heapq
import os
import re
from math import inf
from time import monotonic

from noxs import snapshot, wire
from noxs.guestring import GuestConnection, GuestRing
from noxs.guestview import Eye, Guest
from noxs.journal import Journal
from noxs.requests import INTRODUCED, OK, RELEASED, handle
from noxs.ring import Ring
from noxs.service import Client, Service
from noxs.store import Connection, Store
from noxs.wire import StoreError, canonical, one_string, parse_domid, strings
from xenctypes.errors import ChaosError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable
    from typing import Protocol

    from noxs.bridge import Bridge
    from noxs.store import Watch
    from noxs.wire import Message
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
RETRY = 1.0
PORTS = 256
GUESTS_MAX = 32752
"""DOMID_FIRST_RESERVED (xen.h): there are no more domids."""

_PATH = re.compile(rb"/local/domain/(?:0/backend/(?:vif|vbd)/)?([0-9]{1,5})(?:/|\Z)")
_UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_LOOKS = frozenset({wire.READ, wire.DIRECTORY, wire.DIRECTORY_PART, wire.GET_PERMS})
_WATCHES = frozenset({wire.WATCH, wire.UNWATCH})
_CHANGES = frozenset({wire.WRITE, wire.MKDIR, wire.RM, wire.SET_PERMS})


class Leg(Connection):
    """A control client's part in one store: what it is told goes to the client's socket."""

    __slots__ = ("client",)

    def __init__(self, ident: int, client: Client) -> None:
        super().__init__(ident)
        self.client = client
        self.out = client.out


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


class Stores(Service):
    """Serves guests and the control socket until ``stop``.

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
        self.hall = Store(log)
        self.keeper = Connection(0)
        self.hall.connect(self.keeper)
        self.guests: dict[int, Guest] = {}
        self.by_uuid: dict[bytes, Guest] = {}
        self.by_port: dict[int, Guest] = {}
        self.by_serial: dict[int, Guest] = {}
        self.pages: dict[int, Page] = {}
        self.legs: dict[Client, dict[Store, Leg]] = {}
        self.touched = self.hall.touched
        self.ready: dict[Guest, None] = {}
        self.timers: list[tuple[float, int]] = []
        self.masked: set[Guest] = set()
        self.serial = 0
        for directory in (b"/local/domain", b"/local/domain/0", b"/vm"):
            self.hall.tree.mkdir(self.keeper, None, directory)

    # The loop

    def run(self) -> None:
        """Serve until ``stop``."""
        self.listen()
        self.poll.register(self.hardware.fileno(), 1)
        self.poll.register(self.bridge.fileno(), 1)
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
            guest.compact()
        except OSError as error:
            self._complain(error)
            self._later(guest, now + RETRY)
            return
        end = self.clock()
        guest.work.take(end - now, end)
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

    def _complain(self, error: OSError) -> None:
        self.complain(f"a journal cannot be written: changes are refused, guests wait: {error}")

    def _flush(self) -> None:
        """Send what the views have for the sockets; have guests served that were sent something."""
        touched = self.touched
        while touched:
            conn = touched.pop()
            if isinstance(conn, Leg):
                self._send_out(conn.client)
            elif isinstance(conn, (GuestConnection, Eye)):
                guest = self.guests.get(conn.domid)
                if guest is not None and (conn.out or isinstance(conn, Eye)):
                    self.ready[guest] = None

    def _send_out(self, client: Client) -> None:
        if client.out:
            data = b"".join(client.out)
            client.out.clear()
            self.send(client, data)

    # Devices

    def _forward(self, guest: Guest, now: float) -> None:
        """Pass on what the guest's front ends say, as often as it may."""
        dirty = guest.eye.dirty
        if not dirty:
            return
        wait = guest.forwards.wait(now)
        if wait:
            self._later(guest, now + wait)
            return
        guest.forwards.take(1, now)
        for token in dirty:
            device = guest.devices[token]
            refused = device.refused.copy()
            changes = device.changes(guest.store.tree)
            if changes:
                self.bridge.tell((guest.serial, token), changes)
            if device.refused - refused:
                names = b", ".join(sorted(device.refused)[:3]).decode("ascii", "replace")
                guest.store.log(f"{device.front.decode()}: not passed on: {names}")
        dirty.clear()

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
            self._complain(error)
            self._later(guest, self.clock() + RETRY)

    # The control socket

    def connected(self, client: Client) -> None:
        """See Service."""
        self.legs[client] = {}

    def disconnected(self, client: Client) -> None:
        """See Service."""
        for store, leg in self.legs.pop(client).items():
            store.disconnect(leg)

    def answer(self, client: Client, messages: list[Message]) -> None:
        """See Service."""
        for message in messages:
            op, req_id, tx_id, _ = message
            try:
                reply = self._answer(client, message)
            except StoreError as error:
                op, reply = wire.ERROR, error.name + b"\0"
            except ChaosError as error:
                self.log(str(error))
                op, reply = wire.ERROR, b"EIO\0"
            except OSError as error:
                self._complain(error)
                op, reply = wire.ERROR, b"ENOSPC\0"
            if reply is not None:
                client.out.append(wire.pack(op, req_id, tx_id, reply))
        if client.fd in self.clients:
            self._send_out(client)

    def _answer(self, client: Client, message: Message) -> bytes | None:
        """The reply's payload; None if the view has answered."""
        op, _, tx_id, payload = message
        if tx_id:
            raise StoreError(b"ENOENT")  # there are no transactions here
        if op in _LOOKS or op in _WATCHES or op in _CHANGES:
            path = canonical(payload.partition(b"\0")[0], b"/local/domain/0", special=True)
            guest = self._guest_of(path)
            if guest is not None:
                guest.tick(self.clock())
                guest.handle(self._leg(client, guest.store, guest), message)
            elif op in _CHANGES:
                raise StoreError(b"EACCES")
            else:
                handle(self.hall, self._leg(client, self.hall, None), message)
            return None
        if op == wire.RESET_WATCHES:
            for store, leg in self.legs[client].items():
                store.reset(leg)
            return OK
        if op == wire.GET_DOMAIN_PATH:
            return b"/local/domain/%d\0" % parse_domid(one_string(payload))
        if op == wire.IS_DOMAIN_INTRODUCED:
            served = self.guests.get(parse_domid(one_string(payload)))
            return b"T\0" if served is not None and served.ring is not None else b"F\0"
        arguments = strings(payload)
        name = arguments.pop(0) if op == wire.CONTROL and arguments else b""
        command = _COMMANDS.get((op, name))
        if command is None:
            raise StoreError(b"EINVAL" if op == wire.CONTROL else b"ENOSYS")
        command(self, arguments)
        return OK

    def _guest_of(self, path: bytes) -> Guest | None:
        found = _PATH.match(path)
        if found is not None:
            return self.guests.get(int(found[1]))
        if path.startswith(b"/vm/"):
            return self.by_uuid.get(path.split(b"/", 3)[2])
        return None

    def _leg(self, client: Client, store: Store, guest: Guest | None) -> Leg:
        leg = self.legs[client].get(store)
        if leg is None:
            ident = client.ident
            if guest is not None:
                ident, guest.next_leg = guest.next_leg, guest.next_leg + 1
            leg = self.legs[client][store] = Leg(ident, client)
            store.connect(leg)
        return leg

    def _known(self, domid: bytes) -> Guest:
        guest = self.guests.get(parse_domid(domid))
        if guest is None:
            raise StoreError(b"ENOENT")
        return guest

    def _open(self, arguments: list[bytes]) -> None:
        """CONTROL open: a new guest, in the place of one that is not introduced."""
        if len(arguments) != 3 or not _UUID.match(arguments[1]):
            raise StoreError(b"EINVAL")
        domid, uuid = parse_domid(arguments[0]), arguments[1]
        if not 0 < domid < GUESTS_MAX:
            raise StoreError(b"EINVAL")
        former = self.guests.get(domid)
        if former is not None and former.ring is not None:
            raise StoreError(b"EEXIST")
        for guest in {former, self.by_uuid.get(uuid)} - {None}:
            assert guest is not None
            if guest.ring is not None:
                raise StoreError(b"EEXIST")
            self._forget(guest)
        guest = self._make_guest(domid, uuid.decode())
        try:
            guest.open(arguments[2].decode("utf-8", "replace"))
        except OSError:
            self._remove_journal(guest)
            raise
        self._adopt(guest)

    def _introduce(self, arguments: list[bytes]) -> None:
        """INTRODUCE: serve an opened guest's ring. The frame is not needed: it is grant 1."""
        if len(arguments) < 3:
            raise StoreError(b"EINVAL")
        guest = self._known(arguments[0])
        if not arguments[2].isdigit() or not 0 < int(arguments[2][:10]) < 1 << 32:
            raise StoreError(b"EINVAL")
        port = int(arguments[2])
        if guest.ring is not None:
            if guest.port == port:
                return
            raise StoreError(b"EEXIST")
        try:
            ring = self._make_ring(guest, port)
            if not ring.ring.pristine:
                raise StateError(f"domain {guest.domid}'s store ring has been used")
            guest.introduce(ring, port)
        except (ChaosError, OSError):
            self._unmap(guest)
            raise
        self.hall.fire(INTRODUCED)
        self.ready[guest] = None

    def _release(self, arguments: list[bytes]) -> None:
        """RELEASE: forget a guest."""
        if len(arguments) != 1:
            raise StoreError(b"EINVAL")
        self._forget(self._known(arguments[0]))
        self.hall.fire(RELEASED)

    def _attach(self, arguments: list[bytes]) -> None:
        """CONTROL attach: a device for a guest, with nodes for its front end's directory."""
        if len(arguments) < 3 or not len(arguments) % 2 or not arguments[2].isdigit():
            raise StoreError(b"EINVAL")
        guest = self._known(arguments[0])
        pairs = dict(zip(arguments[3::2], arguments[4::2], strict=True))
        device = guest.attach(arguments[1], int(arguments[2][:10]), pairs)
        self.bridge.attach((guest.serial, device.token), device.front, device.back)

    def _detach(self, arguments: list[bytes]) -> None:
        """CONTROL detach: take a device away."""
        if len(arguments) != 3 or not arguments[2].isdigit():
            raise StoreError(b"EINVAL")
        guest = self._known(arguments[0])
        device = guest.detach(arguments[1], int(arguments[2][:10]))
        self.bridge.detach((guest.serial, device.token))

    # Guests' lives

    def _make_guest(self, domid: int, uuid: str) -> Guest:
        self.serial += 1
        journal = None
        if self.state:
            directory = f"{self.state}/{domid}.{uuid}"
            os.makedirs(directory, mode=0o700, exist_ok=True)
            journal = Journal(directory)
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

    def _make_ring(self, guest: Guest, port: int) -> GuestRing:
        """The guest's ring, mapped, with its channel bound. ChaosError."""
        domid = guest.domid
        self.pages[domid] = self.hardware.map(domid)
        guest.local_port = self.hardware.bind(domid, port)
        self.by_port[guest.local_port] = guest
        channel: Channel = GuestChannel(self.hardware, guest.local_port)
        return GuestRing(Ring(self.pages[domid].view), channel, guest.store, guest.conn)

    def _unmap(self, guest: Guest) -> None:
        guest.ring = None  # it looks into the page
        if self.by_port.pop(guest.local_port, None) is not None:
            self.hardware.unbind(guest.local_port)
        guest.local_port = 0
        page = self.pages.pop(guest.domid, None)
        if page is not None:
            page.close()

    def _adopt(self, guest: Guest) -> None:
        """Make an opened or restored guest known."""
        self.guests[guest.domid] = self.by_serial[guest.serial] = guest
        self.by_uuid[guest.uuid.encode()] = guest
        self._announce(guest, self.hall.tree.mkdir)
        for client, legs in self.legs.items():
            leg = legs.get(self.hall)
            for watch in list(leg.watches.values()) if leg else ():
                if guest.owns(watch.path):
                    target = self._leg(client, guest.store, guest)
                    _move_watch(watch, self.hall, target, guest.store)
        for device in guest.devices.values():
            self.bridge.attach((guest.serial, device.token), device.front, device.back)

    def _forget(self, guest: Guest) -> None:
        """Stop serving a guest; those who watched its nodes are told."""
        for token in guest.devices:
            self.bridge.detach((guest.serial, token))
        self._unmap(guest)
        self.ready.pop(guest, None)
        self.masked.discard(guest)
        del self.guests[guest.domid], self.by_serial[guest.serial]
        del self.by_uuid[guest.uuid.encode()]
        self._announce(guest, self.hall.tree.remove)
        for client, legs in self.legs.items():
            leg = legs.pop(guest.store, None)
            for watch in list(leg.watches.values()) if leg else ():
                target = self._leg(client, self.hall, None)
                _move_watch(watch, guest.store, target, self.hall)
        self.touched.discard(guest.conn)
        self.touched.discard(guest.eye)
        self._remove_journal(guest)

    def _announce(self, guest: Guest, change: Callable[..., object]) -> None:
        for top in (b"/local/domain/%d" % guest.domid, b"/vm/" + guest.uuid.encode()):
            change(self.keeper, None, top)
            self.hall.fire(top)

    def _remove_journal(self, guest: Guest) -> None:
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
            except ChaosError as error:
                self.log(f"domain {domid} has lost its store: {error}")
                remove_directory(directory)

    def _restore(self, domid: int, uuid: str) -> None:
        guest = self._make_guest(domid, uuid)
        assert guest.journal is not None
        try:
            state, records = guest.journal.recover()
            data = snapshot.load(state) if state else None
            if data is None or data["extra"]["boot"] != self.boot:
                raise StateError("it is of an earlier boot, or was never written")
            guest.restore(data, records, lambda guest: self._make_ring(guest, guest.port))
        except ChaosError:
            self._unmap(guest)
            guest.journal.close()
            raise
        self._adopt(guest)
        self.ready[guest] = None

    def close(self) -> None:
        """Close everything; the journals stay, for the next start."""
        self.close_clients()
        self.bridge.stop()
        for guest in list(self.guests.values()):
            self._unmap(guest)
            if guest.journal is not None:
                guest.journal.close()
        self.poll.close()
        os.close(self.wake_fd)


def _move_watch(watch: Watch, source: Store, leg: Leg, target: Store) -> None:
    """Have a control client's watch go on in another store; it fires."""
    source.drop_watch(watch)
    del watch.conn.watches[watch.path, watch.token]
    target.emit(target.add_watch(leg, watch.path[watch.skip :], watch.token), watch.path)


def remove_directory(path: str) -> None:
    """Remove a journal's directory."""
    for name in os.listdir(path):
        os.unlink(f"{path}/{name}")
    os.rmdir(path)


_COMMANDS: dict[tuple[int, bytes], Callable[[Stores, list[bytes]], None]] = {
    (wire.INTRODUCE, b""): Stores._introduce,  # noqa: SLF001 - of this module
    (wire.RELEASE, b""): Stores._release,  # noqa: SLF001 - as above
    (wire.CONTROL, b"open"): Stores._open,  # noqa: SLF001 - as above
    (wire.CONTROL, b"attach"): Stores._attach,  # noqa: SLF001 - as above
    (wire.CONTROL, b"detach"): Stores._detach,  # noqa: SLF001 - as above
}

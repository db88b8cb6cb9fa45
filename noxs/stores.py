"""The control socket of guests' private stores: the store protocol over all their views.

docs/storesd.md has the protocol. Paths are routed: a guest's own to its view, the others to the
hall, a store that says which guests there are. A client's watches below a guest's directories wait
in the hall while there is no such guest.
"""

from __future__ import annotations

import re

from noxs import wire
from noxs.guestloop import GuestLoop
from noxs.requests import INTRODUCED, OK, RELEASED, handle
from noxs.store import Connection, Store
from noxs.wire import StoreError, canonical, one_string, parse_domid, strings
from xenctypes.errors import ChaosError, StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from noxs.guestview import Guest
    from noxs.service import Client
    from noxs.store import Watch
    from noxs.wire import Message

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


class Stores(GuestLoop):
    """Serves guests and control clients until ``stop``. See GuestLoop."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.hall = Store(self.log)
        self.hall.touched = self.touched
        self.keeper = Connection(0)
        self.hall.connect(self.keeper)
        self.by_uuid: dict[bytes, Guest] = {}
        self.legs: dict[Client, dict[Store, Leg]] = {}
        for directory in (b"/local/domain", b"/local/domain/0", b"/vm"):
            self.hall.tree.mkdir(self.keeper, None, directory)

    def described(self) -> str:
        """What is served, for the log."""
        return f"{len(self.guests)} guests"

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
                self.complain_of(error)
                op, reply = wire.ERROR, b"ENOSPC\0"
            except Exception as error:  # noqa: BLE001 - guests must not pay for it
                self.log(f"control request {op}, a bug: {error!r}")
                op, reply = wire.ERROR, b"EIO\0"
            if reply is not None:
                client.out.append(wire.pack(op, req_id, tx_id, reply))
        if client.fd in self.clients:
            self._send_out(client)

    def flush_client(self, conn: Connection) -> None:
        """See GuestLoop."""
        if isinstance(conn, Leg):
            self._send_out(conn.client)

    def _send_out(self, client: Client) -> None:
        if client.out:
            data = b"".join(client.out)
            client.out.clear()
            self.send(client, data)

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
                self.compact(guest)
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
            self.forget(guest)
        guest = self.make_guest(domid, uuid.decode())
        try:
            guest.open(arguments[2].decode("utf-8", "replace"))
        except OSError:
            self.remove_journal(guest)
            guest.forget()
            raise
        self.adopt(guest)

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
            ring = self.make_ring(guest, port)
            if not ring.ring.pristine:
                raise StateError(f"domain {guest.domid}'s store ring has been used")
            guest.introduce(ring, port)
        except (ChaosError, OSError):
            self.unmap(guest)
            raise
        self.hall.fire(INTRODUCED)
        self.ready[guest] = None

    def _release(self, arguments: list[bytes]) -> None:
        """RELEASE: forget a guest."""
        if len(arguments) != 1:
            raise StoreError(b"EINVAL")
        self.forget(self._known(arguments[0]))
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

    def adopt(self, guest: Guest) -> None:
        """See GuestLoop."""
        super().adopt(guest)
        self.by_uuid[guest.uuid.encode()] = guest
        self._announce(guest, self.hall.tree.mkdir)
        for client, legs in self.legs.items():
            leg = legs.get(self.hall)
            for watch in list(leg.watches.values()) if leg else ():
                if guest.owns(watch.path):
                    target = self._leg(client, guest.store, guest)
                    _move_watch(watch, self.hall, target, guest.store)

    def forget(self, guest: Guest) -> None:
        """See GuestLoop; those who watched its nodes are told."""
        super().forget(guest)
        del self.by_uuid[guest.uuid.encode()]
        self._announce(guest, self.hall.tree.remove)
        for client, legs in self.legs.items():
            leg = legs.pop(guest.store, None)
            for watch in list(leg.watches.values()) if leg else ():
                target = self._leg(client, self.hall, None)
                _move_watch(watch, guest.store, target, self.hall)

    def _announce(self, guest: Guest, change: Callable[..., object]) -> None:
        for top in (b"/local/domain/%d" % guest.domid, b"/vm/" + guest.uuid.encode()):
            change(self.keeper, None, top)
            self.hall.fire(top)


def _move_watch(watch: Watch, source: Store, leg: Leg, target: Store) -> None:
    """Have a control client's watch go on in another store; it fires."""
    source.drop_watch(watch)
    del watch.conn.watches[watch.path, watch.token]
    target.emit(target.add_watch(leg, watch.path[watch.skip :], watch.token), watch.path)


_COMMANDS: dict[tuple[int, bytes], Callable[[Stores, list[bytes]], None]] = {
    (wire.INTRODUCE, b""): Stores._introduce,  # noqa: SLF001 - of this module
    (wire.RELEASE, b""): Stores._release,  # noqa: SLF001 - as above
    (wire.CONTROL, b"open"): Stores._open,  # noqa: SLF001 - as above
    (wire.CONTROL, b"attach"): Stores._attach,  # noqa: SLF001 - as above
    (wire.CONTROL, b"detach"): Stores._detach,  # noqa: SLF001 - as above
}

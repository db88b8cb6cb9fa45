"""storesd without Xen: pages in files, event channels over a socket pair, guests played by Peer."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any

from xenbus_peer import Peer, page_file

from noxs import wire
from noxs.stores import Stores
from xenctypes.errors import CallFailed

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from pathlib import Path

UUID = "00000000-0000-4000-8000-%012d"


class View:
    """A mapped page."""

    def __init__(self, page: mmap.mmap) -> None:
        self.view = memoryview(page)
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Hardware:
    """See stores.Hardware. A port is the guest's number plus 1000; both ends may be processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ours.setblocking(False)
        self.pages: dict[int, mmap.mmap] = {}
        self.views: dict[int, View] = {}
        self.bound: dict[int, int] = {}
        self.pending: set[int] = set()
        self.masked: set[int] = set()
        self.notified = 0

    def page(self, domid: int) -> mmap.mmap:
        if domid not in self.pages:
            self.pages[domid] = page_file(self.directory / f"page.{domid}")
        return self.pages[domid]

    def event(self, domid: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self.theirs.send(b"%d" % (domid + 1000), socket.MSG_DONTWAIT)

    def fileno(self) -> int:
        return self.ours.fileno()

    def map(self, domid: int) -> View:
        if domid not in self.pages:
            raise CallFailed("map", 22, f"domain {domid}")
        self.views[domid] = View(self.pages[domid])
        return self.views[domid]

    def bind(self, domid: int, remote_port: int) -> int:
        if remote_port == 666:
            raise CallFailed("bind", 22)
        self.bound[domid + 1000] = remote_port
        self.event(domid)  # as Xen does
        return domid + 1000

    def unbind(self, port: int) -> None:
        del self.bound[port]
        self.masked.discard(port)

    def notify(self, port: int) -> None:
        assert port in self.bound
        self.notified += 1

    def take(self, limit: int) -> list[int]:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.pending.add(int(self.ours.recv(16)))
        ports = sorted(self.pending - self.masked)[:limit]
        self.pending -= set(ports)
        self.masked |= set(ports)
        return ports

    def unmask(self, port: int) -> None:
        self.masked.discard(port)
        if port in self.pending:
            self.theirs.send(b"%d" % port)


class NoBridge:
    """A bridge to nowhere that remembers what it was given."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0)
        self.links: dict[Any, Any] = {}
        self.told: list[Any] = []
        self.news: dict[Any, dict[bytes, bytes]] = {}

    def fileno(self) -> int:
        return self.fd

    def start(self) -> None:
        pass

    def stop(self) -> None:
        os.close(self.fd)

    def attach(self, key: Any, front: bytes, back: bytes, _there: Any = None) -> None:
        self.links[key] = (front, back)

    def detach(self, key: Any) -> None:
        del self.links[key]

    def tell(self, key: Any, changes: Any) -> None:
        self.told.append((key, changes))

    def say(self, key: Any, values: dict[bytes, bytes]) -> None:
        self.news[key] = values
        os.eventfd_write(self.fd, 1)

    def found(self) -> dict[Any, dict[bytes, bytes]]:
        os.eventfd_read(self.fd)
        found, self.news = self.news, {}
        return found


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Guest:
    """A guest with a ring, as its kernel plays it."""

    def __init__(self, host: Host, domid: int) -> None:
        self.host = host
        self.domid = domid
        self.uuid = UUID % domid
        self.page = host.hardware.page(domid)
        self.peer = Peer(self.page, lambda: host.hardware.event(domid))
        self.decoder = wire.Decoder()
        self.seen = 0
        self.ident = 0

    def send(self, op: int, payload: bytes = b"", tx: int = 0) -> int:
        self.ident += 1
        self.peer.to_send += wire.pack(op, self.ident, tx, payload)
        return self.ident

    def receive(self) -> list[wire.Message]:
        """What has come since."""
        self.peer.step()
        new = self.peer.got[self.seen :]
        self.seen = len(self.peer.got)
        return self.decoder.feed(new)

    def ask(self, op: int, payload: bytes = b"", tx: int = 0) -> list[Any]:
        """The reply's payload, after the events before it as (path, token)."""
        ident = self.send(op, payload, tx)
        got: list[Any] = []
        replied = False
        for _ in range(10000):
            self.peer.step()
            self.host.turn()
            for kind, number, _, body in self.receive():
                if kind == wire.WATCH_EVENT:
                    got.append(tuple(wire.strings(body)))
                else:
                    assert number == ident, (number, ident)
                    got.append(body)
                    replied = True
            if replied and not self.peer.to_send:
                break
        assert replied, got
        return got

    def write(self, path: bytes, value: bytes = b"", tx: int = 0) -> list[Any]:
        return self.ask(wire.WRITE, path + b"\0" + value, tx)

    def read(self, path: bytes, tx: int = 0) -> Any:
        return self.ask(wire.READ, path + b"\0", tx)[-1]

    def watch(self, path: bytes, token: bytes = b"t") -> list[Any]:
        return self.ask(wire.WATCH, path + b"\0" + token + b"\0")

    def events(self, turns: int = 20) -> list[Any]:
        got = []
        for _ in range(turns):
            self.host.turn()
            got += [tuple(wire.strings(m[3])) for m in self.receive() if m[0] == wire.WATCH_EVENT]
        return got


class Control:
    """A client of the control socket, for tests that turn the loop themselves."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(host.directory / "control"))
        self.sock.setblocking(False)
        self.decoder = wire.Decoder()
        self.ident = 0
        self.events: list[Any] = []

    def ask(self, op: int, *arguments: object, value: bytes = b"") -> bytes:
        """The reply's payload."""
        self.ident += 1
        parts = [a if isinstance(a, bytes) else str(a).encode() for a in arguments]
        payload = b"".join(part + b"\0" for part in parts) + value
        self.sock.sendall(wire.pack(op, self.ident, 0, payload))
        for _ in range(1000):
            self.host.turn()
            for kind, number, _, body in self.receive():
                if kind == wire.WATCH_EVENT:
                    self.events.append(tuple(wire.strings(body)))
                elif number == self.ident:
                    return body
        raise AssertionError("no reply")

    def receive(self) -> list[wire.Message]:
        try:
            return self.decoder.feed(self.sock.recv(1 << 16))
        except BlockingIOError:
            return []

    def poll(self) -> list[Any]:
        """The events that came."""
        self.host.turn()
        for kind, _, _, body in self.receive():
            assert kind == wire.WATCH_EVENT
            self.events.append(tuple(wire.strings(body)))
        events, self.events = self.events, []
        return events


def listener(path: Path) -> socket.socket:
    """A new listening socket in the place of what was there."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


class Host:
    """A Stores, its hardware, and the clock."""

    def __init__(
        self, directory: Path, *, make_bridge: Callable[[], Any] = NoBridge, journal: bool = True
    ) -> None:
        self.directory = directory
        self.hardware = Hardware(directory)
        self.clock = Clock()
        self.state = str(directory / "state") if journal else ""
        if journal:
            os.makedirs(self.state, exist_ok=True)
        self.said: list[str] = []
        self.alive: dict[int, str] = {}
        self.make_bridge = make_bridge
        self.stores: Stores
        self.start()

    def start(self) -> None:
        self.bridge = self.make_bridge()
        self.stores = Stores(
            listener(self.directory / "control"),
            self.hardware,
            self.bridge,
            state=self.state,
            boot="this",
            admit=lambda *_: True,
            log=self.said.append,
            clock=self.clock,
        )
        self.stores.restore(self.alive.get)
        self.bridge.start()
        self.stores.listen()
        self.stores.poll.register(self.hardware.fileno(), select.EPOLLIN)
        self.stores.poll.register(self.bridge.fileno(), select.EPOLLIN)

    def restart(self) -> None:
        """As after SIGKILL: ports and the socket are gone, pages and journals stay."""
        self.hardware.bound.clear()
        self.hardware.masked.clear()
        self.start()

    def turn(self, seconds: float = 0.001) -> None:
        self.clock.now += seconds
        self.stores.turn(0)

    def until(self, condition: Callable[[], Any], what: str = "") -> Any:
        deadline = time.monotonic() + 20
        while not (value := condition()):
            assert time.monotonic() < deadline, (what, self.said)
            self.clock.now += 0.01
            self.stores.turn(0.01)
        return value

    def guest(self, domid: int, **more: Any) -> Guest:
        """An introduced guest."""
        guest = Guest(self, domid, **more)
        control = Control(self)
        assert control.ask(wire.CONTROL, "open", domid, guest.uuid, f"guest {domid}") == b"OK\0"
        assert control.ask(wire.INTRODUCE, domid, 0, 7) == b"OK\0"
        control.sock.close()
        self.alive[domid] = guest.uuid
        return guest

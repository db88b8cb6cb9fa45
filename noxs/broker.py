"""The broker: one store view served to Dom0's kernel and to Unix sockets.

Everything that can change the view is journalled before it is done, in the order in which it is
done: the kernel's bytes (xenbus.py) and the sockets' requests. Sockets die with the process; their
clients connect again, and a request whose reply was lost may be sent again.
"""

from __future__ import annotations

import os
import select
from _socket import SO_PEERCRED, SOL_SOCKET, socket  # the socket module takes 10 ms to import
from struct import Struct
from time import monotonic

from noxs import snapshot, wire
from noxs.requests import handle
from noxs.snapshot import KERNEL
from noxs.store import Connection, Store
from noxs.wire import Decoder
from noxs.xenbus import RECORD
from xenctypes.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from noxs.journal import Journal
    from noxs.wire import Message
    from noxs.xenbus import XenBus

BACKLOG_MAX = 1 << 20
"""Bytes that may wait for a client that does not read; with more it is closed."""
KERNEL_BACKLOG = 1 << 16
"""Bytes waiting for the kernel above which no socket is read."""
CLIENTS_MAX = 512
CHUNK = 1 << 12
"""Bytes read from a client before the others have their turn: 227 requests of the shortest kind,
whose replies, of the longest kind, are still less than BACKLOG_MAX."""
COMPACT_AFTER = 1 << 20
"""Bytes of log after which the journal is compacted, unless the last snapshot is larger."""

FROM_CLIENT = 3
JOURNALLED = frozenset({
    wire.TRANSACTION_START, wire.WRITE, wire.MKDIR, wire.RM, wire.SET_PERMS, wire.INTRODUCE,
    wire.RELEASE, wire.SET_TARGET, wire.RESET_WATCHES,
})  # fmt: skip
"""Requests that are journalled; so is every one inside a transaction."""

_CREDENTIALS = Struct("iII")
_RETRY = 1.0
_COMPLAIN_EVERY = 10.0
_READ, _WRITE = select.EPOLLIN, select.EPOLLOUT


class Client(Connection):
    """A socket. ``backlog`` waits to be sent on it; meanwhile it is not read."""

    __slots__ = ("backlog", "decoder", "fd", "sock")

    def __init__(self, ident: int, sock: socket) -> None:
        super().__init__(ident)
        self.sock = sock
        self.fd = sock.fileno()
        self.decoder = Decoder()
        self.backlog = bytearray()


class Broker:
    """Serves one view until ``stop``.

    ``admit`` is asked with a peer's socket, uid and gid; ``boot`` identifies the boot that the
    journal belongs to. Without a journal nothing survives.
    """

    def __init__(
        self,
        listener: socket,
        *,
        journal: Journal | None = None,
        boot: str = "",
        admit: Callable[[socket, int, int], bool] = lambda _sock, uid, _gid: uid == 0,
        log: Callable[[str], None] = lambda _message: None,
    ) -> None:
        self.store = Store(log)
        self.xenbus: XenBus | None = None
        self.journal = journal
        self.boot = boot
        self.listener = listener
        self.admit = admit
        self.log = log
        self.clients: dict[int, Client] = {}
        self.paused: list[Client] = []
        self.next_ident = KERNEL + 1
        self.complained = -_COMPLAIN_EVERY
        self.stopping = False
        self.snapshot_fd = -1
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.poll = select.epoll()
        self.poll.register(self.wake_fd, _READ)

    def restore(self) -> None:
        """Bring the view and the kernel's page to where the journal says. StateError.

        A journal of an earlier boot says nothing about this one, and is discarded.
        """
        state, records = self.journal.recover() if self.journal else (None, [])
        data = snapshot.load(state) if state else None
        if data is None or data["extra"]["boot"] != self.boot:
            self._begin()
            return
        extra, xenbus = data["extra"], self.xenbus
        if (extra["xenbus"] is None) != (xenbus is None):
            raise StateError(
                "the journal is that of a noxsd with, or without, --socket-only",
                hint="choose another --state directory",
            )
        snapshot.fill(self.store, data)
        self.next_ident = extra["next_ident"]
        if xenbus is not None:
            xenbus.restore(extra["xenbus"])
        for record in records:
            self._replay(record)
        for conn in list(self.store.connections.values()):
            if conn.ident != KERNEL:
                self.store.disconnect(conn)
        if xenbus is not None:
            xenbus.resume()

    def _begin(self) -> None:
        if self.xenbus is not None:
            if not self.xenbus.ring.pristine:
                raise StateError(
                    "Dom0's XenBus page has been served by another store in this boot",
                    hint="the kernel's watches are lost with it: reboot the host",
                )
            self.xenbus.attach()
        if self.journal is not None:
            self.journal.replace(self._state())

    def _replay(self, record: bytes) -> None:
        kind, ident = RECORD.unpack_from(record)
        if kind != FROM_CLIENT:
            assert self.xenbus is not None
            self.xenbus.replay(record)
            return
        conn = self.store.connections.get(ident)
        if conn is None:
            conn = Connection(ident)
            self.store.connect(conn)
            self.next_ident = max(self.next_ident, ident + 1)
        for message in Decoder().feed(record[RECORD.size :]):
            handle(self.store, conn, message)
        conn.out.clear()

    def _state(self) -> bytes:
        kernel = self.xenbus.state() if self.xenbus else None
        extra = {"boot": self.boot, "next_ident": self.next_ident, "xenbus": kernel}
        return snapshot.dump(self.store, extra)

    def stop(self) -> None:
        """Make ``run`` return once the events at hand are served; for signal handlers too."""
        self.stopping = True
        os.eventfd_write(self.wake_fd, 1)

    def run(self) -> None:
        """Serve until ``stop``."""
        self.listener.setblocking(False)
        self.poll.register(self.listener.fileno(), _READ)
        if self.xenbus is not None:
            self.poll.register(self.xenbus.channel.fileno(), _READ)
            self.xenbus.channel.notify()
        timeout = 0.0
        while not self.stopping:
            for fd, event in self.poll.poll(timeout):
                client = self.clients.get(fd)
                if client is not None:
                    self._serve(client, event)
                elif fd == self.listener.fileno():
                    self._accept()
                elif fd == self.snapshot_fd:
                    self._snapshot_done()
                elif self.xenbus is not None and fd == self.xenbus.channel.fileno():
                    self.xenbus.channel.take()
            timeout = self._serve_kernel() if self.xenbus is not None else -1
            self._flush()
            if self.journal is not None:
                self._compact(self.journal)
        self.close()

    def close(self) -> None:
        """Close every socket, and the journal with a last snapshot."""
        for client in list(self.clients.values()):
            self._close(client)
        if self.journal is not None:
            try:
                self.journal.replace(self._state())
                self.journal.close()
            except OSError as error:
                self.log(f"the last snapshot could not be written, the log has to do: {error}")
        self.poll.close()
        os.close(self.wake_fd)

    def _serve_kernel(self) -> float:
        assert self.xenbus is not None
        try:
            timeout = self.xenbus.serve(self.journal)
        except OSError as error:
            self._complain(error)
            return _RETRY
        if self.paused and len(self.xenbus.queue) < KERNEL_BACKLOG:
            for client in self.paused:
                self.poll.register(client.fd, _READ)
            self.paused.clear()
        return timeout

    # Sockets

    def _accept(self) -> None:
        try:
            fd = _accept(self.listener)
        except OSError as error:
            self.log(f"accept: {error}")
            return
        sock = socket(fileno=fd)
        sock.setblocking(False)
        credentials = sock.getsockopt(SOL_SOCKET, SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, gid = _CREDENTIALS.unpack(credentials)
        client = Client(self.next_ident, sock)
        if not self.admit(sock, uid, gid):
            self.log(f"process {pid} of user {uid} refused")
            self._send(client, wire.pack(wire.ERROR, 0, 0, b"EACCES\0"))
            sock.close()
        elif len(self.clients) >= CLIENTS_MAX:
            self.log(f"process {pid} refused: {CLIENTS_MAX} clients are connected")
            self._send(client, wire.pack(wire.ERROR, 0, 0, b"EBUSY\0"))
            sock.close()
        else:
            self.next_ident += 1
            self.clients[client.fd] = client
            self.store.connect(client)
            self.poll.register(client.fd, _READ)

    def _serve(self, client: Client, event: int) -> None:
        if event & _WRITE:
            backlog = bytes(client.backlog)
            client.backlog.clear()
            if self._send(client, backlog) and not client.backlog:
                self.poll.modify(client.fd, _READ)
        elif self.xenbus is not None and len(self.xenbus.queue) > KERNEL_BACKLOG:
            self.poll.unregister(client.fd)
            self.paused.append(client)
        else:
            self._read(client)

    def _read(self, client: Client) -> None:
        try:
            data = client.sock.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        decoder = client.decoder
        messages = decoder.feed(data)
        if self._journal(client, messages):
            for message in messages:
                handle(self.store, client, message)
        else:
            for _, req_id, tx_id, _ in messages:
                self._reply(client, wire.pack(wire.ERROR, req_id, tx_id, b"ENOSPC\0"))
        if decoder.bad is not None:
            self._refuse(client, decoder.bad[1], decoder.bad[2])
        elif not data:
            if decoder.pending:
                self._refuse(client, *_identify(decoder.pending))
            else:
                self._close(client)

    def _journal(self, client: Client, messages: list[Message]) -> bool:
        """Journal those of a client's messages that need it; whether they may be handled."""
        if self.journal is None:
            return True
        changes = [wire.pack(*m) for m in messages if m[0] in JOURNALLED or m[2]]
        if changes:
            try:
                self.journal.append(RECORD.pack(FROM_CLIENT, client.ident) + b"".join(changes))
            except OSError as error:
                self._complain(error)
                return False
        return True

    def _complain(self, error: OSError) -> None:
        now = monotonic()
        if now > self.complained + _COMPLAIN_EVERY:
            self.complained = now
            self.log(
                f"the journal cannot be written: changes are refused, the kernel waits: {error}"
            )

    def _refuse(self, client: Client, req_id: int, tx_id: int) -> None:
        """Answer what comes before a malformed message, and that with an error; then close."""
        self._reply(client, wire.pack(wire.ERROR, req_id, tx_id, b"EINVAL\0"))
        self.log("a client sent a malformed message and is closed")
        if self._send(client, b"".join(client.out)):
            self._close(client)

    def _reply(self, client: Client, message: bytes) -> None:
        client.out.append(message)
        self.store.touched.add(client)

    def _flush(self) -> None:
        """Send what the view has for the sockets."""
        touched = self.store.touched
        while touched:
            conn = touched.pop()
            if isinstance(conn, Client) and conn.out:
                data = b"".join(conn.out)
                conn.out.clear()
                self._send(conn, data)

    def _send(self, client: Client, data: bytes) -> bool:
        """Send, or keep what the socket does not take; False if the client had to be closed."""
        sent = 0
        if not client.backlog:
            try:
                sent = client.sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self._close(client)
                return False
        if sent < len(data):
            if not client.backlog and client.fd in self.clients:
                self.poll.modify(client.fd, _WRITE)
            client.backlog += data[sent:]
            if len(client.backlog) > BACKLOG_MAX:
                self.log(f"a client that does not read {BACKLOG_MAX} bytes is closed")
                self._close(client)
                return False
        return True

    def _close(self, client: Client) -> None:
        if self.clients.pop(client.fd, None) is None:
            return
        if client in self.paused:
            self.paused.remove(client)
        else:
            self.poll.unregister(client.fd)
        self.store.disconnect(client)
        client.sock.close()

    # Compaction

    def _compact(self, journal: Journal) -> None:
        if self.snapshot_fd < 0 and journal.length > max(COMPACT_AFTER, journal.base):
            try:
                pid = journal.rotate(self._state)
                self.snapshot_fd = os.pidfd_open(pid)
            except OSError as error:
                self.log(f"the journal cannot be compacted now: {error}")
                return
            self.poll.register(self.snapshot_fd, _READ)

    def _snapshot_done(self) -> None:
        assert self.journal is not None
        self.poll.unregister(self.snapshot_fd)
        os.close(self.snapshot_fd)
        self.snapshot_fd = -1
        if not self.journal.settle():
            self.log("a snapshot could not be written; the journal keeps growing")


def _accept(listener: Any) -> int:
    fd, _ = listener._accept()  # noqa: SLF001 - what socket.socket.accept() is made of
    return int(fd)


def _identify(partial: bytes) -> tuple[int, int]:
    """The req_id and tx_id of an incomplete message, as far as they are there."""
    _, req_id, tx_id, _ = wire.HEADER.unpack(partial[:16].ljust(16, b"\0"))
    return req_id, tx_id

"""The broker: one store view served to Dom0's kernel and to Unix sockets.

Everything that can change the view is journalled before it is done, in the order in which it is
done: the kernel's bytes (xenbus.py) and the sockets' requests. Sockets die with the process; their
clients connect again, and a request whose reply was lost may be sent again.
"""

from __future__ import annotations

import os
import select

from noxs import snapshot, wire
from noxs.requests import handle
from noxs.service import Client, Service
from noxs.snapshot import KERNEL
from noxs.store import Connection, Store
from noxs.wire import Decoder
from noxs.xenbus import RECORD
from xenctypes.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable

    from noxs.journal import Journal
    from noxs.wire import Message
    from noxs.xenbus import XenBus

KERNEL_BACKLOG = 1 << 16
"""Bytes waiting for the kernel above which no socket is read."""
COMPACT_AFTER = 1 << 20
"""Bytes of log after which the journal is compacted, unless the last snapshot is larger."""

FROM_CLIENT = 3
JOURNALLED = frozenset({
    wire.TRANSACTION_START, wire.WRITE, wire.MKDIR, wire.RM, wire.SET_PERMS, wire.INTRODUCE,
    wire.RELEASE, wire.SET_TARGET, wire.RESET_WATCHES,
})  # fmt: skip
"""Requests that are journalled; so is every one inside a transaction."""

_RETRY = 1.0
_READ = select.EPOLLIN


class Broker(Service):
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
        super().__init__(listener, admit=admit, log=log)
        self.store = Store(log)
        self.xenbus: XenBus | None = None
        self.journal = journal
        self.boot = boot
        self.snapshot_fd = -1

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

    def described(self) -> str:
        """What is served, for the log."""
        return f"{len(self.store.tree.nodes)} nodes"

    def run(self) -> None:
        """Serve until ``stop``."""
        self.listen()
        if self.xenbus is not None:
            self.poll.register(self.xenbus.channel.fileno(), _READ)
            self.xenbus.channel.notify()
        timeout = 0.0
        while not self.stopping:
            for fd, event in self.poll.poll(timeout):
                if self.serve_socket(fd, event):
                    continue
                if fd == self.snapshot_fd:
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
        self.close_clients()
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
            self.resume_clients()
        return timeout

    # Sockets

    def connected(self, client: Client) -> None:
        """See Service."""
        self.store.connect(client)

    def disconnected(self, client: Client) -> None:
        """See Service."""
        self.store.disconnect(client)

    def busy(self) -> bool:
        """See Service."""
        return self.xenbus is not None and len(self.xenbus.queue) > KERNEL_BACKLOG

    def answer(self, client: Client, messages: list[Message]) -> None:
        """See Service."""
        if self._journal(client, messages):
            for message in messages:
                handle(self.store, client, message)
        else:
            for _, req_id, tx_id, _ in messages:
                client.out.append(wire.pack(wire.ERROR, req_id, tx_id, b"ENOSPC\0"))
                self.store.touched.add(client)

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
        self.complain(
            f"the journal cannot be written: changes are refused, the kernel waits: {error}"
        )

    def _flush(self) -> None:
        """Send what the view has for the sockets."""
        touched = self.store.touched
        while touched:
            conn = touched.pop()
            if isinstance(conn, Client) and conn.out:
                data = b"".join(conn.out)
                conn.out.clear()
                self.send(conn, data)

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

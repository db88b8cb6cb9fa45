"""A store's Unix socket: connections, what they send, and what waits for them.

What a request means is the business of whoever derives from ``Service``: Dom0's bus (broker.py) and
the private stores of guests (stores.py).
"""

from __future__ import annotations

import os
import select
from _socket import SO_PEERCRED, SOL_SOCKET, socket  # the socket module takes 10 ms to import
from struct import Struct
from time import monotonic

from noxs import wire
from noxs.store import Connection
from noxs.wire import Decoder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from noxs.wire import Message

BACKLOG_MAX = 1 << 20
"""Bytes that may wait for a client that does not read; with more it is closed."""
CLIENTS_MAX = 512
CHUNK = 1 << 12
"""Bytes read from a client before the others have their turn: 227 requests of the shortest kind,
whose replies, of the longest kind, are still less than BACKLOG_MAX."""

COMPLAIN_EVERY = 10.0
_CREDENTIALS = Struct("iII")
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


class Service:
    """Clients of one listening socket, served from the owner's loop.

    ``admit`` is asked with a peer's socket, uid and gid. The owner's loop hands ``serve_socket``
    what its epoll ``poll`` reports, and calls ``send`` with what it has for a client.
    """

    def __init__(
        self,
        listener: socket,
        *,
        admit: Callable[[socket, int, int], bool] = lambda _sock, uid, _gid: uid == 0,
        log: Callable[[str], None] = lambda _message: None,
    ) -> None:
        self.listener = listener
        self.admit = admit
        self.log = log
        self.clients: dict[int, Client] = {}
        self.paused: list[Client] = []
        self.next_ident = 1
        self.complained = -COMPLAIN_EVERY
        self.stopping = False
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.poll = select.epoll()
        self.poll.register(self.wake_fd, _READ)

    # What the owner decides

    def connected(self, client: Client) -> None:
        """A client was admitted."""
        raise NotImplementedError

    def disconnected(self, client: Client) -> None:
        """A client is gone, or was closed."""
        raise NotImplementedError

    def answer(self, client: Client, messages: list[Message]) -> None:
        """Answer a client's requests into its ``out``."""
        raise NotImplementedError

    def busy(self) -> bool:
        """Whether clients are not read for now; ``resume_clients`` ends that."""
        return False

    # The loop's part

    def stop(self) -> None:
        """Make the loop return once the events at hand are served; for signal handlers too.

        It is the loop that takes note: whatever else wakes it, the descriptor is open until then.
        """
        if not self.stopping:
            os.eventfd_write(self.wake_fd, 1)

    def listen(self) -> None:
        """Accept clients from now on."""
        self.listener.setblocking(False)
        self.poll.register(self.listener.fileno(), _READ)

    def serve_socket(self, fd: int, event: int) -> bool:
        """Serve a client, accept one or note ``stop``; False if the descriptor is none of these."""
        client = self.clients.get(fd)
        if client is not None:
            self._serve(client, event)
        elif fd == self.listener.fileno():
            self._accept()
        elif fd == self.wake_fd:
            self.stopping = True
        else:
            return False
        return True

    def close_clients(self) -> None:
        """Close every connection."""
        for client in list(self.clients.values()):
            self.drop(client)

    def resume_clients(self) -> None:
        """Read the clients again that were not while ``busy``."""
        for client in self.paused:
            self.poll.register(client.fd, _READ)
        self.paused.clear()

    def complain(self, text: str) -> None:
        """Log what would repeat itself, now and then."""
        now = monotonic()
        if now > self.complained + COMPLAIN_EVERY:
            self.complained = now
            self.log(text)

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
            self.send(client, wire.pack(wire.ERROR, 0, 0, b"EACCES\0"))
            sock.close()
        elif len(self.clients) >= CLIENTS_MAX:
            self.log(f"process {pid} refused: {CLIENTS_MAX} clients are connected")
            self.send(client, wire.pack(wire.ERROR, 0, 0, b"EBUSY\0"))
            sock.close()
        else:
            self.next_ident += 1
            self.clients[client.fd] = client
            self.connected(client)
            self.poll.register(client.fd, _READ)

    def _serve(self, client: Client, event: int) -> None:
        if event & _WRITE:
            backlog = bytes(client.backlog)
            client.backlog.clear()
            if self.send(client, backlog) and not client.backlog:
                self.poll.modify(client.fd, _READ)
        elif self.busy():
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
        self.answer(client, messages)
        if decoder.bad is not None:
            self._refuse(client, decoder.bad[1], decoder.bad[2])
        elif not data:
            if decoder.pending:
                self._refuse(client, *_identify(decoder.pending))
            else:
                self.drop(client)

    def _refuse(self, client: Client, req_id: int, tx_id: int) -> None:
        """Answer what comes before a malformed message, and that with an error; then close."""
        client.out.append(wire.pack(wire.ERROR, req_id, tx_id, b"EINVAL\0"))
        self.log("a client sent a malformed message and is closed")
        if self.send(client, b"".join(client.out)):
            self.drop(client)

    def send(self, client: Client, data: bytes) -> bool:
        """Send, or keep what the socket does not take; False if the client had to be closed."""
        sent = 0
        if not client.backlog:
            try:
                sent = client.sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self.drop(client)
                return False
        if sent < len(data):
            if not client.backlog and client.fd in self.clients:
                self.poll.modify(client.fd, _WRITE)
            client.backlog += data[sent:]
            if len(client.backlog) > BACKLOG_MAX:
                self.log(f"a client that does not read {BACKLOG_MAX} bytes is closed")
                self.drop(client)
                return False
        return True

    def drop(self, client: Client) -> None:
        """Close a client's connection, if it is open."""
        if self.clients.pop(client.fd, None) is None:
            return
        if client in self.paused:
            self.paused.remove(client)
        else:
            self.poll.unregister(client.fd)
        self.disconnected(client)
        client.sock.close()


def _accept(listener: Any) -> int:
    fd, _ = listener._accept()  # noqa: SLF001 - what socket.socket.accept() is made of
    return int(fd)


def _identify(partial: bytes) -> tuple[int, int]:
    """The req_id and tx_id of an incomplete message, as far as they are there."""
    _, req_id, tx_id, _ = wire.HEADER.unpack(partial[:16].ljust(16, b"\0"))
    return req_id, tx_id

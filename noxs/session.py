"""A client's connection to a store's socket: pipelined requests, events, and reconnection."""

from __future__ import annotations

import errno as errnos
import os
import select
import struct

# The socket module, written in Python, takes 10 ms to import.
from _socket import AF_UNIX, SO_RCVTIMEO, SO_SNDTIMEO, SOCK_STREAM, SOL_SOCKET, socket
from time import monotonic, sleep

from noxs import wire
from noxs.nodes import NAMES, decode, result
from noxs.wire import Decoder
from xenctypes.errors import BusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from noxs.nodes import Request
    from noxs.wire import Message

    Event = tuple[str, str]

WINDOW, WINDOW_BYTES = 128, 1 << 15
"""Requests, and bytes of them, sent before replies are read: either end's buffers hold them."""
TRIES = 3
"""How often requests are sent again to a server that closes the connection each time."""
COMMIT = (wire.TRANSACTION_END, b"T\0")
_CHUNK = 1 << 16


class Session:
    """A connection to the first of ``paths`` that answers.

    ``count`` says how often it was made; ``watches`` are the requests that make the watches again
    when it is made anew; ``patience`` is the longest wait, in seconds, for a reply or a server.
    """

    def __init__(self, paths: Iterable[str], patience: float) -> None:
        self.paths = tuple(paths)
        self.path = ""
        self.patience = patience
        self.count = 0
        self.events: list[Event] = []
        self.watches: dict[Event, Request] = {}
        self._sock: socket | None = None
        self._decoder = Decoder()
        self._ident = 0
        self._stale = False  # a reply is overdue: what comes on this socket answers the past
        self._open()

    def close(self) -> None:
        """Close the connection for good."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def fileno(self) -> int:
        """The socket's number; it survives a reconnection."""
        return self._socket().fileno()

    def exchange(self, requests: list[Request], tx_id: int) -> list[Message]:
        """Send the requests, read their replies; sends again what a lost connection took along.

        BusError: in a transaction EAGAIN when the connection was lost and nothing was changed,
        ECONNABORTED when it was lost during the commit and nobody can tell; ETIMEDOUT,
        ECONNREFUSED, ECONNRESET, E2BIG for a payload that is too long.
        """
        for op, payload, path in requests:
            if len(payload) > wire.PAYLOAD_MAX:
                raise BusError(
                    f"{NAMES[op]} {path}: {len(payload)} bytes, a store takes {wire.PAYLOAD_MAX}",
                    path=path,
                    errno=errnos.E2BIG,
                )
        if self._stale:
            self.reopen()
            if tx_id:
                raise lost_transaction()
        for _ in range(TRIES):
            try:
                return self._attempt(requests, tx_id)
            except ConnectionError as error:
                self.reopen()
                if not tx_id:
                    continue
                # A broken pipe took nothing along: the server was gone before.
                if requests[-1][:2] == COMMIT and not isinstance(error, BrokenPipeError):
                    raise unknown_commit() from None
                raise lost_transaction() from None
        raise BusError(
            f"{self.path}: the store closes the connection", path=path, errno=errnos.ECONNRESET
        )

    def _attempt(self, requests: list[Request], tx_id: int) -> list[Message]:
        replies: dict[int, Message] = {}
        idents: list[int] = []
        window: list[bytes] = []
        size = 0
        for op, payload, _ in requests:
            self._ident = self._ident % 0x7FFFFFFF + 1
            idents.append(self._ident)
            window.append(wire.pack(op, self._ident, tx_id, payload))
            size += len(window[-1])
            if len(window) == WINDOW or size > WINDOW_BYTES:
                self._round_trip(window, replies)
                window, size = [], 0
        if window:
            self._round_trip(window, replies)
        return [replies[ident] for ident in idents]

    def _round_trip(self, window: list[bytes], replies: dict[int, Message]) -> None:
        due = len(replies) + len(window)
        try:
            self._send(b"".join(window))
            while len(replies) < due:
                for reply in self.receive():
                    replies[reply[1]] = reply
        except BlockingIOError as error:
            self._stale = True
            raise BusError(
                f"{self.path}: no answer for {self.patience:g} s", errno=errnos.ETIMEDOUT
            ) from error

    def _send(self, data: bytes) -> None:
        self._socket().sendall(data)

    def receive(self) -> list[Message]:
        """Read once: the replies; events are put aside. ConnectionError at the stream's end."""
        data = self._socket().recv(_CHUNK)
        if not data:
            raise ConnectionResetError
        replies = []
        for message in self._decoder.feed(data):
            op, ident, _, payload = message
            if op == wire.WATCH_EVENT:
                path, _, token = payload.partition(b"\0")
                self.events.append((decode(path), decode(token[:-1])))
            elif ident:
                replies.append(message)
            else:
                name = decode(payload.rstrip(b"\0"))
                raise BusError(
                    f"{self.path}: the store refuses us: {name}",
                    errno=getattr(errnos, name, errnos.EIO),
                )
        if self._decoder.bad is not None:
            raise BusError(f"{self.path}: this is not a store's socket", errno=errnos.EPROTO)
        return replies

    def wait(self, timeout: float | None) -> bool:
        """Wait until there is something to receive, for ``timeout`` seconds (None: for ever)."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def reopen(self) -> None:
        """Find the server again, and make the watches again; they fire."""
        deadline = monotonic() + self.patience
        pause = 0.01
        while True:
            try:
                self._open()
                requests = list(self.watches.values())
                for pair in zip(requests, self._attempt(requests, 0), strict=True):
                    result(*pair)
            except (BusError, ConnectionError) as error:
                if monotonic() > deadline:
                    raise BusError(
                        f"{self.path}: the store is gone", errno=errnos.ECONNREFUSED
                    ) from error
                sleep(pause)
                pause = min(2 * pause, 0.5)
            else:
                return

    def _open(self) -> None:
        reasons = []
        for path in self.paths:
            sock = socket(AF_UNIX, SOCK_STREAM)
            limit = struct.pack("ll", int(self.patience), int(self.patience % 1 * 1e6))
            sock.setsockopt(SOL_SOCKET, SO_RCVTIMEO, limit)
            sock.setsockopt(SOL_SOCKET, SO_SNDTIMEO, limit)
            try:
                sock.connect(path)
            except OSError as error:
                sock.close()
                reasons.append(f"{path}: {error.strerror or error}")
                continue
            if self._sock is None:
                self._sock = sock
            else:
                os.dup2(sock.fileno(), self._sock.fileno(), inheritable=False)
                sock.close()
            self.path = path
            self.count += 1
            self._decoder = Decoder()
            self._stale = False
            return
        raise BusError(
            "no store answers: " + ", ".join(reasons),
            errno=errnos.ECONNREFUSED,
            hint="start noxsd, or xenstored; $NOXS_BUS names another socket",
        )

    def _socket(self) -> socket:
        if self._sock is None:
            raise BusError("the connection to the store is closed", errno=errnos.EBADF)
        return self._sock


def lost_transaction() -> BusError:
    """What a transaction meets whose server restarted: it has changed nothing."""
    return BusError("the transaction is lost: the store restarted", errno=errnos.EAGAIN)


def unknown_commit() -> BusError:
    """What a transaction meets whose server went away between its commit and the reply."""
    return BusError(
        "the store restarted during a commit, and does not tell whether it was done",
        errno=errnos.ECONNABORTED,
    )

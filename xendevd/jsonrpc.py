"""JSON-RPC 1.0 on a Unix socket, as ovsdb-server speaks it (RFC 7047), without ever blocking."""

import json
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any

REPLY_MAX = 16 << 20  # bytes; more than a reply about thousands of ports has
PATIENCE = 30.0  # seconds for one reply

Reply = Callable[[Any, str], None]
"""Called once: with the result and "", or with None and what went wrong."""


class Peer:
    """A connection. ``fileno`` is readable when ``receive`` has something to do.

    Replies are handed to their callbacks from ``receive``, ``expire`` and, when the
    connection breaks, from whichever call noticed.
    """

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.settimeout(1.0)
            self._socket.connect(path)
            self._socket.setblocking(False)
        except OSError:
            self._socket.close()
            raise
        self._received = ""
        self._decoder = json.JSONDecoder()
        self._unsent = b""
        self._ident = 0
        self._waiting: dict[int, tuple[Reply, float]] = {}
        self.closed = False

    def fileno(self) -> int:
        """The socket."""
        return self._socket.fileno()

    @property
    def blocked(self) -> bool:
        """Whether ``send`` has to be called when the socket is writable."""
        return bool(self._unsent)

    @property
    def deadline(self) -> float | None:
        """When ``expire`` has something to do, on the monotonic clock."""
        return min((until for _, until in self._waiting.values()), default=None)

    def call(self, method: str, params: list[Any], reply: Reply) -> None:
        """Send a request; ``reply`` hears of its outcome."""
        self._ident += 1
        self._waiting[self._ident] = reply, monotonic() + PATIENCE
        self._queue({"method": method, "params": params, "id": self._ident})

    def _queue(self, message: dict[str, Any]) -> None:
        self._unsent += json.dumps(message, separators=(",", ":")).encode()
        self.send()

    def send(self) -> None:
        """Send what has been queued, as far as the socket takes it."""
        try:
            while self._unsent and not self.closed:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self.close(error.strerror or "send failed")

    def receive(self) -> None:
        """Take what has arrived and hand out the replies."""
        while not self.closed:
            try:
                data = self._socket.recv(1 << 18)
            except BlockingIOError:
                return
            except OSError as error:
                self.close(error.strerror or "receive failed")
                return
            if not data:
                self.close("the connection was closed")
                return
            self._received += data.decode("utf-8", "replace")
            self._decode()

    def _decode(self) -> None:
        while self._received and not self.closed:
            try:
                message, end = self._decoder.raw_decode(self._received)
            except ValueError:
                if len(self._received) > REPLY_MAX or not self._received.startswith("{"):
                    self.close("not a JSON-RPC message")
                return
            self._received = self._received[end:].lstrip()
            if not isinstance(message, dict):
                self.close("not a JSON-RPC message")
            elif message.get("method") == "echo":
                self._queue(
                    {"id": message.get("id"), "result": message.get("params"), "error": None}
                )
            elif (ident := message.get("id")) in self._waiting:
                reply, _ = self._waiting.pop(ident)
                if message.get("error"):
                    reply(None, str(message["error"]))
                else:
                    reply(message.get("result"), "")

    def expire(self) -> None:
        """Give up on requests that have waited for too long; they may still have an effect."""
        now = monotonic()
        for ident, (reply, until) in list(self._waiting.items()):
            if until <= now and ident in self._waiting:
                del self._waiting[ident]
                reply(None, f"no reply within {PATIENCE:g} s")

    def close(self, why: str = "closed") -> None:
        """Close the connection; every request that waits hears ``why``."""
        if self.closed:
            return
        self.closed = True
        self._socket.close()
        waiting, self._waiting = self._waiting, {}
        for reply, _ in waiting.values():
            reply(None, why)

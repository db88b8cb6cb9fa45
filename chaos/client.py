"""The client of chaosd: ``from chaos.client import Chaos``.

::

    with Chaos() as chaos:
        made = chaos.create("app.cfg", name="fw-1", wait_ready=5)
        for event in chaos.events():
            ...

Many requests may be in flight at once: ``submit`` begins one, ``call`` waits for it. Several
threads may share a Chaos. docs/protocol.md has the methods and their parameters.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from typing import TYPE_CHECKING, Any

import xenctypes.errors
from chaos import frames
from xenctypes.errors import ChaosError, PermissionDenied, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Self

SOCKET = "/run/chaos/chaosd.sock"
CHUNK = 1 << 16
LOST = "the daemon went away before it answered"


class Pending:
    """A request in flight."""

    def __init__(self, client: Chaos, ident: int) -> None:
        self._client = client
        self._ident = ident
        self._replies: queue.SimpleQueue[frames.Reply | None] = queue.SimpleQueue()
        self._last: frames.Reply | ChaosError | None = None

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the value. Raises the daemon's error, ProtocolError, TimeoutError."""
        while self._last is None:
            try:
                self._next(timeout)
            except queue.Empty:
                raise TimeoutError(f"no reply within {timeout} s") from None
        return self._value()

    @property
    def progress(self) -> Iterator[Any]:
        """What comes before the last reply, as it comes; raises the daemon's error at the end."""
        while self._last is None:
            reply = self._next(None)
            if reply is not None and reply.kind == frames.PROGRESS:
                yield reply.value
        self._value()

    def cancel(self) -> None:
        """Want no more of it."""
        if self._last is None:
            self._client.submit("cancel", id=self._ident)

    def _next(self, timeout: float | None) -> frames.Reply | None:
        reply = self._replies.get(timeout=timeout)
        if reply is None:
            self._last = ProtocolError(LOST, hint="chaos list shows what became of it")
        elif reply.kind != frames.PROGRESS:
            self._last = reply
        return reply

    def _value(self) -> Any:
        last = self._last
        if isinstance(last, ChaosError):
            raise last
        assert last is not None
        if last.kind == frames.ERROR:
            raise error_of(last.value)
        return last.value

    def deliver(self, reply: frames.Reply | None) -> None:
        """For the client: a reply, or None when no more come."""
        self._replies.put(reply)


class Chaos:
    """A connection to chaosd, a context manager. PermissionDenied, ProtocolError.

    ``path`` is its socket, by default $CHAOS_SOCKET or SOCKET.
    """

    def __init__(self, path: str | None = None) -> None:
        path = path or os.environ.get("CHAOS_SOCKET") or SOCKET
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            if isinstance(error, PermissionError):
                raise PermissionDenied(
                    f"{path}: {error.strerror}", hint="be root, or a member of the group chaos"
                ) from error
            raise ProtocolError(
                f"no chaosd answers on {path}: {error.strerror}", hint="start chaosd"
            ) from error
        self._lock = threading.Lock()
        self._ident = 0
        self._pending: dict[int, Pending] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="chaos replies", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; what was asked is cancelled. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._socket.close()

    # Any method

    def submit(self, method: str, **params: Any) -> Pending:
        """Begin with a request. ProtocolError if the daemon is gone."""
        with self._lock:
            self._ident = self._ident % frames.ID_MAX + 1
            pending = Pending(self, self._ident)
            data = frames.pack_request(self._ident, method, params)
            if self._closed:
                raise ProtocolError(LOST)
            self._pending[self._ident] = pending
            try:
                self._socket.sendall(data)
            except OSError as error:
                raise ProtocolError(LOST) from error
        return pending

    def call(self, method: str, **params: Any) -> Any:
        """Do it and wait for the value."""
        return self.submit(method, **params).result()

    # What most want

    def create(
        self,
        path: str | os.PathLike[str],
        overrides: Sequence[str] = (),
        *,
        name: str | None = None,
        paused: bool = False,
        wait_ready: float = 0,
    ) -> dict[str, Any]:
        """Create a domain from an xl.cfg file: its name, domid, uuid, ready_ms and profile.

        ``wait_ready`` is how many seconds to wait for its ready event.
        """
        named = [] if name is None else [f'name="{name}"']
        made: dict[str, Any] = self.call(
            "create",
            path=os.path.abspath(path),
            overrides=[*overrides, *named],
            paused=paused,
            wait_ready=wait_ready,
        )
        return made

    def list(self) -> Any:
        """All domains, as ``chaos list --json`` has them."""
        return self.call("list")

    def destroy(self, *domains: str) -> Any:
        """End domains; what was destroyed."""
        return self.call("destroy", domains=[*domains])

    def wait(self, domain: str, *, dead: bool = False, timeout: float | None = None) -> Any:
        """Wait until a domain is ready, or dead: the outcome."""
        limit = {} if timeout is None else {"timeout": timeout}
        return self.call("wait", domain=domain, dead=dead, **limit)

    def logs(self, domain: str) -> bytes:
        """What its console has shown, as far as it is kept."""
        return bytes(self.call("logs", domain=domain))

    def events(self, token: str | None = None) -> Iterator[dict[str, Any]]:
        """Events as they come; with a token first those since then, with "" all that are kept."""
        return self.submit("events", token=token).progress

    # Replies

    def _read(self) -> None:
        splitter = frames.Splitter()
        with contextlib.suppress(OSError, ProtocolError):
            while data := self._socket.recv(CHUNK):
                for body in splitter.feed(data):
                    self._take(frames.read_reply(body))
        with self._lock:
            self._closed = True
            pending, self._pending = self._pending, {}
        for each in pending.values():
            each.deliver(None)

    def _take(self, reply: frames.Reply) -> None:
        with self._lock:
            pending = self._pending.get(reply.ident)
            if pending is not None and reply.kind != frames.PROGRESS:
                del self._pending[reply.ident]
        if pending is not None:
            pending.deliver(reply)


def error_of(value: Any) -> ChaosError:
    """The error that a reply describes, of its class in xenctypes.errors where it has one."""
    if not isinstance(value, dict):
        return ProtocolError("an error that is none")
    message, hint = str(value.get("message", "failed")), str(value.get("hint", ""))
    found = getattr(xenctypes.errors, str(value.get("class")), ChaosError)
    if not (isinstance(found, type) and issubclass(found, ChaosError)):
        found = ChaosError
    try:
        error = found(message, hint=hint)
    except TypeError:  # one with more to say than a message
        error = ChaosError(message, hint=hint)
    code = value.get("exit_code")
    if isinstance(code, int):
        error.exit_code = code
    return error

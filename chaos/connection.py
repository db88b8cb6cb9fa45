"""A client's connection to chaosd: requests out, replies in.

No thread of its own: of the callers that wait for replies, one reads for all of them, which
spares each reply a switch between threads.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from chaos import frames
from chaos.faults import restore
from xenctypes.errors import ChaosError, NoDaemon, PermissionDenied, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

SOCKET = "/run/chaos/chaosd.sock"
CHUNK = 1 << 16


class Pending:
    """A request in flight, of ``Connection.submit``."""

    def __init__(self, connection: Connection, ident: int) -> None:
        self.ident = ident
        self._connection = connection
        self._progress: deque[Any] = deque()
        self._last: frames.Reply | None = None

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the value, ``timeout`` seconds at most.

        Raises the daemon's error, ProtocolError, or TimeoutError: then it is still in flight.
        """
        if not self._connection.until(lambda: self._last is not None, timeout):
            raise TimeoutError(f"no reply within {timeout} s")
        return self._value()

    @property
    def progress(self) -> Iterator[Any]:
        """What comes before the value, as it comes. Raises at its end as ``result`` does."""
        while self._connection.until(lambda: bool(self._progress) or self._last is not None):
            if not self._progress:
                break
            yield self._progress.popleft()
        self._value()

    def cancel(self) -> None:
        """Want no more of it: it ends, mostly with an error that says so."""
        if self._last is None:
            self._connection.submit("cancel", id=self.ident)

    def take(self, reply: frames.Reply) -> bool:
        """For the connection: keep a reply. Whether it is the last."""
        if reply.kind == frames.PROGRESS:
            self._progress.append(reply.value)
            return False
        self._last = reply
        return True

    def _value(self) -> Any:
        assert self._last is not None
        if self._last.kind == frames.ERROR:
            raise restore(self._last.value)
        if self._last.kind != frames.OK:
            raise ProtocolError("the daemon leaves this to the client")
        return self._last.value


class Connection:
    """A connection to chaosd, a context manager, for any number of threads.

    ``path`` is the socket, by default $CHAOS_SOCKET or SOCKET. Raises NoDaemon when nobody
    listens there, PermissionDenied.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path or os.environ.get("CHAOS_SOCKET") or SOCKET
        self._socket = _connect(self.path)
        self._splitter = frames.Splitter()
        self._sending = threading.Lock()
        # Guards what follows. Who waits for it is woken when replies came or nobody reads.
        self._state = threading.Condition()
        self._reading = False
        self._failure: Callable[[], ChaosError] | None = None
        self._pending: dict[int, Pending] = {}
        self._ident = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; the daemon cancels what is in flight. Idempotent."""
        with self._state:
            self._lose(lambda: ProtocolError("the connection to chaosd is closed"))
            while self._reading:  # the descriptor's number must not become another file's
                self._state.wait()
        with self._sending:
            self._socket.close()

    def submit(self, method: str, **params: Any) -> Pending:
        """Begin with a request. ProtocolError if it is too long, or the daemon gone."""
        with self._state:
            if self._failure:
                raise self._failure()
            while self._ident in self._pending or not self._ident:
                self._ident = (self._ident + 1) & frames.ID_MAX
            pending = Pending(self, self._ident)
            data = frames.pack_request(pending.ident, method, params)
            self._pending[pending.ident] = pending
            self._ident = (self._ident + 1) & frames.ID_MAX
        self._send(data)
        return pending

    def call(self, method: str, **params: Any) -> Any:
        """Do it and wait for the value."""
        return self.submit(method, **params).result()

    def until(self, ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """For requests: read replies until ``ready``; False if that takes over ``timeout``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._state:
            while not ready():
                if self._failure:
                    raise self._failure()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                if self._reading:
                    self._state.wait(left)
                else:
                    self._read(left)
        return True

    # In

    def _read(self, left: float | None) -> None:
        """Wait for something to read, the state unlocked meanwhile, and take it."""
        self._reading = True
        try:
            self._state.release()
            try:
                self._poll(select.POLLIN, left)
            finally:
                self._state.acquire()
        finally:
            self._reading = False
            self._state.notify_all()
        self._take()

    def _poll(self, events: int, left: float | None = None) -> None:
        poll = select.poll()
        poll.register(self._socket, events)
        poll.poll(None if left is None else math.ceil(left * 1000))

    def _take(self) -> None:
        """Take what there is to read. The state is locked."""
        if self._failure:
            return
        try:
            data = self._socket.recv(CHUNK)
            if not data:
                self._lose(_gone)
            for body in self._splitter.feed(data):
                self._deliver(frames.read_reply(body))
        except BlockingIOError:
            pass
        except OSError:
            self._lose(_gone)
        except ProtocolError as error:
            self._lose(_broken(error))
        except BaseException:  # Ctrl-C: some of the stream may be lost
            self._lose(lambda: ProtocolError("the connection to chaosd was interrupted"))
            raise

    def _deliver(self, reply: frames.Reply) -> None:
        if reply.ident == 0:  # of no request: the daemon is about to hang up
            self._lose(lambda: restore(reply.value))
            return
        pending = self._pending.get(reply.ident)
        if pending is None:
            raise ProtocolError(f"a reply to {reply.ident}, which is no request")
        if pending.take(reply):
            del self._pending[reply.ident]

    def _lose(self, failure: Callable[[], ChaosError]) -> None:
        """Have all requests that are not answered fail; the state is locked."""
        if self._failure is None:
            self._failure = failure
            self._pending.clear()
            with contextlib.suppress(OSError):  # if it is down already
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes who polls it
            self._state.notify_all()

    # Out

    def _send(self, data: bytes) -> None:
        with self._sending:
            left = memoryview(data)
            try:
                while left:
                    try:
                        left = left[self._socket.send(left) :]
                    except BlockingIOError:
                        self._await_room()
            except OSError:
                with self._state:
                    self._take()  # it may have said why
                    self._lose(_gone)
            except BaseException:  # Ctrl-C: half a frame may have gone out
                with self._state:
                    self._lose(lambda: ProtocolError("the connection to chaosd was interrupted"))
                raise

    def _await_room(self) -> None:
        """Wait until more can be sent, and read meanwhile if nobody else does."""
        with self._state:
            reading = self._reading
        self._poll(select.POLLOUT if reading else select.POLLOUT | select.POLLIN)
        with self._state:
            if not self._reading:
                self._take()


def _connect(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        if isinstance(error, PermissionError):
            raise PermissionDenied(
                f"{path}: {error.strerror}", hint="be root, or a member of the group chaos"
            ) from error
        raise NoDaemon(
            f"no chaosd answers on {path}: {error.strerror or error}", hint="start chaosd"
        ) from error
    connection.setblocking(False)
    return connection


def _gone() -> ChaosError:
    return ProtocolError(
        "the daemon went away before it answered", hint="chaos list shows what became of it"
    )


def _broken(error: ProtocolError) -> Callable[[], ChaosError]:
    message = f"chaosd sends {error.message}"
    return lambda: ProtocolError(message, hint="is it of another release? restart it")

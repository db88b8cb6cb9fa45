"""The socket: connections, their frames and descriptors, and the bounds on all of them."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections import deque
from typing import TYPE_CHECKING, Any

from chaos import frames
from chaos.daemon.rights import Peer, peer_of
from chaos.daemon.wanted import NotHere
from chaos.faults import describe
from xenctypes.errors import BusError, ChaosError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from chaos.daemon.calls import Calls
    from chaos.daemon.core import Daemon

SOCKET = "/run/chaos/chaosd.sock"
CHUNK = 1 << 16
NOBODY = -1
FDS_MAX = 4
"""Descriptors that come with one message: a command's streams and its directory."""
BACKLOG_MAX = 4 << 20
"""Bytes that may wait for a client that does not read; with more it is cut off."""
BACKLOG_HIGH = 1 << 18
"""Bytes above which streams to a client pause."""
BRIEF = frozenset(["cancel", "signal"])
"""Methods that never wait, and that may be what makes room for others."""
CLOSE_SECONDS = 30.0
"""How long requests may take to be taken back at the end."""


class Connection:
    """One client. ``running`` are its requests in flight by id, ``attached`` its consoles.

    A request with the id 0 goes by a negative one here: nothing is replied to it.
    """

    def __init__(self, server: Server, sock: socket.socket, peer: Peer) -> None:
        self.server = server
        self.sock = sock
        self.peer = peer
        self.running: dict[int, asyncio.Task[None]] = {}
        self.cancels: dict[int, Any] = {}
        self.attached: dict[int, Any] = {}
        self.fds: list[int] = []
        self.closed = False
        self._splitter = frames.Splitter()
        self._silent = 0
        self._backlog: deque[bytes] = deque()
        self._waiting = 0
        self._drained = asyncio.Event()
        self._drained.set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)

    # In

    def _readable(self) -> None:
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(
                CHUNK, socket.CMSG_SPACE(FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, ancillary, flags = b"", [], 0
        self._keep(ancillary)
        if not data or flags & socket.MSG_CTRUNC or len(self.fds) > FDS_MAX:
            self.close()
            return
        try:
            for body in self._splitter.feed(data):
                self._take(frames.read_request(body))
                if self.closed:
                    return
        except ProtocolError as error:
            self.reply(0, frames.ERROR, describe(error))
            self.server.daemon.log(f"client {self.peer.pid}: {error}: closed")
            self.close()

    def _keep(self, ancillary: list[Any]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self.fds += fds

    def take_fds(self, count: int) -> list[int]:
        """The descriptors that came with a request, which are the caller's now. ProtocolError."""
        fds, self.fds = self.fds, []
        if len(fds) != count:
            for fd in fds:
                os.close(fd)
            raise ProtocolError(f"the request comes with {len(fds)} descriptors, not {count}")
        return fds

    def _take(self, request: frames.Request) -> None:
        if not request.ident:
            self._silent -= 1
            request = request._replace(ident=self._silent)
        ident = request.ident
        if ident in self.running:
            raise ProtocolError(f"request {ident} is still in flight")
        full = len(self.running) >= self.server.daemon.settings.requests
        if full and request.method not in BRIEF:
            self.reply(
                ident,
                frames.ERROR,
                describe(
                    ProtocolError(
                        f"more than {self.server.daemon.settings.requests} requests in flight",
                        hint="wait for replies",
                    )
                ),
            )
            return
        try:
            work = self.server.calls.dispatch(self, request)
        except Exception as error:  # noqa: BLE001 - one request's failure is its own
            self.fail(ident, error)
            return
        finally:
            self._drop_fds()
        if work is not None:
            task = self.running[ident] = self._loop.create_task(self._run(ident, work))
            self.server.tasks.add(task)
            task.add_done_callback(self.server.tasks.discard)

    def cancel(self, ident: int) -> None:
        """End a request, whose reply says so; one that is answered already is fine."""
        if ident in self.cancels:
            self.cancels[ident](None)
        elif ident in self.running:
            self.running[ident].cancel()

    def _drop_fds(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    async def _run(self, ident: int, work: Coroutine[Any, Any, Any]) -> None:
        try:
            value = await work
        except asyncio.CancelledError:
            self.fail(ident, ProtocolError("cancelled"))
        except NotHere:
            pass  # answered: the client does it itself
        except Exception as error:  # noqa: BLE001 - one request's failure is its own
            self.fail(ident, error)
        else:
            self.reply(ident, frames.OK, value)
        finally:
            self.running.pop(ident, None)
            self.cancels.pop(ident, None)

    # Out

    def fail(self, ident: int, error: Exception) -> None:
        """Answer with an error."""
        if not isinstance(error, (ChaosError, OSError)):
            self.server.daemon.log(f"a bug: {error!r}")
        self.reply(ident, frames.ERROR, describe(error))

    def reply(self, ident: int, kind: int, value: Any) -> None:
        """Send, or keep for later; a client that does not read is cut off."""
        if self.closed or ident < 0:
            return
        try:
            data = frames.pack_reply(ident, kind, value)
        except ProtocolError as error:
            data = frames.pack_reply(ident, frames.ERROR, describe(error))
        if not self._backlog:
            try:
                data = data[self.sock.send(data) :]
            except BlockingIOError:
                pass
            except OSError:
                self.close()
                return
            if not data:
                return
            self._loop.add_writer(self.sock.fileno(), self._writable)
        self._backlog.append(data)
        self._waiting += len(data)
        if self._waiting > BACKLOG_HIGH:
            self._drained.clear()
        if self._waiting > BACKLOG_MAX:
            self.server.daemon.log(f"client {self.peer.pid} does not read: cut off")
            self.close()

    def _writable(self) -> None:
        try:
            while self._backlog:
                data = self._backlog[0]
                sent = self.sock.send(data)
                self._waiting -= sent
                if sent < len(data):
                    self._backlog[0] = data[sent:]
                    break
                self._backlog.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if not self._backlog:
            self._loop.remove_writer(self.sock.fileno())
        if self._waiting <= BACKLOG_HIGH:
            self._drained.set()

    async def room(self) -> None:
        """Wait until a stream to this client may go on."""
        await self._drained.wait()

    def close(self) -> None:
        """Close, and cancel what was asked. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self.sock.fileno())
        self._loop.remove_writer(self.sock.fileno())
        self._drained.set()
        self._drop_fds()
        for cancel in list(self.cancels.values()):
            cancel(None)
        for ident, task in list(self.running.items()):
            if ident not in self.cancels:
                task.cancel()
        self.sock.close()
        self.server.connections.discard(self)


class Server:
    """The listening socket and its connections."""

    def __init__(self, daemon: Daemon, calls: Calls, listener: socket.socket, gid: int) -> None:
        self.daemon = daemon
        self.calls = calls
        self.listener = listener
        self.gid = gid
        self.connections: set[Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        listener.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self.daemon.log(f"accept: {error.strerror}")
            return
        sock.setblocking(False)
        peer = peer_of(sock)
        if not self._admitted(peer):
            self.daemon.log(f"process {peer.pid} of user {peer.uid} refused")
            sock.close()
            return
        if len(self.connections) >= self.daemon.settings.clients:
            full = ProtocolError(
                f"more than {self.daemon.settings.clients} clients are connected", hint="try again"
            )
            with contextlib.suppress(OSError):
                sock.send(frames.pack_reply(0, frames.ERROR, describe(full)))
            sock.close()
            return
        self.connections.add(Connection(self, sock, peer))

    def _admitted(self, peer: Peer) -> bool:
        """Root, and the members of the group; whatever the mode of the socket says by now."""
        if peer.uid in {0, os.geteuid()}:
            return True
        return self.gid != NOBODY and self.gid in (peer.gid, *peer.groups)

    async def close(self) -> None:
        """Stop listening, drop every client, and wait for what they asked to be taken back."""
        self._loop.remove_reader(self.listener.fileno())
        self.listener.close()
        for connection in list(self.connections):
            connection.close()
        if self.tasks:
            _, late = await asyncio.wait(self.tasks, timeout=CLOSE_SECONDS)
            if late:
                self.daemon.log(f"{len(late)} requests did not end within {CLOSE_SECONDS:.0f} s")


def listen(path: str, group: str) -> tuple[socket.socket, int]:
    """The listening socket, and the gid that may use it, or NOBODY. BusError, OSError."""
    import grp

    try:
        gid = grp.getgrnam(group).gr_gid if group else NOBODY
    except KeyError:
        gid = NOBODY  # without the group the socket is root's alone
    os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = f"{path}.{os.getpid()}"
    mask = os.umask(0o177)
    try:
        listener.bind(temporary)
    except OSError as error:
        raise BusError(f"{path}: {error.strerror}") from error
    finally:
        os.umask(mask)
    os.chown(temporary, -1, gid)
    os.chmod(temporary, 0o600 if gid == NOBODY else 0o660)
    listener.listen(512)
    os.rename(temporary, path)
    return listener, gid

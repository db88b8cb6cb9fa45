"""A chaosd without Xen: its real socket, connections, commands and threads, for their tests."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any, Self

from chaos import frames
from chaos.daemon import core
from chaos.daemon.calls import Calls
from chaos.daemon.server import Server, listen
from chaos.daemon.settings import Settings
from chaos.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

PATIENCE = 30.0


class Daemon(core.Daemon):
    """The daemon itself, which has taken over no host; what it logs is in ``lines``."""

    def __init__(self, path: Path, **settings: Any) -> None:
        super().__init__(Settings(**settings), Registry(str(path / "run")))
        self.names.prepare()
        self.lines: list[str] = []

    def log(self, message: str) -> None:
        self.lines.append(message)

    async def end(self) -> None:
        """End its threads."""
        await self._end_threads()


class Lab:
    """A daemon that serves, and its clients."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path = str(path / "sock")
        self.daemon = Daemon(path, **settings)
        self.server = Server(self.daemon, Calls(self.daemon), *listen(self.path, ""))

    async def client(self) -> Client:
        """One that has connected."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        await self.daemon.loop.sock_connect(sock, self.path)
        return Client(sock)


class Client:
    """A client, which says what it likes and reads when it likes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self._splitter = frames.Splitter()
        self._replies: list[frames.Reply] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    async def send(self, data: bytes) -> None:
        await asyncio.wait_for(self._loop.sock_sendall(self.sock, data), PATIENCE)

    async def ask(self, ident: int, method: str, **params: Any) -> None:
        await self.send(frames.pack_request(ident, method, params))

    async def run(
        self,
        ident: int,
        *argv: str,
        fds: tuple[int, int, int],
        cwd: str = "/",
        said: str = "",
        more: bytes = b"",
    ) -> None:
        """Have a command run with these standard streams; ``more`` is sent in the same moment.

        ``said`` is where it says to be, if not where it is.
        """
        words = [word.encode() for word in argv]
        request = {"argv": words, "cwd": (said or cwd).encode(), "env": {}}
        data = frames.pack_request(ident, "run", request)
        directory = os.open(cwd, os.O_PATH)
        try:
            control = array.array("i", [*fds, directory])
            self.sock.sendmsg([data + more], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, control)])
        finally:
            os.close(directory)

    async def reply(self) -> frames.Reply | None:
        """The next reply, None at the end of the connection."""
        while not self._replies:
            try:
                data = await asyncio.wait_for(self._loop.sock_recv(self.sock, 65536), PATIENCE)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._replies += [frames.read_reply(body) for body in self._splitter.feed(data)]
        return self._replies.pop(0)


async def holds(condition: Callable[[], Any]) -> None:
    """Wait until a condition holds that no event tells of."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not condition():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0)


def run(path: Path, story: Callable[[Lab], Awaitable[None]], **settings: Any) -> None:
    """Tell a story with a daemon in it."""

    async def tell() -> None:
        lab = Lab(path, **settings)
        try:
            await story(lab)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(lab.path)
            if lab.server.listener.fileno() >= 0:
                await lab.server.close()
            if not lab.daemon.stuck:
                await lab.daemon.end()

    asyncio.run(tell())

"""A chaosd without Xen: its real socket, connections, commands and threads, for their tests."""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

from chaos import frames
from chaos.daemon.calls import Calls
from chaos.daemon.events import Events
from chaos.daemon.server import Server, listen
from chaos.daemon.settings import Settings
from chaos.daemon.wanted import Reader

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

PATIENCE = 30.0


class Daemon:
    """What connections and commands need of a daemon."""

    def __init__(self, **settings: Any) -> None:
        self.loop = asyncio.get_running_loop()
        self.settings = Settings(**settings)
        self.events = Events()
        self.reader = Reader()
        self.host = SimpleNamespace()
        self.names = SimpleNamespace()
        self.lines: list[str] = []
        self._threads = ThreadPoolExecutor(4, "verb")

    def log(self, line: str) -> None:
        self.lines.append(line)

    async def in_verb_thread(self, function: Callable[[Any, Any], Any]) -> Any:
        return await self.loop.run_in_executor(self._threads, function, self.host, self.names)

    in_thread = in_wait_thread = in_verb_thread


class Lab:
    """A daemon that serves, and its clients."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path = str(path / "sock")
        self.daemon: Any = Daemon(**settings)
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

    async def run(self, ident: int, *argv: str, fds: tuple[int, int, int], cwd: str = "/") -> None:
        """Have a command run with these standard streams."""
        words = [word.encode() for word in argv]
        request = {"argv": words, "cwd": cwd.encode(), "env": {}}
        data = frames.pack_request(ident, "run", request)
        directory = os.open("/", os.O_PATH)
        try:
            control = array.array("i", [*fds, directory])
            self.sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, control)])
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

    asyncio.run(tell())

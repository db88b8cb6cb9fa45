"""Guests for a console hub, on pages and channels of our own making."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from struct import pack_into, unpack_from
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from chaos.console import IN_SIZE, INDEXES_AT, OUT_AT, OUT_SIZE
from chaos.consolelog import ConsoleLog
from chaos.daemon.consoles import ConsoleHub
from xenctypes.errors import CallFailed
from xenctypes.public import EVTCHNSTAT_closed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chaos.daemon.attachment import Attachment

PATIENCE = 20.0


class Channels:
    """Event channels as the device has them: an event is a bit, masked once it was taken."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.ports: dict[int, tuple[int, int]] = {}
        self.pending: dict[int, None] = {}
        self.masked: set[int] = set()
        self.notified: dict[int, int] = {}
        self.refuse = False
        self.last = 100

    def bind_interdomain(self, domid: int, remote_port: int) -> int:
        if self.refuse or (domid, remote_port) in self.ports.values():
            raise CallFailed("xenevtchn_bind_interdomain", errno.EINVAL)
        self.last += 1
        self.ports[self.last] = (domid, remote_port)
        self.event(self.last)
        return self.last

    def unbind(self, port: int) -> None:
        del self.ports[port]
        self.masked.discard(port)

    def notify(self, port: int) -> None:
        self.notified[port] = self.notified.get(port, 0) + 1

    def event(self, port: int) -> None:
        self.pending[port] = None
        if port not in self.masked:
            os.eventfd_write(self.fd, 1)

    def take(self, limit: int) -> list[int]:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return []
        ready = [port for port in self.pending if port not in self.masked]
        for port in ready[:limit]:
            del self.pending[port]
            self.masked.add(port)
        if ready[limit:]:
            os.eventfd_write(self.fd, 1)
        return ready[:limit]

    def unmask(self, port: int) -> None:
        self.masked.discard(port)
        if port in self.pending:
            os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        os.close(self.fd)


class Lab:
    """A hub, and guests that write their rings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.channels = Channels()
        self.pages: dict[int, bytearray] = {}
        self.mapped: set[int] = set()
        self.reports: list[str] = []
        self.status = EVTCHNSTAT_closed
        host = SimpleNamespace(
            memory=SimpleNamespace(map=self._map),
            ctrl=SimpleNamespace(
                evtchn_status=lambda domid, port: SimpleNamespace(status=self.status)
            ),
        )
        self.hub = ConsoleHub(
            host, evtchn=self.channels, report=self.reports.append, path=str(path)
        )  # type: ignore[arg-type]

    def _map(self, domid: int, frames: list[int]) -> Any:
        page = self.pages.setdefault(domid, bytearray(4096))
        self.mapped.add(domid)
        return SimpleNamespace(view=memoryview(page), close=lambda: self.mapped.discard(domid))

    def guest(self, name: str, domid: int) -> Guest:
        directory = self.path / name
        directory.mkdir(exist_ok=True)
        self.hub.add(name, name, domid, 7, 2, str(directory))
        return Guest(self, name, domid, ConsoleLog(str(directory)))


class Guest:
    def __init__(self, lab: Lab, name: str, domid: int, log: ConsoleLog) -> None:
        self.lab, self.name, self.domid, self.log = lab, name, domid, log
        self.page = lab.pages[domid]

    def kick(self) -> None:
        for port, (domid, _) in self.lab.channels.ports.items():
            if domid == self.domid:
                self.lab.channels.event(port)

    def room(self) -> int:
        _, _, cons, prod = unpack_from("@4I", self.page, INDEXES_AT)
        return OUT_SIZE - int((prod - cons) & 0xFFFFFFFF)

    def say(self, text: bytes) -> int:
        """Write what there is room for."""
        _, _, _, prod = unpack_from("@4I", self.page, INDEXES_AT)
        text = text[: self.room()]
        for byte in text:
            self.page[OUT_AT + prod % OUT_SIZE] = byte
            prod = (prod + 1) & 0xFFFFFFFF
        pack_into("@I", self.page, INDEXES_AT + 12, prod)
        self.kick()
        return len(text)

    def hear(self) -> bytes:
        cons, prod = unpack_from("@2I", self.page, INDEXES_AT)
        said = bytes(self.page[at % IN_SIZE] for at in range(cons, prod))
        if said:
            pack_into("@I", self.page, INDEXES_AT, prod)
            self.kick()
        return said

    async def logged(self, text: bytes) -> None:
        await holds(lambda: text in self.log.read())


def run(path: Path, story: Any) -> Lab:
    """Tell a story to a hub; afterwards nothing is mapped or bound any more."""

    async def tell() -> Lab:
        lab = Lab(path)
        try:
            await asyncio.wait_for(story(lab), PATIENCE)
        finally:
            lab.hub.close()
            lab.hub.close()
        assert not lab.mapped
        assert not lab.channels.ports
        return lab

    return asyncio.run(tell())


async def holds(condition: Callable[[], object]) -> None:
    """Let the hub work until ``condition`` holds: nothing tells of what it looks at."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def until(attachment: Attachment, text: bytes) -> bytes:
    said = b""
    while text not in said:
        part = await attachment.read()
        assert part, said
        said += part
    return said

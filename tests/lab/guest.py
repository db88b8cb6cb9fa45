"""Guests made in the test's own process, and what is asked of them over the network."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import struct
import subprocess
import time
from typing import TYPE_CHECKING, Any

import command
from waiting import wait_for

from chaos import config as configuration
from chaos.builder import Builder
from chaos.create import UNPAUSED_STEPS, Creation, wait_ready
from chaos.devicepage import DevicePage
from chaos.host import Host
from chaos.registry import Registry
from noxs.page import write_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from noxs.page import GuestWords

PATIENCE = 60.0
SHUTDOWN_POWEROFF, SHUTDOWN_REBOOT, SHUTDOWN_CRASH = 0, 1, 3
DAYTIME = re.compile(rb"\w+, \w+ \d+, \d{4} \d\d:\d\d:\d\d-UTC\r\n")


class Guest:
    """A guest made in this process, so that its page and its doorbell are at hand."""

    def __init__(self, creation: Creation) -> None:
        self.creation = creation
        self.host = creation.host
        self.name = creation.config.name
        self.mapping = self.host.memory.map(creation.domid, creation.page_frames)
        self.page: memoryview = self.mapping.view
        self.seq = 0

    def close(self) -> None:
        self.mapping.close()
        assert self.creation.undo() == []
        self.creation.close()

    def unpause(self) -> None:
        self.host.ctrl.domain_unpause(self.creation.domid)
        self.creation.unpaused_ns = time.perf_counter_ns()

    def words(self) -> GuestWords:
        assert isinstance(self.creation.page, DevicePage)
        return self.creation.page.words()

    def ask(self, code: int, argument: int = 0) -> GuestWords:
        """Send a request and wait until it is acknowledged."""
        self.seq += 1
        write_request(self.page, self.seq, code, argument)
        self.host.evtchn.notify(self.creation.store_local)
        while self.words().ack != self.seq:
            assert self.host.evtchn.wait(self.creation.store_local, PATIENCE), self.words()
        return self.words()

    def info(self) -> Any:
        (info,) = [d for d in self.host.ctrl.domain_list() if d.domid == self.creation.domid]
        return info

    def died(self) -> int | None:
        wait_for(lambda: self.info().shutdown, f"{self.name} does not die")
        reason: int | None = self.info().shutdown_reason
        return reason

    def said(self) -> str:
        return command.chaos("console", self.name, stdin=subprocess.DEVNULL).stdout


@contextlib.contextmanager
def making() -> Iterator[Callable[..., Guest]]:
    """A function that makes guests, for the length of a block."""
    made: list[Guest] = []
    with Host() as host, Builder() as builder:

        def create(
            kernel: str, extra: str = "", *overrides: str, name: str = "", paused: bool = False
        ) -> Guest:
            settings = [
                f'name="{name or kernel}"',
                f'kernel="guests/build/{kernel}.elf"',
                f'extra="{extra}"',
                *overrides,
            ]
            loaded = configuration.load("examples/hello.cfg", settings)[0]
            creation = Creation(loaded, host, builder, Registry()).run(UNPAUSED_STEPS)
            guest = Guest(creation)
            made.append(guest)
            if not paused:
                guest.unpause()
            return guest

        yield create
        failures = []
        for guest in made:
            try:
                guest.close()
            except Exception as error:  # noqa: BLE001 - the others must go as well
                failures.append(error)
        assert not failures


def ready(guest: Guest) -> Guest:
    assert wait_ready(guest.creation, PATIENCE) is not None, guest.said()
    return guest


def read_console(
    name: str, until: bytes, typing: bytes = b"", *, toolstack: Callable[..., Any] = command.start
) -> bytes:
    """Attach, type, and read until something was said; all that was said."""
    reader = toolstack("console", name, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert reader.stdin
    assert reader.stdout
    said = b""
    try:
        reader.stdin.write(typing)
        reader.stdin.flush()
        while until not in said:
            assert select.select([reader.stdout], [], [], PATIENCE)[0], said[-200:]
            part = os.read(reader.stdout.fileno(), 65536)
            assert part, said[-200:]
            said += part
    finally:
        reader.kill()
        reader.wait()
    return said


def vif(last: int, *more: str) -> str:
    return ",".join(("bridge=xenbr0", f"ip=10.77.0.{last}/24", *more))


def vifs(*texts: str) -> str:
    return f"vif=[{', '.join(repr(text) for text in texts)}]"


@contextlib.contextmanager
def pinging(address: str) -> Iterator[None]:
    """Ping a guest for the length of a block: nothing may be lost."""
    words = ["ping", "-q", "-i", "0.1", address]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            said = process.communicate()[0]
    sent, received = map(int, re.findall(r"(\d+) (?:packets transmitted|received)", said))
    assert received >= max(1, sent - 1), said  # the last may have been under way


def ask_tcp(address: str) -> bytes:
    with socket.create_connection((address, 13), PATIENCE) as connection:
        connection.settimeout(PATIENCE)
        text = b""
        while part := connection.recv(4096):
            text += part
    return text


def end_of_image(image: bytes) -> int:
    """Where the last loaded segment of a 64-bit ELF image ends, from the start of memory."""
    table, size, count = (
        struct.unpack_from(f, image, at)[0] for f, at in (("<Q", 32), ("<H", 54), ("<H", 56))
    )
    rows = [struct.unpack_from("<IIQQQQQQ", image, table + size * row) for row in range(count)]
    return max(paddr + memsz for kind, _, _, _, paddr, _, memsz, _ in rows if kind == 1)

"""The console hub on the real hypervisor: what guests say is kept, and floods are paid for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import select
import socket
import subprocess
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command import chaos
from daemons import end, ensure_bus, start
from waiting import wait_for

from chaos import config as configuration
from chaos import frames
from chaos.builder import Builder
from chaos.console import Console
from chaos.consolelog import ConsoleLog
from chaos.create import UNPAUSED_STEPS, Creation
from chaos.daemon.consoles import SHARE, ConsoleHub
from chaos.host import Host
from chaos.registry import Registry
from xenctypes.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from chaos.daemon.attachment import Attachment

PATIENCE = 60.0
CHAOSD = "/run/chaos/chaosd.sock"


class Guests:
    """A hub, and guests made paused in this process, so that nothing is said unheard."""

    def __init__(self, host: Host, builder: Builder) -> None:
        self.host, self.builder = host, builder
        self.hub = ConsoleHub(host)
        self.made: list[Creation] = []

    def make(self, kernel: str, extra: str = "", *, name: str = "") -> Creation:
        settings = [
            f'name="{name or kernel}"',
            f'kernel="guests/build/{kernel}.elf"',
            f'extra="{extra}"',
            'on_poweroff="preserve"',
        ]
        loaded = configuration.load("examples/hello.cfg", settings)[0]
        creation = Creation(loaded, self.host, self.builder, Registry()).run(UNPAUSED_STEPS)
        self.made.append(creation)
        return creation

    def start(self, kernel: str, extra: str = "", *, name: str = "") -> Creation:
        creation = self.make(kernel, extra, name=name)
        self.add(creation)
        self.host.ctrl.domain_unpause(creation.domid)
        return creation

    def add(self, creation: Creation) -> None:
        record = creation.record
        assert record is not None
        self.hub.add(
            record.uuid,
            record.name,
            record.domid,
            record.console_frame,
            record.console_port,
            directory(creation),
        )

    def destroy(self, creation: Creation) -> None:
        self.host.ctrl.domain_destroy(creation.domid)
        creation.domid = -1  # what is left is for end()

    def end(self) -> None:
        self.hub.close()
        for creation in self.made:
            assert creation.undo() == []
            creation.close()


def directory(creation: Creation) -> str:
    return f"{Registry().path}/domains/{creation.uuid}"


def log(creation: Creation) -> bytes:
    return ConsoleLog(directory(creation)).read()


@pytest.fixture
def tell() -> Iterator[Callable[..., Any]]:
    """Runs a story with a hub; at its end every guest is gone, none kept by a mapping of ours."""
    with Host() as host, Builder() as builder:
        before = {info.domid for info in host.ctrl.domain_list()}

        def run(story: Callable[[Guests], Awaitable[Any]]) -> Any:
            async def told() -> Any:
                guests = Guests(host, builder)
                try:
                    return await asyncio.wait_for(story(guests), 2 * PATIENCE)
                finally:
                    guests.end()

            return asyncio.run(told())

        yield run
        wait_for(
            lambda: {info.domid for info in host.ctrl.domain_list()} <= before,
            "a domain does not go",
            PATIENCE,
        )


async def holds(condition: Callable[[], object], what: str) -> None:
    """Let the hub work until ``condition`` holds: nothing tells of what it looks at."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.01)


async def hear(attachment: Attachment, text: bytes) -> bytes:
    said = b""
    while text not in said:
        part = await asyncio.wait_for(attachment.read(), PATIENCE)
        assert part, said
        said += part
    return said


@pytest.mark.every_release
@pytest.mark.anyhost
def test_what_is_said_is_logged_and_what_is_typed_arrives(tell: Callable[..., Any]) -> None:
    async def story(guests: Guests) -> None:
        hello = guests.start("hello", "echo")
        await holds(lambda: b"Hello, world!" in log(hello), "nothing was logged")
        uuid = str(hello.uuid)
        first, second = guests.hub.attach(uuid), guests.hub.attach(uuid)
        assert first.history == second.history == log(hello)
        for sender in (first, second):
            text = os.urandom(2000).hex().encode()  # more than the ring holds
            await sender.send(text)
            heard = b"".join([await hear(first, text[-8:])])
            assert heard == text
            assert await hear(second, text[-8:]) == text
        assert log(hello).endswith(text)

    tell(story)


@pytest.mark.parametrize("manner", ["", "bell", "mad"])
def test_a_flooding_guest_costs_a_bounded_share(tell: Callable[..., Any], manner: str) -> None:
    async def story(guests: Guests) -> tuple[float, list[float]]:
        quiet = guests.start("hello", "echo")
        floods = [guests.start("chatty", manner, name=f"chatty-{n}") for n in range(2)]
        attachment = guests.hub.attach(str(quiet.uuid))
        for flood in floods:
            await holds(lambda f=flood: b"here I come" in log(f), "it does not flood")
        wall, cpu = time.monotonic(), guests.hub.spent
        delays = []
        while time.monotonic() - wall < 4:
            asked = time.monotonic()
            await attachment.send(b"%d;" % len(delays))
            await hear(attachment, b"%d;" % len(delays))
            delays.append(time.monotonic() - asked)
            await asyncio.sleep(0.2)
        share = (guests.hub.spent - cpu) / (time.monotonic() - wall)
        for flood in floods:
            sizes = [os.stat(entry).st_size for entry in os.scandir(directory(flood))]
            assert sum(sizes) < 300 * 1024
        return share, delays

    share, delays = tell(story)
    print(f"{manner}: {share:.2f} of a processor, {max(delays):.3f} s")  # noqa: T201 - measured
    # The last rest may lie behind the end; what Xen takes in a turn counts as ours. Unbounded: 1.
    assert share < 2 * SHARE
    assert max(delays) < 2


@pytest.mark.every_release
@pytest.mark.anyhost
def test_last_words_are_kept_and_the_dead_can_go(tell: Callable[..., Any]) -> None:
    async def story(guests: Guests) -> None:
        hello = guests.make("hello", "poweroff")
        guests.add(hello)
        uuid = str(hello.uuid)
        attachment = guests.hub.attach(uuid)
        guests.host.ctrl.domain_unpause(hello.domid)
        # Without the loop: the hub has no chance to drain before the end.
        deadline = time.monotonic() + PATIENCE
        while not guests.host.ctrl.domain_info(hello.domid).shutdown:  # type: ignore[union-attr]
            assert time.monotonic() < deadline
        guests.hub.remove(uuid)
        guests.hub.remove(uuid)
        assert b"Hello, world!" in log(hello)
        assert b"Hello, world!" in await attachment.read()
        assert await attachment.read() == b""
        assert attachment.ending == "dead"
        # What comes again: the same, dead already.
        guests.add(hello)
        guests.hub.remove(uuid)
        # One that is destroyed under the hub goes once the hub lets go.
        gone = guests.start("hello", "", name="gone")
        guests.destroy(gone)
        guests.hub.remove(str(gone.uuid))

    tell(story)


def test_a_console_has_one_consumer(tell: Callable[..., Any]) -> None:
    async def story(guests: Guests) -> None:
        hello = guests.make("hello", "echo")
        assert hello.record is not None
        hello.entry.close()  # type: ignore[union-attr] # others may look at it now
        uuid = str(hello.uuid)
        with Console(guests.host, Registry(), hello.record):
            guests.add(hello)
            with pytest.raises(StateError, match="attached elsewhere"):
                guests.hub.attach(uuid)
        guests.host.ctrl.domain_unpause(hello.domid)
        await holds(lambda: b"Hello, world!" in log(hello), "the hub does not take over")
        with pytest.raises(StateError, match="attached elsewhere"):
            Console(guests.host, Registry(), hello.record)
        # logs reads beside the hub, and follows until death.
        said = await asyncio.to_thread(chaos, "logs", "--json", "hello")
        assert json.loads(said.stdout)["lines"][0].startswith("Hello, world!")
        follower = await asyncio.create_subprocess_exec(
            "chaos", "logs", "-f", "-n", "0", "hello", stdout=subprocess.PIPE
        )
        attachment = guests.hub.attach(uuid)
        assert follower.stdout is not None
        typing = asyncio.ensure_future(_type(attachment))
        assert await asyncio.wait_for(follower.stdout.read(4), PATIENCE) in b"\\x07\\x07\\x07"
        typing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await typing
        guests.hub.remove(uuid)
        guests.destroy(hello)
        await asyncio.wait_for(follower.communicate(), PATIENCE)
        assert follower.returncode == 0

    tell(story)


async def _type(attachment: Attachment) -> None:
    """Ring the guest's bell until it is heard."""
    while True:
        await attachment.send(b"\x07")
        await asyncio.sleep(0.1)


def test_logs_without_a_daemon() -> None:
    chaos("create", "-q", "examples/hello.cfg", 'extra="lines=5"')
    try:
        follower = subprocess.Popen(
            ["chaos", "logs", "-f", "hello"], stdout=subprocess.PIPE, text=True
        )
        assert follower.stdout is not None
        assert "Hello" in follower.stdout.readline()
        for number in range(1, 6):
            assert follower.stdout.readline() == f"line {number}\n"
        assert chaos("logs", "-n", "2", "hello").stdout == "line 4\r\nline 5\r\n"
    finally:
        chaos("destroy", "hello")
    assert follower.wait(PATIENCE) == 0
    assert 'no domain "hello"' in chaos("logs", "hello", check=False).stderr


class Client:
    """What a thin client does: a command's arguments and descriptors, to chaosd."""

    def __init__(self, *argv: str, stdin: int, stdout: int) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(CHAOSD)
        here = os.open(".", os.O_PATH)
        params = {"argv": [word.encode() for word in argv], "cwd": b"/", "env": {}}
        frame = frames.pack_request(1, "run", params)
        socket.send_fds(self.sock, [frame], [stdin, stdout, 2, here])
        os.close(here)

    def status(self) -> Any:
        self.sock.settimeout(PATIENCE)
        data = b""
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
            part = self.sock.recv(4096)
            assert part
            data += part
        return frames.read_reply(data[4:])

    def close(self) -> None:
        self.sock.close()


@pytest.fixture
def chaosd() -> Iterator[None]:
    ensure_bus()
    daemon = start("chaosd")
    wait_for(answers, "chaosd does not start")
    yield
    end(daemon.pid)
    daemon.wait()
    assert not Path(CHAOSD).exists()


def answers() -> bool:
    """Whether a chaosd listens; one that was killed leaves its socket's file."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(CHAOSD) == 0


def read_until(fd: int, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        assert select.select([fd], [], [], PATIENCE)[0], seen
        part = os.read(fd, 4096)
        assert part, seen
        seen += part
    return seen


def is_raw(fd: int) -> bool:
    return not termios.tcgetattr(fd)[3] & termios.ICANON


@pytest.mark.every_release
def test_consoles_through_chaosd(chaosd: None) -> None:
    chaos("create", "-q", "examples/hello.cfg", 'extra="echo"')
    ours, theirs = pty.openpty()
    read, write = os.pipe()
    try:
        client = Client("console", "hello", stdin=theirs, stdout=theirs)
        read_until(ours, b"Hello, world!")
        wait_for(lambda: is_raw(theirs), "the terminal is not raw")
        os.write(ours, b"are you there?")
        read_until(ours, b"are you there?")
        refused = chaos("console", "hello", check=False)
        assert 'chaosd holds the console of "hello"' in refused.stderr
        os.write(ours, b"\x1d")
        assert client.status() == (1, frames.OK, 0)
        assert not is_raw(theirs)
        client.close()
        client = Client("console", "hello", stdin=theirs, stdout=theirs)
        wait_for(lambda: is_raw(theirs), "the terminal is not raw")
        client.close()  # as when it is killed
        wait_for(lambda: not is_raw(theirs), "the terminal stays raw")
        follower = Client("logs", "-f", "hello", stdin=theirs, stdout=write)
        read_until(read, b"are you there?")
        assert Client("destroy", "hello", stdin=theirs, stdout=write).status().value == 0
        assert follower.status() == (1, frames.OK, 0)
        follower.close()
    finally:
        chaos("destroy", "hello", check=False)
        for fd in (ours, theirs, read, write):
            os.close(fd)

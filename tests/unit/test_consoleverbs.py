"""console and logs as the daemon serves them: terminals, pipes, and clients that vanish."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import termios
from argparse import ArgumentParser
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from console_guests import Guest, Lab, holds, run

from chaos.consolelog import ConsoleLog
from chaos.invocation import Invocation
from chaos.registry import Record, Registry
from chaos.verbs import console, logs
from xenctypes.errors import StateError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UUID = "01234567-89ab-cdef-0123-456789abcdef"


class Client:
    """A client of the daemon: its descriptors, and what it reads."""

    def __init__(self, lab: Lab, verb: Any, *argv: str, stdin: int = -1, stdout: int = -1) -> None:
        parser = ArgumentParser()
        verb.configure(parser, "")
        self.output, write = os.pipe()
        read, self.keyboard = os.pipe()
        self.fds = [self.output, write, read, self.keyboard]
        names = Registry(str(lab.path / "run"))

        async def find(wanted: str) -> Any:
            if wanted not in {"web", UUID, "1"}:
                raise StateError(f'no domain "{wanted}"')
            return SimpleNamespace(uuid=UUID, name="web", domid=1)

        host: Any = SimpleNamespace(ctrl=SimpleNamespace(domain_info=lambda domid: None))
        self.call = Invocation(
            parser.parse_args([*argv, "web"]),
            host,
            names,
            stdin=os.fdopen(read if stdin < 0 else stdin, closefd=False),
            stdout=os.fdopen(write if stdout < 0 else stdout, "w", closefd=False),
            daemon=SimpleNamespace(find=find, consoles=lab.hub),
        )
        self.verb = asyncio.ensure_future(verb.serve(self.call))

    def close(self) -> None:
        for fd in self.fds:
            with contextlib.suppress(OSError):
                os.close(fd)


def guest(lab: Lab) -> Guest:
    names = Registry(str(lab.path / "run"))
    os.mkdir(names.path)
    record = Record(UUID, "web", domid=1, state="running")
    names.reserve(record).close()
    directory = f"{names.path}/domains/{UUID}"
    lab.hub.add(UUID, "web", 1, 7, 2, directory)
    return Guest(lab, "web", 1, ConsoleLog(directory))


async def read(fd: int, wanted: bytes) -> bytes:
    """Read until ``wanted`` was seen; all that was."""
    seen = b""
    while wanted not in seen:
        part = await asyncio.to_thread(os.read, fd, 65536)
        assert part, seen
        seen += part
    return seen


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    for fd in (ours, theirs):
        with contextlib.suppress(OSError):
            os.close(fd)


def is_raw(fd: int) -> bool:
    return not termios.tcgetattr(fd)[3] & termios.ICANON


def test_a_terminal_is_raw_while_attached(tmp_path: Path, terminal: tuple[int, int]) -> None:
    ours, theirs = terminal

    async def story(lab: Lab) -> None:
        web = guest(lab)
        web.say(b"login: ")
        client = Client(lab, console, stdin=theirs, stdout=theirs)
        await read(ours, b"login: ")
        await holds(lambda: is_raw(theirs))
        os.write(ours, b"root\r")
        heard = b""

        def hear() -> bool:
            nonlocal heard
            heard += web.hear()
            return heard == b"root\r"

        await holds(hear)
        web.say(b"# ")
        await read(ours, b"# ")
        os.write(ours, b"\x1d")
        assert await client.verb == 0
        assert not is_raw(theirs)
        client.close()

    run(tmp_path, story)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_client_that_vanishes_leaves_its_terminal_as_it_was(
    tmp_path: Path, terminal: tuple[int, int], stopped: bool
) -> None:
    _ours, theirs = terminal

    async def story(lab: Lab) -> None:
        web = guest(lab)
        web.say(b"hello\n")
        client = Client(lab, console, stdin=theirs, stdout=theirs)
        await holds(lambda: is_raw(theirs))
        if stopped:
            termios.tcflow(theirs, termios.TCOOFF)  # Ctrl-S: nothing is written any more
            for number in range(200):
                text = b"%03d\n" % number
                web.say(text * 512)
                await holds(lambda: web.room() == 2048)
        client.verb.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client.verb
        assert not is_raw(theirs)
        web.say(b"still here\n")
        await web.logged(b"still here\n")
        if stopped:
            termios.tcflow(theirs, termios.TCOON)
        client.close()

    run(tmp_path, story)


def test_a_stopped_terminal_hears_ctrl_and_bracket(
    tmp_path: Path, terminal: tuple[int, int]
) -> None:
    ours, theirs = terminal

    async def story(lab: Lab) -> None:
        web = guest(lab)
        client = Client(lab, console, stdin=theirs, stdout=theirs)
        await holds(lambda: is_raw(theirs))
        for number in range(100):  # nobody reads our end
            text = b"%03d\n" % number
            web.say(text * 512)
            await holds(lambda: web.room() == 2048)
        os.write(ours, b"x" * 3000 + b"\x1d")  # nor does the guest
        assert await client.verb == 0
        assert not is_raw(theirs)
        client.close()

    run(tmp_path, story)


def test_a_pipe_s_end_leaves_and_history_is_shown(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        web = guest(lab)
        web.say(b"\x1b[1mhello\n")
        client = Client(lab, console)
        os.write(client.keyboard, b"typed")
        await read(client.output, b"\x1b[1mhello\n")
        os.close(client.keyboard)
        assert await client.verb == 0
        assert web.hear() == b"typed"
        client.close()

    run(tmp_path, story)


def test_files_serve_as_standard_streams(tmp_path: Path) -> None:
    typed = tmp_path / "typed"
    typed.write_bytes(b"input " * 1000)
    shown = tmp_path / "shown"

    async def story(lab: Lab) -> None:
        web = guest(lab)
        web.say(b"hello\n")
        source, sink = os.open(typed, os.O_RDONLY), os.open(shown, os.O_WRONLY | os.O_CREAT)
        client = Client(lab, console, stdin=source, stdout=sink)
        heard = b""

        def hear() -> bool:
            nonlocal heard
            heard += web.hear()
            return heard == typed.read_bytes()

        await holds(hear)
        assert await client.verb == 0
        assert shown.read_bytes() == b"hello\n"
        client.fds += [source, sink]
        client.close()

    run(tmp_path, story)


def test_death_ends_it_with_the_last_words(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        web = guest(lab)
        client, follower = Client(lab, console), Client(lab, logs, "-f")
        web.say(b"one\n")
        await read(client.output, b"one\n")
        web.say(b"farewell")
        lab.hub.remove(UUID)
        assert await client.verb == 0
        assert await follower.verb == 0
        assert await read(client.output, b"farewell") == b"farewell"
        assert await read(follower.output, b"farewell") == b"one\nfarewell"
        late = Client(lab, logs, "-f")
        assert await late.verb == 0
        assert await read(late.output, b"farewell") == b"one\nfarewell"
        kept = Client(lab, console)
        assert await kept.verb == 0
        assert await read(kept.output, b"farewell") == b"one\nfarewell"
        for one in (client, follower, late, kept):
            one.close()

    run(tmp_path, story)


def test_nobody_reads_what_is_written(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        web = guest(lab)
        client = Client(lab, logs, "-f")
        os.close(client.output)
        web.say(b"hello\n")
        with pytest.raises(BrokenPipeError):
            await client.verb
        web.say(b"again\n")
        await web.logged(b"again\n")
        client.close()

    run(tmp_path, story)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ([], b"one\r\n\\x1b[31mtwo\r\nthr"),
        (["--raw"], b"one\r\n\x1b[31mtwo\r\nthr"),
        (["-n", "1"], b"thr"),
        (["-n", "2", "--raw"], b"\x1b[31mtwo\r\nthr"),
        (["-n", "0"], b""),
        (["-f", "--json"], b'{"line": "one"}\n{"line": "\\\\x1b[31mtwo"}\n{"line": "thr"}\n'),
    ],
)
def test_logs_shows_what_is_asked_for(tmp_path: Path, options: list[str], shown: bytes) -> None:
    async def story(lab: Lab) -> None:
        web = guest(lab)
        web.say(b"one\r\n\x1b[31mtwo\r\nthr")
        await web.logged(b"thr")
        lab.hub.remove(UUID)
        client = Client(lab, logs, *options)
        assert await client.verb == 0
        os.write(client.fds[1], b"END")
        assert await read(client.output, b"END") == shown + b"END"
        # The same without a daemon, of a domain that is gone.
        client.call.daemon = None
        assert logs.run(client.call) == 0
        os.write(client.fds[1], b"END")
        assert await read(client.output, b"END") == shown + b"END"
        client.close()

    run(tmp_path, story)


def test_logs_as_a_document(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        web = guest(lab)
        web.say(b"one\r\ntwo\xff\nthree\n")
        await web.logged(b"three")
        client = Client(lab, logs, "--json")
        assert await client.verb == 0
        assert json.loads(await read(client.output, b"]\n}\n")) == {
            "name": "web",
            "domid": 1,
            "uuid": UUID,
            "lines": ["one", "two\\xff", "three"],
        }
        with pytest.raises(UsageError, match="--raw"):
            await Client(lab, logs, "--json", "--raw").verb
        client.close()

    run(tmp_path, story)


def test_no_thread_and_no_descriptor_stays(tmp_path: Path) -> None:
    import threading

    async def story(lab: Lab) -> None:
        web = guest(lab)
        web.say(b"hello\n")
        before: set[str] = set()
        for round_ in range(3):
            client = Client(lab, console)
            await read(client.output, b"hello\n")
            client.verb.cancel()
            with pytest.raises(asyncio.CancelledError):
                await client.verb
            client.close()
            await holds(lambda: not [t for t in threading.enumerate() if "let" in t.name])
            now = set(os.listdir("/proc/self/fd"))
            assert not round_ or now <= before
            before = now

    run(tmp_path, story)

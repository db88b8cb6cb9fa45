"""Commands of clients that do not read what they are told: nobody else waits for them."""

from __future__ import annotations

import asyncio
import os
import pty
import termios
import threading
from typing import TYPE_CHECKING

import pytest
from chaosd_peer import Lab, holds, run

from chaos import frames
from chaos.daemon import streams
from chaos.daemon.streams import Output
from chaos.verbs import info

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chaos.invocation import Invocation

SIGINT = 2
CONFIG = 'name="web"\nmemory=8\nkernel="k.elf"\n'


@pytest.fixture
def null() -> Iterator[int]:
    fd = os.open(os.devnull, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    for fd in (ours, theirs):
        os.close(fd)


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name in {"outlet", "close", "bar"}]


def test_a_stopped_terminal_stops_nobody_else(
    tmp_path: Path, terminal: tuple[int, int], null: int
) -> None:
    _ours, theirs = terminal
    termios.tcflow(theirs, termios.TCOOFF)  # Ctrl-S

    async def story(lab: Lab) -> None:
        with await lab.client() as stopped, await lab.client() as other:
            await stopped.run(1, "events", "--since=", fds=(null, theirs, theirs))
            for number in range(2000):
                lab.daemon.events.emit("problem", what=f"{number} " + "x" * 200)
                await asyncio.sleep(0)
            await other.ask(1, "version")
            assert (await other.reply())[1] == frames.OK
            # Ctrl-C ends it all the same, though nothing can be written.
            await stopped.ask(0, "signal", id=1, signal=SIGINT)
            assert await stopped.reply() == (1, frames.OK, 130)
            await holds(lambda: not threads())

    run(tmp_path, story)


def test_a_pipe_that_nobody_reads_stops_nobody_else(tmp_path: Path, null: int) -> None:
    (tmp_path / "web.cfg").write_text(CONFIG)
    read, write = os.pipe()

    async def story(lab: Lab) -> None:
        before = len(os.listdir("/proc/self/fd"))
        with await lab.client() as deaf, await lab.client() as other:
            argv = ("create", "web.cfg", "--dryrun", "--count", "500")
            await deaf.run(1, *argv, fds=(null, write, null), cwd=str(tmp_path))
            await other.ask(1, "version")
            assert (await other.reply())[1] == frames.OK
            # Once somebody reads, all of it comes, and only then the command is done.
            shown = await asyncio.to_thread(os.read, read, 1)
            while shown.count(b'"name"') < 500 or not shown.endswith(b"\n]\n"):
                shown += await asyncio.to_thread(os.read, read, 65536)
            assert await deaf.reply() == (1, frames.OK, 0)
            # Nor is anything kept of one who hangs up.
            await deaf.run(2, *argv, fds=(null, write, null), cwd=str(tmp_path))
            await holds(lambda: "outlet" in threads())
        await holds(lambda: not threads() and not lab.server.connections)
        await holds(lambda: len(os.listdir("/proc/self/fd")) == before)

    run(tmp_path, story)
    os.close(read)
    os.close(write)


def test_a_verb_in_a_thread_does_not_wait_for_a_reader(
    tmp_path: Path, null: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all threads of that kind were soon taken."""
    done = threading.Event()

    def talkative(call: Invocation) -> int:
        for number in range(10000):
            call.print(f"{number:0100}")
        done.set()
        return 0

    monkeypatch.setattr(info, "run", talkative)
    read, write = os.pipe()

    async def story(lab: Lab) -> None:
        with await lab.client() as deaf:
            await deaf.run(1, "info", fds=(null, write, null))
            await holds(done.is_set)
            await deaf.ask(0, "signal", id=1, signal=SIGINT)
            assert await deaf.reply() == (1, frames.OK, 130)

    run(tmp_path, story)
    os.close(read)
    os.close(write)


def test_output_is_bounded(null: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()

    async def story() -> None:
        output = Output(write)
        for _ in range(streams.OUTPUT_MAX // 65536 + 1):
            output.write("x" * 65536)
        with pytest.raises(OSError, match="the output is not read"):
            output.write("x")
        monkeypatch.setattr(streams, "OUTPUTS_MAX", 0)
        small = Output(null)
        small.write("others still have a little room")
        await small.drain()
        small.close()
        output.close()
        await holds(lambda: not threads())
        assert Output._all == 0
        with pytest.raises(ValueError, match="closed"):
            output.write("x")

    asyncio.run(story())
    os.close(read)
    os.close(write)


def test_output_that_fails_says_so(null: int) -> None:
    read, write = os.pipe()
    os.close(read)
    only_read = os.open(os.devnull, os.O_RDONLY)

    async def story() -> None:
        for fd, kind in ((write, BrokenPipeError), (only_read, OSError)):
            output = Output(fd)
            output.write("x")
            with pytest.raises(kind):
                await output.drain()
            with pytest.raises(kind):
                output.write("x")
            output.close()
            output.join()
        assert Output._all == 0

    asyncio.run(story())
    os.close(write)
    os.close(only_read)

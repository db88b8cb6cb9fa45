"""Commands of clients that do not read what they are told: nobody else waits for them."""

from __future__ import annotations

import asyncio
import gc
import os
import pty
import select
import termios
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from chaosd_peer import PATIENCE, Lab, holds, run

from chaos import frames
from chaos.daemon import command, core, guests, streams
from chaos.daemon.core import WAIT_THREADS
from chaos.daemon.streams import Output
from chaos.verbs import destroy, info, shutdown
from chaos.verbs import list as lister
from xenctypes.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chaos.invocation import Invocation

SIGINT, SIGTERM = 2, 15
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
        gc.collect()  # what an earlier test that failed has left is not to go in between
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


@pytest.mark.parametrize("verb", ["info", "events"])
def test_a_signal_that_comes_with_the_command_ends_it(
    tmp_path: Path, null: int, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """In a thread and on the loop, which may have been busy when both were sent."""

    def checking(call: Invocation) -> int:
        call.check()
        return 0

    monkeypatch.setattr(info, "run", checking)

    async def story(lab: Lab) -> None:
        with await lab.client() as client:
            signal = frames.pack_request(0, "signal", {"id": 1, "signal": SIGTERM})
            await client.run(1, verb, fds=(null, null, null), more=signal)
            assert await client.reply() == (1, frames.OK, 128 + SIGTERM)

    run(tmp_path, story)


class Waiting:
    """A verb that waits for a guest: begun, and ended once it was told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.ended = threading.Semaphore(0), threading.Semaphore(0)
        self.timeouts: list[float | None] = []
        monkeypatch.setattr(shutdown, "run", self.run)

    def run(self, call: Invocation) -> int:
        self.timeouts.append(call.args.timeout)
        self.begun.release()
        select.select([call.cancel], [], [])
        self.ended.release()
        raise KeyboardInterrupt

    async def all(self, semaphore: threading.Semaphore, count: int) -> None:
        for _ in range(count):
            assert await asyncio.to_thread(semaphore.acquire, timeout=PATIENCE)


def test_whoever_waits_for_guests_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verb = Waiting(monkeypatch)

    async def story(lab: Lab) -> None:
        with await lab.client() as patient:
            for ident in range(1, WAIT_THREADS + 1):
                await patient.ask(ident, "shutdown", domains=["web"], wait=True)
            await verb.all(verb.begun, WAIT_THREADS)
            assert set(verb.timeouts) == {3600.0}
            for run_in in (lab.daemon.in_thread, lab.daemon.in_verb_thread):
                assert await asyncio.wait_for(run_in(lambda *_: 7), PATIENCE) == 7
            await patient.ask(0, "cancel", id=1)
            assert (await patient.reply())[:2] == (1, frames.ERROR)
            await verb.all(verb.ended, 1)
        await verb.all(verb.ended, WAIT_THREADS - 1)  # a hangup ends them
        await holds(lambda: not lab.daemon._calls)
        with await lab.client() as other:
            await other.ask(1, "shutdown", domains=["web"], wait=True, timeout=5)
            await verb.all(verb.begun, 1)
            assert verb.timeouts[-1] == 5
            await lab.server.close()  # and so does the daemon's end
            await lab.daemon.end()
        assert not lab.daemon.stuck

    run(tmp_path, story)


def test_to_look_for_an_unknown_domain_holds_up_nobody(
    tmp_path: Path, null: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are read for it, and what is left of domains is reaped."""
    begun, go = threading.Semaphore(0), threading.Event()

    def find(_host: Any, _names: Any, wanted: str) -> Any:
        begun.release()
        assert go.wait(PATIENCE)
        raise StateError(f'no domain "{wanted}"')

    monkeypatch.setattr(guests, "find_domain", find)
    methods = ("wait", "pause", "logs", "console.attach", "rename")
    verbs = ("wait", "console", "logs")

    async def story(lab: Lab) -> None:
        with await lab.client() as client, await lab.client() as other:
            for ident, method in enumerate(methods, 1):
                await client.ask(ident, method, domain="nosuch", name="x")
            for ident, verb in enumerate(verbs, 11):
                await client.run(ident, verb, "nosuch", fds=(null, null, null))
            for _ in range(len(methods) + len(verbs)):
                assert await asyncio.to_thread(begun.acquire, timeout=PATIENCE)
            await other.ask(1, "version")
            assert (await other.reply())[1] == frames.OK
            go.set()
            for _ in range(len(methods) + len(verbs)):
                reply = await client.reply()
                assert reply.value == 1 or reply.value["message"] == 'no domain "nosuch"'

    run(tmp_path, story)


def test_a_thread_that_does_not_end_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "CLOSE_SECONDS", 0.01)
    go = threading.Event()

    async def story(lab: Lab) -> None:
        stuck = asyncio.ensure_future(lab.daemon.in_thread(lambda *_: go.wait()))
        await asyncio.sleep(0)
        await lab.daemon.end()
        assert lab.daemon.stuck
        assert "1 threads did not end" in lab.daemon.lines[-1]
        go.set()
        await stuck

    run(tmp_path, story)


def test_who_changes_something_is_logged_however_it_is_written(
    tmp_path: Path, null: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb in (destroy, lister):
        monkeypatch.setattr(verb, "run", lambda _call: 0)

    async def story(lab: Lab) -> None:
        me = f"user {os.getuid()}, process {os.getpid()}: chaos"
        with await lab.client() as client:
            for argv, said in (
                (["-v", "destroy", "-a"], ["destroy ['-a']"]),
                (["-v"] * 100 + ["destroy", "-a"], ["destroy ['-a']"]),
                (["pool", "--json", "drain", "x"], ["pool drain ['--json', 'drain', 'x']"]),
                (["logs", "-f", "web"], ["logs ['-f', 'web']"]),
                (["console", "web"], ["console ['web']"]),
                (["create", "/none.cfg"], ["create ['/none.cfg']"]),
                (["create", "-q", "/none.cfg"], ["create ['-q', '/none.cfg']"]),
                (["destroy", "x" * 1000], [f"destroy ['{'x' * 198}..."]),
                (["pool", "--json"], []),
                (["list"], []),
            ):
                lab.daemon.lines.clear()
                await client.run(1, *argv, fds=(null, null, null))
                assert (await client.reply()) is not None
                assert lab.daemon.lines == [f"{me} {line}" for line in said]
            lab.daemon.lines.clear()
            await client.ask(1, "logs", domain="web")
            await client.reply()
            assert "logs {'domain': 'web'}" in lab.daemon.lines[0]

    run(tmp_path, story)


def test_a_directory_that_is_another_here_is_the_client_s_business(
    tmp_path: Path, null: int
) -> None:
    """Of a client with mounts of its own: its files are not those that the paths name here."""
    config = "/none.cfg"
    other = tmp_path / "other"
    other.mkdir()

    async def story(lab: Lab) -> None:
        async with asyncio.timeout(PATIENCE):
            with await lab.client() as client:
                for words in (["create", config], ["-v", "create", config]):
                    for said, kind in ((tmp_path, frames.EXEC), (other, frames.OK)):
                        await client.run(
                            1, *words, fds=(null, null, null), cwd=str(other), said=str(said)
                        )
                        reply = await client.reply()
                        assert reply is not None
                        assert reply.kind == kind

    run(tmp_path, story)


def test_descriptors_are_closed_where_no_thread_can_be(
    tmp_path: Path, null: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()

    class Refused:
        def __init__(self, **_: object) -> None:
            pass

        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    async def story(lab: Lab) -> None:
        with await lab.client() as client:
            monkeypatch.setattr(command, "threading", SimpleNamespace(Thread=Refused))
            await client.run(1, "pool", "none", fds=(write, null, null))
            os.close(write)
            assert (await client.reply()) is not None
            os.set_blocking(read, False)
            assert os.read(read, 1) == b""  # the end, and not EAGAIN

    run(tmp_path, story)
    os.close(read)


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


def test_progress_over_the_socket_ends_with_the_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    calls: list[Invocation] = []

    def verb(call: Invocation) -> int:
        for number in range(3):
            call.report(f"web-{number}", number + 1, 3)
        calls.append(call)
        assert go.wait(PATIENCE)
        call.report("late", 9, 9)
        call.print_json([])
        return 0

    monkeypatch.setattr(destroy, "run", verb)

    async def story(lab: Lab) -> None:
        with await lab.client() as client:
            await client.ask(1, "destroy", domains=["web"], progress=True)
            for number in range(3):
                value = {"what": f"web-{number}", "done": number + 1, "total": 3}
                assert await client.reply() == (1, frames.PROGRESS, value)
            await client.ask(2, "cancel", id=1)
            replies = [await client.reply(), await client.reply()]
            assert {(each[0], each[1]) for each in replies if each} == {(1, 1), (2, 0)}
            go.set()  # what it says from now on is of no request
            await client.ask(3, "destroy", domains=["web"])
            assert await client.reply() == (3, frames.OK, [])
            await client.ask(4, "destroy", domains=["web"], progress=1)
            reply = await client.reply()
            assert reply is not None
            assert reply.value["message"] == 'the parameter "progress" is no bool'
            await client.ask(5, "list", progress=True)
            reply = await client.reply()
            assert reply is not None
            assert reply.value["message"] == 'list has no parameter "progress"'

    run(tmp_path, story)

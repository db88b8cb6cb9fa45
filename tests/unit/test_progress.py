"""A bar for what takes longer than a second, on a terminal, wherever the verb runs."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pty
import re
import select
import signal
import threading
import time
from argparse import Namespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from chaosd_peer import PATIENCE, holds, run

from chaos import frames, progress
from chaos.cli import verb_parser
from chaos.invocation import Invocation
from chaos.signals import ENDING
from chaos.verbs import destroy, shutdown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chaosd_peer import Lab

    from chaos.host import Host
    from chaos.registry import Registry

SIGINT = 2


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    yield ours, theirs
    for fd in (ours, theirs):
        os.close(fd)


def shown(ours: int, until: bytes = b"") -> bytes:
    """What a terminal shows, up to a text or to now."""
    seen = b""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(BlockingIOError):
            seen += os.read(ours, 65536)
            continue
        if until in seen:
            return seen
        assert time.monotonic() < deadline, seen
        select.select([ours], [], [], 0.1)


def call_of(stream: Any, **more: Any) -> Invocation:
    args = Namespace(quiet=False)
    call = Invocation(args, cast("Host", None), cast("Registry", None), stderr=stream, **more)
    call.environ = {"TERM": "xterm", "COLUMNS": "80"}
    return call


def test_a_bar_appears_though_nothing_is_done_and_goes_away(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    ours, theirs = terminal
    told: list[Any] = []
    with open(theirs, "w", encoding="utf-8", closefd=False) as stream:
        call = call_of(stream, report=lambda *values: told.append(values))
        with call.progress("destroying", 20) as report:
            assert b"0/20" in shown(ours, b"0/20")
            for number in range(1, 21):
                report(f"web-{number}", number, 20)
            shown(ours, b"20/20")
        assert shown(ours).endswith(b"\x1b[2K")  # it leaves no trace
    assert told[::19] == [("web-1", 1, 20), ("web-20", 20, 20)]
    assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer)]


def test_no_bar_where_none_is_wanted(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On no terminal, with -q, for one thing, or in less than a second."""
    ours, theirs = terminal
    plain = io.StringIO()
    with open(theirs, "w", encoding="utf-8", closefd=False) as stream:
        quiet, one = call_of(stream), call_of(stream)
        quiet.args.quiet = True
        monkeypatch.setattr(progress, "PATIENCE", 60.0)
        with call_of(stream).progress("destroying", 2) as report:
            report("web", 1, 2)
        monkeypatch.setattr(progress, "PATIENCE", 0.0)
        for call, total in ((call_of(plain), 2), (quiet, 2), (one, 1), (one, 0)):
            with call.progress("destroying", total) as report:
                assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
                report("web", 1, total)
    assert plain.getvalue() == ""
    assert shown(ours) == b""


def test_signals_that_are_held_back_are_not_taken_by_the_bar(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that did not hold them would take them for the one that does."""
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    ours, theirs = terminal
    wanted = sum(1 << number - 1 for number in ENDING)
    with (
        open(theirs, "w", encoding="utf-8", closefd=False) as stream,
        call_of(stream).progress("destroying", 20),
    ):
        shown(ours, b"0/20")
        drawing: int | None = None
        while drawing is None:  # rich begins with it once it has shown something
            os.sched_yield()
            for thread in threading.enumerate():
                if "Refresh" in type(thread).__name__:
                    drawing = thread.native_id
        with open(f"/proc/self/task/{drawing}/status", encoding="ascii") as status:
            blocked = re.search(r"SigBlk:\t(\w+)", status.read())
        assert blocked is not None
        assert int(blocked[1], 16) & wanted == wanted
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(ENDING)


@pytest.mark.parametrize(("module", "name"), [(destroy, "destroy"), (shutdown, "shutdown")])
def test_verbs_for_many_take_quiet(module: Any, name: str) -> None:
    assert verb_parser(name, module).parse_args(["-a", "-q"]).quiet
    assert not verb_parser(name, module).parse_args(["-a"]).quiet


def test_a_verb_in_a_thread_of_the_daemon_has_its_bar(
    tmp_path: Path, terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    ours, theirs = terminal
    steps, begun = threading.Semaphore(0), threading.Semaphore(0)

    def many(call: Invocation) -> int:
        with call.progress("destroying", 20) as told:
            begun.release()
            for number in range(20):
                assert steps.acquire(timeout=PATIENCE)
                call.check()
                told(f"web-{number}", number + 1, 20)
        return 0

    monkeypatch.setattr(destroy, "run", many)

    async def see(text: bytes) -> bytes:
        return await asyncio.to_thread(shown, ours, text)

    async def story(lab: Lab) -> None:
        with await lab.client() as client:
            await client.run(1, "destroy", "-a", fds=(theirs, theirs, theirs))
            await see(b"0/20")
            steps.release(20)
            assert await client.reply() == (1, frames.OK, 0)
            assert (await see(b"20/20")).endswith(b"\x1b[2K")
            # Ctrl-C in the middle of it.
            await client.run(2, "destroy", "-a", fds=(theirs, theirs, theirs))
            steps.release(7)
            await see(b"7/20")
            await client.ask(0, "signal", id=2, signal=SIGINT)
            await holds(lambda: lab.daemon._calls)
            steps.release(1)
            assert await client.reply() == (2, frames.OK, 130)
            for _ in range(2):
                begun.acquire()
            # Quietly; and over the protocol, where there is no terminal.
            await client.run(3, "destroy", "-qa", fds=(theirs, theirs, theirs))
            await client.ask(4, "destroy", all=True)
            for _ in range(2):
                assert await asyncio.to_thread(begun.acquire, timeout=PATIENCE)
            assert not [t for t in threading.enumerate() if t.name == "bar"]
            steps.release(40)
            assert {(await client.reply() or ())[:2] for _ in range(2)} == {(3, 0), (4, 0)}

    run(tmp_path, story)

"""The daemon's end of a shell maker, which is a process that plays one here."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from chaos.daemon import workers
from chaos.daemon.maker import MESSAGE_MAX
from chaos.daemon.workers import MakerDied, Worker
from xenctypes.errors import ConfigError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine, Iterator

PATIENCE = 30.0
MAKER = """
import msgpack, os, signal, socket, sys, time
channel = socket.socket(fileno=int(sys.argv[1]))
channel.send(msgpack.packb({"ok": os.getpid()}))
channel.send(msgpack.packb({"ok": "ready"}))
while message := channel.recv(1 << 20):
    request = msgpack.unpackb(message)
    if request["do"] == "close":
        channel.close()
        time.sleep(60)
    if request["do"] == "hang":
        time.sleep(60)
    if request["do"] == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if request["tell"]:
        for step in ("one", "two"):
            channel.send(msgpack.packb({"done": step}))
    channel.send(msgpack.packb({"ok": request["do"]}))
"""


class Template:
    """Its makers are a script."""

    def __init__(self, script: str) -> None:
        self.script = script
        self.given_up: list[int] = []

    def make(self, channel: socket.socket) -> int:
        os.set_inheritable(channel.fileno(), True)
        words = [sys.executable, "-P", "-c", self.script, str(channel.fileno())]
        self.pid = os.posix_spawn(words[0], words, os.environ)

        return 42

    def give_up(self, pid: int) -> None:
        self.given_up.append(pid)


class Peer:
    """A worker, and what it said of itself."""

    def __init__(self, script: str = MAKER) -> None:
        self.ended = asyncio.Event()
        self.template = Template(script)
        self.worker = Worker(self.template, lambda _: self.ended.set(), lambda: None)

    def ask(self, what: str, **more: Any) -> asyncio.Future[Any]:
        urgent = more.pop("urgent", False)
        return asyncio.ensure_future(
            asyncio.wait_for(self.worker.ask({"do": what, **more}, urgent=urgent), PATIENCE)
        )


@contextmanager
def maker(script: str = MAKER) -> Iterator[Peer]:
    peer = Peer(script)
    try:
        yield peer
    finally:
        peer.worker.end("over")
    assert peer.worker.pid == 0 or peer.worker.status is not None
    with pytest.raises(ChildProcessError):
        os.waitpid(peer.worker.pid or -1, os.WNOHANG)  # nothing is left of it


@pytest.fixture
def run() -> Callable[[Callable[[Peer], Coroutine[Any, Any, None]]], None]:
    def run(story: Callable[[Peer], Coroutine[Any, Any, None]]) -> None:
        async def tell() -> None:
            with maker() as peer:
                await story(peer)

        asyncio.run(tell())

    return run


def test_urgent_jobs_come_first_and_in_their_order(run: Any) -> None:
    async def story(peer: Peer) -> None:
        done: list[str] = []
        jobs = []
        for what in ("a", "B", "b", "C", "D"):
            job = peer.ask(what, urgent=what.isupper())
            job.add_done_callback(lambda job: done.append(job.result()))
            jobs.append(job)
        await asyncio.gather(*jobs)
        assert done == ["B", "C", "D", "a", "b"]

    run(story)


def test_a_request_that_is_too_long_fails_alone(run: Any) -> None:
    async def story(peer: Peer) -> None:
        with pytest.raises(ConfigError, match="too long for a shell maker"):
            await peer.ask("make", data="x" * MESSAGE_MAX)
        assert await peer.ask("next") == "next"
        # The same where the kernel takes less than that.
        peer.worker._socket.setsockopt(workers.socket.SOL_SOCKET, workers.socket.SO_SNDBUF, 4096)
        jobs = [peer.ask("make", data="x" * 100000), peer.ask("last")]
        with pytest.raises(ConfigError, match="too long for a shell maker"):
            await jobs[0]
        assert await jobs[1] == "last"

    run(story)


def test_steps_are_told_to_whoever_wants_to_hear(run: Any) -> None:
    async def story(peer: Peer) -> None:
        told: list[str] = []
        first = peer.worker.ask({"do": "make"}, told=told.append)
        second = peer.worker.ask({"do": "load"})
        assert await asyncio.wait_for(first, PATIENCE) == "make"
        assert told == ["one", "two"]
        assert await asyncio.wait_for(second, PATIENCE) == "load"
        assert told == ["one", "two"]

    run(story)


@pytest.mark.parametrize(
    ("how", "said"), [("die", "it died of SIGSEGV"), ("close", "it closed its channel")]
)
def test_how_a_maker_ended_is_awaited_and_holds_up_nobody(
    run: Any, monkeypatch: pytest.MonkeyPatch, how: str, said: str
) -> None:
    monkeypatch.setattr(workers, "END_PATIENCE", 0.2 if how == "close" else PATIENCE)

    async def story(peer: Peer) -> None:
        job = peer.ask(how)
        turns = 0
        while not job.done():
            await asyncio.sleep(0)
            if not peer.worker.ready and not peer.ended.is_set():
                assert not peer.worker.idle
                turns += 1
        with pytest.raises(MakerDied, match=said):
            await job
        assert turns  # others were served between the end of its channel and its own
        assert peer.ended.is_set()
        with pytest.raises(MakerDied):
            await peer.ask("more")

    run(story)


def test_a_maker_that_does_not_start_takes_its_template_along() -> None:
    async def story() -> None:
        for script in ("", "import sys, socket, time; time.sleep(0.05)"):
            peer = Peer(script)
            job = peer.ask("make")
            with pytest.raises(MakerDied, match="it did not start"):
                await job
            assert peer.template.given_up == [42]
            assert peer.ended.is_set()
            await asyncio.to_thread(os.waitpid, peer.template.pid, 0)  # the worker never knew it

    asyncio.run(story())


def test_a_maker_that_cannot_be_forked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(Template, "make", fail)

    async def story() -> None:
        peer = Peer()
        with pytest.raises(MakerDied, match="it cannot be started: Resource temporarily"):
            await peer.ask("make")
        peer.worker.end("over")  # once is enough
        assert peer.ended.is_set()

    asyncio.run(story())


def test_a_maker_that_hangs_is_killed_and_reaped(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(peer: Peer) -> None:
        assert await peer.ask("make") == "make"
        monkeypatch.setattr(workers, "PATIENCE", 0.05)
        with pytest.raises(MakerDied, match="it gave no answer"):
            await peer.ask("hang")
        loop = asyncio.get_running_loop()
        while peer.worker.status is None:
            await loop.run_in_executor(None, lambda: None)
        assert os.WTERMSIG(peer.worker.status) == 9

    run(story)

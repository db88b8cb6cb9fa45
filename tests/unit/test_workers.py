"""The daemon's end of a shell maker, which is a process that plays one here."""

from __future__ import annotations

import asyncio
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from chaos.daemon import workers
from chaos.daemon.maker import MESSAGE_MAX
from chaos.daemon.workers import MakerDied, Worker
from xenctypes.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

PATIENCE = 30.0
MAKER = """
import msgpack, os, signal, socket, sys, time
channel = socket.socket(fileno=int(sys.argv[3]))
channel.send(msgpack.packb({"ok": None}))
while message := channel.recv(1 << 20):
    request = msgpack.unpackb(message)
    if request["do"] == "close":
        channel.close()
        time.sleep(60)
    if request["do"] == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    channel.send(msgpack.packb({"ok": request["do"]}))
"""


class Peer:
    """A worker, and what it said of itself."""

    def __init__(self, path: str) -> None:
        self.ended = asyncio.Event()
        self.worker = Worker(path, lambda _: self.ended.set(), lambda: None)

    def ask(self, what: str, **more: Any) -> asyncio.Future[Any]:
        urgent = more.pop("urgent", False)
        return asyncio.ensure_future(
            asyncio.wait_for(self.worker.ask({"do": what, **more}, urgent=urgent), PATIENCE)
        )


@contextmanager
def maker(path: str) -> Iterator[Peer]:
    peer = Peer(path)
    try:
        yield peer
    finally:
        peer.worker.end("over")


@pytest.fixture
def run(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Peer], Coroutine[Any, Any, None]]], None]:
    monkeypatch.setattr(workers, "MAKER", (sys.executable, "-P", "-c", MAKER))

    def run(story: Callable[[Peer], Coroutine[Any, Any, None]]) -> None:
        async def tell() -> None:
            with maker(str(tmp_path)) as peer:
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


@pytest.mark.parametrize(
    ("how", "said"), [("die", "it died of SIGSEGV"), ("close", "it closed its channel")]
)
def test_how_a_maker_ended_is_awaited_and_holds_up_nobody(
    run: Any, monkeypatch: pytest.MonkeyPatch, how: str, said: str
) -> None:
    monkeypatch.setattr(workers, "END_PATIENCE", 0.2 if how == "close" else PATIENCE)

    async def story(peer: Peer) -> None:
        loop = asyncio.get_running_loop()
        job = peer.ask(how)
        longest = 0.0
        last = loop.time()
        while not job.done():
            await asyncio.sleep(0)
            longest, last = max(longest, loop.time() - last), loop.time()
            if not peer.worker.ready and not peer.ended.is_set():
                assert not peer.worker.idle
        with pytest.raises(MakerDied, match=said):
            await job
        assert longest < 0.15
        assert peer.ended.is_set()
        with pytest.raises(MakerDied):
            await peer.ask("more")

    run(story)

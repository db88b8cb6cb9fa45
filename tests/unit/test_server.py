"""chaosd's socket: who may use it, how much of it, and what its end waits for."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from chaosd_peer import PATIENCE, Lab, holds, run

from chaos import frames
from chaos.daemon import batches, core, server
from chaos.daemon.guests import Guest
from chaos.daemon.rights import Peer
from chaos.daemon.server import NOBODY, listen
from chaos.domconfig import DomainConfig
from chaos.registry import RUNNING, Entry, Record

if TYPE_CHECKING:
    from pathlib import Path


def test_a_slow_reader_is_cut_off_and_others_do_not_notice(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        with await lab.client() as deaf, await lab.client() as other:

            async def flood() -> None:
                ident = 0
                while True:
                    requests = []
                    for _ in range(1000):
                        ident += 1
                        requests.append(frames.pack_request(ident, "m" * 64, {}))
                    await deaf.send(b"".join(requests))

            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                await asyncio.wait_for(flood(), PATIENCE)
            assert [line for line in lab.daemon.lines if "does not read: cut off" in line]
            await other.ask(1, "version")
            assert (await other.reply())[1] == frames.OK

    run(tmp_path, story)


def test_requests_in_flight_are_bounded(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        with await lab.client() as client:
            for ident in range(1, 5):
                await client.ask(ident, "events")
            reply = await client.reply()
            assert (reply.ident, reply.kind) == (4, frames.ERROR)
            assert reply.value["message"] == "more than 3 requests in flight"
            await client.ask(9, "version")
            assert (await client.reply()).ident == 9  # too many as well
            lab.daemon.events.close()
            assert {(await client.reply())[:2] for _ in range(3)} == {(n, 0) for n in (1, 2, 3)}
            await client.ask(10, "version")
            assert (await client.reply())[:2] == (10, frames.OK)
            await client.ask(11, "events")
            await client.ask(11, "version")
            reply = await client.reply()
            assert (reply.ident, reply.value["message"]) == (0, "request 11 is still in flight")
            assert await client.reply() is None

    run(tmp_path, story, requests=3)


def test_clients_are_bounded(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        clients = [await lab.client() for _ in range(2)]
        for client in clients:
            await client.ask(1, "version")
            assert (await client.reply())[1] == frames.OK
        with await lab.client() as third:
            reply = await third.reply()
            assert (reply.ident, reply.kind) == (0, frames.ERROR)
            assert reply.value["message"] == "more than 2 clients are connected"
            assert await third.reply() is None
        clients.pop().sock.close()
        await holds(lambda: len(lab.server.connections) == 1)
        with await lab.client() as fourth:
            await fourth.ask(1, "version")
            assert (await fourth.reply())[1] == frames.OK
        clients.pop().sock.close()

    run(tmp_path, story, clients=2)


def test_a_request_with_the_id_0_gets_no_reply(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        with await lab.client() as client:
            for method in ("version", "nothing", "events", "events", "cancel"):
                await client.ask(0, method)
            lab.daemon.events.emit("problem", what="x")
            await client.ask(1, "version")
            assert (await client.reply())[:2] == (1, frames.OK)

    run(tmp_path, story)


def test_without_the_group_the_socket_is_root_s_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(lab: Lab) -> None:
        assert lab.server.gid == NOBODY
        assert stat.S_IMODE(os.stat(lab.path).st_mode) == 0o600
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        for gid, groups in ((0, ()), (65534, (0, 4242)), (4242, ())):
            assert not lab.server._admitted(Peer(1, 65534, gid, groups))
        assert lab.server._admitted(Peer(1, 0, 0, ()))
        lab.server.gid = 4242
        assert lab.server._admitted(Peer(1, 65534, 65534, (0, 4242)))
        assert not lab.server._admitted(Peer(1, 65534, 65534, (0,)))

    run(tmp_path, story)
    listener, gid = listen(str(tmp_path / "other"), "no-such-group-as-this")
    listener.close()
    assert gid == NOBODY


def test_what_was_gathered_is_done_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what comes behind a guest for whose record there is no room."""
    monkeypatch.setattr(batches, "DELAY", 3600.0)
    monkeypatch.setattr(batches, "LATEST", 3600.0)
    write, told = Entry.write, []

    def full(entry: Entry, record: Record) -> None:
        if record.name == "web-1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(entry, record)

    monkeypatch.setattr(Entry, "write", full)
    monkeypatch.setattr(core, "announce", lambda *what: told.append(what[2:]))

    async def story(lab: Lab) -> None:
        daemon = lab.daemon
        monkeypatch.setattr(daemon.pool, "close", partial(asyncio.sleep, 0))
        daemon.beside_xenstored = True
        uuids = [f"00000000-0000-4000-8000-00000000000{number}" for number in (1, 2)]
        for domid, uuid in enumerate(uuids, 1):
            record = Record(uuid, f"web-{domid}", RUNNING, domid, noxs=True)
            daemon.names.reserve(record).close()
            guest = Guest(record, DomainConfig(name=record.name, memory=4))
            guest.ready_ms = 1.5
            daemon.guests.add(guest)
            daemon.write_ready(guest)
            daemon.tell_the_bus(guest, [])
        await asyncio.sleep(0)
        await daemon.close()
        assert told == [(1, uuids[0]), (2, uuids[1])]
        first, second = (daemon.names.read(uuid) for uuid in uuids)
        assert first is not None
        assert second is not None
        assert (first.ready_ms, second.ready_ms) == (None, 1.5)
        assert daemon.lines == []

    run(tmp_path, story)


@pytest.mark.parametrize("patient", [True, False])
def test_the_end_waits_for_what_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    if not patient:
        monkeypatch.setattr(server, "CLOSE_SECONDS", 0.01)

    async def story(lab: Lab) -> None:
        begun, go, taken_back = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def method(*_: Any) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                await go.wait()
                taken_back.set()

        lab.server.calls._methods["rename"] = method
        with await lab.client() as client:
            await client.ask(1, "rename")
            await asyncio.wait_for(begun.wait(), PATIENCE)
            closing = asyncio.ensure_future(lab.server.close())
            assert await client.reply() is None
            if patient:
                assert not closing.done()
                go.set()
            await closing
            assert taken_back.is_set() == patient
            assert patient != bool([line for line in lab.daemon.lines if "did not end" in line])
            go.set()
            await taken_back.wait()
        with socket.socket(socket.AF_UNIX) as late:
            assert late.connect_ex(lab.path)

    run(tmp_path, story)

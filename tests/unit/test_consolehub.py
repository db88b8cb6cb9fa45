"""The console hub on pages and channels of our own making: a guest may write anything."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
import tracemalloc
from struct import pack_into
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from console_guests import Guest, Lab, holds, run, until
from hypothesis import given, settings
from hypothesis import strategies as st

from chaos.console import IN_SIZE, INDEXES_AT, OUT_SIZE
from chaos.consolelog import LOG_MAX, ConsoleLog
from chaos.daemon import consoles
from chaos.daemon.attachment import BACKLOG_MAX, Attachment
from chaos.daemon.consoles import BURST, RATE
from xenctypes.errors import StateError
from xenctypes.handle import PROT_WRITE, Mapping, Resource
from xenctypes.public import EVTCHNSTAT_interdomain

if TYPE_CHECKING:
    from pathlib import Path


def test_what_nobody_watches_is_logged(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        web, mail = lab.guest("web", 1), lab.guest("mail", 2)
        web.say(b"I am web\n")
        mail.say(b"I am mail\n")
        await web.logged(b"I am web\n")
        await mail.logged(b"I am mail\n")
        assert web.log.read() == b"I am web\n"
        for number in range(20):
            text = b"%03d\n" % number
            assert web.say(text * 1000) == OUT_SIZE
            await web.logged(text * (OUT_SIZE // 4))
            assert web.say(b"end\n") == 4
            await web.logged(text + b"end\n")
        assert web.room() == OUT_SIZE
        assert lab.channels.notified

    assert not run(tmp_path, story).reports


def test_many_logs_share_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "LOGS_TOTAL", 40_000)

    async def story(lab: Lab) -> None:
        web = lab.guest("web", 1)
        for size in (20_000, 5_000):  # alone, and one of four
            for number in range(30):
                text = b"%d%03d\n" % (size, number)
                web.say(text * 200)
                await web.logged(text)
            files = [path.stat().st_size for path in (tmp_path / "web").iterdir()]
            assert len(files) == 2
            assert size - 2048 < max(files) <= size
            for domid in (2, 3, 4):
                if size == 20_000:
                    lab.guest(f"guest {domid}", domid)

    run(tmp_path, story)


@pytest.mark.parametrize(("blocks", "most"), [(100, 25_600), (1 << 20, LOG_MAX), (0, LOG_MAX)])
def test_logs_leave_room_for_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, most: int
) -> None:
    """A file system of no blocks is one without a bound."""
    status = SimpleNamespace(f_blocks=blocks, f_frsize=4096)
    monkeypatch.setattr("os.statvfs", lambda _path: status)

    async def story(lab: Lab) -> None:
        lab.guest("web", 1)
        assert lab.hub._log_max() == most

    run(tmp_path, story)


def test_what_was_said_before_is_taken_too(tmp_path: Path) -> None:
    """A daemon that starts again finds guests that have gone on."""

    async def story(lab: Lab) -> None:
        lab.pages[1] = bytearray(4096)
        early = Guest(lab, "web", 1, ConsoleLog(str(tmp_path / "web")))
        early.say(b"before you came\n")
        await lab.guest("web", 1).logged(b"before you came\n")

    run(tmp_path, story)


def test_two_attachments_see_all_and_both_type(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        web = lab.guest("web", 1)
        web.say(b"one\n")
        first = lab.hub.attach("web")
        assert first.history == b"one\n"
        web.say(b"two\n")
        await web.logged(b"two\n")
        second = lab.hub.attach("web")
        assert second.history == b"one\ntwo\n"
        web.say(b"three\n")
        assert await until(first, b"three") == b"two\nthree\n"
        assert await until(second, b"three") == b"three\n"
        await first.send(b"from the first")
        await second.send(b", from the second")
        assert web.hear() == b"from the first, from the second"
        first.close()
        first.close()
        assert first.ending == "left"
        assert await first.read() == b""
        await first.send(b"lost")
        assert first.offer(b"lost") == 0
        assert web.hear() == b""
        web.say(b"four\n")
        assert await until(second, b"four") == b"four\n"

    run(tmp_path, story)


def test_input_waits_for_a_guest_that_does_not_read(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        web = lab.guest("web", 1)
        attachment = lab.hub.attach("web")
        text = os.urandom(5 * IN_SIZE)
        sending = asyncio.ensure_future(attachment.send(text))
        heard = b""
        while len(heard) < len(text):
            assert sending.done() or len(heard) <= len(text)
            await asyncio.sleep(0)
            heard += web.hear()
        assert heard == text
        await sending
        # A terminal must not wait: what there is no room for is dropped.
        assert attachment.offer(b"x" * 10000) == IN_SIZE
        assert attachment.offer(b"x" * 10000) == IN_SIZE
        assert attachment.offer(b"x" * 10000) == 0
        stuck = asyncio.ensure_future(attachment.send(b"more"))
        await asyncio.sleep(0)
        lab.hub.remove("web")
        await stuck

    run(tmp_path, story)


def test_the_last_words_are_kept(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        web = lab.guest("web", 1)
        attachment = lab.hub.attach("web")
        web.say(b"farewell\n")
        assert "web" in lab.hub
        lab.hub.remove("web")
        lab.hub.remove("web")
        assert "web" not in lab.hub
        assert web.log.read() == b"farewell\n"
        assert [part async for part in attachment] == [b"farewell\n"]
        assert attachment.ending == "dead"
        assert not lab.mapped
        with pytest.raises(StateError, match="has no console"):
            lab.hub.attach("web")
        web.say(b"from beyond")  # an event of a port that is gone
        again = lab.guest("web", 1)  # adopted anew
        await again.logged(b"from beyond")

    run(tmp_path, story)


def test_a_slow_reader_loses_the_middle(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        web = lab.guest("web", 1)
        attachment = lab.hub.attach("web")
        told = b""
        while len(told) < BURST - 8 * OUT_SIZE:  # in lines, within what the guest may say at once
            line = b"%07d\n" % len(told)
            web.say(line * (OUT_SIZE // 8))
            told += line * (OUT_SIZE // 8)
            await holds(lambda: web.room() == OUT_SIZE)
        assert await attachment.read() == told
        held = Attachment(b"", lambda data: 0, lambda data: asyncio.sleep(0), lambda _: None)
        for at in range(0, 3 * BACKLOG_MAX, 100):
            held.feed(b"%099d\n" % at)
        seen = await held.read()
        assert len(seen) < BACKLOG_MAX + 100
        assert seen.startswith(b"%099d\n" % 0)
        assert seen.endswith(b"%099d\n" % (3 * BACKLOG_MAX // 100 * 100))
        assert b" bytes lost]" in seen
        held.feed(b"fresh")
        assert await held.read() == b"fresh"

    run(tmp_path, story)


def test_a_flood_is_paid_for_by_the_guest_and_harms_no_other(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        flood, quiet = lab.guest("flood", 1), lab.guest("quiet", 2)
        stop = False

        async def flooding() -> int:
            said = 0
            while not stop:
                said += flood.say(b"flood " * 400)
                flood.kick()
                await asyncio.sleep(0)
            return said

        task = asyncio.ensure_future(flooding())
        started = time.monotonic()
        for number in range(20):
            quiet.say(b"%d, still here\n" % number)
            asked = time.monotonic()
            await quiet.logged(b"%d, still here\n" % number)
            assert time.monotonic() - asked < 2
            await asyncio.sleep(0.05)
        stop = True
        assert await task <= BURST + RATE * (time.monotonic() - started) + 2 * OUT_SIZE

    run(tmp_path, story)


def test_events_without_output_cost_too(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        storm = lab.guest("storm", 1)
        visits = 0
        unmask = lab.channels.unmask

        def counted(port: int) -> None:
            nonlocal visits
            visits += 1
            unmask(port)

        lab.channels.unmask = counted  # type: ignore[method-assign]
        end = time.monotonic() + 1
        while time.monotonic() < end:
            storm.kick()
            await asyncio.sleep(0)
        assert visits <= (BURST + RATE * (time.monotonic() - end + 1)) / 1024 + 2

    run(tmp_path, story)


index = st.integers(0, 0xFFFFFFFF)


@settings(max_examples=30)
@given(indexes=st.lists(st.tuples(index, index, index, index), max_size=5), typed=st.binary())
def test_absurd_indexes_harm_nobody(
    tmp_path_factory: pytest.TempPathFactory,
    indexes: list[tuple[int, int, int, int]],
    typed: bytes,
) -> None:
    async def story(lab: Lab) -> None:
        evil, good = lab.guest("evil", 1), lab.guest("good", 2)
        attachment = lab.hub.attach("evil")
        for number, values in enumerate(indexes):
            pack_into("@4I", evil.page, INDEXES_AT, *values)
            evil.kick()
            attachment.offer(typed)
            good.say(b"%d fine\n" % number)
            await good.logged(b"%d fine\n" % number)
        lab.hub.remove("evil")
        assert attachment.ending == "dead"

    assert not run(tmp_path_factory.mktemp("hub"), story).reports


def test_a_console_that_another_process_holds_is_taken_over_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chaos.daemon.consoles.RETRY_SECONDS", 0.01)

    async def story(lab: Lab) -> None:
        lab.channels.refuse = True
        lab.status = EVTCHNSTAT_interdomain
        web = lab.guest("web", 1)
        web.say(b"hello\n")
        await asyncio.sleep(0.05)
        assert web.log.read() == b""
        with pytest.raises(StateError, match="attached elsewhere"):
            lab.hub.attach("web")
        lab.channels.refuse = False
        await web.logged(b"hello\n")

    run(tmp_path, story)


def test_a_guest_past_its_channel_still_has_words(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        lab.channels.refuse = True
        lab.pages[1] = bytearray(4096)
        Guest(lab, "web", 1, ConsoleLog("")).say(b"panic\n")
        await lab.guest("web", 1).logged(b"panic\n")

    run(tmp_path, story)


def test_a_renamed_and_a_rekeyed_guest_log_where_they_are(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        web = lab.guest("web", 1)
        attachment = lab.hub.attach("web")
        web.say(b"one\n")
        await web.logged(b"one\n")
        (tmp_path / "web").rename(tmp_path / "other")
        lab.hub.rekey("web", "other", "other", str(tmp_path / "other"))
        lab.hub.rename("other", "another")
        web.say(b"two\n")
        await until(attachment, b"two")
        assert ConsoleLog(str(tmp_path / "other")).read() == b"one\ntwo\n"
        assert not (tmp_path / "web").exists()
        lab.hub.rename("nobody", "x")
        lab.hub.rekey("nobody", "x", "x", "")

    run(tmp_path, story)


def test_a_full_disk_is_said_once_and_attachments_go_on(tmp_path: Path) -> None:
    async def story(lab: Lab) -> None:
        web = lab.guest("web", 1)
        (tmp_path / "web/console.log").mkdir()
        attachment = lab.hub.attach("web", history=0)
        for text in (b"one\n", b"two\n"):
            web.say(text)
            assert await until(attachment, text) == text
        (tmp_path / "web/console.log").rmdir()
        (tmp_path / "web").rmdir()  # destroyed under us: nothing to say
        web.say(b"three\n")
        assert await until(attachment, b"three\n")

    assert run(tmp_path, story).reports == [
        "console of web: its log: Is a directory",
        "console of web: not logged: Is a directory",
    ]


def test_an_idle_guest_costs_little_memory(tmp_path: Path) -> None:
    count = 200

    class Memory(Resource):
        def _release(self) -> None:
            pass

    async def story(lab: Lab) -> None:
        memory = Memory()
        page = bytearray(4096)
        address = ctypes.addressof((ctypes.c_char * 4096).from_buffer(page))
        host: Any = lab.hub._host
        host.memory.map = lambda domid, frames: Mapping(
            memory, address, 4096, PROT_WRITE, lambda: None
        )
        directories = [str(tmp_path / str(number)) for number in range(count)]
        for directory in directories:
            os.mkdir(directory)
        lab.hub.add("first", "first", 9999, 1, 1, str(tmp_path))
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for domid, directory in enumerate(directories, 1):
            lab.hub.add(directory, f"guest-{domid}", domid, 1, 1, directory)
        await holds(lambda: not lab.channels.pending and not lab.hub._queue)
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        assert used / count < 3072, used / count

    run(tmp_path, story)
